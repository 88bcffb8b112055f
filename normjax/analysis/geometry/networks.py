"""A Flax model as a pure function of its samples."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from normjax import modules, population


class Network(NamedTuple):
    """A model with what it is called with; `run(variables, x)` is its output for other samples."""

    model: Any
    args: tuple[Any, ...]  # without variables: the first are the samples
    kwargs: dict[str, Any]
    variables: Any  # of Linen the collections, of NNX the state
    run: Callable[[Any, jax.Array], jax.Array]

    @classmethod
    def of(cls, caller: str, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]):
        """From the arguments of a public function; ValueError if the first are no samples."""
        plain = lambda path, module, call, args, kwargs: call(*args, **kwargs)
        called, variables, arrays = modules.intercept(model, plain, *args, **kwargs)
        inputs = args if isinstance(model, nnx.Module) else args[1:]
        samples(caller, inputs[0] if inputs else None)
        run = lambda variables, x: called(variables, arrays | {0: x})[0]
        return cls(model, inputs, kwargs, variables, run)

    @property
    def x(self) -> jax.Array:
        """The samples, [N, ...]."""
        return jnp.asarray(self.args[0])

    def one(self, variables: Any, x: jax.Array) -> jax.Array:
        """The output for one sample, without an axis of the batch in either."""
        return self.run(variables, x[None])[0]

    def call(self, model: Any, x: jax.Array) -> Any:
        """Calls a model, bound to its variables, with samples in place of the first argument."""
        return model(x, *self.args[1:], **self.kwargs)

    def observed(self, batch: jax.Array) -> Any:
        """The variables with the statistics of a batch in place of running ones."""
        if not isinstance(self.model, nnx.Module):
            how: Any = dict(variables=self.variables, call=self.call)
            return population.recalibrate(self.model, [batch], **how)
        copy = nnx.merge(nnx.split(self.model)[0], self.variables, copy=True)
        return nnx.state(population.recalibrate(copy, [batch], call=self.call))


def samples(caller: str, x: Any) -> jax.Array:
    """Samples as an array; ValueError unless they are real numbers [N, ...], some of them."""
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating) or not x.ndim:
        text = f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else repr(x)
        raise ValueError(
            f"{caller}: the samples are {text}: give them as the first argument of the model, "
            "a real floating array [N, ...]."
        )
    if not x.size:
        raise ValueError(f"{caller}: the samples of shape {x.shape} are empty.")
    return jnp.asarray(x)


__all__ = ["Network", "samples"]
