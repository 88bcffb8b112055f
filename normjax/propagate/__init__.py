"""Moments pushed through the layers of a network: what the statistics behind a layer should be.

Wang, Peng, Luo, Wang & Lin, *Kalman Normalization*, 2018, https://arxiv.org/abs/1802.03133, predict
the statistics of a layer from those of the one before. The functions here take the mean and the
variance of every channel, of shape [..., C] with the features last and any leading axes (groups of
a batch, say), and return those of the output of one layer. Their `count` is zero: nothing was
counted. Everything takes O(C) work besides the products with a kernel: no map is made.

The assumptions: channels are independent of one another and normally distributed, positions of a
map are independent and alike, and the output of every layer is taken to be so again. Under them all
is exact but what the docstrings call approximate. All functions are differentiable, with finite
derivatives also where a variance is zero.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from normjax.core import checks, passes
from normjax.core.structs import Moments

__all__ = [
    "activation",
    "add",
    "affine",
    "average_pool",
    "concatenate",
    "conv",
    "dense",
    "gelu",
    "leaky_relu",
    "max_pool",
    "pointwise",
    "prediction",
    "relu",
    "sampled_conv",
    "sigmoid",
    "tanh",
]

NODES = 64  # of the Gauss-Hermite quadrature
Padding = str | int | Sequence[int | tuple[int, int]]


def prediction(mean: Any, var: Any) -> Moments:
    """Moments that nobody counted, with the larger shape of `mean` and `var`.

    Args:
      mean: real array [..., C].
      var: real array [..., C], >= 0.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> nj.propagate.prediction(jnp.zeros(2), jnp.ones(2)).var.tolist()
      [1.0, 1.0]
    """
    mean, var = jnp.asarray(mean), jnp.asarray(var)
    dtype = _dtype(mean, var)
    shape = jnp.broadcast_shapes(mean.shape, var.shape)
    mean, var = (jnp.broadcast_to(a.astype(dtype), shape) for a in (mean, var))
    return Moments(jnp.zeros_like(var), mean, var)


def affine(moments: Moments, scale: Any = None, bias: Any = None) -> Moments:
    """Moments of `x * scale + bias`.

    Args:
      moments: those of x, [..., C].
      scale: real array [C], or a number; None: one.
      bias: real array [C], or a number; None: zero.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> x = nj.propagate.prediction(jnp.ones(2), jnp.ones(2))
      >>> nj.propagate.affine(x, 2.0, jnp.array([0.0, 1.0])).mean.tolist()
      [2.0, 3.0]
    """
    mean, var = _parts("affine", moments, scale, bias)
    scale, bias = (_row("affine", name, a, mean) for name, a in (("scale", scale), ("bias", bias)))
    if scale is not None:
        mean, var = mean * scale, var * jnp.square(scale)
    return prediction(mean if bias is None else mean + bias, var)


def add(a: Moments, b: Moments, covariance: Any = None) -> Moments:
    """Moments of the sum of two branches.

    Args:
      a: moments [..., C].
      b: moments [..., C].
      covariance: of the two, an array [..., C] or a number; None: zero, as for independent
        branches.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> x = nj.propagate.prediction(jnp.ones(2), jnp.ones(2))
      >>> nj.propagate.add(x, x).var.tolist(), nj.propagate.add(x, x, covariance=x.var).var.tolist()
      ([2.0, 2.0], [4.0, 4.0])
    """
    mean, var = _parts("add", a, covariance)
    other_mean, other_var = _parts("add", b, mean)
    mean, var = mean.astype(other_mean.dtype), var.astype(other_var.dtype)
    rank = max(mean.ndim, other_mean.ndim)
    if mean.shape[-1] != other_mean.shape[-1]:
        raise ValueError(
            f"add: the branches have {mean.shape[-1]} and {other_mean.shape[-1]} features."
        )
    mean, var, other_mean, other_var = (_lift(m, rank) for m in (mean, var, other_mean, other_var))
    var = var + other_var
    if covariance is not None:
        both = _lift(jnp.asarray(covariance).astype(var.dtype), rank)
        var = jnp.maximum(var + 2 * both, 0)
    return prediction(mean + other_mean, var)


def concatenate(*branches: Moments) -> Moments:
    """Moments of branches joined along the features.

    Args:
      *branches: moments [..., C_i] with the same leading axes.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> x = nj.propagate.prediction(jnp.ones(2), jnp.ones(2))
      >>> nj.propagate.concatenate(x, x, x).mean.shape
      (6,)
    """
    if not branches:
        raise ValueError("concatenate: needs the moments of at least one branch.")
    parts = [_parts("concatenate", branch) for branch in branches]
    lead = {mean.shape[:-1] for mean, _ in parts}
    if len(lead) > 1:
        raise ValueError(f"concatenate: the branches have unlike leading axes {sorted(lead)}.")
    dtype = _dtype(*(mean for mean, _ in parts))
    mean, var = (
        jnp.concatenate([a.astype(dtype) for a in p], -1) for p in zip(*parts, strict=True)
    )
    return prediction(mean, var)


def dense(moments: Moments, kernel: jax.Array, bias: Any = None) -> Moments:
    """Moments of `x @ kernel + bias`.

    Args:
      moments: those of x, [..., I].
      kernel: real array [I, O].
      bias: real array [O]; None: zero.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> x = nj.propagate.prediction(jnp.ones(2), jnp.ones(2))
      >>> nj.propagate.dense(x, jnp.array([[1.0], [-2.0]])).var.tolist()
      [5.0]
    """
    mean, var = _parts("dense", moments, kernel, bias)
    kernel = jnp.asarray(kernel).astype(mean.dtype)
    if kernel.ndim != 2 or kernel.shape[0] != mean.shape[-1]:
        raise ValueError(
            f"dense: a kernel of shape {kernel.shape} does not fit moments of {mean.shape[-1]} "
            "features: it must be [features in, features out]."
        )
    mean, var = _dot(mean, kernel), _dot(var, jnp.square(kernel))
    bias = _row("dense", "bias", bias, mean)
    return prediction(mean if bias is None else mean + bias, var)


def conv(
    moments: Moments,
    kernel: jax.Array,
    bias: Any = None,
    *,
    size: Sequence[int],
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    input_dilation: int | Sequence[int] = 1,
    kernel_dilation: int | Sequence[int] = 1,
    feature_group_count: int = 1,
) -> Moments:
    """Moments, over samples and positions, of a convolution with as many spatial axes as `size`.

    Near the border a window sees zeros of the padding, so that mean and variance depend on the
    position. The moments over all positions are exact: the mean of the means there, and the mean of
    the variances plus the variance of the means. Positions differ only in which taps of each axis
    lie inside, so that a map of one position of each kind will do.

    Args:
      moments: those of the input at any position, [..., I].
      kernel: real array [*window, I / feature_group_count, O], the layout of Flax.
      bias: real array [O]; None: zero.
      size: of the input, such as (height, width).
      strides: for each spatial axis, or one for all.
      padding: "SAME", "SAME_LOWER", "VALID", "CIRCULAR", "CAUSAL" (one spatial axis), a number for
        all axes, or for each axis a number or a pair (low, high).
      input_dilation: for each spatial axis, or one for all.
      kernel_dilation: likewise.
      feature_group_count: number of groups of features.

    Raises:
      ValueError: for shapes that do not fit, an output without positions, or an unknown padding.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> x = nj.propagate.prediction(jnp.ones(1), jnp.zeros(1))
      >>> y = nj.propagate.conv(x, jnp.ones((3, 1, 1)), size=(4,))  # the sums are 2, 3, 3, 2
      >>> y.mean.item(), y.var.item()
      (2.5, 0.25)
    """
    mean, var = _parts("conv", moments, kernel, bias)
    kernel = jnp.asarray(kernel).astype(mean.dtype)
    size = tuple(size)
    groups, rank, features = feature_group_count, len(size), mean.shape[-1]
    if kernel.ndim != rank + 2 or groups < 1 or kernel.shape[-2] * groups != features:
        raise ValueError(
            f"conv: a kernel of shape {kernel.shape} does not fit moments of {features} features, "
            f"maps of size {size} and feature_group_count={groups}: it must be [*window, features "
            "in / groups, features out]."
        )
    if kernel.shape[-1] % groups:
        raise ValueError(f"conv: {groups} groups do not divide {kernel.shape[-1]} features.")
    taps, shares = _borders(
        "conv", size, kernel.shape[:rank], strides, padding, input_dilation, kernel_dilation
    )
    lead, window = mean.shape[:-1], kernel.shape[:rank]
    split = kernel.reshape(math.prod(window), features // groups, groups, -1)

    def at_borders(a, split):
        """[..., I] as what the taps make of it at each kind of position, [..., *kinds, O]."""
        a = a.reshape(*lead, groups, features // groups)
        a = jnp.einsum("...gi,tigo->...tgo", a, split, precision=lax.Precision.HIGHEST)
        a = a.reshape(*lead, *window, -1)
        for axis, inside in enumerate(taps, len(lead)):
            a = jnp.moveaxis(_dot(jnp.moveaxis(a, axis, -1), inside.T.astype(a.dtype)), -1, axis)
        return a

    share = functools.reduce(np.multiply.outer, shares, np.ones(()))
    share = jnp.asarray(share, mean.dtype).reshape(*(1,) * len(lead), *share.shape, 1)
    kinds = tuple(range(len(lead), len(lead) + rank))
    means = at_borders(mean, split)
    mean = jnp.sum(share * means, kinds, keepdims=True)
    spread = at_borders(var, jnp.square(split)) + jnp.square(means - mean)
    mean, var = jnp.squeeze(mean, kinds), jnp.sum(share * spread, kinds)
    bias = _row("conv", "bias", bias, mean)
    return prediction(mean if bias is None else mean + bias, var)


def sampled_conv(
    moments: Moments,
    kernel: jax.Array,
    noise: jax.Array,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    input_dilation: int | Sequence[int] = 1,
    kernel_dilation: int | Sequence[int] = 1,
    feature_group_count: int = 1,
    activation: Callable[[jax.Array], jax.Array] | None = jax.nn.relu,
) -> Moments:
    """Moments of activation and convolution of one Gaussian image: a noisy `conv(relu(...))`.

    What the public implementation of the paper (wanggrun/Kalman-Normalization) does: it draws an
    image with the given moments, runs it through the layer, and takes mean and variance over the
    positions of the output.

    Args:
      moments: those of the input of the activation, [..., I].
      kernel: as in `conv`.
      noise: standard normal numbers [..., *size, I], an image for every leading index.
      strides, padding, input_dilation, kernel_dilation, feature_group_count: as in `conv`; of the
        paddings by name only "SAME", "SAME_LOWER" and "VALID".
      activation: pointwise function in front of the convolution, or None.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> x = nj.propagate.prediction(jnp.zeros(3), jnp.ones(3))
      >>> noise = jax.random.normal(jax.random.key(0), (8, 8, 3))
      >>> nj.propagate.sampled_conv(x, jnp.ones((3, 3, 3, 5)), noise).mean.shape
      (5,)
    """
    mean, var = _parts("sampled_conv", moments, kernel, noise)
    kernel, noise = (jnp.asarray(a).astype(mean.dtype) for a in (kernel, noise))
    rank, lead = kernel.ndim - 2, mean.shape[:-1]
    size = noise.shape[len(lead) : -1]
    if noise.shape != (*lead, *size, mean.shape[-1]) or len(size) != rank or rank < 1:
        raise ValueError(
            f"sampled_conv: noise of shape {noise.shape} does not fit moments of shape "
            f"{mean.shape} and a kernel of shape {kernel.shape}."
        )
    flat = (math.prod(lead), *(1,) * rank, -1)
    image = noise.reshape(-1, *size, mean.shape[-1])
    image = image * _deviation(mean, var).reshape(flat) + mean.reshape(flat)
    spatial = "".join(chr(ord("a") + i) for i in range(rank))
    y = lax.conv_general_dilated(
        image if activation is None else activation(image),
        kernel,
        _each("sampled_conv", rank, strides),
        padding if isinstance(padding, str) else _pairs("sampled_conv", rank, padding),
        _each("sampled_conv", rank, input_dilation),
        _each("sampled_conv", rank, kernel_dilation),
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        feature_group_count=feature_group_count,
        precision=lax.Precision.HIGHEST,
    )
    found = passes.moments(y, tuple(range(1, rank + 1)))
    return prediction(*(a.reshape(*lead, -1) for a in (found.mean, found.var)))


def relu(moments: Moments) -> Moments:
    """Moments of `max(x, 0)`, in closed form.

    With t = mean / deviation, density p and distribution function P of a standard normal number:
    the mean is `mean P(t) + deviation p(t)`, and the variance `var` times `t² P(t) P(-t) + P(t) +
    t p(t) (P(-t) - P(t)) - p(t)²`, in which no large terms cancel for t > 0. For t = -10 rounding
    is about 1e-3 of it in float32.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> y = nj.propagate.relu(nj.propagate.prediction(jnp.zeros(1), jnp.ones(1)))
      >>> f"{y.mean.item():.4f} {y.var.item():.4f}"
      '0.3989 0.3408'
    """
    mean, var = _parts("relu", moments)
    positive, share, _ = _rectified(mean, var)
    return prediction(positive, var * share)


def leaky_relu(moments: Moments, negative_slope: Any = 0.01) -> Moments:
    """Moments of `x` where positive, else `negative_slope * x`, in closed form.

    That is a mixture of x and its ReLU, whose covariance is `var` times the probability of x > 0
    (Stein's lemma).

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> y = nj.propagate.leaky_relu(nj.propagate.prediction(jnp.zeros(1), jnp.ones(1)), 1.0)
      >>> y.mean.item(), y.var.item()
      (0.0, 1.0)
    """
    mean, var = _parts("leaky_relu", moments)
    positive, share, above = _rectified(mean, var)
    slope = jnp.asarray(negative_slope, mean.dtype)
    bend = 1 - slope
    share = jnp.square(slope) + jnp.square(bend) * share + 2 * slope * bend * above
    return prediction(slope * mean + bend * positive, var * share)


def gelu(moments: Moments, approximate: bool = True) -> Moments:
    """Moments of `jax.nn.gelu(x, approximate)`.

    The mean of x P(x), `approximate=False`, is in closed form; all else by quadrature, with the
    errors of `pointwise`.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> x = nj.propagate.prediction(jnp.zeros(1), jnp.ones(1))
      >>> f"{nj.propagate.gelu(x, approximate=False).mean.item():.4f}"
      '0.2821'
    """
    if approximate:
        return pointwise(moments, jax.nn.gelu)
    mean, var = _parts("gelu", moments)
    root = jnp.sqrt(1 + var)
    exact = mean * _below(mean / root) + var / root * _density(mean / root)
    by_nodes = pointwise(moments, functools.partial(jax.nn.gelu, approximate=False))
    return prediction(exact, by_nodes.var)


def tanh(moments: Moments) -> Moments:
    """Moments of `tanh(x)`, by the quadrature of `pointwise`.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> y = nj.propagate.tanh(nj.propagate.prediction(jnp.zeros(1), jnp.ones(1)))
      >>> f"{y.var.item():.4f}"
      '0.3943'
    """
    return pointwise(moments, jnp.tanh)


def sigmoid(moments: Moments) -> Moments:
    """Moments of `1 / (1 + exp(-x))`, by the quadrature of `pointwise`.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> y = nj.propagate.sigmoid(nj.propagate.prediction(jnp.zeros(1), jnp.ones(1)))
      >>> f"{y.mean.item():.4f} {y.var.item():.4f}"
      '0.5000 0.0434'
    """
    return pointwise(moments, jax.nn.sigmoid)


def pointwise(moments: Moments, function: Callable[[jax.Array], jax.Array]) -> Moments:
    """Moments of `function(x)` for normal x, by Gauss-Hermite quadrature with 64 nodes.

    Of GELU, SiLU, tanh and sigmoid, for means between -5 and 5, the error of the mean, in
    deviations of x, and that of the variance, in variances of x, are below 1e-8 for deviations up
    to 1, below 3e-4 up to 3, and below 5e-3 up to 10.

    Args:
      moments: those of x, [..., C].
      function: pointwise, and smooth: a kink at distance t deviations from the mean costs accuracy.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> x = nj.propagate.prediction(jnp.ones(1), jnp.ones(1))
      >>> y = nj.propagate.pointwise(x, jnp.square)
      >>> f"{y.mean.item():.4f} {y.var.item():.4f}"
      '2.0000 6.0000'
    """
    mean, var = _parts("pointwise", moments)
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    nodes, weights = (a.reshape(-1, *(1,) * mean.ndim) for a in (nodes, weights / weights.sum()))
    nodes, weights = (jnp.asarray(a, mean.dtype) for a in (nodes, weights))
    # A smaller variance would drown in rounding; in the limit, that of the output is proportional.
    least = lax.stop_gradient(jnp.finfo(mean.dtype).eps * (1 + jnp.square(mean)))
    enough = jnp.where(var > least, var, least)
    values = function(mean[None] + jnp.sqrt(enough)[None] * nodes)
    if values.shape != (NODES, *mean.shape):
        raise ValueError(f"pointwise: {function!r} changes the shape of its input.")
    centre = jnp.sum(weights * values, 0)
    spread = jnp.sum(weights * jnp.square(values - centre[None]), 0)
    return prediction(centre, var * (spread / enough))


def activation(moments: Moments, function: Callable[[jax.Array], jax.Array] | None) -> Moments:
    """Moments of a pointwise function: in closed form for `jax.nn.relu`, else by quadrature.

    Args:
      moments: those of the input, [..., C].
      function: `jax.nn.relu`, `jax.nn.leaky_relu` or any smooth pointwise function; None is the
        identity.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> x = nj.propagate.prediction(jnp.zeros(1), jnp.ones(1))
      >>> f"{nj.propagate.activation(x, jax.nn.relu).mean.item():.4f}"
      '0.3989'
    """
    if function is None:
        return prediction(*_parts("activation", moments))
    if function is jax.nn.relu:
        return relu(moments)
    if function is jax.nn.leaky_relu:
        return leaky_relu(moments)
    return pointwise(moments, function)


def average_pool(
    moments: Moments,
    window: Sequence[int],
    *,
    size: Sequence[int],
    strides: int | Sequence[int] = 1,
    padding: Padding = "VALID",
    count_include_pad: bool = True,
) -> Moments:
    """Moments of averages over windows, over samples and positions.

    Exact for independent positions. Neighbours on a real map are alike, so that the variance of
    their average is larger than this: an approximation from below.

    Args:
      moments: those of the input at any position, [..., C].
      window: size of a window, such as (2, 2); `size` for the average of the whole map.
      size: of the input.
      strides, padding: as in `conv`.
      count_include_pad: whether the zeros of the padding count, as in `flax.linen.avg_pool`.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> x = nj.propagate.prediction(jnp.ones(3), jnp.ones(3))
      >>> nj.propagate.average_pool(x, (2, 2), size=(8, 8), strides=2).var.tolist()
      [0.25, 0.25, 0.25]
    """
    mean, var = _parts("average_pool", moments)
    inside, share = _inside("average_pool", size, window, strides, padding)
    divisor = math.prod(window) if count_include_pad else inside
    part = inside / divisor
    level = np.sum(share * part)
    spread = np.sum(share * np.square(part - level))
    noise = np.sum(share * part / divisor)
    return prediction(mean * float(level), var * float(noise) + jnp.square(mean) * float(spread))


def max_pool(
    moments: Moments,
    window: Sequence[int],
    *,
    size: Sequence[int],
    strides: int | Sequence[int] = 1,
    padding: Padding = "VALID",
) -> Moments:
    """Moments of maxima over windows, over samples and positions.

    Exact for independent normal positions: the maximum of n of them has a mean and a variance that
    are known multiples of the deviation and the variance. An approximation behind a ReLU, and for
    maps whose neighbours are alike, where the maximum is lower.

    Args:
      moments: those of the input at any position, [..., C].
      window: size of a window, such as (2, 2).
      size: of the input.
      strides, padding: as in `conv`; the padding never is the maximum.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> x = nj.propagate.prediction(jnp.zeros(1), jnp.ones(1))
      >>> y = nj.propagate.max_pool(x, (2,), size=(8,), strides=2)  # mean 1 / sqrt(pi)
      >>> f"{y.mean.item():.4f} {y.var.item():.4f}"
      '0.5642 0.6817'
    """
    mean, var = _parts("max_pool", moments)
    inside, share = _inside("max_pool", size, window, strides, padding)
    shift, shrink = np.array([_largest_of(int(n)) for n in inside]).T
    level = np.sum(share * shift)
    factor = np.sum(share * (shrink + np.square(shift - level)))
    return prediction(mean + _deviation(mean, var) * float(level), var * float(factor))


@functools.cache
def _largest_of(number):
    """Mean and variance of the largest of `number` independent standard normal numbers."""
    x = np.linspace(-12, 12, 4801)
    below = np.array([math.erfc(-a / math.sqrt(2)) / 2 for a in x])
    density = number * np.exp(-np.square(x) / 2) * below ** (number - 1)
    density /= density.sum()
    mean = np.sum(density * x)
    return mean, np.sum(density * np.square(x - mean))


def _parts(name, moments, *others):
    """Mean and variance in a dtype wide enough for `others` too."""
    if not isinstance(moments, Moments):
        raise TypeError(
            f"{name}: {type(moments).__name__} is no Moments: make one by "
            "`propagate.prediction(mean, var)`."
        )
    mean, var = jnp.asarray(moments.mean), jnp.asarray(moments.var)
    if mean.shape != var.shape or not mean.ndim:
        raise ValueError(
            f"{name}: a mean of shape {mean.shape} and a variance of shape {var.shape}: both must "
            "be [..., features]."
        )
    dtype = _dtype(mean, var, *(a for a in others if a is not None))
    return mean.astype(dtype), var.astype(dtype)


def _dtype(*arrays):
    """At least float32, and float64 if any array has it; numbers of Python have no say."""
    kinds = [checks.real("propagate", a).dtype for a in arrays if not checks.is_number(a)]
    return max(map(passes.wide, kinds), key=lambda dtype: dtype.itemsize)


def _row(name, field, value, like):
    """`value` as a number or an array that broadcasts along the features of `like`, or None."""
    if value is None:
        return None
    value = jnp.asarray(value, like.dtype)
    if value.ndim > 1 or value.shape not in ((), like.shape[-1:]):
        raise ValueError(
            f"{name}: {field} of shape {value.shape} does not fit {like.shape[-1]} features."
        )
    return _lift(value, like.ndim)


def _lift(a, rank):
    return jnp.expand_dims(a, tuple(range(rank - a.ndim)))


def _dot(a, b):
    return jnp.einsum("...i,io->...o", a, b, precision=lax.Precision.HIGHEST)


def _deviation(mean, var):
    """`sqrt(var)`, or so little that mean / deviation and derivatives are finite."""
    least = lax.stop_gradient(1e-6 * jnp.square(mean) + 1e-30)
    return jnp.sqrt(jnp.where(var > least, var, least))


def _density(t):
    return jnp.exp(-jnp.square(t) / 2) / math.sqrt(2 * math.pi)


@jax.custom_jvp
def _below(t):
    return lax.erfc(t * (-1 / math.sqrt(2))) / 2


# That of `lax.erfc` itself does not run on values that vary over the devices of a `shard_map`.
@_below.defjvp
def _(primals, tangents):
    return _below(*primals), _density(*primals) * tangents[0]


def _rectified(mean, var):
    """Mean of the ReLU, its variance by that of x, and the probability that x is positive."""
    deviation = _deviation(mean, var)
    t = mean / deviation
    above, under, density = _below(t), _below(-t), _density(t)
    share = jnp.square(t) * above * under + above + t * density * (under - above)
    share = jnp.maximum(share - jnp.square(density), 0)
    return mean * above + deviation * density, share, above


def _borders(
    name: str,
    size: Sequence[int],
    window: Sequence[int],
    strides: int | Sequence[int],
    padding: Padding,
    input_dilation: int | Sequence[int] = 1,
    kernel_dilation: int | Sequence[int] = 1,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each axis the taps of a window that lie inside, of each kind of position, and its share.

    Returns:
      Boolean arrays [kinds, window], and arrays [kinds] with sum one.
    """
    size, window, rank = tuple(size), tuple(window), len(size)
    if not rank or len(window) != rank or not all(n > 0 for n in (*size, *window)):
        raise ValueError(
            f"{name}: size={size} and a window of {window}: for each spatial axis both need a "
            "positive number."
        )
    strides, dilated, spread = (
        _each(name, rank, a) for a in (strides, input_dilation, kernel_dilation)
    )
    lengths = [(n - 1) * d + 1 for n, d in zip(size, dilated, strict=True)]
    reach = [(k - 1) * d + 1 for k, d in zip(window, spread, strict=True)]
    wraps = padding == "CIRCULAR"
    if wraps:
        pads = [((r - 1) // 2, r // 2) for r in reach]
    elif padding == "CAUSAL" and rank == 1:
        pads = [(reach[0] - 1, 0)]
    elif isinstance(padding, str):
        if padding not in ("SAME", "SAME_LOWER", "VALID"):
            raise ValueError(f"{name}: padding={padding!r} is not one whose moments are known.")
        if any(d > 1 for d in dilated):
            raise ValueError(f"{name}: padding={padding!r} with input_dilation={input_dilation}.")
        pads = lax.padtype_to_pads(size, reach, strides, padding)
    else:
        pads = _pairs(name, rank, padding)
    taps, shares = [], []
    for n, k, s, d, r, inner, (low, high) in zip(
        lengths, window, strides, spread, reach, dilated, pads, strict=True
    ):
        number = (n + low + high - r) // s + 1
        if number < 1:
            raise ValueError(
                f"{name}: a window of {window} does not fit into maps of size {size} with "
                f"padding={padding!r}."
            )
        at = np.arange(number)[:, None] * s + np.arange(k) * d - low
        valid = (at >= 0) & (at < n) | wraps
        kinds, counts = np.unique(valid & (at % inner == 0), axis=0, return_counts=True)
        taps.append(kinds)
        shares.append(counts / number)
    return taps, shares


def _inside(name, size, window, strides, padding):
    """How many positions of a window lie inside, and the share of such windows, both [kinds]."""
    taps, shares = _borders(name, size, window, strides, padding)
    inside = functools.reduce(np.multiply.outer, [kinds.sum(1) for kinds in taps]).ravel()
    if not inside.all():
        raise ValueError(f"{name}: with padding={padding!r} a window lies in the padding alone.")
    return inside, functools.reduce(np.multiply.outer, shares).ravel()


def _each(name, rank, value):
    """One positive integer for each spatial axis."""
    values: tuple[Any, ...] = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(values) != rank or not all(isinstance(v, int | np.integer) and v > 0 for v in values):
        raise ValueError(
            f"{name}: {value!r} is not a positive integer, or one for each of {rank} spatial axes."
        )
    return values


def _pairs(name, rank, padding):
    """A pair (low, high) for each spatial axis."""
    each = (padding,) * rank if isinstance(padding, int) else tuple(padding)
    pairs: list[Any] = [(p, p) if isinstance(p, int) else tuple(p) for p in each]
    if len(pairs) != rank or not all(len(p) == 2 for p in pairs):
        raise ValueError(f"{name}: padding={padding!r} does not fit {rank} spatial axes.")
    return pairs
