"""Moments and the affine application: the only passes over an activation.

Statistics and arithmetic are in at least float32 (float64 stays); the variance is two-pass, hence
exact at any offset. Reverse mode keeps the input and the small statistics. In `affine` scale and
bias broadcast like the statistics, in `rows` they lie on reduced axes (layer norm).

With c = x - mean and g the cotangent, sums over what the small arrays lack, and n the count:

    moments  var = sum(c^2) / n  dvar = 2 sum(c dx) / n             dx = (gmean + 2 gvar c) / n
             (without a mean: c = x, and no gmean)
    affine   y = c a + b         dy = (dx - dmean) a + c da + db    dx = g a, da = sum(g c)
    rows     y = c r s + b       dy = ((dx - dmean) r + c dr) s + c r ds + db
                                 dx = g s r, dr = sum(g s c), ds = sum(g c r)
    gated    y = rows a(z)       dy = drows a(z) + rows da(dz)
                                 as rows, of g a(z); dz = da'(g rows)

Every pass takes the tangent of a wide carrier of `x` and returns its cotangent as wide (`Input`),
so that a method whose input meets several passes rounds the gradient once.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from normjax.core import checks
from normjax.core.cpu import fence, positive, sums_of
from normjax.core.linear import Input, differentiated
from normjax.core.method import Normalizer
from normjax.core.segments import Segments, at, inside, sums
from normjax.core.sharding import align, place_like, spec
from normjax.core.statistics import Moments, divisor
from normjax.core.variance import (
    average,
    is_weighted,
    keep,
    mean_and_variance,
    mean_square,
    pool,
    wide,
    widen,
)

POINTWISE = jax.nn.relu, jax.nn.sigmoid, jax.nn.silu  # known to mix no positions


def as_wide(x: jax.Array | Input, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """`arrays` in the dtype of statistics and arithmetic for `x`."""
    return tuple(a.astype(wide(x.dtype)) for a in arrays)


def inputs(
    method: Any,
    x: Any,
    mask: Any,
    weights: Any = None,
    segment_ids: Any = None,
) -> tuple[Any, Any]:
    """`Input`, which is zero where masked: no gradient sees the padding; and how positions count.

    That is None, a mask, weights as a floating array, or `Segments`: their passes take `x` for zero
    in no segment, which saves one that makes it so.
    """
    if isinstance(x, Input):  # from an earlier call
        return x, mask
    name, number = type(method).__name__, cast(int, getattr(method, "num_segments", None))
    x = checks.as_real(name, x)
    mask = checks.as_mask(name, mask, x.shape)
    weights = checks.as_weights(name, weights, x.shape)
    ids = checks.as_segment_ids(name, segment_ids, number, x.shape)
    valid = mask
    if weights is not None:
        weights = keep(mask, lax.stop_gradient(weights).astype(wide(x.dtype)))
        valid = weights > 0
    count: Any = mask if weights is None else weights
    if ids is not None:
        if valid is not None and jnp.broadcast_shapes(valid.shape, ids.shape) == ids.shape:
            ids, valid = jnp.where(valid, ids, number), None
        if weights is None and valid is not None:
            weights = valid.astype(wide(x.dtype))
        count = Segments(ids, weights, number, method.segment_axis(x))
    return carried(x if valid is None else _drop(x, valid)), count


def carried(x: jax.Array | Input) -> Input:
    """`x` with the carrier of its tangent, for all the passes that it meets."""
    return x if isinstance(x, Input) else Input(x, widen(x))


def value(x: Any) -> jax.Array:
    """The activation of an `Input`, in its own shape and dtype, without the carrier."""
    return x.value


@differentiated(
    lambda mask, tangents: keep(mask, *tangents),
    lambda mask, g: (keep(mask, g),),
    moving=1,
    saves=lambda out, x, mask: mask,
)
def _drop(x, mask):
    return keep(mask, x)


def moments(
    x: jax.Array | Input,
    axes: tuple[int, ...],
    *,
    mask: Any = None,
    centred: bool = True,
    channel_groups: int | None = None,
) -> Moments:
    """Count, mean and population variance of `x` over `axes`, which stay as size one.

    Where `mask` is False a position does not count; weights count as they are, and of `Segments`
    there are moments of each, on their axis. `centred=False` gives mean zero and the mean square.
    With `channel_groups`, statistics are also over each of so many groups of consecutive positions
    of the last axis, which keeps its size: every position has those of its group.
    """
    dtype = wide(x.dtype)
    if mask is None:
        shape = (1,) * (x.ndim - 1) + (x.shape[-1] if channel_groups else 1,)
        count = jnp.full(shape, math.prod(x.shape[i] for i in axes), dtype)
    else:
        of = mask.ids if isinstance(mask, Segments) else mask
        kept = x.ndim - 1 if channel_groups else None
        shape = [n if i in (*axes, kept) else of.shape[i] for i, n in enumerate(x.shape)]
        count = _number(mask, shape, axes, dtype)
    count = pool(count, channel_groups)
    fractions = isinstance(mask, Segments) or is_weighted(mask)
    how, n = (axes, channel_groups), divisor(count) if fractions else jnp.maximum(count, 1)
    if centred:
        mean, var = _mean_var(carried(x), mask, n, how)
    else:
        var = _mean_square(carried(x), mask, n, how)
        mean = jnp.zeros_like(var)
    return Moments(jnp.broadcast_to(count, mean.shape), *align(mean, var))


def _number(mask, shape, axes, dtype):
    """How many positions of `shape` count, by their weights, over `axes`."""
    if not isinstance(mask, Segments):
        return jnp.sum(jnp.broadcast_to(mask, shape), axes, dtype=dtype, keepdims=True)
    one = jnp.ones((), dtype) if mask.weights is None else mask.weights
    (count,) = sums(
        None, axes, mask, [jnp.broadcast_to(one, jnp.broadcast_shapes(one.shape, shape))]
    )
    return count


def _mean_var_tangent(how, saved, tangents):
    (x, mean, mask, n), (dx,) = saved, tangents
    dvar = 2 * average(_centre(x, mean, mask) * widen(dx), mask, n, how)
    return align(average(widen(dx), mask, n, how), dvar)


def _mean_var_transpose(how, saved, cotangents):
    x, mean, mask, n = saved
    shift, slope = (pool(c / n, how[1]) for c in cotangents)
    x, mean, shift, slope = fence(x, mean, shift, 2 * slope)
    return (keep(mask, _centre(x, mean, mask) * at(mask, slope) + at(mask, shift)),)


@differentiated(
    _mean_var_tangent,
    _mean_var_transpose,
    static=1,
    moving=1,
    saves=lambda out, x, mask, n, how: (x, out[0], mask, n),
    dear=True,
)
def _mean_var(x, mask, n, how):
    return mean_and_variance(x, mask, n, how)


def _mean_square_tangent(how, saved, tangents):
    (x, mask, n), (dx,) = saved, tangents
    return 2 * average(_centre(x, None, mask) * widen(dx), mask, n, how)


def _mean_square_transpose(how, saved, g):
    x, mask, n = saved
    x, slope = fence(x, 2 * pool(g / n, how[1]))
    return (keep(mask, _centre(x, None, mask) * at(mask, slope)),)


@differentiated(_mean_square_tangent, _mean_square_transpose, static=1, moving=1, dear=True)
def _mean_square(x, mask, n, how):
    return mean_square(x, mask, n, how)


@differentiated(
    lambda epsilon, inverse, tangents: -0.5 * inverse**3 * tangents[0],
    lambda epsilon, inverse, g: (-0.5 * inverse**3 * g,),
    static=1,
    saves=lambda inverse, var, epsilon: inverse,
)
def inverse_deviation(var: jax.Array, epsilon: float) -> jax.Array:
    """`1 / sqrt(var + epsilon)`; reverse mode keeps the result alone, which the passes keep too."""
    return lax.rsqrt(var + epsilon)


def apply(
    x: jax.Array | Input,
    normalizer: Normalizer,
    features: tuple[int, ...] = (),
    *,
    activation: Callable | None = None,
    dtype: Any = None,
    gate: tuple[jax.Array | Input, Callable | None] | None = None,
    mask: Any = None,
) -> jax.Array:
    """Applies `normalizer`, whose arrays may have the shape of the axes `features` of `x`.

    Computed wide; the output has `dtype`, or that of `x`. A `gate` is an array of the shape of `x`
    and a function of it, by which the output is multiplied. If `mask` are `Segments`, mean and
    inverse may be theirs; in none the output is `activation(0)`.
    """
    work = wide(x.dtype)
    x = carried(x)
    mean, inverse, scale, bias = (None if a is None else a.astype(work) for a in normalizer)
    if inverse is not None and scale is not None:
        if inverse.shape == scale.shape and spec(inverse) == spec(scale):
            # Before both get the rank of `x`: reverse mode keeps the factors as it has them.
            inverse, scale = inverse * scale, None
    segments = mask if isinstance(mask, Segments) else None
    whole = None if segments is None else segments.axis
    mean, inverse, scale, bias = (
        None if a is None else place_like(lift(a, features, x.ndim), x.value, whole)
        for a in (mean, inverse, scale, bias)
    )
    if inverse is None:
        inverse, scale = (jnp.ones((1,) * x.ndim, work) if scale is None else scale), None
    learned = [a.shape for a in (scale, bias) if a is not None]
    shape = jnp.broadcast_shapes(inverse.shape, *learned)
    if gate is None and (segments or shape == inverse.shape or shape != x.shape):
        gain = inverse if scale is None else inverse * scale
        how: Any = dict(activation=activation, dtype=dtype, segments=segments)
        return affine(x, mean, gain, bias, **how)
    smaller = jnp.broadcast_shapes((1,) * x.ndim, *learned)
    scale = jnp.ones(smaller, work) if scale is None else scale
    if gate is not None:
        of, how = carried(gate[0]), (activation, gate[1], output_dtype(dtype, x))
        return _gated(x, mean, inverse, scale, bias, of, *how)
    return _rows(x, mean, inverse, scale, bias, activation, output_dtype(dtype, x))


def affine(
    x: jax.Array | Input,
    mean: jax.Array | None,
    gain: jax.Array,
    bias: jax.Array | None = None,
    *,
    activation: Callable | None = None,
    dtype: Any = None,
    segments: Segments | None = None,
) -> jax.Array:
    """`activation((x - mean) * gain + bias)`; every array has the rank of `x` (None: zero)."""
    zeros = lambda: jnp.zeros_like(gain) if segments is None else jnp.zeros((1,) * x.ndim)
    mean, bias = (zeros() if a is None else a for a in (mean, bias))
    x, whole = carried(x), None if segments is None else segments.axis
    small = (place_like(a.astype(wide(x.dtype)), x.value, whole) for a in (mean, gain, bias))
    mean, gain, bias = small
    return _affine(x, mean, gain, bias, segments, activation, output_dtype(dtype, x))


def lift(a: jax.Array, features: tuple[int, ...], rank: int) -> jax.Array:
    """`a` with the rank of an input, if it has the shape of its axes `features`."""
    if a.ndim == rank:
        return a
    return jnp.expand_dims(a, tuple(i for i in range(rank) if i not in features))


def _lacking(shape, full):
    return tuple(i for i, n in enumerate(shape) if n != full[i])


def _sum_to(a, shape):
    """Sum over the axes that `shape` lacks."""
    lacking = _lacking(shape, a.shape)
    return jnp.sum(a, lacking, keepdims=True) if lacking else a


def total_over(a: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sum over the axes that `shape` lacks; fenced, or XLA would make a pass for a sum of sums."""
    return fence(_sum_to(a, shape))[0]


