"""What XLA's CPU compiler needs: a fence between passes, and sums made jointly or in tiles.

Other platforms lower both as if they were not there. Inside of `unfenced()` they leave no trace in
a program at all: so are evaluation, and norms without statistics that nobody differentiates.
"""

import contextlib
import contextvars
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from normjax.core import compat, gpu
from normjax.core.compat import is_plain
from normjax.core.sharding import align, spec

_unfenced = contextvars.ContextVar("unfenced", default=False)
_in_training = contextvars.ContextVar("in_training", default=False)


def unfenced() -> contextlib.AbstractContextManager[None]:
    """While it is open, passes are traced as JAX's own operations alone; not in training.

    A training step is fast with fences also where it differentiates nothing.
    """
    return _during(_unfenced, _unfenced.get() or not _in_training.get())


def in_training(train: bool) -> contextlib.AbstractContextManager[None]:
    """While it is open, a training step is traced, or is not."""
    return _during(_in_training, train)


@contextlib.contextmanager
def _during(variable, value):
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def is_unfenced() -> bool:
    """Whether passes are traced as JAX's own operations alone, as inside of `unfenced()`."""
    return _unfenced.get() or is_plain()


def fence(*arrays: jax.Array, last: bool = False) -> list[jax.Array]:
    """The inputs of one pass, unchanged.

    On CPU, XLA shares what two passes could each recompute (a converted or centred activation) and
    so writes it out; an optimization barrier around all inputs of each pass keeps the passes apart.
    On GPU so are, by their small inputs, the `last` pass and those before it. The TPU compiler
    fuses passes with one another and gets none.
    """
    return list(arrays) if is_unfenced() else _bind_fence(*arrays, last=last)


_bind_fence = compat.register(
    "normjax_fence",
    lambda *arrays, last: list(arrays),
    abstract=lambda *avals, last: list(avals),
    jvp=lambda primals, tangents, last: (_bind_fence(*primals, last=last), list(tangents)),
    batch=lambda arrays, dims, last: (_bind_fence(*arrays, last=last), dims),
    on_cpu=lambda *_: lambda *arrays, last: lax.optimization_barrier(list(arrays)),
    on_gpu=lambda *_: lambda *arrays, last: gpu.fence_small(*arrays) if last else list(arrays),
)


# Tiles. For the sums of a fused product XLA on CPU takes up to three times as long for each sample
# as over all samples, where positions times channels (LANES at most) are in SLOW; not so in tiles
# of at most TILE. Timed on x86, in 32 and 16 bits, as is what follows.
SLOW = range((1 << 15) + 1, (1 << 18) + 1)
TILE = 1 << 14
LANES = 128
# Joint sums. XLA makes several sums fast in one pass where it unrolls them: first over as many
# equal parts of the positions as one of TERMS says (many positions: as the first, and the rest by
# itself). A part must begin at least APART numbers behind the one before, so that they are read
# side by side; where no axis allows that, NEAR. A smaller array may be broadcast for it up to the
# share COPY of the largest.
TERMS = (8, 7, 6, 5, 4)
APART, NEAR = 1 << 10, 1 << 4
COPY = 1 / 64


def sums_of(fun: Callable, axes: tuple[int, ...], *arrays: jax.Array) -> list[jax.Array]:
    """Sums over `axes`, kept as size one, of what a pointwise function of arrays of one rank gives.

    `fun` closes over static values only and returns an array of at least float32, or a tuple of
    such of one dtype. On CPU, where XLA makes a pass for each sum, they are made in one if the
    shape allows it, and positions between samples and channels are summed in tiles where XLA would
    be slow. Other platforms, and programs that XLA divides among devices, sum them as they are.
    """
    if not axes:
        return _values(fun, arrays)
    static = dict(fun=fun, axes=tuple(sorted(axes)))
    return _sums(*arrays, **static) if is_unfenced() else _bind_sums(*align(*arrays), **static)


def _values(fun, arrays):
    shape = jnp.broadcast_shapes(*(a.shape for a in arrays))
    values = fun(*arrays)
    values = values if isinstance(values, tuple) else (values,)
    return [jnp.broadcast_to(a, shape) for a in values]


def _number(fun, arrays):
    return len(jax.eval_shape(functools.partial(_values, fun), arrays))


def _sums(*arrays, fun, axes):
    return [jnp.sum(a, axes, keepdims=True) for a in _values(fun, arrays)]


def _sum_on_one_gpu(*arrays, fun, axes):
    return gpu.sums(_values(fun, arrays), axes)


