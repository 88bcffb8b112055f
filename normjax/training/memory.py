"""What reverse mode keeps, and what it makes again."""

from collections.abc import Callable

import jax

from normjax.core import checks
from normjax.core.compat import factors, is_costly
from normjax.core.statistics import NAME


def checkpoint_policy(*, least: int = 512) -> Callable[..., bool]:
    """What to keep for the backward pass of networks with norms: a `policy` of `jax.checkpoint`.

    Kept is what is dear to make again:

    - convolutions and matrix products without batch axes, where every number is a sum of `least`
      products or more;
    - the statistics of norms, a few numbers for each feature or row, and eigendecompositions;
    - sums over devices.

    All else is made again in the backward pass: outputs of norms, activations, residual sums, and
    short products such as the scores of attention. Gradients stay equal to rounding, and running
    statistics move once. Norms of other libraries sum their statistics again.

    To make a number again takes `2 * least` operations; to keep it, it is written and read. Of
    bfloat16 these four bytes take the time of about 1000 operations on a TPU v5e, and of 1200 on an
    H100, hence the default. So the last convolution of a bottleneck block, from few channels to
    many, is made again. `least=0` keeps all such products; a number larger than every sum, none.

    It is for the part of a network that repeats, a block or the body of a scan: what one
    `jax.checkpoint` makes again is there at once. `nn.remat` and `nnx.remat` take it too.

    Raises:
      ValueError: if `least` is not an integer >= 0.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from normjax.linen import LayerNorm
      >>> class Block(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         return x + nn.Dense(16)(nn.gelu(nn.Dense(64)(LayerNorm()(x))))
      >>> block = nn.remat(Block, policy=checkpoint_policy(least=16))()
      >>> x = jnp.ones((2, 16))
      >>> variables = block.init(jax.random.key(0), x)
      >>> gradients = jax.grad(lambda v: block.apply(v, x).sum())(variables)
      >>> gradients["params"]["LayerNorm_0"]["bias"].shape
      (16,)
    """
    checks.require("checkpoint_policy", "least", least, checks.natural)
    is_statistic = jax.checkpoint_policies.save_only_these_names(NAME)
    is_product = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

    def policy(primitive, *operands, **params):
        if is_costly(primitive) or is_statistic(primitive, *operands, **params):
            return True
        if primitive.name == "dot_general" and not is_product(primitive, *operands, **params):
            return False
        return factors(primitive, *operands, **params) >= max(least, 1)

    return policy
