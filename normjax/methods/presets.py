"""Named layers of papers that are a composition of methods."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import lax

from normjax.core import checks, groups, passes, sync
from normjax.core.structs import AffineParams, Features, Key, Moments, Running
from normjax.core.tracing import traced_once
from normjax.methods.batch import BatchNorm
from normjax.methods.chain import Chain
from normjax.methods.ghost import apply_to_parts
from normjax.methods.ghost_noise import Strength, check_drawing, check_ghosts, gathered, ghost_noise
from normjax.methods.spectral.method import SpectralBatchNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpatialSpectralBatchNorm(SpectralBatchNorm):
    """Batch normalization, then spectral: `chain(BatchNorm(...), SpectralBatchNorm(...))`.

    Cakaj, Mehnert & Yang, *Spectral Batch Normalization*, 2023, https://arxiv.org/abs/2306.16999:
    both layers of its public implementation (uladzislau-varabei/spectral-batch-norm), which have
    scale and bias, and the same epsilon and momentum. Parameters and state are those of the chain,
    under "BatchNorm_0" and "SpectralBatchNorm_1".

    Attributes:
      axis, momentum, epsilon, dtype, param_dtype: of both, as in `SpectralBatchNorm`.
      use_bias, use_scale, bias_init, scale_init: of both.
      axis_name, axis_index_groups: of both.
      running_average, unbiased_running_var, skip_nonfinite: of both; see `BatchNorm` for its own.
      activation: of the result.
      statistics, spectrum, fft_norm, spatial_axes, map_size, bands, route: of the second.

    Raises:
      ValueError: as `SpectralBatchNorm`.
      TypeError: as `SpectralBatchNorm`.

    Example:
      >>> import jax, normjax as nj
      >>> method = nj.SpatialSpectralBatchNorm()
      >>> params, state = method.init(jax.random.key(0), 3)
      >>> x = jax.random.normal(jax.random.key(1), (8, 4, 4, 3))
      >>> y, state = method.apply(params, state, x, train=True)
      >>> y.shape, sorted(state)
      ((8, 4, 4, 3), ['BatchNorm_0', 'SpectralBatchNorm_1'])
    """

    def init(self, key: Key, features: Features) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parameters and state of both under their names; see their `init`."""
        return self.chain.init(key, features)

    def apply(
        self,
        params: dict[str, Any],
        state: dict[str, Any],
        x: jax.Array,
        *,
        train: bool,
        mask: jax.Array | None = None,
        key: Key = None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Feeds the batch-normalized input to the spectral one; see `SpectralBatchNorm.apply`."""
        return self.chain.apply(params, state, x, train=train, mask=mask, key=key)

    @property
    def chain(self) -> Chain:
        """The two methods one after the other."""
        own: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        shared = {f.name: own[f.name] for f in dataclasses.fields(BatchNorm) if f.name in own}
        shared["activation"] = None
        return Chain((BatchNorm(**shared), SpectralBatchNorm(**own)))


@dataclasses.dataclass(frozen=True)
class GhostBatchNorm(BatchNorm):
    """Batch normalization of consecutive parts of the batch: `Ghost(BatchNorm(...), groups)`.

    Hoffer, Hubara & Soudry, *Train longer, generalize better*, 2017, Algorithm 1,
    https://arxiv.org/abs/1705.08741, in the form of Kosson, Fan & Jaggi, *Ghost Noise for
    Regularizing Deep Neural Networks*, 2024, https://arxiv.org/abs/2305.17205: `ghost_batch_size`
    samples of the global batch share statistics, and the running statistics move by the average of
    the parts.

    Attributes:
      ghost_batch_size: samples per part; divides the batch. None: the whole batch.
      axis, momentum, epsilon, use_scale, use_bias: as in `BatchNorm`; the samples lie on axis 0.
      scale_init, bias_init, dtype, param_dtype: as in `BatchNorm`.
      axis_name: mapped axis name(s) whose devices hold consecutive blocks of the global batch:
        either whole parts lie on a device or whole devices share a part.
      axis_index_groups: must be None: `ghost_batch_size` makes the groups.
      activation: as in `BatchNorm`.
      running_average, unbiased_running_var, skip_nonfinite, constant_statistics: as in `BatchNorm`.

    Raises:
      ValueError: for parts that do not fit the batch and the devices or are single values, and as
        in `BatchNorm`.
      TypeError: in `apply`, for complex or boolean input.

    Example:
      >>> import jax, normjax as nj
      >>> method = nj.GhostBatchNorm(8)
      >>> params, state = method.init(jax.random.key(0), 3)
      >>> x = jax.random.normal(jax.random.key(1), (32, 3))
      >>> y, state = method.apply(params, state, x, train=True)
      >>> y.shape
      (32, 3)
    """

    ghost_batch_size: int | None

    def __post_init__(self):
        super().__post_init__()
        checks.no_index_groups(self, "ghost_batch_size makes the groups")

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
        """Normalizes each part with its own statistics (`train=True`); see `BatchNorm.apply`."""
        name = type(self).__name__
        x = checks.real(name, x)
        mask = checks.mask(name, mask, x.shape)
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(BatchNorm)}
        method = BatchNorm(**own)
        if not train:
            return method.apply(params, state, x, train=False, mask=mask)
        at = checks.axes(name, "axis", self.axis, x.shape)
        positions = checks.samples_first(name, at, x.shape)
        devices = 1 if self.axis_name is None else lax.axis_size(self.axis_name)
        here, shared = groups.ghosts(name, self.ghost_batch_size, x.shape, devices)
        if self.ghost_batch_size == 1 and not positions:
            raise ValueError(
                f"{name}: ghost_batch_size=1 and an input of shape {x.shape} leave statistics over "
                "single values, whose variance is zero."
            )
        parts = len(shared) if shared else here * devices
        return apply_to_parts(method, parts, params, state, x, mask, key)


@dataclasses.dataclass(frozen=True)
class EvalNorm(GhostBatchNorm):
    """`GhostBatchNorm` whose evaluation mixes a sample's own statistics into the running ones.

    Kosson, Fan & Jaggi, *Ghost Noise for Regularizing Deep Neural Networks*, 2024,
    https://arxiv.org/abs/2305.17205, after Singh & Shrivastava, *EvalNorm*, 2019,
    https://arxiv.org/abs/1904.06031: in training a sample makes up one of the N that its statistics
    are taken over, and in evaluation it has the same share. With `a = own_weight` the mean is `(1 -
    a) * running mean + a * own mean` and the variance that of the mixture, `(1 - a) * running var +
    a * own var + a * (1 - a) * (own mean - running mean)^2`. The public implementation
    (epfml/ghost-noise) has `a = 1 / N^2`; 1 / N is the value for which the mean is that expected in
    training. Own statistics are over the valid positions; a sample without any has the running
    ones.

    Attributes:
      ghost_batch_size: samples per part in training, N; divides the batch.
      own_weight: "1/N", or "1/N^2" as in the public implementation.
      axis, momentum, epsilon, use_scale, use_bias: as in `BatchNorm`; the samples lie on axis 0.
      scale_init, bias_init, dtype, param_dtype: as in `BatchNorm`.
      axis_name, axis_index_groups, activation: as in `GhostBatchNorm`.
      running_average, unbiased_running_var, skip_nonfinite, constant_statistics: as in `BatchNorm`.

    Raises:
      ValueError: as `GhostBatchNorm`, and without `ghost_batch_size`.
      TypeError: in `apply`, for complex or boolean input.

    Example:
      >>> import jax, normjax as nj
      >>> method = nj.EvalNorm(8)
      >>> params, state = method.init(jax.random.key(0), 3)
      >>> x = jax.random.normal(jax.random.key(1), (5, 4, 4, 3))
      >>> y, _ = method.apply(params, state, x, train=False)
      >>> y.shape
      (5, 4, 4, 3)
    """

    own_weight: Literal["1/N", "1/N^2"] = dataclasses.field(default="1/N", kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if self.ghost_batch_size is None:
            raise ValueError(
                "EvalNorm: ghost_batch_size=None, but evaluation needs to know how many samples "
                "shared statistics in training."
            )

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
        """As `GhostBatchNorm` in training; in evaluation with the mixed statistics."""
        if train:
            return super().apply(params, state, x, train=True, mask=mask, key=key)
        return BatchNorm.apply(self, params, state, x, train=False, mask=mask)

    def _evaluate(self, x, mask, state, params):
        assert self.ghost_batch_size is not None
        name, at = type(self).__name__, self._features(x)
        positions = checks.samples_first(name, at, x.shape)
        own = passes.moments(x, positions, mask=mask)
        weight = 1 / self.ghost_batch_size ** (2 if self.own_weight == "1/N^2" else 1)
        weight = weight * (own.count > 0).astype(own.mean.dtype)
        mean, var = (a.astype(own.mean.dtype) for a in (state.mean, state.var))
        gap = own.mean - mean
        var = var + weight * (own.var - var) + weight * (1 - weight) * jnp.square(gap)
        return passes.normalize(self, x, mean + weight * gap, var, params)


@dataclasses.dataclass(frozen=True)
class GhostNoiseBatchNorm(BatchNorm):
    """Batch normalization with ghost noise, in one pass.

    Kosson, Fan & Jaggi, *Ghost Noise for Regularizing Deep Neural Networks*, 2024,
    https://arxiv.org/abs/2305.17205: what `chain(BatchNorm(use_scale=False, use_bias=False),
    GhostNoise(N), Affine())` computes, as one layer with the variables of `BatchNorm`. The moments
    of every sample give those of the batch, those of ghosts and, in closed form, those of the
    normalized batch, so that the noise costs no pass of its own. Evaluation is that of `BatchNorm`.

    Attributes:
      ghost_batch_size: samples per ghost, as in `GhostNoise`.
      noise_epsilon: added to both variances of the noise, those of ghosts and of the normalized
        batch: epsilon of `GhostNoise`.
      drawing, noise, independent_channels, effective_size: as in `GhostNoise`.
      strength, unbiased_scale: as in `GhostNoise`.
      axis, momentum, epsilon, use_scale, use_bias: as in `BatchNorm`; the samples lie on axis 0.
      scale_init, bias_init, dtype, param_dtype: as in `BatchNorm`.
      axis_name, activation: as in `BatchNorm`; ghosts are drawn from the batch of all devices, for
        which all need the same key.
      axis_index_groups: must be None.
      running_average, unbiased_running_var, skip_nonfinite, constant_statistics: as in `BatchNorm`.

    Raises:
      ValueError: as `BatchNorm` and `GhostNoise`.
      TypeError: in `apply`, for complex or boolean input.

    Example:
      >>> import jax, normjax as nj
      >>> method = nj.GhostNoiseBatchNorm(16)
      >>> params, state = method.init(jax.random.key(0), 3)
      >>> x = jax.random.normal(jax.random.key(1), (32, 5, 5, 3))
      >>> y, state = method.apply(params, state, x, train=True, key=jax.random.key(2))
      >>> y.shape
      (32, 5, 5, 3)
    """

    random: ClassVar[bool] = True

    ghost_batch_size: int | None = None
    _: dataclasses.KW_ONLY
    noise_epsilon: float = 1e-3
    drawing: Literal["replacement", "partition", "shuffle", "consecutive"] = "replacement"
    noise: Literal["both", "shift", "scale"] = "both"
    independent_channels: bool = False
    effective_size: float | None = None
    strength: Strength = 1.0
    unbiased_scale: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_drawing(self)
        checks.no_index_groups(self, "ghosts are drawn from the batch of all devices")

    def _counted(self):
        return super()._counted() or callable(self.strength)

    def _train(self, x, mask, state, params, key):
        name, at = type(self).__name__, self._features(x)
        positions = checks.samples_first(name, at, x.shape)
        check_ghosts(self, positions, x.shape)
        own = passes.moments(x, positions, mask=mask)
        every, first = gathered(own, self.axis_name)
        now = self._statistics(Moments(*(a[None] for a in sync.merge(every))))
        inverse = passes.inverse_deviation(now.var, self.epsilon)

        def normalized(part):
            return Moments(
                part.count, (part.mean - now.mean) * inverse, part.var * jnp.square(inverse)
            )

        both = normalized(every), normalized(now)
        draw = ghost_noise(
            self, self.noise_epsilon, *both, key, state.count, masked=mask is not None
        )
        shift, divisor = draw(first, own.mean)
        scale, bias = (None if a is None else a.astype(shift.dtype) for a in params)
        slope = 1 / divisor if scale is None else scale / divisor
        offset = -shift * slope if bias is None else bias - shift * slope
        gain = inverse * slope
        y = passes.affine(x, now.mean, gain, offset, activation=self.activation, dtype=self.dtype)
        return y, now, None
