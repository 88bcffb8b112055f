"""What is tested: a method, data that fit it, and what it promises."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from normjax.core import checks, passes


@dataclasses.dataclass(frozen=True)
class Subject:
    """A method under test with data that fit it.

    Attributes:
      method: the method.
      shape: shape of the input, the batch first.
      residual_bytes: how many bytes per byte of input reverse mode may keep; None: any number.
      drops_rows: whether a mask of samples gives exactly what dropping them gives.
      roundings: how often half precision rounds on the way to the output (a chain: once per
        method).
      keeps_rounded: whether reverse mode keeps something rounded to half precision, so that the
        gradients of float32 parameters have its precision.
      collectives: how many collectives the forward pass may need (a chain: one per method); the
        backward pass as many more.
      masks_positions: whether a mask may hide single positions of a sample.
      fits_positions: whether the method fits any number of positions, not those of `shape` only.
      extra: further inputs of `apply` by name, made for the dtype of the statistics and the sizes
        of the feature axes; None: none.

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
    extra: Callable[[Any, Any], dict[str, Any]] | None = None

    @property
    def features(self) -> int | tuple[int, ...]:
        """Sizes of the feature axes."""
        at = checks.feature_axes(self.method)
        return tuple(self.shape[i] for i in at) if isinstance(at, tuple) else self.shape[at]

    def variables(self, dtype: Any = None) -> tuple[Any, Any]:
        """Parameters and state that are not at their initial values; in `dtype` if given."""
        params, state = self.method.init(jax.random.key(0), self.features)
        rng = np.random.default_rng(1)

        def moved(a, by):
            return jnp.asarray(np.asarray(a, np.float64) + by, a.dtype if dtype is None else dtype)

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

    def apply(self, params, state, x, mask=None, *, train=True, method=None):
        """`method.apply` with a key if the method is random, and without the moments of a pair."""
        key = jax.random.key(7) if train and checks.is_random(self.method) else None
        method = self.method if method is None else method
        extra = {} if self.extra is None else self.extra(passes.wide(x.dtype), self.features)
        y, state = method.apply(params, state, x, train=train, mask=mask, key=key, **extra)
        return (y[0] if checks.returns_posterior(method) else y), state


def with_axis_name(method: Any, axis_name: str | tuple[str, ...]) -> Any:
    """`method` with its batch statistics shared over `axis_name`.

    Example:
      >>> import normjax as nj
      >>> with_axis_name(nj.Ghost(nj.BatchNorm(), groups=2), "batch").method.axis_name
      'batch'
    """
    if not checks.depends_on_train(method):
        return method
    if hasattr(method, "axis_name"):
        return dataclasses.replace(method, axis_name=axis_name)
    if hasattr(method, "method"):
        return dataclasses.replace(method, method=with_axis_name(method.method, axis_name))
    if hasattr(method, "methods"):
        parts = tuple(with_axis_name(part, axis_name) for part in method.methods)
        return dataclasses.replace(method, methods=parts)
    return method