def _sum_on_one_device(*arrays, fun, axes):
    shape = jnp.broadcast_shapes(*(a.shape for a in arrays))
    sharded = any(part is not None for a in arrays for part in spec(a))  # over one: no views either
    if sharded or not all(isinstance(n, int) for n in shape):
        return _sum_separately(_sums, *arrays, fun=fun, axes=axes)
    if _number(fun, arrays) > 1 and (terms := _terms(arrays, shape, axes)):
        return _sum_jointly(*arrays, fun=fun, axes=axes, shape=shape, **terms)
    tiles = _tiles(shape, axes) if len(arrays) > 1 else 0
    sums = functools.partial(_sum_in_tiles, shape=shape, tiles=tiles) if tiles else _sums
    return _sum_separately(sums, *arrays, fun=fun, axes=axes)


def _sum_separately(sums, *arrays, fun, axes):
    """A pass for each sum, by `sums`; behind barriers, or XLA would write out what they share."""
    totals = []
    for i in range(_number(fun, arrays)):
        arrays = lax.optimization_barrier(arrays) if i else arrays
        totals += sums(*arrays, fun=lambda *a, i=i: _values(fun, a)[i], axes=axes)
    return totals


def _sum_in_tiles(*arrays, fun, axes, shape, tiles):
    first, last = axes[0], axes[-1] + 1
    cuts = (*range(first + 1), *range(last, len(shape) + 1))
    arrays = [_divided(a, shape, cuts, first, tiles) for a in arrays]
    (parts,) = _values(fun, lax.optimization_barrier(arrays))
    total = jnp.sum(lax.optimization_barrier(jnp.sum(parts, first + 1)), first)
    return [jnp.expand_dims(total, axes)]


