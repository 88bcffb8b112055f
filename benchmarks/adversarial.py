"""Adversarial training with batch norms of two branches: `python -m benchmarks.adversarial`.

The claims of Gong et al. 2022 (https://arxiv.org/abs/2102.11382) and Xie et al. 2020
(https://arxiv.org/abs/1911.09665) on a small residual network: statistics of their own for clean
and attacked images keep the accuracy on clean images, and raise that on attacked ones; an affine
map that both branches share raises it further. A step makes attacked images of a batch, passes the
clean ones through branch 0 and the attacked ones through branch 1, and descends the mean of both
losses. Plain batch norm has one branch for both passes.

The attack is projected gradient descent (Madry et al. 2018, https://arxiv.org/abs/1706.06083) in
the ball of the largest norm, with steps of a quarter of its radius from a random start, on pixels
in [0, 1]. In training it attacks the adversarial branch. `--attack-statistics` says with which
statistics: "evaluate" takes the running ones and moves none, so that they are those of the images
that the network learns from; "train" takes those of the batch and moves the running ones with every
step, as the public implementation does (VITA-Group/Sandwich-Batch-Normalization, `Adv`). In the
test each branch meets an attack on itself, with running statistics.

Interrupted, the same command goes on with the first seed that is not stored. All methods share
data, initial weights of the layers around the norms and order of batches; differences are paired by
seed.
"""

import argparse
import functools
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import normjax as nj
from benchmarks import data, machine, models, report, training
from benchmarks.options import fraction, rate, whole
from normjax.core.method import traits
from normjax.linen import Norm

METHODS = {
    type(method).__name__: method
    for method in (
        nj.BatchNorm(momentum=0.9),
        nj.AuxBatchNorm(momentum=0.9),
        nj.SandwichAuxBatchNorm(momentum=0.9),
    )
}
BRANCHES = ("clean", "adversarial")
TOP = {"digits": 16}  # the largest value of a pixel, where it is not 255


class Attack(NamedTuple):
    """How images are attacked: radius of the ball on pixels in [0, 1], steps, and mode.

    With `train` the network normalizes and moves running statistics as in training.
    """

    epsilon: float
    steps: int
    train: bool = False


def pgd(
    forward: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
    x: jax.Array,
    labels: jax.Array,
    state: Any,
    key: jax.Array,
    *,
    epsilon: float,
    steps: int,
) -> tuple[jax.Array, Any]:
    """Images near `x` with a higher loss, and the state that the passes leave.

    Args:
      forward: logits f32[N, classes] and new state of images and state.
      x: images f32[N, H, W, C] in [0, 1].
      labels: i32[N].
      state: what the first pass begins with.
      key: of the random start.
      epsilon: largest change of a pixel; a step is a quarter of it.
      steps: how many.
    """

    def inside(moved):
        return jnp.clip(jnp.clip(moved, x - epsilon, x + epsilon), 0, 1)

    def loss(attacked, state):
        logits, state = forward(attacked, state)
        return training.cross_entropy(logits, labels).sum(), state

    def step(_, carry):
        attacked, state = carry
        slope, state = jax.grad(loss, has_aux=True)(attacked, state)
        return inside(attacked + epsilon / 4 * jnp.sign(slope)), state

    start = inside(x + jax.random.uniform(key, x.shape, x.dtype, -epsilon, epsilon))
    return lax.fori_loop(0, steps, step, (start, state))


def networks(method: Any, classes: int, width: int) -> list[nn.Module]:
    """The same residual network with the norms of each branch; one for a method without any."""
    branches: list[dict[str, int]] = [{}]
    if "branch" in traits(method).inputs:
        branches = [{"branch": branch} for branch in range(len(BRANCHES))]

    def norm(name, inputs):
        return functools.partial(Norm(method, name=name), **inputs)

    return [models.Residual(functools.partial(norm, inputs=b), classes, width) for b in branches]


def training_loss(branches: Sequence[nn.Module], top: int, attack: Attack) -> Callable[..., Any]:
    """The mean of the losses on clean and on attacked images, for `training.compile`.

    The first of the networks gets the clean images; the last one is attacked and gets the others.
    """

    def loss(params, batch_stats, images, labels, key, inputs):
        x = images / jnp.float32(top)
        attacked, batch_stats = attack_of(
            branches[-1], attack, top, inputs, lax.stop_gradient(params), batch_stats, x, labels, key
        )
        value = jnp.float32(0)
        for network, shown in ((branches[0], x), (branches[-1], attacked)):
            seen = training.scale(shown * top, inputs)
            logits, batch_stats = training.forward(network, params, batch_stats, seen)
            value += training.cross_entropy(logits, labels).mean() / 2
        return value, batch_stats

    return loss


def attack_of(network, attack, top, inputs, params, batch_stats, x, labels, key):
    """`pgd` on one branch; images x f32[N, H, W, C] are in [0, 1]."""

    def forward(x, batch_stats):
        seen = training.scale(x * top, inputs)
        return training.forward(network, params, batch_stats, seen, train=attack.train)

    how = dict(epsilon=attack.epsilon, steps=attack.steps)
    return pgd(forward, x, labels, batch_stats, key, **how)


def accuracies(
    branches: Sequence[nn.Module], top: int, attack: Attack
) -> Callable[..., dict[str, jax.Array]]:
    """A function of a state of one seed and the inputs: shares of right answers f32[branches].

    "clean" are those on the test images, "attacked" those on images attacked for the same branch.
    """

    @jax.jit
    def measure(state, inputs):
        seed, params, batch_stats = (
            jax.tree.map(lambda a: a[0], part)
            for part in (state.seed, state.params, state.batch_stats)
        )

        def right(network, batch):
            index, images, labels = batch
            x, key = images / jnp.float32(top), jax.random.fold_in(jax.random.key(seed), index)
            attacked, _ = attack_of(
                network, attack, top, inputs, params, batch_stats, x, labels, key
            )
            found = {}
            for name, shown in (("clean", x), ("attacked", attacked)):
                seen = training.scale(shown * top, inputs)
                logits, _ = training.forward(network, params, batch_stats, seen, train=False)
                found[name] = jnp.sum(logits.argmax(-1) == labels)
            return found

        batches = jnp.arange(len(inputs.test_labels)), inputs.test_images, inputs.test_labels
        number = jnp.sum(inputs.test_labels >= 0)
        each = [lax.map(functools.partial(right, network), batches) for network in branches]
        return jax.tree.map(lambda *counts: jnp.stack(counts).sum(1) / number, *each)

    return measure
