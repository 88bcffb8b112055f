"""Spectra of real maps: orthonormal transforms, and the moments of spectra taken in space.

A map has `positions = n_1 * ... * n_d` values over its spatial axes. Of its spectrum the half plane
of `jnp.fft.rfftn` is stored: the last spatial axis, of size W, keeps the L = W // 2 + 1 frequencies
0 .. W // 2.
"""

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from normjax.core import groups, passes
from normjax.core.activation import activate, activation_cotangent, activation_tangent
from normjax.core.cpu import fence, written
from normjax.core.linear import Input, differentiated, is_plain, linear_map
from normjax.core.passes import carried, keep, output_dtype, total_over, wide, widen
from normjax.core.sharding import place, spec
from normjax.core.structs import Moments

FftNorm = Literal["ortho", "backward", "forward", "full"]


class Layout(NamedTuple):
    """Which axes of an input are what, each in increasing order."""

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    spatial: tuple[int, ...]
    features: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the spatial axes."""
        return tuple(self.shape[i] for i in self.spatial)

    @property
    def stored(self) -> tuple[int, ...]:
        """Sizes of the stored half plane."""
        return (*self.sizes[:-1], self.sizes[-1] // 2 + 1)


def factors(fft_norm: FftNorm, positions: int) -> tuple[float, float]:
    """What the forward and the inverse transform multiply the plain sums by.

    "full" divides by `positions` both ways, so that the pair is not the identity.
    """
    root, whole = 1 / math.sqrt(positions), 1 / positions
    return {
        "ortho": (root, root),
        "backward": (1.0, whole),
        "forward": (whole, 1.0),
        "full": (whole, whole),
    }[fft_norm]


def stored_weights(width: int) -> np.ndarray:
    """For each stored frequency of the last axis, how many of the full plane it stands for."""
    weights = np.full(width // 2 + 1, 2.0)
    weights[0] = 1
    if width % 2 == 0:
        weights[-1] = 1
    return weights


def bands(sizes: tuple[int, ...], number: int) -> np.ndarray:
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


# Statistics of a whole spectrum without a transform. All frequencies of a map sum to `positions`
# times its value at the origin, the stored ones to a functional of the row through the origin along
# the last axis; their squares follow from those of the map (Parseval). So the mean of a spectrum is
# a functional of a patch, the origin or that row, and a constant spectrum is a map within it.


class _Patch(NamedTuple):
    """The axes at whose index 0 the patch lies, and its tables, which broadcast to the input."""

    axes: tuple[int, ...]
    at: np.ndarray  # 1 in the patch, 0 outside
    real: np.ndarray  # patch -> real part of the mean of the (unscaled) spectrum
    imag: np.ndarray  # patch -> imaginary part
    of_one: np.ndarray  # the map whose spectrum is 1, restricted to the patch
    of_i: np.ndarray  # the map that the inverse makes of the stored spectrum i


def _patch(how: tuple[Layout, bool], dtype: Any) -> _Patch:
    layout, half = how
    axes = layout.spatial[:-1] if half else layout.spatial
    at = np.zeros([n if i in axes else 1 for i, n in enumerate(layout.shape)])
    at[(0,) * at.ndim] = 1
    one, zero = np.ones((1,) * at.ndim), np.zeros((1,) * at.ndim)
    if not half:
        tables = at, one, zero, one, zero
    else:
        width, stored = layout.sizes[-1], layout.stored[-1]
        w = np.arange(width)
        even = width % 2 == 0
        origin = (w == 0).astype(float)
        real = (width * origin + 1 + even * (-1.0) ** w) / (2 * stored)
        angle = np.pi * w[1:] / width
        last = np.cos(angle) if even else 1
        sines = np.append(0, (np.cos(angle) - (-1.0) ** w[1:] * last) / (2 * np.sin(angle)))
        shape = [width if i == layout.spatial[-1] else 1 for i in range(at.ndim)]
        row = [t.reshape(shape) for t in (real, -sines / stored, origin, -2 * sines / width)]
        tables = at, *row
    return _Patch(axes, *(t.astype(dtype) for t in tables))


def _slice(x, axes):
    for axis in axes:
        if spec(x)[axis] is None:
            x = lax.slice_in_dim(x, 0, 1, axis=axis)
        else:  # sharded over an Explicit mesh, where only sums may leave one position
            at = np.arange(x.shape[axis]) == 0
            at = np.expand_dims(at, tuple(i for i in range(x.ndim) if i != axis))
            x = jnp.sum(keep(jnp.asarray(at), x), axis, keepdims=True)
    return x


def spatial_moments(
    x: jax.Array | Input, layout: Layout, *, half: bool, mask: jax.Array | None = None
) -> Moments:
    """Moments of the orthonormal spectrum of `x` over samples and all frequencies.

    Args:
      x: the input; zero where `mask` is False.
      layout: its axes.
      half: all stored frequencies alike, instead of the full plane.
      mask: of size one on the spatial axes.

    Returns:
      Count, mean and variance, of the shape of `x` with sizes one but for the features, and with a
      leading axis of two: real and imaginary part. The variance of both is in the first.
    """
    dtype, how = wide(x.dtype), (layout, half)
    count = _sample_count(layout, mask, dtype)
    real, imag, var = _spatial_moments(carried(x), mask, jnp.maximum(count, 1), how)
    positions = math.prod(layout.sizes)
    mean = jnp.stack([real, imag]) / math.sqrt(positions)
    var = jnp.stack([var, jnp.zeros_like(var)]) / positions
    return Moments(jnp.broadcast_to(count, mean.shape), mean, var)


def _sample_count(layout: Layout, mask: jax.Array | None, dtype: Any) -> jax.Array:
    """How many samples count for each feature, of the rank of the input."""
    whole = tuple(1 if i in layout.spatial else n for i, n in enumerate(layout.shape))
    if mask is None:
        shape = tuple(n if i in layout.features else 1 for i, n in enumerate(whole))
        return jnp.full(shape, math.prod(whole) / math.prod(shape), dtype)
    return jnp.sum(jnp.broadcast_to(mask, whole), layout.batch, dtype=dtype, keepdims=True)


def _others(layout):
    return layout.batch + layout.spatial


def _centre(inputs, mask, patch):
    """The input less the map of its mean spectrum."""
    x, real, imag = inputs
    z = widen(x) - patch.at * (real * patch.of_one + imag * patch.of_i)
    return z if mask is None else keep(mask, z)


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
    (x,) = fence(x)
    return fence(_fold(x, layout))[0]


def _centre_folds(folds, real, imag, mask, how):
    """What `_folds` makes of the centred input, from what it makes of the input."""
    patch, (layout, _) = _patch(how, real.dtype), how
    row = jnp.asarray(patch.at) * _fold(real * patch.of_one + imag * patch.of_i, layout)
    return folds - (row if mask is None else keep(mask, row))


def _energy(inputs, mask, how):
    """Sum of squares of the centred input, which is the input but for what `_slice` keeps of it."""
    patch, (layout, _) = _patch(how, inputs[1].dtype), how
    x, real, imag = fence(*inputs)
    if not patch.axes:
        z = _centre((x, real, imag), mask, patch)
        return jnp.sum(jnp.square(z), _others(layout), keepdims=True)
    axis = patch.axes[0]
    rest = tuple(i for i in _others(layout) if i != axis)
    rows = fence(jnp.sum(jnp.square(widen(x)), rest, keepdims=True))[0]
    first = np.expand_dims(np.arange(x.shape[axis]) == 0, rest + layout.features)
    rows = jnp.sum(keep(jnp.asarray(~first), rows), axis, keepdims=True)
    patch = patch._replace(at=patch.at.take([0], axis))
    z = _centre((_slice(x, (axis,)), real, imag), mask, patch)
    return rows + jnp.sum(jnp.square(z), _others(layout), keepdims=True)


def _spatial_moments_tangent(how, saved, tangents):
    (x, real, imag, folds, mask, n), (layout, half), (dx,) = saved, how, tangents
    patch = _patch(how, n.dtype)
    dx = widen(dx) if mask is None else keep(mask, widen(dx))
    row = jnp.sum(_slice(dx, patch.axes), layout.batch, keepdims=True) / n
    dreal, dimag = (
        jnp.sum(row * table, layout.spatial, keepdims=True) for table in (patch.real, patch.imag)
    )
    z = _centre((x, real, imag), mask, patch)
    slope = 2 * jnp.sum(z * dx, _others(layout), keepdims=True)
    if half:
        width, stored = layout.sizes[-1], layout.stored[-1]
        folds = _centre_folds(folds, real, imag, mask, how)
        both = jnp.sum(folds * _fold(dx, layout), _others(layout), keepdims=True)
        slope = (width * slope + 2 * (2 - width % 2) * both) / (2 * stored)
    return dreal, dimag, slope / n


def _spatial_moments_transpose(how, saved, cotangents):
    (x, real, imag, folds, mask, n), (layout, half) = saved, how
    patch = _patch(how, n.dtype)
    dreal, dimag, dvar = (c / n for c in cotangents)
    row, slope = dreal * patch.real + dimag * patch.imag, 2 * dvar
    if not half:
        x, real, imag, row, slope = fence(x, real, imag, row, slope)
        dx = _centre((x, real, imag), None, patch) * slope + patch.at * row
    else:
        width, slope = layout.sizes[-1], slope / (2 * layout.stored[-1])
        mirrors = 2 - width % 2
        centre = real * patch.of_one + imag * patch.of_i
        centre = width * centre + mirrors * _unfold(_fold(centre, layout), centre, layout)
        row = row - centre * slope
        x, folds, row, slope, twin = fence(x, folds, row, slope * width, slope * mirrors)
        dx = widen(x) * slope + _unfold(folds, x, layout) * twin + patch.at * row
    return (dx if mask is None else keep(mask, dx),)


def _spatial_moments_saves(out, x, mask, n, how):
    real, imag, _ = out
    return x, real, imag, _folds(x, how[0]) if how[1] else None, mask, n


@differentiated(
    _spatial_moments_tangent,
    _spatial_moments_transpose,
    static=1,
    moving=1,
    saves=_spatial_moments_saves,
)
def _spatial_moments(x, mask, n, how):
    """Real and imaginary part of the mean of the unscaled spectrum, and its variance."""
    layout, half = how
    patch = _patch(how, n.dtype)
    row = _slice(fence(x)[0], patch.axes)
    row = jnp.sum(widen(row), layout.batch, keepdims=True) / n
    real, imag = (
        jnp.sum(row * table, layout.spatial, keepdims=True) for table in (patch.real, patch.imag)
    )
    square = _energy((x, real, imag), mask, how)
    if not half:
        return real, imag, square / n
    # Of the energy of the stored half plane, half is that of the plane, and half that of the
    # columns that are their own mirror images: the zero frequency and, for even W, the last one.
    # These do not carry the imaginary part of the mean.
    width, stored = layout.sizes[-1], layout.stored[-1]
    mirrors = 2 - width % 2
    own = _centre_folds(_folds(x, layout), real, imag, mask, how)
    own = jnp.sum(jnp.square(own), _others(layout), keepdims=True)
    square = width * square + mirrors * own
    return real, imag, square / (2 * stored * n) + mirrors / stored * jnp.square(imag)


def spatial_affine(
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

    Args:
      x: the input.
      gain: factor of each feature, of the rank of `x`.
      constant: of the shape of `gain` after an axis of two: real and imaginary part of a constant
        added to every (stored) frequency of the orthonormal spectrum.
      layout: the axes of `x`.
      half: the constant is added to the stored frequencies as they are, instead of to the plane.
      activation: pointwise function of the result.
      dtype: of the output; None: that of `x`.
    """
    patch = _patch((layout, half), wide(x.dtype))
    real, imag = constant * math.sqrt(math.prod(layout.sizes))
    row = real * patch.of_one + imag * patch.of_i
    gain, row = gain.astype(wide(x.dtype)), row.astype(wide(x.dtype))
    output = output_dtype(dtype, x)
    return _spatial_affine(carried(x), gain, row, activation, output, (layout, half))


