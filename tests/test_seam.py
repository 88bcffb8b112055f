"""What the seam is for: statistics that pool, micro-batches, folding, raw statistics, inputs."""

import dataclasses
import functools
from typing import Any, ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import close, draw, ragged, variables
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

import normjax as nj
import normjax.linen
import normjax.nnx
from normjax.core import running, seam, statistics
from normjax.core.method import Traits, replace
from normjax.methods import batch
from normjax.methods.batch import BatchFields
from normjax.testing import check_method, count_collectives

KEY = jax.random.key(0)
POOLED = nj.BatchNorm(running_average="pooled")


def exact(*parts):
    """Count, mean and variance of [values, features], over all parts, in float64."""
    x = np.concatenate(parts).astype("float64")
    return np.full(x.shape[-1], len(x)), x.mean(0), x.var(0)


class TestPooled:
    def test_batches_of_all_sizes_at_an_offset(self):
        """A thousand batches of 1 to 64 samples, by masks of one size."""
        rng = np.random.default_rng(0)
        x = (1e3 + rng.normal(size=(1000, 64, 3)) * [1, 3, 0.3]).astype("float32")
        mask = np.arange(64) < rng.integers(1, 65, size=(1000, 1))

        @jax.jit
        def absorb(state, x, mask):
            step = lambda state, one: (POOLED.absorb(state, POOLED.observe(*one)), None)
            return jax.lax.scan(step, state, (x, mask[..., None]))[0]

        state = absorb(POOLED.init(None, 3)[1], x, mask)
        count, mean, var = exact(x[mask])
        np.testing.assert_array_equal(state.pool.count, count)
        np.testing.assert_allclose(state.mean, mean, rtol=2e-7)
        np.testing.assert_allclose(state.var, var, rtol=1e-5)

    def test_many_small_batches_are_exact_to_float32(self):
        """A hundred thousand updates; without the rests they are off by ten roundings and more."""
        rng = np.random.default_rng(1)
        count = rng.integers(1, 1000, size=(100_000, 1)).astype("float32")
        mean = (100 + rng.normal(size=(100_000, 1))).astype("float32")
        var = rng.exponential(size=(100_000, 1)).astype("float32")

        @jax.jit
        def absorb(state, seen):
            return jax.lax.scan(lambda s, one: (POOLED.absorb(s, one), None), state, seen)[0]

        state = absorb(POOLED.init(None, 1)[1], nj.Moments(count, mean, var))
        n, m, v = (a.astype("float64") for a in (count, mean, var))
        center = np.average(m, weights=n)
        np.testing.assert_allclose(state.pool.count, n.sum(), rtol=6e-8)
        np.testing.assert_allclose(state.mean, center, rtol=1.2e-7)
        spread = np.average(v + (m - center) ** 2, weights=n)
        np.testing.assert_allclose(state.var, spread, rtol=2e-7)

    def test_training_records_what_it_saw_and_evaluation_uses_it(self):
        parts = draw(0, 5, 4), draw(1, 2, 4), 3 * draw(2, 8, 4)
        params, state = POOLED.init(None, 4)
        for x in parts:
            _, state = POOLED.apply(params, state, x, train=True)
        _, mean, var = exact(*parts)
        close((state.mean, state.var), (mean.astype("float32"), var.astype("float32")), 1e-6)
        y, _ = POOLED.apply(params, state, parts[0], train=False)
        close(y, ((parts[0] - mean) / np.sqrt(var + 1e-5)).astype("float32"), 1e-5)

    def test_what_is_masked_or_not_finite_does_not_enter(self):
        method, x = nj.BatchNorm(running_average="pooled", skip_nonfinite=True), draw(0, 6, 4)
        params, state = method.init(None, 4)
        _, state = method.apply(params, state, x, train=True)
        holes = np.ones((6, 4), bool)
        holes[:, 2] = False
        _, new = method.apply(params, state, 5 * x, train=True, mask=holes)
        wanted = exact(x, 5 * x)[1].astype("float32")
        wanted[2] = state.mean[2]
        close(new.mean, wanted, 1e-6)
        np.testing.assert_array_equal(new.pool.count, [12, 12, 6, 12])
        for spoilt, mask in ((x * np.float32(np.nan), None), (x, np.zeros((6, 1), bool))):
            chex.assert_trees_all_equal(
                method.apply(params, new, spoilt, train=True, mask=mask)[1], new
            )

    @pytest.mark.parametrize(
        "make",
        (
            lambda: nj.Ghost(POOLED, groups=2),
            lambda: nj.Ghost(nj.chain(nj.LayerNorm(), POOLED), groups=2),
            lambda: nj.GhostBatchNorm(2, running_average="pooled"),
            lambda: nj.EvalNorm(2, running_average="pooled"),
            lambda: nj.BatchNorm(running_average="pooled", momentum=nj.Ramp(0.0, 1.0, 0, 9)),
            lambda: nj.BatchNorm(running_average="pooled", unbiased_running_var=True),
        ),
    )
    def test_refused_where_it_would_mean_nothing(self, make):
        with pytest.raises(ValueError, match="pooled"):
            make()


