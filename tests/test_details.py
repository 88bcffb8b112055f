"""Corners that a user meets: what is refused, what must not be lost, what must not be made anew."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx as fnnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import normjax as nj
from normjax import linen, nnx

X = 0.5 + jax.random.normal(jax.random.key(0), (8, 4, 6))


def variables(method):
    return method.init(jax.random.key(0), 6)


def test_fields_of_an_nnx_module_can_be_set():
    norm = nnx.BatchNorm(6, rngs=fnnx.Rngs(0))
    norm.momentum = 0.0
    norm(X)
    chex.assert_trees_all_close(norm.mean[...], X.mean((0, 1)), atol=1e-6)
    norm.set_attributes(axis_name="batch")
    assert norm.method == nj.BatchNorm(momentum=0.0, axis_name="batch")
    with pytest.raises(ValueError, match="momentum=2"):
        norm.momentum = 2


def test_nnx_rms_norm_takes_a_mask_in_second_place():
    norm, theirs = (m.RMSNorm(6, rngs=fnnx.Rngs(0)) for m in (nnx, fnnx))
    mask = jnp.arange(6) < 4
    wanted = theirs(X, jnp.broadcast_to(mask, X.shape))
    chex.assert_trees_all_close(norm(X, mask)[..., :4], wanted[..., :4], atol=1e-6)
    with pytest.raises(TypeError, match="use_running_average"):
        nnx.LayerNorm(6, rngs=fnnx.Rngs(0))(X, mask)
    with pytest.raises(TypeError, match="num_groups"):
        nnx.GroupNorm(6, 2, num_groups=3, rngs=fnnx.Rngs(0))


def test_nested_axis_names_are_refused_by_ghost():
    inner = nj.BatchNorm(axis_name="batch")
    for method in (nj.Ghost(inner, 2), nj.chain(nj.LayerNorm(), inner)):
        with pytest.raises(ValueError, match="axis_name"):
            nj.Ghost(method, 2)
    with pytest.raises(ValueError, match="LayerNorm"):
        nj.Ghost(nj.LayerNorm(axis_name="model"), 2)


@pytest.mark.parametrize("average", ("debiased", "cumulative"))
def test_an_empty_part_takes_no_part_in_the_average(average):
    method = nj.Ghost(nj.BatchNorm(running_average=average), 2)
    params, state = variables(method)
    mask = (jnp.arange(8) < 4).reshape(8, 1, 1)
    _, wanted = method.method.apply(params, state, (X + 5)[:4], train=True)
    _, state = method.apply(params, state, X + 5, train=True, mask=mask)
    chex.assert_trees_all_close(state, wanted, rtol=1e-6)
    chex.assert_trees_all_close(state.mean, (X + 5)[:4].mean((0, 1)), rtol=1e-6)
    chex.assert_trees_all_equal(state.count, jnp.float32(1))


def test_a_state_of_another_configuration_is_refused():
    params, state = variables(nj.BatchNorm())
    for method in (nj.BatchNorm(running_average="cumulative"), nj.BatchRenorm()):
        with pytest.raises(ValueError, match="count"):
            method.apply(params, state, X, train=True)
    _, counted = variables(nj.BatchRenorm())
    with pytest.raises(ValueError, match="count"):
        nj.BatchNorm().apply(params, counted, X, train=True)


def test_activations_need_not_be_pointwise_but_keep_the_shape():
    method = nj.LayerNorm(activation=jax.nn.softmax)
    params, state = variables(method)
    f = lambda x: jnp.sum(method.apply(params, state, x, train=True)[0] ** 2)
    plain = nj.LayerNorm()
    g = lambda x: jnp.sum(jax.nn.softmax(plain.apply(params, state, x, train=True)[0]) ** 2)
    chex.assert_trees_all_close(jax.grad(f)(X), jax.grad(g)(X), atol=1e-6)
    method = nj.LayerNorm(activation=jnp.cumsum)
    with pytest.raises(ValueError, match="activation"):
        method.apply(params, state, X, train=True)
    with pytest.raises(ValueError, match="hashable"):
        nj.LayerNorm(activation=nn.PReLU(param_dtype=np.zeros(2)))


def test_ramps():
    with pytest.raises(ValueError, match="begin=3"):
        nj.Ramp(1.0, 2.0, 3, 3)
    ramp = nj.Ramp(1.0, 3.0, 2, 4)
    chex.assert_trees_all_close(ramp(np.arange(6)), jnp.array([1.0, 1, 1, 2, 3, 3]))
    assert ramp(3) == 2.0
    rise = optax.linear_schedule(1.0, 3.0, 4)
    method = nj.BatchRenorm(r_max=rise, d_max=optax.constant_schedule(1))
    params, state = variables(method)
    _, state = jax.jit(method.apply, static_argnames="train")(params, state, X, train=True)
    assert state.count == 1


def test_float64_is_kept_in_evaluation_whatever_the_state():
    with jax.enable_x64(True):
        method = nj.BatchNorm(param_dtype=jnp.float64)
        params, state = variables(method)
        params = params._replace(scale=params.scale + 1e-10)
        x = jnp.asarray(np.asarray(X, np.float64))
        y, _ = method.apply(params, state, x, train=False)
        chex.assert_trees_all_close(y, x * (1 + 1e-10) / np.sqrt(1 + 1e-5), rtol=1e-13)
        loss = lambda x: jnp.sum(
            nj.LayerNorm(epsilon=np.float64(1e-5)).apply(params, (), x, train=True)[0] ** 3
        )
        assert jax.grad(loss)(X).dtype == jnp.float32


def test_ghost_takes_masks_that_are_not_sharded_like_the_input():
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Explicit,))
    method = nj.Ghost(nj.BatchNorm(), 4)
    params, state = variables(method)
    masks = np.arange(8).reshape(8, 1, 1) < 7, np.ones((1, 4, 1), bool)
    wanted = [method.apply(params, state, X, train=True, mask=m) for m in masks]
    with jax.set_mesh(mesh):
        params, state = jax.device_put((params, state), NamedSharding(mesh, PartitionSpec()))
        x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("batch")))
        for mask, both in zip(masks, wanted, strict=True):
            got = jax.jit(lambda p, s, x, m=mask: method.apply(p, s, x, train=True, mask=m))(
                params, state, x
            )
            chex.assert_trees_all_close(jax.device_get(got), jax.device_get(both), atol=1e-6)


class Plain:
    """A method that is no dataclass."""

    def init(self, key, features):
        return (), ()

    def apply(self, params, state, x, *, train, mask=None, key=None):
        return 2 * x, state


def test_methods_need_not_be_dataclasses():
    norm = nnx.Norm(Plain(), 6, rngs=fnnx.Rngs(0))
    norm.eval()
    chex.assert_trees_all_close(norm(X), 2 * X)
    assert not hasattr(norm, "momentum")
    chex.assert_trees_all_close(linen.Norm(Plain()).apply({}, X, True), 2 * X)


def test_fresh_initializers_need_no_new_trace():
    counted = []

    def activation(z):
        counted.append(z.shape)
        return z

    for _ in range(3):
        method = nj.LayerNorm(scale_init=nn.initializers.constant(0.5), activation=activation)
        method.apply(*variables(method), X, train=True)
    assert len(counted) == 1


def test_fields_are_static_values():
    assert nj.BatchNorm(momentum=jnp.float32(0.5)).momentum == 0.5
    assert nj.LayerNorm(reduction_axes=range(1, 3)).reduction_axes == (1, 2)
    assert nj.BatchNorm(use_bias=np.bool_(False)).use_bias is False
    with pytest.raises(ValueError, match="momentum is traced"):
        jax.jit(
            lambda m: nj.BatchNorm(momentum=m).apply(*variables(nj.BatchNorm()), X, train=True)
        )(0.5)
    with pytest.raises(TypeError, match="train="):
        nj.LayerNorm().apply(*variables(nj.LayerNorm()), X, train=jnp.array(True))
    with pytest.raises(ValueError, match="dtype"):
        nj.LayerNorm(dtype=jnp.ones(3))
    y, _ = nj.LayerNorm(dtype=float).apply(*variables(nj.LayerNorm()), X, train=True)
    assert y.dtype == jnp.float32


def test_flax_modules_and_single_methods_are_refused_where_methods_belong():
    with pytest.raises(ValueError, match="Flax module"):
        nj.Ghost(linen.BatchNorm(), 2)
    with pytest.raises(ValueError, match="Flax module"):
        linen.Norm(nn.LayerNorm()).init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="sequence"):
        nj.Chain(nj.BatchNorm())


def test_axis_index_groups_of_a_size_that_does_not_fit():
    method = nj.BatchNorm(axis_name="batch", axis_index_groups=[[0, 1], [2, 3]])
    params, state = variables(method)
    with pytest.raises(ValueError, match="4 devices, but axis 'batch' has 8"):
        jax.vmap(lambda x: method.apply(params, state, x, train=True), axis_name="batch")(X)
    with pytest.raises(ValueError, match="exactly once"):
        nj.BatchNorm(axis_name="batch", axis_index_groups=[[0, 1], [1, 2]])
    with pytest.raises(ValueError, match="needs the axis_name"):
        nj.BatchNorm(axis_index_groups=[[0, 1]])


def test_large_messages_go_in_two_steps_to_the_same_moments():
    x = 3 + jax.random.normal(jax.random.key(1), (8, 4, 20000))
    method = nj.BatchNorm(axis_name="batch", momentum=0.0)
    params, state = method.init(None, 20000)
    run = jax.vmap(lambda x: method.apply(params, state, x, train=True), axis_name="batch")
    y, new = run(x)
    alone = nj.BatchNorm(momentum=0.0).apply(params, state, x, train=True)
    chex.assert_trees_all_close((y, jax.tree.map(lambda a: a[0], new)), alone, atol=2e-5)
