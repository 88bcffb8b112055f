"""Batch normalization, and batch renormalization."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import lax

from normjax.core import checks, passes, running, seam, statistics
from normjax.core.checks import field
from normjax.core.fields import RunningFields, Schedule, SegmentFields
from normjax.core.method import Normalizer, Traits, feature_positions
from normjax.core.segments import Segments
from normjax.core.statistics import Moments, Parted
from normjax.core.structs import (
    AffineParams,
    AxisGroups,
    Features,
    Key,
    Mask,
    Running,
    affine_params,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchFields(RunningFields):
    """The fields of methods that normalize by statistics of features."""

    constant_statistics: bool = field(False, checks.flag)

    def check_training(self, x: Any) -> None:
        """ValueError for an input whose statistics are of single values."""
        shape = jnp.shape(x)
        instead = "give more samples or positions, or evaluate; `absorb(state, observe(x))` records"
        sizes = [shape[i] for i in positions(self, shape)]
        checks.require_several_values(self, sizes, shape, instead)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GhostFields(BatchFields):
    """The fields of methods for which the samples of a ghost are the groups."""

    axis_index_groups: AxisGroups = field(None, checks.none, hint="Ghosts make the groups.")


def positions(method: BatchFields, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes that statistics are taken over; ValueError if there are none and no devices."""
    at = feature_positions(method, shape)
    others = tuple(i for i in range(len(shape)) if i not in at)
    checks.require_positions(method, others, shape)
    return others


def init(method: BatchFields, key: Key, features: Features) -> tuple[AffineParams, Running]:
    """Scale, bias (`param_dtype`), running mean 0 and variance 1 (float32), all [features]."""
    shape = checks.as_features(type(method).__name__, features)
    return affine_params(method, key, shape), running.init(method, shape)


def observe(
    method: BatchFields, x: Any, mask: Mask = None, weights: Any = None, segment_ids: Any = None
) -> Moments | Parted:
    """Moments of each feature over batch, positions and devices, [features].

    With `axis_index_groups` they are those of the group of this device, and `parts` has those of
    every group. With `segment_ids` `parts` has those of every segment, along the first axis that is
    reduced; other reduced axes stay as size one.
    """
    x, mask = passes.inputs(method, x, mask, weights, segment_ids)
    others = positions(method, x.shape)
    seen = passes.moments(x, others, mask=mask)
    if isinstance(mask, Segments):
        if method.axis_name is not None:
            seen = statistics.over_devices(seen, method.axis_name)[0]
        merged = (jnp.expand_dims(a, mask.axis) for a in statistics.merge(seen, mask.axis))
        count, mean, var = (jnp.squeeze(a, others) for a in merged)
        return Parted(count, mean, var, seen)
    seen = Moments(*(jnp.squeeze(a, others) for a in seen))
    if method.axis_name is None:
        return seen
    own, groups = statistics.over_devices(seen, method.axis_name, method.axis_index_groups)
    return own if groups is None else Parted(*own, groups)


def normalizer(method: Any, params: Any, mean: Any, var: Any) -> Normalizer:
    """Normalizes by a mean and a variance, with the scale and bias that are learned."""
    if method.constant_statistics:
        mean, var = lax.stop_gradient((mean, var))
    inverse = passes.inverse_deviation(var, method.epsilon)
    return Normalizer(mean, inverse, params.scale, params.bias)


def coefficients(
    method: BatchFields, params: Any, state: Running, seen: Any, *, key: Key = None
) -> Normalizer:
    """Normalizes by the statistics of the batch."""
    return normalizer(method, params, seen.mean, seen.var)


