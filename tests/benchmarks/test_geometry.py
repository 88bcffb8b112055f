"""The benchmark of batch norm's geometry: its networks and its classifier."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import close, draw

from benchmarks import geometry as benchmark
from normjax.analysis import geometry

X = 2 + draw(0, 50, 3)


@pytest.mark.parametrize("arm", benchmark.ARMS)
def test_networks_of_the_arms(arm):
    net = benchmark.Net((5, 4), 2)
    model, variables = benchmark.network_of(arm, net, jnp.asarray(X), 1)
    normed = net.clone(norm=benchmark.BN)
    given = normed.init(jax.random.key(1), X)
    kernel, bias = (np.asarray(variables["params"]["layer_0"][k]) for k in ("kernel", "bias"))
    own = np.asarray(given["params"]["layer_0"]["kernel"])
    if arm == "mean and deviation":
        whole = geometry.smart_init(normed, given, X)
        close(model.apply(variables, X), normed.apply(whole, X), 1e-4)
        close((X @ kernel + bias).std(0), np.ones(5), 1e-3)
    if arm.startswith("mean"):
        close((X @ kernel + bias).mean(0), np.zeros(5), 1e-4)
    else:
        close(kernel, own, 0)
        assert np.ptp(bias) > 0.1 if arm == "random" else not bias.any()


def test_hidden_features():
    model, variables = benchmark.network_of("random", benchmark.Net((5, 4), 2), jnp.asarray(X), 1)
    head = jax.tree.map(np.asarray, variables["params"]["head"])
    found = benchmark.hidden(model, variables, jnp.asarray(X)) @ head["kernel"] + head["bias"]
    close(found, np.asarray(model.apply(variables, X), "float64"), 1e-5)


def test_ridge():
    labels = np.arange(60) % 3
    x = np.eye(3)[labels] + 0.1 * draw(1, 60, 3, dtype="float64")
    assert benchmark.ridge(x, labels, x, labels) == 1
    assert benchmark.ridge(x, labels, x, (labels + 1) % 3) == 0


def test_command(tmp_path, capsys):
    how = ["--seeds", "1", "--output", str(tmp_path)]
    with pytest.raises(SystemExit):
        benchmark.main(["nothing", *how])
    assert "'nothing' is no study" in capsys.readouterr().err
