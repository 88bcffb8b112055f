"""Passes that are differentiated by a linear map with a transpose of its own.

The tangents of passes over an activation are linear maps with better transposes than autodiff
finds, and `jax.custom_vjp` would lose forward mode. The primitive here evaluates, differentiates
and batches as the plain function, and transposes by the given one.
"""

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from normjax.core import compat
from normjax.core.compat import is_plain
from normjax.core.cpu import unfenced
from normjax.core.sharding import align, place, spec
from normjax.core.statistics import named


class Input(NamedTuple):
    """An activation with a carrier of its tangent: itself in at least float32.

    No program makes the carrier, for nobody reads its value. Passes take the tangent of `x` from it
    and hand its cotangent back in its dtype: the parts of a gradient are added wide, and rounded
    once, where `x` was widened.
    """

    value: jax.Array
    carrier: jax.Array

    shape = property(operator.attrgetter("value.shape"))
    ndim = property(operator.attrgetter("value.ndim"))
    dtype = property(operator.attrgetter("value.dtype"))


def differentiated(
    tangent: Callable,
    transpose: Callable,
    *,
    static: int = 0,
    moving: int | None = None,
    saves: Callable | None = None,
    dear: bool = False,
) -> Callable[[Callable], Callable]:
    """Decorator of a pass: its tangent is linear, and transposes by the given function.

    The pass takes arrays, None or `Input` (of which it sees the value), then `static` hashable
    arguments; the first `moving` arrays (None: all) are differentiated. Undifferentiated, and not
    in training, it holds what the function holds. (Under `vmap` JAX takes for granted that a
    function and its rule leave the mapped axis at the same place: batching rules of `core.cpu` are
    those of the operations that they stand for.)

    Args:
      tangent: `tangent(*static, saved, tangents)`, linear in the tuple of tangents.
      transpose: `transpose(*static, saved, cotangents)`, a tuple: the cotangents of the tangents.
      saves: `saves(out, *args)`, what both need; None: the arrays.
      dear: whether policies of `jax.checkpoint` are to know what the function returns: it is
        `named` where it is differentiated, for they do not look into functions with a rule.
    """

    def decorate(function):
        arrays = len(inspect.signature(function).parameters) - static
        fixed = tuple(range(arrays, arrays + static))

        def of_values(*args):
            return function(*map(_value, args))

        def rule(fenced, *given):
            *options, primals, tangents = given
            out = fenced(*primals, *options)
            out = named(out) if dear else out
            moved = tuple(map(_carrier, tangents[:moving]))
            values = tuple(map(_value, primals))
            saved = values if saves is None else saves(out, *values, *options)
            forward, back = (functools.partial(f, *options) for f in (tangent, transpose))
            return out, linear(forward, back, saved, moved)

        ruled = _with_rule(of_values, rule, fixed)

        @functools.wraps(function)
        def run(*args):
            return function(*map(_carrier, args)) if is_plain() else ruled(*args)

        return run

    return decorate


def _with_rule(function, rule, static=()):
    """`function`, unfenced; its `rule(function, *static, primals, tangents)` gets it as it is."""

    def bare(*args: Any) -> Any:
        with unfenced():
            return function(*args)

    both: Any = [jax.custom_jvp(f, nondiff_argnums=static) for f in (function, bare)]
    for f in both:
        f.defjvp(functools.partial(rule, both[0]))
    return both[1]


def _value(a):
    return a.value if isinstance(a, Input) else a


def _carrier(a):
    return a.carrier if isinstance(a, Input) else a


def linear(fun: Callable, transpose: Callable, saved: Any, operands: Any) -> Any:
    """`fun(saved, operands)`, linear in `operands`.

    `transpose(saved, cotangents)` returns the cotangents of the operands, in their structure. Both
    functions close over static values only: every array goes through `saved`.
    """
    leaves, tree = jax.tree.flatten((saved, operands))
    kept = jax.tree.structure(saved).num_leaves
    moved = (None,) * (len(leaves) - kept)
    out = jax.tree.structure(jax.eval_shape(fun, saved, operands))

    def flat(*leaves):
        return jax.tree.leaves(fun(*jax.tree.unflatten(tree, leaves)))

    def flat_transpose(saved, cotangents):
        saved, _ = jax.tree.unflatten(tree, [*saved, *moved])
        return jax.tree.leaves(transpose(saved, jax.tree.unflatten(out, cotangents)))

    flat_out = _bind(*align(*leaves), fun=flat, transpose=flat_transpose, kept=kept)
    return jax.tree.unflatten(out, flat_out)


def linear_map(fun: Callable, transpose: Callable, x: jax.Array) -> jax.Array:
    """`fun(x)`, linear: it and its `transpose` are each other's derivatives, at any order.

    What is inside is never differentiated. Undifferentiated it is `fun(x)` and no more.
    """
    if is_plain():
        return fun(x)

    def rule(fenced, primals, tangents):
        return fenced(*primals), _both_ways(fun, transpose, tangents[0])

    return _with_rule(fun, rule)(x)


def _both_ways(fun, transpose, x):
    return linear(lambda _, x: fun(x), lambda _, t: _both_ways(transpose, fun, t), (), x)


def _jvp(primals, tangents, **static):
    fun, kept = static["fun"], static["kept"]
    out = _bind(*primals, **static)
    fixed = all(isinstance(t, compat.Zero) for t in tangents[:kept])
    tangents = [compat.instantiate_zeros(t) for t in tangents]
    if fixed:
        return out, _bind(*align(*primals[:kept], *tangents[kept:]), **static)
    return out, jax.jvp(fun, tuple(primals), tuple(tangents))[1]


def _transpose(cotangents, *leaves, transpose, kept, **_):
    cotangents = [compat.instantiate_zeros(c) for c in cotangents]
    operands = zip(transpose(leaves[:kept], cotangents), leaves[kept:], strict=True)
    return [None] * kept + [
        place(c, spec(a), like=a) if compat.is_undefined_primal(a) else None for c, a in operands
    ]


def _batch(leaves, dims, *, fun, transpose, kept):
    mapped = [(a, d) for a, d in zip(leaves, dims, strict=True) if d is not None]
    like, at = next(((a, d) for a, d in mapped if spec(a)[d] is not None), mapped[0])
    size, part = like.shape[at], spec(like)[at]

    def front(a, d):
        a = compat.bdim_at_front(a, d, size)
        return place(a, (part, *spec(a)[1:]), like=like)

    saved = [a if d is None else front(a, d) for a, d in zip(leaves[:kept], dims, strict=False)]
    operands = [front(a, d) for a, d in zip(leaves[kept:], dims[kept:], strict=True)]
    axes = tuple(None if d is None else 0 for d in dims[:kept])
    out = _bind(
        *align(*saved, *operands),
        fun=jax.vmap(fun, in_axes=axes + (0,) * len(operands)),
        transpose=jax.vmap(transpose, in_axes=(axes, 0)),
        kept=kept,
    )
    return out, [0] * len(out)


_bind = compat.register(
    "normjax_linear",
    lambda *leaves, fun, **_: fun(*leaves),
    abstract=lambda *avals, fun, **_: jax.make_jaxpr(fun)(*avals).out_avals,
    jvp=_jvp,
    transpose=_transpose,
    batch=_batch,
)
