"""The arms of `--recipe`: words, initial parameters, pairing and the printed test."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import normjax as nj
from benchmarks import compare, models, options, recipe, report, training
from benchmarks.data import Data
from normjax import optim

KEY = jax.random.key(0)
IMAGES = np.random.default_rng(0).integers(0, 17, (40, 8, 8, 1)).astype(np.uint8)
LABELS = np.arange(40, dtype=np.int32) % 10
INPUTS = training.put(Data(IMAGES, LABELS, IMAGES, LABELS, tuple("0123456789")))
RUN = ["--recipe", "g0=1 c=1", "g0=0.1  c=100 input_norm", "--model", "mlp", "--seeds", "3"]
RUN += ["--epochs", "2", "--train-size", "200", "--batch-size", "50"]


def variables(change, model="mlp", method=None):
    network = change.network(models.build(model, method or nj.BatchNorm(), classes=10, width=4))
    images = training.scale(INPUTS.train_images, change.inputs(INPUTS))
    made = network.init(KEY, images, train=False)
    return network, images, made | {"params": change.initial(made["params"])}


def scales(params):
    return {name: float(params[name]["scale"][0]) for name in params if "scale" in params[name]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("g0=0.1 c=100", recipe.Recipe(g0=0.1, c=100.0)),
        ("last g0=.5", recipe.Recipe(g0=0.5, last=True)),
        ("input_norm", recipe.Recipe(input_norm=True)),
        ("temperature=1e-1", recipe.Recipe(temperature=0.1)),
    ],
)
def test_words(text, expected):
    assert recipe.parse(text) == expected


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        (["gamma=1"], "--recipe: unknown word 'gamma=1'; known are g0=NUMBER, c=NUMBER, temp"),
        (["g0"], "--recipe: unknown word 'g0'"),
        (["last=1"], "--recipe: unknown word 'last=1'"),
        (["g0=0"], "--recipe: 'g0=0' has no finite number > 0"),
        (["c=-1"], "'c=-1' has no finite number > 0"),
        (["c=inf"], "'c=inf' has no finite"),
        (["c=x"], "'c=x' has no finite"),
        (["g0=1 g0=2"], "'g0=1 g0=2' says g0 twice"),
        ([" "], "an arm without words is the method itself"),
        (["c=2", "c=2"], "--recipe names c=2 more than once"),
        (
            ["c=2", "--methods", "LayerNorm(use_scale=False)", "--model", "mlp"],
            "--recipe c=2 with LayerNorm(use_scale=False) in mlp: the recipe needs norms with a sc",
        ),
    ],
)
def test_bad_input(arms, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert compare.main(["--recipe", *arms]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


@pytest.mark.parametrize("model", models.MODELS)
def test_initial_scales(model):
    _, _, plain = variables(recipe.NONE, model)
    number = {"mlp": 3, "residual": 5}[model]
    names = [f"norm_{i}" for i in range(1, number + 1)]
    assert scales(plain["params"]) == dict.fromkeys(names, 1.0)
    _, _, small = variables(recipe.Recipe(g0=0.25), model)
    assert scales(small["params"]) == dict.fromkeys(names, 0.25)
    _, _, last = variables(recipe.Recipe(g0=0.25, last=True), model)
    assert scales(last["params"]) == dict.fromkeys(names[:-1], 1.0) | {names[-1]: 0.25}
    _, _, both = variables(recipe.Recipe(g0=0.25, input_norm=True), model)
    first = scales(both["params"]).pop("input_norm")
    assert first == pytest.approx(0.25 * math.sqrt(0.5 - 0.5 / math.pi))
    for changed in (small, last, both):
        for name in plain["params"].keys() - set(names):
            for a, b in zip(
                jax.tree.leaves(changed["params"][name]),
                jax.tree.leaves(plain["params"][name]),
                strict=True,
            ):
                np.testing.assert_array_equal(a, b)


def test_scales_inside_other_methods():
    method = nj.Ghost(nj.chain(nj.LayerNorm(use_scale=False), nj.Affine()), groups=2)
    _, _, found = variables(recipe.Recipe(g0=0.25), method=method)
    assert found["params"]["norm_1"]["Affine_1"]["scale"][0] == 0.25


@pytest.mark.parametrize("model", models.MODELS)
def test_temperature(model):
    network, images, made = variables(recipe.NONE, model)
    other, _, its = variables(recipe.Recipe(temperature=0.25), model)
    jax.tree.map(np.testing.assert_array_equal, made, its)
    logits = network.apply(made, images, train=False)
    np.testing.assert_allclose(other.apply(its, images, train=False), logits / 4, rtol=1e-5)


def test_input_norm_sees_pixels_between_zero_and_one():
    network, images, made = variables(recipe.Recipe(g0=0.5, input_norm=True))
    assert (images.min(), images.max()) == (0, 1)
    np.testing.assert_allclose(images, IMAGES / 16, rtol=1e-6)
    _, new = network.apply(made, images, train=True, mutable=["batch_stats"])
    moved = new["batch_stats"]["input_norm"]
    np.testing.assert_allclose(moved["mean"], 0.1 * (IMAGES / 16).mean(), rtol=1e-5)
    _, same, _ = variables(recipe.Recipe(g0=0.5))
    assert abs(same.mean()) < 1e-5


def test_rates():
    _, _, made = variables(recipe.Recipe(g0=0.1, c=8.0))
    assert recipe.NONE.after() == ()
    (after,) = recipe.Recipe(c=8.0).after()
    rates = optim.effective_learning_rates(after, made["params"])
    slow = {name for name, rate in rates.items() if rate == -0.125}
    assert slow == {"norm_1/scale", "norm_2/scale", "norm_3/scale"}
    assert {rates[name] for name in rates.keys() - slow} == {-1.0}


def test_arms():
    given = options.read(["--recipe"])
    assert (given["methods"], given["recipe"]) == (recipe.METHODS, recipe.ARMS)
    text = recipe.METHODS[0]
    config = options.Config(methods=(text, "RMSNorm"), model=("mlp",), recipe=("g0=0.1 c=100",))
    _, arms = compare.prepare(config, {})
    assert [(arm.method, arm.plain, arm.baseline) for arm in arms] == [
        (text, None, True),
        (f"{text}, g0=0.1 c=100", text, False),
        ("RMSNorm", None, False),
        ("RMSNorm, g0=0.1 c=100", "RMSNorm", False),
    ]


def test_paired_statistics_by_hand():
    def run(method, last, **how):
        return {"model": "mlp", "method": method, "test_accuracy": [[0.0, a] for a in last]} | how

    runs = [
        run("A", [0.5, 0.6, 0.7]),
        run("A, c=2", [0.51, 0.62, 0.73], plain="A"),
        run("B", [0.9, 0.8, 0.7]),
        run("B, c=2", [0.9, 0.8, 0.7], plain="B"),
    ]
    first, second = report.paired(runs)
    # Differences 1, 2, 3 points: t = 2 sqrt(3), two degrees of freedom.
    assert first["difference"] == pytest.approx(0.02)
    assert first["interval"] == pytest.approx(4.302652730 * 0.01 / math.sqrt(3))
    assert first["p_value"] == pytest.approx((1 - math.sqrt(12 / 14)) / 2)
    assert first["significant"]
    assert (first["plain"], first["seeds"]) == ("A", 3)
    assert (second["difference"], second["p_value"], second["significant"]) == (0, None, None)
    assert second["interval"] == 0


def test_how_far_parameters_moved():
    first = {"norm": {"scale": jnp.ones((2, 2)), "bias": jnp.zeros((2, 2))}, "kernel": jnp.ones(2)}
    last = {
        "norm": {"scale": jnp.array([[1.0, 3.0], [1.0, 1.0]]), "bias": jnp.ones((2, 2))},
        "kernel": jnp.zeros(2),
    }
    assert recipe.moved(first, last) == {
        "norm_scale": {"mean": [1.0, 0.0], "deviation": [1.0, 0.0]},
        "norm_bias": {"mean": [1.0, 1.0], "deviation": [0.0, 0.0]},
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert compare.main([*RUN, "--output", str(folder)]) == 0
    return json.loads((folder / "results.json").read_text())


def test_neutral_arm_is_the_baseline_bit_for_bit(finished):
    plain, neutral, _ = finished["runs"]
    for name in ("train_loss", "test_loss", "test_accuracy", "moved"):
        assert neutral[name] == plain[name]
    assert finished["paired"][0]["difference"] == 0
    assert finished["paired"][0]["p_value"] is None


def test_without_validation_all_images_train_and_nothing_more_is_measured(finished):
    assert finished["data"]["train_images"] == 200
    asked_for = {"validation_accuracy", "train_accuracy"}
    assert all(run.keys().isdisjoint(asked_for) for run in finished["runs"])


def test_arm_of_the_recipe(finished, capsys):
    plain, _, arm = finished["runs"]
    assert arm["method"] == "BatchNorm(momentum=0.9), g0=0.1 c=100 input_norm"
    assert arm["parameters"] == plain["parameters"] + 1
    assert arm["train_loss"] != plain["train_loss"]
    ours, base = ([curve[-1] for curve in run["test_accuracy"]] for run in (arm, plain))
    row = finished["paired"][1]
    assert row["difference"] == pytest.approx(np.mean(ours) - np.mean(base))
    expected = stats.ttest_rel(ours, base, alternative="greater").pvalue
    assert row["p_value"] == pytest.approx(expected)
    for slow, fast in zip(
        arm["moved"]["norm_scale"]["deviation"],
        plain["moved"]["norm_scale"]["deviation"],
        strict=True,
    ):
        assert 0 < slow < fast
    report.show_paired(finished["paired"], compare.Console(width=110))
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "input_norm" in line)
    half = 100 * row["interval"]
    assert f"{100 * row['difference']:+.2f} ± {half:.2f}" in line
    assert report.p_text(row["p_value"]) in line


def test_p_values_as_text():
    assert report.p_text(0.0312) == "0.031"
    assert report.p_text(0.00049) == "<0.001"
