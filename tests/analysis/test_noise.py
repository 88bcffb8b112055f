"""Ghosts against brute force, closed forms and simulation.

Simulated means are compared with what they estimate in units of their standard error, and must lie
within five: a false alarm once in 1.7 million for each number, and keys are fixed.
"""

import csv
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from agreement import close, draw
from flax import linen as nn
from flax import nnx
from scipy import integrate, special, stats

import normjax as nj
import normjax.linen
import normjax.nnx
from normjax.analysis import layers, noise

KEY = jax.random.key(0)
STANDARD_ERRORS = 5


def estimates(values, expected):
    """Asserts that means of independent `values` [R, ...] are those expected."""
    values = np.asarray(values, "float64")
    error = values.std(0, ddof=1) / np.sqrt(len(values))
    np.testing.assert_array_less(abs(values.mean(0) - expected), STANDARD_ERRORS * error)


def correlated(share, samples=4000, channels=2, seed=0):
    """Maps of 4x4 positions with `share` of their variance between samples."""
    between = draw(seed, samples, 1, 1, channels)
    within = draw(seed + 1, samples, 4, 4, channels)
    return np.sqrt(share) * between + np.sqrt(1 - share) * within


def brute(x, indices):
    """Shift and scale of ghosts, from their definition in float64."""
    x = np.asarray(x, "float64")
    axes = tuple(range(x.ndim - 1))
    mean, deviation = x.mean(axes), x.std(axes)
    ghosts = [x[chosen] for chosen in np.asarray(indices)]
    shift = [(ghost.mean(axes) - mean) / deviation for ghost in ghosts]
    return noise.Ghosts(np.array(shift), np.array([g.std(axes) / deviation for g in ghosts]))


FIXED = ("size", "ghosts", "drawing")  # arguments that make a program of their own
drawn = jax.jit(noise.draw, static_argnames=FIXED)
indices_of = jax.jit(noise._indices, static_argnames=("samples", *FIXED))
doubled = jax.jit(noise.double_noise, static_argnames=("batch", *FIXED))
measured = jax.jit(noise.measure, static_argnames=FIXED)
gaps = jax.jit(noise.gaps, static_argnames="size")
effective, law_of = jax.jit(noise.effective_size), jax.jit(noise.law)


class DrawTest(parameterized.TestCase):
    @parameterized.parameters(
        ("replacement", (32, 3), 2),
        ("replacement", (32, 5, 3), 7),
        ("partition", (32, 4, 4, 3), 2),
        ("partition", (32, 3), 7),
    )
    def test_brute_force(self, drawing, shape, size):
        self.check_brute_force(drawing, shape, size)

    @parameterized.product(
        drawing=("replacement", "partition"),
        shape=((32, 3), (32, 5, 3), (32, 4, 4, 3)),
        size=(2, 7),
    )
    @pytest.mark.slow
    def test_brute_force_of_all(self, drawing, shape, size):
        self.check_brute_force(drawing, shape, size)

    def check_brute_force(self, drawing, shape, size):
        x = 3 + 2 * draw(0, *shape)
        found = drawn(KEY, x, size, ghosts=40, drawing=drawing)
        indices = indices_of(KEY, 32, size, 40, drawing)
        expected = brute(x, indices)
        close(found.shift, expected.shift, 1e-5)
        close(found.scale, expected.scale, 2e-3 if len(shape) == 2 and size == 2 else 1e-5)

    def test_indices(self):
        order = np.asarray(indices_of(KEY, 8, 3, 4000, "partition"))
        self.assertEqual({len(set(row)) for row in order.tolist()}, {3})
        every = np.asarray(indices_of(KEY, 8, 3, 4000, "replacement"))
        for chosen in (order, every):
            counts = np.array([(chosen == i).sum(1) for i in range(8)]).T
            estimates(counts, 3 / 8)
        self.assertIn(2, {len(set(row)) for row in every.tolist()})

    def test_the_whole_batch_has_no_noise(self):
        shift, scale = drawn(KEY, correlated(0.5, 16), 16, ghosts=5, drawing="partition")
        close(shift, np.zeros_like(shift), 1e-6)
        close(scale, np.ones_like(scale), 1e-6)

    def test_does_not_depend_on_offset_and_unit(self):
        x = correlated(0.5, 64)
        found = drawn(KEY, x, 4, ghosts=9)
        close(drawn(KEY, 7 * x - 500, 4, ghosts=9), found, 2e-4)

    @parameterized.parameters(
        (dict(size=0), "size=0 is not a positive integer"),
        (dict(size=2.0), "size=2.0"),
        (dict(size=2, ghosts=0), "ghosts=0"),
        (dict(size=9, drawing="partition"), "size=9 .* more than the 8 samples"),
        (dict(size=2, drawing="shuffle"), "drawing='shuffle'"),
        (dict(size=2, x=jnp.ones(8)), "shape"),
    )
    def test_rejects(self, how, message):
        with self.assertRaisesRegex(ValueError, message):
            noise.draw(KEY, **{"x": jnp.ones((8, 3))} | how)


