"""Whitening norms, their formulas written plainly, and their products: for `benchmarks.speed`."""

from collections.abc import Callable
from typing import Any

SIZE = 64  # features in a group
SHAPES = ((64, 32, 32, 64), (128, 16, 16, 128), (128, 16, 16, 256))
CASES = dict.fromkeys(
    (
        "IterativeNorm",
        "DecorrelatedBatchNorm",
        "CholeskyBatchNorm",
        "StochasticWhiteningBatchNorm",
    ),
    SHAPES,
)


def programs(method: str, shape: tuple[int, ...]) -> dict[str, tuple[Any, Callable]]:
    """Variables and `apply(variables, x, key) -> (y, new)`, as of `speed.programs`.

    "flax" is flax.linen's BatchNorm. "plain" is the formula as the authors of IterNorm write it,
    features first, [groups, size, positions], which JAX differentiates. "products" are the matrix
    products of a training step and nothing else, but the order of features that they need.
    """
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    import normjax as nj

    channels = shape[-1]
    rate = {"alpha": 1e-3} if method == "StochasticWhiteningBatchNorm" else {}
    ours = getattr(nj, method)(group_size=SIZE, **rate)
    theirs = nn.BatchNorm(use_running_average=False)
    variables = jax.jit(theirs.init)(jax.random.key(0), jnp.ones((2, channels)))
    scale, bias = jnp.ones(channels), jnp.zeros(channels)
    eye = jnp.tile(jnp.eye(SIZE), (channels // SIZE, 1, 1))
    products = _products(root=method != "StochasticWhiteningBatchNorm")

    def flax(variables, x, key):
        y, new = theirs.apply(variables, x, mutable=["batch_stats"])
        return y.astype(x.dtype), new

    return {
        "normjax": (
            ours.init(None, channels),
            lambda v, x, key: ours.apply(*v, x, train=True),
        ),
        "flax": (variables, flax),
        "plain": (((scale, bias), eye), lambda v, x, key: _plain(method, v[0], v[1], x)),
        "products": ((), lambda v, x, key: (products(x), ())),
    }


def _plain(method, params, matrix, x, epsilon=1e-5):
    """The output, and what running averages would take."""
    import jax.numpy as jnp
    from jax import lax

    rows = jnp.moveaxis(x.astype(jnp.float32), -1, 0).reshape(-1, SIZE, x.size // x.shape[-1])
    mean = rows.mean(2, keepdims=True)
    c, eye = rows - mean, jnp.eye(SIZE)
    if method == "StochasticWhiteningBatchNorm":
        c = c / jnp.sqrt(jnp.square(c).mean(2, keepdims=True) + epsilon)
        corr = c @ c.mT / c.shape[2]
        matrix = matrix - 1e-3 * (matrix @ corr @ matrix.mT - eye) @ matrix
        matrix = lax.stop_gradient((matrix + matrix.mT) / 2)
    else:
        cov = c @ c.mT / c.shape[2] + epsilon * eye
        matrix = {
            "IterativeNorm": _iterated,
            "DecorrelatedBatchNorm": _zca,
            "CholeskyBatchNorm": _cholesky,
        }[method](cov)
    y = jnp.moveaxis((matrix @ c).reshape(-1, *x.shape[:-1]), 0, -1)
    scale, bias = params
    return (y * scale + bias).astype(x.dtype), lax.stop_gradient((mean, matrix))


def _iterated(cov):
    import jax.numpy as jnp

    trace = jnp.trace(cov, axis1=1, axis2=2)[:, None, None]
    p = jnp.eye(SIZE)
    for _ in range(5):
        p = 1.5 * p - 0.5 * (p @ p @ p) @ (cov / trace)
    return p / jnp.sqrt(trace)


def _zca(cov):
    import jax.numpy as jnp

    values, vectors = jnp.linalg.eigh(cov)
    return (vectors / jnp.sqrt(values)[:, None, :]) @ vectors.mT


def _cholesky(cov):
    import jax.numpy as jnp
    from jax.scipy.linalg import solve_triangular

    eye = jnp.broadcast_to(jnp.eye(SIZE), cov.shape)
    return solve_triangular(jnp.linalg.cholesky(cov), eye, lower=True)


def _products(*, root):
    """A function with the products of a norm, and in its pullback those of its pullback.

    That is a covariance and a map, then the cotangents of both; without a `root`, whose matrix is a
    constant, not that of the covariance.
    """
    import jax
    import jax.numpy as jnp

    def blocks(a):
        a = a.astype(jnp.float32).reshape(-1, a.shape[-1] // SIZE, SIZE)
        return jnp.moveaxis(a, 1, 0)

    def whole(a, like):
        return jnp.moveaxis(a, 0, 1).reshape(like.shape).astype(like.dtype)

    def gram(a, b):
        return jnp.einsum("gpi,gpj->gij", a, b) / a.shape[1]

    def times(a, matrix):
        return jnp.einsum("gpi,gij->gpj", a, matrix)

    def forward(x):
        rows = blocks(x)
        cov = gram(rows, rows)
        return whole(times(rows, cov), x), (x, cov)

    def backward(kept, g):
        x, cov = kept
        rows, h = blocks(x), blocks(g)
        slope, dx = gram(h, rows), times(h, cov)
        return (whole(dx + times(rows, slope) if root else dx + slope[:, :1], x),)

    products = jax.custom_vjp(lambda x: forward(x)[0])
    products.defvjp(forward, backward)
    return products
