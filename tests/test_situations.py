"""Situations that users meet, over all methods and both front ends."""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, KERNELS
from flax import linen as nn
from flax import nnx as fnnx
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_passes import primitives

import normjax as nj
from normjax import linen, nnx
from normjax.core import passes
from normjax.core.method import feature_axes, parts
from normjax.testing import count_collectives, residual_bytes, with_axis_name

METHODS = {name: case for name, case in CASES.items() if "," not in name}
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
HEADS = pytest.mark.parametrize("case", METHODS.values(), ids=METHODS)
LEAKS = ("BatchNorm", "LayerNorm, gelu inside", "SpectralBatchNorm, ring")
OVER_AXES = ("BatchNorm", "GroupNorm", "ExclusiveBatchNorm", "GhostNoiseBatchNorm", "KalmanNorm")
COMPARED = [METHODS[name] for name in ("BatchNorm", "LayerNorm", "GhostNoise", "KalmanNorm")]
STATELESS = ("LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm", "Affine", "DynamicTanh")


def draw(seed, *shape, dtype="float32"):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def loss(case, params, state, x, **how):
    y, new = case.apply(params, state, x, **how)
    return jnp.sum(jnp.sin(y.astype(jnp.float32))), new


def check_leaks(names):
    """Traces the derivatives of cases as one does who hunts for a leaked tracer."""
    for case in map(CASES.get, names):
        params, state = case.variables()
        run = functools.partial(loss, case)
        with jax.checking_leaks():
            gradient = jax.grad(run, (0, 2), has_aux=True)
            jax.make_jaxpr(gradient)(params, state, case.inputs())
            jax.make_jaxpr(lambda *a, run=run: jax.jvp(run, a, a))(params, state, case.inputs())


@pytest.mark.parametrize("names", (LEAKS, pytest.param(tuple(CASES), marks=pytest.mark.slow)))
def test_derivatives_leak_no_tracer(names):
    """In a process of its own: JAX searches all that is in memory, and tests leave much."""
    code = f"import test_situations; test_situations.check_leaks({names!r})"
    folder = pathlib.Path(__file__).parent
    paths = os.pathsep.join((str(folder.parent), str(folder)))
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": paths}
    )


@EVERY
def test_evaluation_holds_primitives_of_jax_alone_but_for_moments(case):
    run = functools.partial(case.apply, train=False)
    found = primitives(run, *case.variables(), case.inputs())
    own = {"normjax_moments"} if takes_moments(case.method) else set()
    if "segment_ids" in case.extra(jnp.float32, case.shape):
        own = own | {"normjax_segment_sums"}
    assert {name for name in found if "normjax" in name} <= own


def takes_moments(method):
    """Whether evaluation takes moments of its input."""
    kinds = nj.LayerNorm, nj.GroupNorm, nj.InstanceNorm, nj.EvalNorm
    kinds += nj.AdaptiveLayerNorm, nj.ConditionalGroupNorm
    kinds += nj.AdaptiveInstanceNorm, nj.SandwichAdaptiveInstanceNorm
    return any(isinstance(m, kinds) for m in (method, *parts(method)))


def test_norms_without_state_are_the_same_programs_in_training():
    for name in STATELESS:
        case = CASES[name]
        found = primitives(case.apply, *case.variables(), case.inputs())
        assert {name for name in found if "normjax" in name} <= {"normjax_moments"}


@EVERY
def test_symbolic_sizes_are_exported(case):
    """The batch a multiple of eight, and where the method allows it positions of any number."""
    at = {i % len(case.shape) for i in np.atleast_1d(feature_axes(case.method))}
    free = case.fits_positions and not masked_whole(case)
    names = ["8*b"] + [
        str(n) if i in at or not free else f"n{i}" for i, n in enumerate(case.shape[1:], 1)
    ]
    scope = export.SymbolicScope()
    shape = export.symbolic_shape(", ".join(names), scope=scope)
    rows = export.symbolic_shape(", ".join(["8*b", *("1" for _ in case.shape[1:])]), scope=scope)
    params, state = case.variables()
    mask = jax.ShapeDtypeStruct(rows, jnp.bool_)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)

    def symbolic(a):
        own = list(map(str, a.shape[1:]))
        if a.ndim == len(names):
            both = zip(names, case.shape, a.shape, strict=True)
            own = [name if n == m else str(m) for name, n, m in list(both)[1:]]
        sizes = export.symbolic_shape(", ".join(["8*b", *own]), scope=scope)
        return jax.ShapeDtypeStruct(sizes, a.dtype)

    given_samples = case.extras("sample", jnp.float32)
    samples = jax.tree.map(symbolic, given_samples)
    for train in (True, False):
        run = lambda *a, train=train: case.apply(*a, train=train)
        made = export.export(jax.jit(run))(params, state, x, mask, samples)
        export.export(jax.jit(run), platforms=("cuda", "tpu"))(params, state, x, mask, samples)
        unmasked = lambda *a, run=run: run(*a[:-1], None, a[-1])[0]
        export.export(jax.jit(unmasked))(params, state, x, samples)
        if train and case in COMPARED:
            given = params, state, case.inputs(), case.rows(), given_samples
            wanted = jax.jit(run)(*given)
            chex.assert_trees_all_close(made.call(*given), wanted, rtol=2e-5, atol=2e-5)


