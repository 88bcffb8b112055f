"""Sums that CPUs make in tiles, or several at once: the same numbers and derivatives."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import draw, ragged
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import normjax as nj
from normjax.core.cpu import sums_of

SHAPE = (4, 24, 24, 64)  # 576 positions of 64 channels: XLA on CPU is slow at these
AXES = (1, 2)


def product(x, centre):
    x, centre = x.astype(jnp.float32), centre.astype(jnp.float32)
    return x * (x - centre)


def arrays(dtype="float32", key=0):
    return draw(key, *SHAPE, dtype=dtype), draw(key + 1, 4, 1, 1, 64, dtype=dtype)


def plain(fun, axes, *arrays):
    return jnp.sum(fun(*arrays), axes, keepdims=True)


def programs(fun=product, axes=AXES):
    ours = lambda *arrays: sums_of(fun, axes, *arrays)[0]
    return ours, jax.jit(functools.partial(plain, fun, axes))


def results(change, functions, *given):
    """`change(f, *given)` of each function, each as one program."""
    return [jax.tree.leaves(jax.jit(functools.partial(change, f))(*given)) for f in functions]


def tiled(f, *arrays, platform="cpu"):
    """Whether the lowered program has partial sums of 192 positions."""
    text = export.export(jax.jit(f), platforms=[platform])(*arrays).mlir_module()
    return "4x3x192x64" in text


def test_only_cpus_sum_in_tiles_and_only_where_they_are_slow():
    ours, _ = programs()
    assert tiled(ours, *arrays())
    assert not any(tiled(ours, *arrays(), platform=p) for p in ("tpu", "cuda"))
    small = (a[:, : min(8, a.shape[1])] for a in arrays())
    assert "optimization_barrier" not in jax.jit(ours).lower(*small).as_text()
    whole, _ = programs(axes=(0, 1, 2))
    assert "optimization_barrier" not in jax.jit(whole).lower(*arrays()).as_text()


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_value_is_that_of_one_sum(dtype):
    ours, theirs = programs()
    chex.assert_trees_all_close(
        jax.jit(ours)(*arrays(dtype)), theirs(*arrays(dtype)), rtol=1e-5, atol=1e-3
    )


def test_derivatives_of_any_order_and_mode():
    with jax.enable_x64(True):
        given = arrays("float64"), arrays("float64", key=2)
        both = programs(lambda x, c: jnp.sin(x) * (x - c) ** 2)
        for change in (
            jax.jvp,
            lambda f, x, t: jax.vjp(f, *x)[1](t[1]),
            lambda f, x, t: jax.jvp(jax.grad(lambda *a: f(*a).sum(), (0, 1)), x, t),
            lambda f, x, t: jax.grad(lambda c: jax.jvp(f, (x[0], c), t)[1].sum())(x[1]),
        ):
            found, expected = results(change, both, *given)
            chex.assert_trees_all_close(found, expected, rtol=1e-10, atol=1e-10)


def test_masks_and_vmap_with_and_without_axes():
    keep = ragged(5, 1, 24, 24, 1)
    ours, theirs = programs(lambda x, c, m: jnp.where(m, product(x, c), 0))
    x, centre = arrays()
    for axes, given in (
        ((0, None, None), (np.stack([x, 2 * x]), centre, keep)),
        ((None, 1, 0), (x, np.stack([centre, -centre], 1), np.stack([keep, ~keep]))),
    ):
        chex.assert_trees_all_close(
            *(jax.jit(jax.vmap(f, in_axes=axes))(*given) for f in (ours, theirs)),
            rtol=1e-5,
            atol=1e-3,
        )
    grouped, _ = programs(axes=(0, 1, 2))  # as parts of a batch are: vmap makes tiles of each
    parts = np.stack([x[..., :32], x[..., :32]])
    mapped = jax.vmap(grouped, in_axes=(0, None))
    assert "optimization_barrier" in jax.jit(mapped).lower(parts, centre[:1, ..., :32]).as_text()


def test_positions_on_several_devices_are_not_put_together():
    mesh = jax.make_mesh((2, 4), ("batch", "rows"), axis_types=(AxisType.Explicit,) * 2)
    ours, theirs = programs()
    x, centre = arrays()
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("batch", "rows")))
    there = jax.device_put(centre, NamedSharding(mesh, PartitionSpec("batch")))
    with jax.set_mesh(mesh):
        found = jax.jit(ours)(sharded, there)
    chex.assert_trees_all_close(jax.device_get(found), theirs(x, centre), rtol=1e-5, atol=1e-3)


def pair(x, centre):
    return x.astype(jnp.float32), product(x, centre)


def both_ways(axes, fun=pair):
    apart = lambda *a: [plain(lambda *a, i=i: fun(*a)[i], axes, *a) for i in range(2)]
    return functools.partial(sums_of, fun, axes), jax.jit(apart)


def at_once(f, *arrays, platform="cpu"):
    """Whether the lowered program has one reduction with two results."""
    text = export.export(jax.jit(f), platforms=[platform])(*arrays).mlir_module()
    return ":2 = stablehlo.reduce(" in text


def test_several_sums_are_one_pass_of_cpus():
    ours, theirs = both_ways(AXES)
    assert at_once(ours, *arrays())
    assert not any(at_once(ours, *arrays(), platform=p) for p in ("tpu", "cuda"))
    read = lambda f: jax.jit(f).lower(*arrays()).compile().cost_analysis()["bytes accessed"]
    x = arrays()[0]
    assert read(ours) < 1.6 * x.nbytes < 2 * x.nbytes <= read(theirs)


SUMS = (
    ((4, 24, 24, 64), (1, 2), True),
    ((4, 24, 24, 64), (0, 1, 2), True),
    ((16, 7, 5, 3), (0, 1, 2), True),  # over samples, with so few channels
    ((6, 20, 12, 12), (0, 2, 3), True),
    ((2, 20, 14, 18), (2, 3), True),
    ((3, 49, 32), (1,), True),
    ((3, 11, 13, 32), (1, 2), True),  # with a rest: 143 positions
    ((3, 197, 32), (1,), True),
    ((3, 11, 32), (1,), False),
    ((3, 64, 35, 7), (1, 2, 3), True),
    ((0, 8, 8, 16), (0, 1, 2), True),
    ((4, 5, 6, 96), (3,), False),
    ((4, 5, 6, 160), (3,), True),  # along rows
    ((640,), (0,), True),
    ((4, 5), (), False),
)


@pytest.mark.parametrize(
    "shape, axes, together, dtype",
    [(*case, "float32") for case in SUMS]
    + [(*case, "bfloat16") for case in SUMS[::4]]
    + [
        pytest.param(*case, "bfloat16", marks=pytest.mark.slow)
        for i, case in enumerate(SUMS)
        if i % 4
    ],
)
def test_several_sums_have_the_values_of_each(shape, axes, together, dtype):
    x = draw(0, *shape, dtype=dtype)
    centre = draw(1, *(1 if i in axes else n for i, n in enumerate(shape)), dtype=dtype)
    ours, theirs = both_ways(axes)
    assert at_once(ours, x, centre) == together
    chex.assert_trees_all_close(
        list(jax.jit(ours)(x, centre)), theirs(x, centre), rtol=1e-5, atol=1e-3
    )


def test_several_sums_differentiate_and_batch():
    with jax.enable_x64(True):
        given = arrays("float64"), arrays("float64", key=2)
        both = both_ways(AXES, lambda x, c: (jnp.sin(x) * c, x * (x - c) ** 2))
        total = lambda f: lambda *a: sum(jnp.sum(jnp.square(s)) for s in f(*a))
        for change in (
            jax.jvp,
            lambda f, x, t: jax.vjp(f, *x)[1](list(f(*t))),
            lambda f, x, t: jax.jvp(jax.grad(total(f), (0, 1)), x, t),
        ):
            found, expected = results(change, both, *given)
            chex.assert_trees_all_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("axes", ((0, None), (None, 0)))
def test_several_sums_batch_where_one_does_not_see_the_mapped_array(axes):
    x, centre = arrays()
    mapped = np.stack([x, 2 * x]) if axes[0] == 0 else np.stack([centre, -centre])
    given = (mapped, centre) if axes[0] == 0 else (x, mapped)
    for fun in (pair, lambda x, c: (c.astype(jnp.float32), product(x, c))):
        ours, theirs = both_ways(
            AXES, lambda x, c, fun=fun: tuple(jnp.broadcast_arrays(*fun(x, c)))
        )
        bare = functools.partial(sums_of, fun, AXES)
        expected = jax.jit(jax.vmap(theirs, in_axes=axes))(*given)
        for f in (ours, bare, jax.jit(bare)):
            found = list(jax.vmap(f, in_axes=axes)(*given))
            chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("activation", (None, jax.nn.relu, jnp.tanh))
def test_gradients_for_each_example_with_one_cotangent(activation):
    x = draw(0, 2, 8, 4, 4, 16)
    for method in (nj.BatchNorm(activation=activation), nj.LayerNorm(activation=activation)):
        params, state = method.init(jax.random.key(1), 16)
        loss = lambda p, x, m=method, s=state: m.apply(p, s, x, train=True)[0].sum()
        gradient = jax.jit(jax.grad(loss, (0, 1)))
        found = jax.jit(jax.vmap(gradient, in_axes=(None, 0)))(params, x)
        together = jax.tree.map(lambda *a: np.stack(a), *(gradient(params, part) for part in x))
        chex.assert_trees_all_close(found, together, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("activation", (None, jax.nn.relu, jnp.tanh))
def test_an_output_of_fewer_bits_than_the_input(activation):
    with jax.enable_x64(True):
        x = draw(0, 8, 8, 4, 16, dtype="float64")
        for kind in (nj.BatchNorm, nj.LayerNorm):
            grads = []
            for dtype in (jnp.float32, jnp.float64):
                method = kind(dtype=dtype, activation=activation)
                params, state = method.init(jax.random.key(1), 16)
                loss = lambda p, x, m=method, s=state: m.apply(p, s, x, train=True)[0].sum()
                grads.append(jax.jit(jax.grad(loss, (0, 1)))(params, x))
            chex.assert_trees_all_equal_dtypes(grads[0], grads[1], (params, x))
            chex.assert_trees_all_close(*grads, rtol=1e-5, atol=1e-4)


def test_a_mesh_of_one_device():
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(AxisType.Explicit,))
    x, centre = arrays()
    with jax.set_mesh(mesh):
        for parts in (("batch",), (None, "batch")):
            there = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*parts)))
            for ours, theirs in (programs(), both_ways(AXES), both_ways((2,))):
                found = jax.device_get(jax.tree.leaves(jax.jit(ours)(there, centre)))
                expected = jax.tree.leaves(theirs(x, centre))
                chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    "activation, sizes",
    (
        (None, "b, 8, 8, 64"),
        (jax.nn.relu, "b, 24, 24, 64"),
        (None, "8, h, w, 64"),
        pytest.param(jax.nn.relu, "b, 8, 8, 64", marks=pytest.mark.slow),
        pytest.param(None, "b, 24, 24, 64", marks=pytest.mark.slow),
        pytest.param(jax.nn.relu, "8, h, w, 64", marks=pytest.mark.slow),
    ),
)
def test_sizes_that_are_not_known_yet(sizes, activation):
    x = draw(0, 8, 24, 24, 64)
    x = x[:, :8, :8] if "8, 8" in sizes else x
    symbolic = jax.ShapeDtypeStruct(export.symbolic_shape(sizes), x.dtype)
    for kind in (nj.BatchNorm, nj.InstanceNorm, nj.LayerNorm):
        method = kind(activation=activation)
        params, state = method.init(jax.random.key(1), 64)
        run = lambda x, m=method, p=params, s=state: m.apply(p, s, x, train=True)[0]
        step = jax.jit(lambda x, run=run: jax.vjp(run, x)[1](x)[0])
        exported = export.export(step, platforms=["cpu"])(symbolic)
        chex.assert_trees_all_close(exported.call(x), step(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("samples", (4, 1))
def test_small_arrays_stay_small(samples):
    x = np.ones(
        (4, 16, 4, 1024), "float32"
    )  # rows of channels would do, but for the means of samples
    ours, _ = both_ways(AXES)
    compiled = jax.jit(ours).lower(x, x[:samples, :1, :1]).compile()
    partial_sums = 2 * x.nbytes / (8 if samples > 1 else 4)
    assert compiled.memory_analysis().temp_size_in_bytes < 1.1 * partial_sums


@pytest.mark.parametrize("kind", (AxisType.Auto, AxisType.Explicit))
@pytest.mark.parametrize(
    "shape, axes",
    (
        ((8, 16, 16, 64), (1, 2)),
        ((8, 16, 16, 64), (0, 1, 2)),
        ((24, 64), (0,)),
        ((96, 8, 8, 64), (0, 1, 2)),
    ),
)
def test_several_sums_of_samples_on_many_devices_are_one_message(kind, shape, axes):
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(kind,))
    x, centre = draw(0, *shape), np.ones((1,) * (len(shape) - 1) + (64,), "float32")
    ours, theirs = both_ways(axes)
    with jax.set_mesh(mesh):
        there = jax.device_put(x, NamedSharding(mesh, PartitionSpec("batch")))
        compiled = jax.jit(ours).lower(there, centre).compile()
        found = compiled(there, centre)
    text = compiled.as_text()
    assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))
    sent = [line for line in text.splitlines() if " all-reduce(" in line]
    assert len(sent) == (0 in axes), sent
    assert all("f32[64]" in line or "1,64]" in line for line in sent), sent
    chex.assert_trees_all_close(
        [jax.device_get(a) for a in found], theirs(x, centre), rtol=1e-5, atol=1e-3
    )


@pytest.mark.parametrize("activation", (None, jax.nn.relu, jax.nn.gelu))
@pytest.mark.parametrize("masked", (False, True))
def test_norms_of_single_samples_are_those_of_the_formula(activation, masked):
    with jax.enable_x64(True):
        method = nj.InstanceNorm(activation=activation, param_dtype=jnp.float64)
        x, g = arrays("float64")[0], arrays("float64", key=2)[0]
        mask = ragged(5, 4, 24, 24, 1) if masked else None

        def formula(params, x):
            weight = jnp.ones(x.shape) if mask is None else mask.astype(x.dtype)
            number = weight.sum(AXES, keepdims=True)
            mean = (x * weight).sum(AXES, keepdims=True) / number
            var = (jnp.square(x - mean) * weight).sum(AXES, keepdims=True) / number
            y = (x - mean) / jnp.sqrt(var + method.epsilon)
            scale, bias = (a.reshape(1, 1, 1, -1) for a in params)
            y = y * scale + bias
            return y if activation is None else activation(y)

        params, state = method.init(jax.random.key(0), 64)
        params = params._replace(bias=np.linspace(-1, 1, 64))
        shown = np.ones((), bool) if mask is None else mask

        def both(f, params, x):
            y, pull = jax.vjp(f, params, x)
            return y * shown, pull(g * shown)

        apply = lambda p, x: method.apply(p, state, x, train=True, mask=mask)[0]
        found, expected = results(both, (apply, formula), params, x)
        chex.assert_trees_all_close(found, expected, rtol=1e-9, atol=1e-9)
