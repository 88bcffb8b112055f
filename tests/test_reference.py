"""The float64 oracles against recorded outputs, finite differences and each other."""

import dataclasses

import agreement
import numpy as np
import oracles
import vector_files
from absl.testing import parameterized
from oracles import Params, Running, close, draw, params_for, running_for

import normjax as nj
from normjax.core.method import replace, traits


def has_oracle(name):
    """Whether a vector file is of a layer whose method has an oracle and no further input."""
    if vector_files.INDEX[name]["method"] not in vector_files.LAYERS:
        return False
    method = vector_files.method(name)
    return type(method).__name__ in oracles.ORACLES and not traits(method).inputs


FILES = [name for name in vector_files.INDEX if has_oracle(name)]


def close_fields(actual, expected, atol):
    """The fields of `actual`, or of each method's if that is a dict, are the arrays `expected`."""
    for name, value in expected.items():
        part = actual[name] if isinstance(actual, dict) else getattr(actual, name)
        check = close_fields if isinstance(value, dict) else close
        check(part, value, atol)


class VectorsTest(parameterized.TestCase):
    @parameterized.parameters(*FILES)
    def test_outputs_and_state(self, name):
        config, arrays = vector_files.load(name)
        method, params, state = agreement.start(name)
        atol = agreement.TOLERANCE[vector_files.dtype(name)]
        for step in (1, 2, 3):
            y, state = oracles.apply(method, params, state, arrays[f"x_{step}"], train=True)
            close(y, arrays[f"y_{step}"], atol)
            tracked = vector_files.fields(name, f"state_{step}_")
            close_fields(state, tracked, atol)
        if "eps_at_inference" in config:
            method = replace(method, epsilon=config["eps_at_inference"])
        y, after = oracles.apply(method, params, state, arrays["x_eval"], train=not tracked)
        close(y, arrays["y_eval"], atol)
        self.assertTrue(not tracked or after == state)

    @parameterized.parameters(
        *(name for name in FILES if oracles.has_gradients(vector_files.method(name)))
    )
    def test_gradients(self, name):
        _, arrays = vector_files.load(name)
        atol = agreement.TOLERANCE[vector_files.dtype(name)]
        dx, dscale, dbias = oracles.gradients(
            *agreement.start(name), arrays["x_1"], arrays["cotangent"]
        )
        close(dx, arrays["grad_x"], atol)
        actual = {"x": dx, "scale": dscale, "bias": dbias}
        if isinstance(dscale, dict):
            actual = {k: {"scale": dscale[k], "bias": dbias[k]} for k in dscale}
        expected = vector_files.fields(name, "grad_")
        close_fields(actual, {k: v for k, v in expected.items() if k != "x"}, atol)


class GradientsTest(parameterized.TestCase):
    @parameterized.parameters(
        (nj.BatchNorm(axis=1), (3,)),
        (nj.LayerNorm(reduction_axes=(1, -1), feature_axes=(2, 3)), (2, 4)),
        (nj.RMSNorm(reduction_axes=(0, 2), feature_axes=1), (3,)),
        (nj.GroupNorm(num_groups=2), (4,)),
        (nj.GroupNorm(num_groups=None, group_size=1, reduction_axes=(2, 3)), (4,)),
        (nj.InstanceNorm(feature_axes=2), (2,)),
        (nj.Ghost(method=nj.BatchNorm(), groups=2), (4,)),
        (nj.GhostBatchNorm(2), (4,)),
        (nj.ExclusiveBatchNorm(2), (4,)),
        (nj.ExclusiveBatchNorm(axis=1), (3,)),
    )
    def test_central_differences_with_ragged_mask(self, method, features):
        x = draw(0, 4, 3, 2, 4)
        mask = np.random.default_rng(2).random(x.shape) < 0.7
        params = params_for(*features)
        if isinstance(method, nj.RMSNorm):
            params = params._replace(bias=None)
        state = Running(np.zeros(features[-1]), np.ones(features[-1]))
        oracles.check_slope(method, params, state, x, mask)