def masked_whole(case):
    """Whether the method needs to know how large maps are."""
    return any(isinstance(m, nj.SpectralBatchNorm) for m in (case.method, *parts(case.method)))


def mesh_of(kinds, sizes=(2, 4), names=("data", "model")):
    return jax.make_mesh(sizes, names, axis_types=kinds)


EXPLICIT = (AxisType.Explicit,) * 2


@pytest.mark.parametrize("front", ("linen", "nnx"))
@pytest.mark.parametrize("name", ("BatchNorm", "BatchRenorm", "GhostBatchNorm", "KalmanNorm"))
def test_state_made_before_the_mesh(name, front):
    """Initialized or restored first, then trained with channels over an Explicit mesh."""
    x = draw(0, 8, 4, 8) + 2
    how = {"ghost_batch_size": 4} if name == "GhostBatchNorm" else {}
    linen_norm = getattr(linen, name)(momentum=0.9, **how)
    variables = linen_norm.init(jax.random.key(0), x, True)
    variables = jax.tree.map(np.asarray, variables)  # as a checkpoint restores them
    module = getattr(nnx, name)(8, momentum=0.9, rngs=fnnx.Rngs(0), **how)
    run = jax.jit(lambda v, x: linen_norm.apply(v, x, False, mutable=["batch_stats"])[1])
    mesh = mesh_of(EXPLICIT)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", None, "model")))
        if front == "linen":
            mean = run(variables, sharded)["batch_stats"]["mean"]
        else:
            fnnx.jit(lambda m, x: jax.block_until_ready(m(x)))(module, sharded)
            mean = module.mean[...]
    np.testing.assert_allclose(mean, 0.1 * x.astype("float64").mean((0, 1)), rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in OVER_AXES else [pytest.mark.slow])
        for name, case in METHODS.items()
    ],
)
def test_statistics_over_a_manual_axis_and_channels_over_an_explicit_one(name):
    """Tensor parallelism inside of a shard_map over the data."""
    case = METHODS[name]
    if getattr(case.method, "axis", getattr(case.method, "feature_axes", -1)) != -1:
        return
    case = dataclasses.replace(case, shape=(*case.shape[:-1], 2 * case.shape[-1]))
    method = with_axis_name(case.method, "data")
    params, state = case.variables()
    x = case.inputs()
    wanted = jax.jit(jax.value_and_grad(functools.partial(loss, case), 2, has_aux=True))(
        params, state, x
    )
    mesh = mesh_of((AxisType.Auto, AxisType.Explicit), (4, 2))

    def local(params, state, x):
        run = functools.partial(loss, case, method=method)
        (value, new), dx = jax.value_and_grad(run, 2, has_aux=True)(params, state, x)
        return (jax.lax.psum(value, "data"), new), dx

    rows, same = PartitionSpec("data"), PartitionSpec()
    with jax.set_mesh(mesh):
        x = jax.device_put(
            x, NamedSharding(mesh, PartitionSpec("data", *(None,) * (x.ndim - 2), "model"))
        )
        mapped = jax.shard_map(
            local,
            in_specs=(same, same, rows),
            out_specs=((same, same), rows),
            axis_names={"data"},
        )
        got = jax.jit(mapped)(params, state, x)
    chex.assert_trees_all_close(jax.device_get(got), jax.device_get(wanted), rtol=2e-4, atol=2e-4)


