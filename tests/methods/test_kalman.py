"""Kalman normalization."""

import functools

import agreement
import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import vector_files
from absl.testing import parameterized
from agreement import TOLERANCE, close, draw, ragged
from flax import nnx as fnnx
from jax.sharding import Mesh, PartitionSpec
from methods import kalman_oracle

import normjax as nj
from normjax import linen, nnx
from normjax.core.method import replace

KEY = jax.random.key(0)
METHODS = (
    nj.KalmanNorm(gain=0.3),
    nj.KalmanNorm(gain=0.0, running_average="debiased"),
    nj.Ghost(nj.KalmanNorm(gain=0.3, unbiased_running_var=True), groups=3),
    nj.Ghost(nj.KalmanNorm(gain=0.9, guard=1.2), groups=2, running="first"),
    nj.KalmanNorm(gain=0.9, guard=1e6, use_scale=False),
    nj.KalmanNorm(gain="learned", axis=1),
    nj.Ghost(nj.KalmanNorm(gain="learned", gain_per="channel", use_bias=False), groups=2),
    nj.KalmanNorm(gain="computed", momentum=0.6),
    nj.Ghost(nj.KalmanNorm(gain="computed", effective_size=2.5, skip_nonfinite=True), groups=3),
    nj.KalmanNorm(gain="computed", gain_per="channel", effective_size=1),
    nj.KalmanNorm(gain=0.4, transition="learned", prior_features=7),
    nj.Ghost(nj.KalmanNorm(gain=0.4, transition="learned", prior_features=7), groups=2),
)
# With one prior, and for parts of the batch also with one for each.
PRIORS = tuple((m, each) for m in METHODS for each in (False, True)[: getattr(m, "groups", 1)])


def variables(method, features, dtype="float32"):
    """Parameters and state unlike those of `init`; errors are positive."""
    params, state = agreement.variables(method, features, dtype=dtype)
    if state.mean_error is None:
        return params, state
    errors = {name: 0.5 + getattr(state, name) ** 2 for name in ("mean_error", "var_error")}
    return params, state._replace(**errors)


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
        return method.apply(params, state, x, train=True, prior=prior)

    y, pull, new = jax.vjp(forward, params, prior, x, has_aux=True)
    return y, new, pull(cotangent)


@functools.partial(jax.jit, static_argnames="method")
def run_fused(method, params, state, x, prior=None, mask=None):
    """Mean and variance, [parts, features], that training normalizes each part of the batch by."""
    inner, parts = (method.method, method.groups) if hasattr(method, "groups") else (method, 1)
    masks = [None] * parts if mask is None else jnp.split(jnp.broadcast_to(mask, x.shape), parts)
    each = isinstance(prior, nj.EachPart)
    found = []
    for i, (part, valid) in enumerate(zip(jnp.split(x, parts), masks, strict=True)):
        own = jax.tree.map(lambda a, i=i: a[i], prior.value) if each else prior
        found.append(pair(inner.fused(params, state, inner.observe(part, valid), prior=own)))
    return tuple(map(jnp.stack, zip(*found, strict=True)))


def pair(moments):
    return (moments.mean, moments.var)


@functools.partial(jax.jit, static_argnames="method")
def computed_gains(method, params, state, size):
    """Those for a batch of `size` samples, from what becomes of the prior mean 1 and variance 1."""
    zero = jnp.zeros_like(state.mean)
    seen, prior = nj.Moments(zero + size, zero, zero), nj.propagate.prediction(zero + 1, zero + 1)
    fused = method.fused(params, state, seen, prior=prior)
    q = 1 - fused.mean
    return q, 1 - (fused.var - q * (1 - q))


def prior_for(method, each, dtype):
    """A prediction for four features; one for each part if `each`."""
    features = getattr(method, "method", method).prior_features or 4
    if not each:
        return predicted(features, dtype=dtype)
    return nj.EachPart(predicted(method.groups, features, dtype=dtype))


