"""Forward and backward pass are exported for CPU, CUDA and TPU, and so is evaluation."""

import jax
import jax.numpy as jnp
from jax import export

from normjax.testing.subject import Subject

PLATFORMS = ("cpu", "cuda", "tpu")


def check(subject: Subject) -> None:
    """Lowering alone: no platform but that of the tests is needed."""
    params, state = subject.variables()

    def step(params, state, x):
        def loss(params, x):
            y, new = subject.apply(params, state, x)
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), new

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)

    def evaluate(params, state, x):
        return subject.apply(params, state, x, train=False)[0]

    for function in (step, evaluate):
        for dtype in (jnp.float32, jnp.bfloat16):
            x = jax.ShapeDtypeStruct(subject.shape, dtype)
            made = export.export(jax.jit(function), platforms=PLATFORMS)(params, state, x)
            assert made.platforms == PLATFORMS
