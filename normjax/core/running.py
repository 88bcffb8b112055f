"""How running statistics move."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from normjax.core.sharding import place, spec
from normjax.core.structs import AxisName, Features, Moments, Running, feature_shape


def init(features: Features, *, counted: bool = False) -> Running:
    """Mean zero, variance one, no updates so far."""
    shape = feature_shape(features)
    count = jnp.zeros((), jnp.float32) if counted else None
    return Running(jnp.zeros(shape, jnp.float32), jnp.ones(shape, jnp.float32), count)


def update(
    state: Running,
    new: Moments,
    momentum: float,
    *,
    average: str = "exponential",
    unbiased: bool = False,
    skip_nonfinite: bool = False,
) -> Running:
    """Moves `state` towards the moments of a batch; a feature without samples keeps its own.

    Args:
      state: mean and var of shape [features].
      new: moments of any shape with as many elements.
      momentum: weight of the old statistics, in [0, 1].
      average: "exponential": fixed weights. "debiased": the weights of the batches so far are those
        of the exponential average, scaled to sum to one, so that the initial values never count.
        "cumulative": all batches weigh the same.
      unbiased: store the variance divided by n - 1 instead of n.
      skip_nonfinite: leave all of `state` alone if any moment is inf or NaN.
    """
    new = lax.stop_gradient(Moments(*(a.reshape(state.mean.shape) for a in new)))
    new = Moments(*(place(a, spec(state.mean), like=state.mean) for a in new))
    var = new.var * new.count / jnp.maximum(new.count - 1, 1) if unbiased else new.var
    valid = new.count > 0
    if skip_nonfinite:
        valid &= jnp.all(jnp.isfinite(new.mean) & jnp.isfinite(var))
    count, keep = state.count, jnp.asarray(momentum, state.mean.dtype)
    if count is not None:
        if average == "debiased" and momentum < 1:  # momentum 1 weighs all batches alike
            rate = math.log(max(momentum, 1e-30))  # the expm1 of momentum 0 is -1 all the same
            keep = keep * jnp.expm1(rate * count) / jnp.expm1(rate * (count + 1))
        elif average != "exponential":
            keep = count / (count + 1)
        count = count + jnp.any(valid).astype(count.dtype)

    def blend(old, now):
        now = now.astype(old.dtype)
        return jnp.where(
            valid, keep.astype(old.dtype) * old + (1 - keep).astype(old.dtype) * now, old
        )

    return Running(blend(state.mean, new.mean), blend(state.var, var), count)


def update_groups(state: Running, new: Moments, momentum: float, **options) -> Running:
    """The mean of what `update` makes of each group with a sample, stacked on axis 0 of `new`."""
    each = jax.vmap(lambda m: update(state, m, momentum, **options))(new)
    filled = jnp.any(new.count > 0, axis=tuple(range(1, new.count.ndim)))
    return average_filled(state, each, filled)


def average_filled(old: Any, new: Any, filled: jax.Array, axis_name: AxisName = None) -> Any:
    """The mean of the states `new`, stacked on axis 0, of the parts of a batch that have a sample.

    Args:
      old: the state from which all parts started; it is returned if no part has a sample.
      new: what each part made of it.
      filled: bool[parts], whether a part has a sample.
      axis_name: mapped axis over which the parts are divided further.
    """

    def total(a):
        weight = jnp.expand_dims(filled, tuple(range(1, a.ndim))).astype(a.dtype)
        return jnp.sum(a * weight, 0)

    if not jax.tree.leaves(new):
        return new
    sums = jax.tree.map(total, new), jnp.sum(filled.astype(jnp.float32))
    sums, number = sums if axis_name is None else lax.psum(sums, axis_name)
    return jax.tree.map(
        lambda a, b: jnp.where(number > 0, b / jnp.maximum(number, 1).astype(b.dtype), a), old, sums
    )
