"""The benchmark of predicted statistics, and the networks with Kalman norms."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import normjax as nj
from benchmarks import models, propagation
from normjax.linen.carry import carry


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def init(network, x):
    return network.init(jax.random.key(1), x, train=False)


def statistics(network, variables, x):
    """What a training step makes of them, as one program."""
    how = dict(train=True, mutable=["batch_stats"])
    return jax.jit(functools.partial(network.apply, **how))(variables, x)[1]["batch_stats"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "propagation"
    command = ["--seeds", "2", "--epochs", "1", "--train-size", "64", "--output", str(folder)]
    assert propagation.main(command) == 0
    return folder


def test_files(finished):
    assert {p.name for p in finished.iterdir()} == {"propagation.json", "propagation.png"}
    with Image.open(finished / "propagation.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 50
    results = json.loads((finished / "propagation.json").read_text())
    rows = propagation.summary(results)
    assert [row["norm"] for row in rows[::2]] == ["norm_2", "norm_3", "norm_4"]
    for row in rows:
        assert row["fusion"] <= min(row["batch"], row["consistent"]) + 1e-9
        assert row["public"] != row["consistent"]


def test_summary():
    def seed(batch, consistent, public, fusion):
        of = lambda value: {"mean": value, "log_var": value}
        output = {"batch": of(batch), "prediction": of(consistent), "fusion": of(fusion)}
        fused = {**output, "prediction": of(public)}
        return {"output": {"norm_2": output}, "fused": {"norm_2": fused}}

    errors = [seed(1.0, 2.0, 3.0, [2.0, 0.5, 1.0]), seed(3.0, 4.0, 5.0, [4.0, 1.5, 3.0])]
    row = propagation.summary({"gains": [0.0, 0.25, 1.0], "errors": errors})[0]
    assert row == {
        "norm": "norm_2",
        "measure": "mean",
        "batch": 2.0,
        "consistent": 3.0,
        "public": 4.0,
        "fusion": 1.0,
        "gain": 0.25,
    }


def test_bad_input(capsys):
    assert propagation.main(["--batch-size", "5000"]) == 2
    assert "--batch-size" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        propagation.main(["--seeds", "0"])


@pytest.mark.parametrize(
    ("model", "shape", "depth", "norms"),
    [
        pytest.param("residual", (8, 8, 1), 1, 5, marks=pytest.mark.slow),
        pytest.param("residual", (16, 16, 3), 2, 13, marks=pytest.mark.slow),
        ("mlp", (8, 8, 1), 1, 3),
    ],
)
def test_networks_with_kalman_norms(model, shape, depth, norms):
    """Gain one is the network of batch norms; priors are for the layers that get them."""
    x = draw(4, *shape)
    build = lambda method: models.build(model, method, classes=3, width=4, depth=depth)
    plain, kalman = build(nj.BatchNorm()), build(nj.KalmanNorm(gain=1.0))
    variables, same = init(plain, x), init(kalman, x)
    chex.assert_trees_all_equal(same, variables)
    assert len(variables["batch_stats"]) == norms

    def both_modes(network, variables, x):
        modes = (dict(train=train, mutable=["batch_stats"]) for train in (True, False))
        return [network.apply(variables, x, **how) for how in modes]

    wanted, got = (
        jax.jit(functools.partial(both_modes, net))(variables, x) for net in (plain, kalman)
    )
    chex.assert_trees_all_close(got, wanted, atol=1e-5)
    demanding = build(nj.KalmanNorm(gain=0.5, require_prior=True))
    with pytest.raises(ValueError, match="require_prior"):
        statistics(demanding, variables, x)


@pytest.mark.slow
def test_every_norm_but_the_first_of_the_residual_network_has_a_prior():
    """Statistics from the prediction alone differ from the batch's in all norms but the first."""
    x = draw(4, 16, 16, 3)
    networks = [
        models.build("residual", nj.KalmanNorm(gain=gain, momentum=0.0), classes=3, width=4)
        for gain in (0.0, 1.0)
    ]
    variables = networks[0].init(jax.random.key(1), x, train=False)
    stats = [
        net.apply(variables, x, train=True, mutable=["batch_stats"])[1]["batch_stats"]
        for net in networks
    ]
    same = {name: np.allclose(a["var"], stats[1][name]["var"]) for name, a in stats[0].items()}
    assert same == {f"norm_{i}": i == 1 for i in range(1, 8)}


