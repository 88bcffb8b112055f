"""Fields with rules, validation of inputs, and the text of every error."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from normjax.core.compat import is_traced
from normjax.core.structs import Axes, Features, several

Rule = Callable[[Any], str | None]  # what is wrong with a value, or None


def rule(broken: Rule, *, schedule: bool = False, hint: str = "") -> dict[str, Any]:
    """Metadata of a field: its rule, whether a schedule may stand for a value, and advice."""

    def or_schedule(value):
        wrong = None if callable(value) else broken(value)
        return wrong and f"{wrong}, nor a schedule (a function of the number of updates)"

    return {"rule": or_schedule if schedule else broken, "schedule": schedule, "hint": hint}


def field(default: Any, broken: Rule, **metadata: Any) -> Any:
    """A field of a method with its default and its rule; see `rule`."""
    return dataclasses.field(default=default, metadata=rule(broken, **metadata))


def is_number(value: Any) -> bool:
    """Whether `value` is a Python or NumPy real number; True and False are none."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _rule(test: Callable[[Any], Any], words: str) -> Rule:
    return lambda value: None if test(value) else words


_is_int = lambda a: isinstance(a, int | np.integer) and not isinstance(a, bool)
none = _rule(lambda a: a is None, "is not None")
flag = _rule(lambda a: isinstance(a, bool), "is not True or False")
positive = _rule(lambda a: _is_int(a) and a > 0, "is not a positive integer")
natural = _rule(lambda a: _is_int(a) and a >= 0, "is not an integer >= 0")
sizes = _rule(
    lambda a: isinstance(a, tuple) and a and not any(map(positive, a)),
    "is not a sequence of positive integers",
)
positives = _rule(
    lambda a: several(a) and not any(map(positive, several(a))),
    "is not a positive integer or a non-empty sequence of them",
)
integers = _rule(
    lambda a: several(a) and all(map(_is_int, several(a))),
    "is not an integer or a non-empty sequence of integers",
)
floating = _rule(
    lambda a: isinstance(a, str | type | np.dtype) and jnp.issubdtype(a, jnp.floating),
    "is not a real floating dtype",
)
initializer = _rule(callable, "is not a function of (key, shape, dtype)")
axis_name = _rule(
    lambda a: several(a) and all(isinstance(name, str) for name in several(a)),
    "is not the name of a mapped axis, or a tuple of names",
)


def interval(low: float = -math.inf, high: float = math.inf, *, open: bool = False) -> Rule:
    """Finite numbers from `low` to `high`, without these if `open`."""
    words = "is not a finite number"
    if high < math.inf:
        words = f"is not in ({low:g}, {high:g})" if open else f"is not in [{low:g}, {high:g}]"
    elif low > -math.inf:
        words += f" {'>' if open else '>='} {low:g}"

    def inside(value):
        finite = is_number(value) and low <= value <= high and abs(value) < math.inf
        return finite and not (open and value in (low, high))

    return _rule(inside, words)


def one_of(*options: Any, or_else: Rule | None = None) -> Rule:
    """One of the options, or what another rule allows."""
    words = f"is not {' or '.join(map(repr, options))}"

    def broken(value):
        if any(type(value) is type(a) and value == a for a in options):
            return None
        if or_else is None:
            return words
        return (wrong := or_else(value)) and f"{words}, and {wrong}"

    return broken


def optional(other: Rule) -> Rule:
    """A rule that allows None, and what another rule allows."""
    return one_of(None, or_else=other)


def activation(value: Any) -> str | None:
    """A hashable function of one array, such as `jax.nn.relu`."""
    try:
        hash(value)
    except TypeError:
        value = None
    return None if callable(value) else "is not a hashable function of one array, like jax.nn.relu"


def axis_index_groups(value: Any) -> str | None:
    """Groups that name every device index exactly once."""
    nested = isinstance(value, tuple) and value and all(isinstance(g, tuple) and g for g in value)
    if not nested or sorted(sum(value, ())) != list(range(sum(map(len, value)))):
        return "is not groups of device indices that name each of 0, 1, 2, ... exactly once"


def method(value: Any) -> str | None:
    """An object with the two functions of a method."""
    if isinstance(value, type):
        return "is not a method but a class: make one with parentheses"
    if hasattr(value, "bind"):
        return "is not a method but a Flax module: give the method, such as normjax.BatchNorm()"
    if not (hasattr(value, "init") and hasattr(value, "apply")):
        return "is not a method: it needs `init(key, features)` and `apply(params, state, x, ...)`"


def configure(method: Any) -> None:
    """Makes the fields of `method` static and checks each by its rule (ValueError)."""
    name = type(method).__name__
    for one in dataclasses.fields(method):
        value = _static(getattr(method, one.name))
        object.__setattr__(method, one.name, value)
        if is_traced(value):
            hint = "give a Python value, or make the method outside of the traced function."
            raise ValueError(f"{name}: {one.name} is traced, but fields are static: {hint}")
        require(name, one.name, value, one.metadata["rule"], one.metadata["hint"])