def test_collectives_are_as_many_as_the_readme_says():
    """With a named axis one each way; under jit two forward (mean and variance) and one back."""
    method = nj.BatchNorm()
    params, state = method.init(None, 4)
    x = jnp.asarray(draw(0, 16, 3, 4))
    mesh, rows = mesh_of((AxisType.Auto,), (8,), ("batch",)), PartitionSpec("batch")
    own = lambda a: jax.lax.pcast(a, ("batch",), to="varying")

    def output(method, params, x):
        return method.apply(params, state, x, train=True)[0]

    def gradient(method, params, x):
        return jax.grad(lambda x: jnp.sum(jnp.sin(output(method, params, x))))(x)

    named = dataclasses.replace(method, axis_name="batch")
    for function, by_name, by_jit in ((output, 1, 2), (gradient, 2, 3)):
        local = lambda x, f=function: f(named, jax.tree.map(own, params), x)
        mapped = jax.shard_map(local, mesh=mesh, in_specs=rows, out_specs=rows)
        assert count_collectives(mapped, x) == by_name
        sharded = jax.device_put(x, NamedSharding(mesh, rows))
        assert count_collectives(functools.partial(function, method, params), sharded) == by_jit


@pytest.mark.parametrize(
    ("method", "shape", "at", "placed"),
    (
        (nj.RMSNorm(), (4, 8, 4, 16), ("data", None, "model", None), "model"),
        (nj.LayerNorm(), (8, 8, 16), ("data",), "data"),
        (nj.BatchNorm(), (8, 5, 16), ("data",), "data"),
        (nj.GroupNorm(4), (8, 5, 16), ("data",), "data"),
        (nj.Affine(), (8, 5, 16), ("data", None, "model"), "data"),
    ),
    ids=("q/k norm", "LayerNorm", "BatchNorm", "GroupNorm", "Affine"),
)
def test_scale_and_bias_are_placed_like_the_activation(method, shape, at, placed):
    """Laid out otherwise, by a logical rule or by FSDP, on an Explicit mesh."""
    x = draw(0, *shape)
    params, state = method.init(None, 16)

    def step(params, x):
        y, _ = method.apply(params, state, x, train=True)
        return jnp.sum(jnp.sin(y)), y

    wanted = jax.jit(jax.value_and_grad(step, (0, 1), has_aux=True))(params, x)
    mesh = mesh_of(EXPLICIT)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*at)))
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec(placed)))
        got = jax.jit(jax.value_and_grad(step, (0, 1), has_aux=True))(params, x)
        (_, y), (dparams, dx) = got
        kinds = jax.tree.map(jax.typeof, (y, dx, dparams))
        assert kinds == jax.tree.map(jax.typeof, (x, x, params))
    chex.assert_trees_all_close(jax.device_get(got), jax.device_get(wanted), rtol=1e-4, atol=1e-5)


@EVERY
def test_an_empty_batch_gives_an_empty_output_and_moves_nothing(case):
    params, state = case.variables()
    x = jnp.zeros((0, *case.shape[1:]))
    samples = jax.tree.map(lambda a: a[:0], case.extras("sample", jnp.float32))
    for mask in (None, jnp.ones((0, *(1,) * (x.ndim - 1)), bool)):
        y, new = case.apply(params, state, x, mask, samples)
        assert y.shape == x.shape
        chex.assert_trees_all_close(new, state, rtol=1e-6)


SINGLE = (
    (nj.BatchNorm(), (1, 3)),
    (nj.BatchNorm(axis=(0, 1)), (4, 3, 1)),
    (nj.BatchNorm(unbiased_running_var=True), (1, 1, 1, 3)),
    (nj.BatchRenorm(), (1, 3)),
    (nj.Ghost(nj.BatchNorm(), 4), (4, 3)),
    (nj.GhostBatchNorm(1), (4, 3)),
    (nj.EvalNorm(1), (4, 3)),
    (nj.ExclusiveBatchNorm(2), (4, 3)),
    (nj.KalmanNorm(), (1, 3)),
    (nj.Ghost(nj.KalmanNorm(), groups=4), (4, 3)),
    (nj.SpectralBatchNorm(), (1, 1, 1, 3)),
    (nj.SpectralBatchNorm(statistics="frequency", map_size=(4, 4)), (1, 4, 4, 3)),
    (nj.LayerNorm(), (4, 1)),
    (nj.LayerNorm(reduction_axes=(1, 2)), (4, 1, 1, 3)),
    (nj.GroupNorm(3), (4, 3)),
    (nj.GroupNorm(None, 1), (4, 1, 1, 3)),
    (nj.InstanceNorm(), (4, 1, 1, 3)),
    (nj.chain(nj.RMSNorm(), nj.InstanceNorm()), (4, 1, 3)),
)


