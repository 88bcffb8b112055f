"""The benchmark of whitening: its matrices, its files, and its differences from its measures."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import close, draw

import normjax as nj
from benchmarks import whiteness, whitening
from normjax.core import roots


def covariance(seed, *groups, size=6):
    x = draw(seed, *groups, 40, size, dtype="float64")
    return x.mT @ x / 40


def test_principal_components_whiten():
    cov = covariance(0, 3).astype("float32")
    matrix = whiteness.PCABatchNorm().root(jnp.asarray(cov), jnp.eye(6))
    values, vectors = np.linalg.eigh(cov)
    close(matrix @ cov @ matrix.mT, np.broadcast_to(np.eye(6), (3, 6, 6)), 1e-4)
    along = np.abs(matrix @ vectors) * np.sqrt(values)[..., None]
    close(along, np.broadcast_to(np.eye(6), (3, 6, 6)), 1e-3)
    x = draw(1, 40, 6)
    method = whiteness.PCABatchNorm(group_size=3)
    slope = jax.grad(lambda x: jnp.sum(method.apply(*method.init(None, 6), x, train=True)[0] ** 3))
    assert np.isfinite(slope(x)).all()


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_iterations_are_those_of_normjax(steps):
    cov = jnp.asarray(covariance(0, 2), jnp.float32)
    close(whiteness.published(cov, steps), roots.published(cov, steps), 1e-6)
    method = nj.IterativeNorm(steps=steps)
    close(whiteness.coupled(cov, steps), method.root(cov, roots.identity_like(cov)), 1e-6)


def test_distance():
    cov = covariance(0, 2)
    close(whiteness.distance(cov, roots.zca(jnp.asarray(cov, jnp.float32))), 0.0, 1e-4)
    values = np.linalg.eigvalsh(cov)
    expected = np.median(np.sqrt(np.mean((values - 1) ** 2, 1)))
    close(whiteness.distance(cov, jnp.eye(6)), expected, 1e-6)
    assert whiteness.distance(cov, jnp.full((6, 6), jnp.nan)) is None


def test_correlations_have_their_eigenvalues():
    values = [2.5, 1.0, 0.4, 0.1]
    corr = whiteness.correlation(values, 0)
    close(np.linalg.eigvalsh(corr)[::-1], np.array(values), 1e-6)
    close(np.diag(corr), np.ones(4), 1e-6)


def test_partial_whitening_follows_its_law():
    found = whiteness.partial(1e-4)
    close(np.array(found["variances"]), np.array(found["law"]), 0.01)


def test_arms_are_named_after_what_they_have():
    arms = whitening.convolutions_arms() | whitening.dense_arms()
    for name, arm in arms.items():
        own = {method for method in arm.methods if method != whiteness.BN}
        assert name.startswith("BN") == (not own)
        assert f"batch {arm.batch_size}" in name or arm.batch_size == 64
        for method in own:
            size = getattr(method, "group_size", None)
            assert size is None or f" {size}" in name
            assert not isinstance(method, nj.IterativeNorm) or f"T={method.steps}" in name
    assert sum("layer" in name for name in arms) == 2


def results(**losses):
    rows = [
        {"arm": name, "batch_size": 64, "accuracy": accuracy, "train_loss": loss}
        for name, (accuracy, loss) in losses.items()
    ]
    return {"study": "dense", "configuration": {"seeds": 2}, "rows": rows}


def test_measures_and_differences():
    found = results(
        BN=([0.5, 0.25], [[4.0, 3.0, 2.0, 1.0, 0.5], [4.0, 3.0, 2.0, 1.0, 0.25]]),
        other=([0.75, 0.5], [[4.0, 2.0, 2.0, 1.0, 0.25], [4.0, 1.0, 2.0, 1.0, None]]),
    )
    own = whitening.values(found["rows"][0])
    assert {name: a.tolist() for name, a in own.items()} == {
        "accuracy": [0.5, 0.25],
        "early loss": [3.0, 3.0],
        "final loss": [0.5, 0.25],
    }
    gap = whitening.less(found, "other", "BN")
    assert gap["accuracy"].tolist() == [0.25, 0.25]
    assert gap["early loss"].tolist() == [-1.0, -2.0]
    assert gap["final loss"].tolist() == [-0.25, np.inf]
    head, bn, other = whitening.cells(found)
    assert len(head) == len(bn) == len(other) == 7
    assert bn[2] == "" and other[2] == "+25.00 ± 0.00"
    assert other[-2:] == ["not finite", "not finite"]


def test_rows_by_fields():
    rows = [{"a": a, "b": b, "v": 10 * a + b} for b in (1, 2) for a in (3, 4)]
    found = whitening.by(rows, "v", "a")
    assert found == [{"a": 3, "v": [31, 32]}, {"a": 4, "v": [41, 42]}]


def test_a_file_of_another_command(tmp_path, capsys):
    other = {"study": "identities", "configuration": {"seeds": 3}, "complete": True}
    (tmp_path / "identities.json").write_text(json.dumps(other))
    assert whitening.main(["identities", "--seeds", "2", "--output", str(tmp_path)]) == 2
    assert "identities.json is of another command" in capsys.readouterr().err
    assert json.loads((tmp_path / "identities.json").read_text()) == other


def test_an_unknown_study(capsys):
    with pytest.raises(SystemExit):
        whitening.main(["density"])
    assert "'density' is no study" in capsys.readouterr().err


def test_an_interrupted_study_goes_on(tmp_path, monkeypatch):
    arms = dict(list(whitening.dense_arms().items())[:2])
    monkeypatch.setattr(whitening, "dense_arms", lambda: arms)
    argv = ["dense", "--seeds", "2", "--steps", "20", "--output", str(tmp_path)]
    assert whitening.main(argv) == 0
    file = tmp_path / "dense.json"
    whole = json.loads(file.read_text())
    assert [row["arm"] for row in whole["rows"]] == [*arms]
    first, second = whole["rows"]
    kept = first | {"accuracy": [0.0, 1.0]}
    file.write_text(json.dumps(whole | {"rows": [kept], "complete": False}))
    assert whitening.main(argv) == 0
    again = json.loads(file.read_text())
    assert again["rows"] == [kept, second] and again["complete"]
    file.write_text(json.dumps(whole | {"data": whole["data"] | {"crc32": 0}}))
    assert whitening.main(argv) == 2


@pytest.mark.slow
@pytest.mark.parametrize("study", [name for name in whitening.STUDIES if name != "dense"])
def test_files(study, tmp_path, capsys, monkeypatch):
    arms = dict(list(whitening.convolutions_arms().items())[::7])
    monkeypatch.setattr(whitening, "convolutions_arms", lambda: arms)
    argv = [study, "--seeds", "2", "--steps", "2", "--passes", "2", "--output", str(tmp_path)]
    assert whitening.main(argv) == 0
    found = json.loads((tmp_path / f"{study}.json").read_text())
    assert found["configuration"]["seeds"] == 2 and found["complete"]
    head, *lines = whitening.cells(found)
    assert lines and all(len(line) == len(head) for line in lines)
    assert lines[0][0] in capsys.readouterr().out
