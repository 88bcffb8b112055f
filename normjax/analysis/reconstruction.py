"""How well a generator can make images that it has not seen: its latent reconstruction error.

Xiang & Li, *On the Effects of Batch and Weight Normalization in Generative Adversarial Networks*,
2017, https://arxiv.org/abs/1704.03971, section 4: for every test image the code is searched that
makes the image with the least mean squared error, by RMSprop on the code alone. A generator that
leaves out a part of the data, or whose samples are blurred, has a large error.

The public implementation starts at zero and takes RMSprop with decay 0.9, epsilon 1e-6 and learning
rate 0.01, 50 steps while a network is in training and more at its end. It averages the loss over a
batch, which makes gradients smaller beside the epsilon, and keeps the best step of the whole; here
every image has a search and a best step of its own. With the constant rate the last steps hover
about the minimum; a schedule that decays comes closer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from normjax.core import checks
from normjax.core.passes import widen


class Reconstruction(NamedTuple):
    """What `reconstruct` finds for N images, in at least float32.

    An error is the mean of the squared differences of an image. One that is not finite counts in
    the curve, and is never the least.

    Example:
      >>> import jax.numpy as jnp, normjax.analysis.reconstruction as reconstruction
      >>> found = reconstruction.reconstruct(jnp.sin, jnp.full((5, 2), 0.5), latent=2, steps=100)
      >>> found.curve.shape, found.errors.shape, found.codes.shape
      ((101,), (5,), (5, 2))
    """

    curve: jax.Array  # [steps + 1], mean error of all images at the start and after each step
    errors: jax.Array  # [N], the least error of each image at any step; inf if none is finite
    codes: jax.Array  # [N, latent], the codes that have it


def reconstruct(
    generate: Callable[..., jax.Array],
    images: jax.Array,
    *inputs: Any,
    latent: int,
    steps: int,
    learning_rate: optax.ScalarOrSchedule = 0.01,
    key: Any = None,
    chunk: int | None = None,
) -> Reconstruction:
    """The error with which `generate` makes each of `images`, by a search for its code.

    Works under `jax.jit`; the generator is not changed. Its batches are of one image, mapped by
    `jax.vmap`: it must be in evaluation mode, for a batch of one has no statistics.

    Args:
      generate: `generate(codes, *inputs)` with codes [1, latent] returns images [1, ...].
      images: real numbers [N, ...], N > 0.
      *inputs: trees of arrays with N rows, what the generator takes besides, such as classes.
      latent: length of a code.
      steps: of the search.
      learning_rate: a number or a schedule of optax.
      key: None starts at codes of zero, a key at draws of the normal distribution.
      chunk: how many images are searched for at once; None: all. Changes memory and time alone.

    Raises:
      ValueError: for a number outside its range; for images of another shape than those made.
      TypeError: for images that are not real numbers.

    Example:
      >>> import jax.numpy as jnp, normjax.analysis.reconstruction as reconstruction
      >>> circle = lambda z: jnp.concatenate([jnp.cos(z), jnp.sin(z)], 1)
      >>> images = jnp.array([[0.0, 1.0], [0.0, 2.0]])
      >>> found = reconstruction.reconstruct(circle, images, latent=1, steps=300)
      >>> found.errors.round(2).tolist(), found.codes[:, 0].round(1).tolist()
      ([0.0, 0.5], [1.600000023841858, 1.600000023841858])
    """
    images = _images(images, latent, steps, chunk)
    codes = jnp.zeros((len(images), latent), images.dtype)
    if key is not None:
        codes = jax.random.normal(checks.require_key("reconstruct", key), codes.shape, codes.dtype)
    optimizer = optax.rmsprop(learning_rate, decay=0.9, eps=1e-6, eps_in_sqrt=False)

    def search(row):
        return _search(generate, optimizer, steps, *row)

    curves, errors, found = lax.map(
        search, (images, codes, inputs), batch_size=chunk or len(images)
    )
    return Reconstruction(jnp.mean(curves, 0), errors, found)


def _images(images, latent, steps, chunk):
    """The images as wide real numbers, and the arguments checked."""
    for name, value in (("latent", latent), ("steps", steps)):
        checks.require("reconstruct", name, value, checks.positive)
    checks.require("reconstruct", "chunk", chunk, checks.optional(checks.positive))
    images = widen(checks.as_real("reconstruct", images, "the images have"))
    if images.ndim < 2 or not images.size:
        raise ValueError(f"reconstruct: images of shape {images.shape}, but [N, ...], not empty.")
    return images


def _search(generate, optimizer, steps, image, code, inputs):
    """Errors [steps + 1] of one image, the least of them, and its code."""
    inputs = jax.tree.map(lambda a: a[None], inputs)

    def error(code):
        made = generate(code[None], *inputs)
        if made.shape != (1, *image.shape):
            raise ValueError(
                f"reconstruct: generate makes {made.shape} of a code, but the images are "
                f"{(1, *image.shape)}: they need the same shape."
            )
        return jnp.mean(jnp.square(widen(made[0]) - image))

    def better(found, best, code):
        smaller = found < best[0]
        return jnp.where(smaller, found, best[0]), jnp.where(smaller, code, best[1])

    def step(carry, _):
        code, state, best = carry
        found, slope = jax.value_and_grad(error)(code)
        updates, state = optimizer.update(slope, state, code)
        best = better(found, best, code)
        return (optax.apply_updates(code, updates), state, best), found

    start = jnp.full((), jnp.inf, image.dtype), code
    carry, curve = lax.scan(step, (code, optimizer.init(code), start), length=steps)
    code, _, best = carry
    last = error(code)
    return jnp.append(curve, last), *better(last, best, code)


def pca_floor(train: jax.Array, test: jax.Array, *, latent: int) -> jax.Array:
    """The error [N] of each of `test` [N, ...] for the best linear code of that length.

    The code is that of principal components: the mean and the first `latent` right singular vectors
    of all of `train` [M, ...], exactly, in at least float32. No affine generator has a smaller mean
    error on `train`; a curved one may. An error is the mean of the squared differences.

    ValueError for images of unequal shapes or none, and for more components than pixels or than
    images but one; TypeError for images that are not real numbers.

    Example:
      >>> import jax.numpy as jnp, normjax.analysis.reconstruction as reconstruction
      >>> train = jnp.array([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]])
      >>> reconstruction.pca_floor(train, jnp.array([[7.0, 3.0]]), latent=1).tolist()
      [2.0]
    """
    checks.require("pca_floor", "latent", latent, checks.positive)
    train, test = (widen(checks.as_real("pca_floor", a, "the images have")) for a in (train, test))
    if train.ndim < 2 or train.shape[1:] != test.shape[1:] or not train.size or not test.size:
        raise ValueError(
            f"pca_floor: images of shapes {train.shape} and {test.shape}, but [M, ...] and "
            "[N, ...], alike but for their numbers and not empty."
        )
    train, test = (a.reshape(len(a), -1) for a in (train, test))
    most = min(len(train) - 1, train.shape[1])
    if latent > most:
        raise ValueError(
            f"pca_floor: latent={latent}, but {len(train)} images of {train.shape[1]} numbers have "
            f"at most {most} components."
        )
    mean = jnp.mean(train, 0, keepdims=True)
    components = jnp.linalg.svd(train - mean, full_matrices=False)[2][:latent]
    product = lambda a, b: jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
    rest = test - mean
    rest = rest - product(product(rest, components.T), components)
    return jnp.mean(jnp.square(rest), 1)


__all__ = ["Reconstruction", "pca_floor", "reconstruct"]
