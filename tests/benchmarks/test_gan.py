"""The benchmark of generative adversarial networks: its networks, measures, failures and files."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from agreement import close, draw
from jax import lax
from PIL import Image
from scipy import linalg

import normjax as nj
from benchmarks import gan, generative

LABELS = jnp.arange(4) % 3
TINY = "--seeds 2 --steps 4 --parts 2 --batch-size 8 --latent 3 --width 2 --search 2"
TINY += " --final-search 10 --images 5 --samples 72 --classifier-steps 3 --train-size 40"


def build(first, second=None, *, classes=None, rate=1e-3):
    return generative.Gan(
        generative.Generator(first, (8, 8, 1), 2, classes),
        generative.Discriminator(second, 2, classes),
        latent=3,
        batch_size=4,
        optimizer=optax.rmsprop(rate),
    )


def test_transposed_convolutions_are_those_of_jax():
    layer, x = generative.Transposed(5), draw(0, 2, 3, 4, 6)
    variables = layer.init(jax.random.key(0), x)
    kernel = variables["params"]["kernel"]
    expected = lax.conv_transpose(
        x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    close(layer.apply(variables, x), expected, 1e-5)


@pytest.mark.parametrize("shape", [(8, 8, 1), (12, 20, 3)])
def test_strict_weight_norm_has_the_layers_of_the_paper(shape):
    network = generative.Generator(nj.StrictWeightNorm(), shape, 2)
    z = draw(0, 4, 3)
    variables = network.init(jax.random.key(0), z, LABELS, train=False)
    params, last = variables["params"], f"up_{generative.halvings(*shape[:2])}"
    run = lambda params: network.apply({"params": params}, z, LABELS, train=True)
    y = run(params)
    assert y.shape == (4, *shape)
    scales = [name for name in params if name.endswith("_kernel")]
    assert scales == [f"{last}_kernel"], "the last layer alone learns a scale"
    assert [name for name in params if name.endswith("_bias")] == [f"{last}_bias"]
    assert "slope" in params["code_activation"]
    for name in ("code", "up_1", last):
        longer = jax.tree.map(lambda a: 3 * a, params[name])
        close(run(params | {name: longer}), y, 1e-5)


def test_unit_variance_through_a_transposed_convolution():
    block = generative.Block(nj.StrictWeightNorm(), nn.relu, LABELS, True)

    class Alone(nn.Module):
        @nn.compact
        def __call__(self, x):
            return block(generative.Transposed(64, name="up"), x, strides=2)

    x = draw(0, 8, 8, 8, 32)
    variables = Alone().init(jax.random.key(0), x)
    identity = variables["params"]["up_activation"] | {"slope": jnp.ones(64)}
    y = Alone().apply({"params": variables["params"] | {"up_activation": identity}}, x)
    assert np.var(np.asarray(y)[:, 2:-2, 2:-2]) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("first", "second", "classes"),
    [
        pytest.param(nj.BatchNorm(), nj.SpectralWeightNorm(), None, marks=pytest.mark.slow),
        (nj.SandwichBatchNorm(3), None, 3),
        (None, nj.WeightNorm(), 3),
    ],
)
def test_a_step_moves_what_it_should(first, second, classes):
    networks = build(first, second, classes=classes)
    state = networks.init(jax.random.key(0, impl="rbg"))
    images, labels = draw(0, 6, 8, 8, 1), jnp.arange(6) % 3
    new, history = jax.jit(networks.step)(state, images, labels, jax.random.key(1, impl="rbg"))
    assert np.isfinite(np.array(history)).all() and history.gradient > 0
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state[:2], new[:2])
    fixed = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree.leaves_with_path(moved)
        if not leaf
    ]
    # The vector of one feature is 1 or -1 for ever.
    assert all("kernel_stats" in name and "head" in name for name in fixed), fixed
    z = draw(1, 4, 3)
    one = networks.generate(new, z, LABELS)
    other = networks.generate(new, z, (LABELS + 1) % 3)
    assert bool(jnp.any(one != other)) == (classes is not None)
    close(networks.generate(new, z[:1], LABELS[:1]), one[:1], 1e-5)


def test_failures():
    part = lambda loss, slope: generative.History(*map(jnp.float32, (loss, 1.0, slope)))
    start = part(1.0, 2.0)
    assert generative.failure([start]) == ""
    assert generative.failure([start, part(1e-5, 1.0)]) == "", "a gradient is left"
    assert generative.failure([start, part(0.5, 1e-5)]) == ""
    assert generative.failure([start, part(1e-5, 1e-5)]) == "gradient of the generator vanished"
    assert generative.failure([part(1e-5, 1e-5), start]) == "", "it has come back"
    assert generative.failure([start, part(np.nan, 1.0)]) == "not finite"
    assert generative.failure([start, part(1.0, np.inf)]) == "not finite"


def test_the_distance_of_gaussians():
    one, two = draw(0, 50, 4).astype(float), draw(1, 70, 4) @ draw(2, 4, 4) + 0.5
    first, second = np.cov(one.T), np.cov(two.T)
    root = linalg.sqrtm(first @ second).real
    expected = np.sum((one.mean(0) - two.mean(0)) ** 2) + np.trace(first + second - 2 * root)
    assert generative.frechet(one, two) == pytest.approx(expected, rel=1e-6)
    assert generative.frechet(one, one) == pytest.approx(0, abs=1e-9)
    assert np.isnan(generative.frechet(one, np.full((3, 4), np.nan)))


def test_a_classifier_learns():
    labels = jnp.arange(60) % 3
    images = jnp.asarray(draw(0, 60, 8, 8, 1)) + labels[:, None, None, None]
    network = generative.Classifier(3)
    features, logits = network.apply(network.fit(images, labels, 60), images)
    assert features.shape == (60, generative.FEATURES)
    assert jnp.mean(logits.argmax(1) == labels) > 0.9


@pytest.mark.parametrize("channels", [1, 3])
def test_the_grid(channels):
    samples = np.full((20, 4, 2, channels), -1.0)
    samples[9] = 0.0
    picture = np.asarray(gan.grid(samples))
    expected = np.full((2 * 64 + gan.GAP, 8 * 32 + 7 * gan.GAP), 255)
    for i, j in np.ndindex(2, 8):
        top, left = i * (64 + gan.GAP), j * (32 + gan.GAP)
        expected[top : top + 64, left : left + 32] = 128 if (i, j) == (1, 1) else 0
    assert (picture.reshape(*expected.shape, channels) == expected[..., None]).all()


def row(arm, seed, final, failed=""):
    found = {"arm": arm, "seed": seed, "failed": failed, "error": [0.5, 0.4, 0.3]}
    found |= {"distance": [3.0, 1.0, 2.0]}
    return found | ({} if failed else {"final_error": final, "curve": [1.0, final]})


def test_the_summary_leaves_failed_runs_out():
    rows = [row("a", 1, 0.4), row("a", 0, 0.2), row("b", 0, 0.1), row("b", 1, None, "not finite")]
    one, two = gan.summary({"rows": rows})
    assert one["final"] == (pytest.approx(0.3), pytest.approx(1.2706, rel=1e-3))
    assert one["final less"] is None and one["failed"] == []
    assert one["rank"] == (pytest.approx(0.5), pytest.approx(0))
    assert two["final"] == (0.1, None) and two["failed"] == ["not finite"] and two["runs"] == 2
    assert two["final less"] == (pytest.approx(-0.5), None)
    assert two["early less"] == two["distance less"] == (0, None)
    (lost,) = gan.summary({"rows": [row("a", 0, None, "not finite")]})
    assert lost["final"] is None and gan.text(lost["final"]) == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--arms", "BatchNrm"], "did you mean 'BatchNorm'"),
        (["--arms", "none / none / none"], "one method, or two"),
        (["--steps", "3", "--parts", "2"], "--parts 2 does not divide --steps 3"),
    ],
)
def test_wrong_options(argv, message, capsys):
    with pytest.raises(SystemExit):
        gan.main(argv)
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_class_needs_conditional(tmp_path, capsys):
    argv = ["--arms", "SandwichBatchNorm(num_classes=10) / none", "--output", str(tmp_path)]
    assert gan.main(argv) == 2
    assert "needs --conditional" in capsys.readouterr().err


@pytest.mark.slow
def test_files_and_an_interrupted_run(tmp_path, capsys):
    argv = [*TINY.split(), "--arms", "BatchNorm(momentum=0.5) / none", "--output", str(tmp_path)]
    assert gan.main(argv) == 0
    assert "0 of 2" in capsys.readouterr().out
    file = tmp_path / "gan.json"
    whole = json.loads(file.read_text())
    assert [len(r["error"]) for r in whole["rows"]] == [2, 2]
    assert [len(r["curve"]) for r in whole["rows"]] == [2, 2]
    assert "picture" not in whole["rows"][1]
    with Image.open(tmp_path / whole["rows"][0]["picture"]) as picture:
        assert picture.size == (270, 270)
    assert (tmp_path / "training.png").exists() and (tmp_path / "search.png").exists()
    kept = whole["rows"][0] | {"final_error": 7.0}
    file.write_text(json.dumps(whole | {"rows": [kept]}))
    assert gan.main(argv) == 0
    again = json.loads(file.read_text())
    assert again["rows"] == [kept, whole["rows"][1]], "the same seed gives equal results"
    assert gan.main([*argv, "--latent", "4"]) == 2
    assert "of another command" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_diverges_is_counted_apart(tmp_path, capsys):
    argv = [*TINY.split(), "--seeds", "1", "--arms", "none", "--learning-rate", "1e30"]
    assert gan.main([*argv, "--output", str(tmp_path)]) == 0
    assert "1 of 1" in capsys.readouterr().out
    (found,) = json.loads((tmp_path / "gan.json").read_text())["rows"]
    assert found["failed"] == "not finite" and found["parts"] == 1 and "final_error" not in found
