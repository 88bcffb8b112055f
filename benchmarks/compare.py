"""Compares normalization methods in small networks: `python -m benchmarks.compare`.

Every method sees the same data, initial weights and order of batches for a seed; accuracies are
those of the last epoch. A run leaves results.json (everything), table.csv, curves.csv and
curves.png in a folder of its own under `runs/`.
"""

import dataclasses
import importlib.metadata
import json
import math
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

import normjax as nj
from benchmarks import data, machine, methods, models, options, recipe, report, training
from normjax.core.method import parts, traits

SAVE_SECONDS = 10.0  # between checkpoints; one takes about 0.05 s
PACKAGES = "jax jaxlib flax optax orbax-checkpoint numpy scipy scikit-learn matplotlib pillow"
CURVES = ("train_loss", "test_loss", "test_accuracy")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One method in one network; without a network it is left out, for the reason in `note`.

    An arm of `--recipe` has in `plain` the method that it is compared with.
    """

    model: str
    method: str
    layer: str
    baseline: bool = False
    plain: str | None = None
    change: recipe.Recipe = recipe.NONE
    network: nn.Module | None = None
    parameters: int = 0
    note: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 after one line about bad input, or 130 after an interruption."""
    argv = sys.argv[1:] if argv is None else argv
    again = list(argv)
    try:
        try:
            folder, config, results = open_run(options.read(argv), argv)
            inputs, arms = prepare(config, results)
            folder.mkdir(parents=True, exist_ok=True)
            store(folder, results)
        except (ValueError, OSError) as error:
            print("compare:", " ".join(str(error).split()), file=sys.stderr)
            return 2
        again = ["--resume", "--output", str(folder)]
        run(folder, config, results, inputs, arms)
    except KeyboardInterrupt:
        command = shlex.join(["python", "-m", "benchmarks.compare", *again])
        print(f"interrupted; continue with: {command}", file=sys.stderr)
        return 130
    return 0


def open_run(
    given: dict[str, Any], argv: Sequence[str]
) -> tuple[Path, options.Config, dict[str, Any]]:
    """The folder of a new or resumed run, its configuration, and its results so far."""
    given = dict(given)
    resume, output = given.pop("resume", False), given.pop("output", None)
    if resume:
        folder = Path(output) if output else _last_interrupted()
        return folder, *_stored(folder, given)
    config = options.Config(**given)
    folder = Path(output) if output else _next_free(config.data)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"--output {folder} is not empty: --resume continues its run, "
            "another --output keeps its results"
        )
    results = {
        "command": shlex.join(["python", "-m", "benchmarks.compare", *argv]),
        "versions": {
            "python": platform.python_version(),
            "normjax": nj.__version__,
            **{name: importlib.metadata.version(name) for name in PACKAGES.split()},
        },
        "machine": machine.describe(),
        "configuration": dataclasses.asdict(config),
        "complete": False,
        "runs": [],
    }
    return folder, config, results


def prepare(config: options.Config, results: dict[str, Any]) -> tuple[training.Inputs, list[Arm]]:
    """The data on the device and all arms, after every check that needs no training.

    What the data are is noted in `results`, and compared with what is noted there.
    """
    size, groups = config.batch_size, 1
    if config.statistics_batch is not None:
        groups = size // config.statistics_batch
        if size % config.statistics_batch:
            raise ValueError(
                f"--statistics-batch {config.statistics_batch} does not divide --batch-size {size}"
            )
    dataset = data.load(
        config.data,
        config.data_dir,
        train_size=config.train_size,
        validation=config.validation,
        label_noise=config.label_noise,
    )
    number = len(dataset.train_labels)
    if size > number:
        raise ValueError(f"--batch-size {size} is above the {number} train images")
    about = data.describe(dataset)
    if results.setdefault("data", about) != about:
        raise ValueError("--resume: the data are not those that the run began with")
    inputs = training.put(dataset)
    plain = (text for text in config.methods if type(methods.parse(text)) is nj.BatchNorm)
    baseline = next(plain, None)
    arms = []
    for model in config.model:
        for text in config.methods:
            arm = _arm(model, text, groups, config, inputs, len(dataset.classes))
            arms.append(dataclasses.replace(arm, baseline=text == baseline))
            if arm.network is not None:
                arms += [_with_recipe(arm, words, config, inputs) for words in config.recipe]
    if not any(arm.network for arm in arms):
        raise ValueError(f"--methods {arms[0].method} in --model {arms[0].model}: {arms[0].note}")
    return inputs, arms