@pytest.mark.parametrize(("method", "shape"), SINGLE)
def test_statistics_of_single_values_are_refused_in_training(method, shape):
    at = np.atleast_1d(feature_axes(method))
    features = tuple(shape[i] for i in at) if len(at) > 1 else shape[at[0]]
    params, state = method.init(jax.random.key(0), features)
    x = jnp.ones(shape)
    with pytest.raises(ValueError, match=r"single value|over \d values"):
        method.apply(params, state, x, train=True)
    with pytest.raises(ValueError, match=r"single value|over \d values"):
        jax.eval_shape(lambda x: method.apply(params, state, x, train=True), x)
    y, _ = method.apply(params, state, x, train=False)  # too, and with the same trace
    assert (y[0] if isinstance(y, tuple) else y).shape == shape


def test_single_values_over_devices_or_with_a_prior_are_no_single_values():
    method = nj.BatchNorm(axis_name="batch")
    params, state = method.init(None, 3)
    run = jax.vmap(lambda x: method.apply(params, state, x, train=True)[0], axis_name="batch")
    y = run(jnp.asarray(draw(0, 4, 1, 3)))
    chex.assert_trees_all_close(y.std(0), jnp.ones((1, 3)), atol=1e-3)
    method = nj.KalmanNorm()
    params, state = method.init(None, 3)
    prior = nj.propagate.prediction(jnp.zeros(3), jnp.ones(3))
    y, _ = method.apply(params, state, jnp.ones((1, 3)), train=True, prior=prior)
    chex.assert_tree_all_finite(y)


@pytest.mark.parametrize("name", ("BatchNorm", "InstanceNorm", "LayerNorm", "GroupNorm"))
def test_linen_initializes_with_a_single_value(name):
    how = {"num_groups": 4} if name == "GroupNorm" else {}
    norm = getattr(linen, name)(**how)
    x = jnp.ones((1, 1, 1, 4) if name != "LayerNorm" else (1, 1))
    switch = {"use_running_average": False} if name == "BatchNorm" else {}
    variables = norm.init(jax.random.key(0), x, **switch)
    with pytest.raises(ValueError, match="single"):
        norm.apply(variables, x, **switch, mutable=["batch_stats"])


@HEADS
def test_masks_of_numbers_that_are_no_mask_are_refused(case):
    params, state = case.variables()
    rows = case.rows()
    for weights in (rows.astype(jnp.float32) / 2, rows.astype(jnp.complex64)):
        with pytest.raises(TypeError, match="weights"):
            case.apply(params, state, case.inputs(), weights)
    if case in COMPARED:
        found = case.apply(params, state, case.inputs(), rows.astype(jnp.int32))
        wanted = case.apply(params, state, case.inputs(), rows)
        chex.assert_trees_all_close(found, wanted, atol=1e-6)


def test_masks_of_numbers_are_refused_by_the_front_ends():
    x, weights = jnp.asarray(draw(0, 4, 3)), jnp.array([[1], [0.5], [0.5], [0.0]])
    with pytest.raises(TypeError, match="weights"):
        linen.BatchNorm(use_running_average=False).init_with_output(
            jax.random.key(0), x, mask=weights
        )
    with pytest.raises(TypeError, match="weights"):
        nnx.LayerNorm(3, rngs=fnnx.Rngs(0))(x, mask=weights)


@pytest.mark.parametrize("method", (nj.Ghost(nj.BatchNorm(), 4), nj.GhostBatchNorm(4)))
def test_a_remainder_of_ghosts_is_padded_and_masked_as_the_error_says(method):
    rows = 11 if isinstance(method, nj.GhostBatchNorm) else 15
    x = draw(0, rows, 3)
    params, state = method.init(None, 3)
    with pytest.raises(ValueError, match=r"Pad the batch with 1 samples"):
        method.apply(params, state, x, train=True)
    padded, mask = np.pad(x, ((0, 1), (0, 0))), (np.arange(rows + 1) < rows)[:, None]
    y, _ = method.apply(params, state, padded, train=True, mask=mask)
    last = x[12 if rows == 15 else 8 :].astype("float64")
    wanted = (last - last.mean(0)) / np.sqrt(last.var(0) + 1e-5)
    np.testing.assert_allclose(y[rows - len(last) : rows], wanted, atol=1e-5)


