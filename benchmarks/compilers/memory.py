"""Training steps under policies of rematerialization: what they hold at once, move and repeat.

The networks are 16 scanned bottleneck blocks, 12 scanned layers of a transformer, and ResNet-50,
with the norms of flax.linen and of normjax, whose blocks keep all, or what a policy keeps.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend import core

import normjax.linen
from benchmarks import resnet
from benchmarks.compilers import networks
from benchmarks.compilers.targets import Compiler, placed
from benchmarks.split import source
from normjax.core.compat import factors
from normjax.training import checkpoint_policy

saves = jax.checkpoint_policies
Policy = Callable[..., Any] | None
Loss = tuple[Callable, tuple[Any, ...]]  # of parameters and more, with statistics; shapes of both


def convolutions(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy that keeps convolutions alone."""
    return primitive.name == "conv_general_dilated"


class Bottleneck(nn.Module):
    """A residual block, of which `norm` makes the batch norms; a body for `nn.scan`."""

    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        width = x.shape[-1] // 4
        conv = functools.partial(nn.Conv, use_bias=False, **networks.BFLOAT16)
        y = nn.relu(self.norm()(conv(width, (1, 1))(x)))
        y = nn.relu(self.norm()(conv(width, (3, 3))(y)))
        return nn.relu(x + self.norm()(conv(4 * width, (1, 1))(y))), None


class Blocks(nn.Module):
    """Scanned bottleneck blocks, with a loss behind them.

    Attributes:
      norm: makes the norms.
      policy: what the blocks keep for the backward pass; None: all.
      blocks: number of blocks.
    """

    norm: Callable[..., nn.Module]
    policy: Policy = None
    blocks: int = 16

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        body: Any = Bottleneck
        if self.policy is not None:
            body = nn.remat(Bottleneck, policy=self.policy, prevent_cse=False)
        axes: Any = {"params": 0, "batch_stats": 0}
        stack = nn.scan(body, variable_axes=axes, split_rngs={"params": True}, length=self.blocks)
        x, _ = stack(self.norm)(x, None)
        return jnp.square(x.astype(jnp.float32)).mean()


def blocks(
    library: Any, policy: Policy, shape: tuple[int, ...] = (128, 28, 28, 512), **how: Any
) -> Loss:
    """Of `Blocks` for inputs [N, H, W, C]."""
    fields: Any = dict(use_running_average=False, momentum=0.9, **networks.BFLOAT16)
    model = Blocks(functools.partial(library.BatchNorm, **fields), policy, **how)
    return _loss(model, jax.ShapeDtypeStruct(shape, jnp.bfloat16))


def transformer(
    library: Any, policy: Policy, shape: tuple[int, int, int] = (8, 1024, 1024), **how: Any
) -> Loss:
    """Of `networks.Transformer` with LayerNorm for inputs [batch, positions, features]."""
    norm = functools.partial(library.LayerNorm, **networks.BFLOAT16)
    model = networks.Transformer(norm, policy, **how)
    return _loss(model, jax.ShapeDtypeStruct(shape, jnp.bfloat16))


def residual(library: Any, policy: Policy, batch: int = 64, size: int = 224, **how: Any) -> Loss:
    """Of the ResNet-50 of `benchmarks.resnet`, or with its fields `how`; its mean square logit."""
    remat = None if policy is None else functools.partial(nn.remat, policy=policy)
    model = resnet.network("flax" if library is nn else "normjax", remat=remat, **how)
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.bfloat16)
    return _loss(model, images, train=True)


def _loss(model, x, **how):
    variables = jax.eval_shape(functools.partial(model.init, **how), networks.key(), x)
    params, statistics = variables["params"], variables.get("batch_stats", {})

    def loss(params, statistics, x):
        tree = {"params": params, "batch_stats": statistics}
        y, new = model.apply(tree, x, mutable=["batch_stats"], **how)
        return jnp.mean(jnp.square(y.astype(jnp.float32))), new

    return loss, (params, statistics, x)


Arms = dict[str, tuple[Any, Policy]]  # a library of norms, and a policy
NOTHING: Arms = {"flax, nothing_saveable": (nn, saves.nothing_saveable)}
CONVOLUTIONS: Arms = {"flax, convolutions": (nn, convolutions)}
PLAIN: Arms = {"flax": (nn, None)}
OURS: Arms = {
    "normjax": (normjax.linen, None),
    "normjax, checkpoint_policy(least=0)": (normjax.linen, checkpoint_policy(least=0)),
    "normjax, checkpoint_policy()": (normjax.linen, checkpoint_policy()),
}
PRODUCTS: Arms = {
    "flax, dots_saveable": (nn, saves.dots_saveable),
    "flax, dots_with_no_batch_dims_saveable": (nn, saves.dots_with_no_batch_dims_saveable),
}
WHOLE: Arms = {name: OURS[name] for name in ("normjax", "normjax, checkpoint_policy()")}
CASES: dict[str, tuple[Callable[..., Loss], Arms]] = {
    "16 scanned blocks": (blocks, PLAIN | NOTHING | CONVOLUTIONS | OURS),
    "12 scanned layers": (transformer, PLAIN | NOTHING | PRODUCTS | WHOLE),
    "ResNet-50 by blocks": (residual, PLAIN | CONVOLUTIONS | WHOLE),
}


def jobs(
    compiler: Compiler, stacks: Sequence[str]
) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """What is to be compiled, each with a function that does it."""
    for network in stacks:
        make, arms = CASES[network]
        for arm, how in arms.items():
            case = {"network": network, "norms": arm}
            yield case, functools.partial(measure, compiler, make, how, f"{network} {arm}")


def measure(
    compiler: Compiler, make: Callable[..., Loss], how: tuple[Any, Policy], label: str
) -> dict[str, Any]:
    """The figures of value and gradients of a loss, whose parameters are donated.

    With them, bytes `kept` for the backward pass besides the arguments, and `products`: operations
    of convolutions and matrix products.
    """
    loss, arguments = make(*how)
    step = jax.value_and_grad(loss, has_aux=True)
    lowered = jax.jit(step, donate_argnums=0).lower(*placed(arguments, compiler.one))
    return {
        **compiler.figures(lowered, label),
        "kept": kept(loss, *arguments),
        "products": products(jax.make_jaxpr(step)(*arguments).jaxpr),
    }


def kept(loss: Callable, params: Any, *rest: Any) -> int:
    """Bytes that reverse mode keeps, without arguments and constants.

    Example:
      >>> kept(lambda a, x: (jnp.sin(a * x).sum(), None), jnp.float32(1), jnp.ones(5))
      20
    """

    def residuals(params, *rest):
        return jax.tree.leaves(jax.vjp(lambda p: loss(p, *rest), params, has_aux=True)[1])

    jaxpr: Any = jax.make_jaxpr(residuals)(params, *rest).jaxpr
    fresh = {var for var in jaxpr.outvars if source(jaxpr, var) is None}
    return sum(math.prod(var.aval.shape) * var.aval.dtype.itemsize for var in fresh)


def products(jaxpr: Any) -> int:
    """Operations of the convolutions and matrix products of a jaxpr; scans count all their steps.

    Example:
      >>> products(jax.make_jaxpr(lambda a, b: a @ b)(jnp.ones((2, 3)), jnp.ones((3, 4))).jaxpr)
      48
    """
    total = 0
    for equation in jaxpr.eqns:
        operands = (var.aval for var in equation.invars)
        if length := factors(equation.primitive, *operands, **equation.params):
            total += 2 * length * math.prod(equation.outvars[0].aval.shape)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += times * sum(map(products, core.jaxprs_in_params(equation.params)))
    return total
