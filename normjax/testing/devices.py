"""Sharded equals unsharded, with ragged masks, and devices send few messages."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from normjax.testing.measure import EXACT, count_collectives, jit
from normjax.testing.subject import Subject, fill, with_axis_name

AXIS = "batch"
ROWS, SAME = PartitionSpec(AXIS), PartitionSpec()
SPECS = {"y": ROWS, "state": SAME, "grad": (SAME, ROWS), "jvp": ROWS, "second": (SAME, ROWS)}


def check(subject: Subject) -> None:
    """With a ragged mask: jit over an Explicit mesh, and shard_map; values and gradients."""
    _compare(subject, ("jit, Explicit", "shard_map, checks on"), subject.masks()[-1:], whole=False)


def check_all(subject: Subject) -> None:
    """Masked and not: jit, shard_map, pmap and vmap; values, gradients, second derivatives."""
    _compare(subject, WAYS, subject.masks(), whole=True)


def _compare(subject, ways, masks, whole):
    samples, devices = subject.shape[0], jax.device_count()
    if devices < 2 or samples % devices:
        hint = f"{devices} devices; two or more are needed."
        raise ValueError(f"check_method: a batch of {samples} cannot be divided among {hint}")
    with jax.enable_x64(True):
        variables = subject.variables(jnp.float64)
        x, weight = (subject.inputs(jnp.float64, seed) for seed in (2, 4))
        samples = subject.extras("sample", jnp.float64)
        program = functools.partial(_program, subject, whole)
        for mask in masks:
            data = fill(mask, x, jnp.nan), mask, weight, samples
            wanted = jit(program())(*variables, *data)
            specs = {name: SPECS[name] for name in wanted}
            for name in ways:
                got = WAYS[name](program, specs, variables, data)
                where = f"{name}, {'masked' if mask is not None else 'no mask'}"
                chex.assert_trees_all_close(got, wanted, custom_message=where, **EXACT)


def _program(subject, whole, *, mapped=False, checked=False):
    """Output, state and gradients as a function of data; `whole`: a tangent and a second order too.

    `mapped`: as one device of `AXIS` computes them; `checked`: where the type says what varies.
    """
    method = with_axis_name(subject.method, AXIS) if mapped else subject.method

    def reduced(gradients):
        dparams, dx = gradients
        return (lax.psum(dparams, AXIS) if mapped else dparams), dx

    def run(params, state, x, mask, weight, samples):
        def output(params, x):
            y, new = subject.apply(params, state, x, mask, samples, method=method)
            return fill(mask, y, 0), new

        loss = lambda params, x: jnp.sum(jnp.sin(output(params, x)[0]) * weight)
        gradient = jax.grad(loss, (0, 1))
        y, new = output(params, x)
        out = {"y": y, "state": new}
        own = _vary(params) if checked else params
        if not whole:
            return out | {"grad": reduced(gradient(own, x))}
        direction = jax.tree.map(jnp.cos, own), jnp.where(jnp.isnan(x), 0, jnp.sin(3 * x))
        first, second = jax.jvp(gradient, (own, x), direction)
        tangent = jax.jvp(lambda *at: output(*at)[0], (own, x), direction)[1]
        return out | {"jvp": tangent, "grad": reduced(first), "second": reduced(second)}

    return run


def _vary(params):
    """Parameters as a device's own, so that their gradients are not summed over devices."""
    return jax.tree.map(lambda a: lax.pcast(a, (AXIS,), to="varying"), params)


def _mesh(kind=AxisType.Auto):
    return jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(kind,))


def _jitted(kind, program, specs, variables, data):
    mesh = _mesh(kind)
    with jax.set_mesh(mesh):
        variables = jax.device_put(variables, NamedSharding(mesh, SAME))
        data = jax.device_put(data, NamedSharding(mesh, ROWS))
        result = jit(program())(*variables, *data)
        old, new = (jax.tree.map(jax.typeof, tree) for tree in (variables[1], result["state"]))
        assert new == old, f"{old} became {new}"
    return result


def _sharded(check, program, specs, variables, data):
    into = (SAME, SAME, *(ROWS,) * len(data))
    how = dict[str, Any](mesh=_mesh(), in_specs=into, out_specs=specs, check_vma=check)
    return jit(jax.shard_map(program(mapped=True, checked=check), **how))(*variables, *data)


def _split(transform, program, specs, variables, data):
    parts = jax.tree.map(lambda a: a.reshape(jax.device_count(), -1, *a.shape[1:]), data)
    # A closure: `pmap` takes no argument without arrays, such as variables of none.
    run = lambda data: program(mapped=True)(*variables, *data)
    result = transform(run, axis_name=AXIS)(parts)
    whole = lambda spec, a: a.reshape(-1, *a.shape[2:]) if spec == ROWS else a[0]
    join = lambda spec, tree: jax.tree.map(functools.partial(whole, spec), tree)
    return jax.tree.map(join, specs, result)


WAYS = {
    "jit, Auto": functools.partial(_jitted, AxisType.Auto),
    "jit, Explicit": functools.partial(_jitted, AxisType.Explicit),
    "shard_map, checks on": functools.partial(_sharded, True),
    "shard_map, checks off": functools.partial(_sharded, False),
    "pmap": functools.partial(_split, jax.pmap),
    "vmap": functools.partial(_split, jax.vmap),
}


def check_collectives(subject: Subject) -> None:
    """Under a named axis at most `collectives` forward and as many more backward."""
    method = with_axis_name(subject.method, AXIS)
    variables, x = subject.variables(), subject.inputs()
    samples = subject.extras("sample", jnp.float32)

    def forward(params, state, x, samples):
        return subject.apply(params, state, x, None, samples, method=method)

    def backward(params, state, x, samples):
        def loss(x):
            y, new = forward(_vary(params), state, x, samples)
            # With its own parameters the state of a device may be its own.
            return jnp.sum(jnp.sin(y)), jax.tree.map(lambda a: a[None], new)

        return jax.grad(loss, has_aux=True)(x)

    allowed = subject.collectives
    for function, state_spec, limit in ((forward, SAME, allowed), (backward, ROWS, 2 * allowed)):
        how = dict[str, Any](in_specs=(SAME, SAME, ROWS, ROWS), out_specs=(ROWS, state_spec))
        mapped = jax.shard_map(function, mesh=_mesh(), **how)
        number = count_collectives(mapped, *variables, x, samples)
        assert number <= limit, f"{function.__name__}: {number} collectives, {limit} allowed"
