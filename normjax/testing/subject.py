"""What is tested: a method, data that fit it, and what it promises."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from normjax.core import passes
from normjax.core.method import feature_sizes, replace, traits


@dataclasses.dataclass(frozen=True)
class Subject:
    """A method under test with data that fit it.

    The input of a method over kernels is a kernel. It has no mask; what is divided among devices is
    its first axis.

    Attributes:
      method: the method.
      shape: shape of the input, the batch first.
      residual_bytes: how many bytes per byte of input reverse mode may keep; None: any number.
      drops_rows: whether a mask of samples gives exactly what dropping them gives.
      roundings: how often half precision rounds on the way to the output (a chain: per method).
      keeps_rounded: whether reverse mode keeps something rounded to half precision, so that the
        gradients of float32 parameters have its precision.
      collectives: how many collectives the forward pass may need (a chain: one per method); the
        backward pass as many more.
      masks_positions: whether a mask may hide single positions of a sample.
      fits_positions: whether the method fits any number of positions, not those of `shape` only.
      extra: `extra(dtype, shape)` makes further inputs of `apply` by name, in the dtype of the
        statistics; those that the traits call "sample" are masked, dropped and divided with `x`,
        and those that they do not name are a ValueError.

    Example:
      >>> import normjax as nj
      >>> Subject(nj.BatchNorm(), (16, 3)).features
      3
    """

    method: Any
    shape: tuple[int, ...]
    residual_bytes: float | None = 1.1
    drops_rows: bool = True
    roundings: int = 1
    keeps_rounded: bool = False
    collectives: int = 1
    masks_positions: bool = True
    fits_positions: bool = True
    extra: Callable[[Any, tuple[int, ...]], dict[str, Any]] = lambda dtype, shape: {}

    def __post_init__(self):
        made = self.extra(jnp.float32, self.shape)
        if unknown := made.keys() - traits(self.method).inputs.keys():
            raise ValueError(
                f"check_method: extra inputs {sorted(unknown)}, which the traits of "
                f"{type(self.method).__name__} do not name."
            )

    @property
    def features(self) -> int | tuple[int, ...]:
        """Sizes of the feature axes."""
        return feature_sizes(self.method, self.shape)

    @property
    def over_kernels(self) -> bool:
        """Whether the input is a kernel."""
        return traits(self.method).over == "kernel"

    def masks(self) -> tuple[Any, ...]:
        """None and, where the method takes any, a mask."""
        return (None,) if self.over_kernels else (None, self.rows())

    def extras(self, kind: Literal["sample", "whole"], dtype: Any) -> dict[str, Any]:
        """The extra inputs that the traits of the method call `kind`."""
        kinds = traits(self.method).inputs
        return {k: a for k, a in self.extra(dtype, self.shape).items() if kinds[k] == kind}

    def variables(self, dtype: Any = None) -> tuple[Any, Any]:
        """Parameters and state that are not at their initial values; in `dtype` if given."""
        about = self.inputs() if self.over_kernels else self.features
        params, state = self.method.init(jax.random.key(0), about)
        rng = np.random.default_rng(1)
        moved = lambda a, by: jnp.asarray(np.asarray(a, np.float64) + by, dtype or a.dtype)
        params = jax.tree.map(lambda a: moved(a, 0.3 * rng.normal(size=a.shape)), params)
        return params, jax.tree.map(lambda a: moved(a, 0.25), state)

    def inputs(self, dtype: Any = jnp.float32, seed: int = 2) -> jax.Array:
        """A normal sample with mean 0.5."""
        return jnp.asarray(np.random.default_rng(seed).normal(0.5, 1, self.shape), dtype)

    def rows(self) -> jax.Array:
        """A mask of samples, ragged over eight consecutive parts of the batch, one empty."""
        keep = np.random.default_rng(3).random(self.shape[0]) < 0.7
        part = max(self.shape[0] // 8, 1)
        keep[:part] = True
        keep[2 * part : 3 * part] = False
        return jnp.asarray(keep.reshape(-1, *(1,) * (len(self.shape) - 1)))

    def apply(self, params, state, x, mask=None, samples=None, *, train=True, method=None):
        """`method.apply` with a key if it is random, and with extra inputs; `samples`: of `x`."""
        key = jax.random.key(7) if train and traits(self.method).random else None
        method, dtype = self.method if method is None else method, passes.wide(x.dtype)
        if self.over_kernels:
            return method.apply(params, state, x, train=train)
        samples = self.extras("sample", dtype) if samples is None else samples
        given = samples | self.extras("whole", dtype)
        return method.apply(params, state, x, train=train, mask=mask, key=key, **given)


def fill(mask: Any, x: jax.Array, value: float) -> jax.Array:
    """`x` with `value` where `mask`, if there is one, is False."""
    return x if mask is None else jnp.where(mask, x, value)


def with_axis_name(method: Any, axis_name: str | tuple[str, ...]) -> Any:
    """`method` with its statistics of the batch, or of divided rows, shared over `axis_name`.

    Example:
      >>> import normjax as nj
      >>> with_axis_name(nj.Ghost(nj.BatchNorm(), groups=2), "batch").method.axis_name
      'batch'
    """
    divided = lambda one: traits(one).trains or traits(one).over == "kernel"
    return replace(method, axis_name=axis_name, where=divided)