class TestMomentum:
    def test_schedule_is_an_average_with_changing_weights(self):
        method = nj.BatchNorm(momentum=lambda step: 1 - 1 / (2 + step))
        params, state = variables(method, 4, count=0.0)
        mean, var = (np.asarray(a, "float64") for a in (state.mean, state.var))
        xs = draw(0, 6, 8, 4)
        for step, x in enumerate(xs):
            _, state = method.apply(params, state, x, train=True)
            keep = 1 - 1 / (2 + step)
            mean = keep * mean + (1 - keep) * x.astype("float64").mean(0)
            var = keep * var + (1 - keep) * x.astype("float64").var(0)
        close((state.mean, state.var), (mean.astype("float32"), var.astype("float32")), 1e-6)
        assert state.count == 6

    def test_only_the_exponential_average_has_one(self):
        with pytest.raises(ValueError, match="schedule of momentum"):
            nj.BatchNorm(momentum=nj.Ramp(0.0, 1.0, 0, 9), running_average="debiased")


def covariances(x):
    """Of [vectors, features], in NumPy."""
    count = np.asarray(len(x), x.dtype)
    return nj.Covariances(count, x.mean(0), np.cov(x.T, bias=True).astype(x.dtype))


RAGGED = [100 + draw(i, n, 3) for i, n in enumerate((7, 1, 12, 4))]


class TestPool:
    def test_is_the_statistics_of_the_union(self):
        method = nj.BatchNorm()
        wanted = nj.Moments(*map(np.float32, exact(*RAGGED)))
        close(nj.pool(*map(method.observe, RAGGED)), wanted, 1e-5)
        one = method.observe(RAGGED[0])
        chex.assert_trees_all_equal(nj.pool(one), one)

    def test_with_masks(self):
        method, x, mask = nj.BatchNorm(), draw(0, 9, 2, 3), ragged(1, 9, 2, 3)
        mask[:3, :, 1] = False
        parts = zip(np.split(x, 3), np.split(mask, 3), strict=True)
        seen = nj.pool(*(method.observe(part, valid) for part, valid in parts))
        close(seen, method.observe(x, mask), 1e-6)
        np.testing.assert_array_equal(seen.count, mask.sum((0, 1)))

    def test_of_batches_without_a_sample(self):
        method, nothing = nj.BatchNorm(), np.zeros((4, 1), bool)
        empty = [method.observe(draw(i, 4, 3), nothing) for i in range(2)]
        chex.assert_trees_all_equal(nj.pool(*empty), nj.Moments(*np.zeros((3, 3), "float32")))
        one = method.observe(RAGGED[0])
        close(nj.pool(empty[0], one), one, 1e-6)

    def test_of_methods_that_treat_parts_apart(self):
        seen = [nj.ExclusiveBatchNorm().observe(draw(i, n, 3)) for i, n in enumerate((4, 6))]
        assert all(isinstance(one, nj.Parted) for one in seen)
        wanted = nj.BatchNorm().observe(np.concatenate([draw(0, 4, 3), draw(1, 6, 3)]))
        close(nj.pool(*seen), wanted, 1e-6)


