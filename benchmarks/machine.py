"""What a benchmark ran on."""

import os
import platform
from pathlib import Path

import jax


def describe() -> dict[str, str | int]:
    """Platform, processor, cores and accelerator, as results record them."""
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


def processor() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
