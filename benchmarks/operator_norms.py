"""How much convolutions stretch, and what is taken for it: `python -m benchmarks.operator_norms`.

The norm of the operator of a convolution with zero padding, exactly: the largest singular value of
its dense matrix. Beside it the factors that `SpectralWeightNorm` finds: of the kernel as a matrix,
of the convolution of periodic maps ("torus"), and a bound. Kernels are those of a residual network
for digits, before and after training.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import normjax as nj
from benchmarks import data, machine, models, report, training
from benchmarks.options import whole

# Kernels of the network, with the size of their input maps and their stride.
LAYERS = {
    "stage_0_block_0_conv_1": (8, 1),
    "stage_1_block_0_conv_1": (8, 2),
    "stage_1_block_0_conv_2": (4, 1),
}
OPERATORS = ("matrix", "torus", "bound")
STEPS = 20  # of power iterations, before each of as many calls more


@functools.partial(jax.jit, static_argnames=("size", "stride", "periodic"))
def dense(kernel: jax.Array, *, size: int, stride: int, periodic: bool = False) -> jax.Array:
    """The matrix of a convolution [3, 3, in, out] of maps of that size, [inputs, outputs]."""
    number = size * size * kernel.shape[2]
    maps = jnp.eye(number).reshape(number, size, size, -1)
    pads = ((0, 0), (1, 1), (1, 1), (0, 0))
    maps = jnp.pad(maps, pads, mode="wrap" if periodic else "constant")
    layout = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(
        maps, kernel, (stride, stride), "VALID", dimension_numbers=layout, precision="highest"
    )
    return y.reshape(number, -1)


def exact(kernel: jax.Array, **how: Any) -> float:
    """The norm of the operator of a convolution."""
    return float(np.linalg.norm(np.asarray(dense(kernel, **how), float), 2))


def factor(operator: Any, kernel: jax.Array, *, size: int, stride: int) -> float:
    """What `SpectralWeightNorm` divides a kernel by, after many steps of power iteration."""
    fields: dict[str, Any] = {"iterations": STEPS, "operator": operator}
    if operator == "torus":
        fields["map_size"] = (size, size)
    if operator == "bound":
        fields["strides"] = stride
    method = nj.SpectralWeightNorm(**fields)
    params, state = method.init(jax.random.key(0), kernel)
    normal = kernel
    for _ in range(1 if operator == "torus" else STEPS):
        normal, state = method.apply(params, state, kernel, train=True)
    return float(jnp.linalg.norm(kernel) / jnp.linalg.norm(normal))


def kernels(seeds: int, epochs: int) -> dict[str, list[dict[str, jax.Array]]]:
    """Those of the network by seed and name, "random" and "trained"."""
    dataset = data.load("digits", None)
    network = models.build("residual", nj.BatchNorm(momentum=0.9), classes=len(dataset.classes))
    inputs = training.put(dataset)
    program = training.compile(
        network, inputs, seeds=seeds, epochs=epochs, batch_size=32, learning_rate=0.1
    )
    state = program.init(jnp.arange(seeds))
    found = {"random": state.params}
    for _ in range(epochs):
        state = program.train(state, inputs)
    found["trained"] = state.params
    return {
        kind: [{name: params[name]["kernel"][seed] for name in LAYERS} for seed in range(seeds)]
        for kind, params in found.items()
    }


def rows(seeds: int, epochs: int) -> list[dict[str, Any]]:
    """A row for each kind of kernels and layer, with numbers by seed.

    `norm` is that of the operator; the others are over it, and "periodic" is the torus's over the
    norm with periodic padding.
    """
    table = []
    for kind, by_seed in kernels(seeds, epochs).items():
        for name, (size, stride) in LAYERS.items():
            found: dict[str, list[float]] = {key: [] for key in ("norm", *OPERATORS, "periodic")}
            shape = list(by_seed[0][name].shape)
            for kernel in (one[name] for one in by_seed):
                how = {"size": size, "stride": stride}
                norm = exact(kernel, **how)
                values = {name: factor(name, kernel, **how) for name in OPERATORS}
                found["norm"].append(norm)
                for operator, value in values.items():
                    found[operator].append(value / norm)
                found["periodic"].append(values["torus"] / exact(kernel, periodic=True, **how))
            row = {"kernels": kind, "shape": shape, "size": size, "stride": stride}
            table.append({**row, **found})
    return table


def cells(results: dict[str, Any]) -> list[list[str]]:
    """The table as text, its head first."""
    head = ["kernel", "maps", "stride", "kernels", "norm of the operator"]
    head += ["matrix / norm", "torus / norm", "bound / norm", "torus / periodic norm"]
    lines = [head]
    for row in results["rows"]:
        size = f"{row['size']}x{row['size']}"
        line = ["x".join(map(str, row["shape"])), size, str(row["stride"]), row["kernels"]]
        for name in ("norm", *OPERATORS, "periodic"):
            half = report.interval(row[name])
            width = "n/a" if half is None else f"{half:.3f}"
            line.append(f"{np.mean(row[name]):.3f} ± {width}")
        lines.append(line)
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, measures, prints the table and writes `operator_norms.json`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.operator_norms", description=__doc__
    )
    parser.add_argument("--seeds", type=whole, default=8)
    parser.add_argument("--epochs", type=whole, default=15, help="of training")
    parser.add_argument("--output", type=Path, default=Path("runs/operator_norms"))
    options = parser.parse_args(argv)
    found = rows(options.seeds, options.epochs)
    results = {**machine.heading("operator_norms", "flax", "scikit-learn"), "rows": found}
    machine.write(results, options.output / "operator_norms.json", indent=None)
    report.print_cells(cells(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