@pytest.mark.parametrize("name", nj.__all__)
def test_train_must_be_said(name):
    cls = getattr(nj, name)
    if not (isinstance(cls, type) and hasattr(cls, "apply")):
        return
    every = (CASES | KERNELS).values()
    case = next(c for c in every if isinstance(c.method, cls))
    params, state = case.variables()
    with pytest.raises(TypeError, match="train"):
        case.method.apply(params, state, case.inputs())


def fresh(name):
    """A module of each kind, with initializers that are new at every call."""
    init = fnnx.initializers.constant(0.1)
    modules = {
        "BatchNorm": lambda rngs: nnx.BatchNorm(4, scale_init=init, rngs=rngs),
        "wrapped": lambda rngs: nnx.Norm(
            nj.chain(nj.Ghost(nj.BatchNorm(bias_init=init), 2), nj.Affine(scale_init=init)),
            4,
            rngs=rngs,
        ),
    }
    return modules[name]


@pytest.mark.parametrize("name", ("BatchNorm", "wrapped"))
def test_modules_made_alike_are_traced_once_and_stacked(name):
    traces = 0

    @fnnx.jit
    def step(model, x):
        nonlocal traces
        traces += 1
        return model(x)

    models = [fresh(name)(fnnx.Rngs(0, ghost=i)) for i in range(3)]
    for model in models:
        step(model, jnp.asarray(draw(0, 8, 4)))
    assert traces == 1
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *models)
    leaves = jax.tree.leaves(fnnx.state(stacked))
    assert leaves and all(leaf.shape[0] == 3 for leaf in leaves)


def test_modules_made_otherwise_differ():
    def graph(**how):
        return fnnx.split(nnx.LayerNorm(4, rngs=fnnx.Rngs(0), **how))[0]

    halved = lambda z: 0.5 * z
    constant = fnnx.initializers.constant
    assert graph(activation=halved) == graph(activation=halved, scale_init=constant(0.5))
    assert graph(activation=halved) != graph()
    assert graph(activation=halved) != graph(activation=halved, epsilon=1e-3)
    assert nnx.LayerNorm(4, activation=halved, rngs=fnnx.Rngs(0)).activation(2.0) == 1.0


def test_parameters_attached_replaced_and_removed_later_are_honoured():
    x = jnp.asarray(draw(0, 8, 6) + 2)
    norm = nnx.LayerNorm(6, use_bias=False, rngs=fnnx.Rngs(0))
    norm.bias = fnnx.Param(jnp.full(6, 5.0))
    chex.assert_trees_all_close(norm(x).mean(), jnp.float32(5), atol=1e-5)
    gradient = fnnx.grad(lambda m: m(x).sum())(norm)
    chex.assert_trees_all_close(gradient["bias"][...], jnp.full(6, 8.0))
    norm.scale = fnnx.Param(jnp.full(6, 3.0))
    chex.assert_trees_all_close(norm(x).std(), jnp.float32(3), atol=1e-3)
    norm.bias = None
    del norm.scale
    chex.assert_trees_all_close(norm(x), nnx.LayerNorm(6, rngs=fnnx.Rngs(0))(x), atol=1e-6)
    chained = nnx.Norm(nj.chain(nj.RMSNorm(), nj.Affine(use_bias=False)), 6, rngs=fnnx.Rngs(0))
    chained.Affine_1["bias"] = fnnx.Param(jnp.full(6, 5.0))
    plain = nnx.RMSNorm(6, rngs=fnnx.Rngs(0))
    chex.assert_trees_all_close(chained(x), plain(x) + 5, atol=1e-5)
    norm = nnx.BatchNorm(6, rngs=fnnx.Rngs(0))
    norm.scale = fnnx.Param(jnp.full(6, 2.0))
    norm.mean = None
    with pytest.raises(AttributeError, match="mean is gone"):
        norm(x)


@pytest.mark.parametrize("name", STATELESS)
def test_modules_without_statistics_are_traced_once_for_both_modes(name):
    module = getattr(nnx, name)(32, rngs=fnnx.Rngs(0))
    traces = 0

    @fnnx.jit
    def run(model, x):
        nonlocal traces
        traces += 1
        return model(x)

    x = jnp.asarray(draw(0, 4, 3, 32))
    y = run(module, x)
    module.eval()
    chex.assert_trees_all_equal(run(module, x), y)
    module.train()
    run(module, x)
    run(fnnx.view(module, use_running_average=True, raise_if_not_found=False), x)
    assert traces == 1


