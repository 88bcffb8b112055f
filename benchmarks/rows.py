"""Times each pass of layer norm's training step beside a copy: `python -m benchmarks.rows`.

Every pass is timed as a program of its own, in units of a copy of the input, which takes turns with
it: one read and one write. So are other ways to make a pass, relative to the way that is used.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import normjax as nj
from benchmarks import machine, speed
from benchmarks.options import whole
from benchmarks.stacks import interleaved
from normjax.core import passes
from normjax.core.cpu import sums_of
from normjax.core.variance import average, wide, widen

SHAPES = ((4096, 768), (64, 197, 768))  # multiples of all parts and blocks below
DTYPES = ("float32", "bfloat16")
NORM = nj.LayerNorm()
SHARE = 8  # statistics in one read are about the mean of one feature in so many
BLOCK = 32  # rows, of the backward pass in blocks


class Arrays(NamedTuple):
    """What passes read: input and cotangent [..., C], numbers of rows [..., 1], features [1, C]."""

    x: jax.Array
    g: jax.Array
    mean: jax.Array
    inverse: jax.Array
    scale: jax.Array
    bias: jax.Array


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark, prints the tables and writes `rows.json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rows", description=__doc__)
    parser.add_argument("--rounds", type=whole, default=25, help="interleaved repetitions")
    parser.add_argument("--output", type=Path, default=Path("runs/rows"))
    options = parser.parse_args(argv)
    if argv is None:
        speed.keep_memory("rows")
    results = run(options.rounds)
    machine.write(results, options.output / "rows.json")
    show(results)
    print(f"Written to {options.output}/rows.json")
    return 0


def run(rounds: int) -> dict[str, Any]:
    """All measurements as one JSON-ready dict."""
    from rich.progress import Progress

    todo = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]
    rows = []
    with Progress(transient=True) as progress:
        task = progress.add_task("rows", total=len(todo))
        for case in todo:
            progress.update(task, description=" ".join(map(str, case)))
            rows.append(measure(*case, rounds))
            progress.advance(task)
    return {**machine.heading("rows"), "rows": rows}


def draw(shape: tuple[int, ...], dtype: str) -> Arrays:
    """Arrays of normal numbers, with the statistics of the input."""
    features = (1,) * (len(shape) - 1) + shape[-1:]
    sizes = (shape, shape, features, features)
    x, g, *small = (jax.random.normal(jax.random.key(i), size) for i, size in enumerate(sizes))
    x, g = x.astype(dtype), g.astype(dtype)
    mean, var = statistics(x)
    return Arrays(x, g, mean, lax.rsqrt(var + NORM.epsilon), *small)


def measure(shape: tuple[int, ...], dtype: str, rounds: int) -> dict[str, Any]:
    """One row: passes in units of a copy, and other ways relative to what is used.

    All programs take turns. Numbers are medians over the turns, `low` and `high` are quartiles.
    """
    programs = {"copy": lambda a: -a.x, **PASSES}
    programs |= {(of, name): f for of, ways in WAYS.items() for name, f in ways.items()}
    arrays = draw(shape, dtype)
    seconds = interleaved({name: (jax.jit(f), (arrays,)) for name, f in programs.items()}, rounds)

    def found(name, unit, field):
        low, middle, high = np.quantile(seconds[name] / seconds[unit], (0.25, 0.5, 0.75)).tolist()
        ms = float(np.median(seconds[name])) * 1e3
        return {"ms": ms, field: middle, "low": low, "high": high}

    return {
        "shape": list(shape),
        "dtype": dtype,
        "copy_ms": float(np.median(seconds["copy"])) * 1e3,
        "passes": {name: found(name, "copy", "copies") for name in PASSES},
        "ways": {
            of: {name: found((of, name), of, "ratio") for name in ways} for of, ways in WAYS.items()
        },
    }


# The passes as the norm makes them.


def mean_of(x: jax.Array) -> jax.Array:
    """Means of rows."""
    n = jnp.full((), x.shape[-1], wide(x.dtype))
    return average(widen(x), None, n, ((x.ndim - 1,), None))


def variance_of(x: jax.Array, mean: jax.Array) -> jax.Array:
    """Variances of rows, about their mean."""
    square = lambda x, mean: jnp.square(widen(x) - mean)
    return sums_of(square, (x.ndim - 1,), x, mean)[0] / x.shape[-1]


def statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Means, then variances."""
    x, mean = lax.optimization_barrier((x, mean_of(x)))
    return mean, variance_of(x, mean)


