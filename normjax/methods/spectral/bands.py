"""Statistics of the stored spectra of maps, of each frequency or merged over bands of them.

A `spectrum` is from `transforms.forward`, `layout` that of its input. `members` is the band of each
stored frequency, as one row of `rings`; None: every frequency is a band, in the order of `rfftn`.
Statistics are [2, bands, *features], real and imaginary part.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from normjax.core import passes
from normjax.core.statistics import Moments
from normjax.methods.spectral.transforms import Layout, order, stored_weights


def rings(sizes: tuple[int, ...], number: int) -> np.ndarray:
    """The band of each stored frequency, an integer below `number`.

    The zero frequency is band 0 (alone, if there is more than one band). The others are divided by
    |k|, in cycles per position, into `number - 1` rings of equal width from 0 to the largest |k|
    that any map can have, sqrt(d) / 2; so a band means the same at every resolution, and one may be
    empty in a small map.
    """
    grids = [np.fft.fftfreq(n) for n in sizes[:-1]] + [np.fft.rfftfreq(sizes[-1])]
    square = sum(k**2 for k in np.meshgrid(*grids, indexing="ij"))
    radius = np.sqrt(square) / (math.sqrt(len(sizes)) / 2)
    return np.ceil((number - 1) * radius - 1e-9).clip(0).astype(np.int32)


def moments(
    spectrum: jax.Array,
    layout: Layout,
    members: np.ndarray | None,
    number: int,
    *,
    half: bool,
    mask: jax.Array | None = None,
) -> Moments:
    """Moments of `number` bands, of which some may be empty, over samples.

    With `half` every stored frequency counts once, instead of with its mirror image. `mask` has
    size one on the spatial axes.
    """
    if mask is not None:
        mask = jnp.transpose(mask, order(layout))[:, None]
    spatial = len(layout.spatial)
    samples = tuple(range(1 + spatial, 1 + spatial + len(layout.batch)))

    def listed(a):
        """[L, 2, *other spatial, *batch, *features] as [2, frequencies, *features]."""
        a = jnp.moveaxis(a.squeeze(samples), 0, spatial)
        return a.reshape(2, math.prod(layout.stored), *a.shape[1 + spatial :])

    parts = Moments(*map(listed, passes.moments(spectrum, samples, mask=mask)))
    if members is None:
        return parts
    shares = _memberships(members, number, parts.mean.dtype)
    if not half:
        weights = np.broadcast_to(stored_weights(layout.sizes[-1]), layout.stored)
        shares = shares * weights.reshape(1, -1).astype(shares.dtype)

    def total(a):
        return jnp.einsum("gk,pk...->pg...", shares, a, precision=lax.Precision.HIGHEST)

    count = total(parts.count)
    safe = jnp.maximum(count, 1)
    mean = total(parts.count * parts.mean) / safe
    if not half:  # mirror images cancel the imaginary part
        mean = mean * np.array([1, 0], shares.dtype).reshape(-1, *(1,) * (mean.ndim - 1))
    gap = jnp.square(parts.mean - _spread(mean, members))
    return Moments(count, mean, total(parts.count * (parts.var + gap)) / safe)


def store_rounded(
    spectrum: jax.Array, now: Moments, layout: Layout, members: np.ndarray | None, dtype: Any
) -> jax.Array:
    """`spectrum`, its distance from the mean rounded to half precision; differentiated as itself.

    The distances are divided by their scale before, so that they are within the range of `dtype`.
    The zero frequency, where cotangents with a mean are large, is real: where its imaginary part
    would be, it has what rounding left over. For a policy of `jax.checkpoint` the distances have
    the name "rounded".
    """
    _, mean, var = (unlisted(a, layout, members) for a in now)
    scale = jnp.sqrt(var + jnp.square(mean / 1000) + jnp.finfo(var.dtype).tiny)
    shape = [n if i <= len(layout.spatial) else 1 for i, n in enumerate(spectrum.shape)]
    index = lax.iota(jnp.int32, math.prod(shape)).reshape(shape)  # reverse mode keeps constants
    real, imag = index == 0, index == math.prod(shape[2:])
    exact = (lax.stop_gradient(spectrum) - mean) / scale
    left = exact - exact.astype(dtype).astype(exact.dtype)
    distance = jnp.where(imag, jnp.flip(left, 1), exact).astype(dtype)
    distance = checkpoint_name(distance, "rounded").astype(exact.dtype)
    distance = jnp.where(real, distance + jnp.flip(distance, 1), distance)
    return straight_through(jnp.where(imag, 0, distance * scale + mean), spectrum)


@jax.custom_jvp
def straight_through(value: Any, gradient_of: Any) -> Any:
    """`value`, differentiated as if it were `gradient_of`, an array or tree of arrays alike."""
    del gradient_of
    return value


straight_through.defjvp(lambda primals, tangents: (primals[0], tangents[1]))


def unlisted(a: jax.Array, layout: Layout, members: np.ndarray | None) -> jax.Array:
    """[parts, 1 or bands, *features] so that it broadcasts to a spectrum."""
    if members is not None and a.shape[1] > 1:
        a = _spread(a, members)
    parts, number, *rest = a.shape
    spatial = len(layout.spatial)
    stored = (1,) * spatial if number == 1 else layout.stored
    a = jnp.moveaxis(a.reshape(parts, *stored, *rest), spatial, 0)
    return jnp.expand_dims(a, tuple(range(1 + spatial, 1 + spatial + len(layout.batch))))


def _memberships(members, number, dtype):
    return (members == np.arange(number)[:, None]).astype(dtype)


def _spread(a, members):
    """[.., bands, ...] as [.., frequencies, ...]: each has the value of its band."""
    ones = _memberships(members, a.shape[1], a.dtype)
    return jnp.einsum("gk,pg...->pk...", ones, a, precision=lax.Precision.HIGHEST)
