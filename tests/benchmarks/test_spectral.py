"""The training benchmark of spectral batch norm: its files, and its table from its measures."""

import json
import math

import jax
import numpy as np
import pytest
from PIL import Image
from scipy import stats

import normjax as nj
from benchmarks import models, spectral

RUN = ["--seeds", "2", "--epochs", "1", "--train-size", "64", "--batch-size", "32", "--width", "4"]


@pytest.mark.parametrize(
    "arms",
    [
        ["frequency, ortho"],
        pytest.param(["batch norm", "frequency, ortho"], marks=pytest.mark.slow),
    ],
)
def test_files(arms, tmp_path):
    assert spectral.main([*RUN, "--arms", *arms, "--output", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"spectral.json", "spectral.png"}
    with Image.open(tmp_path / "spectral.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 50
    results = json.loads((tmp_path / "spectral.json").read_text())
    assert (results["train_images"], results["test_images"]) == (64, 540)
    assert [arm["name"] for arm in results["arms"]] == arms
    for arm in results["arms"]:
        right = np.array(arm["test_accuracy"]) * 540
        np.testing.assert_allclose(right, right.round(), atol=1e-9)
        for field in spectral.MEASURES:
            assert np.shape(arm["measures"][field]) == (2, 2, len(arm["maps"]))
    flat = dict(zip(arm["maps"], np.array(arm["measures"]["flatness"])[0, 1], strict=True))
    assert flat["norm_5"] > 0.99  # statistics of each frequency make the spectrum of a batch flat
    assert flat["norm_3"] < 0.99


def arm(name, accuracy, flatness, quantile):
    maps = ["norm_1", "stage_0_block_0/sum", "norm_2", "norm_3", "stage_1_block_0/sum"]
    measures = {"flatness": flatness, "quantile": quantile}
    shaped = {k: np.reshape(v, (2, 1, 5)).tolist() for k, v in measures.items()}
    return {"name": name, "test_accuracy": accuracy, "maps": maps, "measures": shaped}


def test_summary():
    first = arm("a", [0.5, 0.7], [0, 0, 0, 0, 0.2, 0, 0, 0, 0, 0.4], [1.0] * 10)
    other = arm("b", [0.6, 0.9], [0, 0, 0, 0, 0.3, 0, 0, 0, 0, 0.7], [9, 9, 2, 4, 5, 9, 9, 3, 3, 6])
    base, row = spectral.summary({"arms": [first, other]})
    assert base["accuracy_gain"] == base["flatness_gain"] == (0.0, 0.0)
    half = stats.t.ppf(0.975, 1) * stats.sem([0.1, 0.2])
    assert row["accuracy"][0] == pytest.approx(0.75)
    assert row["accuracy_gain"] == pytest.approx((0.15, half))
    assert row["flatness_gain"][0] == pytest.approx(0.2)
    assert row["norms_ratio"][0] == pytest.approx(3)
    spread = stats.t.ppf(0.975, 1) * stats.sem([math.log(5), math.log(6)])
    ends = math.sqrt(30) * math.exp(-spread), math.sqrt(30) * math.exp(spread)
    assert row["sums_ratio"] == pytest.approx((math.sqrt(30), *ends))


@pytest.mark.parametrize(("model", "early", "deep"), [("residual", 3, 2), ("mlp", 2, 1)])
def test_placement(model, early, deep):
    network = models.build(
        model, nj.RMSNorm(), classes=10, early=nj.BatchNorm(use_bias=False, momentum=0.5)
    )
    shapes = jax.eval_shape(
        lambda x: network.init(jax.random.key(0), x, train=False), np.zeros((2, 8, 8, 1), "f")
    )
    tracked = sorted(shapes["batch_stats"])
    assert tracked == [f"norm_{i + 1}" for i in range(early)]
    norms = [name for name in shapes["params"] if name.startswith("norm_")]
    assert len(norms) == early + deep


@pytest.mark.parametrize(
    ("argv", "pieces"),
    [
        (["--data", "images"], ("--data images", "--data-dir")),
        (["--train-size", "5"], ("--train-size 5", "10")),
        (["--batch-size", "1300"], ("--batch-size 1300", "1257")),
    ],
)
def test_bad_input_is_one_line(argv, pieces, capsys):
    assert spectral.main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert all(piece in err for piece in pieces)


@pytest.mark.parametrize("option", ["--seeds", "--epochs", "--depth"])
def test_counts_are_positive(option, capsys):
    with pytest.raises(SystemExit):
        spectral.main([option, "0"])
    assert f"{option}: '0' is not a whole number >= 1" in capsys.readouterr().err
