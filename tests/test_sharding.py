"""Meshes with two axes: channels sharded too, Auto and Explicit; the state keeps its type."""

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import normjax as nj
from normjax.testing import count_collectives

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
    "chain": nj.chain(nj.GroupNorm(2), nj.BatchNorm()),
}


@pytest.mark.parametrize("shard_params", (False, True), ids=("params whole", "params sharded"))
@pytest.mark.parametrize("kind", (AxisType.Auto, AxisType.Explicit), ids=("Auto", "Explicit"))
@pytest.mark.parametrize("name", METHODS)
def test_batch_and_channels_sharded(name, kind, shard_params):
    method = METHODS[name]
    params, state = method.init(jax.random.key(0), SHAPE[-1])
    x = 3 + jax.random.normal(jax.random.key(1), SHAPE)

    def step(params, state, x):
        def loss(params, x):
            y, new = method.apply(params, state, x, train=True)
            return jnp.sum(jnp.sin(y)), (y, new)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)

    wanted = jax.jit(step)(params, state, x)
    mesh = jax.make_mesh((4, 2), ("batch", "model"), axis_types=(kind, kind))

    def place(a, *spec):
        return jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))

    def place_params(a):
        return place(a, "model") if shard_params and a.ndim else place(a)

    with jax.set_mesh(mesh):
        params, state = jax.tree.map(place_params, (params, state))
        x = place(x, "batch", None, None, "model")
        got = jax.jit(step)(params, state, x)
        (_, (y, new)), gradients = got
        if kind is AxisType.Explicit:
            assert jax.typeof(y) == jax.typeof(x)
            for after, before in ((new, state), (gradients, (params, x))):
                types = jax.tree.map(jax.typeof, after), jax.tree.map(jax.typeof, before)
                assert types[0] == types[1]
    chex.assert_trees_all_close(jax.device_get(got), jax.device_get(wanted), rtol=2e-5, atol=2e-5)


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
    x = jax.device_put(jnp.ones((16, 4, 4, 16)), rows)

    def forward(params, state, x):
        return method.apply(params, state, x, train=True)

    assert count_collectives(forward, params, state, x) <= allowed
