"""Moments behind linear layers, sums of branches and pooling."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from normjax.core.statistics import Moments
from normjax.propagate.borders import Padding, borders, inside
from normjax.propagate.moments import common_dtype, deviation, lift, parts, prediction, row


def affine(moments: Moments, scale: Any = None, bias: Any = None) -> Moments:
    """Moments of `x * scale + bias`, both real arrays [C] or numbers; None: one and zero.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> x = nj.propagate.prediction(jnp.ones(2), jnp.ones(2))
      >>> nj.propagate.affine(x, 2.0, jnp.array([0.0, 1.0])).mean.tolist()
      [2.0, 3.0]
    """
    return _affine("affine", *parts("affine", moments, scale, bias), scale, bias)


def _affine(name, mean, var, scale, bias):
    if scale is not None:
        scale = row(name, "scale", scale, mean)
        mean, var = mean * scale, var * jnp.square(scale)
    if bias is not None:
        mean = mean + row(name, "bias", bias, mean)
    return prediction(mean, var)


def add(a: Moments, b: Moments, covariance: Any = None) -> Moments:
    """Moments of the sum of two branches [..., C], and their `covariance`, [..., C] or a number.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> x = nj.propagate.prediction(jnp.ones(2), jnp.ones(2))
      >>> nj.propagate.add(x, x).var.tolist(), nj.propagate.add(x, x, covariance=x.var).var.tolist()
      ([2.0, 2.0], [4.0, 4.0])
    """
    means, variances = _branches("add", (a, b), covariance)
    features, others = (m.shape[-1] for m in means)
    if features != others:
        raise ValueError(f"add: the branches have {features} and {others} features.")
    rank = max(m.ndim for m in means)
    mean, var = (lift(p, rank) + lift(q, rank) for p, q in (means, variances))
    if covariance is not None:
        both = lift(jnp.asarray(covariance).astype(var.dtype), rank)
        var = jnp.maximum(var + 2 * both, 0)
    return prediction(mean, var)


def concatenate(*branches: Moments) -> Moments:
    """Moments of branches [..., C_i], whose leading axes are alike, joined along the features.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> x = nj.propagate.prediction(jnp.ones(2), jnp.ones(2))
      >>> nj.propagate.concatenate(x, x, x).mean.shape
      (6,)
    """
    if not branches:
        raise ValueError("concatenate: needs the moments of at least one branch.")
    means, variances = _branches("concatenate", branches)
    lead = {mean.shape[:-1] for mean in means}
    if len(lead) > 1:
        raise ValueError(f"concatenate: the branches have unlike leading axes {sorted(lead)}.")
    return prediction(jnp.concatenate(means, -1), jnp.concatenate(variances, -1))


def dense(moments: Moments, kernel: jax.Array, bias: Any = None) -> Moments:
    """Moments of `x @ kernel + bias`: real arrays [I, O] and [O], or no bias.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> x = nj.propagate.prediction(jnp.ones(2), jnp.ones(2))
      >>> nj.propagate.dense(x, jnp.array([[1.0], [-2.0]])).var.tolist()
      [5.0]
    """
    mean, var = parts("dense", moments, kernel, bias)
    kernel = jnp.asarray(kernel).astype(mean.dtype)
    if kernel.ndim != 2 or kernel.shape[0] != mean.shape[-1]:
        raise ValueError(
            f"dense: a kernel of shape {kernel.shape} does not fit moments of {mean.shape[-1]} "
            "features: it must be [features in, features out]."
        )
    return _affine("dense", _dot(mean, kernel), _dot(var, jnp.square(kernel)), None, bias)


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
    the variances plus the variance of the means. ValueError for shapes that do not fit, an output
    without positions, or an unknown padding.

    Args:
      moments: those of the input at any position, [..., I].
      kernel: real array [*window, I / feature_group_count, O], the layout of Flax.
      bias: real array [O]; None: zero.
      size: of the input, such as (height, width).
      padding: "SAME", "SAME_LOWER", "VALID", "CIRCULAR", "CAUSAL" (one spatial axis), a number for
        all axes, or for each axis a number or a pair (low, high).
      strides, input_dilation, kernel_dilation, feature_group_count: as in `flax.linen.Conv`.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> x = nj.propagate.prediction(jnp.ones(1), jnp.zeros(1))
      >>> y = nj.propagate.conv(x, jnp.ones((3, 1, 1)), size=(4,))  # the sums are 2, 3, 3, 2
      >>> y.mean.item(), y.var.item()
      (2.5, 0.25)
    """
    mean, var = parts("conv", moments, kernel, bias)
    kernel, groups = jnp.asarray(kernel).astype(mean.dtype), feature_group_count
    features = mean.shape[-1]
    if kernel.ndim != len(size) + 2 or groups < 1 or kernel.shape[-2] * groups != features:
        raise ValueError(
            f"conv: a kernel of shape {kernel.shape} does not fit moments of {features} features, "
            f"maps of size {tuple(size)} and feature_group_count={groups}: it must be [*window, "
            "features in / groups, features out]."
        )
    if kernel.shape[-1] % groups:
        raise ValueError(f"conv: {groups} groups do not divide {kernel.shape[-1]} features.")
    kernel = kernel.reshape(*kernel.shape[:-1], groups, -1)
    dilations = input_dilation, kernel_dilation
    taps, share = borders("conv", size, kernel.shape[:-3], strides, padding, *dilations)
    means, kinds = _at_borders(mean, kernel, taps), tuple(range(-1 - share.ndim, -1))
    share = lift(jnp.asarray(share[..., None], mean.dtype), means.ndim)
    mean = jnp.sum(share * means, kinds, keepdims=True)
    spread = _at_borders(var, jnp.square(kernel), taps) + jnp.square(means - mean)
    return _affine("conv", jnp.squeeze(mean, kinds), jnp.sum(share * spread, kinds), None, bias)


