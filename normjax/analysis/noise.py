"""The noise that statistics of a few samples bring into a network, measured and from theory.

Kosson, Fan & Jaggi, *Ghost Noise for Regularizing Deep Neural Networks*, 2024,
https://arxiv.org/abs/2305.17205. A ghost is a handful of samples whose statistics stand for those
of the batch. Everything is in deviations of what ghosts are compared with, and hence the same
before and after a normalization and its affine map. Channels that do not vary get NaN. Maps are
real arrays [B, ..., C]; another rank or an empty map is a ValueError, another dtype a TypeError.
"""

import functools
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.scipy.special import betaln, digamma, gammaln

from normjax.core import checks, passes
from normjax.core.statistics import Moments, merge
from normjax.methods.ghost_noise import expected_inverse, ghost_sums, shift_and_scale

Drawing = Literal["replacement", "partition"]


class Ghosts(NamedTuple):
    """Statistics of R ghosts, f[R, C] in at least float32, in units of what they are drawn from.

    Example:
      >>> import jax, normjax.analysis.noise as noise
      >>> noise.draw(jax.random.key(0), jax.numpy.eye(3), 2, ghosts=100).shift.shape
      (100, 3)
    """

    shift: jax.Array  # mean of the ghost less that of the whole, in deviations of the whole
    scale: jax.Array  # deviation of the ghost over that of the whole


def draw(
    key: jax.Array, x: jax.Array, size: int, *, ghosts: int = 1024, drawing: Drawing = "replacement"
) -> Ghosts:
    """Draws `ghosts` independent ghosts of `size` samples from a batch of features [B, ..., C].

    With replacement, as in `normjax.GhostNoise`, or by "partition", without it, as when ghost batch
    norm divides a shuffled batch. ValueError for an argument outside its range, or a ghost larger
    than the batch that it is a part of.

    Example:
      >>> import jax, normjax.analysis.noise as noise
      >>> x = jax.random.normal(jax.random.key(0), (1024, 1))
      >>> shift, scale = noise.draw(jax.random.key(1), x, 16, ghosts=20_000)
      >>> round(16 * float(shift.var()), 1)
      1.0
    """
    own, whole = _moments("draw", x)
    _check("draw", len(own.mean), drawing, size=size, ghosts=ghosts)
    return _ghosts(own, whole, _indices(key, len(own.mean), size, ghosts, drawing))


@functools.partial(jax.jit, static_argnums=0)
def _moments(name, x):
    """Moments [B, C] of every sample and [C] of all."""
    x = checks.as_real(name, x)
    if x.ndim < 2 or not x.size:
        raise ValueError(
            f"{name}: the input has shape {x.shape}, but features are [B, ..., C] and not empty."
        )
    own = passes.moments(x, tuple(range(1, x.ndim - 1)))
    own = Moments(*(a.reshape(len(x), x.shape[-1]) for a in own))
    return own, merge(own)


def _check(name, samples, drawing, **sizes):
    for field, value in sizes.items():
        checks.require(name, field, value, checks.positive)
    checks.require(name, "drawing", drawing, checks.one_of("replacement", "partition"))
    if drawing == "partition" and sizes["size"] > samples:
        raise ValueError(
            f"{name}: size={sizes['size']} with drawing='partition' is more than the {samples} "
            "samples that there are."
        )


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _indices(key, samples, size, ghosts, drawing):
    if drawing == "replacement":
        return jax.random.randint(key, (ghosts, size), 0, samples)
    order = jnp.tile(jnp.arange(samples), (ghosts, 1))
    return jax.random.permutation(key, order, axis=1, independent=True)[:, :size]


@jax.jit
def _ghosts(own, whole, indices):
    """The ghosts of samples `indices` [R, N], in units of `whole`."""
    gap = own.mean - whole.mean[None]
    sums = [own.count, own.count * gap, own.count * (own.var + jnp.square(gap))]
    totals = ghost_sums(jnp.stack(sums, 1), lambda k: indices[:, k], indices.shape[1])
    count, first, second = (totals[:, i] for i in range(3))
    var = whole.var[None]
    shift, scale = shift_and_scale(count, first, second, var, 0.0)
    return Ghosts(shift / jnp.sqrt(var), scale)


