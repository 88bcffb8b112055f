"""Norms folded into the layers beside them: `normjax.folding`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import close, draw
from flax import nnx

import normjax as nj
from normjax import folding
from normjax import linen as norms
from normjax import nnx as nnx_norms

KEY = jax.random.key(0)
IMAGES = draw(0, 2, 8, 8, 3)
TOLERANCE = 1e-5


def value(name, shape, rng):
    """Random numbers for a variable of this name: none of them is what training starts with."""
    a = rng.normal(size=shape)
    if name == "var":
        return 0.5 + a**2
    if name in ("cov", "matrix"):
        return 0.5 * np.eye(shape[-1]) + a @ a.swapaxes(-1, -2) / shape[-1]
    if name == "scale":
        return 1 + 0.3 * a
    return a / np.sqrt(np.prod(shape[:-1])) if name == "kernel" else a


def variables(model, *args, dtype=None, **kwargs):
    """Random variables of a Linen model."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: model.init(KEY, *args, **kwargs))
    draw = lambda path, a: jnp.asarray(value(path[-1].key, a.shape, rng), dtype or a.dtype)
    return jax.tree.map_with_path(draw, shapes)


def randomized(model):
    """An NNX model in evaluation, with random variables."""
    rng = np.random.default_rng(1)
    for path, variable in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))):
        variable.set_value(jnp.asarray(value(path[-1], variable.shape, rng), variable.dtype))
    model.eval()
    return model


class ResNet(nn.Module):
    """Two blocks; the second halves the maps and has a convolution in its shortcut."""

    method: nj.Method | None
    use_bias: bool = False

    @nn.compact
    def __call__(self, x, **inputs):
        def normalized(name, x, *args, **how):
            x = nn.Conv(*args, use_bias=self.use_bias, name=f"conv_{name}", **how)(x)
            if self.method is None:
                return x
            norm = norms.Norm(self.method, use_running_average=True, name=f"norm_{name}")
            return norm(x, **inputs)

        x = nn.relu(normalized("stem", x, 6, (3, 3)))
        for i, stride in enumerate((1, 2)):
            y = nn.relu(normalized(f"{i}a", x, 6, (3, 3), strides=stride))
            y = normalized(f"{i}b", y, 6, (3, 3))
            if stride > 1:
                x = normalized(f"{i}c", x, 6, (1, 1), strides=stride)
            x = nn.relu(x + y)
        return nn.Dense(5)(x.mean((1, 2)))


class NnxResNet(nnx.Module):
    """As `ResNet`."""

    def __init__(self, method, rngs):
        self.convs, self.norms = nnx.Dict(), nnx.Dict()
        for name in ("stem", "0a", "0b", "1a", "1b", "1c"):
            inputs, size = 3 if name == "stem" else 6, 1 if name == "1c" else 3
            strides = 2 if name in ("1a", "1c") else 1
            how = dict(strides=strides, use_bias=False, rngs=rngs)
            self.convs[name] = nnx.Conv(inputs, 6, (size, size), **how)
            self.norms[name] = nnx_norms.Norm(method, 6, rngs=rngs)
        self.head = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x, **inputs):
        normalized = lambda name, x: self.norms[name](self.convs[name](x), **inputs)
        x = nnx.relu(normalized("stem", x))
        x = nnx.relu(x + normalized("0b", nnx.relu(normalized("0a", x))))
        y = normalized("1b", nnx.relu(normalized("1a", x)))
        return self.head(nnx.relu(normalized("1c", x) + y).mean((1, 2)))


METHODS = (
    (nj.BatchNorm(), {}),
    (nj.BatchNorm(use_scale=False, use_bias=False, activation=jax.nn.gelu), {}),
    (nj.BatchRenorm(), {}),
    (nj.Ghost(nj.KalmanNorm(), groups=2), {}),
    (nj.GhostBatchNorm(2), {}),
    (nj.RunningNorm(clip=1.5), {}),
    (nj.Ghost(nj.ConditionalBatchNorm(num_classes=4), groups=2), {"condition": 3}),
    (nj.SandwichAuxBatchNorm(2), {"branch": 1}),
    (nj.MultiStats(nj.BatchNorm(), 2), {"branch": 1}),
    (nj.Affine(use_scale=False), {}),
    (nj.IterativeNorm(group_size=4, last_group="smaller"), {}),
    (nj.DecorrelatedBatchNorm(group_size=2, shared_matrix=True, stored="matrix"), {}),
    (nj.StochasticWhiteningBatchNorm(activation=jax.nn.relu), {}),
)


@pytest.mark.parametrize(("method", "inputs"), METHODS)
def test_a_resnet_of_linen(method, inputs):
    model = ResNet(method)
    old = variables(model, IMAGES, **inputs)
    done = folding.fold(model, old, IMAGES, norm_inputs=inputs, **inputs)
    names = ("stem", "0a", "0b", "1a", "1b", "1c")
    assert done.folded == {f"norm_{name}": (f"conv_{name}",) for name in names}
    assert done.kept == {} and done.relative <= TOLERANCE
    wanted = jax.jit(lambda x: model.apply(old, x, **inputs))(IMAGES)
    y = jax.jit(lambda x: done.model.apply(done.variables, x, **inputs))(IMAGES)
    close(y, wanted, TOLERANCE)
    np.testing.assert_allclose(done.absolute, np.max(np.abs(y - wanted)), atol=1e-6)
    assert list(done.variables) == ["params"]
    if not getattr(method, "activation", None) and not hasattr(method, "clip"):
        without = ResNet(None, use_bias=True)  # the same code without norms takes the variables
        close(jax.jit(without.apply)(done.variables, IMAGES), wanted, TOLERANCE)


@pytest.mark.parametrize(("method", "inputs"), METHODS)
def test_a_resnet_of_nnx(method, inputs):
    model = randomized(NnxResNet(method, nnx.Rngs(0)))
    done = folding.fold(model, IMAGES, norm_inputs=inputs, **inputs)
    assert len(done.folded) == 6 and done.kept == {} and done.relative <= TOLERANCE
    assert done.folded["norms/1c"] == ("convs/1c",) and done.variables is None
    close(done.model(IMAGES, **inputs), model(IMAGES, **inputs), TOLERANCE)
    assert nnx.state(done.model, nnx.BatchStat) == nnx.State({})
    assert isinstance(model.norms["1c"], nnx_norms.Norm)
    assert isinstance(done.model.norms["1c"], folding.Rest)