def evaluation(
    method: BatchFields, params: Any, state: Running, x: Any = None, mask: Mask = None
) -> Normalizer:
    """Normalizes by the running statistics; `x` and `mask` change nothing."""
    mean, var = (state.mean, state.var) if x is None else passes.as_wide(x, state.mean, state.var)
    return normalizer(method, params, mean, var)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchNorm(BatchFields, SegmentFields):
    """Batch normalization: `(x - mean) / sqrt(var + epsilon) * scale + bias` over the batch.

    Ioffe & Szegedy, *Batch Normalization*, 2015, Algorithms 1 and 2,
    https://arxiv.org/abs/1502.03167

    Training takes mean and variance over all axes but `axis`, evaluation the running statistics.
    The variance is the population variance; the paper (Algorithm 2) and PyTorch store `n / (n - 1)`
    times it in the running average (`unbiased_running_var=True`; of weights n is their sum, and
    the factor `max(n, 1) / max(n - 1, 1)`). The output has the dtype of the
    input (integers: float32) unless `dtype` says otherwise; statistics and arithmetic are in at
    least float32.

    Attributes:
      axis: the feature axis, or several, with their own scale, bias and statistics.
      momentum: weight of the old running statistics, in [0, 1]; or a schedule, a function of the
        number of updates, which adds a leaf `count` to the state.
      epsilon: added to the variance, >= 0.
      dtype: dtype of the output; None: that of the input.
      param_dtype: dtype of scale and bias.
      use_scale, use_bias: whether `init` makes a scale, and a bias.
      scale_init, bias_init: their initializers, called with (key, features, param_dtype).
      axis_name: mapped axis name(s) whose devices share statistics in training.
      axis_index_groups: groups of device indices along `axis_name` that share statistics among
        themselves. Running statistics average the groups, and are the same on every device.
      activation: pointwise function of the output; the backward pass then keeps only `x`.
      running_average: "exponential" with `momentum`; "debiased", the same without the initial
        values' share; "cumulative", all batches alike; "pooled", all values alike: the statistics
        of all that was seen, whatever the sizes of batches, rounded once. "debiased" and
        "cumulative" add a leaf `count` to the state, "pooled" a leaf `pool`.
      unbiased_running_var: store the variance divided by n - 1 in the running statistics.
      skip_nonfinite: leave the state alone when the moments of a batch are not all finite.
      num_segments: largest number of segments, for the input `segment_ids` of `apply`: training
        normalizes every position by the statistics of its segment, such as a document or a graph
        of the batch; the running statistics are of the whole batch.
      constant_statistics: hold mean and variance constant in the backward pass: the gradient of x
        is then the cotangent times scale over deviation.

    Raises:
      ValueError: for a field outside its range; in `apply`, for axes or features that do not fit
        the input.
      TypeError: in `apply`, for complex or boolean input.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> method = nj.BatchNorm(momentum=0.9)
      >>> params, state = method.init(jax.random.key(0), 3)
      >>> x = jax.random.normal(jax.random.key(1), (8, 4, 4, 3))
      >>> y, state = method.apply(params, state, x, train=True)
      >>> y, _ = method.apply(params, state, x, train=False)
    """

    traits: ClassVar[Traits] = Traits(inputs={"weights": "sample", "segment_ids": "sample"})

    init, observe, evaluation, apply = init, observe, evaluation, seam.apply

    def __post_init__(self):
        super().__post_init__()
        if self.num_segments is not None and self.axis_index_groups is not None:
            raise ValueError(
                f"{type(self).__name__}: num_segments={self.num_segments} with axis_index_groups: "
                "segments have statistics of all devices. Give an id to those of each group."
            )

    def segment_axis(self, x: Any) -> int:
        """The axis of `x` along which the statistics of segments lie."""
        return checks.segment_axis(self, positions(self, x.shape), x.shape)

    def coefficients(
        self, params: AffineParams, state: Running, seen: Any, *, key: Key = None
    ) -> Normalizer:
        """Normalizes by the statistics of the batch, or by those of each segment."""
        segments = self.num_segments is not None and isinstance(seen, Parted)
        return coefficients(self, params, state, seen.parts if segments else seen)

    def absorb(self, state: Running, seen: Moments | Parted) -> Running:
        """The running statistics moved by those of the batch, whatever its segments."""
        absorb = running.absorb if self.num_segments is None else running.absorb_whole
        return absorb(self, state, seen)


def relu_scale(scale_init: Callable[..., Any]) -> Callable[..., Any]:
    """`scale_init` times the deviation of the ReLU of a standard normal number, 0.5838.

    Davis & Frank, *Revisiting Batch Norm Initialization*, 2022, https://arxiv.org/abs/2110.13989,
    and its public implementation (osu-cvl/revisiting-bn-init, with 0.58) normalize images by a
    batch norm without bias in place of the moments of the data set, `BatchNorm(use_bias=False,
    scale_init=relu_scale(init))` with the `init` of the other norms. The first layer then sees
    inputs as large as those that later ones get from a norm and a ReLU. ReLU(z) has the mean square
    1/2, half that of z, and the mean 1 / sqrt(2 pi): its variance is 1/2 - 1 / (2 pi).

    Example:
      >>> import jax, normjax as nj
      >>> init = nj.relu_scale(jax.nn.initializers.constant(0.1))
      >>> params, _ = nj.BatchNorm(use_bias=False, scale_init=init).init(None, 3)
      >>> f"{params.scale[0]:.4f}", params.bias
      ('0.0584', None)
    """
    return lambda *shape: scale_init(*shape) * math.sqrt(1 / 2 - 1 / (2 * math.pi))


