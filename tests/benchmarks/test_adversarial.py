"""Adversarial training: the attack, which statistics move, accuracies, runs that go on, table."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.progress import Progress
from scipy import stats

from benchmarks import adversarial, training
from benchmarks.adversarial import ARMS, Attack
from benchmarks.data import Data

RUN = ["--train-size", "64", "--batch-size", "32", "--width", "2", "--epochs", "1", "--seeds", "2"]
RUN += ["--steps", "2", "--test-steps", "2"]
KEY = jax.random.key(0)


def small(number=16, tests=300):
    """Images of 8x8 pixels up to 16 and three classes; the test images make two padded batches."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 17, (number + tests, 8, 8, 1)).astype(np.uint8)
    labels = rng.integers(0, 3, number + tests).astype(np.int32)
    return Data(images[:number], labels[:number], images[number:], labels[number:], ("a", "b", "c"))


@functools.cache
def made(name):
    """The branches of a small network, parameters, statistics with variances of a million, data."""
    branches = adversarial.build(ARMS[name].method, 3, top=16, width=2)
    inputs = training.put(small())
    images = training.scale(inputs.train_images, inputs)
    variables = jax.jit(lambda: branches.networks[0].init(KEY, images, train=False))()
    large = lambda path, a: jnp.full_like(a, 1e6) if path[-1].key == "var" else a
    batch_stats = jax.tree_util.tree_map_with_path(large, variables["batch_stats"])
    return branches, variables["params"], batch_stats, inputs


def moves(batch_stats):
    """How often each variance has moved from a million, which is a tenth of the way each time."""
    var = np.concatenate([np.atleast_2d(norm["var"]) for norm in batch_stats.values()], axis=1)
    times = np.log(var / 1e6) / math.log(0.9)
    np.testing.assert_allclose(times, times.round(), atol=1e-2)
    return [set(of_branch) for of_branch in times.round().astype(int).tolist()]


def linear(kernel):
    """A linear classifier whose state counts the passes."""
    return lambda x, passes: (x.reshape(len(x), -1) @ kernel, passes + 1)


@pytest.mark.parametrize("steps", [1, 3, 9])
def test_attack_stays_near_and_raises_the_loss(steps):
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(12, 4)), jnp.float32)
    x = jnp.asarray(rng.choice([0, 0.05, 0.5, 0.9, 1], (40, 2, 2, 3)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 4, 40))
    attack = Attack(0.2, steps)
    moved, passes = adversarial.pgd(linear(kernel), x, labels, 0, KEY, attack)
    assert passes == steps
    assert np.abs(moved - x).max() <= 0.2 + 1e-6 and moved.min() >= 0 and moved.max() <= 1
    before, after = (
        training.cross_entropy(linear(kernel)(shown, 0)[0], labels) for shown in (x, moved)
    )
    assert before.mean() + 0.2 < after.mean()
    other, _ = adversarial.pgd(linear(kernel), x, labels, 0, jax.random.key(1), attack)
    assert (np.asarray(other) != np.asarray(moved)).any()  # the start is random


def test_attack_of_two_classes_reaches_the_corner():
    """There the gradient has one sign, so that eight steps get from anywhere to the farthest."""
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(12, 2)), jnp.float32)
    x = jnp.asarray(rng.uniform(size=(20, 2, 2, 3)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 2, 20))
    moved, _ = adversarial.pgd(linear(kernel), x, labels, 0, KEY, Attack(0.1, 8))
    way = np.sign(kernel[:, 1] - kernel[:, 0]) * np.where(labels == 0, 1, -1)[:, None]
    wanted = np.clip(x + 0.1 * way.reshape(x.shape), 0, 1)
    np.testing.assert_allclose(moved, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "branch", "train"),
    [
        ("AuxBatchNorm", 1, False),
        ("AuxBatchNorm", 1, True),
        ("AuxBatchNorm", 0, True),
        ("SandwichAuxBatchNorm", 1, True),
    ],
)
def test_an_attack_moves_the_statistics_of_its_branch_alone(name, branch, train):
    branches, params, batch_stats, inputs = made(name)
    given = inputs.train_images / 16, inputs.train_labels, inputs, KEY
    attack = functools.partial(branches.attack, branch, attack=Attack(0.1, 3, train))
    _, new = jax.jit(attack)(params, batch_stats, *given)
    wanted = [{0}, {0}]
    wanted[branch] = {3 * train}
    assert moves(new) == wanted


@pytest.mark.parametrize(
    ("name", "train", "wanted"),
    [
        ("BatchNorm", False, [{2}]),
        ("BatchNorm", True, [{5}]),
        ("BatchNorm, one batch", False, [{1}]),
        ("AuxBatchNorm", False, [{1}, {1}]),
        ("SandwichAuxBatchNorm", True, [{1}, {4}]),
    ],
)
def test_a_step_of_training_moves_statistics(name, train, wanted):
    branches, params, batch_stats, inputs = made(name)
    loss = adversarial.training_loss(
        branches, Attack(0.1, 3, train), one_batch=ARMS[name].one_batch
    )
    given = inputs.train_images, inputs.train_labels, KEY, inputs
    _, new = jax.jit(loss)(params, batch_stats, *given)
    assert moves(new) == wanted