def _spatial_affine_tangent(activation, dtype, how, saved, tangents):
    (x, gain, row), (dx, dgain, drow) = saved, tangents
    patch = _patch(how, gain.dtype)
    dz = widen(dx) * gain + widen(x) * dgain + patch.at * drow
    z = widen(x) * gain + patch.at * row
    return activation_tangent(activation, z, dz).astype(dtype)


def _spatial_affine_transpose(activation, dtype, how, saved, g):
    del dtype
    patch = _patch(how, saved[1].dtype)

    def inputs(*after, axes=()):
        """Cotangent before the activation, input, gain: for a pass after `after`'s."""
        zero = jnp.zeros_like(saved[1])
        h, x, gain, row, zero, *_ = fence(g, *saved, zero, *after)
        h, x = widen(_slice(h, axes)), widen(_slice(x, axes))
        z = x * gain + (row if axes else patch.at * row)
        return activation_cotangent(activation, z, h, zero), x, gain

    h, x, gain = inputs()
    slope = total_over(h * x, gain.shape)
    h, _, _ = inputs(slope, axes=patch.axes)
    total = total_over(h, saved[2].shape)
    h, _, gain = inputs(total)
    return h * gain, slope, total


@differentiated(_spatial_affine_tangent, _spatial_affine_transpose, static=3)
def _spatial_affine(x, gain, row, activation, dtype, how):
    patch = _patch(how, gain.dtype)
    x, gain, row = fence(x, gain, row)
    return activate(activation, widen(x) * gain + patch.at * row).astype(dtype)


