"""Times norms of segments beside the same norm without: `python -m benchmarks.segments`.

A training step (forward and backward pass with a given cotangent, in one compiled program) with 64
segments is timed in turns with one without, for ids in order, as of packed documents, and in any.
Bytes are those that XLA counts, in units of the input; of loops it counts one turn.
"""

import argparse
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, speed

NUMBER = 64  # segments
SHAPES = ((16, 512, 256), (32, 2048, 256))
METHODS = ("BatchNorm", "InstanceNorm", "GroupNorm")
ORDERS = ("packed", "any")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark, prints the ratios and writes `segments.json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.segments", description=__doc__)
    parser.add_argument("--rounds", type=int, default=25, help="interleaved repetitions")
    parser.add_argument("--scale", type=int, default=1, help="divisor of the batch, for a trial")
    parser.add_argument("--output", type=Path, default=Path("runs/segments"))
    options = parser.parse_args(argv)
    if argv is None:
        speed.keep_memory("segments")
    rows = []
    for method in METHODS:
        for samples, *shape in SHAPES:
            for dtype in ("float32", "bfloat16"):
                size = (samples // options.scale, *shape)
                rows.append(measure(method, size, dtype, options.rounds))
                print(_line(rows[-1]), flush=True)
    results = {**machine.heading("segments"), "rows": rows}
    machine.write(results, options.output / "segments.json")
    return 0


def measure(method: str, shape: tuple[int, ...], dtype: str, rounds: int) -> dict[str, Any]:
    """One row: times of all programs, which take turns, and ratios to the one without segments."""
    import jax
    import numpy as np

    x, g = (jax.random.normal(jax.random.key(i), shape).astype(dtype) for i in range(2))
    row: dict[str, Any] = {"method": method, "shape": list(shape), "dtype": dtype}
    turns = {}
    for name, (program, given) in programs(method, shape).items():
        compiled = jax.jit(program).lower(x, g, **given).compile()
        cost: Any = compiled.cost_analysis()
        row[f"{name}_bytes"] = cost["bytes accessed"] / x.nbytes

        def turn(compiled=compiled, given=given):
            jax.block_until_ready(compiled(x, g, **given))  # caches as this one leaves them
            start = time.perf_counter()
            jax.block_until_ready(compiled(x, g, **given))
            return time.perf_counter() - start

        turn()
        turns[name] = turn
    times = np.array([[turn() for turn in turns.values()] for _ in range(rounds)])
    for name, column in zip(turns, times.T, strict=True):
        row[f"{name}_ms"] = float(np.median(column) * 1e3)
        low, middle, high = map(float, np.quantile(column / times[:, 0], (0.25, 0.5, 0.75)))
        row |= {f"{name}_ratio": middle, f"{name}_low": low, f"{name}_high": high}
    return row


def programs(method: str, shape: tuple[int, ...]) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Training steps `step(x, g)` without segments, with packed ones, and with ids in any order.

    Those of batch norm are segments of the batch, those of others of each sample.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    import normjax as nj

    def step(norm, x, g, **given):
        params, state = norm.init(jax.random.key(0), shape[-1])
        apply = lambda params, x: norm.apply(params, state, x, train=True, **given)
        y, pullback, new = jax.vjp(apply, params, x, has_aux=True)
        return y, new, pullback(g)

    norm = getattr(nj, method)
    ids = np.random.default_rng(0).integers(0, NUMBER, (*shape[:-1], 1), np.int32)
    over = 0 if method == "BatchNorm" else 1
    flat = np.sort(ids.reshape(*shape[:over], -1), -1).reshape(ids.shape)
    found: dict[str, Any] = {"plain": (functools.partial(step, norm()), {})}
    for order, own in zip(ORDERS, (flat, ids), strict=True):
        of = functools.partial(step, norm(num_segments=NUMBER))
        found[order] = of, {"segment_ids": jnp.asarray(own)}
    return found


def _line(row):
    ratios = ", ".join(f"{name} {row[f'{name}_ratio']:.2f}" for name in ORDERS)
    size = "x".join(map(str, row["shape"]))
    return f"{row['method']} {size} {row['dtype']}: {row['plain_ms']:.2f} ms; {ratios}"


if __name__ == "__main__":
    sys.exit(main())
