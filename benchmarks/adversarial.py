"""Adversarial training with batch norms of two branches: `python -m benchmarks.adversarial`.

The claims of Xie et al. 2020 (https://arxiv.org/abs/1911.09665) and Gong et al. 2022
(https://arxiv.org/abs/2102.11382) on a small residual network: statistics of their own for clean
and for attacked images keep the accuracy on clean images and raise that on attacked ones; an affine
map that both branches share raises it further. A step attacks the images of a batch, passes the
clean ones through branch 0 and the attacked ones through branch 1, and descends the mean of both
losses. Batch norm has one branch for all; with "one batch" clean and attacked images make one batch
and share its statistics, otherwise each pass has those of its own images, as it has with branches.

The attack is projected gradient descent (Madry et al. 2018, https://arxiv.org/abs/1706.06083) on
pixels in [0, 1], in a ball of the largest norm, with steps of a quarter of its radius from a random
start. In training it attacks the adversarial branch, and `--attack-statistics` says how: "evaluate"
uses the running statistics of that branch and moves none, so that they are those of the images that
the network learns from; "train" uses those of the batch and moves the running ones with every step,
as the public implementation does (VITA-Group/Sandwich-Batch-Normalization, `Adv`). In the test each
branch meets an attack on itself, with running statistics.

All methods share data, initial weights of the layers around the norms and order of batches, and
differences are paired by seed. An interrupted run goes on with the first seed that is not stored
when its command is given again.
"""

import argparse
import functools
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
from benchmarks import data, machine, models, report, resumable, training
from benchmarks.options import fraction, rate, whole
from normjax.core.method import traits
from normjax.linen import Norm


class Arm(NamedTuple):
    """A method, and whether clean and attacked images make one batch."""

    method: Any
    one_batch: bool = False


ARMS = {
    "BatchNorm": Arm(nj.BatchNorm(momentum=0.9)),
    "BatchNorm, one batch": Arm(nj.BatchNorm(momentum=0.9), one_batch=True),
    "AuxBatchNorm": Arm(nj.AuxBatchNorm(momentum=0.9)),
    "SandwichAuxBatchNorm": Arm(nj.SandwichAuxBatchNorm(momentum=0.9)),
}
BRANCHES = ("clean", "adversarial")
MEASURES = ("clean", "attacked")
PEERS = ("BatchNorm", "AuxBatchNorm")  # what the others are compared with
TOP = {"digits": 16}  # the largest value of a pixel, where it is not 255
EPSILON = {"digits": 2 / 16}  # where it is not that of the paper, 8/255


class Attack(NamedTuple):
    """Radius on pixels in [0, 1], number of steps, and whether the passes are those of training."""

    epsilon: float
    steps: int
    train: bool = False


class Branches(NamedTuple):
    """The network with the norms of each branch, or one for all, and the largest pixel."""

    networks: tuple[nn.Module, ...]
    top: int

    def forward(
        self,
        branch: int,
        params: Any,
        batch_stats: Any,
        x: jax.Array,
        inputs: training.Inputs,
        *,
        train: bool,
    ) -> tuple[jax.Array, Any]:
        """Logits, and running statistics after them, of images x f32[N, H, W, C] in [0, 1]."""
        network = self.networks[branch % len(self.networks)]
        images = training.scale(x * self.top, inputs)
        return training.forward(network, params, batch_stats, images, train=train)

    def attack(
        self,
        branch: int,
        params: Any,
        batch_stats: Any,
        x: jax.Array,
        labels: jax.Array,
        inputs: training.Inputs,
        key: jax.Array,
        attack: Attack,
    ) -> tuple[jax.Array, Any]:
        """`pgd` on a branch: attacked images and the running statistics after it."""

        def forward(x, batch_stats):
            return self.forward(branch, params, batch_stats, x, inputs, train=attack.train)

        return pgd(forward, x, labels, batch_stats, key, attack)


def build(method: Any, classes: int, *, top: int = 255, width: int = 8) -> Branches:
    """The residual network for each branch of a method, with one tree of variables."""
    number = len(BRANCHES) if "branch" in traits(method).inputs else 0
    chosen = [{"branch": branch} for branch in range(number)] or [{}]

    def norm(name, branch):
        return functools.partial(Norm(method, name=name), **branch)

    networks = (models.Residual(functools.partial(norm, branch=b), classes, width) for b in chosen)
    return Branches(tuple(networks), top)


