"""What a benchmark ran on, and the file of its results."""

import importlib.metadata
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any


def describe() -> dict[str, str | int]:
    """Platform, processor, cores and accelerator, as results record them."""
    import jax  # here, so that a benchmark can set its environment first

    device = jax.devices()[0]
    kind = device.device_kind if device.platform != "cpu" else processor()
    return {
        "platform": platform.platform(terse=True),
        "python": platform.python_version(),
        "processor": processor(),
        "cores": os.cpu_count() or 0,
        "backend": device.platform,
        "device": kind,
    }


def heading(benchmark: str, *packages: str) -> dict[str, Any]:
    """Command, machine and versions (of jax and `packages`), with which results begin."""
    return {
        "command": shlex.join(["python", "-m", f"benchmarks.{benchmark}", *sys.argv[1:]]),
        "machine": describe(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", *packages)},
    }


def write(results: dict[str, Any], file: Path, indent: int | None = 1, **how: Any) -> None:
    """Writes the results as JSON, in a folder that is made if there is none.

    It is written in one move: an interruption leaves the old file or the new one. `how` is for
    `json.dumps`.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".part")
    partial.write_text(json.dumps(results, indent=indent, **how) + "\n", encoding="utf-8")
    partial.replace(file)


def processor() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