@dataclasses.dataclass(frozen=True)
class Ramp:
    """A schedule: `start` until step `begin`, then linear to `stop` at step `end`.

    The form of the clips in Ioffe, *Batch Renormalization*, 2017, section 4.1,
    https://arxiv.org/abs/1702.03275

    Example:
      >>> Ramp(1.0, 3.0, 5000, 40000)(22500)
      2.0
    """

    start: float
    stop: float
    begin: int
    end: int

    def __post_init__(self):
        if not self.begin < self.end:
            raise ValueError(f"Ramp: begin={self.begin} is not before end={self.end}.")

    def __call__(self, step):
        """The value at `step`, a number or an array of any shape."""
        share = (step - self.begin) / (self.end - self.begin)
        number = checks.is_number(share)
        share = min(max(share, 0.0), 1.0) if number else jnp.clip(share, 0.0, 1.0)
        return self.start + (self.stop - self.start) * share


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchRenorm(BatchFields):
    """Batch renormalization: batch normalization corrected towards the running statistics.

    Ioffe, *Batch Renormalization*, 2017, Algorithm 1, https://arxiv.org/abs/1702.03275

    In training the normalized value becomes `(x - mean) / std * r + d` with `r = clip(std /
    running_std, 1 / r_max, r_max)` and `d = clip((mean - running_mean) / running_std, -d_max,
    d_max)`, both constant in the backward pass and taken before the running statistics move. `std`
    is `sqrt(var + epsilon)` throughout. The defaults are the paper's ramps (section 4.1: r_max 1
    until step 5000, 3 from step 40000; d_max 0 until step 5000, 5 from step 25000) and momentum.

    Attributes:
      r_max: bound of the scale correction, >= 1, or a schedule (a function of the number of
        updates, such as those of optax). A schedule adds the leaf `count` to the state.
      d_max: bound of the shift correction, >= 0, or a schedule.
      axis, momentum, epsilon, use_scale, use_bias, scale_init, bias_init, dtype, param_dtype,
        axis_name, axis_index_groups, activation, running_average, unbiased_running_var,
        skip_nonfinite, constant_statistics: as in `BatchNorm`; there are no segments.

    Raises:
      ValueError: for a bound outside its range, and as in `BatchNorm`.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> method, x = nj.BatchRenorm(r_max=3.0, d_max=5.0), jnp.arange(12.0).reshape(4, 3)
      >>> y, state = method.apply(*method.init(None, 3), x, train=True)
    """

    traits: ClassVar[Traits] = Traits(inputs={"weights": "sample"})

    r_max: Schedule = field(Ramp(1.0, 3.0, 5000, 40000), checks.interval(1), schedule=True)
    d_max: Schedule = field(Ramp(0.0, 5.0, 5000, 25000), checks.interval(0), schedule=True)

    init, observe, evaluation = init, observe, evaluation
    absorb, apply = running.absorb, seam.apply

    def coefficients(
        self, params: AffineParams, state: Running, seen: Any, *, key: Key = None
    ) -> Normalizer:
        """Normalizes by the statistics of the batch, corrected by r and d."""
        plain, dtype = coefficients(self, params, state, seen), seen.mean.dtype
        r_max, d_max = (
            jnp.asarray(bound(state.count) if callable(bound) else bound, dtype)
            for bound in (self.r_max, self.d_max)
        )
        deviation = jnp.sqrt(seen.var + self.epsilon)
        running_deviation = jnp.sqrt(state.var.astype(dtype) + self.epsilon)
        shift = (seen.mean - state.mean.astype(dtype)) / running_deviation
        r = lax.stop_gradient(jnp.clip(deviation / running_deviation, 1 / r_max, r_max))
        d = lax.stop_gradient(jnp.clip(shift, -d_max, d_max))
        d = d if plain.scale is None else d * plain.scale.astype(dtype)
        bias = d if plain.bias is None else d + plain.bias.astype(dtype)
        inverse: Any = plain.inverse
        return plain._replace(inverse=inverse * r, bias=bias)
