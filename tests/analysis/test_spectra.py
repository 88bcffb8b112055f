"""Measures of feature maps, against NumPy in float64 from the definitions."""

import csv
import functools
import io

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from agreement import close, draw
from flax import linen as nn
from scipy.special import digamma

import normjax.linen
from normjax.analysis import spectra


def oracle(x, bands, with_mean):
    x = np.asarray(x, "float64")
    sizes, axes = x.shape[1:-1], tuple(range(1, x.ndim - 1))
    power = np.mean(np.abs(np.fft.fftn(x, axes=axes)) ** 2, 0)
    grid = np.meshgrid(*map(np.fft.fftfreq, sizes), indexing="ij")
    radius = np.sqrt(np.sum(np.square(grid), 0) / (len(sizes) / 4))
    band = np.ceil((bands - 1) * radius - 1e-9)
    counted = power.reshape(-1, x.shape[-1])[0 if with_mean else 1 :]
    flatness = np.exp(np.mean(np.log(counted), 0)) / np.mean(counted, 0)
    return spectra.Measures(
        np.sqrt(np.mean(x**2)),
        np.mean([np.linalg.norm(sample) for sample in x]),
        np.quantile(np.abs(x), 0.999),
        np.max(np.abs(x)),
        np.mean(flatness),
        np.array([np.sum(power[band == i]) for i in range(bands)]) / np.sum(power),
    )


@functools.partial(jax.jit, static_argnames=("bands", "with_mean"))
def measure(x, **options):
    return spectra.measure({"x": x}, **options)["x"]


class MeasureTest(parameterized.TestCase):
    @parameterized.product(
        shape=((5, 7, 3), (4, 8, 1), (4, 6, 8, 3), (4, 5, 7, 3), (1, 9, 4, 2), (3, 4, 5, 6, 2)),
        options=(dict(bands=8, with_mean=False), dict(bands=1, with_mean=True)),
    )
    def test_oracle(self, shape, options):
        x = 1 + draw(0, *shape) * np.arange(1, 1 + shape[-1], dtype="float32")
        close(measure(x, **options), oracle(x, **options), 2e-5)
        with jax.enable_x64(True):
            close(measure(x.astype("float64"), **options), oracle(x, **options), 1e-10)

    @parameterized.parameters(1, 8)
    def test_flatness_of_white_noise(self, samples):
        """Powers are gamma variables; the mean of their logarithm is a digamma function."""
        found = measure(draw(0, samples, 64, 64, 16)).flatness
        np.testing.assert_allclose(found, np.exp(digamma(samples)) / samples, rtol=0.01)

    @parameterized.parameters((8, 1), (6, 2), (5, 3))
    def test_impulse_is_flat(self, size, axes):
        x = np.zeros((2, *axes * (size,), 3), "float32")
        x[(slice(None), *axes * (1,))] = 2
        found = measure(x)
        white = oracle(x, 8, False).shares
        close((found.flatness, found.shares), (1.0, white), 1e-5)

    @parameterized.parameters(0, 1.7, -1000)
    def test_constant(self, value):
        found = measure(np.full((2, 7, 6, 3), value, "float32"))
        close(found, oracle_of_constant(abs(value)), 2e-5)

    def test_constant_channels_do_not_count_in_the_flatness(self):
        x = draw(0, 4, 7, 6, 3)
        wide = np.concatenate([x, np.zeros_like(x), np.full_like(x, 1.7)], -1)
        close(measure(wide).flatness, measure(x).flatness, 1e-6)

    @parameterized.parameters(1e30, 1e-30)
    def test_any_scale(self, scale):
        x = draw(0, 4, 7, 6, 3)
        found, expected = measure(x * np.float32(scale)), measure(x)
        sizes = [value / np.float32(scale) for value in found[:4]]
        close((sizes, found[4:]), (list(expected[:4]), expected[4:]), 1e-5)

    def test_nan_is_not_hidden(self):
        x = draw(0, 2, 7, 6, 3)
        x[1, 2, 3, 0] = np.nan
        self.assertTrue(all(np.isnan(value).all() for value in measure(x)))

    @parameterized.parameters("bfloat16", "float16")
    def test_half_precision(self, dtype):
        x = (300 * draw(0, 4, 7, 6, 3)).astype(dtype)
        found, expected = measure(x), measure(x.astype("float32"))
        chex.assert_trees_all_equal_dtypes(found, expected)
        close(found, expected, 1e-6)

    @parameterized.parameters((3, 4), (2, 2, 2, 2, 2, 3))
    def test_without_spectrum(self, *shape):
        found = measure(draw(0, *shape))
        self.assertEqual(found[4:], (None, None))

    def test_jit_keeps_order_and_measures_alone(self):
        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.Dense(2, name="a")(normjax.linen.RMSNorm(name="b")(x))

        net, x = Net(), draw(0, 4, 5, 6, 3)
        variables = jax.jit(net.init)(jax.random.key(0), x)
        found = jax.jit(lambda *inputs: spectra.measure(spectra.capture(net, *inputs)))(
            variables, x
        )
        self.assertEqual(list(found), ["b", "a", "__call__"])
        each = spectra.capture(net, variables, x)
        close(dict(found), {name: measure(y) for name, y in each.items()}, 2e-5)

    def test_rejects_an_array(self):
        with self.assertRaisesRegex(TypeError, "dict"):
            spectra.measure(jnp.ones((2, 3)))

    @parameterized.parameters(
        (jnp.ones((2, 3), complex), {}, TypeError, "'x': the input has dtype complex64"),
        (jnp.ones(3), {}, ValueError, r"'x' has shape \(3,\)"),
        (jnp.ones((0, 3, 3, 2)), {}, ValueError, r"'x' has shape \(0, 3, 3, 2\)"),
        (jnp.ones((2, 3)), dict(bands=0), ValueError, "bands=0"),
        (jnp.ones((2, 3)), dict(bands=2.0), ValueError, "bands=2.0"),
    )
    def test_rejects(self, x, options, error, message):
        with self.assertRaisesRegex(error, message):
            measure(x, **options)


