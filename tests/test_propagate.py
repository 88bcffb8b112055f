"""Moments through layers: enumeration of positions, quadrature, sampling, recorded numbers."""

import functools
import math

import agreement
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import vector_files
from absl.testing import parameterized
from jax import lax, test_util

import normjax as nj
from normjax import propagate

EXACT = dict(rtol=1e-10, atol=1e-10)
DRAWS = 1_000_000
pytestmark = pytest.mark.usefixtures("strict_promotion")


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def predicted(mean, var):
    """What `propagate.prediction` gives, without a program."""
    return nj.Moments(np.zeros_like(var), mean, var)


def some(*shape, seed=0):
    """Moments with random means and variances."""
    return predicted(draw(seed, *shape), 0.3 + draw(seed + 1, *shape) ** 2)


def once(function, /, *args, **fixed):
    """`function(*args, **fixed)` as one program instead of one for each operation."""
    return jax.jit(function, static_argnames=tuple(fixed))(*args, **fixed)


def agree(found, mean, var, **tolerance):
    chex.assert_trees_all_close((found.mean, found.var), (mean, var), **(tolerance or EXACT))
    chex.assert_trees_all_equal(found.count, np.zeros_like(found.mean))


def convolve(image, kernel, **how):
    rank = kernel.ndim - 2
    axes = "".join("abc"[:rank])
    how |= dict(dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"), precision="highest")
    return np.asarray(lax.conv_general_dilated(image[None], kernel, **how))[0]


def by_enumeration(x, kernel, size, **how):
    """Mean and variance over the positions of an output, each with a mean and a variance."""
    wide = lambda a: np.broadcast_to(a, (*size, a.size))
    means = convolve(wide(x.mean), kernel, **how).reshape(-1, kernel.shape[-1])
    spread = convolve(wide(x.var), kernel**2, **how).reshape(-1, kernel.shape[-1])
    return means.mean(0), spread.mean(0) + means.var(0)


def check_sampled(found, values):
    """The moments of `values` [draws, positions, C], of which draws are independent."""
    draws = len(values)
    mean = values.mean((0, 1))
    square = np.square(values - np.asarray(found.mean)).mean(1)
    for wanted, each in ((found.mean, values.mean(1)), (found.var, square)):
        error = each.std(0) / math.sqrt(draws)
        assert (error > 0).all()
        assert (np.abs(each.mean(0) - np.asarray(wanted)) <= 4 * error).all(), (mean, found, error)


class ConvTest(parameterized.TestCase):
    @parameterized.parameters(
        dict(size=(5, 7), window=(3, 3)),
        dict(size=(5, 7), window=(3, 5), strides=2),
        dict(size=(6, 6), window=(4, 4), strides=(2, 3), padding="SAME_LOWER"),
        dict(size=(6, 5), window=(3, 2), padding="VALID", strides=(1, 2)),
        dict(size=(6, 5), window=(3, 3), padding=((0, 3), (2, 1))),
        dict(size=(6, 5), window=(3, 3), padding=2, kernel_dilation=2),
        dict(size=(6, 5), window=(3, 3), padding=(1, (0, 4)), input_dilation=(2, 3)),
        dict(size=(9,), window=(5,), kernel_dilation=3, strides=2),
        dict(size=(4, 3, 5), window=(3, 3, 3), strides=(1, 2, 1)),
        dict(size=(2, 2), window=(7, 7)),
        dict(size=(8, 8), window=(3, 3), feature_group_count=2),
        dict(size=(8, 8), window=(3, 3), feature_group_count=4, strides=2),
        dict(size=(8, 8), window=(1, 1), strides=2),
        dict(size=(8, 8), window=(3, 3), padding=((-1, 2), (0, -2))),
    )
    def test_enumeration(self, size, window, strides=1, padding="SAME", **how):
        groups = how.get("feature_group_count", 1)
        x, kernel = some(4), draw(5, *window, 4 // groups, 8)
        found = once(propagate.conv, x, kernel, size=size, strides=strides, padding=padding, **how)
        each = lambda a: (a,) * len(size) if isinstance(a, int) else a
        pairs = padding if isinstance(padding, str) else [each(p) for p in each(padding)]
        pairs = pairs if isinstance(pairs, str) else [(p * 2)[:2] for p in pairs]
        plain = dict(
            window_strides=each(strides),
            padding=pairs,
            lhs_dilation=each(how.get("input_dilation", 1)),
            rhs_dilation=each(how.get("kernel_dilation", 1)),
            feature_group_count=groups,
        )
        agree(found, *by_enumeration(x, kernel, size, **plain))

    def test_circular_is_without_a_border_and_causal_has_one_on_one_side(self):
        x, kernel = some(3), draw(5, 3, 3, 2)
        conv = functools.partial(once, propagate.conv, x, kernel, size=(7,))
        agree(conv(padding="CIRCULAR"), *conv(padding="VALID")[1:])
        agree(conv(padding="CAUSAL"), *conv(padding=((2, 0),))[1:])

    def test_without_a_border_it_is_the_dense_layer_of_the_taps(self):
        x, kernel, bias = some(2, 3), draw(5, 3, 3, 3, 4), draw(6, 4)
        found = once(propagate.conv, x, kernel, bias, size=(9, 9), padding="VALID")
        taps = nj.Moments(*(np.tile(a, (1, 9)) for a in x))
        agree(found, *once(propagate.dense, taps, kernel.reshape(27, 4), bias)[1:])

    def test_sampling(self):
        size, rng = (3, 4), np.random.default_rng(0)
        x, kernel = some(2), draw(5, 3, 3, 2, 2)
        draws = DRAWS // 12
        image = rng.normal(size=(draws, *size, 2)) * np.sqrt(x.var) + np.asarray(x.mean)
        how = dict(
            window_strides=(1, 2), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y = lax.conv_general_dilated(image, kernel, **how)
        found = once(propagate.conv, x, kernel, size=size, strides=(1, 2))
        check_sampled(found, np.asarray(y).reshape(draws, -1, 2))

    def test_leading_axes_and_dtypes(self):
        x, kernel = some(3, 2, 4), draw(5, 3, 3, 4, 6)
        conv = jax.jit(functools.partial(propagate.conv, size=(5, 5)))
        found = jax.device_get(conv(x, kernel))
        for i, j in np.ndindex(3, 2):
            one = nj.Moments(*(a[i, j] for a in x))
            agree(nj.Moments(*(a[i, j] for a in found)), *conv(one, kernel)[1:])
        half = nj.Moments(*(a.astype(jnp.bfloat16) for a in x))
        low = jax.eval_shape(conv, half, kernel.astype(jnp.bfloat16))
        chex.assert_type([low.mean, low.var], jnp.float32)

    def test_work_does_not_grow_with_the_map(self):
        x, kernel = some(4), draw(5, 3, 3, 4, 8)
        largest = lambda size: max(
            math.prod(v.aval.shape)
            for e in jax.make_jaxpr(lambda x: propagate.conv(x, kernel, size=size))(x).eqns
            for v in e.outvars
        )
        self.assertEqual(largest((512, 512)), largest((8, 8)))

    @parameterized.parameters(
        (dict(size=(5, 5)), (3, 3, 3, 2), "(3, 3, 3, 2)"),
        (dict(size=(5,)), (3, 3, 4, 2), "(5,)"),
        (dict(size=(5, 5), feature_group_count=4), (3, 3, 1, 6), "6"),
        (dict(size=(2, 2), padding="VALID"), (3, 3, 4, 2), "VALID"),
        (dict(size=(5, 5), padding="REFLECT"), (3, 3, 4, 2), "REFLECT"),
        (dict(size=(5, 5), padding="CAUSAL"), (3, 3, 4, 2), "CAUSAL"),
        (dict(size=(5, 5), input_dilation=2), (3, 3, 4, 2), "input_dilation=(2, 2)"),
        (dict(size=(5, 5), padding=((1, 1),)), (3, 3, 4, 2), "2 spatial"),
        (dict(size=(5, 5), strides=(1, 1, 1)), (3, 3, 4, 2), "(1, 1, 1)"),
        (dict(size=(5, 5), kernel_dilation=0), (3, 3, 4, 2), "0"),
        (dict(size=(0, 5)), (3, 3, 4, 2), "(0, 5)"),
    )
    def test_rejects(self, how, kernel, *pieces):
        pieces = ("conv", *pieces)
        agreement.check_rejects(self, pieces, propagate.conv, some(4), np.ones(kernel), **how)


def by_quadrature(function, mean, deviation, kinks=()):
    """Mean and variance of a function of a normal number."""
    ends = np.sort([*(mean + deviation * np.linspace(-12, 12, 400)), *kinks])
    nodes, weights = np.polynomial.legendre.leggauss(16)
    half, middle = np.diff(ends)[:, None] / 2, (ends[1:] + ends[:-1])[:, None] / 2
    x = middle + half * nodes
    density = scipy.stats.norm(mean, deviation).pdf(x) * half * weights
    value = function(x)
    centre = (value * density).sum()
    return centre, ((value - centre) ** 2 * density).sum()


MEANS = np.array([-5.0, -2.0, -0.5, 0.0, 0.1, 1.0, 3.0, 5.0])
exact_gelu = functools.partial(jax.nn.gelu, approximate=False)
SMOOTH = {
    jnp.tanh: np.tanh,
    jax.nn.sigmoid: lambda x: 1 / (1 + np.exp(-x)),
    jax.nn.gelu: lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    exact_gelu: lambda x: x * scipy.stats.norm.cdf(x),
    jax.nn.silu: lambda x: x / (1 + np.exp(-x)),
}


def through(function):
    return functools.partial(propagate.activation, function=function)


leaky_relu, gelu, tanh = map(through, (jax.nn.leaky_relu, jax.nn.gelu, jnp.tanh))


class PointwiseTest(parameterized.TestCase):
    def wanted(self, function, deviation, kinks=()):
        pairs = [by_quadrature(function, mean, deviation, kinks) for mean in MEANS]
        return map(np.array, zip(*pairs, strict=True))

    def inputs(self, deviation):
        return predicted(MEANS, np.full(MEANS.shape, deviation**2))

    @parameterized.parameters(0.1, 0.5, 1.0, 3.0, 20.0)
    def test_relu(self, deviation):
        mean, var = self.wanted(lambda x: np.maximum(x, 0), deviation, (0.0,))
        agree(once(propagate.relu, self.inputs(deviation)), mean, var)
        agree(once(propagate.activation, self.inputs(deviation), function=jax.nn.relu), mean, var)

    @parameterized.product(deviation=(0.1, 1.0, 20.0), slope=(0.01, 0.3, -0.5, 2.0))
    def test_leaky_relu(self, deviation, slope):
        mean, var = self.wanted(lambda x: np.where(x > 0, x, slope * x), deviation, (0.0,))
        tolerance = dict(rtol=1e-9, atol=1e-9)
        leaky = functools.partial(jax.nn.leaky_relu, negative_slope=slope)
        found = once(propagate.activation, self.inputs(deviation), function=leaky)
        agree(found, mean, var, **tolerance)

    @parameterized.product(
        function=tuple(SMOOTH), scale=((0.3, 1e-8), (1.0, 1e-8), (3.0, 3e-4), (10.0, 5e-3))
    )
    def test_smooth_within_the_stated_errors(self, function, scale):
        deviation, bound = scale
        mean, var = self.wanted(SMOOTH[function], deviation)
        found = once(propagate.activation, self.inputs(deviation), function=function)
        self.assertLess(np.max(np.abs(found.mean - mean)) / deviation, bound)
        self.assertLess(np.max(np.abs(found.var - var)) / deviation**2, bound)

    def test_polynomials_are_exact(self):
        found = once(propagate.activation, self.inputs(2.0), function=lambda x: x**3 - x)
        # Moments of a normal number about its mean: 0, 4, 0, 48, 0, 960.
        slope, bend = 3 * MEANS**2 - 1, 3 * MEANS
        mean = MEANS**3 - MEANS + 4 * bend
        square = 4 * slope**2 + 48 * (bend**2 + 2 * slope) + 960 - (4 * bend) ** 2
        agree(found, mean, square)

    def test_float32_keeps_the_variance_of_what_is_far_from_the_kink(self):
        x = predicted(np.array([3e3, -10]), np.ones(2))
        low = once(propagate.relu, jax.tree.map(np.float32, x))
        exact = once(propagate.relu, x)
        np.testing.assert_allclose(low.var[0], 1, rtol=1e-6)
        np.testing.assert_allclose(low.var[1], exact.var[1], rtol=1e-3)

    @parameterized.parameters(
        propagate.relu,
        leaky_relu,
        gelu,
        through(exact_gelu),
        tanh,
        through(jax.nn.sigmoid),
        lambda x: propagate.max_pool(x, (2, 2), size=(4, 4)),
    )
    def test_a_constant(self, layer):
        """Variance zero: the function of the mean, and finite derivatives."""

        def value(mean, var):
            return layer(propagate.prediction(mean, var))[1:]

        @jax.jit
        def results(*at):
            return value(*at), jax.jacrev(value, (0, 1))(*at), jax.jacfwd(value, (0, 1))(*at)

        for dtype in (np.float32, np.float64):
            mean = np.array([-1e6, -1.0, 0.0, 1e-3, 1.0, 1e6], dtype)
            for var in (0.0, 1e-30, 1e-12):
                level, first, forward = results(mean, np.full(6, var, dtype))
                chex.assert_tree_all_finite((level, first))
                if dtype == np.float64:  # a deviation of 1e-8 enlarges rounding by as much
                    chex.assert_trees_all_close(first, forward, rtol=1e-6, atol=1e-8)

    @parameterized.parameters(propagate.relu, leaky_relu, gelu, tanh)
    def test_a_small_variance_is_that_of_the_slope(self, layer):
        mean = np.array([-2.0, -0.5, 0.7, 2.0])
        at = lambda v: layer(propagate.prediction(mean, jnp.full(4, v))).var
        level = lambda m: layer(propagate.prediction(m, jnp.zeros_like(m))).mean
        slope = np.diagonal(once(jax.jacrev(level), mean))
        chex.assert_trees_all_close(once(at, 1e-8), 1e-8 * slope**2, rtol=1e-4)
        grad = once(jax.jacrev(at), 0.0)
        chex.assert_trees_all_close(grad, slope**2, rtol=1e-5, atol=1e-7)

    @parameterized.parameters(propagate.relu, gelu)
    def test_derivatives(self, layer):
        self.check_derivatives(layer)

    @parameterized.parameters(leaky_relu, tanh)
    @pytest.mark.slow
    def test_derivatives_of_the_like(self, layer):
        self.check_derivatives(layer)

    def check_derivatives(self, layer):
        x = some(5)
        value = jax.jit(lambda mean, var: layer(propagate.prediction(mean, var))[1:])
        test_util.check_grads(value, (x.mean, x.var), order=2, atol=1e-4, rtol=1e-4)

    def test_relu_slopes(self):
        """Of the mean: the probability to be positive, and half the density at zero (Price)."""
        x = some(5)
        value = lambda mean, var: propagate.relu(propagate.prediction(mean, var)).mean
        dmean, dvar = once(jax.jacrev(value, (0, 1)), x.mean, x.var)
        normal = scipy.stats.norm(x.mean, np.sqrt(x.var))
        chex.assert_trees_all_close(np.diagonal(dmean), 1 - normal.cdf(0), **EXACT)
        chex.assert_trees_all_close(np.diagonal(dvar), normal.pdf(0) / 2, **EXACT)

    def test_rejects(self):
        reject = lambda *a: agreement.check_rejects(self, *a)
        reject(("relu", "ndarray"), propagate.relu, np.ones(3))
        bad = nj.Moments(np.zeros(3), np.ones(3), np.ones(4))
        reject(("relu", "(4,)"), propagate.relu, bad)
        scalar = nj.Moments(np.zeros(()), np.zeros(()), np.ones(()))
        reject(("relu", "()"), propagate.relu, scalar)
        reject(("activation", "shape"), propagate.activation, some(3), jnp.sum)
        whole = nj.Moments(np.zeros(1), np.ones(1, "complex64"), np.ones(1, "complex64"))
        reject(("complex64",), propagate.relu, whole)


class PoolTest(parameterized.TestCase):
    @parameterized.parameters(
        dict(window=(2, 2), strides=2),
        dict(window=(3, 3), strides=2, padding="SAME"),
        dict(window=(3, 2), padding=((1, 0), (1, 1))),
        dict(window=(5, 6)),
    )
    def test_average_is_the_convolution(self, window, **how):
        x, size = some(3), (5, 6)
        kernel = np.full((*window, 1, 3), 1 / math.prod(window))
        conv = functools.partial(once, propagate.conv, size=size, feature_group_count=3)
        wanted = conv(x, kernel, **{"padding": "VALID", **how})
        found = once(propagate.average_pool, x, window=window, size=size, **how)
        agree(found, *wanted[1:])

    def test_average_of_what_lies_inside(self):
        x = some(3)
        how = dict(size=(3, 4), padding="SAME", count_include_pad=False)
        found = once(propagate.average_pool, x, window=(3, 3), **how)
        inside = np.multiply.outer([2, 3, 2], [2, 3, 3, 2])
        agree(found, x.mean, x.var * (1 / inside).mean())

    @parameterized.parameters("VALID", "SAME")
    def test_largest_by_sampling(self, padding):
        x, size, rng = some(2), (3, 3), np.random.default_rng(1)
        draws = DRAWS // 9
        image = rng.normal(size=(draws, *size, 2)) * np.sqrt(x.var) + np.asarray(x.mean)
        y = lax.reduce_window(image, -np.inf, lax.max, (1, 2, 3, 1), (1, 2, 1, 1), padding)
        how = dict(size=size, strides=(2, 1), padding=padding)
        found = once(propagate.max_pool, x, window=(2, 3), **how)
        check_sampled(found, np.asarray(y).reshape(draws, -1, 2))

    def test_largest_of_one_is_it(self):
        x = some(3)
        found = once(propagate.max_pool, x, window=(1, 1), size=(4, 4), strides=2)
        agree(found, x.mean, x.var)

    def test_rejects(self):
        for pool in (propagate.average_pool, propagate.max_pool):
            name = pool.__name__
            agreement.check_rejects(self, (name, "(6, 2)"), pool, some(3), (6, 2), size=(5, 5))
            agreement.check_rejects(self, (name, "(2,)"), pool, some(3), (2,), size=(5, 5))
            how = dict(size=(5,), padding=3)
            agreement.check_rejects(self, (name, "padding"), pool, some(3), (2,), **how)


class LinearTest(parameterized.TestCase):
    def test_a_chain_of_linear_layers_is_exact(self):
        """Kernels in which every feature feeds one output keep features independent."""
        x, members = some(8), np.arange(8)
        owners = (members // 2, members[:4] // 2, members[:2] // 2)
        total, constant, found = np.eye(8), np.zeros(8), x
        layer = jax.jit(lambda x, k, b, s: propagate.affine(propagate.dense(x, k, b), s, -b))
        for i, owner in enumerate(owners):
            kernel = draw(i, len(owner), 1) * np.eye(owner.max() + 1)[owner]
            bias, scale = draw(i + 5, owner.max() + 1), draw(i + 9, owner.max() + 1)
            found = layer(found, kernel, bias, scale)
            total = total @ (kernel * scale)
            constant = (constant @ kernel + bias) * scale - bias
        covariance = total.T @ np.diag(x.var) @ total
        agree(found, x.mean @ total + constant, np.diag(covariance))

    def test_the_mean_through_any_linear_layers_is_exact(self):
        x, found, total = some(6), some(6), np.eye(6)
        for i in range(3):
            kernel = draw(i, 6, 6)
            found, total = once(propagate.dense, found, kernel), total @ kernel
        chex.assert_trees_all_close(found.mean, x.mean @ total, **EXACT)

    def test_add(self):
        x, y = some(3), some(2, 3, seed=4)
        agree(once(propagate.add, x, y), x.mean + y.mean, x.var + y.var)
        agree(once(propagate.add, x, x, x.var), *once(propagate.affine, x, 2.0)[1:])
        agree(once(propagate.add, x, x, -x.var), 2 * x.mean, np.zeros(3))
        agree(once(propagate.add, x, x, covariance=0.25), 2 * x.mean, 2 * x.var + 0.5)

    def test_affine(self):
        x, scale, bias = some(2, 3), draw(4, 3), draw(5, 3)
        agree(once(propagate.affine, x, scale, bias), x.mean * scale + bias, x.var * scale**2)
        agree(once(propagate.affine, x), x.mean, x.var)
        agree(once(propagate.affine, x, bias=1.0), x.mean + 1, x.var)

    def test_concatenate(self):
        x, y = some(2, 3), some(2, 4, seed=4)
        found = once(propagate.concatenate, x, y)
        agree(found, *(np.concatenate(p, -1) for p in zip(x[1:], y[1:], strict=True)))

    def test_rejects(self):
        reject = lambda *a: agreement.check_rejects(self, *a)
        reject(("dense", "(3, 2)", "4 features"), propagate.dense, some(4), np.ones((3, 2)))
        reject(("dense", "bias", "(3,)"), propagate.dense, some(3), np.ones((3, 2)), np.ones(3))
        reject(("add", "3", "4"), propagate.add, some(3), some(4))
        reject(("affine", "scale", "(4,)"), propagate.affine, some(3), np.ones(4))
        reject(("concatenate", "(2,)"), propagate.concatenate, some(3), some(2, 3))
        reject(("concatenate",), propagate.concatenate)


def sampled_conv(x, kernel, noise, strides=1, padding="SAME"):
    """Moments of activation and convolution of one image for each leading index.

    This is how the public implementation (wanggrun/Kalman-Normalization) predicts statistics.
    """
    kernel, lead = jnp.asarray(kernel), noise.ndim - 3
    conv = functools.partial(
        lax.conv_general_dilated,
        window_strides=(strides, strides),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )

    def layer(images):
        flat = jax.nn.relu(images).reshape(-1, *images.shape[lead:])
        y = conv(flat, kernel.astype(images.dtype))
        return y.reshape(*images.shape[:lead], *y.shape[1:])

    mean, deviation = (a[..., None, None, :] for a in (x.mean, jnp.sqrt(x.var)))
    y = layer(noise * deviation + mean)
    return propagate.prediction(y.mean((-3, -2)), y.var((-3, -2)))


def behind_relu(x, kernel, images):
    """Moments of a convolution of rectified numbers: in closed form, and of each image."""

    def both(images):
        sampled = jax.vmap(lambda noise: sampled_conv(x, kernel, noise))(images)
        return propagate.conv(propagate.relu(x), kernel, size=images.shape[1:-1]), sampled

    return jax.device_get(once(both, images))


class SampledTest(parameterized.TestCase):
    @parameterized.parameters(*vector_files.names("kalman_transition"))
    def test_vectors(self, name):
        """The recorded statistics lie one part of the batch after the other."""
        config, arrays = vector_files.load(name)
        parts = config["split"]
        split = lambda a: a.reshape(parts, -1)
        noise = arrays["draw_1_noise"][0]
        noise = np.moveaxis(noise.reshape(*noise.shape[:2], parts, -1), 2, 0)

        def predict(mean, var, kernel):
            moments = propagate.prediction(split(mean), split(var))
            how = dict(strides=config["stride"], padding=config["padding"])
            found = sampled_conv(moments, kernel, noise, **how)
            return found.mean.ravel(), found.var.ravel()

        @jax.jit
        def results(given, cotangents):
            found, pull = jax.vjp(predict, *given)
            return found, pull(cotangents)

        given = [arrays[k] for k in ("aux_1_mean", "aux_1_var", "param_kernel")]
        found, slopes = results(given, tuple(arrays[f"cotangent_{k}"] for k in ("mean", "var")))
        chex.assert_trees_all_close(found, (arrays["out_1_mean"], arrays["out_1_var"]), **EXACT)
        wanted = tuple(arrays[f"grad_{k}"] for k in ("aux_mean", "aux_var", "kernel"))
        chex.assert_trees_all_close(slopes, wanted, **EXACT)

    def test_large_images_approach_the_closed_form(self):
        x, kernel, size = some(3), draw(5, 3, 3, 3, 4), (60, 60)
        closed, each = behind_relu(x, kernel, draw(6, 40, *size, 3))
        for wanted, found in zip(closed[1:], each[1:], strict=True):
            error = found.std(0) / math.sqrt(40)
            np.testing.assert_array_less(np.abs(found.mean(0) - wanted), 4 * error + 1e-3)

    def test_one_small_image_is_noisy(self):
        """The statement about the public implementation: 0.1 on means of 0.5, 18 % of variances."""
        x = predicted(np.zeros(64), np.ones(64))
        kernel = draw(0, 3, 3, 64, 64) * math.sqrt(2 / (9 * 64))
        closed, each = behind_relu(x, kernel, draw(1, 50, 8, 8, 64))
        self.assertBetween(each.mean.std(0).mean(), 0.07, 0.13)
        self.assertBetween((each.var / closed.var).std(0).mean(), 0.14, 0.22)
