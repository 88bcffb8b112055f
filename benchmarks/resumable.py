"""What benchmarks share whose runs are stored one by one and go on after an interruption."""

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine


def command(benchmark: str, argv: Sequence[str], work: Callable[[], None]) -> int:
    """Does the work of `python -m benchmarks.<benchmark> *argv`.

    Returns 0, or 2 after one line about bad input, or 130 after an interruption.
    """
    try:
        work()
    except (ValueError, OSError) as error:
        print(f"{benchmark}:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = shlex.join(["python", "-m", f"benchmarks.{benchmark}", *argv])
        print(f"interrupted; what is done is stored; continue with: {again}", file=sys.stderr)
        return 130
    return 0


def results(file: Path, about: dict[str, Any], benchmark: str, *packages: str) -> dict[str, Any]:
    """The stored results; if there are none, new ones: their heading, and `about`.

    ValueError if what is stored is about something else.
    """
    if not file.exists():
        return {**machine.heading(benchmark, *packages), **about}
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        stored = {}
    if any(stored.get(part) != value for part, value in about.items()):
        raise ValueError(f"{file} is of another command; another --output keeps it")
    return stored