def _arm(model, text, groups, config, inputs, classes):
    method = methods.parse(text)
    if model == "mlp" and _needs_positions(method):
        note = "the layers are [N, C], without positions to normalize over"
        return Arm(model, text, text, note=note)
    layer, early = text, nj.BatchNorm() if config.placement == "deep" else None
    if groups > 1 and traits(method).trains and not isinstance(method, nj.Ghost):
        layer = f"Ghost({text}, groups={groups})"
    if groups > 1 and early is not None:
        early = nj.Ghost(early, groups=groups)
    try:
        method = methods.parse(layer)
        how = {"width": config.width, "depth": config.depth, "posterior": config.posterior}
        network = models.build(model, method, classes=classes, early=early, **how)
        params = training.shapes(network, inputs, config.batch_size)
    except (ValueError, TypeError, NameError) as error:
        raise ValueError(f"--methods {text} in --model {model}: {error}") from None
    return Arm(model, text, layer, network=network, parameters=_number(params))


def _with_recipe(arm, words, config, inputs):
    change = recipe.parse(words)
    network = change.network(arm.network)
    try:
        params = training.shapes(network, change.inputs(inputs), config.batch_size)
        jax.eval_shape(change.initial, params)
    except ValueError as error:
        raise ValueError(f"--recipe {words} with {arm.method} in {arm.model}: {error}") from None
    return dataclasses.replace(
        arm,
        method=f"{arm.method}, {words}",
        plain=arm.method,
        change=change,
        network=network,
        parameters=_number(params),
    )