class LawTest(parameterized.TestCase):
    @parameterized.parameters(2, 2.5, 4, 16, 17, 18, 100, 1000)
    def test_replacement(self, size):
        """Against moments of scipy's chi distribution."""
        found = law_of(size)
        chi = stats.chi(size - 1, scale=size**-0.5)
        mean, var = chi.stats()
        close(float(found.shift_var), 1 / size, 1e-7)
        close(float(found.scale_square), chi.moment(2), 1e-5)
        close(float(found.scale_mean), float(mean), 1e-6)
        np.testing.assert_allclose(found.scale_var, var, rtol=1e-4)
        log_var = special.digamma((size - 1) / 2) - np.log(size / 2)
        np.testing.assert_allclose(found.log_var, log_var, atol=2e-6)
        expected = np.inf
        if size > 2:
            a = (size - 1) / 2
            gammas = special.gammaln(a - 0.5) - special.gammaln(a)
            expected = np.sqrt(size / 2) * np.exp(gammas)
        np.testing.assert_allclose(found.inverse_scale, expected, rtol=1e-5)

    @parameterized.parameters((3, 8), (4, 8), (16, 128), (64, 128), (127, 128))
    def test_partition(self, size, batch):
        """Against quadrature over the Beta distribution."""
        found = law_of(size, batch)
        a, b = (size - 1) / 2, (batch - size) / 2
        logarithm = special.betaln(a, b)

        def expected(function):
            def integrand(angle):  # t = sin(angle)^2, without the pole of the density at t = 1
                sine, cosine = np.sin(angle), np.cos(angle)
                density = np.exp((2 * a - 1) * np.log(sine) - logarithm) * cosine ** (2 * b - 1)
                return 2 * density * function(batch / size * sine**2)

            return integrate.quad(integrand, 0, np.pi / 2)[0]

        close(float(found.shift_var), (batch - size) / (batch - 1) / size, 1e-6)
        close(float(found.scale_square), expected(lambda t: t), 1e-4)
        close(float(found.scale_mean), expected(np.sqrt), 1e-4)
        close(float(found.inverse_scale), expected(lambda t: t**-0.5), 1e-4)
        close(float(found.log_var), expected(np.log), 1e-4)
        var = expected(lambda t: (np.sqrt(t) - expected(np.sqrt)) ** 2)
        np.testing.assert_allclose(found.scale_var, var, rtol=2e-3)

    def test_no_noise_at_the_whole_batch(self):
        found = law_of(128, 128)
        close(np.array(found), np.array([0, 1, 1, 0, 1, 0], "float32"), 1e-6)

    @parameterized.product(size=(2, 16), drawing=("replacement", "partition"))
    def test_simulated(self, size, drawing):
        self.check_simulated(size, drawing)

    @parameterized.product(size=(4, 64), drawing=("replacement", "partition"))
    @pytest.mark.slow
    def test_other_sizes_simulated(self, size, drawing):
        self.check_simulated(size, drawing)

    def check_simulated(self, size, drawing):
        """A batch of its own for every ghost, for the law is that over Gaussian batches."""
        batch = 2048 if drawing == "replacement" else 128

        @jax.jit
        def one(key):
            x = jax.random.normal(key, (batch, 1))
            ghosts = noise.draw(key, x, size, ghosts=1, drawing=drawing)
            return ghosts.shift[0, 0], ghosts.scale[0, 0]

        shift, scale = (np.asarray(a) for a in jax.lax.map(one, jax.random.split(KEY, 2000)))
        found = law_of(size, batch if drawing == "partition" else None)
        estimates(shift, 0)
        if drawing == "partition":
            estimates(shift**2, found.shift_var)
            estimates(scale**2, found.scale_square)
            estimates(scale, found.scale_mean)
        else:  # the law is that of large batches: terms of 1 / B are within the error here
            estimates(shift**2, found.shift_var)
            estimates(scale**2, found.scale_square)

    def test_shapes(self):
        for part in jax.eval_shape(noise.law, np.array([[2.0, 8.0, 32.0]]), 64):
            self.assertEqual(part.shape, (1, 3))