def output_dtype(dtype: Any, x: jax.Array | Input) -> Any:
    """The dtype of the output for an input `x`, where `dtype` is None or what a user asked for."""
    return x.dtype if dtype is None else jax.dtypes.canonicalize_dtype(dtype)


def activate(activation: Callable | None, z: jax.Array) -> jax.Array:
    """`activation(z)`; None is the identity. ValueError if it changes the shape."""
    if activation is None:
        return z
    y = activation(z)
    if y.shape != z.shape:
        raise ValueError(f"activation={activation!r} makes shape {y.shape} of shape {z.shape}.")
    return y


def activation_tangent(activation: Callable | None, z: jax.Array, dz: jax.Array) -> jax.Array:
    """The tangent of `activate` at `z` along `dz`."""
    return dz if activation is None else jax.jvp(activation, (z,), (dz,))[1]


def activation_cotangent(
    activation: Callable | None, z: jax.Array, h: jax.Array, zero: jax.Array
) -> jax.Array:
    """The cotangent of `z` for the cotangent `h` of `activate`.

    `zero` is a zero that broadcasts to `z`, fenced with the other inputs of the pass.
    """
    if activation is None:
        return h
    if activation is jax.nn.relu:
        return h * positive(lax.stop_gradient(z), zero)
    return jax.vjp(activation, z)[1](h)[0]


