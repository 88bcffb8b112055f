"""Tracing `apply` once for all layers of one configuration and shape."""

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
    def run(self, params, state, x, **how):
        return compiled(self, params, state, x, **how)

    return run  # type: ignore[return-value]
