"""What `checkpoint_policy` keeps, and that nothing else changes."""

import collections
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

import normjax as nj
from normjax import linen as norms
from normjax import nnx as nnx_norms
from normjax.training import checkpoint_policy

KEY = jax.random.key(0)
METHODS = [
    nj.BatchNorm(),
    nj.LayerNorm(),
    nj.RMSNorm(),
    nj.GroupNorm(num_groups=2),
    nj.Ghost(nj.BatchNorm(), groups=2),
    nj.KalmanNorm(),
    nj.IterativeNorm(group_size=4),
    nj.DecorrelatedBatchNorm(group_size=4),
]


def kept(function, *args):
    """How often reverse mode keeps arrays of each dtype and shape, beside the arguments."""
    leaves = jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(function, *a)[1], *args))
    found = collections.Counter((str(a.dtype), a.shape) for a in leaves)
    return found - collections.Counter((str(a.dtype), a.shape) for a in jax.tree.leaves(args))


def count(jaxpr, name):
    """How many equations of a primitive there are in a jaxpr, inside of others too."""
    inner = (part for eqn in jaxpr.eqns for part in jax.tree.leaves(list(eqn.params.values())))
    jaxprs = (getattr(part, "jaxpr", part) for part in inner)
    own = sum(eqn.primitive.name == name for eqn in jaxpr.eqns)
    return own + sum(count(part, name) for part in jaxprs if hasattr(part, "eqns"))


class ConvBlock(nn.Module):
    """A convolution, a norm and ReLU; a body for `nn.scan`."""

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.Conv(8, (3, 3), use_bias=False, dtype=jnp.bfloat16)(x)
        y = norms.BatchNorm(use_running_average=False, dtype=jnp.bfloat16)(y)
        return nn.relu(x + nn.relu(y)), None


class Layer(nn.Module):
    """Attention of two heads of eight features, and a perceptron."""

    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(2, use_bias=False)(norms.LayerNorm()(x))
        return x + nn.Dense(16)(nn.gelu(nn.Dense(64)(norms.RMSNorm()(x)))), None


def loss_of(block, x):
    variables = block.init(KEY, x)

    def loss(params, x):
        y, new = block.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return y[0].astype(jnp.float32).sum(), new

    return loss, variables["params"]


def test_a_convolution_and_two_statistics_are_kept():
    x = jax.random.normal(KEY, (2, 5, 5, 8), jnp.bfloat16)
    loss, params = loss_of(nn.remat(ConvBlock, policy=checkpoint_policy(least=72))(), x)
    found = kept(lambda p, x: loss(p, x)[0], params, x)
    assert found == {("bfloat16", x.shape): 1, ("float32", (1, 1, 1, 8)): 2}
    loss, params = loss_of(nn.remat(ConvBlock, policy=checkpoint_policy(least=73))(), x)
    found = kept(lambda p, x: loss(p, x)[0], params, x)
    assert found == {("float32", (1, 1, 1, 8)): 2}


def test_products_and_statistics_of_a_transformer_are_kept_but_no_scores():
    x = jax.random.normal(KEY, (2, 6, 16))
    loss, params = loss_of(nn.remat(Layer, policy=checkpoint_policy(least=16))(), x)
    found = kept(lambda p, x: loss(p, x)[0], params, x)
    assert found == {
        ("float32", (2, 6, 2, 8)): 3,  # query, key and value
        ("float32", (2, 6, 16)): 1,  # the projection behind the attention
        ("float32", (2, 6, 64)): 1,
        ("float32", (2, 6, 1)): 3,  # mean and variance, mean square
    }


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_methods_keep_their_statistics_and_change_nothing_else(method):
    params, state = method.init(KEY, 8)
    x = 3 + jax.random.normal(KEY, (4, 3, 3, 8))

    def loss(params, x):
        y, new = method.apply(params, state, x, train=True)
        return jnp.sin(y).sum(), new

    again = jax.checkpoint(loss, policy=checkpoint_policy())
    gradients, again_gradients = (
        jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(params, x) for f in (loss, again)
    )
    chex.assert_trees_all_close(gradients, again_gradients, rtol=1e-4, atol=1e-4)
    found = kept(lambda *a: again(*a)[0], params, x)
    assert found and all(jnp.zeros(shape).size < x.size for _, shape in found)
    nothing = jax.checkpoint(loss, policy=jax.checkpoint_policies.nothing_saveable)
    assert not kept(lambda *a: nothing(*a)[0], params, x)