class TestCovariances:
    def test_pool_and_merge_are_those_of_the_union(self):
        wanted, parts = covariances(np.concatenate(RAGGED)), list(map(covariances, RAGGED))
        close(nj.pool(*parts), wanted, 1e-5)
        rows = jax.tree.map(lambda *a: np.stack((a, a)), *parts)
        close(statistics.merge(rows, 1), jax.tree.map(lambda a: np.stack((a, a)), wanted), 1e-5)

    @pytest.mark.parametrize("features", (3, 200))
    def test_over_devices(self, features):
        """Small ones by one collective; large ones in two steps that send no device's own."""
        x = 10 + draw(0, 8 * 5, features)
        mask = ragged(1, 40)
        mask[5:10] = False
        mesh = Mesh(np.array(jax.devices()), ("batch",))

        def local(x, mask):
            weight = mask.astype(x.dtype)
            count = weight.sum()
            mean = (weight @ x) / jnp.maximum(count, 1)
            gap = (x - mean[None]) * weight[:, None]
            return nj.Covariances(count, mean, gap.T @ gap / jnp.maximum(count, 1))

        rows, whole = PartitionSpec("batch"), PartitionSpec()
        reduce = lambda *a: statistics.over_devices(local(*a), "batch")[0]
        mapped = jax.shard_map(reduce, mesh=mesh, in_specs=rows, out_specs=whole)
        close(jax.jit(mapped)(x, mask), covariances(x[mask]), 1e-4)
        large = 8 * 4 * (features**2 + features + 1) > statistics.LARGE_MESSAGE
        assert count_collectives(mapped, x, mask) == (2 if large else 1)


MICRO = (
    (nj.BatchNorm(), {}),
    (nj.BatchRenorm(r_max=1.5, d_max=0.5), {}),
    (nj.KalmanNorm(gain=0.3), {"prior": nj.Moments(np.zeros(4), draw(5, 4), 1 + draw(6, 4) ** 2)}),
    (nj.KalmanNorm(gain="learned"), {}),
)


class TestMicroBatches:
    @pytest.mark.parametrize(("method", "inputs"), MICRO)
    def test_pooled_observations_are_those_of_the_whole_batch(self, method, inputs):
        with jax.enable_x64(True):
            x, mask = draw(0, 12, 3, 4, dtype="float64"), ragged(1, 12, 3, 1)
            params, state = variables(method, 4, dtype="float64")
            parts = zip(np.split(x, [2, 5]), np.split(mask, [2, 5]), strict=True)
            seen = nj.pool(*(method.observe(part, valid) for part, valid in parts))
            whole = method.observe(x, mask)
            ours, wanted = (method.coefficients(params, state, s, **inputs) for s in (seen, whole))
            close(ours, wanted, 1e-12)
            close(method.absorb(state, seen), method.absorb(state, whole), 1e-12)
            y, _ = method.apply(params, state, x, train=True, mask=mask, **inputs)
            close(jnp.where(mask, normalized(x, ours), 0), jnp.where(mask, y, 0), 1e-10)


def normalized(x, normalizer):
    """The formula of a `Normalizer`."""
    mean, inverse, scale, bias = jax.tree.map(np.asarray, normalizer)
    y = x if mean is None else x - mean
    for factor in (inverse, scale):
        y = y if factor is None else y * factor
    return y if bias is None else y + bias


class TestFolding:
    @pytest.mark.parametrize(
        "method",
        (
            nj.BatchNorm(),
            nj.BatchNorm(use_scale=False, use_bias=False, running_average="pooled"),
            nj.BatchRenorm(),
            nj.KalmanNorm(gain="computed", use_bias=False),
            nj.Affine(),
            nj.Affine(use_scale=False),
            nj.Ghost(nj.BatchNorm(), groups=4),
        ),
    )
    def test_a_dense_layer_takes_up_the_norm_behind_it(self, method):
        x, kernel, bias = draw(0, 6, 3), draw(1, 3, 4), draw(2, 4)
        params, state = variables(method, 4)
        wanted, _ = method.apply(params, state, x @ kernel + bias, train=False)
        mean, inverse, scale, shift = method.evaluation(params, state)
        slope = np.ones(4, "float32")
        for factor in (inverse, scale):
            slope = slope if factor is None else slope * np.asarray(factor)
        offset = (bias if mean is None else bias - mean) * slope
        offset = offset if shift is None else offset + shift
        close(x @ (kernel * slope) + np.asarray(offset), np.asarray(wanted), 1e-5)

    @pytest.mark.parametrize(
        "method",
        (nj.LayerNorm(), nj.RMSNorm(), nj.GroupNorm(2), nj.InstanceNorm(), nj.EvalNorm(2)),
    )
    def test_own_statistics_cannot_be_folded(self, method):
        with pytest.raises(ValueError, match=rf"{type(method).__name__}: x=None, .* statistics of"):
            method.evaluation(*method.init(KEY, 4))

    @pytest.mark.parametrize("method", (nj.DynamicTanh(), nj.chain(nj.BatchNorm())))
    def test_other_methods_are_no_normalizations(self, method):
        assert not isinstance(method, nj.Normalization)


