"""Named layers of papers that are a composition of methods."""

import dataclasses
from typing import Any

import jax

from normjax.core.structs import Features, Key
from normjax.methods.batch import BatchNorm
from normjax.methods.chain import Chain
from normjax.methods.spectral import SpectralBatchNorm


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
        shared = {f.name: own[f.name] for f in dataclasses.fields(BatchNorm)}
        shared["activation"] = None
        return Chain((BatchNorm(**shared), SpectralBatchNorm(**own)))