Route = Literal["fft", "matmul"]


def forward(x: jax.Array, layout: Layout, route: Route) -> jax.Array:
    """The stored half of the orthonormal spectrum of each map.

    Args:
      x: of the shape of `layout`.
      layout: its axes.
      route: "fft", or "matmul": one product with a matrix of cosines and sines per axis.

    Returns:
      Array [L, 2, *other spatial, *batch, *features], real and imaginary part along axis 1, in at
      least float32.
    """
    how = layout, route
    given, wider = x.dtype, wide(x.dtype)
    return linear_map(
        lambda x: _analyse(x, how, wider, mirrored=False),
        lambda t: _synthesize(t, how, given, mirrored=False),
        x,
        _shard_local_program(route),
    )


def inverse(spectrum: jax.Array, layout: Layout, route: Route, dtype: Any) -> jax.Array:
    """The maps, of `dtype`, whose stored half spectra `forward` gives.

    The frequencies of the last axis that are their own mirror images count with the real part that
    they have after the inverse over the other axes, as in `jnp.fft.irfftn`.
    """
    how = layout, route
    given = spectrum.dtype
    return linear_map(
        lambda t: _synthesize(t, how, dtype, mirrored=True),
        lambda x: _analyse(x, how, given, mirrored=True),
        spectrum,
        _shard_local_program(route),
    )


