"""Where arrays lie: specs over Explicit meshes, and the manual axes of shard_map."""

from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from normjax.core.compat import kind, varying


def align(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Gives all arrays the same varying manual axes, so that transposes need no case for them."""
    axes = frozenset().union(*map(varying, arrays))
    return tuple(
        lax.pcast(a, tuple(axes - varying(a)), to="varying") if axes - varying(a) else a
        for a in arrays
    )


def spec(a: Any) -> tuple[Any, ...]:
    """For each axis of `a` the Explicit mesh axes over which it is sharded, or None."""
    parts = tuple(kind(a).sharding.spec)
    return parts + (None,) * (kind(a).ndim - len(parts))


def place(a: jax.Array, parts: tuple[Any, ...], like: Any) -> jax.Array:
    """`a` sharded as `parts` say over the Explicit mesh of `like`, or its own if that has none."""
    if spec(a) == parts:
        return a
    mesh = kind(like).sharding.mesh
    mesh = kind(a).sharding.mesh if mesh.empty else mesh
    return jax.sharding.reshard(a, NamedSharding(mesh, PartitionSpec(*parts)))


def place_like(a: jax.Array, x: jax.Array, whole: int | None = None) -> jax.Array:
    """`a`, which has the rank of `x` and broadcasts to it, sharded as `x` where it is as large.

    Not so along the axis `whole`.
    """
    sizes = enumerate(zip(a.shape, x.shape, spec(x), strict=True))
    parts = (part if n == m != 1 and i != whole else None for i, (n, m, part) in sizes)
    return place(a, tuple(parts), like=x)
