"""How running statistics move: four averages, with one guard."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from normjax.core import checks, statistics
from normjax.core.fields import RunningFields
from normjax.core.sharding import place, spec
from normjax.core.statistics import Moments, Parted
from normjax.core.structs import AxisName, Pool, Running


def counts(method: RunningFields) -> bool:
    """Whether the state counts updates: for the average, or for a schedule."""
    return method.running_average in ("debiased", "cumulative") or checks.has_schedule(method)


def init(method: RunningFields, shape: tuple[int, ...]) -> Running:
    """Mean zero, variance one, no updates and no values so far."""
    zeros = jnp.zeros(shape, jnp.float32)
    count = jnp.zeros((), jnp.float32) if counts(method) else None
    pool = Pool(*(zeros,) * 4) if method.running_average == "pooled" else None
    return Running(zeros, jnp.ones(shape, jnp.float32), count, pool)


def require_state(method: RunningFields, state: Any) -> None:
    """ValueError unless `state` has the leaves that the fields of `method` ask for."""
    checks.require_leaf(method, state, "count", counts(method))
    checks.require_leaf(method, state, "pool", method.running_average == "pooled")


def absorb(method: RunningFields, state: Running, seen: Moments | Parted) -> Running:
    """Moves `state` towards the moments of a batch; a feature without samples keeps its own.

    `method.running_average` says how; see `BatchNorm`. Of parts of a batch, stacked on axis 0 of
    `seen.parts`, the updates are averaged, over those with a sample.
    """
    if not isinstance(seen, Parted):
        return _absorb(method, state, seen)
    if method.running_average == "pooled":
        return _absorb(method, state, statistics.merge(seen.parts))
    each = jax.vmap(lambda part: _absorb(method, state, part))(seen.parts)
    return average_filled(state, each, filled(seen.parts))


def absorb_whole(method: RunningFields, state: Running, seen: Any) -> Running:
    """Moves `state` towards the moments of the whole batch, whatever its parts."""
    return absorb(method, state, statistics.whole(seen))


def filled(parts: Moments) -> jax.Array:
    """bool[parts]: whether a part of a batch has a sample."""
    return jnp.any(parts.count > 0, axis=tuple(range(1, parts.count.ndim)))


def _absorb(method, state, seen):
    new, valid = measured(method, seen, state.mean)
    var, count = new.var, None
    if method.unbiased_running_var:
        # Of a sum of weights below two, less than n / (n - 1), and of one at most one, nothing.
        var = var * jnp.maximum(new.count, 1) / jnp.maximum(new.count - 1, 1)
    if state.count is not None:
        count = state.count + jnp.any(valid).astype(state.count.dtype)
    if state.pool is not None:
        return _pooled(state, new, valid)._replace(count=count)
    keep = weight(method, state.count, state.mean.dtype)
    mean, var = blend(keep, (state.mean, state.var), (new.mean, var), valid)
    return Running(mean, var, count)


def measured(method: RunningFields, seen: Moments, like: jax.Array) -> tuple[Moments, jax.Array]:
    """`seen` with the shape and sharding of `like`, as a constant, and where it may be recorded."""
    new = lax.stop_gradient(Moments(*(a.reshape(like.shape) for a in seen)))
    new = Moments(*(place(a, spec(like), like=like) for a in new))
    valid = new.count > 0
    if method.skip_nonfinite:
        valid &= jnp.all(jnp.isfinite(new.mean) & jnp.isfinite(new.var))
    return new, valid


def momentum_at(method: RunningFields, count: jax.Array | None, dtype: Any) -> jax.Array:
    """The weight of the old statistics after `count` updates."""
    value = method.momentum(count) if callable(method.momentum) else method.momentum
    return jnp.asarray(value, dtype)


def weight(method: RunningFields, count: Any, dtype: Any) -> jax.Array:
    """The weight of the old statistics, for the kind of average."""
    keep: Any = method.momentum
    if method.running_average == "debiased" and keep < 1:  # momentum 1 weighs all batches alike
        rate = math.log(max(keep, 1e-30))  # the expm1 of momentum 0 is -1 all the same
        keep = jnp.asarray(keep, dtype)
        return keep * jnp.expm1(rate * count) / jnp.expm1(rate * (count + 1))
    if method.running_average in ("debiased", "cumulative"):
        return count / (count + 1)
    return momentum_at(method, count, dtype)


def blend(keep: jax.Array, old: Any, new: Any, valid: jax.Array) -> Any:
    """The tree `old` moved towards its equal `new` where `valid`; `keep` weighs the old."""

    def one(a, b):
        b, share = b.astype(a.dtype), keep.astype(a.dtype)
        return jnp.where(valid, share * a + (1 - share) * b, a)

    return jax.tree.map(one, old, new)


def _pooled(state, new, valid):
    """Statistics of all values so far. Sums are pairs: the rounded number and its rest."""
    pool = state.pool
    mean, var, n = (a.astype(state.mean.dtype) for a in (new.mean, new.var, new.count))
    count, count_rest = _add(pool.count, pool.count_rest, n)
    share = n / statistics.divisor(count)
    gap = (mean - state.mean) - pool.mean_rest
    slope = (var - state.var) - pool.var_rest + (1 - share) * jnp.square(gap)
    mean, mean_rest = _add(state.mean, pool.mean_rest, share * gap)
    var, var_rest = _add(state.var, pool.var_rest, share * slope)
    moved = Running(mean, var, None, Pool(count, count_rest, mean_rest, var_rest))
    return jax.tree.map(lambda a, b: jnp.where(valid, a, b), moved, state._replace(count=None))


def _add(high, low, step):
    """`high + low + step` as a rounded sum and its rest (Knuth's two-sum, then a fast one)."""
    total = high + step
    part = total - high
    rest = low + ((high - (total - part)) + (step - part))
    rounded = total + rest
    return rounded, rest - (rounded - total)


def average_filled(old: Any, new: Any, filled: jax.Array, axis_name: AxisName = None) -> Any:
    """The mean over the parts of a batch, also over devices, of the states that they made of `old`.

    `new` has them stacked on axis 0. Parts that are not `filled`, without a sample, do not count.
    """

    def total(a):
        weight = jnp.expand_dims(filled, tuple(range(1, a.ndim))).astype(a.dtype)
        return jnp.sum(a * weight, 0)

    if not jax.tree.leaves(new):
        return new
    sums = jax.tree.map(total, new), jnp.sum(filled.astype(jnp.float32))
    sums, number = sums if axis_name is None else lax.psum(sums, axis_name)
    mean = lambda a, b: jnp.where(number > 0, b / jnp.maximum(number, 1).astype(b.dtype), a)
    return jax.tree.map(mean, old, sums)
