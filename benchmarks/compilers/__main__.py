"""Compiles norms for TPUs and GPUs that are not there: `python -m benchmarks.compilers`.

The TPU compiler (extra `compilers-tpu`) and XLA's compiler for CUDA (`compilers-cuda`) compile
ahead of time on any machine. What the programs of flax.linen and normjax move is counted in the
text of the compiled programs: bytes read and written in the memory of the device, kernels,
temporaries, and operations between devices. The figures depend on the versions alone. They do not
say how long a program takes.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.compilers import show, work
from benchmarks.compilers.targets import DEFAULTS, Target


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles, writes a file for each topology and a plot, and prints the tables.

    Returns:
      0; 1 if a program did not compile; 2 after a line about what is wrong or not installed.
    """
    options = _options(argv)
    results = {}
    try:
        for name in options.topology or DEFAULTS:
            target = Target(name)
            if sentence := target.missing():
                if options.topology:
                    raise ValueError(sentence)
                print(f"compilers: left out: {sentence}", file=sys.stderr)
                continue
            results[name] = run(target, options)
    except (ValueError, RuntimeError) as error:
        print(f"compilers: {error}", file=sys.stderr)
        return 2
    if not results:
        return 2
    show.tables(results, options.only)
    if "layers" in options.only:
        known = {name: stored(Target(name), options) for name in (*DEFAULTS, *results)}
        show.plot({n: r for n, r in known.items() if "layers" in r}, options.output / "layers.png")
    print(f"Written to {options.output}")
    return 1 if show.failures(results, options.only) else 0


def _options(argv):
    from benchmarks.compilers import layers, memory, networks

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compilers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    text = f"{', '.join(DEFAULTS)} (default: all whose compiler is installed), or a slice of TPUs "
    text += "such as v5e:16x16"
    parser.add_argument("--topology", nargs="+", metavar="NAME", help=text)
    text = "what to compile (default: all)"
    parser.add_argument(
        "--only", nargs="+", choices=work.SECTIONS, default=work.SECTIONS, help=text
    )
    for name, values in (
        ("methods", layers.CASES),
        ("dtypes", layers.DTYPES),
        ("networks", networks.CASES),
        ("stacks", memory.CASES),
    ):
        parser.add_argument(
            f"--{name}",
            nargs="+",
            choices=list(values),
            default=list(values),
            metavar=name[:-1].upper(),
            help=f"of {', '.join(values)}",
        )
    text = "folder for the text of every compiled program"
    parser.add_argument("--dump", type=Path, help=text)
    parser.add_argument("--output", type=Path, default=Path("runs/compilers"))
    return parser.parse_args(argv)


def run(target: Target, options: argparse.Namespace) -> dict[str, Any]:
    """All sections of a topology, which are written as they grow.

    Sections that a file has already and that are not compiled now stay in it.
    """
    from rich.progress import Progress

    file, results = options.output / target.file, stored(target, options)
    rows: list[dict[str, Any]] = []
    with Progress(transient=True) as progress:
        task = progress.add_task(target.name)
        for kind, *content in work.messages(target, options):
            match kind:
                case "section":
                    name, heading, count = content
                    rows = []
                    results[name] = {**heading, "rows": rows}
                    progress.reset(task, total=count)
                case "case":
                    progress.update(task, description=f"{target.name}: {content[0]}")
                case "row":
                    rows.append(content[0])
                    machine.write(results, file)
                    progress.advance(task)
    return results


def stored(target: Target, options: argparse.Namespace) -> dict[str, Any]:
    """What the file of a topology has."""
    file = options.output / target.file
    return json.loads(file.read_text()) if file.exists() else {"topology": target.name}


if __name__ == "__main__":
    sys.exit(main())
