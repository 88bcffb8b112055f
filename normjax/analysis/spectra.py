"""How large the feature maps of a network are, and how their power is spread over frequencies.

`capture`, that of `normjax.analysis.layers`, returns the maps of a Flax model; `measure` reduces
each to a few numbers; `table` lists these over depth and steps, as `figures.plot` draws them.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from normjax.analysis.layers import capture as capture
from normjax.core import checks
from normjax.core.passes import widen
from normjax.methods.spectral.bands import rings
from normjax.methods.spectral.transforms import stored_weights


class Measures(NamedTuple):
    """What `measure` says about one map x of shape [B, *spatial, C], in at least float32.

    The first four are in the units of x; the last two have none, and are None without spatial axes
    and with more than three.

    `flatness` is the geometric over the arithmetic mean of the power spectrum, from 0 (a single
    frequency) to 1 (all alike), https://doi.org/10.1109/TASSP.1974.1162572: over all frequencies
    but zero, of powers averaged over the batch; averaged over the channels that vary, 0 if none
    does. Band 0 of `shares` is the zero frequency, the mean of a map; the others are rings of equal
    width up to the largest |k|, half a cycle per position along every spatial axis.

    Example:
      >>> import jax.numpy as jnp, normjax.analysis.spectra as spectra
      >>> spectra.measure({"x": jnp.ones((2, 4, 4, 3))}, bands=3)["x"].shares.tolist()
      [1.0, 0.0, 0.0]
    """

    rms: jax.Array  # root of the mean square of all values
    norm: jax.Array  # L2 norm of a sample, averaged over the batch
    quantile: jax.Array  # 99.9 % quantile of |x|, linearly interpolated
    maximum: jax.Array  # largest |x|
    flatness: jax.Array | None  # how uniform the frequencies are
    shares: jax.Array | None  # [bands], of the energy, with sum 1 (0 if x is zero)


def measure(
    maps: Mapping[str, jax.Array], *, bands: int = 8, with_mean: bool = False
) -> OrderedDict[str, Measures]:
    """A few numbers for each map, such as those that `capture` returns.

    They show what https://arxiv.org/abs/2306.16999 is about: how large feature maps are, and how
    uniform their frequencies. Maps are real arrays [B, ..., C], not empty (else TypeError or
    ValueError); up to three axes between the first and the last are spatial. There are the zero
    frequency and `bands - 1` rings; the former counts in the flatness if `with_mean`.

    Example:
      >>> import jax.numpy as jnp, normjax.analysis.spectra as spectra
      >>> from flax import nnx
      >>> model = nnx.Sequential(nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0)), nnx.relu)
      >>> run = nnx.jit(lambda model, x: spectra.measure(spectra.capture(model, x)))
      >>> list(run(model, jnp.ones((2, 8, 8, 3))))
      ['layers/0', '__call__']
    """
    if not isinstance(maps, Mapping):
        raise TypeError(f"measure: maps is {type(maps).__name__}, not a dict of arrays by name.")
    checks.require("measure", "bands", bands, checks.positive)
    return OrderedDict((name, _measure(name, maps[name], bands, with_mean)) for name in maps)


def _measure(name, x, bands, with_mean):
    x = widen(checks.as_real(f"measure: {name!r}", x))
    if x.ndim < 2 or not x.size:
        raise ValueError(
            f"measure: {name!r} has shape {x.shape}, but a map is [B, ..., C] and not empty."
        )
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
    ring = rings(sizes, bands)
    weights = np.broadcast_to(stored_weights(sizes[-1]), ring.shape).ravel()
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
    """What `measure` returned, by step, as rows for `csv.DictWriter` or `pandas.DataFrame`.

    A row per step and map: "step", "depth" (the place of the map, from 0), "map", the measures that
    are one number, "share_0", "share_1" and so on; None for what a map does not have. ValueError
    for an empty history, or steps that differ in maps or bands.

    Example:
      >>> import jax.numpy as jnp, normjax.analysis.spectra as spectra
      >>> history = {i: spectra.measure({"x": jnp.full((8, 10), 2.0**i)}) for i in range(3)}
      >>> [(row["step"], row["map"], row["rms"]) for row in spectra.table(history)]
      [(0, 'x', 1.0), (1, 'x', 2.0), (2, 'x', 4.0)]
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
            row = {"step": step, "depth": depth, "map": name}
            for field, value in jax.device_get(found)._asdict().items():
                row[field] = None if value is None else value.tolist()
            shares = row.pop("shares") or [None] * bands
            rows.append(row | {f"share_{band}": share for band, share in enumerate(shares)})
    return rows


__all__ = ["Measures", "capture", "measure", "table"]
