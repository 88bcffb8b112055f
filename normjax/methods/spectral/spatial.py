"""Statistics of whole spectra without a transform, and constants added to whole spectra.

All frequencies of a map sum to `positions` times its value at the origin, the stored ones to a
functional of the row through the origin along the last axis; their squares follow from those of the
map (Parseval). So the mean of a spectrum is a functional of a patch, the origin or that row, and a
constant spectrum is a map within it.

Of n samples, r x and i x are real and imaginary part of the mean spectrum, and z is x less the map
of that mean. The half plane has L columns, W of the plane, m of them their own mirror images; F is
a sum along the last axis (of even size: of its even and of its odd positions). g: cotangents.

    moments   var = sum(z^2) / n                 dvar = 2 sum(z dx) / n
              transpose: (r' greal + i' gimag + 2 z gvar) / n, r' and i' being maps in the patch
    of half   var = (W sum(z^2) + m sum((F z)^2)) / (2 L n) + m (i x)^2 / L
              dvar = (W sum(z dx) + m sum(F z F dx)) / (L n), transpose: W z + m F' F z for 2 L z
    affine    y = x a + e                        dy = dx a + x da + de, e and de in the patch
              transpose: g a, sum(g x), sum(g) in the patch
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from normjax.core import groups, passes
from normjax.core.cpu import fence
from normjax.core.linear import Input, differentiated
from normjax.core.passes import keep, wide, widen
from normjax.core.sharding import spec
from normjax.core.statistics import Moments
from normjax.methods.spectral.transforms import Layout


class _Patch(NamedTuple):
    """The axes at whose index 0 the patch lies, and its tables, which broadcast to the input."""

    axes: tuple[int, ...]
    at: np.ndarray  # 1 in the patch, 0 outside
    real: np.ndarray  # patch -> real part of the mean of the (unscaled) spectrum
    imag: np.ndarray  # patch -> imaginary part
    of_one: np.ndarray  # the map whose spectrum is 1, restricted to the patch
    of_i: np.ndarray  # the map that the inverse makes of the stored spectrum i


def _patch(layout, half, dtype):
    axes = layout.spatial[:-1] if half else layout.spatial
    at = np.zeros([n if i in axes else 1 for i, n in enumerate(layout.shape)])
    at[(0,) * at.ndim] = 1
    one, zero = np.ones((1,) * at.ndim), np.zeros((1,) * at.ndim)
    tables = one, zero, one, zero
    if half:
        width, stored, mirrors = _columns(layout)
        w, even = np.arange(width), mirrors == 2
        origin = (w == 0).astype(float)
        real = (width * origin + 1 + even * (-1.0) ** w) / (2 * stored)
        angle = np.pi * w[1:] / width
        last = np.cos(angle) if even else 1
        sines = np.append(0, (np.cos(angle) - (-1.0) ** w[1:] * last) / (2 * np.sin(angle)))
        shape = [width if i == layout.spatial[-1] else 1 for i in range(at.ndim)]
        row = (real, -sines / stored, origin, -2 * sines / width)
        tables = (t.reshape(shape) for t in row)
    return _Patch(axes, *(t.astype(dtype) for t in (at, *tables)))


def _columns(layout):
    """How many columns the plane has, and the half plane; how many are their own mirror images."""
    width = layout.sizes[-1]
    return width, layout.stored[-1], 2 - width % 2


def moments(
    x: jax.Array | Input, layout: Layout, *, half: bool, mask: jax.Array | None = None
) -> Moments:
    """Moments [2, ...] of the orthonormal spectrum of `x` over samples and all frequencies.

    They are of real and imaginary part, the variance of both in the first, with size one where `x`
    has no features. `half`: of all stored frequencies alike, instead of the full plane. `x` is zero
    where `mask`, of size one on the spatial axes, is False.
    """
    whole = tuple(1 if i in layout.spatial else n for i, n in enumerate(layout.shape))
    if mask is None:
        shape = tuple(n if i in layout.features else 1 for i, n in enumerate(whole))
        count = jnp.full(shape, math.prod(whole) / math.prod(shape), wide(x.dtype))
    else:
        mask_of_maps = jnp.broadcast_to(mask, whole)
        count = jnp.sum(mask_of_maps, layout.batch, dtype=wide(x.dtype), keepdims=True)
    real, imag, var = _moments(passes.carried(x), mask, jnp.maximum(count, 1), layout, half)
    positions = math.prod(layout.sizes)
    mean = jnp.stack([real, imag]) / math.sqrt(positions)
    var = jnp.stack([var, jnp.zeros_like(var)]) / positions
    return Moments(jnp.broadcast_to(count, mean.shape), mean, var)


def _origin(x, axis):
    """True at index 0 of an axis, of the rank of `x`."""
    others = tuple(i for i in range(x.ndim) if i != axis)
    return np.expand_dims(np.arange(x.shape[axis]) == 0, others)


def _slice(x, axes):
    for axis in axes:
        if spec(x)[axis] is None:
            x = lax.slice_in_dim(x, 0, 1, axis=axis)
        else:  # sharded over an Explicit mesh, where only sums may leave one position
            x = jnp.sum(keep(jnp.asarray(_origin(x, axis)), x), axis, keepdims=True)
    return x


def _mean(x, n, layout, patch):
    """Real and imaginary part of the mean of the unscaled spectrum."""
    row = jnp.sum(widen(_slice(x, patch.axes)), layout.batch, keepdims=True) / n
    return [jnp.sum(row * a, layout.spatial, keepdims=True) for a in (patch.real, patch.imag)]


def _centre(x, real, imag, mask, patch):
    """The input less the map of its mean spectrum."""
    return keep(mask, widen(x) - patch.at * (real * patch.of_one + imag * patch.of_i))


def _fold(x, layout):
    """Sums along the last spatial axis; of even size: of its even and of its odd positions."""
    axis, width = layout.spatial[-1], layout.sizes[-1]
    if width % 2:
        return jnp.sum(widen(x), axis, keepdims=True)
    return jnp.sum(widen(*fence(groups.split(x, axis, width // 2))), axis)


def _unfold(e, x, layout):
    """The transpose of `_fold`: every position gets the sum that it entered."""
    axis, width = layout.spatial[-1], layout.sizes[-1]
    if width % 2:
        return e
    shape = (*e.shape[:axis], width // 2, *e.shape[axis:])
    return groups.join(jnp.broadcast_to(jnp.expand_dims(e, axis), shape), axis, like=x)


def _folds(x, layout):
    """`_fold` in a pass of its own."""
    return fence(_fold(fence(x)[0], layout))[0]


def _centre_folds(folds, real, imag, mask, layout, patch):
    """What `_folds` makes of the centred input, from what it makes of the input."""
    row = jnp.asarray(patch.at) * _fold(real * patch.of_one + imag * patch.of_i, layout)
    return folds - keep(mask, row)


def _energy(x, real, imag, mask, layout, patch):
    """Sum of squares of the centred input, which is the input but for what `_slice` keeps of it."""
    x, real, imag = fence(x, real, imag)
    if not patch.axes:
        z = _centre(x, real, imag, mask, patch)
        return jnp.sum(jnp.square(z), layout.samples, keepdims=True)
    axis = patch.axes[0]
    rest = tuple(i for i in layout.samples if i != axis)
    rows = fence(jnp.sum(jnp.square(widen(x)), rest, keepdims=True))[0]
    rows = jnp.sum(keep(jnp.asarray(~_origin(x, axis)), rows), axis, keepdims=True)
    patch = patch._replace(at=patch.at.take([0], axis))
    z = _centre(_slice(x, (axis,)), real, imag, mask, patch)
    return rows + jnp.sum(jnp.square(z), layout.samples, keepdims=True)


def _moments_tangent(layout, half, saved, tangents):
    (x, real, imag, folds, mask, n), (dx,) = saved, tangents
    patch = _patch(layout, half, n.dtype)
    dx = keep(mask, widen(dx))
    dreal, dimag = _mean(dx, n, layout, patch)
    z = _centre(x, real, imag, mask, patch)
    slope = 2 * jnp.sum(z * dx, layout.samples, keepdims=True)
    if half:
        width, stored, mirrors = _columns(layout)
        folds = _centre_folds(folds, real, imag, mask, layout, patch)
        both = jnp.sum(folds * _fold(dx, layout), layout.samples, keepdims=True)
        slope = (width * slope + 2 * mirrors * both) / (2 * stored)
    return dreal, dimag, slope / n


def _moments_transpose(layout, half, saved, cotangents):
    x, real, imag, folds, mask, n = saved
    patch = _patch(layout, half, n.dtype)
    dreal, dimag, dvar = (c / n for c in cotangents)
    row, slope = dreal * patch.real + dimag * patch.imag, 2 * dvar
    if not half:
        x, real, imag, row, slope = fence(x, real, imag, row, slope)
        dx = _centre(x, real, imag, None, patch) * slope + patch.at * row
    else:
        width, stored, mirrors = _columns(layout)
        slope = slope / (2 * stored)
        centre = real * patch.of_one + imag * patch.of_i
        centre = width * centre + mirrors * _unfold(_fold(centre, layout), centre, layout)
        row = row - centre * slope
        x, folds, row, slope, twin = fence(x, folds, row, slope * width, slope * mirrors)
        dx = widen(x) * slope + _unfold(folds, x, layout) * twin + patch.at * row
    return (keep(mask, dx),)


def _moments_saves(out, x, mask, n, layout, half):
    return x, *out[:2], _folds(x, layout) if half else None, mask, n


@differentiated(_moments_tangent, _moments_transpose, static=2, moving=1, saves=_moments_saves)
def _moments(x, mask, n, layout, half):
    """Real and imaginary part of the mean of the unscaled spectrum, and its variance."""
    patch = _patch(layout, half, n.dtype)
    real, imag = _mean(fence(x)[0], n, layout, patch)
    square = _energy(x, real, imag, mask, layout, patch)
    if not half:
        return real, imag, square / n
    # Of the energy of the stored half plane, half is that of the plane, and half that of the
    # columns that are their own mirror images: the zero frequency and, for even W, the last one.
    # These do not carry the imaginary part of the mean.
    width, stored, mirrors = _columns(layout)
    own = _centre_folds(_folds(x, layout), real, imag, mask, layout, patch)
    own = jnp.sum(jnp.square(own), layout.samples, keepdims=True)
    square = width * square + mirrors * own
    return real, imag, square / (2 * stored * n) + mirrors / stored * jnp.square(imag)


def affine(
    x: jax.Array | Input,
    gain: jax.Array,
    constant: jax.Array,
    layout: Layout,
    *,
    half: bool,
    activation: Any = None,
    dtype: Any = None,
) -> jax.Array:
    """`activation(x * gain + what the inverse makes of a constant spectrum)`.

    `gain` has the rank of `x`. `constant`, [2, *gain.shape], is what is added to the orthonormal
    spectrum: with `half` to the stored frequencies as they are, instead of to the plane.
    """
    patch = _patch(layout, half, wide(x.dtype))
    real, imag = constant * math.sqrt(math.prod(layout.sizes))
    row = real * patch.of_one + imag * patch.of_i
    gain, row = gain.astype(wide(x.dtype)), row.astype(wide(x.dtype))
    output = passes.output_dtype(dtype, x)
    return _affine(passes.carried(x), gain, row, activation, output, layout, half)


def _affine_tangent(activation, dtype, layout, half, saved, tangents):
    (x, gain, row), (dx, dgain, drow) = saved, tangents
    patch = _patch(layout, half, gain.dtype)
    dz = widen(dx) * gain + widen(x) * dgain + patch.at * drow
    z = widen(x) * gain + patch.at * row
    return passes.activation_tangent(activation, z, dz).astype(dtype)


def _affine_transpose(activation, dtype, layout, half, saved, g):
    del dtype
    patch = _patch(layout, half, saved[1].dtype)

    def inputs(*after, axes=()):
        """Cotangent before the activation, input, gain: for a pass after `after`'s."""
        zero = jnp.zeros_like(saved[1])
        h, x, gain, row, zero, *_ = fence(g, *saved, zero, *after)
        h, x = widen(_slice(h, axes)), widen(_slice(x, axes))
        z = x * gain + (row if axes else patch.at * row)
        return passes.activation_cotangent(activation, z, h, zero), x, gain

    h, x, gain = inputs()
    slope = passes.total_over(h * x, gain.shape)
    h, _, _ = inputs(slope, axes=patch.axes)
    total = passes.total_over(h, saved[2].shape)
    h, _, gain = inputs(total)
    return h * gain, slope, total


@differentiated(_affine_tangent, _affine_transpose, static=4)
def _affine(x, gain, row, activation, dtype, layout, half):
    patch = _patch(layout, half, gain.dtype)
    x, gain, row = fence(x, gain, row)
    return passes.activate(activation, widen(x) * gain + patch.at * row).astype(dtype)