def output(a: Arrays) -> jax.Array:
    """The normalized rows, times scale, plus bias."""
    return passes.apply(a.x, nj.Normalizer(a.mean, a.inverse, a.scale, a.bias))


def along(x: jax.Array, g: jax.Array, mean: jax.Array, scale: jax.Array) -> tuple[jax.Array, ...]:
    """What is summed along rows: cotangents of inverse deviations, and of normalized rows."""
    h = widen(g) * scale
    return h * (widen(x) - mean), h


def across(
    x: jax.Array, g: jax.Array, mean: jax.Array, inverse: jax.Array
) -> tuple[jax.Array, ...]:
    """What is summed across rows: gradients of scale and of bias."""
    h = widen(g)
    return h * ((widen(x) - mean) * inverse), h


def row_sums(a: Arrays) -> list[jax.Array]:
    """Both sums along rows."""
    return sums_of(along, (a.x.ndim - 1,), a.x, a.g, a.mean, a.scale)


def column_sums(a: Arrays) -> list[jax.Array]:
    """Gradients of scale and bias."""
    return sums_of(across, tuple(range(a.x.ndim - 1)), a.x, a.g, a.mean, a.inverse)


def input_gradient(a: Arrays, shift: jax.Array, slope: jax.Array) -> jax.Array:
    """Gradient of the input, of which the statistics move it by `shift + slope (x - mean)`."""
    wide = widen(a.g) * a.inverse * a.scale + (widen(a.x) - a.mean) * slope + shift
    return wide.astype(a.x.dtype)


def backward(
    a: Arrays, along_rows: Callable = row_sums, along_columns: Callable = column_sums
) -> tuple[jax.Array, ...]:
    """Gradients of the input, of scale and of bias, in three passes."""
    of_inverse, of_normal = along_rows(a)
    shift = -of_normal * a.inverse / a.x.shape[-1]
    slope = -of_inverse * a.inverse**3 / a.x.shape[-1]
    a, shift, slope = lax.optimization_barrier((a, shift, slope))
    gradients = along_columns(a)
    a, shift, slope, gradients = lax.optimization_barrier((a, shift, slope, gradients))
    return input_gradient(a, shift, slope), *gradients


def step(a: Arrays) -> Any:
    """The norm itself: output, and gradients of the input, of scale and of bias."""
    params = nj.AffineParams(jnp.ravel(a.scale), jnp.ravel(a.bias))
    y, pullback = jax.vjp(lambda x, p: NORM.apply(p, (), x, train=True)[0], a.x, params)
    dx, gradient = pullback(a.g)
    return y, dx, gradient.scale, gradient.bias


# Other ways to make them.


