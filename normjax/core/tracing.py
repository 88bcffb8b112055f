"""Tracing `apply` once for all layers of one configuration and shape, and as it is written."""

import dataclasses
import functools
import sys
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
    evaluation alike is traced once for both; `check_training` and `check_inputs` run outside.
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
        self.check_inputs(**{name: value for name, value in given.items() if name in known.inputs})
        static = without_initializers(self)
        out = compiled(static, params, state, x, train=train and known.trains, **given)
        if train:
            self.check_training(x)
        return out

    return cast(Apply, run)


def as_written(run: Callable[[], tuple[Any, Any]], x: Any) -> tuple[Any, Any]:
    """What `run` returns, the output for `x` and more, without what qwix puts in its place.

    In a quantized model qwix replaces functions of JAX: it rounds the operands of products, and for
    ODML of all arithmetic. Of norms it knows those of Flax alone, by name; of others the running
    statistics would be averages of rounded numbers.
    """
    manager: Any = getattr(sys.modules.get("qwix._src.interception"), "interception_manager", None)
    if manager is None or not (replaced := manager.disable_interception()):
        return run()
    try:
        y, more = run()
    finally:
        manager.enable_interception(replaced)
    return jax.lax.optimization_barrier((x, y))[1], more  # by which qwix sees that y comes of x


def without_initializers(method: Any) -> Any:
    """`method`, and all that it is made of, with default initializers.

    So a fresh closure there needs no new trace, and makes no other configuration of it.
    """

    def bare(value):
        if isinstance(value, tuple):
            return tuple(map(bare, value))
        is_method = dataclasses.is_dataclass(value) and not checks.method(value)
        return without_initializers(value) if is_method else value

    changed = {}
    for f in dataclasses.fields(method):
        old = getattr(method, f.name)
        has_default = f.name.endswith("_init") and f.default is not dataclasses.MISSING
        new = f.default if has_default else bare(old)
        if new != old:
            changed[f.name] = new
    return dataclasses.replace(method, **changed) if changed else method