def test_loss_is_of_clean_and_attacked_images():
    """And its gradient takes the attacked images as given."""
    branches, params, batch_stats, inputs = made("AuxBatchNorm")
    x, labels, attack = inputs.train_images / 16, inputs.train_labels, Attack(0.1, 2)
    run = jax.jit(functools.partial(branches.attack, 1, attack=attack))
    moved, _ = run(params, batch_stats, x, labels, inputs, jax.random.fold_in(KEY, 1))

    def by_hand(params):
        clean, _ = branches.forward(0, params, batch_stats, x, inputs, train=True)
        other, _ = branches.forward(1, params, batch_stats, moved, inputs, train=True)
        return sum(training.cross_entropy(logits, labels).mean() for logits in (clean, other)) / 2

    loss = adversarial.training_loss(branches, attack)
    ours = lambda params: loss(params, batch_stats, inputs.train_images, labels, KEY, inputs)[0]
    for found, wanted in zip(
        jax.tree.leaves(jax.jit(jax.value_and_grad(ours))(params)),
        jax.tree.leaves(jax.jit(jax.value_and_grad(by_hand))(params)),
        strict=True,
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_accuracies():
    branches, params, batch_stats, inputs = made("AuxBatchNorm")
    means = lambda path, a: a.at[1].set(0.05) if path[-1].key == "mean" else jnp.ones_like(a)
    batch_stats = jax.tree_util.tree_map_with_path(means, batch_stats)
    data = small()
    x = jnp.asarray(data.test_images) / 16
    logits, _ = branches.forward(0, params, batch_stats, x, inputs, train=False)
    centered = {"kernel": params["head"]["kernel"], "bias": -logits.mean(0)}  # all classes occur
    params = params | {"head": centered}
    state = training.State(params, batch_stats, (), *[jnp.int32(0)] * 5)
    state = jax.tree.map(lambda a: jnp.asarray(a)[None], state)
    found = {
        attack: adversarial.accuracies(branches, attack)(state, inputs)
        for attack in (Attack(0.0, 1), Attack(0.2, 3))
    }
    for branch in (0, 1):
        logits, _ = branches.forward(branch, params, batch_stats, x, inputs, train=False)
        share = np.mean(np.asarray(logits).argmax(1) == data.test_labels)
        for measured in found.values():
            assert measured["clean"][branch] == pytest.approx(share)
        unmoved, attacked = (measured["attacked"][branch] for measured in found.values())
        assert unmoved == pytest.approx(share)
        assert attacked < share / 2
    assert found[Attack(0.0, 1)]["clean"][0] != found[Attack(0.0, 1)]["clean"][1]


def call(capsys, *argv):
    code = adversarial.main([str(a) for a in argv])
    return code, *capsys.readouterr()


def load(folder):
    return json.loads((folder / "adversarial.json").read_text())


def test_files(tmp_path, capsys):
    argv = [*RUN, "--methods", "BatchNorm, one batch", "--attack-statistics", "train"]
    code, out, err = call(capsys, *argv, "--output", tmp_path)
    assert (code, err) == (0, "")
    assert "BatchNorm, one batch" in out and f"Written to {tmp_path}/adversarial.json" in out
    assert {path.name for path in tmp_path.iterdir()} == {"adversarial.json"}
    results = load(tmp_path)
    assert results["command"].startswith("python -m benchmarks.adversarial")
    assert results["configuration"]["attack_statistics"] == "train"
    assert results["data"]["train_images"] == 64
    assert [run["seed"] for run in results["runs"]] == [0, 1]
    assert results["runs"][0] != results["runs"][1] | {"seed": 0}
    for run in results["runs"]:
        for measure in adversarial.MEASURES:
            (right,) = np.array(run[measure]) * 540
            assert right == pytest.approx(round(right), abs=1e-3)


def quick(name, seeds, classes, inputs, options, tick):
    """In place of training."""
    for seed in seeds:
        tick()
        yield {"method": name, "seed": seed, "clean": [0.5 + seed / 8], "attacked": [seed / 8]}


@pytest.mark.parametrize("train", [quick, pytest.param(None, marks=pytest.mark.slow)])
def test_interrupted_run_goes_on(train, tmp_path, monkeypatch, capsys):
    """Interrupted in the second seed; what is complete is not trained again."""
    epochs, advance = [], Progress.advance

    def counting(self, *args):
        advance(self, *args)
        epochs.append(len(epochs))
        if len(epochs) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "advance", counting)
    if train is not None:
        monkeypatch.setattr(adversarial, "_train", train)
    folder = tmp_path / "a run"
    argv = [*RUN, "--methods", "AuxBatchNorm", "--output", folder]
    code, _, err = call(capsys, *argv)
    assert code == 130
    assert "; continue with: python -m benchmarks.adversarial --train-size 64" in err
    assert err.endswith(f"--output '{folder}'\n")
    (first,) = load(folder)["runs"]
    code, out, err = call(capsys, *argv)
    assert (code, err, len(epochs)) == (0, "", 3)
    results = load(folder)
    assert results["runs"][0] == first
    assert [run["seed"] for run in results["runs"]] == [0, 1]
    assert call(capsys, *argv) == (code, out, err)
    assert len(epochs) == 3 and load(folder) == results
    code, _, _ = call(capsys, *argv[:-1], tmp_path / "another")
    assert (code, len(epochs)) == (0, 5)
    assert load(tmp_path / "another")["runs"] == results["runs"]


