"""What whitening norms do, and how networks train with them: `python -m benchmarks.whitening`.

Five studies, each with a file of its own; those named are run, or all.

identities: inverse roots by the published iteration and its coupled form, the closed forms of
stochastic whitening, and how much of white input few steps keep.

disturbance: how much the output of a sample depends on the others of its batch, by method and batch
size (`normjax.analysis.whitening`), on correlated Gaussian features.

conditioning: condition numbers and correlations of the outputs of the norms of a network of four
convolutions, with random weights. Stochastic whitening has seen batches before.

convolutions: the same network in training, with stochastic whitening (Zhang et al. 2021,
https://arxiv.org/abs/2106.04413), iterative (Huang et al. 2019, https://arxiv.org/abs/1904.03441)
and decorrelated batch norm (Huang et al. 2018, https://arxiv.org/abs/1804.08450), and batch norm.

dense: three dense layers on handwritten digits, with whitening of groups and of all features at
several batch sizes, and with the matrix of principal components in place of the symmetric one.

Networks of a study share data, initial weights and order of batches; differences are paired by
seed. A study that was interrupted goes on from its file.
"""

import argparse
import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks import data, machine, models, report, resumable, training, whiteness
from benchmarks.options import Studies, rate, whole
from benchmarks.whiteness import ALPHAS, BN, decorrelated, iterative, stochastic

PASSES = 500  # batches of 64 that stochastic whitening sees before it is measured
STEPS = {"convolutions": 300, "dense": 300}  # of training
SEEDS = {"dense": 20}  # where they are not 8
DENSE_BATCHES = (16, 64, 256)
MEASURES = ("accuracy", "early loss", "final loss")


class Arm(NamedTuple):
    """What one network of a training study has."""

    methods: tuple[Any, ...]  # its norms; one for all layers, or one for each
    batch_size: int = 64


def convolutions_arms() -> dict[str, Arm]:
    """The networks of the study, by name; those of batch 16 say so."""
    arms = {"BN": Arm((BN,))}
    for criterion in ("kl", "frobenius"):
        for alpha in ALPHAS:
            arms[f"SWBN {criterion} {alpha:.0e}"] = Arm((stochastic(alpha, criterion),))
    for size in (16, 64):
        arms |= {f"IterNorm {size} T={t}": Arm((iterative(size, t),)) for t in (3, 5, 7)}
        arms[f"DBN {size}"] = Arm((decorrelated(size),))
    arms["IterNorm 64 T=5, first layer"] = Arm((iterative(64, 5), BN, BN, BN))
    arms["IterNorm 64 T=5, last layer"] = Arm((BN, BN, BN, iterative(64, 5)))
    few = ("BN", "IterNorm 16 T=5", "IterNorm 64 T=5", "DBN 16", "DBN 64")
    return arms | {f"{name}, batch 16": arms[name]._replace(batch_size=16) for name in few}


def dense_arms() -> dict[str, Arm]:
    """The networks of the study, by name."""
    arms = {}
    methods = {"BN": BN} | {f"DBN {size}": decorrelated(size) for size in (16, 32, 64)}
    methods["DBN all"] = decorrelated(None)
    for size in DENSE_BATCHES:
        for name, method in methods.items():
            arms[f"{name}, batch {size}"] = Arm((method,), size)
    pca = whiteness.PCABatchNorm(group_size=16, momentum=0.9)
    return arms | {f"PCA 16, batch {size}": Arm((pca,), size) for size in DENSE_BATCHES[1:]}


ARMS = {"convolutions": convolutions_arms, "dense": dense_arms}


class Study(NamedTuple):
    """Which options decide the results of a study, and what makes them."""

    options: tuple[str, ...]
    run: Callable[..., None]


@functools.cache
def load(kind: str, folder: str | None, size: int | None) -> tuple[data.Data, training.Inputs]:
    """The data, and all of them on the device."""
    dataset = data.load(kind, folder, train_size=size)
    return dataset, training.put(dataset)


