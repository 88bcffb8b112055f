"""Ghost noise, ghost batch norm, exclusive batch norm and EvalNorm."""

import functools
from unittest import mock

import agreement
import chex
import jax
import jax.numpy as jnp
import numpy as np
import vector_files
from absl.testing import parameterized
from agreement import TOLERANCE, close, draw, ragged, run, variables
from methods import ghost_noise_oracle
from scipy import stats

import normjax as nj
from normjax.methods import ghost_noise as noise

KEY = jax.random.key(0)
NOISES = [
    *vector_files.names("ghost_noise_replacement"),
    *vector_files.names("ghost_noise_minimal"),
    *vector_files.names("ghost_noise_shuffle"),
]


@functools.partial(jax.jit, static_argnames="method")
def noisy(method, x, key=KEY, mask=None):
    return method.apply((), nj.NoiseState(None), x, train=True, key=key, mask=mask)[0]


@functools.partial(jax.jit, static_argnames="function")
def pulled(function, x, cotangent):
    """A value and the gradient of its product with a cotangent."""
    y, pull = jax.vjp(function, x)
    return y, pull(cotangent)[0]


def drawn(draw, samples):
    """What one of the functions that draw gives for `samples` samples."""
    return np.asarray(jax.jit(lambda: draw(KEY, noise._roster(None, samples)))())