def has_schedule(method: Any) -> bool:
    """Whether a field of `method` is a function of the number of updates."""
    every = dataclasses.fields(method)
    return any(f.metadata["schedule"] and callable(getattr(method, f.name)) for f in every)


def _static(value):
    """Sequences as tuples, NumPy's and JAX's concrete scalars as Python's."""
    if isinstance(value, list | tuple | range) and not hasattr(value, "_fields"):
        return tuple(map(_static, value))
    if isinstance(value, np.generic | np.ndarray | jax.Array) and value.ndim == 0:
        return value if is_traced(value) else value.item()
    return value


def require(name: str, field: str, value: Any, rule: Rule, hint: str = "") -> None:
    """ValueError if `value` breaks a rule; `hint`: what to do."""
    if wrong := rule(value):
        raise ValueError(f"{name}: {field}={value!r} {wrong}.{hint and ' ' + hint}")


def require_number(
    name: str, field: str, value: Any, low: float, *, above: bool = False, hint: str = ""
) -> None:
    """ValueError unless `value` is an array or a finite number >= `low` (`above`: > `low`)."""
    if not isinstance(value, jax.Array):
        require(name, field, value, interval(low, open=above), hint)


def require_key(name: str, key: Any) -> Any:
    """The key with which training draws random numbers; ValueError if there is none."""
    if key is None:
        raise ValueError(
            f"{name}: key=None, but training draws random numbers: give a key of its own for "
            "every layer and step (in Flax it comes from the stream `ghost`)."
        )
    return key


def position_axes(method: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """All axes but 0, that of samples, and those of features; ValueError without samples."""
    name = type(method).__name__
    features = as_axes(name, "axis", method.axis, shape)
    if 0 in features or not shape:
        where = f"{shape} with features along {features}"
        raise ValueError(f"{name}: input of shape {where} has no samples: they lie on axis 0.")
    return tuple(i for i in range(1, len(shape)) if i not in features)


def as_features(name: str, value: Features) -> tuple[int, ...]:
    """The shape of the parameters for `value` features; ValueError unless positive integers."""
    shape = tuple(value) if isinstance(value, list | tuple) else (value,)
    require(name, "features", shape, sizes)
    return tuple(map(int, shape))


def as_real(name: str, x: Any, what: str = "the input has") -> jax.Array:
    """`x` as a real floating array, integers as float32; TypeError for any other input."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x
    if jnp.issubdtype(x.dtype, jnp.integer):
        return x.astype(jnp.float32)
    hint = " Normalize real and imaginary parts as two features." if x.dtype.kind == "c" else ""
    raise TypeError(f"{name}: {what} dtype {x.dtype}, but real numbers are needed.{hint}")


def as_axes(name: str, field: str, value: Axes, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Increasing non-negative axes; ValueError for one out of range, or named twice."""
    rank, given = len(shape), several(value)
    if not all(-rank <= axis < rank for axis in given):
        raise ValueError(f"{name}: {field}={value} is out of range for an input of shape {shape}.")
    axes = sorted({axis % rank for axis in given})
    if len(axes) < len(given):
        raise ValueError(f"{name}: {field}={value} names an axis twice (input shape {shape}).")
    return tuple(axes)


def as_mask(name: str, value: Any, shape: tuple[int, ...]) -> jax.Array | None:
    """`value` as booleans of rank `len(shape)`; an error for other dtypes, or if too large."""
    if value is None:
        return None
    value = jnp.asarray(value)
    if not (value.dtype == jnp.bool_ or jnp.issubdtype(value.dtype, jnp.integer)):
        raise TypeError(
            f"{name}: the mask has dtype {value.dtype}, but is True (or not 0) where a position "
            "counts. Numbers that weigh positions are `weights`, where a method takes them; give "
            "`mask != 0` if they are none."
        )
    value = value if value.dtype == jnp.bool_ else value != 0
    return _of_rank(name, "a mask", "A mask", value, shape)


def _of_rank(name, one, many, value, shape):
    """`value` with axes of size one in front; ValueError unless it broadcasts to `shape`."""
    lacking = len(shape) - value.ndim
    pairs = zip(value.shape, shape[max(lacking, 0) :], strict=False)  # sizes may be symbolic
    if lacking < 0 or not all(n == m or n == 1 for n, m in pairs):
        verb = "does" if one.startswith("a ") else "do"
        raise ValueError(
            f"{name}: {one} of shape {value.shape} {verb} not broadcast to the input's shape "
            f"{shape}. {many} of samples or positions need{'s' if verb == 'does' else ''} trailing "
            "axes of size one."
        )
    return jnp.expand_dims(value, tuple(range(lacking)))


def as_weights(name: str, value: Any, shape: tuple[int, ...]) -> jax.Array | None:
    """`value` as numbers of rank `len(shape)`, zero where a traced one is not finite and positive.

    TypeError for other dtypes; ValueError if too large, or for concrete ones that do not count.
    """
    if value is None:
        return None
    require_weights(name, value)
    value = as_real(name, value, "weights have")
    value = _of_rank(name, "weights", "Weights", value, shape)
    return jnp.where((value > 0) & (value < jnp.inf), value, 0)


def require_weights(name: str, value: Any) -> None:
    """ValueError for concrete weights that are negative or not finite."""
    if value is not None and not _all(value, lambda a: (a >= 0) & (a < np.inf)):
        raise ValueError(
            f"{name}: weights are negative or not finite, but say how much a position counts. "
            "Give 0 for those that do not count."
        )


def as_segment_ids(
    name: str, value: Any, number: int | None, shape: tuple[int, ...]
) -> jax.Array | None:
    """`value` as int32 of rank `len(shape)`, and `number` where it is in none of the segments.

    TypeError for other dtypes; ValueError if too large, without `number`, or if only that is given.
    """
    require_segment_ids(name, value, number)
    if value is None or number is None:
        return None
    value = jnp.asarray(value)
    value = value.astype(jnp.int32) if value.dtype.itemsize < 4 else value
    value = _of_rank(name, "segment_ids", "Ids", value, shape)
    return jnp.where((value >= 0) & (value < number), value, number).astype(jnp.int32)


def require_segment_ids(name: str, value: Any, number: int | None) -> None:
    """An error for ids without a number of segments, or the reverse, and for concrete bad ids."""
    if (value is None) != (number is None):
        given = "was given without" if number is None else "is None, but the method has"
        raise ValueError(
            f"{name}: segment_ids {given} num_segments, the largest number of segments: a field of "
            "the method, which is static. Give both or neither."
        )
    if value is None or number is None:
        return
    dtype = jnp.result_type(value)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"{name}: segment_ids have dtype {dtype}, but are integers.")
    if not _all(value, lambda a: (a >= -1) & (a < number)):
        raise ValueError(
            f"{name}: segment_ids are not all in [0, num_segments={number}), or -1 for padding."
        )


