"""Conditional norms in training: `python -m benchmarks.conditional balance`, relations or few-shot.

Three studies with small convolutional networks on handwritten digits, each of whose norms is told a
condition. Arms share data, initial weights of the layers around and order of batches; differences
are paired by seed.

balance: digits turned by 0, 90, 180 and 270 degrees; the condition is the angle. Per angle the norm
of the gradient of its loss (`normjax.analysis.balance`), with a shared affine map in front of those
of the angles or without it (Gong et al. 2022, https://arxiv.org/abs/2102.11382). In "rotations" all
angles are equally hard; in "noisy" pixels get more noise with the angle.

relations: two digits in a field of 2 x 2, and a question such as "is the 3 left of the 7?", which
is the condition. Most pairs of digits are never asked about in training. Conditional batch norm and
group norm on both kinds of pairs (Michalski et al. 2019, https://arxiv.org/abs/1908.00061).

few-shot: prototypical networks whose condition is made from the examples of a task; 5 classes and
one example of each, from digits that training has never shown.
"""

import argparse
import functools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import normjax as nj
from benchmarks import data, machine, models, report, training
from benchmarks.options import whole
from normjax.analysis import balance
from normjax.linen import Norm

LEARNING_RATE = 0.05
ANGLES = 4
NOISE = {"rotations": (0.0, 0.0, 0.0, 0.0), "noisy": (0.0, 0.5, 1.0, 2.0)}  # deviations of pixels
RELATIONS = ("left of", "right of", "above", "below")
CELLS = 2  # along each side of a field
PARTNERS = 3  # of the nine others, with which training asks about a digit
TRAIN_DIGITS, TEST_DIGITS = (0, 1, 4, 6, 8, 9), (2, 3, 5, 7)
TASKS, WAYS, QUERIES = 4, 5, 5  # tasks of a batch, their classes, and images to classify of each
EVALUATIONS = 128  # batches


class Batch(NamedTuple):
    """Standardized images f32[N, H, W, 1], conditions [N] or [N, D], and labels i32[N]."""

    images: jax.Array
    condition: jax.Array
    labels: jax.Array


class Net(nn.Module):
    """Three convolutions, each with a conditional norm and a ReLU.

    Attributes:
      method: the norm, with an input `condition`.
      outputs: how many numbers are made of the last map.
      strides: of the convolutions.
      questions: whether conditions are vectors, which a hidden layer takes before the norms.
    """

    method: Any
    outputs: int
    strides: tuple[int, ...] = (1, 2, 2)
    questions: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array, *, train: bool) -> jax.Array:
        """f32[N, outputs]."""
        if self.questions:
            condition = nn.relu(nn.Dense(64, name="question")(condition))
        for i, stride in enumerate(self.strides):
            x = models.conv(32 if i else 16, 3, stride, f"conv_{i + 1}")(x)
            norm = Norm(self.method, name=f"norm_{i + 1}")
            x = nn.relu(norm(x, use_running_average=not train, condition=condition))
        x = x.reshape(len(x), -1)
        return nn.Dense(self.outputs, name="head")(x)


def digits(train: bool) -> jax.Array:
    """Standardized digits f32[10, M, 8, 8, 1] of the train or test images, as many of each."""
    dataset = data.digits()
    pixels = dataset.train_images / 1.0
    images, labels = dataset[:2] if train else dataset[2:4]
    number = np.bincount(labels).min()
    chosen = np.stack([images[labels == digit][:number] for digit in range(10)])
    return jnp.asarray((chosen - pixels.mean()) / pixels.std(), jnp.float32)


def turned(images: jax.Array) -> jax.Array:
    """Images [..., 8, 8, 1] at every angle, [ANGLES, ..., 8, 8, 1]."""
    return jnp.stack([jnp.rot90(images, k, (-3, -2)) for k in range(ANGLES)])


def rotations(images: jax.Array, noise: Sequence[float]) -> Callable[[jax.Array], Batch]:
    """Draws 64 digits of `images`, at random angles, with noise of these deviations."""
    every, deviation = turned(images), jnp.asarray(noise)

    def sample(key):
        *keys, noisy = jax.random.split(key, 4)
        angle, label, index = (
            jax.random.randint(k, (64,), 0, n) for k, n in zip(keys, every.shape[:3], strict=True)
        )
        white = jax.random.normal(noisy, (64, *every.shape[3:]))
        x = every[angle, label, index] + deviation[angle][:, None, None, None] * white
        return Batch(x, angle, label)

    return sample


