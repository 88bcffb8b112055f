"""Table, curves and files of a comparison."""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy import stats

COLUMNS: tuple[str, ...] = (
    "model",
    "method",
    "accuracy",
    "interval",
    "difference",
    "p_value",
    "step_ms",
    "parameters",
    "note",
)
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7A5C00", "#333333")


def interval(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % Student t interval of the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def p_value(values: Sequence[float], baseline: Sequence[float]) -> float | None:
    """One-sided paired t-test of `values` being the larger; None if the differences do not vary."""
    difference = np.subtract(values, baseline)
    if len(difference) < 2 or np.ptp(difference) < 1e-9:
        return None
    return float(stats.ttest_rel(values, baseline, alternative="greater").pvalue)


def p_text(value: float) -> str:
    """A p value as the tables show it."""
    return f"{value:.3f}" if value >= 0.0005 else "<0.001"


def rows(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table: one dict of `COLUMNS` per run, tested against the `baseline` run of its model.

    Accuracies, intervals and differences are fractions of the test set at the last epoch; `step_ms`
    is the median over the epochs after the first; what does not apply is None.
    """
    final = {
        (run["model"], run["method"]): [curve[-1] for curve in run["test_accuracy"]]
        for run in runs
        if not run["note"]
    }
    baselines = {
        run["model"]: final[run["model"], run["method"]] for run in runs if run["baseline"]
    }
    table = []
    for run in runs:
        row = dict.fromkeys(COLUMNS) | {k: run[k] for k in ("model", "method", "note")}
        table.append(row)
        if run["note"]:
            continue
        values = final[run["model"], run["method"]]
        row["accuracy"] = float(np.mean(values))
        row["interval"] = interval(values)
        row["step_ms"] = float(np.median(run["step_ms"][1:] or run["step_ms"]))
        row["parameters"] = run["parameters"]
        if run["model"] in baselines and not run["baseline"]:
            baseline = baselines[run["model"]]
            row["difference"] = float(np.mean(values) - np.mean(baseline))
            row["p_value"] = p_value(values, baseline)
    return table


def paired(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each arm of `--recipe`: its accuracies less those of its method, paired by seed.

    `difference` is the mean over seeds and `interval` half of its 95 % Student t interval, as
    fractions of the test set; `p_value` is that of the one-sided paired t-test that the arm is
    better, and `significant` whether it is at most 0.05. What does not apply is None.
    """
    final = {
        (run["model"], run["method"]): [curve[-1] for curve in run["test_accuracy"]] for run in runs
    }
    found = []
    for run in runs:
        if "plain" in run:
            values, plain = (final[run["model"], run[key]] for key in ("method", "plain"))
            difference = np.subtract(values, plain)
            p = p_value(values, plain)
            found.append(
                {
                    "model": run["model"],
                    "method": run["method"],
                    "plain": run["plain"],
                    "seeds": len(values),
                    "difference": float(difference.mean()),
                    "interval": interval(difference.tolist()),
                    "p_value": p,
                    "significant": None if p is None else p <= 0.05,
                }
            )
    return found


def print_cells(cells: Sequence[Sequence[str]], **how: Any) -> None:
    """Prints a table of text, its head first; `how` is its title or caption."""
    head, *lines = cells
    table = Table(*head, title_justify="left", caption_justify="left", **how)
    for line in lines:
        table.add_row(*map(escape, line))
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def show_paired(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Prints the rows of `paired`."""
    text = "Differences paired by seed: mean ± half of its 95 % Student t interval. p: one-sided "
    text += "paired t-test that the arm is better than its method, bold up to 0.05."
    view = Table(caption=text, caption_justify="left", header_style="bold")
    view.add_column("model", no_wrap=True)
    view.add_column("arm", overflow="fold", min_width=12)
    for name in ("less its method, points", "p", "seeds"):
        view.add_column(name, justify="right")
    for row in rows:
        half = "n/a" if row["interval"] is None else f"{100 * row['interval']:.2f}"
        p = "n/a" if row["p_value"] is None else p_text(row["p_value"])
        view.add_row(
            row["model"],
            escape(row["method"]),
            f"{100 * row['difference']:+.2f} ± {half}",
            f"[bold]{p}[/bold]" if row["significant"] else p,
            str(row["seeds"]),
        )
    console.print(view)


def show(table: Sequence[dict[str, Any]], console: Console, caption: str) -> None:
    """Prints the table, a section per model."""
    view = Table(caption=escape(caption), caption_justify="left", header_style="bold")
    view.add_column("model", no_wrap=True)
    view.add_column("method", overflow="fold", min_width=12)
    for name in ("accuracy, %", "vs BatchNorm", "p", "ms/step", "parameters"):
        view.add_column(name, justify="right")
    last = None
    for row in table:
        if last not in (None, row["model"]):
            view.add_section()
        model = "" if row["model"] == last else row["model"]
        last = row["model"]
        method = escape(row["method"])
        if row["note"]:
            view.add_row(model, method, "left out")
            continue
        width = "n/a" if row["interval"] is None else f"{100 * row['interval']:.2f}"
        difference = "" if row["difference"] is None else f"{100 * row['difference']:+.2f}"
        p = "" if row["difference"] is None else "n/a"
        if row["p_value"] is not None:
            p = p_text(row["p_value"])
        view.add_row(
            model,
            method,
            f"{100 * row['accuracy']:.2f} ± {width}",
            difference,
            f"[bold]{p}[/bold]" if row["p_value"] is not None and row["p_value"] < 0.05 else p,
            f"{row['step_ms']:.2f}",
            f"{row['parameters']:,}",
        )
    console.print(view)


def write_csv(
    folder: Path, table: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]]
) -> None:
    """`table.csv`, and `curves.csv` with a line per model, method, seed and epoch."""
    with open(folder / "table.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(table)
    measures = ("train_loss", "test_loss", "test_accuracy")
    with open(folder / "curves.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("model", "method", "seed", "epoch", *measures))
        for run in runs:
            for i, seed in enumerate(run["seeds"]):
                curves = zip(*(run[name][i] for name in measures), strict=True)
                for epoch, values in enumerate(curves, 1):
                    writer.writerow((run["model"], run["method"], seed, epoch, *values))


def plot(file: Path, table: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]]) -> None:
    """Loss curves (mean over seeds, shaded from lowest to highest) and last accuracies by model."""
    models = list(dict.fromkeys(run["model"] for run in runs))
    methods = list(dict.fromkeys(run["method"] for run in runs))
    colors = {method: COLORS[i % len(COLORS)] for i, method in enumerate(methods)}
    lines = {method: ("-", "--", ":")[i // len(COLORS) % 3] for i, method in enumerate(methods)}
    height = 1.2 + 0.28 * max(len(methods), 8)
    figure = Figure((13, height * len(models) + 0.3), dpi=150, layout="constrained")
    axes = figure.subplots(len(models), 3, squeeze=False, width_ratios=(1, 1, 0.9))
    for (left, middle, right), model in zip(axes, models, strict=True):
        shown = [run for run in runs if run["model"] == model and not run["note"]]
        for axis, measure in ((left, "train_loss"), (middle, "test_loss")):
            for run in shown:
                curves = np.array(run[measure], float)
                epochs = np.arange(1, curves.shape[1] + 1)
                style = {"color": colors[run["method"]], "linestyle": lines[run["method"]]}
                marker = "o" if len(epochs) == 1 else None
                axis.plot(epochs, curves.mean(0), linewidth=1.6, marker=marker, **style)
                axis.fill_between(
                    epochs,
                    curves.min(0),
                    curves.max(0),
                    color=style["color"],
                    alpha=0.1,
                    linewidth=0,
                )
            axis.set(yscale="log", xlabel="epoch")
            axis.set_title(f"{model}: {measure.replace('_', ' ')}", loc="left", fontsize=11)
            axis.xaxis.get_major_locator().set_params(integer=True)
        wanted = [row for row in table if row["model"] == model and not row["note"]]
        for place, row in enumerate(wanted):
            half = row["interval"] or 0.0
            ends = [100 * (row["accuracy"] + side * half) for side in (-1, 1)]
            style = {"color": colors[row["method"]], "linestyle": lines[row["method"]]}
            right.plot(ends, [place, place], linewidth=2, **style)
            right.plot(100 * row["accuracy"], place, "o", markersize=6, color=style["color"])
        right.set_yticks(range(len(wanted)), [_short(row["method"]) for row in wanted], fontsize=9)
        for label, row in zip(right.get_yticklabels(), wanted, strict=True):
            label.set_color(colors[row["method"]])
        right.invert_yaxis()
        right.margins(y=0.08)
        right.set_xlabel("%")
        right.set_title(f"{model}: test accuracy, last epoch", loc="left", fontsize=11)
        for axis in (left, middle, right):
            axis.grid(alpha=0.25, linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)


def _short(text, limit=38):
    return text if len(text) <= limit else text[: limit - 1] + "…"
