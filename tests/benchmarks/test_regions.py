"""The benchmark of linear regions: its file, and its networks."""

import json

import numpy as np

from benchmarks import documents, regions


def test_results_are_written(tmp_path, capsys):
    sizes = ["--widths", "4", "--size", "6", "--repeats", "1", "--peer-regions", "2"]
    assert regions.main([*sizes, "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "regions.json").read_text())
    assert [row["network"] for row in results["rows"]] == [
        "perceptron, 3 x 4",
        "convolutional, 6 x 6",
    ]
    assert all(row["regions"] > 10 and row["seconds"] > 0 for row in results["rows"])
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert len(list(documents.region_rows(results))) == 3


def test_perceptrons_have_normalized_units():
    layers = regions.perceptron(5)
    x = np.random.default_rng(0).normal(size=(512, 2))
    for kernel, bias in layers:
        z = x @ kernel
        np.testing.assert_allclose(z.std(0), 1, rtol=1e-9)
        x = np.maximum(z + bias, 0)
