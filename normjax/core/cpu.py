"""What XLA's CPU compiler needs: a fence between passes, and sums made at once or in tiles.

Other platforms lower both as if they were not there. Inside of `unfenced()` they leave no trace in
a program at all: so are evaluation, and norms without statistics that nobody differentiates.
"""

import contextlib
import contextvars
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import layout as memory
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from normjax.core.sharding import align, spec

_unfenced = contextvars.ContextVar("unfenced", default=False)
_in_training = contextvars.ContextVar("in_training", default=False)


@contextlib.contextmanager
def unfenced(always: bool = False) -> Iterator[None]:
    """While it is open, passes are traced as JAX's own operations alone; not in training.

    A training step is fast with fences also where it differentiates nothing. `always`: there too.
    """
    token = _unfenced.set(always or _unfenced.get() or not _in_training.get())
    try:
        yield
    finally:
        _unfenced.reset(token)


@contextlib.contextmanager
def in_training(train: bool) -> Iterator[None]:
    """While it is open, a training step is traced, or is not."""
    token = _in_training.set(train)
    try:
        yield
    finally:
        _in_training.reset(token)


def is_unfenced() -> bool:
    """Whether passes are traced as JAX's own operations alone, as inside of `unfenced()`."""
    return _unfenced.get()


fence_p = Primitive("normjax_fence")
fence_p.multiple_results = True


def fence(*arrays: jax.Array) -> list[jax.Array]:
    """The inputs of one pass, unchanged.

    On CPU, XLA shares what two passes could each recompute (a converted or centred activation) and
    so writes it out; an optimization barrier around all inputs of each pass keeps the passes apart.
    Other platforms fuse passes with one another and get none.
    """
    return list(arrays) if is_unfenced() else fence_p.bind(*arrays)


def _fence_jvp(primals, tangents):
    return fence_p.bind(*primals), list(tangents)


fence_p.def_impl(lambda *arrays: list(arrays))
fence_p.def_abstract_eval(lambda *avals: list(avals))
mlir.register_lowering(fence_p, mlir.lower_fun(lambda *arrays: list(arrays), multiple_results=True))
mlir.register_lowering(
    fence_p,
    mlir.lower_fun(lambda *arrays: lax.optimization_barrier(list(arrays)), multiple_results=True),
    platform="cpu",
)
ad.primitive_jvps[fence_p] = _fence_jvp
batching.primitive_batchers[fence_p] = lambda arrays, dims: (fence_p.bind(*arrays), dims)


# Sums of a fused product for each sample, over so many positions times lanes of channels, take XLA
# on CPU up to three times as long as one sum over all samples (timed on x86, in 32 and 16 bits);
# sums over tiles do not.
SLOW_SUMS = range((1 << 15) + 1, (1 << 18) + 1)
TILE = 1 << 14  # positions times lanes
LANES = 128  # at most so many channels count
# Several sums in one pass go over so few terms first that XLA on CPU unrolls them; many would take
# up to ten times as long. Terms that lie APART numbers from one another or more are read side by
# side; where no axis has such, they may be as near as NEAR (timed on x86, in 32 and 16 bits).
TERMS = (8, 7, 6, 5, 4)
APART, NEAR = 1 << 10, 1 << 4
COPY = 1 / 64  # of the largest array, at most, for a small one that is broadcast on the way

sums_p = Primitive("normjax_sums")
sums_p.multiple_results = True


def sum_of(fun: Callable, axes: tuple[int, ...], *arrays: jax.Array) -> jax.Array:
    """The sum over `axes`, kept as size one, of a pointwise function of arrays of one rank.

    `fun` closes over static values only and returns an array of at least float32. On CPU positions
    between samples and channels are summed in tiles where XLA would be slow; other platforms, and
    programs that XLA divides among devices, sum them as they are.
    """
    return sums_of(fun, axes, *arrays)[0]


def sums_of(fun: Callable, axes: tuple[int, ...], *arrays: jax.Array) -> list[jax.Array]:
    """As `sum_of`, of each array of the tuple that `fun` returns, which are of one dtype.

    On CPU, where XLA makes a pass for each sum, they are made in one if the shape allows it.
    """
    if not axes:
        return _values(fun, arrays)
    how = dict(fun=fun, axes=tuple(sorted(axes)))
    return _sums(*arrays, **how) if is_unfenced() else sums_p.bind(*align(*arrays), **how)


