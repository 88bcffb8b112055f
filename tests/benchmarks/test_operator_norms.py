"""The benchmark of operator norms: kernels whose norms are known, and the table."""

import json

import jax
import numpy as np
import pytest
from agreement import draw

from benchmarks import operator_norms


def factors(kernel, **how):
    return [operator_norms.factor(name, kernel, **how) for name in operator_norms.OPERATORS]


def test_one_weight_of_the_window_is_a_matrix():
    matrix = draw(0, 3, 4)
    kernel = np.zeros((3, 3, 3, 4), "float32")
    kernel[1, 1] = matrix
    norm = np.linalg.norm(matrix, 2)
    for stride in (1, 2):
        found = operator_norms.exact(kernel, size=4, stride=stride)
        assert found == pytest.approx(norm, rel=1e-5)
    expected = [norm, norm, 3 * norm]
    assert factors(kernel, size=4, stride=1) == pytest.approx(expected, rel=1e-4)


def test_a_kernel_of_ones():
    kernel = np.ones((3, 3, 1, 1), "float32")
    how = {"size": 8, "stride": 1}
    assert operator_norms.exact(kernel, periodic=True, **how) == pytest.approx(9, rel=1e-5)
    along = np.tri(8, k=1) - np.tri(8, k=-2)  # sums of three neighbours, fewer at the ends
    expected = np.linalg.norm(along, 2) ** 2
    assert operator_norms.exact(kernel, **how) == pytest.approx(expected, rel=1e-5)
    assert factors(kernel, **how) == pytest.approx([3, 9, 9], rel=1e-4)


def test_the_table(monkeypatch, tmp_path, capsys):
    shapes = {name: draw(i, 3, 3, 2, 3) for i, name in enumerate(operator_norms.LAYERS)}
    found = {"random": [shapes] * 2, "trained": [jax.tree.map(lambda a: 2 * a, shapes)] * 2}
    monkeypatch.setattr(operator_norms, "kernels", lambda seeds, epochs: found)
    assert operator_norms.main(["--output", str(tmp_path)]) == 0
    assert "3x3x2x3" in capsys.readouterr().out
    rows = json.loads((tmp_path / "operator_norms.json").read_text())["rows"]
    one, two = rows[0], rows[3]
    assert np.allclose(2 * np.array(one["norm"]), two["norm"], rtol=1e-5)
    for name in operator_norms.OPERATORS:
        assert np.allclose(one[name], two[name], rtol=1e-3)
    assert np.allclose(one["periodic"], 1, rtol=1e-3)
