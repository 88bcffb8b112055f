"""The values whose signs decide which affine map a network is, read from the program of JAX.

A ReLU is `max(u, 0)`, a leaky ReLU `select(u >= 0, ...)`, and so on: the places where u is zero are
the boundary of the unit. All else that a piecewise affine program does to its input is linear.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from normjax.core.compat import evaluate

LINEAR = {
    *("add", "add_any", "broadcast_in_dim", "checkpoint_name", "concatenate", "copy", "copy_p"),
    *("convert_element_type", "cumsum", "expand_dims", "name", "neg", "optimization_barrier"),
    *("pad", "reduce_precision", "reduce_sum", "reduce_window_sum", "reshape", "rev"),
    *("sharding_constraint", "slice", "split", "squeeze", "sub", "transpose"),
}
IN_ONE = {"conv_general_dilated", "dot_general", "mul"}  # linear in each operand by itself
IN_FIRST = {"div", "dynamic_slice", "gather"}  # linear in the first
POOLS = {"reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min"}
COMPARISONS = {"ge", "gt", "le", "lt"}


class _Value(NamedTuple):
    value: Any
    moves: bool  # whether it depends on the input
    gap: Any = None  # of a comparison, the difference whose sign it is


def switches(
    caller: str, function: Callable[[jax.Array], jax.Array], x: jax.Array
) -> tuple[jax.Array, OrderedDict[str, jax.Array]]:
    """The output of a function of one sample, and the values u by place, in order.

    Places are "relu_0", "leaky_relu_1" and so on. ValueError for what is not piecewise affine, and
    for a function without a place.
    """
    program = jax.make_jaxpr(function)(x)
    reader = _Reader(caller)
    consts = [_Value(c, False) for c in program.consts]
    (output,) = reader.read(program.jaxpr, [*consts, _Value(x, True)], ())
    if not reader.found:
        raise ValueError(f"{caller}: the model is affine: no activation of it has a boundary.")
    return output.value, reader.found


class _Reader:
    """Runs a program and keeps the values u."""

    def __init__(self, caller):
        self.caller = caller
        self.found = OrderedDict()

    def read(self, program, inputs, names):
        env = dict(zip([*program.constvars, *program.invars], inputs, strict=True))
        look = lambda v: _Value(v.val, False) if hasattr(v, "val") else env[v]
        for eqn in program.eqns:
            inner = _inner(eqn)
            values = [look(v) for v in eqn.invars]
            if inner is None:
                outputs = self.step(eqn, values, names)
            else:
                consts = [_Value(c, False) for c in inner.consts]
                own = str(eqn.params.get("name", ""))
                outputs = self.read(inner.jaxpr, [*consts, *values], (*names, own))
            env |= zip(eqn.outvars, outputs, strict=True)
        return [look(v) for v in program.outvars]

    def step(self, eqn, values, names):
        """What one step of the program returns."""
        kind, moving = eqn.primitive.name, [v.moves for v in values]
        gap = None
        if not any(moving):
            pass
        elif kind in COMPARISONS:
            gap = values[0].value - values[1].value
        elif kind in ("max", "min"):
            self.keep(values[0].value - values[1].value, kind, names)
        elif kind == "abs":
            self.keep(values[0].value, kind, names)
        elif kind == "select_n" and values[0].gap is not None:
            self.keep(values[0].gap, kind, names)
        elif not (
            kind in LINEAR | POOLS
            or (kind == "select_n" and not moving[0])
            or (kind in IN_ONE and sum(moving) == 1)
            or (kind in IN_FIRST and not any(moving[1:]))
        ):
            raise ValueError(
                f"{self.caller}: the model takes {_called(names, kind)} of its input, which is not "
                "piecewise affine and has no boundaries: activations are such as relu, leaky_relu "
                "and abs, and norms evaluate, with running statistics."
            )
        outputs = evaluate(eqn.primitive, eqn.params, *(v.value for v in values))
        return [_Value(output, any(moving), gap) for output in outputs]

    def keep(self, gap, kind, names):
        gap = gap[0] if jnp.ndim(gap) and len(gap) == 1 else gap  # the sample is a batch of one
        self.found[f"{_called(names, kind)}_{len(self.found)}"] = gap


def _called(names, kind):
    """The innermost function of `jax.nn` that a step is in, or the step itself."""
    return next((name for name in reversed(names) if hasattr(jax.nn, name)), kind)


def _inner(eqn):
    """The closed program that a step calls once; None if it calls none, or several times."""
    if eqn.primitive.name in ("scan", "while", "cond"):
        return None
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in eqn.params:
            inner = eqn.params[name]
            return inner if hasattr(inner, "jaxpr") else _Open(inner, [])
    return None


class _Open(NamedTuple):
    """A program without constants, with the fields of a closed one."""

    jaxpr: Any
    consts: Any


__all__ = ["switches"]
