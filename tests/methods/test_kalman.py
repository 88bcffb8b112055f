"""Kalman normalization."""

import dataclasses
import functools

import agreement
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import vector_files
from absl.testing import parameterized
from agreement import TOLERANCE, close, draw, ragged
from flax import nnx as fnnx
from jax.sharding import Mesh, PartitionSpec

import normjax as nj
from normjax import linen, nnx

KEY = jax.random.key(0)
METHODS = (
    nj.KalmanNorm(gain=0.3),
    nj.KalmanNorm(gain=0.0, running_average="debiased"),
    nj.KalmanNorm(gain=0.3, groups=3, unbiased_running_var=True, posterior="fused"),
    nj.KalmanNorm(gain=0.9, groups=2, running_group="first", guard=1.2),
    nj.KalmanNorm(gain=0.9, guard=1e6, use_scale=False),
    nj.KalmanNorm(gain="learned", axis=1),
    nj.KalmanNorm(gain="learned", gain_per="channel", use_bias=False, groups=2),
    nj.KalmanNorm(gain="computed", momentum=0.6),
    nj.KalmanNorm(gain="computed", effective_size=2.5, groups=3, skip_nonfinite=True),
    nj.KalmanNorm(gain="computed", gain_per="channel", effective_size=1),
    nj.KalmanNorm(gain=0.4, transition="learned", prior_features=7),
    nj.KalmanNorm(gain=0.4, transition="learned", prior_features=7, groups=2),
)


PRIORS = tuple((m, grouped) for m in METHODS for grouped in (False, True)[: m.groups])