def moments(spectrum: jax.Array, layout: Layout, mask: jax.Array | None = None) -> Moments:
    """Moments over the samples of real and imaginary part of each stored frequency.

    Args:
      spectrum: from `forward`.
      layout: the axes of the input.
      mask: of the rank of the input, of size one on the spatial axes.

    Returns:
      Count, mean and variance [2, frequencies in the order of `rfftn`, *features].
    """
    if mask is not None:
        mask = jnp.transpose(mask, _order(layout))[:, None]
    first = 1 + len(layout.spatial)
    samples = tuple(range(first, first + len(layout.batch)))
    now = passes.moments(spectrum, samples, mask=mask)
    return Moments(*(_listed(a.squeeze(samples), layout) for a in now))


def _listed(a, layout):
    """[L, 2, *other spatial, ...] as [2, frequencies, ...]."""
    spatial = len(layout.spatial)
    a = jnp.moveaxis(a, 0, spatial)
    return a.reshape(2, math.prod(layout.stored), *a.shape[1 + spatial :])


def _unlisted(a, layout, members):
    """[parts, 1 or groups, *features] so that it broadcasts to a spectrum."""
    if members is not None and a.shape[1] > 1:
        a = _spread(a, members)
    parts, number, *rest = a.shape
    spatial = len(layout.spatial)
    stored = (1,) * spatial if number == 1 else layout.stored
    a = jnp.moveaxis(a.reshape(parts, *stored, *rest), spatial, 0)
    return jnp.expand_dims(a, tuple(range(1 + spatial, 1 + spatial + len(layout.batch))))


