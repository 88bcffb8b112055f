"""Norms folded into the layers beside them: what computes the same with fewer operations.

In evaluation with running statistics a norm is an affine map `x -> slope * x + shift` of each
feature, or a matrix of features for whitening. A dense or convolutional layer takes it into its
kernel and bias: of a norm behind the layer (`into_previous`) or in front of it (`into_next`). Of a
norm with statistics of its input, such as `LayerNorm`, the layers behind it take scale and bias.
`fold` finds the norms and layers of a model that allow it, and does it.

Jacob et al., *Quantization and Training of Neural Networks*, 2018, section 3.2,
https://arxiv.org/abs/1712.05877, for batch norm; Graef, Wasielewski & Clapp, *FlashNorm*, 2024,
section 1, https://arxiv.org/abs/2407.09577, for scales of norms with statistics of their input.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import core, linen, nnx
from jax.ad_checkpoint import checkpoint_name

import normjax
import normjax.linen
import normjax.nnx
from normjax import modules
from normjax.core import checks, matrices, passes
from normjax.core.compat import is_traced
from normjax.core.method import Linear, Normalizer, feature_positions, traits
from normjax.core.structs import Axes, several

__all__ = ["Folded", "FoldedModel", "Rest", "fold", "into_next", "into_previous"]

# Of these, which have statistics of their input or are no affine maps, scale and bias come last.
AFFINE_LAST = (
    normjax.LayerNorm,
    normjax.RMSNorm,
    normjax.GroupNorm,
    normjax.InstanceNorm,
    normjax.EvalNorm,
    normjax.DynamicTanh,
    normjax.Derf,
)


def into_previous(
    kernel: jax.Array,
    bias: jax.Array | None,
    normalizer: Normalizer | Linear,
    *,
    axes: Axes = -1,
    groups: int = 1,
) -> tuple[jax.Array, jax.Array | None]:
    """Kernel and bias of a layer and the norm behind it.

    Exact for every dense layer and convolution, with strides, dilations and padding too. Computed
    in at least float32 and rounded once, to the dtypes of kernel and bias (without bias: that of
    the kernel). Without bias, and where the norm has none and no mean, the bias stays None.

    Args:
      kernel: of a dense layer [..., features], of a convolution [..., inputs, features].
      bias: of the shape of the `axes` of the kernel; None: zero.
      normalizer: what `method.evaluation(params, state)` returns; its arrays broadcast to the shape
        of the `axes`.
      axes: those of the kernel that are the features of the output, in their order: -1, or -2 for
        the transposed kernel of a transposed convolution, or several.
      groups: groups of features of a convolution: blocks of a matrix must lie within one.

    Raises:
      ValueError: for shapes that do not fit, and blocks of a matrix across groups.

    Example:
      >>> import jax.numpy as jnp, normjax as nj, normjax.folding as folding
      >>> method = nj.BatchNorm(epsilon=0.0)
      >>> params, state = method.init(None, 2)
      >>> state = state._replace(mean=jnp.array([1.0, 2.0]), var=jnp.array([4.0, 0.25]))
      >>> normalizer = method.evaluation(params, state)
      >>> kernel, bias = folding.into_previous(jnp.ones((3, 2)), None, normalizer)
      >>> kernel[0].tolist(), bias.tolist()
      ([0.5, 2.0], [-0.5, -4.0])
    """
    name, at = "into_previous", checks.as_axes("into_previous", "axes", axes, kernel.shape)
    sizes = tuple(kernel.shape[i] for i in at)
    k, b = _wide(name, kernel, bias, sizes)
    if isinstance(normalizer, Linear):
        of = _blocks(name, normalizer, sizes, groups)
        k = matrices.times(k, of.matrix.mT, (at, of.matrix.shape[-1]))
        b = _mix(of, b)
    else:
        mean, slope, shift = _affine(name, normalizer, sizes, k.dtype)
        k = k * passes.lift(slope, at, k.ndim)
        b = (b - mean) * slope + shift
    return _narrow(kernel, bias, normalizer, k, b)


def into_next(
    kernel: jax.Array,
    bias: jax.Array | None,
    normalizer: Normalizer | Linear,
    *,
    inputs: Axes = -2,
    outputs: Axes = -1,
    groups: int = 1,
    padded: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Kernel and bias of a layer and the norm in front of it.

    With a shift this is not exact for a convolution that is `padded` with zeros: the layer pads the
    output of the norm, and folded its input, whose zeros the norm would have shifted. At borders
    the sum over the kernel then lacks positions, and no bias can say so. Dtypes are those of
    `into_previous`.

    Args:
      kernel: of a dense layer [inputs, features], of a convolution [..., inputs, features].
      bias: of the shape of the axes `outputs` of the kernel; None: zero.
      normalizer: as for `into_previous`, of the shape of the axes `inputs`, for a convolution with
        groups of the inputs of all groups.
      inputs, outputs: the axes of the kernel that are features of input and output; all but the
        outputs are summed over.
      groups: groups of features of a convolution.
      padded: whether the layer pads with zeros, or puts zeros between positions.

    Raises:
      ValueError: for shapes that do not fit, blocks of a matrix across groups, groups with other
        `inputs` and `outputs` than the last two axes, and a shift that is not zero, or traced,
        where the layer is `padded`.

    Example:
      >>> import jax.numpy as jnp, normjax as nj, normjax.folding as folding
      >>> normalizer = nj.Normalizer(scale=jnp.array([2.0, 3.0]), bias=jnp.array([1.0, -1.0]))
      >>> kernel, bias = folding.into_next(jnp.array([[1.0], [5.0]]), None, normalizer)
      >>> kernel.tolist(), bias.tolist()
      ([[2.0], [15.0]], [-4.0])
    """
    name = "into_next"
    at = checks.as_axes(name, "inputs", inputs, kernel.shape)
    out = checks.as_axes(name, "outputs", outputs, kernel.shape)
    sizes = tuple(kernel.shape[i] for i in out)
    k, b = _wide(name, kernel, bias, sizes)
    if groups > 1:
        _require_last(name, groups, k.shape, at, out)
        k = _join_groups(k, groups)
    of_inputs = tuple(k.shape[i] for i in at)
    if isinstance(normalizer, Linear):
        of = _blocks(name, normalizer, of_inputs, groups)
        folded = matrices.times(k, of.matrix, (at, of.matrix.shape[-1]))
        shift = _mix(of, jnp.zeros(of_inputs, k.dtype))
    else:
        mean, slope, shift = _affine(name, normalizer, of_inputs, k.dtype)
        folded, shift = k * passes.lift(slope, at, k.ndim), shift - mean * slope
    if padded and (is_traced(shift) or bool(jnp.any(shift != 0))):
        raise ValueError(
            f"{name}: the layer pads with zeros, and the norm shifts what it is given: at the "
            "borders no bias makes up for the shift. Leave the norm, or pad its output yourself."
        )
    total = k * passes.lift(shift, at, k.ndim)
    if groups > 1:
        folded, total = (_split_groups(a, groups) for a in (folded, total))
    b = b + jnp.sum(total, tuple(i for i in range(k.ndim) if i not in out))
    return _narrow(kernel, bias, normalizer, folded, b)