def variables(method, features, dtype="float32", seed=100):
    """Parameters and state unlike those of `init`."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name, value = path[-1].name, rng.normal(size=leaf.shape)
        if name == "count":
            value = 3.0
        elif name in ("var", "mean_error", "var_error"):
            value = 0.5 + value**2
        elif name == "scale":
            value = 1 + 0.3 * value
        return jnp.asarray(value, dtype)

    return jax.tree.map_with_path(fill, agreement.shapes(method, features))


def predicted(*shape, seed=50, dtype="float32"):
    mean, var = draw(seed, *shape, dtype=dtype), 0.5 + draw(seed + 1, *shape, dtype=dtype) ** 2
    return nj.Moments(np.zeros_like(var), mean, var)


@functools.partial(jax.jit, static_argnames=("method", "train"))
def run(method, params, state, x, prior=None, *, train=True, mask=None):
    return method.apply(params, state, x, train=train, mask=mask, prior=prior)


@functools.partial(jax.jit, static_argnames="method")
def run_back(method, params, state, x, prior, cotangent):
    """What `run` gives, and the gradients of params, prior and x."""

    def forward(params, prior, x):
        (y, posterior), new = method.apply(params, state, x, train=True, prior=prior)
        return y, (posterior, new)

    y, pull, rest = jax.vjp(forward, params, prior, x, has_aux=True)
    return y, *rest, pull(cotangent)


def pair(moments):
    return (moments.mean, moments.var)


@functools.partial(jax.jit, static_argnames="method")
def computed_gains(method, params, state, size):
    """Those for a batch of `size` samples."""
    shape = (1, *state.mean.shape)
    now = nj.Moments(*(jnp.full(shape, a, state.mean.dtype) for a in (size, 0, 1)))
    return method._gains(now, params, state, lambda a: a[None])


def prior_for(method, grouped, dtype):
    features = method.prior_features or 4
    return predicted(*((method.groups,) if grouped else ()), features, dtype=dtype)


class KalmanTest(parameterized.TestCase):
    @parameterized.parameters(*vector_files.names("kalman_norm"))
    def test_vectors(self, name):
        config, arrays = vector_files.load(name)
        method = vector_files.method(name)
        with jax.enable_x64(True):
            features, groups = arrays["x_1"].shape[-1], config["split"]
            lead = (groups, features) if groups > 1 else (features,)
            params, state = agreement.shapes(method, features)
            params = params._replace(scale=arrays["param_scale"], bias=arrays["param_bias"])
            state = state._replace(mean=arrays["state_0_mean"], var=arrays["state_0_var"])
            for k in (1, 2, 3):
                prior = None
                if config["has_prior"]:
                    parts = [arrays[f"aux_{k}_prior_{p}"].reshape(lead) for p in ("mean", "var")]
                    prior = nj.Moments(np.zeros(lead), *parts)
                x, cotangent = arrays[f"x_{k}"], arrays["cotangent"]
                y, posterior, state, grads = run_back(method, params, state, x, prior, cotangent)
                close(y, arrays[f"y_{k}"], 1e-10)
                close(pair(state), (arrays[f"state_{k}_mean"], arrays[f"state_{k}_var"]), 1e-10)
                mean, var = (arrays[f"out_{k}_{part}"].reshape(lead) for part in ("mean", "var"))
                if not config["has_prior"]:  # what is handed on there is the unbiased variance
                    size = arrays["x_1"][..., 0].size / groups
                    var = var * (size - 1) / size
                close(pair(posterior), (mean, var), 1e-10)
                if k == 1:
                    dparams, dprior, dx = grads
                    close(dx, arrays["grad_x"], 1e-10)
                    close(dparams[:2], (arrays["grad_scale"], arrays["grad_bias"]), 1e-10)
                    if prior is not None:
                        wanted = (arrays[f"grad_aux_prior_{part}"] for part in ("mean", "var"))
                        close(pair(dprior), tuple(a.reshape(lead) for a in wanted), 1e-10)
            method = dataclasses.replace(method, epsilon=config["eps"])
            (y, _), after = run(method, params, state, arrays["x_eval"], train=False)
            close(y, arrays["y_eval"], 1e-10)
            chex.assert_trees_all_equal(after, state)

    @parameterized.product(case=PRIORS, how=((True, "float32", False), (True, "float64", True)))
    def test_oracle(self, case, how):
        self.check_oracle(*case, *how)

    @parameterized.parameters(*METHODS)
    def test_oracle_of_evaluation(self, method):
        self.check_oracle(method, False, False, "float64", True)

    @parameterized.product(
        case=PRIORS,
        train=(True, False),
        dtype=("float32", "float64"),
        masked=(False, True),
    )
    @pytest.mark.slow
    def test_oracle_of_all(self, case, train, dtype, masked):
        self.check_oracle(*case, train, dtype, masked)

    def check_oracle(self, method, grouped, train, dtype, masked):
        shape = (6, 4, 3, 4)
        mask = ragged(1, *shape) if masked else None
        x = draw(0, *shape, dtype=dtype)
        with jax.enable_x64(dtype == "float64"):
            given = x if mask is None else np.where(mask, x, np.asarray(np.nan, dtype))
            params, state = variables(method, 4, dtype)
            prior = prior_for(method, grouped, dtype)
            (y, posterior), new = run(method, params, state, given, prior, train=train, mask=mask)
            (wanted, moments), expected = reference.apply(
                method, params, state, x, train=train, mask=mask, prior=pair(prior)
            )
            cast = lambda tree: jax.tree.map(lambda a: np.asarray(a, dtype), tree)
            close(y, cast(wanted), TOLERANCE[dtype])
            close(pair(posterior), cast(moments), TOLERANCE[dtype])
            close(new, cast(expected), TOLERANCE[dtype])
            chex.assert_trees_all_equal_shapes_and_dtypes(new, state)

    @parameterized.parameters(*METHODS)
    def test_central_differences(self, method):
        """Of everything that gets a gradient; computed gains are constants."""
        with jax.enable_x64(True):
            x, weight = draw(0, 6, 4, 3, 4, dtype="float64"), draw(1, 6, 4, 3, 4, dtype="float64")
            params, state = variables(method, 4, "float64")
            prior = prior_for(method, False, "float64")
            mask = ragged(1, 6, 4, 3, 4)

            def loss(params, moments, x):
                given = nj.propagate.prediction(*moments)
                (y, _), _ = run(method, params, state, x, given, mask=mask)
                return jnp.sum(jnp.where(mask, y, 0) * weight)

            agreement.check_slopes(loss, (params, pair(prior), x))

    @parameterized.parameters(("float32", 1e-6), ("float64", 1e-12))
    def test_gain_one_is_batch_norm(self, dtype, tolerance):
        with jax.enable_x64(dtype == "float64"):
            x = draw(0, 6, 3, 4, dtype=dtype)
            norm, kalman = nj.BatchNorm(), nj.KalmanNorm(gain=1.0)
            params, state = variables(kalman, 4, dtype)
            given = nj.AffineParams(*params[:2]), nj.Running(*state[:3]), x
            wanted, new, _ = agreement.run(norm, *given)
            for prior in (None, predicted(4, dtype=dtype)):
                (y, _), mine = run(kalman, params, state, x, prior)
                close((y, nj.Running(*mine[:3])), (wanted, new), tolerance)
            (y, _), _ = run(kalman, params, state, x, prior, train=False)
            close(y, agreement.run(norm, *given, train=False)[0], tolerance)

    def test_gain_zero_is_the_prediction_alone(self):
        method, x, prior = nj.KalmanNorm(gain=0.0), draw(0, 6, 3, 4), predicted(4)
        params, state = variables(method, 4)
        (y, _), new = run(method, params, state, x, prior)
        slope = np.asarray(params.scale) / np.sqrt(prior.var + method.epsilon)
        close(y, (x - np.asarray(prior.mean)) * slope + np.asarray(params.bias), 2e-6)
        close(new.mean, 0.99 * state.mean + 0.01 * prior.mean, 1e-6)
        close(new.var, 0.99 * state.var + 0.01 * prior.var, 1e-6)

    def test_the_fused_variance_is_that_of_a_mixture(self):
        """Claim of the paper, by drawing from the batch or from the prediction."""
        with jax.enable_x64(True):
            rng, q, draws = np.random.default_rng(0), 0.3, 1_000_000
            x, prior = draw(0, 50, 2, dtype="float64"), predicted(2, dtype="float64")
            method = nj.KalmanNorm(gain=q, posterior="fused")
            (_, fused), _ = run(method, *method.init(KEY, 2), x, prior)
            normal = rng.normal(size=(draws, 2)) * np.sqrt(prior.var) + np.asarray(prior.mean)
            sample = np.where(rng.random((draws, 1)) < q, x[rng.integers(50, size=draws)], normal)
            gaps = sample - np.asarray(fused.mean)
            for values, wanted in ((sample, fused.mean), (gaps**2, fused.var)):
                error = values.std(0) / np.sqrt(draws)
                np.testing.assert_array_less(np.abs(values.mean(0) - wanted), 4 * error)

    def test_guard_falls_back_exactly(self):
        x, plain = draw(0, 6, 3, 4), nj.KalmanNorm(guard=100)
        params, state = variables(plain, 4)
        alone = run(plain, params, state, x)
        prior = predicted(4)
        self.assertFalse(np.array_equal(run(plain, params, state, x, prior)[0][0], alone[0][0]))

        @jax.jit
        @jax.grad
        def slope(moments):
            given = nj.propagate.prediction(*moments)
            return jnp.sum(run(plain, params, state, x, given)[0][0] ** 3)

        for factor in (1e4, np.nan):
            broken = prior._replace(var=prior.var * np.float32(factor))
            chex.assert_trees_all_equal(run(plain, params, state, x, broken), alone)
            chex.assert_trees_all_equal(slope(pair(broken)), (np.zeros(4), np.zeros(4)))
        computed = nj.KalmanNorm(gain="computed", guard=100)
        params, state = variables(computed, 4)
        _, new = run(computed, params, state, x, broken)
        chex.assert_trees_all_equal(new[3:], state[3:])

    def test_guard_is_for_all_groups_together(self):
        x, method = draw(0, 6, 3, 4), nj.KalmanNorm(guard=100, groups=2)
        params, state = variables(method, 4)
        prior = predicted(2, 4)
        prior.var[1] *= 1e4
        ignored = run(method, params, state, x, prior)
        other = prior._replace(mean=prior.mean + 1, var=3 * prior.var)
        chex.assert_trees_all_equal(run(method, params, state, x, other), ignored)
        close(ignored, run(method, params, state, x), TOLERANCE["float32"])  # another program

    def test_computed_gain_follows_the_error_of_the_prediction(self):
        """A right prediction gets nearly all weight, a wrong one hardly any."""
        with jax.enable_x64(True):
            rng = np.random.default_rng(0)
            method = nj.KalmanNorm(gain="computed", momentum=0.9)
            right = nj.Moments(np.zeros(64), np.zeros(64), np.ones(64))
            wrong = nj.Moments(np.zeros(64), np.full(64, 2.0), np.full(64, 10.0))
            params, _ = method.init(KEY, 64)
            found = []
            for prior in (right, wrong):
                _, state = method.init(KEY, 64)
                for _ in range(100):
                    x = rng.normal(size=(8, 64))
                    _, state = run(method, params, state, x, prior)
                gains = computed_gains(method, params, state, 8)
                found.append([float(g.mean()) for g in gains])
            self.assertLess(max(found[0]), 0.15)
            # The error of the mean is (4 + 1/8) / 10, of which 1/8 counts as noise.
            self.assertAlmostEqual(found[1][0], 1 - 1 / 8 / 0.4125, delta=0.02)
            self.assertGreater(found[1][1], 0.9)

    def test_computed_gain_is_that_of_the_error_over_noise(self):
        """Predictions off by normal errors of known variance: the gain is tau^2 / (tau^2 + 1/n)."""
        with jax.enable_x64(True):
            rng, features, size, tau = np.random.default_rng(0), 4096, 4, 0.5
            method = nj.KalmanNorm(gain="computed", momentum=0.95)
            params, state = method.init(KEY, features)
            for _ in range(100):
                x = rng.normal(size=(size, features))
                mean, log_var = tau * rng.normal(size=(2, features))
                prior = nj.Moments(np.zeros(features), mean, np.exp(log_var))
                _, state = run(method, params, state, x, prior)
            q, p = computed_gains(method, params, state, size)
            # The unit of the mean's error, the predicted variance, makes it exp(tau^2 / 2) larger.
            error = (tau**2 + 1 / size) * np.exp(tau**2 / 2)
            np.testing.assert_allclose(q, 1 - 1 / size / error, atol=0.02)
            noise = np.pi**2 / 2 - 4 + (0.03648997397857652 - np.log(2)) ** 2
            np.testing.assert_allclose(p, tau**2 / (tau**2 + noise), atol=0.02)

    def test_posterior_is_what_the_output_has(self):
        x = draw(0, 4096, 4)
        method = nj.KalmanNorm(gain=1.0, activation=jax.nn.relu)
        params, state = variables(method, 4)
        (y, posterior), _ = run(method, params, state, x)
        np.testing.assert_allclose(y.mean(0), posterior.mean, atol=0.05)
        np.testing.assert_allclose(y.var(0), posterior.var, atol=0.1)
        (_, evaluated), _ = run(method, params, state, x, train=False)
        chex.assert_trees_all_equal(evaluated, posterior)

    def test_no_state_leaks(self):
        """Evaluation changes nothing, training not the state that it was given."""
        for method in METHODS[::3]:
            params, state = variables(method, 4)
            before = jax.tree.map(np.array, state)
            x, prior = draw(0, 6, 4, 3, 4), prior_for(method, False, "float32")
            first = run(method, params, state, x, prior)
            chex.assert_trees_all_equal(run(method, params, state, x, train=False)[1], state)
            chex.assert_trees_all_equal(state, before)
            chex.assert_trees_all_equal(run(method, params, state, x, prior), first)

    def test_an_empty_group_has_the_prediction(self):
        method = nj.KalmanNorm(groups=2, posterior="fused")
        params, state = variables(method, 4)
        x, prior = draw(0, 4, 4), predicted(4)
        mask = np.arange(4)[:, None] < 2
        (_, posterior), new = run(method, params, state, x, prior, mask=mask)
        close(posterior.mean[1], prior.mean, 1e-6)
        close(posterior.var[1], prior.var, 1e-6)
        one = nj.KalmanNorm()
        _, wanted = run(one, params, state, x[:2], prior)
        close(new, wanted, 1e-6)

    @parameterized.parameters(8, 4, 16)
    def test_groups_over_devices(self, groups):
        """Outputs, posteriors and state do not depend on the number of devices."""
        with jax.enable_x64(True):
            how = dict(gain="computed", groups=groups, posterior="fused", guard=100)
            x = draw(0, 16, 3, 4, dtype="float64")
            prior = predicted(4, dtype="float64")
            one = nj.KalmanNorm(**how)
            params, state = variables(one, 4, "float64")
            (y, posterior), new = run(one, params, state, x, prior)
            many = nj.KalmanNorm(**how, axis_name="batch")

            def step(x):
                (y, own), new = many.apply(params, state, x, train=True, prior=prior)
                own = jnp.stack(pair(own))
                return y, own.reshape(2, -1, 4), new

            mesh = Mesh(np.array(jax.devices()), ("batch",))
            rows, whole = PartitionSpec("batch"), PartitionSpec()
            mapped = jax.shard_map(
                step,
                mesh=mesh,
                in_specs=rows,
                out_specs=(rows, PartitionSpec(None, "batch"), whole),
            )
            z, own, moved = jax.jit(mapped)(x)
            close(z, y, 1e-10)
            close(moved, new, 1e-10)
            own = np.asarray(own)[:, :: max(8 // groups, 1)]
            close(own, np.stack(pair(posterior)), 1e-10)

    def test_front_ends(self):
        x, kernel = draw(0, 8, 4), draw(1, 4, 4)
        wanted = nj.KalmanNorm(momentum=0.9)
        params, state = wanted.init(KEY, 4)
        prior = predicted(4)
        (y, posterior), new = run(wanted, params, state, x, prior)
        module = linen.KalmanNorm(momentum=0.9)
        variables = module.init(KEY, x, True)
        found, stats = module.apply(variables, x, False, prior=prior, mutable=["batch_stats"])
        chex.assert_trees_all_equal(found, (y, posterior))
        chex.assert_trees_all_equal(stats["batch_stats"]["var"], new.var)
        norm = nnx.KalmanNorm(4, momentum=0.9, rngs=fnnx.Rngs(0))
        chex.assert_trees_all_equal(norm(x, prior=prior), (y, posterior))
        chex.assert_trees_all_equal(norm.var[...], new.var)
        norm.eval()
        z, moments = norm(x)
        second = nnx.KalmanNorm(4, gain="learned", rngs=fnnx.Rngs(0))
        second(z @ kernel, prior=nj.propagate.dense(moments, kernel))
        self.assertEqual(second.gain_logit[...].shape, ())

    @parameterized.parameters(
        dict(gain=1.5),
        dict(gain=-0.1),
        dict(gain="optimal"),
        dict(gain=True),
        dict(gain_per="group"),
        dict(initial_gain=1.0),
        dict(groups=0),
        dict(guard=0),
        dict(posterior="both"),
        dict(running_group="last"),
        dict(require_prior=1),
        dict(transition="fixed"),
        dict(transition="learned"),
        dict(prior_features=3),
        dict(effective_size=4),
        dict(effective_size=0.5, gain="computed"),
        dict(transition_init=None),
    )
    def test_rejects_field(self, **fields):
        name, value = next(iter(fields.items()))
        agreement.check_rejects(self, ("KalmanNorm", name, value), nj.KalmanNorm, **fields)

    @parameterized.parameters(
        (dict(), predicted(3), "(3,)"),
        (dict(), predicted(2, 4), "(2, 4)"),
        (dict(groups=2), predicted(3, 4), "(2, 4)"),
        (dict(), np.ones(4), "not Moments"),
        (dict(require_prior=True), None, "require_prior"),
        (dict(groups=4), predicted(4), "4 groups"),
        (dict(groups=2, axis=0), predicted(6), "samples"),
        (dict(transition="learned", prior_features=3), predicted(4), "(3, 4)"),
    )
    def test_rejects_prior(self, fields, prior, piece):
        method, x = nj.KalmanNorm(**fields), draw(0, 6, 4)
        params, state = method.init(KEY, x.shape[method.axis])
        how = dict(train=True, prior=prior)
        agreement.check_rejects(self, (piece,), method.apply, params, state, x, **how)

    def test_wrappers_say_what_to_do(self):
        for wrap, piece in ((lambda m: nj.Ghost(m, 2), "groups"), (nj.chain, "itself")):
            agreement.check_rejects(self, ("KalmanNorm", piece), wrap, nj.KalmanNorm())

    def test_a_learned_transition_has_one_feature_axis(self):
        method = nj.KalmanNorm(transition="learned", prior_features=3, axis=(1, 2))
        with pytest.raises(ValueError, match=r"\(2, 4\)"):
            method.init(KEY, (2, 4))
