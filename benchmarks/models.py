"""Small networks that take their normalization from a factory."""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from normjax import KalmanNorm, propagate
from normjax.core.method import replace, traits
from normjax.linen import Norm
from normjax.linen.carry import add, carry

Posterior = Literal["output", "fused"]


def conv_by_patches(x, kernel, strides, padding, **_):
    """A 2-D convolution as a product of patches and kernel.

    XLA's CPU compiler has no fast kernel for the gradients of a convolution inside a loop: there
    they take some thirty times as long as outside. A matrix product is fast everywhere.
    """
    size = kernel.shape[:2]
    pads = lax.padtype_to_pads(x.shape[1:3], size, strides, padding)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    stops = [n - k + 1 for n, k in zip(x.shape[1:3], size, strict=True)]
    parts = [
        x[:, i : i + stops[0] : strides[0], j : j + stops[1] : strides[1]]
        for i in range(size[0])
        for j in range(size[1])
    ]
    return jnp.concatenate(parts, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def conv(features: int, size: int, stride: int, name: str) -> nn.Conv:
    """A convolution without bias, in the form that trains fastest on the backend."""
    how = conv_by_patches if jax.default_backend() == "cpu" else None
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        use_bias=False,
        kernel_init=nn.initializers.he_normal(),
        conv_general_dilated=how,
        name=name,
    )


def carrying(posterior: Posterior | None, x: jax.Array) -> contextlib.AbstractContextManager[Any]:
    """`carry` with the moments of standardized pixels `x`; None: nothing is carried."""
    if posterior is None:
        return contextlib.nullcontext()
    pixels = propagate.prediction(jnp.zeros(x.shape[-1]), jnp.ones(x.shape[-1]))
    return carry([(x, pixels)], posterior=posterior)


class Residual(nn.Module):
    """Residual network of pre-activation basic blocks, https://arxiv.org/abs/1603.05027.

    A stage halves the resolution and doubles the channels of the one before. Images under 16
    pixels have two stages, others three. Every block sows what its branch adds and the sum, under
    its name and "/branch" and "/sum". Of Kalman norms the first has no prior.

    Attributes:
      norm: makes a normalization, a function of the input and `use_running_average`.
      classes: number of classes.
      width: channels of the first stage.
      depth: blocks of each stage.
      early: makes the normalizations of maps larger than those of the last stage; None: `norm`.
      posterior: for Kalman norms, with their ReLU inside: what they hand on, see `carry`.
    """

    norm: Callable[..., Callable[..., Any]]
    classes: int
    width: int = 16
    depth: int = 1
    early: Callable[..., nn.Module] | None = None
    posterior: Posterior | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits f32[N, classes] of images f32[N, H, W, C]."""
        layer = 0

        def normalize(x):
            nonlocal layer
            layer += 1
            norm = self.norm if x.shape[1] <= last or self.early is None else self.early
            norm = norm(name=f"norm_{layer}")
            if self.posterior is None:
                return nn.relu(norm(x, use_running_average=not train))
            prior = {"prior": None} if layer == 1 else {}
            return norm(x, use_running_average=not train, **prior)

        stages = 2 if x.shape[1] < 16 else 3
        last = -(-x.shape[1] // 2 ** (stages - 1))  # size of the maps of the last stage
        with carrying(self.posterior, x):
            x = conv(self.width, 3, 1, "stem")(x)
            for stage in range(stages):
                for block in range(self.depth):
                    features = self.width * 2**stage
                    stride = 2 if stage and not block else 1
                    name = f"stage_{stage}_block_{block}"
                    y = normalize(x)
                    if stride > 1:
                        x = conv(features, 1, stride, f"{name}_shortcut")(y)
                    y = conv(features, 3, stride, f"{name}_conv_1")(y)
                    y = conv(features, 3, 1, f"{name}_conv_2")(normalize(y))
                    x = add(x, y)
                    self.sow("intermediates", f"{name}/branch", y)
                    self.sow("intermediates", f"{name}/sum", x)
            return nn.Dense(self.classes, name="head")(normalize(x).mean((1, 2)))


class MLP(nn.Module):
    """Three hidden layers of 128 units, each normalized before its ReLU.

    Attributes:
      norm: makes a normalization.
      classes: number of classes.
      early: makes the normalizations of all layers but the last; None: `norm`.
      posterior: for Kalman norms, with their ReLU inside: what they hand on, see `carry`.
    """

    norm: Callable[..., nn.Module]
    classes: int
    early: Callable[..., nn.Module] | None = None
    posterior: Posterior | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits f32[N, classes] of images f32[N, H, W, C]."""
        init = nn.initializers.he_normal()
        with carrying(self.posterior, x):
            x = x.reshape(x.shape[0], -1)
            for layer in range(1, 4):
                x = nn.Dense(128, use_bias=False, kernel_init=init, name=f"dense_{layer}")(x)
                norm = self.norm if layer == 3 or self.early is None else self.early
                x = norm(name=f"norm_{layer}")(x, use_running_average=not train)
                x = nn.relu(x) if self.posterior is None else x
            return nn.Dense(self.classes, name="head")(x)


MODELS = ("residual", "mlp")
PLACEMENTS = ("all", "deep")


def build(
    model: str,
    method: Any,
    *,
    classes: int,
    width: int = 16,
    depth: int = 1,
    early: Any = None,
    posterior: Posterior = "output",
) -> nn.Module:
    """The network `model` with `method` as each of its normalizations.

    Args:
      model: one of `MODELS`.
      method: the method.
      classes: number of classes.
      width: channels of the first stage of the residual network.
      depth: blocks of each of its stages.
      early: a method for all layers before the last one (mlp) or those whose maps are larger than
        in the last stage (residual); None: `method`.
      posterior: what Kalman norms hand on, see `carry`.

    Raises:
      ValueError: for Kalman norms in the last layers alone: their priors come from early ones; or
        inside of a method that hands no moments on.
    """
    kalman = "prior" in traits(method).inputs
    if kalman and early is not None:
        raise ValueError("KalmanNorm: no other method can be in the early layers.")
    if kalman and not isinstance(getattr(method, "method", method), KalmanNorm):
        raise ValueError(f"{type(method).__name__}: it hands on no moments of its KalmanNorm.")
    norm = partial(Norm, method=replace(method, activation=nn.relu) if kalman else method)
    first = None if early is None else partial(Norm, method=early)
    how = {"early": first, "posterior": posterior if kalman else None}
    if model == "mlp":
        return MLP(norm, classes, **how)
    return Residual(norm, classes, width, depth, **how)
