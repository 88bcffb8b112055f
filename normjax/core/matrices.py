"""Covariances of groups of features, and matrices applied to them: the passes of whitening.

Features make groups of consecutive ones, and an input blocks, [groups, positions, size]. All
products are in at least float32 at the highest precision: with less, whitened data are not white.
Reverse mode keeps the input and the small arrays. With c = x - mean, g the cotangent and n the
count:

    covariances  S = sum(c c^T) / n   dS = sum(dc c^T + c dc^T) / n
                                      dx = (gmean + (gS + gS^T) c) / n
    mix          y = M c + b          dy = M (dx - dmean) + dM c + db
                                      dx = M^T g, dM = sum(g c^T), dmean = -M^T sum(g)
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from normjax.core import groups
from normjax.core.compat import kind
from normjax.core.cpu import fence
from normjax.core.linear import Input, differentiated
from normjax.core.passes import (
    activate,
    activation_cotangent,
    activation_tangent,
    as_wide,
    carried,
    lift,
    output_dtype,
)
from normjax.core.sharding import align, place, place_like, spec
from normjax.core.statistics import Covariances, divisor
from normjax.core.structs import several
from normjax.core.variance import average, is_weighted, keep, wide, widen

Where = tuple[tuple[int, ...], int]  # the feature axes, and how many features make a group


def to_blocks(a: jax.Array, where: Where) -> jax.Array:
    """`a` as [groups, positions, size]; the last group is filled up with zeros.

    Positions stay several axes where they are sharded over an Explicit mesh.
    """
    at, size = where
    a = jnp.moveaxis(a, at, range(-len(at), 0))
    positions = a.shape[: a.ndim - len(at)]
    features = math.prod(a.shape[len(positions) :])
    missing = -features % size
    if len(at) > 1 or missing or not _lies_in_groups(a, features // size):
        a = place(a, (*spec(a)[: len(positions)], *(None,) * len(at)), like=a)
        a = a.reshape(*positions, features)
    if missing:
        a = jnp.pad(a, [(0, 0)] * len(positions) + [(0, missing)])
    a = jnp.moveaxis(groups.split(a, a.ndim - 1, (features + missing) // size), -2, 0)
    return a if _is_divided(a) else a.reshape(a.shape[0], math.prod(positions), size)


def _lies_in_groups(a, number):
    """Whether no group of the last axis lies on several devices of an Explicit mesh."""
    part = spec(a)[-1]
    names = () if part is None else several(part)
    return number % math.prod(kind(a).sharding.mesh.shape[name] for name in names) == 0


def _is_divided(a):
    """Whether positions lie on several devices of an Explicit mesh: one axis could not say how."""
    return any(part is not None for part in spec(a)[1:-1])


def from_blocks(blocks: jax.Array, where: Where, like: jax.Array) -> jax.Array:
    """The inverse of `to_blocks`, with the shape of `like`."""
    at, size = where
    sizes = tuple(like.shape[i] for i in at)
    features = math.prod(sizes)
    positions = tuple(n for i, n in enumerate(like.shape) if i not in at)
    if blocks.ndim == 3:
        blocks = blocks.reshape(blocks.shape[0], *positions, size)
    a = jnp.moveaxis(blocks, 0, -2)
    if len(at) == 1 and features % size == 0:
        like = jnp.moveaxis(like, at[0], -1)
        return jnp.moveaxis(groups.join(a, a.ndim - 2, like=like), -1, at[0])
    a = place(a, (*spec(a)[:-2], None, None), like=a)
    a = a.reshape(*positions, a.shape[-2] * size)[..., :features].reshape(*positions, *sizes)
    return jnp.moveaxis(a, range(-len(at), 0), at)


def block_features(a: jax.Array, size: int) -> jax.Array:
    """An array of the features, [...], as [groups, size], filled up with zeros, on every device."""
    a = everywhere(a).reshape(-1)
    return jnp.pad(a, (0, -a.size % size)).reshape(-1, size)


def everywhere(a: jax.Array) -> jax.Array:
    """`a` whole on every device of an Explicit mesh."""
    return place(a, (None,) * a.ndim, like=a)


def unblock_features(a: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    """The inverse of `block_features`, for feature axes of these sizes."""
    return a.reshape(-1)[: math.prod(sizes)].reshape(sizes)


def gram(a: jax.Array, b: jax.Array, where: Where) -> jax.Array:
    """Sums over all positions of outer products within groups, [groups, of a, of b]."""
    return _on_platform(_gram, _wide_gram, where, a, b)


def times(a: jax.Array, matrix: jax.Array, where: Where) -> jax.Array:
    """The features of every group, as a row, times the `matrix` of the group."""
    return _on_platform(_times, _wide_times, where, a, matrix)


def _on_platform(narrow, wide, where, a, b):
    at, size = where
    width = _width(math.prod(a.shape[i] for i in at), size)
    if width == size or any(spec(a)[i] is not None for i in at):
        return narrow(a, b, where)
    tpu = functools.partial(wide, where=where, width=width)
    return lax.platform_dependent(a, b, tpu=tpu, default=functools.partial(narrow, where=where))


def _width(features, size):
    """The largest number of features in whole groups that divides all, up to LANES if it can be."""
    widths = range(LANES // size * size, size, -size)
    return next((n for n in widths if features % n == 0), size)


def _gram(a, b, where):
    a, b = to_blocks(a, where), to_blocks(b, where)
    over = tuple(range(1, a.ndim - 1))
    how: dict[str, Any] = {}
    if any(part is not None for part in (*spec(a), *spec(b))):
        parts = PartitionSpec(spec(a)[0], None, None)
        how["out_sharding"] = NamedSharding(kind(a).sharding.mesh, parts)
    found = lax.dot_general(
        a, b, ((over, over), ((0,), (0,))), precision=lax.Precision.HIGHEST, **how
    )
    return everywhere(found)


def _times(a, matrix, where):
    blocks = to_blocks(a, where)
    last = blocks.ndim - 1
    matrix = place(matrix, (spec(blocks)[0], None, None), like=blocks)
    blocks = lax.dot_general(
        blocks, matrix, (((last,), (1,)), ((0,), (0,))), precision=lax.Precision.HIGHEST
    )
    return from_blocks(blocks, where, a)


# On TPU a minor axis shorter than LANES is filled up: several groups make one block there, of which
# the products between groups are dropped.
LANES = 512


def _wide_gram(a, b, where, width):
    at, size = where
    found = _gram(a, b, (at, width)).reshape(-1, width // size, size, width // size, size)
    return jnp.einsum("nkikj->nkij", found).reshape(-1, size, size)


def _wide_times(a, matrix, where, width):
    at, size = where
    number = width // size
    each = matrix.reshape(-1, number, size, 1, size)
    apart = each * jnp.eye(number, dtype=a.dtype).reshape(1, number, 1, number, 1)
    return _times(a, apart.reshape(-1, width, width), (at, width))


def covariances(
    x: jax.Array | Input, where: Where, *, mask: Any = None, diagonal: bool = False
) -> Covariances:
    """Count [groups], mean [groups, size] and population covariance [groups, size, size] of `x`.

    Over all axes but those of features, along which `mask`, which may hold weights, has size one.
    With `diagonal` only variances are differentiated; the rest are constants.
    """
    at, dtype = where[0], wide(x.dtype)
    others = tuple(i for i in range(x.ndim) if i not in at)
    if mask is None:
        count = jnp.full((1,) * x.ndim, math.prod(x.shape[i] for i in others), dtype)
    else:
        shape = [1 if i in at else n for i, n in enumerate(x.shape)]
        count = jnp.sum(jnp.broadcast_to(mask, shape), others, dtype=dtype, keepdims=True)
    n = divisor(count) if mask is not None and is_weighted(mask) else jnp.maximum(count, 1)
    mean, cov = _mean_cov(carried(x), mask, n, where, diagonal)
    return Covariances(*align(jnp.broadcast_to(count.reshape(1), mean.shape[:1]), mean, cov))


def _lifted(mean, where, x):
    """A mean of features, [groups, size], with the rank of `x` and sharded as it."""
    at, _ = where
    mean = unblock_features(mean, tuple(x.shape[i] for i in at))
    return place_like(lift(mean, at, x.ndim), x)


def _centred(x, mean, where, mask=None):
    """`x - mean`, zero where masked; of weighted ones times the root of their weights."""
    root = jnp.sqrt(mask) if mask is not None and is_weighted(mask) else mask
    return keep(root, widen(x) - _lifted(mean, where, x))


def _mean_cov_tangent(where, diagonal, saved, tangents):
    (x, mean, mask, n), (dx,) = saved, tangents
    dmean = _means(widen(dx), mask, n, where)
    c, dc = _centred(x, mean, where, mask), _centred(dx, jnp.zeros_like(mean), where, mask)
    if diagonal:
        return align(dmean, _diagonal(_means(2 * c * dc, None, n, where)))
    half = gram(c, dc, where) / n.reshape(1, 1, 1)
    return align(dmean, half + half.mT)


def _mean_cov_transpose(where, diagonal, saved, cotangents):
    (x, mean, mask, n), (gmean, gcov) = saved, cotangents
    x, mean = fence(x, mean, last=True)
    shift = _lifted(gmean, where, x) / n
    if diagonal:
        slope = 2 * _lifted(jnp.diagonal(gcov, axis1=1, axis2=2), where, x) / n
        return (keep(mask, (widen(x) - _lifted(mean, where, x)) * slope + shift),)
    slope = (gcov + gcov.mT) / n.reshape(1, 1, 1)
    return (keep(mask, times(_centred(x, mean, where), slope, where) + shift),)


@differentiated(
    _mean_cov_tangent,
    _mean_cov_transpose,
    static=2,
    moving=1,
    saves=lambda out, x, mask, n, where, diagonal: (x, out[0], mask, n),
    dear=True,
)
def _mean_cov(x, mask, n, where, diagonal):
    mean = _means(widen(x), mask, n, where)
    c = _centred(x, mean, where, mask)
    return mean, gram(c, c, where) / n.reshape(1, 1, 1)


def _means(a, mask, n, where):
    at, size = where
    others = tuple(i for i in range(a.ndim) if i not in at)
    return block_features(average(a, mask, n, (others, None)), size)


def _diagonal(a):
    return a[..., None] * jnp.eye(a.shape[-1], dtype=a.dtype)[None]


def mix(
    x: jax.Array | Input,
    mean: jax.Array,
    matrix: jax.Array,
    bias: jax.Array | None,
    where: Where,
    *,
    activation: Callable | None = None,
    dtype: Any = None,
) -> jax.Array:
    """`activation(matrix (x - mean) + bias)` of every group of features.

    `mean` is [groups, size], `matrix` [groups, size, size], or [1, ...] for all groups alike;
    `bias` has the sizes of the features.
    """
    x, (at, size) = carried(x), where
    sizes = [x.shape[i] for i in at]
    number = -(-math.prod(sizes) // size)
    whole = lambda a: everywhere(jnp.broadcast_to(a, (number, *a.shape[1:])))
    mean, matrix = map(whole, as_wide(x, mean, matrix))
    bias = jnp.zeros(sizes, matrix.dtype) if bias is None else bias.astype(matrix.dtype)
    bias = block_features(bias, size)
    return _mix(x, mean, matrix, bias, where, activation, output_dtype(dtype, x))


def _mixed(c, matrix, bias, where, x):
    return times(c, matrix.mT, where) + _lifted(bias, where, x)


def _mix_tangent(where, activation, dtype, saved, tangents):
    (x, mean, matrix, bias), (dx, dmean, dmatrix, dbias) = saved, tangents
    c, dc = _centred(x, mean, where), _centred(dx, dmean, where)
    dz = times(dc, matrix.mT, where) + times(c, dmatrix.mT, where) + _lifted(dbias, where, x)
    if activation is not None:
        dz = activation_tangent(activation, _mixed(c, matrix, bias, where, x), dz)
    return dz.astype(dtype)


def _mix_transpose(where, activation, _, saved, g):
    x, mean, matrix, bias = saved
    x, mean = fence(x, mean, last=True)
    c, h = _centred(x, mean, where), widen(g)
    if activation is not None:
        z = _mixed(c, matrix, bias, where, x)
        h = activation_cotangent(activation, z, h, jnp.zeros((1,) * x.ndim, h.dtype))
    others = tuple(i for i in range(x.ndim) if i not in where[0])
    total = block_features(jnp.sum(h, others), where[1])
    dmean = -jnp.matmul(total[:, None], matrix, precision=lax.Precision.HIGHEST)[:, 0]
    sizes = tuple(x.shape[i] for i in where[0])
    dmean = block_features(unblock_features(dmean, sizes), where[1])  # zero for what is no feature
    return times(h, matrix, where), dmean, gram(h, c, where), total


@differentiated(_mix_tangent, _mix_transpose, static=3, moving=4)
def _mix(x, mean, matrix, bias, where, activation, dtype):
    z = _mixed(_centred(x, mean, where), matrix, bias, where, x)
    return activate(activation, z).astype(dtype)
