"""What a method is made of, and what its programs keep and run on: traced, nearly all of it."""

import copy
import dataclasses
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from normjax.core.method import feature_axes
from normjax.core.structs import to_dict
from normjax.testing.measure import jit, residual_bytes
from normjax.testing.subject import Subject

PLATFORMS = ("cpu", "cuda", "tpu")


def check(subject: Subject) -> None:
    """Configuration, parameters, state, dtypes of the output, evaluation, no retrace."""
    method = subject.method
    twin = copy.copy(method)
    assert (twin, hash(twin)) == (method, hash(method)), f"a copy of {method!r} is not equal to it"
    train = inspect.signature(method.apply).parameters["train"]
    assert train.default is train.empty, "`train` has a default: a call that forgets it is no error"
    params, state = subject.variables()
    assert isinstance(to_dict(params) | to_dict(state), dict)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        x = jax.ShapeDtypeStruct(subject.shape, dtype)
        for train in (True, False):
            run = lambda *a, train=train: subject.apply(*a, train=train)
            y, new = jax.eval_shape(run, params, state, x)
            wanted = getattr(method, "dtype", None) or dtype
            assert y.shape == subject.shape, f"{subject.shape} in gives {y.shape} out"
            assert y.dtype == wanted, f"{jnp.dtype(dtype)} in gives {y.dtype} out"
            chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
            weak = any(a.weak_type for a in jax.tree.leaves(new))
            assert not weak, "the state comes back weakly typed"
    _, new = jit(lambda *a: subject.apply(*a, train=False))(params, state, subject.inputs())
    chex.assert_trees_all_equal(new, state)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state, x):
        return subject.apply(params, state, x)

    chex.clear_trace_counter()
    _, state = step.trace(params, state, subject.inputs()).out_info
    step.trace(params, state, subject.inputs(seed=5))


def check_memory(subject: Subject) -> None:
    """Reverse mode keeps at most `residual_bytes` per byte of input, across a jit boundary.

    In float32 and bfloat16, for an input so large that parameters do not count.
    """
    if subject.residual_bytes is None:
        return
    at = {i % len(subject.shape) for i in np.atleast_1d(feature_axes(subject.method))}
    batch, positions = (1, 8) if subject.fits_positions else (32, 1)
    factor = [32 if i in at else positions if i else batch for i in range(len(subject.shape))]
    larger = dataclasses.replace(subject, shape=tuple(np.multiply(subject.shape, factor).tolist()))
    params, state = larger.variables()
    small = sum(a.nbytes for a in jax.tree.leaves((params, state)))
    samples = larger.extras("sample", jnp.float32)
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jax.ShapeDtypeStruct(larger.shape, dtype)
        for mask in larger.masks():
            output = lambda p, samples, x, mask=mask: larger.apply(p, state, x, mask, samples)[0]
            kept = residual_bytes(output, params, samples, x) - 4 * small / (
                x.size * x.dtype.itemsize
            )
            assert kept <= subject.residual_bytes, (
                f"{jnp.dtype(dtype)}, {'no ' if mask is None else ''}mask: {kept:.2f} bytes kept "
                f"per byte, {subject.residual_bytes} allowed"
            )


def check_export(subject: Subject) -> None:
    """Forward and backward pass are lowered for CPU, CUDA and TPU, and so is evaluation."""
    params, state = subject.variables()

    def loss(params, state, x):
        y, new = subject.apply(params, state, x)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), new

    step = jax.value_and_grad(loss, (0, 2), has_aux=True)
    evaluate = lambda *args: subject.apply(*args, train=False)[0]
    for function in (step, evaluate):
        for dtype in (jnp.float32, jnp.bfloat16):
            x = jax.ShapeDtypeStruct(subject.shape, dtype)
            made = export.export(jax.jit(function), platforms=PLATFORMS)(params, state, x)
            assert made.platforms == PLATFORMS
