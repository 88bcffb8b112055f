"""Meshes with two axes: channels sharded too, Auto and Explicit; the state keeps its type."""

import functools
from itertools import product

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import draw, ragged
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import normjax as nj
from normjax.testing import count_collectives, with_axis_name

SHAPE = (8, 4, 2, 8)
METHODS = {
    "BatchNorm": nj.BatchNorm(momentum=0.5),
    "BatchRenorm": nj.BatchRenorm(),
    "LayerNorm": nj.LayerNorm(),
    "LayerNorm, relu inside": nj.LayerNorm(activation=jax.nn.relu),
    "RMSNorm": nj.RMSNorm(),
    "GroupNorm, groups divide": nj.GroupNorm(4),
    "GroupNorm, groups do not divide": nj.GroupNorm(1),
    "InstanceNorm": nj.InstanceNorm(),
    "Affine": nj.Affine(),
    "DynamicTanh": nj.DynamicTanh(),
    "Ghost, more groups than devices": nj.Ghost(nj.BatchNorm(), groups=8),
    "Ghost, fewer groups than devices": nj.Ghost(nj.BatchNorm(), groups=2),
    "GhostBatchNorm": nj.GhostBatchNorm(2),
    "ExclusiveBatchNorm": nj.ExclusiveBatchNorm(),
    "chain": nj.chain(nj.GroupNorm(2), nj.BatchNorm()),
    "DecorrelatedBatchNorm, groups divide": nj.DecorrelatedBatchNorm(group_size=2),
    "IterativeNorm, groups do not divide": nj.IterativeNorm(
        group_size=5, last_group="smaller", stored="matrix"
    ),
    "StochasticWhiteningBatchNorm": nj.StochasticWhiteningBatchNorm(alpha=0.1, group_size=4),
}
RANDOM = {
    "GhostNoise": nj.GhostNoise(32),
    "GhostNoise, each channel": nj.GhostNoise(4, independent_channels=True),
    "GhostNoise, effective size": nj.GhostNoise(effective_size=6.5),
    "GhostNoise, partition": nj.GhostNoise(4, drawing="partition"),
    "GhostNoise, shuffle": nj.GhostNoise(4, drawing="shuffle"),
    "AnalyticGhostNoise": nj.AnalyticGhostNoise(4),
    "GhostNoiseBatchNorm": nj.GhostNoiseBatchNorm(4),
    "Ghost": nj.Ghost(nj.GhostNoise(2), groups=8),
}


def on_meshes():
    """All of them; which kind of mesh has sharded parameters in the fast tier alternates."""
    for i, name in enumerate(METHODS):
        for kind, sharded in product((AxisType.Auto, AxisType.Explicit), (False, True)):
            fast = sharded == ((kind is AxisType.Explicit) == (i % 2 == 0))
            label = f"{name}-{kind.name}-params {'sharded' if sharded else 'whole'}"
            marks = [] if fast else pytest.mark.slow
            yield pytest.param(name, kind, sharded, marks=marks, id=label)


def step(method, params, state, x):
    def loss(params, x):
        y, new = method.apply(params, state, x, train=True)
        return jnp.sum(jnp.sin(y)), (y, new)

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)


@functools.cache
def on_one_device(name):
    """Arguments of a step and what it gives."""
    method = METHODS[name]
    given = *method.init(jax.random.key(0), SHAPE[-1]), 3 + draw(0, *SHAPE)
    return given, jax.device_get(jax.jit(functools.partial(step, method))(*given))


