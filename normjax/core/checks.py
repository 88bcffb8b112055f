"""Validation of configurations and inputs, and the text of every error."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from normjax.core.structs import Features, feature_shape


def _momentum(value):
    if not is_number(value) or not 0.0 <= value <= 1.0:
        return (
            "is not in [0, 1]. It weighs the old statistics; what PyTorch calls momentum 0.1 is 0.9"
        )


def _epsilon(value):
    if not is_number(value) or not 0.0 <= value < math.inf:
        return "is not a finite number >= 0"


def _axes(value):
    single = value if isinstance(value, tuple) else (value,)
    if not single or not all(_is_int(a) for a in single):
        return "is not an integer or a non-empty sequence of integers"


def _flag(value):
    if not isinstance(value, bool):
        return "is not True or False"


def _callable(value):
    if not callable(value):
        return "is not a function of (key, shape, dtype)"


def _activation(value):
    if value is not None and not (callable(value) and _is_hashable(value)):
        return "is neither None nor a hashable function of one array, such as jax.nn.relu"


def _dtype(value):
    named = isinstance(value, str | type | np.dtype)
    if value is not None and not (named and jnp.issubdtype(value, jnp.floating)):
        return "is not a real floating dtype"


def _axis_name(value):
    names = value if isinstance(value, tuple) else (value,)
    if value is not None and not (names and all(isinstance(n, str) for n in names)):
        return "is not the name of a mapped axis, or a tuple of names"


def _axis_index_groups(value):
    if value is None:
        return None
    nested = isinstance(value, tuple) and all(isinstance(g, tuple) and g for g in value)
    if not nested or not value:
        return "is not a sequence of non-empty groups of device indices"
    if sorted(i for g in value for i in g) != list(range(sum(map(len, value)))):
        return "does not name every device index 0, 1, 2, ... exactly once"


def _method(value):
    if isinstance(value, type):
        return "is not a method but a class: make one with parentheses"
    if hasattr(value, "bind"):
        return "is not a method but a Flax module: give the method, such as normjax.BatchNorm()"
    if not (hasattr(value, "init") and hasattr(value, "apply")):
        return "is not a method: it needs `init(key, features)` and `apply(params, state, x, ...)`"


def _gain(value):
    if value not in ("learned", "computed") and not (is_number(value) and 0.0 <= value <= 1.0):
        return "is neither a number in [0, 1] nor 'learned' nor 'computed'. It weighs the batch"


def _positive(value):
    if not _is_int(value) or value < 1:
        return "is not a positive integer"


def _one_of(*options):
    def rule(value):
        if value not in options:
            return f"is not one of {', '.join(map(repr, options))}"

    return rule


def _map_size(value):
    if value is not None and not (isinstance(value, tuple) and value):
        return "is not a sequence of the sizes of the spatial axes"
    if value is not None and any(_positive(n) for n in value):
        return "holds a size that is not a positive integer"


def _size(value):
    return None if value is None else _positive(value)


def _strength(value):
    if not callable(value) and not (is_number(value) and 0.0 <= value < math.inf):
        return "is neither a finite number >= 0 nor a schedule, a function of the number of updates"


RULES = {
    "momentum": _momentum,
    "epsilon": _epsilon,
    "axis": _axes,
    "reduction_axes": lambda v: None if v is None else _axes(v),
    "feature_axes": _axes,
    "use_scale": _flag,
    "use_bias": _flag,
    "unbiased_running_var": _flag,
    "constant_statistics": _flag,
    "skip_nonfinite": _flag,
    "scale_init": _callable,
    "bias_init": _callable,
    "activation": _activation,
    "dtype": _dtype,
    "param_dtype": lambda v: _dtype(v) if v is not None else "is not a real floating dtype",
    "axis_name": _axis_name,
    "axis_index_groups": _axis_index_groups,
    "method": _method,
    "groups": _positive,
    "num_groups": _size,
    "group_size": _size,
    "ghost_batch_size": _size,
    "effective_size": lambda v: (
        None
        if v is None or (is_number(v) and 1.0 <= v < math.inf)
        else "is neither None nor a finite number >= 1"
    ),
    "drawing": _one_of("replacement", "partition", "shuffle", "consecutive"),
    "noise": _one_of("both", "shift", "scale"),
    "independent_channels": _flag,
    "strength": _strength,
    "unbiased_scale": _flag,
    "noise_epsilon": _epsilon,
    "own_weight": _one_of("1/N", "1/N^2"),
    "shift_unit": _one_of("one", "deviation", "deviation, differentiated"),
    "gain": _gain,
    "gain_per": _one_of("layer", "channel"),
    "initial_gain": lambda v: (
        None if is_number(v) and 0.0 < v < 1.0 else "is not a number in (0, 1)"
    ),
    "guard": lambda v: (
        None
        if v is None or (is_number(v) and 0.0 < v < math.inf)
        else "is neither None nor a finite number > 0"
    ),
    "posterior": _one_of("output", "fused"),
    "running_group": _one_of("all", "first"),
    "require_prior": _flag,
    "transition": _one_of(None, "learned"),
    "prior_features": _size,
    "transition_init": _callable,
    "running_average": _one_of("exponential", "debiased", "cumulative"),
    "statistics": _one_of("channel", "frequency", "ring"),
    "spectrum": _one_of("full", "half"),
    "fft_norm": _one_of("ortho", "backward", "forward", "full"),
    "spatial_axes": lambda v: None if v is None else _axes(v),
    "map_size": _map_size,
    "bands": _positive,
    "route": _one_of("auto", "spatial", "matmul", "fft"),
}


def configuration(method: Any) -> None:
    """Makes the fields of `method` static and checks every field that has a rule.

    Raises:
      ValueError: naming method, field, value and rule.
    """
    name = type(method).__name__
    for field in dataclasses.fields(method):
        value = _static(getattr(method, field.name))
        object.__setattr__(method, field.name, value)
        if isinstance(value, Tracer):
            raise ValueError(
                f"{name}: {field.name} is traced, but fields are static: give a Python "
                "value, or make the method outside of the traced function."
            )
        broken = RULES[field.name](value) if field.name in RULES else None
        if broken:
            raise ValueError(f"{name}: {field.name}={value!r} {broken}.")
    if (
        getattr(method, "axis_index_groups", None) is not None
        and getattr(method, "axis_name", None) is None
    ):
        raise ValueError(f"{name}: axis_index_groups needs the axis_name that it divides.")


def _static(value):
    """Sequences as tuples, NumPy's and JAX's concrete scalars as Python's."""
    if isinstance(value, list | tuple | range) and not hasattr(value, "_fields"):
        return tuple(_static(v) for v in value)
    if isinstance(value, np.generic | np.ndarray | jax.Array) and value.ndim == 0:
        return value if isinstance(value, Tracer) else value.item()
    return value


