"""The affine map of normalizations on its own."""

import dataclasses
from typing import Any, ClassVar

from normjax.core import seam
from normjax.core.fields import ActivationFields, AffineFields, AxisFields
from normjax.core.method import Normalizer, Traits
from normjax.core.structs import AffineParams, Mask
from normjax.methods import layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Affine(ActivationFields, AffineFields, AxisFields):
    """The learned affine map of normalizations on its own: `x * scale + bias`.

    Ioffe & Szegedy, *Batch Normalization*, 2015, Algorithm 1, last line,
    https://arxiv.org/abs/1502.03167

    For chains that put something between a normalization and its affine map.

    Attributes:
      axis, dtype, param_dtype, use_scale, use_bias, scale_init, bias_init, activation: as in
        `BatchNorm`.

    Raises:
      ValueError, TypeError: as in `BatchNorm`.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> method = nj.chain(nj.LayerNorm(use_scale=False, use_bias=False), nj.Affine())
      >>> y, _ = method.apply(*method.init(None, 4), jnp.ones((2, 4)), train=True)
    """

    traits: ClassVar[Traits] = Traits(trains=False)

    init, apply = layer.init, seam.apply

    def evaluation(
        self, params: AffineParams, state: tuple[()], x: Any = None, mask: Mask = None
    ) -> Normalizer:
        """Scale and bias; `x` changes nothing, and masked positions are taken as zero."""
        return Normalizer(scale=params.scale, bias=params.bias)
