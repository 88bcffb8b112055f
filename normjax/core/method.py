"""What a method is.

A method is a frozen configuration with two pure functions, `init` and `apply` (`Method`). What else
others may know of it are its `Traits`. Methods that are made of others hold them in fields, where
`parts` finds them.

Nearly every method is statistics of groups of `x` (`observe`), then a small function of these
(`coefficients`), which is the mathematics of its paper, then one affine pass over `x`. Such a
method is a `Normalization`: it gives these functions, and `core.seam.apply` makes `apply` of them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax

from normjax.core import checks
from normjax.core.structs import Axes, Features, Key, Mask, several


@dataclasses.dataclass(frozen=True)
class Traits:
    """What others may know of a method: its class variable `traits`, or a property of a wrapper.

    Attributes:
      trains: whether training and evaluation differ.
      random: whether training draws random numbers, so that it needs `key`.
      inputs: further inputs of `apply` by name: "sample" for one with the samples on axis 0, which
        is divided and masked with them; "whole" for one that belongs to the whole batch.
      over: what is normalized: an activation, or the kernel of a layer: `init(key, kernel)`,
        `apply(params, state, kernel, ...)`.

    Example:
      >>> import normjax as nj
      >>> nj.KalmanNorm().traits.inputs, nj.LayerNorm().traits.trains
      ({'prior': 'whole'}, False)
    """

    trains: bool = True
    random: bool = False
    inputs: Mapping[str, Literal["sample", "whole"]] = dataclasses.field(default_factory=dict)
    over: Literal["activation", "kernel"] = "activation"


@runtime_checkable
class Method(Protocol):
    """A normalization: a hashable configuration with two pure functions, and optional `traits`.

    Example:
      >>> import normjax as nj
      >>> isinstance(nj.BatchNorm(), Method), isinstance(jax.nn.relu, Method)
      (True, False)
    """

    def init(self, key: Key, features: Features) -> tuple[Any, Any]:
        """Parameters, which an optimizer moves, and state, both trees of arrays or `()`."""
        ...

    def apply(
        self, params: Any, state: Any, x: Any, *, train: bool, mask: Mask = None, key: Key = None
    ) -> tuple[jax.Array, Any]:
        """The output for `x`, and the state with the structure, shapes and dtypes that it had."""
        ...


class Normalizer(NamedTuple):
    """`activation((x - mean) * inverse * scale + bias)`, which `passes.apply` computes.

    Every array has the rank of `x` and broadcasts to it, or has the shape of the feature axes.

    Example:
      >>> import normjax as nj
      >>> nj.Affine().evaluation(*nj.Affine().init(None, 2)).scale.tolist()
      [1.0, 1.0]
    """

    mean: jax.Array | None = None  # None: zero
    inverse: jax.Array | None = None  # one over the deviation; None: one
    scale: jax.Array | None = None  # None: one
    bias: jax.Array | None = None  # None: zero


class Linear(NamedTuple):
    """`activation(matrix (x - mean) + bias)` of groups of consecutive features: `matrices.mix`.

    Several feature axes count as one. With one matrix all groups have it; the last group may lack
    features, whose places in `mean` and `matrix` mean nothing.

    Example:
      >>> import normjax as nj
      >>> norm = nj.DecorrelatedBatchNorm(group_size=2)
      >>> norm.evaluation(*norm.init(None, 6)).matrix.shape
      (3, 2, 2)
    """

    mean: jax.Array  # [groups, size]
    matrix: jax.Array  # [groups, size, size]
    bias: jax.Array | None = None  # [features]; None: zero


@runtime_checkable
class Normalization(Method, Protocol):
    """A method whose statistics can be had apart from its output.

    Example:
      >>> import normjax as nj
      >>> isinstance(nj.BatchNorm(), Normalization), isinstance(nj.DynamicTanh(), Normalization)
      (True, False)
    """

    def observe(self, x: Any, mask: Mask = None) -> Any:
        """Statistics of `x` over its groups and over devices, by the only collective."""
        ...

    def evaluation(self, params: Any, state: Any, x: Any = None, mask: Mask = None) -> Any:
        """The `Normalizer` (or `Linear`) of evaluation; it needs no `x` with running statistics."""
        ...

    def absorb(self, state: Any, seen: Any) -> Any:
        """The state moved by what `observe` saw, or by what `statistics.pool` made of several."""
        ...


def traits(method: Any) -> Traits:
    """The traits of a method; the default ones if it states none."""
    return getattr(method, "traits", Traits())


def of_statistics(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the further inputs of `apply` that say how positions count: `observe` takes them."""
    return {name: inputs[name] for name in ("weights", "segment_ids") if name in inputs}


def feature_axes(method: Any) -> Axes:
    """The axes for whose sizes `init` makes parameters; the last if the method names none."""
    return getattr(method, "feature_axes", getattr(method, "axis", -1))


def feature_positions(method: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The feature axes of an input of `shape`, increasing; ValueError for one out of range."""
    field = "feature_axes" if hasattr(method, "feature_axes") else "axis"
    return checks.as_axes(type(method).__name__, field, feature_axes(method), shape)


def feature_sizes(method: Any, shape: tuple[int, ...]) -> Features:
    """What to give to `init` for an input of `shape`: a size, or several if `axis` is a tuple."""
    sizes = tuple(shape[i] for i in feature_positions(method, shape))
    return sizes if isinstance(feature_axes(method), tuple) else sizes[0]


def observes(method: Any) -> bool:
    """Whether `method`, and all that it is made of but a map of its output, give statistics."""
    inner = (part for part in parts(method) if part is not getattr(method, "affine", None))
    return isinstance(method, Normalization) and all(map(observes, inner))


def parts(method: Any) -> tuple[Any, ...]:
    """The methods that `method` is made of: those in its fields."""
    every = (value for field in _fields(method).values() for value in several(field))
    return tuple(value for value in every if not checks.method(value))


def _fields(method):
    """The values of the fields of a method, if it is a dataclass."""
    fields = dataclasses.fields(method) if dataclasses.is_dataclass(method) else ()
    return {field.name: getattr(method, field.name) for field in fields}


def replace(method: Any, *, where: Callable[[Any], bool] | None = None, **fields: Any) -> Any:
    """`method` with fields set in it and in all that it is made of, where they have them.

    `where` says of which methods fields are set; None: of all.

    Example:
      >>> import normjax as nj
      >>> replace(nj.Ghost(nj.BatchNorm(), groups=2), axis_name="batch").method.axis_name
      'batch'
    """

    def inside(value):
        if isinstance(value, tuple):
            return tuple(map(inside, value))
        return value if checks.method(value) else replace(value, where=where, **fields)

    old, own = _fields(method), fields if where is None or where(method) else {}
    new = {name: own[name] if name in own else inside(value) for name, value in old.items()}
    changed = {name: value for name, value in new.items() if value is not old[name]}
    return dataclasses.replace(method, **changed) if changed else method