class EffectiveSizeTest(parameterized.TestCase):
    @parameterized.parameters(0.0, 0.1, 0.3, 0.5, 0.8, 1.0)
    def test_correlated_positions(self, share):
        found = effective(correlated(share, 20_000), 16)
        expected = 16 / (share + (1 - share) / 16)
        close(expected, 16 / (share + (1 - share) / 16), 1e-12)
        np.testing.assert_allclose(found, expected, rtol=0.03)

    def test_dense_features(self):
        close(effective(draw(0, 50, 3), 16), jnp.full(3, 16.0), 1e-4)

    @parameterized.product(share=(0.0, 0.2, 1.0), drawing=("replacement", "partition"))
    def test_is_what_the_ghosts_show(self, share, drawing):
        x = correlated(share, 64)
        ghosts = drawn(KEY, x, 16, ghosts=4000, drawing=drawing)
        factor = 48 / 63 if drawing == "partition" else 1
        expected = factor / np.asarray(effective(x, 16))
        estimates(np.square(ghosts.shift), expected)
        estimates(np.square(ghosts.scale), 1 - expected)

    def test_constant_channel(self):
        x = draw(0, 9, 2, 2)
        x[..., 1] = 3
        found = effective(x, 4)
        self.assertEqual(np.isnan(found).tolist(), [False, True])


class DoubleNoiseTest(parameterized.TestCase):
    @parameterized.parameters("replacement", "partition")
    def test_parts_make_the_whole(self, drawing):
        x = correlated(0.5, 100)
        batch, ghost, total = doubled(KEY, x, 16, 4, ghosts=50, drawing=drawing)
        close(total.shift, batch.shift + batch.scale * ghost.shift, 1e-6)
        close(total.scale, batch.scale * ghost.scale, 1e-6)

    def test_brute_force(self):
        x = correlated(0.5, 100)
        batch, ghost, total = doubled(KEY, x, 16, 4, ghosts=20)
        chosen = np.asarray(jax.random.randint(jax.random.split(KEY)[0], (20, 16), 0, 100))
        close(batch, brute(x, chosen), 1e-5)
        close(total, brute(x, chosen[:, :4]), 1e-5)
        ghosts = [brute(x[chosen[i]], [range(4)]) for i in range(20)]
        expected = jax.tree.map(lambda *a: np.concatenate(a), *ghosts)
        close(ghost, expected, 1e-5)

    @parameterized.parameters("replacement", "partition")
    def test_variances(self, drawing):
        x = draw(0, 1000, 2)
        batch, ghost, total = doubled(KEY, x, 32, 8, ghosts=20_000, drawing=drawing)
        estimates(np.square(batch.shift), 1 / 32)
        expected = 1 / 8 if drawing == "partition" else 1 / 32 + (1 - 1 / 32) / 8
        estimates(np.square(total.shift), expected)
        law = law_of(8, 32).shift_var if drawing == "partition" else 1 / 8
        estimates(np.square(ghost.shift), float(law))

    def test_rejects(self):
        with self.assertRaisesRegex(ValueError, "double_noise: size=9 .* 8 samples"):
            noise.double_noise(KEY, draw(0, 20, 2), 8, 9)
        with self.assertRaisesRegex(ValueError, "double_noise: batch=0"):
            noise.double_noise(KEY, draw(0, 20, 2), 0, 9)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = normjax.linen.GhostBatchNorm(ghost_batch_size=4, name="norm")(
            x, use_running_average=not train
        )
        x = nn.Dense(3, name="dense")(nn.relu(x).mean((1, 2)))
        return normjax.linen.BatchNorm(momentum=0.0, name="last")(x, use_running_average=not train)


def start(net, x):
    return jax.jit(functools.partial(net.init, train=False))(KEY, x)


