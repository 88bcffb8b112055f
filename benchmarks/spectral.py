"""Trains networks with spectral batch norm in the last stage: `python -m benchmarks.spectral`.

The claims of Cakaj, Mehnert & Yang 2023 (https://arxiv.org/abs/2306.16999) on a small residual
network: spectral behind batch normalization in the deeper blocks raises the test accuracy, makes
the frequency components of feature maps more uniform, and keeps feature maps small in training.
The paper leaves open what the statistics pool and how the transform is scaled, so every reading is
an arm. All arms share data, initial weights of the layers around and order of batches; differences
are paired by seed. Maps are measured in training mode, at initialization and after every epoch.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import normjax as nj
from benchmarks import data, machine, models, report, training
from benchmarks.options import whole
from normjax.analysis import spectra

EARLY = nj.BatchNorm(momentum=0.9)  # before the last stage
MEASURED_IMAGES = 64
MEASURES = ("rms", "quantile", "maximum", "flatness")


def arms(size: int) -> dict[str, Any]:
    """The methods of the last stage, whose maps are `size` x `size`, by name."""

    def both(unbiased_running_var=False, **fields):
        shared = {"momentum": 0.9, "unbiased_running_var": unbiased_running_var}
        return nj.chain(nj.BatchNorm(**shared), nj.SpectralBatchNorm(**shared, **fields))

    found: dict[str, Any] = {"batch norm": EARLY}
    for fft_norm in ("ortho", "backward"):
        found[f"channel, {fft_norm}"] = both(fft_norm=fft_norm)
        found[f"frequency, {fft_norm}"] = both(
            fft_norm=fft_norm, statistics="frequency", map_size=(size, size)
        )
    found["public implementation"] = both(
        fft_norm="full", spectrum="half", unbiased_running_var=True
    )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Trains all arms and writes the results; returns 0, or 2 after one line about bad input."""
    options = _options(argv)
    try:
        results = run(options)
    except (ValueError, OSError) as error:
        print("spectral:", error, file=sys.stderr)
        return 2
    machine.write(results, options.output / "spectral.json", indent=None)
    show(results)
    plot(results, options.output / "spectral.png")
    print(f"Written to {options.output}/spectral.json and spectral.png")
    return 0


def _options(argv):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spectral", description=__doc__)
    parser.add_argument("--data", default="digits", choices=("digits", "images", "cifar10-bin"))
    parser.add_argument("--data-dir", help="folder of the images, as in benchmarks.compare")
    parser.add_argument("--train-size", type=whole, help="number of train images to keep")
    parser.add_argument("--seeds", type=whole, default=8)
    parser.add_argument("--epochs", type=whole, default=10)
    parser.add_argument("--batch-size", type=whole, default=64)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--depth", type=whole, default=1, help="blocks per stage")
    parser.add_argument("--width", type=whole, default=16, help="channels of the first stage")
    parser.add_argument("--arms", nargs="+", choices=list(arms(1)), metavar="ARM")
    parser.add_argument("--output", type=Path, default=Path("runs/spectral"))
    options = parser.parse_args(argv)
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements as one JSON-ready dict."""
    from rich.progress import Progress

    dataset = data.load(options.data, options.data_dir, train_size=options.train_size)
    if options.batch_size > len(dataset.train_labels):
        number = len(dataset.train_labels)
        raise ValueError(f"--batch-size {options.batch_size} is above the {number} train images")
    inputs = training.put(dataset)
    size = dataset.train_images.shape[1]
    methods = arms(-(-size // (2 if size < 16 else 4)))
    methods = {name: methods[name] for name in options.arms or methods}
    found = []
    with Progress(transient=True) as progress:
        task = progress.add_task("spectral", total=len(methods) * options.epochs)
        for name, method in methods.items():
            progress.update(task, description=name)
            arm = _train(method, dataset, inputs, options, lambda: progress.advance(task))
            found.append({"name": name, "method": repr(method)} | arm)
    return {
        **machine.heading("spectral"),
        "configuration": {k: v for k, v in vars(options).items() if k not in ("output", "arms")},
        "train_images": len(dataset.train_labels),
        "test_images": len(dataset.test_labels),
        "arms": found,
    }


def _train(method, dataset, inputs, options, tick):
    """Accuracies [seeds] of the last epoch, and measures [seeds][epochs + 1][maps] by name."""
    network = models.build(
        "residual",
        method,
        classes=len(dataset.classes),
        width=options.width,
        depth=options.depth,
        early=EARLY,
    )
    program = training.compile(
        network,
        inputs,
        seeds=options.seeds,
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        augment=True,
        flip=options.data != "digits",
    )
    images = training.scale(inputs.train_images[:MEASURED_IMAGES], inputs)

    @jax.jit
    def measure(state):
        def one(state):
            variables = {"params": state.params, "batch_stats": state.batch_stats}
            maps = spectra.capture(network, variables, images, train=True)
            return spectra.measure({k: x for k, x in maps.items() if x.ndim == 4})

        return jax.lax.map(one, state)

    state = program.init(jnp.arange(options.seeds))
    history = [measure(state)]
    for _ in range(options.epochs):
        state = program.train(state, inputs)
        history.append(measure(state))
        tick()
    correct = program.evaluate(state, inputs).correct[:, -1]
    measures = {
        field: np.array(
            [[getattr(found, field) for found in step.values()] for step in history]
        ).transpose(2, 0, 1)
        for field in MEASURES
    }
    return {
        "test_accuracy": (np.asarray(correct) / len(dataset.test_labels)).tolist(),
        "maps": list(history[0]),
        "measures": {field: values.tolist() for field, values in measures.items()},
    }


def summary(results: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per arm, all of the last epoch; `*_gain` and `*_ratio` are to the first arm by seed.

    Pairs (mean, half of the 95 % interval or None): "accuracy" and "accuracy_gain", fractions of
    the test set; "flatness" and "flatness_gain", of the sums of the last stage. Triples (geometric
    mean, low and high end of the 95 % interval): "norms_ratio" and "sums_ratio", of the 99.9 %
    quantile of |x| of the normalized maps and of the sums of the last stage.
    """

    def last(arm, field, kind):
        return np.array(arm["measures"][field])[:, -1, _places(arm["maps"])[kind]].mean(1)

    def mean(values):
        return float(np.mean(values)), report.interval(values.tolist())

    base, rows = results["arms"][0], []
    for arm in results["arms"]:
        accuracy, flatness = np.array(arm["test_accuracy"]), last(arm, "flatness", "sums")
        row: dict[str, Any] = {
            "name": arm["name"],
            "accuracy": mean(accuracy),
            "accuracy_gain": mean(accuracy - np.array(base["test_accuracy"])),
            "flatness": mean(flatness),
            "flatness_gain": mean(flatness - last(base, "flatness", "sums")),
        }
        for kind in ("norms", "sums"):
            ratio = np.log(last(arm, "quantile", kind) / last(base, "quantile", kind))
            middle, half = mean(ratio)
            ends = () if half is None else (middle - half, middle + half)
            row[f"{kind}_ratio"] = tuple(float(np.exp(r)) for r in (middle, *ends))
        rows.append(row)
    return rows


