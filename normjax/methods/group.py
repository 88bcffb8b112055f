"""Group normalization and instance normalization."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from normjax.core import checks, groups, passes, seam
from normjax.core.checks import field
from normjax.core.fields import COUNT, AffineFields, SegmentFields, StatisticsFields
from normjax.core.method import Traits
from normjax.core.statistics import Moments
from normjax.core.structs import AffineParams, Axes, Features, Key, Mask, affine_params
from normjax.core.tracing import traced_once
from normjax.methods import layer


@dataclasses.dataclass(frozen=True)
class GroupNorm(StatisticsFields, AffineFields, SegmentFields):
    """Group normalization: statistics of each sample over a group of channels and all positions.

    Wu & He, *Group Normalization*, 2018, equations 1-2 and 7, https://arxiv.org/abs/1803.08494

    Channels lie on the last axis; groups are consecutive channels. No state. The output has the
    dtype of the input (integers: float32) unless `dtype` says otherwise.

    Attributes:
      num_groups: into how many groups to divide the channels; None to give `group_size` instead.
      group_size: channels per group; needs `num_groups=None`.
      epsilon: added to the variance, >= 0 (the paper and PyTorch: 1e-5; Flax: 1e-6).
      dtype, param_dtype, use_scale, use_bias, scale_init, bias_init: as in `LayerNorm`; scale and
        bias are those of each channel.
      reduction_axes: axes over which statistics are taken, the last among them; None: all but the
        first.
      num_segments: as in `LayerNorm`; an axis of positions must be reduced.
      axis_name: mapped axis name(s) over which positions are divided.
      axis_index_groups, activation: as in `LayerNorm`.

    Raises:
      ValueError, TypeError: as in `BatchNorm`, and for groups that do not divide the channels.

    Example:
      >>> import jax, normjax as nj
      >>> method, x = nj.GroupNorm(num_groups=4), jax.numpy.ones((2, 8, 8, 16))
      >>> method.apply(*method.init(None, 16), x, train=True)[0].shape
      (2, 8, 8, 16)
    """

    traits: ClassVar[Traits] = Traits(trains=False, inputs=layer.SAMPLES)

    num_groups: int | None = field(32, COUNT)
    group_size: int | None = field(None, COUNT)
    _: dataclasses.KW_ONLY
    reduction_axes: Axes | None = field(None, checks.optional(checks.integers))

    coefficients = layer.coefficients
    evaluation, absorb = layer.evaluation, layer.absorb

    def __post_init__(self):
        super().__post_init__()
        if (self.num_groups is None) == (self.group_size is None):
            given = f"num_groups={self.num_groups} and group_size={self.group_size}"
            raise ValueError(f"GroupNorm: {given}: give one, and None for the other.")

    def init(self, key: Key, features: Features) -> tuple[AffineParams, tuple[()]]:
        """Scale and bias (`param_dtype`) of shape [channels], which the groups divide; no state."""
        shape = checks.as_features("GroupNorm", features)
        if len(shape) != 1:
            raise ValueError(f"GroupNorm: features={features!r}, but channels lie on one axis.")
        self._groups(shape[0])
        return affine_params(self, key, shape), ()

    def check_training(self, x: Any) -> None:
        """ValueError for statistics of single values."""
        shape = jnp.shape(x)
        *positions, last = self._reduced(shape)
        sizes = *(shape[i] for i in positions), shape[last] // self._groups(shape[last])
        checks.require_several_values(self, sizes, shape, "take fewer groups, or larger maps")

    def observe(
        self, x: Any, mask: Mask = None, weights: Any = None, segment_ids: Any = None
    ) -> Moments:
        """Moments of each group; every channel, on the last axis, has those of its group."""
        x, mask = passes.inputs(self, x, mask, weights, segment_ids)
        *positions, last = self._reduced(x.shape)
        number = self._groups(x.shape[last])
        return layer.reduce(self, x, tuple(positions), mask, channel_groups=number)

    @traced_once
    def apply(
        self,
        params: Any,
        state: Any,
        x: Any,
        *,
        train: bool,
        mask: Mask = None,
        weights: Any = None,
        segment_ids: Any = None,
        key: Key = None,
    ) -> tuple[jax.Array, Any]:
        """Normalizes `x`; `train` and `key` change nothing. See `BatchNorm.apply` for the rest."""
        x, mask = passes.inputs(self, x, mask, weights, segment_ids)
        seam.require_variables(self, params, state, x)
        if len(self._reduced(x.shape)) > 1:
            return seam.evaluate(self, params, state, x, mask), state
        # Statistics within a group of a row: those of the group's channels as an axis.
        last = x.ndim - 1
        number = self._groups(x.shape[last])
        parts = jax.tree.map(lambda a: groups.split(a, last, number), x)
        if mask is not None:
            mask = mask[..., None] if mask.shape[last] == 1 else groups.split(mask, last, number)
        small = jax.tree.map(lambda a: groups.split(a, 0, number), params)
        n = self.coefficients(small, state, layer.reduce(self, parts, (last + 1,), mask))
        y = passes.apply(parts, n, (last, last + 1), activation=self.activation, dtype=self.dtype)
        return groups.join(y, last, like=passes.value(x)), state

    def segment_axis(self, x: Any) -> int:
        """The axis of `x` along which the statistics of segments lie."""
        return checks.segment_axis(self, self._reduced(x.shape)[:-1], x.shape)

    def _reduced(self, shape):
        reduced, last = self.reduction_axes, len(shape) - 1
        if reduced is None:
            reduced = tuple(range(min(1, last), last + 1))
        reduced = checks.as_axes("GroupNorm", "reduction_axes", reduced, shape)
        if last not in reduced:
            given = f"reduction_axes={self.reduction_axes} and shape {shape}"
            raise ValueError(f"GroupNorm: {given}: the last axis, of channels, must be reduced.")
        return reduced

    def _groups(self, channels):
        name = "group_size" if self.num_groups is None else "num_groups"
        divisor = getattr(self, name)
        if channels % divisor:
            raise ValueError(f"GroupNorm: {name}={divisor} does not divide {channels} channels.")
        return divisor if name == "num_groups" else channels // divisor


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstanceNorm(StatisticsFields, AffineFields, SegmentFields):
    """Instance normalization: statistics of each sample and feature over all positions.

    Ulyanov, Vedaldi & Lempitsky, *Instance Normalization*, 2016, equation 3,
    https://arxiv.org/abs/1607.08022

    Axis 0 is the batch. No state: the tracked form of PyTorch is `Ghost(BatchNorm(...),
    groups=batch_size)`. The output has the dtype of the input (integers: float32) unless `dtype`
    says otherwise.

    Attributes:
      epsilon: added to the variance, >= 0 (the paper and PyTorch: 1e-5; Flax: 1e-6).
      dtype, param_dtype, use_scale, use_bias, scale_init, bias_init: as in `LayerNorm`.
      feature_axes: axes with statistics, scale and bias of their own.
      num_segments: as in `LayerNorm`.
      axis_name: mapped axis name(s) over which positions are divided.
      axis_index_groups, activation: as in `LayerNorm`.

    Raises:
      ValueError, TypeError: as in `BatchNorm`, and for an input without positions.

    Example:
      >>> import jax, normjax as nj
      >>> method, x = nj.InstanceNorm(), jax.numpy.ones((2, 8, 8, 3))
      >>> method.apply(*method.init(None, 3), x, train=True)[0].shape
      (2, 8, 8, 3)

      Two documents in a row of six tokens, the last of which is padding:

      >>> method, x = nj.InstanceNorm(num_segments=2), jax.numpy.arange(18.0).reshape(1, 6, 3)
      >>> ids = jax.numpy.array([0, 0, 0, 1, 1, -1]).reshape(1, 6, 1)
      >>> y, _ = method.apply(*method.init(None, 3), x, train=True, segment_ids=ids)
      >>> method.observe(x, segment_ids=ids).mean[0, :, 0].tolist()
      [3.0, 10.5]
    """

    traits: ClassVar[Traits] = Traits(trains=False, inputs=layer.SAMPLES)

    feature_axes: Axes = field(-1, checks.integers)

    init, coefficients = layer.init, layer.coefficients
    evaluation, absorb, apply = layer.evaluation, layer.absorb, seam.apply

    def check_training(self, x: Any) -> None:
        """ValueError for statistics of single values."""
        shape = jnp.shape(x)
        sizes = [shape[i] for i in self._positions(shape)]
        checks.require_several_values(self, sizes, shape, "take GroupNorm, or larger maps")

    def observe(
        self, x: Any, mask: Mask = None, weights: Any = None, segment_ids: Any = None
    ) -> Moments:
        """Moments over positions, which stay as axes of size one."""
        x, mask = passes.inputs(self, x, mask, weights, segment_ids)
        return layer.reduce(self, x, self._positions(x.shape), mask)

    def segment_axis(self, x: Any) -> int:
        """The axis of `x` along which the statistics of segments lie."""
        return checks.segment_axis(self, self._positions(x.shape), x.shape)

    def _positions(self, shape):
        at = checks.as_axes("InstanceNorm", "feature_axes", self.feature_axes, shape)
        if 0 in at:
            given = f"feature_axes={self.feature_axes} and shape {shape}"
            raise ValueError(f"InstanceNorm: {given}: axis 0 is the batch, not of features.")
        positions = tuple(i for i in range(1, len(shape)) if i not in at)
        checks.require_positions(self, positions, shape)
        return positions
