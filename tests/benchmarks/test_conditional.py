"""The benchmark of conditional norms: what it asks, its files, and its table from its measures."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from benchmarks import conditional


def numbered(digits=10, copies=3, size=8):
    """Images in which every pixel is the digit, counted from one."""
    values = jnp.arange(1.0, 1 + digits)[:, None, None, None, None]
    return jnp.broadcast_to(values, (digits, copies, size, size, 1))


@pytest.mark.parametrize("held_out", [False, True])
def test_questions_have_the_right_answers(held_out):
    batch = conditional.questions(numbered(), held_out=held_out)(jax.random.key(0))
    images, condition, labels = map(np.asarray, batch)
    assert images.shape == (64, 16, 16, 1)
    assert 0.3 < labels.mean() < 0.7
    first, relation, second = (part.argmax(1) for part in np.split(condition, (10, 14), 1))
    assert condition.sum() == 3 * 64
    partner = (second - first) % 10
    assert set(partner) == set(range(4, 10) if held_out else range(1, 4))
    asked = 0
    for image, a, r, b, answer in zip(images, first, relation, second, labels, strict=True):
        if 0 in (a, b):
            continue  # looks like an empty cell
        (here,), (there,) = (np.argwhere(image[::8, ::8, 0] == 1 + digit) for digit in (a, b))
        row, column = there - here
        assert answer == (column > 0, column < 0, row > 0, row < 0)[r]
        asked += 1
    assert asked > 40


def test_a_batch_of_one_question():
    batch = conditional.questions(numbered(), alone=True)(jax.random.key(0))
    assert len(np.unique(np.asarray(batch.condition), axis=0)) == 1
    assert len(np.unique(np.asarray(batch.labels))) == 2


def test_angles_and_noise():
    images = jnp.arange(64.0).reshape(1, 1, 8, 8, 1)
    batch = conditional.rotations(images, (0.0, 0.0, 0.0, 0.5))(jax.random.key(0))
    for x, angle in zip(batch.images, batch.condition, strict=True):
        gap = x[:, :, 0] - np.rot90(images[0, 0, :, :, 0], angle)
        assert np.std(gap) == 0 if angle < 3 else 0.3 < np.std(gap) < 0.7


def test_tasks_have_their_examples_first():
    batch = conditional.tasks(numbered(copies=9), conditional.TEST_DIGITS)(jax.random.key(0))
    x = np.asarray(batch.images).reshape(4, 5, 6, 8, 8, 1)
    assert set(np.unique(x)) <= {1.0 + digit for digit in conditional.TEST_DIGITS}
    assert np.ptp(x, (2, 3, 4, 5)).max() == 0, "a class is one digit"
    condition = np.asarray(batch.condition).reshape(4, 5, 6, 64)
    np.testing.assert_allclose(condition[:, 2, 3], x[:, :, 0].reshape(4, 5, 64).mean(1), rtol=1e-6)
    outputs = np.repeat(np.eye(5)[None, :, None], 6, 2) * np.ones((4, 1, 1, 1))
    scores, labels = conditional.prototypes(jnp.asarray(outputs.reshape(120, 5)), batch)
    assert scores.shape == (4, 5, 5, 5)
    np.testing.assert_array_equal(scores.argmax(-1), labels)
    assert scores[0, 1, 0, 1] == 0 > scores[0, 1, 0, 0]


def test_parts_divide_the_steps(capsys):
    with pytest.raises(SystemExit):
        conditional.main(["few-shot", "--steps", "3", "--parts", "2"])
    assert "--parts 2 does not divide --steps 3" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("study", "rows"), [("balance", 20), ("relations", 6), ("few-shot", 4)])
def test_files(study, rows, tmp_path, capsys):
    argv = [study, "--seeds", "2", "--steps", "4", "--parts", "2"]
    assert conditional.main([*argv, "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / f"{study}.json").read_text())
    assert results["configuration"] == {"seeds": 2, "steps": 4, "parts": 2}
    assert len(conditional.summary(results)) == rows
    assert "accuracy" in capsys.readouterr().out
    for arm in results["arms"]:
        if study == "balance":
            assert np.shape(arm["accuracy"]) == (2,)
            for found in arm["measures"].values():
                assert np.shape(found["norms"]) == (2, 3, conditional.ANGLES)
                assert np.min(found["norms"]) > 0
                assert np.shape(found["cosine"]) == (2, 3)
        elif arm["method"] == "ConditionalGroupNorm":
            running, batch = list(arm["accuracy"].values())[:2]
            assert running == batch, "group norm has no statistics of a batch"


def arm(method, accuracy, norms, cosine):
    """Of two seeds at three times, with two kernels of two conditions."""
    found = {"norms": np.reshape(norms, (2, 3, 2)).tolist(), "cosine": cosine}
    twice = {"norms": (2 * np.array(found["norms"])).tolist(), "cosine": cosine}
    row = {"norm_1/condition/scale": found, "norm_1/condition/bias": found}
    measures = {"conv_1/kernel": found, "conv_2/kernel": twice, **row}
    return {"data": "made", "method": method, "accuracy": accuracy, "measures": measures}


def test_summary():
    start, even, uneven = [7, 1], [2, 2], [1, 3]
    one = arm("a", [0.5, 0.7], [start, uneven, even] * 2, [[9, 0.1, 0.3], [9, 0.2, 0.2]])
    two = arm("b", [0.6, 0.9], [start, even, even] * 2, [[9, 0.2, 0.4], [9, 0.3, 0.5]])
    rows = conditional.summary({"study": "balance", "arms": [one, two]})
    found = {row["quantity"]: row for row in rows}
    half = stats.t.ppf(0.975, 1) * stats.sem([0.1, 0.2])
    assert found["accuracy"]["difference"] == pytest.approx((0.15, half))
    assert found["variation of norms, kernels"]["first"] == pytest.approx((0.25, 0))
    assert found["variation of norms, kernels"]["difference"][0] == pytest.approx(-0.25)
    assert found["largest / smallest norm, scales"]["first"][0] == pytest.approx(2)
    assert found["cosine, biases"]["difference"] == pytest.approx((0.15, half))
    assert found["cosine, biases"]["methods"] == ("a", "b")
