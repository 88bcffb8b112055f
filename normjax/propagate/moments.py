"""Moments that are pushed through layers: how they are made, checked and lined up."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from normjax.core import checks, passes
from normjax.core.statistics import Moments


def prediction(mean: Any, var: Any) -> Moments:
    """Moments with count 0, not taken from samples, of real arrays [..., C], which broadcast.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> nj.propagate.prediction(jnp.zeros(2), jnp.ones(2)).var.tolist()
      [1.0, 1.0]
    """
    mean, var = jnp.asarray(mean), jnp.asarray(var)
    dtype = common_dtype(mean, var)
    mean, var = jnp.broadcast_arrays(mean.astype(dtype), var.astype(dtype))
    return Moments(jnp.zeros_like(var), mean, var)


def parts(name: str, moments: Moments, *others: Any) -> tuple[jax.Array, jax.Array]:
    """Mean and variance, checked, in a dtype wide enough for `others` too."""
    if not isinstance(moments, Moments):
        raise TypeError(
            f"{name}: {type(moments).__name__} is no Moments: make one by "
            "`propagate.prediction(mean, var)`."
        )
    mean, var = jnp.asarray(moments.mean), jnp.asarray(moments.var)
    if mean.shape != var.shape or not mean.ndim:
        raise ValueError(
            f"{name}: a mean of shape {mean.shape} and a variance of shape {var.shape}: both must "
            "be [..., features]."
        )
    dtype = common_dtype(mean, var, *(a for a in others if a is not None))
    return mean.astype(dtype), var.astype(dtype)


def common_dtype(*arrays: Any) -> Any:
    """At least float32, and float64 if any array has it; numbers of Python have no say."""
    kinds = [checks.as_real("propagate", a).dtype for a in arrays if not checks.is_number(a)]
    return max(map(passes.wide, kinds), key=lambda dtype: dtype.itemsize)


def deviation(mean: jax.Array, var: jax.Array) -> jax.Array:
    """`sqrt(var)`, or so little that mean / deviation and derivatives are finite."""
    least = lax.stop_gradient(1e-6 * jnp.square(mean) + 1e-30)
    return jnp.sqrt(jnp.where(var > least, var, least))


def row(name: str, field: str, value: Any, like: jax.Array) -> jax.Array:
    """`value`, a number or an array [C], so that it broadcasts to `like`, [..., C]."""
    value = jnp.asarray(value, like.dtype)
    if value.ndim > 1 or value.shape not in ((), like.shape[-1:]):
        raise ValueError(
            f"{name}: {field} of shape {value.shape} does not fit {like.shape[-1]} features."
        )
    return lift(value, like.ndim)


def lift(a: jax.Array, rank: int) -> jax.Array:
    """`a` with leading axes of size one up to `rank`."""
    return jnp.expand_dims(a, tuple(range(rank - a.ndim)))