class Law(NamedTuple):
    """What theory says of ghosts of N samples of dense Gaussian features; see `law`.

    Example:
      >>> from normjax.analysis import noise
      >>> [round(float(noise.law(n).inverse_scale), 2) for n in (4, 8, 16, 32)]
      [1.6, 1.2, 1.09, 1.04]
    """

    shift_var: jax.Array  # variance of the shift, whose mean is zero
    scale_square: jax.Array  # expectation of the squared scale
    scale_mean: jax.Array  # expectation of the scale
    scale_var: jax.Array  # variance of the scale
    inverse_scale: jax.Array  # expectation of 1 / scale, by which features grow; inf for N = 2
    log_var: jax.Array  # expectation of the logarithm of the squared scale


def law(size: float | jax.Array, batch: float | jax.Array | None = None) -> Law:
    """Moments of shift and scale of ghosts of dense Gaussian features, in closed form.

    With replacement, from a large batch, the shift is Normal(0, 1/N) and the squared scale
    chi-squared with N - 1 degrees of freedom over N. Without replacement from a `batch` of B > 2,
    the variance of the shift has the factor of a finite population, (B - N) / (B - 1), and the
    squared scale is B / N times a Beta((N - 1) / 2, (B - N) / 2) number: sums of squares within the
    ghost over those of all. Both noises end at N = B. `size` is N > 1 or an effective size, and may
    be an array.

    Example:
      >>> from normjax.analysis import noise
      >>> float(noise.law(16).shift_var), float(noise.law(128, batch=128).shift_var)
      (0.0625, 0.0)
    """
    n = jnp.asarray(size, jnp.result_type(float))
    shift_var, (spread, inverse, log_var) = 1 / n, _of_scale(n)
    if batch is not None:
        b = jnp.asarray(batch, n.dtype)
        of_all = _of_scale(b)
        shift_var, spread = (b - n) / (b - 1) / n, spread - of_all[0]
        inverse, log_var = inverse / of_all[1], log_var - of_all[2]
    scale_square = 1 - shift_var
    return Law(
        shift_var=shift_var,
        scale_square=scale_square,
        scale_mean=jnp.sqrt(scale_square * jnp.exp(-spread)),
        scale_var=-scale_square * jnp.expm1(-spread),
        inverse_scale=jnp.where(n > 2, inverse, jnp.inf),
        log_var=log_var,
    )


def _of_scale(n):
    """For t chi-squared over n: log(E t / (E sqrt t)^2), to rounding, E 1 / sqrt t and E log t."""
    a = (n - 1) / 2
    spread = jnp.log(a) + 2 * (betaln(a, 0.5) - gammaln(0.5))
    spread = jnp.where(a < 8, spread, 1 / (4 * a) - 1 / (96 * a**3) + 1 / (320 * a**5))
    return spread, expected_inverse(1 / n, 1), digamma(a) - jnp.log(n / 2)


def effective_size(x: jax.Array, size: float) -> jax.Array:
    """Samples of dense features that a ghost of `size` samples is worth, by its shift.

    `size * var / between`, f[C], where `between` is the variance over the samples of `x`,
    [B, ..., C], of their means over positions: the shift of a ghost drawn with replacement has the
    variance 1 / effective size, exactly, for any features. If a share s of their variance lies
    between samples, and the rest is independent over P positions, it is size / (s + (1 - s) / P).

    Example:
      >>> import jax, normjax.analysis.noise as noise
      >>> x = jax.random.normal(jax.random.key(0), (5000, 4, 4, 1))
      >>> round(float(noise.effective_size(x, 2)[0]))
      32
    """
    own, whole = _moments("effective_size", x)
    return size / (jnp.mean(jnp.square(own.mean - whole.mean[None]), 0) / whole.var)


