"""Inverse square roots of covariances: matrices W with W S W^T = I.

Three ways, of a batch of symmetric matrices [..., d, d] with no eigenvalue below zero but by
rounding: an eigendecomposition (`zca`), Cholesky factors (`cholesky`) and products alone
(`newton_schulz`). All are in the dtype of the matrices, float32 or wider, at the highest precision
of products, differentiable in any mode to any order, and finite, as are their derivatives, for
equal and for vanishing eigenvalues. `residual` says how good a root is.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from normjax.core.linear import differentiated
from normjax.core.statistics import divisor

Scaling = Literal["trace", "frobenius", "power"]
Steps = Sequence[tuple[float, ...]]  # of each step: a, b, c of x (a + b x^2 + c x^4)
CUBIC = (1.5, -0.5)
QUINTIC = (15 / 8, -10 / 8, 3 / 8)
POWER_STEPS = 8  # their estimate is at least the largest eigenvalue over d^(1/16)
SAFE_STEPS = 7  # of the published iteration

product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def identity_like(cov: jax.Array) -> jax.Array:
    """Identities of the shape [..., d, d] of `cov`."""
    return jnp.broadcast_to(jnp.eye(cov.shape[-1], dtype=cov.dtype), cov.shape)


def residual(cov: jax.Array, matrix: jax.Array) -> jax.Array:
    """`I - W S W^T`, [..., d, d]: zero for a root `matrix` of `cov`; two products.

    Its largest absolute value is how far data with this covariance are from white afterwards.
    """
    white = product(product(matrix, cov), matrix.mT)
    return identity_like(cov) - white


def zca(cov: jax.Array) -> jax.Array:
    """`S^(-1/2)`, symmetric, by an eigendecomposition.

    Eigenvalues count as at least the largest times the spacing of the dtype. The derivative is that
    of `W S W = I`: `R dW + dW R = -W dS W` with the root `R = S W`, solved in the eigenbasis, whose
    own derivative, infinite for equal eigenvalues, is not needed.
    """
    return _zca((cov + cov.mT) / 2)[0]


def _zca_tangent(saved, tangents):
    (cov, matrix, roots, vectors), (dcov,) = saved, tangents
    back = product(product(matrix, dcov), matrix)
    moved = -_lyapunov(product(cov, matrix), back, roots, vectors)
    return moved, jnp.zeros_like(roots), jnp.zeros_like(vectors)


def _zca_transpose(saved, cotangents):
    cov, matrix, roots, vectors = saved
    back = _lyapunov(product(cov, matrix), cotangents[0], roots, vectors)
    return (-product(product(matrix, back), matrix),)


@differentiated(_zca_tangent, _zca_transpose, saves=lambda out, cov: (cov, *out), dear=True)
def _zca(cov):
    """The root, and roots of the eigenvalues and eigenvectors: constants of all derivatives."""
    values, vectors = jnp.linalg.eigh(cov, symmetrize_input=False)
    dtype = jnp.finfo(cov.dtype)
    least = jnp.maximum(values[..., -1:] * dtype.eps, dtype.tiny)
    roots = jnp.sqrt(jnp.maximum(values, least))
    return product(vectors / roots[..., None, :], vectors.mT), roots, vectors


def _lyapunov_tangent(saved, tangents):
    (a, x, *basis), (da, dc) = saved, tangents
    return _lyapunov(a, dc - product(da, x) - product(x, da), *basis)


def _lyapunov_transpose(saved, g):
    a, x, *basis = saved
    back = _lyapunov(a, g, *basis)
    return -product(back, x.mT) - product(x.mT, back), back


@differentiated(
    _lyapunov_tangent,
    _lyapunov_transpose,
    moving=2,
    saves=lambda x, a, c, values, vectors: (a, x, values, vectors),
)
def _lyapunov(a, c, values, vectors):
    """X with `A X + X A = C`, where A is symmetric with these eigenvalues and eigenvectors."""
    c = product(product(vectors.mT, c), vectors)
    x = c / (values[..., :, None] + values[..., None, :])
    return product(product(vectors, x), vectors.mT)


def cholesky(cov: jax.Array) -> jax.Array:
    """`L^-1`, lower triangular, of `S = L L^T`.

    Where the factor fails, by rounding of an eigenvalue near zero, the trace times the spacing of
    the dtype is added to the diagonal.
    """
    cov = (cov + cov.mT) / 2
    factor = functools.partial(jnp.linalg.cholesky, symmetrize_input=False)
    dtype, eye = jnp.finfo(cov.dtype), identity_like(cov)
    bare = lax.stop_gradient(cov)
    failed = jnp.any(jnp.isnan(factor(bare)), (-2, -1)) & jnp.all(jnp.isfinite(bare), (-2, -1))
    more = dtype.eps * jnp.trace(bare, axis1=-2, axis2=-1) + dtype.tiny
    more = jnp.where(failed, more, 0)[..., None, None]
    return jax.scipy.linalg.solve_triangular(factor(cov + more * eye), eye, lower=True)


def newton_schulz(cov: jax.Array, steps: Steps, scaling: Scaling = "trace") -> jax.Array:
    """What the `steps` of a Newton-Schulz iteration make of `S^(-1/2)`, by products alone.

    With S divided by a bound of its largest eigenvalue and the polynomial p(M) = a + b M + c M^2 of
    a step, the coupled form is `Y = S, Z = I; P = p(Z Y); Y <- Y P, Z <- P Z`: Z is what
    `Z <- p(Z^2 S) Z` gives in exact arithmetic, but its rounding does not grow. A cubic step takes
    three products, a quintic one four; of those of the first step two are none, and of the last
    one. The derivative is that of the products. The scale is the trace, the Frobenius norm, or a
    bound by power iteration, which is at most d^(1/16) times the largest eigenvalue.
    """
    scale = _scale(cov, scaling)
    eye = identity_like(cov)
    y, z = cov / scale, eye
    for i, (a, b, *c) in enumerate(steps):
        m = product(z, y) if i else y
        p = a * eye + b * m
        p = p + c[0] * product(m, m) if c else p
        y = product(y, p) if i + 1 < len(steps) else y
        z = product(p, z) if i else p
    return z / jnp.sqrt(scale)


def published(cov: jax.Array, steps: int) -> jax.Array:
    """The iteration of IterNorm as it stands, `P <- 1.5 P - 0.5 P^3 S`, scaled by the trace.

    Its rounding grows from step to step, in float64 too. ValueError for more than seven steps.
    """
    if steps > SAFE_STEPS:
        raise ValueError(f"published: {steps} steps, but beyond {SAFE_STEPS} rounding takes over.")
    scale, p = _scale(cov, "trace"), identity_like(cov)
    for _ in range(steps):
        p = 1.5 * p - 0.5 * product(product(product(p, p), p), cov / scale)
    return p / jnp.sqrt(scale)


def _scale(cov, scaling):
    """A bound of the largest eigenvalue, [..., 1, 1]; one for a matrix of zeros."""
    if scaling == "trace":
        bound = jnp.trace(cov, axis1=-2, axis2=-1)[..., None, None]
    elif scaling == "frobenius":
        square = jnp.sum(jnp.square(cov), (-2, -1), keepdims=True)
        bound = jnp.where(square > 0, jnp.sqrt(divisor(square)), 0)
    else:
        bound = _by_power(cov) * cov.shape[-1] ** (1 / (2 * POWER_STEPS))
    return divisor(bound)


def _by_power(cov):
    """At most the largest eigenvalue, and at least that over d^(1 / 2 steps).

    The column of the largest variance is a start that no eigenvector of it is orthogonal to.
    """
    largest = jnp.argmax(jnp.diagonal(cov, axis1=-2, axis2=-1), -1)
    v = jax.nn.one_hot(largest, cov.shape[-1], dtype=cov.dtype)[..., None]
    size = jnp.zeros((*cov.shape[:-2], 1, 1), cov.dtype)
    for _ in range(POWER_STEPS):
        v = product(cov, v)
        square = jnp.sum(jnp.square(v), (-2, -1), keepdims=True)
        size = jnp.where(square > 0, jnp.sqrt(divisor(square)), 0)
        v = v / divisor(size)
    return size


@functools.lru_cache
def minimax(condition: float, steps: int) -> tuple[tuple[float, ...], ...]:
    """Quintic steps that bring all values between `1 / condition` and 1 as near to 1 as they can.

    Each is the odd polynomial of degree five nearest to 1 on the interval that is left, by Remez'
    exchange; the composition of such is optimal (Amsel et al., *The Polar Express*, 2025,
    https://arxiv.org/abs/2505.16932, Theorem 3.1).
    """
    low, high, found = condition**-0.5, 1.0, []
    for _ in range(steps):
        if high - low < 1e-6:
            found.append(QUINTIC)
            continue
        a, b, c = _nearest(low, high)
        found.append((a, b, c))
        low = low * (a + b * low**2 + c * low**4)
        high = 2 - low
    return tuple(found)


def _nearest(low, high):
    """a, b, c of the polynomial `a x + b x^3 + c x^5` that is nearest to 1 on an interval."""
    inner = np.array([(3 * low + high) / 4, (low + 3 * high) / 4])
    for _ in range(60):
        x = np.array([low, *inner, high])
        system = np.stack([x, x**3, x**5, [1, -1, 1, -1]], 1)
        a, b, c, _ = map(float, np.linalg.solve(system, np.ones(4)))
        spread = np.sqrt(9 * b * b - 20 * a * c)
        old, inner = inner, np.sqrt((-3 * b + np.array([-spread, spread])) / (10 * c))
        if np.abs(inner - old).max() < 1e-14:
            break
    return a, b, c


def steps_of(kind: str, number: int, first: int, condition: float) -> Any:
    """So many steps of an iteration, the `first` of which are minimax ones."""
    last = CUBIC if kind == "cubic" else QUINTIC
    return (*minimax(condition, first), *(last,) * (number - first))
