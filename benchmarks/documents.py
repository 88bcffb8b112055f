"""Writes the tables of the documents from the stored results: `python -m benchmarks.documents`.

In a document a table stands between `<!-- table: NAME -->` and `<!-- end -->`, with NAME a key of
`TABLES`. A test compares every document with what this program would write.
"""

import functools
import json
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import (
    adversarial,
    conditional,
    depth,
    gan,
    guarantees,
    operator_norms,
    report,
    rows,
    scaling,
    spectral,
)
from benchmarks.compilers import show, traffic

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = ("README.md", "benchmarks/README.md", "notebooks/README.md", "CONTRIBUTING.md")
MARKED = re.compile(r"(?<=<!-- table: )([\w-]+)( -->\n)(.*?)(?=<!-- end -->)", re.DOTALL)
SUMMARY = (
    ("Variance of values around 10 000, float32: relative error", guarantees.offset_variance),
    ("Variance over 8 devices, unequal masks: relative error", guarantees.ragged_devices),
    (
        "LayerNorm, bfloat16: error of the gradient / error of rounding it once",
        guarantees.half_precision_gradient,
    ),
    (
        "LayerNorm, bfloat16: bytes kept for the backward pass / bytes of the input",
        guarantees.kept_layer_norm,
    ),
)
PACKAGES = ("jax", "flax", "libtpu", "jax-cuda12-plugin", "relucent")
COMPILED = ("H100", "v5p", "v6e", "v5e")
GHOST_SIZES = (2, 4, 8, 16, 32, 64)
SAMPLE_NORMS = {"residual": "GroupNorm(num_groups=1, ", "mlp": "LayerNorm("}
NO_AFFINE = "use_scale=False, use_bias=False)"


class Table(NamedTuple):
    """A table: `cells` makes its head and rows of what is in `files`, below `RESULTS`."""

    files: Sequence[str]
    cells: Callable[..., Iterable[Sequence[str]]]
    source: bool = True  # whether files, machine and commands stand below it
    section: str | None = None  # the part of each file that counts; it may be absent


def main() -> int:
    """Writes the tables of all documents."""
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(filled(path.read_text()))
    return 0


def filled(text: str) -> str:
    """The text of a document with its tables as the stored results say.

    Raises:
      KeyError: for a table that `TABLES` does not have.
    """
    return MARKED.sub(lambda found: found[1] + found[2] + markdown(TABLES[found[1]]), text)


def markdown(table: Table) -> str:
    """A table with its source."""
    results = [json.loads((RESULTS / file).read_text()) for file in table.files]
    if table.section is not None:
        results = [found.get(table.section, {"versions": {}, "rows": []}) for found in results]
    head, *rows = table.cells(*results)
    lines = [head, ["---"] * len(head), *rows]
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    if not table.source:
        return text
    versions = {name: version for found in results for name, version in found["versions"].items()}
    where = ", ".join(f"{name} {versions[name]}" for name in PACKAGES if name in versions)
    if machine := results[0].get("machine"):
        where = f"{machine['device']}, {machine['cores']} cores; {where}"
    where = f"({where})"
    if len(table.files) > 2:
        folder = table.files[0].partition("/")[0]
        return f"{text}\nFrom [`{folder}`](results/{folder}) {where}; each file has its command.\n"
    links = ", ".join(f"[`{file}`](results/{file})" for file in table.files)
    commands = "\n".join(wrapped(found["command"]) for found in results)
    return f"{text}\nFrom {links} {where}:\n\n```bash\n{commands}\n```\n"


def wrapped(command: str) -> str:
    """A command over several lines, broken between its arguments."""
    words = [shlex.quote(word).replace(" ", "\0") for word in shlex.split(command)]
    lines = textwrap.wrap(" ".join(words), 110, break_long_words=False, break_on_hyphens=False)
    return " \\\n  ".join(lines).replace("\0", " ")


def summary(measured, compiled, speed):
    """The differences that the README begins with."""
    yield "measured", "flax", "normjax"
    found = {row["case"] + ": " + row["measure"]: row for row in measured["rows"]}
    for words, measurement in SUMMARY:
        row = found[(measurement.__doc__ or "").strip().rstrip(".")]
        yield words, guarantees.text(row["flax"]), guarantees.text(row["normjax"])
    moved = {
        row["norms"]: row for row in compiled["networks"]["rows"] if row["network"] == "ResNet-50"
    }
    gigabytes = (
        f"{(row['read'] + row['written']) / 1e9:.1f}"
        for row in (moved["flax"], moved["normjax, inside"])
    )
    yield (
        "ResNet-50, bfloat16 (ReLU inside the norm): GB a step moves, compiled for H100",
        *gigabytes,
    )
    ratio = medians(speed)["BatchNorm, relu", "bfloat16"]["ratio_flax"]
    words = f"BatchNorm and ReLU, bfloat16: time of a training step, {speed['machine']['cores']}"
    yield f"{words} CPU cores", "1", f"{ratio:.2f}"