def _number(params):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def run(
    folder: Path,
    config: options.Config,
    results: dict[str, Any],
    inputs: training.Inputs,
    arms: Sequence[Arm],
) -> None:
    """Trains what is not stored yet, then writes and prints everything."""
    console = Console(width=None if sys.stdout.isatty() else 110)
    columns = (
        TextColumn("{task.description:38}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    saved = (folder / "checkpoints").absolute()
    checkpoints = ocp.CheckpointManager(saved, options=ocp.CheckpointManagerOptions(max_to_keep=1))
    done = len(results["runs"])
    with checkpoints, Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=len(arms) * config.epochs)
        for place, arm in enumerate(arms):
            if place >= done:
                bar.update(task, description=f"{arm.model} {arm.method}")
                record = train(arm, place, config, inputs, checkpoints, lambda: bar.advance(task))
                results["runs"].append(record)
                store(folder, results)
            bar.update(task, completed=(place + 1) * config.epochs)

    table = report.rows(results["runs"])
    if config.recipe:
        results["paired"] = report.paired(results["runs"])
    report.write_csv(folder, table, results["runs"])
    report.plot(folder / "curves.png", table, results["runs"])
    shutil.rmtree(saved)
    store(folder, results | {"table": table, "complete": True})
    seeds = f"{config.seeds} seed{'s' * (config.seeds > 1)}"
    notes = [
        f"Accuracy after the last of {config.epochs} epochs on {results['data']['test_images']} "
        f"test images: mean over {seeds} ± half of the 95 % Student t interval. "
        "p: one-sided paired t-test that the method is better than BatchNorm, bold below 0.05. "
        "ms/step: of one seed, without compilation."
    ]
    notes += [f"{arm.method} in {arm.model}: left out; {arm.note}." for arm in arms if arm.note]
    notes += [f"{text}: {methods.about(methods.parse(text))}" for text in config.methods]
    report.show(table, console, "\n".join(notes))
    if config.recipe:
        report.show_paired(results["paired"], console)
    console.print(f"Results and curves are in {folder}/", markup=False, highlight=False)


def train(
    arm: Arm,
    place: int,
    config: options.Config,
    inputs: training.Inputs,
    checkpoints: ocp.CheckpointManager,
    tick: Callable[[], None],
) -> dict[str, Any]:
    """The record of the arm at `place`, from its checkpoint on; `tick` is called per epoch."""
    record = {
        "model": arm.model,
        "method": arm.method,
        "layer": arm.layer,
        "baseline": arm.baseline,
        "note": arm.note,
        "parameters": arm.parameters,
    }
    if arm.plain is not None:
        record["plain"] = arm.plain
    if arm.network is None:
        return record | {key: [] for key in ("seeds", *CURVES, "step_ms")}
    inputs = arm.change.inputs(inputs)
    program = training.compile(
        arm.network,
        inputs,
        seeds=config.seeds,
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        augment=config.augment,
        flip=config.data != "digits",
        initial=arm.change.initial,
        after=arm.change.after(),
    )
    state = program.init(jnp.arange(config.seeds))
    untrained = state.params
    seconds = np.zeros(config.epochs, np.float32)
    first = place * (config.epochs + 1)  # the number of this arm's checkpoint after no epoch
    latest = checkpoints.latest_step()
    if latest is not None and latest >= first:
        target = ocp.args.StandardRestore((state, seconds))
        kept: Any = checkpoints.restore(latest, args=target)
        state, seconds = kept

    def save():
        step = first + int(state.epoch[0])
        if step > first and step != checkpoints.latest_step():
            checkpoints.save(step, args=ocp.args.StandardSave((state, seconds.copy())))

    saved = time.monotonic()
    try:
        while (epoch := int(state.epoch[0])) < config.epochs:
            start = time.perf_counter()
            trained = jax.block_until_ready(program.train(state, inputs))
            seconds[epoch] = time.perf_counter() - start
            state = jax.block_until_ready(program.evaluate(trained, inputs))
            tick()
            if time.monotonic() - saved > SAVE_SECONDS:
                save()
                saved = time.monotonic()
    except KeyboardInterrupt:
        save()
        raise
    steps = config.seeds * (len(inputs.train_labels) // config.batch_size)
    accuracy = np.asarray(state.correct) / np.sum(np.asarray(inputs.test_labels) >= 0)
    if config.recipe:
        record["moved"] = recipe.moved(untrained, state.params)
    if config.validation:
        found = training.validation_accuracy(arm.network, state, inputs)
        record["validation_accuracy"] = found.tolist()
    if config.both_modes:
        record["train_accuracy"] = {}
        for name, train in (("training", True), ("evaluation", False)):
            how = {"batch_size": config.batch_size, "train": train}
            found = training.train_accuracy(arm.network, state, inputs, **how)
            record["train_accuracy"][name] = found.tolist()
    return record | {
        "seeds": state.seed.tolist(),
        "train_loss": _finite(state.train_loss),
        "test_loss": _finite(state.test_loss),
        "test_accuracy": accuracy.tolist(),
        "step_ms": (1e3 * seconds / steps).tolist(),
    }


def store(folder: Path, results: dict[str, Any]) -> None:
    """Writes results.json in one move."""
    machine.write(results, folder / "results.json", allow_nan=False)


def _stored(folder, given):
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        stored: dict[str, Any] = results["configuration"]
        complete = results["complete"]
    except (OSError, ValueError, KeyError):
        raise ValueError(f"--resume: {folder} holds no run that was interrupted") from None
    if complete:
        raise ValueError(f"--resume: the run in {folder} is complete; nothing is left to do")
    config: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()
    }
    for name, value in given.items():
        if value != config[name]:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"--resume: {option} is {value}, but {config[name]} in {folder}")
    return options.Config(**config), results


def _finite(curves):
    """Nested lists, with None for what JSON has no number for."""
    lists = np.asarray(curves).tolist()
    return [[value if math.isfinite(value) else None for value in curve] for curve in lists]


def _needs_positions(method):
    positions = isinstance(method, nj.InstanceNorm | nj.SpectralBatchNorm)
    return positions or any(map(_needs_positions, parts(method)))


def _next_free(name):
    taken = [p.name.rpartition("-")[2] for p in Path("runs").glob(f"{name}-*")]
    return Path("runs", f"{name}-{max([int(n) for n in taken if n.isdecimal()], default=0) + 1}")


def _last_interrupted():
    found = list(Path("runs").glob("*/checkpoints"))
    if not found:
        raise ValueError("--resume: no interrupted run is under runs/; --output names another")
    return max(found, key=lambda folder: folder.stat().st_mtime).parent


if __name__ == "__main__":
    sys.exit(main())