class NormTest(parameterized.TestCase):
    @parameterized.parameters(
        *vector_files.names("exclusive_batch_norm"), *vector_files.names("eval_norm")
    )
    def test_vectors(self, name):
        agreement.check_vectors(name)

    @parameterized.product(
        method=(
            nj.GhostBatchNorm(2),
            nj.GhostBatchNorm(None, axis=1),
            nj.ExclusiveBatchNorm(3),
            nj.ExclusiveBatchNorm(unbiased_running_var=True),
            nj.EvalNorm(3),
        ),
        train=(True, False),
        kind=agreement.KINDS,
    )
    def test_oracle(self, method, train, kind):
        dtype, masked = kind
        mask = ragged(1, 6, 4, 4) if masked else None
        agreement.check_oracle(method, 4, draw(0, 6, 4, 4), mask=mask, train=train, dtype=dtype)

    def test_ghost_of_the_batch_is_batch_norm(self):
        x = draw(0, 6, 3, 4)
        params, state = variables(nj.BatchNorm(), 4)
        wanted = run(nj.BatchNorm(), params, state, x, cotangent=x)
        for size in (6, None):
            got = run(nj.GhostBatchNorm(size), params, state, x, cotangent=x)
            close(got, wanted, TOLERANCE["float32"])

    def test_leaving_one_out_of_many_hardly_matters(self):
        """The difference to batch norm falls as one over the batch."""
        gaps = []
        for samples in (16, 64, 256):
            x = draw(0, samples, 32, 3)
            params, state = nj.BatchNorm().init(KEY, 3)
            exclusive, _, _ = run(nj.ExclusiveBatchNorm(), params, state, x)
            gaps.append(np.abs(exclusive - run(nj.BatchNorm(), params, state, x)[0]).max())
        self.assertLess(gaps[1], gaps[0] / 2)
        self.assertLess(gaps[2], gaps[1] / 2)

    def test_own_weight_of_eval_norm_is_what_training_expects(self):
        """A sample of ones among N - 1 standard normal ones meets the mean 1/N on average."""
        method = nj.EvalNorm(8, use_scale=False, use_bias=False)
        state = nj.Running(np.zeros(1, "float32"), np.ones(1, "float32"))
        x = np.ones((1, 4, 1), "float32")
        y, _, _ = run(method, nj.AffineParams(), state, x, train=False)
        a, one = 1 / 8, np.float32(1)
        close(y, (x - a) / np.sqrt((one - a) + a * (1 - a) + 1e-5), TOLERANCE["float32"])

    @parameterized.parameters(("1/N", True), ("1/N^2", False))
    def test_own_weight_of_eval_norm_by_simulation(self, own_weight, agrees):
        """One sample among 7 drawn anew 20000 times: its statistics in training, on average.

        Mean and variance about it agree to 5 standard errors with 1 / N; with 1 / N^2 the mean is
        off by 0.3. The variance about the expected mean is that in the ghost batch and that of its
        mean together.
        """
        ghosts, size, mean, deviation = 20000, 8, 1.0, 2.0
        own = 4 + draw(0, 1, 3, 1)
        others = mean + deviation * draw(1, ghosts, size - 1, 3, 1)
        x = np.concatenate([np.broadcast_to(own, (ghosts, 1, 3, 1)), others], 1)
        plain = dict(use_scale=False, use_bias=False, epsilon=0.0)
        start = nj.Running(np.zeros(1, "float32"), np.ones(1, "float32"))
        rows = x.reshape(-1, 3, 1).astype("float32")
        y, _, _ = run(nj.GhostBatchNorm(size, **plain), nj.AffineParams(), start, rows)
        y = np.asarray(y, "float64").reshape(x.shape)[:, 0]  # of the sample itself
        spread = (own[:, 0] - own[:, 1]) / (y[:, 0] - y[:, 1])
        means = (own[:, 0] - y[:, 0] * spread)[:, 0]
        state = nj.Running(np.full(1, mean, "float32"), np.full(1, deviation**2, "float32"))
        method = nj.EvalNorm(size, own_weight=own_weight, **plain)
        at, _, _ = run(method, nj.AffineParams(), state, own.astype("float32"), train=False)
        at = np.asarray(at, "float64")
        root = (own[0, 0, 0] - own[0, 1, 0]) / (at[0, 0, 0] - at[0, 1, 0])
        center = own[0, 0, 0] - at[0, 0, 0] * root
        error = abs(center - means.mean()) / (means.std() / np.sqrt(ghosts))
        self.assertEqual(error < 5, agrees)
        variances = spread[:, 0] ** 2 + (means - means.mean()) ** 2
        error = abs(root**2 - variances.mean()) / (variances.std() / np.sqrt(ghosts))
        self.assertEqual(error < 5, agrees)

    @parameterized.parameters(
        (nj.GhostBatchNorm, (4,), (6, 3), "ghost_batch_size=4"),
        (nj.GhostBatchNorm, (1,), (6, 3), "single"),
        (nj.ExclusiveBatchNorm, (4,), (6, 3), "ghost_batch_size=4"),
        (nj.ExclusiveBatchNorm, (2,), (6, 3), "ghost_batch_size=2"),
        (nj.ExclusiveBatchNorm, (), (1, 5, 3), "one more sample"),
    )
    def test_rejects_input(self, make, size, shape, piece):
        agreement.check_rejects_input(self, make(*size), 3, draw(0, *shape), None, piece)

    @parameterized.parameters(
        (nj.GhostBatchNorm, dict(ghost_batch_size=0)),
        (nj.ExclusiveBatchNorm, dict(ghost_batch_size=1)),
        (nj.EvalNorm, dict(ghost_batch_size=None)),
        (nj.EvalNorm, dict(ghost_batch_size=2, own_weight=0.5)),
        (nj.GhostNoise, dict()),
        (nj.GhostNoise, dict(ghost_batch_size=4, effective_size=4.0)),
        (nj.GhostNoise, dict(ghost_batch_size=4, strength=-0.5)),
        (nj.GhostNoise, dict(ghost_batch_size=4, drawing="partition", independent_channels=True)),
        (nj.GhostNoise, dict(ghost_batch_size=2, unbiased_scale=True)),
        (nj.GhostNoise, dict(ghost_batch_size=4, unbiased_scale=True, noise="shift")),
        (nj.GhostNoise, dict(ghost_batch_size=4, noise="none")),
        (nj.AnalyticGhostNoise, dict(ghost_batch_size=1)),
        (nj.AnalyticGhostNoise, dict(ghost_batch_size=4, strength=-1.0)),
        (
            nj.GhostNoiseBatchNorm,
            dict(ghost_batch_size=4, axis_name="b", axis_index_groups=((0,),)),
        ),
    )
    def test_rejects_field(self, make, fields):
        agreement.check_rejects(self, (make.__name__,), make, **fields)