class Net(nn.Module):
    """Layers whose norms have statistics, and one without."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train):
        x = normjax.linen.BatchNorm(axis_name=self.axis_name)(nn.Dense(4)(x), not train)
        x = normjax.linen.DynamicTanh()(normjax.linen.LayerNorm(use_scale=False)(x))
        return normjax.linen.Norm(nj.Ghost(nj.KalmanNorm(), groups=2))(x, not train)


class Model(nnx.Module):
    """The first two norms of `Net`."""

    def __init__(self, rngs, axis_name=None):
        self.dense = nnx.Linear(3, 4, rngs=rngs)
        self.norm = normjax.nnx.BatchNorm(4, axis_name=axis_name, rngs=rngs)
        self.last = normjax.nnx.LayerNorm(4, rngs=rngs)

    def __call__(self, x, mask=None):
        return self.last(self.norm(self.dense(x), mask=mask))


X = draw(0, 8, 3)


class TestRawStatistics:
    def test_of_a_linen_model(self):
        net = Net()
        variables = net.init(KEY, X, True)
        assert "moments" not in variables
        for train in (True, False):
            _, new = net.apply(variables, X, train, mutable=["moments", "batch_stats"])
            assert set(new["moments"]) == {"BatchNorm_0", "LayerNorm_0", "Norm_0"}
            dense = nn.Dense(4).apply({"params": variables["params"]["Dense_0"]}, X)
            (seen,) = new["moments"]["BatchNorm_0"]["seen"]
            close(seen, nj.BatchNorm().observe(dense), 1e-6)
            (seen,) = new["moments"]["LayerNorm_0"]["seen"]
            assert seen.mean.shape == (8, 1)
        _, new = net.apply(variables, X, True, mutable=["batch_stats"])
        assert set(new) == {"batch_stats"}

    def test_of_a_linen_model_over_an_axis_of_vmap(self):
        variables = Net().init(KEY, X, True)
        run = lambda net, x: net.apply(variables, x, True, mutable=["moments", "batch_stats"])[1]
        (whole,) = run(Net(), X)["moments"]["BatchNorm_0"]["seen"]
        mapped = jax.vmap(functools.partial(run, Net(axis_name="batch")), axis_name="batch")
        (seen,) = mapped(X.reshape(2, 4, 3))["moments"]["BatchNorm_0"]["seen"]
        close(seen, jax.tree.map(lambda a: np.tile(a, (2, 1)), whole), 1e-6)

    def test_of_an_nnx_model(self):
        model, mask = Model(nnx.Rngs(0)), np.arange(8)[:, None] < 5
        y, seen = nnx.capture(model, normjax.nnx.Seen)(X, mask)
        close(seen["norm"]["seen"][0], nj.BatchNorm().observe(model.dense(X), mask), 1e-6)
        assert seen["last"]["seen"][0].mean.shape == (8, 1)
        assert not jax.tree.leaves(nnx.state(model, normjax.nnx.Seen))
        plain = Model(nnx.Rngs(0))
        chex.assert_trees_all_equal(plain(X, mask), y)
        assert not jax.tree.leaves(nnx.state(plain, normjax.nnx.Seen))

    def test_of_an_nnx_model_over_an_axis_of_vmap(self):
        graph, state = nnx.split(Model(nnx.Rngs(0), axis_name="batch"))

        def run(state, x):
            _, seen = nnx.capture(nnx.merge(graph, state), normjax.nnx.Seen)(x)
            return seen["norm"]["seen"][0]

        seen = jax.vmap(run, (None, 0), axis_name="batch")(state, X.reshape(2, 4, 3))
        whole = nj.BatchNorm().observe(Model(nnx.Rngs(0)).dense(X))
        close(seen, jax.tree.map(lambda a: np.tile(a, (2, 1)), whole), 1e-6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditional(BatchFields):
    """Batch norm whose output every sample multiplies by a `gain` of its own, [batch, 1, features].

    A method of a user, written with the public parts.
    """

    traits: ClassVar[Traits] = Traits(inputs={"gain": "sample"})

    init, observe, evaluation = batch.init, batch.observe, batch.evaluation
    coefficients, absorb = batch.coefficients, running.absorb

    def apply(
        self, params: Any, state: Any, x: Any, *, train: bool, mask=None, key=None, gain: Any
    ) -> Any:
        y, state = seam.apply(self, params, state, x, train=train, mask=mask)
        gain = gain if mask is None else jnp.where(mask, gain, 1)
        return (y * gain).astype(y.dtype), state


def gains(dtype, shape):
    return {"gain": jnp.asarray(1 + draw(7, shape[0], 1, shape[-1]) ** 2, dtype)}


class TestInputs:
    def test_chain_gives_each_method_its_own(self):
        first, second = Conditional(), nj.KalmanNorm(gain=0.3)
        method, x = nj.chain(first, nj.LayerNorm(), second), draw(0, 6, 3, 4)
        params, state = method.init(KEY, 4)
        gain = gains("float32", x.shape)["gain"]
        prior = nj.propagate.prediction(jnp.ones(4), jnp.ones(4))
        y, new = method.apply(params, state, x, train=True, gain=gain, prior=prior)
        names = ("Conditional_0", "LayerNorm_1", "KalmanNorm_2")
        z, _ = first.apply(params[names[0]], state[names[0]], x, train=True, gain=gain)
        z, _ = nj.LayerNorm().apply(params[names[1]], (), z, train=True)
        z, last = second.apply(params[names[2]], state[names[2]], z, train=True, prior=prior)
        chex.assert_trees_all_equal((y, new[names[2]]), (z, last))
        own = {"gain": "sample", "prior": "whole"}
        assert method.traits.inputs == own | dict(nj.LayerNorm().traits.inputs)

    def test_chain_refuses_what_none_takes(self):
        method = nj.chain(nj.BatchNorm(), nj.KalmanNorm())
        params, state = method.init(KEY, 4)
        pattern = r"BatchNorm, KalmanNorm takes an input 'gain'"
        with pytest.raises(TypeError, match=pattern):
            method.apply(params, state, draw(0, 6, 4), train=True, gain=jnp.ones((6, 4)))

    def test_chain_refuses_two_meanings_of_a_name(self):
        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Whole(Conditional):
            traits: ClassVar[Traits] = Traits(inputs={"gain": "whole"})

        with pytest.raises(ValueError, match=r"different ways.*gain"):
            nj.chain(Conditional(), Whole())

    @pytest.mark.parametrize("masked", (False, True))
    def test_ghost_divides_those_of_samples(self, masked):
        one, x = Conditional(), draw(0, 8, 3, 4)
        mask = ragged(1, 8, 3, 1) if masked else np.ones((8, 1, 1), bool)
        params, state = variables(one, 4)
        gain = gains("float32", x.shape)["gain"]
        how = dict(train=True, mask=mask, gain=gain)
        y, new = jax.jit(lambda x: nj.Ghost(one, groups=4).apply(params, state, x, **how))(x)
        parts = [
            one.apply(params, state, part, train=True, mask=valid, gain=own)
            for part, valid, own in zip(*map(np.split, (x, mask, gain), (4,) * 3), strict=True)
        ]
        wanted, states = zip(*parts, strict=True)
        close(y, np.concatenate(wanted), 1e-5)
        close(new, jax.tree.map(lambda *a: sum(a) / 4, *states), 1e-5)

    @pytest.mark.parametrize(
        ("method", "promises"),
        (
            (nj.Ghost(Conditional(), groups=8), dict(drops_rows=False)),
            pytest.param(nj.chain(Conditional(), nj.Affine()), {}, marks=pytest.mark.slow),
        ),
    )
    def test_contract(self, method, promises):
        only = ("structure", "masks", "devices", "collectives")
        check_method(method, (16, 3, 4), only=only, extra=gains, **promises)

    def test_devices_divide_those_of_samples(self):
        """Four parts of a batch on eight devices, two for a part."""
        method, x = nj.Ghost(Conditional(), groups=4), draw(0, 16, 3, 4)
        params, state = variables(method, 4)
        gain = gains("float32", x.shape)["gain"]
        wanted = method.apply(params, state, x, train=True, gain=gain)
        method = replace(method, axis_name="batch")
        step = lambda x, gain: method.apply(params, state, x, train=True, gain=gain)
        rows, whole = PartitionSpec("batch"), PartitionSpec()
        mesh = Mesh(np.array(jax.devices()), ("batch",))
        mapped = jax.shard_map(step, mesh=mesh, in_specs=rows, out_specs=(rows, whole))
        close(jax.jit(mapped)(x, gain), wanted, 1e-5)