def rounded(
    spectrum: jax.Array, now: Moments, layout: Layout, members: np.ndarray | None, dtype: Any
) -> jax.Array:
    """`spectrum` with its distance from the mean rounded to `dtype`, differentiated as itself.

    The distances are divided by their scale before, so that they are within the range of `dtype`.
    The zero frequency, where cotangents with a mean are large, is real: where its imaginary part
    would be, it has what rounding left over. For a policy of `jax.checkpoint` the distances have
    the name "rounded".

    Args:
      spectrum: from `forward`.
      now: its moments, as `moments` or `merge` returns them.
      layout: the axes of the input.
      members: group of each stored frequency; None: every frequency is a group.
      dtype: of half precision.
    """
    _, mean, var = (_unlisted(a, layout, members) for a in now)
    scale = jnp.sqrt(var + jnp.square(mean / 1000) + jnp.finfo(var.dtype).tiny)
    real, imag = _zero_frequency(layout, spectrum.ndim)
    exact = (lax.stop_gradient(spectrum) - mean) / scale
    left = exact - exact.astype(dtype).astype(exact.dtype)
    distance = jnp.where(imag, jnp.flip(left, 1), exact).astype(dtype)
    distance = checkpoint_name(distance, "rounded").astype(exact.dtype)
    distance = jnp.where(real, distance + jnp.flip(distance, 1), distance)
    return as_if(jnp.where(imag, 0, distance * scale + mean), spectrum)


def _zero_frequency(layout, rank):
    """Where a spectrum has the real, and where the imaginary part of the zero frequency."""
    sizes = [layout.stored[-1], 2, *layout.stored[:-1], *(1,) * (rank - 1 - len(layout.spatial))]
    zeros = np.zeros((2, *sizes), bool)
    for i in range(2):
        zeros[(i, 0, i, *(0,) * (rank - 2))] = True
    return map(jnp.asarray, zeros)


@jax.custom_jvp
def as_if(value: Any, other: Any) -> Any:
    """`value`, differentiated as if it were `other`, an array or tree of arrays alike."""
    del other
    return value


as_if.defjvp(lambda primals, tangents: (primals[0], tangents[1]))


def affine(
    spectrum: jax.Array,
    mean: jax.Array,
    gain: jax.Array,
    bias: jax.Array,
    layout: Layout,
    members: np.ndarray | None,
) -> jax.Array:
    """`(spectrum - mean) * gain + bias`.

    Args:
      spectrum: from `forward`.
      mean: [2, groups, *features], as `merge` returns it.
      gain: [1, groups, *features].
      bias: [2, 1, *features].
      layout: the axes of the input.
      members: group of each stored frequency; None: every frequency is a group.
    """

    return passes.affine(spectrum, *(_unlisted(a, layout, members) for a in (mean, gain, bias)))


def _memberships(members, number, dtype):
    return (members == np.arange(number)[:, None]).astype(dtype)


def _spread(a, members):
    """[.., groups, ...] as [.., frequencies, ...]: each has the value of its group."""
    ones = _memberships(members, a.shape[1], a.dtype)
    return jnp.einsum("gk,pg...->pk...", ones, a, precision=lax.Precision.HIGHEST)


def merge(
    parts: Moments, layout: Layout, members: np.ndarray, number: int, *, half: bool
) -> Moments:
    """Moments of groups of frequencies from those of each.

    Args:
      parts: as `moments` returns them.
      layout: the axes of the input.
      members: group of each stored frequency, an integer array [frequencies].
      number: how many groups there are; one may be empty.
      half: every stored frequency counts once, instead of with its mirror image.

    Returns:
      Count, mean and variance [2, groups, *features].
    """
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


def _order(layout):
    return (layout.spatial[-1], *layout.spatial[:-1], *layout.batch, *layout.features)


