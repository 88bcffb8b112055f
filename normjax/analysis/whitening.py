"""How far the features of a network are from white, and how much of a sample's output is chance.

Whitening (`normjax.DecorrelatedBatchNorm` and others) is to make features uncorrelated, which makes
layers better conditioned, at the price of statistics that vary more from batch to batch. `capture`,
that of `normjax.analysis.layers`, returns the maps of a Flax model, and `measure` says how
correlated the features of each are; `disturbance` and `compare` measure the price, for any method.
"""

import functools
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from normjax.analysis.layers import capture as capture
from normjax.core import checks
from normjax.core.passes import widen
from normjax.core.roots import product


class Measures(NamedTuple):
    """What `measure` says about the d features of one map, over batch and positions.

    Features that do not vary have no correlations: the last two are of the others. The condition
    number is the largest over the smallest eigenvalue, and inf where the smallest is rounding, as
    with no more vectors than features.

    `off_diagonal` is the mean of the squared correlations of two different features, from 0
    (uncorrelated) to 1; NaN of fewer than two. Squares, and not absolute values, because they say
    the same as the eigenvalues of the correlation matrix, whose variance is `(d - 1) off_diagonal`,
    and because n independent Gaussian vectors have an expectation of exactly 1 / (n - 1), which
    tells chance from correlation.

    Example:
      >>> import jax.numpy as jnp, normjax.analysis.whitening as whitening
      >>> x = jnp.array([[2.0, 1.0], [2.0, -1.0], [-2.0, 1.0], [-2.0, -1.0]])
      >>> found = whitening.measure({"x": x})["x"]
      >>> [round(float(value), 4) for value in found]
      [4.0, 1.0, 0.0]
    """

    condition: jax.Array  # condition number of the covariance
    correlation_condition: jax.Array  # of the correlation: what batch norm leaves
    off_diagonal: jax.Array  # mean squared correlation of two features


def measure(maps: Mapping[str, jax.Array]) -> OrderedDict[str, Measures]:
    """How correlated the features of each map are, such as those that `capture` returns.

    Maps are real arrays [B, ..., C], not empty (else TypeError or ValueError). The eigenvalues are
    squared singular values of the centred map, so that float32 resolves condition numbers up to
    some 1e10. Works under `jax.jit`.

    Example:
      >>> import jax, flax.linen as nn, normjax.analysis.whitening as whitening
      >>> model, x = nn.Dense(4), jax.random.normal(jax.random.key(0), (64, 8))
      >>> maps = whitening.capture(model, model.init(jax.random.key(1), x), x)
      >>> found = whitening.measure(maps)["__call__"]
      >>> bool(found.condition > found.correlation_condition > 1)
      True
    """
    if not isinstance(maps, Mapping):
        raise TypeError(f"measure: maps is {type(maps).__name__}, not a dict of arrays by name.")
    return OrderedDict((name, _measure(_as_map(f"measure: {name!r}", maps[name]))) for name in maps)


def _as_map(name, x):
    x = widen(checks.as_real(name, x))
    if x.ndim < 2 or not x.size:
        raise ValueError(f"{name} has shape {x.shape}, but a map is [B, ..., C] and not empty.")
    return x


def _measure(x):
    rows = x.reshape(-1, x.shape[-1])
    centred = rows - jnp.mean(rows, 0, keepdims=True)
    largest = jnp.max(jnp.abs(centred))
    scale = jnp.where(largest == 0, 1, largest)  # squares neither overflow nor vanish
    factor = jnp.linalg.qr(centred / scale, mode="r")
    length = jnp.sqrt(jnp.sum(jnp.square(factor), 0))
    rounding = 8 * jnp.finfo(x.dtype).eps * jnp.max(jnp.abs(rows), 0) / scale
    varies = length > rounding * math.sqrt(len(rows))
    unit = factor * jnp.where(varies, 1 / jnp.where(varies, length, 1), 0)[None]
    number = jnp.sum(varies)
    pairs = product(unit.T, unit) * (1 - jnp.eye(len(varies), dtype=unit.dtype))
    return Measures(
        condition=_condition(factor, factor.shape[1]),
        correlation_condition=_condition(unit, number),
        off_diagonal=jnp.sum(jnp.square(pairs)) / (number * (number - 1)),
    )


def _condition(factor, number):
    """Squared ratio of the first and the last of so many singular values; inf where that is 0."""
    values = jnp.linalg.svd(factor, compute_uv=False)
    values = jnp.pad(values, (0, factor.shape[1] - len(values)))
    least = jnp.where(number > 0, values[jnp.maximum(number - 1, 0)], 0)
    rounding = factor.shape[1] * jnp.finfo(factor.dtype).eps * values[0]
    return jnp.where(least > rounding, jnp.square(values[0] / least), jnp.inf)