def _is_hashable(value):
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _is_int(value):
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether `value` is a Python or NumPy real number; True and False are none."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def number(
    name: str, field: str, value: Any, low: float, *, above: bool = False, hint: str = ""
) -> None:
    """ValueError unless `value` is an array or a finite number >= `low` (`above`: > `low`)."""
    if isinstance(value, jax.Array):
        return
    if not (is_number(value) and low <= value < math.inf) or (above and value == low):
        rule = f"is not a finite number {'>' if above else '>='} {low:g}"
        raise ValueError(f"{name}: {field}={value!r} {rule}.{hint and ' ' + hint}")


def method(name: str, value: Any) -> None:
    """ValueError unless `value` has the two functions of a method."""
    broken = _method(value)
    if broken:
        raise ValueError(f"{name}: {value!r} {broken}.")


def feature_axes(value: Any) -> Any:
    """The axes for whose sizes a method's parameters are made."""
    return getattr(value, "feature_axes", getattr(value, "axis", -1))


def depends_on_train(value: Any) -> bool:
    """Whether a method differs between training and evaluation; True unless it says otherwise."""
    return getattr(value, "depends_on_train", True)


def is_random(value: Any) -> bool:
    """Whether a method draws random numbers in training; False unless it says otherwise."""
    return getattr(value, "random", False)


def returns_posterior(value: Any) -> bool:
    """Whether the output of a method is a pair, y and its moments; False unless it says so."""
    return getattr(value, "returns_posterior", False)


def no_pair(name: str, value: Any, instead: str) -> None:
    """ValueError if the output of the method `value` is a pair; `instead` is what to do."""
    if returns_posterior(value):
        raise ValueError(
            f"{name}: the output of {value!r} is a pair, y and its moments: {instead}."
        )


def need_key(name: str, key: Any) -> Any:
    """The key with which training draws random numbers; ValueError if there is none."""
    if key is None:
        raise ValueError(
            f"{name}: key=None, but training draws random numbers: give a key of its own for "
            "every layer and step (in Flax it comes from the stream `ghost`)."
        )
    return key


def no_index_groups(method: Any, reason: str) -> None:
    """ValueError if `method` was given `axis_index_groups`, which `reason` rules out."""
    if method.axis_index_groups is not None:
        raise ValueError(
            f"{type(method).__name__}: axis_index_groups={method.axis_index_groups}, but {reason}."
        )


