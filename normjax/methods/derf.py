"""Dynamic erf."""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from normjax.core import checks
from normjax.core.checks import field
from normjax.core.fields import AffineFields, AxisFields
from normjax.core.method import Traits
from normjax.core.structs import Features, Key, affine_params
from normjax.core.tracing import traced_once
from normjax.methods.dynamic import squash


class DerfParams(NamedTuple):
    """Slope and shift of the error function, shared by all features, and scale and bias.

    Chen et al., *Stronger Normalization-Free Transformers*, 2025, https://arxiv.org/abs/2512.10938

    Example:
      >>> import normjax as nj
      >>> params, _ = nj.Derf(use_bias=False).init(None, 3)
      >>> params.alpha.item(), params.shift.item(), params.scale.shape, params.bias
      (0.5, 0.0, (3,), None)
    """

    alpha: jax.Array
    shift: jax.Array
    scale: jax.Array | None = None
    bias: jax.Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Derf(AffineFields, AxisFields):
    """Dynamic erf: `erf(alpha * x + shift) * scale + bias` in place of a normalization.

    Chen, Lu, Zhu, Sun & Liu, *Stronger Normalization-Free Transformers*, 2025,
    https://arxiv.org/abs/2512.10938

    The authors report it above layer norm and dynamic tanh for images, speech and DNA, and equal to
    them for GPT-2. Doubts have been raised since: trained with Muon a language model falls behind
    one with norms, unless alpha starts at 0.3 (arXiv 2604.01563), and dynamic tanh, its sibling,
    helps where data are scarce and costs where they are plenty (arXiv 2604.23434).

    Computed in at least float32; reverse mode keeps the input alone.

    Attributes:
      alpha_init: initial slope, a finite number.
      shift_init: initial shift, a finite number.
      axis, dtype, use_scale, use_bias, scale_init, bias_init: as in `Affine`.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError, TypeError: as in `Affine`.

    Example:
      >>> import jax, normjax as nj
      >>> method = nj.Derf(alpha_init=1.0)
      >>> params, state = method.init(jax.random.key(0), 2)
      >>> y, _ = method.apply(params, state, jax.numpy.array([[0.0, 100.0]]), train=True)
      >>> print(y)
      [[0. 1.]]
    """

    traits: ClassVar[Traits] = Traits(trains=False)

    alpha_init: float = field(0.5, checks.interval(-math.inf))
    shift_init: float = field(0.0, checks.interval(-math.inf))

    def init(self, key: Key, features: Features) -> tuple[DerfParams, tuple[()]]:
        """Slope and shift (scalars), scale and bias [features], all `param_dtype`; no state."""
        scale, bias = affine_params(self, key, checks.as_features("Derf", features))
        alpha, shift = (
            jnp.asarray(a, self.param_dtype) for a in (self.alpha_init, self.shift_init)
        )
        return DerfParams(alpha, shift, scale, bias), ()

    @traced_once
    def apply(
        self,
        params: DerfParams,
        state: tuple[()],
        x: jax.Array,
        *,
        train: bool,
        mask: jax.Array | None = None,
        key: Key = None,
    ) -> tuple[jax.Array, tuple[()]]:
        """Maps `x`, with masked positions taken as zero; `train` and `key` change nothing."""
        del train, key
        return squash(self, lambda x, p: _erf(p.alpha * x + p.shift), params, state, x, mask), state


@jax.custom_jvp
def _erf(u: Any) -> Any:
    """`lax.erf`, whose own derivative JAX 0.12 refuses inside of a checked `shard_map`."""
    return lax.erf(u)


_erf.defjvps(lambda du, _, u: du * (2 / math.sqrt(math.pi)) * jnp.exp(-jnp.square(u)))
