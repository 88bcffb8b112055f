"""Splitting an axis into groups and joining it again, with the sharding kept where it can be."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from normjax.core.sharding import place, spec


def ghosts(
    name: str, size: int | None, shape: tuple[int, ...], devices: int
) -> tuple[int, tuple[tuple[int, ...], ...] | None]:
    """How consecutive samples of the global batch, `size` together (None: all), lie on devices.

    Args:
      name: the method's, for the error.
      size: samples per group.
      shape: that of the input of one device, the samples first.
      devices: how many there are.

    Returns:
      The number of groups on each device (one if there are no samples), and None; or, where devices
      share a group, one and the groups of their indices.

    Raises:
      ValueError: if groups do not divide the batch, or neither whole groups lie on a device nor
        whole devices share one.
    """
    samples = shape[0] if shape else 1
    if samples == 0:
        return 1, None
    size = samples * devices if size is None else size
    if samples % size == 0:
        return samples // size, None
    if samples * devices % size or size % samples:
        rule = "divide the batch"
        if devices > 1:
            rule += f" of {devices} devices, with whole groups on a device or whole devices in one"
        hint = f" {pad_and_mask(-samples % size)}" if devices == 1 else ""
        raise ValueError(
            f"{name}: ghost_batch_size={size} does not fit input of shape {shape}: it must {rule}."
            f"{hint}"
        )
    return 1, neighbours(devices, size // samples)


def pad_and_mask(missing: int) -> str:
    """What to do where so many samples are missing for the last group."""
    return (
        f"Pad the batch with {missing} samples and give a mask that is False there: the last group "
        "is then smaller."
    )


def neighbours(devices: int, together: int) -> tuple[tuple[int, ...], ...]:
    """The indices of all devices, in groups of `together` consecutive ones."""
    return tuple(tuple(range(i, i + together)) for i in range(0, devices, together))


def samples_of_mask(mask: jax.Array | None, x: jax.Array) -> jax.Array | None:
    """`mask` with the samples of `x` on axis 0, and there sharded like `x`, so that both split."""
    if mask is None:
        return None
    mask = jnp.broadcast_to(mask, (x.shape[0], *mask.shape[1:]))
    return place(mask, (spec(x)[0], *spec(mask)[1:]), like=x)


def split(x: jax.Array, axis: int, groups: int) -> jax.Array:
    """Axis of size n as two axes (groups, n / groups) of consecutive blocks.

    If the axis is sharded over an Explicit mesh, whole groups stay on a device where their number
    allows it; else the positions within a group are sharded, or, if that does not divide either,
    nothing is.
    """
    shape = (*x.shape[:axis], groups, x.shape[axis] // groups, *x.shape[axis + 1 :])
    parts = spec(x)
    part = parts[axis]
    if part is None:
        return x.reshape(shape)
    names = part if isinstance(part, tuple) else (part,)
    devices = math.prod(jax.typeof(x).sharding.mesh.shape[n] for n in names)
    if groups % devices == 0:
        pair = (part, None)
    elif shape[axis + 1] % devices == 0:
        pair = (None, part)
    else:
        pair = (None, None)
    return _reshape(x, shape, (*parts[:axis], *pair, *parts[axis + 1 :]))


def join(x: jax.Array, axis: int, like: jax.Array) -> jax.Array:
    """The inverse of `split`: axes `axis` and `axis + 1` become one, sharded as in `like`."""
    shape = (*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
    if all(part is None for part in spec(x)) and all(part is None for part in spec(like)):
        return x.reshape(shape)
    return _reshape(x, shape, spec(like))


def _reshape(x, shape, parts):
    mesh = jax.typeof(x).sharding.mesh
    return jnp.reshape(x, shape, out_sharding=NamedSharding(mesh, PartitionSpec(*parts)))
