"""Training of a ResNet on many devices: `python -m benchmarks.scaling`.

Two parts (`--parts`), each with flax.linen's batch norm, normjax's and no norm, by the same step of
`normjax.training`:

devices: a small network trains on 1, 2, 4 and 8 simulated devices. How far parameters and
statistics end from those of one device, and what the program sends.

pods: ResNet-50 is compiled for slices of 64 and 256 TPUs that are not there (extra
`compilers-tpu`). What the program sends, and what a model of it says (`cost`).

Messages are operations between devices in the compiled program, for these layouts:

- jit: the compiler divides one global program by how its arrays are sharded.
- shard_map: each device runs its part, and norms name the axis.
- data: the batch is sharded over all devices, parameters are replicated.
- fsdp: parameters other than those of norms are sharded over the same devices too.
"""

import argparse
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import machine
from benchmarks.compilers import targets, traffic

ARMS = ("flax", "normjax", "no norm")
LAYOUTS = {
    "jit, data": ("jit", None),
    "jit, fsdp": ("jit", "data"),
    "shard_map, data": ("shard_map", None),
    "shard_map, fsdp": ("shard_map", "data"),
}
DEVICES = (1, 2, 4, 8)
PODS = ("v5e:8x8", "v5e:16x16")
PARTS = ("devices", "pods")
STEPS = 3
SMALL = {"size": 16, "width": 8, "stages": (1, 1), "classes": 10, "batch": 64}
FULL = {"size": 224, "width": 64, "stages": (3, 4, 6, 3), "classes": 1000, "batch": 32}  # a chip
# Of a chip of v5e, https://cloud.google.com/tpu/docs/v5e: 1600 Gbit/s between chips. The time of a
# hop is an assumption.
BANDWIDTH = 1600e9 / 8
HOP = 1e-6
FLAGS = "--xla_force_host_platform_device_count=8"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts, prints their tables and writes a file for each.

    Returns:
      0; 1 if a program did not compile; 2 after a line about a compiler that is not installed.
    """
    options = _options(argv)
    if argv is None and os.environ.get("XLA_FLAGS") != FLAGS:
        targets.prepare()
        arguments = [sys.executable, "-m", "benchmarks.scaling", *sys.argv[1:]]
        os.execve(sys.executable, arguments, {**os.environ, "XLA_FLAGS": FLAGS})
    failed = False
    for part in options.parts:
        if part == "pods" and (sentence := targets.Target(options.slices[0]).missing()):
            print(f"scaling: {sentence}", file=sys.stderr)
            return 2
        results = run(part, options)
        show(part, results)
        failed |= any("note" in row for row in results["rows"])
        print(f"Written to {options.output}/{part}.json")
    return int(failed)


def _options(argv):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    text = f"slices of TPUs (default: {' '.join(PODS)})"
    parser.add_argument("--slices", nargs="+", default=PODS, metavar="SLICE", help=text)
    text = "of ResNet-50 on pods (default: all)"
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help=text)
    parser.add_argument("--output", type=Path, default=Path("runs/scaling"))
    return parser.parse_args(argv)


def run(part: str, options: argparse.Namespace) -> dict[str, Any]:
    """The rows of a part, written as they grow; those of them that the file has already stay."""
    from rich.progress import Progress

    file = options.output / f"{part}.json"
    packages = ("flax", "libtpu") if part == "pods" else ("flax",)
    heading = machine.heading("scaling", *packages)
    old = json.loads(file.read_text())["rows"] if file.exists() else []
    jobs = list(device_jobs() if part == "devices" else pod_jobs(options.slices, options.layouts))
    asked = [case for case, _ in jobs]
    case_of = lambda row: {name: row.get(name) for name in asked[0]}
    rows = [row for row in old if case_of(row) in asked and "note" not in row]
    results, known = {**heading, "rows": rows}, [case_of(row) for row in rows]
    with Progress(transient=True) as progress:
        task = progress.add_task(part, total=len(jobs))
        for case, measure in jobs:
            progress.update(task, description=" ".join(map(str, case.values())))
            if case not in known:
                results["rows"].append(_attempt(case, measure))
                machine.write(results, file)
            progress.advance(task)
    machine.write(results, file)
    return results


def _attempt(case, measure):
    from benchmarks.bandwidth import attempt

    return attempt(case, measure)


def device_jobs() -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Trainings of the small network, each with a function that runs it."""
    for layout in LAYOUTS:
        for arm in ARMS:
            for devices in DEVICES:
                case = {"layout": layout, "arm": arm, "devices": devices}
                yield case, functools.partial(trained, **case)


