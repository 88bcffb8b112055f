"""Latent reconstruction errors, against generators whose best codes are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from agreement import close, draw
from sklearn.decomposition import PCA

from normjax.analysis import reconstruction

N, LATENT = 5, 3
MATRIX = np.linalg.qr(draw(0, 8, LATENT))[0].T * np.array([[1.0], [0.5], [2.0]], "float32")
IMAGES = draw(1, N, 2, 4)
DECAY = optax.exponential_decay(0.1, 20, 0.7)


def linear(z, shift=0.0):
    return (z @ MATRIX + shift).reshape(-1, 2, 4)


def best(shift=0.0):
    """Codes and errors of least squares."""
    wanted = (IMAGES.reshape(N, 8) - shift).astype("float64")
    codes = np.linalg.lstsq(MATRIX.T.astype("float64"), wanted.T)[0].T
    return codes, np.mean((codes @ MATRIX - wanted) ** 2, 1)


@pytest.mark.parametrize("key", [None, jax.random.key(0)])
def test_a_linear_generator(key):
    how = {"latent": LATENT, "steps": 400, "learning_rate": DECAY, "key": key}
    found = jax.jit(lambda x: reconstruction.reconstruct(linear, x, **how))(IMAGES)
    codes, errors = best()
    close(found.codes, codes.astype("float32"), 1e-3)
    close(found.errors, errors.astype("float32"), 1e-5)
    start = np.zeros((N, LATENT)) if key is None else jax.random.normal(key, (N, LATENT))
    first = np.mean((np.asarray(linear(start)) - IMAGES) ** 2)
    close(found.curve[0], np.float32(first), 1e-5)
    close(found.curve[-1], found.errors.mean(), 1e-5)


def test_the_first_steps_are_those_of_rmsprop():
    z, square, curve = np.zeros((N, LATENT)), 0.0, []
    flat = IMAGES.reshape(N, 8)
    for _ in range(4):
        gap = z @ MATRIX - flat
        curve.append(np.mean(gap**2))
        slope = 2 / 8 * gap @ MATRIX.T
        square = 0.9 * square + 0.1 * slope**2
        z = z - 0.01 * slope / (np.sqrt(square) + 1e-6)
    found = reconstruction.reconstruct(linear, IMAGES, latent=LATENT, steps=3)
    close(found.curve, np.array(curve, "float32"), 1e-5)


def test_inputs_and_chunks():
    shift = draw(2, N, 8)
    how = {"latent": LATENT, "steps": 300, "learning_rate": DECAY}
    found = reconstruction.reconstruct(linear, IMAGES, shift, **how)
    close(found.errors, best(shift)[1].astype("float32"), 1e-4)
    parts = reconstruction.reconstruct(linear, IMAGES, shift, chunk=2, **how)
    close(parts.errors, found.errors, 1e-5)
    close(parts.curve[:20], found.curve[:20], 1e-5)


def test_the_best_step_of_each_image_is_kept():
    how = {"latent": 1, "steps": 1, "learning_rate": 2.0}
    targets = jnp.array([[0.1], [9.0]])
    found = reconstruction.reconstruct(lambda z: z, targets, **how)
    close(found.errors, (found.codes - targets)[:, 0] ** 2, 1e-6)
    assert found.errors.mean() < found.curve.min(), "each at another step"
    broken = lambda z: jnp.where(z > 6, jnp.nan, z)
    found = reconstruction.reconstruct(broken, targets, **how)
    assert np.isfinite(found.errors).all() and np.isfinite(found.codes).all()
    assert np.isnan(found.curve[-1])


def test_the_floor_is_that_of_principal_components():
    train, test = draw(3, 40, 3, 2), draw(4, 7, 3, 2)
    pca = PCA(2, svd_solver="full").fit(train.reshape(40, 6).astype("float64"))
    flat = test.reshape(7, 6).astype("float64")
    expected = np.mean((pca.inverse_transform(pca.transform(flat)) - flat) ** 2, 1)
    found = reconstruction.pca_floor(train, test, latent=2)
    close(found, expected.astype("float32"), 1e-5)
    close(reconstruction.pca_floor(train, test, latent=6), np.zeros(7, "float32"), 1e-10)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: reconstruct(steps=0), ValueError, "steps=0 is not a positive integer"),
        (lambda: reconstruct(latent=2.0), ValueError, "latent=2.0 is not a positive integer"),
        (lambda: reconstruct(chunk=0), ValueError, "chunk=0"),
        (lambda: reconstruct(images=np.ones((2, 4, 2))), ValueError, r"makes \(1, 2, 4\) of a"),
        (lambda: reconstruct(images=np.ones((0, 2, 4))), ValueError, "not empty"),
        (lambda: reconstruct(images=np.ones((2, 2, 4), complex)), TypeError, "complex"),
        (lambda: floor(np.ones((3, 4)), np.ones((2, 5))), ValueError, "alike but for their"),
        (lambda: floor(np.ones((2, 4)), np.ones((2, 4))), ValueError, "at most 1 components"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def reconstruct(images=IMAGES, latent=LATENT, steps=1, chunk=None):
    how = {"latent": latent, "steps": steps, "chunk": chunk}
    return reconstruction.reconstruct(linear, images, **how)


def floor(train, test):
    return reconstruction.pca_floor(train, test, latent=2)
