"""Forward and backward pass as programs of their own, and what is in them.

A forward pass returns the output, new statistics and what reverse mode keeps; a backward pass takes
that and a cotangent, and returns the gradients of parameters and input. What is kept and is the
input, or a view of it, stays where it is, as in one program for both.
"""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import Literal, jaxpr_as_fun

DIRECTIONS = ("forward", "backward")
VIEWS = ("reshape", "squeeze", "expand_dims", "broadcast_in_dim")
FREE = {
    *("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "opt-barrier"),
    *("after-all", "partition-id", "replica-id"),
}


class Passes:
    """Forward and backward programs of `apply(params, rest, x)` over several inputs, lowered.

    Attributes:
      lowered: both by direction.
      kept: bytes that reverse mode keeps for one input.
    """

    def __init__(self, params: Any, rest: Any, apply: Callable, x: Sequence, g: Sequence):
        held: list[Any] = [None]

        def one(params, rest, x):
            y, pullback, new = jax.vjp(lambda p, x: apply(p, rest, x), params, x, has_aux=True)
            leaves, held[0] = jax.tree.flatten(pullback)
            return y, jax.tree.leaves(new), leaves

        closed, shapes = jax.make_jaxpr(one, return_shape=True)(params, rest, x[0])
        fixed = jax.tree.leaves((params, rest))
        first = 1 + len(shapes[1])
        sources = [source(closed.jaxpr, var) for var in closed.jaxpr.outvars[first:]]
        fresh = [at is None for at in sources]
        run = jaxpr_as_fun(closed)

        def forward(fixed, x):
            results = []
            for part in x:
                at = (*fixed, part)
                if results:  # after the one before, of which nothing is left to use again
                    at, _ = lax.optimization_barrier((at, results[-1][0][0]))
                out = run(*at)
                results.append((out[:first], list(itertools.compress(out[first:], fresh))))
            return results

        def backward(fixed, x, kept, g):
            gradients = []
            for part, new, cotangent in zip(x, kept, g, strict=True):
                at = (*fixed, part)
                if gradients:
                    (at, cotangent), _ = lax.optimization_barrier(
                        ((at, cotangent), gradients[-1][1])
                    )
                new, again = iter(new), run(*at)[first:]  # of which constants alone are used
                leaves = [
                    next(new) if i is None else a if i < 0 else at[i].reshape(a.shape)
                    for i, a in zip(sources, again, strict=True)
                ]
                gradients.append(jax.tree.unflatten(held[0], leaves)(cotangent))
            return gradients

        kept = [list(itertools.compress(shapes[2], fresh))] * len(x)
        self.lowered = {
            "forward": jax.jit(forward).lower(fixed, x),
            "backward": jax.jit(backward).lower(fixed, x, kept, g),
        }
        self.kept = sum(math.prod(a.shape) * a.dtype.itemsize for a in shapes[2])
        self._arguments = fixed, x, g

    def arguments(self, forward: Callable) -> dict[str, tuple[Any, ...]]:
        """Those of both programs; the backward pass needs what `forward` keeps."""
        fixed, x, g = self._arguments
        kept = [new for _, new in forward(fixed, x)]
        return {"forward": (fixed, x), "backward": (fixed, x, kept, g)}


def source(jaxpr: Any, var: Any) -> int | None:
    """The argument of which an output of a jaxpr is a view; -1: it is a constant; None: neither.

    Example:
      >>> views = lambda a, b: (b.reshape(2, 2), b + 1, 2 * jax.numpy.ones(3))
      >>> jaxpr = jax.make_jaxpr(views)(1.0, jax.numpy.ones(4)).jaxpr
      >>> [source(jaxpr, var) for var in jaxpr.outvars]
      [1, None, -1]
    """
    if isinstance(var, Literal):
        return -1
    if var in jaxpr.invars:
        return jaxpr.invars.index(var)
    moving = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if moving.intersection(v for v in equation.invars if not isinstance(v, Literal)):
            moving.update(equation.outvars)
    if var not in moving:
        return -1
    for equation in jaxpr.eqns:
        if var not in equation.outvars:
            continue
        place, name = equation.outvars.index(var), equation.primitive.name
        if name in VIEWS:
            same = equation.invars[0].aval.size == var.aval.size
            return source(jaxpr, equation.invars[0]) if same else None
        if name == "optimization_barrier":
            return source(jaxpr, equation.invars[place])
        if name in ("jit", "pjit"):
            inner = equation.params["jaxpr"].jaxpr
            at = source(inner, inner.outvars[place])
            return at if at in (None, -1) else source(jaxpr, equation.invars[at])
    return None


def kernels(text: str) -> int:
    """How many kernels a compiled program starts; the body of a loop counts once.

    Example:
      >>> kernels(jax.jit(lambda x: x + 1).lower(1.0).compile().as_text())
      1
    """
    bodies: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if line.endswith("{") and "->" in line and not line.startswith((" ", "HloModule")):
            name = line.removeprefix("ENTRY ").split(maxsplit=1)[0].lstrip("%")
            entry, lines = (name if line.startswith("ENTRY ") else entry), []
            bodies[name] = lines
        else:
            lines.append(line)

    def count(name):
        total = 0
        for line in bodies.get(name, ()):
            found = re.search(r" = .*?\s([a-z][\w\-]*)\(", line)
            if found is None or found[1] in FREE or found[1].endswith(("-done", "-update")):
                continue
            inner = re.search(r"(?:to_apply|body)=%?([\w.\-]+)", line)
            total += count(inner[1]) if found[1] in ("call", "while") and inner else 1
        return total

    return count(entry)
