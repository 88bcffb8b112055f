"""How large the feature maps of a network are, and how their power is spread over frequencies.

`capture`, which is that of `normjax.analysis.layers`, runs any Flax model once and returns the
outputs of its modules and what they sow; `measure` reduces them to a few numbers per map; `table`
and `plot` show these over depth and over the steps of a training.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from normjax.analysis.layers import capture as capture
from normjax.core import checks
from normjax.core.passes import widen
from normjax.methods.spectral import transforms as spectra

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Measures(NamedTuple):
    """What `measure` says about one map x of shape [B, *spatial, C].

    All are float32, or float64 for a map of float64. The first four are scalars in the units of x;
    the last two have no unit, and are None without spatial axes and with more than three.

    Attributes:
      rms: root of the mean square of all values.
      norm: L2 norm of each sample, averaged over the batch.
      quantile: the value that 99.9 % of all |x| do not exceed (linearly interpolated).
      maximum: largest |x|.
      flatness: geometric over arithmetic mean of the power spectrum, between 0 (a single frequency)
        and 1 (all frequencies alike); https://doi.org/10.1109/TASSP.1974.1162572. Taken over all
        frequencies of the plane but zero, of powers averaged over the batch; then averaged over
        the channels that vary, and 0 if none does.
      shares: [bands], the share of the energy in each band of frequencies, with sum 1 (0 if x is
        zero). Band 0 is the zero frequency, the mean of a map. The others are rings of equal width
        up to the largest |k|, half a cycle per position along every spatial axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from normjax.analysis import spectra
      >>> ones = spectra.measure({"ones": jnp.ones((2, 4, 4, 3))})["ones"]
      >>> [round(float(value), 3) for value in ones[:5]]
      [1.0, 6.928, 1.0, 1.0, 0.0]
      >>> ones.shares.tolist()
      [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """

    rms: jax.Array
    norm: jax.Array
    quantile: jax.Array
    maximum: jax.Array
    flatness: jax.Array | None
    shares: jax.Array | None


def measure(
    maps: Mapping[str, jax.Array], *, bands: int = 8, with_mean: bool = False
) -> OrderedDict[str, Measures]:
    """A few numbers for each map, such as those that `capture` returns.

    They show what https://arxiv.org/abs/2306.16999 is about: feature maps that are large at
    initialization and in training, in four measures of size, and how uniform their frequencies
    are.

    Args:
      maps: real floating arrays [B, ..., C] of rank 2 and more. Up to three axes between the first
        and the last are spatial.
      bands: number of bands of frequencies: the zero frequency and `bands - 1` rings.
      with_mean: let the zero frequency, the mean of a map, count in the flatness.

    Returns:
      `Measures` by name, in the order of `maps`.

    Raises:
      TypeError: if `maps` is no dict, and for a map that is not real and floating.
      ValueError: for a map of rank 0 or 1 or without values, and if `bands` is no positive integer.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from normjax.analysis import spectra
      >>> model = nnx.Sequential(nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0)), nnx.relu)
      >>> @nnx.jit
      ... def measured(model, x):
      ...     return spectra.measure(spectra.capture(model, x), bands=4)
      >>> x = jax.random.normal(jax.random.key(0), (16, 8, 8, 3))
      >>> for name, found in measured(model, x).items():
      ...     print(name, found.rms.shape, found.shares.shape)
      layers/0 () (4,)
      __call__ () (4,)
    """
    if not isinstance(maps, Mapping):
        raise TypeError(f"measure: maps is {type(maps).__name__}, not a dict of arrays by name.")
    broken = checks.RULES["bands"](bands)
    if broken:
        raise ValueError(f"measure: bands={bands!r} {broken}.")
    return OrderedDict((name, _measure(name, maps[name], bands, with_mean)) for name in maps)


def _measure(name, x, bands, with_mean):
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"measure: {name!r} has dtype {x.dtype}, which is not real and floating.")
    if x.ndim < 2 or not x.size:
        raise ValueError(
            f"measure: {name!r} has shape {x.shape}, but a map is [B, ..., C] with a value or more."
        )
    x = widen(x)
    maximum = jnp.max(jnp.abs(x))
    scale = jnp.where(maximum == 0, 1, maximum)
    z = x / scale  # squares neither overflow nor vanish
    norms = jnp.sqrt(jnp.sum(jnp.square(z), range(1, z.ndim)))
    return Measures(
        rms=scale * jnp.sqrt(jnp.mean(jnp.square(z))),
        norm=scale * jnp.mean(norms),
        quantile=scale * jnp.quantile(jnp.abs(z), 0.999),
        maximum=maximum,
        **_spectral(z, bands, with_mean),
    )


def _spectral(z, bands, with_mean):
    sizes = z.shape[1:-1]
    if not 1 <= len(sizes) <= 3:
        return {"flatness": None, "shares": None}
    spectrum = jnp.fft.rfftn(z, axes=range(1, z.ndim - 1), norm="ortho")
    power = jnp.mean(jnp.square(spectrum.real) + jnp.square(spectrum.imag), 0)
    power = power.reshape(-1, z.shape[-1])  # [stored frequencies, C]
    ring = spectra.bands(sizes, bands)
    weights = np.broadcast_to(spectra.stored_weights(sizes[-1]), ring.shape).ravel()
    weights = jnp.asarray(weights, z.dtype)[:, None]
    energy = jax.ops.segment_sum(jnp.sum(weights * power, 1), ring.ravel(), bands)
    total = jnp.sum(energy)
    whole = jnp.sum(weights * power, 0)
    if not with_mean:
        weights, power = weights[1:], power[1:]
    positions = max(math.prod(sizes) - (not with_mean), 1)
    mean = jnp.sum(weights * power, 0) / positions
    logarithm = jnp.sum(weights * jnp.log(power), 0) / positions
    still = mean * positions <= 64 * jnp.finfo(z.dtype).eps ** 2 * whole  # but for rounding
    flatness = jnp.where(still, 0, jnp.exp(logarithm) / jnp.where(still, 1, mean))
    return {
        "flatness": jnp.sum(flatness) / jnp.maximum(jnp.sum(~still), 1),
        "shares": energy / jnp.where(total == 0, 1, total),
    }


def table(history: Mapping[int, Mapping[str, Measures]]) -> list[dict[str, Any]]:
    """The measures of some steps as rows, for `csv.DictWriter` or `pandas.DataFrame`.

    Args:
      history: by step, what `measure` returned at that step.

    Returns:
      One row per step and map: "step", "depth" (the place of the map, from 0), "map" (its name),
      the measures that are one number, and "share_0", "share_1" and so on. Numbers are Python's;
      None stands for what a map without spatial axes does not have.

    Raises:
      ValueError: if `history` is empty, or its steps differ in maps or bands.

    Example:
      >>> import jax.numpy as jnp
      >>> from normjax.analysis import spectra
      >>> history = {}
      >>> for step in range(3):
      ...     history[step] = spectra.measure({"logits": jnp.full((8, 10), 2.0**step)})
      >>> [(row["step"], row["map"], row["rms"]) for row in spectra.table(history)]
      [(0, 'logits', 1.0), (1, 'logits', 2.0), (2, 'logits', 4.0)]
    """
    kinds = [
        [(name, jax.tree.map(np.shape, found)) for name, found in measured.items()]
        for measured in history.values()
    ]
    if not kinds or not kinds[0]:
        raise ValueError("table: the history holds no maps.")
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError("table: the steps of the history differ in their maps or bands.")
    bands = max((kind.shares[0] for _, kind in kinds[0] if kind.shares), default=0)
    rows = []
    for step, measured in history.items():
        for depth, (name, found) in enumerate(measured.items()):
            *numbers, shares = jax.device_get(found)
            numbers = [None if number is None else number.item() for number in numbers]
            shares = [None] * bands if shares is None else shares.tolist()
            rows.append(
                {"step": step, "depth": depth, "map": name}
                | dict(zip(Measures._fields[:-1], numbers, strict=True))
                | {f"share_{band}": share for band, share in enumerate(shares)}
            )
    return rows


LABELS = {
    "rms": "RMS",
    "norm": "L2 norm\nper sample",
    "quantile": "99.9 % of |x|\nare below",
    "maximum": "largest |x|",
    "flatness": "spectral\nflatness",
    "shares": "share of energy",
}


def plot(
    history: Mapping[int, Mapping[str, Measures]],
    *,
    maps: Sequence[str] | None = None,
    measures: Sequence[str] = Measures._fields,
) -> "Figure":
    """Draws the measures over depth, and over steps if there are several.

    Over depth up to five of the steps are drawn, the first and the last among them; shares of
    energy at the last. Over steps there is a line per map; shares are averaged over the maps.

    Args:
      history: by step, what `measure` returned at that step.
      maps: names of the maps to draw; None: all.
      measures: fields of `Measures`, a row of panels each.

    Returns:
      A figure of matplotlib (which the extra `benchmarks` installs): `figure.savefig("maps.png")`.

    Raises:
      ValueError: as `table`, and for a name in `maps` or `measures` that does not exist.

    Example:
      >>> import jax.numpy as jnp
      >>> from normjax.analysis import spectra
      >>> maps = {"conv": jnp.ones((2, 4, 4, 3)), "logits": jnp.ones((2, 10))}
      >>> figure = spectra.plot({0: spectra.measure(maps)}, measures=("rms", "shares"))
      >>> [panel.get_ylabel() for panel in figure.axes]
      ['RMS', 'share of energy']
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    rows, steps = table(history), list(history)
    known = [row["map"] for row in rows[: len(rows) // len(steps)]]
    shown = [name for name in known if maps is None or name in maps]
    unknown = [*(set(maps or ()) - set(known)), *(set(measures) - set(LABELS))]
    if unknown or not shown or not measures:
        raise ValueError(
            f"plot: maps={maps!r} and measures={measures!r} name none, or others than "
            f"{known} and {[*LABELS]}."
        )

    def values(field):
        cells = [row[field] for row in rows if row["map"] in shown]
        return np.array(cells, float).reshape(len(steps), len(shown))

    columns = min(len(steps), 2)
    width = max(3 + 0.2 * len(shown), 6)
    figure = Figure((width + 7 * (columns - 1), 1.8 * len(measures) + 1.5), layout="constrained")
    panels = figure.subplots(
        len(measures),
        columns,
        squeeze=False,
        sharex="col",
        sharey="row",
        width_ratios=(width, 5)[:columns],
    )
    some = np.unique(np.linspace(0, len(steps) - 1, 5).round().astype(int))
    step_colors = colormaps["viridis"](np.linspace(0.8, 0, len(some)))
    map_colors = colormaps["plasma"](np.linspace(0, 0.85, len(shown)))
    for field, row in zip(measures, panels, strict=True):
        row[0].set_ylabel(LABELS[field])
        for axes in row:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.3, linewidth=0.5)
        if field == "shares":
            shares = [values(key) for key in rows[0] if key.startswith("share_")]
            if shares:
                _draw_shares(row, steps, np.array(shares))
            continue
        _draw_lines(row, steps, some, values(field), (step_colors, map_colors))
        if field != "flatness" and (values(field) > 0).any():
            row[0].set_yscale("log")
            row[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            row[0].yaxis.set_major_formatter("{x:g}")
            row[0].yaxis.set_minor_formatter("")
    lines = panels[[field != "shares" for field in measures]]
    _label(panels, lines, shown, map_colors)
    return figure


def _draw_lines(row, steps, some, value, colors):
    """Draws [steps, maps]: `some` steps over the maps, then every map over the steps."""
    step_colors, map_colors = colors
    for i, color in zip(some, step_colors, strict=True):
        row[0].plot(value[i], "o-", color=color, markersize=3, label=f"step {steps[i]}")
    for axes in row[1:]:
        for line, color in zip(value.T, map_colors, strict=True):
            axes.plot(steps, line, color=color, linewidth=1)


def _label(panels, lines, shown, map_colors):
    """Names the maps under the last row, and tells on the first row of lines what they are."""
    panels[-1, 0].set_xticks(range(len(shown)), shown, rotation=90, fontsize=8)
    for axes in lines[:1, 0]:
        steps = len(axes.get_lines())
        axes.legend(ncols=steps, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    for axes in lines[:1, 1:].flat:
        axes.set_title("a line per map, in the color of its name", fontsize=10)
    for axes in panels[-1, 1:]:
        axes.set_xlabel("step")
        for label, color in zip(panels[-1, 0].get_xticklabels(), map_colors, strict=True):
            label.set_color(color)


def _draw_shares(row, steps, shares):
    """Draws shares [bands, steps, maps], those of the last step, and averaged over the maps."""
    from matplotlib import colormaps

    colors = colormaps["cividis"](np.linspace(0, 1, len(shares)))
    rings = max(len(shares) - 1, 1)
    below = np.cumsum(shares, 0) - shares
    for band, color in enumerate(colors):
        label = f"\u2264 {band / rings:.2f}" if band else "0 (mean)"
        at = range(shares.shape[-1])
        row[0].bar(at, shares[band, -1], 0.9, below[band, -1], color=color, label=label)
    row[0].set(ylim=(0, 1))
    row[0].set_title(f"step {steps[-1]}", loc="right", fontsize=8)
    for axes in row[1:]:
        spatial = ~np.isnan(shares).all((0, 1))
        axes.stackplot(steps, shares[:, :, spatial].sum(2) / max(spatial.sum(), 1), colors=colors)
        axes.set_title("mean over the maps", loc="right", fontsize=8)
    row[-1].legend(
        *row[0].get_legend_handles_labels(),
        title="|k| / largest",
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        reverse=True,
        fontsize=8,
    )


__all__ = ["Measures", "capture", "measure", "plot", "table"]