def table(history: Mapping[int, Mapping[str, Measures]]) -> list[dict[str, Any]]:
    """What `measure` returned, by step, as rows that `figures.plot` draws.

    A row per step and map: "step", "depth" (the place of the map, from 0), "map" and the measures;
    None for what is not finite. ValueError for an empty history, or steps that differ in maps.

    Example:
      >>> import jax.numpy as jnp, normjax.analysis.whitening as whitening
      >>> x = jnp.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
      >>> history = {i: whitening.measure({"x": x.at[:, 0].mul(10.0**i)}) for i in range(3)}
      >>> rows = whitening.table(history)
      >>> [(row["step"], row["map"], round(row["condition"])) for row in rows]
      [(0, 'x', 1), (1, 'x', 100), (2, 'x', 10000)]
    """
    kinds = [[*measured] for measured in history.values()]
    if not kinds or not kinds[0] or any(kind != kinds[0] for kind in kinds):
        raise ValueError("table: the history holds no maps, or its steps differ in them.")
    rows = []
    for step, measured in history.items():
        for depth, (name, found) in enumerate(measured.items()):
            values = jax.device_get(found)._asdict()
            known = {k: float(v) if np.isfinite(v) else None for k, v in values.items()}
            rows.append({"step": step, "depth": depth, "map": name, **known})
    return rows


def disturbance(
    method: Any,
    x: jax.Array,
    batch_size: int,
    *,
    key: jax.Array,
    variables: tuple[Any, Any] | None = None,
    samples: int = 64,
    batches: int = 64,
    per_feature: bool = False,
) -> jax.Array:
    """Stochastic normalization disturbance: how much the output of a sample depends on the others.

    Huang, Zhou, Zhu, Liu & Shao, *Iterative Normalization*, 2019, section 4,
    https://arxiv.org/abs/1904.03441

    Of a sample, the mean distance of its output, in training mode and over random mini-batches that
    contain it, from the average output over these; then the mean over samples. The distance is
    Euclidean, over the features; with positions it is averaged over them.

    Args:
      method: a method without further inputs of `apply`.
      x: real samples f[N, ..., C], of which mini-batches are drawn without replacement.
      batch_size: samples of a mini-batch, from 1 to N.
      key: of the draws, of the initial variables, and of methods that draw.
      variables: `(params, state)` of the method; None: those of `init`.
      samples: how many samples are followed, from 1 to N.
      batches: how many mini-batches of each; the average over R of them makes the result small by
        the share 1 / (2 R).
      per_feature: divide by C, as the paper does to compare layers.

    Returns:
      One number, in the units of the output.

    Raises:
      ValueError: for an argument outside its range, and samples that are no [N, ..., C].

    Example:
      >>> import jax, normjax as nj, normjax.analysis.whitening as whitening
      >>> x = jax.random.normal(jax.random.key(0), (512, 16))
      >>> method = nj.BatchNorm()
      >>> some = [whitening.disturbance(method, x, n, key=jax.random.key(1)) for n in (32, 128)]
      >>> round(float(some[0] / some[1]), 0)
      2.0
    """
    x = _as_map("disturbance: x", x)
    sizes = {"batch_size": batch_size, "samples": samples, "batches": batches}
    for name, value in sizes.items():
        checks.require("disturbance", name, value, checks.positive)
        if name != "batches" and value > len(x):
            raise ValueError(f"disturbance: {name}={value}, but x has {len(x)} samples.")
    first, chosen, drawn = jax.random.split(key, 3)
    if variables is None:
        variables = method.init(first, x.shape[-1])
    found = _disturbance(method, variables, x, batch_size, (samples, batches), (chosen, drawn))
    return found / (x.shape[-1] if per_feature else 1)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _disturbance(method, variables, x, batch_size, sizes, keys):
    samples, batches = sizes

    def output(followed, keys):
        order = jax.random.uniform(keys[0], (len(x),)).at[followed].set(2)
        batch = x[lax.top_k(order, batch_size)[1]]  # the one followed is its first sample
        y, _ = method.apply(*variables, batch, train=True, key=keys[1])
        return widen(y[0])

    def distance(inputs):
        followed, keys = inputs
        y = lax.map(functools.partial(output, followed), keys, batch_size=16)
        gap = y - jnp.mean(y, 0, keepdims=True)
        return jnp.mean(jnp.sqrt(jnp.sum(jnp.square(gap), -1)))

    followed = jax.random.permutation(keys[0], len(x))[:samples]
    keys = jax.random.split(keys[1], (samples, batches, 2))
    return jnp.mean(lax.map(distance, (followed, keys)))


def compare(
    methods: Mapping[str, Any], x: jax.Array, batch_sizes: Sequence[int], **how: Any
) -> list[dict[str, Any]]:
    """The `disturbance` of several methods, at several batch sizes, as rows for `figures.plot`.

    A row per method and size: "method" (its name in `methods`), "batch_size" and "disturbance".
    All see the same samples in the same mini-batches; `how` is `key` and the other arguments.

    Example:
      >>> import jax, normjax as nj
      >>> from normjax.analysis import figures, whitening
      >>> x = jax.random.normal(jax.random.key(0), (256, 8))
      >>> methods = {"BN": nj.BatchNorm(), "ZCA": nj.DecorrelatedBatchNorm()}
      >>> rows = whitening.compare(methods, x, (16, 64), key=jax.random.key(1))
      >>> figure = figures.plot(rows, "batch_size", ["disturbance"], by="method")
      >>> bn, _, zca, _ = (row["disturbance"] for row in rows)
      >>> bn < zca
      True
    """
    return [
        {
            "method": name,
            "batch_size": size,
            "disturbance": float(disturbance(method, x, size, **how)),
        }
        for name, method in methods.items()
        for size in batch_sizes
    ]


__all__ = ["Measures", "capture", "compare", "disturbance", "measure", "table"]