@pytest.mark.parametrize(("name", "kind", "shard_params"), list(on_meshes()))
def test_batch_and_channels_sharded(name, kind, shard_params):
    (params, state, x), wanted = on_one_device(name)
    mesh = jax.make_mesh((4, 2), ("batch", "model"), axis_types=(kind, kind))

    def place(a, *spec):
        return jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))

    def place_params(a):
        return place(a, "model") if shard_params and a.ndim else place(a)

    with jax.set_mesh(mesh):
        params, state = jax.tree.map(place_params, (params, state))
        x = place(x, "batch", None, None, "model")
        got = jax.jit(functools.partial(step, METHODS[name]))(params, state, x)
        (_, (y, new)), gradients = got
        if kind is AxisType.Explicit:
            assert jax.typeof(y) == jax.typeof(x)
            for after, before in ((new, state), (gradients, (params, x))):
                types = jax.tree.map(jax.typeof, after), jax.tree.map(jax.typeof, before)
                assert types[0] == types[1]
    chex.assert_trees_all_close(jax.device_get(got), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("method", "allowed"),
    (
        (nj.BatchNorm(), 2),
        (nj.LayerNorm(), 0),
        (nj.GroupNorm(4), 0),
        (nj.Ghost(nj.BatchNorm(), groups=8), 1),
    ),
    ids=("BatchNorm", "LayerNorm", "GroupNorm", "Ghost"),
)
def test_collectives_under_jit(method, allowed):
    params, state = method.init(None, 16)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("batch"))
    whole = NamedSharding(mesh, PartitionSpec())
    params, state = jax.device_put((params, state), whole)
    x = jax.device_put(np.ones((16, 4, 4, 16), "float32"), rows)

    def forward(params, state, x):
        return method.apply(params, state, x, train=True)

    assert count_collectives(forward, params, state, x) <= allowed


@pytest.mark.parametrize("size", (1, 2, 4), ids=lambda n: f"{64 // n // 8} groups per device")
def test_ghosts_on_their_devices_need_no_collective(size):
    """Output and input's gradient of groups that lie on a device, under jit and shard_map."""
    method = nj.GhostBatchNorm(size)
    params, state = method.init(None, 4)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("batch")
    ones = np.ones((64, 3, 4), "float32")
    x, g = jax.device_put((ones, ones), NamedSharding(mesh, rows))

    def step(method, x, g):
        y, back = jax.vjp(lambda x: method.apply(params, state, x, train=True)[0], x)
        return y, back(g)[0]

    assert count_collectives(functools.partial(step, method), x, g) == 0
    local = functools.partial(step, with_axis_name(method, "batch"))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows), out_specs=rows)
    assert count_collectives(mapped, x, g) == 0
    whole = functools.partial(step, nj.BatchNorm())
    assert count_collectives(whole, x, g) > 0, "nothing is counted"


def on_devices():
    """All of them; fewer than eight devices, and no mask, are slow for all but one."""
    for name, devices, masked in product(RANDOM, (1, 2, 4, 8), (False, True)):
        fast = (devices == 8 and masked) or (name == "GhostNoise" and devices in (2, 8))
        label = f"{name}-{devices}{'-masked' if masked else ''}"
        yield pytest.param(name, devices, masked, marks=[] if fast else pytest.mark.slow, id=label)


@pytest.mark.parametrize(("name", "devices", "masked"), list(on_devices()))
def test_one_draw_for_any_devices(name, devices, masked):
    """Jit over devices and shard_map over a named axis draw what one device draws, masks too."""
    method, key = RANDOM[name], jax.random.key(2)
    params, state = method.init(None, 3)
    x, mask = draw(0, 64, 2, 3), ragged(1, 64, 2, 1, share=0.8)
    mask[:5] = False
    mesh = jax.make_mesh((devices,), ("batch",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("batch")

    def step(method, x, mask):
        return method.apply(params, state, x, train=True, mask=mask, key=key)[0]

    def local(x, mask):
        return step(with_axis_name(method, "batch"), x, mask)

    mapped = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(rows, rows), out_specs=rows))
    whole = jax.jit(functools.partial(step, method))
    close = functools.partial(chex.assert_trees_all_close, rtol=2e-5, atol=2e-5)
    keep = mask if masked else None
    got = jax.device_get(whole(*jax.device_put((x, keep), NamedSharding(mesh, rows))))
    close(got, whole(x, keep))
    every = mask if masked else np.ones_like(mask)
    close(jax.device_get(mapped(x, every)), whole(x, every))
    assert not np.allclose(got, x), "no noise"
