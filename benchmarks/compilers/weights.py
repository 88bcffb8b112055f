"""Training steps of ResNet-50 with and without wrappers that normalize its kernels.

All norms of activations are Flax's. Every convolution and the last layer have a wrapper, which
makes the kernel in float32 from the parameters in every step. What it moves depends on the kernels
alone: the more images, the less it is beside the rest.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax

import normjax as nj
from benchmarks.compilers import networks
from benchmarks.compilers.targets import Compiler
from normjax.linen import NormalizedKernels

NETWORK = "ResNet-50"


class Spectral(nn.Module):
    """Flax's wrapper, which moves its vector in training."""

    layer: nn.Module

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        train = self.is_mutable_collection("batch_stats")
        return nn.SpectralNorm(self.layer)(x, update_stats=train)


def ours(method: Any) -> Callable[[nn.Module], nn.Module]:
    """The wrapper of normjax."""
    return functools.partial(NormalizedKernels, method=method)


ARMS: dict[str, Callable[[nn.Module], nn.Module] | None] = {
    "flax": None,
    "flax WeightNorm": nn.WeightNorm,
    "normjax WeightNorm": ours(nj.WeightNorm()),
    "flax SpectralNorm": Spectral,
    "normjax SpectralWeightNorm": ours(nj.SpectralWeightNorm()),
}


def residual(arm: str, **how: Any) -> networks.Step:
    """The training step of an arm."""
    return networks.residual("flax", wrap=ARMS[arm], **how)


def jobs(compiler: Compiler) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """What is to be compiled, each with a function that does it."""
    for arm in ARMS:
        case = {"network": NETWORK, "norms": arm}
        yield case, functools.partial(networks.measure, compiler, residual, NETWORK, arm)
