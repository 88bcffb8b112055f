"""Dynamic tanh."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from normjax.core import checks, passes, seam
from normjax.core.checks import field
from normjax.core.fields import AffineFields, AxisFields
from normjax.core.method import Traits
from normjax.core.structs import Features, Key, Mask, affine_params
from normjax.core.tracing import traced_once


class DynamicTanhParams(NamedTuple):
    """The slope of the tanh, which all features share, and scale and bias of the features.

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
class DynamicTanh(AffineFields, AxisFields):
    """Dynamic tanh: `tanh(alpha * x) * scale + bias` in place of a normalization.

    Zhu, Chen, He, LeCun & Liu, *Transformers without Normalization*, 2025, equation 2,
    https://arxiv.org/abs/2503.10622

    Computed in at least float32; reverse mode keeps the input alone and computes the tanh again.
    The output has the dtype of the input (integers: float32) unless `dtype` says otherwise.

    Attributes:
      alpha_init: initial slope, a finite number (the paper: 0.5, less in wide language models).
      axis, dtype, use_scale, use_bias, scale_init, bias_init: as in `Affine`.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: for a field outside its range; in `apply`, for axes or features that do not fit
        the input.
      TypeError: in `apply`, for complex or boolean input.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> method = nj.DynamicTanh(alpha_init=1.0)
      >>> y, _ = method.apply(*method.init(None, 2), jnp.array([[0.0, 100.0]]), train=True)
      >>> print(y)
      [[0. 1.]]
    """

    traits: ClassVar[Traits] = Traits(trains=False)

    alpha_init: float = field(0.5, checks.interval())

    def init(self, key: Key, features: Features) -> tuple[DynamicTanhParams, tuple[()]]:
        """Slope (scalar), scale and bias [features], all `param_dtype`; no state."""
        scale, bias = affine_params(self, key, checks.as_features("DynamicTanh", features))
        return DynamicTanhParams(jnp.asarray(self.alpha_init, self.param_dtype), scale, bias), ()

    @traced_once
    def apply(
        self,
        params: DynamicTanhParams,
        state: tuple[()],
        x: jax.Array,
        *,
        train: bool,
        mask: Mask = None,
        key: Key = None,
    ) -> tuple[jax.Array, tuple[()]]:
        """Maps `x`, with masked positions taken as zero; `train` and `key` change nothing."""
        del train, key
        return squash(self, lambda x, p: jnp.tanh(p.alpha * x), params, state, x, mask), state


def squash(
    method: Any, function: Callable[..., Any], params: Any, state: Any, x: Any, mask: Any
) -> jax.Array:
    """`function(x, params) * scale + bias`, computed wide; reverse mode keeps `x` alone."""
    x, _ = passes.inputs(method, x, mask)
    at = seam.require_variables(method, params, state, x)

    def run(params, x):
        params = jax.tree.map(lambda a: a.astype(passes.wide(x.dtype)), params)
        y = function(passes.widen(x), params)
        if params.scale is not None:
            y = y * passes.lift(params.scale, at, x.ndim)
        if params.bias is not None:
            y = y + passes.lift(params.bias, at, x.ndim)
        return y.astype(passes.output_dtype(method.dtype, x))

    return jax.checkpoint(run)(params, passes.value(x))
