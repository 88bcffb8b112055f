"""Normalization of parts of the batch."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from normjax.core import checks, groups, running
from normjax.core.sharding import align, place, spec
from normjax.core.structs import Axes, Features, Key


@dataclasses.dataclass(frozen=True)
class Ghost:
    """Runs a method on equal parts of the batch in training; evaluation runs it once on all of it.

    Hoffer, Hubara & Soudry, *Train longer, generalize better*, 2017, Algorithm 1 (ghost batch
    normalization), https://arxiv.org/abs/1705.08741

    Part i is the i-th block of consecutive samples of the *global* batch: under jit by itself;
    under a named axis (the method's `axis_name`) devices hold consecutive blocks of it, and either
    whole groups lie on a device, or whole devices share a group. So the result does not depend on
    how many devices there are. Running statistics are the mean of what each part makes of the old
    ones; the paper's Algorithm 1 moves them by the parts one after the other.

    Attributes:
      method: the method, such as `BatchNorm()`.
      groups: number of parts; divides the batch.

    Raises:
      ValueError: for a method that is none, or for groups that do not divide the batch or fit the
        devices.

    Example:
      >>> import jax, normjax as nj
      >>> method = nj.Ghost(nj.BatchNorm(), groups=4)
      >>> params, state = method.init(jax.random.key(0), 3)
      >>> x = jax.random.normal(jax.random.key(1), (32, 3))
      >>> y, state = method.apply(params, state, x, train=True)
      >>> y.shape
      (32, 3)
    """

    method: Any
    groups: int

    def __post_init__(self):
        checks.configuration(self)
        checks.no_pair("Ghost", self.method, "give it its own field `groups`")
        if getattr(self.method, "axis_index_groups", None) is not None:
            raise ValueError("Ghost: the method has axis_index_groups; Ghost makes these itself.")
        axis_name = getattr(self.method, "axis_name", None)
        if axis_name is not None and not self.depends_on_train:
            raise ValueError(
                f"Ghost: axis_name={axis_name!r} of {type(self.method).__name__} divides its "
                "samples, not the batch: its statistics need no Ghost."
            )
        if any(_axis_names(part) for part in _parts(self.method)):
            raise ValueError(
                "Ghost: a method inside of the method has an axis_name: put Ghost around that one."
            )

    @property
    def axis(self) -> Axes:
        """The feature axes of the method."""
        return checks.feature_axes(self.method)

    @property
    def random(self) -> bool:
        """Whether training draws random numbers."""
        return checks.is_random(self.method)

    @property
    def depends_on_train(self) -> bool:
        """Whether training and evaluation differ."""
        return checks.depends_on_train(self.method)

    def init(self, key: Key, features: Features) -> tuple[Any, Any]:
        """Parameters and state of the method."""
        return self.method.init(key, features)

    def apply(
        self,
        params: Any,
        state: Any,
        x: jax.Array,
        *,
        train: bool,
        mask: jax.Array | None = None,
        key: Key = None,
        **inputs: Any,
    ) -> tuple[Any, Any]:
        """Runs the method on each part; `mask` and `inputs` (batch on axis 0) are divided too.

        Every part draws with a key of its own; under a named axis give all devices the same `key`.
        """
        if not train:
            return self.method.apply(params, state, x, train=False, mask=mask, key=key, **inputs)
        return apply_to_parts(self.method, self.groups, params, state, x, mask, key, **inputs)


def apply_to_parts(
    method: Any,
    number: int,
    params: Any,
    state: Any,
    x: jax.Array,
    mask: jax.Array | None,
    key: Key,
    **inputs: Any,
) -> tuple[Any, Any]:
    """Training of `Ghost(method, number)`; the number may be symbolic."""
    x = checks.real("Ghost", x)
    axis_name = getattr(method, "axis_name", None)
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    if devices > 1 and number % devices and devices % number:
        raise ValueError(
            f"Ghost: {number} groups and {devices} devices along axis {axis_name!r}: "
            "one must divide the other."
        )
    keys = _keys(method, number, key, axis_name, devices)
    if devices > 1 and number < devices:
        shared = groups.neighbours(devices, devices // number)
        if not hasattr(method, "axis_index_groups"):
            raise ValueError(
                f"Ghost: groups={number} on {devices} devices, but "
                f"{type(method).__name__} has no axis_index_groups, by which devices "
                "share a group: give one or more groups per device."
            )
        method = dataclasses.replace(method, axis_index_groups=shared)
        key = None if keys is None else keys[0]
        return method.apply(params, state, x, train=True, mask=mask, key=key, **inputs)

    here = number // devices
    method = method if devices == 1 else dataclasses.replace(method, axis_name=None)
    if x.ndim == 0 or x.shape[0] % here != 0:
        hint = f" {groups.pad_and_mask(-x.shape[0] % here)}" if x.ndim else ""
        raise ValueError(f"Ghost: {here} groups do not divide a batch of shape {x.shape}.{hint}")
    mask = groups.samples_of_mask(checks.mask("Ghost", mask, x.shape), x)
    inputs = jax.tree.map(lambda a: place(a, (spec(x)[0], *spec(a)[1:]), like=x), inputs)
    parts = jax.tree.map(lambda a: groups.split(a, 0, here), (x, mask, inputs))
    if keys is not None:
        keys = place(keys, (spec(parts[0])[0], *spec(keys)[1:]), like=x)

    def run(part, key):
        x, mask, inputs = part
        return method.apply(params, state, x, train=True, mask=mask, key=key, **inputs)

    y, new = jax.vmap(run)(parts, keys)
    filled = jnp.ones(here, bool) if mask is None else jnp.any(parts[1], range(1, x.ndim + 1))
    filled, _ = align(filled, x)
    name = axis_name if devices > 1 else None
    new = running.average_filled(state, new, filled, name)
    return jax.tree.map(lambda a: groups.join(a, 0, like=x), y), new


def _keys(method, number, key, axis_name, devices):
    """The keys of the groups on this device, or of the one that it shares with others."""
    if key is None or not checks.is_random(method):
        return None
    keys = jax.random.split(key, number)
    if devices == 1:
        return keys
    here = max(number // devices, 1)
    first = lax.axis_index(axis_name) * number // devices
    return lax.dynamic_slice_in_dim(keys, first, here)


def _parts(method):
    """The methods that `method` is made of."""
    inner = getattr(method, "method", None)
    return (*getattr(method, "methods", ()), *(() if inner is None else (inner,)))


def _axis_names(method):
    """The axis names in `method` and what it is made of."""
    own = getattr(method, "axis_name", None)
    names = [name for part in _parts(method) for name in _axis_names(part)]
    return names if own is None else [own, *names]