class NetNNX(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = normjax.nnx.GhostBatchNorm(4, ghost_batch_size=4, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.conv(x))


def gap_of(x, mean, var, size=None):
    """Of one norm."""
    return gaps({"norm": x}, {"norm": {"mean": mean, "var": var}}, size=size)["norm"]


class GapTest(parameterized.TestCase):
    @parameterized.parameters((None,), (4,), (12,))
    def test_brute_force(self, size):
        x = 2 + 3 * draw(0, 12, 2, 3, 5)
        mean, var = draw(1, 5), 0.5 + draw(2, 5) ** 2
        found = gap_of(x, mean, var, size=size)
        parts = x.astype("float64").reshape(-1, (size or 12) * 6, 5)
        close(found.mean, ((parts.mean(1) - mean) / np.sqrt(var)).astype("float32"), 1e-5)
        close(found.log_var, np.log(parts.var(1) / var).astype("float32"), 1e-5)

    @parameterized.parameters(4, 16)
    def test_variances_of_ghosts_are_low(self, size):
        found = gap_of(draw(0, 64_000, 1), np.zeros(1), np.ones(1), size=size)
        estimates(found.log_var, law_of(size).log_var)
        estimates(found.mean, 0)

    def test_linen(self):
        net, x = Net(), draw(0, 8, 4, 4, 1)
        variables = start(net, x)
        capture = functools.partial(layers.capture_inputs, net, train=True)
        inputs = jax.jit(capture)(variables, x)
        found = gaps(inputs, variables["batch_stats"], size=4)
        self.assertEqual(list(found), ["norm", "last"])
        close(found["norm"], gap_of(inputs["norm"], np.zeros(4), np.ones(4), size=4), 0)
        apply = functools.partial(net.apply, train=True, mutable=["batch_stats"])
        _, new = jax.jit(apply)(variables, x)
        whole = gaps(inputs, new["batch_stats"])["last"]  # whose momentum is zero
        close(whole, jax.tree.map(np.zeros_like, whole), 1e-5)

    def test_nnx(self):
        net, x = NetNNX(), draw(0, 8, 4, 4, 1)
        inputs = layers.capture_inputs(net, x)
        found = noise.gaps(inputs, nnx.to_pure_dict(nnx.state(net, nnx.BatchStat)), size=2)
        self.assertEqual({name: gap.mean.shape for name, gap in found.items()}, {"norm": (4, 4)})

    @parameterized.parameters(
        (lambda: gap_of(draw(0, 8, 3), np.zeros(3), np.ones(3), size=3), "size=3 does not div"),
        (lambda: gap_of(draw(0, 8, 3), np.zeros(2), np.ones(3)), "made for"),
        (lambda: noise.gaps({"a": draw(0, 8, 3)}, {}), "no norm"),
    )
    def test_rejects(self, call, message):
        with self.assertRaisesRegex(ValueError, message):
            call()


def maps():
    still = correlated(0.5, 64)
    still[..., 1] = 2
    return {"conv": correlated(0.2, 64), "dense": draw(3, 64, 3), "still": still}


@functools.cache
def found_in_maps(drawing="replacement"):
    return measured(maps(), 8, key=KEY, ghosts=300, drawing=drawing)


class MeasureTest(parameterized.TestCase):
    @parameterized.parameters("replacement", "partition")
    def test_is_of_the_ghosts_drawn(self, drawing):
        found = found_in_maps(drawing)
        self.assertEqual(list(found), ["conv", "dense", "still"])
        for name, x in maps().items():
            shift, scale = map(np.asarray, drawn(KEY, x, 8, ghosts=300, drawing=drawing))
            mine = found[name]
            close(mine.effective_size, effective(x, 8), 1e-6)
            close(mine.shift_var, np.mean(np.square(shift), 0), 1e-6)
            close(mine.scale_square, np.mean(np.square(scale), 0), 1e-6)
            close(mine.scale_var, np.var(scale, 0), 1e-6)
            factor = 56 / 63 if drawing == "partition" else 1
            close(mine.shift_law, factor / mine.effective_size, 1e-6)
            close(mine.scale_square_law, 1 - mine.shift_law, 1e-6)
        close(found["dense"].scale_law, jnp.full(3, law_of(8 / factor).scale_var), 1e-6)

    def test_jit(self):
        expected = noise.measure({"dense": maps()["dense"]}, 8, key=KEY, ghosts=300)
        close(found_in_maps()["dense"], expected["dense"], 1e-5)

    def test_norm_shows_the_ghosts_of_its_input(self):
        net, x = Net(), draw(0, 64, 4, 4, 1)
        variables = start(net, x)
        inputs, outputs = (
            jax.jit(functools.partial(capture, net, train=False))(variables, x)
            for capture in (layers.capture_inputs, layers.capture)
        )
        found = [measured({"a": m["norm"]}, 8, key=KEY) for m in (inputs, outputs)]
        close(*found, 1e-4)

    def test_noise_of_the_method(self):
        """GhostNoise shifts by what `draw` says: the same variance, by effective size."""
        x = correlated(0.2, 64)
        plain = np.asarray((x - x.mean((0, 1, 2))) / x.std((0, 1, 2)), "float32")
        method = nj.GhostNoise(8, noise="shift")

        @jax.jit
        def noisy(key):
            return method.apply((), nj.NoiseState(), plain, train=True, key=key)[0]

        keys = jax.random.split(KEY, 40)
        shifts = [(plain - np.asarray(noisy(key)))[:, 0, 0] for key in keys]
        estimates(np.square(np.concatenate(shifts)), 1 / np.asarray(effective(x, 8)))

    def test_table(self):
        found = found_in_maps()
        rows = noise.table(found)
        self.assertEqual([row["map"] for row in rows], ["conv", "dense", "still"])
        self.assertEqual([row["channels"] for row in rows], [2, 3, 1])
        self.assertEqual(rows[1]["shift_var"], float(np.median(found["dense"].shift_var)))
        self.assertEqual(rows[2]["shift_var"], float(found["still"].shift_var[0]))
        none = noise.table(noise.measure({"zero": np.zeros((8, 2))}, 8, key=KEY))
        self.assertEqual((none[0]["channels"], none[0]["scale_var"]), (0, None))
        writer = csv.DictWriter(io.StringIO(), rows[0])
        writer.writeheader()
        writer.writerows(rows)
