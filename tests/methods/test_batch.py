"""BatchNorm and BatchRenorm."""

import functools
from itertools import cycle

import agreement
import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import vector_files
from absl.testing import parameterized
from agreement import (
    DEVICES_OFFSET_TOLERANCE,
    OFFSET_TOLERANCE,
    TOLERANCE,
    close,
    draw,
    ragged,
    run,
    variables,
)

import normjax as nj

KEY = jax.random.key(0)


def half_step(step):
    return 1 + step / 2


def tenth_step(step):
    return step / 10


def falling(step):
    return 1 / (1 + step)


class BatchNormTest(parameterized.TestCase):
    @parameterized.parameters(*vector_files.names("batch_norm"))
    def test_vectors(self, name):
        agreement.check_vectors(name)

    @parameterized.parameters(*vector_files.names("scale_batch_norm"))
    def test_vectors_with_initial_scale(self, name):
        agreement.check_vectors(name)
        _, arrays = vector_files.load(name)
        params, _ = vector_files.method(name).init(KEY, arrays["param_scale"].shape)
        np.testing.assert_array_equal(params.scale, arrays["param_scale"].astype("float32"))
        np.testing.assert_array_equal(params.bias, arrays["param_bias"])

    ORACLE = (
        dict(shape=(6, 4), features=4),
        dict(shape=(1, 5, 1, 3), features=3, use_bias=False, epsilon=1e-3),
        dict(shape=(3, 4, 2, 5), features=4, axis=1, use_scale=False, momentum=0.0),
        dict(shape=(3, 4, 2, 5), features=(3, 5), axis=(0, -1), unbiased_running_var=True),
        dict(shape=(7, 1), features=1, running_average="debiased", momentum=0.9),
        dict(shape=(2, 3, 4), features=4, running_average="cumulative"),
        dict(shape=(2, 6, 4), features=4, activation=jax.nn.relu, momentum=1.0),
        dict(shape=(2, 6, 4), features=4, constant_statistics=True),
        dict(shape=(2, 6, 4), features=4, momentum=falling),
    )

    @parameterized.parameters(*zip(ORACLE, cycle(agreement.KINDS)))
    def test_oracle(self, case, kind):
        agreement.check_case(nj.BatchNorm, case, kind)

    @parameterized.parameters(*zip(ORACLE, cycle(agreement.KINDS[::-1])))
    @pytest.mark.slow
    def test_oracle_of_the_other_kind(self, case, kind):
        agreement.check_case(nj.BatchNorm, case, kind)

    @parameterized.parameters(False, True)
    def test_evaluation_is_the_oracle_and_keeps_state(self, masked):
        method, x = nj.BatchNorm(axis=1, running_average="debiased"), draw(0, 3, 4, 2)
        mask = ragged(1, *x.shape) if masked else None
        agreement.check_oracle(method, 4, x, mask=mask, train=False)

    @hypothesis.settings(deadline=None, derandomize=True, max_examples=25)
    @hypothesis.given(
        seed=st.integers(0, 2**16),
        share=st.floats(0, 1),
        offset=st.floats(-100, 100),
        log_std=st.integers(-2, 2),
        by=st.sampled_from(["position", "sample", "channel"]),
    )
    def test_any_mask(self, seed, share, offset, log_std, by):
        method, shape = nj.BatchNorm(unbiased_running_var=True), (4, 3, 2)
        drawn = {"position": shape, "sample": (4, 1, 1), "channel": (2,)}[by]
        mask = np.broadcast_to(ragged(seed, *drawn, share=share), shape)
        with jax.enable_x64(True):
            x = np.where(mask, offset + 10.0**log_std * draw(seed, *shape, dtype="float64"), np.nan)
            params, state = variables(method, 2, dtype="float64")
            y, new, _ = run(method, params, state, x, mask=mask)
            expected_y, expected = oracles.apply(method, params, state, x, train=True, mask=mask)
            close((y, new), (expected_y, expected), TOLERANCE["float64"])

    @parameterized.parameters((6, 1, 1), (1, 3, 1), (1, 1, 4), (4,), ())
    def test_mask_broadcasts(self, *shape):
        mask = ragged(2, *shape)
        mask.flat[0] = True
        x = draw(0, 6, 3, 4)
        agreement.check_oracle(nj.BatchNorm(), 4, x, mask=mask)

    def test_masked_rows_are_as_if_dropped(self):
        x, keep = draw(0, 6, 3, 4), np.array([1, 0, 1, 1, 0, 1], bool)
        method = nj.BatchNorm(unbiased_running_var=True)
        params, state = variables(method, 4)
        padded = np.where(keep[:, None, None], x, np.float32(np.nan))
        y, new, _ = run(method, params, state, padded, mask=keep[:, None, None])
        z, expected, _ = run(method, params, state, x[keep])
        close((y[keep], new), (z, expected), TOLERANCE["float32"])

    @parameterized.parameters("exponential", "debiased", "cumulative")
    def test_empty_mask_leaves_state_alone(self, average):
        method, x = nj.BatchNorm(running_average=average), draw(0, 6, 4)
        params, state = variables(method, 4)
        y, new, pulled = run(method, params, state, x, mask=np.zeros((6, 1), bool), cotangent=x)
        chex.assert_trees_all_equal(new, state)
        chex.assert_tree_all_finite((y, pulled))

    @parameterized.parameters(("exponential", np.nan), ("debiased", np.inf), ("cumulative", 1e30))
    def test_nonfinite_batch_is_skipped(self, average, bad):
        method = nj.BatchNorm(running_average=average, skip_nonfinite=True)
        params, state = variables(method, 4)
        x = draw(0, 6, 4)
        _, moved, _ = run(method, params, state, x)
        x[2, 1] = bad
        _, kept, _ = run(method, params, state, x)
        chex.assert_trees_all_equal(kept, state)
        self.assertFalse(np.equal(moved.mean, state.mean).any())
        method = nj.BatchNorm(running_average=average)
        _, spoilt, _ = run(method, params, state, x)
        self.assertFalse(np.isfinite(spoilt.var[1]))
        close(spoilt.var[2:], moved.var[2:], TOLERANCE["float32"])

    @parameterized.parameters(0.5, 0.99, 0.9999)
    def test_debiased_average_of_steps(self, momentum):
        method = nj.BatchNorm(running_average="debiased", momentum=momentum)
        params, state = method.init(KEY, 4)
        xs = draw(0, 6, 8, 4)
        for x in xs:
            _, state, _ = run(method, params, state, x)
        weights = momentum ** np.arange(5, -1, -1)
        mean = np.average(xs.astype("float64").mean(1), axis=0, weights=weights)
        var = np.average(xs.astype("float64").var(1), axis=0, weights=weights)
        expected = nj.BatchNorm(running_average="debiased").init(KEY, 4)[1]
        expected = expected._replace(mean=mean, var=var, count=np.float32(6))
        close(state, expected, TOLERANCE["float32"])

    def test_cumulative_average_of_steps(self):
        method = nj.BatchNorm(running_average="cumulative")
        params, state = method.init(KEY, 4)
        xs = draw(0, 5, 8, 4)
        for x in xs:
            _, state, _ = run(method, params, state, x)
        close(state.mean, xs.mean((0, 1)), TOLERANCE["float32"])
        close(state.var, xs.var(1).mean(0), TOLERANCE["float32"])

    def test_dtypes(self):
        x = draw(0, 6, 4)
        agreement.check_dtypes(nj.BatchNorm(running_average="debiased"), 4, x)
        agreement.check_dtypes(nj.BatchNorm(dtype=jnp.float32), 4, x, output=jnp.float32)
        agreement.check_dtypes(nj.BatchNorm(dtype=jnp.bfloat16), 4, x, output=jnp.bfloat16)
        params, state = nj.BatchNorm(param_dtype=jnp.bfloat16).init(KEY, 4)
        chex.assert_type(list(params), "bfloat16")
        chex.assert_type([state.mean, state.var], "float32")

    def test_statistics_of_bfloat16_are_exact(self):
        method = nj.BatchNorm(momentum=0.0)
        x = jnp.asarray(3 + draw(0, 4096, 2), "bfloat16")
        params, state = method.init(KEY, 2)
        _, new, _ = run(method, params, state, x)
        _, expected = oracles.apply(method, params, state, x, train=True)
        np.testing.assert_allclose(new.mean, expected.mean, rtol=1e-6)
        np.testing.assert_allclose(new.var, expected.var, rtol=1e-5)

    def test_bfloat16_output_is_rounded_once(self):
        agreement.check_rounding(nj.BatchNorm(), 16, 2 + draw(0, 64, 16))

    @parameterized.parameters(1.0, -1.0)
    def test_large_offset(self, sign):
        method = nj.BatchNorm(momentum=0.0)
        x = (sign * 1e4 + draw(0, 512, 4, 3)).astype("float32")
        params, state = method.init(KEY, 3)
        _, new, _ = run(method, params, state, x)
        exact = x.astype("float64").var((0, 1))
        np.testing.assert_allclose(new.var, exact, rtol=OFFSET_TOLERANCE)

    def test_large_offset_over_a_mapped_axis(self):
        method = nj.BatchNorm(momentum=0.0, axis_name="devices")
        x = (1e4 + draw(0, 8, 64, 3)).astype("float32")
        params, state = method.init(KEY, 3)
        step = jax.vmap(functools.partial(run, method, params, state), axis_name="devices")
        _, new, _ = step(x)
        exact = np.broadcast_to(x.astype("float64").var((0, 1)), (8, 3))
        np.testing.assert_allclose(new.var, exact, rtol=DEVICES_OFFSET_TOLERANCE)

    def test_initializers(self):
        method = nj.BatchNorm(
            scale_init=jax.nn.initializers.constant(2.0), bias_init=jax.nn.initializers.normal()
        )
        params, state = method.init(KEY, 5)
        close(params.scale, np.full(5, 2.0, "float32"), 0)
        self.assertTrue(np.any(params.bias))
        close([state.mean, state.var], [np.zeros(5, "float32"), np.ones(5, "float32")], 0)
        self.assertIsNone(state.count)

    def test_scale_and_bias_are_drawn_apart(self):
        normal = jax.nn.initializers.normal()
        params, _ = nj.BatchNorm(scale_init=normal, bias_init=normal).init(KEY, 5)
        self.assertFalse(np.any(params.scale == params.bias))

    @parameterized.parameters(
        ("momentum", 1.5),
        ("momentum", -0.1),
        ("epsilon", -1e-5),
        ("epsilon", float("nan")),
        ("running_average", "mean"),
        ("axis", "last"),
        ("use_scale", 2),
        ("dtype", "int32"),
        ("activation", "relu"),
    )
    def test_rejects_field(self, field, value):
        for kind in (nj.BatchNorm, nj.BatchRenorm):
            pieces = (kind.__name__, field, value)
            agreement.check_rejects(self, pieces, kind, **{field: value})

    @parameterized.parameters(
        (dict(axis=3), draw(0, 6, 4), None, "axis=3"),
        (dict(axis=(1, -1)), draw(0, 6, 4), None, "axis=(1, -1)"),
        (dict(), draw(0, 6, 5), None, "5"),
        (dict(), np.float32(1), None, "()"),
        (dict(), draw(0, 4), None, "(4,)"),
        (dict(), draw(0, 6, 4).astype("complex64"), None, "complex64"),
        (dict(), draw(0, 6, 4), np.ones(6, bool), "(6,)"),
        (dict(), draw(0, 6, 4), np.ones((2, 6, 4), bool), "(2, 6, 4)"),
    )
    def test_rejects_input(self, fields, x, mask, value):
        for kind in (nj.BatchNorm, nj.BatchRenorm):
            agreement.check_rejects_input(self, kind(**fields), 4, x, mask, value)

    @parameterized.parameters(0, -3, 2.5, "four")
    def test_rejects_features(self, features):
        init = nj.BatchNorm().init
        agreement.check_rejects(self, ("BatchNorm", features), init, KEY, features)


