"""Segments: positions of an activation that share statistics, such as the documents of a batch.

`Segments` stands in the place of a mask. Small arrays then have, on the first of the reduced axes,
a number for each segment: `at` gives every position that of its own, and `sums` adds up what the
positions of each segment have. Nothing else of the passes knows of segments.

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
from normjax.core.cpu import at_front
from normjax.core.sharding import align, place, spec

BLOCK = 1 << 15  # numbers of an array in a block
PARTS = 16  # of the positions that have sums of their own at most, or long sums would round much
SPARSE = 64  # positions of a part for each number that it sums up to


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["ids", "weights"],
    meta_fields=["number", "axis"],
)
@dataclasses.dataclass(frozen=True)
class Segments:
    """The segment of each position, and its weight in the statistics of this."""

    ids: jax.Array  # int32, of the rank of the activation; `number`: in no segment
    weights: jax.Array | None  # of the rank of the activation; None: one
    number: int
    axis: int  # of small arrays, along which the segments lie


def inside(mask: Any, a: jax.Array) -> jax.Array:
    """`a`, which is zero at positions of no segment, if `mask` are `Segments`."""
    if not isinstance(mask, Segments):
        return a
    return jnp.where(mask.ids < mask.number, a, jnp.zeros((), a.dtype))


def at(mask: Any, a: jax.Array) -> jax.Array:
    """What `a` has for the segment of each position; it broadcasts to the activation.

    A position of no segment has what any has. `a` as it is if it has no segments.
    """
    if not isinstance(mask, Segments) or a.shape[mask.axis] == 1:
        return a
    ids, axis = jnp.minimum(mask.ids, mask.number - 1), mask.axis
    if any(part is not None for part in (*spec(ids), *spec(a))):
        return _at_by_product(ids, a, axis)
    along, rest = _axes(ids, axis)
    sizes = [ids.shape[i] for i in along] + [a.shape[i] for i in rest]
    index = _rows(ids, mask.number, axis, a.shape)
    found = _flat(a, ids, axis).at[index].get(mode="promise_in_bounds")
    return found.reshape(sizes).transpose(np.argsort([*along, *rest]).tolist())


def _axes(ids, axis):
    """The axes along which `ids` vary, and that of segments; and the others."""
    along = [i for i, n in enumerate(ids.shape) if n != 1 or i == axis]
    return along, [i for i in range(ids.ndim) if i not in along]


def _order(ids, axis):
    """The axes of a small array with those along which `ids` vary first, segments behind them."""
    along, rest = _axes(ids, axis)
    return [i for i in along if i != axis] + [axis] + rest


def _flat(a, ids, axis):
    """A small array as rows: one for each of the places that `ids` tell apart and each segment."""
    order = _order(ids, axis)
    rows = order.index(axis) + 1
    sizes = [a.shape[i] for i in order]
    return a.transpose(order).reshape(math.prod(sizes[:rows]), *sizes[rows:])


def _rows(ids, number, axis, shape):
    """For each position its row of a small array of `shape`; one behind all if in no segment."""
    index, places = 0, 1
    for i in _axes(ids, axis)[0]:
        if i != axis and shape[i] != 1:
            index = index * shape[i] + lax.broadcasted_iota(ids.dtype, ids.shape, i)
            places = places * shape[i]
    return jnp.where(ids < number, index * number + ids, places * number).reshape(-1)


def _chosen(ids, number, dtype):
    """One where a position is in a segment, else zero, without axes of size one; and its axes."""
    along = [i for i, n in enumerate(ids.shape) if n != 1]
    ids = jnp.squeeze(ids, tuple(i for i in range(ids.ndim) if i not in along))
    every = jnp.arange(number, dtype=ids.dtype).reshape(*(1,) * ids.ndim, number)
    ones = ids[..., None] == every
    return ones.astype(dtype), (*along, -1)


def _product(a, of_a, b, of_b, out, **how):
    """A product of arrays whose axes have these names, -1 the segments, at HIGHEST precision."""
    names = lambda axes: [i + 1 for i in axes]
    args = (a, names(of_a), b, names(of_b), names(out))
    return jnp.einsum(*args, precision=lax.Precision.HIGHEST, **how)


def _at_by_product(ids, a, axis):
    ones, of_ones = _chosen(ids, a.shape[axis], a.dtype)
    single = tuple(i for i, n in enumerate(a.shape) if n == 1)
    of_a = [-1 if i == axis else i for i in range(a.ndim) if i not in single]
    out = [i for i in range(a.ndim) if i in of_a or i in of_ones]
    found = _product(jnp.squeeze(a, single), of_a, ones, of_ones, out)
    return jnp.expand_dims(found, tuple(i for i in range(a.ndim) if i not in out))


def sums(
    fun: Callable | None,
    axes: tuple[int, ...],
    segments: Segments,
    wide: Sequence[jax.Array],
    small: Sequence[jax.Array] = (),
) -> list[jax.Array]:
    """Sums over `axes`, for each segment, of what a function gives: small arrays.

    `fun` takes the arrays `wide`, of the rank of the activation, and, of the small arrays `small`,
    what `at` gives. It is pointwise, closes over static values only, and returns a tuple of arrays
    of at least float32. None: `wide` themselves, which are such. Nothing of positions in no segment
    enters.
    """
    static: Any = dict(fun=fun, axes=tuple(axes), wides=len(wide))
    static |= dict(number=segments.number, axis=segments.axis)
    arrays = segments.ids, *wide, *small
    return _by_product(*arrays, **static) if is_plain() else _bind(*align(*arrays), **static)


def _values(ids, *arrays, fun, wides, number, axis):
    mask = Segments(ids, None, number, axis)
    full = (jnp.broadcast_to(a, jnp.broadcast_shapes(a.shape, ids.shape)) for a in arrays[:wides])
    wide = [inside(mask, a) for a in full]
    return wide if fun is None else fun(*wide, *(at(mask, a) for a in arrays[wides:]))


def _by_product(ids, *arrays, axes, **static):
    number, axis, totals = static["number"], static["axis"], []
    kept = [-1 if i == axis else i for i in range(ids.ndim) if i == axis or i not in axes]
    for a in _values(ids, *arrays, **static):
        (ones, of_ones), how, parts = _chosen(ids, number, a.dtype), {}, spec(a)
        if any(part is not None for part in parts):
            out = PartitionSpec(*(None if i < 0 else parts[i] for i in kept))
            how["out_sharding"] = NamedSharding(jax.typeof(a).sharding.mesh, out)
            ones = place(ones, (*(parts[i] for i in of_ones[:-1]), None), like=a)
        total = _product(a, range(ids.ndim), ones, of_ones, kept, **how)
        totals.append(jnp.expand_dims(total, tuple(i for i in axes if i != axis)))
    return totals


def _by_blocks(ids, *arrays, axes, fun, wides, number, axis):
    static: Any = dict(fun=fun, wides=wides, number=number, axis=axis)
    if not all(isinstance(n, int) for a in (ids, *arrays) for n in a.shape):  # exported families
        return _by_product(ids, *arrays, axes=axes, **static)
    length = max(a.shape[axis] for a in (ids, *arrays[:wides]))
    sizes = [length if i == axis else n for i, n in enumerate(ids.shape)]
    ids = jnp.broadcast_to(ids, sizes)
    (along, rest), order = _axes(ids, axis), _order(ids, axis)
    shape = lambda a: [number if i == axis else 1 if i in axes else n for i, n in enumerate(a)]
    places = shape(ids.shape)
    last = math.prod(places[i] for i in along) - 1
    over = tuple(k + 1 for k, i in enumerate(rest) if i in axes)
    wide = [_wide_rows(a, ids, axis) for a in arrays[:wides]]
    spread = lambda a: [places[i] if i in along else n for i, n in enumerate(a.shape)]
    tables = [_flat(jnp.broadcast_to(a, spread(a)), ids, axis) for a in arrays[wides:]]

    def add(totals, index, behind, *wide):
        if fun is not None:
            valid = jnp.expand_dims(index <= last, tuple(range(1, len(rest) + 1)))
            near = jnp.minimum(index, last)
            small = (a.at[near].get(mode="promise_in_bounds") for a in tables)
            wide = fun(*(jnp.where(valid, a, jnp.zeros((), a.dtype)) for a in wide), *small)
        values = (jnp.sum(a, over, keepdims=True) if over else a for a in wide)
        where = jnp.where(index <= last, index + behind, size)
        return [t.at[where].add(a, mode="drop") for t, a in zip(totals, values, strict=True)]

    like = jax.eval_shape(functools.partial(_values, **static), ids, *arrays)
    parts = max(1, min(PARTS, ids.size // (SPARSE * (last + 1))))
    size = parts * (last + 1)
    zeros = [jnp.zeros((size, *(shape(a.shape)[i] for i in rest)), a.dtype) for a in like]
    index = _rows(ids, number, axis, places)
    behind = lax.iota(jnp.int32, ids.size) // -(-ids.size // parts) * (last + 1)
    # Behind the barrier XLA sees rows, and does not copy an activation to make them.
    blocked = lax.optimization_barrier([index, behind, *wide])
    totals = [align(a, ids, *arrays)[0] for a in zeros]
    totals = _in_blocks(add, totals, blocked, BLOCK if fun else None)
    back = np.argsort(order).tolist()
    together = (jnp.sum(a.reshape(parts, last + 1, *a.shape[1:]), 0) for a in totals)
    split = lambda a, sizes: a.reshape([sizes[i] for i in order]).transpose(back)
    return [split(a, shape(b.shape)) for a, b in zip(together, like, strict=True)]


def _wide_rows(a, ids, axis):
    """An array of the rank of the activation as rows: one for each of `ids`."""
    along, rest = _axes(ids, axis)
    sizes = [ids.shape[i] if i in along else n for i, n in enumerate(a.shape)]
    a = jnp.broadcast_to(a, sizes).transpose(*along, *rest)
    return a.reshape(ids.size, *a.shape[len(along) :])


def _in_blocks(add, totals, arrays, numbers):
    """`add(totals, *arrays)`, in blocks of rows with so many numbers; None: in one."""
    rows = arrays[0].shape[0]
    row = max(math.prod(a.shape[1:]) for a in arrays)
    size = max(1, min(rows, numbers // max(row, 1))) if numbers else rows
    cut = lambda start, size: (lax.dynamic_slice_in_dim(a, start, size) for a in arrays)
    done = rows // size * size if 0 < size < rows else 0
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


def _batch(arrays, dims, *, axes, axis, **static):
    moved = dict(axes=tuple(i + 1 for i in axes), axis=axis + 1, **static)
    out = _bind(*at_front(arrays, dims), **moved)
    return out, [0] * len(out)


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
