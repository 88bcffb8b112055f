"""Layer normalization and root-mean-square normalization."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from normjax.core import checks, passes, sync
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


def _apply(method, params, x, mask, *, centred):
    name = type(method).__name__
    x, mask = passes.inputs(name, x, mask)
    reduced = checks.axes(name, "reduction_axes", method.reduction_axes, x.shape)
    at = checks.axes(name, "feature_axes", method.feature_axes, x.shape)
    checks.match(name, "feature_axes", at, x.shape, params)
    others = tuple(i for i in range(x.ndim) if i not in at)
    params = AffineParams(*(None if a is None else jnp.expand_dims(a, others) for a in params))
    now = passes.moments(x, reduced, mask=mask, centred=centred)
    if method.axis_name is not None:
        now, _ = sync.over_devices(now, method.axis_name, method.axis_index_groups)
    return passes.normalize(method, x, now.mean if centred else None, now.var, params)


def _refuse_single_features(method, x):
    name, shape = type(method).__name__, jnp.shape(x)
    reduced = checks.axes(name, "reduction_axes", method.reduction_axes, shape)
    instead = "take statistics over more axes (reduction_axes), or normalize another axis"
    sizes = [shape[i] for i in reduced]
    checks.several_values(name, sizes, shape, method.axis_name, instead)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerNorm:
    """Layer normalization: `(x - mean) / sqrt(var + epsilon) * scale + bias` within each sample.

    Ba, Kiros & Hinton, *Layer Normalization*, 2016, section 3, https://arxiv.org/abs/1607.06450

    As in Flax, statistics are over the last axis by default, so that every position has its own;
    the paper's convolutional form is `reduction_axes=(1, 2, 3)`. No state. The output has the dtype
    of the input (integers: float32) unless `dtype` says otherwise.

    Attributes:
      epsilon: added to the variance, >= 0.
      dtype: dtype of the output; None: that of the input.
      param_dtype: dtype of scale and bias.
      use_bias: whether `init` makes a bias.
      use_scale: whether `init` makes a scale.
      bias_init: initializer of the bias, called with (key, features, param_dtype).
      scale_init: initializer of the scale, called with (key, features, param_dtype).
      reduction_axes: axes over which statistics are taken.
      feature_axes: axes with their own scale and bias.
      axis_name: mapped axis name(s) over which the reduced axes are divided.
      axis_index_groups: groups of device indices along `axis_name` that share statistics among
        themselves.
      activation: pointwise function of the result, taken inside, so that reverse mode keeps the
        input alone.

    Raises:
      ValueError: for a field outside its range; in `apply`, for axes or features that do not fit
        the input.
      TypeError: in `apply`, for complex or boolean input.

    Example:
      >>> import jax, normjax as nj
      >>> method = nj.LayerNorm()
      >>> params, state = method.init(jax.random.key(0), 16)
      >>> y, state = method.apply(params, state, jax.numpy.ones((2, 5, 16)), train=True)
      >>> y.shape, state
      ((2, 5, 16), ())
    """

    depends_on_train: ClassVar[bool] = False

    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Callable[..., Any] = jax.nn.initializers.zeros
    scale_init: Callable[..., Any] = jax.nn.initializers.ones
    reduction_axes: Axes = -1
    feature_axes: Axes = -1
    axis_name: AxisName = None
    axis_index_groups: AxisGroups = None
    activation: Callable[[jax.Array], jax.Array] | None = None

    def __post_init__(self):
        checks.configuration(self)

    def init(self, key: Key, features: Features) -> tuple[AffineParams, tuple[()]]:
        """Scale and bias (`param_dtype`) of the shape of the feature axes; no state."""
        return affine_params(self, key, checks.features("LayerNorm", features)), ()

    @traced_once(in_training=_refuse_single_features)
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
        return _apply(self, params, x, mask, centred=True), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class RMSNorm:
    """Root-mean-square normalization: `x / sqrt(mean(x**2) + epsilon) * scale`.

    Zhang & Sennrich, *Root Mean Square Layer Normalization*, 2019, equation 4,
    https://arxiv.org/abs/1910.07467

    The paper has no epsilon. Squares are summed and the scale is applied in at least float32, then
    the result is rounded once to the dtype of the input (integers: float32) or to `dtype`. No
    state.

    Attributes:
      epsilon: added to the mean square, >= 0.
      dtype: dtype of the output; None: that of the input.
      param_dtype: dtype of the scale.
      use_scale: whether `init` makes a scale.
      scale_init: initializer of the scale, called with (key, features, param_dtype).
      reduction_axes: axes over which squares are averaged.
      feature_axes: axes with their own scale.
      axis_name: mapped axis name(s) over which the reduced axes are divided.
      axis_index_groups: groups of device indices along `axis_name` that share statistics among
        themselves.
      activation: pointwise function of the result, taken inside, so that reverse mode keeps the
        input alone.

    Raises:
      ValueError: for a field outside its range; in `apply`, for axes or features that do not fit
        the input.
      TypeError: in `apply`, for complex or boolean input.

    Example:
      >>> import jax, normjax as nj
      >>> method = nj.RMSNorm()
      >>> params, state = method.init(jax.random.key(0), 4)
      >>> y, _ = method.apply(params, state, jax.numpy.full((2, 4), 3.0), train=True)
      >>> print(y[0].round(3))
      [1. 1. 1. 1.]
    """

    depends_on_train: ClassVar[bool] = False

    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_scale: bool = True
    scale_init: Callable[..., Any] = jax.nn.initializers.ones
    reduction_axes: Axes = -1
    feature_axes: Axes = -1
    axis_name: AxisName = None
    axis_index_groups: AxisGroups = None
    activation: Callable[[jax.Array], jax.Array] | None = None

    def __post_init__(self):
        checks.configuration(self)

    def init(self, key: Key, features: Features) -> tuple[AffineParams, tuple[()]]:
        """A scale (`param_dtype`) of the shape of the feature axes; no state."""
        return affine_params(self, key, checks.features("RMSNorm", features)), ()

    @traced_once
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
        return _apply(self, params, x, mask, centred=False), state