def test_methods_without_statistics_are_traced_once_for_both_modes():
    traces = []

    def activation(z):
        traces.append(z.shape)
        return z

    method = nj.LayerNorm(activation=activation)
    params, state = method.init(None, 6)
    for train in (True, False):
        method.apply(params, state, jnp.ones((3, 6)), train=train)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("method", "numbers"),
    ((nj.RMSNorm(), 1), (nj.LayerNorm(), 2), (nj.LayerNorm(use_bias=False), 2)),
)
@pytest.mark.parametrize("features", (16, 128))
def test_row_norms_keep_one_or_two_numbers_of_a_row(method, numbers, features):
    rows = 4096
    x = jax.ShapeDtypeStruct((rows, features), jnp.bfloat16)
    params, state = method.init(None, features)
    kept = residual_bytes(lambda p, x: method.apply(p, state, x, train=True)[0], params, x)
    per_row = (kept - 1) * 2 * features
    assert per_row < 4 * numbers + 16 * features / rows + 0.01


CONSTANT = (
    nj.BatchNorm(constant_statistics=True),
    nj.BatchRenorm(r_max=1.5, d_max=0.5, constant_statistics=True),
    nj.GhostBatchNorm(4, constant_statistics=True),
    nj.EvalNorm(4, constant_statistics=True),
    nj.ExclusiveBatchNorm(4, constant_statistics=True),
    nj.Ghost(nj.BatchNorm(constant_statistics=True), 2),
    nj.GhostNoiseBatchNorm(4, constant_statistics=True),
    nj.KalmanNorm(constant_statistics=True),
)


@pytest.mark.parametrize("method", CONSTANT, ids=lambda m: type(m).__name__)
def test_constant_statistics_leave_the_slope_of_the_affine_map(method):
    """The gradient of the input is the cotangent times what the input is multiplied by."""
    params, state = method.init(None, 3)
    x, key = jnp.asarray(draw(0, 8, 5, 3)), jax.random.key(1)

    def output(method, x):
        y, new = method.apply(params, state, x, train=True, key=key)
        return (y[0] if isinstance(y, tuple) else y), new

    y, pullback, new = jax.vjp(functools.partial(output, method), x, has_aux=True)
    (dx,) = pullback(jnp.ones_like(y))
    inner = getattr(method, "method", method)
    moving = dataclasses.replace(inner, constant_statistics=False)
    moving = moving if inner is method else dataclasses.replace(method, method=moving)
    z, other = output(moving, x)
    chex.assert_trees_all_close((y, new), (z, other), atol=1e-6)
    gain = (y[:, 1:] - y[:, :-1]) / (x[:, 1:] - x[:, :-1])  # of each sample and channel
    np.testing.assert_allclose(dx[:, 1:], gain, rtol=2e-3)


def test_flax_restores_what_was_saved_before_fields_were_added():
    """Variables are unchanged by options: a new field adds no leaf."""
    variables = linen.BatchNorm().init(jax.random.key(0), jnp.ones((2, 3)), True)
    more = linen.BatchNorm(constant_statistics=True).init(jax.random.key(0), jnp.ones((2, 3)), True)
    assert flax.traverse_util.flatten_dict(variables).keys() == (
        flax.traverse_util.flatten_dict(more).keys()
    )


def test_the_carrier_is_no_part_of_a_compiled_program():
    """Neither forward nor across the border of a jit: bytes are those of bfloat16 alone."""
    method = nj.BatchNorm()
    params, state = method.init(None, 64)
    x = jnp.ones((64, 8, 8, 64), jnp.bfloat16)
    run = jax.jit(lambda x: method.apply(params, state, x, train=False)[0])
    read = run.lower(x).compile().cost_analysis()["bytes accessed"]
    assert read < 2.05 * x.nbytes
    assert passes.carried(x).carrier.dtype == jnp.float32


class Rebuilt(nn.Module):
    """A Linen module that makes its norm's functions anew at every call."""

    @nn.compact
    def __call__(self, x):
        norm = linen.LayerNorm(scale_init=nn.initializers.constant(0.5))
        return norm(x)


def test_linen_modules_made_alike_are_equal_enough_to_be_traced_once():
    traces = []
    x = jnp.ones((2, 3))
    variables = Rebuilt().init(jax.random.key(0), x)

    @jax.jit
    def run(variables, x):
        traces.append(1)
        return Rebuilt().apply(variables, x)

    for _ in range(3):
        run(variables, x)
    assert len(traces) == 1