class ReluScaleTest(parameterized.TestCase):
    @parameterized.parameters(1.0, 0.1, 0.01)
    def test_scale_starts_at_the_deviation_of_a_relu(self, g0):
        z, step = np.linspace(-12, 12, 240001, retstep=True)
        density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi) * step
        relu = np.maximum(z, 0)
        mean = (density * relu).sum()
        deviation = np.sqrt((density * (relu - mean) ** 2).sum())
        np.testing.assert_allclose(deviation, 0.584, atol=5e-4)
        start = nj.relu_scale(jax.nn.initializers.constant(g0))
        params, _ = nj.BatchNorm(use_bias=False, scale_init=start).init(KEY, (2, 3))
        np.testing.assert_allclose(params.scale, np.full((2, 3), g0 * deviation), rtol=1e-6)

    def test_is_of_the_dtype_that_is_asked_for(self):
        start = nj.relu_scale(jax.nn.initializers.ones)
        params, _ = nj.BatchNorm(scale_init=start, param_dtype=jnp.bfloat16).init(KEY, 3)
        chex.assert_type(params.scale, jnp.bfloat16)


class BatchRenormTest(parameterized.TestCase):
    ORACLE = (
        dict(shape=(6, 4), features=4, r_max=1.2, d_max=0.3),
        dict(shape=(3, 4, 5), features=4, axis=1, r_max=3.0, d_max=5.0, use_scale=False),
        dict(shape=(3, 2, 4), features=4, r_max=half_step, d_max=tenth_step, use_bias=False),
        dict(shape=(3, 2, 4), features=4, r_max=2.0, d_max=tenth_step, momentum=0.9,
             running_average="debiased", unbiased_running_var=True),
        dict(shape=(6, 4), features=4),
    )  # fmt: skip

    @parameterized.parameters(*zip(ORACLE, cycle(agreement.KINDS)))
    def test_oracle(self, case, kind):
        agreement.check_case(nj.BatchRenorm, case, kind)

    @parameterized.parameters(*zip(ORACLE, cycle(agreement.KINDS[::-1])))
    @pytest.mark.slow
    def test_oracle_of_the_other_kind(self, case, kind):
        agreement.check_case(nj.BatchRenorm, case, kind)

    def test_evaluation_is_batch_norm(self):
        x, method = draw(0, 6, 4), nj.BatchRenorm(r_max=2.0, d_max=1.0)
        params, state = variables(method, 4)
        agreement.check_oracle(method, 4, x, train=False)
        ours = run(method, params, state, x, train=False)
        chex.assert_trees_all_equal(ours, run(nj.BatchNorm(), params, state, x, train=False))

    def test_closed_clips_are_batch_norm(self):
        x, method = draw(0, 6, 4), nj.BatchRenorm(r_max=1.0, d_max=0.0)
        params, state = variables(method, 4)
        ours = run(method, params, state, x, cotangent=x)
        theirs = run(nj.BatchNorm(), params, state, x, cotangent=x)
        close(ours, theirs, TOLERANCE["float32"])

    def test_open_clips_are_evaluation(self):
        x, method = draw(0, 6, 4), nj.BatchRenorm(r_max=1e6, d_max=1e6)
        params, state = variables(method, 4)
        y, _, _ = run(method, params, state, x)
        z, _, _ = run(method, params, state, x, train=False)
        close(y, z, TOLERANCE["float32"])

    @parameterized.parameters(
        (0, 1.0, 0.0),
        (5000, 1.0, 0.0),
        (22500, 2.0, 4.375),
        (25000, 15 / 7, 5.0),
        (40000, 3.0, 5.0),
        (90000, 3.0, 5.0),
    )
    def test_default_ramps_are_the_papers(self, count, r_max, d_max):
        x = 10 + 10 * draw(0, 6, 4)
        scheduled, fixed = nj.BatchRenorm(), nj.BatchRenorm(r_max=r_max, d_max=d_max)
        params, state = scheduled.init(KEY, 4)
        state = state._replace(count=jnp.float32(count))
        y, new, _ = run(scheduled, params, state, x)
        z, _, _ = run(fixed, params, state._replace(count=None), x)
        close(y, z, TOLERANCE["float32"])
        self.assertEqual(new.count, count + 1)

    def test_clips_advance_with_the_count(self):
        method = nj.BatchRenorm(r_max=half_step, d_max=tenth_step)
        params, state = method.init(KEY, 4)
        outputs = []
        for _ in range(3):
            y, after, _ = run(method, params, state, 5 + 5 * draw(0, 6, 4))
            state = state._replace(count=after.count)
            outputs.append(np.asarray(y, "float64"))
        plain = (outputs[0] - 0) / 1.0
        close(outputs[1], plain * 1.5 + 0.1, TOLERANCE["float32"])
        close(outputs[2], plain * 2.0 + 0.2, TOLERANCE["float32"])

    def test_count_waits_for_skipped_batches(self):
        method = nj.BatchRenorm(skip_nonfinite=True)
        params, state = variables(method, 4)
        for x, mask in ((draw(0, 6, 4), np.zeros((), bool)), (np.full((6, 4), np.nan), None)):
            _, new, _ = run(method, params, state, x.astype("float32"), mask=mask)
            chex.assert_trees_all_equal(new, state)

    def test_numbers_leave_no_count(self):
        self.assertIsNone(nj.BatchRenorm(r_max=3.0, d_max=5.0).init(KEY, 4)[1].count)
        for field in (dict(r_max=3.0), dict(d_max=5.0)):
            self.assertEqual(nj.BatchRenorm(**field).init(KEY, 4)[1].count, 0)

    def test_dtypes_and_rounding(self):
        agreement.check_dtypes(nj.BatchRenorm(), 4, draw(0, 6, 4))
        agreement.check_dtypes(
            nj.BatchRenorm(dtype=jnp.bfloat16), 4, draw(0, 6, 4), output=jnp.bfloat16
        )
        agreement.check_rounding(nj.BatchRenorm(r_max=2.0, d_max=1.0), 16, 2 + draw(0, 64, 16))

    @parameterized.parameters(
        ("r_max", 0.5), ("r_max", float("nan")), ("d_max", -1.0), ("d_max", "none")
    )
    def test_rejects_bound(self, field, value):
        pieces = ("BatchRenorm", field, value)
        agreement.check_rejects(self, pieces, nj.BatchRenorm, **{field: value})
