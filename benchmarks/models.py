"""Small networks that take their normalization from a factory."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from normjax import KalmanNorm, propagate
from normjax.linen import Norm
from normjax.linen.carry import add, pointwise


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


class Residual(nn.Module):
    """Residual network of pre-activation basic blocks, https://arxiv.org/abs/1603.05027.

    A stage halves the resolution and doubles the channels of the one before. Images under 16
    pixels have two stages, others three. Every block sows what its branch adds and the sum, under
    its name and "/branch" and "/sum". Inside `normjax.linen.carry.carry` Kalman norms get their
    priors by themselves; `KalmanResidual` passes them on by hand.

    Attributes:
      norm: makes a normalization.
      classes: number of classes.
      width: channels of the first stage.
      depth: blocks of each stage.
      early: makes the normalizations of maps larger than those of the last stage; None: `norm`.
    """

    norm: Callable[..., nn.Module]
    classes: int
    width: int = 16
    depth: int = 1
    early: Callable[..., nn.Module] | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits f32[N, classes] of images f32[N, H, W, C]."""
        layer = 0

        def normalize(x):
            nonlocal layer
            layer += 1
            norm = self.norm if x.shape[1] <= last or self.early is None else self.early
            y = norm(name=f"norm_{layer}")(x, use_running_average=not train)
            return pointwise(nn.relu, y)

        stages = 2 if x.shape[1] < 16 else 3
        last = -(-x.shape[1] // 2 ** (stages - 1))  # size of the maps of the last stage
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


class KalmanResidual(nn.Module):
    """`Residual` with Kalman norms: every layer passes on its output and the moments of it.

    The first norm has no prior. The skip connection starts with the moments of standardized pixels
    behind the stem; where a block keeps the shape, they are added to those of its branch.

    Attributes:
      method: a `KalmanNorm`; its ReLU is taken inside.
      classes: number of classes.
      width: channels of the first stage.
      depth: blocks of each stage.
    """

    method: KalmanNorm
    classes: int
    width: int = 16
    depth: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits f32[N, classes] of images f32[N, H, W, C] with mean 0 and variance 1."""
        method, layer = dataclasses.replace(self.method, activation=nn.relu), 0

        def through(x, moments, features, size, stride, name):
            module = conv(features, size, stride, name)
            y = module(x)
            kernel = module.variables["params"]["kernel"]
            return y, propagate.conv(moments, kernel, size=x.shape[1:3], strides=stride)

        def normalize(x, moments):
            nonlocal layer
            layer += 1
            norm = Norm(method, name=f"norm_{layer}")
            return norm(x, use_running_average=not train, prior=moments if layer > 1 else None)

        stages, channels = 2 if x.shape[1] < 16 else 3, x.shape[-1]
        pixels = propagate.prediction(jnp.zeros(channels), jnp.ones(channels))
        x, skip = through(x, pixels, self.width, 3, 1, "stem")
        for stage in range(stages):
            for block in range(self.depth):
                features = self.width * 2**stage
                stride = 2 if stage and not block else 1
                name = f"stage_{stage}_block_{block}"
                y, moments = normalize(x, skip)
                if stride > 1:
                    x, skip = through(y, moments, features, 1, stride, f"{name}_shortcut")
                y, moments = through(y, moments, features, 3, stride, f"{name}_conv_1")
                y, moments = normalize(y, moments)
                y, moments = through(y, moments, features, 3, 1, f"{name}_conv_2")
                x, skip = x + y, propagate.add(skip, moments)
        y, _ = normalize(x, skip)
        return nn.Dense(self.classes, name="head")(y.mean((1, 2)))


class MLP(nn.Module):
    """Three hidden layers of 128 units, each normalized before its ReLU.

    Attributes:
      norm: makes a normalization.
      classes: number of classes.
      early: makes the normalizations of all layers but the last; None: `norm`.
    """

    norm: Callable[..., nn.Module]
    classes: int
    early: Callable[..., nn.Module] | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits f32[N, classes] of images f32[N, H, W, C]."""
        x = x.reshape(x.shape[0], -1)
        init = nn.initializers.he_normal()
        for layer in range(1, 4):
            x = nn.Dense(128, use_bias=False, kernel_init=init, name=f"dense_{layer}")(x)
            norm = self.norm if layer == 3 or self.early is None else self.early
            x = nn.relu(norm(name=f"norm_{layer}")(x, use_running_average=not train))
        return nn.Dense(self.classes, name="head")(x)


class KalmanMLP(nn.Module):
    """`MLP` with Kalman norms; the first has no prior.

    Attributes:
      method: a `KalmanNorm`; its ReLU is taken inside.
      classes: number of classes.
    """

    method: KalmanNorm
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits f32[N, classes] of images f32[N, H, W, C]."""
        method = dataclasses.replace(self.method, activation=nn.relu)
        x, moments = x.reshape(x.shape[0], -1), None
        for layer in range(1, 4):
            init = nn.initializers.he_normal()
            dense = nn.Dense(128, use_bias=False, kernel_init=init, name=f"dense_{layer}")
            x = dense(x)
            if moments is not None:
                moments = propagate.dense(moments, dense.variables["params"]["kernel"])
            norm = Norm(method, name=f"norm_{layer}")
            x, moments = norm(x, use_running_average=not train, prior=moments)
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

    Raises:
      ValueError: for Kalman norms in the last layers alone: their priors come from early ones.
    """
    if isinstance(method, KalmanNorm):
        if early is not None:
            raise ValueError("KalmanNorm: no other method can be in the early layers.")
        if model == "mlp":
            return KalmanMLP(method, classes)
        return KalmanResidual(method, classes, width, depth)
    norm = partial(Norm, method=method)
    first = None if early is None else partial(Norm, method=early)
    if model == "mlp":
        return MLP(norm, classes, first)
    return Residual(norm, classes, width, depth, first)
