"""What XLA's GPU compiler needs: fewer kernels for sums, and passes that share no intermediate."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from normjax.core.sharding import spec

TERMS = 1 << 11  # more XLA sums by two kernels (its limit for columns lies higher)
PARTS = 32  # terms of a partial sum, which is written and read


def fence_small(*arrays: jax.Array) -> list[jax.Array]:
    """`arrays`, the smaller ones behind a barrier.

    Passes that compute the same of them would share it, and write it out: a mask, a centred input.
    The largest arrays stay as they are, or nothing before a pass could be fused with it.
    """
    large = max(a.size for a in arrays)
    small = [a for a in arrays if a.size < large]
    if not small:
        return list(arrays)
    fenced = iter(lax.optimization_barrier(small))
    return [next(fenced) if a.size < large else a for a in arrays]


def sums(values: Sequence[jax.Array], axes: tuple[int, ...]) -> list[jax.Array]:
    """Sums of arrays of one shape over `axes`, which stay as size one.

    Many terms are summed by two kernels, and by two more for each further sum: XLA joins the first
    of each, not the second. Here the second is one kernel for all, over the first axis.
    """
    shape = values[0].shape
    first, *others = axes
    alone = len(values) == 1 or not others or any(map(any, map(spec, values)))
    if alone or not all(isinstance(n, int) for n in shape):  # sizes of an exported family
        return [jnp.sum(a, axes, keepdims=True) for a in values]
    terms = math.prod(shape[i] for i in others)
    if terms < PARTS or terms * shape[first] <= TERMS:
        return [jnp.sum(a, axes, keepdims=True) for a in values]
    parts = [jnp.sum(a, others, keepdims=True) for a in values]
    zeros = tuple(np.zeros((), a.dtype) for a in parts)
    add = lambda a, b: tuple(p + q for p, q in zip(a, b, strict=True))
    return [jnp.expand_dims(a, first) for a in lax.reduce(tuple(parts), zeros, add, (first,))]
