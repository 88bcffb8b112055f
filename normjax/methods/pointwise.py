"""Methods without statistics: the affine map and dynamic tanh."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from normjax.core import checks, passes
from normjax.core.structs import AffineParams, Axes, Features, Key, affine_params
from normjax.core.tracing import traced_once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Affine:
    """The learned affine map of normalizations on its own: `x * scale + bias`.

    Ioffe & Szegedy, *Batch Normalization*, 2015, Algorithm 1, last line,
    https://arxiv.org/abs/1502.03167

    For chains that put something between a normalization and its affine map. The output has the
    dtype of the input (integers: float32) unless `dtype` says otherwise.

    Attributes:
      axis: the feature axis, or several, with their own scale and bias.
      dtype: dtype of the output; None: that of the input.
      param_dtype: dtype of scale and bias.
      use_bias: whether `init` makes a bias.
      use_scale: whether `init` makes a scale.
      bias_init: initializer of the bias, called with (key, features, param_dtype).
      scale_init: initializer of the scale, called with (key, features, param_dtype).
      activation: pointwise function of the result, taken inside, so that reverse mode keeps the
        input alone.

    Raises:
      ValueError: for a field outside its range; in `apply`, for axes or features that do not fit
        the input.
      TypeError: in `apply`, for complex or boolean input.

    Example:
      >>> import jax, normjax as nj
      >>> method = nj.chain(nj.LayerNorm(use_scale=False, use_bias=False), nj.Affine())
      >>> params, state = method.init(jax.random.key(0), 4)
      >>> y, _ = method.apply(params, state, jax.numpy.ones((2, 4)), train=True)
      >>> y.shape
      (2, 4)
    """

    depends_on_train: ClassVar[bool] = False

    axis: Axes = -1
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Callable[..., Any] = jax.nn.initializers.zeros
    scale_init: Callable[..., Any] = jax.nn.initializers.ones
    activation: Callable[[jax.Array], jax.Array] | None = None

    def __post_init__(self):
        checks.configuration(self)

    def init(self, key: Key, features: Features) -> tuple[AffineParams, tuple[()]]:
        """Scale and bias (`param_dtype`) of the shape of the feature axes; no state."""
        return affine_params(self, key, checks.features("Affine", features)), ()

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
        """Maps `x`, with masked positions taken as zero; `train` and `key` change nothing."""
        del train, key
        x, _ = passes.inputs("Affine", x, mask)
        at = checks.axes("Affine", "axis", self.axis, x.shape)
        checks.match("Affine", "axis", at, x.shape, params)
        others = tuple(i for i in range(x.ndim) if i not in at)
        shape = tuple(n if i in at else 1 for i, n in enumerate(x.shape))
        one = jnp.ones(shape, passes.wide(x.dtype))
        scale, bias = (None if a is None else jnp.expand_dims(a, others) for a in params)
        gain = one if scale is None else scale
        y = passes.affine(x, None, gain, bias, activation=self.activation, dtype=self.dtype)
        return y, state


class DynamicTanhParams(NamedTuple):
    """The slope of the tanh, shared by all features, and scale and bias of the features.

    Zhu et al., *Transformers without Normalization*, 2025, https://arxiv.org/abs/2503.10622

    Example:
      >>> import normjax as nj
      >>> params, _ = nj.DynamicTanh(use_bias=False).init(None, 3)
      >>> params.alpha.item(), params.scale.shape, params.bias
      (0.5, (3,), None)
    """

    alpha: jax.Array
    scale: jax.Array | None = None
    bias: jax.Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicTanh:
    """Dynamic tanh: `tanh(alpha * x) * scale + bias` in place of a normalization.

    Zhu, Chen, He, LeCun & Liu, *Transformers without Normalization*, 2025, equation 2,
    https://arxiv.org/abs/2503.10622

    Computed in at least float32; reverse mode keeps the input alone and computes the tanh again.
    The output has the dtype of the input (integers: float32) unless `dtype` says otherwise.

    Attributes:
      axis: the feature axis, or several, with their own scale and bias.
      alpha_init: initial slope, a finite number (the paper: 0.5, less in wide language models).
      dtype: dtype of the output; None: that of the input.
      param_dtype: dtype of the parameters.
      use_bias: whether `init` makes a bias.
      use_scale: whether `init` makes a scale.
      bias_init: initializer of the bias, called with (key, features, param_dtype).
      scale_init: initializer of the scale, called with (key, features, param_dtype).

    Raises:
      ValueError: for a field outside its range; in `apply`, for axes or features that do not fit
        the input.
      TypeError: in `apply`, for complex or boolean input.

    Example:
      >>> import jax, normjax as nj
      >>> method = nj.DynamicTanh(alpha_init=1.0)
      >>> params, state = method.init(jax.random.key(0), 2)
      >>> y, _ = method.apply(params, state, jax.numpy.array([[0.0, 100.0]]), train=True)
      >>> print(y)
      [[0. 1.]]
    """

    depends_on_train: ClassVar[bool] = False

    axis: Axes = -1
    alpha_init: float = 0.5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Callable[..., Any] = jax.nn.initializers.zeros
    scale_init: Callable[..., Any] = jax.nn.initializers.ones

    def __post_init__(self):
        checks.configuration(self)
        if not checks.is_number(self.alpha_init) or not abs(self.alpha_init) < float("inf"):
            raise ValueError(f"DynamicTanh: alpha_init={self.alpha_init!r} is not a finite number.")

    def init(self, key: Key, features: Features) -> tuple[DynamicTanhParams, tuple[()]]:
        """Slope (scalar), scale and bias [features], all `param_dtype`; no state."""
        scale, bias = affine_params(self, key, checks.features("DynamicTanh", features))
        return DynamicTanhParams(jnp.asarray(self.alpha_init, self.param_dtype), scale, bias), ()

    @traced_once
    def apply(
        self,
        params: DynamicTanhParams,
        state: tuple[()],
        x: jax.Array,
        *,
        train: bool,
        mask: jax.Array | None = None,
        key: Key = None,
    ) -> tuple[jax.Array, tuple[()]]:
        """Maps `x`, with masked positions taken as zero; `train` and `key` change nothing."""
        del train, key
        x, _ = passes.inputs("DynamicTanh", x, mask)
        at = checks.axes("DynamicTanh", "axis", self.axis, x.shape)
        checks.match("DynamicTanh", "axis", at, x.shape, (params.scale, params.bias))
        others = tuple(i for i in range(x.ndim) if i not in at)
        return jax.checkpoint(self._map, static_argnums=(2,))(
            params, passes.value(x), others
        ), state

    def _map(self, params, x, others):
        dtype = passes.wide(x.dtype)
        y = jnp.tanh(params.alpha.astype(dtype) * x.astype(dtype))
        if params.scale is not None:
            y = y * jnp.expand_dims(params.scale.astype(dtype), others)
        if params.bias is not None:
            y = y + jnp.expand_dims(params.bias.astype(dtype), others)
        return y.astype(self.dtype or x.dtype)