def _analyse(x, how, dtype, mirrored):
    """The half spectrum; `mirrored` multiplies by `stored_weights`. Transposed by `_synthesize`."""
    layout, route = how
    weights = stored_weights(layout.sizes[-1]) if mirrored else np.ones(layout.stored[-1])
    if route == "matmul":
        x = jnp.transpose(x, _order(layout)).astype(dtype)
        return _products(x, _half_matrix(layout.sizes[-1], weights, dtype), layout)
    whole = tuple(None if i in layout.spatial else part for i, part in enumerate(spec(x)))
    x = jnp.transpose(place(x, whole, like=x), _minor(layout)).astype(dtype)
    spectrum = _shard_local(_rfftn, x, layout.sizes)
    spectrum = jnp.stack([spectrum.real, spectrum.imag])
    weights = (weights / math.sqrt(math.prod(layout.sizes))).astype(dtype)
    spectrum = spectrum * weights.reshape((1,) * len(layout.shape) + (-1,))
    outer = len(layout.shape) - len(layout.spatial)
    others = range(1 + outer, len(layout.shape))
    return jnp.transpose(spectrum, (len(layout.shape), 0, *others, *range(1, 1 + outer)))


def _synthesize(spectrum, how, dtype, mirrored):
    """The map of a half spectrum whose mirror images are added if `mirrored`, else missing."""
    layout, route = how
    weights = stored_weights(layout.sizes[-1]) if mirrored else np.ones(layout.stored[-1])
    if route == "matmul":
        matrix = _half_matrix(layout.sizes[-1], weights, spectrum.dtype)
        x = _products_transposed(spectrum, matrix, layout)
        return written(jnp.transpose(x, _inverse_order(_order(layout))), dtype)
    spatial, outer = len(layout.spatial), len(layout.shape) - len(layout.spatial)
    parts = jnp.transpose(
        spectrum, (1, *range(1 + spatial, 1 + spatial + outer), *range(2, 1 + spatial), 0)
    )
    weights = weights / stored_weights(layout.sizes[-1])
    weights = (weights * math.sqrt(math.prod(layout.sizes))).astype(parts.dtype)
    parts = parts * weights.reshape((1,) * len(layout.shape) + (-1,))
    x = _shard_local(_irfftn, lax.complex(parts[0], parts[1]), layout.sizes).astype(dtype)
    return jnp.transpose(x, _inverse_order(_minor(layout)))


def _inverse_order(order):
    return tuple(int(i) for i in np.argsort(order))


def _minor(layout):
    return (*layout.batch, *layout.features, *layout.spatial)


def _rfftn(x, sizes):
    return jnp.fft.rfftn(x, sizes, axes=range(-len(sizes), 0))


def _irfftn(spectrum, sizes):
    # The inverse over the other axes comes first: a transform over several axes at once need not
    # ignore imaginary parts alike on every backend.
    for axis in range(-len(sizes), -1):
        spectrum = jnp.fft.ifft(spectrum, axis=axis)
    return jnp.fft.irfft(spectrum, sizes[-1])


# Before JAX 0.12 the compiler gathers whole arrays for a Fourier transform under `jit`.
GATHERS = jax.__version_info__ < (0, 12)


def _shard_local(function, x, sizes):
    """`function(x, sizes)`, a transform of the last axes, on each device's shard of the others."""
    if not GATHERS or is_plain():
        return function(x, sizes)

    def run(a):  # the compiler calls it on a thread of its own, which has not our precision
        with jax.enable_x64(x.dtype in (jnp.float64, jnp.complex128)):
            return function(a, sizes)

    def partition(mesh, args, out):
        outer = x.ndim - len(sizes)
        parts = NamedSharding(args[0].sharding.mesh, PartitionSpec(*args[0].sharding.spec[:outer]))
        return mesh, run, parts, (parts,)

    given, made = ([f"{kind}{i}" for i in range(len(sizes))] for kind in "io")
    local = custom_partitioning(run)
    local.def_partition(
        partition=partition,
        sharding_rule=f"... {' '.join(given)} -> ... {' '.join(made)}",
        need_replication_factors=(*given, *made),
    )
    mapped = jax.custom_batching.custom_vmap(local)
    mapped.def_vmap(lambda _, batched, x: (_shard_local(function, x, sizes), batched[0]))
    return mapped(x)


def _shard_local_program(route):
    """What shows `linear` that a transform is partitioned in a way of its own, if it is."""
    if route == "fft" and GATHERS:
        return jax.make_jaxpr(lambda x: _shard_local(_rfftn, x, (2,)))(np.zeros(2, np.float32))
    return None