@pytest.mark.slow
def test_predictions_of_the_residual_network_are_of_the_right_size():
    """Of untrained layers on white noise, fused variances lie near those of the batch."""
    x = draw(64, 16, 16, 3)
    method = nj.KalmanNorm(gain=0.0, momentum=0.0)
    network = models.build("residual", method, classes=3, width=32)
    variables = init(network, x)
    plain = models.build("residual", nj.BatchNorm(momentum=0.0), classes=3, width=32)
    alone, true = (statistics(net, variables, x) for net in (network, plain))
    for name, found in alone.items():
        ratio = np.median(found["var"] / true[name]["var"])
        assert 0.7 < ratio < 1.4, (name, ratio)


def priors_by_hand(params, size, depth):
    """Of the norms of the residual network, for standardized pixels, from its parameters alone."""
    priors = {}

    def normalize(moments):
        name = f"norm_{len(priors) + 1}"
        priors[name] = moments
        scale, bias = params[name]["scale"], params[name]["bias"]
        return nj.propagate.relu(nj.propagate.prediction(bias, scale**2))

    def through(moments, name, size, stride=1):
        kernel = params[name]["kernel"]
        return nj.propagate.conv(moments, kernel, size=(size, size), strides=stride)

    skip = through(nj.propagate.prediction(jnp.zeros(3), jnp.ones(3)), "stem", size)
    for stage in range(3):
        for block in range(depth):
            name, stride = f"stage_{stage}_block_{block}", 2 if stage and not block else 1
            y = normalize(skip)
            if stride > 1:
                skip = through(y, f"{name}_shortcut", size, stride)
            y = through(y, f"{name}_conv_1", size, stride)
            size //= stride
            y = through(normalize(y), f"{name}_conv_2", size)
            skip = nj.propagate.add(skip, y)
    normalize(skip)
    return priors | {"norm_1": None}


@pytest.mark.slow
def test_carried_and_passed_by_hand():
    """Strides, stages and sums of the residual network give the priors that they should."""
    x = draw(4, 16, 16, 3)
    network = models.build("residual", nj.KalmanNorm(gain=0.5), classes=3, width=4, depth=2)
    variables = network.init(jax.random.key(1), x, train=False)
    with carry() as known:
        network.apply(variables, x, train=True, mutable=["batch_stats"])
    wanted = priors_by_hand(variables["params"], 16, 2)
    assert len(wanted) == 13
    chex.assert_trees_all_close(known.priors, wanted, rtol=1e-5)


def test_groups_and_what_is_handed_on_change_the_network():
    x = draw(8, 8, 8, 1)
    build = functools.partial(models.build, "mlp", classes=3)
    plain = nj.KalmanNorm(gain=0.5, momentum=0.0)
    networks = (build(plain), build(nj.Ghost(plain, 2)), build(plain, posterior="fused"))
    variables = init(networks[0], x)
    whole, parts, fused = (statistics(net, variables, x)["norm_2"]["var"] for net in networks)
    assert not np.allclose(whole, parts, rtol=0.01)
    assert not np.allclose(whole, fused, rtol=0.01)


def test_kalman_norms_in_the_last_layers_alone():
    with pytest.raises(ValueError, match="early"):
        models.build("mlp", nj.KalmanNorm(), classes=3, early=nj.BatchNorm())


def test_kalman_norms_inside_of_what_hands_nothing_on():
    with pytest.raises(ValueError, match="Chain: it hands on no moments"):
        models.build("mlp", nj.chain(nj.KalmanNorm(), nj.Affine()), classes=3)