def _values(fun, arrays):
    shape = jnp.broadcast_shapes(*(a.shape for a in arrays))
    values = fun(*arrays)
    values = values if isinstance(values, tuple) else (values,)
    return [jnp.broadcast_to(a, shape) for a in values]


def _number(fun, arrays):
    return len(jax.eval_shape(functools.partial(_values, fun), arrays))


def _sums(*arrays, fun, axes):
    return [jnp.sum(a, axes, keepdims=True) for a in _values(fun, arrays)]


def _lower_for_cpu(context, *arrays, **how):
    alone = _alone(context.module_context.axis_context)
    rule = _sums_of_one_device if alone else functools.partial(_one_by_one, _sums)
    return mlir.lower_fun(rule, multiple_results=True)(context, *arrays, **how)


def _alone(context):
    """Whether a program is for one device, or shard_map's for each: nobody divides its arrays."""
    manual = getattr(context, "manual_axes", ())
    return manual.issuperset(context.mesh.axis_names) if manual else context.num_devices == 1


def _sums_of_one_device(*arrays, fun, axes):
    shape = jnp.broadcast_shapes(*(a.shape for a in arrays))
    sharded = any(part is not None for a in arrays for part in spec(a))  # over one: no views either
    if sharded or not all(isinstance(n, int) for n in shape):
        return _one_by_one(_sums, *arrays, fun=fun, axes=axes)
    if _number(fun, arrays) > 1 and (terms := _terms(arrays, shape, axes)):
        return _at_once(*arrays, fun=fun, axes=axes, shape=shape, **terms)
    tiles = _tiles(shape, axes) if len(arrays) > 1 else 0
    how = functools.partial(_in_tiles, shape=shape, tiles=tiles) if tiles else _sums
    return _one_by_one(how, *arrays, fun=fun, axes=axes)


def _one_by_one(how, *arrays, fun, axes):
    """A pass for each sum, by `how`; behind barriers, or XLA would write out what they share."""
    totals = []
    for i in range(_number(fun, arrays)):
        arrays = lax.optimization_barrier(arrays) if i else arrays
        totals += how(*arrays, fun=lambda *a, i=i: _values(fun, a)[i], axes=axes)
    return totals


def _in_tiles(*arrays, fun, axes, shape, tiles):
    first, last = axes[0], axes[-1] + 1
    cuts = (*range(first + 1), *range(last, len(shape) + 1))
    arrays = [_split(_merge(a, shape, cuts), first, tiles) for a in arrays]
    (parts,) = _values(fun, lax.optimization_barrier(arrays))
    total = jnp.sum(lax.optimization_barrier(jnp.sum(parts, first + 1)), first)
    return [jnp.expand_dims(total, axes)]


def _at_once(*arrays, fun, axes, shape, start, stop, terms):
    """All sums: first over `terms` equal parts of the positions on axes from `start` to `stop`."""
    cuts = (0, start, *range(stop, len(shape) + 1))
    arrays = [_split(_merge(a, shape, cuts), 1, terms) for a in arrays]
    values = tuple(_values(fun, lax.optimization_barrier(arrays)))
    zeros = tuple(np.zeros((), a.dtype) for a in values)
    add = lambda a, b: tuple(p + q for p, q in zip(a, b, strict=True))
    parts = lax.optimization_barrier(lax.reduce(values, zeros, add, (1,)))
    each = math.prod(shape[start:stop]) // terms, *(1,) * (stop - start - 1)
    parts = (a.reshape(*shape[:start], *each, *shape[stop:]) for a in parts)
    return [jnp.sum(a, axes, keepdims=True) for a in parts]


def _merge(a, shape, cuts):
    """`a` with all axes between two cuts made one, of size one or as in `shape`."""
    sizes = _merged(a.shape, shape, cuts)
    ends = itertools.pairwise(cuts)
    return jnp.broadcast_to(a, sizes).reshape([math.prod(sizes[i:j]) for i, j in ends])


def _merged(sizes, shape, cuts):
    """`sizes`, of which those between two cuts are all one or all as in `shape`."""
    groups = ((sizes[i:j], shape[i:j]) for i, j in itertools.pairwise(cuts))
    return [n for own, full in groups for n in (own if math.prod(own) == 1 else full)]


