"""Segments: positions of an activation that share statistics, such as the documents of a batch.

`Segments` stands in the place of a mask. Small arrays have an axis of segments in front: `at` gives
every position what its segment has there, and `sums` adds up what positions have for each segment.
Nothing else of the passes knows of segments.

On CPU sums are made in blocks of positions that stay in the cache: XLA computes all values before
it adds the first. Elsewhere, and where arrays are divided among devices, they are products with a
matrix of ones and zeros, in which a NaN of one segment reaches all.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from normjax.core import compat
from normjax.core.compat import is_plain
from normjax.core.sharding import align, place, spec

BLOCK = 1 << 14  # numbers of an array in a block


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["ids", "weights"], meta_fields=["number"]
)
@dataclasses.dataclass(frozen=True)
class Segments:
    """The segment of each position, and its weight in the statistics of this."""

    ids: jax.Array  # int32, of the rank of the activation; `number`: in no segment
    weights: jax.Array | None  # of the rank of the activation; None: one
    number: int


def inside(mask: Any, a: jax.Array) -> jax.Array:
    """`a`, which is zero at positions of no segment, if `mask` are `Segments`."""
    if not isinstance(mask, Segments):
        return a
    return jnp.where(mask.ids < mask.number, a, jnp.zeros((), a.dtype))


def at(mask: Any, a: jax.Array) -> jax.Array:
    """What `a` [segments or 1, ...] has for the segment of each position; it broadcasts to them.

    A position of no segment has what any has. Where `mask` are not `Segments`, `a` as it is.
    """
    if not isinstance(mask, Segments):
        return a
    return a[0] if a.shape[0] == 1 else _at(mask.ids, a)


def _at(ids, a):
    ids = jnp.minimum(ids, a.shape[0] - 1)
    if any(part is not None for part in (*spec(ids), *spec(a))):
        return _at_by_product(ids, a)
    along, rest, back = _axes(ids)
    index, rows = _rows(ids, a.shape[1:]), _flat(a, along, rest)
    found = rows.at[index].get(mode="promise_in_bounds")
    return found.reshape(*(ids.shape[i] for i in along), *rows.shape[1:]).transpose(back)


def _axes(ids):
    """The axes along which `ids` vary, the others, and the order that puts both in place."""
    along = [i for i, n in enumerate(ids.shape) if n != 1]
    rest = [i for i in range(ids.ndim) if i not in along]
    return along, rest, np.argsort([*along, *rest]).tolist()


def _rows(ids, shape):
    """For each position its row in `_flat` of an array of `shape` for each segment."""
    index = ids
    for i in _axes(ids)[0]:
        index = index * shape[i]
        if shape[i] != 1:
            index = index + lax.broadcasted_iota(index.dtype, ids.shape, i)
    return index.reshape(-1)


def _flat(a, along, rest):
    """An array [segments, ...] as rows: one for each segment and place on the axes `along`."""
    a = a.transpose(0, *(i + 1 for i in (*along, *rest)))
    return a.reshape(math.prod(a.shape[: len(along) + 1]), *a.shape[len(along) + 1 :])


def _chosen(ids, number, dtype):
    """One where a position is in a segment, else zero, without axes of size one; and its axes."""
    along = _axes(ids)[0]
    ids = jnp.squeeze(ids, tuple(i for i in range(ids.ndim) if i not in along))
    ones = ids[..., None] == jnp.arange(number, dtype=ids.dtype)
    return ones.astype(dtype), (*along, -1)


def _product(a, of_a, b, of_b, out, **how):
    """A product of arrays whose axes have these names, -1 the segments, at HIGHEST precision."""
    names = lambda axes: [i + 1 for i in axes]
    args = (a, names(of_a), b, names(of_b), names(out))
    return jnp.einsum(*args, precision=lax.Precision.HIGHEST, **how)


def _at_by_product(ids, a):
    ones, of_ones = _chosen(ids, a.shape[0], a.dtype)
    single = tuple(i for i, n in enumerate(a.shape[1:]) if n == 1)
    of_a = [-1, *(i for i in range(ids.ndim) if i not in single)]
    out = [i for i in range(ids.ndim) if i in of_a or i in of_ones]
    found = _product(jnp.squeeze(a, tuple(i + 1 for i in single)), of_a, ones, of_ones, out)
    return jnp.expand_dims(found, tuple(i for i in range(ids.ndim) if i not in out))


def sums(
    fun: Callable | None,
    axes: tuple[int, ...],
    segments: Segments,
    wide: Sequence[jax.Array],
    small: Sequence[jax.Array] = (),
) -> list[jax.Array]:
    """Sums over `axes`, for each segment, of what a function gives: [segments, ...], axes kept.

    `fun` takes the arrays `wide`, of the rank of the activation, and, of arrays `small`
    [segments or 1, ...], what `at` gives. It is pointwise, closes over static values only, and
    returns a tuple of arrays of at least float32. None: `wide` themselves, which are such. Nothing
    of positions in no segment enters.
    """
    static = dict(fun=fun, axes=tuple(axes), number=segments.number, wides=len(wide))
    arrays = segments.ids, *wide, *small
    return _by_product(*arrays, **static) if is_plain() else _bind(*align(*arrays), **static)


def _values(ids, *arrays, fun, number, wides):
    mask = Segments(ids, None, number)
    full = (jnp.broadcast_to(a, jnp.broadcast_shapes(a.shape, ids.shape)) for a in arrays[:wides])
    wide = [inside(mask, a) for a in full]
    return wide if fun is None else fun(*wide, *(at(mask, a) for a in arrays[wides:]))


def _by_product(*arrays, axes, **static):
    ids, totals = arrays[0], []
    kept = [i for i in range(ids.ndim) if i not in axes]
    for a in _values(*arrays, **static):
        (ones, of_ones), how, parts = _chosen(ids, static["number"], a.dtype), {}, spec(a)
        if any(part is not None for part in parts):
            out = PartitionSpec(None, *(parts[i] for i in kept))
            how["out_sharding"] = NamedSharding(jax.typeof(a).sharding.mesh, out)
            ones = place(ones, (*(parts[i] for i in of_ones[:-1]), None), like=a)
        total = _product(a, range(ids.ndim), ones, of_ones, [-1, *kept], **how)
        totals.append(jnp.expand_dims(total, tuple(i + 1 for i in axes)))
    return totals


def _by_blocks(*arrays, axes, fun, number, wides):
    static, ids = dict(fun=fun, number=number, wides=wides), arrays[0]
    if not all(isinstance(n, int) for a in arrays for n in a.shape):  # an exported family
        return _by_product(*arrays, axes=axes, **static)
    along, rest, back = _axes(ids)
    sizes = [1 if i in axes else n for i, n in enumerate(ids.shape)]
    size, over = number * math.prod(sizes), tuple(k + 1 for k, i in enumerate(rest) if i in axes)
    wide = [_wide_rows(a, ids) for a in arrays[1 : wides + 1]]
    tables = [_flat(_spread(a, number, sizes, along), along, rest) for a in arrays[wides + 1 :]]

    def add(totals, index, *wide):
        if fun is not None:
            valid = jnp.expand_dims(index < size, tuple(range(1, len(rest) + 1)))
            near = jnp.minimum(index, size - 1)
            small = (a.at[near].get(mode="promise_in_bounds") for a in tables)
            wide = fun(*(jnp.where(valid, a, jnp.zeros((), a.dtype)) for a in wide), *small)
        values = (jnp.sum(a, over, keepdims=True) if over else a for a in wide)
        return [t.at[index].add(a, mode="drop") for t, a in zip(totals, values, strict=True)]

    blocked = [_rows(ids, sizes), *wide]
    shape = lambda a: (size, *(1 if i in axes else a.shape[i] for i in rest))
    like = jax.eval_shape(functools.partial(_values, **static), *arrays)
    zeros = [align(jnp.zeros(shape(a), a.dtype), *arrays)[0] for a in like]
    totals = _in_blocks(add, zeros, blocked, BLOCK if fun else None)
    split = lambda a: a.reshape(number, *(sizes[i] for i in along), *a.shape[1:])
    return [split(a).transpose(0, *(i + 1 for i in back)) for a in totals]


def _spread(a, number, sizes, along):
    """A small array for each segment and each place of the axes along which ids vary."""
    own = (sizes[i] if i in along else n for i, n in enumerate(a.shape[1:]))
    return jnp.broadcast_to(a, (number, *own))


def _wide_rows(a, ids):
    """An array of the rank of the activation as rows: one for each of `ids`."""
    along, rest, _ = _axes(ids)
    a = jnp.broadcast_to(a, [ids.shape[i] if i in along else n for i, n in enumerate(a.shape)])
    a = a.transpose(*along, *rest)
    return a.reshape(ids.size, *a.shape[len(along) :])


def _in_blocks(add, totals, arrays, numbers):
    """`add(totals, *arrays)`, in blocks of rows with so many numbers; None: in one."""
    rows = arrays[0].shape[0]
    row = max(math.prod(a.shape[1:]) for a in arrays)
    size = max(1, min(rows, numbers // row)) if numbers else rows
    cut = lambda start, size: (lax.dynamic_slice_in_dim(a, start, size) for a in arrays)
    done = rows // size * size if size < rows else 0
    step = lambda i, totals: add(totals, *cut(i * size, size))
    totals = lax.fori_loop(0, done // size, step, totals) if done else totals
    return add(totals, *cut(done, rows - done)) if done < rows else totals


def _jvp(primals, tangents, **static):
    moved = [i for i, t in enumerate(tangents) if i and not isinstance(t, compat.Zero)]

    def of_moved(*some):
        arrays = list(primals)
        for i, a in zip(moved, some, strict=True):
            arrays[i] = a
        return _by_product(*arrays, **static)

    given = tuple(primals[i] for i in moved), tuple(tangents[i] for i in moved)
    return _bind(*primals, **static), jax.jvp(of_moved, *given)[1]


def _batch(arrays, dims, *, axes, wides, **static):
    def front(a, d, at):
        return jnp.expand_dims(a, at) if d is None else jnp.moveaxis(a, d, at)

    pairs = zip(arrays, dims, strict=True)
    arrays = [front(a, d, int(i > wides)) for i, (a, d) in enumerate(pairs)]
    out = _bind(*arrays, axes=tuple(i + 1 for i in axes), wides=wides, **static)
    return out, [1] * len(out)


_bind = compat.register(
    "normjax_segment_sums",
    _by_product,
    abstract=lambda *avals, **static: (
        jax.make_jaxpr(functools.partial(_by_product, **static))(*avals).out_avals
    ),
    jvp=_jvp,
    batch=_batch,
    on_cpu=lambda alone, _: _by_blocks if alone else _by_product,
)
