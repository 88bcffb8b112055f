"""Dynamic erf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import normjax as nj

RNG = np.random.default_rng(0)
X = RNG.normal(0, 2, (4, 3, 5))
PARAMS = nj.DerfParams(np.asarray(0.7), np.asarray(-0.3), RNG.normal(size=5), RNG.normal(size=5))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("float64", 1e-13)])
def test_oracle(dtype, tolerance):
    wanted = scipy.special.erf(PARAMS.alpha * X + PARAMS.shift) * PARAMS.scale + PARAMS.bias
    with jax.enable_x64(dtype == "float64"):
        params = jax.tree.map(lambda a: jnp.asarray(a, dtype), PARAMS)
        y, state = nj.Derf().apply(params, (), jnp.asarray(X, dtype), train=True)
    assert state == () and y.dtype == dtype
    np.testing.assert_allclose(y, wanted, atol=tolerance)


def test_gradients_are_those_of_the_formula():
    u, g = PARAMS.alpha * X + PARAMS.shift, RNG.normal(size=X.shape)
    du = g * PARAMS.scale * 2 / np.sqrt(np.pi) * np.exp(-(u**2))
    wanted = nj.DerfParams(
        (du * X).sum(), du.sum(), (g * scipy.special.erf(u)).sum((0, 1)), g.sum((0, 1))
    )
    with jax.enable_x64(True):
        run = lambda params, x: nj.Derf().apply(params, (), x, train=True)[0]
        params = jax.tree.map(jnp.asarray, PARAMS)
        slopes, dx = jax.vjp(run, params, jnp.asarray(X))[1](jnp.asarray(g))
        second = jax.jvp(jax.grad(lambda x: run(params, x).sum()), (X,), (g,))[1]
    np.testing.assert_allclose(dx, du * PARAMS.alpha, atol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), slopes, wanted)
    one = 2 / np.sqrt(np.pi) * np.exp(-(u**2)) * PARAMS.scale
    np.testing.assert_allclose(second, -2 * u * PARAMS.alpha**2 * one * g, atol=1e-12)


def test_without_a_shift_it_is_odd_and_bounded_by_the_scale():
    method = nj.Derf(use_bias=False, alpha_init=3.0)
    params, state = method.init(None, 5)
    y, z = (method.apply(params, state, jnp.asarray(s * X), train=False)[0] for s in (1, -1))
    np.testing.assert_array_equal(y, -z)
    assert np.abs(y).max() <= 1


@pytest.mark.parametrize("field", ["alpha_init", "shift_init"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), "half", True])
def test_fields_are_finite_numbers(field, value):
    with pytest.raises(ValueError, match=rf"Derf: {field}=.* is not a finite number"):
        nj.Derf(**{field: value})
