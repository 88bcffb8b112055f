"""Tables and a plot of what was compiled."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.compilers.traffic import COLLECTIVES

COLORS = {"bfloat16": "#E69F00", "float32": "#0072B2"}
GREY = "#dddddd"


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
    console = Console(width=None if sys.stdout.isatty() else 200)
    shows = {"layers": _layers, "pods": _pods}
    for section in sections:
        for topology, found in results.items():
            rows = [row for row in found.get(section, {"rows": ()})["rows"] if "note" not in row]
            if rows:
                console.print(shows.get(section, _networks)(topology, rows))
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
        right + ["with the chip"] * chip,
    )

    for row in rows:
        columns = []
        for peer in ("normjax", "flax"):
            program, size = row["programs"][peer], row["input"]
            each = [program[name] for name in names]
            column = [f"{moved(figures) / size:.1f}" for figures in each]
            column.append("/".join(str(figures["kernels"]) for figures in each))
            column.append(f"{program['kept'] / size:.2f}")
            column.append(f"{max(figures['temporaries'] for figures in each) / size:.2f}")
            if chip:
                column.append("/".join(f"{figures['accessed'] / size:.0f}" for figures in each))
            columns.append(column)
        least = [f", {least}" for least in row["bound"].values()] + [""] * len(columns[0])
        cells = [f"{a} ({b}{c})" for a, b, c in zip(*columns, least, strict=False)]
        table.add_row(row["method"], size_text(row), row["dtype"], *cells)
    return table


def size_text(row: dict[str, Any]) -> str:
    """The shape of the input of a layer."""
    return "x".join(map(str, row["shape"]))


def _networks(topology, rows):
    right = ("GiB in memory", "/ flax", "temporaries, MiB", "/ flax", "kernels", "estimated / flax")
    right += ("kept / flax", "operations of products / flax")
    table = _table(f"{topology}: a training step", ("network", "norms"), right)
    for row, ratios in zip(rows, over_flax(rows), strict=True):
        table.add_row(
            row["network"],
            row["norms"],
            f"{moved(row) / 2**30:.2f}",
            ratios["moved"],
            f"{row['temporaries'] / 2**20:.0f}",
            ratios["temporaries"],
            str(row["kernels"]),
            *(ratios[name] for name in ("seconds", "kept", "products")),
        )
    return table


def over_flax(rows: Sequence[dict[str, Any]], digits: int = 2) -> list[dict[str, str]]:
    """Figures of networks, over those of the network with the norms of Flax.

    Empty where one of the two is not known.
    """
    known = [{"moved": moved(row), **row} for row in rows]
    base = {row["network"]: row for row in known if row["norms"] == "flax"}
    ratio = lambda a, b: f"{a / b:.{digits}f}" if a and b else ""
    names = ("moved", "temporaries", "kernels", "seconds", "kept", "products")
    return [
        {n: ratio(row.get(n), base.get(row["network"], {}).get(n)) for n in names} for row in known
    ]


def _pods(topology, rows):
    names = [kind for kind in COLLECTIVES if any(kind in kinds(row) for row in rows)]
    table = _table(
        f"{topology}: operations between chips / arrays / KiB by chip, normjax (flax)",
        ("slice", "arrays sharded", "norm"),
        names,
    )
    for row in rows:
        cells = [collectives(row, name) for name in names]
        table.add_row(row["slice"], row["layout"], row["norm"], *cells)
    return table


def kinds(row: dict[str, Any]) -> set[str]:
    """Of the operations between chips in the programs of a row."""
    return {kind for program in row["programs"].values() for kind in program["collectives"]}


def collectives(row: dict[str, Any], kind: str) -> str:
    """Operations, arrays and KiB of one kind in the program of normjax, in brackets those of Flax.

    Empty if there are none.
    """
    found = []
    for peer in ("normjax", "flax"):
        has = row["programs"][peer]["collectives"].get(kind)
        text = "{operations} / {operands} / {0:.0f}"
        found.append(text.format(has["bytes"] / 1024, **has) if has else "0")
    return "" if found == ["0", "0"] else "{} ({})".format(*found)


def plot(results: dict[str, Any], path: Path) -> None:
    """Bytes of forward pass with residuals and backward pass, by topology, method and input."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    bounds = []
    found = {
        topology: [row for row in result["layers"]["rows"] if "note" not in row][::-1]
        for topology, result in results.items()
    }
    rows = max(found.values(), key=len)
    figure = Figure((3 + 3 * len(found), 0.24 * len(rows) + 1.8), layout="constrained")
    columns = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (topology, rows) in zip(columns, found.items(), strict=True):
        labels = [f"{r['method']}  {size_text(r)}  {r['dtype']}" for r in rows]
        values = {
            peer: [units(r, peer, "residuals", "backward") for r in rows]
            for peer in ("flax", "normjax")
        }
        axes.barh(labels, values["flax"], color=GREY, height=0.8)
        axes.barh(
            labels,
            values["normjax"],
            color=[COLORS[row["dtype"]] for row in rows],
            height=0.45,
        )
        least = [row["bound"]["residuals"] + row["bound"]["backward"] for row in rows]
        bounds = axes.plot(least, labels, "k|", markersize=8, label="bound")
        axes.set_title(topology, loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.01)
    figure.supxlabel(
        "bytes moved in memory, forward with residuals + backward / bytes of the input"
    )
    shown = [Patch(color=color, label=f"normjax, {name}") for name, color in COLORS.items()]
    shown += [Patch(color=GREY, label="flax.linen"), *bounds]
    figure.legend(handles=shown, loc="outside upper right", ncols=len(shown), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
