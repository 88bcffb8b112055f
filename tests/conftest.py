"""Eight CPU devices, strict NumPy rules and no display, set before anything imports JAX."""

import gc
import os
import resource

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
GIGABYTE = 1 << 20  # in the units of ru_maxrss
held = 4 * GIGABYTE


@pytest.fixture(autouse=True)
def _drop_programs():
    """Compiled programs go when they have come to take another gigabyte."""
    global held
    yield
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > held:
        held += GIGABYTE
        jax.clear_caches()


@pytest.fixture
def strict_promotion():
    """No implicit dtype promotion; Flax's norms and optax's Adam do not run under it."""
    with jax.numpy_dtype_promotion("strict"):
        yield
