"""The benchmark of effective depth: its data, its files and its table."""

import functools
import json

import numpy as np
import pytest

from benchmarks import depth
from normjax.analysis import depth as analysis


def test_gaussians_have_their_deviations():
    x, labels = depth.gaussians(0, classes=5, features=30, samples=4000)
    centres = np.stack([x[labels == label].mean(0) for label in range(5)])
    assert abs((x - centres[labels]).std() - 1) < 0.02
    assert abs(centres.std() - 2) < 0.4


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(depth, "MOMENTS", (0, 10))
    monkeypatch.setattr(depth, "IMAGES", 16)
    monkeypatch.setattr(depth, "ARMS", {"one": ("gaussians", True, 0.01)})
    monkeypatch.setattr(depth, "Dense", functools.partial(depth.Dense, blocks=2, width=4))


@pytest.mark.usefixtures("small")
def test_training(tmp_path, capsys):
    assert depth.main(["training", "--seeds", "1", "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "training.json").read_text())
    (row,) = results["rows"]
    first, last = row["measured"]
    assert first["gains"]["scale"] == [1.0, 1.0] != last["gains"]["scale"]
    assert last["loss"] < first["loss"] and first["first_scale"] == 1.0
    close = np.testing.assert_allclose
    close([sum(row["sampled"]), sum(row["exact"])], [1, 1], rtol=1e-6)
    gains = depth.history(row)[10]
    assert list(gains) == ["block_0", "block_1"]
    mean = analysis.network_lengths(gains).mean / 3
    close(last["relative"]["jacobian, amplitude"], mean, rtol=1e-6)
    head, *lines = depth.cells(results)
    assert [line[:2] for line in lines] == [["one", "0"], ["one", "10"]]
    assert {len(line) for line in lines} == {len(head)}
    assert (tmp_path / "training.png").stat().st_size > 1000
    assert "one | 10" in capsys.readouterr().out


def test_an_unknown_study(capsys):
    with pytest.raises(SystemExit):
        depth.main(["width"])
    assert "'width' is no study" in capsys.readouterr().err