def _places(maps):
    """Indices of the maps that are sums of blocks and outputs of norms in the last stage."""
    stage = max(int(name.split("_")[1]) for name in maps if name.endswith("/sum"))
    mine = [n.startswith(f"stage_{stage}_") and n.endswith("/sum") for n in maps]
    norms = [i for i, name in enumerate(maps) if name.startswith("norm_")]
    sums = np.flatnonzero(mine).tolist()
    return {"sums": sums, "norms": norms[-2 * len(sums) :]}


def show(results: dict[str, Any]) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 150)
    seeds = results["configuration"]["seeds"]
    table = Table(
        title=f"Last epoch, mean of {seeds} seeds ± half of the 95 % Student t interval; "
        "quantile: 99.9 % of |x|, ratio to batch norm [95 %]"
    )
    names = "accuracy, %", "gain, points", "flatness of sums", "gain", "quantile, norms"
    for name in ("arm", *names, "quantile, sums"):
        table.add_column(name, justify="left" if name == "arm" else "right")

    def pair(values, factor=1.0, sign=""):
        half = "n/a" if values[1] is None else f"{factor * values[1]:.2f}"
        return f"{factor * values[0]:{sign}.2f} ± {half}"

    def ratio(values):
        return f"{values[0]:.2f}" + (" [{:.2f}, {:.2f}]".format(*values[1:]) if values[1:] else "")

    for row in summary(results):
        table.add_row(
            row["name"],
            pair(row["accuracy"], 100),
            pair(row["accuracy_gain"], 100, "+"),
            pair(row["flatness"]),
            pair(row["flatness_gain"], 1, "+"),
            ratio(row["norms_ratio"]),
            ratio(row["sums_ratio"]),
        )
    console.print(table)


def plot(results: dict[str, Any], path: Path) -> None:
    """Accuracy gains, and flatness and quantiles of the last sum over the epochs."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    rows = summary(results)
    figure = Figure((13, 4), dpi=150, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for place, row in enumerate(rows[1:]):
        color = report.COLORS[(place + 1) % len(report.COLORS)]
        mean, half = row["accuracy_gain"]
        left.errorbar(100 * mean, place, xerr=100 * (half or 0), fmt="o", color=color, capsize=3)
    left.set_yticks(range(len(rows) - 1), [row["name"] for row in rows[1:]])
    left.invert_yaxis()
    left.axvline(0, color="black", linewidth=0.8)
    left.set_title("test accuracy less that of batch norm, points", loc="left", fontsize=10)
    titles = {
        "flatness": "flatness of the last sum (1: all frequencies alike)",
        "quantile": "99.9 % quantile of |x|, last sum",
    }
    for axes, (field, title) in zip((middle, right), titles.items(), strict=True):
        for place, arm in enumerate(results["arms"]):
            place_of_sum = _places(arm["maps"])["sums"][-1]
            values = np.array(arm["measures"][field])[:, :, place_of_sum]
            color = report.COLORS[place % len(report.COLORS)]
            axes.plot(values.mean(0), color=color, label=arm["name"])
            axes.fill_between(
                range(values.shape[1]), values.min(0), values.max(0), color=color, alpha=0.1
            )
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
    right.set_yscale("log")
    right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter("")
    middle.legend(frameon=False, fontsize=8)
    for axes in (left, middle, right):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
