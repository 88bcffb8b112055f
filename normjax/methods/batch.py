"""Batch normalization, of inputs too, leaving samples out, and batch renormalization."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import lax

from normjax.core import checks, groups, passes, running, sync
from normjax.core.sharding import place, spec
from normjax.core.structs import (
    AffineParams,
    Axes,
    AxisGroups,
    AxisName,
    Features,
    Key,
    Moments,
    Running,
    affine_params,
)
from normjax.core.tracing import traced_once


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchNorm:
    """Batch normalization: `(x - mean) / sqrt(var + epsilon) * scale + bias` over the batch.

    Ioffe & Szegedy, *Batch Normalization*, 2015, Algorithms 1 and 2,
    https://arxiv.org/abs/1502.03167

    Training takes mean and variance over all axes but `axis`; evaluation uses the running
    statistics. The variance is the population variance, in training and in the running average; the
    paper (Algorithm 2) and PyTorch store `n / (n - 1)` times it (`unbiased_running_var=True`). The
    output has the dtype of the input (integers: float32) unless `dtype` says otherwise; statistics
    and arithmetic are in at least float32.

    Attributes:
      axis: the feature axis, or several, with their own scale, bias and statistics.
      momentum: weight of the old running statistics, in [0, 1].
      epsilon: added to the variance, >= 0.
      dtype: dtype of the output; None: that of the input.
      param_dtype: dtype of scale and bias.
      use_bias: whether `init` makes a bias.
      use_scale: whether `init` makes a scale.
      bias_init: initializer of the bias, called with (key, features, param_dtype).
      scale_init: initializer of the scale, called with (key, features, param_dtype).
      axis_name: mapped axis name(s) whose devices share statistics in training.
      axis_index_groups: groups of device indices along `axis_name` that share statistics among
        themselves. Running statistics average the groups, so that they are the same on every
        device.
      activation: pointwise function of the result, taken inside, so that reverse mode keeps the
        input alone.
      running_average: "exponential" with `momentum`; "debiased", the same without the initial
        values' share; "cumulative", all batches alike. The last two add a leaf `count` to the
        state.
      unbiased_running_var: store the variance divided by n - 1 in the running statistics.
      skip_nonfinite: leave the state alone when the moments of a batch are not all finite.
      constant_statistics: hold mean and variance of the batch constant in the backward pass: the
        gradient of the input is then the cotangent times scale over deviation.

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
      >>> y.shape, state.mean.shape
      ((8, 4, 4, 3), (3,))
      >>> y, _ = method.apply(params, state, x, train=False)
    """

    axis: Axes = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Callable[..., Any] = jax.nn.initializers.zeros
    scale_init: Callable[..., Any] = jax.nn.initializers.ones
    axis_name: AxisName = None
    axis_index_groups: AxisGroups = None
    activation: Callable[[jax.Array], jax.Array] | None = None
    running_average: Literal["exponential", "debiased", "cumulative"] = "exponential"
    unbiased_running_var: bool = False
    skip_nonfinite: bool = False
    constant_statistics: bool = False

    def __post_init__(self):
        checks.configuration(self)

    def init(self, key: Key, features: Features) -> tuple[AffineParams, Running]:
        """Scale, bias (`param_dtype`), running mean 0 and variance 1 (float32), all [features]."""
        features = checks.features(type(self).__name__, features)
        return affine_params(self, key, features), running.init(features, counted=self._counted())

    @traced_once
    def apply(
        self,
        params: AffineParams,
        state: Running,
        x: jax.Array,
        *,
        train: bool,
        mask: jax.Array | None = None,
        key: Key = None,
    ) -> tuple[jax.Array, Running]:
        """Normalizes `x` with its own statistics (`train=True`) or the running ones.

        Args:
          params: scale and bias from `init`.
          state: running statistics; returned moved if `train`, else unchanged.
          x: real array with the features on `axis`; training needs another axis or `axis_name`.
          train: whether to use and record the statistics of `x`.
          mask: broadcasts to `x`; positions where it is False do not enter the statistics, and
            nothing of them, NaN included, reaches the output at other positions or any gradient.
          key: unused.

        Returns:
          The output, of the shape of `x`, and the state.
        """
        name = type(self).__name__
        x, mask = passes.inputs(name, x, mask)
        at = checks.axes(name, "axis", self.axis, x.shape)
        checks.match(name, "axis", at, x.shape, (*params, state.mean, state.var))
        checks.counted(name, state, self._counted())
        others = tuple(i for i in range(x.ndim) if i not in at)
        params = AffineParams(*(None if a is None else jnp.expand_dims(a, others) for a in params))
        mean, var = (jnp.expand_dims(a, others) for a in (state.mean, state.var))
        if not train:
            return self._evaluate(x, mask, Running(mean, var), params), state

        checks.need_positions(name, others, x.shape, self.axis_name)
        self._refuse_single_values(x)
        y, now, each = self._train(x, mask, Running(mean, var, state.count), params, key)
        update = running.update if each is None else running.update_groups
        return y, update(
            state,
            now if each is None else each,
            self.momentum,
            average=self.running_average,
            unbiased=self.unbiased_running_var,
            skip_nonfinite=self.skip_nonfinite,
        )

    def _refuse_single_values(self, x):
        sizes = [n for i, n in enumerate(x.shape) if i not in self._features(x)]
        instead = "give more samples or positions, or evaluate"
        name = type(self).__name__
        checks.several_values(name, sizes, x.shape, self.axis_name, instead)

    def _features(self, x):
        return checks.axes(type(self).__name__, "axis", self.axis, x.shape)

    def _evaluate(self, x, mask, state: Running, params: AffineParams):
        """The output for running statistics that broadcast to `x`."""
        del mask
        return passes.normalize(self, x, state.mean, state.var, params)

    def _train(self, x, mask, state: Running, params: AffineParams, key: Key):
        """Output, moments for the running statistics, and those of each group of devices if any."""
        del key
        at = self._features(x)
        now = passes.moments(x, tuple(i for i in range(x.ndim) if i not in at), mask=mask)
        each = None
        if self.axis_name is not None:
            now, each = sync.over_devices(now, self.axis_name, self.axis_index_groups)
        return self._normalize_batch(x, self._statistics(now), state, params), now, each

    def _statistics(self, moments):
        """Moments as the backward pass shall see them."""
        return lax.stop_gradient(moments) if self.constant_statistics else moments

    def _counted(self):
        return self.running_average != "exponential"

    def _normalize_batch(self, x, now: Moments, state: Running, params: AffineParams):
        del state
        return passes.normalize(self, x, now.mean, now.var, params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputNorm(BatchNorm):
    """Batch normalization of a network's input, in place of the moments of the data set.

    Davis & Frank, *Revisiting Batch Norm Initialization*, 2022, https://arxiv.org/abs/2110.13989,
    and its public implementation (osu-cvl/revisiting-bn-init): a `BatchNorm` of the channels of
    the images (in [0, 1] there) whose shift stays zero, so it has no bias, and whose scale starts
    at what `scale_init` gives times the standard deviation of ReLU(z), z standard normal. With the
    `scale_init` of the other norms the first layer sees inputs as large as those that later ones
    get from a norm and a ReLU. The deviation: the density of z is even, so the mean square of
    ReLU(z) is half that of z, 1/2; its mean is the integral of z exp(-z²/2) / sqrt(2 pi) over
    z > 0, 1 / sqrt(2 pi). Hence the variance 1/2 - 1 / (2 pi) and the deviation 0.5838. (The
    implementation rounds it to 0.58.)

    The scale is a norm's scale to `normjax.optim.batch_norm_init_recipe`, and learns as slowly.

    Attributes:
      axis, momentum, epsilon, use_scale: as in `BatchNorm`.
      scale_init: that of the other norms; see above.
      dtype, param_dtype, axis_name, axis_index_groups, activation: as in `BatchNorm`.
      running_average, unbiased_running_var, skip_nonfinite, constant_statistics: as in `BatchNorm`.

    Raises:
      ValueError: as in `BatchNorm`.
      TypeError: as in `BatchNorm`.

    Example:
      >>> import jax, normjax as nj
      >>> method = nj.InputNorm(scale_init=jax.nn.initializers.constant(0.1))
      >>> params, state = method.init(jax.random.key(0), 3)
      >>> images = jax.random.uniform(jax.random.key(1), (8, 4, 4, 3))
      >>> y, state = method.apply(params, state, images, train=True)
      >>> f"{params.scale[0]:.4f} {y.std():.4f}", params.bias
      ('0.0584 0.0584', None)
    """

    use_bias: ClassVar[bool] = False
    bias_init: ClassVar[Callable[..., Any]] = jax.nn.initializers.zeros

    def init(self, key: Key, features: Features) -> tuple[AffineParams, Running]:
        """Scale (`param_dtype`), running mean 0 and variance 1 (float32), all [features]."""
        params, state = super().init(key, features)
        return jax.tree.map(lambda scale: scale * _RELU_DEVIATION, params), state


_RELU_DEVIATION = math.sqrt(1 / 2 - 1 / (2 * math.pi))  # of the ReLU of a standard normal number


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
        clip = (lambda a: min(max(a, 0.0), 1.0)) if checks.is_number(share) else _clip
        return self.start + (self.stop - self.start) * clip(share)


def _clip(share):
    return jnp.clip(share, 0.0, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchRenorm(BatchNorm):
    """Batch renormalization: batch normalization corrected towards the running statistics.

    Ioffe, *Batch Renormalization*, 2017, Algorithm 1, https://arxiv.org/abs/1702.03275

    In training the normalized value becomes `(x - mean) / std * r + d` with `r = clip(std /
    running_std, 1 / r_max, r_max)` and `d = clip((mean - running_mean) / running_std, -d_max,
    d_max)`, both constant in the backward pass and taken before the running statistics move. `std`
    is `sqrt(var + epsilon)` throughout. The defaults are the paper's ramps (section 4.1: r_max 1
    until step 5000, 3 from step 40000; d_max 0 until step 5000, 5 from step 25000); `momentum`
    keeps the 0.99 of the paper.

    Attributes:
      r_max: bound of the scale correction, >= 1, or a schedule (a function of the number of
        updates, such as those of optax). A schedule adds the leaf `count` to the state.
      d_max: bound of the shift correction, >= 0, or a schedule.
      axis, momentum, epsilon, use_scale, use_bias: as in `BatchNorm`.
      scale_init, bias_init, dtype, param_dtype: as in `BatchNorm`.
      axis_name, axis_index_groups, activation: as in `BatchNorm`.
      running_average, unbiased_running_var, skip_nonfinite, constant_statistics: as in `BatchNorm`.

    Raises:
      ValueError: for a bound outside its range, and as in `BatchNorm`.

    Example:
      >>> import jax, normjax as nj
      >>> method = nj.BatchRenorm(r_max=3.0, d_max=5.0)
      >>> params, state = method.init(jax.random.key(0), 3)
      >>> x = jax.random.normal(jax.random.key(1), (8, 3))
      >>> y, state = method.apply(params, state, x, train=True)
      >>> y.shape
      (8, 3)
    """

    r_max: float | Callable[[Any], Any] = Ramp(1.0, 3.0, 5000, 40000)
    d_max: float | Callable[[Any], Any] = Ramp(0.0, 5.0, 5000, 25000)

    def __post_init__(self):
        super().__post_init__()
        for field, low in (("r_max", 1), ("d_max", 0)):
            value = getattr(self, field)
            if not callable(value) and not (checks.is_number(value) and value >= low):
                raise ValueError(
                    f"BatchRenorm: {field}={value!r} is neither a number >= {low} nor a schedule."
                )

    def _counted(self):
        return super()._counted() or callable(self.r_max) or callable(self.d_max)

    def _normalize_batch(self, x, now, state, params):
        dtype = now.mean.dtype
        r_max, d_max = (
            jnp.asarray(bound(state.count) if callable(bound) else bound, dtype)
            for bound in (self.r_max, self.d_max)
        )
        deviation = jnp.sqrt(now.var + self.epsilon)
        running_deviation = jnp.sqrt(state.var.astype(dtype) + self.epsilon)
        ratio = deviation / running_deviation
        shift = (now.mean - state.mean.astype(dtype)) / running_deviation
        r = lax.stop_gradient(jnp.clip(ratio, 1 / r_max, r_max))
        d = lax.stop_gradient(jnp.clip(shift, -d_max, d_max))
        scale, bias = (None if a is None else a.astype(dtype) for a in params)
        gain = passes.inverse_deviation(now.var, self.epsilon) * r
        gain, d = (gain, d) if scale is None else (gain * scale, d * scale)
        offset = d if bias is None else d + bias
        return passes.affine(
            x, now.mean, gain, offset, activation=self.activation, dtype=self.dtype
        )


@dataclasses.dataclass(frozen=True)
class ExclusiveBatchNorm(BatchNorm):
    """Batch normalization of every sample by the statistics of the others.

    Kosson, Fan & Jaggi, *Ghost Noise for Regularizing Deep Neural Networks*, 2024,
    https://arxiv.org/abs/2305.17205 (exclusive batch normalization, XBN).

    In training a sample's mean and variance are those of the other samples of its group of
    `ghost_batch_size` consecutive samples of the global batch, and gradients flow through them; the
    running statistics are those of the whole batch, and evaluation is that of `BatchNorm`. The
    public implementation (epfml/ghost-noise) subtracts squared means from mean squares; here a
    sample's share is taken off moments about the group's mean, which is exact at any offset. It
    also evaluates with epsilon 1e-5 whatever its argument; here epsilon is the same in both modes.
    The only valid sample of a group is normalized by its own statistics.

    Attributes:
      ghost_batch_size: samples per group, > 1; divides the batch. None: the whole batch. Under
        `axis_name` either whole groups lie on a device or whole devices share a group.
      axis, momentum, epsilon, use_scale, use_bias: as in `BatchNorm`; the samples lie on axis 0.
      scale_init, bias_init, dtype, param_dtype: as in `BatchNorm`.
      axis_name, activation: as in `BatchNorm`.
      axis_index_groups: must be None: `ghost_batch_size` makes the groups.
      running_average, unbiased_running_var, skip_nonfinite, constant_statistics: as in `BatchNorm`.

    Raises:
      ValueError: for groups of one sample, of two without positions, or that do not fit the batch
        and the devices, and as in `BatchNorm`.
      TypeError: in `apply`, for complex or boolean input.

    Example:
      >>> import jax, normjax as nj
      >>> method = nj.ExclusiveBatchNorm(4)
      >>> params, state = method.init(jax.random.key(0), 3)
      >>> x = jax.random.normal(jax.random.key(1), (8, 3))
      >>> y, state = method.apply(params, state, x, train=True)
      >>> y.shape
      (8, 3)
    """

    ghost_batch_size: int | None = None

    def __post_init__(self):
        super().__post_init__()
        checks.no_index_groups(self, "ghost_batch_size makes the groups")
        if self.ghost_batch_size == 1:
            raise ValueError(
                "ExclusiveBatchNorm: ghost_batch_size=1: without a sample's own nothing is left to "
                "take statistics over."
            )

    def _train(self, x, mask, state, params, key):
        del state, key
        name, at = type(self).__name__, self._features(x)
        positions = checks.samples_first(name, at, x.shape)
        devices = 1 if self.axis_name is None else lax.axis_size(self.axis_name)
        here, shared = groups.ghosts(name, self.ghost_batch_size, x.shape, devices)
        size = x.shape[0] // here * (len(shared[0]) if shared else 1)
        if size and size < (2 if positions else 3):
            raise ValueError(
                f"{name}: ghost_batch_size={self.ghost_batch_size} and an input of shape {x.shape} "
                f"leave statistics over {size - 1} values; one more sample or positions are needed."
            )
        own = passes.moments(x, positions, mask=mask)
        own = own._replace(count=place(own.count, spec(own.mean), like=own.mean))
        parts = Moments(*(groups.split(a, 0, here) for a in own))
        group = sync.merge(parts, 1)
        if shared is None:
            now = sync.merge(group, 0)
            if self.axis_name is not None:
                now, _ = sync.over_devices(now, self.axis_name)
        else:
            group, every = sync.over_devices(
                Moments(*(a[0] for a in group)), self.axis_name, shared
            )
            now = group if every is None else sync.merge(every, 0)
            group = Moments(*(a[None] for a in group))
        rest = _leave_one_out(parts, Moments(*(a[:, None] for a in group)))
        rest = Moments(*(groups.join(a, 0, like=own.mean) for a in rest))
        rest = self._statistics(rest)
        return passes.normalize(self, x, rest.mean, rest.var, params), now, None


def _leave_one_out(own: Moments, group: Moments) -> Moments:
    """Moments of `group` without each of its members `own`."""
    count = group.count - own.count
    share = own.count / jnp.maximum(count, 1)
    gap = own.mean - group.mean
    shift = share * gap
    square = group.var + share * (group.var - own.var - jnp.square(gap))
    var = jnp.maximum(square - jnp.square(shift), 0)
    alone = count == 0
    mean, var = jnp.where(alone, own.mean, group.mean - shift), jnp.where(alone, own.var, var)
    return Moments(count, mean, var)