def double_noise(
    key: jax.Array,
    x: jax.Array,
    batch: int,
    size: int,
    *,
    ghosts: int = 1024,
    drawing: Drawing = "partition",
) -> tuple[Ghosts, Ghosts, Ghosts]:
    """Draws batches of a population [P, ..., C], with replacement, and a ghost from each as `draw`.

    Returns the noise of batch norm, batches in units of the population; what ghost noise adds,
    ghosts in units of their batches; and the total, ghosts in units of the population. So
    `total.shift = batch.shift + batch.scale * ghost.shift` and `total.scale = batch.scale *
    ghost.scale`. For dense features the variance of the shift is 1/B for the batch, and in total
    1/N with "partition" (ghost batch norm), 1/B + (1 - 1/B) / N with "replacement" (ghost noise
    behind batch norm).

    Example:
      >>> import jax, normjax.analysis.noise as noise
      >>> x = jax.random.normal(jax.random.key(0), (4096, 1))
      >>> batch, _, total = noise.double_noise(jax.random.key(1), x, 32, 8, ghosts=20_000)
      >>> round(1 / float(batch.shift.var())), round(1 / float(total.shift.var()))
      (32, 8)
    """
    own, whole = _moments("double_noise", x)
    _check("double_noise", batch, drawing, batch=batch, size=size, ghosts=ghosts)
    first, second = jax.random.split(key)
    chosen = jax.random.randint(first, (ghosts, batch), 0, len(own.mean))
    inner = chosen[:, :size]  # independent draws: any N of them are a part of a shuffled batch
    if drawing == "replacement":
        picked = jax.random.randint(second, (ghosts, size), 0, batch)
        inner = jnp.take_along_axis(chosen, picked, 1)
    outer, total = _ghosts(own, whole, chosen), _ghosts(own, whole, inner)
    ghost = Ghosts((total.shift - outer.shift) / outer.scale, total.scale / outer.scale)
    return outer, ghost, total


class Gap(NamedTuple):
    """How statistics of training differ from running ones, f[G, C] for G parts of a batch.

    Example:
      >>> import jax.numpy as jnp, normjax.analysis.noise as noise
      >>> statistics = {"norm": {"mean": jnp.ones(1), "var": 4 * jnp.ones(1)}}
      >>> noise.gaps({"norm": jnp.array([[1.0], [3.0]])}, statistics)["norm"].mean.tolist()
      [[0.5]]
    """

    mean: jax.Array  # mean of the part less running mean, in running deviations
    log_var: jax.Array  # logarithm of the variance of the part over the running variance


def gaps(
    inputs: Mapping[str, jax.Array], statistics: Mapping[str, Any], *, size: int | None = None
) -> OrderedDict[str, Gap]:
    """Compares the statistics that norms of a Flax model train with with their running ones.

    The former are those of the G = B / size consecutive ghosts of an input, or with None of all of
    it. The logarithm of the variance of a ghost is low on average, by `law(N).log_var` for dense
    Gaussian features. `inputs` is what `normjax.analysis.layers.capture_inputs` returns, the model
    in training mode, of which first calls count. `statistics` is the collection "batch_stats" of a
    Linen model, or of an NNX model `nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))`. ValueError
    if no norm has an input and a `mean` and `var` of its own, if these are of other features, and
    for a size that does not divide the batch.

    Example:
      >>> import jax, jax.numpy as jnp, normjax.analysis.noise as noise
      >>> inputs = {"norm": jax.random.normal(jax.random.key(0), (32, 5))}
      >>> statistics = {"norm": {"mean": jnp.zeros(5), "var": jnp.ones(5)}}
      >>> noise.gaps(inputs, statistics, size=8)["norm"].mean.shape
      (4, 5)
    """
    flat: Any = traverse_util.flatten_dict(statistics)
    running = {
        "/".join(map(str, path)): (flat[*path, "mean"], flat[*path, "var"])
        for *path, name in flat
        if name == "mean" and (*path, "var") in flat
    }
    both = [name for name in inputs if name in running]
    if not both:
        raise ValueError(
            f"gaps: the inputs {[*inputs]} and the running statistics of {[*running]} have no norm "
            "in common; both come from one model, whose norms have `mean` and `var` themselves."
        )
    return OrderedDict((name, _gap(inputs[name], *running[name], size)) for name in both)


