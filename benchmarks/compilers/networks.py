"""Training steps of whole networks with the norms of both libraries."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import normjax.linen
from benchmarks import resnet
from benchmarks.compilers.targets import Compiler, placed

INSIDE = "normjax, inside"  # the activation behind a norm is part of it
PLAIN_ARMS = ("flax", "normjax")
ARMS = (*PLAIN_ARMS, INSIDE)
BFLOAT16: dict[str, Any] = {"dtype": jnp.bfloat16}
RECOMPUTED = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
Step = tuple[Callable, tuple[Any, ...]]  # function and shapes of its arguments


class Block(nn.Module):
    """A layer of a transformer, of which `norm` makes the norms; a body for `nn.scan`."""

    norm: Callable[..., nn.Module]
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        attend = nn.MultiHeadDotProductAttention(self.heads, use_bias=False, **BFLOAT16)
        x = x + attend(self.norm()(x))
        y = nn.gelu(nn.Dense(4 * x.shape[-1], **BFLOAT16)(self.norm()(x)))
        return x + nn.Dense(x.shape[-1], **BFLOAT16)(y), None


class Transformer(nn.Module):
    """Scanned layers of a transformer, with a loss behind them.

    Attributes:
      norm: makes the norms.
      policy: what the layers keep for the backward pass; None: all.
      layers: number of layers.
      heads: of the attention.
    """

    norm: Callable[..., nn.Module]
    policy: Callable | None = None
    layers: int = 12
    heads: int = 16

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        body: Any = Block
        if self.policy is not None:
            body = nn.remat(Block, policy=self.policy, prevent_cse=False)
        stack = nn.scan(
            body, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers
        )
        x, _ = stack(self.norm, self.heads)(x, None)
        return jnp.square(x.astype(jnp.float32)).mean()


class UNet(nn.Module):
    """Convolutions with a norm and SiLU, down and up again, with a loss behind them.

    Attributes:
      norm: makes a function that normalizes and applies SiLU.
      widths: channels of each resolution.
    """

    norm: Callable[[], Callable]
    widths: tuple[int, ...] = (64, 128, 256)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def level(x, width):
            for _ in range(2):
                x = self.norm()(nn.Conv(width, (3, 3), **BFLOAT16)(x))
            return x

        skipped = []
        for width in self.widths[:-1]:
            skipped.append(level(x, width))
            x = nn.avg_pool(skipped[-1], (2, 2), (2, 2))
        x = level(x, self.widths[-1])
        for width, skip in zip(self.widths[-2::-1], skipped[::-1], strict=True):
            x = nn.ConvTranspose(width, (2, 2), (2, 2), **BFLOAT16)(x)
            x = level(jnp.concatenate([x, skip], -1), width)
        y = nn.Conv(3, (1, 1), **BFLOAT16)(x)
        return jnp.square(y.astype(jnp.float32)).mean()


def residual(arm: str, batch: int = 64, size: int = 224, **how: Any) -> Step:
    """ResNet-50 of `benchmarks.resnet`, or with its fields `how`."""
    name = "normjax, relu inside" if arm == INSIDE else arm
    model = resnet.network(name, **how)
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.bfloat16)
    statistics = dict(jax.eval_shape(functools.partial(model.init, train=False), key(), images))
    params = statistics.pop("params")
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return resnet.training_step(model), ((params, statistics, params), images, labels)


def transformer(
    arm: str,
    norm: str = "LayerNorm",
    policy: Callable | None = None,
    shape: tuple[int, int, int] = (8, 1024, 1024),
    **how: Any,
) -> Step:
    """Gradients of a `Transformer` for an input [batch, positions, features]."""
    make = functools.partial(getattr(_library(arm), norm), **BFLOAT16)
    return _gradients(Transformer(make, policy, **how), shape)


def unet(arm: str, shape: tuple[int, ...] = (64, 64, 64, 3), **how: Any) -> Step:
    """Gradients of a `UNet` with GroupNorm for images [N, H, W, C]."""

    def norm():
        if arm == INSIDE:
            return normjax.linen.GroupNorm(activation=nn.silu, **BFLOAT16)
        layer = _library(arm).GroupNorm(**BFLOAT16)
        return lambda x: nn.silu(layer(x))

    return _gradients(UNet(norm, **how), shape)


def _library(arm):
    return nn if arm == "flax" else normjax.linen


def key():
    return jax.eval_shape(lambda: jax.random.key(0))


def _gradients(model, shape):
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    params = jax.eval_shape(model.init, key(), x)
    return jax.value_and_grad(model.apply), (params, x)


rms = functools.partial(transformer, norm="RMSNorm")
CASES: dict[str, tuple[Callable[[str], Step], tuple[str, ...]]] = {
    "ResNet-50": (residual, ARMS),
    "transformer, LayerNorm": (transformer, PLAIN_ARMS),
    "transformer, LayerNorm, recomputed": (
        functools.partial(transformer, policy=RECOMPUTED),
        PLAIN_ARMS,
    ),
    "transformer, RMSNorm": (rms, PLAIN_ARMS),
    "transformer, RMSNorm, recomputed": (functools.partial(rms, policy=RECOMPUTED), PLAIN_ARMS),
    "U-Net, GroupNorm": (unet, ARMS),
}


def jobs(
    compiler: Compiler, networks: Sequence[str]
) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """What is to be compiled, each with a function that does it."""
    for network in networks:
        make, arms = CASES[network]
        for arm in arms:
            case = {"network": network, "norms": arm}
            yield case, functools.partial(measure, compiler, make, network, arm)


def measure(
    compiler: Compiler, make: Callable[[str], Step], network: str, arm: str
) -> dict[str, Any]:
    """The figures of a training step, whose first argument is donated."""
    step, arguments = make(arm)
    lowered = jax.jit(step, donate_argnums=0).lower(*placed(arguments, compiler.one))
    return compiler.figures(lowered, f"{network} {arm}")
