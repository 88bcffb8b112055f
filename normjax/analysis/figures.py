"""What the plots of measurements share; matplotlib comes with the extra `benchmarks`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#333333")


def panels(
    rows: int, columns: int, size: tuple[float, float], *, titles: Sequence[str] = (), **grid: Any
) -> tuple["Figure", Any]:
    """A figure of `size` inches, width and height, and its panels [rows, columns].

    `titles` are those of the first panels, row by row; `grid` is what else `Figure.subplots` takes.

    Example:
      >>> from normjax.analysis import figures
      >>> figure, axes = figures.panels(1, 2, (6, 3), titles=("left", "right"), sharey=True)
      >>> axes[0, 1].get_title(loc="left")
      'right'
    """
    from matplotlib.figure import Figure

    figure = Figure(size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **grid)
    for panel in axes.flat:
        panel.grid(alpha=0.3, linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
    for panel, title in zip(axes.flat, titles, strict=False):
        panel.set_title(title, loc="left", fontsize=10)
    return figure, axes


__all__ = ["panels"]
