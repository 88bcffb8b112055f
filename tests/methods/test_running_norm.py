"""RunningNorm."""

from itertools import cycle

import agreement
import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from absl.testing import parameterized
from agreement import close, draw, ragged
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

import normjax as nj
import normjax.linen
import normjax.nnx

CASES = (
    dict(shape=(6, 5), features=5),
    dict(shape=(1, 5), features=5),
    dict(shape=(4, 3, 2), features=3, axis=1, clip=0.5),
    dict(shape=(4, 3, 2), features=(3, 2), axis=(1, 2), use_scale=True, use_bias=True, clip=1.0),
    dict(shape=(4, 3, 2), features=2, clip=1.5, activation=jnp.tanh),
    dict(shape=(6, 5), features=5, running_average="exponential", momentum=0.9),
    dict(shape=(6, 5), features=5, running_average="cumulative", unbiased_running_var=True),
)


def filled(method, features, dtype):
    """Variables with statistics of ten values that were seen."""
    params, state = agreement.variables(method, features, dtype=dtype)
    if state.pool is None:
        return params, state
    ten, zero = jnp.full_like(state.mean, 10), jnp.zeros_like(state.mean)
    return params, state._replace(pool=nj.Pool(ten, zero, zero, zero))


class RunningNormTest(parameterized.TestCase):
    @parameterized.parameters(*zip(CASES, cycle(agreement.KINDS)))
    def test_oracle(self, case, kind):
        self.check(case, kind, train=True)

    @parameterized.parameters(*zip(CASES, cycle(agreement.KINDS[::-1])))
    @pytest.mark.slow
    def test_oracle_of_the_other_kind(self, case, kind):
        self.check(case, kind, train=True)

    @parameterized.parameters((CASES[2],), (CASES[5],))
    def test_evaluation(self, case):
        self.check(case, agreement.KINDS[1], train=False)

    def check(self, case, kind, *, train):
        fields, (dtype, masked) = dict(case), kind
        shape, features = fields.pop("shape"), fields.pop("features")
        method, mask = nj.RunningNorm(**fields), ragged(1, *shape) if masked else None
        with jax.enable_x64(dtype == "float64"):
            x = 2 + 3 * draw(0, *shape, dtype=dtype)
            params, state = filled(method, features, dtype)
            spoilt = x if mask is None else np.where(mask, x, np.asarray(np.nan, dtype))
            y, new, _ = agreement.run(method, params, state, spoilt, train=train, mask=mask)
            exact, wanted = oracles.apply(method, params, state, x, train=train, mask=mask)
            close(y, exact.astype(dtype), agreement.TOLERANCE[dtype])
            wanted = jax.tree.map(lambda a: np.asarray(a, dtype), wanted)
            if not train:
                chex.assert_trees_all_equal(new, state)
            elif new.pool is None:
                close(new, wanted, agreement.TOLERANCE[dtype])
            else:
                close(new[:2], wanted[:2], agreement.TOLERANCE[dtype])
                np.testing.assert_array_equal(new.pool.count, wanted.pool.count)

    def test_ragged_batches_on_eight_devices_are_all_values(self):
        """Batches of 1 to 512 rows of 8 devices; constants and a large offset among the columns."""
        rng = np.random.default_rng(0)
        sizes = [1, 512, *rng.integers(1, 513, size=30)]
        scale, shift = np.array([1, 30, 0.1, 0]), np.array([0, -5, 100, 3])
        method = nj.RunningNorm(axis_name="envs")
        mesh = Mesh(np.array(jax.devices()), ("envs",))
        rows, whole = PartitionSpec("envs"), PartitionSpec()

        def move(state, x, mask):
            return method.apply(nj.AffineParams(), state, x, train=True, mask=mask)[::-1]

        specs = dict(in_specs=(whole, rows, rows), out_specs=(whole, rows))
        move = jax.jit(jax.shard_map(move, mesh=mesh, **specs))
        state, seen = method.init(None, 4)[1], []
        for step, size in enumerate(sizes):
            drift = 1 + step / len(sizes)
            x = (rng.normal(size=(512, 4)) * scale * drift + shift).astype("float32")
            seen.append(x[:size])
            x[size:] = np.nan
            state, y = move(state, x, np.arange(512)[:, None] < size)
        exact = np.concatenate(seen).astype("float64")
        np.testing.assert_array_equal(state.pool.count, np.full(4, len(exact)))
        np.testing.assert_allclose(state.mean, exact.mean(0), rtol=1e-5)
        np.testing.assert_allclose(state.var, exact.var(0), rtol=1e-5, atol=1e-12)
        wanted = (seen[-1] - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-8)
        np.testing.assert_allclose(y[: sizes[-1], :3], wanted[:, :3], rtol=1e-4, atol=2e-4)
        assert np.max(np.abs(y[: sizes[-1], 3])) < 0.01  # a rounding of 3 over 1e-4

    def test_moves_first_and_evaluation_leaves_the_statistics(self):
        """As Gymnasium's `RunningMeanStd` without the values that it starts with."""
        method, count, mean, var = nj.RunningNorm(), 0, np.zeros(3), np.ones(3)
        params, state = method.init(None, 3)
        chex.assert_trees_all_equal(
            method.apply(params, state, draw(9, 2, 3), train=False)[1], state
        )
        for step in range(4):
            x = draw(step, 1 + step, 3) + step
            y, state = method.apply(params, state, x, train=True)
            total, delta = count + len(x), x.astype("float64").mean(0) - mean
            square = var * count + x.astype("float64").var(0) * len(x)
            mean = mean + delta * len(x) / total
            var, count = (square + delta**2 * count * len(x) / total) / total, total
            close(y, ((x - mean) / np.sqrt(var + 1e-8)).astype("float32"), 1e-5)
        still, same = method.apply(params, state, x, train=False)
        close(still, y, 1e-6)
        chex.assert_trees_all_equal(same, state)

    def test_statistics_are_constants_of_the_backward_pass(self):
        method, x, g = nj.RunningNorm(), draw(0, 6, 3), draw(1, 6, 3)
        params, state = filled(method, 3, "float32")
        pull = jax.vjp(lambda s, x: method.apply(params, s, x, train=True)[0], state, x)[1]
        dstate, dx = pull(g)
        assert not any(np.any(a) for a in jax.tree.leaves(dstate))
        moved = method.absorb(state, method.observe(x))
        close(dx, g / np.sqrt(moved.var + np.float32(1e-8)), 1e-5)

    def test_clip_bounds_the_output_and_cuts_the_gradient(self):
        method, x = nj.RunningNorm(clip=1.0), np.float32([[-9], [0.5], [9]])
        params, state = method.init(None, 1)
        y, pull = jax.vjp(lambda x: method.apply(params, state, x, train=False)[0], x)
        np.testing.assert_array_equal(y, [[-1], [0.5], [1]])
        np.testing.assert_array_equal(pull(np.ones_like(x))[0], [[0], [1], [0]])
        twin = nj.RunningNorm(clip=1.0)
        assert method.epilogue() == twin.epilogue()  # a fresh one would be traced again

    def test_vmapped_environments_share_the_statistics(self):
        method, x = nj.RunningNorm(axis_name="envs"), 3 + draw(0, 4, 2, 3)
        params, state = method.init(None, 3)
        run = lambda x: method.apply(params, state, x, train=True)
        y, new = jax.vmap(run, axis_name="envs", out_axes=(0, None))(x)
        flat, wanted = nj.RunningNorm().apply(params, state, x.reshape(8, 3), train=True)
        close((y.reshape(8, 3), new), (flat, wanted), 1e-5)

    def test_modules(self):
        x = 5 + draw(0, 6, 3)
        module = normjax.linen.RunningNorm(clip=2.0)
        variables = module.init(jax.random.key(0), x, use_running_average=False)
        assert "params" not in variables
        y, moved = module.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        close(moved["batch_stats"]["mean"], x.mean(0), 1e-5)
        model = normjax.nnx.RunningNorm(3, clip=2.0, rngs=nnx.Rngs(0))
        close(model(x), y, 1e-6)
        model.eval()
        before = nnx.state(model)
        close(model(x), y, 1e-6)
        chex.assert_trees_all_equal(nnx.state(model), before)

    def test_dtypes(self):
        agreement.check_dtypes(nj.RunningNorm(use_scale=True), 4, draw(0, 6, 4))

    @parameterized.parameters(
        ("clip", -1.0),
        ("clip", "ten"),
        ("epsilon", -1.0),
        ("running_average", "welford"),
        ("axis_index_groups", ((0, 1),)),
        ("unbiased_running_var", True),
    )
    def test_rejects_field(self, field, value):
        pieces = ("RunningNorm", field)
        agreement.check_rejects(self, pieces, nj.RunningNorm, axis_name="envs", **{field: value})