def guarantee_rows(results):
    """Every measurement of `benchmarks.guarantees`."""
    yield "case", "measure", "flax", "normjax"
    for row in results["rows"]:
        yield row["case"], row["measure"], *(guarantees.text(row[k]) for k in ("flax", "normjax"))


def segment_rows(results):
    """Times with segments, relative to those without."""
    yield "method", "shape", "dtype", "ms without", "packed", "ids in any order"
    for row in results["rows"]:
        times = (
            f"{row[f'{order}_ratio']:.2f} ({row[f'{order}_low']:.2f} to {row[f'{order}_high']:.2f})"
            for order in ("packed", "any")
        )
        shape = "x".join(map(str, row["shape"]))
        yield row["method"], shape, row["dtype"], f"{row['plain_ms']:.2f}", *times


def region_rows(results):
    """Regions and times of networks, and those of the peer where it ran."""
    yield "network", "regions", "seconds", "regions a second", "relucent"
    for row in results["rows"]:
        peer = row.get("relucent")
        rate = lambda found: f"{found['regions'] / found['seconds']:,.0f}"
        text = "" if peer is None else f"{rate(peer)} ({peer['regions']:,} regions)"
        count = f"{row['regions']:,}"
        yield row["network"], count, f"{row['seconds']:.2f}", rate(row), text


