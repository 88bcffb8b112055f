"""The arms of `benchmarks.compare --recipe`: small initial norm scales that move slowly.

Davis & Frank, *Revisiting Batch Norm Initialization*, 2022, https://arxiv.org/abs/2110.13989, and
two controls: a chain of norms undoes every scale but the last, so that a small scale of the last
norm alone, or smaller logits, may do the same.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import normjax as nj
from benchmarks import training
from normjax import optim
from normjax.linen import Norm

METHODS = ("BatchNorm(momentum=0.9)",)  # where --methods names none
ARMS = (
    "g0=0.1 c=100",
    "g0=0.1 c=100 input_norm",
    "g0=0.1 c=100 last",
    "temperature=0.1",
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One arm; the defaults change nothing.

    Attributes:
      g0: factor of the initial scales of the norms.
      c: divisor of their learning rate.
      temperature: factor of the logits.
      last: whether g0 is for the last norm alone.
      input_norm: whether a batch norm takes the place of the moments of the data set.
    """

    g0: float = 1.0
    c: float = 1.0
    temperature: float = 1.0
    last: bool = False
    input_norm: bool = False

    def network(self, network: nn.Module) -> nn.Module:
        """`network` with what stands before and after it; its weights stay the same."""
        if not self.input_norm and self.temperature == 1:
            return network
        return Framed(network, self.input_norm, self.temperature)

    def inputs(self, inputs: training.Inputs) -> training.Inputs:
        """The data, with pixels in [0, 1] for a batch norm of the input."""
        if not self.input_norm:
            return inputs
        largest = inputs.train_images.max().astype(jnp.float32)
        return inputs._replace(mean=0 * inputs.mean, std=jnp.full_like(inputs.std, largest))

    def initial(self, params: Any) -> Any:
        """Parameters to start from, made of those that the network starts from.

        Raises:
          ValueError: if there is no scale to change.
        """
        if self.g0 == self.c == 1:
            return params
        labels = optim.label_parameters(params)
        if self.last:
            norms = [name for name in params if name.startswith("norm_")]
            last = max(norms, key=lambda name: int(name.removeprefix("norm_")))
            others = {name: jax.tree.map(lambda _: "other", params[name]) for name in params}
            labels = others | {last: labels[last]}
        if "norm_scale" not in jax.tree.leaves(labels):
            raise ValueError("the recipe needs norms with a scale")
        return jax.tree.map(lambda k, a: a * self.g0 if k == "norm_scale" else a, labels, params)

    def after(self) -> tuple[optax.GradientTransformation, ...]:
        """What comes after the optimizer."""
        return () if self.c == 1 else (optim.scale_learning_rate(self.c),)


NONE = Recipe()


class Framed(nn.Module):
    """A network with a batch norm before it and a factor after it, in the network's own scope.

    Attributes:
      network: called with (images, train=...).
      input_norm: whether there is the norm.
      temperature: the factor.
    """

    network: nn.Module
    input_norm: bool
    temperature: float

    def setup(self):
        nn.share_scope(self, self.network)
        if self.input_norm:
            scale_init = nj.relu_scale(nn.initializers.ones)
            method = nj.BatchNorm(momentum=0.9, use_bias=False, scale_init=scale_init)
            self.first = Norm(method, name="input_norm")

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """The network's logits times the factor."""
        if self.input_norm:
            x = self.first(x, use_running_average=not train)
        logits: Any = self.network(x, train=train)
        return self.temperature * logits


def parse(text: str) -> Recipe:
    """The arm that words such as `g0=0.1 c=100 last` describe.

    Raises:
      ValueError: naming the word that is unknown or breaks a rule.

    Example:
      >>> parse("g0=0.5 input_norm").g0
      0.5
    """
    kinds = {field.name: type(field.default) for field in dataclasses.fields(Recipe)}
    given = {}
    for word in text.split():
        name, equals, value = word.partition("=")
        if name not in kinds or bool(equals) != (kinds.get(name) is float):
            known = ", ".join(n if k is bool else f"{n}=NUMBER" for n, k in kinds.items())
            raise ValueError(f"unknown word {word!r}; known are {known}")
        if name in given:
            raise ValueError(f"{text!r} says {name} twice")
        given[name] = _positive(word, value) if equals else True
    if not given:
        raise ValueError("an arm without words is the method itself")
    return Recipe(**given)


def _positive(word, text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"{word!r} has no finite number > 0")
    return value


def moved(first: Any, last: Any) -> dict[str, dict[str, list[float]]]:
    """How far the norms' scales and biases went, by label: mean and deviation for each seed.

    Args:
      first: initial parameters with a leading axis of seeds.
      last: trained ones.
    """
    labels = jax.tree.leaves(optim.label_parameters(first))
    steps = jax.tree.leaves(jax.tree.map(jnp.subtract, last, first))
    found = {}
    for label in ("norm_scale", "norm_bias"):
        parts = [
            np.reshape(a, (len(a), -1)) for k, a in zip(labels, steps, strict=True) if k == label
        ]
        if parts:
            all_of_them = np.concatenate(parts, axis=1)
            found[label] = {
                "mean": all_of_them.mean(1).tolist(),
                "deviation": all_of_them.std(1).tolist(),
            }
    return found
