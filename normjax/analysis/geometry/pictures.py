"""Pictures of distances and of jitter; matplotlib comes with the extra `benchmarks`."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax import lax

from normjax.analysis.geometry.boundaries import layers
from normjax.analysis.geometry.jitter import require_norms, require_sizes
from normjax.analysis.geometry.margins import require_logits
from normjax.analysis.geometry.networks import Network
from normjax.core import checks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLES = ("-", "--", ":", "-.")
SHADES = ("0.0", "0.35", "0.6")
MARKERS = "o^sDvPX*"


def plot_distances(
    groups: Mapping[str, Mapping[str, Any]],
    *,
    unit: float | Mapping[str, float] = 1.0,
    path: str | os.PathLike[str] | None = None,
) -> "Figure":
    """Draws the distribution of distances, a panel for each layer and a line for each network.

    A line is the share of the distances below a value, on a logarithmic axis; what is infinite or
    zero counts, and is off the picture. The dot is the median.

    Args:
      groups: by the name of the network the arrays of its layers, such as `distances` returns; all
        have the same layers.
      unit: what to measure distances in, such as the deviation of the data; of all networks, or by
        name.
      path: where to save the figure; the suffix says the format.

    Raises:
      ValueError: without a network, and for networks with different layers.

    Example:
      >>> import numpy as np
      >>> from normjax.analysis import geometry
      >>> rng = np.random.default_rng(0)
      >>> groups = {"near": {"relu_0": rng.random(50)}, "far": {"relu_0": 9 * rng.random(50)}}
      >>> figure = geometry.plot_distances(groups)
      >>> [line.get_label() for line in figure.axes[0].lines[::2]]
      ['near', 'far']
    """
    from matplotlib.figure import Figure

    names = [[*group] for group in groups.values()]
    if not names or not names[0] or any(own != names[0] for own in names):
        raise ValueError(f"plot_distances: layers are {names}: give the same ones of each network.")
    figure = Figure((4 * len(names[0]) + 0.5, 3.4), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(names[0]), squeeze=False, sharey=True)[0]
    for axes, layer in zip(panels, names[0], strict=True):
        for i, (name, group) in enumerate(groups.items()):
            scale = unit[name] if isinstance(unit, Mapping) else unit
            values = np.sort(np.ravel(np.asarray(group[layer], float))) / scale
            share = np.arange(1, len(values) + 1) / len(values)
            seen = np.isfinite(values) & (values > 0)
            color, style = SHADES[i % len(SHADES)], STYLES[i % len(STYLES)]
            axes.semilogx(values[seen], share[seen], style, color=color, label=name, lw=1.6)
            middle = np.median(values)
            axes.plot(*([[a] if middle > 0 else [] for a in (middle, 0.5)]), "o", color=color, ms=4)
        axes.set_title(layer, loc="left", fontsize=10)
        axes.set_xlabel("distance")
        axes.grid(alpha=0.3, linewidth=0.5)
    panels[0].set_ylabel("share of the distances")
    panels[0].legend(frameon=False, fontsize=8)
    if path is not None:
        figure.savefig(path)
    return figure


def plot_jitter(
    model: linen.Module | nnx.Module,
    *args: Any,
    batch_sizes: Sequence[int],
    key: jax.Array,
    draws: int = 24,
    labels: Any = None,
    margin: float = 0.3,
    resolution: int = 81,
    path: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> "Figure":
    """Draws the boundaries of a classifier of points in a plane, for many mini-batches at once.

    A row for each batch size: a panel for the units of each layer, and one for the decision
    boundary. Each thin line is that of one mini-batch, whose statistics all norms have; the thick
    lines have those of all samples, which are the dots. Lines are found on a grid.

    Args:
      model, *args, key, **kwargs: as of `jitter`, with samples f[N, 2], and logits as the output.
      batch_sizes: the sizes of the mini-batches.
      draws: how many mini-batches of each size.
      labels: the class of each sample, int[N]: its marker.
      margin: how far the picture goes beyond the samples, as a share of their range.
      resolution: points of the grid along each axis.
      path: where to save the figure; the suffix says the format.

    Raises:
      TypeError, ValueError: as `jitter` and `distances`, and for samples that are not [N, 2].

    Example:
      >>> import jax, flax.linen as nn, normjax.linen
      >>> from normjax.analysis import geometry
      >>> norm = normjax.linen.BatchNorm(use_running_average=True)
      >>> model = nn.Sequential([nn.Dense(3), norm, nn.relu, nn.Dense(2)])
      >>> x = jax.random.normal(jax.random.key(0), (64, 2))
      >>> how = dict(batch_sizes=[8, 32], draws=2, resolution=9, key=jax.random.key(1))
      >>> figure = geometry.plot_jitter(model, model.init(jax.random.key(2), x), x, **how)
      >>> [axes.get_title(loc="left") for axes in figure.axes]
      ['relu_0, batch 8', 'decision, batch 8', 'relu_0, batch 32', 'decision, batch 32']
    """
    from matplotlib.figure import Figure

    network = Network.of("plot_jitter", model, args, kwargs)
    kinds = _checked(network, batch_sizes, draws, resolution, labels)
    grid = _grid(np.asarray(network.x, float), margin, resolution)
    found = [_values(network, grid, size, draws, key) for size in batch_sizes]
    columns = [*found[0][1]]
    figure = Figure((3.2 * len(columns), 3.2 * len(found)), dpi=150, layout="constrained")
    shape = len(found), len(columns)
    panels = figure.subplots(*shape, squeeze=False, sharex=True, sharey=True)
    for row, batch_size, of_size in zip(panels, batch_sizes, found, strict=True):
        for axes, name in zip(row, columns, strict=True):
            _draw(axes, grid, *(of_panels[name] for of_panels in of_size))
            _scatter(axes, np.asarray(network.x), kinds)
            axes.set_title(f"{name}, batch {batch_size}", loc="left", fontsize=9)
    if path is not None:
        figure.savefig(path)
    return figure


def _checked(network, batch_sizes, draws, resolution, labels):
    """The classes of the samples, after the checks of the arguments."""
    if not len(batch_sizes):
        raise ValueError("plot_jitter: batch_sizes are none: give the sizes of the mini-batches.")
    for size in batch_sizes:
        require_sizes("plot_jitter", network.x, size, max(draws, 2))
    for name, value in (("draws", draws), ("resolution", resolution)):
        checks.require("plot_jitter", name, value, checks.positive)
    require_norms("plot_jitter", network)
    require_logits("plot_jitter", network)
    shape = network.x.shape
    if shape[1:] != (2,) or (labels is not None and np.shape(labels) != shape[:1]):
        raise ValueError(
            f"plot_jitter: samples of shape {shape} and labels of shape {np.shape(labels)}, but "
            "they are points of a plane, [N, 2] and [N]."
        )
    return np.zeros(len(network.x), int) if labels is None else np.asarray(labels)


def _grid(points, margin, resolution):
    low, high = points.min(0), points.max(0)
    reach = margin * (high - low)
    return np.stack(np.meshgrid(*np.linspace(low - reach, high + reach, resolution).T))


def _values(network, grid, batch_size, draws, key):
    """What is zero on boundaries, [draws, surfaces, ...grid] by panel, and with all samples."""
    at = jnp.asarray(grid.reshape(2, -1).T, network.x.dtype)

    def surfaces(variables):
        found = layers(network, variables, "plot_jitter")(at)
        logits = network.run(variables, at)
        others = jnp.where(jnp.eye(logits.shape[1], dtype=bool)[None], -jnp.inf, logits[:, None])
        gaps = logits - jnp.max(others, 2)
        found["decision"] = gaps[:, :1] if logits.shape[1] == 2 else gaps
        shape = -1, *grid.shape[1:]
        return jax.tree.map(lambda u: u.reshape(len(at), -1).T.reshape(shape), found)

    def run(x, key):
        order = lambda key: jax.random.permutation(key, len(x))[:batch_size]
        one = lambda key: surfaces(network.observed(x[order(key)]))
        return lax.map(one, jax.random.split(key, draws)), surfaces(network.observed(x))

    return jax.device_get(jax.jit(run)(network.x, key))


def _draw(axes, grid, drawn, whole):
    for surfaces, width, color in (
        *((batch, 0.4, "0.55") for batch in drawn),
        (whole, 1.4, "0.0"),
    ):
        for surface in surfaces:
            if surface.min() < 0 < surface.max():
                axes.contour(*grid, surface, levels=[0], linewidths=width, colors=[color])


def _scatter(axes, points, kinds):
    for kind in np.unique(kinds):
        own, marker = points[kinds == kind], MARKERS[int(kind) % len(MARKERS)]
        axes.plot(*own.T, marker, color=SHADES[int(kind) % 3], ms=2, alpha=0.5)


__all__ = ["plot_distances", "plot_jitter"]
