"""Linear maps with a transpose of their own, and the fence between passes on CPU.

Tangents of the passes over an activation are linear maps whose best transpose is known. Autodiff
would find a slower one, and `jax.custom_vjp` would lose forward mode. The primitive here evaluates,
differentiates and batches as the plain function, and transposes by the given one.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

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

    def flat(*leaves):
        return jax.tree.leaves(fun(*jax.tree.unflatten(tree, leaves)))

    def flat_transpose(saved, cotangents):
        saved = jax.tree.unflatten(tree, [*saved, *(None,) * (len(leaves) - kept)])[0]
        return jax.tree.leaves(transpose(saved, jax.tree.unflatten(out, cotangents)))

    how = dict(fun=flat, transpose=flat_transpose, kept=kept, program=program)
    result = linear_p.bind(*align(*leaves), **how)
    return jax.tree.unflatten(out, result)


def align(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Gives all arrays the same varying manual axes (shard_map): no transpose need know them."""
    axes = frozenset().union(*map(varying, arrays))
    return tuple(
        lax.pcast(a, tuple(axes - varying(a)), to="varying") if axes - varying(a) else a
        for a in arrays
    )


def varying(a: jax.Array) -> frozenset[str]:
    """The manual mesh axes over which `a` varies."""
    return frozenset(getattr(jax.typeof(a).manual_axis_type, "varying", ()))


def spec(a: Any) -> tuple[Any, ...]:
    """For each axis of `a` the Explicit mesh axes over which it is sharded, or None."""
    kind = _kind(a)
    return tuple(kind.sharding.spec) + (None,) * (kind.ndim - len(kind.sharding.spec))


def place(a: jax.Array, parts: tuple[Any, ...], like: Any) -> jax.Array:
    """`a` sharded as `parts` say over the Explicit mesh of `like`."""
    if spec(a) == parts:
        return a
    return jax.sharding.reshard(a, NamedSharding(_kind(like).sharding.mesh, PartitionSpec(*parts)))


def _kind(a):
    return a.aval if ad.is_undefined_primal(a) else jax.typeof(a)


def _plain(*leaves, fun, **_):
    return fun(*leaves)


def _jvp(primals, tangents, *, fun, kept, **how):
    how = dict(fun=fun, kept=kept, **how)
    out = linear_p.bind(*primals, **how)
    fixed = all(isinstance(t, ad.Zero) for t in tangents[:kept])
    tangents = [ad.instantiate_zeros(t) for t in tangents]
    if fixed:
        return out, linear_p.bind(*align(*primals[:kept], *tangents[kept:]), **how)
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


linear_p.def_impl(_plain)
linear_p.def_abstract_eval(lambda *avals, fun, **_: jax.make_jaxpr(fun)(*avals).out_avals)
mlir.register_lowering(linear_p, mlir.lower_fun(_plain, multiple_results=True))
ad.primitive_jvps[linear_p] = _jvp
ad.primitive_transposes[linear_p] = _transpose
batching.primitive_batchers[linear_p] = _batch


fence_p = Primitive("normjax_fence")
fence_p.multiple_results = True


def fence(*arrays: jax.Array) -> list[jax.Array]:
    """The inputs of one pass, unchanged.

    On CPU, XLA shares what two passes could each recompute (a converted or centred activation) and
    so writes it out; an optimization barrier around all inputs of each pass keeps the passes apart.
    Other platforms fuse passes with one another and get none.
    """
    return fence_p.bind(*arrays)


def _fence_jvp(primals, tangents):
    return fence_p.bind(*primals), list(tangents)


fence_p.def_impl(lambda *arrays: list(arrays))
fence_p.def_abstract_eval(lambda *avals: list(avals))
mlir.register_lowering(fence_p, mlir.lower_fun(lambda *arrays: list(arrays), multiple_results=True))
mlir.register_lowering(
    fence_p,
    mlir.lower_fun(lambda *arrays: lax.optimization_barrier(list(arrays)), multiple_results=True),
    platform="cpu",
)
ad.primitive_jvps[fence_p] = _fence_jvp
batching.primitive_batchers[fence_p] = lambda arrays, dims: (fence_p.bind(*arrays), dims)
