"""Layer normalization and root-mean-square normalization."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from normjax.core import checks, passes, seam, statistics
from normjax.core.fields import AffineFields, ReductionFields, ScaleFields
from normjax.core.method import Normalizer, Traits
from normjax.core.statistics import Moments
from normjax.core.structs import AffineParams, Features, Key, Mask, affine_params


def init(method: ScaleFields, key: Key, features: Features) -> tuple[AffineParams, tuple[()]]:
    """What is learned (`param_dtype`) of the shape of the feature axes; no state."""
    return affine_params(method, key, checks.as_features(type(method).__name__, features)), ()


def reduce(method: Any, x: Any, axes: Any, mask: Any, **options: Any) -> Moments:
    """Moments of `x` over `axes`, which stay as size one, and over devices."""
    seen = passes.moments(x, axes, mask=mask, **options)
    if method.axis_name is None:
        return seen
    return statistics.over_devices(seen, method.axis_name, method.axis_index_groups)[0]


def reduction_axes(method: ReductionFields, x: Any) -> tuple[int, ...]:
    """The axes of `x` over which statistics are taken."""
    name, shape = type(method).__name__, jnp.shape(x)
    return checks.as_axes(name, "reduction_axes", method.reduction_axes, shape)


def coefficients(
    method: Any, params: AffineParams, state: tuple[()], seen: Moments, *, key: Key = None
) -> Normalizer:
    """Normalizes by mean and variance."""
    inverse = passes.inverse_deviation(seen.var, method.epsilon)
    return Normalizer(seen.mean, inverse, params.scale, params.bias)


def evaluation(
    method: Any, params: AffineParams, state: tuple[()], x: Any = None, mask: Mask = None
) -> Normalizer:
    """Normalizes `x` by statistics of its own; it cannot be folded into a layer before it."""
    if x is None:
        name = type(method).__name__
        raise ValueError(f"{name}: x=None, but evaluation takes statistics of x: it cannot fold.")
    return method.coefficients(params, state, method.observe(x, mask))


def absorb(method: Any, state: tuple[()], seen: Moments) -> tuple[()]:
    """There is no state."""
    return state


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerNorm(ReductionFields, AffineFields):
    """Layer normalization: `(x - mean) / sqrt(var + epsilon) * scale + bias` within each sample.

    Ba, Kiros & Hinton, *Layer Normalization*, 2016, section 3, https://arxiv.org/abs/1607.06450

    As in Flax, statistics are over the last axis by default, so that every position has its own;
    the paper's convolutional form is `reduction_axes=(1, 2, 3)`. No state. The output has the dtype
    of the input (integers: float32) unless `dtype` says otherwise.

    Attributes:
      epsilon, dtype, param_dtype, use_scale, use_bias, scale_init, bias_init, activation: as in
        `BatchNorm`.
      reduction_axes: axes over which statistics are taken.
      feature_axes: axes with their own scale and bias.
      axis_name: mapped axis name(s) over which the reduced axes are divided.
      axis_index_groups: groups of device indices along `axis_name` that share statistics.

    Raises:
      ValueError, TypeError: as in `BatchNorm`.

    Example:
      >>> import jax, normjax as nj
      >>> method = nj.LayerNorm()
      >>> y, _ = method.apply(*method.init(None, 16), jax.numpy.ones((2, 5, 16)), train=True)
    """

    traits: ClassVar[Traits] = Traits(trains=False)

    init, coefficients = init, coefficients
    evaluation, absorb, apply = evaluation, absorb, seam.apply

    def check_training(self, x: Any) -> None:
        """ValueError for statistics of single values."""
        shape = jnp.shape(x)
        instead = "take statistics over more axes (reduction_axes), or normalize another axis"
        sizes = [shape[i] for i in reduction_axes(self, x)]
        checks.require_several_values(self, sizes, shape, instead)

    def observe(self, x: Any, mask: Mask = None) -> Moments:
        """Moments over the reduced axes, which stay as size one."""
        x, mask = passes.inputs(self, x, mask)
        return reduce(self, x, reduction_axes(self, x), mask)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RMSNorm(ReductionFields, ScaleFields):
    """Root-mean-square normalization: `x / sqrt(mean(x**2) + epsilon) * scale`.

    Zhang & Sennrich, *Root Mean Square Layer Normalization*, 2019, equation 4,
    https://arxiv.org/abs/1910.07467

    The paper has no epsilon. Computed in at least float32 and rounded once to the dtype of the
    input (integers: float32) or to `dtype`. No state.

    Attributes:
      epsilon: added to the mean square, >= 0.
      use_scale, scale_init, dtype, param_dtype: as in `LayerNorm`; there is no bias.
      reduction_axes: axes over which squares are averaged.
      feature_axes, axis_name, axis_index_groups, activation: as in `LayerNorm`.

    Raises:
      ValueError, TypeError: as in `LayerNorm`.

    Example:
      >>> import jax, normjax as nj
      >>> method = nj.RMSNorm()
      >>> y, _ = method.apply(*method.init(None, 4), jax.numpy.full((2, 4), 3.0), train=True)
      >>> print(y[0].round(3))
      [1. 1. 1. 1.]
    """

    traits: ClassVar[Traits] = Traits(trains=False)

    init, evaluation, absorb, apply = init, evaluation, absorb, seam.apply

    def observe(self, x: Any, mask: Mask = None) -> Moments:
        """Mean squares over the reduced axes, which stay as size one, as variances about zero."""
        x, mask = passes.inputs(self, x, mask)
        return reduce(self, x, reduction_axes(self, x), mask, centred=False)

    def coefficients(
        self, params: AffineParams, state: tuple[()], seen: Moments, *, key: Key = None
    ) -> Normalizer:
        """Normalizes by the root of the mean square."""
        return Normalizer(None, passes.inverse_deviation(seen.var, self.epsilon), params.scale)