def oracle_of_constant(value):
    share = float(value > 0)
    return spectra.Measures(
        *(np.float32(value * factor) for factor in (1, np.sqrt(7 * 6 * 3), 1, 1)),
        np.float32(0),
        np.array([share, 0, 0, 0, 0, 0, 0, 0], "float32"),
    )


@functools.cache
def history(steps=7):
    """Maps that grow, one without spatial axes, one that is zero, and one that diverges."""
    x = draw(0, 2, 6, 6, 3)
    measures = jax.jit(functools.partial(spectra.measure, bands=3))
    with np.errstate(divide="ignore"):
        maps = [
            {
                "grows": x * (step + 1),
                "flat": x[:, 0, 0],
                "zero": np.zeros_like(x),
                "diverges": x / np.float32(steps - 1 - step),
            }
            for step in range(steps)
        ]
    order = list(maps[0])
    found = ((10 * step, measures(each)) for step, each in enumerate(maps))
    return {step: {name: each[name] for name in order} for step, each in found}


class HistoryTest(parameterized.TestCase):
    def test_table(self):
        found = history()
        rows = spectra.table(found)
        self.assertEqual(list(rows[0])[:4], ["step", "depth", "map", "rms"])
        self.assertEqual([row["step"] for row in rows[::4]], list(found))
        self.assertEqual([row["map"] for row in rows[:4]], list(found[0]))
        self.assertEqual([row["depth"] for row in rows[:4]], [0, 1, 2, 3])
        last = found[60]["grows"]
        self.assertEqual(rows[-4]["maximum"], float(last.maximum))
        self.assertEqual([rows[-4][f"share_{i}"] for i in range(3)], last.shares.tolist())
        self.assertEqual([rows[1][key] for key in ("flatness", "share_0")], [None, None])
        writer = csv.DictWriter(io.StringIO(), rows[0])
        writer.writeheader()
        writer.writerows(rows)

    @parameterized.parameters(
        (lambda: spectra.table({}), "no maps"),
        (lambda: spectra.table({0: {}}), "no maps"),
        (lambda: spectra.table(history() | {90: spectra.measure({"a": jnp.ones((2, 3))})}), "maps"),
    )
    def test_rejects(self, call, message):
        with self.assertRaisesRegex(ValueError, message):
            call()
