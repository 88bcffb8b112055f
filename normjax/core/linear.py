"""Passes that are differentiated by a linear map with a transpose of its own.

Tangents of the passes over an activation are linear maps whose best transpose is known. Autodiff
would find a slower one, and `jax.custom_vjp` would lose forward mode. The primitive here evaluates,
differentiates and batches as the plain function, and transposes by the given one; `differentiated`
makes the rules of a pass from it.
"""

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from normjax.core.cpu import unfenced
from normjax.core.sharding import align, place, spec

_plain = contextvars.ContextVar("plain", default=False)


class Input(NamedTuple):
    """An activation with a carrier of its tangent: itself in at least float32.

    The carrier's value is never read, so that no program makes it. Passes take the tangent of `x`
    from it and hand its cotangent back in its dtype, so that the parts of a gradient are added wide
    and rounded once, where `x` was widened.
    """

    value: jax.Array
    carrier: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the activation."""
        return self.value.shape

    @property
    def ndim(self) -> int:
        """That of the activation."""
        return self.value.ndim

    @property
    def dtype(self) -> Any:
        """That of the activation."""
        return self.value.dtype


@contextlib.contextmanager
def plain_derivatives() -> Iterator[None]:
    """While it is open, functions traced anew are differentiated by plain autodiff of the formulas.

    They hold JAX's own primitives only, for tools that know no others. It drops all traces that JAX
    has cached, before and after.

    Example:
      >>> import jax, normjax as nj
      >>> params, state = nj.LayerNorm().init(None, 3)
      >>> loss = lambda x: (nj.LayerNorm().apply(params, state, x, train=True)[0] ** 3).sum()
      >>> with plain_derivatives():
      ...     print(jax.grad(loss)(jax.numpy.ones((2, 3))).shape)
      (2, 3)
    """
    token = _plain.set(True)
    jax.clear_caches()
    try:
        yield
    finally:
        _plain.reset(token)
        jax.clear_caches()


def is_plain() -> bool:
    """Whether `plain_derivatives()` is open, so that passes have no rules of their own."""
    return _plain.get()


def differentiated(
    tangent: Callable,
    transpose: Callable,
    *,
    static: int = 0,
    moving: int | None = None,
    saves: Callable | None = None,
) -> Callable[[Callable], Callable]:
    """Decorator of a pass: its tangent is linear, and transposes by the given function.

    The pass takes arrays, None or `Input` (of which it sees the value), then `static` hashable
    arguments. Undifferentiated, and not in training, it holds JAX's own primitives only. (Under
    `vmap` JAX takes for granted that a function and its rule leave the mapped axis at the same
    place: batching rules of `core.cpu` are those of the operations that they stand for.)

    Args:
      tangent: `tangent(*static, saved, tangents)`, linear in the tuple of tangents.
      transpose: `transpose(*static, saved, cotangents)`, a tuple: the cotangents of the tangents.
      static: number of static arguments, the last ones.
      moving: number of arguments that are differentiated, the first ones; None: all arrays.
      saves: `saves(out, *args)`, what both need; None: the arrays.
    """

    def decorate(function):
        arrays = len(inspect.signature(function).parameters) - static
        fixed = tuple(range(arrays, arrays + static))

        def of_values(*args: Any) -> Any:
            return function(*map(_value, args))

        def of_values_unfenced(*args: Any) -> Any:
            with unfenced():
                return of_values(*args)

        def rule(*given):
            *how, primals, tangents = given
            out = fenced(*primals, *how)
            moved = tuple(map(_carrier, tangents[:moving]))
            values = tuple(map(_value, primals))
            saved = values if saves is None else saves(out, *values, *how)
            forward, back = (functools.partial(f, *how) for f in (tangent, transpose))
            return out, linear(forward, back, saved, moved)

        fenced: Any = jax.custom_jvp(of_values, nondiff_argnums=fixed)
        alone: Any = jax.custom_jvp(of_values_unfenced, nondiff_argnums=fixed)
        fenced.defjvp(rule)
        alone.defjvp(rule)

        @functools.wraps(function)
        def run(*args):
            if not is_plain():
                return alone(*args)
            with unfenced(always=True):
                return function(*map(_carrier, args))

        return run

    return decorate


def _value(a):
    return a.value if isinstance(a, Input) else a


def _carrier(a):
    return a.carrier if isinstance(a, Input) else a


linear_p = Primitive("normjax_linear")
linear_p.multiple_results = True


def linear(
    fun: Callable, transpose: Callable, saved: Any, operands: Any, program: Any = None
) -> Any:
    """`fun(saved, operands)`, linear in `operands`.

    `transpose(saved, cotangents)` returns the cotangents of the operands, in their structure. Both
    functions close over static values only: every array goes through `saved`. `program` is a jaxpr
    with those primitives of `fun` for which JAX searches a program before it lowers it.
    """
    leaves, tree = jax.tree.flatten((saved, operands))
    kept = jax.tree.structure(saved).num_leaves
    out = jax.tree.structure(jax.eval_shape(fun, saved, operands))
    static = dict(
        fun=functools.partial(_flat, fun, tree),
        transpose=functools.partial(_flat_transpose, transpose, tree, out, len(leaves) - kept),
        kept=kept,
        program=program,
    )
    return jax.tree.unflatten(out, linear_p.bind(*align(*leaves), **static))


def _flat(fun, tree, *leaves):
    return jax.tree.leaves(fun(*jax.tree.unflatten(tree, leaves)))


def _flat_transpose(transpose, tree, out, operands, saved, cotangents):
    saved = jax.tree.unflatten(tree, [*saved, *(None,) * operands])[0]
    return jax.tree.leaves(transpose(saved, jax.tree.unflatten(out, cotangents)))


def linear_map(fun: Callable, transpose: Callable, x: jax.Array, program: Any = None) -> jax.Array:
    """`fun(x)`, linear: it and its `transpose` are each other's derivatives, at any order.

    What is inside is never differentiated. Undifferentiated it is `fun(x)` and no more.
    """

    def of_value_unfenced(x):
        with unfenced(always=is_plain()):
            return fun(x)

    def rule(primals, tangents):
        return fenced(*primals), _both_ways(fun, transpose, tangents[0], program)

    fenced, alone = jax.custom_jvp(fun), jax.custom_jvp(of_value_unfenced)
    fenced.defjvp(rule)
    alone.defjvp(rule)
    return of_value_unfenced(x) if is_plain() else alone(x)


def _both_ways(fun, transpose, x, program):
    return linear(
        lambda _, x: fun(x),
        lambda _, t: _both_ways(transpose, fun, t, program),
        (),
        x,
        program,
    )


def _lowered(*leaves, fun, **_):
    return fun(*leaves)


def _jvp(primals, tangents, *, fun, kept, **static):
    static = dict(fun=fun, kept=kept, **static)
    out = linear_p.bind(*primals, **static)
    fixed = all(isinstance(t, ad.Zero) for t in tangents[:kept])
    tangents = [ad.instantiate_zeros(t) for t in tangents]
    if fixed:
        return out, linear_p.bind(*align(*primals[:kept], *tangents[kept:]), **static)
    return out, jax.jvp(fun, tuple(primals), tuple(tangents))[1]


def _transpose(cotangents, *leaves, transpose, kept, **_):
    cotangents = [ad.instantiate_zeros(c) for c in cotangents]
    operands = zip(transpose(leaves[:kept], cotangents), leaves[kept:], strict=True)
    return [None] * kept + [
        place(c, spec(a), like=a) if ad.is_undefined_primal(a) else None for c, a in operands
    ]


def _batch(leaves, dims, *, fun, transpose, kept, program):
    mapped = [(a, d) for a, d in zip(leaves, dims, strict=True) if d is not None]
    like, at = next(((a, d) for a, d in mapped if spec(a)[d] is not None), mapped[0])
    size, part = like.shape[at], spec(like)[at]

    def front(a, d):
        a = batching.bdim_at_front(a, d, size)
        return place(a, (part, *spec(a)[1:]), like=like)

    saved = [a if d is None else front(a, d) for a, d in zip(leaves[:kept], dims, strict=False)]
    operands = [front(a, d) for a, d in zip(leaves[kept:], dims[kept:], strict=True)]
    axes = tuple(None if d is None else 0 for d in dims[:kept])
    out = linear_p.bind(
        *align(*saved, *operands),
        fun=jax.vmap(fun, in_axes=axes + (0,) * len(operands)),
        transpose=jax.vmap(transpose, in_axes=(axes, 0)),
        kept=kept,
        program=program,
    )
    return out, [0] * len(out)


linear_p.def_impl(_lowered)
linear_p.def_abstract_eval(lambda *avals, fun, **_: jax.make_jaxpr(fun)(*avals).out_avals)
mlir.register_lowering(linear_p, mlir.lower_fun(_lowered, multiple_results=True))
ad.primitive_jvps[linear_p] = _jvp
ad.primitive_transposes[linear_p] = _transpose
batching.primitive_batchers[linear_p] = _batch