def samples_first(name: str, features: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of positions: all but axis 0, the samples, and `features`; ValueError unless so."""
    if 0 in features or not shape:
        raise ValueError(
            f"{name}: an input of shape {shape} with features along {features} has no samples: "
            "they lie on axis 0."
        )
    return tuple(i for i in range(1, len(shape)) if i not in features)


def features(name: str, value: Features) -> tuple[int, ...]:
    """The shape of the parameters for `value` features; ValueError unless positive integers."""
    shape = feature_shape(value) if isinstance(value, int | Sequence) else (value,)
    if isinstance(value, str) or not shape or not all(_is_int(n) and n > 0 for n in shape):
        raise ValueError(
            f"{name}: features={value!r} is not a positive integer or a tuple of them."
        )
    return tuple(int(n) for n in shape)


def real(name: str, x: Any) -> jax.Array:
    """`x` as a real floating array; integers become float32.

    Raises:
      TypeError: for complex, boolean or other input.
    """
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x
    if jnp.issubdtype(x.dtype, jnp.integer):
        return x.astype(jnp.float32)
    hint = " Normalize real and imaginary parts as two features." if x.dtype.kind == "c" else ""
    raise TypeError(f"{name}: the input has dtype {x.dtype}, but real numbers are needed.{hint}")


def axes(
    name: str, field: str, value: int | tuple[int, ...], shape: tuple[int, ...]
) -> tuple[int, ...]:
    """Axes as increasing non-negative integers.

    Raises:
      ValueError: for an axis out of range, or named twice.
    """
    rank = len(shape)
    given = value if isinstance(value, tuple) else (value,)
    for axis in given:
        if not -rank <= axis < rank:
            raise ValueError(
                f"{name}: {field}={value} is out of range for an input of shape {shape}."
            )
    result = tuple(axis % rank for axis in given)
    if len(set(result)) != len(result):
        raise ValueError(f"{name}: {field}={value} names an axis twice (input shape {shape}).")
    return tuple(sorted(result))


def match(
    name: str, field: str, at: tuple[int, ...], shape: tuple[int, ...], arrays: Sequence[Any]
) -> None:
    """ValueError unless each of `arrays` (or None) has the sizes of the axes `at` of `shape`."""
    sizes = tuple(shape[i] for i in at)
    for a in arrays:
        if a is not None and tuple(a.shape) != sizes:
            raise ValueError(
                f"{name}: the input of shape {shape} has features {sizes} along {field}={at}, "
                f"but its parameters or statistics were made for {tuple(a.shape)}."
            )


def counted(name: str, state: Any, wanted: bool) -> None:
    """ValueError unless `state` has a leaf `count` exactly if `wanted`."""
    if wanted != (state.count is not None):
        raise ValueError(
            f"{name}: the state has {'no' if wanted else 'a'} leaf `count`, which "
            f"this configuration {'needs' if wanted else 'does not use'}."
        )


def mask(name: str, value: Any, shape: tuple[int, ...]) -> jax.Array | None:
    """`value` as a boolean array of rank `len(shape)`.

    Raises:
      ValueError: unless it broadcasts to `shape`.
      TypeError: for what is neither boolean nor an integer.
    """
    if value is None:
        return None
    value = jnp.asarray(value)
    if not (value.dtype == jnp.bool_ or jnp.issubdtype(value.dtype, jnp.integer)):
        raise TypeError(
            f"{name}: the mask has dtype {value.dtype}, but is True (or not 0) where a position "
            "counts. There are no `weights` of samples: give `mask != 0` if the numbers are none."
        )
    last = shape[len(shape) - value.ndim :]  # sizes may be symbolic
    fits = value.ndim <= len(shape) and all(
        n == m or n == 1 for n, m in zip(value.shape, last, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{name}: a mask of shape {value.shape} does not broadcast to the input's shape "
            f"{shape}. A mask of samples or positions needs trailing axes of size one."
        )
    value = value if value.dtype == jnp.bool_ else value != 0
    return jnp.expand_dims(value, tuple(range(len(shape) - value.ndim)))


def need_positions(
    name: str, reduced: tuple[int, ...], shape: tuple[int, ...], axis_name: Any
) -> None:
    """ValueError if there are no axes to take statistics over."""
    if not reduced and axis_name is None:
        raise ValueError(
            f"{name}: an input of shape {shape} has too few axes: none is left to take "
            "statistics over."
        )


def several_values(
    name: str, sizes: Sequence[int], shape: tuple[int, ...], axis_name: Any, instead: str
) -> None:
    """ValueError if statistics over axes of `sizes` are of single values; `instead`: what to do."""
    if any(n != 1 for n in sizes):  # they may be symbolic; an empty batch has no statistics
        return
    if axis_name is None or lax.axis_size(axis_name) == 1:
        raise ValueError(
            f"{name}: in an input of shape {shape} every statistic is that of a single value, "
            f"whose variance is zero, and the output would be the bias: {instead}."
        )
