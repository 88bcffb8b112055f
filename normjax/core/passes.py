"""Moments and the affine application: the only passes over an activation.

Statistics and arithmetic are in at least float32 (float64 stays); the variance is two-pass, hence
exact at any offset. Reverse mode keeps the input and the small statistics. The two applications
differ in where scale and bias live: in `affine` they broadcast like the statistics, in `rows` they
lie on reduced axes (layer norm).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from normjax.core.linear import align, fence, linear
from normjax.core.structs import AffineParams, Moments


def wide(dtype: Any) -> Any:
    """The dtype of statistics and arithmetic for an input of `dtype`."""
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.dtype(jnp.float32)


def widen(x: jax.Array) -> jax.Array:
    """`x` in at least float32."""
    return x.astype(wide(x.dtype))


def moments(
    x: jax.Array, axes: tuple[int, ...], *, mask: jax.Array | None = None, centred: bool = True
) -> Moments:
    """Count, mean and population variance of `x` over `axes`, which stay as size one.

    Where `mask` is False a position does not count. `centred=False` gives mean zero and the mean
    square.
    """
    dtype = wide(x.dtype)
    if mask is None:
        size = math.prod(x.shape[i] for i in axes)
        count = jnp.full((1,) * x.ndim, size, dtype)
    else:
        mask = jnp.broadcast_to(mask, x.shape)
        count = jnp.sum(mask, axes, dtype=dtype, keepdims=True)
    mean, var = _mean_var(x, mask, jnp.maximum(count, 1), axes, centred)
    return Moments(jnp.broadcast_to(count, mean.shape), mean, var)


def _average(a, mask, n, axes):
    return jnp.sum(a if mask is None else jnp.where(mask, a, 0), axes, keepdims=True) / n


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _mean_var(x, mask, n, axes, centred):
    if not centred:
        square = _average(jnp.square(widen(*fence(x))), mask, n, axes)
        return align(jnp.zeros_like(square), square)
    mean = _average(widen(*fence(x)), mask, n, axes)
    x, centre = fence(x, mean)
    return mean, _average(jnp.square(widen(x) - centre), mask, n, axes)


def _mean_var_tangent(axes, centred, saved, dx):
    x, mean, mask, n = saved
    dvar = 2 * _average((widen(x) - mean) * widen(dx), mask, n, axes)
    return align(_average(widen(dx), mask, n, axes) if centred else jnp.zeros_like(dvar), dvar)


def _mean_var_transpose(axes, centred, saved, cotangents):
    x, mean, mask, n = saved
    x, mean, shift, slope = fence(x, mean, cotangents[0] / n, 2 * cotangents[1] / n)
    dx = (widen(x) - mean) * slope
    dx = dx + shift if centred else dx
    return (dx if mask is None else jnp.where(mask, dx, 0)).astype(x.dtype)


@_mean_var.defjvp
def _(axes, centred, primals, tangents):
    x, mask, n = primals
    mean, var = _mean_var(x, mask, n, axes, centred)
    tangent = functools.partial(_mean_var_tangent, axes, centred)
    transpose = functools.partial(_mean_var_transpose, axes, centred)
    return (mean, var), linear(tangent, transpose, (x, mean, mask, n), tangents[0])


def normalize(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    params: AffineParams,
    *,
    epsilon: float,
    activation: Callable | None = None,
    dtype: Any = None,
) -> jax.Array:
    """`activation((x - mean) / sqrt(var + epsilon) * scale + bias)` in `dtype`, or in that of `x`.

    `mean`, `var` and the parameters have the rank of `x` and broadcast to it.
    """
    scale, bias = params
    shapes = [a.shape for a in (mean, scale, bias) if a is not None]
    shape = jnp.broadcast_shapes(*shapes)
    inverse = lax.rsqrt(var + epsilon)
    if math.prod(shape) < x.size or shape == mean.shape:
        gain = inverse if scale is None else inverse * scale
        return affine(x, mean, gain, bias, activation=activation, dtype=dtype)
    smaller = jnp.broadcast_shapes(*[a.shape for a in params if a is not None])
    scale = jnp.ones(smaller, mean.dtype) if scale is None else _fit(scale, smaller, mean)
    bias = jnp.zeros(smaller, mean.dtype) if bias is None else _fit(bias, smaller, mean)
    return _rows(x, mean, inverse, scale, bias, activation, jnp.dtype(dtype or x.dtype))


def affine(
    x: jax.Array,
    mean: jax.Array,
    gain: jax.Array,
    bias: jax.Array | None = None,
    *,
    activation: Callable | None = None,
    dtype: Any = None,
) -> jax.Array:
    """`activation((x - mean) * gain + bias)`, computed wide, in `dtype` or that of `x`."""
    mean, gain, bias = (jnp.zeros_like(mean) if a is None else a for a in (mean, gain, bias))
    mean, gain, bias = (a.astype(wide(x.dtype)) for a in (mean, gain, bias))
    zero = jnp.zeros_like(mean) + jnp.zeros_like(gain) + jnp.zeros_like(bias)
    how = activation, jnp.dtype(dtype or x.dtype)
    return _affine(x, mean + zero, gain + zero, bias + zero, *how)


def _fit(a, shape, like):
    return jnp.broadcast_to(a.astype(wide(like.dtype)), shape)


def _reduced(small, x):
    return tuple(i for i, n in enumerate(small.shape) if n != x.shape[i])


def _total(a, small):
    """Sum over the axes that `small` lacks; fenced, or XLA would make a pass for a sum of sums."""
    return fence(jnp.sum(a, _reduced(small, a), keepdims=True))[0]


def _activate(activation, z):
    return z if activation is None else activation(z)


def _tangent(activation, z, dz):
    return dz if activation is None else jax.jvp(activation, (z,), (dz,))[1]


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def _affine(x, mean, gain, bias, activation, dtype):
    x, mean, gain, bias = fence(x, mean, gain, bias)
    return _activate(activation, (widen(x) - mean) * gain + bias).astype(dtype)


def _affine_tangent(activation, dtype, saved, tangents):
    (x, mean, gain, bias), (dx, dmean, dgain, dbias) = saved, tangents
    centred = widen(x) - mean
    dz = (widen(dx) - dmean) * gain + centred * dgain + dbias
    return _tangent(activation, centred * gain + bias, dz).astype(dtype)


def _affine_transpose(activation, saved, g):
    def inputs(*after):
        """Cotangent before the activation, centred input, gain: for a pass after `after`'s."""
        h, x, mean, gain, bias, *_ = fence(g, *saved, *after)
        centred = widen(x) - mean
        return _tangent(activation, centred * gain + bias, widen(h)), centred, gain

    h, _, gain = inputs()
    total = _total(h, gain)
    h, centred, _ = inputs(total)
    slope = _total(h * centred, gain)
    h, _, gain = inputs(slope)
    return (h * gain).astype(saved[0].dtype), -total * saved[2], slope, total


