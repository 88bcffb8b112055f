"""Errors of statistics from small batches, predictions and both."""

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import normjax as nj
from normjax import linen, propagate
from normjax.analysis import propagation
from normjax.linen.carry import carry

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


def test_capture_of_norms_of_parts():
    """A norm of parts of the batch is measured as the one that it evaluates as."""
    x = jax.random.normal(KEY, (6, 3))
    model = linen.Norm(nj.Ghost(nj.KalmanNorm(), groups=2), use_running_average=True)
    found = propagation.capture(model, model.init(KEY, x), x)[""]
    chex.assert_trees_all_close(found.truth.mean, x.mean(0), atol=1e-6)
    assert found.batches.mean.shape == (3, 3)


def test_fusion_is_that_of_the_layer_and_has_its_parts_at_the_ends():
    x = jax.random.normal(KEY, (6, 3))
    prior = propagate.prediction(jnp.ones(3), 2 * jnp.ones(3))
    truth = propagate.prediction(jnp.zeros(3), jnp.ones(3))
    batches = nj.Moments(jnp.full((1, 3), 6.0), x.mean(0)[None], x.var(0)[None])
    found = propagation.Statistics(truth, batches, prior)
    gains = (0.0, 0.3, 1.0)
    table = propagation.compare(found, gains)
    for i, gain in enumerate(gains):
        method = nj.KalmanNorm(gain=gain)
        fused = method.fused(*method.init(KEY, 3), method.observe(x), prior=prior)
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
