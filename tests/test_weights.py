"""Statistics weighted by sample or position, of which a boolean mask is the case 0 and 1."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import normjax as nj
import normjax.linen
import normjax.nnx
from normjax.core import statistics, variance
from normjax.core.method import replace
from normjax.testing import derivative_gaps

EXACT = dict(rtol=1e-10, atol=1e-10)
SHAPE = (8, 6, 4)
# Each with the axis along which rows are repeated, over which it takes statistics.
METHODS = {
    "batch": (nj.BatchNorm(unbiased_running_var=True), 0),
    "batch, pooled": (nj.BatchNorm(running_average="pooled"), 0),
    "renorm": (nj.BatchRenorm(r_max=1.5, d_max=0.5), 0),
    "running": (nj.RunningNorm(), 0),
    "layer": (nj.LayerNorm(reduction_axes=(1, 2)), 1),
    "rms": (nj.RMSNorm(reduction_axes=(1, 2)), 1),
    "instance": (nj.InstanceNorm(), 1),
    "group": (nj.GroupNorm(2), 1),
}


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def variables(method):
    params, state = method.init(jax.random.key(0), SHAPE[-1])
    exact = lambda a: jnp.asarray(a, jnp.float64) + 0.25
    return jax.tree.map(exact, params), jax.tree.map(exact, state)


def train(method, x, mask=None, weights=None, count=1.0):
    """Output, new state and the gradient of a loss that weighs outputs by `count`."""
    params, state = variables(method)
    given = {} if weights is None else {"weights": weights}

    def loss(params, x):
        y, new = method.apply(params, state, x, train=True, mask=mask, **given)
        return jnp.sum(jnp.where(count == 0, 0, jnp.sin(y)) * count), (y, new)

    (_, (y, new)), (dparams, dx) = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
    return y, new, dparams, dx


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", METHODS)
def test_weights_that_are_integers_repeat_rows(name):
    method, axis = METHODS[name]
    x = draw(0, *SHAPE)
    times = np.array([2, 0, 3, 1, 1, 4, 1, 2])[: SHAPE[axis]]
    column = [n if i == axis else 1 for i, n in enumerate(SHAPE)]
    weights = jnp.asarray(times, jnp.float64).reshape(column)
    spoilt = jnp.asarray(np.where(weights == 0, np.nan, x))
    y, new, dparams, dx = train(method, spoilt, weights=weights, count=weights)
    repeated = jnp.asarray(np.repeat(x, times, axis))
    several, wanted, slopes, of_rows = train(method, repeated)
    at = np.repeat(np.arange(SHAPE[axis]), times)
    chex.assert_trees_all_close(jnp.take(y, at, axis), several, **EXACT)
    chex.assert_trees_all_close((new, dparams), (wanted, slopes), **EXACT)
    own = [
        np.asarray(of_rows).take(np.flatnonzero(at == i), axis).sum(axis) for i in range(len(times))
    ]
    chex.assert_trees_all_close(dx, np.stack(own, axis), **EXACT)


@pytest.mark.parametrize("train_", (True, False))
@pytest.mark.parametrize(
    "shape",
    (
        SHAPE,
        *(pytest.param(s, marks=pytest.mark.slow) for s in ((8, 1, 1), (8, 6, 1), SHAPE[1:])),
    ),
)
@pytest.mark.parametrize("name", METHODS)
def test_weights_of_zero_and_one_are_a_mask(name, shape, train_):
    method, _ = METHODS[name]
    mask = np.random.default_rng(0).random(shape) < 0.6
    x = jnp.asarray(np.where(mask, draw(1, *SHAPE), np.nan))
    params, state = variables(method)

    def run(**given):
        call = lambda p, x: method.apply(p, state, x, train=train_, **given)
        (y, new), pull = jax.vjp(call, params, x)
        return (
            y,
            new,
            pull((jnp.where(mask, draw(2, *SHAPE), 0), jax.tree.map(jnp.zeros_like, new))),
        )

    masked = run(mask=jnp.asarray(mask))
    chex.assert_trees_all_close(run(weights=jnp.asarray(mask, jnp.float32)), masked, **EXACT)
    chex.assert_trees_all_close(run(weights=jnp.asarray(mask, jnp.int32)), masked, **EXACT)
    spoilt = jnp.where(mask, 1.0, jnp.nan)  # what is masked weighs nothing
    traced = jax.jit(lambda weights: run(mask=jnp.asarray(mask), weights=weights))
    chex.assert_trees_all_close(traced(spoilt), masked, **EXACT)


@pytest.mark.parametrize("name", METHODS)
def test_one_weight_for_all_changes_nothing_but_the_count(name):
    method, _ = METHODS[name]
    x = jnp.asarray(draw(0, *SHAPE))
    plain = train(method, x)
    chex.assert_trees_all_close(train(method, x, weights=jnp.ones((8, 1, 1))), plain, **EXACT)
    for weight in (1e-6, 1e6):
        y, new, dparams, dx = train(method, x, weights=jnp.full((8, 1, 1), weight))
        if "pool" not in name and name != "running":  # which count weights
            chex.assert_trees_all_close((y, dparams, dx), (plain[0], *plain[2:]), **EXACT)
        if name == "batch, pooled":  # from a count of 0.25 and a rest of as much
            chex.assert_trees_all_close(new.pool.count, jnp.full(4, 0.5 + 48 * weight), **EXACT)


def test_the_moments_of_numpy():
    x, weights = draw(0, *SHAPE), np.abs(draw(1, *SHAPE[:2], 1))
    seen = nj.BatchNorm().observe(jnp.asarray(x), weights=jnp.asarray(weights))
    of = dict(axis=(0, 1), weights=np.broadcast_to(weights, SHAPE))
    mean = np.average(x, **of)
    wanted = weights.sum(), mean, np.average((x - mean) ** 2, **of)
    chex.assert_trees_all_close(tuple(seen), (np.full(4, wanted[0]), *wanted[1:]), **EXACT)


@pytest.mark.parametrize("scale", (1e-7, 1.0))
@pytest.mark.parametrize("large", (False, True))
@pytest.mark.parametrize("name", ("batch", "instance"))
def test_over_devices_whatever_the_sum_of_weights(name, large, scale, monkeypatch):
    if large:  # sums in two steps
        monkeypatch.setattr(statistics, "LARGE_MESSAGE", 0)
    method, axis = METHODS[name]
    method = replace(method, unbiased_running_var=False)
    x, weights = draw(0, 8, 16, 4), scale * np.abs(draw(1, 8, 16, 1))
    weights[:, :3] = weights[2] = 0
    x, weights = jnp.asarray(np.where(weights == 0, np.nan, x)), jnp.asarray(weights)
    along = P(*(None,) * axis, "d")

    def run(method, x, weights):
        y, new, dparams, dx = train(method, x, weights=weights, count=weights / scale)
        if method.axis_name:
            dparams = lax.psum(dparams, "d")
        return y, new, dparams, dx

    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    own = functools.partial(run, replace(method, axis_name="d"))
    how = dict(mesh=mesh, in_specs=along, out_specs=(along, P(), P(), along), check_vma=False)
    got = jax.jit(jax.shard_map(own, **how))(x, weights)
    chex.assert_trees_all_close(got, run(method, x, weights), **EXACT)


def test_pooled_and_merged_counts_are_sums_of_weights():
    method, x = nj.BatchNorm(), jnp.asarray(draw(0, *SHAPE))
    weights = jnp.asarray(1e-3 * np.abs(draw(1, 8, 1, 1)))
    whole = method.observe(x, weights=weights)
    parts = (method.observe(x[i : i + 4], weights=weights[i : i + 4]) for i in (0, 4))
    chex.assert_trees_all_close(nj.pool(*parts), whole, **EXACT)
    method = nj.BatchNorm(running_average="pooled")
    state = method.init(None, 4)[1]
    for i in (0, 4):
        state = method.absorb(state, method.observe(x[i : i + 4], weights=weights[i : i + 4]))
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)
    close((state.mean, state.var, state.pool.count), (whole.mean, whole.var, whole.count))


@pytest.mark.parametrize(("total", "factor"), ((1e-6, 1), (1, 1), (1.5, 1.5), (4, 4 / 3)))
def test_the_unbiased_variance_of_a_small_sum_of_weights(total, factor):
    method, x = nj.BatchNorm(unbiased_running_var=True, momentum=0.0), jnp.asarray(draw(0, 8, 4))
    state = method.init(None, 4)[1]
    seen = method.observe(x, weights=jnp.full((8, 1), total / 8))
    moved = method.absorb(state, seen)
    chex.assert_trees_all_close(moved.var, factor * jnp.var(x, 0), rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_derivatives_hold_weights_constant(name):
    method, _ = METHODS[name]
    params, state = variables(method)
    x, weights = jnp.asarray(draw(0, *SHAPE)), jnp.asarray(np.abs(draw(1, *SHAPE[:2], 1)))
    output = lambda p, x, w: method.apply(p, state, x, train=True, weights=w)[0]
    loss = lambda *at: jnp.sum(jnp.sin(output(*at, weights)))
    for function in (lambda *at: output(*at, weights), jax.grad(loss, (0, 1))):
        adjoint, slope = derivative_gaps(function, params, x)
        assert adjoint < 1e-11 and slope < 1e-6
    for function in (lambda w: output(params, x, w), lambda w: method.observe(x, weights=w)):
        total = lambda w, f=function: sum(map(jnp.sum, jax.tree.leaves(f(w))))
        chex.assert_trees_all_equal(jax.grad(total)(weights), jnp.zeros_like(weights))


@pytest.mark.parametrize("schedule", ("_on_tpu", "_on_gpu"))
def test_schedules_of_other_platforms(schedule):
    x = np.float32(draw(0, 64, 7, 4) + 1e3)
    weights = np.float32(np.abs(draw(1, 64, 7, 1)))
    n, how = jnp.sum(jnp.asarray(weights), (0, 1), keepdims=True), ((0, 1), None)
    _, var = getattr(variance, schedule)(jnp.asarray(x), jnp.asarray(weights), n, how)
    of = dict(axis=(0, 1), weights=np.broadcast_to(np.float64(weights), x.shape))
    mean = np.average(np.float64(x), **of)
    np.testing.assert_allclose(var.ravel(), np.average((x - mean) ** 2, **of), rtol=5e-6)


@pytest.mark.parametrize("place", ("before", "after"))
def test_a_gate_where_nothing_counts(place):
    method = nj.RMSNorm(gate_place=place, num_groups=2)
    params, state = method.init(None, 4)
    mask = np.arange(8).reshape(8, 1, 1) % 3 > 0
    x, gate = (np.where(mask, draw(i, *SHAPE), np.nan) for i in (0, 1))

    def run(**given):
        call = lambda x, gate: method.apply(params, state, x, train=True, gate=gate, **given)[0]
        y, pull = jax.vjp(call, jnp.asarray(x), jnp.asarray(gate))
        return y, pull(jnp.where(mask, 1.0, 0.0) * y)

    chex.assert_trees_all_close(run(weights=mask * 3.0), run(mask=mask), **EXACT)


def test_parts_of_a_batch_have_weights_of_their_own():
    ghost = nj.Ghost(nj.BatchNorm(), groups=2)
    params, state = ghost.init(None, 4)
    x, weights = jnp.asarray(draw(0, *SHAPE)), jnp.asarray(np.abs(draw(1, 8, 1, 1)))
    y, _ = ghost.apply(params, state, x, train=True, weights=weights)
    of = lambda i: dict(train=True, weights=weights[i : i + 4])
    parts = (nj.BatchNorm().apply(params, state, x[i : i + 4], **of(i))[0] for i in (0, 4))
    chex.assert_trees_all_close(y, jnp.concatenate(list(parts)), **EXACT)
    seen = ghost.observe(x, weights=weights)
    chex.assert_trees_all_close(seen, nj.BatchNorm().observe(x, weights=weights), **EXACT)


def test_a_part_whose_weights_are_zero_does_not_count():
    ghost = nj.Ghost(nj.BatchNorm(), groups=2)
    params, state = ghost.init(None, 4)
    x, mask = jnp.asarray(draw(0, *SHAPE)), jnp.arange(8).reshape(8, 1, 1) < 4
    run = lambda **given: ghost.apply(params, state, x, train=True, **given)
    chex.assert_trees_all_close(run(weights=mask * 2.0), run(mask=mask), **EXACT)


def test_modules_observe_with_weights():
    x, weights = np.float32(draw(0, 8, 4)), np.arange(8.0, dtype=np.float32).reshape(8, 1)
    wanted = nj.BatchNorm().observe(x, weights=weights)
    module = normjax.linen.BatchNorm(use_running_average=False)
    made = module.init(jax.random.key(0), x)
    _, new = module.apply(made, x, weights=weights, mutable=["batch_stats", "moments"])
    chex.assert_trees_all_close(new["moments"]["seen"][0], wanted)
    module = normjax.nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    _, seen = nnx.capture(module, normjax.nnx.Seen)(x, weights=weights)
    chex.assert_trees_all_close(seen["seen"][0], wanted)


X, ONES = np.zeros((6, 4), np.float32), np.ones((6, 1), np.float32)
BAD = (
    (-ONES, ValueError, "negative or not finite"),
    (ONES * np.nan, ValueError, "negative or not finite"),
    (ONES * np.inf, ValueError, "negative or not finite"),
    (ONES * 1j, TypeError, "weights have dtype complex64"),
    (ONES[:, 0], ValueError, r"weights of shape \(6,\) do not broadcast"),
    (ONES[None], ValueError, r"weights of shape \(1, 6, 1\) do not broadcast"),
)


@pytest.mark.parametrize(("weights", "error", "words"), BAD)
def test_bad_weights(weights, error, words):
    for method in (nj.BatchNorm(), nj.LayerNorm(), nj.GroupNorm(2)):
        with pytest.raises(error, match=words):
            method.apply(*method.init(None, 4), X, train=True, weights=weights)
        with pytest.raises(error, match=words):
            method.observe(X, weights=weights)


def test_bad_weights_that_are_traced_count_as_zero():
    x, method = jnp.asarray(draw(0, 6, 4)), nj.BatchNorm()
    bad = jnp.array([1.0, -2, 3, jnp.nan, jnp.inf, -jnp.inf])[:, None]
    good = jnp.where((bad > 0) & (bad < jnp.inf), bad, 0)
    observe = jax.jit(lambda weights: method.observe(x, weights=weights))
    chex.assert_trees_all_close(observe(bad), observe(good), **EXACT)


def test_what_takes_no_weights_says_so():
    for method in (nj.GhostBatchNorm(2), nj.Affine()):
        with pytest.raises(TypeError, match="takes no input 'weights'"):
            method.apply(*method.init(None, 4), X, train=True, weights=ONES)
    with pytest.raises(TypeError, match="are `weights`, where a method takes them"):
        nj.BatchNorm().observe(X, ONES)
