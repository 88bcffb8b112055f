"""One way to draw tables of measurements; matplotlib comes with the extra `benchmarks`."""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "v", "D", "x", "*")  # of a number that shares no divisor with the dashes


def plot(
    rows: Sequence[Mapping[str, Any]],
    x: str,
    panels: Sequence[str | Sequence[str]],
    *,
    by: str | None = None,
) -> "Figure":
    """Draws fields of a table over its field `x`, numbers or names: a panel for one, or several.

    `rows` are such as `noise.table` and `spectra.table` make; a value that is None is left out.
    With `by` there is a line for each value of that field. Lines differ in dashes and markers too,
    for print in grey. ValueError for a field that is missing.

    Example:
      >>> from normjax.analysis import figures
      >>> rows = [{"map": m, "step": s, "rms": 1.0 + s} for s in range(3) for m in ("conv", "head")]
      >>> figure = figures.plot(rows, "map", ["rms"], by="step")
      >>> [line.get_label() for line in figure.axes[0].lines]
      ['rms, step 0', 'rms, step 1', 'rms, step 2']
    """
    from matplotlib.figure import Figure

    fields = [(panel,) if isinstance(panel, str) else tuple(panel) for panel in panels]
    wanted = {x, *sum(fields, ())} | ({by} if by else set())
    if not (rows and fields and all(wanted <= row.keys() for row in rows)):
        raise ValueError(f"plot: not all rows have the fields {sorted(wanted)}, or there are none.")
    lines = dict.fromkeys(row[by] for row in rows) if by else {None: None}
    width = max(0.2 * len({row[x] for row in rows}), 4.5)
    figure = Figure((width * len(fields), 4), layout="constrained")
    for axes, names in zip(figure.subplots(1, len(fields), squeeze=False)[0], fields, strict=True):
        for place, (line, name) in enumerate(itertools.product(lines, names)):
            known = [r for r in rows if (not by or r[by] == line) and r[name] is not None]
            points = [row[x] for row in known], [row[name] for row in known]
            axes.plot(
                *points,
                linestyle=DASHES[place % len(DASHES)],
                marker=MARKERS[place % len(MARKERS)],
                markevery=max(len(known) // 10, 1),
                markersize=4,
                label=f"{name}, {by} {line}" if by else name,
            )
        axes.set_xlabel(x)
        axes.tick_params("x", rotation=90 if isinstance(rows[0][x], str) else 0)
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.legend(frameon=False, fontsize=8, handlelength=3.5)
    return figure


__all__ = ["plot"]