def places() -> np.ndarray:
    """Cells of two digits for which a relation holds and does not: i[relation, answer, 8, 2]."""
    cells = [(a, b) for a in range(CELLS**2) for b in range(CELLS**2) if a != b]
    column, row = (lambda cell: cell % CELLS), (lambda cell: cell // CELLS)
    holds = (
        lambda a, b: column(a) < column(b),
        lambda a, b: column(a) > column(b),
        lambda a, b: row(a) < row(b),
        lambda a, b: row(a) > row(b),
    )
    table = [[[c for c in cells if hold(*c) == answer] for answer in (0, 1)] for hold in holds]
    return np.array([[no, yes * (len(no) // len(yes))] for no, yes in table])


def questions(
    images: jax.Array, *, held_out: bool = False, alone: bool = False
) -> Callable[[jax.Array], Batch]:
    """Draws 64 fields, questions about trained or held-out pairs, and answers, half of them yes.

    The condition is the first digit, the relation and the second digit, each one-hot. `alone`: all
    questions of a batch are the same.
    """
    table = jnp.asarray(places())
    low, high = (PARTNERS + 1, 10) if held_out else (1, PARTNERS + 1)

    def sample(key):
        keys = jax.random.split(key, 6)
        asked = () if alone else (64,)
        draw = lambda i, low, high, shape=(64,): jax.random.randint(keys[i], shape, low, high)
        first, relation = draw(0, 0, 10, asked), draw(1, 0, len(RELATIONS), asked)
        second = (first + draw(2, low, high, asked)) % 10
        first, relation, second = (jnp.broadcast_to(a, 64) for a in (first, relation, second))
        answer = draw(3, 0, 2)
        cells = table[relation, answer, draw(4, 0, table.shape[2])]
        which = draw(5, 0, images.shape[1], (64, 2))
        pair = images[jnp.stack([first, second], 1), which]
        empty = jnp.full((64, CELLS**2, *images.shape[2:]), images.min())
        field = empty.at[jnp.arange(64)[:, None], cells].set(pair)
        field = field.reshape(64, CELLS, CELLS, *images.shape[2:]).swapaxes(2, 3)
        parts = ((first, 10), (relation, len(RELATIONS)), (second, 10))
        condition = jnp.concatenate([jax.nn.one_hot(a, n) for a, n in parts], 1)
        return Batch(field.reshape(64, 8 * CELLS, 8 * CELLS, 1), condition, answer)

    return sample


def tasks(images: jax.Array, wanted: Sequence[int]) -> Callable[[jax.Array], Batch]:
    """Draws tasks of classes, a digit at an angle each: one example and queries of each class.

    In order of tasks, classes and images, the example first. The condition of a task is the mean of
    its examples, for every sample of it.
    """
    pool = turned(images[jnp.asarray(wanted)])
    pool = pool.reshape(-1, *pool.shape[2:])

    def sample(key):
        classes, members = jax.random.split(key)
        shape = TASKS, WAYS, 1 + QUERIES
        choose = lambda key, shape, n: lax.top_k(jax.random.uniform(key, shape), n)[1]
        chosen = choose(classes, (TASKS, len(pool)), WAYS)
        index = choose(members, (TASKS, WAYS, pool.shape[1]), 1 + QUERIES)
        x = pool[chosen[:, :, None], index]
        task = x[:, :, 0].mean(1).reshape(TASKS, 1, 1, -1)
        condition = jnp.broadcast_to(task, (*shape, task.shape[-1]))
        labels = jnp.broadcast_to(jnp.arange(WAYS)[None, :, None], shape)
        flat = lambda a, rank: a.reshape(-1, *a.shape[a.ndim - rank :])
        return Batch(flat(x, 3), flat(condition, 1), flat(labels, 0))

    return sample


def logits(outputs: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The outputs and the labels."""
    return outputs, batch.labels


def prototypes(outputs: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Minus squared distances of queries to the examples of their task, and labels."""
    z = outputs.reshape(TASKS, WAYS, 1 + QUERIES, -1)
    labels = batch.labels.reshape(z.shape[:-1])[:, :, 1:]
    gap = z[:, :, 1:, None] - z[:, None, None, :, 0]
    return -jnp.mean(jnp.square(gap), -1), labels


def forward(
    network: nn.Module, params: Any, stats: Any, batch: Batch, *, train: bool
) -> tuple[jax.Array, Any]:
    """The outputs of a batch, and new running statistics."""
    return training.forward(
        network, params, stats, batch.images, train=train, condition=batch.condition
    )


def train(
    network: nn.Module,
    sample: Callable[[jax.Array], Batch],
    read: Callable[..., tuple[jax.Array, jax.Array]],
    options: argparse.Namespace,
    measure: Callable[[Any], Any] = lambda state: (),
) -> tuple[Any, Any]:
    """Parameters and statistics after training, and what `measure` makes of them; seeds lead.

    Measured at the start and after every part of `options.parts`.
    """
    optimizer = training.sgd(LEARNING_RATE, options.steps)
    each = options.steps // options.parts

    def step(carry, key):
        params, stats, state = carry
        batch = sample(key)

        def loss(params):
            outputs, new = forward(network, params, stats, batch, train=True)
            scores, labels = read(outputs, batch)
            return training.cross_entropy(scores, labels).mean(), new

        grads, stats = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), stats, state), None

    def part(carry, keys):
        carry, _ = lax.scan(step, carry, keys)
        return carry, measure(carry[:2])

    def one(seed):
        start, order = jax.random.split(jax.random.key(seed))
        batch = sample(start)
        variables = network.init(start, batch.images, batch.condition, train=False)
        params, stats = variables["params"], variables.get("batch_stats", {})
        first = measure((params, stats))
        keys = jax.random.split(order, (options.parts, each))
        (params, stats, _), history = lax.scan(part, (params, stats, optimizer.init(params)), keys)
        history = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, history)
        return (params, stats), history

    return jax.jit(lambda seeds: lax.map(one, seeds))(jnp.arange(options.seeds))


def accuracy(
    network: nn.Module,
    state: Any,
    sample: Callable[[jax.Array], Batch],
    read: Callable[..., tuple[jax.Array, jax.Array]],
    *,
    train: bool = False,
) -> list[float]:
    """Shares of right answers by seed; with `train` the statistics are those of the batch."""

    def right(state, key):
        (params, stats), batch = state, sample(key)
        outputs, _ = forward(network, params, stats, batch, train=train)
        scores, labels = read(outputs, batch)
        return jnp.mean(scores.argmax(-1) == labels)

    @jax.jit
    def of_seeds(states):
        keys = jax.random.split(jax.random.key(1), EVALUATIONS)
        return lax.map(lambda s: lax.map(lambda key: right(s, key), keys).mean(), states)

    return np.asarray(of_seeds(state), float).tolist()


def study_balance(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Gradients of angles over time; see `analysis.balance`."""
    images, test = digits(True), digits(False)
    found = []
    for name, noise in NOISE.items():
        sample, evaluated = rotations(images, noise), rotations(test, noise)
        batches = [sample(key) for key in jax.random.split(jax.random.key(2), 8)]
        fixed = jax.tree.map(lambda *a: jnp.concatenate(a), *batches)
        for kind in (nj.ConditionalBatchNorm, nj.SandwichBatchNorm):
            network = Net(kind(num_classes=ANGLES, momentum=0.9), 10, (1, 2, 1), questions=False)
            measure = functools.partial(gradients, network, fixed)
            state, history = train(network, sample, logits, options, measure)
            found.append(
                {
                    "data": name,
                    "method": kind.__name__,
                    "accuracy": accuracy(network, state, evaluated, logits),
                    "measures": {
                        leaf: {
                            field: short(getattr(measures, field)) for field in ("norms", "cosine")
                        }
                        for leaf, measures in history.items()
                    },
                }
            )
    return found


def short(values: jax.Array) -> list[Any]:
    """Nested lists of numbers with four digits."""
    a = np.asarray(values, float)
    return np.array([float(f"{v:.4g}") for v in a.ravel()]).reshape(a.shape).tolist()


def gradients(network: Net, batch: Batch, state: Any) -> dict[str, balance.Measures]:
    """Of all kernels before a norm, and of the angles' scales and biases."""
    params, stats = state

    def losses(params):
        outputs, _ = forward(network, params, stats, batch, train=True)
        each = training.cross_entropy(outputs, batch.labels)
        return balance.by_condition(each, batch.condition, ANGLES)

    layers = range(1, 1 + len(network.strides))
    kernels = [f"conv_{i}/kernel" for i in layers]
    rows = [f"norm_{i}/condition/{leaf}" for i in layers for leaf in ("scale", "bias")]
    return balance.measure(losses, params, kernels, rows)


def conditional(features: int) -> dict[str, Any]:
    """Conditional batch norm and group norm by name, for conditions of so many features."""
    return {
        "ConditionalBatchNorm": nj.ConditionalBatchNorm(condition_features=features, momentum=0.9),
        "ConditionalGroupNorm": nj.ConditionalGroupNorm(num_groups=4, condition_features=features),
    }


def study_relations(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Accuracies on trained and held-out pairs of digits, by the statistics of evaluation."""
    images, test = digits(True), digits(False)
    found = []
    for name, method in conditional(64).items():
        network = Net(method, 2)
        state, _ = train(network, questions(images), logits, options)
        row: dict[str, Any] = {"method": name, "accuracy": {}}
        for held_out in (False, True):
            pairs = "held-out pairs" if held_out else "trained pairs"
            for statistics, batch, alone in (
                ("running", False, False),
                ("of a mixed batch", True, False),
                ("of one question", True, True),
            ):
                sample = questions(test, held_out=held_out, alone=alone)
                values = accuracy(network, state, sample, logits, train=batch)
                row["accuracy"][f"{pairs}, {statistics}"] = values
        found.append(row)
    return found


def study_few_shot(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Accuracies on tasks of the digits of training, and of other ones."""
    images, test = digits(True), digits(False)
    found = []
    for name, method in conditional(64).items():
        network = Net(method, 64)
        state, _ = train(network, tasks(images, TRAIN_DIGITS), prototypes, options)
        row: dict[str, Any] = {"method": name, "accuracy": {}}
        for words, wanted in (("digits of training", TRAIN_DIGITS), ("new digits", TEST_DIGITS)):
            for statistics, batch in (("running", False), ("of a mixed batch", True)):
                sample = tasks(test, wanted)
                values = accuracy(network, state, sample, prototypes, train=batch)
                row["accuracy"][f"{words}, {statistics}"] = values
        found.append(row)
    return found


STUDIES = {"balance": study_balance, "relations": study_relations, "few-shot": study_few_shot}
STEPS = {"balance": 400, "relations": 4000, "few-shot": 1000}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one study, prints its table and writes its results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.conditional",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=whole, default=8)
    parser.add_argument("--steps", type=whole, help=f"of training, by default {STEPS}")
    parser.add_argument("--parts", type=whole, default=20, help="of training, measured after each")
    parser.add_argument("--output", type=Path, default=Path("runs/conditional"))
    options = parser.parse_args(argv)
    options.steps = options.steps or STEPS[options.study]
    if options.steps % options.parts:
        parser.error(f"--parts {options.parts} does not divide --steps {options.steps}")
    results = run(options)
    machine.write(results, options.output / f"{options.study}.json", indent=None)
    show(results)
    print(f"Written to {options.output}/{options.study}.json")
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements as one JSON-ready dict."""
    return {
        **machine.heading("conditional", "flax", "scikit-learn"),
        "study": options.study,
        "configuration": {name: getattr(options, name) for name in ("seeds", "steps", "parts")},
        "arms": STUDIES[options.study](options),
    }


def summary(results: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each quantity: means of both arms and the second less the first, paired by seed.

    Pairs (mean, half of the 95 % interval or None): "first", "second" and "difference". Of the
    balance: the mean over the parameters of a kind and over time after the start.
    """
    rows = []
    for first, second in zip(results["arms"][::2], results["arms"][1::2], strict=True):
        one, two = quantities(first), quantities(second)
        for name in one:
            a, b = np.array(one[name]), np.array(two[name])
            rows.append(
                {
                    "data": first.get("data", results["study"]),
                    "quantity": name,
                    "methods": (first["method"], second["method"]),
                    "first": interval(a),
                    "second": interval(b),
                    "difference": interval(b - a),
                }
            )
    return rows


def interval(values: np.ndarray) -> tuple[float, float | None]:
    """Mean, and half of its 95 % interval."""
    return float(np.mean(values)), report.interval(values.tolist())


def quantities(arm: dict[str, Any]) -> dict[str, Any]:
    """Numbers of an arm, each a value per seed."""
    if "measures" not in arm:
        return {f"accuracy, {name}": values for name, values in arm["accuracy"].items()}
    found = {"accuracy": arm["accuracy"]}
    for name, suffix in (("kernels", "kernel"), ("scales", "scale"), ("biases", "bias")):
        over_time = series(arm, suffix)
        for field, values in over_time.items():
            found[f"{field}, {name}"] = values[:, 1:].mean(1)
    return found


def series(arm: dict[str, Any], suffix: str) -> dict[str, np.ndarray]:
    """Over time, [seeds, times]: means over the parameters whose names end in `suffix`."""
    own = [found for name, found in arm["measures"].items() if name.endswith(suffix)]
    norms = np.array([found["norms"] for found in own])
    return {
        "variation of norms": np.mean(norms.std(-1) / norms.mean(-1), 0),
        "largest / smallest norm": np.exp(np.mean(np.log(norms.max(-1) / norms.min(-1)), 0)),
        "cosine": np.mean([found["cosine"] for found in own], 0),
    }


def show(results: dict[str, Any]) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    rows = summary(results)
    table = Table(title="Mean over seeds ± half of its 95 % interval")
    for name in ("data", "quantity", *rows[0]["methods"], "difference"):
        table.add_column(name)
    for row in rows:
        values = (text(row[name], sign) for name, sign in NUMBERS)
        table.add_row(row["data"], row["quantity"], *values)
    Console(width=None if sys.stdout.isatty() else 150).print(table)


NUMBERS = (("first", ""), ("second", ""), ("difference", "+"))


def text(values: tuple[float, float | None], sign: str = "") -> str:
    """A mean and its interval."""
    half = math.nan if values[1] is None else values[1]
    return f"{values[0]:{sign}.3f} ± {half:.3f}"


if __name__ == "__main__":
    sys.exit(main())
