"""Splitting an axis into groups and joining it again, with the sharding kept where it can be."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from normjax.core.sharding import spec
from normjax.core.structs import AxisGroups, several


def ghosts(method: Any, shape: tuple[int, ...]) -> tuple[int, AxisGroups, int]:
    """How groups of `ghost_batch_size` samples of the global batch (None: all) lie on devices.

    Returns the number of groups on each device (one if there are no samples); the groups of devices
    that share a group of samples, or None; and the number of devices. ValueError if they do not
    fit. `shape` is that of the input of one device, the samples first.
    """
    size, samples = method.ghost_batch_size, shape[0] if shape else 1
    devices = 1 if method.axis_name is None else lax.axis_size(method.axis_name)
    if samples == 0:
        return 1, None, devices
    size = samples * devices if size is None else size
    if samples % size == 0:
        return samples // size, None, devices
    if samples * devices % size or size % samples:
        rule = f"it must divide the batch. {pad_and_mask(-samples % size)}"
        if devices > 1:
            rule = f"on {devices} devices whole groups lie on a device, or whole devices in one."
        name = type(method).__name__
        raise ValueError(f"{name}: ghost_batch_size={size} does not fit shape {shape}: {rule}")
    return 1, neighbours(devices, size // samples), devices


def pad_and_mask(missing: int) -> str:
    """What to do where so many samples are missing for the last group."""
    pad = f"Pad the batch with {missing} samples and give a mask that is False there"
    return f"{pad}: the last group is then smaller."


def neighbours(devices: int, together: int) -> tuple[tuple[int, ...], ...]:
    """The indices of all devices, in groups of `together` consecutive ones."""
    return tuple(tuple(range(i, i + together)) for i in range(0, devices, together))


def split(x: jax.Array, axis: int, groups: int) -> jax.Array:
    """Axis of size n as two axes (groups, n / groups) of consecutive blocks.

    If it is sharded over an Explicit mesh, whole groups stay on a device where their number allows
    it; else the positions within a group are sharded, where they can be.
    """
    shape = (*x.shape[:axis], groups, x.shape[axis] // groups, *x.shape[axis + 1 :])
    parts = spec(x)
    part = parts[axis]
    if part is None:
        return x.reshape(shape)
    devices = math.prod(jax.typeof(x).sharding.mesh.shape[name] for name in several(part))
    whole = groups % devices == 0
    within = not whole and shape[axis + 1] % devices == 0
    pair = part if whole else None, part if within else None
    return _reshape(x, shape, (*parts[:axis], *pair, *parts[axis + 1 :]))


def join(x: jax.Array, axis: int, like: jax.Array) -> jax.Array:
    """The inverse of `split`: axes `axis` and `axis + 1` become one, sharded as in `like`."""
    shape = (*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
    if all(part is None for part in (*spec(x), *spec(like))):
        return x.reshape(shape)
    return _reshape(x, shape, spec(like))


def _reshape(x, shape, parts):
    mesh = jax.typeof(x).sharding.mesh
    return jnp.reshape(x, shape, out_sharding=NamedSharding(mesh, PartitionSpec(*parts)))