def _angles(frequencies, positions):
    """2 pi k n / N, reduced exactly."""
    product = np.outer(np.arange(frequencies), np.arange(positions)) % positions
    return 2 * np.pi * product / positions


def _half_matrix(width, weights, dtype):
    """Real and imaginary part of the stored frequencies of a real axis: [L, 2, W]."""
    angles = _angles(width // 2 + 1, width)
    matrix = np.stack([np.cos(angles), -np.sin(angles)], 1) / math.sqrt(width)
    return (matrix * weights[:, None, None]).astype(dtype)


def _whole_matrix(size, dtype):
    """The transform of a complex axis: [part out, frequency, part in, position]."""
    angles = _angles(size, size)
    cos, sin = np.cos(angles), np.sin(angles)
    matrix = np.stack([np.stack([cos, sin], 1), np.stack([-sin, cos], 1)])
    return (matrix / math.sqrt(size)).astype(dtype)


_dot = functools.partial(lax.dot_general, precision=lax.Precision.HIGHEST)


def _along(matrix, spectrum, axis):
    """`matrix` [part out, out, part in, in] times each frequency of axis 0, at `axis`."""
    matrix = jnp.broadcast_to(jnp.asarray(matrix), (len(spectrum), *matrix.shape))
    return jnp.moveaxis(_dot(matrix, spectrum, (((3, 4), (1, axis)), ((0,), (0,)))), 2, axis)


# From this size on, an even axis takes less time as its even and odd positions apart: of their
# products, the first half of the spectrum is the sum and the second half the difference.
SPLIT = 24


def _splits(layout, parts):
    """Whether the first spatial axis is transformed so; `parts` is how it is sharded."""
    size = layout.sizes[0]
    return len(layout.sizes) > 1 and size >= SPLIT and size % 2 == 0 and parts is None


def _split_matrix(size, dtype):
    """Of each parity: [2, part out, first half of the frequencies, part in, positions]."""
    matrix = _whole_matrix(size, dtype)[:, : size // 2]
    return np.moveaxis(matrix.reshape(2, size // 2, 2, size // 2, 2), -1, 0)


def _products(x, half_matrix, layout):
    """Spectrum of [W, *other spatial, ...], every axis in its place."""
    half, axes = jnp.asarray(half_matrix), dict(enumerate(layout.sizes[:-1], 2))
    first = functools.partial(_dot, dimension_numbers=(((2,), (0,)), ((), ())))
    if _splits(layout, spec(x)[1]):
        x = x.reshape(len(x), axes[2] // 2, 2, *x.shape[2:])
        spectrum = jax.vmap(first)(jnp.stack([half, half]), jnp.moveaxis(x, 2, 0))
        matrix = _split_matrix(axes.pop(2), x.dtype)
        even, odd = jax.vmap(functools.partial(_along, axis=2))(matrix, spectrum)
        spectrum = jnp.concatenate([even + odd, even - odd], 2)
    else:
        spectrum = first(half, x)
    for axis, size in axes.items():
        spectrum = _along(_whole_matrix(size, x.dtype), spectrum, axis)
    return spectrum


def _products_transposed(spectrum, half_matrix, layout):
    half, axes = jnp.asarray(half_matrix), dict(enumerate(layout.sizes[:-1], 2))
    last = functools.partial(_dot, dimension_numbers=(((0, 1), (0, 1)), ((), ())))
    split = _splits(layout, spec(spectrum)[2])
    size = axes.pop(2) if split else 0
    for axis in reversed(axes):
        matrix = _whole_matrix(axes[axis], spectrum.dtype).transpose(2, 3, 0, 1)
        spectrum = _along(matrix, spectrum, axis)
    if not split:
        return last(half, spectrum)
    near, far = jnp.split(spectrum, 2, 2)
    matrix = _split_matrix(size, spectrum.dtype).transpose(0, 3, 4, 1, 2)
    parts = jnp.stack([near + far, near - far])
    parts = jax.vmap(functools.partial(_along, axis=2))(matrix, parts)
    x = jnp.moveaxis(jax.vmap(last)(jnp.stack([half, half]), parts), 0, 2)
    return x.reshape(len(x), size, *x.shape[3:])