def _gap(x, mean, var, size):
    own, _ = _moments("gaps", x)
    mean, var = (jnp.asarray(a, own.mean.dtype) for a in (mean, var))
    checks.require_features("gaps", "axis", (1,), own.mean.shape, (mean, var))
    size = len(own.mean) if size is None else size
    checks.require("gaps", "size", size, checks.positive)
    if len(own.mean) % size:
        raise ValueError(f"gaps: size={size} does not divide a batch of {len(own.mean)}.")
    parts = merge(Moments(*(a.reshape(-1, size, a.shape[-1]) for a in own)), axis=1)
    return Gap((parts.mean - mean[None]) / jnp.sqrt(var[None]), jnp.log(parts.var / var[None]))


class Measures(NamedTuple):
    """What `measure` says about the ghosts of one map, all f[C].

    `shift_law` is 1 / effective size, and (B - N) / (B - 1) times that without replacement. It and
    `scale_square_law`, 1 - shift_law, are exact for any features.

    Example:
      >>> import jax, normjax.analysis.noise as noise
      >>> noise.measure({"x": jax.numpy.eye(3)}, 2, key=jax.random.key(0))["x"].shift_var.shape
      (3,)
    """

    effective_size: jax.Array  # see the function of this name
    shift_var: jax.Array  # mean square of the shift of the ghosts drawn
    shift_law: jax.Array  # its expectation
    scale_square: jax.Array  # mean of their squared scale
    scale_square_law: jax.Array  # its expectation
    scale_var: jax.Array  # variance of their scale
    scale_law: jax.Array  # that of dense Gaussian features at the effective size


def measure(
    maps: Mapping[str, jax.Array],
    size: int,
    *,
    key: jax.Array,
    ghosts: int = 1024,
    drawing: Drawing = "replacement",
) -> OrderedDict[str, Measures]:
    """Draws ghosts of every map of a network, as `draw`, and compares their statistics with theory.

    `maps` are such as `normjax.analysis.layers` captures: inputs of norms, or their outputs. Ghosts
    of all maps are of the same samples.

    Example:
      >>> import jax, normjax.analysis.noise as noise
      >>> maps = {"conv": jax.random.normal(jax.random.key(0), (64, 8, 8, 1))}
      >>> found = noise.measure(maps, 16, key=jax.random.key(1))["conv"]
      >>> round(float(found.shift_var[0] / found.shift_law[0]), 1)
      1.0
    """
    how = size, ghosts, drawing
    return OrderedDict((name, _measure(key, x, *how)) for name, x in maps.items())


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _measure(key, x, size, ghosts, drawing):
    drawn = draw(key, x, size, ghosts=ghosts, drawing=drawing)
    effective, samples = effective_size(x, size), len(x)
    share = (samples - size) / max(samples - 1, 1) if drawing == "partition" else 1
    shift_law = share / effective
    return Measures(
        effective_size=effective,
        shift_var=jnp.mean(jnp.square(drawn.shift), 0),
        shift_law=shift_law,
        scale_square=jnp.mean(jnp.square(drawn.scale), 0),
        scale_square_law=1 - shift_law,
        scale_var=jnp.var(drawn.scale, 0),
        scale_law=law(1 / shift_law).scale_var,
    )


def table(measured: Mapping[str, Measures]) -> list[dict[str, Any]]:
    """What `measure` returned as rows, for `csv.DictWriter` or `pandas.DataFrame`.

    A row per map: "map" (its name), "channels" (how many vary), and the median of every measure
    over these (None if none does).

    Example:
      >>> import jax, normjax.analysis.noise as noise
      >>> found = noise.measure({"dense": jax.numpy.eye(3)}, 2, key=jax.random.key(0))
      >>> [(row["map"], row["channels"], round(row["shift_law"], 3)) for row in noise.table(found)]
      [('dense', 3, 0.5)]
    """
    rows = []
    for name, found in measured.items():
        values = np.array(jax.device_get(found), float)
        values = values[:, ~np.isnan(values[0])]
        middle = np.median(values, 1).tolist() if values.size else [None] * len(values)
        fields = dict(zip(Measures._fields, middle, strict=True))
        rows.append({"map": name, "channels": values.shape[1], **fields})
    return rows


__all__ = [
    "Gap",
    "Ghosts",
    "Law",
    "Measures",
    "double_noise",
    "draw",
    "effective_size",
    "gaps",
    "law",
    "measure",
    "table",
]