def pod_jobs(
    slices: Sequence[str], layouts: Sequence[str]
) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Programs of ResNet-50, each with a function that compiles it."""
    for name in slices:
        for layout in layouts:
            for arm in ARMS:
                case = {"slice": name, "layout": layout, "arm": arm}
                yield case, functools.partial(compiled, **case)


def network(arm: str, axis_name: str | None, setting: dict[str, Any], dtype: Any) -> Any:
    """The ResNet of an arm."""
    import flax.linen as nn

    import normjax.linen
    from benchmarks.resnet import ResNet

    if arm == "no norm":
        norm = lambda **_: lambda x: x
    else:
        kind = nn.BatchNorm if arm == "flax" else normjax.linen.BatchNorm
        norm = functools.partial(kind, momentum=0.9, axis_name=axis_name, dtype=dtype)
    how = {name: setting[name] for name in ("width", "stages", "classes")}
    return ResNet(norm, dtype=dtype, **how)


def loss(model: Callable[..., Any], batch: dict[str, Any], train: bool) -> Any:
    """Cross-entropy."""
    import optax

    from normjax import training

    logits = model(batch["image"], train=train)
    return training.Loss(optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]))


def step_of(layout: str, arm: str, mesh: Any, setting: dict[str, Any], dtype: Any) -> Any:
    """The compiled step of a layout on a mesh, and what makes its state."""
    import jax
    import numpy as np
    import optax

    from normjax import training

    mode, fsdp = LAYOUTS[layout]
    mapped = mode == "shard_map"
    model = network(arm, "data" if mapped else None, setting, dtype)
    optimizer = optax.sgd(0.05, momentum=0.9)
    image = np.zeros((1, setting["size"], setting["size"], 3), np.float32)
    args = (model, optimizer, jax.random.key(0), image)
    make = functools.partial(training.create_train_state, *args, train=False)
    where = {"mesh": mesh} if mapped else {}
    step = training.make_train_step(model, optimizer, loss, mode=mode, **where)
    return step, make, fsdp


def trained(layout: str, arm: str, devices: int) -> dict[str, Any]:
    """Trains the small network; how far it ends from one device, and what its program sends."""
    import jax
    import numpy as np

    (wanted, _), (got, sent) = (run_small(layout, arm, number) for number in (1, devices))
    gaps = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), got, wanted)
    return {"collectives": sent, "difference": max(jax.tree.leaves(gaps)), "steps": STEPS}


@functools.cache
def run_small(layout: str, arm: str, number: int) -> tuple[Any, dict[str, Any]]:
    """Parameters and statistics of the small network after its steps, and what these sent."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from normjax import training

    mesh = jax.make_mesh((number,), ("data",), devices=jax.devices()[:number])
    step, make, fsdp = step_of(layout, arm, mesh, SMALL, jnp.float32)
    state, program = make(mesh=mesh, fsdp=fsdp), None
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        shape = (SMALL["batch"], SMALL["size"], SMALL["size"], 3)
        image = rng.normal(1, 2, size=shape).astype(np.float32)
        batch = {"image": image, "label": rng.integers(0, SMALL["classes"], shape[0])}
        batch = training.shard_batch(batch, mesh)
        program = program or step.lower(state, batch).compile()
        state, _ = program(state, batch)
    assert program is not None
    sent = traffic.count(program.as_text()).collectives
    return jax.device_get((state.params, state.statistics)), sent


