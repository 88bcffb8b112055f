"""Generative adversarial networks with norms of activations or weights: `python -m benchmarks.gan`.

A small DCGAN learns images, with a method in generator and discriminator, by RMSprop and the
non-saturating logistic loss. An arm names the method of both, or of each: "BatchNorm",
"StrictWeightNorm" (with TPReLU, as Xiang & Li 2017, https://arxiv.org/abs/1704.03971), "none", or
"BatchNorm / SpectralWeightNorm". With `--conditional` both networks are told the class: by norms
that take it, such as "SandwichBatchNorm(num_classes=10) / none", else as a part of the code; the
discriminator by projection (Miyato & Koyama 2018).

Measured after each part of the training and at its end, on test images with pixels in [-1, 1]:
the latent reconstruction error (`normjax.analysis.reconstruction`), beside that of the best linear
code, and a Frechet distance between samples and train images, by features of a classifier that is
trained first. (It compares arms of one run, and is not the FID of other work.)

A run fails if a number is not finite, or if the discriminator's loss and the generator's gradient
vanish. It ends there, and is counted apart: means are over the others. For a seed, all arms share
initial weights and batches; "less" is less the first arm, paired by seed. What is done is stored,
and is not done again; samples are those of an arm's first run that does not fail.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image
from scipy import stats
from threadpoolctl import threadpool_limits

from benchmarks import data, generative, machine, methods, report, resumable
from benchmarks.options import rate, whole
from normjax.analysis import figures, reconstruction

ARMS = ("BatchNorm(momentum=0.9)", "none", "StrictWeightNorm", "WeightNorm")
CONDITIONAL = (
    "ConditionalBatchNorm(num_classes={0}, momentum=0.9) / none",
    "SandwichBatchNorm(num_classes={0}, momentum=0.9) / none",
)
DATA = ("data", "data_dir", "train_size")
TRAINING = ("seeds", "steps", "parts", "learning_rate", "batch_size", "latent", "width")
MEASURING = (
    "conditional",
    "search",
    "final_search",
    "search_rate",
    "images",
    "samples",
    "classifier_steps",
)
GRID = 8  # samples along each side of a picture
GAP = 2  # pixels between them
SHOWN = 10  # steps of the last search from one point of its curve to the next
MEASURES = {"error": "reconstruction error", "distance": "distance"}
VALUES: dict[str, Callable[[dict[str, Any]], float]] = {
    "early": lambda row: row["error"][0],
    "final": lambda row: row["final_error"],
    "distance": lambda row: row["distance"][-1],
}


class Images(NamedTuple):
    """Train and test images f32[N, H, W, C] in [-1, 1], and classes i32[N]."""

    train: jax.Array
    train_labels: jax.Array
    test: jax.Array
    test_labels: jax.Array
    classes: int


def load(options: argparse.Namespace) -> tuple[Images, dict[str, Any]]:
    """The images, and what results say about them."""
    dataset = data.load(options.data, options.data_dir, train_size=options.train_size)
    half = dataset.train_images.max() / 2
    train, test = (
        jnp.asarray(images / half - 1, jnp.float32)
        for images in (dataset.train_images, dataset.test_images[: options.images])
    )
    labels = dataset.train_labels, dataset.test_labels[: options.images]
    images = Images(
        train, jnp.asarray(labels[0]), test, jnp.asarray(labels[1]), len(dataset.classes)
    )
    return images, data.describe(dataset)


def parse(arm: str) -> tuple[Any, Any]:
    """The methods of generator and discriminator; ValueError for unknown ones."""
    words = [word.strip() for word in arm.split("/")]
    if len(words) > 2:
        raise ValueError(f"{arm!r}: one method, or two divided by a slash")
    found = [None if word == "none" else methods.parse(word) for word in words]
    return found[0], found[-1]


def build(arm: str, images: Images, options: argparse.Namespace) -> generative.Gan:
    """The networks of an arm."""
    first, second = parse(arm)
    takes = [m for m in (first, second) if m is not None and "condition" in m.traits.inputs]
    if takes and not options.conditional:
        raise ValueError(f"{arm!r} takes a class: it needs --conditional")
    classes = images.classes if options.conditional else None
    _, *shape = images.train.shape
    return generative.Gan(
        generative.Generator(first, tuple(shape), options.width, classes),
        generative.Discriminator(second, options.width, classes),
        options.latent,
        options.batch_size,
        optax.rmsprop(options.learning_rate, decay=0.9, eps=1e-6, eps_in_sqrt=False),
    )


class Judge(NamedTuple):
    """What generators are compared by."""

    features: Callable[[jax.Array], jax.Array]  # of images
    reference: np.ndarray  # features of the train images
    about: dict[str, Any]


def judge(images: Images, options: argparse.Namespace) -> Judge:
    """The classifier, and what data themselves have: a linear code, the distance of test images."""
    network = generative.Classifier(images.classes)
    variables = network.fit(images.train, images.train_labels, options.classifier_steps)
    run = jax.jit(lambda x: network.apply(variables, x))
    features = lambda x: run(x)[0]
    reference, (of_test, logits) = np.asarray(features(images.train)), run(images.test)
    latent = min(options.latent, len(images.train) - 1, math.prod(images.train.shape[1:]))
    floor = reconstruction.pca_floor(images.train, images.test, latent=latent)
    about = {
        "classifier_accuracy": float(jnp.mean(logits.argmax(1) == images.test_labels)),
        "linear_error": float(floor.mean()),
        "test_distance": generative.frechet(reference, np.asarray(of_test)),
    }
    return Judge(features, reference, about)


class Program(NamedTuple):
    """Compiled functions of an arm."""

    init: Callable[[jax.Array], generative.State]
    train: Callable[[generative.State, jax.Array], Any]  # the state is donated
    search: Callable[[generative.State], reconstruction.Reconstruction]
    final_search: Callable[[generative.State], reconstruction.Reconstruction]
    sample: Callable[[generative.State], jax.Array]


def compile(gan: generative.Gan, images: Images, options: argparse.Namespace) -> Program:
    """Functions that an arm's seeds share."""
    count = options.samples
    z = jax.random.normal(jax.random.key(1), (count, options.latent))
    labels = jnp.arange(count) % images.classes

    def searching(steps):
        def search(state, test, classes):
            make = lambda z, classes: gan.generate(state, z, classes)
            how = {"latent": options.latent, "steps": steps, "learning_rate": options.search_rate}
            return reconstruction.reconstruct(make, test, classes, **how)

        compiled = jax.jit(search)
        return lambda state: compiled(state, images.test, images.test_labels)

    train = jax.jit(gan.train, donate_argnums=0)
    sample = jax.jit(gan.generate)
    return Program(
        jax.jit(gan.init),
        lambda state, keys: train(state, images.train, images.train_labels, keys),
        searching(options.search),
        searching(options.final_search),
        lambda state: sample(state, z, labels),
    )