def pgd(
    forward: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
    x: jax.Array,
    labels: jax.Array,
    state: Any,
    key: jax.Array,
    attack: Attack,
) -> tuple[jax.Array, Any]:
    """Images f32[N, H, W, C] of a high loss near `x`, and the state that the passes leave.

    Args:
      forward: logits f32[N, classes] and the next state, of images and a state.
      x: images in [0, 1].
      labels: i32[N].
      state: what the first pass gets.
      key: of the random start.
      attack: its radius and steps; each is a quarter of the radius in the sign of the gradient.
    """
    epsilon = attack.epsilon

    def inside(moved):
        return jnp.clip(jnp.clip(moved, x - epsilon, x + epsilon), 0, 1)

    def loss(moved, state):
        logits, state = forward(moved, state)
        return training.cross_entropy(logits, labels).sum(), state

    def step(_, carry):
        moved, state = carry
        slope, state = jax.grad(loss, has_aux=True)(moved, state)
        return inside(moved + epsilon / 4 * jnp.sign(slope)), state

    start = inside(x + jax.random.uniform(key, x.shape, x.dtype, -epsilon, epsilon))
    return lax.fori_loop(0, attack.steps, step, (start, state))


def training_loss(
    branches: Branches, attack: Attack, *, one_batch: bool = False
) -> Callable[..., tuple[jax.Array, Any]]:
    """For `training.compile`: the mean of the losses on clean images and on attacked ones."""

    def loss(params, batch_stats, images, labels, key, inputs):
        x, fixed = images / branches.top, lax.stop_gradient(params)
        key = jax.random.fold_in(key, 1)  # the crops have drawn from it
        moved, batch_stats = branches.attack(1, fixed, batch_stats, x, labels, inputs, key, attack)
        passes = [(x, labels), (moved, labels)]
        if one_batch:
            passes = [(jnp.concatenate([x, moved]), jnp.concatenate([labels, labels]))]
        losses = []
        for branch, (x, labels) in enumerate(passes):
            logits, batch_stats = branches.forward(
                branch, params, batch_stats, x, inputs, train=True
            )
            losses.append(training.cross_entropy(logits, labels).mean())
        return jnp.stack(losses).mean(), batch_stats

    return loss


def accuracies(branches: Branches, attack: Attack) -> Callable[..., dict[str, jax.Array]]:
    """A compiled function of a state, of one seed, and inputs: f32[branches] for each measure.

    They are shares of right answers on test images as they are, and attacked for the same branch.
    """

    def right(branch, state, inputs, batch):
        index, images, labels = batch
        x, key = images / branches.top, jax.random.fold_in(jax.random.key(state.seed), index)
        known = jnp.maximum(labels, 0)  # those of -1 fill up the last batch
        variables = state.params, state.batch_stats
        moved, _ = branches.attack(branch, *variables, x, known, inputs, key, attack)
        counts = []
        for shown in (x, moved):
            logits, _ = branches.forward(branch, *variables, shown, inputs, train=False)
            counts.append(jnp.sum(logits.argmax(-1) == labels))
        return jnp.stack(counts)

    @jax.jit
    def measure(state, inputs):
        state = jax.tree.map(lambda a: a[0], state)
        batches = jnp.arange(len(inputs.test_labels)), inputs.test_images, inputs.test_labels
        counts = [
            lax.map(functools.partial(right, branch, state, inputs), batches).sum(0)
            for branch in range(len(branches.networks))
        ]
        shares = jnp.stack(counts, 1) / jnp.sum(inputs.test_labels >= 0)
        return dict(zip(MEASURES, shares, strict=True))

    return measure


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what is not stored yet, writes `adversarial.json` and prints a table."""
    argv = sys.argv[1:] if argv is None else argv
    options = _options(argv)

    def work():
        show(run(options))
        print(f"Written to {options.output}/adversarial.json")

    return resumable.command("adversarial", argv, work)


def _options(argv):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adversarial", description=__doc__)
    parser.add_argument("--data", default="digits", choices=("digits", "images", "cifar10-bin"))
    parser.add_argument("--data-dir", help="folder of the images, as in benchmarks.compare")
    parser.add_argument("--train-size", type=whole, help="number of train images to keep")
    text = f"some of: {'; '.join(ARMS)} (default: all)"
    parser.add_argument(
        "--methods", nargs="+", choices=ARMS, default=list(ARMS), metavar="METHOD", help=text
    )
    parser.add_argument("--seeds", type=whole, default=8)
    parser.add_argument("--epochs", type=whole, default=30)
    parser.add_argument("--batch-size", type=whole, default=64)
    parser.add_argument("--learning-rate", type=rate, default=0.3)
    parser.add_argument("--width", type=whole, default=8, help="channels of the first stage")
    text = "largest change of a pixel in [0, 1] (default: 2/16 for digits, else 8/255)"
    parser.add_argument("--epsilon", type=fraction, help=text)
    parser.add_argument("--steps", type=whole, default=7, help="of an attack in training")
    parser.add_argument("--test-steps", type=whole, default=10, help="of an attack in the test")
    text = "with which statistics images are attacked in training: see above"
    choices = ("evaluate", "train")
    parser.add_argument("--attack-statistics", choices=choices, default=choices[0], help=text)
    parser.add_argument("--output", type=Path, default=Path("runs/adversarial"))
    options = parser.parse_args(argv)
    options.methods = list(dict.fromkeys(options.methods))
    if options.epsilon is None:
        options.epsilon = EPSILON.get(options.data, 8 / 255)
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The results of all seeds of all methods, of which those stored are not made again."""
    from rich.progress import Progress

    dataset = data.load(options.data, options.data_dir, train_size=options.train_size)
    number = len(dataset.train_labels)
    if options.batch_size > number:
        raise ValueError(f"--batch-size {options.batch_size} is above the {number} train images")
    configuration = {k: v for k, v in vars(options).items() if k != "output"}
    about = {"configuration": configuration, "data": data.describe(dataset)}
    file = options.output / "adversarial.json"
    results = resumable.results(file, about, "adversarial", "flax")
    results.setdefault("runs", [])
    done = {(row["method"], row["seed"]) for row in results["runs"]}
    inputs = training.put(dataset)
    with Progress(transient=True) as progress:
        total = len(options.methods) * options.seeds * options.epochs
        task = progress.add_task("adversarial", total=total, completed=len(done) * options.epochs)
        for name in options.methods:
            progress.update(task, description=name)
            seeds = [seed for seed in range(options.seeds) if (name, seed) not in done]
            tick = lambda: progress.advance(task)
            for row in _train(name, seeds, len(dataset.classes), inputs, options, tick):
                results["runs"].append(row)
                machine.write(results, file, allow_nan=False)
    return results


