"""Compiled training and evaluation of one network, for several seeds one after the other."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from benchmarks.data import Data
from normjax import optim

EVALUATION_BATCH = 256


class Inputs(NamedTuple):
    """A data set, all of it on the device; what is evaluated in batches, padded by labels of -1."""

    train_images: jax.Array  # u8[N, H, W, C]
    train_labels: jax.Array  # i32[N]
    test_images: jax.Array  # u8[K, B, H, W, C]
    test_labels: jax.Array  # i32[K, B]
    mean: jax.Array  # f32[1, 1, 1, C], of the train pixels
    std: jax.Array  # f32[1, 1, 1, C]
    validation_images: jax.Array | None = None  # u8[J, B, H, W, C]
    validation_labels: jax.Array | None = None  # i32[J, B]


class State(NamedTuple):
    """All that a run is made of, with a leading axis of seeds."""

    params: Any
    batch_stats: Any
    opt_state: Any
    seed: jax.Array  # i32: with `epoch` the source of all random numbers
    epoch: jax.Array  # i32: epochs done
    train_loss: jax.Array  # f32[epochs], mean over the epoch's steps; NaN where not reached
    test_loss: jax.Array  # f32[epochs]
    correct: jax.Array  # i32[epochs], right answers on the test set


class Program(NamedTuple):
    """Compiled functions of all seeds; `train` runs one epoch, `evaluate` the whole test set."""

    init: Callable[[jax.Array], State]
    train: Callable[[State, Inputs], State]
    evaluate: Callable[[State, Inputs], State]


def put(data: Data) -> Inputs:
    """`data` on the default device."""
    apart = data.validation_images, data.validation_labels
    kept = (None, None) if apart[1] is None else _batches(*apart)
    mean, std = _pixel_moments(data.train_images)
    return Inputs(
        jnp.asarray(data.train_images),
        jnp.asarray(data.train_labels),
        *_batches(data.test_images, data.test_labels),
        jnp.asarray(mean.reshape(1, 1, 1, -1), jnp.float32),
        jnp.asarray(np.where(std == 0, 1, std).reshape(1, 1, 1, -1), jnp.float32),
        *kept,
    )


def _batches(images, labels):
    """Equal batches, the last one padded by labels of -1."""
    number = -(-len(labels) // EVALUATION_BATCH)
    size = -(-len(labels) // number)
    missing = number * size - len(labels)
    images = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
    labels = np.pad(labels, (0, missing), constant_values=-1)
    return (
        jnp.asarray(images.reshape(number, size, *images.shape[1:])),
        jnp.asarray(labels.reshape(number, size)),
    )


def shapes(network: nn.Module, inputs: Inputs, batch_size: int) -> Any:
    """Shapes of the parameters, after a step in training mode has been traced for errors."""
    images = jnp.zeros((batch_size, *inputs.train_images.shape[1:]))

    def once(key):
        variables = network.init(key, images, train=False)
        forward(network, variables["params"], variables.get("batch_stats", {}), images, key)
        return variables["params"]

    return jax.eval_shape(once, jax.random.key(0))


def compile(
    network: nn.Module,
    inputs: Inputs,
    *,
    seeds: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    augment: bool = False,
    flip: bool = False,
    initial: Callable[[Any], Any] = lambda params: params,
    after: Sequence[optax.GradientTransformation] = (),
    loss: Callable[..., tuple[jax.Array, Any]] | None = None,
) -> Program:
    """Compiles a run: SGD with Nesterov momentum, warm-up and cosine, weight decay on kernels.

    For a seed, every method sees the same initial weights of the layers around it, order of the
    batches and augmentation. An epoch drops its last partial batch; evaluation has all images.

    Args:
      network: called with (images, train=...).
      inputs: the data set.
      seeds: length of the leading axis of the state.
      epochs: length of the schedule.
      batch_size: at most the number of train images.
      learning_rate: the highest of the schedule.
      augment: crop train images at random from ones padded by an eighth of their height.
      flip: mirror half of the train images.
      initial: the parameters to start from, made of the network's own.
      after: transformations of the updates behind the optimizer.
      loss: called with (params, batch_stats, images, labels, key, inputs), of which the images are
        u8[N, H, W, C]; returns the loss and new batch_stats. None: cross-entropy in training mode.
    """
    steps = len(inputs.train_labels) // batch_size
    total = steps * epochs
    optimizer = optax.chain(sgd(learning_rate, total), *after)

    def plain_loss(params, batch_stats, images, labels, key, inputs):
        logits, new = forward(network, params, batch_stats, scale(images, inputs), key)
        return cross_entropy(logits, labels).mean(), new

    differentiated = jax.value_and_grad(loss or plain_loss, has_aux=True)

    def start(seed):
        images = jnp.zeros((1, *inputs.train_images.shape[1:]))
        variables = network.init(_key(seed, 0), images, train=False)
        params = initial(variables["params"])
        unknown = jnp.full(epochs, jnp.nan)
        return State(
            params=params,
            batch_stats=variables.get("batch_stats", {}),
            opt_state=optimizer.init(params),
            seed=seed,
            epoch=jnp.int32(0),
            train_loss=unknown,
            test_loss=unknown,
            correct=jnp.full(epochs, -1),
        )

    def train(state, inputs):
        def step(carry, batch):
            params, batch_stats, opt_state = carry
            indices, key = batch
            images, labels = inputs.train_images[indices], inputs.train_labels[indices]
            if augment:
                images = _augment(key, images, images.shape[1] // 8, flip)
            (value, batch_stats), grads = differentiated(
                params, batch_stats, images, labels, key, inputs
            )
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), batch_stats, opt_state), value

        order_key, steps_key = jax.random.split(_key(state.seed, 1 + state.epoch))
        order = jax.random.permutation(order_key, len(inputs.train_labels))
        batches = order[: steps * batch_size].reshape(steps, batch_size)
        carry = state.params, state.batch_stats, state.opt_state
        carry, losses = lax.scan(step, carry, (batches, jax.random.split(steps_key, steps)))
        return state._replace(
            params=carry[0],
            batch_stats=carry[1],
            opt_state=carry[2],
            epoch=state.epoch + 1,
            train_loss=state.train_loss.at[state.epoch].set(losses.mean()),
        )

    def evaluate(state, inputs):
        def batch(images, labels):
            images = scale(images, inputs)
            logits, _ = forward(network, state.params, state.batch_stats, images, train=False)
            losses = jnp.where(labels >= 0, cross_entropy(logits, labels), 0.0)
            return losses.sum(), jnp.sum(logits.argmax(-1) == labels)

        losses, correct = lax.map(lambda b: batch(*b), (inputs.test_images, inputs.test_labels))
        number = jnp.sum(inputs.test_labels >= 0)
        return state._replace(
            test_loss=state.test_loss.at[state.epoch - 1].set(losses.sum() / number),
            correct=state.correct.at[state.epoch - 1].set(correct.sum()),
        )

    def for_seeds(function):
        return jax.jit(lambda state, *inputs: lax.map(lambda s: function(s, *inputs), state))

    first = for_seeds(start).lower(jnp.arange(seeds))
    rest = (for_seeds(f).lower(first.out_info, inputs).compile() for f in (train, evaluate))
    return Program(first.compile(), *rest)


def sgd(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Nesterov momentum with warm-up and cosine up to `learning_rate`, weight decay on kernels."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 20, steps)
    return optax.chain(
        optax.add_decayed_weights(5e-4, mask=_kernels),
        optax.sgd(schedule, momentum=0.9, nesterov=True),
    )


def validation_accuracy(network: nn.Module, state: State, inputs: Inputs) -> np.ndarray:
    """Share of right answers on the validation images, f[seeds]."""
    return _accuracy(network, state, inputs, (inputs.validation_images, inputs.validation_labels))


def train_accuracy(
    network: nn.Module, state: State, inputs: Inputs, *, batch_size: int, train: bool
) -> np.ndarray:
    """Share of right answers on train images as they are, with the labels trained on, f[seeds].

    The images come in batches of one random order for all seeds, without the last partial one. With
    `train` the network normalizes and draws as in training, and learns nothing.
    """
    number = len(inputs.train_labels) // batch_size
    order = np.random.default_rng(0).permutation(len(inputs.train_labels))
    order = order[: number * batch_size].reshape(number, batch_size)
    batches = inputs.train_images[order], inputs.train_labels[order]
    return _accuracy(network, state, inputs, batches, train=train)


def _accuracy(network, state, inputs, batches, train=False):
    def of_seed(state):
        def right(batch):
            index, images, labels = batch
            key = jax.random.fold_in(_key(state.seed, 1 + state.epoch), index) if train else None
            images = scale(images, inputs)
            logits, _ = forward(network, state.params, state.batch_stats, images, key, train=train)
            return jnp.sum(logits.argmax(-1) == labels)

        return lax.map(right, (jnp.arange(len(batches[0])), *batches)).sum()

    right = jax.jit(lambda state: lax.map(of_seed, state))(state)
    return np.asarray(right) / np.sum(np.asarray(batches[1]) >= 0)


def _pixel_moments(images):
    """Mean and standard deviation per channel, without all the images as floats at once."""
    number = images[..., 0].size
    total = squares = np.int64(0)
    for part in np.array_split(images, -(-len(images) // 1024)):
        pixels = part.reshape(-1, images.shape[-1]).astype(np.int64)
        total, squares = total + pixels.sum(0), squares + (pixels**2).sum(0)
    mean = total / number
    return mean, np.sqrt(np.maximum(squares / number - mean**2, 0))


def _key(seed, use):
    # The initial draws compile in a tenth of the time that the default generator takes.
    return jax.random.fold_in(jax.random.key(seed, impl="rbg"), use)


def forward(
    network: nn.Module,
    params: Any,
    batch_stats: Any,
    images: jax.Array,
    key: jax.Array | None = None,
    *,
    train: bool = True,
    **inputs: Any,
) -> tuple[jax.Array, Any]:
    """Logits f32[N, classes], and the running statistics, which move with `train` alone.

    `key` is for methods that draw in training, `inputs` are what the network takes besides images.
    """
    variables = {"params": params, "batch_stats": batch_stats}
    if not train:
        logits: Any = network.apply(variables, images, train=False, **inputs)
        return logits, batch_stats
    rngs = {} if key is None else {"ghost": key}
    logits, new = network.apply(
        variables, images, train=True, mutable=["batch_stats"], rngs=rngs, **inputs
    )
    return logits, new.get("batch_stats", {})


def scale(images: jax.Array, inputs: Inputs) -> jax.Array:
    """Images with every channel at mean zero and variance one over the train pixels, float32."""
    return (images.astype(jnp.float32) - inputs.mean) / inputs.std


def _augment(key, images, pad, flip):
    number, height, width, _ = images.shape
    bits = jax.random.bits(key, (3, number, 1))  # every further draw compiles for a second
    shift = (bits % (2 * pad + 1)).astype(jnp.int32)
    rows = shift[0] + jnp.arange(height)[None]
    columns = shift[1] + jnp.arange(width)[None]
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    which = jnp.arange(number)[:, None, None]
    images = padded[which, rows[:, :, None], columns[:, None, :]]
    if not flip:
        return images
    mirrored = bits[2, :, :, None, None] % 2 == 1
    return jnp.where(mirrored, images[:, :, ::-1], images)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Loss of each image, f32[N]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


_kernels = functools.partial(optim.decay_mask, labels=["kernel"])