def _split(a, axis, number):
    """`a` with `axis` as so many equal parts, in order."""
    size = a.shape[axis]
    parts = (1, 1) if size == 1 else (number, size // number)
    return a.reshape(*a.shape[:axis], *parts, *a.shape[axis + 1 :])


def _terms(arrays, shape, axes):
    """Which axes hold the positions that are summed in parts first, and in how many; or None."""
    found = None
    for start in reversed(axes):
        stop = next(i for i in range(start, len(shape) + 1) if i not in axes)
        cuts = (0, start, *range(stop, len(shape) + 1))
        sizes = ((a.size, math.prod(_merged(a.shape, shape, cuts))) for a in arrays)
        cheap = all(new == old or new <= COPY * math.prod(shape) for old, new in sizes)
        positions, row = math.prod(shape[start:stop]), math.prod(shape[stop:])
        terms = next((k for k in TERMS if positions % k == 0), None)
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
    if not between or positions * lanes not in SLOW_SUMS:
        return 0
    fits = (k for k in range(2, positions // 32 + 1) if positions % k == 0)
    return next((k for k in fits if positions // k * lanes <= TILE), 0)


def _sums_jvp(primals, tangents, **how):
    moved = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]

    def of_moved(*some):
        arrays = list(primals)
        for i, a in zip(moved, some, strict=True):
            arrays[i] = a
        return _sums(*arrays, **how)

    given = tuple(primals[i] for i in moved), tuple(tangents[i] for i in moved)
    return sums_p.bind(*primals, **how), jax.jvp(of_moved, *given)[1]


def _sums_batch(arrays, dims, *, fun, axes):
    arrays = [
        jnp.expand_dims(a, 0) if d is None else jnp.moveaxis(a, d, 0)
        for a, d in zip(arrays, dims, strict=True)
    ]
    out = sums_of(fun, tuple(i + 1 for i in axes), *arrays)
    return out, [0] * len(out)


sums_p.def_impl(_sums)
sums_p.def_abstract_eval(
    lambda *avals, **how: jax.make_jaxpr(functools.partial(_sums, **how))(*avals).out_avals
)
mlir.register_lowering(sums_p, mlir.lower_fun(_sums, multiple_results=True))
mlir.register_lowering(sums_p, _lower_for_cpu, platform="cpu")
ad.primitive_jvps[sums_p] = _sums_jvp
batching.primitive_batchers[sums_p] = _sums_batch


# Before JAX 0.12 the compiler gathers whole arrays to set their order in memory.
ORDERS = jax.__version_info__ >= (0, 12)
written_p = Primitive("normjax_written")


def written(x: jax.Array, dtype: Any) -> jax.Array:
    """`x` in `dtype`; on CPU the last axis minor in memory, in one pass.

    There XLA would copy a transposed array once more, and round to bfloat16 slowly while it does.
    Exported programs may not say an order, so theirs do without. It is not differentiated.
    """
    if is_unfenced():
        return x.astype(dtype)
    return written_p.bind(x, dtype=jnp.dtype(dtype))


def _written(x, dtype, ordered=False):
    if x.dtype == jnp.float32 and dtype == jnp.bfloat16 and ordered:
        bits = lax.bitcast_convert_type(lax.reduce_precision(x, 8, 7), jnp.uint32)
        y = lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), dtype)
    else:
        y = x.astype(dtype)
    if not (ordered and ORDERS):
        return y
    return memory.with_layout_constraint(y, memory.Layout(tuple(range(y.ndim))))


def _lower_written_for_cpu(context, x, *, dtype):
    ordered = not context.module_context.lowering_parameters.for_export
    rule = functools.partial(_written, ordered=ordered)
    return mlir.lower_fun(rule, multiple_results=False)(context, x, dtype=dtype)


def _written_batch(arrays, dims, *, dtype):
    return written_p.bind(*arrays, dtype=dtype), *dims


written_p.def_impl(_written)
written_p.def_abstract_eval(lambda x, *, dtype: x.update(dtype=dtype))
mlir.register_lowering(written_p, mlir.lower_fun(_written, multiple_results=False))
mlir.register_lowering(written_p, _lower_written_for_cpu, platform="cpu")
batching.primitive_batchers[written_p] = _written_batch
