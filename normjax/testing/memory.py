"""Reverse mode keeps at most `residual_bytes` per byte of input, in float32 and bfloat16."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from normjax.core import checks
from normjax.testing.measure import residual_bytes
from normjax.testing.subject import Subject


def check(subject: Subject) -> None:
    """What is kept across a jit boundary for an input so large that parameters do not count."""
    if subject.residual_bytes is None:
        return
    at = {i % len(subject.shape) for i in np.atleast_1d(checks.feature_axes(subject.method))}
    batch, positions = (1, 8) if subject.fits_positions else (32, 1)
    factor = [32 if i in at else positions if i else batch for i in range(len(subject.shape))]
    larger = dataclasses.replace(subject, shape=tuple(np.multiply(subject.shape, factor).tolist()))
    params, state = larger.variables()
    small = sum(a.nbytes for a in jax.tree.leaves((params, state)))
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jax.ShapeDtypeStruct(larger.shape, dtype)
        for mask in (None, larger.rows()):
            output = lambda p, x, mask=mask: larger.apply(p, state, x, mask)[0]
            kept = residual_bytes(output, params, x)
            kept -= 4 * small / (x.size * x.dtype.itemsize)
            assert kept <= subject.residual_bytes, (
                f"{jnp.dtype(dtype)}, {'no ' if mask is None else ''}mask: {kept:.2f} bytes kept "
                f"per byte, {subject.residual_bytes} allowed"
            )