class KalmanTest(parameterized.TestCase):
    @parameterized.parameters(*vector_files.names("kalman_norm"))
    def test_vectors(self, name):
        config, arrays = vector_files.load(name)
        dtype = vector_files.dtype(name)
        tolerance = TOLERANCE[dtype]
        with jax.enable_x64(dtype == "float64"):
            method, params, state = agreement.start(name)
            for k in (1, 2, 3):
                x, priors = arrays[f"x_{k}"], kalman_oracle.recorded_priors(config, arrays, k)
                prior = kalman_oracle.as_input(priors, method)
                handed = run_fused(method, params, state, x, prior)
                y, state, grads = run_back(method, params, state, x, prior, arrays["cotangent"])
                close(y, arrays[f"y_{k}"], tolerance)
                close(pair(state), (arrays[f"state_{k}_mean"], arrays[f"state_{k}_var"]), tolerance)
                close(handed, self.handed_on(config, arrays, k), tolerance)
                if k == 1:
                    dparams, dprior, dx = grads
                    close(dx, arrays["grad_x"], tolerance)
                    for part, given in zip(("scale", "bias"), dparams[:2], strict=True):
                        close(given, arrays.get(f"grad_{part}"), tolerance)
                    if prior is not None:
                        dprior = pair(getattr(dprior, "value", dprior))
                        wanted = (arrays[f"grad_aux_prior_{part}"] for part in ("mean", "var"))
                        wanted = (a.reshape(d.shape) for a, d in zip(wanted, dprior, strict=True))
                        close(dprior, tuple(wanted), tolerance)
            method = replace(method, epsilon=config["eps"])
            y, after = run(method, params, state, arrays["x_eval"], train=False)
            close(y, arrays["y_eval"], tolerance)
            chex.assert_trees_all_equal(after, state)

    def handed_on(self, config, arrays, k):
        """Recorded mean and variance of each part; without a prior that one is unbiased."""
        shape = config["split"], arrays["x_1"].shape[-1]
        mean, var = (arrays[f"out_{k}_{part}"].reshape(shape) for part in ("mean", "var"))
        size = arrays["x_1"][..., 0].size / config["split"]
        return mean, var if config["has_prior"] else var * (size - 1) / size

    @parameterized.parameters(*vector_files.names("kalman_norm"))
    @pytest.mark.slow
    def test_oracle_of_vectors(self, name):
        config, arrays = vector_files.load(name)
        method, params, state = agreement.start(name)
        close = functools.partial(oracles.close, atol=TOLERANCE[vector_files.dtype(name)])
        inner, parts = getattr(method, "method", method), config["split"]
        for k in (1, 2, 3):
            x, priors = arrays[f"x_{k}"], kalman_oracle.recorded_priors(config, arrays, k)
            each = [priors and nj.Moments(*(a[i] for a in priors)) for i in range(parts)]
            handed = [
                kalman_oracle.fused(inner, params, state, part, None, own)
                for part, own in zip(np.split(x, parts), each, strict=True)
            ]
            wanted = self.handed_on(config, arrays, k)
            close(tuple(zip(*handed, strict=True)), wanted)
            prior = kalman_oracle.as_input(priors, method)
            y, state = oracles.apply(method, params, state, x, train=True, prior=prior)
            close(y, arrays[f"y_{k}"])
            close(state[:2], (arrays[f"state_{k}_mean"], arrays[f"state_{k}_var"]))
        method = replace(method, epsilon=config["eps"])
        y, _ = oracles.apply(method, params, state, arrays["x_eval"], train=False)
        close(y, arrays["y_eval"])

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

    def check_oracle(self, method, each, train, dtype, masked):
        shape = (6, 4, 3, 4)
        mask = ragged(1, *shape) if masked else None
        x = draw(0, *shape, dtype=dtype)
        with jax.enable_x64(dtype == "float64"):
            given = x if mask is None else np.where(mask, x, np.asarray(np.nan, dtype))
            params, state = variables(method, 4, dtype)
            prior = prior_for(method, each, dtype)
            inputs = dict(prior=prior) if train else {}
            y, new = run(method, params, state, given, train=train, mask=mask, **inputs)
            wanted, expected = oracles.apply(
                method, params, state, x, train=train, mask=mask, **inputs
            )
            cast = lambda tree: jax.tree.map(lambda a: np.asarray(a, dtype), tree)
            close(y, cast(wanted), TOLERANCE[dtype])
            close(new, cast(expected), TOLERANCE[dtype])
            chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
            if not hasattr(method, "groups"):
                posterior = kalman_oracle.posterior(params, 4)
                close(pair(method.posterior(params, state)), cast(posterior), TOLERANCE[dtype])
                (mean,), (var,) = run_fused(method, params, state, given, prior, mask)
                wanted = kalman_oracle.fused(method, params, state, x, mask, prior)
                close((mean, var), cast(wanted), TOLERANCE[dtype])

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
                y, _ = run(method, params, state, x, given, mask=mask)
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
                y, mine = run(kalman, params, state, x, prior)
                close((y, nj.Running(*mine[:3])), (wanted, new), tolerance)
            y, _ = run(kalman, params, state, x, prior, train=False)
            close(y, agreement.run(norm, *given, train=False)[0], tolerance)

    def test_gain_zero_is_the_prediction_alone(self):
        method, x, prior = nj.KalmanNorm(gain=0.0), draw(0, 6, 3, 4), predicted(4)
        params, state = variables(method, 4)
        y, new = run(method, params, state, x, prior)
        slope = np.asarray(params.scale) / np.sqrt(prior.var + method.epsilon)
        close(y, (x - np.asarray(prior.mean)) * slope + np.asarray(params.bias), 2e-6)
        close(new.mean, 0.99 * state.mean + 0.01 * prior.mean, 1e-6)
        close(new.var, 0.99 * state.var + 0.01 * prior.var, 1e-6)

    def test_the_fused_variance_is_that_of_a_mixture(self):
        """Claim of the paper, by drawing from the batch or from the prediction."""
        with jax.enable_x64(True):
            rng, q, draws = np.random.default_rng(0), 0.3, 1_000_000
            x, prior = draw(0, 50, 2, dtype="float64"), predicted(2, dtype="float64")
            method = nj.KalmanNorm(gain=q)
            (mean,), (var,) = run_fused(method, *method.init(KEY, 2), x, prior)
            normal = rng.normal(size=(draws, 2)) * np.sqrt(prior.var) + np.asarray(prior.mean)
            sample = np.where(rng.random((draws, 1)) < q, x[rng.integers(50, size=draws)], normal)
            gaps = sample - np.asarray(mean)
            for values, wanted in ((sample, mean), (gaps**2, var)):
                error = values.std(0) / np.sqrt(draws)
                np.testing.assert_array_less(np.abs(values.mean(0) - wanted), 4 * error)

    def test_guard_falls_back_exactly(self):
        x, plain = draw(0, 6, 3, 4), nj.KalmanNorm(guard=100)
        params, state = variables(plain, 4)
        alone = run(plain, params, state, x)
        prior = predicted(4)
        self.assertFalse(np.array_equal(run(plain, params, state, x, prior)[0], alone[0]))

        @jax.jit
        @jax.grad
        def slope(moments):
            given = nj.propagate.prediction(*moments)
            return jnp.sum(run(plain, params, state, x, given)[0] ** 3)

        for factor in (1e4, np.nan):
            broken = prior._replace(var=prior.var * np.float32(factor))
            chex.assert_trees_all_equal(run(plain, params, state, x, broken), alone)
            chex.assert_trees_all_equal(slope(pair(broken)), (np.zeros(4), np.zeros(4)))
        computed = nj.KalmanNorm(gain="computed", guard=100)
        params, state = variables(computed, 4)
        _, new = run(computed, params, state, x, broken)
        chex.assert_trees_all_equal(new[3:], state[3:])

    def test_every_part_has_its_own_guard(self):
        x, plain = draw(0, 6, 3, 4), nj.KalmanNorm(guard=100)
        method = nj.Ghost(plain, groups=2)
        params, state = variables(method, 4)
        prior = predicted(2, 4)
        prior.var[1] *= 1e4
        y, _ = run(method, params, state, x, nj.EachPart(prior))
        first = run(plain, params, state, x[:3], nj.Moments(*(a[0] for a in prior)))[0]
        second = run(plain, params, state, x[3:])[0]
        close(y, np.concatenate([first, second]), TOLERANCE["float32"])
        self.assertGreater(np.abs(first - run(plain, params, state, x[:3])[0]).max(), 0.01)

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
        y, _ = run(method, params, state, x)
        posterior = method.posterior(params)
        np.testing.assert_allclose(y.mean(0), posterior.mean, atol=0.05)
        np.testing.assert_allclose(y.var(0), posterior.var, atol=0.1)

    def test_posterior_without_scale_and_bias_needs_the_state(self):
        method = nj.KalmanNorm(use_scale=False, use_bias=False)
        params, state = method.init(KEY, 3)
        chex.assert_trees_all_equal(
            pair(method.posterior(params, state)), (jnp.zeros(3), jnp.ones(3))
        )
        with pytest.raises(ValueError, match="give the state"):
            method.posterior(params)

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

    def test_an_empty_part_has_the_prediction(self):
        one = nj.KalmanNorm()
        method = nj.Ghost(one, groups=2)
        params, state = variables(method, 4)
        x, prior = draw(0, 4, 4), predicted(4)
        mask = np.arange(4)[:, None] < 2
        mean, var = run_fused(method, params, state, x, prior, mask)
        close((mean[1], var[1]), pair(prior), 1e-6)
        _, new = run(method, params, state, x, prior, mask=mask)
        _, wanted = run(one, params, state, x[:2], prior)
        close(new, wanted, 1e-6)

    @parameterized.parameters((8, "first"), (8, "all"), (4, "all"), (16, "first"))
    def test_groups_over_devices(self, groups, running):
        """Outputs and state do not depend on the number of devices."""
        with jax.enable_x64(True):
            x = draw(0, 16, 3, 4, dtype="float64")
            prior = predicted(4, dtype="float64")
            inner = nj.KalmanNorm(gain="computed", guard=100)
            one = nj.Ghost(inner, groups, running=running)
            params, state = variables(one, 4, "float64")
            wanted = run(one, params, state, x, prior)
            step = self.over_devices(replace(one, axis_name="batch"), params, state, prior)
            close(jax.jit(step)(x), wanted, 1e-10)

    def over_devices(self, method, params, state, prior):
        """A training step on eight devices."""
        mesh = Mesh(np.array(jax.devices()), ("batch",))
        rows, whole = PartitionSpec("batch"), PartitionSpec()
        step = lambda x: method.apply(params, state, x, train=True, prior=prior)
        return jax.shard_map(step, mesh=mesh, in_specs=rows, out_specs=(rows, whole))

    def test_the_first_part_is_on_one_device(self):
        method = nj.Ghost(nj.KalmanNorm(axis_name="batch"), 4, running="first")
        step = self.over_devices(method, *method.init(KEY, 4), predicted(4))
        agreement.check_rejects(
            self, ("groups=4", "8 devices", "running='all'"), step, draw(0, 16, 4)
        )

    def test_front_ends(self):
        x, kernel = draw(0, 8, 4), draw(1, 4, 4)
        wanted = nj.KalmanNorm(momentum=0.9)
        params, state = wanted.init(KEY, 4)
        prior = predicted(4)
        y, new = run(wanted, params, state, x, prior)
        module = linen.KalmanNorm(momentum=0.9)
        variables = module.init(KEY, x, True)
        found, stats = module.apply(variables, x, False, prior=prior, mutable=["batch_stats"])
        chex.assert_trees_all_equal(found, y)
        chex.assert_trees_all_equal(stats["batch_stats"]["var"], new.var)
        norm = nnx.KalmanNorm(4, momentum=0.9, rngs=fnnx.Rngs(0))
        chex.assert_trees_all_equal(norm(x, prior=prior), y)
        chex.assert_trees_all_equal(norm.var[...], new.var)
        moments = norm.method.posterior(nj.KalmanParams(norm.scale[...], norm.bias[...]))
        second = nnx.KalmanNorm(4, gain="learned", rngs=fnnx.Rngs(0))
        second(y @ kernel, prior=nj.propagate.dense(moments, kernel))
        self.assertEqual(second.gain_logit[...].shape, ())

    @parameterized.parameters(
        dict(gain=1.5),
        dict(gain=-0.1),
        dict(gain="optimal"),
        dict(gain=True),
        dict(gain_per="group"),
        dict(initial_gain=1.0),
        dict(guard=0),
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
        (nj.KalmanNorm(), predicted(3), "(3,)"),
        (nj.KalmanNorm(), predicted(2, 4), "(2, 4)"),
        (nj.Ghost(nj.KalmanNorm(), 2), nj.EachPart(predicted(2, 3)), "(3,)"),
        (nj.Ghost(nj.KalmanNorm(), 2), nj.EachPart(predicted(3, 4)), "3"),
        (nj.KalmanNorm(), np.ones(4), "not Moments"),
        (nj.KalmanNorm(), nj.EachPart(predicted(1, 4)), "not Moments"),
        (nj.KalmanNorm(require_prior=True), None, "require_prior"),
        (nj.KalmanNorm(transition="learned", prior_features=3), predicted(4), "(3, 4)"),
    )
    def test_rejects_prior(self, method, prior, piece):
        params, state = method.init(KEY, 4)
        how = dict(train=True, prior=prior)
        agreement.check_rejects(self, (piece,), method.apply, params, state, draw(0, 6, 4), **how)

    def test_a_learned_transition_has_one_feature_axis(self):
        method = nj.KalmanNorm(transition="learned", prior_features=3, axis=(1, 2))
        with pytest.raises(ValueError, match=r"\(2, 4\)"):
            method.init(KEY, (2, 4))
