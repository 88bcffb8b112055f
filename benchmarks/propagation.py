"""How well predictions and small batches know statistics: `python -m benchmarks.propagation`.

The claim behind Kalman normalization (https://arxiv.org/abs/1802.03133): in a trained network the
statistics that the layer before predicts are nearer to the truth than those of two samples, and
both together are nearer than either. A network of four convolutions is trained with batch norm.
Then all train images give the true statistics of the input of every norm but the first; against
them stand those of small batches, two predictions, and the fusion over its gain. One prediction
starts from the moments of what the norm before puts out (mean bias, variance scale^2), the other,
of the public implementation, from the statistics of its input.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import data, machine, training
from benchmarks.models import Posterior, conv
from benchmarks.options import whole
from normjax import KalmanNorm
from normjax.analysis import figures, propagation
from normjax.linen import Norm
from normjax.linen.carry import carry

GAINS = tuple(float(g) for g in np.linspace(0, 1, 21))
PREDICTIONS: dict[Posterior, str] = {
    "output": "consistent prediction",
    "fused": "public implementation's prediction",
}


class Network(nn.Module):
    """Four convolutions, each with a Kalman norm and its ReLU; the third halves the resolution.

    Attributes:
      classes: number of classes.
      posterior: what the norms hand on, see `carry`.
      gain: of the norms; one is batch norm.
      width: channels of the first two convolutions; the others have twice as many.
    """

    classes: int
    posterior: Posterior = "output"
    gain: float = 1.0
    width: int = 16

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits f32[N, classes] of images f32[N, H, W, C]."""
        method = KalmanNorm(gain=self.gain, activation=nn.relu, momentum=0.9)
        with carry(posterior=self.posterior):
            for layer in range(4):
                features, stride = self.width * (1 + layer // 2), 1 + (layer == 2)
                x = conv(features, 3, stride, f"conv_{layer + 1}")(x)
                norm = Norm(method, name=f"norm_{layer + 1}")
                x = norm(x, use_running_average=not train)
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, measures and writes the results; returns 0, or 2 after one line about bad input."""
    parser = argparse.ArgumentParser(prog="benchmarks.propagation", description=__doc__)
    parser.add_argument("--data", default="digits", choices=("digits", "images", "cifar10-bin"))
    parser.add_argument("--data-dir", help="folder of the images, as in benchmarks.compare")
    parser.add_argument("--train-size", type=whole, help="number of train images to keep")
    parser.add_argument("--seeds", type=whole, default=4)
    parser.add_argument("--epochs", type=whole, default=10)
    parser.add_argument("--batch-size", type=whole, default=64, help="of the training")
    parser.add_argument(
        "--small-batch", type=whole, default=2, help="whose statistics are measured"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/propagation"))
    options = parser.parse_args(argv)
    try:
        results = run(options)
    except (ValueError, OSError) as error:
        print("propagation:", error, file=sys.stderr)
        return 2
    machine.write(results, options.output / "propagation.json", indent=None)
    plot(results).savefig(options.output / "propagation.png", dpi=150)
    show(results)
    print(f"Written to {options.output}/propagation.json and propagation.png")
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The errors as one JSON-ready dict."""
    dataset = data.load(options.data, options.data_dir, train_size=options.train_size)
    number = len(dataset.train_labels)
    if max(options.batch_size, options.small_batch) > number:
        raise ValueError(f"--batch-size or --small-batch is above the {number} train images")
    inputs, classes = training.put(dataset), len(dataset.classes)
    program = training.compile(
        Network(classes),
        inputs,
        seeds=options.seeds,
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=0.1,
    )
    state = program.init(jnp.arange(options.seeds))
    for _ in range(options.epochs):
        state = program.train(state, inputs)
    correct = program.evaluate(state, inputs).correct[:, -1]
    kept = number - number % options.small_batch
    order = np.random.default_rng(0).permutation(number)[:kept]
    images = training.scale(inputs.train_images[order], inputs)

    @jax.jit
    def measure(variables):
        tables = {}
        for posterior in PREDICTIONS:
            network = Network(classes, posterior)
            how = dict(batch_size=options.small_batch, train=False)
            found = propagation.capture(network, variables, images, **how)
            del found["norm_1"]
            tables[posterior] = {n: propagation.compare(f, GAINS) for n, f in found.items()}
        return tables

    errors = []
    for seed in range(options.seeds):
        one = jax.tree.map(lambda a, seed=seed: a[seed], (state.params, state.batch_stats))
        tables = measure(dict(zip(("params", "batch_stats"), one, strict=True)))
        plain = jax.tree.map(lambda a: np.asarray(a).tolist(), tables)
        errors.append(
            {
                posterior: {
                    norm: {kind: found._asdict() for kind, found in table.items()}
                    for norm, table in norms.items()
                }
                for posterior, norms in plain.items()
            }
        )
    return {
        **machine.heading("propagation"),
        "configuration": {k: v for k, v in vars(options).items() if k != "output"},
        "gains": list(GAINS),
        "test_accuracy": (np.asarray(correct) / len(dataset.test_labels)).tolist(),
        "errors": errors,
    }


def plot(results: dict[str, Any]) -> Any:
    """Errors of the fusion with the consistent prediction over the gain, by norm: the last seed."""
    rows = [
        {"gain": gain, "norm": name, "squared error of the mean": mean, "of the log-variance": var}
        for name, table in results["errors"][-1]["output"].items()
        for gain, mean, var in zip(GAINS, *table["fusion"].values(), strict=True)
    ]
    figure = figures.plot(rows, "gain", list(rows[0])[2:], by="norm")
    for axes in figure.axes:
        axes.set_yscale("log")
    return figure


def summary(results: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each norm and measure: means over seeds, and the gain that is best on average.

    The measures are "mean" and "log_var" of `normjax.analysis.propagation.Errors`.
    """
    rows, gains = [], results["gains"]
    for norm in results["errors"][0]["output"]:
        for measure in propagation.Errors._fields:

            def mean(posterior, kind, norm=norm, measure=measure):
                each = [seed[posterior][norm][kind][measure] for seed in results["errors"]]
                return np.mean(each, 0)

            fusion = mean("output", "fusion")
            best = int(np.argmin(fusion))
            rows.append(
                {
                    "norm": norm,
                    "measure": measure,
                    "batch": float(mean("output", "batch")),
                    "consistent": float(mean("output", "prediction")),
                    "public": float(mean("fused", "prediction")),
                    "fusion": float(fusion[best]),
                    "gain": gains[best],
                }
            )
    return rows


def show(results: dict[str, Any]) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    title = f"Mean squared errors of statistics, {len(results['errors'])} seeds"
    table = Table(title=title)
    for name in ("norm", "error of", "batch", *PREDICTIONS.values(), "best fusion", "its gain"):
        table.add_column(name)
    for row in summary(results):
        numbers = (f"{row[k]:.4f}" for k in ("batch", "consistent", "public", "fusion"))
        table.add_row(row["norm"], row["measure"], *numbers, f"{row['gain']:.2f}")
    Console(width=None if sys.stdout.isatty() else 130).print(table)


if __name__ == "__main__":
    sys.exit(main())
