"""Mean and variance of an activation: exact at any offset, in the passes that a compiler needs.

Two passes: mean = sum(x) / n, var = sum((x - mean)^2) / n. XLA's CPU compiler makes one sum of one
read in any case; its GPU compiler reads rows once for all of a program that keeps no statistics.

One read about a share, on GPU and for rows: sums about a centre k, the mean of a share f of all
positions, with d = x - k: mean = k + sum(d) / n, var = sum(d^2) / n - (sum(d) / n)^2. For any data
(k - mean)^2 is at most (1 / f - 1) var (Cauchy-Schwarz), so that cancellation costs no more than
1 / f roundings.

One read about zero, for the rest on TPU, whose compiler joins such sums to the convolution that
makes x. Where mean^2 > NEAR var for any of them, and the difference of squares would be inexact, a
loop that else runs no times sums about the mean, in blocks.
"""

import contextlib
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from normjax.core import compat, gpu, groups
from normjax.core.compat import is_plain
from normjax.core.cpu import at_front, fence, is_unfenced, sums_of, unfenced
from normjax.core.segments import Segments, inside, sums
from normjax.core.sharding import align, spec

SHARE = 64  # the centre is the mean of one in so many positions
NEAR = 64  # cancellation in the variance costs at most so many roundings
BLOCKS = 32  # of the loop

How = tuple[tuple[int, ...], int | None]  # reduced axes, and groups of the last axis


def wide(dtype: Any) -> Any:
    """The dtype of statistics and arithmetic for an input of `dtype`."""
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.dtype(jnp.float32)


def widen(x: jax.Array) -> jax.Array:
    """`x` in at least float32; float32 and float64 stay as they are."""
    return x.astype(wide(x.dtype))


def keep(mask: Any, x: jax.Array) -> jax.Array:
    """`x` where `mask` (None: everywhere), else zero; linear in `x` and its own transpose.

    A mask of floating numbers holds weights, with which `x` is multiplied; it may be `Segments`.
    """
    if isinstance(mask, Segments):
        return keep(mask.weights, inside(mask, x))
    if mask is None:
        return x
    return x * mask if is_weighted(mask) else jnp.where(mask, x, jnp.zeros((), x.dtype))


def is_weighted(mask: Any) -> bool:
    """Whether positions count by the numbers of a floating array."""
    return mask is not None and jnp.issubdtype(mask.dtype, jnp.floating)


def pool(a: jax.Array, channel_groups: int | None) -> jax.Array:
    """Sums over groups of the last axis, repeated for every member: its own transpose."""
    if channel_groups is None:
        return a
    parts = groups.split(a, a.ndim - 1, channel_groups)
    total = jnp.broadcast_to(parts.sum(-1, keepdims=True), parts.shape)
    return groups.join(total, a.ndim - 1, like=a)


def average(a: jax.Array, mask: Any, n: jax.Array, how: How) -> jax.Array:
    """Sum of `a` where `mask`, over what `how` says, divided by `n`."""
    axes, channel_groups = how
    if isinstance(mask, Segments):
        bare = dataclasses.replace(mask, weights=None)
        return _averages(None, keep(mask.weights, a), bare, n, how)[0]
    return pool(jnp.sum(keep(mask, a), axes, keepdims=True), channel_groups) / n


def mean_and_variance(
    x: jax.Array, mask: Any, n: jax.Array, how: How
) -> tuple[jax.Array, jax.Array]:
    """Mean and population variance of `x`, of which `n` values count; not differentiated."""
    if isinstance(mask, Segments):
        return _of_segments(x, mask, n, how)
    if is_plain():
        return _two_passes(x, mask, n, how)
    arrays = (x, n) if mask is None else (x, n, mask)
    mean, var = _bind(*align(*arrays), how=how, fenced=not is_unfenced())
    return mean, var


def _square(x, centre, mask=None):
    return keep(mask, jnp.square(widen(x) - centre))


def _two_passes(x, mask, n, how):
    axes, channel_groups = how
    mean = average(widen(*fence(x)), mask, n, how)
    valid = () if mask is None else (mask,)
    (square,) = sums_of(_square, axes, *fence(x, mean, *valid))
    return mean, pool(square, channel_groups) / n


def mean_square(x: jax.Array, mask: Any, n: jax.Array, how: How) -> jax.Array:
    """Mean square of `x`, of which `n` values count; not differentiated."""
    if isinstance(mask, Segments):
        return _averages(lambda x: (jnp.square(x),), x, mask, n, how)[0]
    return average(jnp.square(widen(*fence(x))), mask, n, how)


def _of_segments(x, segments, n, how):
    """The second pass corrects the mean: sums in blocks round long segments more than others."""
    (mean,) = _averages(None, x, segments, n, how)
    both = lambda x, mean: (x - mean, jnp.square(x - mean))
    gap, square = _averages(both, x, segments, n, how, mean)
    return mean + gap, jnp.maximum(square - jnp.square(gap), 0)


def _averages(fun, x, segments, n, how, *small):
    """Averages in each segment of what `fun(x, *small)` gives, or of `x`, made as it is read."""
    axes, channel_groups = how
    valid = () if segments.weights is None else (segments.weights,)

    def values(x, *rest):
        weights, small = (rest[0], rest[1:]) if valid else (None, rest)
        x = widen(x)
        return tuple(keep(weights, a) for a in ((x,) if fun is None else fun(x, *small)))

    as_it_is = fun is None and not valid and x.dtype == wide(x.dtype)
    totals = sums(None if as_it_is else values, axes, segments, (x, *valid), small)
    return [pool(a, channel_groups) / n for a in totals]