def run_seed(
    program: Program,
    judge: Judge,
    seed: int,
    options: argparse.Namespace,
    advance: Callable[[], None],
) -> tuple[dict[str, Any], np.ndarray | None]:
    """The results of a run, numbers after each part, and samples; None for those of a failed one.

    `failed` says why, "" for a run that has not; a failed one ends with the part that it failed in.
    """
    # This generator compiles in a fraction of the time that the default one takes.
    start, order = jax.random.split(jax.random.key(seed, impl="rbg"))
    state = program.init(start)
    keys = jax.random.split(order, (options.parts, options.steps // options.parts))
    history, errors, distances, failed = [], [], [], ""
    for part in range(options.parts):
        state, found = program.train(state, keys[part])
        history.append(jax.device_get(found))
        failed = generative.failure(history)
        if failed:
            break
        error = float(program.search(state).errors.mean())
        samples = program.sample(state)
        distance = generative.frechet(judge.reference, np.asarray(judge.features(samples)))
        if not (math.isfinite(error) and math.isfinite(distance)):
            failed = generative.NOT_FINITE
            break
        errors.append(error)
        distances.append(distance)
        advance()
    row = {"seed": seed, "failed": failed, "parts": len(history)}
    for name, values in zip(generative.History._fields, zip(*history, strict=True), strict=True):
        row[name] = numbers(values)
    row |= {"error": numbers(errors), "distance": numbers(distances)}
    if failed:
        return row, None
    final = program.final_search(state)
    row |= {"final_error": float(final.errors.mean()), "curve": numbers(final.curve[::SHOWN])}
    return row, np.asarray(samples)


def numbers(values: Any) -> list[float | None]:
    """Numbers of five digits, None for those that are not finite."""
    return [float(f"{a:.5g}") if math.isfinite(a) else None for a in np.asarray(values, float)]


def grid(samples: np.ndarray) -> Image.Image:
    """A picture of the first samples f32[N, H, W, C], in rows of `GRID`, with white gaps."""
    rows = min(len(samples) // GRID, GRID)
    scale = max(1, 32 // samples.shape[2])
    pixels = np.clip((samples[: rows * GRID] + 1) * 127.5, 0, 255).round().astype(np.uint8)
    pixels = pixels.repeat(scale, 1).repeat(scale, 2)
    pixels = np.pad(pixels, ((0, 0), (GAP, 0), (GAP, 0), (0, 0)), constant_values=255)
    _, height, width, channels = pixels.shape
    pixels = pixels.reshape(rows, GRID, height, width, channels).swapaxes(1, 2)
    pixels = pixels.reshape(rows * height, GRID * width, channels)[GAP:, GAP:]
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The results, of which those stored are not made again."""
    from rich.progress import Progress

    images, about = load(options)
    defaults = [arm.format(images.classes) for arm in (ARMS, CONDITIONAL)[options.conditional]]
    arms = options.arms or defaults
    gans = {arm: build(arm, images, options) for arm in arms}
    fields = (*DATA, *TRAINING, *MEASURING)
    configuration = {name: getattr(options, name) for name in fields} | {"arms": arms}
    file = options.output / "gan.json"
    about = {"configuration": configuration, "data": about}
    results = resumable.results(file, about, "gan", "flax", "optax", "scikit-learn")
    done = {(row["arm"], row["seed"]) for row in results.setdefault("rows", [])}
    missing = [(arm, s) for arm in arms for s in range(options.seeds) if (arm, s) not in done]
    if not missing:
        return results
    judged = judge(images, options)
    results["judge"] = judged.about
    program, last = None, None
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=len(missing) * options.parts)
        for number, (arm, seed) in enumerate(missing):
            progress.update(task, description=f"{arm}, seed {seed}")
            if program is None or arm != last:
                program, last = compile(gans[arm], images, options), arm
            advance = lambda: progress.advance(task)
            row, samples = run_seed(program, judged, seed, options, advance)
            progress.update(task, completed=(number + 1) * options.parts)
            shown = any(one["arm"] == arm and "picture" in one for one in results["rows"])
            if samples is not None and not shown:
                picture = f"samples-{arms.index(arm)}.png"
                options.output.mkdir(parents=True, exist_ok=True)
                grid(samples).save(options.output / picture)
                row["picture"] = picture
            results["rows"].append({"arm": arm, **row})
            machine.write(results, file, indent=None, allow_nan=False)
    return results


def summary(results: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each arm: how many of its runs failed and why, and numbers of the others.

    Pairs (mean, half of the 95 % interval or None): the errors "early", after the first part, and
    "final"; "distance"; and "rank", Spearman's correlation of error and distance over the parts of
    a run. "early less" and so on are those less the first arm's, relative to them, paired by the
    seeds that neither failed. What no run has is None.
    """
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(results["rows"], key=lambda row: row["seed"]):
        by_arm.setdefault(row["arm"], []).append(row)
    table: list[dict[str, Any]] = []
    base: dict[str, dict[int, float]] = {}
    for arm, rows in by_arm.items():
        sound = [row for row in rows if not row["failed"]]
        found = {name: {row["seed"]: of(row) for row in sound} for name, of in VALUES.items()}
        failed = [row["failed"] for row in rows if row["failed"]]
        line = {"arm": arm, "runs": len(rows), "failed": failed}
        for name, values in found.items():
            both = [seed for seed in values if seed in base.get(name, ())]
            less = [values[seed] / base[name][seed] - 1 for seed in both]
            line |= {name: interval(list(values.values())), f"{name} less": interval(less)}
        table.append(line | {"rank": interval([_rank(row) for row in sound])})
        base = base or found
    return table


def _rank(row):
    """Spearman's correlation; NaN for fewer than three parts, or values that are all equal."""
    errors, distances = row["error"], row["distance"]
    if len(errors) < 3 or np.ptp(errors) == 0 or np.ptp(distances) == 0:
        return math.nan
    return float(np.corrcoef(stats.rankdata(errors), stats.rankdata(distances))[0, 1])


def interval(values: Sequence[float]) -> tuple[float, float | None] | None:
    """Mean, and half of its 95 % interval, of the values that are numbers; None without any."""
    known = [a for a in values if not math.isnan(a)]
    return (float(np.mean(known)), report.interval(known)) if known else None


def text(value: tuple[float, float | None] | None, form: str = ".4f", factor: float = 1) -> str:
    """A mean and its interval."""
    if value is None:
        return ""
    mean, half = value
    width = "n/a" if half is None else f"{factor * half:{form.lstrip('+')}}"
    return f"{factor * mean:{form}} ± {width}"


def cells(results: dict[str, Any]) -> list[list[str]]:
    """The table as text, its head first."""
    lines = [["arm", "failed"]]
    for name in ("early error", "final error", "distance"):
        lines[0] += [name, "less, %"]
    lines[0].append("rank correlation")
    for row in summary(results):
        reasons = "".join(f"; {reason}" for reason in dict.fromkeys(row["failed"]))
        line = [row["arm"], f"{len(row['failed'])} of {row['runs']}{reasons}"]
        for name in VALUES:
            line.append(text(row[name], ".1f" if name == "distance" else ".4f"))
            line.append(text(row[f"{name} less"], "+.1f", 100))
        lines.append([*line, text(row["rank"], "+.2f")])
    return lines


def show(results: dict[str, Any]) -> None:
    """Prints the table."""
    about = results["judge"]
    caption = (
        "Means over the runs that did not fail ± half of the 95 % interval. Error of the best "
        f"linear code: {about['linear_error']:.4f}; distance of test images: "
        f"{about['test_distance']:.2f}; accuracy of the classifier: "
        f"{100 * about['classifier_accuracy']:.1f} %."
    )
    report.print_cells(cells(results), caption=caption)


def plot(results: dict[str, Any], file: Path) -> None:
    """Draws error and distance over training, means of the runs that did not fail."""
    steps, parts = (results["configuration"][name] for name in ("steps", "parts"))
    rows = []
    for arm in dict.fromkeys(row["arm"] for row in results["rows"]):
        sound = [row for row in results["rows"] if row["arm"] == arm and not row["failed"]]
        for part in range(parts if sound else 0):
            row = {"step": (part + 1) * steps // parts, "arm": arm}
            for name, title in MEASURES.items():
                row[title] = float(np.mean([one[name][part] for one in sound]))
            rows.append(row)
    if rows:
        figure = figures.plot(rows, "step", list(MEASURES.values()), by="arm")
        figure.set_size_inches(12, 4)
        figure.savefig(file, dpi=100)


def plot_search(results: dict[str, Any], file: Path) -> None:
    """Draws the error over the steps of the last search, and that of the best linear code."""
    rows = []
    for arm in dict.fromkeys(row["arm"] for row in results["rows"]):
        curves = [r["curve"] for r in results["rows"] if r["arm"] == arm and not r["failed"]]
        for step, values in enumerate(zip(*curves, strict=True)):
            known = [a for a in values if a is not None]
            error = np.mean(known) if known else None
            rows.append({"step": SHOWN * step, "arm": arm, "error": error})
    if rows:
        ends = (0, max(row["step"] for row in rows))
        floor = results["judge"]["linear_error"]
        rows += [{"step": step, "arm": "best linear code", "error": floor} for step in ends]
        figure = figures.plot(rows, "step", ["error"], by="arm")
        figure.set_size_inches(7, 4)
        figure.savefig(file, dpi=100)


def main(argv: Sequence[str] | None = None) -> int:
    """Makes what is not stored yet, writes files and prints a table."""
    argv = sys.argv[1:] if argv is None else argv
    options = _options(argv)

    def work():
        with threadpool_limits(1, user_api="blas"):
            results = run(options)
        plot(results, options.output / "training.png")
        plot_search(results, options.output / "search.png")
        show(results)
        print(f"Written to {options.output}/")

    return resumable.command("gan", argv, work)


def _options(argv):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    text = f"methods, or pairs with a slash (default: {', '.join(ARMS)})"
    option("--arms", nargs="+", metavar="ARM", help=text)
    option("--conditional", action="store_true", help="tell both networks the class")
    option("--data", default="digits", choices=("digits", "images", "cifar10-bin"))
    option("--data-dir", help="folder of the images, as in benchmarks.compare")
    option("--train-size", type=whole, help="number of train images to keep")
    option("--seeds", type=whole, default=3)
    option("--steps", type=whole, default=2000, help="of training")
    option("--parts", type=whole, default=5, help="of training, measured after each")
    option("--learning-rate", type=rate, default=5e-4)
    option("--batch-size", type=whole, default=32)
    option("--latent", type=whole, default=16, help="length of a code")
    option("--width", type=whole, default=16, help="channels of the largest hidden maps")
    option("--search", type=whole, default=50, help="steps of a search for codes")
    option("--final-search", type=whole, default=500, help="steps of the last search")
    option("--search-rate", type=rate, default=0.01, help="learning rate of the searches")
    option("--images", type=whole, default=256, help="test images to reconstruct")
    option("--samples", type=whole, default=1024, help="of the distance")
    option("--classifier-steps", type=whole, default=1000)
    option("--output", type=Path, default=Path("runs/gan"))
    options = parser.parse_args(argv)
    if options.steps % options.parts:
        parser.error(f"--parts {options.parts} does not divide --steps {options.steps}")
    try:
        for arm in options.arms or ():
            parse(arm)
    except ValueError as error:
        parser.error(f"--arms: {error}")
    if options.arms:
        options.arms = list(dict.fromkeys(options.arms))
    return options


if __name__ == "__main__":
    sys.exit(main())
