"""Configuration, parameters, state, dtypes of the output, evaluation, no retrace."""

import copy
import inspect

import chex
import jax
import jax.numpy as jnp

from normjax.core.structs import to_dict
from normjax.testing.measure import jit
from normjax.testing.subject import Subject


def check(subject: Subject) -> None:
    """What a method is made of and returns; traced, but for one evaluation."""
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
            weak = [a.weak_type for a in jax.tree.leaves(new)]
            assert not any(weak), "the state comes back weakly typed"
    _, new = jit(lambda *a: subject.apply(*a, train=False))(params, state, subject.inputs())
    chex.assert_trees_all_equal(new, state)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state, x):
        return subject.apply(params, state, x)

    chex.clear_trace_counter()
    _, state = step.trace(params, state, subject.inputs()).out_info
    step.trace(params, state, subject.inputs(seed=5))