@_affine.defjvp
def _(activation, dtype, primals, tangents):
    tangent = functools.partial(_affine_tangent, activation, dtype)
    transpose = functools.partial(_affine_transpose, activation)
    out = _affine(*primals, activation, dtype)
    return out, linear(tangent, transpose, tuple(primals), tuple(tangents))


@functools.partial(jax.custom_jvp, nondiff_argnums=(5, 6))
def _rows(x, mean, inverse, scale, bias, activation, dtype):
    x, mean, inverse, scale, bias = fence(x, mean, inverse, scale, bias)
    return _activate(activation, (widen(x) - mean) * inverse * scale + bias).astype(dtype)


def _rows_tangent(activation, dtype, saved, tangents):
    x, mean, inverse, scale, bias = saved
    dx, dmean, dinverse, dscale, dbias = tangents
    centred = widen(x) - mean
    dz = ((widen(dx) - dmean) * inverse + centred * dinverse) * scale
    dz = dz + centred * inverse * dscale + dbias
    return _tangent(activation, centred * inverse * scale + bias, dz).astype(dtype)


def _rows_transpose(activation, saved, g):
    def inputs(*after):
        """As in `_affine_transpose`, with inverse and scale in place of the gain."""
        h, x, mean, inverse, scale, bias, *_ = fence(g, *saved, *after)
        centred = widen(x) - mean
        h = _tangent(activation, centred * inverse * scale + bias, widen(h))
        return h, centred, inverse, scale

    h, _, inverse, scale = inputs()
    total = _total(h * scale, inverse)
    h, centred, inverse, scale = inputs(total)
    slope = _total(h * scale * centred, inverse)
    h, centred, inverse, scale = inputs(slope)
    dscale = _total(h * (centred * inverse), scale)
    h, _, _, scale = inputs(dscale)
    dbias = _total(h, scale)
    h, _, inverse, scale = inputs(dbias)
    dx = (h * inverse * scale).astype(saved[0].dtype)
    return dx, -total * saved[2], slope, dscale, dbias


@_rows.defjvp
def _(activation, dtype, primals, tangents):
    tangent = functools.partial(_rows_tangent, activation, dtype)
    transpose = functools.partial(_rows_transpose, activation)
    out = _rows(*primals, activation, dtype)
    return out, linear(tangent, transpose, tuple(primals), tuple(tangents))