def _sum_jointly(*arrays, fun, axes, shape, start, stop, terms):
    """All sums: first over `terms` equal parts of the positions on axes from `start` to `stop`."""
    cuts, positions = (0, start, *range(stop, len(shape) + 1)), math.prod(shape[start:stop])
    rest = positions % terms
    divide = functools.partial(_divided, shape=shape, cuts=cuts, at=1)
    add = lambda a, b: tuple(p + q for p, q in zip(a, b, strict=True))

    def total(arrays, each):
        values = tuple(_values(fun, arrays))
        zeros = tuple(np.zeros((), a.dtype) for a in values)
        parts = lax.optimization_barrier(lax.reduce(values, zeros, add, (1,)))
        sizes = *shape[:start], each, *(1,) * (stop - start - 1), *shape[stop:]
        return [jnp.sum(a.reshape(sizes), axes, keepdims=True) for a in parts]

    most = [divide(a, number=terms, within=(0, positions - rest)) for a in arrays]
    sums = total(lax.optimization_barrier(most), positions // terms)
    if not rest:
        return sums
    last = [divide(a, number=rest, within=(positions - rest, positions)) for a in arrays]
    return list(add(sums, total(last, 1)))


def _divided(a, shape, cuts, at, number, within=None):
    """`a` with all axes between two cuts made one, and of these the one at `at` `number` parts.

    `within`: of this one, the positions from the first to before the second.
    """
    full = _merged(a.shape, shape, cuts)
    sizes = [math.prod(full[i:j]) for i, j in itertools.pairwise(cuts)]
    a = jnp.broadcast_to(a, full).reshape(sizes)
    if within is not None and sizes[at] > 1:
        a = lax.slice_in_dim(a, *within, axis=at)
    parts = number if sizes[at] > 1 else 1
    return a.reshape(*a.shape[:at], parts, a.shape[at] // parts, *a.shape[at + 1 :])


def _merged(sizes, shape, cuts):
    """`sizes`, of which those between two cuts are all one or all as in `shape`."""
    groups = ((sizes[i:j], shape[i:j]) for i, j in itertools.pairwise(cuts))
    return [n for own, full in groups for n in (own if math.prod(own) == 1 else full)]


def _terms(arrays, shape, axes):
    """Which axes hold the positions that are summed in parts first, and in how many; or None."""
    found = None
    for start in reversed(axes):
        stop = next(i for i in range(start, len(shape) + 1) if i not in axes)
        cuts = (0, start, *range(stop, len(shape) + 1))
        sizes = ((a.size, math.prod(_merged(a.shape, shape, cuts))) for a in arrays)
        cheap = all(new == old or new <= COPY * math.prod(shape) for old, new in sizes)
        positions, row = math.prod(shape[start:stop]), math.prod(shape[stop:])
        most = TERMS[0] if positions >= TERMS[0] ** 2 else None  # with a rest
        terms = next((k for k in TERMS if positions % k == 0), most)
        if cheap and terms and (apart := positions // terms * row) >= NEAR:
            found = dict(start=start, stop=stop, terms=terms)
            if apart >= APART:
                break
    return found


def _tiles(shape, axes):
    """How many tiles the positions of each sample make for fast sums; 0: they stay together."""
    first, last = axes[0], axes[-1] + 1
    positions, lanes = math.prod(shape[first:last]), min(shape[-1], LANES)
    between = axes == tuple(range(first, len(shape) - 1)) and math.prod(shape[:first]) > 1
    if not between or positions * lanes not in SLOW:
        return 0
    fits = (k for k in range(2, positions // 32 + 1) if positions % k == 0)
    return next((k for k in fits if positions // k * lanes <= TILE), 0)


def _sums_jvp(primals, tangents, **static):
    moved = [i for i, t in enumerate(tangents) if not isinstance(t, compat.Zero)]

    def of_moved(*some):
        arrays = list(primals)
        for i, a in zip(moved, some, strict=True):
            arrays[i] = a
        return _sums(*arrays, **static)

    given = tuple(primals[i] for i in moved), tuple(tangents[i] for i in moved)
    return _bind_sums(*primals, **static), jax.jvp(of_moved, *given)[1]


def at_front(arrays: Any, dims: Any) -> list[jax.Array]:
    """Arrays of one rank with their mapped axis, or one of size one, first."""
    return [
        jnp.expand_dims(a, 0) if d is None else jnp.moveaxis(a, d, 0)
        for a, d in zip(arrays, dims, strict=True)
    ]


def _sums_batch(arrays, dims, *, fun, axes):
    out = sums_of(fun, tuple(i + 1 for i in axes), *at_front(arrays, dims))
    return out, [0] * len(out)


_bind_sums = compat.register(
    "normjax_sums",
    _sums,
    abstract=lambda *avals, **static: (
        jax.make_jaxpr(functools.partial(_sums, **static))(*avals).out_avals
    ),
    jvp=_sums_jvp,
    batch=_sums_batch,
    on_cpu=lambda alone, _: (
        _sum_on_one_device if alone else functools.partial(_sum_separately, _sums)
    ),
    on_gpu=lambda alone, _: _sum_on_one_gpu if alone else _sums,
)


def positive(z: jax.Array, zero: jax.Array) -> jax.Array:
    """One where `z` is positive, else zero, in its dtype; not differentiated.

    On CPU by operations that XLA fuses into sums. A comparison it would write out, and so it would
    constants that several passes share: hence `zero`, which broadcasts to `z`, is an input.
    """
    return _step(z, zero)[0] if is_unfenced() else _bind_step(*align(z, zero))[0]


def _step(z, zero):
    return [(z > 0).astype(z.dtype)]


def _ratio(z, zero):
    return [jnp.maximum(z, zero) / jnp.maximum(z, zero + 1e-37)]


_bind_step = compat.register(
    "normjax_step",
    _step,
    abstract=lambda z, zero: [z],
    batch=lambda arrays, dims: (_bind_step(*at_front(arrays, dims)), [0]),
    on_cpu=lambda *_: _ratio,
)


def written(x: jax.Array, dtype: Any) -> jax.Array:
    """`x` in `dtype`, not differentiated; on CPU the last axis minor in memory, in one pass.

    There XLA would copy a transposed array once more, and round to bfloat16 slowly while it does.
    Exported programs may not say an order, so theirs do without.
    """
    return x.astype(dtype) if is_unfenced() else _bind_written(x, dtype=jnp.dtype(dtype))[0]


def _written(x, dtype):
    return [x.astype(dtype)]


def _written_in_order(x, dtype):
    if x.dtype != jnp.float32 or dtype != jnp.bfloat16:
        return [compat.in_order(x.astype(dtype))]
    bits = lax.bitcast_convert_type(lax.reduce_precision(x, 8, 7), jnp.uint32)
    return [compat.in_order(lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), dtype))]


_bind_written = compat.register(
    "normjax_written",
    _written,
    abstract=lambda x, *, dtype: [x.update(dtype=dtype)],
    batch=lambda arrays, dims, *, dtype: (_bind_written(*arrays, dtype=dtype), dims),
    on_cpu=lambda _, exported: _written if exported else _written_in_order,
)
