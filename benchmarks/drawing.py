"""Times the two ways to the sums of drawn ghosts: `python -m benchmarks.drawing`.

Ghost noise draws N of B samples for every sample and needs sums of their moments, two numbers for
each channel: by gathering one draw after the other, or by a product with the matrix of how often
each sample was drawn. The table has the time of the product over that of gathering, and which way
`normjax.methods.ghost_noise` takes.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from benchmarks.options import whole
from normjax.methods import ghost_noise as noise

BATCHES = (32, 64, 128, 256, 512, 1024, 2048)
CHANNELS = (64, 512)
SIZES = (4, 8, 16, 32, 64, 128, 256)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the table and writes `drawing.json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drawing", description=__doc__)
    for name, default in (("batches", BATCHES), ("channels", CHANNELS), ("sizes", SIZES)):
        parser.add_argument(f"--{name}", type=whole, nargs="+", default=default)
    parser.add_argument("--rounds", type=whole, default=15, help="interleaved repetitions")
    parser.add_argument("--output", type=Path, default=Path("runs/drawing"))
    options = parser.parse_args(argv)
    results = run(options)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "drawing.json").write_text(json.dumps(results, indent=1) + "\n")
    show(results)
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements as one JSON-ready dict."""
    rows = [
        measure(batch, size, channels, options.rounds)
        for channels in options.channels
        for batch in options.batches
        for size in options.sizes
        if size <= batch
    ]
    return {
        "command": shlex.join(["python", "-m", "benchmarks.drawing", *sys.argv[1:]]),
        "machine": machine.describe(),
        "versions": {"jax": jax.__version__},
        "rows": rows,
        "worst": max(row["regret"] for row in rows),
    }


def measure(batch: int, size: int, channels: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of both ways, taking turns, and what the choice of the library costs."""
    table = jax.random.normal(jax.random.key(0), (batch, 2, channels))
    indices = jax.random.randint(jax.random.key(1), (batch, size), 0, batch, dtype=jnp.int32)

    def program(count):
        def ghosts(table, indices):
            return noise.resampled(table, indices, count=count)

        compiled = jax.jit(ghosts).lower(table, indices).compile()
        jax.block_until_ready(compiled(table, indices))
        return compiled

    times = []
    programs = program(True), program(False)
    for _ in range(rounds):
        for compiled in programs:
            start = time.perf_counter()
            jax.block_until_ready(compiled(table, indices))
            times.append(time.perf_counter() - start)
    counting, gathering = np.median(np.reshape(times, (-1, 2)), 0) * 1e3
    counts = noise.counts_draws(size, batch)
    return {
        "batch": batch,
        "size": size,
        "channels": channels,
        "counting_ms": float(counting),
        "gathering_ms": float(gathering),
        "counts": counts,
        "regret": float((counting if counts else gathering) / min(counting, gathering)),
    }


def show(results: dict[str, Any]) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    rows = results["rows"]
    sizes = sorted({row["size"] for row in rows})
    table = Table(title="Time of counting / of gathering; * counting is taken")
    for name in ("channels", "batch", *map(str, sizes)):
        table.add_column(name, justify="right")
    for channels, batch in dict.fromkeys((row["channels"], row["batch"]) for row in rows):
        found = {r["size"]: r for r in rows if (r["channels"], r["batch"]) == (channels, batch)}
        cells = (_cell(found[size]) if size in found else "" for size in sizes)
        table.add_row(str(channels), str(batch), *cells)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(f"the way taken costs at most {results['worst']:.2f} x the better one")


def _cell(row):
    return f"{row['counting_ms'] / row['gathering_ms']:.2f}{'*' if row['counts'] else ' '}"


if __name__ == "__main__":
    sys.exit(main())
