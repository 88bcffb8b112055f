"""Eight CPU devices, strict NumPy rules and no display, set before anything imports JAX."""

import gc
import itertools
import os
from pathlib import Path

# Programs of tests run once on a few numbers: most of the time would go into optimizing them.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
    )
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MPLBACKEND"] = "agg"

import jax
import pytest

gc.set_threshold(50_000)  # traces are many objects that stay: else they are searched all the time
jax.config.update("jax_numpy_rank_promotion", "raise")
MAPS = Path("/proc/self/maps")  # a line for each mapping of memory: Linux allows 65,530
count = itertools.count(1)


@pytest.fixture(autouse=True)
def _drop_programs():
    """Compiled programs go before their mappings come near the number that a process may have."""
    yield
    if next(count) % 50 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


@pytest.fixture
def strict_promotion():
    """No implicit dtype promotion; Flax's norms and optax's Adam do not run under it."""
    with jax.numpy_dtype_promotion("strict"):
        yield
