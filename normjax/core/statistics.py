"""Statistics, and how those of parts make those of the whole: exact for unequal counts."""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from normjax.core.sharding import place, spec
from normjax.core.structs import AxisGroups, AxisName

Tree = TypeVar("Tree")
Statistics = TypeVar("Statistics", "Moments", "Covariances")

NAME = "normjax.statistics"  # by which a policy of `jax.checkpoint` knows them
LARGE_MESSAGE = 1 << 20  # bytes, from which two all-reduces beat one of all devices' statistics


class Moments(NamedTuple):
    """First two moments of a number of values.

    Example:
      >>> import normjax as nj, numpy as np
      >>> nj.BatchNorm().observe(np.eye(2)).var.tolist()
      [0.25, 0.25]
    """

    count: jax.Array  # how many values entered, over all devices; shaped as the others
    mean: jax.Array
    var: jax.Array  # population variance, divided by `count`


class Covariances(NamedTuple):
    """Mean and covariance of a number of vectors.

    Example:
      >>> import jax.numpy as jnp
      >>> Covariances(jnp.array(4.0), jnp.zeros(3), jnp.eye(3)).cov.shape
      (3, 3)
    """

    count: jax.Array  # [...], how many vectors entered, over all devices
    mean: jax.Array  # [..., features]
    cov: jax.Array  # [..., features, features], divided by `count`


class Parted(NamedTuple):
    """Moments (or covariances) of a batch, and of the parts of it that a method treats apart.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> seen = nj.ExclusiveBatchNorm().observe(jnp.arange(8.0).reshape(4, 2))
      >>> seen.mean.shape, seen.parts.mean.shape
      ((2,), (4, 2))
    """

    count: jax.Array
    mean: jax.Array
    var: jax.Array  # of covariances the covariance
    parts: Any  # what the method's `coefficients` take


def named(tree: Tree) -> Tree:
    """`tree`, whose arrays have the name by which a policy of `jax.checkpoint` keeps them.

    In a compiled program the name is nothing.
    """
    return jax.tree.map(lambda a: checkpoint_name(a, NAME), tree)


def whole(seen: Any) -> Any:
    """What `seen` says of the whole batch, without its parts."""
    if not isinstance(seen, Parted):
        return seen
    return (Covariances if isinstance(seen.parts, Covariances) else Moments)(*seen[:3])


def divisor(count: jax.Array) -> jax.Array:
    """`count`, which may be a sum of small weights, or one where nothing entered."""
    return jnp.where(count > 0, count, jnp.ones((), count.dtype))


def merge(parts: Statistics, axis: int = 0) -> Statistics:
    """Statistics of the union of the values whose statistics lie along `axis`, which is dropped."""
    count, means, seconds = parts
    total = count.sum(axis, keepdims=True)
    safe = divisor(total)
    near = means.sum(axis, keepdims=True) / max(means.shape[axis], 1)
    weighted = (_weight(count, means) * (means - near)).sum(axis, keepdims=True)
    mean = near + weighted / _weight(safe, near)
    second = _weight(count, seconds) * (seconds + _square(parts, means - mean))
    second = second.sum(axis, keepdims=True) / _weight(safe, seconds)
    return type(parts)(*(a.squeeze(axis) for a in (total, mean, second)))


def pool(*seen: Any) -> Any:
    """Statistics of the union of several batches, of those of each.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> method, x = nj.BatchNorm(), jnp.arange(12.0).reshape(6, 2)
      >>> pool(method.observe(x[:4]), method.observe(x[4:])).mean.tolist()
      [5.0, 6.0]
    """
    return merge(_stack(map(whole, seen)))


def _stack(trees):
    return jax.tree.map(lambda *a: jnp.stack(a), *trees)


def _weight(count, like):
    """`count` with trailing axes of size one, to weigh `like`."""
    return jnp.expand_dims(count, tuple(range(count.ndim, like.ndim)))


def _square(statistics, gap):
    """What a gap between means adds to the variance or the covariance."""
    if isinstance(statistics, Covariances):
        return gap[..., :, None] * gap[..., None, :]
    return jnp.square(gap)


def over_devices(
    part: Statistics, axis_name: AxisName, groups: AxisGroups = None
) -> tuple[Statistics, Statistics | None]:
    """Statistics of this device's group, and those of all groups stacked on axis 0.

    Without `groups`, which must name every device (ValueError), those of all devices, and None.
    """
    devices = lax.axis_size(axis_name)
    if groups is None:
        large = devices * sum(a.size * a.dtype.itemsize for a in part) > LARGE_MESSAGE
        return _in_two_steps(part, axis_name) if large else merge(gather(part, axis_name)), None
    if (named := sum(map(len, groups))) != devices:
        axis = f"axis {axis_name!r} has {devices}"
        raise ValueError(f"axis_index_groups={groups} names {named} devices, but {axis}.")
    parts, owner = gather(part, axis_name), np.empty(devices, np.int32)
    for number, group in enumerate(groups):
        owner[list(group)] = number
    pick = lambda group: jax.tree.map(lambda a: a[np.array(group)], parts)
    stacked = _stack(merge(pick(group)) for group in groups)
    own = jnp.asarray(owner)[lax.axis_index(axis_name)]
    return jax.tree.map(lambda a: a[own], stacked), stacked


def gather(part: Tree, axis_name: AxisName) -> Tree:
    """Every device's `part` stacked on axis 0, by one psum, hence replicated for shard_map."""
    index, devices = lax.axis_index(axis_name), lax.axis_size(axis_name)
    leaves, tree = jax.tree.flatten(part)
    alike = len({a.shape for a in leaves}) == 1
    if alike:  # sharded over an Explicit mesh like the one that is sharded most
        most = max(leaves, key=lambda a: sum(part is not None for part in spec(a)))
        message = jnp.stack([place(a, spec(most), like=most) for a in leaves])
    else:
        message = jnp.concatenate([a.ravel() for a in leaves])
    here = (jnp.arange(devices, dtype=index.dtype) == index).reshape(-1, *(1,) * message.ndim)
    stacked = lax.psum(jnp.where(here, message, 0), axis_name)
    if alike:
        return jax.tree.unflatten(tree, [stacked[:, i] for i in range(len(leaves))])
    pieces = jnp.split(stacked, np.cumsum([a.size for a in leaves])[:-1], axis=1)
    whole = [piece.reshape(-1, *a.shape) for piece, a in zip(pieces, leaves, strict=True)]
    return jax.tree.unflatten(tree, whole)


def _in_two_steps(part, axis_name):
    count, total = lax.psum((part[0], _weight(part[0], part[1]) * part[1]), axis_name)
    safe = divisor(count)
    mean = total / _weight(safe, total)
    second = _weight(part[0], part[2]) * (part[2] + _square(part, part[1] - mean))
    return type(part)(count, mean, lax.psum(second, axis_name) / _weight(safe, second))
