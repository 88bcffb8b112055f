"""The noise that statistics of a few samples bring into a network, measured and from theory.

A ghost is a handful of samples whose statistics stand for those of the batch. Functions of arrays
come first: `draw` makes ghosts, `law` is what theory says of them, `effective_size` how many
samples of dense features a ghost is worth, `double_noise` takes the noise of ghost batch norm
apart, `gap` compares statistics of training with running ones. `measure` and `gaps` do this for
all maps of a Flax model, as `normjax.analysis.layers` captures them; `table` and `plot` show it.

Kosson, Fan & Jaggi, *Ghost Noise for Regularizing Deep Neural Networks*, 2024,
https://arxiv.org/abs/2305.17205. Everything is in deviations of what ghosts are compared with, and
hence the same before and after a normalization and its affine map.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy import stats
from jax.scipy.special import betaln, digamma, gammaln

from normjax.core import checks, passes, sync
from normjax.core.structs import Moments
from normjax.methods.ghost_noise import resampled, shift_and_scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Drawing = Literal["replacement", "partition"]
COLORS = ("#0072B2", "#D55E00", "#333333")


class Ghosts(NamedTuple):
    """Statistics of R ghosts in units of what they are drawn from.

    Attributes:
      shift: f[R, C], mean of the ghost less that of the whole, in deviations of the whole.
      scale: f[R, C], deviation of the ghost over that of the whole. Both are NaN for a channel that
        does not vary.

    Example:
      >>> import jax
      >>> from normjax.analysis import noise
      >>> x = jax.random.normal(jax.random.key(0), (64, 4, 4, 3))
      >>> ghosts = noise.draw(jax.random.key(1), x, 8, ghosts=100)
      >>> ghosts.shift.shape, ghosts.scale.shape
      ((100, 3), (100, 3))
    """

    shift: jax.Array
    scale: jax.Array


def draw(
    key: jax.Array,
    x: jax.Array,
    size: int,
    *,
    ghosts: int = 1024,
    drawing: Drawing = "replacement",
) -> Ghosts:
    """Draws independent ghosts of `size` samples from a batch of features.

    Args:
      key: draws them.
      x: [B, ..., C], the samples first and the features last.
      size: samples per ghost, N.
      ghosts: how many ghosts, R.
      drawing: "replacement", as in `normjax.GhostNoise`: N independent draws. "partition": N of the
        samples without replacement, as when ghost batch norm divides a shuffled batch.

    Returns:
      `Ghosts`, in at least float32.

    Raises:
      ValueError: for a size that is no positive integer, ghosts larger than the batch without
        replacement, another drawing, or an input of rank 0 or 1.
      TypeError: for an input that is not real.

    Example:
      >>> import jax
      >>> from normjax.analysis import noise
      >>> x = jax.random.normal(jax.random.key(0), (1024, 2))
      >>> shift, scale = noise.draw(jax.random.key(1), x, 16, ghosts=20_000)
      >>> [round(16 * float(v), 1) for v in shift.var(0)]
      [1.0, 1.0]
    """
    own, whole = _moments("draw", x)
    _check("draw", size=size, ghosts=ghosts, drawing=drawing, samples=len(own.mean))
    return _ghosts(own, whole, _indices(key, len(own.mean), size, ghosts, drawing))


def _moments(name, x):
    """Moments [B, C] of every sample and [C] of all."""
    x = checks.real(name, x)
    if x.ndim < 2 or not x.size:
        raise ValueError(
            f"{name}: the input has shape {x.shape}, but features are [B, ..., C] with a value or "
            "more."
        )
    own = passes.moments(x, tuple(range(1, x.ndim - 1)))
    own = Moments(*(a.reshape(len(x), x.shape[-1]) for a in own))
    return own, sync.merge(own)


def _check(name, *, samples, drawing="replacement", **sizes):
    for field, value in sizes.items():
        if broken := checks.RULES["groups"](value):
            raise ValueError(f"{name}: {field}={value!r} {broken}.")
    if drawing not in ("replacement", "partition"):
        raise ValueError(f"{name}: drawing={drawing!r} is not one of 'replacement', 'partition'.")
    if drawing == "partition" and sizes["size"] > samples:
        raise ValueError(
            f"{name}: size={sizes['size']} with drawing='partition' is more than the {samples} "
            "samples that there are."
        )


def _indices(key, samples, size, ghosts, drawing):
    if drawing == "replacement":
        return jax.random.randint(key, (ghosts, size), 0, samples)
    order = jnp.tile(jnp.arange(samples), (ghosts, 1))
    return jax.random.permutation(key, order, axis=1, independent=True)[:, :size]


def _ghosts(own, whole, indices):
    """The ghosts of samples `indices` [R, N], in units of `whole`."""
    gap = own.mean - whole.mean[None]
    sums = [own.count, own.count * gap, own.count * (own.var + jnp.square(gap))]
    totals = resampled(jnp.stack(sums, 1), indices)
    count, first, second = (totals[:, i] for i in range(3))
    var = whole.var[None]
    shift, scale = shift_and_scale(count, first, second, var, 0.0, "both")
    return Ghosts(shift / jnp.sqrt(var), scale)


class Law(NamedTuple):
    """What theory says of ghosts of dense Gaussian features; see `law`.

    Attributes:
      shift_var: variance of the shift, whose mean is zero.
      scale_square: expectation of the squared scale.
      scale_mean: expectation of the scale.
      scale_var: variance of the scale.
      inverse_scale: expectation of 1 / scale, the factor by which ghost noise makes features
        larger; infinite for ghosts of two.
      log_var: expectation of the logarithm of the squared scale.

    Example:
      >>> from normjax.analysis import noise
      >>> [round(float(noise.law(n).inverse_scale), 2) for n in (4, 8, 16, 32)]
      [1.6, 1.2, 1.09, 1.04]
    """

    shift_var: jax.Array
    scale_square: jax.Array
    scale_mean: jax.Array
    scale_var: jax.Array
    inverse_scale: jax.Array
    log_var: jax.Array


def law(size: float | jax.Array, batch: float | jax.Array | None = None) -> Law:
    """Moments of shift and scale of ghosts of dense Gaussian features, in closed form.

    With replacement, from a large batch, the shift is Normal(0, 1/N) and the squared scale
    chi-squared with N - 1 degrees of freedom over N. Without replacement from a batch of B, the
    variance of the shift has the factor of a finite population, (B - N) / (B - 1), and the squared
    scale is B / N times a Beta((N - 1) / 2, (B - N) / 2) number: sums of squares within the ghost
    over those of all, which are independent chi-squared numbers over their sum. Both noises end at
    N = B.

    Args:
      size: samples per ghost, N > 1, or an effective size: a number, or an array of any shape.
      batch: B >= N, B > 2, to draw without replacement; None: with replacement.

    Returns:
      `Law`, arrays of the shape of `size`.

    Example:
      >>> from normjax.analysis import noise
      >>> found = noise.law(16)
      >>> round(16 * float(found.shift_var), 4), round(16 * float(found.scale_square), 4)
      (1.0, 15.0)
      >>> alone = noise.law(128, batch=128)
      >>> float(alone.shift_var), float(alone.scale_mean), float(alone.scale_var)
      (0.0, 1.0, 0.0)
    """
    n = jnp.asarray(size, jnp.result_type(float))
    a = (n - 1) / 2
    if batch is None:
        shift_var, spread, inverse = 1 / n, _spread(a), jnp.sqrt(n / 2) * _inverse_root(a)
        log_var = digamma(a) - jnp.log(n / 2)
    else:
        b = (batch - 1) / 2
        shift_var, spread = (batch - n) / (batch - 1) / n, _spread(a) - _spread(b)
        inverse = jnp.sqrt(n / batch) * _inverse_root(a) / _inverse_root(b)
        log_var = digamma(a) - digamma(b) + jnp.log(batch / n)
    scale_square = 1 - shift_var
    return Law(
        shift_var=shift_var,
        scale_square=scale_square,
        scale_mean=jnp.sqrt(scale_square * jnp.exp(-spread)),
        scale_var=-scale_square * jnp.expm1(-spread),
        inverse_scale=jnp.where(n > 2, inverse, jnp.inf),
        log_var=log_var,
    )


def _spread(a):
    """Logarithm of E t / (E sqrt t)^2 for a Gamma(a) number t, to rounding for any a > 0."""
    exact = jnp.log(a) + 2 * (betaln(a, 0.5) - gammaln(0.5))
    return jnp.where(a < 8, exact, 1 / (4 * a) - 1 / (96 * a**3) + 1 / (320 * a**5))


def _inverse_root(a):
    """E 1 / sqrt t for a Gamma(a) number t, a > 1/2."""
    return jnp.exp(betaln(a - 0.5, 0.5) - gammaln(0.5))


def effective_size(x: jax.Array, size: float) -> jax.Array:
    """Samples of dense features that a ghost of `size` samples is worth, by its shift.

    `size * var / between`, where `between` is the variance over the samples of their means over
    positions: the shift of a ghost drawn with replacement has the variance 1 / effective size,
    exactly, for any features.

    Args:
      x: [B, ..., C].
      size: samples per ghost.

    Returns:
      f[C], >= size; NaN for a channel that does not vary.

    Raises:
      ValueError: for an input of rank 0 or 1.
      TypeError: for an input that is not real.

    Example:
      >>> import jax
      >>> from normjax.analysis import noise
      >>> x = jax.random.normal(jax.random.key(0), (5000, 4, 4, 1))
      >>> round(float(noise.effective_size(x, 2)[0]))
      32
    """
    return size / _share_between(*_moments("effective_size", x))


def _share_between(own, whole):
    """Share of the variance that lies between the means of samples, [C]."""
    return jnp.mean(jnp.square(own.mean - whole.mean[None]), 0) / whole.var


def expected_size(size: float, share: float, positions: int) -> float:
    """The effective size of features with equal correlation between the positions of a sample.

    `size / (share + (1 - share) / positions)`: `share` of the variance lies between samples, the
    rest is independent from position to position.

    Args:
      size: samples per ghost.
      share: in [0, 1].
      positions: positions of a map, such as height times width.

    Returns:
      The effective size.

    Example:
      >>> from normjax.analysis import noise
      >>> round(noise.expected_size(16, 0.1, 16), 1), noise.expected_size(16, 1.0, 16)
      (102.4, 16.0)
    """
    return size / (share + (1 - share) / positions)


class DoubleNoise(NamedTuple):
    """The two noises of ghost batch norm and their sum, R draws of each.

    Attributes:
      batch: statistics of a batch in units of the population: the noise of batch norm.
      ghost: statistics of a ghost in units of its batch: what ghost noise adds to that.
      total: statistics of the ghost in units of the population. `total.shift = batch.shift +
        batch.scale * ghost.shift` and `total.scale = batch.scale * ghost.scale`.

    Example:
      >>> import jax
      >>> from normjax.analysis import noise
      >>> x = jax.random.normal(jax.random.key(0), (512, 3))
      >>> found = noise.double_noise(jax.random.key(1), x, 32, 8, ghosts=100)
      >>> found.total.shift.shape
      (100, 3)
    """

    batch: Ghosts
    ghost: Ghosts
    total: Ghosts


def double_noise(
    key: jax.Array,
    x: jax.Array,
    batch: int,
    size: int,
    *,
    ghosts: int = 1024,
    drawing: Drawing = "partition",
) -> DoubleNoise:
    """Draws batches from a population and a ghost from each batch.

    For dense features the variances of the shifts in units of the population are 1/B for the batch
    and 1/N for the ghost: with `drawing="partition"` (ghost batch norm) the total is that of a
    batch of N, 1/N. With `"replacement"` (ghost noise behind batch norm) it is 1/B + (1 - 1/B) / N.

    Args:
      key: draws both.
      x: the population, [P, ..., C]; batches are drawn from it with replacement.
      batch: samples per batch, B.
      size: samples per ghost, N.
      ghosts: how many batches, with a ghost each.
      drawing: how a ghost is drawn from its batch, as in `draw`.

    Returns:
      `DoubleNoise`.

    Raises:
      ValueError: as `draw`.
      TypeError: as `draw`.

    Example:
      >>> import jax
      >>> from normjax.analysis import noise
      >>> x = jax.random.normal(jax.random.key(0), (4096, 1))
      >>> found = noise.double_noise(jax.random.key(1), x, 32, 8, ghosts=20_000)
      >>> variances = (float(found.batch.shift.var()), float(found.total.shift.var()))
      >>> [round(1 / v) for v in variances]
      [32, 8]
    """
    own, whole = _moments("double_noise", x)
    _check("double_noise", batch=batch, size=size, ghosts=ghosts, drawing=drawing, samples=batch)
    first, second = jax.random.split(key)
    chosen = jax.random.randint(first, (ghosts, batch), 0, len(own.mean))
    inner = chosen[:, :size]  # independent draws: any N of them are a part of a shuffled batch
    if drawing == "replacement":
        picked = jax.random.randint(second, (ghosts, size), 0, batch)
        inner = jnp.take_along_axis(chosen, picked, 1)
    outer, total = _ghosts(own, whole, chosen), _ghosts(own, whole, inner)
    ghost = Ghosts((total.shift - outer.shift) / outer.scale, total.scale / outer.scale)
    return DoubleNoise(outer, ghost, total)


class Gap(NamedTuple):
    """How statistics of training differ from running ones, for G parts of a batch.

    Attributes:
      mean: f[G, C], mean of the part less running mean, in running deviations.
      log_var: f[G, C], logarithm of the variance of the part over the running variance.

    Example:
      >>> import jax.numpy as jnp
      >>> from normjax.analysis import noise
      >>> x = jnp.array([[1.0], [3.0]])
      >>> found = noise.gap(x, mean=jnp.array([1.0]), var=jnp.array([4.0]))
      >>> found.mean.tolist(), [round(v, 3) for v in found.log_var[0].tolist()]
      ([[0.5]], [-1.386])
    """

    mean: jax.Array
    log_var: jax.Array


def gap(x: jax.Array, mean: jax.Array, var: jax.Array, *, size: int | None = None) -> Gap:
    """Compares the statistics of a batch, or of its consecutive ghosts, with running ones.

    Training normalizes with the former and evaluation with the latter. The logarithm of the
    variance of a ghost is low on average, by `law(N).log_var` for dense Gaussian features.

    Args:
      x: [B, ..., C], what a norm normalizes.
      mean: running mean, [C].
      var: running variance, [C].
      size: samples per ghost, a divisor of the batch; None: the whole batch.

    Returns:
      `Gap` of B / size ghosts.

    Raises:
      ValueError: for a size that does not divide the batch, an input of rank 0 or 1, or statistics
        of other features.
      TypeError: for an input that is not real.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from normjax.analysis import noise
      >>> x = jax.random.normal(jax.random.key(0), (64, 8, 8, 3))
      >>> noise.gap(x, jnp.zeros(3), jnp.ones(3), size=16).mean.shape
      (4, 3)
    """
    own, _ = _moments("gap", x)
    checks.match("gap", "axis", (1,), own.mean.shape, (jnp.asarray(mean), jnp.asarray(var)))
    size = len(own.mean) if size is None else size
    _check("gap", size=size, samples=len(own.mean))
    if len(own.mean) % size:
        raise ValueError(f"gap: size={size} does not divide a batch of {len(own.mean)}.")
    parts = Moments(*(a.reshape(-1, size, a.shape[-1]) for a in own))
    parts = jax.vmap(sync.merge)(parts)
    mean, var = (jnp.asarray(a, parts.mean.dtype)[None] for a in (mean, var))
    return Gap((parts.mean - mean) / jnp.sqrt(var), jnp.log(parts.var / var))


def gaps(
    inputs: Mapping[str, jax.Array], statistics: Mapping[str, Any], *, size: int | None = None
) -> OrderedDict[str, Gap]:
    """`gap` for every norm of a Flax model.

    Args:
      inputs: what `normjax.analysis.layers.capture_inputs` returns, the model in training mode.
      statistics: the collection "batch_stats" of a Linen model, or the state `nnx.state(model,
        nnx.BatchStat)` of an NNX model as a dict, `nnx.to_pure_dict(...)`.
      size: as in `gap`.

    Returns:
      `Gap` by the path of the norm, in the order of `inputs`: for the modules with leaves `mean`
      and `var` of their own, on their first call.

    Raises:
      ValueError: as `gap`, and if no norm is in both.

    Example:
      >>> import jax
      >>> from flax import linen as nn
      >>> from normjax import linen as norms
      >>> from normjax.analysis import layers, noise
      >>> model = nn.Sequential([nn.Dense(5), norms.BatchNorm(use_running_average=False)])
      >>> x = jax.random.normal(jax.random.key(0), (32, 4))
      >>> variables = model.init(jax.random.key(1), x)
      >>> inputs = layers.capture_inputs(model, variables, x)
      >>> found = noise.gaps(inputs, variables["batch_stats"], size=8)
      >>> {name: value.mean.shape for name, value in found.items()}
      {'layers_1': (4, 5)}
    """
    running = dict(_running(statistics))
    found = OrderedDict(
        (name, gap(x, *running[name], size=size)) for name, x in inputs.items() if name in running
    )
    if not found:
        raise ValueError(
            f"gaps: the inputs {[*inputs]} and the running statistics of {[*running]} have no norm "
            "in common; both come from one model, whose norms have `mean` and `var` themselves."
        )
    return found


def _running(tree, path=()):
    """Paths of the modules with running statistics, and these."""
    if "mean" in tree and "var" in tree:
        yield "/".join(path), (tree["mean"], tree["var"])
    for name, inner in tree.items():
        if isinstance(inner, Mapping):
            yield from _running(inner, (*path, str(name)))


class Measures(NamedTuple):
    """What `measure` says about the ghosts of one map, all f[C], NaN where a channel is constant.

    Attributes:
      effective_size: see the function of this name.
      shift_var: mean square of the shift of the ghosts drawn.
      shift_law: its expectation, 1 / effective size, and (B - N) / (B - 1) times that without
        replacement: exact for any features.
      scale_square: mean of their squared scale.
      scale_square_law: its expectation, 1 - shift_law: exact for any features.
      scale_var: variance of their scale.
      scale_law: that of dense Gaussian features at the effective size.

    Example:
      >>> import jax
      >>> from normjax.analysis import noise
      >>> maps = {"dense": jax.random.normal(jax.random.key(0), (256, 3))}
      >>> noise.measure(maps, 16, key=jax.random.key(1))["dense"].shift_var.shape
      (3,)
    """

    effective_size: jax.Array
    shift_var: jax.Array
    shift_law: jax.Array
    scale_square: jax.Array
    scale_square_law: jax.Array
    scale_var: jax.Array
    scale_law: jax.Array


def measure(
    maps: Mapping[str, jax.Array],
    size: int,
    *,
    key: jax.Array,
    ghosts: int = 1024,
    drawing: Drawing = "replacement",
) -> OrderedDict[str, Measures]:
    """Draws ghosts of every map of a network and compares their statistics with theory.

    Args:
      maps: arrays [B, ..., C], such as those that `normjax.analysis.layers` captures: the inputs of
        norms, or their outputs, which have the same ghosts.
      size: samples per ghost, N.
      key: draws them, with the same samples for all maps of a batch.
      ghosts: how many.
      drawing: as in `draw`.

    Returns:
      `Measures` by name, in the order of `maps`.

    Raises:
      ValueError: as `draw`.
      TypeError: as `draw`.

    Example:
      >>> import jax
      >>> from flax import linen as nn
      >>> from normjax.analysis import layers, noise
      >>> model = nn.Sequential([nn.Conv(8, (3, 3)), nn.relu, nn.Conv(8, (3, 3))])
      >>> x = jax.random.normal(jax.random.key(0), (64, 8, 8, 1))
      >>> variables = model.init(jax.random.key(1), x)
      >>> @jax.jit
      ... def measured(variables, x):
      ...     maps = layers.capture(model, variables, x)
      ...     return noise.measure(maps, 16, key=jax.random.key(2))
      >>> {name: value.shift_var.shape for name, value in measured(variables, x).items()}
      {'layers_0': (8,), 'layers_2': (8,), '__call__': (8,)}
    """
    found = OrderedDict()
    for name, x in maps.items():
        own, whole = _moments(f"measure: {name!r}", x)
        samples = len(own.mean)
        _check("measure", size=size, ghosts=ghosts, drawing=drawing, samples=samples)
        drawn = _ghosts(own, whole, _indices(key, samples, size, ghosts, drawing))
        effective = size / _share_between(own, whole)
        without = drawing == "partition"
        shift_law = (samples - size) / max(samples - 1, 1) / effective if without else 1 / effective
        found[name] = Measures(
            effective_size=effective,
            shift_var=jnp.mean(jnp.square(drawn.shift), 0),
            shift_law=shift_law,
            scale_square=jnp.mean(jnp.square(drawn.scale), 0),
            scale_square_law=1 - shift_law,
            scale_var=jnp.var(drawn.scale, 0),
            scale_law=law(1 / shift_law).scale_var,
        )
    return found


def table(measured: Mapping[str, Measures]) -> list[dict[str, Any]]:
    """The measures as rows, for `csv.DictWriter` or `pandas.DataFrame`.

    Args:
      measured: what `measure` returned.

    Returns:
      A row per map: "map" (its name), "channels" (how many vary), and the median of every measure
      over these (None if none does).

    Example:
      >>> import jax
      >>> from normjax.analysis import noise
      >>> maps = {"dense": jax.random.normal(jax.random.key(0), (256, 3))}
      >>> rows = noise.table(noise.measure(maps, 16, key=jax.random.key(1)))
      >>> rows[0]["map"], rows[0]["channels"], round(rows[0]["effective_size"], 1)
      ('dense', 3, 16.0)
    """
    rows = []
    for name, found in measured.items():
        values = np.array(jax.device_get(found), float)
        values = values[:, ~np.isnan(values[0])]
        middle = np.median(values, 1).tolist() if values.size else [None] * len(values)
        fields = dict(zip(Measures._fields, middle, strict=True))
        rows.append({"map": name, "channels": values.shape[1], **fields})
    return rows


def plot(measured: Mapping[str, Measures], size: int) -> "Figure":
    """Draws effective sizes, and the deviations of shift and scale beside theory, map by map.

    Args:
      measured: what `measure` returned.
      size: samples per ghost.

    Returns:
      A figure of matplotlib (which the extra `benchmarks` installs): medians over the channels, and
      from the lowest to the highest channel for the effective sizes.

    Raises:
      ValueError: without a map that varies.

    Example:
      >>> import jax
      >>> from normjax.analysis import noise
      >>> maps = {"dense": jax.random.normal(jax.random.key(0), (256, 3))}
      >>> figure = noise.plot(noise.measure(maps, 16, key=jax.random.key(1)), 16)
      >>> [axes.get_title(loc="left") for axes in figure.axes]
      ['effective size', 'deviation of the shift', 'deviation of the scale']
    """
    from matplotlib.figure import Figure

    rows = [row for row in table(measured) if row["channels"]]
    if not rows:
        raise ValueError(f"plot: none of the maps {[*measured]} varies.")
    names = [row["map"] for row in rows]
    at = np.arange(len(rows))

    def median(field):
        return np.array([row[field] for row in rows])

    figure = Figure((4 + 0.8 * len(rows), 4), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True)
    sizes = [np.asarray(measured[name].effective_size) for name in names]
    middle = median("effective_size")
    ends = np.abs([[np.nanmin(s), np.nanmax(s)] for s in sizes] - middle[:, None]).T
    panels[0].errorbar(at, middle, ends, fmt="o", color=COLORS[0], capsize=3, label="of the maps")
    panels[0].axhline(size, color=COLORS[2], linestyle="--", label=f"dense features: {size}")
    panels[0].set_yscale("log")
    panels[0].set_title("effective size", loc="left")
    dense = law(size)
    for axes, name, drawn, theory, alone in (
        (panels[1], "shift", "shift_var", "shift_law", dense.shift_var),
        (panels[2], "scale", "scale_var", "scale_law", dense.scale_var),
    ):
        axes.plot(at, np.sqrt(median(drawn)), "o", color=COLORS[0], label="drawn")
        axes.plot(at, np.sqrt(median(theory)), "x", color=COLORS[1], label="at the effective size")
        axes.axhline(np.sqrt(float(alone)), color=COLORS[2], linestyle="--", label="dense features")
        axes.set_ylim(bottom=0)
        axes.set_title(f"deviation of the {name}", loc="left")
    for axes in panels:
        axes.set_xticks(at, names, rotation=90, fontsize=8)
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_draws(drawn: Ghosts, size: float) -> "Figure":
    """Draws histograms of shift and scale over all ghosts and channels, and their densities.

    Args:
      drawn: what `draw` returned.
      size: size of dense Gaussian ghosts, whose densities are drawn.

    Returns:
      A figure of matplotlib.

    Raises:
      ValueError: if no channel varies.

    Example:
      >>> import jax
      >>> from normjax.analysis import noise
      >>> x = jax.random.normal(jax.random.key(0), (256, 3))
      >>> figure = noise.plot_draws(noise.draw(jax.random.key(1), x, 16), 16)
      >>> len(figure.axes)
      2
    """
    from matplotlib.figure import Figure

    def of_shift(t):
        return stats.norm.pdf(t, 0, size**-0.5)

    def of_scale(t):
        return 2 * size * t * stats.chi2.pdf(size * jnp.square(t), size - 1)

    figure = Figure((9, 3), layout="constrained")
    titles = (f"shift, and Normal(0, 1/{size:g})", f"scale, and chi({size - 1:g}) / \u221a{size:g}")
    for axes, values, density, title in zip(
        figure.subplots(1, 2), drawn, (of_shift, of_scale), titles, strict=True
    ):
        values = np.asarray(values)
        values = values[~np.isnan(values)]
        if not values.size:
            raise ValueError("plot_draws: no channel varies.")
        axes.hist(values, 60, density=True, color=COLORS[0], alpha=0.4)
        line = np.linspace(values.min(), values.max(), 200)
        axes.plot(line, np.asarray(density(jnp.asarray(line))), color=COLORS[1])
        axes.set_title(title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


__all__ = [
    "DoubleNoise",
    "Gap",
    "Ghosts",
    "Law",
    "Measures",
    "double_noise",
    "draw",
    "effective_size",
    "expected_size",
    "gap",
    "gaps",
    "law",
    "measure",
    "plot",
    "plot_draws",
    "table",
]