class LimitsTest(parameterized.TestCase):
    def same(self, first, second, x, *, state=None, params=None, mask=None):
        params = params_for(x.shape[-1]) if params is None else params
        state = running_for(x.shape[-1]) if state is None else state
        y, new = oracles.apply(first, params, state, x, train=True, mask=mask)
        z, expected = oracles.apply(second, params, state, x, train=True, mask=mask)
        close(y, z)
        close(new.mean, expected.mean)
        close(new.var, expected.var)

    def test_one_group_is_layer_norm_over_all_but_the_batch(self):
        layer = nj.LayerNorm(reduction_axes=(1, 2, 3))
        self.same(nj.GroupNorm(num_groups=1), layer, draw(0, 2, 3, 4, 5))

    def test_a_group_per_channel_is_instance_norm(self):
        self.same(nj.GroupNorm(num_groups=5), nj.InstanceNorm(), draw(0, 2, 3, 4, 5))
        single = nj.GroupNorm(num_groups=None, group_size=1)
        self.same(single, nj.InstanceNorm(), draw(0, 2, 3, 4, 5))

    def test_renorm_with_closed_clips_is_batch_norm(self):
        self.same(nj.BatchRenorm(r_max=1.0, d_max=0.0), nj.BatchNorm(), draw(0, 6, 3, 4))

    def test_renorm_with_open_clips_is_evaluation(self):
        x, params, state = draw(0, 6, 3, 4), params_for(4), running_for(4)
        method = nj.BatchRenorm(r_max=1e9, d_max=1e9)
        y, new = oracles.apply(method, params, state, x, train=True)
        close(y, oracles.apply(method, params, state, x, train=False)[0])
        self.assertFalse(np.allclose(new.mean, state.mean))

    def test_rms_norm_is_layer_norm_of_centred_input(self):
        x = draw(0, 5, 8)
        x -= x.mean(-1, keepdims=True)
        self.same(nj.RMSNorm(), nj.LayerNorm(use_bias=False), x, params=Params(draw(1, 8)))

    def test_one_ghost_is_the_method(self):
        ghost = nj.Ghost(method=nj.BatchNorm(), groups=1)
        self.same(ghost, nj.BatchNorm(), draw(0, 6, 4))

    def test_a_ghost_per_sample_is_instance_norm(self):
        ghost = nj.Ghost(method=nj.BatchNorm(epsilon=1e-6), groups=3)
        x, params, state = draw(0, 3, 4, 5), params_for(5), running_for(5)
        y, _ = oracles.apply(ghost, params, state, x, train=True)
        close(y, oracles.apply(nj.InstanceNorm(), params, (), x, train=True)[0])

    def test_chain_applies_in_order(self):
        batch, affine = nj.BatchNorm(), nj.Affine()
        x, state = draw(0, 6, 4), running_for(4)
        first, second = params_for(4), params_for(4, seed=20)
        y, new = oracles.apply(
            nj.chain(batch, affine),
            {"BatchNorm_0": first, "Affine_1": second},
            {"BatchNorm_0": state, "Affine_1": ()},
            x,
            train=True,
        )
        z, expected = oracles.apply(batch, first, state, x, train=True)
        close(y, z * second.scale + second.bias)
        close(new["BatchNorm_0"].var, expected.var)

    def test_dynamic_tanh_is_linear_near_zero(self):
        x, params = 1e-4 * draw(0, 6, 4), params_for(4)._replace(alpha=0.25)
        y, _ = oracles.apply(nj.DynamicTanh(), params, (), x, train=True)
        close(y, params.scale * 0.25 * x + params.bias, atol=1e-12)

    def test_activation_comes_last(self):
        x, params, state = draw(0, 6, 4), params_for(4), running_for(4)
        y, _ = oracles.apply(nj.BatchNorm(activation=np.tanh), params, state, x, train=True)
        z, _ = oracles.apply(nj.BatchNorm(), params, state, x, train=True)
        close(y, np.tanh(z))