def _wide(name, kernel, bias, sizes):
    """Kernel and bias in at least float32."""
    if bias is not None and bias.shape != sizes:
        raise ValueError(
            f"{name}: a bias of shape {bias.shape} for a kernel of shape {kernel.shape} with "
            f"features {sizes}."
        )
    dtype = passes.wide(kernel.dtype)
    return kernel.astype(dtype), jnp.zeros(sizes, dtype) if bias is None else bias.astype(dtype)


def _narrow(kernel, bias, normalizer, k, b):
    """Folded kernel and bias in the dtypes of those given; None for a bias that nobody needs."""
    if bias is None and normalizer.mean is None and normalizer.bias is None:
        return k.astype(kernel.dtype), None
    return k.astype(kernel.dtype), b.astype(kernel.dtype if bias is None else bias.dtype)


def _affine(name, normalizer, sizes, dtype):
    """Mean, slope and shift of `(x - mean) * slope + shift`, each of shape `sizes`."""

    def whole(a, default):
        a = jnp.asarray(default if a is None else a, dtype)
        pairs = zip(a.shape, sizes, strict=False)
        if a.ndim not in (0, len(sizes)) or any(n not in (1, m) for n, m in pairs):
            raise ValueError(f"{name}: a normalizer of {a.shape} features for {sizes} of a kernel.")
        return jnp.broadcast_to(a, sizes)

    mean, inverse, scale, bias = map(whole, normalizer, (0, 1, 1, 0))
    return mean, inverse * scale, bias