def of_images(options: argparse.Namespace) -> tuple[data.Data, training.Inputs]:
    """What networks of convolutions see."""
    return load(options.data, options.data_dir, options.train_size)


def describe(results: dict[str, Any], dataset: data.Data) -> None:
    """Notes the data; ValueError if rows that are stored are of others."""
    about = data.describe(dataset)
    if results.setdefault("data", about) != about:
        raise ValueError("the data are not those that the results began with")


def measures(run: Callable[[argparse.Namespace], dict[str, Any]]) -> Callable[..., None]:
    """A study that is made at once."""

    def study(options, results, store):
        if not results.get("complete"):
            results |= run(options)
            store()

    return study


def conditioning(options: argparse.Namespace) -> dict[str, Any]:
    """The study of this name."""
    dataset, inputs = of_images(options)
    found = whiteness.conditioning(inputs, len(dataset.classes), options.seeds, options.passes)
    return {"data": data.describe(dataset), **found}


def convolutions(
    options: argparse.Namespace, results: dict[str, Any], store: Callable[[], None]
) -> None:
    """Trains the networks of the study that are not stored yet."""
    dataset, inputs = of_images(options)
    classes = len(dataset.classes)

    def build(arm):
        return whiteness.Net(arm.methods * (4 // len(arm.methods)), classes)

    describe(results, dataset)
    train(build, convolutions_arms(), inputs, options, results, store, augment=True)


def dense(options: argparse.Namespace, results: dict[str, Any], store: Callable[[], None]) -> None:
    """Trains the networks of the study that are not stored yet."""
    dataset, inputs = load("digits", None, None)

    def build(arm):
        return models.build("mlp", arm.methods[0], classes=len(dataset.classes))

    describe(results, dataset)
    train(build, dense_arms(), inputs, options, results, store)


def train(
    build: Callable[[Arm], nn.Module],
    arms: dict[str, Arm],
    inputs: training.Inputs,
    options: argparse.Namespace,
    results: dict[str, Any],
    store: Callable[[], None],
    *,
    augment: bool = False,
) -> None:
    """A row for each arm: losses [seeds][epochs], None where not finite, and accuracies [seeds].

    All arms take about the same number of steps, in whole epochs. Rows that are there are kept.
    """
    from rich.progress import Progress

    number = len(inputs.train_labels)
    done = [row["arm"] for row in results.setdefault("rows", [])]
    epochs = {
        name: max(round(options.steps * a.batch_size / number), 1) for name, a in arms.items()
    }
    with Progress(transient=True) as progress:
        total = sum(epochs.values())
        task = progress.add_task("", total=total, completed=sum(epochs[name] for name in done))
        for name, arm in arms.items():
            if name in done:
                continue
            progress.update(task, description=name)
            program = training.compile(
                build(arm),
                inputs,
                seeds=options.seeds,
                epochs=epochs[name],
                batch_size=arm.batch_size,
                learning_rate=options.learning_rate,
                augment=augment,
                flip=augment and options.data != "digits",
            )
            state = program.init(jnp.arange(options.seeds))
            for _ in range(epochs[name]):
                state = jax.block_until_ready(program.train(state, inputs))
                progress.advance(task)
            state = program.evaluate(state, inputs)
            right = np.asarray(state.correct[:, -1]) / np.sum(np.asarray(inputs.test_labels) >= 0)
            losses = np.asarray(state.train_loss, float)
            row = {"arm": name, "batch_size": arm.batch_size, "accuracy": right.tolist()}
            row["train_loss"] = [[a if math.isfinite(a) else None for a in seed] for seed in losses]
            results["rows"].append(row)
            store()


TRAINED = ("seeds", "steps", "learning_rate")
IMAGES = ("data", "train_size")
STUDIES = {
    "identities": Study(("seeds",), measures(lambda o: whiteness.identities(o.seeds))),
    "disturbance": Study(("seeds",), measures(lambda o: whiteness.disturbance(o.seeds))),
    "conditioning": Study(("seeds", "passes", *IMAGES), measures(conditioning)),
    "convolutions": Study((*TRAINED, *IMAGES), convolutions),
    "dense": Study(TRAINED, dense),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Makes what is not stored yet, writes a file for each study and prints a table."""
    argv = sys.argv[1:] if argv is None else argv
    options = _options(argv)

    def work():
        for name in options.studies:
            show(run(name, options))
        print(f"Written to {options.output}/")

    return resumable.command("whitening", argv, work)


def _options(argv):
    parser = Studies("whitening", __doc__, STUDIES)
    text = "of conditioning and convolutions"
    parser.add_argument(
        "--data", default="digits", choices=("digits", "images", "cifar10-bin"), help=text
    )
    parser.add_argument("--data-dir", help="folder of the images, as in benchmarks.compare")
    parser.add_argument("--train-size", type=whole, help="number of train images to keep")
    parser.add_argument("--seeds", type=whole, help=f"by default 8, {SEEDS}")
    parser.add_argument("--steps", type=whole, help=f"of training, about; by default {STEPS}")
    parser.add_argument("--learning-rate", type=rate, default=0.1)
    text = "batches that stochastic whitening sees before it is measured"
    parser.add_argument("--passes", type=whole, default=PASSES, help=text)
    return parser.read(argv)


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The results of a study, of which those stored are not made again."""
    study, file = STUDIES[name], options.output / f"{name}.json"
    chosen = {
        "seeds": options.seeds or SEEDS.get(name, 8),
        "steps": options.steps or STEPS.get(name),
    }
    options = argparse.Namespace(**vars(options) | chosen)
    configuration = {field: getattr(options, field) for field in study.options}
    about = {"study": name, "configuration": configuration}
    results = resumable.results(file, about, "whitening", "flax", "scikit-learn")
    store = lambda: machine.write(results, file, indent=None, allow_nan=False)
    with threadpool_limits(1, user_api="blas"):  # its threads wait for each other by spinning
        study.run(options, results, store)
    results["complete"] = True
    store()
    return results


def values(row: dict[str, Any]) -> dict[str, np.ndarray]:
    """`MEASURES` of a row of a training study, [seeds].

    Losses are means over an epoch: the last one, and that which ends a quarter of the training; a
    loss that is not finite is inf.
    """
    losses = np.array([[math.inf if a is None else a for a in seed] for seed in row["train_loss"]])
    early = losses[:, -(-losses.shape[1] // 4) - 1]
    return dict(zip(MEASURES, (np.array(row["accuracy"]), early, losses[:, -1]), strict=True))


def less(results: dict[str, Any], arm: str, peer: str) -> dict[str, np.ndarray]:
    """Differences of `MEASURES` between two arms of a training study, paired by seed, [seeds]."""
    one, two = (
        next(values(row) for row in results["rows"] if row["arm"] == name) for name in (arm, peer)
    )
    return {measure: one[measure] - two[measure] for measure in MEASURES}


def interval(values: np.ndarray) -> tuple[float, float | None]:
    """Mean, and half of its 95 % interval."""
    return float(np.mean(values)), report.interval(values.tolist())


def cells(results: dict[str, Any]) -> list[list[str]]:
    """The table of a study as text, its head first."""
    return TABLES.get(results["study"], _training)(results)


def text(values: Any, digits: str = ".3g", sign: str = "", factor: float = 1.0) -> str:
    """Mean and half of its 95 % interval, of values by seed; says so if one is not finite."""
    if any(a is None or not math.isfinite(a) for a in values):
        return "not finite"
    mean, half = interval(factor * np.asarray(values, float))
    return f"{mean:{sign}{digits}} ± {'n/a' if half is None else f'{half:{digits}}'}"


def one(value: float | None) -> str:
    """A number of which there is one."""
    return "not finite" if value is None else f"{value:.2g}"


def _training(results):
    lines = [["arm", "accuracy, %", "less BN", "early loss", "less BN", "final loss", "less BN"]]
    names = [row["arm"] for row in results["rows"]]
    for row in results["rows"]:
        name, own, line = row["arm"], values(row), [row["arm"]]
        peer = next(n for n in (f"BN, batch {row['batch_size']}", "BN") if n in names)
        for measure in MEASURES:
            digits, factor = (".2f", 100) if measure == "accuracy" else (".3f", 1)
            line.append(text(own[measure], digits, factor=factor))
            gap = less(results, name, peer)[measure]
            line.append("" if name == peer else text(gap, digits, "+", factor))
        lines.append(line)
    return lines


def _identities(results):
    lines = [["what", "of", "found"]]
    for row in by(results["roots"], "error", "iteration", "condition", "dtype"):
        found = "; ".join(f"{t}: {one(row['error'][t - 1])}" for t in (5, 10, 15, 20))
        of = "condition {condition:.0e}, {dtype}".format(**row)
        lines.append([f"distance by steps, {row['iteration']}", of, found])
    for row in results["averages"]:
        of = f"alpha {row['alpha']:.0e}, {'noisy' if row['noisy'] else 'one batch'}"
        lines.append(["deviation of W^-2 from the average", of, text(row["deviation"])])
    for row in results["stability"]:
        of = "condition {condition:.0f}, {factor} of the bound".format(**row)
        lines.append(["growth of an error", of, one(middle(row["growth"]))])
    for row in results["partial"]:
        for name in ("variances", "law"):
            found = "; ".join(f"{a:.3f}" for a in row[name])
            of = f"alpha {row['alpha']:.0e}, eigenvalues {row['eigenvalues']}"
            lines.append([f"partial whitening, {name}", of, found])
    for row in by(results["kept"], "deviation", "scaling"):
        found = "; ".join(f"{a:.3f}" for a in row["deviation"])
        lines.append(["deviation of white input by steps", row["scaling"], found])
    return lines


def by(rows: Sequence[dict[str, Any]], value: str, *fields: str) -> list[dict[str, Any]]:
    """A row for each combination of `fields`, with the list of what their rows have in `value`."""
    found: dict[Any, Any] = {}
    for row in rows:
        own = {field: row[field] for field in fields}
        found.setdefault(tuple(own.values()), own | {value: []})[value].append(row[value])
    return list(found.values())


def middle(values: Sequence[float | None]) -> float | None:
    """The median, with None for infinity."""
    found = np.median([math.inf if a is None else a for a in values])
    return float(found) if math.isfinite(found) else None


def _disturbance(results):
    sizes = sorted({row["batch_size"] for row in results["rows"]})
    lines = {row["method"]: [row["method"]] for row in results["rows"]}
    for row in results["rows"]:
        lines[row["method"]].append(text(row["disturbance"], ".3f"))
    return [["method", *(f"batch {size}" for size in sizes)], *lines.values()]


def _conditioning(results):
    """By layer: the geometric mean of condition numbers, and the mean of squared correlations."""
    layers = range(1, 5)
    head = ["method", *(f"condition, {i}" for i in layers), *(f"correlation, {i}" for i in layers)]
    lines = [head]
    for row in results["rows"]:
        conditions = zip(*row["condition"], strict=True)
        masses = zip(*row["off_diagonal"], strict=True)
        line = [row["method"], *(one(_geometric(layer)) for layer in conditions)]
        lines.append([*line, *(one(float(np.mean(layer))) for layer in masses)])
    return lines


def _geometric(values):
    return None if None in values else float(np.exp(np.mean(np.log(values))))


TABLES = {
    "identities": _identities,
    "disturbance": _disturbance,
    "conditioning": _conditioning,
}


def show(results: dict[str, Any]) -> None:
    """Prints the table."""
    seeds = results["configuration"]["seeds"]
    title = f"{results['study']}: {seeds} seeds, mean ± half of its 95 % interval"
    report.print_cells(cells(results), title=title)


if __name__ == "__main__":
    sys.exit(main())