class MasksTest(parameterized.TestCase):
    @parameterized.parameters(
        nj.BatchNorm(unbiased_running_var=True),
        nj.BatchRenorm(r_max=1.2, d_max=0.3),
        nj.LayerNorm(reduction_axes=(0, 2), feature_axes=2),
        nj.RMSNorm(reduction_axes=(0, 2), feature_axes=2),
    )
    def test_masked_rows_are_as_if_dropped(self, method):
        x, keep = draw(0, 6, 3, 4), np.array([1, 0, 1, 1, 0, 1], bool)
        params, state = params_for(4), running_for(4)
        x[~keep] = np.nan
        y, new = oracles.apply(method, params, state, x, train=True, mask=keep[:, None, None])
        z, expected = oracles.apply(method, params, state, x[keep], train=True)
        close(y[keep], z)
        close(new.mean, expected.mean)
        close(new.var, expected.var)
        self.assertTrue(np.isfinite(y).all())

    @parameterized.parameters(
        nj.LayerNorm(reduction_axes=(1, 2)),
        nj.GroupNorm(num_groups=2),
        nj.InstanceNorm(),
    )
    def test_masked_positions_are_as_if_dropped(self, method):
        x, keep = draw(0, 2, 6, 4), np.array([1, 0, 1, 1, 0, 1], bool)
        y, _ = oracles.apply(method, Params(), (), x, train=True, mask=keep[:, None])
        z, _ = oracles.apply(method, Params(), (), x[:, keep], train=True)
        close(y[:, keep], z)

    def test_channel_without_valid_positions_keeps_its_statistics(self):
        x, mask, state = draw(0, 6, 4), np.array([True, False, True, True]), running_for(4)
        y, new = oracles.apply(nj.BatchNorm(), Params(), state, x, train=True, mask=mask)
        self.assertEqual((new.mean[1], new.var[1]), (state.mean[1], state.var[1]))
        self.assertFalse(np.equal(new.mean, state.mean)[[0, 2, 3]].any())
        close(y[:, 1], 0)

    @parameterized.parameters("exponential", "debiased", "cumulative")
    def test_empty_batch_changes_nothing(self, average):
        count = None if average == "exponential" else 3.0
        x, state = draw(0, 6, 4), running_for(4, count)
        method = nj.BatchNorm(running_average=average)
        y, new = oracles.apply(method, params_for(4), state, x, train=True, mask=False)
        for before, after in zip(state, new, strict=True):
            np.testing.assert_array_equal(before, after)
        close(y, np.broadcast_to(params_for(4).bias, y.shape))

    def test_skip_nonfinite(self):
        x, state = draw(0, 6, 4), running_for(4)
        x[2, 1] = np.inf
        method = nj.BatchNorm(skip_nonfinite=True)
        with np.errstate(invalid="ignore"):
            _, kept = oracles.apply(method, Params(), state, x, train=True)
            method = dataclasses.replace(method, skip_nonfinite=False)
            _, spoilt = oracles.apply(method, Params(), state, x, train=True)
        self.assertIs(kept, state)
        self.assertFalse(np.isfinite(spoilt.var).all())


class AveragesTest(parameterized.TestCase):
    def run_steps(self, **fields):
        method, state = nj.BatchNorm(**fields), Running(np.full(4, 9.0), np.full(4, 9.0), 0.0)
        xs = draw(0, 5, 8, 4)
        for x in xs:
            _, state = oracles.apply(method, Params(), state, x, train=True)
        return xs, state

    def test_debiased_is_the_weighted_mean_of_the_batches(self):
        xs, state = self.run_steps(running_average="debiased", momentum=0.8)
        weights = 0.8 ** np.arange(4, -1, -1)
        close(state.mean, np.average(xs.mean(1), axis=0, weights=weights))
        close(state.var, np.average(xs.var(1), axis=0, weights=weights))
        self.assertEqual(state.count, 5)

    def test_cumulative_is_the_mean_of_the_batches(self):
        xs, state = self.run_steps(running_average="cumulative", unbiased_running_var=True)
        close(state.mean, xs.mean((0, 1)))
        close(state.var, xs.var(1, ddof=1).mean(0))

    def test_renorm_clips_follow_the_count(self):
        x, params, state = draw(0, 6, 4), Params(), running_for(4, 2.0)
        scheduled = nj.BatchRenorm(r_max=lambda t: 1 + 0.1 * t, d_max=lambda t: 0.05 * t)
        y, new = oracles.apply(scheduled, params, state, x, train=True)
        fixed = nj.BatchRenorm(r_max=float(np.float32(1.2)), d_max=float(np.float32(0.1)))
        close(y, oracles.apply(fixed, params, state, x, train=True)[0], atol=1e-6)
        self.assertEqual(new.count, 3)
