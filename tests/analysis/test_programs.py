"""Programs of models: run step by step they are the model, and they say where modules are."""

import flax.linen as nn
import jax
import pytest
from agreement import close, draw
from flax import nnx

import normjax.linen
from normjax.analysis import programs


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        norm = normjax.linen.BatchNorm(use_running_average=False, name="norm")
        return x + nn.gelu(norm(nn.Dense(3, name="dense")(x))), x.sum(1)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        kinds = {"params": 0, "batch_stats": 0}
        how = {"variable_axes": kinds, "split_rngs": {"params": True}, "length": 2}
        x, sums = nn.scan(nn.remat(Layer), **how)(name="stack")(x, None)
        x, _ = nn.jit(Layer)(name="last")(x, None)
        return x + jax.lax.while_loop(lambda y: y.sum() < 100, lambda y: 2 * y + 1, x), sums


class NetNNX(nnx.Module):
    def __init__(self):
        self.dense = nnx.Linear(3, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return nnx.remat(lambda dense, x: nnx.relu(dense(x)))(self.dense, self.dense(x))


def test_a_program_is_its_model():
    net, x = Net(), draw(0, 4, 3)
    variables = net.init(jax.random.key(0), x)
    program = programs.trace(net, variables, x)
    values = dict(program.known)
    assert values[program.inputs[0]] is x
    programs.run(program.steps, values)
    (_, sums), _ = net.apply(variables, x, mutable=["batch_stats"])
    assert all(values[n].shape == program.types[n].shape for n in program.types)
    close(values[program.steps[program.sites[0].stop].outputs[0]], sums, 1e-6)
    own = [("stack",), ("stack", "dense"), ("stack", "norm")]
    last = [("last", *path[1:]) for path in own]
    assert [site.path for site in program.sites] == [(), *own, *own, *last]
    assert all(site.start < site.stop for site in program.sites)


def test_an_nnx_model():
    net, x = NetNNX(), draw(0, 4, 3)
    program = programs.trace(net, x)
    values = dict(program.known)
    programs.run(program.steps, values)
    close(values[program.steps[program.sites[0].stop].outputs[0]], net(x), 1e-6)
    assert [site.path for site in program.sites] == [(), ("dense",), ("dense",)]


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="not a module"):
        programs.trace(jax.numpy.tanh, draw(0, 2))