class NoiseTest(parameterized.TestCase):
    @parameterized.parameters(*NOISES)
    def test_vectors(self, name):
        """Outputs and the gradient with the recorded draws in place of those of the key."""
        _, arrays = vector_files.load(name)
        method, dtype = vector_files.method(name), vector_files.dtype(name)
        apply = nj.GhostNoise.apply.__wrapped__
        forward = lambda x: apply(method, (), nj.NoiseState(None), x, train=True, key=KEY)[0]

        @jax.jit
        def step(x, indices, order):
            recorded = dict(draw_indices=lambda *_: indices, draw_order=lambda *_: order)
            with mock.patch.multiple(noise, **recorded):
                return pulled(forward, x, arrays["cotangent"])

        with jax.enable_x64(dtype == "float64"):
            for k in (1, 2, 3):
                ghosts = (arrays.get(f"draw_{k}_{a}", 0) for a in ("randint", "randperm"))
                y, dx = step(arrays[f"x_{k}"], *(np.asarray(a, "int32") for a in ghosts))
                close(y, arrays[f"y_{k}"], TOLERANCE[dtype])
                if k == 1:
                    close(dx, arrays["grad_x"], TOLERANCE[dtype])
            if "x_eval" in arrays:
                x = arrays["x_eval"]
                y, _ = method.apply((), nj.NoiseState(None), x, train=False)
                chex.assert_trees_all_equal(y, x)

    @parameterized.parameters(*vector_files.names("noisy_affine"))
    def test_analytic_vectors(self, name):
        _, arrays = vector_files.load(name)
        method, apply = vector_files.method(name), nj.AnalyticGhostNoise.apply.__wrapped__
        forward = lambda x: apply(method, (), nj.NoiseState(None), x, train=True, key=KEY)[0]

        @jax.jit
        def step(x, recorded):
            with mock.patch.object(noise, "draw_analytic", lambda *_: recorded):
                return pulled(forward, x, arrays["cotangent"])

        with jax.enable_x64(True):
            for k in (1, 2, 3):
                x = arrays[f"x_{k}"]
                none = np.ones((len(x), *(1,) * (x.ndim - 2), x.shape[-1]))
                y, dx = step(x, [arrays.get(f"draw_{k}_{a}", none) for a in ("randn", "chi2")])
                close(y, arrays[f"y_{k}"], TOLERANCE["float64"])
                if k == 1:
                    close(dx, arrays["grad_x"], TOLERANCE["float64"])

    @parameterized.parameters(1, 2, 16, 40)
    def test_sums_of_draws(self, size):
        table = draw(0, 24, 3, 5)
        indices = np.random.default_rng(1).integers(0, 24, (24, size)).astype("int32")
        sums = lambda table, indices: noise.ghost_sums(table, lambda k: indices[:, k], size)
        close(jax.jit(sums)(table, indices), table[indices].sum(1), 1e-4)

    def test_equal_samples_have_no_noise(self):
        x = np.broadcast_to(draw(0, 1, 4, 3), (8, 4, 3))
        for drawing in ("replacement", "partition", "shuffle", "consecutive"):
            close(noisy(nj.GhostNoise(4, drawing=drawing), x), x, TOLERANCE["float32"])

    def test_gradient_is_the_cotangent_over_the_scale(self):
        method, x, g = nj.GhostNoise(4), draw(0, 8, 4, 3), draw(1, 8, 4, 3)
        y, dx = jax.device_get(pulled(functools.partial(noisy, method), x, g))
        slope = (y[:, 1] - y[:, 0]) / (x[:, 1] - x[:, 0])
        close(dx, g * slope[:, None], TOLERANCE["float32"])

    @parameterized.parameters("partition", "consecutive")
    def test_batch_norm_and_noise_of_parts_are_ghost_batch_norm(self, drawing):
        """Claim of the paper, exact for epsilon 0; the fused layer too."""
        with jax.enable_x64(True):
            x = draw(0, 12, 5, 3, dtype="float64")
            order = np.arange(12)
            if drawing == "partition":
                order = drawn(noise.draw_order, samples=12)
            plain = dict(epsilon=0.0, use_scale=False, use_bias=False)
            params, state = nj.BatchNorm(**plain).init(KEY, 3)
            wanted = np.empty_like(x)
            wanted[order] = run(nj.GhostBatchNorm(4, **plain), params, state, x[order])[0]
            z, _, _ = run(nj.BatchNorm(**plain), params, state, x)
            close(noisy(nj.GhostNoise(4, drawing=drawing, epsilon=0.0), z), wanted, 1e-10)
            fused = nj.GhostNoiseBatchNorm(4, drawing=drawing, noise_epsilon=0.0, **plain)
            y, _ = fused.apply(params, state, x, train=True, key=KEY)
            close(y, wanted, 1e-10)

    @parameterized.parameters(
        dict(ghost_batch_size=4),
        dict(ghost_batch_size=4, unbiased_scale=True, noise="scale"),
        dict(ghost_batch_size=2, drawing="shuffle", strength=0.5),
        dict(effective_size=6.5),
    )
    def test_fused_is_the_chain(self, **fields):
        with jax.enable_x64(True):
            x = 3 + draw(0, 8, 4, 3, dtype="float64")
            plain = nj.BatchNorm(use_scale=False, use_bias=False)
            fused = nj.GhostNoiseBatchNorm(**fields)
            params, state = variables(fused, 3, dtype="float64")

            def apart(params, x):
                z, new = plain.apply(nj.AffineParams(), state, x, train=True)
                z = noisy(nj.GhostNoise(**fields), z)
                return nj.Affine().apply(params, (), z, train=True)[0], new

            whole = lambda p, x: fused.apply(p, state, x, train=True, key=KEY)

            def results(f, params, x):
                y, pull, new = jax.vjp(f, params, x, has_aux=True)
                return y, new, pull(x)

            ours, theirs = (
                jax.jit(functools.partial(results, f))(params, x) for f in (whole, apart)
            )
            close(ours, theirs, 1e-10)

    def test_masked_samples_are_not_drawn(self):
        x, mask = draw(0, 8, 4, 3), (np.arange(8) < 5).reshape(8, 1, 1)
        spoilt = np.where(mask, x, np.nan)
        for method in (nj.GhostNoise(4), nj.GhostNoise(4, independent_channels=True)):
            y = noisy(method, spoilt, mask=mask)
            chex.assert_tree_all_finite(y)
            close(y[:5], noisy(method, x[:5]), TOLERANCE["float32"])

    @parameterized.parameters(
        nj.GhostNoise(4), nj.AnalyticGhostNoise(4), nj.Ghost(nj.GhostNoise(2), groups=2)
    )
    def test_a_missing_key_is_an_error(self, method):
        x = draw(0, 8, 4, 3)
        apply, state = method.apply, nj.NoiseState(None)
        agreement.check_rejects(self, ("key",), apply, (), state, x, train=True)
        chex.assert_trees_all_equal(apply((), state, x, train=False)[0], x)

    def test_strength_follows_its_schedule(self):
        method = nj.GhostNoise(4, strength=nj.Ramp(0.0, 1.0, 0, 2))
        x, (_, state) = draw(0, 8, 4, 3), method.init(None, 3)
        y, state = method.apply((), state, x, train=True, key=KEY)
        close(y, x, 1e-6)
        _, state = method.apply((), state, x, train=True, key=KEY)
        y, state = method.apply((), state, x, train=True, key=KEY)
        close(y, noisy(nj.GhostNoise(4), x), 1e-6)
        self.assertEqual(state.count, 3)

    @parameterized.parameters(
        (nj.GhostNoise, "replacement", 4),
        (nj.GhostNoise, "partition", 4),
        (nj.AnalyticGhostNoise, None, 4),
        (nj.AnalyticGhostNoise, None, 9),
    )
    def test_distribution(self, make, drawing, size):
        """Dense Gaussian features: shift ~ N(0, 1/N), N scale^2 ~ chi-squared of N - 1.

        In parts of a batch of B: shift ~ N(0, (B - N) / (B - 1) / N) to the order of 1 / B, and
        N/B scale^2 ~ Beta((N - 1) / 2, (B - N) / 2) exactly.

        Three tests each for shift and scale (mean, variance, Kolmogorov-Smirnov), each with a
        false-alarm rate of 1e-4, hence 6e-4 for a configuration; the seeds are fixed. One sample of
        each of 4096 independent channels is tested, so that the draws are independent.
        """
        fields = {} if drawing is None else dict(drawing=drawing, epsilon=0.0)
        samples, channels = 256, 4096
        x = draw(3, samples, channels)
        x = (x - x.mean(0)) / x.std(0)
        apply = functools.partial(noisy, make(size, **fields))
        y, dx = jax.device_get(pulled(apply, x, np.ones_like(x)))
        slope = dx[0]
        zero = apply(np.zeros_like(x))[0] if drawing is None else y[0] - x[0] * slope
        scale = np.asarray(1 / slope, "float64")
        shift = -np.asarray(zero, "float64") * scale
        finite = (samples - size) / (samples - 1) if drawing == "partition" else 1.0
        unit = shift / np.sqrt(finite / size)
        self.check_sample(unit, stats.norm(), channels)
        law, unit = stats.chi2(size - 1), size * scale**2
        if drawing == "partition":  # the share of a part in the sum of squares of a whole batch
            law, unit = stats.beta((size - 1) / 2, (samples - size) / 2), unit / samples
        self.check_sample(unit, law, channels)

    def check_sample(self, sample, law, n):
        """Mean, variance and distribution; false-alarm rate 1e-4 each."""
        z = stats.norm.isf(0.5e-4)
        mean, var, _, excess = law.stats("mvsk")
        self.assertLess(abs(sample.mean() - mean), z * np.sqrt(var / n))
        spread = np.sqrt((excess + 2) * var**2 / n)
        self.assertLess(abs(sample.var() - var), z * spread)
        self.assertGreater(stats.kstest(sample, law.cdf).pvalue, 1e-4)

    @parameterized.parameters(3, 4, 8, 32)
    def test_expected_inverse_is_that_of_the_chi_law(self, size):
        for power in (0.5, 1.0):
            wanted = stats.chi2(size - 1).expect(lambda c, p=power: (c / size) ** (-p / 2))
            got = jax.jit(noise.expected_inverse)(np.float32(1 / size), power)
            np.testing.assert_allclose(got, wanted, rtol=1e-4)

    @parameterized.product(make=(nj.GhostNoise, nj.AnalyticGhostNoise), strength=(0.5, 1.0))
    def test_unbiased_scale_keeps_the_size_on_average(self, make, strength):
        fields = {} if make is nj.AnalyticGhostNoise else {"epsilon": 0.0}
        method = make(8, noise="scale", strength=strength, unbiased_scale=True, **fields)
        x = jnp.asarray(draw(0, 256, 512))
        slope = jax.vjp(functools.partial(noisy, method), x)[1](jnp.ones_like(x))[0]
        np.testing.assert_allclose(slope.mean(), 1, rtol=0.01)

    def test_effective_size_sets_the_variance_of_the_shift(self):
        """Empirically over 4000 keys, to 5 standard errors."""
        method = nj.GhostNoise(effective_size=12.5, noise="shift")
        x = draw(0, 16, 4, 2) + 2 * draw(1, 16, 1, 2)
        keys = jax.random.split(KEY, 4000)
        shifts = jax.jit(jax.vmap(lambda k: x - noisy(method, x, key=k)))(keys)
        var = np.asarray(shifts[:, :, 0]).var((0, 1))
        np.testing.assert_allclose(var, np.asarray(x).var((0, 1)) / 12.5, rtol=0.05)

    @parameterized.parameters(1.0, 1.25, 2.5, 7.875)
    def test_weights_of_draws_are_worth_the_effective_size(self, size):
        share, total = noise._shares(jnp.float32(size))
        weights = np.array([share(jnp.int32(k)) for k in range(9)])
        np.testing.assert_allclose(weights.sum(), total, rtol=1e-6)
        np.testing.assert_allclose(total**2 / np.sum(weights**2), size, rtol=1e-6)

    def test_no_array_of_all_drawn_moments(self):
        method, x = nj.GhostNoise(64), np.ones((128, 4, 4, 32), "float32")
        compiled = noisy.lower(method, x).compile()
        all_drawn = 128 * 64 * 32 * 4
        self.assertLess(compiled.memory_analysis().temp_size_in_bytes, all_drawn / 2)
        method = nj.GhostNoise(64, independent_channels=True)
        compiled = noisy.lower(method, x).compile()
        self.assertLess(compiled.memory_analysis().temp_size_in_bytes, all_drawn / 2)

    def test_oracle_of_a_draw(self):
        x, method = draw(0, 6, 4, 3), nj.GhostNoise(4)
        indices = lambda key, roster: noise.draw_indices(key, roster.rank, roster, 4)
        ghosts = drawn(indices, samples=6)
        shift, scale = ghost_noise_oracle.ghost_noise(method, x, ghosts)
        close(noisy(method, x), ((x - shift) / scale).astype("float32"), TOLERANCE["float32"])

    @parameterized.parameters(*NOISES)
    def test_oracle_of_vectors(self, name):
        _, arrays = vector_files.load(name)
        method, atol = vector_files.method(name), TOLERANCE[vector_files.dtype(name)]
        for step in (1, 2, 3):
            x, samples = arrays[f"x_{step}"], len(arrays["x_1"])
            ghosts = arrays.get(f"draw_{step}_randint")
            if ghosts is None:
                order = arrays.get(f"draw_{step}_randperm", np.arange(samples))
                size = method.ghost_batch_size
                ghosts = np.repeat(order.reshape(-1, size), size, axis=0)
            shift, scale = ghost_noise_oracle.ghost_noise(method, x, ghosts)
            close((x - shift) / scale, arrays[f"y_{step}"], atol)
            if step == 1:
                close(arrays["cotangent"] / scale, arrays["grad_x"], atol)

    @parameterized.parameters(*vector_files.names("noisy_affine"))
    def test_oracle_of_analytic_vectors(self, name):
        _, arrays = vector_files.load(name)
        method = vector_files.method(name)
        for step in (1, 2, 3):
            x, none = arrays[f"x_{step}"], np.nan
            normal, chi2 = (arrays.get(f"draw_{step}_{a}", none) for a in ("randn", "chi2"))
            shift, scale = ghost_noise_oracle.analytic_noise(method, x, normal, chi2)
            close((x - shift) / scale, arrays[f"y_{step}"], TOLERANCE["float64"])
