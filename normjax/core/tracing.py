"""Tracing `apply` once for all layers of one configuration and shape."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax

Apply = TypeVar("Apply", bound=Callable[..., Any])


def traced_once(apply: Apply) -> Apply:
    """The `apply` of a method under `jax.jit`, static in the method and in `train`.

    A network has many layers alike. JAX keeps the trace, the derivatives and the lowered form of an
    inner jit and uses them again for each, which halves the time it takes to trace a deep network;
    XLA inlines the calls.
    """
    compiled = jax.jit(apply, static_argnums=0, static_argnames="train")

    @functools.wraps(apply)
    def run(self, params, state, x, *, train=True, **how):
        if not isinstance(train, bool):
            raise TypeError(
                f"{type(self).__name__}: train={train!r} is not True or False. Under "
                'jax.jit make it static: `static_argnames="train"`.'
            )
        return compiled(_without_initializers(self), params, state, x, train=train, **how)

    return run  # type: ignore[return-value]


def _without_initializers(method):
    """`method` with default initializers, so that a fresh closure there needs no new trace."""
    fields = [f for f in dataclasses.fields(method) if f.name.endswith("_init")]
    defaults = {f.name: f.default for f in fields if getattr(method, f.name) != f.default}
    return dataclasses.replace(method, **defaults) if defaults else method
