"""Eight CPU devices, strict NumPy rules and no display, set before anything imports JAX."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MPLBACKEND"] = "agg"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def strict_promotion():
    """No implicit dtype promotion; Flax's norms and optax's Adam do not run under it."""
    with jax.numpy_dtype_promotion("strict"):
        yield
