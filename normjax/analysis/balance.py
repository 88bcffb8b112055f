"""How evenly the conditions of a network, such as classes, pull at the parameters they share.

Gong et al., *Sandwich Batch Normalization*, 2022, https://arxiv.org/abs/2102.11382, say that a
shared affine map in front of those of the classes balances the norms of the gradients of classes
and keeps their directions diverse. Here the gradient of condition i is that of the mean loss of its
samples, with statistics of batch norms from the whole batch: samples of all conditions run through
the network together, and only the loss is of those of one. It is taken for kernels and other shared
parameters, and for the condition's own rows of scale and bias.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from normjax.core import checks
from normjax.core.passes import widen


class Measures(NamedTuple):
    """What `measure` says about one parameter, K conditions; in at least float32.

    A gradient that is zero has no direction: its cosines are NaN, and `cosine` is the mean over the
    other pairs (NaN if there is none). `ratio` is then inf. If all are zero, `variation` and
    `ratio` are NaN.

    Example:
      >>> import jax.numpy as jnp, normjax.analysis.balance as balance
      >>> losses = lambda params: jnp.array([3.0, 1.0]) * params["scale"]
      >>> found = balance.measure(losses, {"scale": jnp.ones(())}, ["scale"])["scale"]
      >>> found.norms.tolist(), f"{found.variation:.2f} {found.ratio:.2f} {found.cosine:.2f}"
      ([3.0, 1.0], '0.50 3.00 1.00')
    """

    norms: jax.Array  # [K], L2 norms of the gradients
    cosines: jax.Array  # [K, K], of the angles between them
    variation: jax.Array  # standard deviation of the norms over their mean
    ratio: jax.Array  # the largest norm over the smallest
    cosine: jax.Array  # mean over the pairs of different conditions


def by_condition(losses: jax.Array, condition: jax.Array, num_conditions: int) -> jax.Array:
    """Means [num_conditions] of losses [N] over the samples of each condition, int [N].

    0 for a condition that has no sample; samples of another number, such as -1, do not count.
    ValueError unless both have one value per sample, and for less than one condition.

    Example:
      >>> import jax.numpy as jnp, normjax.analysis.balance as balance
      >>> balance.by_condition(jnp.array([1.0, 5.0, 3.0]), jnp.array([0, 1, 0]), 3).tolist()
      [2.0, 5.0, 0.0]
    """
    checks.require("by_condition", "num_conditions", num_conditions, checks.positive)
    losses, condition = checks.as_real("by_condition", losses), jnp.asarray(condition)
    if losses.ndim != 1 or condition.shape != losses.shape:
        raise ValueError(
            f"by_condition: losses of shape {losses.shape} and conditions of shape "
            f"{condition.shape}, but both are [N]."
        )
    own = condition[:, None] == jnp.arange(num_conditions)[None]
    total = jnp.sum(jnp.where(own, widen(losses)[:, None], 0), 0)
    return total / jnp.maximum(jnp.sum(own, 0), 1)


def measure(
    losses: Callable[[Any], jax.Array],
    params: Any,
    leaves: Sequence[str] = (),
    rows: Sequence[str] = (),
    *,
    chunk: int = 1,
) -> OrderedDict[str, Measures]:
    """Gradients of the loss of every condition, for some parameters.

    `losses` returns the loss of each condition, [K] with K > 1, as `by_condition` makes it from
    those of the samples of one batch, which holds all conditions. Names are paths in the tree
    `params`, such as "conv/kernel". Of `leaves`, whole gradients are compared. `rows` have a row
    for each condition on axis 0, as the scale and bias of `ClassAffine`; of these the gradient of
    condition i is that of its own row i.

    The network runs once, then backwards `chunk` conditions at a time; what stays in memory are the
    gradients of all conditions, K times as large as the parameters chosen. Works under `jax.jit`
    and `jax.vmap`. ValueError for a name that is unknown or there twice, none at all, losses of
    another shape, and rows that are not K.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj, normjax.analysis.balance as balance
      >>> norm, labels = nj.SandwichBatchNorm(num_classes=3), jnp.arange(12) % 3
      >>> params, state = norm.init(jax.random.key(0), 4)
      >>> x, g = jax.random.normal(jax.random.key(1), (2, 12, 4))
      >>> def losses(params):
      ...     y, _ = norm.apply(params, state, x, train=True, condition=labels)
      ...     return balance.by_condition(jnp.sum(g * y, 1), labels, 3)
      >>> found = balance.measure(losses, params, ["norm/scale"], rows=["condition/scale"])
      >>> {name: measures.cosines.shape for name, measures in found.items()}
      {'norm/scale': (3, 3), 'condition/scale': (3, 3)}
    """
    checks.require("measure", "chunk", chunk, checks.positive)
    paths, structure = jax.tree.flatten_with_path(params)
    tree = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
    names = [*leaves, *rows]
    _require_names(names, tree)

    def of_chosen(chosen):
        return losses(jax.tree.unflatten(structure, (tree | chosen).values()))

    found, pull = jax.vjp(of_chosen, {name: jnp.asarray(tree[name]) for name in names})
    _require_losses(found, {name: jnp.shape(tree[name]) for name in rows})

    def gradients(i):
        (of_all,) = pull((jnp.arange(len(found)) == i).astype(found.dtype))
        return {name: jnp.ravel(g[i] if name in rows else g) for name, g in of_all.items()}

    each = lax.map(gradients, jnp.arange(len(found)), batch_size=chunk)
    return OrderedDict((name, _measure(each[name])) for name in names)


def _require_names(names, tree):
    unknown = [name for name in names if name not in tree]
    if unknown or not names or len(set(names)) < len(names):
        said = f"{unknown[0]!r} is no parameter" if unknown else f"{names} are none, or some twice"
        raise ValueError(f"measure: {said}; there are {[*tree]}.")


def _require_losses(losses, rows):
    """ValueError unless there is one of each condition, and rows, of these shapes, of each."""
    if losses.ndim != 1 or len(losses) < 2 or not jnp.issubdtype(losses.dtype, jnp.floating):
        raise ValueError(
            f"measure: the losses are {losses.dtype}{list(losses.shape)}, but one real number for "
            "each of at least two conditions."
        )
    for name, shape in rows.items():
        if shape[:1] != losses.shape:
            raise ValueError(
                f"measure: {name!r} of shape {shape} has no row for each of the {len(losses)} "
                "conditions."
            )


def _measure(gradients):
    """Of gradients [K, size]."""
    g = widen(gradients)
    largest = jnp.max(jnp.abs(g), 1, keepdims=True)
    z = g / jnp.where(largest == 0, 1, largest)  # squares neither overflow nor vanish
    length = jnp.sqrt(jnp.sum(jnp.square(z), 1))
    norms = largest[:, 0] * length
    z = z / length[:, None]  # 0 / 0 is NaN: no direction
    cosines = jnp.matmul(z, z.T, precision=lax.Precision.HIGHEST)
    relative = norms / jnp.max(norms)
    pairs = (norms != 0)[:, None] & (norms != 0)[None] & ~np.eye(len(g), dtype=bool)
    return Measures(
        norms=norms,
        cosines=cosines,
        variation=jnp.std(relative) / jnp.mean(relative),
        ratio=1 / jnp.min(relative),
        cosine=jnp.mean(cosines, where=pairs),
    )


def table(history: Mapping[int, Mapping[str, Measures]]) -> list[dict[str, Any]]:
    """What `measure` returned, by step, as rows that `figures.plot` draws.

    A row per step and parameter: "step", "parameter" (its name), "variation", "ratio", "cosine",
    and the norms, "norm_0", "norm_1" and so on; None for what is not finite. ValueError for an
    empty history, or steps that differ in parameters or conditions.

    Example:
      >>> import jax.numpy as jnp
      >>> from normjax.analysis import balance, figures
      >>> losses = lambda params: jnp.arange(1.0, 4.0) * params["scale"] ** 2
      >>> scales = [{"scale": jnp.full((), 2.0**i)} for i in range(3)]
      >>> history = {i: balance.measure(losses, scale, ["scale"]) for i, scale in enumerate(scales)}
      >>> rows = balance.table(history)
      >>> [(row["step"], row["norm_0"], row["ratio"]) for row in rows]
      [(0, 2.0, 3.0), (1, 4.0, 3.0), (2, 8.0, 3.0)]
      >>> figure = figures.plot(rows, "step", ["variation", "cosine"], by="parameter")
    """
    kinds = [
        [(name, np.shape(found.norms)) for name, found in measured.items()]
        for measured in history.values()
    ]
    if not kinds or not kinds[0] or any(kind != kinds[0] for kind in kinds):
        raise ValueError(
            "table: the history holds no parameters, or its steps differ in these or in conditions."
        )
    rows = []
    for step, measured in history.items():
        for name, found in measured.items():
            found = jax.device_get(found)
            numbers = {field: getattr(found, field) for field in ("variation", "ratio", "cosine")}
            numbers |= {f"norm_{i}": norm for i, norm in enumerate(found.norms)}
            known = {k: float(v) if np.isfinite(v) else None for k, v in numbers.items()}
            rows.append({"step": step, "parameter": name, **known})
    return rows


__all__ = ["Measures", "by_condition", "measure", "table"]
