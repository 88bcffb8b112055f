"""Tracing `apply` once for all layers of one configuration and shape."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax

from normjax.core import checks, cpu
from normjax.core.method import traits

Apply = TypeVar("Apply", bound=Callable[..., Any])


def traced_once(apply: Apply) -> Apply:
    """The `apply` of a method under `jax.jit`, static in the method and in `train`.

    JAX keeps the trace and the derivatives of an inner jit for all layers alike, which halves the
    time it takes to trace a deep network. It is inlined: the compiler would let one function that
    many layers share stand in the way of their shardings. A method that treats training and
    evaluation alike is traced once for both, and `check_training` runs outside.
    """

    @functools.partial(jax.jit, static_argnums=0, static_argnames="train", inline=True)
    @functools.wraps(apply)
    def compiled(self, params, state, x, *, train, **given):
        with cpu.in_training(train):
            return apply(self, params, state, x, train=train, **given)

    @functools.wraps(apply)
    def run(self, params, state, x, *, train, **given):
        name, known = type(self).__name__, traits(self)
        if not isinstance(train, bool):
            hint = 'Under jax.jit make it static: `static_argnames="train"`.'
            raise TypeError(f"{name}: train={train!r} is not True or False. {hint}")
        if unknown := given.keys() - {"mask", "key"} - known.inputs.keys():
            raise TypeError(f"{name}: apply takes no input {min(unknown)!r}.")
        checks.require_weights(name, given.get("weights"))
        if hasattr(self, "num_segments"):
            checks.require_segment_ids(name, given.get("segment_ids"), self.num_segments)
        static = without_initializers(self)
        out = compiled(static, params, state, x, train=train and known.trains, **given)
        if train:
            self.check_training(x)
        return out

    return cast(Apply, run)


def without_initializers(method: Any) -> Any:
    """`method` with default initializers, so that a fresh closure there needs no new trace."""
    fields = [f for f in dataclasses.fields(method) if f.name.endswith("_init")]
    defaults = {f.name: f.default for f in fields if getattr(method, f.name) != f.default}
    return dataclasses.replace(method, **defaults) if defaults else method
