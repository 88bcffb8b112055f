"""Instance normalization whose scale and bias are the statistics of other features, of a style."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from normjax.core import checks, passes, seam
from normjax.core.checks import field
from normjax.core.fields import AffineFields, AxisFields, StatisticsFields
from normjax.core.method import Normalizer, Traits, feature_positions
from normjax.core.statistics import Moments
from normjax.core.structs import AffineParams, Mask
from normjax.methods import layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class StyleFields(StatisticsFields, AffineFields, AxisFields):
    """The fields of norms by a style, and their functions."""

    traits: ClassVar[Traits] = Traits(trains=False, inputs={"style": "sample"})

    epsilon: float = field(1e-5, checks.interval(0))
    unbiased_var: bool = field(True, checks.flag)

    init, absorb, apply = layer.init, layer.absorb, seam.apply

    def check_training(self, x: Any) -> None:
        """ValueError for statistics of single values."""
        shape = jnp.shape(x)
        sizes = [shape[i] for i in checks.position_axes(self, shape)]
        checks.require_several_values(self, sizes, shape, "give larger maps")

    def observe(self, x: Any, mask: Mask = None) -> Moments:
        """Moments of each sample and feature over positions, which stay as axes of size one."""
        x, mask = passes.inputs(self, x, mask)
        positions = checks.position_axes(self, x.shape)
        checks.require_positions(self, positions, x.shape)
        return layer.reduce(self, x, positions, mask)

    def evaluation(
        self,
        params: AffineParams,
        state: tuple[()],
        x: Any = None,
        mask: Mask = None,
        *,
        style: Any = None,
    ) -> Normalizer:
        """Normalizes `x` by its statistics and gives it those of `style`; it cannot be folded."""
        if x is None or style is None:
            name, given = type(self).__name__, "style" if style is None else "x"
            raise ValueError(f"{name}: {given}=None, but statistics of x and style are needed.")
        content = self.observe(x, mask)
        style = self._style(style, x, mask)
        at, rank = feature_positions(self, x.shape), len(x.shape)
        scale = jnp.sqrt(self._var(style) + self.epsilon).astype(content.mean.dtype)
        own, shift = (None if a is None else passes.lift(a, at, rank) for a in params)
        own = scale if own is None else own.astype(scale.dtype) * scale
        bias = style.mean.astype(scale.dtype)
        bias = bias if shift is None else shift.astype(scale.dtype) * scale + bias
        inverse = passes.inverse_deviation(self._var(content), self.epsilon)
        return Normalizer(content.mean, inverse, own, bias)

    def _style(self, style, x, mask):
        """Moments of the style; zeros for a sample of which nothing is valid."""
        name = type(self).__name__
        style = checks.as_real(f"{name}, style", style)
        alike = [0, *feature_positions(self, x.shape)]
        wanted = [n if i in alike else "any" for i, n in enumerate(x.shape)]
        if style.ndim != len(x.shape) or any(style.shape[i] != x.shape[i] for i in alike):
            given = f"a style of shape {style.shape} for an input of shape {x.shape}"
            raise ValueError(f"{name}: {given}: it must have the shape {wanted}.")
        if mask is not None:
            mask = jnp.any(mask, tuple(range(1, mask.ndim)), keepdims=True)
        return self.observe(style, mask)

    def _var(self, seen):
        if not self.unbiased_var:
            return seen.var
        return seen.var * (seen.count / jnp.maximum(seen.count - 1, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveInstanceNorm(StyleFields):
    """Gives the features of a content the mean and the deviation of those of a style.

    Huang & Belongie, *Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization*,
    2017, equation 8, https://arxiv.org/abs/1703.06868, with the details of the public
    implementation of Gong et al., 2022 (VITA-Group/Sandwich-Batch-Normalization).

    `(x - mean(x)) / std(x) * std(style) + mean(style)` for each sample and feature, with `std` the
    root of the unbiased variance plus `epsilon`. The input `style` has the samples and features of
    `x`, and positions of its own. No state; gradients flow to the style too. The style of a sample
    of which the mask leaves nothing does not count; its own positions cannot be masked.

    Attributes:
      axis: the feature axis, or several; axis 0 is the batch.
      epsilon: added to both variances, >= 0.
      unbiased_var: whether variances are divided by n - 1, as in both implementations, or by n.
      use_scale, use_bias: whether there is an affine map that all styles share between the two;
        there is none by default.
      scale_init, bias_init: its initializers.
      dtype, param_dtype, activation: as in `BatchNorm`.
      axis_name: mapped axis name(s) over which positions, of both, are divided.
      axis_index_groups: as in `LayerNorm`.

    Raises:
      ValueError: for a style that does not fit, and as in `InstanceNorm`.
      TypeError: for input that is not of real numbers.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> method = nj.AdaptiveInstanceNorm()
      >>> content, style = jnp.ones((2, 8, 8, 3)), jnp.ones((2, 5, 7, 3))
      >>> y, _ = method.apply(*method.init(None, 3), content, train=True, style=style)
    """

    use_scale: bool = field(False, checks.flag)
    use_bias: bool = field(False, checks.flag)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SandwichAdaptiveInstanceNorm(StyleFields):
    """Adaptive instance normalization with an affine map that all styles share in between.

    Gong et al., *Sandwich Batch Normalization*, 2022, section 4.4,
    https://arxiv.org/abs/2102.11382, as in the public implementation
    (VITA-Group/Sandwich-Batch-Normalization): `std(style) (scale n(x) + bias) + mean(style)`.

    Attributes:
      use_scale, use_bias, scale_init, bias_init: of the shared affine map, as in `BatchNorm`.
      axis, epsilon, unbiased_var, dtype, param_dtype, activation, axis_name, axis_index_groups: as
        in `AdaptiveInstanceNorm`.

    Raises:
      ValueError, TypeError: as in `AdaptiveInstanceNorm`.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> method = nj.SandwichAdaptiveInstanceNorm()
      >>> content, style = jnp.ones((2, 8, 8, 3)), jnp.ones((2, 5, 7, 3))
      >>> y, _ = method.apply(*method.init(None, 3), content, train=True, style=style)
    """
