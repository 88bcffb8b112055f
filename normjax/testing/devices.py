"""Sharded equals unsharded, with ragged masks, and devices send few messages."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from normjax.testing.measure import EXACT, count_collectives, jit
from normjax.testing.subject import Subject, with_axis_name

AXIS = "batch"
WAYS = (
    "jit, Auto",
    "jit, Explicit",
    "shard_map, checks on",
    "shard_map, checks off",
    "pmap",
    "vmap",
)


def check(subject: Subject) -> None:
    """With a ragged mask: jit over an Explicit mesh, and shard_map; values and gradients."""
    _compare(subject, ("jit, Explicit", "shard_map, checks on"), (subject.rows(),), whole=False)


def check_all(subject: Subject) -> None:
    """Masked and not: jit, shard_map, pmap and vmap; values, gradients, second derivatives."""
    _compare(subject, WAYS, (None, subject.rows()), whole=True)


def _compare(subject, ways, masks, whole):
    devices = jax.devices()
    if len(devices) < 2 or subject.shape[0] % len(devices):
        raise ValueError(
            f"check_method: a batch of {subject.shape[0]} cannot be divided among {len(devices)} "
            "devices; two or more are needed."
        )
    with jax.enable_x64(True):
        variables = subject.variables(jnp.float64)
        x = subject.inputs(jnp.float64)
        weight = subject.inputs(jnp.float64, seed=4)
        for mask in masks:
            data = x if mask is None else jnp.where(mask, x, jnp.nan)
            wanted = jit(_program(subject, subject.method, whole))(*variables, data, mask, weight)
            mapped = _mapped(subject, whole)
            for name in ways:
                got = mapped[name](*variables, data, mask, weight)
                where = f"{name}, {'masked' if mask is not None else 'no mask'}"
                chex.assert_trees_all_close(got, wanted, custom_message=where, **EXACT)


def _program(subject, method, whole, reduce=lambda tree: tree, local=lambda tree: tree):
    """Output, state and gradients as a function of data; `whole`: a tangent and a second order too.

    `reduce` sums gradients of parameters over devices; `local` marks parameters as a device's own.
    """

    def run(params, state, x, mask, weight):
        def output(params, x):
            y, new = subject.apply(params, state, x, mask, method=method)
            return (y if mask is None else jnp.where(mask, y, 0)), new

        def loss(params, x):
            return jnp.sum(jnp.sin(output(params, x)[0]) * weight)

        own = local(params)
        gradient = jax.grad(loss, (0, 1))
        y, new = output(params, x)
        if not whole:
            dparams, dx = gradient(own, x)
            return {"y": y, "state": new, "grad": (reduce(dparams), dx)}
        direction = jax.tree.map(jnp.cos, own), jnp.where(jnp.isnan(x), 0, jnp.sin(3 * x))
        gradients, second = jax.jvp(gradient, (own, x), direction)
        tangent = jax.jvp(lambda *at: output(*at)[0], (own, x), direction)[1]
        pairs = {"grad": gradients, "second": second}
        reduced = {name: (reduce(dparams), dx) for name, (dparams, dx) in pairs.items()}
        return {"y": y, "state": new, "jvp": tangent, **reduced}

    return run


def _mapped(subject, whole) -> dict[str, Any]:
    """Ways to run `_program` on all devices, by name."""
    number = jax.device_count()
    method = with_axis_name(subject.method, AXIS)
    plain = _program(subject, subject.method, whole)
    total = lambda tree: jax.tree.map(lambda a: lax.psum(a, AXIS), tree)
    vary = lambda tree: jax.tree.map(lambda a: lax.pcast(a, (AXIS,), to="varying"), tree)
    unchecked = _program(subject, method, whole, reduce=total)
    checked = _program(subject, method, whole, reduce=total, local=vary)
    rows, same = PartitionSpec(AXIS), PartitionSpec()
    out: dict[str, Any] = {"y": rows, "state": same, "grad": (same, rows)}
    out |= {"jvp": rows, "second": (same, rows)} if whole else {}

    def jitted(kind):
        def run(params, state, *data):
            mesh = jax.make_mesh((number,), (AXIS,), axis_types=(kind,))
            with jax.set_mesh(mesh):
                put = lambda a: jax.device_put(a, NamedSharding(mesh, rows))
                params, state = jax.device_put((params, state), NamedSharding(mesh, same))
                data = jax.tree.map(put, data)
                result = jit(plain)(params, state, *data)
                for a, b in zip(*map(jax.tree.leaves, (result["state"], state)), strict=True):
                    assert jax.typeof(a) == jax.typeof(b), f"{jax.typeof(b)} became {jax.typeof(a)}"
            return result

        return run

    def sharded(check):
        def run(params, state, x, mask, weight):
            mesh = Mesh(np.array(jax.devices()), (AXIS,))
            specs = (same, same, rows, None if mask is None else rows, rows)
            function = checked if check else unchecked
            mapped = jax.shard_map(
                function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=check
            )
            return jit(mapped)(params, state, x, mask, weight)

        return run

    def split(tree):
        return jax.tree.map(lambda a: a.reshape(number, -1, *a.shape[1:]), tree)

    def join(result):
        merge = lambda a: a.reshape(-1, *a.shape[2:])
        first = lambda tree: jax.tree.map(lambda a: a[0], tree)
        pair = lambda both: (first(both[0]), merge(both[1]))
        kinds = {"y": merge, "jvp": merge, "state": first, "grad": pair, "second": pair}
        return {name: kinds[name](value) for name, value in result.items()}

    def mapped_by(transform):
        def run(params, state, *data):
            # A closure: `pmap` takes no argument without arrays, such as variables of none.
            one = lambda data: unchecked(params, state, *data)
            return join(transform(one, axis_name=AXIS)(split(data)))

        return run

    runs = (
        jitted(AxisType.Auto),
        jitted(AxisType.Explicit),
        sharded(True),
        sharded(False),
        mapped_by(jax.pmap),
        mapped_by(jax.vmap),
    )
    return dict(zip(WAYS, runs, strict=True))


def check_collectives(subject: Subject) -> None:
    """Under a named axis at most `collectives` forward and as many more backward."""
    method = with_axis_name(subject.method, AXIS)
    params, state = subject.variables()
    x = subject.inputs()
    mesh = Mesh(np.array(jax.devices()), (AXIS,))
    rows, whole = PartitionSpec(AXIS), PartitionSpec()

    def forward(params, state, x):
        return subject.apply(params, state, x, method=method)

    def backward(params, state, x):
        varying = jax.tree.map(lambda a: lax.pcast(a, (AXIS,), to="varying"), params)

        def loss(x):
            y, new = subject.apply(varying, state, x, method=method)
            # Of every device: with its own parameters, the state may be its own.
            return jnp.sum(jnp.sin(y)), jax.tree.map(lambda a: a[None], new)

        return jax.grad(loss, has_aux=True)(x)

    allowed = subject.collectives
    for function, state_spec, limit in ((forward, whole, allowed), (backward, rows, 2 * allowed)):
        mapped = jax.shard_map(
            function, mesh=mesh, in_specs=(whole, whole, rows), out_specs=(rows, state_spec)
        )
        number = count_collectives(mapped, params, state, x)
        assert number <= limit, f"{function.__name__}: {number} collectives, {limit} allowed"
