"""Errors of statistics from small batches, predictions and both."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import normjax as nj
from normjax import linen, propagate
from normjax.analysis import propagation
from normjax.carry import carry

KEY = jax.random.key(0)


class Net(nn.Module):
    depth: int = 2

    @nn.compact
    def __call__(self, x):
        for _ in range(self.depth):
            x = nn.Conv(5, (3, 3))(x)
            x = linen.KalmanNorm(use_running_average=True, activation=nn.relu)(x)
        return x


def test_capture_has_the_statistics_of_the_inputs():
    x = jax.random.normal(KEY, (6, 8, 8, 3))
    with carry():
        variables = Net().init(KEY, x)
    given = propagate.prediction(jnp.zeros(3), jnp.ones(3))
    found = jax.jit(lambda x: propagation.capture(Net(), variables, x, batch_size=3, given=given))(
        x
    )
    z = nn.Conv(5, (3, 3)).apply({"params": variables["params"]["Conv_0"]}, x)
    first = found["KalmanNorm_0"]
    chex.assert_trees_all_close(first.truth.mean, z.mean((0, 1, 2)), atol=1e-5)
    chex.assert_trees_all_close(first.truth.var, z.var((0, 1, 2)), rtol=1e-5)
    for i in range(2):
        part = z[3 * i : 3 * i + 3]
        chex.assert_trees_all_close(first.batches.mean[i], part.mean((0, 1, 2)), atol=1e-5)
        chex.assert_trees_all_close(first.batches.var[i], part.var((0, 1, 2)), rtol=1e-5)
    kernel = variables["params"]["Conv_0"]["kernel"]
    wanted = propagate.conv(given, kernel, size=(8, 8))
    chex.assert_trees_all_close(first.prediction[1:], wanted[1:], atol=1e-6)
    assert propagation.capture(Net(), variables, x)["KalmanNorm_0"].prediction is None


def test_fusion_is_that_of_the_layer_and_has_its_parts_at_the_ends():
    x = jax.random.normal(KEY, (6, 3))
    prior = propagate.prediction(jnp.ones(3), 2 * jnp.ones(3))
    truth = propagate.prediction(jnp.zeros(3), jnp.ones(3))
    batches = nj.Moments(jnp.full((1, 3), 6.0), x.mean(0)[None], x.var(0)[None])
    found = propagation.Statistics(truth, batches, prior)
    gains = (0.0, 0.3, 1.0)
    table = propagation.compare(found, gains)
    for i, gain in enumerate(gains):
        method = nj.KalmanNorm(gain=gain, posterior="fused")
        (_, fused), _ = method.apply(*method.init(KEY, 3), x, train=True, prior=prior)
        wanted = propagation.errors(fused, truth)
        chex.assert_trees_all_close(jax.tree.map(lambda a, i=i: a[i], table["fusion"]), wanted)
    ends = [jax.tree.map(lambda a, i=i: a[i], table["fusion"]) for i in (0, 2)]
    chex.assert_trees_all_close(ends, [table["prediction"], table["batch"]], rtol=1e-6)


def test_rejects():
    x = jax.random.normal(KEY, (6, 8, 8, 3))
    with pytest.raises(ValueError, match="batch_size=4"):
        propagation.capture(Net(), {}, x, batch_size=4)
    with pytest.raises(ValueError, match="Dense has called no Kalman norm"):
        propagation.capture(nn.Dense(3), nn.Dense(3).init(KEY, x), x)
    one = propagate.prediction(jnp.zeros(3), jnp.ones(3))
    with pytest.raises(ValueError, match="no prediction"):
        propagation.compare(propagation.Statistics(one, one, None))


def stack(key, depth, channels, size, batch):
    """Errors of the predicted variances in a stack of He-initialized layers on white noise.

    Every layer is a normalization with random scale and bias, a ReLU and a convolution. Medians
    over channels of |predicted / true - 1| for the closed form, the closed form without borders,
    and a full batch of sampled images.
    """
    conv = lambda x, kernel: jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    keys = jax.random.split(key, depth + 1)
    x = jax.random.normal(keys[0], (batch, *size, channels))
    rows = []
    for layer in keys[1:]:
        ks = jax.random.split(layer, 4)
        scale = 0.5 + jax.random.uniform(ks[0], (channels,))
        bias = 0.5 * jax.random.normal(ks[1], (channels,))
        kernel = jax.random.normal(ks[2], (3, 3, channels, channels)) * math.sqrt(2 / 9 / channels)
        norm = nj.BatchNorm(activation=nn.relu)
        _, state = norm.init(KEY, channels)
        y, _ = norm.apply(nj.AffineParams(scale, bias), state, x, train=True)
        x = conv(y, kernel)
        true = x.var((0, 1, 2))
        rectified = propagate.relu(propagate.prediction(bias, scale**2))
        images = jax.random.normal(ks[3], (batch, *size, channels))
        sampled = conv(nn.relu(images * scale[None, None, None] + bias[None, None, None]), kernel)
        found = (
            propagate.conv(rectified, kernel, size=size).var,
            propagate.conv(rectified, kernel, size=size, padding="CIRCULAR").var,
            sampled.var((0, 1, 2)),
        )
        rows.append([jnp.median(jnp.abs(var / true - 1)) for var in found])
    return jnp.array(rows)


def test_predicted_variances_in_a_stack_of_he_layers():
    """The closed form with borders is as good as a full batch of samples, also deep."""
    errors = np.asarray(jax.jit(lambda key: stack(key, 4, 64, (8, 8), 256))(KEY))
    closed, interior, sampled = errors.T
    assert (closed <= sampled + 0.01).all(), errors
    assert closed[0] < 0.02 and closed[0] < interior[0] / 4, errors
    assert closed.max() < 0.1, errors