def about_share(a: Arrays) -> tuple[jax.Array, jax.Array]:
    """Means and variances from one read about a centre, the mean of some features."""
    axes, n = (a.x.ndim - 1,), a.x.shape[-1]
    x, centre = lax.optimization_barrier((a.x, mean_of(a.x[..., : n // SHARE])))
    both = lambda x, centre: (widen(x) - centre, jnp.square(widen(x) - centre))
    gap, square = (total / n for total in sums_of(both, axes, x, centre))
    return centre + gap, square - jnp.square(gap)


def one_by_one(values: Callable, arrays: Sequence[jax.Array], axis: int) -> list[jax.Array]:
    """A pass for each sum."""
    first = jnp.sum(values(*arrays)[0], axis, keepdims=True)
    arrays, first = lax.optimization_barrier((arrays, first))
    return [first, jnp.sum(values(*arrays)[1], axis, keepdims=True)]


def products(values: Callable, arrays: Sequence[jax.Array], axis: int) -> list[jax.Array]:
    """Products of matrices with ones."""
    ones = jnp.ones((1, arrays[0].shape[axis]), jnp.float32)
    return [a @ ones.T if axis else ones @ a for a in values(*arrays)]


def in_parts(*sizes: int, over: int = 0) -> Callable:
    """Both sums by one reduction, first over the part `over` of an axis divided into `sizes`."""

    def divided(a, axis):
        own = sizes if a.shape[axis] > 1 else (1,) * len(sizes)
        return a.reshape(*a.shape[:axis], *own, *a.shape[axis + 1 :])

    def reduce(values, arrays, axis):
        found = values(*lax.optimization_barrier([divided(a, axis) for a in arrays]))
        zeros = tuple(np.zeros((), a.dtype) for a in found)
        add = lambda a, b: (a[0] + b[0], a[1] + b[1])
        parts = lax.optimization_barrier(lax.reduce(found, zeros, add, (axis + over,)))
        rest = tuple(range(axis, axis + len(sizes) - 1))
        return [jnp.expand_dims(jnp.sum(a, rest), axis) for a in parts]

    return reduce


def flat(a: Arrays) -> Arrays:
    """All rows on one axis."""
    return Arrays(*(a.reshape(-1, a.shape[-1]) for a in a))


def sums_by(way: Callable, of: str) -> Callable[[Arrays], list[jax.Array]]:
    """The "row sums" or "column sums" as `way` makes them of all rows on one axis."""

    def run(a):
        a = flat(a)
        values, small, axis = SUMS[of]
        return way(values, (a.x, a.g, a.mean, getattr(a, small)), axis)

    return run


def in_blocks(loops: int) -> Callable[[Arrays], tuple[jax.Array, ...]]:
    """`backward` of one block of rows after another, in loops that do not depend on each other."""

    def block(a, sums, rows):
        dx, *found = backward(a._replace(**rows))
        return jax.tree.map(jnp.add, sums, found), dx

    def run(a):
        a = flat(a)
        moving = {name: getattr(a, name) for name in ("x", "g", "mean", "inverse")}
        zeros, ends = [jnp.zeros_like(a.scale)] * 2, []
        for i in range(loops):
            cut = lambda m, i=i: m.reshape(loops, -1, BLOCK, m.shape[-1])[i]
            ends.append(lax.scan(lambda *c: block(a, *c), zeros, jax.tree.map(cut, moving)))
        dx = jnp.concatenate([dx for _, dx in ends]).reshape(a.x.shape)
        return dx, *jax.tree.map(lambda *sums: sum(sums), *(sums for sums, _ in ends))

    return run


SUMS = {"row sums": (along, "scale", 1), "column sums": (across, "inverse", 0)}
PASSES: dict[str, Callable[[Arrays], Any]] = {
    "mean": lambda a: mean_of(a.x),
    "variance": lambda a: variance_of(a.x, a.mean),
    "mean, then variance": lambda a: statistics(a.x),
    "output": output,
    "row sums": row_sums,
    "column sums": column_sums,
    "gradient of the input": lambda a: input_gradient(a, a.mean, a.inverse),
    "backward pass": backward,
    "training step": step,
}
OF_SUMS = {
    "a pass for each": one_by_one,
    "products with ones": products,
    "one reduction, undivided": in_parts(-1),
    "one reduction, 16 parts first": in_parts(16, -1),
    "one reduction, 32 parts first": in_parts(32, -1),
}
WAYS: dict[str, dict[str, Callable[[Arrays], Any]]] = {
    "mean, then variance": {"one read about a share": about_share},
    "row sums": {name: sums_by(way, "row sums") for name, way in OF_SUMS.items()},
    "column sums": {
        name: sums_by(way, "column sums")
        for name, way in (OF_SUMS | {"blocks of 64 rows": in_parts(-1, 8, 8, over=1)}).items()
    },
    "backward pass": {
        "sums in 16 parts first": lambda a: backward(
            flat(a), *(sums_by(in_parts(16, -1), of) for of in SUMS)
        ),
        f"blocks of {BLOCK} rows, one loop": in_blocks(1),
        f"blocks of {BLOCK} rows, two loops": in_blocks(2),
    },
}


def cells(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Head and rows of a table of the passes: copies, and milliseconds in brackets."""
    found = results["rows"]
    copy = ("copy (read, write)", *(f"1 ({row['copy_ms']:.2f})" for row in found))
    lines = [
        (name, *("{copies:.2f} ({ms:.2f})".format(**row["passes"][name]) for row in found))
        for name in found[0]["passes"]
    ]
    return [("pass", *_cases(found)), copy, *lines]


def tried(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Head and rows of a table of other ways: time over that of what is used, with quartiles."""
    found = results["rows"]
    ratio = "{ratio:.2f} ({low:.2f} to {high:.2f})"
    lines = [
        (of, name, *(ratio.format(**row["ways"][of][name]) for row in found))
        for of, ways in found[0]["ways"].items()
        for name in ways
    ]
    return [("instead of", "tried", *_cases(found)), *lines]


def _cases(rows):
    return (f"{'x'.join(map(str, row['shape']))} {row['dtype']}" for row in rows)


def show(results: dict[str, Any]) -> None:
    """Prints both tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 170)
    titles = "Passes in units of a copy (ms)", "Time over that of what is used (quartiles)"
    for title, (head, *lines) in zip(titles, (cells(results), tried(results)), strict=True):
        table = Table(*head, title=title)
        for line in lines:
            table.add_row(*line)
        console.print(table)


if __name__ == "__main__":
    sys.exit(main())
