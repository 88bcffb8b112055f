"""Group normalization and instance normalization."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from normjax.core import checks, groups, passes, sync
from normjax.core.structs import (
    AffineParams,
    Axes,
    AxisGroups,
    AxisName,
    Features,
    Key,
    affine_params,
)
from normjax.core.tracing import traced_once


def _refuse_single_members(method, x):
    shape = jnp.shape(x)
    *positions, last = method._reduced(shape)
    sizes = *(shape[i] for i in positions), shape[last] // method._groups(shape[last])
    instead = "take fewer groups, or larger maps"
    checks.several_values("GroupNorm", sizes, shape, method.axis_name, instead)


def _refuse_single_positions(method, x):
    shape = jnp.shape(x)
    at = checks.axes("InstanceNorm", "feature_axes", method.feature_axes, shape)
    sizes = [n for i, n in enumerate(shape) if i not in (0, *at)]
    instead = "take GroupNorm, or larger maps"
    checks.several_values("InstanceNorm", sizes, shape, method.axis_name, instead)


@dataclasses.dataclass(frozen=True)
class GroupNorm:
    """Group normalization: statistics of each sample over a group of channels and all positions.

    Wu & He, *Group Normalization*, 2018, equations 1-2 and 7, https://arxiv.org/abs/1803.08494

    Channels lie on the last axis; groups are consecutive channels. No state. The output has the
    dtype of the input (integers: float32) unless `dtype` says otherwise.

    Attributes:
      num_groups: into how many groups to divide the channels; None to give `group_size` instead.
      group_size: channels per group; needs `num_groups=None`.
      epsilon: added to the variance, >= 0 (the paper and PyTorch: 1e-5; Flax: 1e-6).
      dtype: dtype of the output; None: that of the input.
      param_dtype: dtype of scale and bias.
      use_bias: whether `init` makes a bias per channel.
      use_scale: whether `init` makes a scale per channel.
      bias_init: initializer of the bias, called with (key, features, param_dtype).
      scale_init: initializer of the scale, called with (key, features, param_dtype).
      reduction_axes: axes over which statistics are taken, the last among them; None: all but the
        first.
      axis_name: mapped axis name(s) over which positions are divided.
      axis_index_groups: groups of device indices along `axis_name` that share statistics among
        themselves.
      activation: pointwise function of the result, taken inside, so that reverse mode keeps the
        input alone.

    Raises:
      ValueError: for a field outside its range; in `apply`, for groups that do not divide the
        channels, and for axes or features that do not fit the input.
      TypeError: in `apply`, for complex or boolean input.

    Example:
      >>> import jax, normjax as nj
      >>> method = nj.GroupNorm(num_groups=4)
      >>> params, state = method.init(jax.random.key(0), 16)
      >>> y, _ = method.apply(params, state, jax.numpy.ones((2, 8, 8, 16)), train=True)
      >>> y.shape
      (2, 8, 8, 16)
    """

    depends_on_train: ClassVar[bool] = False

    num_groups: int | None = 32
    group_size: int | None = None
    _: dataclasses.KW_ONLY
    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Callable[..., Any] = jax.nn.initializers.zeros
    scale_init: Callable[..., Any] = jax.nn.initializers.ones
    reduction_axes: Axes | None = None
    axis_name: AxisName = None
    axis_index_groups: AxisGroups = None
    activation: Callable[[jax.Array], jax.Array] | None = None

    def __post_init__(self):
        checks.configuration(self)
        if (self.num_groups is None) == (self.group_size is None):
            raise ValueError(
                f"GroupNorm: num_groups={self.num_groups} and group_size={self.group_size}: "
                "give exactly one (group_size needs num_groups=None)."
            )

    def init(self, key: Key, features: Features) -> tuple[AffineParams, tuple[()]]:
        """Scale and bias (`param_dtype`) of shape [channels], which the groups divide; no state."""
        shape = checks.features("GroupNorm", features)
        if len(shape) != 1:
            raise ValueError(f"GroupNorm: features={features!r}, but channels lie on one axis.")
        self._groups(shape[0])
        return affine_params(self, key, shape), ()

    @traced_once(in_training=_refuse_single_members)
    def apply(
        self,
        params: AffineParams,
        state: tuple[()],
        x: jax.Array,
        *,
        train: bool,
        mask: jax.Array | None = None,
        key: Key = None,
    ) -> tuple[jax.Array, tuple[()]]:
        """Normalizes `x`; `train` and `key` change nothing. See `BatchNorm.apply` for `mask`."""
        del train, key
        x, mask = passes.inputs("GroupNorm", x, mask)
        last = x.ndim - 1
        reduced = self._reduced(x.shape)
        if last not in reduced:
            raise ValueError(
                f"GroupNorm: reduction_axes={self.reduction_axes} must include the last axis of "
                f"an input of shape {x.shape}: it holds the channels."
            )
        checks.match("GroupNorm", "axis", (last,), x.shape, params)
        number = self._groups(x.shape[last])
        if len(reduced) > 1:
            now = passes.moments(x, reduced[:-1], mask=mask, channel_groups=number)
            now = self._over_devices(now)
            return passes.normalize(self, x, now.mean, now.var, _lift(params, x.ndim)), state

        parts = jax.tree.map(lambda a: groups.split(a, last, number), x)
        if mask is not None:
            mask = mask[..., None] if mask.shape[last] == 1 else groups.split(mask, last, number)
        now = self._over_devices(passes.moments(parts, (last + 1,), mask=mask))
        params = AffineParams(*(None if a is None else groups.split(a, 0, number) for a in params))
        y = passes.normalize(self, parts, now.mean, now.var, _lift(params, parts.ndim))
        return groups.join(y, last, like=passes.value(x)), state

    def _reduced(self, shape):
        reduced = self.reduction_axes
        if reduced is None:
            reduced = tuple(range(1, len(shape))) if len(shape) > 1 else (0,)
        return checks.axes("GroupNorm", "reduction_axes", reduced, shape)

    def _over_devices(self, now):
        if self.axis_name is None:
            return now
        return sync.over_devices(now, self.axis_name, self.axis_index_groups)[0]

    def _groups(self, channels):
        name = "group_size" if self.num_groups is None else "num_groups"
        divisor = getattr(self, name)
        if channels % divisor:
            raise ValueError(f"GroupNorm: {name}={divisor} does not divide {channels} channels.")
        return divisor if name == "num_groups" else channels // divisor


def _lift(params, rank):
    """Parameters with leading axes of size one, up to `rank` axes."""
    return AffineParams(
        *(None if a is None else jnp.expand_dims(a, tuple(range(rank - a.ndim))) for a in params)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstanceNorm:
    """Instance normalization: statistics of each sample and feature over all positions.

    Ulyanov, Vedaldi & Lempitsky, *Instance Normalization*, 2016, equation 3,
    https://arxiv.org/abs/1607.08022

    Axis 0 is the batch. No state: the tracked form of PyTorch is `Ghost(BatchNorm(...),
    groups=batch_size)`. The output has the dtype of the input (integers: float32) unless `dtype`
    says otherwise.

    Attributes:
      epsilon: added to the variance, >= 0 (the paper and PyTorch: 1e-5; Flax: 1e-6).
      dtype: dtype of the output; None: that of the input.
      param_dtype: dtype of scale and bias.
      use_bias: whether `init` makes a bias.
      use_scale: whether `init` makes a scale.
      bias_init: initializer of the bias, called with (key, features, param_dtype).
      scale_init: initializer of the scale, called with (key, features, param_dtype).
      feature_axes: axes with statistics, scale and bias of their own.
      axis_name: mapped axis name(s) over which positions are divided.
      axis_index_groups: groups of device indices along `axis_name` that share statistics among
        themselves.
      activation: pointwise function of the result, taken inside, so that reverse mode keeps the
        input alone.

    Raises:
      ValueError: for a field outside its range; in `apply`, for an input without positions, and for
        axes or features that do not fit the input.
      TypeError: in `apply`, for complex or boolean input.

    Example:
      >>> import jax, normjax as nj
      >>> method = nj.InstanceNorm()
      >>> params, state = method.init(jax.random.key(0), 3)
      >>> y, _ = method.apply(params, state, jax.numpy.ones((2, 8, 8, 3)), train=True)
      >>> y.shape
      (2, 8, 8, 3)
    """

    depends_on_train: ClassVar[bool] = False

    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Callable[..., Any] = jax.nn.initializers.zeros
    scale_init: Callable[..., Any] = jax.nn.initializers.ones
    feature_axes: Axes = -1
    axis_name: AxisName = None
    axis_index_groups: AxisGroups = None
    activation: Callable[[jax.Array], jax.Array] | None = None

    def __post_init__(self):
        checks.configuration(self)

    def init(self, key: Key, features: Features) -> tuple[AffineParams, tuple[()]]:
        """Scale and bias (`param_dtype`) of the shape of the feature axes; no state."""
        return affine_params(self, key, checks.features("InstanceNorm", features)), ()

    @traced_once(in_training=_refuse_single_positions)
    def apply(
        self,
        params: AffineParams,
        state: tuple[()],
        x: jax.Array,
        *,
        train: bool,
        mask: jax.Array | None = None,
        key: Key = None,
    ) -> tuple[jax.Array, tuple[()]]:
        """Normalizes `x`; `train` and `key` change nothing. See `BatchNorm.apply` for `mask`."""
        del train, key
        x, mask = passes.inputs("InstanceNorm", x, mask)
        at = checks.axes("InstanceNorm", "feature_axes", self.feature_axes, x.shape)
        if 0 in at:
            raise ValueError(
                f"InstanceNorm: feature_axes={self.feature_axes} names axis 0 of an input of shape "
                f"{x.shape}, but axis 0 is the batch."
            )
        checks.match("InstanceNorm", "feature_axes", at, x.shape, params)
        others = tuple(i for i in range(x.ndim) if i not in at)
        checks.need_positions("InstanceNorm", others[1:], x.shape, self.axis_name)
        now = passes.moments(x, others[1:], mask=mask)
        if self.axis_name is not None:
            now, _ = sync.over_devices(now, self.axis_name, self.axis_index_groups)
        params = AffineParams(*(None if a is None else jnp.expand_dims(a, others) for a in params))
        return passes.normalize(self, x, now.mean, now.var, params), state
