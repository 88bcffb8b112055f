"""Eight CPU devices, strict NumPy rules and no display, set before anything imports JAX."""

import itertools
import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MPLBACKEND"] = "agg"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
finished = itertools.count(1)


@pytest.fixture(autouse=True)
def _drop_programs():
    """Now and then all compiled programs go: those of thousands of tests take gigabytes."""
    yield
    if next(finished) % 20 == 0:
        jax.clear_caches()


@pytest.fixture
def strict_promotion():
    """No implicit dtype promotion; Flax's norms and optax's Adam do not run under it."""
    with jax.numpy_dtype_promotion("strict"):
        yield