def _all(value, holds):
    """Whether `holds` of all numbers, as far as they are known here."""
    known = not is_traced(value) and getattr(value, "is_fully_addressable", True)
    return not known or bool(np.all(holds(np.asarray(value))))


def require_features(name: str, field: str, at: Any, shape: Any, arrays: Sequence[Any]) -> None:
    """ValueError unless each of `arrays` (or None) has the sizes of the axes `at` of `shape`."""
    sizes = tuple(shape[i] for i in at)
    for a in arrays:
        if a is not None and tuple(a.shape) != sizes:
            raise ValueError(
                f"{name}: the input of shape {shape} has features {sizes} along {field}={at}, "
                f"but its parameters or statistics were made for {tuple(a.shape)}."
            )


def require_leaf(method: Any, state: Any, leaf: str, wanted: bool) -> None:
    """ValueError unless `state` has a value for `leaf` exactly if `wanted`."""
    if wanted != (getattr(state, leaf) is not None):
        has, needs = ("no", "needs") if wanted else ("a", "does not use")
        raise ValueError(
            f"{type(method).__name__}: the state has {has} leaf `{leaf}`, which the method {needs}."
        )


def require_positions(method: Any, reduced: Sequence[int], shape: tuple[int, ...]) -> None:
    """ValueError if neither axes nor devices are left to take statistics over."""
    if not reduced and method.axis_name is None:
        name = type(method).__name__
        raise ValueError(f"{name}: input of shape {shape} has no axis to take statistics over.")


def segment_axis(method: Any, axes: Sequence[int], shape: Any) -> int:
    """The first of the `axes` that are reduced and have no scale; ValueError without any."""
    if not axes:
        raise ValueError(
            f"{type(method).__name__}: num_segments with an input of shape {shape}: segments are "
            "of the positions of an axis that is reduced and has no scale, and there is none."
        )
    return axes[0]


def require_several_values(method: Any, sizes: Sequence[int], shape: Any, instead: str) -> None:
    """ValueError if statistics over axes of `sizes` are of single values; `instead`: what to do."""
    if any(n != 1 for n in sizes):  # they may be symbolic; an empty batch has no statistics
        return
    if method.axis_name is None or lax.axis_size(method.axis_name) == 1:
        raise ValueError(
            f"{type(method).__name__}: in an input of shape {shape} every statistic is that of a "
            f"single value, whose variance is zero, and the output would be the bias: {instead}."
        )
