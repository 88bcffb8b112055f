"""Times the linear regions of networks in a plane: `python -m benchmarks.regions`.

Networks with random weights and batch norm in evaluation: perceptrons of three hidden layers, and a
convolutional one with max-pooling and a residual sum. Where the package `relucent` is installed,
with PyTorch, it searches the regions of the same perceptron in the same window, up to a number of
them. Times are of a call, with all that is traced and compiled in it.
"""

import argparse
import importlib.util
import itertools
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.options import whole

PEER = "relucent"
RADIUS = 3.0  # half the side of the window


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark, prints its rows and writes `regions.json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regions", description=__doc__)
    parser.add_argument("--widths", type=whole, nargs="+", default=[8, 64], help="of perceptrons")
    parser.add_argument("--size", type=whole, default=16, help="of the images")
    parser.add_argument("--repeats", type=whole, default=3, help="of which the median counts")
    parser.add_argument("--peer-regions", type=whole, default=1000, help="most that it searches")
    parser.add_argument("--output", type=Path, default=Path("runs/regions"))
    options = parser.parse_args(argv)
    peer = all(map(importlib.util.find_spec, (PEER, "torch")))
    rows = []
    for width in options.widths:
        layers = perceptron(width)
        row = {"network": f"perceptron, 3 x {width}", **measure(*function(layers), options.repeats)}
        if peer:
            row[PEER] = search(layers, options.peer_regions)
        rows.append(row)
        print(_line(row), flush=True)
    row = measure(*convolutional(options.size), options.repeats)
    rows.append({"network": f"convolutional, {options.size} x {options.size}", **row})
    print(_line(rows[-1]))
    heading = machine.heading("regions", *((PEER, "torch") if peer else ()))
    machine.write({**heading, "rows": rows}, options.output / "regions.json")
    return 0


def perceptron(width: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Kernels and biases of layers, the batch norm of random data folded into them."""
    rng, sizes = np.random.default_rng(0), (2, width, width, width, 3)
    h, layers = rng.normal(size=(512, 2)), []
    for n, m in itertools.pairwise(sizes):
        kernel = rng.normal(size=(n, m))
        z = h @ kernel
        layers.append((kernel / z.std(0), rng.normal(size=m) / 2 - z.mean(0) / z.std(0)))
        h = np.maximum(h @ layers[-1][0] + layers[-1][1], 0)
    return layers


def function(layers: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Any, None]:
    """A perceptron as a function of an input, which is in the plane."""
    import jax

    def f(x):
        for kernel, bias in layers[:-1]:
            x = jax.nn.relu(x @ kernel + bias)
        return x @ layers[-1][0] + layers[-1][1]

    return f, None


def convolutional(size: int) -> tuple[Any, Any]:
    """A network over images as a function of an input, and a plane through three images."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    import normjax.linen
    from normjax.analysis import geometry

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = lambda: normjax.linen.BatchNorm(use_running_average=True)
            x = nn.relu(norm()(nn.Conv(8, (3, 3))(x)))
            x = nn.max_pool(x, (2, 2), (2, 2))
            y = nn.relu(norm()(nn.Conv(8, (3, 3))(x)))
            x = nn.relu(x + norm()(nn.Conv(8, (3, 3))(y)))
            return nn.Dense(10)(x.mean((0, 1)))

    rng = np.random.default_rng(0)
    images = rng.normal(size=(3, size, size, 3))
    variables = Network().init(jax.random.key(0), jnp.asarray(images[0], "float32"))
    return lambda x: Network().apply(variables, x), geometry.Plane.through(*images)


def measure(f: Any, plane: Any, repeats: int) -> dict[str, Any]:
    """How many regions there are in the window, and the median of times to find them."""
    from normjax.analysis import geometry

    window = ((-RADIUS, RADIUS), (-RADIUS, RADIUS))
    times, count = [], 0
    for _ in range(repeats):
        start = time.perf_counter()
        regions = geometry.regions_2d(f, plane, window)
        times.append(time.perf_counter() - start)
        count = regions.count
    return {"regions": count, "seconds": float(np.median(times))}


def search(layers: list[tuple[np.ndarray, np.ndarray]], most: int) -> dict[str, Any]:
    """How many regions relucent finds, up to `most`, how long it takes, and whether it ends."""
    import torch  # pyright: ignore[reportMissingImports]
    from relucent import Complex  # pyright: ignore[reportMissingImports]

    modules = []
    for kernel, bias in layers:
        linear = torch.nn.Linear(*kernel.shape, dtype=torch.float64)
        linear.weight.data, linear.bias.data = torch.tensor(kernel.T.copy()), torch.tensor(bias)
        modules += [linear, torch.nn.ReLU()]
    network = Complex(torch.nn.Sequential(*modules[:-1]))
    how: Any = {"cube_radius": RADIUS, "cube_mode": "intersect", "verify": False, "verbose": 0}
    start = time.perf_counter()
    found = network.bfs(max_polys=most, nworkers=os.cpu_count(), **how)
    seconds = time.perf_counter() - start
    return {"regions": len(network), "seconds": seconds, "complete": bool(found.complete)}


def _line(row):
    text = f"{row['network']}: {row['regions']} regions in {row['seconds']:.2f} s"
    if PEER in row:
        peer = row[PEER]
        text += f"; {PEER} {peer['regions']} in {peer['seconds']:.1f} s"
    return text


if __name__ == "__main__":
    sys.exit(main())