def _affine_tangent(activation, dtype, saved, tangents):
    (x, *small, segments), (dx, *moved) = saved, tangents
    mean, gain, bias, dmean, dgain, dbias = (at(segments, a) for a in (*small, *moved))
    centred = _centre(x, None, segments) - mean
    dz = (widen(dx) - dmean) * gain + centred * dgain + dbias
    z, dz = (inside(segments, a) for a in (centred * gain + bias, dz))
    return activation_tangent(activation, z, dz).astype(dtype)


def _affine_transpose(activation, _, saved, g):
    *saved, segments = saved
    if segments is not None:
        return _segments_transpose(activation, saved, segments, g)
    small = saved[1:]
    zero = jnp.zeros(jnp.broadcast_shapes(*(a.shape for a in small)), small[1].dtype)

    def both(h, x, mean, gain, bias, zeros):
        """Cotangent before the activation, alone and times the centred input."""
        centred = widen(x) - mean
        h = activation_cotangent(activation, centred * gain + bias, h.astype(gain.dtype), zeros)
        return h, h * centred

    whole = (g, *saved, zero)
    total, slope = _totals(both, activation, zero.shape, *whole)
    *whole, _ = fence(*whole, slope, last=True)
    dx = both(*whole)[0] * whole[3]
    totals = -total * small[1], slope, total
    return dx, *(_sum_to(a, b.shape) for a, b in zip(totals, small, strict=True))


