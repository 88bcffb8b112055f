"""Seeded faults: for each a fast test that finds it, which `test_mutants.py` shows.

A fault replaces one piece of text, which occurs once in its file. Those that change nothing that
anybody could see do not belong here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A fault: in `file`, `new` in place of `old`; `tests`: arguments for pytest that find it."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def adjoint(name):
    """The test of a pass of `test_passes.py`: its transpose is adjoint, its tangent the slope."""
    test = "test_the_transpose_is_adjoint_and_the_tangent_the_slope"
    return (f"tests/test_passes.py::{test}[{name}]",)


def contract(*lines):
    """Checks of lines of the contract."""
    return tuple(f"tests/test_contract.py::test_contract[{line}]" for line in lines)


def some(file, words):
    """Tests of a file whose names match an expression of words."""
    return f"tests/{file}", "-k", words


PASSES, LINEAR, CPU, GPU, VARIANCE = (
    f"normjax/core/{name}.py" for name in ("passes", "linear", "cpu", "gpu", "variance")
)
PLACES, STATISTICS, RUNNING = (
    f"normjax/core/{name}.py" for name in ("sharding", "statistics", "running")
)
GROUPS, STRUCTS, SEGMENTS = (
    f"normjax/core/{name}.py" for name in ("groups", "structs", "segments")
)
CHECKS = "normjax/core/checks.py"
COMPAT = "normjax/core/compat.py"
TRACING, SEAM = "normjax/core/tracing.py", "normjax/core/seam.py"
SPATIAL, BANDS, TRANSFORMS, SPECTRAL = (
    f"normjax/methods/spectral/{name}.py" for name in ("spatial", "bands", "transforms", "method")
)
LAYERS, ACTIVATIONS = (f"normjax/propagate/{name}.py" for name in ("layers", "activations"))
BATCH, CHAIN, GHOST, GROUP, LAYER = (
    f"normjax/methods/{name}.py" for name in ("batch", "chain", "ghost", "group", "layer")
)
AFFINE, DYNAMIC, NOISE, KALMAN = (
    f"normjax/methods/{name}.py" for name in ("affine", "dynamic", "ghost_noise", "kalman")
)
DERF = "normjax/methods/derf.py"
RUNNING_NORM = "normjax/methods/running_norm.py"
LINEN, CARRY = (f"normjax/linen/{name}.py" for name in ("__init__", "carry"))
FOLDED, FOLDED_ARRAYS, FOLDED_MODELS, FOLDED_PROGRAM = (
    f"normjax/folding/{name}.py" for name in ("__init__", "arrays", "models", "program")
)
NNX, OPTIM = (f"normjax/{name}.py" for name in ("nnx", "optim"))
INTEROP = "normjax/interop.py"
BALANCE, WHITENESS, RECONSTRUCTION, DEPTH, CALLS, PROGRAMS = (
    f"normjax/analysis/{name}.py"
    for name in ("balance", "whitening", "reconstruction", "depth", "layers", "programs")
)
REGIONS = {
    name: f"normjax/analysis/geometry/{name}.py"
    for name in ("cells", "partition", "planes", "program", "rules", "subdivision")
}
BOUNDARIES, SWITCHES, JITTER, MARGINS, SMART = (
    f"normjax/analysis/geometry/{name}.py"
    for name in ("boundaries", "switches", "jitter", "margins", "initialization")
)
MATRICES, ROOTS = (f"normjax/core/{name}.py" for name in ("matrices", "roots"))
WHITENING = "normjax/methods/whitening.py"
KERNEL_NORMS, TRANSLATED = (f"normjax/methods/{name}.py" for name in ("weights", "translated"))
KERNELS = "normjax/kernels.py"

OF_PASSES = {
    "transpose of the drop doubled": Mutant(
        PASSES,
        "lambda mask, g: (keep(mask, g),)",
        "lambda mask, g: (2 * keep(mask, g),)",
        adjoint("drop"),
    ),
    "tangent of the drop not masked": Mutant(
        PASSES,
        "lambda mask, tangents: keep(mask, *tangents)",
        "lambda mask, tangents: tangents[0]",
        adjoint("drop"),
    ),
    "inputs not masked": Mutant(
        PASSES,
        "return carried(x if valid is None else _drop(x, valid)), count",
        "return carried(x), count",
        contract("BatchNorm-masks"),
    ),
    "transpose of the moments doubled": Mutant(
        PASSES,
        "keep(mask, _centre(x, mean, mask) * at(mask, slope) + at(mask, shift))",
        "keep(mask, 2 * (_centre(x, mean, mask) * at(mask, slope) + at(mask, shift)))",
        adjoint("moments"),
    ),
    "transpose of the moments without the mean's": Mutant(
        PASSES,
        "keep(mask, _centre(x, mean, mask) * at(mask, slope) + at(mask, shift))",
        "keep(mask, _centre(x, mean, mask) * at(mask, slope))",
        adjoint("moments"),
    ),
    "transpose of the mean square dropped": Mutant(
        PASSES,
        "keep(mask, _centre(x, None, mask) * at(mask, slope))",
        "keep(mask, 0 * _centre(x, None, mask) * at(mask, slope))",
        adjoint("moments, mean square"),
    ),
    "cotangent of the moments not masked": Mutant(
        PASSES,
        "return (keep(mask, _centre(x, mean, mask) * at(mask, slope) + at(mask, shift)),)",
        "return (_centre(x, mean, mask) * at(mask, slope) + at(mask, shift),)",
        adjoint("moments, mask"),
    ),
    "tangent of the variance not doubled": Mutant(
        PASSES, "dvar = 2 * average(", "dvar = average(", adjoint("moments")
    ),
    "cotangent of the mean square not masked": Mutant(
        PASSES,
        "return (keep(mask, _centre(x, None, mask) * at(mask, slope)),)",
        "return (_centre(x, None, mask) * at(mask, slope),)",
        adjoint("moments, masked mean square"),
    ),
    "tangent of the mean dropped": Mutant(
        PASSES,
        "return align(average(widen(dx), mask, n, how), dvar)",
        "return align(jnp.zeros_like(dvar), dvar)",
        adjoint("moments"),
    ),
    "variance as mean square less squared mean": Mutant(
        VARIANCE,
        "return mean, pool(square, channel_groups) / n",
        "return mean, average(jnp.square(widen(x)), mask, n, how) - jnp.square(mean)",
        contract("BatchNorm-numbers"),
    ),
    "mask forgotten in the sum of squares": Mutant(
        VARIANCE,
        "return keep(mask, jnp.square(widen(x) - centre))",
        "return jnp.square(widen(x) - centre)",
        contract("BatchNorm-masks"),
    ),
    "count ignores the mask": Mutant(
        PASSES,
        "return jnp.sum(jnp.broadcast_to(mask, shape),",
        "return jnp.sum(jnp.ones(shape, bool),",
        contract("BatchNorm-masks"),
    ),
    "sums not over the group of channels": Mutant(
        VARIANCE,
        "return pool(jnp.sum(keep(mask, a), axes, keepdims=True), channel_groups) / n",
        "return jnp.sum(keep(mask, a), axes, keepdims=True) / n",
        some("methods/test_group.py", "GroupNormTest and test_oracle"),
    ),
    "the centre's gap is forgotten": Mutant(
        VARIANCE,
        "pool(square, channel_groups) / n - jnp.square(gap), 0)",
        "pool(square, channel_groups) / n, 0)",
        some("test_variance.py", "exact_in_float32 and gpu"),
    ),
    "a masked share is trusted": Mutant(
        VARIANCE,
        "if mask is not None or in_one_kernel:",
        "if in_one_kernel:",
        some("test_variance.py", "exact_in_float32 and gpu"),
    ),
    "cancellation is not mended": Mutant(
        VARIANCE,
        "~(jnp.square(mean) <= NEAR * var)",
        "~(jnp.square(mean) <= 1e6 * var)",
        some("test_variance.py", "exact_in_float32 and zero"),
    ),
    "the loop forgets the mask": Mutant(
        VARIANCE,
        "shifted = keep(valid, widen(at(x)) - centre)",
        "shifted = widen(at(x)) - centre",
        some("test_variance.py", "exact_in_float32 and zero"),
    ),
    "the loop leaves out a block": Mutant(
        VARIANCE,
        "needed & (c[0] < blocks)",
        "needed & (c[0] < blocks - 1)",
        some("test_variance.py", "exact_in_float32 and zero"),
    ),
    "pairs of sums: one kernel forgets the first part": Mutant(
        GPU,
        "tuple(p + q for p, q in zip(a, b, strict=True))",
        "(a[0] + b[0], b[1])",
        some("test_variance.py", "exact_in_float32 and gpu"),
    ),
    "pool of channels is their mean": Mutant(
        VARIANCE,
        "parts.sum(-1, keepdims=True)",
        "parts.mean(-1, keepdims=True)",
        some("methods/test_group.py", "GroupNormTest and mask"),
    ),
    "half precision not widened": Mutant(
        VARIANCE, "return x.astype(wide(x.dtype))", "return x", contract("BatchNorm-numbers")
    ),
    "carrier not widened": Mutant(
        PASSES,
        "else Input(x, widen(x))",
        "else Input(x, x)",
        some("test_passes.py", "adds_up_wide"),
    ),
    "tangent of the inverse deviation with the wrong sign": Mutant(
        PASSES,
        "tangents: -0.5 * inverse**3",
        "tangents: 0.5 * inverse**3",
        adjoint("inverse deviation"),
    ),
    "transpose of the inverse deviation doubled": Mutant(
        PASSES,
        "g: (-0.5 * inverse**3 * g,)",
        "g: (-(inverse**3) * g,)",
        adjoint("inverse deviation"),
    ),
    "epsilon outside of the root": Mutant(
        PASSES,
        "return lax.rsqrt(var + epsilon)",
        "return 1 / (jnp.sqrt(var) + epsilon)",
        some("methods/test_batch.py", "BatchNormTest and test_vectors"),
    ),
    "transpose of the affine map doubled": Mutant(
        PASSES,
        "dx = both(*whole)[0] * whole[3]",
        "dx = 2 * both(*whole)[0] * whole[3]",
        adjoint("affine"),
    ),
    "cotangent of the affine map's mean with the wrong sign": Mutant(
        PASSES, "totals = -total * small[1]", "totals = total * small[1]", adjoint("affine")
    ),
    "cotangent of the gain not centred": Mutant(
        PASSES, "return h, h * centred\n", "return h, h * widen(x)\n", adjoint("affine")
    ),
    "tangent of the affine map without the mean's": Mutant(
        PASSES, "dz = (widen(dx) - dmean) * gain", "dz = widen(dx) * gain", adjoint("affine")
    ),
    "tangent of the affine map without the gain's": Mutant(
        PASSES, "+ centred * dgain + dbias", "+ dbias", adjoint("affine")
    ),
    "transpose of the rows doubled": Mutant(
        PASSES,
        "dx = before(*arrays)[0] * arrays[2] * arrays[3]",
        "dx = 2 * before(*arrays)[0] * arrays[2] * arrays[3]",
        adjoint("rows"),
    ),
    "cotangent of the rows' mean dropped": Mutant(
        PASSES,
        "dmean = -total[0] * inverse if total else None",
        "dmean = 0 * total[0] if total else None",
        adjoint("rows"),
    ),
    "cotangent of the rows' scale without the inverse": Mutant(
        PASSES, "slope = h * (centred * arrays[2])", "slope = h * centred", adjoint("rows")
    ),
    "tangent of the rows without the scale's": Mutant(
        PASSES,
        "dz = _plus(dz + centred * inverse * dscale, dbias)",
        "dz = _plus(dz, dbias)",
        adjoint("rows"),
    ),
    "tangent of the activation is the identity": Mutant(
        PASSES,
        "return dz if activation is None else jax.jvp(activation, (z,), (dz,))[1]",
        "return dz",
        adjoint("affine, softmax"),
    ),
    "cotangent of the activation doubled": Mutant(
        PASSES,
        "return jax.vjp(activation, z)[1](h)[0]",
        "return 2 * jax.vjp(activation, z)[1](h)[0]",
        adjoint("affine, softmax"),
    ),
    "relu lets the cotangent of negative numbers through": Mutant(
        PASSES,
        "return h * positive(lax.stop_gradient(z), zero)",
        "return h * (1 - positive(lax.stop_gradient(z), zero))",
        adjoint("affine, relu"),
    ),
}

OF_PROGRAMS = {
    "tangents of saved values dropped": Mutant(
        LINEAR,
        "    if fixed:\n",
        "    if True:\n",
        some("test_passes.py", "derivatives_are_those_of_the_formula and affine"),
    ),
    "transpose of linear maps doubled": Mutant(
        LINEAR,
        "lambda _, t: _both_ways(transpose, fun, t)",
        "lambda _, t: 2 * _both_ways(transpose, fun, t)",
        adjoint("transform, matmul, (3, 4)"),
    ),
    "axis of a batched saved array mistaken": Mutant(
        LINEAR,
        "axes = tuple(None if d is None else 0 for d in dims[:kept])",
        "axes = tuple(dims[:kept])",
        some("test_passes.py", "mapped_axis and affine and samples"),
    ),
    "plain derivatives of linear maps are not plain": Mutant(
        LINEAR,
        "    if is_plain():\n",
        "    if False:\n",
        some("test_passes.py", "switch_is_plain and transform"),
    ),
    "joint sums with a wrong sign": Mutant(
        CPU,
        "tuple(p + q for p, q in zip",
        "tuple(p - q for p, q in zip",
        some("test_sums.py", "values_of_each"),
    ),
    "sums in tiles are means": Mutant(
        CPU,
        "total = jnp.sum(lax.optimization_barrier",
        "total = jnp.mean(lax.optimization_barrier",
        some("test_sums.py", "value_is_that_of_one_sum"),
    ),
    "batched sums over the axis before": Mutant(
        CPU,
        "tuple(i + 1 for i in axes), *at_front(",
        "tuple(axes), *at_front(",
        some("test_sums.py", "does_not_see_the_mapped_array"),
    ),
    "bfloat16 truncated": Mutant(
        CPU,
        "lax.bitcast_convert_type(lax.reduce_precision(x, 8, 7), jnp.uint32)",
        "lax.bitcast_convert_type(x, jnp.uint32)",
        contract("SpectralBatchNorm, ring-gradients"),
    ),
    "the switch is not read": Mutant(
        COMPAT,
        'PLAIN = os.environ.get("NORMJAX_PLAIN", "0") not in ("", "0")',
        "PLAIN = False",
        some("test_compat.py", "with_the_switch"),
    ),
    "sums of a divided program as on one device": Mutant(
        COMPAT,
        "on(*program)",
        "on(True, program[1])",
        some("test_sums.py", "one_message or put_together"),
    ),
    "a missing internal is not told": Mutant(
        COMPAT,
        "    HAS_PRIMITIVES = False\n    _without(error, AUTODIFF)\n",
        "    HAS_PRIMITIVES = False\n",
        some("test_compat.py", "manual_axis_type"),
    ),
    "manual axes not aligned": Mutant(
        PLACES,
        "if axes - varying(a) else a",
        "if False else a",
        contract("BatchNorm-devices"),
    ),
    "arrays not placed": Mutant(
        PLACES,
        "    if spec(a) == parts:\n",
        "    if True:\n",
        some("test_situations.py", "placed_like_the_activation"),
    ),
    "train not dropped where it changes nothing": Mutant(
        TRACING,
        "train=train and known.trains",
        "train=train",
        some("test_situations.py", "test_methods_without_statistics_are_traced_once"),
    ),
    "initializers are part of the trace": Mutant(
        TRACING,
        "return dataclasses.replace(method, **changed) if changed else method",
        "return method",
        some("test_details.py", "fresh_initializers"),
    ),
    "initializers of a module count": Mutant(
        "normjax/nnx.py",
        "self._counts = without_initializers(method) if is_dataclass else method",
        "self._counts = method",
        some("test_situations.py", "made_otherwise"),
    ),
    "single values are not refused": Mutant(
        CHECKS,
        "if any(n != 1 for n in sizes):",
        "if any(n != 0 for n in sizes):",
        some("test_situations.py", "single_values_are_refused"),
    ),
    "parameters of another size are taken": Mutant(
        CHECKS,
        "if a is not None and tuple(a.shape) != sizes:",
        "if a is not None and len(a.shape) != len(sizes):",
        some("methods/test_layer.py", "rejects_input"),
    ),
    "one is no integer of a mask": Mutant(
        CHECKS,
        "else value != 0\n",
        "else value > 1\n",
        some("test_situations.py", "masks_of_numbers_that_are_no_mask and LayerNorm"),
    ),
    "bias drawn with the key of the scale": Mutant(
        STRUCTS,
        "key = None if key is None else jax.random.fold_in(key, 1)",
        "pass",
        some("methods/test_batch.py", "drawn_apart"),
    ),
}

OF_STATISTICS = {
    "merge ignores how many each counts": Mutant(
        STATISTICS,
        "mean = near + weighted / _weight(safe, near)",
        "mean = near",
        contract("BatchNorm-devices"),
    ),
    "merge without the gap between means": Mutant(
        STATISTICS,
        "_weight(count, seconds) * (seconds + _square(parts, means - mean))",
        "_weight(count, seconds) * seconds",
        contract("BatchNorm-devices"),
    ),
    "gather sends nothing": Mutant(
        STATISTICS,
        "stacked = lax.psum(jnp.where(here, message, 0), axis_name)",
        "stacked = jnp.where(here, message, 0)",
        contract("BatchNorm-devices"),
    ),
    "message in two steps without the gap": Mutant(
        STATISTICS,
        "(part[2] + _square(part, part[1] - mean))",
        "part[2]",
        some("test_details.py", "large_messages"),
    ),
    "all devices get the first group": Mutant(
        STATISTICS,
        "own = jnp.asarray(owner)[lax.axis_index(axis_name)]",
        "own = 0",
        contract("GhostBatchNorm-devices"),
    ),
    "momentum weighs the new statistics": Mutant(
        RUNNING,
        "jnp.where(valid, share * a + (1 - share) * b, a)",
        "jnp.where(valid, (1 - share) * a + share * b, a)",
        some("methods/test_batch.py", "BatchNormTest and test_vectors"),
    ),
    "running variance biased where it should not be": Mutant(
        RUNNING,
        "if method.unbiased_running_var:",
        "if not method.unbiased_running_var:",
        some("methods/test_batch.py", "BatchNormTest and test_vectors"),
    ),
    "gradients flow through the state": Mutant(
        RUNNING,
        "new = lax.stop_gradient(Moments(*(a.reshape(like.shape) for a in seen)))",
        "new = Moments(*(a.reshape(like.shape) for a in seen))",
        contract("BatchNorm-derivatives"),
    ),
    "debiased weights turned round": Mutant(
        RUNNING,
        "jnp.expm1(rate * count) / jnp.expm1(rate * (count + 1))",
        "jnp.expm1(rate * (count + 1)) / jnp.expm1(rate * count)",
        some("methods/test_batch.py", "debiased_average"),
    ),
    "cumulative average off by one": Mutant(
        RUNNING,
        "return count / (count + 1)",
        "return (count + 1) / (count + 2)",
        some("methods/test_batch.py", "cumulative_average"),
    ),
    "features without samples move": Mutant(
        RUNNING, "valid = new.count > 0", "valid = new.count >= 0", contract("BatchNorm-masks")
    ),
    "batches without samples are counted": Mutant(
        RUNNING,
        "count = state.count + jnp.any(valid).astype(state.count.dtype)",
        "count = state.count + 1",
        some("methods/test_batch.py", "empty_mask"),
    ),
    "batches with one finite moment are recorded": Mutant(
        RUNNING,
        "valid &= jnp.all(",
        "valid &= jnp.any(",
        some("methods/test_batch.py", "nonfinite_batch"),
    ),
    "parts without samples weigh": Mutant(
        RUNNING,
        "weight = jnp.expand_dims(filled, tuple",
        "weight = jnp.expand_dims(jnp.ones_like(filled), tuple",
        some("test_details.py", "empty_part"),
    ),
    "groups of devices strided": Mutant(
        GROUPS,
        "tuple(tuple(range(i, i + together)) for i in range(0, devices, together))",
        "tuple(tuple(range(i, devices, devices // together)) for i in range(devices // together))",
        contract("GhostBatchNorm-devices"),
    ),
    "hint how much to pad is the remainder": Mutant(
        GROUPS,
        "pad_and_mask(-samples % size)",
        "pad_and_mask(samples % size)",
        some("test_situations.py", "remainder_of_ghosts"),
    ),
}

OF_SPECTRA = {
    "transpose of the spectral variance not doubled": Mutant(
        SPATIAL,
        "dreal * patch.real + dimag * patch.imag, 2 * dvar",
        "dreal * patch.real + dimag * patch.imag, dvar",
        adjoint("spatial moments, half=False, masked=False"),
    ),
    "transpose of the half spectrum's variance without folds": Mutant(
        SPATIAL,
        "dx = widen(x) * slope + _unfold(folds, x, layout) * twin + patch.at * row",
        "dx = widen(x) * slope + patch.at * row",
        adjoint("spatial moments, half=True, masked=False"),
    ),
    "tangent of the spectral variance not doubled": Mutant(
        SPATIAL,
        "slope = 2 * jnp.sum(z * dx,",
        "slope = jnp.sum(z * dx,",
        adjoint("spatial moments, half=False, masked=False"),
    ),
    "imaginary mean of the half spectrum with the wrong sign": Mutant(
        SPATIAL,
        "(real, -sines / stored, origin, -2 * sines / width)",
        "(real, sines / stored, origin, 2 * sines / width)",
        some("methods/test_spectral.py", "RoutesTest and test_agree"),
    ),
    "transpose of the spatial affine map doubled": Mutant(
        SPATIAL,
        "return h * gain, slope, total",
        "return 2 * h * gain, slope, total",
        adjoint("spatial affine"),
    ),
    "transpose of the transform doubled": Mutant(
        TRANSFORMS,
        "lambda s: _synthesize(s, layout, route, once, given)",
        "lambda s: 2 * _synthesize(s, layout, route, once, given)",
        adjoint("transform, matmul, (3, 4)"),
    ),
    "transpose of the inverse transform without mirror images": Mutant(
        TRANSFORMS,
        "lambda x: _analyse(x, layout, route, images, given)",
        "lambda x: _analyse(x, layout, route, np.ones_like(images), given)",
        adjoint("inverse, matmul, (3, 4)"),
    ),
    "last frequency of even widths has a mirror image": Mutant(
        TRANSFORMS,
        "    if width % 2 == 0:\n        weights[-1] = 1\n",
        "    if width % 2 == 1:\n        weights[-1] = 1\n",
        some("methods/test_spectral.py", "RoutesTest and test_agree"),
    ),
    "merge of frequencies without the gap": Mutant(
        BANDS,
        "total(parts.count * (parts.var + gap)) / safe",
        "total(parts.count * parts.var) / safe",
        some("methods/test_spectral.py", "OracleTest and test_configurations"),
    ),
    "mirror images do not cancel": Mutant(
        BANDS,
        "mean = mean * np.array([1, 0], shares.dtype)",
        "mean = mean * np.array([1, 1], shares.dtype)",
        some("methods/test_spectral.py", "OracleTest and test_configurations"),
    ),
    "straight_through takes the derivative of the value": Mutant(
        BANDS,
        "(primals[0], tangents[1])",
        "(primals[0], tangents[0])",
        contract("SpectralBatchNorm, ring-gradients"),
    ),
    "remainder of the zero frequency dropped": Mutant(
        BANDS,
        "jnp.where(real, distance + jnp.flip(distance, 1), distance)",
        "distance",
        contract("SpectralBatchNorm, ring-gradients"),
    ),
    "rings of another width": Mutant(
        BANDS,
        "np.ceil((number - 1) * radius - 1e-9)",
        "np.ceil(number * radius - 1e-9)",
        some("methods/test_spectral.py", "OracleTest and test_configurations"),
    ),
    "full scaling divides once": Mutant(
        TRANSFORMS,
        '"full": (1 / root, 1 / root)',
        '"full": (1 / root, root)',
        some("methods/test_spectral.py", "LimitsTest and test_scalings"),
    ),
    "variance of a scaled spectrum scaled once": Mutant(
        SPECTRAL,
        "now.var * factor**2",
        "now.var * factor",
        some("methods/test_spectral.py", "OracleTest and test_configurations"),
    ),
    "public correction of the spectral variance dropped": Mutant(
        SPECTRAL,
        "part.var * (size / max(size - 1, 1))",
        "part.var",
        some("methods/test_spectral.py", "OracleTest and test_cases"),
    ),
}

OF_METHODS = {
    "evaluation uses the statistics of the batch": Mutant(
        SEAM,
        "normalizer = method.evaluation(params, state, x, mask, **inputs)",
        "normalizer = method.coefficients(params, state, method.observe(x, mask))",
        some("methods/test_batch.py", "test_evaluation_is_the_oracle"),
    ),
    "constant statistics are not constant": Mutant(
        BATCH,
        "    if method.constant_statistics:\n",
        "    if False:\n",
        some("test_situations.py", "test_constant_statistics and BatchNorm"),
    ),
    "deviation of the ReLU without its mean": Mutant(
        BATCH,
        "math.sqrt(1 / 2 - 1 / (2 * math.pi))",
        "math.sqrt(1 / 2)",
        some("methods/test_batch.py", "ReluScaleTest and scale_starts"),
    ),
    "r of BatchRenorm is differentiated": Mutant(
        BATCH,
        "r = lax.stop_gradient(jnp.clip(deviation / running_deviation, 1 / r_max, r_max))",
        "r = jnp.clip(deviation / running_deviation, 1 / r_max, r_max)",
        some("methods/test_batch.py", "BatchRenormTest and test_oracle"),
    ),
    "r of BatchRenorm not clipped below": Mutant(
        BATCH,
        "jnp.clip(deviation / running_deviation, 1 / r_max, r_max)",
        "jnp.clip(deviation / running_deviation, 0, r_max)",
        some("methods/test_batch.py", "BatchRenormTest"),
    ),
    "d of BatchRenorm not clipped below": Mutant(
        BATCH,
        "jnp.clip(shift, -d_max, d_max)",
        "jnp.clip(shift, None, d_max)",
        some("methods/test_batch.py", "BatchRenormTest"),
    ),
    "d of BatchRenorm not scaled": Mutant(
        BATCH,
        "d = d if plain.scale is None else d * plain.scale.astype(dtype)",
        "d = d",
        some("methods/test_batch.py", "BatchRenormTest and test_oracle"),
    ),
    "count of ExclusiveBatchNorm with the sample's own": Mutant(
        GHOST,
        "count = group.count - own.count",
        "count = group.count",
        some("methods/test_ghost_noise.py", "NormTest and test_oracle"),
    ),
    "variance of ExclusiveBatchNorm without the gap": Mutant(
        GHOST,
        "group.var + share * (group.var - own.var - jnp.square(gap))",
        "group.var + share * (group.var - own.var)",
        some("methods/test_ghost_noise.py", "NormTest and test_oracle"),
    ),
    "links of a chain draw with one key": Mutant(
        CHAIN,
        "list(jax.random.split(key, number))",
        "[key] * number",
        some("methods/test_chain.py", "own_parameters"),
    ),
    "ghosts draw with one key": Mutant(
        GHOST,
        "keys = jax.random.split(key, number)",
        "keys = jax.random.split(key, number)[jnp.zeros(number, int)]",
        some("methods/test_ghost.py", "groups_draw_apart"),
    ),
    "statistics of GroupNorm without the first axis of positions": Mutant(
        GROUP,
        "layer.reduce(self, x, tuple(positions), mask, channel_groups=number)",
        "layer.reduce(self, x, tuple(positions[1:]), mask, channel_groups=number)",
        some("methods/test_group.py", "GroupNormTest and test_vectors"),
    ),
    "statistics of GroupNorm over the groups": Mutant(
        GROUP,
        "layer.reduce(self, parts, (last + 1,), mask)",
        "layer.reduce(self, parts, (last,), mask)",
        some("methods/test_group.py", "GroupNormTest and test_oracle"),
    ),
    "statistics of InstanceNorm over the batch": Mutant(
        GROUP,
        "layer.reduce(self, x, self._positions(x.shape), mask)",
        "layer.reduce(self, x, (0, *self._positions(x.shape)), mask)",
        some("methods/test_group.py", "InstanceNormTest and test_vectors"),
    ),
    "mean of LayerNorm dropped": Mutant(
        LAYER,
        "return Normalizer(seen.mean, inverse, params.scale, params.bias)",
        "return Normalizer(None, inverse, params.scale, params.bias)",
        some("methods/test_layer.py", "LayerNormTest and test_vectors"),
    ),
    "RMSNorm centred": Mutant(
        LAYER,
        "centred: ClassVar[bool] = False",
        "centred: ClassVar[bool] = True",
        some("methods/test_layer.py", "RMSNormTest and test_vectors"),
    ),
    "Affine without scale": Mutant(
        AFFINE,
        "Normalizer(scale=params.scale, bias=params.bias)",
        "Normalizer(bias=params.bias)",
        some("methods/test_affine.py", "AffineTest and test_oracle"),
    ),
    "DynamicTanh without bias": Mutant(
        DYNAMIC,
        "y = y + passes.lift(params.bias, at, x.ndim)",
        "pass",
        some("methods/test_affine.py", "DynamicTanhTest and test_oracle"),
    ),
    "own share of EvalNorm turned round": Mutant(
        GHOST,
        "params, mean + weight * gap, var",
        "params, own.mean - weight * gap, var",
        some("methods/test_ghost_noise.py", "NormTest and test_oracle"),
    ),
    "variance of EvalNorm without the gap": Mutant(
        GHOST,
        "weight * (own.var - var) + weight * (1 - weight) * jnp.square(gap)",
        "weight * (own.var - var)",
        some("methods/test_ghost_noise.py", "NormTest and test_oracle"),
    ),
    "offset of GhostNoiseBatchNorm with the wrong sign": Mutant(
        NOISE,
        "else bias - shift * slope",
        "else bias + shift * slope",
        some("methods/test_ghost_noise.py", "test_fused_is_the_chain"),
    ),
    "ghosts are differentiated": Mutant(
        NOISE,
        "every, batch = lax.stop_gradient((samples.every, batch))",
        "every = samples.every",
        some("methods/test_ghost_noise.py", "test_fused_is_the_chain"),
    ),
    "shift of GhostNoise with the wrong sign": Mutant(
        NOISE,
        "return passes.affine(x, shift, 1 / scale",
        "return passes.affine(x, -shift, 1 / scale",
        some("methods/test_ghost_noise.py", "noise_of_parts_are_ghost_batch_norm"),
    ),
    "strength multiplies the scale": Mutant(
        NOISE,
        "shift * strength, scale**strength",
        "shift * strength, scale * strength",
        some("methods/test_ghost_noise.py", "strength_follows_its_schedule"),
    ),
    "expected inverse multiplied on": Mutant(
        NOISE,
        "scale = scale * expected_inverse(inverse_size, strength)",
        "scale = scale / expected_inverse(inverse_size, strength)",
        some("methods/test_ghost_noise.py", "unbiased_scale_keeps"),
    ),
    "last draw of a ghost weighs its fraction": Mutant(
        NOISE,
        "return jnp.where(k < n, 1, jnp.where(k == n, last, 0))",
        "return jnp.where(k < n, 1, jnp.where(k == n, f, 0))",
        some("methods/test_ghost_noise.py", "worth_the_effective_size"),
    ),
    "one degree of freedom too many": Mutant(
        NOISE,
        "divmod(method.ghost_batch_size - 1, 2)",
        "divmod(method.ghost_batch_size, 2)",
        some("methods/test_ghost_noise.py", "test_distribution"),
    ),
    "samples not in their own part": Mutant(
        NOISE,
        "place_of = jnp.argsort(order)",
        "place_of = order",
        some("methods/test_ghost_noise.py", "noise_of_parts_are_ghost_batch_norm"),
    ),
    "fused variance without the gap of the means": Mutant(
        KALMAN,
        "(1 - p) * (var - seen.var) + q * (1 - q) * jnp.square(gap)",
        "(1 - p) * (var - seen.var)",
        some("methods/test_kalman.py", "variance_is_that_of_a_mixture"),
    ),
    "gain of the mean turned round": Mutant(
        KALMAN,
        "seen.mean + (1 - q) * gap,",
        "seen.mean + q * gap,",
        some("methods/test_kalman.py", "gain_one_is_batch_norm"),
    ),
    "guard turned round": Mutant(
        KALMAN,
        "jnp.mean(var / seen.var)) < self.guard",
        "jnp.mean(var / seen.var)) > self.guard",
        some("methods/test_kalman.py", "guard_falls_back"),
    ),
    "posterior has the scale for a variance": Mutant(
        KALMAN,
        "propagate.prediction(bias, jnp.square(scale))",
        "propagate.prediction(bias, scale)",
        some("methods/test_kalman.py", "posterior_is_what_the_output_has"),
    ),
    "computed gain takes the noise of sampling for an error": Mutant(
        KALMAN,
        "jnp.maximum(error.astype(dtype) - noise, 0)",
        "error.astype(dtype)",
        some("methods/test_kalman.py", "error_over_noise"),
    ),
    "all groups count as the first": Mutant(
        GHOST,
        "dtype=jnp.int32) + first == 0)",
        "dtype=jnp.int32) + first >= 0)",
        some("methods/test_kalman.py", "test_oracle"),
    ),
    "noise of a learned transition dropped": Mutant(
        KALMAN,
        "prior._replace(var=prior.var + noise)",
        "prior._replace(var=prior.var)",
        some("methods/test_kalman.py", "test_oracle"),
    ),
}

OF_THE_REST = {
    "variance behind a relu": Mutant(
        ACTIVATIONS,
        "t * density * (under - above)",
        "t * density * (above - under)",
        some("test_propagate.py", "test_relu"),
    ),
    "covariance of a leaky relu counted once": Mutant(
        ACTIVATIONS,
        "* share + 2 * slope * bend * above",
        "* share + slope * bend * above",
        some("test_propagate.py", "test_leaky_relu"),
    ),
    "share of the borders dropped": Mutant(
        LAYERS,
        "mean = jnp.sum(share * means, kinds, keepdims=True)",
        "mean = jnp.mean(means, kinds, keepdims=True)",
        some("test_propagate.py", "test_enumeration"),
    ),
    "variance of the means at the borders dropped": Mutant(
        LAYERS,
        "+ jnp.square(means - mean)\n",
        "\n",
        some("test_propagate.py", "test_enumeration"),
    ),
    "covariance of branches counted once": Mutant(
        LAYERS, "var + 2 * both", "var + both", some("test_propagate.py", "test_add")
    ),
    "variance scaled once": Mutant(
        LAYERS,
        "var * jnp.square(scale)",
        "var * scale",
        some("test_propagate.py", "test_affine"),
    ),
    "variance behind a dense layer without squares": Mutant(
        LAYERS,
        "_dot(var, jnp.square(kernel))",
        "_dot(var, jnp.abs(kernel))",
        some("test_propagate.py", "chain_of_linear_layers"),
    ),
    "variance of averages is that of one position": Mutant(
        LAYERS,
        "noise = np.sum(share * part / divisor)",
        "noise = np.sum(share * part)",
        some("test_propagate.py", "average_is_the_convolution"),
    ),
    "linen trains while it initializes": Mutant(
        LINEN,
        "train = not evaluate and not self.is_initializing()",
        "train = not evaluate",
        some("test_fronts.py", "initialization_leaves_statistics_alone"),
    ),
    "linen does not keep the state": Mutant(
        LINEN,
        "cells[name].value = value",
        "pass",
        some("test_fronts.py", "linen_gives_what_flax_gives"),
    ),
    "linen ignores the mask": Mutant(
        LINEN,
        "train=train, mask=mask, key=key",
        "train=train, mask=None, key=key",
        some("test_fronts.py", "linen_gives_what_flax_gives"),
    ),
    "nnx does not keep the state": Mutant(
        NNX,
        "self._variable(path).set_value(jax.lax.stop_gradient(value))",
        "self._variable(path)",
        some("test_fronts.py", "nnx_gives_what_flax_gives"),
    ),
    "nnx misses parameters that were removed": Mutant(
        NNX,
        'elif variable is not None or name in getattr(tree, "_field_defaults", ()):',
        "elif variable is not None:",
        some("test_situations.py", "attached_replaced_and_removed"),
    ),
    "carry passes no prior on": Mutant(
        CARRY,
        'prior = given.pop("prior", known.get(x))',
        'prior = given.pop("prior", None)',
        some("test_carry.py", "it_equals_passing_by_hand"),
    ),
    "carry forgets the activation of fused posteriors": Mutant(
        CARRY,
        "posterior = propagate.activation(posterior, method.activation)",
        "pass",
        some("test_carry.py", "fused_posteriors"),
    ),
    "learning rate of scales multiplied": Mutant(
        OPTIM,
        "return update / jnp.asarray(c, update.dtype)",
        "return update * jnp.asarray(c, update.dtype)",
        some("test_optim.py", "one_step_of_the_recipe"),
    ),
    "decay of all but the weights": Mutant(
        OPTIM,
        "lambda label: label in labels,",
        "lambda label: label not in labels,",
        some("test_optim.py", "test_decay_mask"),
    ),
    "frozen updates times zero": Mutant(
        OPTIM,
        "optax.set_to_zero()",
        "optax.scale(0.0)",
        some("test_optim.py", "frozen_updates"),
    ),
    "statistics are not kept": Mutant(
        OPTIM,
        "leaves[i] = old_leaves[i]",
        "pass",
        some("test_optim.py", "freeze_a_part"),
    ),
}

OF_ANALYSIS = {
    "gradients of the rows of another condition": Mutant(
        BALANCE,
        "g[i] if name in rows",
        "g[0] if name in rows",
        some("analysis/test_balance.py", "test_oracle"),
    ),
    "the loss of all conditions instead of one": Mutant(
        BALANCE,
        "(jnp.arange(len(found)) == i)",
        "(jnp.arange(len(found)) >= i)",
        some("analysis/test_balance.py", "test_gradients_of_a_condition"),
    ),
    "mean cosine with gradients that have no direction": Mutant(
        BALANCE,
        "jnp.mean(cosines, where=pairs)",
        "jnp.mean(cosines)",
        some("analysis/test_balance.py", "no_direction"),
    ),
    "condition number of what is not centred": Mutant(
        WHITENESS,
        "centred = rows - jnp.mean(rows, 0, keepdims=True)",
        "centred = rows",
        some("analysis/test_whitening.py", "test_oracle"),
    ),
    "squared correlations with those of a feature and itself": Mutant(
        WHITENESS,
        "pairs = product(unit.T, unit) * (1 - jnp.eye(len(varies), dtype=unit.dtype))",
        "pairs = product(unit.T, unit)",
        some("analysis/test_whitening.py", "test_oracle"),
    ),
    "features that do not vary among the correlated ones": Mutant(
        WHITENESS,
        "number = jnp.sum(varies)",
        "number = len(varies)",
        some("analysis/test_whitening.py", "do_not_vary"),
    ),
    "distances not divided by the length of the weights": Mutant(
        BOUNDARIES,
        "return jnp.sum(jnp.square(values), 0) / jnp.sum(jnp.square(kernel), 0)",
        "return jnp.sum(jnp.square(values), 0)",
        some("analysis/test_geometry.py", "total_least_squares"),
    ),
    "the last slope in place of all": Mutant(
        BOUNDARIES,
        "s + jnp.square(slope)",
        "jnp.square(slope)",
        some("analysis/test_geometry.py", "test_distances"),
    ),
    "a foot point in whatever region": Mutant(
        BOUNDARIES,
        "earlier.append(name)",
        "pass",
        some("analysis/test_geometry.py", "foot_point"),
    ),
    "the boundary of maxout at zero": Mutant(
        SWITCHES,
        "self.keep(values[0].value - values[1].value, kind, names)",
        "self.keep(values[0].value, kind, names)",
        some("analysis/test_geometry.py", "kinds_of_boundaries"),
    ),
    "thresholds that ignore the deviation of the batch": Mutant(
        JITTER,
        "return normalizer.mean - lift(normalizer.bias) / (inverse * lift(unit))",
        "return normalizer.mean - lift(normalizer.bias) / lift(unit)",
        some("analysis/test_geometry.py", "test_jitter"),
    ),
    "a law without the size of the population": Mutant(
        JITTER,
        "share = (len(x) - batch_size) / (len(x) - 1) / batch_size",
        "share = 1 / batch_size",
        some("analysis/test_geometry.py", "no_jitter_with_all_samples"),
    ),
    "a law of positions as if they were samples": Mutant(
        JITTER,
        "    gap = each.mean - whole.mean[None]",
        "    gap = jnp.sqrt(each.var + jnp.square(each.mean - whole.mean[None]))",
        some("analysis/test_geometry.py", "law_of_jitter"),
    ),
    "a law without its skewness": Mutant(
        JITTER,
        "linear = one * e + f_d[None] * d",
        "linear = one * e - f_d[None] * d",
        some("analysis/test_geometry.py", "law_of_jitter"),
    ),
    "the class itself among the others": Mutant(
        MARGINS,
        "return jnp.where(usable, gaps / lengths, jnp.inf)",
        "return jnp.where(usable, gaps / lengths, 0)",
        some("analysis/test_geometry.py", "test_margins"),
    ),
    "the wrong half of a bisection": Mutant(
        MARGINS,
        "return jnp.where(is_inside, middle, low), jnp.where(is_inside, high, middle)",
        "return jnp.where(is_inside, low, middle), jnp.where(is_inside, middle, high)",
        some("analysis/test_geometry.py", "test_margins"),
    ),
    "means behind norms that divide": Mutant(
        SMART,
        "return Moments(seen.count, seen.mean, jnp.ones_like(seen.var))",
        "return seen",
        some("analysis/test_geometry.py", "test_smart_init"),
    ),
    "disturbance in batches without the sample": Mutant(
        WHITENESS,
        "order = jax.random.uniform(keys[0], (len(x),)).at[followed].set(2)",
        "order = jax.random.uniform(keys[0], (len(x),))",
        some("analysis/test_whitening.py", "over_every_batch"),
    ),
    "paths through a branch as often as its gain": Mutant(
        DEPTH,
        "odds / (1 + np.where(np.isinf(odds), 0, odds))",
        "np.minimum(odds, 1)",
        some("analysis/test_depth.py", "all_paths"),
    ),
    "squares of shares that do not sum to one": Mutant(
        DEPTH,
        "share /= np.sum(share, -1, keepdims=True)",
        "share /= 1",
        some("analysis/test_depth.py", "all_paths"),
    ),
    "energies of paths by gains that are not squared": Mutant(
        DEPTH,
        "odds = np.square(np.minimum(odds, 1e150))",
        "odds = np.minimum(odds, 1e150)",
        some("analysis/test_depth.py", "all_paths"),
    ),
    "critical points by second moments in place of factorial ones": Mutant(
        DEPTH,
        "share @ (length * (length - 1))",
        "share @ (length * length)",
        some("analysis/test_depth.py", "critical_rate"),
    ),
    "skips that do not grow": Mutant(
        DEPTH,
        "np.sqrt(1 + np.arange(number) * np.square(scale))",
        "np.sqrt(1 + 0 * np.arange(number) * np.square(scale))",
        some("analysis/test_depth.py", "saturates"),
    ),
    "a branch for the skip": Mutant(
        DEPTH,
        "(few, skip), (many, branch) = sorted(",
        "(few, branch), (many, skip) = sorted(",
        some("analysis/test_depth.py", "gains_of_blocks"),
    ),
    "sums without a layer as blocks": Mutant(
        DEPTH,
        "if few <= 1 and few < many:",
        "if few <= 1:",
        some("analysis/test_depth.py", "gains_of_blocks"),
    ),
    "sums that hold blocks as blocks": Mutant(
        DEPTH,
        "return [b for b in found if not any(",
        "return found if found else [b for b in found if not any(",
        some("analysis/test_depth.py", "hold_others"),
    ),
    "paths of a length not counted": Mutant(
        DEPTH,
        "math.comb(len(free), k) *",
        "1 *",
        some("analysis/test_depth.py", "energies_of_the_polynomial"),
    ),
    "gradients of the sum in place of a path": Mutant(
        DEPTH,
        "way + lax.stop_gradient(total - way)",
        "total",
        some("analysis/test_depth.py", "energies_of_the_polynomial"),
    ),
    "the input of a block in place of the change of its branch": Mutant(
        DEPTH,
        "changes = [jax.jvp(both, (start,), (jnp.asarray(v, start.dtype),))[1] for v in draws]",
        "changes = [both(start) for v in draws]",
        some("analysis/test_depth.py", "jacobian_gains"),
    ),
    "the first batch norm of a block for the last": Mutant(
        DEPTH,
        "found |= {block.name: ratios}",
        "found = {block.name: ratios} | {n: r for n, r in found.items() if r[0]}",
        some("analysis/test_depth.py", "gains_of_blocks"),
    ),
    "a module of Linen alone draws from the beginning": Mutant(
        CALLS,
        "module.scope.rng_counters.update(_counts(drawn))",
        "pass",
        some("analysis/test_layers.py", "repeat_the_calls"),
    ),
    "a module of NNX alone with its first variables": Mutant(
        CALLS,
        "jax.tree.leaves(nnx.split(copy, nnx.Intermediate, ...)[2])",
        "jax.tree.leaves(nnx.split(self.module, nnx.Intermediate, ...)[2])",
        some("analysis/test_layers.py", "repeat_the_calls"),
    ),
    "a call by super as one more": Mutant(
        CALLS,
        "if context.method_name != CALL or module.path in running:",
        "if context.method_name != CALL:",
        some("analysis/test_layers.py", "keywords"),
    ),
    "a scan is not unrolled": Mutant(
        PROGRAMS,
        "with jax.disable_jit():",
        "with jax.disable_jit(False):",
        some("analysis/test_depth.py", "blocks_of_scans"),
    ),
}

OF_THE_SEAM = {
    "pooled statistics forget what rounding loses": Mutant(
        RUNNING,
        "return rounded, rest - (rounded - total)",
        "return rounded, 0 * rest",
        some("test_seam.py", "many_small_batches"),
    ),
    "pooled variance without the gap between means": Mutant(
        RUNNING,
        "+ (1 - share) * jnp.square(gap)",
        "",
        some("test_seam.py", "batches_of_all_sizes"),
    ),
    "covariance without the gap between means": Mutant(
        STATISTICS,
        "return gap[..., :, None] * gap[..., None, :]",
        "return 0 * gap[..., :, None] * gap[..., None, :]",
        some("test_seam.py", "TestCovariances and union"),
    ),
    "pool counts parts of a batch twice": Mutant(
        STATISTICS,
        "if not isinstance(seen, Parted):\n        return seen",
        "return seen",
        some("test_seam.py", "treat_parts_apart"),
    ),
    "a chain hands every input to every method": Mutant(
        CHAIN,
        "if k in traits(method).inputs}",
        "if True}",
        some("test_seam.py", "gives_each_method_its_own"),
    ),
    "every part of Ghost gets the inputs of all samples": Mutant(
        GHOST,
        'if kinds.get(name) == "sample"}',
        'if kinds.get(name) == "part"}',
        some("test_seam.py", "ghost_divides"),
    ),
    "statistics are sown while a model is initialized": Mutant(
        LINEN,
        'self.is_mutable_collection("moments") and not self.is_initializing()',
        'self.is_mutable_collection("moments")',
        some("test_seam.py", "of_a_linen_model"),
    ),
    "Derf without its shift": Mutant(
        DERF,
        "_erf(p.alpha * x + p.shift)",
        "_erf(p.alpha * x)",
        some("methods/test_derf.py", "test_oracle"),
    ),
    "tangent of a gated norm without the gate's": Mutant(
        PASSES,
        "return (dy + y * activation_tangent(of_gate, z, widen(dgate))).astype(dtype)",
        "return dy.astype(dtype)",
        some("methods/test_rows.py", "test_derivatives"),
    ),
    "cotangent of a gated norm without the gate": Mutant(
        PASSES,
        "(h,) = fence(widen(g) * activate(of_gate, widen(gate)))",
        "(h,) = fence(widen(g))",
        some("methods/test_rows.py", "test_derivatives"),
    ),
    "a gate that is not masked": Mutant(
        LAYER,
        "gate, _ = passes.inputs(self, _as_gate(self, gate, x), valid)",
        "gate, _ = passes.inputs(self, _as_gate(self, gate, x), None)",
        some("methods/test_rows.py", "masked_positions"),
    ),
    "a gate in front that keeps its product": Mutant(
        LAYER,
        "y = jax.checkpoint(before)(",
        "y = before(",
        some("methods/test_rows.py", "backward_pass_keeps"),
    ),
    "offset of a scale in the dtype of the parameters": Mutant(
        LAYER,
        "scale = scale.astype(seen.var.dtype) + self.scale_offset",
        "scale = scale + self.scale_offset",
        some("methods/test_rows.py", "offset_is_added"),
    ),
    "an offset scale that starts at one": Mutant(
        LAYER,
        "params._replace(scale=params.scale - self.scale_offset)",
        "params",
        some("methods/test_rows.py", "starts_at_one"),
    ),
    "a cast that XLA leaves out": Mutant(
        LAYER,
        "lax.reduce_precision(a.astype(work), kind.nexp, kind.nmant)",
        "a.astype(work)",
        some("methods/test_rows.py", "that_of_transformers"),
    ),
    "gradients of rounded factors": Mutant(
        LAYER,
        "return (exact + lax.stop_gradient(rounded - exact)).astype(dtype)",
        "return rounded.astype(dtype)",
        some("methods/test_rows.py", "half_precision"),
    ),
    "RunningNorm normalizes before it moves": Mutant(
        RUNNING_NORM,
        "moved = self.absorb(state, seen)",
        "moved = state",
        some("methods/test_running_norm.py", "moves_first"),
    ),
    "RunningNorm with a gradient through its statistics": Mutant(
        RUNNING_NORM,
        "constant_statistics: ClassVar[bool] = True",
        "constant_statistics: ClassVar[bool] = False",
        some("methods/test_running_norm.py", "constants"),
    ),
    "RunningNorm clips from above alone": Mutant(
        RUNNING_NORM,
        "jnp.clip(z, -self.bound, self.bound)",
        "jnp.minimum(z, self.bound)",
        some("methods/test_running_norm.py", "test_clip"),
    ),
}
CONDITIONAL, BRANCHES, STYLE = (
    f"normjax/methods/{name}.py" for name in ("conditional", "branches", "adaptive_instance")
)
OF_CONDITIONS = {
    "shared bias that the class does not scale": Mutant(
        CONDITIONAL,
        "shift = None if shift is None else shift * scale",
        "shift = shift",
        some("methods/test_conditional.py", "composed_affine"),
    ),
    "a map without the one": Mutant(
        CONDITIONAL,
        "scale = None if scale is None else 1 + scale",
        "scale = scale",
        some("methods/test_conditional.py", "starts_as_the_plain"),
    ),
    "conditions of padding are not dropped": Mutant(
        CONDITIONAL,
        "return passes.keep(jnp.expand_dims(valid, tuple(range(-own, 0))), condition)",
        "return condition",
        contract("AdaptiveLayerNorm-masks"),
    ),
    "features of a condition are always last": Mutant(
        CONDITIONAL,
        "return jnp.moveaxis(a, range(-features, 0), feature_positions(method, a.shape))",
        "return a",
        some("methods/test_conditional.py", "classes_and_vectors"),
    ),
    "classes that are NaN where there are none": Mutant(
        CONDITIONAL,
        'mode="clip"',
        'mode="fill"',
        some("methods/test_conditional.py", "are_clipped"),
    ),
    "known classes are not checked": Mutant(
        CONDITIONAL,
        "outside = (classes < 0) | (classes >= self.num_classes)",
        "outside = classes < 0",
        some("methods/test_conditional.py", "test_inputs"),
    ),
    "a class in the dtype of its parameters": Mutant(
        CONDITIONAL,
        "lifted = lambda a: None if a is None else passes.lift(a, at, rank).astype(dtype)",
        "lifted = lambda a: None if a is None else passes.lift(a, at, rank)",
        some("methods/test_conditional.py", "half_precision"),
    ),
    "two activations": Mutant(
        CONDITIONAL,
        "method = dataclasses.replace(method, activation=None)",
        "method = method",
        some("methods/test_conditional.py", "comes_last"),
    ),
    "an update goes to the first branch": Mutant(
        BRANCHES,
        "lax.dynamic_update_index_in_dim(a, b, index, 0)",
        "lax.dynamic_update_index_in_dim(a, b, 0, 0)",
        some("methods/test_conditional.py", "its_branch_only"),
    ),
    "rows of the first branch": Mutant(
        BRANCHES,
        'inputs | {"condition": self._index(branch)}',
        'inputs | {"condition": 0}',
        some("methods/test_conditional.py", "outputs_gradients"),
    ),
    "variances of a style over n": Mutant(
        STYLE,
        "seen.var * (seen.count / jnp.maximum(seen.count - 1, 1))",
        "seen.var",
        some("methods/test_conditional.py", "adaptive_instance"),
    ),
    "styles of padding count": Mutant(
        STYLE,
        "return self.observe(style, mask)",
        "return self.observe(style)",
        contract("SandwichAdaptiveInstanceNorm-masks"),
    ),
}

OF_WEIGHTS = {
    "weights that only mask": Mutant(
        VARIANCE,
        "return x * mask if is_weighted(mask)",
        "return jnp.where(mask > 0, x, 0) if is_weighted(mask)",
        some("test_weights.py", "repeat_rows"),
    ),
    "a sum of weights below one divided by one": Mutant(
        STATISTICS,
        "jnp.where(count > 0, count, jnp.ones((), count.dtype))",
        "jnp.maximum(count, 1)",
        some("test_weights.py", "one_weight_for_all"),
    ),
    "pooled statistics of small weights": Mutant(
        RUNNING,
        "share = n / statistics.divisor(count)",
        "share = n / jnp.maximum(count, 1)",
        some("test_weights.py", "pooled_and_merged"),
    ),
    "unbiased variance of small weights": Mutant(
        RUNNING,
        "var * jnp.maximum(new.count, 1) / jnp.maximum(new.count - 1, 1)",
        "var * new.count / jnp.maximum(new.count - 1, 1)",
        some("test_weights.py", "unbiased_variance"),
    ),
    "a gradient of weights": Mutant(
        PASSES,
        "lax.stop_gradient(weights).astype(wide(x.dtype))",
        "weights.astype(wide(x.dtype))",
        some("test_weights.py", "hold_weights_constant"),
    ),
    "traced weights that are negative count": Mutant(
        CHECKS,
        "jnp.where((value > 0) & (value < jnp.inf), value, 0)",
        "jnp.abs(value)",
        some("test_weights.py", "traced_count_as_zero"),
    ),
    "concrete weights not looked at": Mutant(
        CHECKS,
        "if value is not None and not _all(value, lambda a: (a >= 0) & (a < np.inf)):",
        "if False:",
        some("test_weights.py", "bad_weights"),
    ),
    "weights on TPUs about zero": Mutant(
        VARIANCE,
        "if is_weighted(mask):\n        return _two_passes(x, mask, n, how)",
        "if False:\n        return _two_passes(x, mask, n, how)",
        some("test_weights.py", "other_platforms"),
    ),
    "weights forgotten where parts are observed": Mutant(
        GHOST,
        "return self.method.observe(x, mask, **inputs)",
        "return self.method.observe(x, mask)",
        some("test_weights.py", "weights_of_their_own"),
    ),
}

OF_SEGMENTS = {
    "segments that are not told apart": Mutant(
        SEGMENTS,
        "return jnp.where(ids < number, index * number + ids, places * number)",
        "return jnp.where(ids < number, index * number + 0 * ids, places * number)",
        some("test_segments.py", "a_loop_over and batch-none"),
    ),
    "places of kept axes in the wrong order": Mutant(
        SEGMENTS,
        "index = index * shape[i] + lax.broadcasted_iota(ids.dtype, ids.shape, i)",
        "index = index + lax.broadcasted_iota(ids.dtype, ids.shape, i) * 0",
        some("test_segments.py", "a_loop_over and instance-none"),
    ),
    "a block forgotten": Mutant(
        SEGMENTS,
        "return add(totals, *cut(done, rows - done)) if done < rows else totals",
        "return add(totals, *cut(done, rows - done)) if not done else totals",
        some("test_segments.py", "alike and 20"),
    ),
    "all blocks in one part": Mutant(
        SEGMENTS,
        "parts = max(1, min(PARTS, ids.size // (SPARSE * (last + 1))))",
        "parts = 1",
        some("test_segments.py", "long_segments"),
    ),
    "the mean of segments not corrected": Mutant(
        VARIANCE,
        "return mean + gap, jnp.maximum(square - jnp.square(gap), 0)",
        "return mean, square",
        some("test_segments.py", "long_segments"),
    ),
    "padding read as a segment": Mutant(
        SEGMENTS,
        "return jnp.where(mask.ids < mask.number, a, jnp.zeros((), a.dtype))",
        "return a",
        some("test_segments.py", "a_loop_over and batch-ids"),
    ),
    "products without the padding's zeros": Mutant(
        SEGMENTS,
        "wide = [inside(mask, a) for a in full]",
        "wide = list(full)",
        some("test_segments.py", "Explicit and batch"),
    ),
    "transpose over segments doubled": Mutant(
        PASSES,
        "totals = -total * gain, slope, total",
        "totals = -2 * total * gain, slope, total",
        adjoint("segments affine"),
    ),
    "running statistics averaged over segments": Mutant(
        BATCH,
        "absorb = running.absorb if self.num_segments is None else running.absorb_whole",
        "absorb = running.absorb",
        some("test_segments.py", "a_loop_over and batch-none"),
    ),
    "segments of each device": Mutant(
        BATCH,
        "seen = statistics.over_devices(seen, method.axis_name)[0]",
        "seen = seen",
        some("test_segments.py", "span_devices and shard_map and batch"),
    ),
    "ids not looked at": Mutant(
        CHECKS,
        "if not _all(value, lambda a: (a >= -1) & (a < number)):",
        "if False:",
        some("test_segments.py", "bad_input"),
    ),
    "a mask forgotten beside ids": Mutant(
        PASSES,
        "ids, valid = jnp.where(valid, ids, number), None",
        "valid = None",
        some("test_segments.py", "a_loop_over and batch-mask"),
    ),
    "a mask of values forgotten beside ids": Mutant(
        PASSES,
        "weights = valid.astype(wide(x.dtype))",
        "weights = None",
        some("test_segments.py", "a_loop_over and batch-mask"),
    ),
}

OF_WHITENING = {
    "covariance transposed without its other half": Mutant(
        MATRICES,
        "slope = (gcov + gcov.mT) / n.reshape(1, 1, 1)",
        "slope = 2 * gcov / n.reshape(1, 1, 1)",
        adjoint("covariances"),
    ),
    "weights of covariances squared": Mutant(
        MATRICES,
        "root = jnp.sqrt(mask) if mask is not None",
        "root = mask if mask is not None",
        adjoint("covariances, weights"),
    ),
    "count of weights rounded up": Mutant(
        MATRICES,
        "n = divisor(count) if mask is not None and is_weighted(mask) else jnp.maximum(count, 1)",
        "n = jnp.maximum(count, 1)",
        some("methods/test_whitening.py", "small_weights"),
    ),
    "variances alone doubled": Mutant(
        MATRICES,
        "slope = 2 * _lifted(jnp.diagonal(gcov",
        "slope = _lifted(jnp.diagonal(gcov",
        adjoint("covariances, variances"),
    ),
    "matrix transposed in the pullback": Mutant(
        MATRICES,
        "return times(h, matrix, where), dmean",
        "return times(h, matrix.mT, where), dmean",
        adjoint("mix"),
    ),
    "mean's cotangent of another sign": Mutant(
        MATRICES,
        "dmean = -jnp.matmul(",
        "dmean = jnp.matmul(",
        adjoint("mix"),
    ),
    "matrix transposed in the map": Mutant(
        MATRICES,
        "return times(c, matrix.mT, where) + _lifted(bias, where, x)",
        "return times(c, matrix, where) + _lifted(bias, where, x)",
        some("methods/test_whitening.py", "evaluation_is_a_linear_map"),
    ),
    "wide blocks of other groups": Mutant(
        MATRICES,
        'jnp.einsum("nkikj->nkij", found)',
        'jnp.einsum("nlikj->nkij", found)',
        some("test_passes.py", "wide_blocks"),
    ),
    "derivative of the symmetric root of another sign": Mutant(
        ROOTS,
        "moved = -_lyapunov(product(cov, matrix), back, roots, vectors)",
        "moved = _lyapunov(product(cov, matrix), back, roots, vectors)",
        some("test_roots.py", "test_derivatives and zca"),
    ),
    "the Lyapunov solution's own derivative left out": Mutant(
        ROOTS,
        "return _lyapunov(a, dc - product(da, x) - product(x, da), *basis)",
        "return _lyapunov(a, dc, *basis)",
        some("test_roots.py", "test_derivatives and zca"),
    ),
    "the iteration uncoupled": Mutant(
        ROOTS,
        "m = product(z, y) if i else y",
        "m = product(product(z, z), cov / scale) if i else y",
        some("test_roots.py", "ill_conditioned or products"),
    ),
    "a scale below the largest eigenvalue": Mutant(
        ROOTS,
        "bound = _by_power(cov) * cov.shape[-1] ** (1 / (2 * POWER_STEPS))",
        "bound = _by_power(cov) / 2",
        some("test_roots.py", "is_a_bound"),
    ),
    "epsilon forgotten": Mutant(
        WHITENING,
        "return _shrunk(method, cov, eye) + method.epsilon * eye, eye, join",
        "return _shrunk(method, cov, eye), eye, join",
        some("methods/test_whitening.py", "test_vectors"),
    ),
    "shrinkage towards the trace": Mutant(
        WHITENING,
        "level = jnp.trace(cov, axis1=1, axis2=2) / jnp.trace(eye, axis1=1, axis2=2)",
        "level = jnp.trace(cov, axis1=1, axis2=2)",
        some("methods/test_whitening.py", "test_oracle"),
    ),
    "variances of masked samples": Mutant(
        WHITENING,
        "eye *= jnp.squeeze(present",
        "eye += 0 * jnp.squeeze(present",
        some("methods/test_whitening.py", "SamplesTest and oracle"),
    ),
    "masked rows in the covariance": Mutant(
        MATRICES,
        "return keep(root, widen(x) - _lifted(mean, where, x))",
        "return (1 if root is None else jnp.sqrt(root)) * (widen(x) - _lifted(mean, where, x))",
        some("methods/test_whitening.py", "AgreementTest and test_oracle"),
    ),
    "recorded covariance biased": Mutant(
        WHITENING,
        "return a * (jnp.maximum(count, 1) / jnp.maximum(count - 1, 1))",
        "return a * (jnp.maximum(count, 1) / jnp.maximum(count, 1))",
        some("methods/test_whitening.py", "AgreementTest and test_oracle"),
    ),
    "half-lives doubled": Mutant(
        WHITENING,
        "return math.log(2) / (2 * self.half_life)",
        "return math.log(2) / (4 * self.half_life)",
        some("methods/test_whitening.py", "test_half_life"),
    ),
    "a bound of the rate that is too large": Mutant(
        WHITENING,
        "return 4 / (2 + root + 1 / root)",
        "return 4 / (root + 1 / root)",
        some("methods/test_whitening.py", "bound_of_the_rate or test_fields"),
    ),
    "step of Frobenius not divided by its norm": Mutant(
        WHITENING,
        "step = roots.product(step, corr) * share",
        "step = roots.product(step, corr)",
        some("methods/test_whitening.py", "test_vectors"),
    ),
    "minimax steps of a wrong range": Mutant(
        ROOTS,
        "low, high, found = condition**-0.5, 1.0, []",
        "low, high, found = 1 / condition, 1.0, []",
        some("test_roots.py", "test_minimax_steps"),
    ),
    "what the last group lacks not left out": Mutant(
        WHITENING,
        "cov = cov * present[:, :, None] * present[:, None, :]",
        "cov = cov * 1",
        some("methods/test_whitening.py", "evaluation_is_the_oracle or test_oracle"),
    ),
    "the old matrix used": Mutant(
        WHITENING,
        "matrix = self._whitener(self._moved(state, seen), state.mean.size)",
        "matrix = self._whitener(state.matrix, state.mean.size)",
        some("methods/test_whitening.py", "test_vectors or invisible"),
    ),
    "the step of the matrix differentiated": Mutant(
        WHITENING,
        """        seen = lax.stop_gradient(seen)
        cov, old""",
        "        cov, old",
        some("methods/test_whitening.py", "invisible or test_vectors"),
    ),
    "the matrix not made symmetric": Mutant(
        WHITENING,
        "new = (new + new.mT) / 2",
        "new = new * 1",
        some("methods/test_whitening.py", "test_vectors"),
    ),
    "scale of the input's features": Mutant(
        WHITENING,
        "return matrix * scale[..., None]",
        "return matrix * scale[:, None]",
        some("methods/test_whitening.py", "test_vectors"),
    ),
    "mean of the weighted without weights": Mutant(
        MATRICES,
        "block_features(average(a, mask, n, (others, None)), size)",
        "block_features(average(a, None, n, (others, None)), size)",
        some("methods/test_whitening.py", "weights_count"),
    ),
    "symmetric root transposed with another sign": Mutant(
        ROOTS,
        "return (-product(product(matrix, back), matrix),)",
        "return (product(product(matrix, back), matrix),)",
        some("test_roots.py", "test_derivatives and zca"),
    ),
    "eigenvalues of zero not held up": Mutant(
        ROOTS,
        "roots = jnp.sqrt(jnp.maximum(values, least))",
        "roots = jnp.sqrt(values)",
        some("test_roots.py", "without_variance and zca"),
    ),
    "a failed factor left as it is": Mutant(
        ROOTS,
        "more = jnp.where(failed, more, 0)[",
        "more = jnp.where(failed, 0, 0)[",
        some("test_roots.py", "failed_factor"),
    ),
    "power iteration from the first column": Mutant(
        ROOTS,
        "largest = jnp.argmax(jnp.diagonal(cov, axis1=-2, axis2=-1), -1)",
        "largest = jnp.zeros(cov.shape[:-2], int)",
        some("test_roots.py", "is_a_bound"),
    ),
    "groups without samples move": Mutant(
        WHITENING,
        "    valid = seen.count > 0\n",
        "    valid = seen.count >= 0\n",
        some("methods/test_whitening.py", "without_samples"),
    ),
    "covariances that are not finite kept": Mutant(
        WHITENING,
        "jnp.isfinite(seen.mean).all(1) & jnp.isfinite(seen.cov).all((1, 2))",
        "jnp.isfinite(seen.mean).all(1)",
        some("methods/test_whitening.py", "not_finite"),
    ),
    "a Frobenius step along rounding": Mutant(
        WHITENING,
        "rounding = 4 * cov.shape[-1] * jnp.finfo(cov.dtype).eps",
        "rounding = 0.0",
        some("methods/test_whitening.py", "uncorrelated"),
    ),
    "constant statistics of stochastic whitening differentiated": Mutant(
        WHITENING,
        "            mean, var = lax.stop_gradient((mean, var))",
        "            mean, var = mean, var",
        some("methods/test_whitening.py", "test_oracle"),
    ),
    "the learnt matrix averaged": Mutant(
        WHITENING,
        "leaf: (self._moved(state, seen), jnp.zeros_like(keep))",
        "leaf: (self._moved(state, seen), keep)",
        some("methods/test_whitening.py", "test_oracle"),
    ),
    "means of shared groups averaged, covariances too": Mutant(
        WHITENING,
        "lambda a: a[None], statistics.merge(seen)",
        "lambda a: a.mean(0)[None], seen",
        some("methods/test_whitening.py", "test_oracle"),
    ),
    "groups not dealt": Mutant(
        WHITENING,
        "dealt = every if key is None else jax.random.permutation(key, every)",
        "dealt = every",
        some("methods/test_whitening.py", "permuted_features"),
    ),
}

OF_KERNELS = {
    "rows of a kernel not corrected for strides": Mutant(
        KERNEL_NORMS,
        "method.root(square / math.prod(_strides(method, wide.shape)))",
        "method.root(square)",
        some("methods/test_weights.py", "transposed_convolutions"),
    ),
    "strides of a kernel multiplied": Mutant(
        KERNEL_NORMS,
        "square / math.prod(",
        "square * math.prod(",
        some("methods/test_weights.py", "transposed_convolutions"),
    ),
    "rows summed on one device": Mutant(
        KERNEL_NORMS,
        "total if method.axis_name is None else lax.psum(total, method.axis_name)",
        "total",
        contract("WeightNorm-devices"),
    ),
    "length of rows on one device": Mutant(
        KERNEL_NORMS,
        "return devices * math.prod(",
        "return math.prod(",
        contract("WeightStandardization-devices"),
    ),
    "normalized kernels in float32": Mutant(
        KERNEL_NORMS,
        "function(widen(kernel), *small).astype(kernel.dtype)",
        "function(widen(kernel), *small)",
        contract("StrictWeightNorm-structure"),
    ),
    "kernels summed in half precision": Mutant(
        KERNEL_NORMS,
        "return function(widen(kernel), *small)",
        "return function(kernel, *small)",
        contract("StrictWeightNorm-numbers"),
    ),
    "kernels kept more than once": Mutant(
        KERNEL_NORMS,
        "return jax.checkpoint(run, prevent_cse=False)(kernel, *small)",
        "return run(kernel, *small)",
        contract("StrictWeightNorm-memory"),
    ),
    "scales of rows start at one": Mutant(
        KERNEL_NORMS,
        "scale = _norm(alone, widen(rows.kernel), rows.along)",
        "scale = jnp.ones_like(_norm(alone, widen(rows.kernel), rows.along))",
        some("test_kernels.py", "changes_nothing"),
    ),
    "gradients through the power iteration": Mutant(
        KERNEL_NORMS,
        "    wide = lax.stop_gradient(widen(rows.kernel))\n    side",
        "    wide = widen(rows.kernel)\n    side",
        contract("SpectralWeightNorm-derivatives"),
    ),
    "power iteration not normalized": Mutant(
        KERNEL_NORMS,
        "moved * lax.rsqrt(jnp.where(found, square, 1))",
        "moved * 1",
        some("methods/test_weights.py", "test_oracle"),
    ),
    "power iteration of zeros": Mutant(
        KERNEL_NORMS,
        "jnp.where(found, moved.astype(vector.dtype), vector)",
        "moved.astype(vector.dtype)",
        some("methods/test_weights.py", "zeros_are_harmless"),
    ),
    "power iteration in evaluation": Mutant(
        KERNEL_NORMS,
        "range(self.iterations if train else 0)",
        "range(self.iterations)",
        some("methods/test_weights.py", "recorded_spectral"),
    ),
    "bound without overlap": Mutant(
        KERNEL_NORMS,
        'if method.operator != "bound":',
        'if method.operator != "torus":',
        some("methods/test_weights.py", "factor_of_a_convolution"),
    ),
    "wave of another frequency": Mutant(
        KERNEL_NORMS,
        "jnp.argmax(values[:, 0])",
        "jnp.argmin(values[:, 0])",
        some("methods/test_weights.py", "factor_of_a_convolution"),
    ),
    "wave turned backwards": Mutant(
        KERNEL_NORMS,
        "-jnp.sin(2 * math.pi * turns)",
        "jnp.sin(2 * math.pi * turns)",
        some("methods/test_weights.py", "test_oracle"),
    ),
    "inputs and features of a wave mixed up": Mutant(
        KERNEL_NORMS,
        "if rows.at == (rank - 1,) else (after, before)",
        "if rows.at == (rank - 2,) else (after, before)",
        some("methods/test_weights.py", "test_oracle"),
    ),
    "forward passes move the vectors": Mutant(
        LINEN,
        'self.is_mutable_collection("kernel_stats") and not self.is_initializing()',
        "not self.is_initializing()",
        some("test_kernels.py", "linen_forward_passes"),
    ),
    "calls with mutable vectors leave them": Mutant(
        LINEN,
        'self.is_mutable_collection("kernel_stats") and not self.is_initializing()',
        "False",
        some("test_kernels.py", "linen_forward_passes"),
    ),
    "a step that moves nothing": Mutant(
        NNX,
        "*self._own(), train=True)",
        "*self._own())",
        some("test_kernels.py", "nnx_forward_passes"),
    ),
    "every wrapped parameter is a kernel": Mutant(
        KERNELS,
        'if path[-1] == "kernel"]',
        "]",
        some("test_kernels.py", "refuse_what_does_not_fit"),
    ),
    "projected rows added to the old ones": Mutant(
        OPTIM,
        "old + update.astype(wide), train=True)[0] - old",
        "old + update.astype(wide), train=True)[0]",
        some("test_kernels.py", "unit_rows"),
    ),
    "threshold below zero": Mutant(
        TRANSLATED,
        "jnp.where(inputs[0] > bias, inputs[0], bias)",
        "jnp.where(inputs[0] > bias, inputs[0], 0 * bias)",
        some("methods/test_translated.py", "test_oracle"),
    ),
    "slopes beyond the ends": Mutant(
        TRANSLATED,
        "slope = jnp.where(inside, slope, ",
        "slope = jnp.where(inside | True, slope, ",
        some("methods/test_translated.py", "slopes_at"),
    ),
    "no gradient at the ends": Mutant(
        TRANSLATED,
        "inside = (slope >= 0) & (slope <= 1)",
        "inside = (slope > 0) & (slope < 1)",
        some("methods/test_translated.py", "slopes_at"),
    ),
    "others of an addition not masked": Mutant(
        TRANSLATED,
        "passes.inputs(self, a, mask)[0]",
        "passes.inputs(self, a, None)[0]",
        contract("WeightNormalizedAddition-masks"),
    ),
    "epsilon of the norm in its square": Mutant(
        KERNEL_NORMS,
        'if self.epsilon_place == "square":',
        'if self.epsilon_place != "":',
        some("methods/test_weights.py", "recorded or oracle"),
    ),
    "norm of zeros without a derivative": Mutant(
        KERNEL_NORMS,
        "jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)",
        "jnp.sqrt(square)",
        some("methods/test_weights.py", "zeros_are_harmless"),
    ),
    "rows times their norm": Mutant(
        KERNEL_NORMS,
        "return wide * (scale / _norm(self, wide, rows.along))",
        "return wide * (scale * _norm(self, wide, rows.along))",
        some("methods/test_weights.py", "test_oracle"),
    ),
    "standardized rows not centred": Mutant(
        KERNEL_NORMS,
        "centred = wide - _total(method, wide, rows.along) / length",
        "centred = wide",
        some("methods/test_weights.py", "test_oracle"),
    ),
    "scaled rows as long as their number": Mutant(
        KERNEL_NORMS,
        "(self.gamma / math.sqrt(_length(self, rows)))",
        "self.gamma",
        some("methods/test_weights.py", "test_oracle"),
    ),
    "kernels over the square of their factor": Mutant(
        KERNEL_NORMS,
        "return wide / jnp.sqrt(factor(self, rows, wide, found) + self.epsilon)",
        "return wide / (factor(self, rows, wide, found) + self.epsilon)",
        some("methods/test_weights.py", "test_oracle"),
    ),
    "factor of the rows of one device": Mutant(
        KERNEL_NORMS,
        "square = _total(method, side * side, tuple(range(side.ndim))).reshape(())",
        "square = jnp.sum(side * side)",
        contract("SpectralWeightNorm-devices"),
    ),
    "one step of the power iteration": Mutant(
        KERNEL_NORMS,
        "range(self.iterations if train else 0)",
        "range(1 if train else 0)",
        some("methods/test_weights.py", "recorded or oracle"),
    ),
    "windows of a bound rounded down": Mutant(
        KERNEL_NORMS,
        "math.prod(-(-n // stride) for",
        "math.prod(n // stride for",
        some("methods/test_weights.py", "factor_of_a_convolution"),
    ),
    "the other part of a wave": Mutant(
        KERNEL_NORMS,
        "jnp.square(jnp.sum(wide * direction.real))",
        "jnp.square(jnp.sum(wide * direction.imag))",
        some("methods/test_weights.py", "test_oracle"),
    ),
    "slopes from zero, not from the threshold": Mutant(
        TRANSLATED,
        "bias + slope * over)",
        "slope * over)",
        some("methods/test_translated.py", "test_oracle"),
    ),
    "weights of an addition over their square": Mutant(
        TRANSLATED,
        "norm = self.root(jnp.sum(jnp.square(jnp.stack(weights)), 0))",
        "norm = jnp.sum(jnp.square(jnp.stack(weights)), 0)",
        some("methods/test_translated.py", "oracle_of_the_addition"),
    ),
}

OF_RECONSTRUCTION = {
    "the last step is kept, not the best": Mutant(
        RECONSTRUCTION,
        "smaller = found < best[0]",
        "smaller = found < jnp.inf",
        some("analysis/test_reconstruction.py", "best_step"),
    ),
    "an error that is not finite is the best": Mutant(
        RECONSTRUCTION,
        "smaller = found < best[0]",
        "smaller = ~(found >= best[0])",
        some("analysis/test_reconstruction.py", "best_step"),
    ),
    "codes after the last step are not tried": Mutant(
        RECONSTRUCTION,
        "*better(last, best, code)",
        "*best",
        some("analysis/test_reconstruction.py", "best_step"),
    ),
    "codes of zero in place of draws": Mutant(
        RECONSTRUCTION,
        "    if key is not None:",
        "    if key is None and latent < 0:",
        some("analysis/test_reconstruction.py", "linear_generator"),
    ),
    "another optimizer of codes": Mutant(
        RECONSTRUCTION,
        "decay=0.9, eps=1e-6",
        "decay=0.99, eps=1e-6",
        some("analysis/test_reconstruction.py", "first_steps"),
    ),
    "inputs of other images": Mutant(
        RECONSTRUCTION,
        "inputs = jax.tree.map(lambda a: a[None], inputs)",
        "inputs = jax.tree.map(lambda a: a[None] * 0, inputs)",
        some("analysis/test_reconstruction.py", "inputs_and_chunks"),
    ),
    "images not centred for their code": Mutant(
        RECONSTRUCTION,
        "rest = test - mean",
        "rest = test",
        some("analysis/test_reconstruction.py", "principal_components"),
    ),
    "a component more": Mutant(
        RECONSTRUCTION,
        "full_matrices=False)[2][:latent]",
        "full_matrices=False)[2][: latent + 1]",
        some("analysis/test_reconstruction.py", "principal_components"),
    ),
}

POPULATION, OBSERVERS, MICROBATCHES = (
    f"normjax/{name}.py" for name in ("population", "observers", "training/microbatches")
)
OF_POPULATIONS = {
    "old statistics not forgotten": Mutant(
        POPULATION,
        'replace(method, momentum=0.0, running_average="exponential")',
        'replace(method, momentum=0.01, running_average="exponential")',
        some("test_population.py", "all_valid_values and exponential"),
    ),
    "average of whitening's correlations moved by one step": Mutant(
        POPULATION,
        '("covariance", 0.5)',
        '("covariance", 0.25)',
        some("test_population.py", "of_whitening"),
    ),
    "values pooled with those before": Mutant(
        POPULATION,
        "fresh = Pool(count, ",
        "fresh = Pool(count + 1, ",
        some("test_population.py", "all_valid_values and pooled"),
    ),
    "layers recalibrated in one pass": Mutant(
        POPULATION,
        "passes >= _norms(run.sites, seen)",
        "passes >= 1",
        some("test_population.py", "whatever_the_batches"),
    ),
    "an old statistic that is not a number stays": Mutant(
        POPULATION,
        "jnp.where(jnp.isfinite(a), a, jnp.ones((), a.dtype))",
        "a",
        some("test_population.py", "of_layers_against"),
    ),
    "a batch lost where sums are carried": Mutant(
        POPULATION,
        "_merge(levels[level], seen), None",
        "levels[level], None",
        some("test_population.py", "do_not_round"),
    ),
    "spread of the replicas' means left out": Mutant(
        POPULATION,
        "average(a + sum(map(jnp.square, gaps)))",
        "average(a)",
        some("test_population.py", "mixture_of_replicas"),
    ),
    "replicas weigh alike": Mutant(
        POPULATION,
        "weight = jnp.ones(()) if counts is None else counts",
        "weight = jnp.ones(())",
        some("test_population.py", "mixture_of_replicas"),
    ),
    "only the last call of a norm is observed": Mutant(
        OBSERVERS,
        "module.put_variable(STATISTICS, SEEN, merge(before, seen))",
        "module.put_variable(STATISTICS, SEEN, seen)",
        some("test_population.py", "shared_norm"),
    ),
    "branches take what others see": Mutant(
        OBSERVERS,
        "dtype=branch.dtype) == branch",
        "dtype=branch.dtype) <= branch",
        some("test_population.py", "branches"),
    ),
    "parts weigh alike, whatever counts in them": Mutant(
        MICROBATCHES,
        'return sums.sums["loss"] + penalty,',
        'return sums.means()["loss"] * 4 + penalty,',
        some("test_microbatches.py", "whole_batch"),
    ),
    "statistics move with every part": Mutant(
        MICROBATCHES,
        'if statistics != "sequential":',
        "if False:",
        some("test_microbatches.py", "is_ghost_norm"),
    ),
    "gradients summed in half precision": Mutant(
        MICROBATCHES,
        "jnp.promote_types(a.dtype, jnp.float32)",
        "a.dtype",
        some("test_microbatches.py", "half_precision"),
    ),
    "parts without a sample count": Mutant(
        MICROBATCHES,
        "return jnp.any(count > 0, range(1, count.ndim))",
        "return jnp.any(count >= 0, range(1, count.ndim))",
        some("test_microbatches.py", "by_choice"),
    ),
}

OF_FOLDING = {
    "a mean folded without the slope": Mutant(
        FOLDED_ARRAYS,
        "b = (b - mean) * slope + shift",
        "b = b * slope - mean + shift",
        some("test_folding.py", "takes_the_norm_behind_it"),
    ),
    "a matrix in front of a layer transposed": Mutant(
        FOLDED_ARRAYS,
        "folded = matrices.times(k, of.matrix, (at",
        "folded = matrices.times(k, of.matrix.mT, (at",
        some("test_folding.py", "blocks_of_whitening"),
    ),
    "the bias of a layer folded twice": Mutant(
        FOLDED_ARRAYS,
        "total = k * passes.lift(shift, at, k.ndim)",
        "total = folded * passes.lift(shift, at, k.ndim)",
        some("test_folding.py", "takes_the_norm_in_front_of_it"),
    ),
    "zeros between positions forgotten": Mutant(
        FOLDED_PROGRAM,
        "pads or spreads)",
        "pads)",
        some("test_folding.py", "takes_the_norm_in_front_of_it"),
    ),
    "other takers of an output forgotten": Mutant(
        FOLDED,
        "if program.takers[p] != [i]:",
        "if i not in program.takers[p]:",
        some("test_folding.py", "not_folded_and_why"),
    ),
    "other uses of a kernel forgotten": Mutant(
        FOLDED_PROGRAM,
        'if self.uses.get(edit.leaf(call, leaf), leaf == "bias") != 1:',
        "if False:",
        some("test_folding.py", "not_folded_and_why"),
    ),
    "the activation of a folded norm dropped": Mutant(
        FOLDED,
        "return method.epilogue(), method.dtype",
        "return None, method.dtype",
        some("test_folding.py", "resnet_of_linen"),
    ),
    "offset of a scale forgotten": Mutant(
        FOLDED,
        'scale = scale.astype(passes.wide(scale.dtype)) + getattr(method, "scale_offset", 0)',
        "scale = scale.astype(passes.wide(scale.dtype))",
        some("test_folding.py", "attention_and_mlp"),
    ),
    "a folded model at another path": Mutant(
        FOLDED_MODELS,
        "path = module.path[len(self.path) :]",
        "path = module.path",
        some("test_folding.py", "is_a_module"),
    ),
}

OF_INTEROP = {
    "kernels of transposed convolutions flipped the other way": Mutant(
        INTEROP,
        "transposed and rules.flips != whole",
        "transposed and rules.flips == whole",
        some("test_interop.py", "transposed_convolutions"),
    ),
    "running variances converted the wrong way": Mutant(
        INTEROP,
        "int(ours) - int(LIBRARIES[self.library].unbiased)",
        "int(LIBRARIES[self.library].unbiased) - int(ours)",
        some("test_interop.py", "running_variances"),
    ),
    "offsets of scales added up": Mutant(
        INTEROP,
        "return self.scale_offset - getattr(",
        "return self.scale_offset + getattr(",
        some("test_interop.py", "scales_around_zero"),
    ),
    "leaves without an array": Mutant(
        INTEROP,
        "for i, path in enumerate(paths) if i not in taken]",
        "for i, path in enumerate(paths) if i < 0]",
        some("test_interop.py", "is_listed"),
    ),
    "an array for two leaves": Mutant(
        INTEROP,
        "taken.add(j)",
        "pass",
        some("test_interop.py", "is_listed"),
    ),
    "dtypes of the arrays": Mutant(
        INTEROP,
        "a = np.asarray(a).astype(like.dtype)",
        "a = np.asarray(a)",
        some("test_interop.py", "dtypes_and_shardings"),
    ),
    "hidden averages debiased": Mutant(
        INTEROP,
        "average * -math.expm1(",
        "average / -math.expm1(",
        some("test_interop.py", "averages_of_haiku"),
    ),
    "fields of methods inside of methods are not compared": Mutant(
        INTEROP,
        "elif isinstance(value, list) and value:",
        "elif isinstance(value, dict) and value:",
        some("test_interop.py", "configuration_of_norms"),
    ),
}

OF_REGIONS = {
    "boundaries on both sides": Mutant(
        REGIONS["cells"],
        "np.where(across > 0, labels, ~labels)",
        "np.where(across > -np.inf, labels, ~labels)",
        some("analysis/test_regions.py", "boundary_is_there_once"),
    ),
    "boundaries named by the number of their functions": Mutant(
        REGIONS["cells"],
        "names = _on_side(labels[rows[cut]], gap[cut])",
        "names = labels[rows[cut]] if one < other else ~labels[rows[cut]]",
        some("analysis/test_regions.py", "every_kind"),
    ),
    "edge that leaves a half-plane keeps its label": Mutant(
        REGIONS["cells"],
        "np.where(cut, new, cells.labels)",
        "np.where(cut, cells.labels, new)",
        some("analysis/test_regions.py", "boundary_is_there_once or meets"),
    ),
    "equal values have no largest": Mutant(
        REGIONS["cells"],
        "~less & (more | (one < other))",
        "~less & more",
        some("analysis/test_regions.py", "every_kind"),
    ),
    "a window settled by its largest value anywhere": Mutant(
        REGIONS["cells"],
        "ahead.all(1).any(-1)",
        "ahead.any(1).any(-1)",
        some("analysis/test_regions.py", "every_kind"),
    ),
    "parts of a cell beside those of others": Mutant(
        REGIONS["cells"],
        "return join(sides), np.tile(",
        "return join(sides), np.repeat(",
        some("analysis/test_regions.py", "tile_the_window"),
    ),
    "values of the first cells in every batch": Mutant(
        REGIONS["subdivision"],
        "decide(part, functions[rows])",
        "decide(part, functions[: len(rows)])",
        some("analysis/test_regions.py", "in_batches"),
    ),
    "maps relative to the middle of the window": Mutant(
        REGIONS["partition"],
        "outputs[:, 2] - slopes @ _middles(window)",
        "outputs[:, 2]",
        some("analysis/test_regions.py", "tile_the_window"),
    ),
    "the changes of a segment from one side": Mutant(
        REGIONS["partition"],
        "np.maximum(cells.labels[1:, 0], ~cells.labels[1:, 0])",
        "np.abs(cells.labels[1:, 0])",
        some("analysis/test_regions.py", "meets_the_regions"),
    ),
    "a sample outside on one side": Mutant(
        REGIONS["partition"],
        "off = np.abs(points - _middles(regions.window)) >",
        "off = _middles(regions.window) - points >",
        some("analysis/test_regions.py", "bad_input"),
    ),
    "a sample off the plane": Mutant(
        REGIONS["planes"],
        "if off.any() and not project:",
        "if off.all() and not project and len(off) > 1:",
        some("analysis/test_regions.py", "bad_input"),
    ),
    "a minimum for a maximum": Mutant(
        REGIONS["rules"],
        "return np.where(more, y, x)",
        "return np.where(more, x, y)",
        some("analysis/test_regions.py", "every_kind"),
    ),
    "outputs of a convolution in the order of its numbers": Mutant(
        REGIONS["rules"],
        "np.argsort(out))",
        "np.array(out))",
        some("analysis/test_regions.py", "every_kind"),
    ),
    "results of a reversed scan reversed": Mutant(
        REGIONS["program"],
        "for i in sorted(rows)]",
        "for i in rows]",
        some("analysis/test_regions.py", "every_kind"),
    ),
    "a case for a value that is not its number": Mutant(
        REGIONS["rules"],
        "np.where(which == i, case, result)",
        "np.where(which != i, case, result)",
        some("analysis/test_regions.py", "every_kind"),
    ),
}

MUTANTS = {
    **OF_REGIONS,
    **OF_KERNELS,
    **OF_RECONSTRUCTION,
    **OF_ANALYSIS,
    **OF_POPULATIONS,
    **OF_FOLDING,
    **OF_INTEROP,
    **OF_WHITENING,
    **OF_WEIGHTS,
    **OF_SEGMENTS,
    **OF_THE_SEAM,
    **OF_PASSES,
    **OF_PROGRAMS,
    **OF_STATISTICS,
    **OF_SPECTRA,
    **OF_METHODS,
    **OF_THE_REST,
    **OF_CONDITIONS,
}
