"""What `normjax.modules` finds in models."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import normjax as nj
from normjax import linen as norms
from normjax import modules
from normjax import nnx as nnx_norms

X = jnp.ones((2, 4))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = norms.BatchNorm(use_running_average=False, name="norm")(nn.Dense(4)(x))
        return x + nn.relu(y), None


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        axes = {"params": 0, "batch_stats": 0}
        stack = nn.scan(nn.remat(Block), axes, split_rngs={"params": True}, length=3, out_axes=0)
        x, _ = stack(name="stack")(x, None)
        shared = norms.LayerNorm(name="shared")
        return shared(shared(nn.Dropout(0.5)(x, deterministic=not train)))


def test_calls_of_a_linen_model_come_in_order_with_fields_and_identities():
    model = Net()
    variables = jax.eval_shape(model.init, jax.random.key(0), X)
    rngs = {"dropout": jax.random.key(1)}
    calls = modules.visit(model, variables, X, train=True, rngs=rngs)
    first, second = [call for call in calls if call.path == ("shared",)]
    assert calls[0].path == () and calls[0].output is second.output
    assert second.args[0] is first.output
    assert calls[0].kwargs == {"train": True}
    found = modules.norms(model, variables, X)
    assert list(found) == [("stack", "norm"), ("shared",)]
    assert found["stack", "norm"] == nj.BatchNorm()


def test_an_nnx_model_stays_as_it_is():
    class Net(nnx.Module):
        def __init__(self, rngs):
            noise = nj.GhostNoise(effective_size=8)
            self.norms = nnx.List([nnx_norms.Norm(noise, 4, rngs=rngs)])
            self.norms.append(nnx_norms.BatchNorm(4, rngs=rngs))

        @nnx.remat
        def __call__(self, x):
            return self.norms[1](self.norms[0](x))

    model = Net(nnx.Rngs(0))
    before = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))
    outer, first, second = modules.visit(model, X)
    assert outer.path == () and outer.output.shape == X.shape
    assert first.module is model.norms[0] and second.args[0] is first.output
    after = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert type(model) is Net and type(model.norms[1]) is nnx_norms.BatchNorm
    assert list(modules.norms(model)) == [("norms", 0), ("norms", 1)]


@pytest.mark.parametrize(
    ("model", "args", "text"),
    [(jnp.tanh, (X,), "no module|not a module"), (nn.Dense(3), (X,), "variables")],
)
def test_what_is_no_model_is_refused(model, args, text):
    with pytest.raises(TypeError, match=text):
        modules.visit(model, *args)
