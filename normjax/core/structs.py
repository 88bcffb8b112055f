"""The containers that methods take and return: NamedTuples of arrays or None."""

from typing import Any, NamedTuple

import jax

Key = jax.Array | None
Mask = jax.Array | None  # where an input counts; it broadcasts to it
Features = int | tuple[int, ...]
Axes = int | tuple[int, ...]
AxisName = str | tuple[str, ...] | None
AxisGroups = tuple[tuple[int, ...], ...] | None


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


class Pool(NamedTuple):
    """How many values pooled statistics are of, and what rounding lost of it, of mean and of var.

    Example:
      >>> import normjax as nj
      >>> nj.BatchNorm(running_average="pooled").init(None, 3)[1].pool.count.tolist()
      [0.0, 0.0, 0.0]
    """

    count: jax.Array  # f32[features]
    count_rest: jax.Array  # f32[features]
    mean_rest: jax.Array  # f32[features]
    var_rest: jax.Array  # f32[features]


class Running(NamedTuple):
    """Running statistics, and what the kind of average needs besides.

    Example:
      >>> import normjax as nj
      >>> nj.BatchNorm(running_average="cumulative").init(None, 3)[1].count.item()
      0.0
    """

    mean: jax.Array  # f32[features]
    var: jax.Array  # f32[features]
    count: jax.Array | None = None  # f32[], of updates
    pool: Pool | None = None


def several(value: Any) -> tuple[Any, ...]:
    """A tuple as it is, a single value as a tuple of one."""
    return value if isinstance(value, tuple) else (value,)


def affine_params(method: Any, key: Key, shape: tuple[int, ...]) -> AffineParams:
    """Scale and bias as the fields of `method` ask for them."""
    scale = method.scale_init(key, shape, method.param_dtype) if method.use_scale else None
    bias = None
    if getattr(method, "use_bias", False):
        key = None if key is None else jax.random.fold_in(key, 1)
        bias = method.bias_init(key, shape, method.param_dtype)
    return AffineParams(scale, bias)


def to_dict(tree: Any) -> dict[str, Any]:
    """Parameters or state of a method as nested dicts, without what is None or empty."""
    nested = ((k, to_dict(v) if _is_container(v) else v) for k, v in _items(tree))
    return {k: v for k, v in nested if not (v is None or (isinstance(v, dict) and not v))}


def from_dict(spec: Any, values: dict[str, Any]) -> Any:
    """The inverse of `to_dict`: `spec` with its leaves taken from `values`."""
    inside = lambda k, v: from_dict(v, values.get(k, {})) if _is_container(v) else values[k]
    return type(spec)(**{k: None if v is None else inside(k, v) for k, v in _items(spec)})


def _is_container(value):
    return isinstance(value, dict | tuple) and not (value and type(value) is tuple)


def _items(tree):
    return (tree._asdict() if hasattr(tree, "_asdict") else dict(tree)).items()