def _totals(values, activation, shape, *arrays):
    """As `total_over`, of each array that `values` gives."""
    if activation in (None, jax.nn.relu):
        lacking = _lacking(shape, arrays[0].shape)
        return fence(*sums_of(values, lacking, *fence(*arrays)))
    totals = []  # the activation may mix positions
    for i in range(len(jax.eval_shape(values, *arrays))):
        one = values(*fence(*arrays, *totals)[: len(arrays)])[i]
        totals.append(total_over(one, shape))
    return totals


def _segments_transpose(activation, saved, segments, g):
    x, mean, gain, bias = saved
    small, shape = saved[1:], jnp.broadcast_shapes(mean.shape, gain.shape, bias.shape)
    zero = jnp.zeros((1,) * x.ndim, gain.dtype)

    def before(h, x, mean, gain, bias, zero, activation):
        """Cotangent before the activation, and the centred input."""
        centred = widen(x) - mean
        return activation_cotangent(activation, centred * gain + bias, widen(h), zero), centred

    def both(activation, h, x, mean, gain, bias):
        zero = jnp.zeros((1,) * x.ndim, gain.dtype)
        h, centred = before(h, x, mean, gain, bias, zero, activation)
        return h, centred * h

    def whole(g, x, mean, gain, bias, zero):
        mean, gain, bias = (at(segments, a) for a in (mean, gain, bias))
        x = inside(segments, x)
        return inside(segments, before(g, x, mean, gain, bias, zero, activation)[0])

    pointwise = activation in (None, *POINTWISE)  # others may mix positions
    if pointwise:
        h = g
    else:
        h = whole(*fence(g, x, mean, gain, bias, zero))
    values = functools.partial(both, activation if pointwise else None)
    over = set(_lacking(shape, x.shape)) | {segments.axis}
    total, slope = sums(values, tuple(sorted(over)), segments, (h, x), small)
    *arrays, slope = fence(g, x, mean, gain, bias, zero, slope, last=True)
    dx = whole(*arrays) * at(segments, arrays[3])
    totals = -total * gain, slope, total
    return dx, *(_sum_to(a, b.shape) for a, b in zip(totals, small, strict=True))


