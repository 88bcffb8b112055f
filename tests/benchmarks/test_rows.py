"""Times of layer norm's passes: they make what the norm makes, and so do the other ways."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from benchmarks import rows

SHAPE = (4, 32, 64)


@pytest.fixture(scope="module")
def arrays():
    return rows.draw(SHAPE, "float32")


def compiled(program, *args):
    return jax.jit(program).lower(*args).compile()


def test_passes_are_those_of_the_norm(arrays):
    y, *gradients = rows.step(arrays)
    mean, var = rows.statistics(arrays.x)
    inverse = lax.rsqrt(var + rows.NORM.epsilon)
    found = arrays._replace(mean=mean, inverse=inverse)
    np.testing.assert_allclose(rows.output(found), y, atol=1e-5)
    for ours, wanted in zip(rows.backward(found), gradients, strict=True):
        np.testing.assert_allclose(ours.reshape(wanted.shape), wanted, atol=1e-4)


@pytest.mark.parametrize("dtype", rows.DTYPES)
def test_passes_move_the_bytes_of_the_norm(dtype):
    """Apart they read and write as much as together, to the numbers of each row."""
    arrays = rows.draw((16, 32, 768), dtype)
    names = "mean, then variance", "output", "backward pass", "training step"
    *passes, step = (
        compiled(rows.PASSES[name], arrays).cost_analysis()["bytes accessed"] for name in names
    )
    assert sum(passes) == pytest.approx(step, rel=0.01)


@pytest.mark.parametrize("of, name", [(of, name) for of in rows.WAYS for name in rows.WAYS[of]])
def test_ways_make_the_same(of, name, arrays):
    wanted = rows.PASSES[of](arrays)
    found = jax.jit(rows.WAYS[of][name])(arrays)
    for ours, right in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours.reshape(right.shape), right, atol=1e-4)


def test_row_has_every_program(arrays):
    row = rows.measure(SHAPE, "bfloat16", rounds=2)
    assert list(row["passes"]) == list(rows.PASSES)
    assert {of: list(ways) for of, ways in row["ways"].items()} == {
        of: list(ways) for of, ways in rows.WAYS.items()
    }
    numbers = jnp.array(jax.tree.leaves((row["copy_ms"], row["passes"], row["ways"])))
    assert (numbers > 0).all()


def test_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rows, "SHAPES", ((64, 32),))
    assert rows.main(["--rounds", "2", "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "rows.json").read_text())
    found = [(row["shape"], row["dtype"]) for row in results["rows"]]
    assert found == [([64, 32], dtype) for dtype in rows.DTYPES]
    assert "one reduction, undivided" in capsys.readouterr().out