def test_a_stored_run_must_be_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(adversarial, "_train", quick)
    argv = [*RUN, "--output", tmp_path]
    assert call(capsys, *argv)[0] == 0
    results = load(tmp_path)
    for change in (["--epochs", 2], ["--seeds", 3], ["--attack-statistics", "train"]):
        code, _, err = call(capsys, *argv, *change)
        assert (code, err.count("\n")) == (2, 1)
        assert "adversarial.json is of another command" in err
    assert load(tmp_path) == results
    results["data"]["crc32"] += 1
    for text in (json.dumps(results), "{"):
        (tmp_path / "adversarial.json").write_text(text)
        assert call(capsys, *argv)[0] == 2
        assert (tmp_path / "adversarial.json").read_text() == text


def test_summary():
    def runs(method, clean, attacked):
        for seed in (1, 0):  # in any order
            yield {"method": method, "seed": seed, "clean": clean[seed], "attacked": attacked[seed]}

    results = {
        "configuration": {"seeds": 2, "test_steps": 10, "epsilon": 0.1},
        "runs": [
            *runs("BatchNorm", [[0.8], [0.9]], [[0.3], [0.4]]),
            *runs("AuxBatchNorm", [[0.9, 0.7], [0.9, 0.8]], [[0.2, 0.5], [0.3, 0.5]]),
            *runs("SandwichAuxBatchNorm", [[1.0, 0.7], [0.9, 0.9]], [[0.1, 0.6], [0.4, 0.8]]),
        ],
    }
    batch, clean, attacked, _, sandwich = adversarial.summary(results)
    branches = [row["branch"] for row in adversarial.summary(results)]
    assert branches == ["both", "clean", "adversarial", "clean", "adversarial"]
    half = lambda values: stats.t.ppf(0.975, 1) * stats.sem(values)
    assert batch["clean"] == pytest.approx((0.85, half([0.8, 0.9])))
    assert batch["less BatchNorm"] is batch["less AuxBatchNorm"] is None
    assert clean["less BatchNorm"]["clean"] == pytest.approx((0.05, half([0.1, 0.0])))
    assert attacked["less BatchNorm"]["attacked"] == pytest.approx((0.15, half([0.2, 0.1])))
    assert attacked["less AuxBatchNorm"] is None
    assert sandwich["less BatchNorm"]["attacked"] == pytest.approx((0.35, half([0.3, 0.4])))
    assert sandwich["less AuxBatchNorm"]["attacked"] == pytest.approx((0.2, half([0.1, 0.3])))
    head, *lines = adversarial.cells(results)
    assert all(len(line) == len(head) for line in lines)
    name, branch, *_, last = lines[-1]
    assert (name, branch, last) == ("SandwichAuxBatchNorm", "adversarial", "+20.0 ± 127.1")


def test_one_seed_has_no_interval():
    runs = [{"method": "BatchNorm", "seed": 0, "clean": [0.5], "attacked": [0.25]}]
    _, line = adversarial.cells({"runs": runs})
    assert line == ["BatchNorm", "both", "50.0 ± n/a", "", "", "25.0 ± n/a", "", ""]


def test_default_radius():
    assert adversarial._options([]).epsilon == adversarial.EPSILON["digits"]
    assert adversarial._options(["--data", "images"]).epsilon == 8 / 255
    assert adversarial._options(["--data", "images", "--epsilon", "0.5"]).epsilon == 0.5


@pytest.mark.parametrize(
    ("argv", "pieces"),
    [
        (["--data", "images"], ("--data images", "--data-dir")),
        (["--train-size", "5"], ("--train-size 5", "10")),
        (["--batch-size", "1300"], ("--batch-size 1300", "1257")),
    ],
)
def test_bad_input_is_one_line(argv, pieces, tmp_path, capsys):
    code, out, err = call(capsys, *argv, "--output", tmp_path / "none")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("adversarial: ") and all(piece in err for piece in pieces)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seeds", "0"], "--seeds: '0' is not a whole number >= 1"),
        (["--steps", "0"], "--steps: '0' is not a whole number >= 1"),
        (["--test-steps", "x"], "--test-steps: 'x' is not a whole number >= 1"),
        (["--epsilon", "1"], "--epsilon: '1' is not a fraction in [0, 1)"),
        (["--learning-rate", "0"], "--learning-rate: '0' is not a finite number > 0"),
        (["--attack-statistics", "batch"], "--attack-statistics: invalid choice: 'batch'"),
        (["--methods", "LayerNorm"], "--methods: invalid choice: 'LayerNorm'"),
    ],
)
def test_bad_options(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        adversarial.main(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