def medians(results: dict[str, Any]) -> dict[tuple[str, str], dict[str, float]]:
    """Medians over the shapes of the numbers of `benchmarks.speed`, by method and dtype."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        found.setdefault((row["method"], row["dtype"]), []).append(row)
    return {
        case: {
            field: float(np.median([row[field] for row in rows]))
            for field, value in rows[0].items()
            if isinstance(value, float)
        }
        for case, rows in found.items()
    }


def speeds(columns: dict[str, str]):
    """A table of `benchmarks.speed`: columns are formats of medians, empty where one is absent."""

    def cells(results):
        yield "method", "dtype", *columns
        for case, row in medians(results).items():
            yield *case, *(_format(column, row) for column in columns.values())

    return cells


def _format(text, numbers):
    try:
        return text.format(**numbers)
    except KeyError:
        return ""


def compile_rows(results):
    """Seconds to compile a network."""
    yield "", "flax", "normjax"
    found = results["compile_50_layers"]
    name = "seconds to trace, lower and compile a training step with 50 norms"
    yield name, f"{found['flax']:.2f}", f"{found['normjax']:.2f}"


def spectral_rows(results):
    """Test accuracy and flatness of networks with spectral norms in the last stage."""
    yield "last stage", "test accuracy, %", "less batch norm, points", "flatness", "less batch norm"
    for place, row in enumerate(spectral.summary(results)):
        accuracy, gain, flatness, flatter = (
            f"{factor * row[name][0]:{sign}.2f} ± {factor * row[name][1]:.2f}"
            for name, factor, sign in (
                ("accuracy", 100, ""),
                ("accuracy_gain", 100, "+"),
                ("flatness", 1, ""),
                ("flatness_gain", 1, "+"),
            )
        )
        yield row["name"], accuracy, gain if place else "", flatness, flatter if place else ""


def points(values: Any) -> str:
    """Mean and half of the 95 % interval of differences, in points."""
    return f"{100 * np.mean(values):+.1f} ± {100 * (report.interval(list(values)) or 0):.1f}"


def last_accuracies(*results):
    """Test accuracies of the last epoch, one for each seed, by network and method."""
    return {
        (run["model"], run["method"]): np.array([curve[-1] for curve in run["test_accuracy"]])
        for found in results
        for run in found["runs"]
    }


def ghost_noise_rows(*results):
    """Ghost noise beside other norms; the size is the best on validation images, or given."""
    yield "network", "method", "compared with", "test accuracy, points", "seeds"
    final = last_accuracies(*results)
    valid = {
        (run["model"], run["method"]): np.mean(run["validation_accuracy"])
        for found in results
        for run in found["runs"]
    }

    def sizes(model, form):
        return [n for n in GHOST_SIZES if (model, form.format(n)) in final]

    def best(model, form):
        size = max(sizes(model, form), key=lambda n: valid[model, form.format(n)])
        return size, form.format(size)

    def row(model, name, method, other_name, other):
        less = final[model, method] - final[model, other]
        return model, name, other_name, points(less), str(len(less))

    batch, analytic = "BatchNorm(momentum=0.9)", f"chain(BatchNorm(momentum=0.9, {NO_AFFINE}, "
    analytic += "AnalyticGhostNoise(ghost_batch_size={}), Affine())"
    noisy, ghost, exclusive, eval_norm = (
        f"{name}(ghost_batch_size={{}}, momentum=0.9)"
        for name in ("GhostNoiseBatchNorm", "GhostBatchNorm", "ExclusiveBatchNorm", "EvalNorm")
    )
    for model, layer in SAMPLE_NORMS.items():
        size, method = best(model, noisy)
        name = f"GhostNoiseBatchNorm({size})"
        yield row(model, name, method, "BatchNorm", batch)
        for other_name, form in (("GhostBatchNorm", ghost), ("ExclusiveBatchNorm", exclusive)):
            size, other = best(model, form)
            yield row(model, name, method, f"{other_name}({size})", other)
        form = f"chain({layer}{NO_AFFINE}, GhostNoise(ghost_batch_size={{}}), Affine())"
        size, method = best(model, form)
        name = layer.partition("(")[0]
        plain = f"chain({layer}{NO_AFFINE}, Affine())"
        yield row(model, f"{name}, GhostNoise({size})", method, name, plain)
    for name, form, other_name, other in (
        ("AnalyticGhostNoise", analytic, "GhostNoise", noisy),
        ("EvalNorm", eval_norm, "GhostBatchNorm", ghost),
    ):
        for n in sizes("mlp", form):
            names = f"{name}({n})", f"{other_name}({n})"
            yield row("mlp", names[0], form.format(n), names[1], other.format(n))


def kalman_rows(results):
    """Kalman norms beside batch norm."""
    yield "images per statistic", "method", "test accuracy less batch norm's, points", "seeds"
    final = last_accuracies(results)
    two, all_images = "GhostBatchNorm(ghost_batch_size=2, momentum=0.9)", "BatchNorm(momentum=0.9)"
    public = "guard=100, posterior='fused', "
    arms = [
        ("2", f"KalmanNorm, gain {gain}", f"KalmanNorm(gain={gain}, groups=64, momentum=0.9)", two)
        for gain in (0.1, 0.5, 0.9)
    ]
    small = f"KalmanNorm(gain=0.1, groups=64, {public}running_group='first', momentum=0.9)"
    name = "the form of the public implementation"
    arms.append(("2", name, small, two))
    arms.append(("128", name, f"KalmanNorm(gain=0.95, {public}momentum=0.9)", all_images))
    for size, name, method, other in arms:
        less = final["residual", method] - final["residual", other]
        yield size, name, points(less), str(len(less))


def adversarial_rows(*results):
    """Clean and attacked images with the norms of one and of two branches."""
    for place, found in enumerate(results):
        head, *lines = adversarial.cells(found)
        if place == 0:
            yield "attack in training", *head
        for line in lines:
            yield found["configuration"]["attack_statistics"], *line


def gan_rows(*results):
    """Reconstruction errors and distances of generators."""
    for place, found in enumerate(results):
        head, *lines = gan.cells(found)
        if place == 0:
            yield "learning rate", "steps", *head
        how = found["configuration"]
        for line in lines:
            yield f"{how['learning_rate']:g}", str(how["steps"]), *line
    about = results[0]["judge"]  # the same for all, of the data
    for name, column, value in (
        ("best linear code", "final error", f"{about['linear_error']:.4f}"),
        ("test images", "distance", f"{about['test_distance']:.1f}"),
    ):
        yield "", "", name, *(value if column == other else "" for other in head[1:])


def prediction_rows(results):
    """Errors of predicted variances by layer."""
    names = list(results["accuracy"][0]["errors"])
    yield "input", "kind", *names
    for row in results["accuracy"]:
        errors = (" ".join(f"{e:.3f}" for e in row["errors"][name]) for name in names)
        yield "x".join(map(str, row["shape"])), row["input"], *errors


def cost_rows(results):
    """Time of a prediction with its gradients, and of a training step."""
    yield "time of", "input", "relative"
    size = lambda row: "x".join(map(str, row["shape"]))
    for name, field in (("the convolution", "convolution"), ("a sampled batch", "sampled")):
        for row in results["costs"]:
            share = row[f"with_gradients_over_{field}"]
            yield f"a prediction with its gradients / {name}", size(row), f"{share:.4f}"
    step = results["training_step"]
    ratio = "{ratio:.2f} [{low:.2f}, {high:.2f}]".format(**step)
    yield "a training step with KalmanNorm / with BatchNorm", size(step), ratio


def by_pass(*passes: str, methods: Sequence[str] = ()):
    """A table of layers that were compiled, each with its last input; empty: all methods."""

    def cells(*results):
        yield "method", "input", "dtype", "bound", *COMPILED
        cases = [
            {(row["method"], row["dtype"]): row for row in found["rows"] if "note" not in row}
            for found in results
        ]
        for case, row in cases[0].items():
            if methods and case[0] not in methods:
                continue
            least = " + ".join(str(row["bound"][name]) for name in passes)
            moved = (_moved(found[case], passes) if case in found else "" for found in cases)
            yield case[0], show.size_text(row), case[1], least, *moved

    return cells


def _moved(row, passes):
    ours, theirs = (
        " + ".join(f"{show.units(row, peer, name):.1f}" for name in passes)
        for peer in ("normjax", "flax")
    )
    return f"{ours} ({theirs})"


def network_rows(*names: str, digits: int = 2):
    """A table of compiled networks: figures `names` over those with the norms of Flax."""

    def cells(*results):
        yield "network", "norms", *COMPILED
        found = []
        for result in results:
            rows = [row for row in result["rows"] if "note" not in row]
            ratios = zip(rows, show.over_flax(rows, digits), strict=True)
            found.append(
                {
                    (row["network"], row["norms"]): " / ".join(ratio[name] for name in names)
                    for row, ratio in ratios
                }
            )
        cases = dict.fromkeys(case for cells in found for case in cells if case[1] != "flax")
        for case in cases:
            yield *case, *(cells.get(case, "") for cells in found)

    return cells


def pod_rows(results):
    """Operations between chips."""
    rows = [row for row in results["rows"] if "note" not in row]
    kinds = [kind for kind in traffic.COLLECTIVES if any(kind in show.kinds(row) for row in rows)]
    yield "chips", "arrays sharded", "norm", *kinds
    for row in rows:
        cells = (show.collectives(row, kind) for kind in kinds)
        yield str(row["chips"]), row["layout"], row["norm"], *cells


def device_rows(results):
    """What a step sends on the largest number of simulated devices."""
    head, *lines = scaling.cells("devices", results)
    most = max(int(line[0]) for line in lines)
    return [head, *(line for line in lines if int(line[0]) == most)]


def conditional_rows(*results):
    """Two conditional norms, and the second less the first."""
    rows = [row for found in results for row in conditional.summary(found)]
    yield "data", "mean over seeds", *rows[0]["methods"], "difference"
    for row in rows:
        values = (conditional.text(row[name], sign) for name, sign in conditional.NUMBERS)
        yield row["data"], row["quantity"], *values


def recipe_rows(*results):
    """Small slow scales and controls beside the same network without."""
    yield "labels", "network", "arm", "test accuracy, points", "seeds"
    for found in results:
        noise = found["configuration"]["label_noise"]
        labels = f"{noise:.0%} wrong" if noise else "right"
        for row in found["paired"]:
            arm = row["method"].removeprefix(row["plain"]).lstrip(", ")
            less = f"{100 * row['difference']:+.1f} ± {100 * row['interval']:.1f}"
            yield labels, row["model"], f"`{arm}`", less, str(row["seeds"])


GHOST_FILES = tuple(
    f"ghost_noise/{name}.json"
    for name in (
        *("residual_noise", "residual_ghosts", "residual_exclusive", "residual_layer"),
        *("mlp_noise", "mlp_ghosts", "mlp_layer"),
    )
)
GAN_FILES = tuple(f"gan/{name}gan.json" for name in ("slow/", "", "fast/", "long/"))
COMPILED_FILES = tuple(f"compilers/{topology}.json" for topology in COMPILED)
FLAX, ACCESSED = "{ratio_flax:.2f}", "{normjax_bytes:.1f} ({flax_bytes:.1f})"
KEPT = "{normjax_kept:.2f} ({flax_kept:.2f})"
TABLES: dict[str, Table] = {
    "summary": Table(
        ("guarantees/guarantees.json", "compilers/H100.json", "speed/speed.json"),
        summary,
        source=False,
    ),
    "guarantees": Table(("guarantees/guarantees.json",), guarantee_rows),
    "speed": Table(
        ("speed/speed.json",),
        speeds(
            {
                "time / flax": FLAX,
                "bytes": ACCESSED,
                "kept": KEPT,
                "temporaries": "{normjax_temporaries:.2f} ({flax_temporaries:.2f})",
            }
        ),
    ),
    "compile": Table(("speed/speed.json",), compile_rows, source=False),
    "spectral-speed": Table(
        ("speed/spectral/speed.json",),
        speeds(
            {
                "time / flax BatchNorm": FLAX,
                "/ plain FFT": "{ratio_plain_fft:.2f}",
                "/ FFT pair": "{ratio_fft_pair:.2f}",
                "bytes": "{normjax_bytes:.1f}",
                "kept": "{normjax_kept:.2f}",
            }
        ),
    ),
    "ghost-speed": Table(
        ("speed/ghost/speed.json",),
        speeds(
            {
                "time / flax BatchNorm": FLAX,
                "/ flax BatchNorm + Dropout": "{ratio_flax_dropout:.2f}",
                "bytes": ACCESSED,
                "kept": KEPT,
            }
        ),
    ),
    "input-speed": Table(
        ("speed/inputs/speed.json",),
        speeds(
            {
                "time / flax and jnp": FLAX,
                "/ without the input": "{ratio_plain:.2f}",
                "bytes": ACCESSED,
                "kept": KEPT,
            }
        ),
    ),
    "torch-speed": Table(
        ("speed/torch/speed.json",),
        speeds({"time / PyTorch": "{ratio_torch:.2f}", "/ flax": FLAX}),
    ),
    "whitening-speed": Table(
        ("speed/whitening/speed.json",),
        speeds(
            {
                "time / flax BatchNorm": FLAX,
                "/ plain": "{ratio_plain:.2f}",
                "/ products": "{ratio_products:.2f}",
                "bytes": "{normjax_bytes:.1f}",
                "kept": KEPT,
            }
        ),
    ),
    "segments": Table(("segments/segments.json",), segment_rows),
    "regions": Table(("regions/regions.json",), region_rows),
    "rows": Table(("rows/rows.json",), rows.cells),
    "scaling-devices": Table(("scaling/devices.json",), device_rows),
    "scaling-pods": Table(("scaling/pods.json",), functools.partial(scaling.cells, "pods")),
    "rows-tried": Table(("rows/rows.json",), rows.tried, source=False),
    "spectral": Table(("spectral/spectral.json",), spectral_rows),
    "ghost-noise": Table(GHOST_FILES, ghost_noise_rows),
    "kalman": Table(("kalman/two.json",), kalman_rows),
    "predictions": Table(("kalman/stacks.json",), prediction_rows, source=False),
    "costs": Table(("kalman/stacks.json",), cost_rows),
    "compilers": Table(COMPILED_FILES, by_pass("residuals", "backward"), section="layers"),
    "compilers-forward": Table(
        COMPILED_FILES,
        by_pass("forward", "both", methods=("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm")),
        source=False,
        section="layers",
    ),
    "compilers-networks": Table(
        COMPILED_FILES,
        network_rows("moved", "temporaries", "kernels"),
        source=False,
        section="networks",
    ),
    "compilers-memory": Table(
        COMPILED_FILES,
        network_rows("temporaries", "moved", "kept", "products"),
        source=False,
        section="memory",
    ),
    "compilers-weights": Table(
        COMPILED_FILES,
        network_rows("moved", "temporaries", "kernels", digits=3),
        source=False,
        section="weights",
    ),
    "compilers-pods": Table(("compilers/v5e.json",), pod_rows, section="pods"),
    "operator-norms": Table(("operator_norms/operator_norms.json",), operator_norms.cells),
    "gan": Table(GAN_FILES, gan_rows),
    "gan-conditional": Table(("gan/conditional/gan.json",), gan_rows),
    "balance": Table(("conditional/balance.json",), conditional_rows),
    "conditional": Table(
        ("conditional/relations.json", "conditional/few-shot.json"), conditional_rows
    ),
    "recipe": Table(("recipe/noisy.json", "recipe/clean.json"), recipe_rows),
    "depth-initialization": Table(("depth/initialization.json",), depth.cells),
    "depth-training": Table(("depth/training.json",), depth.cells),
    "depth-cost": Table(("depth/cost.json",), depth.cells),
    "adversarial": Table(
        ("adversarial/adversarial.json", "adversarial/train/adversarial.json"), adversarial_rows
    ),
    "adversarial-strong": Table(("adversarial/strong/adversarial.json",), adversarial_rows),
}

if __name__ == "__main__":
    sys.exit(main())
