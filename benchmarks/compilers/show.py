"""Tables and a plot of what was compiled."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

COLORS = {"bfloat16": "#E69F00", "float32": "#0072B2"}
PEERS = ("flax", "normjax")


def moved(figures: dict[str, Any]) -> int:
    """Bytes that a program reads and writes in the memory of the device."""
    return figures["read"] + figures["written"]


def units(row: dict[str, Any], peer: str, *passes: str) -> float:
    """Bytes that passes move together, by byte of input."""
    return sum(moved(row["programs"][peer][name]) for name in passes) / row["input"]


def failures(results: dict[str, Any], sections: Sequence[str]) -> list[str]:
    """What did not compile, and why."""
    return [
        f"{topology}: {' '.join(str(v) for k, v in row.items() if k != 'note')}: {row['note']}"
        for topology, found in results.items()
        for section in sections
        for row in found.get(section, {"rows": ()})["rows"]
        if "note" in row
    ]


def tables(results: dict[str, Any], sections: Sequence[str]) -> None:
    """Prints the tables of some sections, and what did not compile."""
    console = Console(width=None if sys.stdout.isatty() else 180)
    shows = {"layers": _layers}
    for section in sections:
        for topology, found in results.items():
            rows = [row for row in found.get(section, {"rows": ()})["rows"] if "note" not in row]
            if rows:
                console.print(shows[section](topology, rows))
    for line in failures(results, sections):
        console.print(escape(line), style="red")


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def _layers(topology, rows):
    names = {"forward": "forward", "residuals": "with residuals", "backward": "backward"}
    names["both"] = "in one program"
    right = [*names.values(), "kernels", "kept", "temporaries"]
    chip = "accessed" in rows[0]["programs"]["normjax"]["forward"]
    table = _table(
        f"{topology}: bytes in memory / bytes of the input: normjax (flax, bound)",
        ("method", "input", "dtype"),
        right + ["on the chip too"] * chip,
    )

    def both(row, cell):
        ours, theirs = (cell(row["programs"][peer]) for peer in ("normjax", "flax"))
        return f"{ours} ({theirs})"

    def each(row, number):
        return both(row, lambda program: "/".join(number(program[name]) for name in names))

    for row in rows:
        size = row["input"]
        cells = [
            f"{units(row, 'normjax', name):.1f} ({units(row, 'flax', name):.1f}, {least})"
            for name, least in row["bound"].items()
        ]
        cells.append(each(row, lambda figures: str(figures["kernels"])))
        cells.append(both(row, lambda program: f"{program['kept'] / size:.2f}"))
        most = lambda program: max(program[name]["temporaries"] for name in names)
        cells.append(both(row, lambda program: f"{most(program) / size:.2f}"))
        if chip:
            cells.append(each(row, lambda figures: f"{figures['accessed'] / size:.0f}"))
        table.add_row(row["method"], "x".join(map(str, row["shape"])), row["dtype"], *cells)
    return table


def plot(results: dict[str, Any], path: Path) -> None:
    """Bytes of forward pass with residuals and backward pass, by topology, method and input."""
    from matplotlib.figure import Figure

    found = {
        topology: [row for row in result["layers"]["rows"] if "note" not in row][::-1]
        for topology, result in results.items()
    }
    rows = max(found.values(), key=len)
    figure = Figure((3 + 3 * len(found), 0.24 * len(rows) + 1.8), layout="constrained")
    columns = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (topology, rows) in zip(columns, found.items(), strict=True):
        labels = [f"{r['method']}  {'x'.join(map(str, r['shape']))}  {r['dtype']}" for r in rows]
        values = {peer: [units(r, peer, "residuals", "backward") for r in rows] for peer in PEERS}
        axes.barh(labels, values["flax"], color="#dddddd", height=0.8, label="flax.linen")
        axes.barh(
            labels,
            values["normjax"],
            color=[COLORS[row["dtype"]] for row in rows],
            height=0.45,
            label="normjax",
        )
        least = [row["bound"]["residuals"] + row["bound"]["backward"] for row in rows]
        axes.plot(least, labels, "k|", markersize=8, label="bound")
        axes.set_title(topology, loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.01)
    figure.supxlabel(
        "bytes moved in memory, forward with residuals + backward / bytes of the input"
    )
    handles, names = columns[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
