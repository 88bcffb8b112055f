"""Small DCGANs that take their normalization from methods, their training, and what is measured."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import normjax as nj
from benchmarks import models
from normjax.core.method import traits
from normjax.kernels import over
from normjax.linen import Norm, NormalizedKernels

KERNEL = nn.initializers.he_normal()
QUARTER = nn.initializers.variance_scaling(8.0, "fan_in", "truncated_normal")
FEATURES = 64  # of the classifier
NOT_FINITE = "not finite"
VANISHED = 1e-3  # of the discriminator's loss, and of the generator's gradient beside its largest


class Transposed(nn.Module):
    """A transposed convolution of window 4 and stride 2, as `nn.ConvTranspose` without bias.

    An output sees a quarter of the window: four products of patches and a part of the kernel, for
    the reason that `models.conv_by_patches` has.

    Attributes:
      features: channels of the output.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, 2H, 2W, features] of [N, H, W, C]."""
        number, height, width, channels = x.shape
        kernel = self.param("kernel", QUARTER, (4, 4, channels, self.features))
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))

        def phase(i, j):
            window = padded[:, i : i + height + 1, j : j + width + 1]
            return models.conv_by_patches(window, kernel[i::2, j::2], (1, 1), "VALID")

        y = jnp.stack([jnp.stack([phase(i, j) for j in (0, 1)], 3) for i in (0, 1)], 2)
        return y.reshape(number, 2 * height, 2 * width, self.features)


@dataclasses.dataclass(frozen=True)
class Block:
    """Makes layers with a norm and an activation, in the compact method of a network.

    With strict weight norm activations are `TPReLU`, and the last layer has weight norm with scale
    and bias (Xiang & Li 2017). A bias is where no norm of activations follows.

    Attributes:
      method: a method over activations or over kernels, or None.
      activation: without strict weight norm.
      labels: classes i32[N], for methods that take conditions.
      train: whether statistics are those of the batch.
    """

    method: Any
    activation: Callable[[jax.Array], jax.Array]
    labels: jax.Array
    train: bool

    def __call__(
        self, layer: nn.Module, x: jax.Array, *, strides: int = 1, plain: bool = False
    ) -> jax.Array:
        """A hidden layer; `strides` are those of a transposed convolution, `plain`: no norm."""
        method, strict = self.method, isinstance(self.method, nj.StrictWeightNorm)
        if isinstance(method, nj.StrictWeightNorm | nj.WeightNorm):
            method = dataclasses.replace(method, strides=strides)
        x, name = _apply(layer, x, method), layer.name
        normalized = method is not None and not over(method) and not plain
        if normalized:
            given = {"condition": self.labels} if "condition" in traits(method).inputs else {}
            norm = Norm(method, name=f"{name}_norm")
            x = norm(x, use_running_average=not self.train, **given)
        elif not strict:
            x = _bias(x, name)
        if strict:
            return Norm(nj.TPReLU(), name=f"{name}_activation")(x)
        return self.activation(x)

    def last(self, layer: nn.Module, x: jax.Array) -> jax.Array:
        """A layer with a bias and nothing behind it."""
        method = self.method
        if isinstance(method, nj.StrictWeightNorm):
            method = nj.WeightNorm()
        return _bias(_apply(layer, x, method), layer.name)


def _apply(layer: Any, x: jax.Array, method: Any) -> jax.Array:
    if method is None or not over(method):
        return layer(x)
    return NormalizedKernels(layer, method, name=f"{layer.name}_kernel")(x)


def _bias(x, name):
    return Norm(nj.Affine(use_scale=False), name=f"{name}_bias")(x)


def _dense(features, name):
    return nn.Dense(features, use_bias=False, kernel_init=KERNEL, name=name)


def halvings(height: int, width: int) -> int:
    """How often the networks halve the size of an image: up to four times, to no less than 2.

    ValueError for images of odd size.
    """
    found = 0
    while found < 4 and min(height, width) >= 4 and height % 2 == width % 2 == 0:
        height, width, found = height // 2, width // 2, found + 1
    if not found:
        raise ValueError(f"images of {height} x {width}: both need to be even, and at least 4")
    return found


class Maps(nn.Module):
    """A dense layer from codes to maps: norms see all positions of a feature.

    Attributes:
      shape: of a map, (H, W, features).
    """

    shape: tuple[int, int, int]

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        """[N, H, W, features] of [N, L]."""
        return _dense(math.prod(self.shape), "dense")(z).reshape(len(z), *self.shape)


class Generator(nn.Module):
    """Images in [-1, 1] from codes, by transposed convolutions.

    Attributes:
      method: as in `Block`.
      shape: of an image, (H, W, C).
      width: channels of the largest hidden map; a map of half the size has twice as many.
      classes: number of classes, or None for images of all; methods without a condition get the
        class as a part of the code.
    """

    method: Any
    shape: tuple[int, ...]
    width: int
    classes: int | None = None

    @nn.compact
    def __call__(self, z: jax.Array, labels: jax.Array, *, train: bool) -> jax.Array:
        """f32[N, H, W, C] of codes f32[N, L] and classes i32[N]."""
        height, width, channels = self.shape
        levels = halvings(height, width)
        block = Block(self.method, nn.relu, labels, train)
        told = self.method is not None and "condition" in traits(self.method).inputs
        if self.classes is not None and not told:
            z = jnp.concatenate([z, jax.nn.one_hot(labels, self.classes)], 1)
        height, width = height >> levels, width >> levels
        features = self.width << (levels - 1)
        x = block(Maps((height, width, features), name="code"), z)
        for level in range(1, levels):
            x = block(Transposed(features >> level, name=f"up_{level}"), x, strides=2)
        x = block.last(Transposed(channels, name=f"up_{levels}"), x)
        return jnp.tanh(x)


class Discriminator(nn.Module):
    """Logits of being an image of the data, by convolutions; without a norm in the first layer.

    Attributes:
      method: as in `Block`.
      width: channels of the first map; a map of half the size has twice as many.
      classes: number of classes, which are told by projection (Miyato & Koyama 2018); or None.
    """

    method: Any
    width: int
    classes: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, labels: jax.Array, *, train: bool) -> jax.Array:
        """f32[N] of images f32[N, H, W, C] and classes i32[N]."""
        block = Block(self.method, lambda x: nn.leaky_relu(x, 0.2), labels, train)
        for level in range(halvings(*x.shape[1:3])):
            layer = models.conv(self.width << level, 4, 2, f"down_{level + 1}")
            x = block(layer, x, plain=level == 0)
        x = x.reshape(len(x), -1)
        logits = block.last(_dense(1, "head"), x)[:, 0]
        if self.classes is None:
            return logits
        zeros = nn.initializers.zeros
        rows = nn.Embed(self.classes, x.shape[1], embedding_init=zeros, name="classes")(labels)
        return logits + jnp.sum(rows * x, 1)


class State(NamedTuple):
    """What training moves."""

    generator: Any  # variables
    discriminator: Any
    optimizers: tuple[Any, Any]


class History(NamedTuple):
    """Of a step, or means over steps."""

    discriminator_loss: jax.Array
    generator_loss: jax.Array
    gradient: jax.Array  # L2 norm of that of the generator


class Gan(NamedTuple):
    """Two networks and how they are trained, by the non-saturating logistic loss."""

    generator: Generator
    discriminator: Discriminator
    latent: int
    batch_size: int
    optimizer: optax.GradientTransformation

    def init(self, key: jax.Array) -> State:
        """The start of a run."""
        keys, labels = jax.random.split(key), jnp.zeros(1, jnp.int32)
        z, x = jnp.zeros((1, self.latent)), jnp.zeros((1, *self.generator.shape))
        first = self.generator.init(keys[0], z, labels, train=False)
        second = self.discriminator.init(keys[1], x, labels, train=False)
        start = self.optimizer.init
        return State({**first}, {**second}, (start(first["params"]), start(second["params"])))

    def generate(self, state: State, z: jax.Array, labels: jax.Array) -> jax.Array:
        """Images of codes, in evaluation mode."""
        images: Any = self.generator.apply(state.generator, z, labels, train=False)
        return images

    def step(
        self, state: State, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> tuple[State, History]:
        """A step of the discriminator, then one of the generator, on a batch drawn by `key`."""
        keys = jax.random.split(key, 5)
        index = jax.random.randint(keys[0], (self.batch_size,), 0, len(images))
        real, labels = images[index], labels[index]
        z = jax.random.normal(keys[1], (2, self.batch_size, self.latent))
        generator = _move(self.generator, state.generator, z[0], labels)
        discriminator = _move(self.discriminator, state.discriminator, real, labels)

        fake, _ = _train(self.generator, generator, generator["params"], z[0], labels, keys[2])

        def first_loss(params):
            on_real, new = _train(self.discriminator, discriminator, params, real, labels, keys[3])
            on_fake, new = _train(self.discriminator, new, params, fake, labels, keys[4])
            return jnp.mean(nn.softplus(-on_real) + nn.softplus(on_fake)), new

        discriminator, second, first_value, _ = self._descend(
            first_loss, discriminator, state.optimizers[1]
        )

        def second_loss(params):
            fake, new = _train(self.generator, generator, params, z[1], labels, keys[3])
            fixed = discriminator["params"]
            on_fake, _ = _train(self.discriminator, discriminator, fixed, fake, labels, keys[4])
            return jnp.mean(nn.softplus(-on_fake)), new

        generator, first, second_value, slope = self._descend(
            second_loss, generator, state.optimizers[0]
        )
        history = History(first_value, second_value, optax.tree.norm(slope))
        return State(generator, discriminator, (first, second)), history

    def _descend(self, loss, variables, optimizer):
        (value, new), slope = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, optimizer = self.optimizer.update(slope, optimizer, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return {**new, "params": params}, optimizer, value, slope

    def train(
        self, state: State, images: jax.Array, labels: jax.Array, keys: jax.Array
    ) -> tuple[State, History]:
        """A step for each key, and the means of their history."""
        step = lambda state, key: self.step(state, images, labels, key)
        state, history = lax.scan(step, state, keys)
        return state, jax.tree.map(jnp.mean, history)


def _train(network, variables, params, x, labels, key):
    """The output in training mode, and the variables with new running statistics."""
    given = {**variables, "params": params}
    how = {"train": True, "mutable": ["batch_stats"], "rngs": {"ghost": key}}
    y, new = network.apply(given, x, labels, **how)
    return y, {**variables, **new}


def _move(network, variables, x, labels):
    """The variables with what methods over kernels keep moved by a step."""
    if "kernel_stats" not in variables:
        return variables
    _, new = network.apply(variables, x, labels, train=False, mutable=["kernel_stats"])
    return {**variables, **new}


def failure(history: Sequence[History]) -> str:
    """Why a run has failed, of the means over each of its parts so far; "" if it has not.

    Either a number is not finite, or the discriminator wins: its loss is below `VANISHED`, and the
    generator's gradient below that share of its largest.
    """
    losses, others, slopes = np.array(history, float).T
    if not all(np.isfinite(a).all() for a in (losses, others, slopes)):
        return NOT_FINITE
    won = losses[-1] < VANISHED and slopes[-1] <= VANISHED * slopes.max()
    return "gradient of the generator vanished" if won else ""


class Classifier(nn.Module):
    """Two convolutions and a hidden layer, whose features compare images.

    Attributes:
      classes: number of classes.
    """

    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Features f32[N, FEATURES] and logits f32[N, classes] of images f32[N, H, W, C]."""
        for i, features in enumerate((16, 32)):
            x = models.conv(features, 3, 2, f"conv_{i + 1}")(x)
            x = nn.relu(_bias(x, f"conv_{i + 1}"))
        x = nn.relu(nn.Dense(FEATURES, name="hidden")(x.reshape(len(x), -1)))
        return x, nn.Dense(self.classes, name="head")(x)

    def fit(self, images: jax.Array, labels: jax.Array, steps: int) -> Any:
        """Variables after so many steps of Adam on batches of 64, the same in every run."""
        optimizer = optax.adam(1e-3)

        def loss(variables, index):
            made: Any = self.apply(variables, images[index])
            each = optax.softmax_cross_entropy_with_integer_labels(made[1], labels[index])
            return jnp.mean(each)

        def step(carry, key):
            variables, state = carry
            slope = jax.grad(loss)(variables, jax.random.randint(key, (64,), 0, len(images)))
            updates, state = optimizer.update(slope, state, variables)
            return (optax.apply_updates(variables, updates), state), None

        @jax.jit
        def run():
            first, rest = jax.random.split(jax.random.key(0, impl="rbg"))
            variables = self.init(first, images[:1])
            carry = variables, optimizer.init(variables)
            return lax.scan(step, carry, jax.random.split(rest, steps))[0][0]

        return run()


def frechet(one: np.ndarray, two: np.ndarray) -> float:
    """The Frechet distance of Gaussians with the moments of features [N, F] and [M, F].

    `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`, Heusel et al. 2017,
    https://arxiv.org/abs/1706.08500; not finite if a feature is not.
    """
    one, two = np.asarray(one, float), np.asarray(two, float)
    if not (np.isfinite(one).all() and np.isfinite(two).all()):
        return float("nan")
    first, second = np.cov(one.T), np.cov(two.T)
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ second @ root), 0)).sum()
    gap = np.sum((one.mean(0) - two.mean(0)) ** 2)
    return float(max(gap + np.trace(first) + np.trace(second) - 2 * cross, 0.0))
