"""Stacks of random layers: a tiny run, the series of a rectified covariance, a known covariance."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import stacks
from normjax import propagate


@pytest.mark.slow
def test_files(tmp_path, capsys):
    command = ["--depth", "2", "--seeds", "1", "--rounds", "2", "--shrink", "32"]
    assert stacks.main([*command, "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "stacks.json").read_text())
    assert len(results["accuracy"]) == len(stacks.SHAPES) * len(stacks.INPUTS)
    assert all(0 < e < 1 for row in results["accuracy"] for e in row["errors"]["closed form"])
    assert all(row["with_gradients_over_convolution"] > 0 for row in results["costs"])
    assert results["training_step"]["ratio"] > 0
    assert "KalmanNorm over BatchNorm" in capsys.readouterr().out


def test_closed_form_is_as_good_as_samples():
    """Also deep, where borders count most: on small maps."""
    one = functools.partial(stacks.errors, shape=(256, 8, 8, 64), depth=4)
    found = jax.device_get(jax.jit(one)(jax.random.key(0)))
    closed, interior, sampled = (
        found[name] for name in ("closed form", "without borders", "sampled batch")
    )
    assert (closed <= sampled + 0.01).all(), found
    assert closed[0] < 0.02 and closed[0] < interior[0] / 4, found
    assert closed.max() < 0.1, found


@pytest.mark.parametrize("correlation", (-0.6, 0.0, 0.5, 0.8))
def test_rectified_covariance(correlation):
    """Against a million pairs, to five standard errors and what the series leaves out."""
    mean, deviation = np.array([0.3, -0.4]), np.array([1.2, 0.7])
    pair = np.random.default_rng(0).normal(size=(1_000_000, 2))
    pair[:, 1] = correlation * pair[:, 0] + np.sqrt(1 - correlation**2) * pair[:, 1]
    positive = np.maximum(mean + deviation * pair, 0)
    moments = propagate.prediction(mean.astype("float32"), (deviation**2).astype("float32"))
    correlations = np.array([[1, correlation], [correlation, 1]], "float32")
    ours = jax.jit(stacks.rectified)(moments, correlations)
    wanted = np.cov(positive.T)
    np.testing.assert_allclose(ours, wanted, atol=5 * positive.var() / 1000 + 1e-3)


def test_independent_channels_have_no_covariance():
    """Then the variances are those of the closed form, borders included."""

    @jax.jit
    def both():
        scale, bias, kernel = stacks.draw_layer(jax.random.key(0), 4)
        moments = propagate.relu(propagate.prediction(bias, scale**2))
        conv = functools.partial(propagate.conv, kernel=kernel, size=(5, 7))
        found = stacks.through(jnp.diag(moments.var), moments.mean, conv, kernel)
        return found, (conv(moments).var, conv(moments, padding="CIRCULAR").var)

    (var, inside), (wanted, circular) = both()
    np.testing.assert_allclose(var, wanted, rtol=1e-5)
    np.testing.assert_allclose(np.diagonal(inside), circular, rtol=1e-5)


def test_rejects(capsys):
    with pytest.raises(SystemExit):
        stacks.main(["--depth", "0"])
    assert "--depth: '0' is not" in capsys.readouterr().err