def _blocks(name, linear, sizes, groups):
    """`linear` with a matrix for each block of the features."""
    features, size = math.prod(sizes), linear.matrix.shape[-1]
    number, fits = -(-features // size), len(linear.matrix)
    if fits not in (1, number) or (linear.bias is not None and linear.bias.shape != sizes):
        given = f"matrices {linear.matrix.shape}"
        raise ValueError(f"{name}: {given} of a normalizer do not fit features {sizes}.")
    if groups > 1 and features // groups % size:
        raise ValueError(
            f"{name}: blocks of {size} features that whitening mixes lie across {groups} groups of "
            f"a convolution with {features} features: take a group_size that divides a group."
        )
    whole = lambda a: jnp.broadcast_to(a, (number, *a.shape[1:]))
    return linear._replace(mean=whole(linear.mean), matrix=whole(linear.matrix))


def _mix(linear, b):
    """The output of `linear` for one position with the features `b`."""
    where = tuple(range(1, b.ndim + 1)), linear.matrix.shape[-1]
    return matrices.mix(b[None], linear.mean, linear.matrix, linear.bias, where)[0]


def _require_last(name, groups, shape, at, out):
    rank = len(shape)
    if (at, out) != ((rank - 2,), (rank - 1,)) or shape[-1] % groups:
        raise ValueError(
            f"{name}: groups={groups} and a kernel of shape {shape} with inputs {at} and outputs "
            f"{out}: they are its last two axes, and groups divide the outputs."
        )


def _join_groups(k, groups):
    """[..., inputs of a group, outputs] as [..., inputs, outputs of a group]."""
    *space, inputs, outputs = k.shape
    k = jnp.moveaxis(k.reshape(*space, inputs, groups, outputs // groups), -2, -3)
    return k.reshape(*space, groups * inputs, outputs // groups)


def _split_groups(k, groups):
    """The inverse of `_join_groups`."""
    *space, inputs, outputs = k.shape
    k = jnp.moveaxis(k.reshape(*space, groups, inputs // groups, outputs), -3, -2)
    return k.reshape(*space, inputs // groups, groups * outputs)


class Rest(nnx.Module):
    """What is left of a norm that was folded: its activation, and the dtype of its output.

    It takes the place of the norm in a folded model of NNX, and takes the same arguments.

    Example:
      >>> import jax, normjax.folding as folding
      >>> folding.Rest(jax.nn.relu, None)(jax.numpy.array([-1.0, 1.0]), use_running_average=True)
      Array([0., 1.], dtype=float32)
    """

    def __init__(self, activation: Callable[[jax.Array], jax.Array] | None, dtype: Any):
        self.activation = activation
        self.dtype = dtype

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """The activation of `x`, in at least float32, rounded to `dtype` or that of `x`."""
        return _rest(self.activation, self.dtype, x)


def _rest(activation, dtype, x):
    wide = x.astype(passes.wide(x.dtype))
    return passes.activate(activation, wide).astype(passes.output_dtype(dtype, x))


@dataclasses.dataclass(frozen=True)
class _Folds:
    """A model, which `linen.Module` would make a child if it were a field, and what to change."""

    model: linen.Module
    skipped: tuple[tuple[Any, ...], ...]  # path, activation and dtype of norms left out
    changed: tuple[tuple[Any, tuple[tuple[str, Any], ...]], ...]  # path and new fields


class FoldedModel(linen.Module):
    """A Linen model that leaves out the norms that were folded; `fold` makes it.

    It is called as the model, and has its variables at the same paths: those of the same code
    without the folded norms, and with `use_bias=True` in the layers that took them. That code runs
    with these variables too.

    Attributes:
      folds: the model, and what is different.

    Example:
      >>> import jax, flax.linen as nn, normjax.folding as folding, normjax.linen
      >>> norm = normjax.linen.BatchNorm(use_running_average=True)
      >>> model, x = nn.Sequential([nn.Dense(2, use_bias=False), norm]), jax.numpy.ones((3, 4))
      >>> folded = folding.fold(model, model.init(jax.random.key(0), x), x).model
      >>> without = nn.Sequential([nn.Dense(2)])
      >>> folded.apply(without.init(jax.random.key(0), x), x).shape
      (3, 2)
    """

    folds: _Folds

    @linen.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns."""
        skipped = {path: rest for path, *rest in self.folds.skipped}
        changed = {path: dict(fields) for path, fields in self.folds.changed}

        def run(call, args, kwargs, context):
            module = context.module
            path = module.path[len(self.path) :]
            if context.method_name != "__call__":
                return call(*args, **kwargs)
            if path in skipped:
                return _rest(*skipped[path], *args[:1])
            fields = changed.get(path, {})
            if all(getattr(module, name) == value for name, value in fields.items()):
                return call(*args, **kwargs)
            return module.clone(parent=module.scope, **fields)(*args, **kwargs)

        with linen.intercept_methods(run):
            return self.folds.model.clone(parent=self.scope)(*args, **kwargs)


class Folded(NamedTuple):
    """A folded model, what was folded and what was not, and how far the outputs are apart.

    Norms and layers are named by their path, such as "block_1/norm".

    Attributes:
      model: Linen: a `FoldedModel`; NNX: a model of its own, with `Rest` in place of norms.
      variables: Linen: its variables; NNX: None, the model holds them.
      folded: the layers that took each norm, or its scale and bias.
      kept: why each other norm was left.
      absolute, relative: largest difference between the outputs of both models for the arguments
        of `fold`; relative to the largest value of an output.

    Example:
      >>> import jax, flax.linen as nn, normjax.folding as folding, normjax.linen
      >>> model = nn.Sequential([nn.Dense(2), normjax.linen.GroupNorm(2), nn.relu])
      >>> x = jax.numpy.ones((2, 3, 4))
      >>> done = folding.fold(model, model.init(jax.random.key(0), x), x)
      >>> done.folded, list(done.kept), done.absolute
      ({}, ['layers_1'], 0.0)
    """

    model: Any
    variables: Any
    folded: dict[str, tuple[str, ...]]
    kept: dict[str, str]
    absolute: float
    relative: float


def fold(
    model: linen.Module | nnx.Module,
    *args: Any,
    pairs: Iterable[tuple[str, str | tuple[str, ...]]] | None = None,
    norm_inputs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Folded:
    """Folds the norms of a model into its layers, for evaluation.

    A norm is folded into the dense or convolutional layer whose output it takes, if nothing else
    takes that, or else into the layers that take its output, if nothing else does. Between them
    there may be nothing: not even a reshape or an activation, but a norm keeps its own
    (`activation`). Of a norm with statistics of its input (`LayerNorm`, `RMSNorm`, `GroupNorm`,
    ...) scale and bias are folded into the layers behind it. Layers without bias get one where
    there is a shift. Which module takes which output, and that nothing else uses it or a kernel, is
    read from the program that JAX makes of the model.

    Norms must evaluate: give the arguments with which the model does (in NNX `model.eval()` first).
    Masks change nothing of evaluation but the output at masked positions.

    Args:
      model: a model of Linen or NNX; it stays as it is.
      *args, **kwargs: those of its call, in Linen those of `model.apply`, with the variables first.
      pairs: norms with the layers that shall take them, by path, as
        [("norm_1", "conv_1"), ("norm_2", ("query", "key"))]; None: all that can be folded.
      norm_inputs: the one class or branch for which conditional norms are folded, as
        {"condition": 3, "branch": 0}.

    Returns:
      The folded model, with what was folded, what was not and why, and the largest differences.
      Kernels are folded in at least float32 and rounded to their dtype: in half precision the
      differences tell what that costs.

    Raises:
      TypeError: for what is no Flax module, or no variables in Linen.
      ValueError: for a pair that can not be folded, with the reason, and for paths and inputs of
        norms that there are none of.

    Example:
      >>> import jax, flax.linen as nn, normjax.folding as folding, normjax.linen
      >>> norm = normjax.linen.BatchNorm(use_running_average=True)
      >>> model = nn.Sequential([nn.Conv(4, (3, 3), use_bias=False), norm, nn.relu])
      >>> x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
      >>> done = folding.fold(model, model.init(jax.random.key(1), x), x)
      >>> done.folded, done.kept, done.relative < 1e-6
      ({'layers_1': ('layers_0',)}, {}, True)
      >>> y = done.model.apply(done.variables, x)
      >>> jax.tree.map(jax.numpy.shape, done.variables)
      {'params': {'layers_0': {'bias': (4,), 'kernel': (3, 3, 3, 4)}}}
    """
    kwargs.pop("mutable", None)
    program = _Program.of(model, args, kwargs)
    edit = _Nnx(model) if isinstance(model, nnx.Module) else _Linen(model, args[0])
    norm_inputs = dict(norm_inputs or {})
    _check_inputs(program, norm_inputs)
    wanted = None if pairs is None else _wanted(program, pairs)
    done, kept = {}, {}
    for i in program.norms():
        name, reasons = program.name(i), {}
        if wanted is not None and name not in wanted:
            continue
        for find, where in ((_previous, "in front"), (_next, "behind")):
            try:
                takers, kernels, rest = find(program, edit, i, norm_inputs)
                if wanted is not None and wanted[name] != sorted(map(program.name, takers)):
                    names = ", ".join(map(program.name, takers))
                    raise ValueError(f"the layers that can take it are {names}")
            except ValueError as error:
                reasons[where] = str(error).rstrip(".")
                continue
            for taker, arrays in zip(takers, kernels, strict=True):
                edit.write(program.calls[taker], *arrays)
            edit.leave(program.calls[i], rest)
            done[name] = tuple(map(program.name, takers))
            break
        else:
            front, behind = (f"{where}: {text}" for where, text in reasons.items())
            same = len(set(reasons.values())) == 1
            kept[name] = reasons["behind"] if same else f"{front}; {behind}"
            if wanted is not None:
                raise ValueError(f"fold: {name!r} can not be folded: {kept[name]}.")
    new, variables = edit.result()
    given = args if variables is None else (variables, *args[1:])
    differences = _differences((model, args, kwargs), (new, given, kwargs))
    return Folded(new, variables, done, kept, *differences)


def _check_inputs(program, norm_inputs):
    """ValueError for an input that no norm takes."""
    taken = {name for i in program.norms() for name in traits(program.method(i)).inputs}
    for name in norm_inputs.keys() - taken:
        raise ValueError(f"fold: norm_inputs has {name!r}, which no norm of the model takes.")


def _wanted(program, pairs):
    """The paths of layers by norm; ValueError for one that the model lacks."""
    wanted = {norm: sorted(several(layers)) for norm, layers in pairs}
    norms = [program.name(i) for i in program.norms()]
    layers = [program.name(i) for i in program.layers()]
    for kind, names, have in (
        ("norm", wanted, norms),
        ("layer", (name for many in wanted.values() for name in many), layers),
    ):
        for name in names:
            if name not in have:
                known = ", ".join(have[:8])
                raise ValueError(f"fold: no {kind} has the path {name!r}. There are: {known}.")
    return wanted


def _previous(program, edit, i, norm_inputs):
    """How the layer in front of norm `i` takes it: layers, their arrays, what is left of it."""
    call = program.norm(i)
    method, normalizer = _normalizer(edit, call, norm_inputs)
    p = program.producers.get(i)
    if p is None or program.layout(p) is None:
        raise ValueError("its input is not the output of a dense or convolutional layer")
    if program.takers[p] != [i]:
        raise ValueError(f"something else takes the output of {program.name(p)} too")
    layout, arrays = program.layer(p, edit)
    normalizer = _on_axes(normalizer, method, program.calls[p].output.shape, layout.outputs)
    how = dict(axes=tuple(layout.outputs.values()), groups=layout.groups)
    return [p], [into_previous(*arrays, normalizer, **how)], _left(method)


def _next(program, edit, i, norm_inputs):
    """How the layers behind norm `i` take it, or its scale and bias."""
    call = program.norm(i)
    if isinstance(program.method(i), AFFINE_LAST):
        method, normalizer = _affine_last(edit, call)
        left, activation = None, getattr(method, "activation", None)
    else:
        method, normalizer = _normalizer(edit, call, norm_inputs)
        left = _left(method)
        activation = left[0]
    if activation is not None:
        raise ValueError("its activation lies in front of what takes its output")
    takers = program.takers[i]
    if not takers or any(t is None or program.layout(t) is None for t in takers):
        raise ValueError("more than dense and convolutional layers takes its output")
    new = []
    for t in takers:
        layout, arrays = program.layer(t, edit)
        on = _on_axes(normalizer, method, program.calls[t].args[0].shape, layout.inputs)
        axes = dict(inputs=tuple(layout.inputs.values()), outputs=tuple(layout.outputs.values()))
        new.append(into_next(*arrays, on, **axes, groups=layout.groups, padded=layout.padded))
    return takers, new, left


def _normalizer(edit, call, norm_inputs):
    """The method of a norm and its affine map; ValueError if it has none in evaluation."""
    method, params, state = edit.norm(call)
    if not hasattr(method, "evaluation"):
        raise ValueError(f"{type(method).__name__} is no affine map in evaluation")
    names = traits(method).inputs.keys() & {"branch", "condition"}
    given = {name: norm_inputs.get(name) for name in names}
    return method, method.evaluation(params, state, **given)


def _affine_last(edit, call):
    """The method of a norm, and its scale and bias, where these come last."""
    method, params, _ = edit.norm(call)
    if call.kwargs.get("gate") is not None:
        raise ValueError("its gate lies behind scale and bias")
    if params.scale is None and params.bias is None:
        raise ValueError(f"{type(method).__name__} has neither scale nor bias")
    scale = params.scale
    if scale is not None:
        scale = scale.astype(passes.wide(scale.dtype)) + getattr(method, "scale_offset", 0)
    return method, Normalizer(scale=scale, bias=getattr(params, "bias", None))


def _left(method):
    """Activation and dtype of a method: what is left of it when it is folded."""
    while not hasattr(method, "epilogue"):  # a wrapper
        method = method.method
    return method.epilogue(), method.dtype


def _on_axes(normalizer, method, shape, axes):
    """`normalizer` for all of the `axes` of features of an array of `shape`."""
    at = feature_positions(method, shape)
    if not set(at) <= axes.keys() or (isinstance(normalizer, Linear) and len(at) < len(axes)):
        raise ValueError(f"its features lie on axes {at}, those of the layer on {tuple(axes)}")
    if isinstance(normalizer, Linear):
        return normalizer
    lacking = tuple(n for n, axis in enumerate(axes) if axis not in at)
    lift = lambda a: jnp.expand_dims(a, lacking) if a.ndim == len(at) else a
    return Normalizer(*(None if a is None else lift(a) for a in normalizer))


class _Layout(NamedTuple):
    """How a layer applies its kernel: axes of its input and output and those of the kernel."""

    inputs: dict[int, int]
    outputs: dict[int, int]  # increasing, as the axes of the bias
    rank: int
    groups: int = 1
    padded: bool = False  # with zeros, around the input or between its positions


def _dense(module, x, y):
    return _Layout({x.ndim - 1: 0}, {y.ndim - 1: 1}, 2)


def _general(module, x, y):
    batch = tuple(getattr(module, "batch_axis", None) or getattr(module, "batch_dims", ()))
    axis = sorted(a % x.ndim for a in several(module.axis))
    features = len(several(getattr(module, "features", None) or module.out_features))
    inputs = {a: len(batch) + n for n, a in enumerate(axis)}
    rank = len(batch) + len(axis) + features
    outputs = {n: n for n in batch}
    outputs |= {y.ndim - n: rank - n for n in range(features, 0, -1)}
    return _Layout(inputs, outputs, rank)


def _einsum(module, x, y):
    text = module.einsum_str.replace(" ", "")
    sides, result = text.split("->")
    left, kernel = sides.split(",")
    if "..." in kernel:
        return None
    free = "".join(c for c in map(chr, range(ord("A"), ord("z"))) if c.isalpha() and c not in text)
    dots = free[: max(x.ndim - len(left.replace("...", "")), 0)]
    left, result = (side.replace("...", dots) for side in (left, result))
    outputs = {n: kernel.index(c) for n, c in enumerate(result) if c in kernel}
    inputs = {n: kernel.index(c) for n, c in enumerate(left) if c in kernel and c not in result}
    if any(list(axes.values()) != sorted(axes.values()) for axes in (inputs, outputs)):
        return None
    return _Layout(inputs, outputs, len(kernel))


def _conv(module, x, y):
    sizes, padding = several(module.kernel_size), module.padding
    names = isinstance(padding, str)
    pads = padding not in ("VALID", "CIRCULAR", "REFLECT") if names else bool(np.any(padding))
    small = names and padding in ("SAME", "CAUSAL", "SAME_LOWER") and set(sizes) == {1}
    between = np.any(np.asarray(module.input_dilation or 1) > 1)
    rank = len(sizes)
    outputs, padded = {y.ndim - 1: rank + 1}, bool(between) or (pads and not small)
    return _Layout({x.ndim - 1: rank}, outputs, rank + 2, module.feature_group_count, padded)


def _transposed(module, x, y):
    rank = len(several(module.kernel_size))
    swap = module.transpose_kernel
    axes = {x.ndim - 1: rank + swap}, {y.ndim - 1: rank + 1 - swap}
    return _Layout(*axes, rank + 2, padded=True)


LAYERS = (
    (linen.Dense, _dense),
    (nnx.Linear, _dense),
    (linen.DenseGeneral, _general),
    (nnx.LinearGeneral, _general),
    (linen.Einsum, _einsum),
    (nnx.Einsum, _einsum),
    (linen.Conv, _conv),
    (nnx.Conv, _conv),
    (linen.ConvTranspose, _transposed),
    (nnx.ConvTranspose, _transposed),
)


@dataclasses.dataclass
class _Program:
    """The calls of norms and layers of a model, and what JAX's program of it does between them."""

    calls: dict[int, modules.Visit]
    producers: dict[int, int]  # of a call, that whose output it takes
    takers: dict[int, list[int | None]]  # those that take the output of a call; None: anything else
    looped: set[int]
    uses: dict[tuple[str, ...], int]  # how often the program uses a variable

    @classmethod
    def of(cls, model, args, kwargs):
        """Traces a model whose norms and layers mark what they take and return."""
        calls = {}

        def mark(path, module, call, args, kwargs):
            layer = any(_is_layer(module, kind) for kind, _ in LAYERS)
            if not (layer or isinstance(module, normjax.linen.Front | normjax.nnx.Norm)):
                return call(*args, **kwargs)
            i = len(calls)
            marked = [checkpoint_name(x, f"{MARK}takes {i}") for x in args[:1]]
            output = checkpoint_name(call(*marked, *args[1:], **kwargs), f"{MARK}gives {i}")
            calls[i] = modules.Visit(path, module, args, kwargs, output)
            return output

        run, variables, arrays = modules.intercept(model, mark, *args, **kwargs)
        program = jax.make_jaxpr(run)(variables, arrays).jaxpr
        found = cls({}, {}, {}, set(), {})
        found._read(program, False)
        found.calls = {i: calls[i] for i in sorted(found.takers)}
        paths = [_names(path) for path, _ in jax.tree.leaves_with_path(variables)]
        counts = _uses(program)
        found.uses = {path: counts[v] for path, v in zip(paths, program.invars, strict=False)}
        return found

    def _read(self, program, looped):
        """Notes the marks of a program and of those inside of it."""
        users = collections.defaultdict(list)
        for eqn in program.eqns:
            for v in eqn.invars:
                if not hasattr(v, "val"):  # no constant
                    users[v].append(_mark(eqn, "takes"))
        for v in program.outvars:
            if not hasattr(v, "val"):
                users[v].append(None)
        for eqn in program.eqns:
            i = _mark(eqn, "gives")
            if i is not None:
                self.takers[i] = users[eqn.outvars[0]]
                self.producers |= {j: i for j in self.takers[i] if j is not None}
                self.looped |= {i} if looped else set()
            for inner in _inside(eqn):
                self._read(inner, looped or eqn.primitive.name in ("scan", "while"))

    def name(self, i):
        return "/".join(map(str, self.calls[i].path))

    def norms(self):
        return [i for i in self.calls if not self.layers([i])]

    def layers(self, among=None):
        """The calls of layers."""
        every = self.calls if among is None else among
        kinds = [kind for kind, _ in LAYERS]
        return [i for i in every if any(_is_layer(self.calls[i].module, kind) for kind in kinds)]

    def method(self, i):
        module = self.calls[i].module
        return module.method if isinstance(module, nnx.Module) else module.method_of()

    def norm(self, i):
        """The call of a norm; ValueError if it cannot be folded for how it is called."""
        call = self.calls[i]
        self._require_once(i)
        said = call.kwargs.get("use_running_average", call.args[1] if call.args[1:] else None)
        if traits(self.method(i)).trains and not _evaluates(call.module, said):
            raise ValueError("it is called for training, with statistics of the batch")
        return call

    def layout(self, i):
        """The layout of a call of a layer; None for one of a norm, or if it is not simple."""
        call = self.calls[i]
        for kind, layout in LAYERS:
            if _is_layer(call.module, kind) and call.args:
                return layout(call.module, call.args[0], call.output)
        return None

    def layer(self, i, edit):
        """Layout, kernel and bias of a layer; ValueError if they cannot take a norm."""
        call, name = self.calls[i], self.name(i)
        self._require_once(i)
        layout: Any = self.layout(i)
        if getattr(call.module, "mask", None) is not None:
            raise ValueError(f"{name} has a mask of its kernel")
        for leaf in ("kernel", "bias"):
            if self.uses.get(edit.leaf(call, leaf), 1 if leaf == "bias" else 0) != 1:
                raise ValueError(f"something else uses the {leaf} of {name} too")
        kernel, bias = edit.layer(call)
        x, y = call.args[0], call.output
        sizes = [(kernel.shape[k] * layout.groups, x.shape[n]) for n, k in layout.inputs.items()]
        sizes += [(kernel.shape[k], y.shape[n]) for n, k in layout.outputs.items()]
        if kernel.ndim != layout.rank or any(a != b for a, b in sizes):
            shapes = f"{kernel.shape} for an input of shape {x.shape}"
            raise ValueError(f"{name} is one of several layers whose kernels are stacked: {shapes}")
        return layout, (kernel, bias)

    def _require_once(self, i):
        path = self.calls[i].path
        times = sum(call.path == path for call in self.calls.values())
        if times > 1:
            raise ValueError(f"{self.name(i)} is called {times} times")
        if i in self.looped:
            raise ValueError(f"{self.name(i)} runs in a loop (`scan`)")


MARK = "normjax.folding "


def _mark(eqn, kind):
    """The number in a mark of this kind; None for any other step of a program."""
    name = eqn.params.get("name") if eqn.primitive.name == "name" else None
    mine = isinstance(name, str) and name.startswith(f"{MARK}{kind} ")
    return int(name.split()[-1]) if mine else None


def _inside(eqn) -> Iterator[Any]:
    """The programs in a step of a program."""
    for value in eqn.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            each = getattr(each, "jaxpr", each)
            if hasattr(each, "eqns"):
                yield each


def _uses(program):
    """How often each variable of a program is used in it, and in programs inside."""
    counts = collections.Counter()
    for eqn in program.eqns:
        inner = list(_inside(eqn))
        for part in inner:
            own = _uses(part) + collections.Counter(v for v in part.outvars if v in part.invars)
            for v, a in zip(reversed(eqn.invars), reversed(part.invars), strict=False):
                if not hasattr(v, "val"):
                    counts[v] += own[a]
        if not inner:
            counts.update(v for v in eqn.invars if not hasattr(v, "val"))
    return counts


def _names(path):
    """A path of JAX as names, without the `value` of a box or a variable."""
    names = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
    return names[:-1] if isinstance(path[-1], jax.tree_util.GetAttrKey) else names


def _is_layer(module, kind):
    """Whether a module is of a class of Flax, or of one that calls it alike."""
    return isinstance(module, kind) and type(module).__call__ is kind.__call__


def _evaluates(module, said):
    if isinstance(module, nnx.Module):
        return module.use_running_average if said is None else said
    return module.evaluates(said)


def _affine_fields(method):
    """The fields by which a method goes without scale and bias."""
    return {name: False for name in ("use_scale", "use_bias") if hasattr(method, name)}


class _Linen:
    """The variables of a Linen model, to be changed."""

    def __init__(self, model, variables):
        self.model = model
        self.old = variables
        self.new = jax.tree.map(lambda a: a, core.unfreeze(variables))
        self.skipped = []
        self.changed = collections.defaultdict(dict)

    def leaf(self, call, name):
        return ("params", *call.path, name)

    def norm(self, call):
        at = {name: _at(tree, call.path) for name, tree in self.old.items()}
        bound = call.module.bind({name: tree for name, tree in at.items() if tree is not None})
        return call.module.method_of(), *bound.unpack(call.args[0])

    def layer(self, call):
        own = linen.unbox(_at(self.new["params"], call.path))
        return own["kernel"], own.get("bias")

    def write(self, call, kernel, bias):
        own = _at(self.new["params"], call.path)
        for name, value in (("kernel", kernel), ("bias", bias)):
            old = own.get(name)
            if value is not None:
                boxed = isinstance(old, core.meta.AxisMetadata)
                own[name] = old.replace_boxed(value) if boxed else value
                if old is None:
                    self.changed[call.path]["use_bias"] = True

    def leave(self, call, left):
        if left is not None:
            self.skipped.append((call.path, *left))
            for name in self.new:
                self.new[name] = _without(self.new[name], call.path)
            return
        for name in ("scale", "bias"):
            self.new["params"] = _without(self.new["params"], (*call.path, name))
        method = call.module.method_of()
        fields = _affine_fields(method)
        if isinstance(call.module, normjax.linen.Norm):
            fields = {"method": dataclasses.replace(method, **fields)}
        self.changed[call.path] |= fields

    def result(self):
        changed = tuple((path, tuple(fields.items())) for path, fields in self.changed.items())
        model = FoldedModel(_Folds(self.model, tuple(self.skipped), changed))
        return model, {name: tree for name, tree in self.new.items() if tree or not self.old[name]}


def _at(tree, path):
    """The part of nested dicts at a path, or None."""
    for name in path:
        tree = None if tree is None else tree.get(name)
    return tree


def _without(tree, path):
    """Nested dicts without the part at a path, and without what is then empty."""
    if path[0] not in tree:
        return tree
    inner = _without(tree[path[0]], path[1:]) if path[1:] else {}
    rest = {name: part for name, part in tree.items() if name != path[0]}
    return {**rest, path[0]: inner} if inner else rest


class _Nnx:
    """A copy of an NNX model, to be changed."""

    def __init__(self, model):
        self.model = nnx.clone(model)
        self.modules = dict(nnx.iter_modules(self.model))

    def leaf(self, call, name):
        return (*map(str, call.path), name)

    def norm(self, call):
        if not self._holders(call):
            raise ValueError("the model holds it in a list or dict: take nnx.List or nnx.Dict")
        norm = self.modules[call.path]
        return norm.method, *norm.unpack()

    def layer(self, call):
        own = self.modules[call.path]
        return own.kernel[...], None if own.bias is None else own.bias[...]

    def write(self, call, kernel, bias):
        own = self.modules[call.path]
        own.kernel.set_value(kernel)
        if bias is None:
            return
        if own.bias is not None:
            own.bias.set_value(bias)
            return
        own.bias = nnx.Param(bias)
        if hasattr(own, "use_bias"):
            own.use_bias = True

    def leave(self, call, left):
        if left is not None:
            for holder, name in self._holders(call):
                setattr(holder, name, Rest(*left))
            return
        norm = self.modules[call.path]
        for name in _affine_fields(norm.method):
            setattr(norm, name, False)
            setattr(norm, name.removeprefix("use_"), nnx.data(None))

    def _holders(self, call):
        """The modules with an attribute that is the module of a call, and its name."""
        own = self.modules[call.path]
        every = [m for _, m in nnx.iter_modules(self.model)]
        return [(m, name) for m in every for name, value in vars(m).items() if value is own]

    def result(self):
        return self.model, None


def _differences(old, new):
    """The largest absolute and relative difference of the outputs of two calls of models."""
    absolute = relative = 0.0
    for a, b in zip(_outputs(*old), _outputs(*new), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating) and a.size:
            a, b = (np.asarray(value).astype("float64") for value in (a, b))
            gap, size = float(np.max(np.abs(a - b))), float(np.max(np.abs(a)))
            absolute = max(absolute, gap)
            relative = max(relative, gap / size if gap else 0.0)
    return absolute, relative


def _outputs(model, args, kwargs):
    plain = lambda path, module, call, args, kwargs: call(*args, **kwargs)
    run, *inputs = modules.intercept(model, plain, *args, **kwargs)
    return jax.jit(run)(*inputs)
