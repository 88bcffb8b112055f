"""Merging moments over mapped devices: exact for unequal counts, one collective each way."""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from normjax.core.sharding import place, spec
from normjax.core.structs import AxisGroups, AxisName, Moments

Tree = TypeVar("Tree")

# Bytes, beyond which two small all-reduces beat one that carries every device's moments.
LARGE_MESSAGE = 1 << 20


def merge(parts: Moments, axis: int = 0) -> Moments:
    """Moments of the union of the samples whose moments lie along `axis`, which is dropped."""
    count = parts.count.sum(axis, keepdims=True)
    safe = jnp.maximum(count, 1)
    near = parts.mean.sum(axis, keepdims=True) / max(parts.mean.shape[axis], 1)
    mean = near + (parts.count * (parts.mean - near)).sum(axis, keepdims=True) / safe
    gap = jnp.square(parts.mean - mean)
    var = (parts.count * (parts.var + gap)).sum(axis, keepdims=True) / safe
    return Moments(*(a.squeeze(axis) for a in (count, mean, var)))


def over_devices(
    part: Moments, axis_name: AxisName, groups: AxisGroups = None
) -> tuple[Moments, Moments | None]:
    """Moments over the devices of `axis_name`, or over each group of their indices.

    Returns:
      The moments of this device's group, and those of all groups stacked on axis 0 (None: there is
      one group).

    Raises:
      ValueError: if the groups do not name every device.
    """
    devices = lax.axis_size(axis_name)
    if groups is None:
        large = 3 * devices * part.mean.size * part.mean.dtype.itemsize > LARGE_MESSAGE
        return _in_two_steps(part, axis_name) if large else merge(gather(part, axis_name)), None
    named = sum(map(len, groups))
    if named != devices:
        raise ValueError(
            f"axis_index_groups={groups} names {named} devices, but axis {axis_name!r} "
            f"has {devices}."
        )
    parts = gather(part, axis_name)
    owner = np.empty(devices, np.int32)
    each = []
    for number, group in enumerate(groups):
        owner[list(group)] = number
        members = np.array(group)
        each.append(merge(Moments(*(a[members] for a in parts))))
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *each)
    mine = jnp.asarray(owner)[lax.axis_index(axis_name)]
    return jax.tree.map(lambda a: a[mine], stacked), stacked


def gather(part: Tree, axis_name: AxisName) -> Tree:
    """Every device's `part` stacked on axis 0, by one psum, hence replicated for shard_map.

    The arrays of `part`, such as those of `Moments`, broadcast to one shape, which they get, and
    are sharded over an Explicit mesh like the one that is sharded most.
    """
    index, devices = lax.axis_index(axis_name), lax.axis_size(axis_name)
    leaves, tree = jax.tree.flatten(part)
    arrays = jnp.broadcast_arrays(*leaves)
    most = max(arrays, key=lambda a: sum(part is not None for part in spec(a)))
    message = jnp.stack([place(a, spec(most), like=most) for a in arrays])
    here = (jnp.arange(devices, dtype=index.dtype) == index).reshape(-1, *(1,) * message.ndim)
    stacked = lax.psum(jnp.where(here, message, 0), axis_name)
    return jax.tree.unflatten(tree, [stacked[:, i] for i in range(len(leaves))])


def _in_two_steps(part, axis_name):
    count, total = lax.psum((part.count, part.count * part.mean), axis_name)
    safe = jnp.maximum(count, 1)
    mean = total / safe
    square = part.count * (part.var + jnp.square(part.mean - mean))
    return Moments(count, mean, lax.psum(square, axis_name) / safe)