def compiled(slice: str, layout: str, arm: str) -> dict[str, Any]:
    """Compiles ResNet-50 for a slice of TPUs; what its program sends, and what the model says."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from normjax import training

    devices = targets.Target(slice).devices()
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    step, make, fsdp = step_of(layout, arm, mesh, FULL, jnp.bfloat16)
    shapes = jax.eval_shape(make)
    where = training.placement(shapes, mesh, fsdp=fsdp)
    place = lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    state = jax.tree.map(place, shapes, where)
    rows, size = FULL["batch"] * len(devices), FULL["size"]
    spread = jax.NamedSharding(mesh, jax.P("data"))
    batch = {
        "image": jax.ShapeDtypeStruct((rows, size, size, 3), jnp.float32, sharding=spread),
        "label": jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=spread),
    }
    program = step.lower(state, batch).compile()
    sizes = [4 * math.prod(a.shape) for a in jax.tree.leaves(state.params)]
    split = [any(sharding.spec) for sharding in jax.tree.leaves(where.params)]
    return {
        "chips": len(devices),
        "collectives": traffic.count(program.as_text()).collectives,
        "temporaries": program.memory_analysis().temp_size_in_bytes,
        "channels": [a.shape[0] for a in jax.tree.leaves(state.statistics)][::2],
        "whole": sum(n for n, apart in zip(sizes, split, strict=True) if not apart),
        "split": sum(n for n, apart in zip(sizes, split, strict=True) if apart),
    }


class Cost(NamedTuple):
    """What the model says of a step on a square of chips."""

    messages: int  # of the norms
    bytes: int  # of all
    seconds: float  # that the norms' messages take


def cost(row: dict[str, Any]) -> Cost:
    """The model of what a step sends, of a row of the pods.

    A batch norm sends a message forward and one backward, of two sums for each channel. Forward
    that is two moments (Flax), or the counts, means and variances of all chips, each chip's in a
    place of its own (normjax; from `LARGE_MESSAGE` on, and under `jit`, two messages: the mean,
    then the variance). A gradient is a message of its size. Divided parameters are sent twice
    at their whole size, for the compiler gathers, and divides gradients, by sums of whole arrays on
    so many chips. A message passes all chips of a row and a column, there and back, at `HOP` each.
    """
    from normjax.core.statistics import LARGE_MESSAGE

    messages, moved = 0, row["whole"] + 2 * row["split"] + 8
    of_norms = 0
    for channels in row["channels"]:
        forward, number = 2 * 4 * channels, 1
        if row["arm"] == "normjax":
            gathered = 3 * 4 * channels * row["chips"]
            one = row["layout"].startswith("shard_map") and gathered <= LARGE_MESSAGE
            forward, number = (gathered, 1) if one else (3 * 4 * channels, 2)
        messages += number + 1
        of_norms += forward + 2 * 4 * channels
    hops = 4 * (math.isqrt(row["chips"]) - 1)
    seconds = messages * hops * HOP + 2 * of_norms / BANDWIDTH
    return Cost(messages, moved + of_norms, seconds)


def totals(row: dict[str, Any]) -> tuple[int, int]:
    """Messages of a row's program, and their bytes on a device."""
    kinds = row["collectives"].values()
    return sum(kind["operations"] for kind in kinds), sum(kind["bytes"] for kind in kinds)


def cells(part: str, results: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Head and rows of a part's table; messages of a norm are those beyond the network without."""
    rows = [row for row in results["rows"] if "note" not in row]
    size = "devices" if part == "devices" else "chips"
    plain = {(row["layout"], row[size]): row for row in rows if row["arm"] == "no norm"}
    last = ("from one device",) if part == "devices" else ("model: a norm", "KiB", "ms for norms")
    yield size, "layout", "norm", "messages", "a norm", "KiB", *last
    for row in rows:
        messages, moved = totals(row)
        base = plain.get((row["layout"], row[size]))
        norms = 0 if base is None or row["arm"] == "no norm" else NORMS[part]
        each = f"{(messages - totals(base)[0]) / norms:.2f}" if norms and base else ""
        found = (str(row[size]), row["layout"], row["arm"], str(messages), each)
        found = (*found, f"{moved / 1024:.0f}")
        if part == "devices":
            yield *found, f"{row['difference']:.1e}"
        else:
            says = cost(row)
            each = f"{says.messages / norms:.2f}" if norms else ""
            yield *found, each, f"{says.bytes / 1024:.0f}", f"{says.seconds * 1e3:.2f}"


def norms_of(stages: Sequence[int]) -> int:
    """Batch norms of a ResNet."""
    return 1 + 3 * sum(stages) + len(stages)


NORMS = {"devices": norms_of(SMALL["stages"]), "pods": norms_of(FULL["stages"])}


def show(part: str, results: dict[str, Any]) -> None:
    """Prints the table of a part."""
    from rich.console import Console
    from rich.table import Table

    head, *lines = cells(part, results)
    table = Table(*head, title=part)
    for line in lines:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 150).print(table)


if __name__ == "__main__":
    sys.exit(main())
