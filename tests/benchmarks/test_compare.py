"""The command, its files, its statistics, interruption and bad input."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
from PIL import Image
from rich.progress import Progress
from scipy import stats

from benchmarks import compare, machine, options, report

RUN = ["--model", "mlp", "--methods", "BatchNorm LayerNorm", "InstanceNorm"]
RUN += ["--seeds", "3", "--epochs", "2", "--train-size", "200", "--batch-size", "50"]
RUN += ["--validation", "0.25", "--both-modes"]


def call(capsys, *argv):
    """Exit code, standard output and standard error of the command."""
    code = compare.main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    return code, out, err


def load(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert compare.main([*RUN, "--output", str(folder)]) == 0
    return folder


def test_files(finished):
    names = {"results.json", "table.csv", "curves.csv", "curves.png"}
    assert {path.name for path in finished.iterdir()} == names
    with Image.open(finished / "curves.png") as image:
        assert min(image.size) > 500
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 50


def test_results(finished):
    results = load(finished)
    assert results["complete"]
    assert results["command"].startswith("python -m benchmarks.compare --model mlp --methods 'Bat")
    assert {"python", "normjax", "jax", "jaxlib", "flax", "optax"} <= results["versions"].keys()
    assert results["machine"] == machine.describe()
    assert results["configuration"]["methods"] == ["BatchNorm", "LayerNorm", "InstanceNorm"]
    assert results["configuration"].keys() == options.Config.__dataclass_fields__.keys()
    assert results["data"]["train_images"] == 150
    assert results["data"]["test_images"] == 540
    batch, layer, instance = results["runs"]
    assert (batch["method"], batch["baseline"], layer["baseline"]) == ("BatchNorm", True, False)
    assert batch["parameters"] == 64 * 128 + 2 * 128 * 128 + 1290 + 6 * 128
    for run in (batch, layer):
        assert run["seeds"] == [0, 1, 2]
        for name in ("train_loss", "test_loss", "test_accuracy"):
            assert np.shape(run[name]) == (3, 2)
        assert len(run["step_ms"]) == 2
        assert min(run["step_ms"]) > 0
        right = np.array(run["test_accuracy"]) * 540
        np.testing.assert_allclose(right, right.round(), atol=1e-9)
    assert instance["note"].startswith("the layers are [N, C]")
    assert instance["seeds"] == instance["test_loss"] == []


def test_table_is_of_the_curves(finished):
    results = load(finished)
    ours, base = ([curve[-1] for curve in results["runs"][i]["test_accuracy"]] for i in (1, 0))
    row = results["table"][1]
    assert tuple(row) == report.COLUMNS
    assert (row["model"], row["method"], row["note"]) == ("mlp", "LayerNorm", "")
    assert row["accuracy"] == pytest.approx(sum(ours) / 3)
    mean = sum(ours) / 3
    deviation = math.sqrt(sum((a - mean) ** 2 for a in ours) / 2)
    assert row["interval"] == pytest.approx(4.302652730 * deviation / math.sqrt(3))
    difference = [a - b for a, b in zip(ours, base, strict=True)]
    assert row["difference"] == pytest.approx(sum(difference) / 3)
    expected = stats.ttest_rel(ours, base, alternative="greater").pvalue
    assert row["p_value"] == pytest.approx(expected)
    assert row["step_ms"] == results["runs"][1]["step_ms"][1]
    first, last = results["table"][0], results["table"][2]
    assert first["difference"] is first["p_value"] is None
    assert all(last[name] is None for name in report.COLUMNS[2:-1])


def test_csv_holds_what_json_holds(finished):
    results = load(finished)
    with open(finished / "table.csv", encoding="utf-8") as file:
        for row, kept in zip(csv.DictReader(file), results["table"], strict=True):
            assert row == {name: "" if v is None else str(v) for name, v in kept.items()}
    with open(finished / "curves.csv", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * 3 * 2
    for line in lines:
        run = next(run for run in results["runs"] if run["method"] == line["method"])
        for name in ("train_loss", "test_loss", "test_accuracy"):
            kept = run[name][int(line["seed"])][int(line["epoch"]) - 1]
            assert float(line[name]) == kept


def test_printed_table(finished, capsys):
    results = load(finished)
    compare.report.show(results["table"], compare.Console(width=110), "caption")
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "LayerNorm" in line)
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    kept = results["table"][1]
    assert cells == [
        "",
        "LayerNorm",
        f"{100 * kept['accuracy']:.2f} ± {100 * kept['interval']:.2f}",
        f"{100 * kept['difference']:+.2f}",
        f"{kept['p_value']:.3f}" if kept["p_value"] >= 0.0005 else "<0.001",
        f"{kept['step_ms']:.2f}",
        f"{kept['parameters']:,}",
    ]
    assert "left out" in next(line for line in out.splitlines() if "InstanceNorm" in line)
    assert "caption" in out
    odd = [kept | {"method": "Chain(methods=[RMSNorm])"}]
    compare.report.show(odd, compare.Console(width=110), "")
    assert "Chain(methods=[RMSNorm])" in capsys.readouterr().out


@pytest.mark.slow
def test_resumed_run_equals_uninterrupted(finished, tmp_path, monkeypatch, capsys):
    """Interrupted after the first epoch of the second method; checkpoints are made before, too."""
    folder = tmp_path / "a run"
    epochs, kept = [], []
    advance, save = Progress.advance, compare.ocp.CheckpointManager.save

    def interrupting(self, *args):
        advance(self, *args)
        epochs.append(len(epochs))
        if len(epochs) == 3:
            raise KeyboardInterrupt

    def noting(self, step, **how):
        kept.append(step)
        return save(self, step, **how)

    monkeypatch.setattr(Progress, "advance", interrupting)
    monkeypatch.setattr(compare.ocp.CheckpointManager, "save", noting)
    monkeypatch.setattr(compare, "SAVE_SECONDS", 0.0)
    code, _, err = call(capsys, *RUN, "--output", folder)
    assert code == 130
    command = f"python -m benchmarks.compare --resume --output '{folder}'"
    assert err == f"interrupted; continue with: {command}\n"
    assert (folder / "checkpoints").is_dir()
    assert not load(folder)["complete"]
    assert len(load(folder)["runs"]) == 1
    assert kept == [1, 2, 4]

    code, out, err = call(capsys, "--resume", "--output", folder)
    assert (code, err) == (0, "")
    assert len(epochs) == 4
    assert "InstanceNorm in mlp: left out" in out
    assert "InstanceNorm: Instance normalization: statistics of each" in " ".join(out.split())
    assert not (folder / "checkpoints").exists()
    ours, whole = load(folder), load(finished)
    for part in ("runs", "table"):
        for one, other in zip(ours[part], whole[part], strict=True):
            assert one | {"step_ms": 0} == other | {"step_ms": 0}
    assert [len(run["step_ms"]) for run in ours["runs"]] == [2, 2, 0]
    assert all(ms > 0 for run in ours["runs"] for ms in run["step_ms"])
    assert ours["configuration"] == whole["configuration"]


def test_interrupted_before_the_first_epoch(tmp_path, monkeypatch, capsys):
    def stop(*args, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare.data, "load", stop)
    code, _, err = call(capsys, "--seeds", 2, "--output", tmp_path / "new")
    assert code == 130
    assert err.startswith("interrupted; continue with: python -m benchmarks.compare --seeds 2")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_divergence_in_the_residual_network_by_one_seed(tmp_path, capsys):
    argv = ["--model", "residual", "--methods", "Affine", "--seeds", "1", "--epochs", "2"]
    argv += ["--train-size", "50", "--width", "2", "--learning-rate", "1e30"]
    code, out, err = call(capsys, *argv, "--output", tmp_path)
    assert (code, err) == (0, "")
    assert "± n/a" in out
    ((first, second),) = load(tmp_path)["runs"][0]["train_loss"]
    assert 0 < first < 10
    assert second is None
    assert load(tmp_path)["table"][0]["interval"] is None


def test_statistics_by_hand():
    assert report.interval([0.5]) is None
    assert report.interval([0.25, 0.75]) == pytest.approx(12.706204736 * 0.25)
    assert report.interval([1.0, 2.0, 3.0, 4.0]) == pytest.approx(
        3.182446305 * math.sqrt(5 / 3) / 2
    )
    assert report.p_value([1.0], [0.5]) is None
    assert report.p_value([0.9, 0.8, 0.7], [0.8, 0.7, 0.6]) is None
    # Differences 1, 2, 3: t = 2 sqrt(3), and with 2 degrees of freedom the tail beyond t is
    # (1 - t / sqrt(t² + 2)) / 2.
    tail = (1 - math.sqrt(12 / 14)) / 2
    assert report.p_value([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == pytest.approx(tail)
    assert report.p_value([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx(1 - tail)


def test_baseline_belongs_to_the_model():
    def run(model, method, baseline, last):
        curves = [[0.0, value] for value in last]
        how = {"note": "", "baseline": baseline, "parameters": 1, "step_ms": [9.0, 1.0, 3.0]}
        return {"model": model, "method": method, "test_accuracy": curves, **how}

    table = report.rows(
        [
            run("mlp", "BatchNorm", True, [0.5, 0.6]),
            run("mlp", "LayerNorm", False, [0.7, 0.9]),
            run("residual", "BatchNorm", True, [0.9, 0.9]),
            run("residual", "LayerNorm", False, [0.8, 0.7]),
        ]
    )
    assert [row["difference"] for row in table] == [
        None,
        pytest.approx(0.25),
        None,
        pytest.approx(-0.15),
    ]
    assert table[0]["step_ms"] == 2.0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--methods", "BatchNrom"],
            "--methods: unknown method 'BatchNrom'; did you mean 'BatchNorm'?",
        ),
        (["--methods", "BatchNorm(size=1)"], "--methods: BatchNorm has no field 'size'; known are"),
        (
            ["--methods", "BatchNorm(momentum=3)"],
            "--methods: BatchNorm: momentum=3 is not in [0, 1]",
        ),
        (["--methods", "LayerNorm LayerNorm"], "--methods names LayerNorm more than once"),
        (["--methods", " "], "--methods names none"),
        (["--methods"], "argument --methods: expected at least one argument"),
        (["--model", "mlp", "vit"], "argument --model: invalid choice: 'vit'"),
        (["--model", "mlp", "mlp"], "--model names mlp more than once"),
        (["--seeds", "0"], "argument --seeds: '0' is not a whole number >= 1"),
        (["--seeds", "-1"], "argument --seeds: "),
        (["--epochs", "two"], "argument --epochs: 'two' is not a whole number >= 1"),
        (["--label-noise", "1"], "argument --label-noise: '1' is not a fraction in [0, 1)"),
        (["--label-noise", "x"], "argument --label-noise: 'x' is not a fraction in [0, 1)"),
        (["--learning-rate", "0"], "argument --learning-rate: '0' is not a finite number > 0"),
        (["--learning-rate", "inf"], "argument --learning-rate: 'inf' is not a finite number > 0"),
        (["--batch-size", "1258"], "--batch-size 1258 is above the 1257 train images"),
        (["--statistics-batch", "24"], "--statistics-batch 24 does not divide --batch-size 32"),
        (["--statistics-batch", "64"], "--statistics-batch 64 does not divide --batch-size 32"),
        (["--train-size", "5000"], "--train-size 5000 is not between 10"),
        (["--data", "images"], "--data images needs --data-dir"),
        (["--data-dir", "some"], "--data-dir 'some' needs --data images or cifar10-bin"),
        (["--data", "cifar10-bin", "--data-dir", "none"], "--data-dir 'none' is not a folder"),
        (["--data", "mnist"], "argument --data: invalid choice: 'mnist'"),
        (
            ["--methods", "GroupNorm", "--model", "residual"],
            "--methods GroupNorm in --model residual: ",
        ),
        (["--methods", "Ghost(BatchNorm(), groups=5)"], "Ghost: 5 groups do not divide"),
        (
            ["--methods", "BatchNorm(axis_name='batch')"],
            "--methods BatchNorm(axis_name='batch') in",
        ),
        (
            ["--methods", "InstanceNorm", "--model", "mlp"],
            "--methods InstanceNorm in --model mlp: the",
        ),
        (["--resume"], "--resume: no interrupted run is under runs/"),
        (["--resume", "--output", "none"], "--resume: none holds no run that was interrupted"),
        (["--speed"], "unrecognized arguments: --speed"),
    ],
)
def test_bad_input(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("compare: ")
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_results_are_kept(finished, tmp_path, capsys):
    before = (finished / "results.json").read_bytes()
    code, _, err = call(capsys, *RUN, "--output", finished)
    assert code == 2
    assert "is not empty: --resume continues its run, another --output keeps" in err
    assert (finished / "results.json").read_bytes() == before
    code, _, err = call(capsys, "--resume", "--output", finished)
    assert code == 2
    assert "is complete; nothing is left to do" in err


def test_resumed_run_must_be_the_same(finished, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    results = load(folder) | {"complete": False}
    compare.store(folder, results)
    for argv, message in (
        (["--epochs", "3"], "--resume: --epochs is 3, but 2 in"),
        (["--batch-size", "32"], "--resume: --batch-size is 32, but 50 in"),
        (
            ["--methods", "BatchNorm"],
            "--resume: --methods is ('BatchNorm',), but ('BatchNorm', 'La",
        ),
        (["--no-augment"], "--resume: --augment is False, but True in"),
    ):
        code, _, err = call(capsys, "--resume", "--output", folder, *argv)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1
    results["data"]["crc32"] += 1
    compare.store(folder, results)
    code, _, err = call(capsys, *RUN, "--resume", "--output", folder)
    assert code == 2
    assert "the data are not those that the run began with" in err
    (folder / "results.json").write_text("{")
    code, _, err = call(capsys, "--resume", "--output", folder)
    assert code == 2
    assert "holds no run that was interrupted" in err


def test_folders_under_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"data": "images", "data_dir": "x"}
    assert str(compare.open_run(given, [])[0]) == "runs/images-1"
    (tmp_path / "runs" / "images-9" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "images-mine").mkdir()
    folder, config, results = compare.open_run(given, [])
    assert str(folder) == "runs/images-10"
    compare.store(tmp_path / "runs" / "images-9", results)
    assert compare.open_run({"resume": True}, [])[:2] == (compare.Path("runs/images-9"), config)


def test_statistics_batch():
    config = options.Config(
        methods=(
            "BatchNorm",
            "LayerNorm",
            "Ghost(BatchNorm(), groups=2)",
            "chain(BatchNorm())",
            "KalmanNorm",
        ),
        model=("mlp",),
        batch_size=64,
        statistics_batch=16,
    )
    _, arms = compare.prepare(config, {})
    assert [arm.layer for arm in arms] == [
        "Ghost(BatchNorm, groups=4)",
        "LayerNorm",
        "Ghost(BatchNorm(), groups=2)",
        "Ghost(chain(BatchNorm()), groups=4)",
        "Ghost(KalmanNorm, groups=4)",
    ]
    assert [arm.baseline for arm in arms] == [True, False, False, False, False]


def test_default_comparison():
    config = options.Config()
    _, arms = compare.prepare(config, {})
    assert [(arm.model, arm.method) for arm in arms] == [
        (model, method) for model in ("residual", "mlp") for method in config.methods
    ]
    left_out = [(arm.model, arm.method) for arm in arms if arm.network is None]
    assert left_out == [("mlp", "chain(BatchNorm, SpectralBatchNorm)")]
    assert [arm.method for arm in arms if arm.baseline] == ["BatchNorm", "BatchNorm"]


def test_what_kalman_norms_hand_on():
    argv = ["--model", "mlp", "--methods", "KalmanNorm LayerNorm", "--posterior", "fused"]
    _, arms = compare.prepare(options.Config(**options.read(argv)), {})
    assert [arm.network.posterior for arm in arms] == ["fused", None]


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        compare.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "--statistics-batch" in out
    assert "GroupNorm(num_groups=4)" in out


def test_placement_leaves_batch_norm_before_the_last_layer():
    argv = ["--model", "mlp", "--methods", "Affine(use_bias=False)", "--placement", "deep"]
    _, (arm,) = compare.prepare(options.Config(**options.read(argv)), {})
    dense = 64 * 128 + 2 * 128 * 128 + 1290
    assert arm.parameters == dense + 2 * (128 + 128) + 128


def test_no_recipe_leaves_no_trace(finished):
    results = load(finished)
    assert results["configuration"]["recipe"] == []
    assert "paired" not in results
    assert all(run.keys().isdisjoint({"plain", "moved"}) for run in results["runs"])


def test_validation_and_both_modes(finished):
    batch, layer, instance = load(finished)["runs"]
    for run in (batch, layer):
        assert len(run["validation_accuracy"]) == 3
        right = np.array(run["validation_accuracy"]) * 50
        np.testing.assert_allclose(right, right.round(), atol=1e-9)
    modes = layer["train_accuracy"]
    assert modes["training"] == modes["evaluation"]
    assert batch["train_accuracy"]["training"] != batch["train_accuracy"]["evaluation"]
    assert "validation_accuracy" not in instance


def test_bad_validation(capsys):
    code, _, err = call(capsys, "--validation", "1.5")
    assert (code, err.count("\n")) == (2, 1)
    assert "--validation" in err