@pytest.mark.parametrize("block", [ConvBlock, Layer])
def test_scanned_blocks_have_the_same_gradients_and_move_statistics_once(block):
    x = jax.random.normal(KEY, (2, 4, 4, 8) if block is ConvBlock else (2, 6, 16))
    x = x.astype(jnp.bfloat16 if block is ConvBlock else jnp.float32)
    results = []
    for body in (block, nn.remat(block, policy=checkpoint_policy(least=16), prevent_cse=False)):
        how: Any = dict(variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})
        stack = nn.scan(body, **how, length=3)()
        loss, params = loss_of(stack, x)
        results.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(params, x))
    chex.assert_trees_all_close(*results, rtol=2e-2, atol=2e-2)


def test_nnx_moves_statistics_once():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(8, 8, rngs=rngs)
            self.norm = nnx_norms.BatchNorm(8, rngs=rngs)

        def __call__(self, x):
            return nnx.relu(self.norm(self.linear(x)))

    x = jax.random.normal(KEY, (4, 8))
    found = []
    for wrap in (lambda f: f, nnx.remat(policy=checkpoint_policy(least=8))):
        block = Block(nnx.Rngs(0))
        run = wrap(lambda block, x: block(x))
        loss = lambda block, x, run=run: jnp.sin(run(block, x)).sum()
        gradients = nnx.jit(nnx.grad(loss))(block, x)
        found.append((nnx.to_pure_dict(gradients), nnx.to_pure_dict(nnx.state(block))))
    chex.assert_trees_all_close(*found, rtol=1e-5, atol=1e-6)
    assert jnp.any(found[0][1]["norm"]["mean"] != 0)


def test_sums_over_devices_are_not_made_again():
    method = nj.BatchNorm(axis_name="data")
    params, state = method.init(KEY, 4)

    def loss(params, x):
        return jnp.sin(method.apply(params, state, x, train=True)[0]).sum()

    def sums(function):
        rows = PartitionSpec("data")
        each = lambda p, x: jax.grad(function, 1)(p, x)
        mesh = Mesh(jax.devices()[:2], "data")
        mapped = jax.shard_map(each, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows)
        jaxpr = jax.make_jaxpr(mapped)(params, jnp.ones((4, 4))).jaxpr
        return sum(count(jaxpr, name) for name in ("psum", "psum_invariant"))

    plain = sums(loss)
    assert plain > 0
    assert sums(jax.checkpoint(loss, policy=checkpoint_policy())) == plain
    nothing = jax.checkpoint_policies.nothing_saveable
    assert sums(jax.checkpoint(loss, policy=nothing)) > plain


def test_the_name_is_there_only_where_it_is_differentiated():
    method = nj.LayerNorm()
    params, state = method.init(KEY, 4)
    run = lambda x: method.apply(params, state, x, train=True)[0].sum()
    x = jnp.ones((2, 4))
    assert count(jax.make_jaxpr(run)(x).jaxpr, "name") == 0
    assert count(jax.make_jaxpr(jax.grad(run))(x).jaxpr, "name") == 2


@pytest.mark.parametrize("least", [-1, 2.5, True, None])
def test_least_is_a_whole_number(least):
    with pytest.raises(ValueError, match=r"checkpoint_policy: least=.* is not an integer >= 0"):
        checkpoint_policy(least=least)
