"""What is measured of programs: bytes kept, collectives; and how large ones are compiled."""

import re
from collections.abc import Callable
from typing import Any

import jax

EXACT = dict(rtol=1e-10, atol=1e-10)
COLLECTIVES = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"


def residual_bytes(function: Callable, *args: Any) -> float:
    """Bytes that reverse mode keeps across a jit boundary, per byte of the last argument.

    Nothing is compiled; arguments may be `jax.ShapeDtypeStruct`s.

    Example:
      >>> import jax.numpy as jnp
      >>> residual_bytes(jnp.sin, jnp.ones(8))
      1.0
    """
    _, pullback = jax.jit(lambda *a: jax.vjp(function, *a)).trace(*args).out_info
    kept = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(pullback))
    return kept / (args[-1].size * args[-1].dtype.itemsize)


def count_collectives(function: Callable, *args: Any) -> int:
    """Number of collectives in the compiled program of `function`.

    Example:
      >>> import jax.numpy as jnp
      >>> count_collectives(lambda x: x.sum(), jnp.ones(8))
      0
    """
    text = jax.jit(function).lower(*args).compile().as_text() or ""
    return len(re.findall(rf"= [^=]*\b(?:{COLLECTIVES})(?:-start)?\(", text))


def jit(function: Callable) -> Any:
    """Compiled fast, not to be fast: for large programs that run once, on a few numbers."""
    cpu = jax.default_backend() == "cpu"
    options = {"xla_backend_optimization_level": 0} if cpu else None
    return jax.jit(function, compiler_options=options)
