"""Pictures of linear regions; matplotlib comes with the extra `benchmarks`."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from normjax.analysis.geometry.partition import Regions, inside

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "o^sDvPX*"


def plot_regions(
    panels: Regions | Mapping[str, Regions],
    samples: Any = None,
    classes: Any = None,
    *,
    project: bool = False,
    path: str | os.PathLike[str] | None = None,
) -> "Figure":
    """Draws partitions side by side, with samples on top.

    Boundaries have the color of their layer, and are thinner and lighter the deeper it is, so that
    they can be told apart in grey. If the output has several scores, a thick line is where the two
    largest are equal, and the shade tells which is the largest.

    Args:
      panels: regions, or several by title.
      samples: inputs [N, *shape] to show in every panel.
      classes: the class of each sample, integers [N]: its marker.
      project: show samples that are not in the plane at the nearest point of it.
      path: where to save the figure; the suffix says the format.

    Raises:
      ValueError: without any panel, for samples that are not in the plane or not in a window, and
        for another number of classes than of samples.

    Example:
      >>> import jax, normjax.analysis.geometry as geometry
      >>> f = lambda x: jax.nn.relu(x) - x[::-1]
      >>> panels = {"relu": geometry.regions_2d(f), "identity": geometry.regions_2d(lambda x: x)}
      >>> figure = geometry.plot_regions(panels, [[0.5, 0.2], [-0.1, 0.3]], [0, 1])
      >>> [axes.get_title() for axes in figure.axes[:2]]
      ['relu: 4 regions', 'identity: 1 region']
    """
    from matplotlib.figure import Figure

    named = {"": panels} if isinstance(panels, Regions) else dict(panels)
    if not named:
        raise ValueError("plot_regions: there are no panels: give regions, or several by title.")
    depth = max(1, *(len(regions.layers) for regions in named.values()))
    figure = Figure((4.6 * len(named) + 0.6, 4.6), dpi=150, layout="constrained")
    for axes, (title, regions) in zip(
        figure.subplots(1, len(named), squeeze=False)[0], named.items(), strict=True
    ):
        _draw_partition(axes, regions, depth)
        if samples is not None:
            _draw_samples(axes, inside("plot_regions", regions, samples, project), classes)
        count = f"{regions.count} region" + "s" * (regions.count != 1)
        axes.set_title(f"{title}: {count}" if title else count)
        axes.set(aspect="equal", xlim=regions.window[0], ylim=regions.window[1])
    mappable = _colors(depth)
    bar = figure.colorbar(mappable, ax=figure.axes, label="layer", shrink=0.8)
    bar.set_ticks(range(1, depth + 1) if depth <= 8 else [1, depth])
    if path is not None:
        figure.savefig(path)
    return figure


def _colors(depth):
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    colors = colormaps["viridis"](np.linspace(0, 0.8, depth))
    return ScalarMappable(BoundaryNorm(np.arange(depth + 1) + 0.5, depth), ListedColormap(colors))


def _draw_partition(axes, regions, depth):
    from matplotlib.collections import LineCollection, PolyCollection

    if np.prod(regions.maps.shape[1:-1]) > 1:
        polygons, winners = regions.classes()
        levels = 1 - 0.15 * winners / max(1, winners.max())
        shades = np.repeat(levels[:, None], 3, axis=1)
        style = {"facecolors": shades, "edgecolors": shades, "zorder": 0}
        axes.add_collection(PolyCollection(polygons, **style))
        for color, width in (("white", 4.5), ("black", 2.2)):
            style = {"colors": color, "linewidths": width, "zorder": 3}
            axes.add_collection(LineCollection(regions.decision(), **style))
    lines = regions.boundaries()
    for layer in np.unique(lines.layer)[::-1]:
        color = _colors(depth).to_rgba(layer + 1)
        width = 1.6 - 1.0 * layer / max(1, depth - 1)
        ends = lines.ends[lines.layer == layer]
        axes.add_collection(LineCollection(ends, colors=[color], linewidths=width, zorder=1))


def _draw_samples(axes, points, classes):
    classes = np.zeros(len(points), int) if classes is None else np.asarray(classes)
    if classes.shape != points.shape[:1]:
        raise ValueError(
            f"plot_regions: classes of shape {classes.shape} for {len(points)} samples: give one "
            "integer for each sample."
        )
    names = np.unique(classes)
    for i, name in enumerate(names):
        shade = str(1 - i / max(1, len(names) - 1))
        style = {"marker": MARKERS[i % len(MARKERS)], "facecolor": shade, "edgecolor": "black"}
        axes.scatter(*points[classes == name].T, s=22, linewidths=0.7, zorder=4, **style)
