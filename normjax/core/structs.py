"""The containers that methods take and return: NamedTuples of arrays or None."""

from typing import Any, NamedTuple

import jax

Key = jax.Array | None
Features = int | tuple[int, ...]
Axes = int | tuple[int, ...]
AxisName = str | tuple[str, ...] | None
AxisGroups = tuple[tuple[int, ...], ...] | None


class Moments(NamedTuple):
    """First two moments over the reduced axes, which are kept as size one.

    Example:
      >>> import jax.numpy as jnp
      >>> Moments(jnp.array([2.0]), jnp.array([0.5]), jnp.array([0.25])).count.item()
      2.0
    """

    count: jax.Array  # how many elements entered, summed over devices
    mean: jax.Array
    var: jax.Array  # population variance, divided by `count`


class AffineParams(NamedTuple):
    """Scale and bias of the feature axes, or None where `init` was told to leave one out.

    Example:
      >>> import normjax as nj
      >>> params, _ = nj.BatchNorm(use_bias=False).init(None, 3)
      >>> params.scale.shape, params.bias
      ((3,), None)
    """

    scale: jax.Array | None = None
    bias: jax.Array | None = None


class Running(NamedTuple):
    """Running statistics, and the number of updates where the average needs it.

    Example:
      >>> import normjax as nj
      >>> _, state = nj.BatchNorm(running_average="cumulative").init(None, 3)
      >>> state.var.shape, state.count.item()
      ((3,), 0.0)
    """

    mean: jax.Array  # f32[features]
    var: jax.Array  # f32[features]
    count: jax.Array | None = None  # f32[]


def feature_shape(features: Features) -> tuple[int, ...]:
    """The shape of a parameter made for `features`."""
    return (features,) if isinstance(features, int) else tuple(features)


def affine_params(method: Any, key: Key, features: Features) -> AffineParams:
    """Scale and bias as the fields of `method` ask for them."""
    scale = bias = None
    shape = feature_shape(features)
    if method.use_scale:
        scale = method.scale_init(key, shape, method.param_dtype)
    if getattr(method, "use_bias", False):
        key = None if key is None else jax.random.fold_in(key, 1)
        bias = method.bias_init(key, shape, method.param_dtype)
    return AffineParams(scale, bias)


def to_dict(tree: Any) -> dict[str, Any]:
    """Parameters or state of a method as nested dicts, without what is None or empty."""
    fields = tree._asdict() if hasattr(tree, "_asdict") else dict(tree)
    nested = {k: to_dict(v) if _is_container(v) else v for k, v in fields.items() if v is not None}
    return {k: v for k, v in nested.items() if not (isinstance(v, dict) and not v)}


def from_dict(spec: Any, values: dict[str, Any]) -> Any:
    """The inverse of `to_dict`: `spec` with its leaves taken from `values`."""
    fields = spec._asdict() if hasattr(spec, "_asdict") else dict(spec)
    new = {
        k: from_dict(v, values.get(k, {})) if _is_container(v) else None if v is None else values[k]
        for k, v in fields.items()
    }
    if isinstance(spec, dict):
        return new
    return type(spec)(**new)


def _is_container(value):
    return isinstance(value, dict) or (
        isinstance(value, tuple) and (hasattr(value, "_fields") or not value)
    )