def _at_borders(a, kernel, taps):
    """[..., I] as what the taps make of it at each kind of position, [..., *kinds, O]."""
    lead, (*window, within, groups, _) = a.shape[:-1], kernel.shape
    kernel = kernel.reshape(math.prod(window), *kernel.shape[-3:])
    a = a.reshape(*lead, groups, within)
    a = jnp.einsum("...gi,tigo->...tgo", a, kernel, precision=lax.Precision.HIGHEST)
    a = a.reshape(*lead, *window, -1)
    for axis, kinds in enumerate(taps, len(lead)):
        a = jnp.moveaxis(_dot(jnp.moveaxis(a, axis, -1), kinds.T.astype(a.dtype)), -1, axis)
    return a


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
    their average is larger than this: an approximation from below. `window` and `size`, that of the
    input, are such as (2, 2) and (8, 8), `padding` is as in `conv`, and `count_include_pad` says
    whether its zeros count.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> x = nj.propagate.prediction(jnp.ones(3), jnp.ones(3))
      >>> nj.propagate.average_pool(x, (2, 2), size=(8, 8), strides=2).var.tolist()
      [0.25, 0.25, 0.25]
    """
    mean, var = parts("average_pool", moments)
    number, share = inside("average_pool", size, window, strides, padding)
    divisor = math.prod(window) if count_include_pad else number
    part = number / divisor
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
    """Moments of maxima over windows, over samples and positions; arguments as in `average_pool`.

    Exact for independent normal positions: the maximum of n of them has a mean and a variance that
    are known multiples of the deviation and the variance. An approximation behind a ReLU, and for
    maps whose neighbours are alike, where the maximum is lower.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> x = nj.propagate.prediction(jnp.zeros(1), jnp.ones(1))
      >>> y = nj.propagate.max_pool(x, (2,), size=(8,), strides=2)  # mean 1 / sqrt(pi)
      >>> f"{y.mean.item():.4f} {y.var.item():.4f}"
      '0.5642 0.6817'
    """
    mean, var = parts("max_pool", moments)
    number, share = inside("max_pool", size, window, strides, padding)
    shift, shrink = np.array([_largest_of(int(n)) for n in number]).T
    level = np.sum(share * shift)
    factor = np.sum(share * (shrink + np.square(shift - level)))
    return prediction(mean + deviation(mean, var) * float(level), var * float(factor))


@functools.cache
def _largest_of(number):
    """Mean and variance of the largest of `number` independent standard normal numbers."""
    x = np.linspace(-12, 12, 4801)
    below = np.array([math.erfc(-a / math.sqrt(2)) / 2 for a in x])
    density = number * np.exp(-np.square(x) / 2) * below ** (number - 1)
    density /= density.sum()
    mean = np.sum(density * x)
    return mean, np.sum(density * np.square(x - mean))


def _branches(name, branches, *others):
    """The means and the variances of branches, in one dtype."""
    found = [parts(name, branch, *others) for branch in branches]
    dtype = common_dtype(*(mean for mean, _ in found))
    return zip(*([a.astype(dtype) for a in pair] for pair in found), strict=True)


def _dot(a, b):
    return jnp.einsum("...i,io->...o", a, b, precision=lax.Precision.HIGHEST)
