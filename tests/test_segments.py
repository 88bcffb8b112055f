"""Statistics of segments: equal to a loop over segments in float64, with masks, over devices."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import normjax as nj
import normjax.linen
import normjax.nnx
from normjax.core import compat, segments
from normjax.testing import derivative_gaps, residual_bytes

PRIMITIVES = pytest.mark.skipif(
    compat.PLAIN or not compat.HAS_PRIMITIVES, reason="products stand for blocks"
)
EXACT = dict(rtol=1e-10, atol=1e-10)
SHAPE, NUMBER = (8, 12, 4), 6
# Each with the axes along which ids vary. One segment is always empty, and one has one position.
METHODS = {
    "batch": (nj.BatchNorm(num_segments=NUMBER), (0, 1)),
    "batch, of samples": (nj.BatchNorm(num_segments=NUMBER), (0,)),
    "batch, of positions": (nj.BatchNorm(num_segments=NUMBER), (1,)),
    "batch, of features too": (nj.BatchNorm(num_segments=NUMBER), (0, 1, 2)),
    "batch, channels first": (nj.BatchNorm(num_segments=NUMBER, axis=1), (0, 2)),
    "batch, constant": (nj.BatchNorm(num_segments=NUMBER, constant_statistics=True), (0, 1)),
    "layer": (nj.LayerNorm(num_segments=NUMBER, reduction_axes=(1, 2)), (0, 1)),
    "layer, all": (nj.LayerNorm(num_segments=NUMBER, reduction_axes=(0, 1, 2)), (0, 1)),
    "rms": (nj.RMSNorm(num_segments=NUMBER, reduction_axes=0), (0,)),
    "instance": (nj.InstanceNorm(num_segments=NUMBER), (0, 1)),
    "instance, of positions": (nj.InstanceNorm(num_segments=NUMBER), (1,)),
    "instance, of samples": (nj.InstanceNorm(num_segments=NUMBER), (0,)),
    "group": (nj.GroupNorm(2, num_segments=NUMBER), (0, 1)),
    "group, all": (nj.GroupNorm(2, num_segments=NUMBER, reduction_axes=(0, 1, 2)), (0, 1)),
}
METHODS_FEW = ("batch", "layer", "rms", "instance", "group")


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def draw_ids(axes, shape=SHAPE, low=0):
    """Ids in any order: segment 2 is empty, 4 has one position."""
    sizes = tuple(n if i in axes else 1 for i, n in enumerate(shape))
    ids = np.random.default_rng(1).choice([i for i in range(low, NUMBER) if i not in (2, 4)], sizes)
    ids.flat[3] = 4
    return ids.astype(np.int32)


def variables(method):
    params, state = method.init(jax.random.key(0), SHAPE[np.atleast_1d(nj_axis(method))[0]])
    moved = lambda a, seed: jnp.asarray(a + 0.3 * draw(seed, *a.shape))
    params = type(params)(*(None if a is None else moved(a, i) for i, a in enumerate(params)))
    return params, jax.tree.map(lambda a: a.astype(jnp.float64), state)


def nj_axis(method):
    return getattr(method, "axis", getattr(method, "feature_axes", -1))


def looped(method, params, state, x, ids, mask, cotangent):
    """Output, state and gradients by the oracles of one segment after the other."""
    ids, mask = np.broadcast_to(ids, x.shape), np.broadcast_to(mask, x.shape)
    y, dx, dparams = np.zeros(x.shape), np.zeros(x.shape), [0, 0]
    for segment in range(method.num_segments):
        own = mask & (ids == segment)
        if own.any():
            of, _ = oracles.apply(method, params, state, x, train=True, mask=own)
            g = np.where(own, cotangent, 0)
            slopes = oracles.gradients(method, params, state, x, g, mask=own)
            y, dx = np.where(own, of, y), dx + slopes[0]
            dparams = [a + b for a, b in zip(dparams, slopes[1:], strict=True)]
    whole = mask & (ids >= 0) & (ids < method.num_segments)
    _, state = oracles.apply(method, params, state, x, train=True, mask=whole)
    return y, state, dx, dparams


def ours(method, params, state, x, ids, mask, cotangent):
    """The same by the method; the cotangent is zero where nothing counts."""

    def loss(params, x):
        y, new = method.apply(params, state, x, train=True, mask=mask, segment_ids=ids)
        return jnp.sum(jnp.where(cotangent == 0, 0, y) * cotangent), (y, new)

    (_, (y, new)), slopes = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
    return y, new, slopes[1], slopes[0]


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


PADDED = [(name, padding) for name in METHODS_FEW for padding in ("ids", "mask", "mask of values")]


@pytest.mark.parametrize(("name", "padding"), [(name, "none") for name in METHODS] + PADDED)
def test_a_loop_over_segments(name, padding):
    method, axes = METHODS[name]
    params, state = variables(method)
    ids, mask = draw_ids(axes), np.ones((), bool)
    x, g = draw(2, *SHAPE), draw(3, *SHAPE)
    if padding == "ids":
        ids = draw_ids(axes, low=-1)
    elif padding != "none":
        part = ids.shape if padding == "mask" else SHAPE
        mask = np.random.default_rng(4).random(part) < 0.7
    counts = np.broadcast_to(mask & (ids >= 0), SHAPE)
    g = np.where(counts, g, 0)
    wanted = looped(method, params, state, x, ids, mask, g)
    spoilt = jnp.where(counts, x, jnp.nan)
    given = None if padding in ("none", "ids") else jnp.asarray(mask)
    run = jax.jit(functools.partial(ours, method))
    y, new, dx, dparams = run(params, state, spoilt, jnp.asarray(ids), given, jnp.asarray(g))
    chex.assert_trees_all_close(np.where(counts, y, 0), np.where(counts, wanted[0], 0), **EXACT)
    chex.assert_trees_all_equal(np.where(counts, 0, dx), np.zeros(SHAPE))
    got = dx, [a for a in dparams if a is not None], new and (new.mean, new.var)
    oracle = wanted[2], wanted[3][: len(got[1])], new and (wanted[1].mean, wanted[1].var)
    chex.assert_trees_all_close(got, oracle, **EXACT)


def test_a_position_alone_becomes_the_bias_and_one_of_none_the_activation_of_zero():
    method = nj.BatchNorm(num_segments=3, activation=lambda z: z + 1)
    params, state = method.init(None, 2)
    x, ids = jnp.asarray(draw(0, 4, 2)), jnp.array([1, 1, 2, -1]).reshape(4, 1)
    y, _ = method.apply(params, state, x.at[3].set(jnp.nan), train=True, segment_ids=ids)
    chex.assert_trees_all_equal(y[2:], jnp.ones((2, 2)))
    seen = method.observe(x, segment_ids=ids)
    assert seen.parts.count[:, 0].tolist() == [0, 2, 1]
    chex.assert_trees_all_close(seen.mean, jnp.mean(x[:3], 0), **EXACT)
    chex.assert_trees_all_close(seen.parts.mean[1], jnp.mean(x[:2], 0), **EXACT)


def test_evaluation_is_by_the_running_statistics():
    method, axes = METHODS["batch"]
    params, state = variables(method)
    x, ids = jnp.asarray(draw(0, *SHAPE)), jnp.asarray(draw_ids(axes, low=-1))
    state = state._replace(mean=state.mean + 1, var=state.var * 2)
    spoilt = jnp.where(ids < 0, jnp.nan, x)

    def loss(method, params, x, **given):
        y, new = method.apply(params, state, x, train=False, **given)
        chex.assert_trees_all_equal(new, state)
        return jnp.sum(jnp.where(ids < 0, 0, jnp.sin(y)))

    run = lambda m, x, **given: jax.value_and_grad(functools.partial(loss, m))(params, x, **given)
    got = run(method, spoilt, segment_ids=ids)
    chex.assert_trees_all_close(got, run(nj.BatchNorm(), x), **EXACT)


@pytest.mark.parametrize("name", METHODS_FEW)
def test_derivatives_of_both_orders(name):
    method, axes = METHODS[name]
    params, state = variables(method)
    ids, weights = jnp.asarray(draw_ids(axes, low=-1)), jnp.abs(jnp.asarray(draw(5, *SHAPE[:2], 1)))
    x = jnp.where(ids < 0, jnp.nan, jnp.asarray(draw(2, *SHAPE)))

    def output(params, x):
        given = dict(segment_ids=ids, weights=weights)
        return jnp.where(ids < 0, 0, method.apply(params, state, x, train=True, **given)[0])

    loss = lambda *at: jnp.sum(jnp.sin(output(*at)))
    for function in (output, jax.grad(loss, (0, 1))):
        adjoint, slope = derivative_gaps(function, params, x)
        assert adjoint < 1e-11 and slope < 1e-6


@pytest.mark.parametrize("activation", (jax.nn.relu, jax.nn.silu, jnp.tanh, jax.nn.softmax))
def test_an_activation_inside(activation):
    method = nj.BatchNorm(num_segments=NUMBER, activation=activation)
    params, state = variables(method)
    ids, x = jnp.asarray(draw_ids((0, 1))), jnp.asarray(draw(2, *SHAPE))
    run = lambda m, x: m.apply(params, state, x, train=True, segment_ids=ids)[0]
    plain = lambda x: activation(run(METHODS["batch"][0], x))
    weigh = lambda f: jax.value_and_grad(lambda x: jnp.sum(jnp.cos(f(x)) * draw(3, *SHAPE)))
    got = weigh(functools.partial(run, method))(x), derivative_gaps(lambda x: run(method, x), x)
    chex.assert_trees_all_close(got[0], weigh(plain)(x), **EXACT)
    assert got[1][0] < 1e-11 and got[1][1] < 1e-6


@PRIMITIVES
@pytest.mark.parametrize("size", (1, 20, 1 << 20))
@pytest.mark.parametrize("name", METHODS_FEW)
def test_blocks_and_products_are_alike(name, size, monkeypatch):
    method, axes = METHODS[name]
    params, state = variables(method)
    args = jnp.asarray(draw(2, *SHAPE)), jnp.asarray(draw_ids(axes, low=-1)), None
    args = params, state, *args, jnp.asarray(draw(3, *SHAPE))
    program = lambda: jax.jit(lambda *a: ours(method, *a)).lower(*args)
    monkeypatch.setattr(segments, "BLOCK", size)
    blocks = program()
    monkeypatch.setattr(segments, "_bind", segments._by_product)
    jax.clear_caches()
    products = program()
    assert "dot_general" in products.as_text() and "dot_general" not in blocks.as_text()
    close = functools.partial(chex.assert_trees_all_close, **EXACT)
    close(blocks.compile()(*args), products.compile()(*args))
    jax.clear_caches()


@pytest.mark.parametrize("schedule", ("blocks", "products"))
def test_each_segment_at_an_offset_of_its_own(schedule, monkeypatch):
    if schedule == "products":
        monkeypatch.setattr(segments, "_bind", segments._by_product)
        jax.clear_caches()
    ids = np.random.default_rng(0).integers(0, 4, (4096, 1))
    x = np.float32(draw(0, 4096, 8) + np.array([0, 1e2, -1e4, 1e4])[ids])
    seen = jax.jit(nj.BatchNorm(num_segments=4).observe)(x, segment_ids=jnp.asarray(ids)).parts
    for segment in range(4):
        own = np.float64(x)[ids[:, 0] == segment]
        np.testing.assert_allclose(np.asarray(seen.var)[segment], own.var(0), rtol=2e-6)
        np.testing.assert_allclose(
            np.asarray(seen.mean)[segment], own.mean(0), rtol=1e-6, atol=1e-6
        )
    jax.clear_caches()


@PRIMITIVES
@pytest.mark.parametrize("number", (1, 64))
def test_long_segments_far_from_zero(number):
    x = np.float32(draw(0, 32768, 4) + 1e4)
    ids = np.arange(32768).reshape(-1, 1) // (32768 // number)
    parts = jax.jit(nj.BatchNorm(num_segments=number).observe)(x, segment_ids=ids).parts
    exact = np.float64(x).reshape(number, -1, 4)
    np.testing.assert_allclose(parts.var, exact.var(1), rtol=4e-6)


def over_devices(method, params, state, x, ids, g, kind):
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        at = lambda a: jax.device_put(a, NamedSharding(mesh, P("batch")))
        return jax.jit(functools.partial(ours, method))(
            *jax.device_put((params, state), NamedSharding(mesh, P())), at(x), at(ids), None, at(g)
        )


@pytest.mark.parametrize("way", ("Auto", "Explicit", "shard_map", "vmap"))
@pytest.mark.parametrize("name", METHODS_FEW)
def test_segments_that_span_devices(name, way):
    method, axes = METHODS[name]
    params, state = variables(method)
    ids = draw_ids(axes, low=-1)
    x, g = (np.where(ids < 0, fill, draw(i, *SHAPE)) for i, fill in ((2, np.nan), (3, 0)))
    x, ids, g = (jnp.asarray(a) for a in (x, ids, g))
    wanted = jax.jit(functools.partial(ours, method))(params, state, x, ids, None, g)
    if way in ("Auto", "Explicit"):
        got = over_devices(method, params, state, x, ids, g, getattr(AxisType, way))
    else:
        spans = name in ("batch", "rms")  # the statistics of the others are of samples
        of = nj.core.method.replace(method, axis_name="d") if spans else method

        def part(x, ids, g):
            y, new, dx, dparams = ours(of, params, state, x, ids, None, g)
            return y, new, dx, lax.psum(dparams, "d")

        if way == "vmap":
            split = lambda a: a.reshape(8, -1, *a.shape[1:])
            y, new, dx, dparams = jax.jit(jax.vmap(part, axis_name="d"))(*map(split, (x, ids, g)))
            first = functools.partial(jax.tree.map, lambda a: a[0])
            got = y.reshape(SHAPE), first(new), dx.reshape(SHAPE), first(dparams)
        else:
            mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
            how = dict(mesh=mesh, in_specs=P("d"), out_specs=(P("d"), P(), P("d"), P()))
            got = jax.jit(jax.shard_map(part, check_vma=False, **how))(x, ids, g)
    chex.assert_trees_all_close(got, wanted, **EXACT)


def test_positions_divided_among_devices():
    """Instance norm of long documents: each device has a part of every sample."""
    method = nj.InstanceNorm(num_segments=NUMBER, axis_name="d")
    params, state = variables(method)
    x, ids = jnp.asarray(draw(2, 3, 16, 4)), jnp.asarray(draw_ids((0, 1), (3, 16, 4)))
    run = lambda m, x, ids: m.apply(params, state, x, train=True, segment_ids=ids)[0]
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    how = dict(mesh=mesh, in_specs=P(None, "d"), out_specs=P(None, "d"))
    got = jax.jit(jax.shard_map(functools.partial(run, method), **how))(x, ids)
    whole = nj.InstanceNorm(num_segments=NUMBER)
    chex.assert_trees_all_close(got, run(whole, x, ids), **EXACT)


def test_vmap_over_ids_or_activations():
    method = METHODS["instance"][0]
    params, state = variables(method)
    x, ids = jnp.asarray(draw(2, *SHAPE)), jnp.asarray(draw_ids((0, 1)))
    run = lambda x, ids: method.apply(params, state, x, train=True, segment_ids=ids)[0]
    slope = jax.grad(lambda x, ids: jnp.sum(jnp.sin(run(x, ids))))
    for function in (run, slope):
        for x_axis, ids_axis in ((0, None), (None, 1), (2, 0)):
            several = jnp.stack([x, 2 * x], x_axis) if x_axis is not None else x
            others = jnp.stack([ids, (ids + 1) % 3], ids_axis) if ids_axis is not None else ids
            got = jax.jit(jax.vmap(function, (x_axis, ids_axis)))(several, others)
            pick = lambda a, axis, i: a if axis is None else jnp.take(a, i, axis)
            for i in range(2):
                one = function(pick(several, x_axis, i), pick(others, ids_axis, i))
                chex.assert_trees_all_close(got[i], one, **EXACT)


def test_ids_that_are_traced_and_out_of_range_are_padding():
    method = METHODS["batch"][0]
    params, state = variables(method)
    x, ids = jnp.asarray(draw(2, *SHAPE)), draw_ids((0, 1), low=-1)
    run = jax.jit(lambda ids: method.apply(params, state, x, train=True, segment_ids=ids))
    far = np.where(ids < 0, np.where(np.arange(12)[:, None] % 2, -7, NUMBER + 9), ids)
    chex.assert_trees_all_equal(run(jnp.asarray(far)), run(jnp.asarray(ids)))


@pytest.mark.parametrize("dtype", (np.int8, np.uint8, np.int64))
def test_ids_of_any_integer_dtype(dtype):
    method = METHODS["batch"][0]
    params, state = variables(method)
    x, ids = jnp.asarray(draw(2, *SHAPE)), draw_ids((0, 1))
    run = lambda ids: method.apply(params, state, x, train=True, segment_ids=ids)
    chex.assert_trees_all_equal(run(ids.astype(dtype)), run(jnp.asarray(ids)))


@PRIMITIVES
def test_reverse_mode_keeps_the_input_and_the_ids():
    method = nj.BatchNorm(num_segments=4, activation=jax.nn.relu)
    params, state = method.init(None, 16)
    x, ids = jnp.zeros((512, 16), jnp.bfloat16), jnp.zeros((512, 1), jnp.int32)
    run = lambda x: method.apply(params, state, x, train=True, segment_ids=ids)[0]
    assert residual_bytes(run, x) < 1.2  # an id and 16 numbers of two bytes


def test_modules():
    x, ids = np.float32(draw(0, 8, 4)), np.arange(8).reshape(8, 1) % 3
    method = nj.BatchNorm(num_segments=3)
    params, state = method.init(None, 4)
    wanted, moved = method.apply(params, state, x, train=True, segment_ids=ids)
    module = normjax.linen.BatchNorm(num_segments=3, epsilon=1e-5, use_running_average=False)
    made = module.init(jax.random.key(0), x, segment_ids=ids)
    y, new = module.apply(made, x, segment_ids=ids, mutable=["batch_stats", "moments"])
    chex.assert_trees_all_close((y, new["batch_stats"]["mean"]), (wanted, moved.mean))
    chex.assert_trees_all_close(new["moments"]["seen"][0].mean, x.mean(0), rtol=1e-5, atol=1e-6)
    module = normjax.nnx.BatchNorm(4, num_segments=3, rngs=nnx.Rngs(0))
    chex.assert_trees_all_close(module(x, segment_ids=ids), wanted)
    _, seen = nnx.capture(module, normjax.nnx.Seen)(x, segment_ids=ids)
    chex.assert_trees_all_close(seen["seen"][0].mean, x.mean(0), rtol=1e-5, atol=1e-6)


X, IDS = np.zeros((6, 4), np.float32), np.zeros((6, 1), np.int32)
BAD = (
    (nj.BatchNorm(num_segments=3), IDS + 3, ValueError, r"\[0, num_segments=3\)"),
    (nj.BatchNorm(num_segments=3), IDS - 2, ValueError, r"\[0, num_segments=3\)"),
    (nj.BatchNorm(num_segments=3), IDS.astype(np.float32), TypeError, "float32"),
    (nj.BatchNorm(num_segments=3), IDS[:, 0], ValueError, r"\(6,\) do not broadcast"),
    (nj.BatchNorm(num_segments=3), IDS[None], ValueError, r"\(1, 6, 1\) do not broadcast"),
    (nj.BatchNorm(num_segments=3), None, ValueError, "segment_ids is None, but .* num_segments"),
    (nj.BatchNorm(), IDS, ValueError, "segment_ids was given without num_segments"),
    (nj.LayerNorm(num_segments=3), IDS, ValueError, "no scale, and there is none"),
    (nj.GroupNorm(2, num_segments=3), IDS, ValueError, "no scale, and there is none"),
)


@pytest.mark.parametrize(("method", "ids", "error", "words"), BAD)
def test_bad_input(method, ids, error, words):
    given = {} if ids is None else {"segment_ids": ids}
    with pytest.raises(error, match=words):
        method.apply(*method.init(None, 4), X, train=True, **given)
    if "num_segments=3)" in words:
        with pytest.raises(error, match=words):
            method.observe(X, **given)


def test_what_takes_no_segments_says_so():
    for method in (nj.BatchRenorm(), nj.GhostBatchNorm(2), nj.Affine()):
        with pytest.raises(TypeError, match="takes no input 'segment_ids'"):
            method.apply(*method.init(None, 4), X, train=True, segment_ids=IDS)
    method = nj.RMSNorm(num_segments=2, reduction_axes=0)
    with pytest.raises(ValueError, match="segment_ids with a gate"):
        method.apply(*method.init(None, 4), X, train=True, segment_ids=IDS, gate=X)
    for make, how, words in (
        (nj.LayerNorm, dict(num_groups=2), "needs num_groups=1"),
        (nj.RMSNorm, dict(cast="before_scale"), "cast='output'"),
        (nj.BatchNorm, dict(axis_name="d", axis_index_groups=((0,), (1,))), "axis_index_groups"),
        (
            nj.InstanceNorm,
            dict(num_segments=0),
            "num_segments=0 is not None, and is not a positive integer",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            make(**dict(num_segments=2) | how)
