"""Inverse square roots of covariances: accuracy, derivatives, counts of products."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normjax.core import roots
from normjax.testing.derivatives import derivative_gaps

CUBIC, MINIMAX = (roots.CUBIC,) * 20, roots.steps_of("cubic", 7, 4, 1.4e4)
ROOTS = {
    "zca": roots.zca,
    "cholesky": roots.cholesky,
    "cubic": functools.partial(roots.newton_schulz, steps=CUBIC),
    "minimax": functools.partial(roots.newton_schulz, steps=MINIMAX, scaling="power"),
    "quintic": functools.partial(
        roots.newton_schulz, steps=roots.steps_of("quintic", 13, 0, 1.0), scaling="frobenius"
    ),
}


def covariance(condition, d=64, seed=0, dtype="float32"):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))
    return jnp.asarray((q * np.geomspace(1 / condition, 1, d)) @ q.T, dtype)


def far(cov, matrix):
    """The largest entry of the residual, in float64."""
    cov, matrix = (np.asarray(a, "float64") for a in (cov, matrix))
    return np.abs(np.eye(len(cov)) - matrix @ cov @ matrix.T).max()


@pytest.mark.parametrize("name", ROOTS)
def test_roots_of_ill_conditioned_covariances(name):
    """float32 at condition number 1e4; eigendecompositions are a little worse than products."""
    run = jax.jit(ROOTS[name])
    gaps = [far(cov, run(cov)) for cov in (covariance(1e4, seed=seed) for seed in range(4))]
    assert max(gaps) < (2e-4 if name == "zca" else 1e-4), gaps
    assert np.isfinite(run(covariance(1e6))).all()
    cov = covariance(1e6)
    shown = np.abs(roots.residual(cov, run(cov))).max()
    np.testing.assert_allclose(shown, far(cov, run(cov)), atol=2e-2)


def test_products_of_the_accurate_iteration():
    jaxpr = jax.make_jaxpr(ROOTS["minimax"])(covariance(1e4))
    products = [
        eqn
        for eqn in jaxpr.jaxpr.eqns
        if eqn.primitive.name == "dot_general" and eqn.outvars[0].aval.shape == (64, 64)
    ]
    assert len(products) == 22
    cubic = jax.make_jaxpr(ROOTS["cubic"])(covariance(1e4))
    assert sum(eqn.primitive.name == "dot_general" for eqn in cubic.jaxpr.eqns) == 57


@pytest.mark.parametrize("condition", [1e2, 1e4])
def test_the_published_iteration_parts_from_the_coupled_one(condition):
    """To rounding the same sequence; its rounding then grows, so that more steps are refused."""
    with jax.enable_x64(True):
        cov = covariance(condition, dtype="float64")
        pairs = [
            (roots.published(cov, t), roots.newton_schulz(cov, (roots.CUBIC,) * t))
            for t in (0, 3, 5, 7)
        ]
        for ours, coupled in pairs:
            chex.assert_trees_all_close(ours, coupled, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="beyond 7"):
        roots.published(cov, 8)


@pytest.mark.parametrize("name", ROOTS)
def test_a_batch_is_one_by_one(name):
    batch = jnp.stack([covariance(10.0, 5, seed) for seed in range(3)]).reshape(3, 1, 5, 5)
    each = jnp.stack([ROOTS[name](one[0])[None] for one in batch])
    chex.assert_trees_all_close(ROOTS[name](batch), each, atol=2e-6, rtol=1e-5)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("minimax", "quintic")]


@pytest.mark.parametrize("name", ["zca", "cholesky", "cubic", *SLOW])
def test_derivatives(name):
    """Of first and second order, along symmetric directions: generic, white, nearly singular."""
    with jax.enable_x64(True):
        deficient = jnp.diag(jnp.array([2.0, 1.0, 1.0, 0.0, 0.0])) + 1e-2 * jnp.eye(5)
        cov = jnp.stack([covariance(30.0, 5, dtype="float64"), 2 * jnp.eye(5), deficient])
        size = jnp.abs(ROOTS[name](cov)).max((1, 2), keepdims=True)
        run = lambda cov: ROOTS[name]((cov + cov.mT) / 2) / size
        gradient = jax.grad(lambda cov: jnp.sum(jnp.sin(run(cov))))
        for function in (run, gradient):
            adjoint, slope = derivative_gaps(function, cov)
            assert adjoint < 1e-10 and slope < 1e-4, (adjoint, slope)


@pytest.mark.parametrize("name", ROOTS)
def test_without_variance(name):
    """A covariance of zeros has a root whose derivative with those of variances is finite."""
    zeros = jnp.zeros((3, 3))
    assert np.isfinite(ROOTS[name](zeros)).all()
    few = jnp.diag(jnp.array([1.0, 0.0, 0.0])) + 1e-5 * jnp.eye(3)
    assert np.isfinite(jax.grad(lambda cov: ROOTS[name](cov).sum())(few)).all()


def test_a_failed_factor_is_made_again():
    rows = np.random.default_rng(0).normal(size=(20, 64)).astype("float32")
    cov = jnp.asarray(rows.T @ rows / 20)
    run = lambda cov: jnp.sum(jnp.sin(roots.cholesky(cov)))
    assert np.isfinite(roots.cholesky(cov)).all() and np.isfinite(jax.grad(run)(cov)).all()
    assert np.isnan(roots.cholesky(cov.at[0, 0].set(np.nan))).any()


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_minimax_steps(condition):
    """The best odd quintic: its error takes its largest value four times, with signs in turn.

    That of all steps together is that of the last.
    """
    steps = roots.minimax(condition, 5)
    low, high = condition**-0.5, 1.0
    composed = np.linspace(low, high, 200001)
    for a, b, c in steps[:3]:
        composed = composed * (a + b * composed**2 + c * composed**4)
        x = np.linspace(low, high, 200001)
        error = 1 - x * (a + b * x**2 + c * x**4)
        most = np.abs(error).max()
        touched = np.flatnonzero(np.abs(error) > most * (1 - 1e-6))
        signs = np.sign(error[touched])
        assert np.count_nonzero(np.diff(signs)) == 3
        np.testing.assert_allclose(np.abs(composed - 1).max(), most, rtol=1e-6)
        low, high = 1 - most, 1 + most
    for a, b, c in steps[3:]:
        composed = composed * (a + b * composed**2 + c * composed**4)
    assert np.abs(composed - 1).max() < {1e2: 1e-12, 1e4: 2e-6, 1e6: 0.12}[condition]


def test_the_nearest_quintic_is_that_of_polar_express():
    """Its first step: the best above 0.0240733, scaled so that its values from 1e-3 mean one."""
    a, b, c = roots._nearest(0.02407327424182761, 1.0)
    ends = sum(x * (a + b * x**2 + c * x**4) for x in (1e-3, 1.0))
    public = [8.28721201814563, -23.595886519098837, 17.300387312530933]
    np.testing.assert_allclose(2 / ends * np.array([a, b, c]), public, rtol=1e-9)
    near = [8.0934, -23.6204, 17.4462]  # without such a cushion, of condition number 1e4
    np.testing.assert_allclose(roots.minimax(1e4, 1)[0], near, atol=1e-4)


def test_the_scale_by_power_iteration_is_a_bound():
    for seed in range(20):
        cov = covariance(10.0 ** (seed % 5), 16, seed, "float32")
        largest = np.linalg.eigvalsh(cov)[-1]
        bound = float(roots._scale(cov, "power").squeeze())
        assert largest <= bound * (1 + 1e-5) <= 1.2 * largest * (1 + 1e-5)
    apart = jnp.diag(jnp.array([1.0, 4.0, 2.0]))  # each column but one sees one small eigenvalue
    np.testing.assert_allclose(roots._scale(apart, "power").squeeze(), 4 * 3 ** (1 / 16), rtol=1e-6)