def _on_gpu(x, mask, n, how):
    in_one_kernel = _is_rows(x, how) and is_unfenced()
    if mask is not None or in_one_kernel:  # a share may be all masked
        return _two_passes(x, mask, n, how)
    return _about_share(x, n, how)


def _on_tpu(x, mask, n, how, alone=True):
    if is_weighted(mask):
        return _two_passes(x, mask, n, how)
    # A loop has x written for it; and devices that divide the samples must agree to run it.
    no_loop = _is_rows(x, how) or not (alone or 0 in how[0])
    return _about_share(x, n, how) if no_loop and mask is None else _about_zero(x, mask, n, how)


def _is_rows(x, how):
    axes = how[0]
    return axes == tuple(range(axes[0], x.ndim))


def _about_share(x, n, how):
    axes, channel_groups = how
    cuts = _share(x, axes)
    if cuts is None:
        return _two_passes(x, None, n, how)
    share = x[cuts]
    number = math.prod(share.shape[i] for i in axes)
    number = number * x.shape[-1] // channel_groups if channel_groups else number
    centre = average(widen(share), None, jnp.full((), number, n.dtype), how)
    shifted = widen(x) - centre
    total, square = gpu.sums((shifted, jnp.square(shifted)), axes)
    gap = pool(total, channel_groups) / n
    return centre + gap, jnp.maximum(pool(square, channel_groups) / n - jnp.square(gap), 0)


def _share(x, axes):
    """Slices of the first positions, one in SHARE, samples last; None if all axes are divided."""
    cuts, left = [slice(None)] * x.ndim, SHARE
    whole = [i for i in (*axes[1:], axes[0]) if spec(x)[i] is None]
    for i in whole:
        parts = min(left, x.shape[i])
        cuts[i] = slice(-(-x.shape[i] // parts))
        left = -(-left // parts)
    return tuple(cuts) if whole else None


def _about_zero(x, mask, n, how):
    axes, channel_groups = how
    sums = [
        jnp.sum(keep(mask, f(widen(x))), axes, keepdims=True) for f in (jnp.asarray, jnp.square)
    ]
    mean, square = (pool(a, channel_groups) / n for a in sums)
    var = square - jnp.square(mean)
    far = jnp.any(~(jnp.square(mean) <= NEAR * var))  # also where squares overflow
    sums = _sums_about(mean, x, mask, axes, far, like=sums[0])
    gap, square = (pool(a, channel_groups) / n for a in sums)
    return mean + gap, jnp.where(far, square - jnp.square(gap), var)


def _sums_about(centre, x, mask, axes, needed, like):
    """Sums of `x - centre` and of its square over `axes` where `mask`; zeros if not `needed`."""
    whole = [i for i in axes if i and spec(x)[i] is None]  # samples are on many devices
    axis = max(whole, key=lambda i: x.shape[i], default=axes[0])
    blocks = max((k for k in range(1, BLOCKS + 1) if whole and x.shape[axis] % k == 0), default=1)
    size = x.shape[axis] // blocks

    def add(carry):
        i, *sums = carry
        whole = lambda a: blocks == 1 or a.shape[axis] == 1
        at = lambda a: a if whole(a) else lax.dynamic_slice_in_dim(a, i * size, size, axis)
        valid = None if mask is None else at(mask)
        shifted = keep(valid, widen(at(x)) - centre)
        found = (jnp.sum(a, axes, keepdims=True) for a in (shifted, jnp.square(shifted)))
        return i + 1, *(a + b for a, b in zip(sums, found, strict=True))

    zero, _ = align(jnp.zeros_like(like), like)
    carry = *align(jnp.zeros((), jnp.int32), needed)[:1], zero, zero
    with jax.named_scope("where_inexact"):  # the name by which benchmarks know the loop
        return lax.while_loop(lambda c: needed & (c[0] < blocks), add, carry)[1:]


def _by(passes):
    """The function that stands for the primitive in programs where `passes` make the statistics."""

    def run(x, n, mask=None, *, how, fenced):
        # Neither an exported family, nor empty, nor groups of channels alone.
        usual = how[0] and all(isinstance(size, int) and size > 0 for size in x.shape)
        with contextlib.nullcontext() if fenced else unfenced():
            return list(align(*(passes if usual else _two_passes)(x, mask, n, how)))

    return run


def _batch(arrays, dims, *, how, fenced):
    axes, channel_groups = how
    how = tuple(i + 1 for i in axes), channel_groups
    return _bind(*at_front(arrays, dims), how=how, fenced=fenced), [0, 0]


_bind = compat.register(
    "normjax_moments",
    _by(_two_passes),
    abstract=lambda *avals, **static: (
        jax.make_jaxpr(functools.partial(_by(_two_passes), **static))(*avals).out_avals
    ),
    batch=_batch,
    on_gpu=lambda *_: _by(_on_gpu),
    on_tpu=lambda alone, _: _by(functools.partial(_on_tpu, alone=alone)),
)