@differentiated(_affine_tangent, _affine_transpose, static=2, moving=4)
def _affine(x, mean, gain, bias, segments, activation, dtype):
    x, mean, gain, bias = fence(x, mean, gain, bias)
    mean, gain, bias = (at(segments, a) for a in (mean, gain, bias))
    z = inside(segments, (_centre(x, None, segments) - mean) * gain + bias)
    return activate(activation, z).astype(dtype)


def _centre(x, mean, mask=None):
    x = inside(mask, widen(x))
    return x if mean is None else x - at(mask, mean)


def _plus(z, bias):
    return z if bias is None else z + bias


def _rows_tangent(activation, dtype, saved, tangents):
    x, mean, inverse, scale, bias = saved
    dx, dmean, dinverse, dscale, dbias = tangents
    centred = _centre(x, mean)
    dz = (_centre(dx, dmean) * inverse + centred * dinverse) * scale
    dz = _plus(dz + centred * inverse * dscale, dbias)
    z = _plus(centred * inverse * scale, bias)
    return activation_tangent(activation, z, dz).astype(dtype)


def _rows_transpose(activation, _, saved, g):
    x, mean, inverse, scale, bias = saved
    given = [a is not None for a in (mean, bias)]
    whole = (g, x, inverse, scale, jnp.zeros_like(inverse))
    whole += tuple(a for a in (mean, bias) if a is not None)
    small = scale.shape if bias is None else jnp.broadcast_shapes(scale.shape, bias.shape)

    def before(h, x, inverse, scale, zero, *rest):
        """Cotangent before the activation, and the centred input."""
        rest = iter(rest)
        mean, bias = (next(rest) if has else None for has in given)
        centred = _centre(x, mean)
        z = _plus(centred * inverse * scale, bias)
        return activation_cotangent(activation, z, h.astype(scale.dtype), zero), centred

    def along(*arrays):
        h, centred = before(*arrays)
        h = h * arrays[3]
        return (h * centred, h) if given[0] else (h * centred,)

    def across(*arrays):
        h, centred = before(*arrays)
        slope = h * (centred * arrays[2])
        return (slope, h) if given[1] else (slope,)

    slope, *total = _totals(along, activation, inverse.shape, *whole)
    arrays = fence(*whole, slope)[: len(whole)]
    dscale, *dbias = _totals(across, activation, small, *arrays)
    arrays = fence(*whole, dscale)[: len(whole)]
    dx = before(*arrays)[0] * arrays[2] * arrays[3]
    dmean = -total[0] * inverse if total else None
    dbias = None if bias is None else _sum_to(dbias[0], bias.shape)
    return dx, dmean, slope, _sum_to(dscale, scale.shape), dbias


@differentiated(_rows_tangent, _rows_transpose, static=2)
def _rows(x, mean, inverse, scale, bias, activation, dtype):
    return _rows_value(activation, *_fenced(x, mean, inverse, scale, bias)).astype(dtype)


def _fenced(*arrays):
    leaves, tree = jax.tree.flatten(arrays)  # the mean may be None
    return jax.tree.unflatten(tree, fence(*leaves))


def _rows_value(activation, x, mean, inverse, scale, bias):
    return activate(activation, _plus(_centre(x, mean) * inverse * scale, bias))


def _gated_tangent(activation, of_gate, dtype, saved, tangents):
    (*of_rows, gate), (*moved, dgate) = saved, tangents
    y, z = _rows_value(activation, *of_rows), widen(gate)
    dy = _rows_tangent(activation, y.dtype, of_rows, moved) * activate(of_gate, z)
    return (dy + y * activation_tangent(of_gate, z, widen(dgate))).astype(dtype)


def _gated_transpose(activation, of_gate, _, saved, g):
    *of_rows, gate = saved
    (h,) = fence(widen(g) * activate(of_gate, widen(gate)))  # its exponentials once, on CPU
    moved = _rows_transpose(activation, None, of_rows, h)
    h = widen(g) * _rows_value(activation, *of_rows)
    return *moved, activation_cotangent(of_gate, widen(gate), h, jnp.zeros_like(h))


@differentiated(_gated_tangent, _gated_transpose, static=3)
def _gated(x, mean, inverse, scale, bias, gate, activation, of_gate, dtype):
    *of_rows, gate = _fenced(x, mean, inverse, scale, bias, gate)
    y = _rows_value(activation, *of_rows)
    return (y * activate(of_gate, widen(gate))).astype(dtype)