def _train(name, seeds, classes, inputs, options, tick):
    """A row for each of the seeds; nothing is compiled if there are none."""
    if not seeds:
        return
    arm = ARMS[name]
    branches = build(arm.method, classes, top=TOP.get(options.data, 255), width=options.width)
    attack = Attack(options.epsilon, options.steps, options.attack_statistics == "train")
    program = training.compile(
        branches.networks[0],
        inputs,
        seeds=1,
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        augment=True,
        flip=options.data != "digits",
        loss=training_loss(branches, attack, one_batch=arm.one_batch),
    )
    measure = accuracies(branches, Attack(options.epsilon, options.test_steps))
    for seed in seeds:
        state = program.init(jnp.array([seed]))
        for _ in range(options.epochs):
            state = jax.block_until_ready(program.train(state, inputs))
            tick()
        found = {k: np.asarray(v, float).tolist() for k, v in measure(state, inputs).items()}
        yield {"method": name, "seed": seed, **found}


def summary(results: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each branch of each method, "both" of one without branches.

    "clean" and "attacked" are pairs of the mean over seeds, as fractions of the test set, and half
    of its 95 % interval, None for one seed. "less BatchNorm" and "less AuxBatchNorm" have the same
    of the differences to the same branch there, paired by seed; they are None where there are none.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for run in sorted(results["runs"], key=lambda run: run["seed"]):
        found.setdefault(run["method"], []).append(run)

    def values(method, measure, branch):
        of_seeds = np.array([run[measure] for run in found[method]])
        return of_seeds[:, branch % of_seeds.shape[1]]

    def pair(values):
        return float(np.mean(values)), report.interval(values.tolist())

    rows = []
    for method, runs in found.items():
        names = BRANCHES if len(runs[0]["clean"]) > 1 else ("both",)
        for branch, name in enumerate(names):
            own = {measure: values(method, measure, branch) for measure in MEASURES}
            row: dict[str, Any] = {"method": method, "branch": name}
            row |= {measure: pair(of_seeds) for measure, of_seeds in own.items()}
            for peer in PEERS:
                apart = peer in found and list(found).index(peer) < list(found).index(method)
                less = {m: pair(own[m] - values(peer, m, branch)) for m in own} if apart else None
                row[f"less {peer}"] = less
            rows.append(row)
    return rows


def cells(results: dict[str, Any]) -> list[list[str]]:
    """The table of `summary` as text, its head first."""

    def text(pair, sign=""):
        half = "n/a" if pair[1] is None else f"{100 * pair[1]:.1f}"
        return f"{100 * pair[0]:{sign}.1f} ± {half}"

    head = ["method", "branch"]
    for measure in MEASURES:
        head += [f"{measure}, %", *(f"less {peer}" for peer in PEERS)]
    lines = [head]
    for row in summary(results):
        line = [row["method"], row["branch"]]
        for measure in MEASURES:
            less = (row[f"less {peer}"] for peer in PEERS)
            line += [text(row[measure]), *(text(a[measure], "+") if a else "" for a in less)]
        lines.append(line)
    return lines


def show(results: dict[str, Any]) -> None:
    """Prints the table."""
    how = results["configuration"]
    title = f"Test accuracy, mean of {how['seeds']} seeds ± half of the 95 % Student t interval; "
    title += f"differences in points, paired by seed; attacked: {how['test_steps']} steps within "
    title += f"{how['epsilon']:.4g} on the same branch"
    report.print_cells(cells(results), title=title)


if __name__ == "__main__":
    sys.exit(main())
