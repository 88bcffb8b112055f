"""Exact population statistics of the norms of a Flax model, for Linen and NNX alike.

`recalibrate` takes them anew from data, as evaluation needs it after a change of the weights such
as their average; `sync` merges those of replicas that trained apart; `pool` merges what methods
observed.

Recalibration replaces statistics by those of all values of a data set, exactly, for every kind of
running average. A feature without a value keeps its own. "pooled" statistics count the new values
alone. A count of updates, by which schedules go, stays, but is at least one. A norm that is called
several times has the statistics of all calls, branches (`MultiStats`) each their own. What stays:
gains and errors of `KalmanNorm`, whose statistics become those of its input without a prior, and
the matrix of `StochasticWhiteningBatchNorm(form="update")`, which follows in many small steps.

One program is compiled for each shape of a batch. Statistics stay on the device: of 2^n batches n
pooled ones at most, of which equally many are merged, so that rounding does not grow with their
number.
"""

import collections
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from flax.typing import PathParts
from jax import lax

from normjax.core import matrices
from normjax.core.method import parts, replace
from normjax.core.statistics import pool
from normjax.core.structs import AxisName, Pool
from normjax.methods.spectral.method import SpectralBatchNorm
from normjax.methods.whitening import StochasticWhiteningBatchNorm
from normjax.observers import merge, observer

__all__ = ["pool", "recalibrate", "sync"]

MEANS = "mean", "mean_real", "mean_imag"
_merge = jax.jit(merge)
Where = Callable[[PathParts, Any], bool]


def recalibrate(
    model: linen.Module | nnx.Module,
    batches: Iterable[Any] | Callable[[], Iterable[Any]],
    *,
    variables: Any = None,
    call: Callable[..., Any] | None = None,
    layerwise: bool = False,
    where: Where | None = None,
    rngs: Mapping[str, jax.Array] | None = None,
) -> Any:
    """Replaces running statistics by those of all values of a data set; see the module.

    Wu & Johnson, *Rethinking "Batch" in BatchNorm*, 2021, section 3, https://arxiv.org/abs/2105.07576
    (PreciseBN). It averages the statistics of batches; here they are pooled, which is exact for
    batches of any sizes and masks. `layerwise` gives those that evaluation meets.

    Args:
      model: a module of Linen or NNX.
      batches: trees of arrays of any sizes, also sharded over a mesh; with `layerwise` a
        collection, or a function that returns an iterator.
      variables: of a Linen model, with the weights that it is to have.
      call: `call(model, batch)` calls the model, which is bound to its variables, and in NNX is in
        evaluation mode, as for evaluation: which statistics norms use is not its business. None:
        `model(batch)`.
      layerwise: False: norms normalize by the statistics of the batch, as in training, in one pass
        over the data. True: by the new ones of all data. A pass settles the norms that see settled
        ones alone; passes end when one changes nothing, or with as many as there are norms.
      where: `where(path, method)` says which norms are recalibrated; None: all that have running
        statistics. The others do as `call` says.
      rngs: keys of a Linen model for what is drawn, folded for each batch.

    Returns the variables of Linen with new statistics, of the same structure and dtypes. A model of
    NNX changes in place, and is returned. Axis names of norms are dropped: batches are global.

    ValueError without batches, for an iterator that would have to run twice, without norms that
    have running statistics, and, by its path, for one whose statistics cannot be had or replaced.
    TypeError for a model that is none, and variables where there should be none.

    Example:
      >>> import jax, flax.linen as nn, normjax.linen, normjax.population as population
      >>> net = nn.Sequential([nn.Dense(4), normjax.linen.BatchNorm(use_running_average=True)])
      >>> data = jax.random.normal(jax.random.key(0), (10, 3))
      >>> variables = net.init(jax.random.key(1), data)
      >>> variables = population.recalibrate(net, [data[:7], data[7:]], variables=variables)
      >>> f"{net.apply(variables, data).var():.3f}"
      '1.000'
    """
    if (variables is not None) != isinstance(model, linen.Module):
        rule = "give those of a Linen model, and of NNX none."
        raise TypeError(f"recalibrate: variables={type(variables).__name__}: {rule}")
    how: Any = dict(train=not layerwise, choose=functools.partial(_chosen, where, layerwise))
    run = observer(model, functools.partial(_evaluated, call), **how)
    if isinstance(model, linen.Module):
        return _recalibrated(run, variables, _repeatable(batches, layerwise), layerwise, rngs)
    found = _recalibrated(run, nnx.state(model), _repeatable(batches, layerwise), layerwise, None)
    nnx.update(model, nnx.filter_state(found, nnx.BatchStat))
    return model


def _recalibrated(run, variables, batches, layerwise, rngs):
    """The variables with new statistics."""

    @jax.jit
    def observe(variables, batch, number):
        keys = {name: jax.random.fold_in(key, number) for name, key in (rngs or {}).items()}
        return run(variables, batch, rngs=keys).seen

    move = jax.jit(lambda variables, seen: run.moved(variables, seen, _replaced))
    passes = 0
    while True:
        passes += 1
        parts = enumerate(batches())
        seen = _total(observe(variables, batch, number) for number, batch in parts)
        if not run.sites:
            raise ValueError("recalibrate: the call reaches no norm that has running statistics.")
        old, variables = variables, move(variables, seen)
        if not layerwise or passes >= _norms(run.sites, seen) or _same(old, variables):
            return variables


def _evaluated(call, model, batch):
    if isinstance(model, nnx.Module):
        model.eval()
    return model(batch) if call is None else call(model, batch)


def _repeatable(batches: Any, layerwise: bool) -> Callable[[], Any]:
    """A function that returns an iterator over the batches."""
    if callable(batches):
        return batches
    if isinstance(batches, jax.Array | np.ndarray | Mapping):
        raise TypeError(
            f"recalibrate: batches is a single batch, {type(batches).__name__}: put it in a list."
        )
    if layerwise and isinstance(batches, Iterator):
        raise ValueError(
            f"recalibrate: layerwise=True goes through the batches several times, but batches is "
            f"an iterator, {type(batches).__name__}: give a list, or a function that returns one."
        )
    return lambda: batches


def _chosen(where, layerwise, path, method):
    """The method that is to be recalibrated, for batches that are global; None: it stays."""
    if where is not None and not where(path, method):
        return None
    name = f"recalibrate: {'/'.join(map(str, path)) or type(method).__name__}"
    for one in _leaves(method):
        if getattr(one, "axis_index_groups", None) is not None and not layerwise:
            raise ValueError(
                f"{name}: axis_index_groups divide the batch over devices, which a global batch is "
                "not: take layerwise=True."
            )
        if isinstance(one, SpectralBatchNorm) and one.unbiased_running_var:
            raise ValueError(
                f"{name}: unbiased_running_var=True of SpectralBatchNorm goes by the size of maps, "
                "which pooled statistics do not have. Leave the norm out by `where`."
            )
    return replace(method, axis_name=None, axis_index_groups=None)


def _leaves(method):
    """The methods that `method` is made of, and itself."""
    return [method, *(one for part in parts(method) for one in _leaves(part))]


def _total(every):
    """The statistics of all: those of equally many batches are merged, as digits are carried."""
    levels = []
    for seen in every:
        level = 0
        while level < len(levels) and levels[level] is not None:
            seen, levels[level] = _merge(levels[level], seen), None
            level += 1
        levels[level : level + 1] = [seen]
    rest = [seen for seen in levels if seen is not None]
    if not rest:
        raise ValueError("recalibrate: there are no batches.")
    return functools.reduce(_merge, rest)


def _norms(sites, seen):
    """How many norms there are, those of stacked layers and the links of chains counted."""
    total = 0
    for path, site in sites.items():
        first, shape = (jax.tree.leaves(tree)[0] for tree in (seen[path], site.seen))
        stacked = first.size // max(shape.size, 1)
        links = jax.tree.leaves(site.seen, is_leaf=lambda node: hasattr(node, "_fields"))
        total += stacked * len(links)
    return total


@jax.jit
def _same(old, new):
    """Whether two trees have the same numbers, bit for bit, or both none."""
    alike = lambda a, b: jnp.all((a == b) | ((a != a) & (b != b)))
    return jnp.all(jnp.stack(jax.tree.leaves(jax.tree.map(alike, old, new))))


def _replaced(method, state, seen):
    """`state` with the statistics `seen` in place of its own, where there are values."""
    if not any(hasattr(one, "momentum") for one in _leaves(method)):
        raise ValueError(
            f"recalibrate: {type(method).__name__} has no field momentum, which at 0 makes it "
            "forget its old statistics. Leave the norm out by `where`."
        )
    forget = replace(method, momentum=0.0, running_average="exponential")
    for form, alpha in (("update", 0.0), ("covariance", 0.5)):
        is_form = lambda m, form=form: (
            isinstance(m, StochasticWhiteningBatchNorm) and m.form == form
        )
        forget = replace(forget, where=is_form, alpha=alpha, half_life=None)
    old = jax.tree.map(lambda a: jnp.where(jnp.isfinite(a), a, jnp.ones((), a.dtype)), state)
    history = getattr(state, "pool", None)
    new = forget.absorb(old if history is None else old._replace(pool=None), seen)
    if history is not None:
        count = seen.count.reshape(history.count.shape).astype(history.count.dtype)
        fresh = Pool(count, *(jnp.zeros_like(count),) * 3)
        keep = lambda a, b: jnp.where(count > 0, a, b)
        new = new._replace(pool=jax.tree.map(keep, fresh, history))
    if getattr(state, "count", None) is not None:
        new = new._replace(count=jnp.maximum(state.count, 1))
    return new


def sync(statistics: Any, *, axis_name: AxisName = None, counts: jax.Array | None = None) -> Any:
    """One set of running statistics from those of replicas that trained apart.

    Means are averaged, and variances by the law of total variance, `mean(var + (mean_i - mean)^2)`:
    the variance of a mixture of the replicas. Covariances likewise. That is exact for statistics of
    all values; of moving averages it is a mixture of what each has seen lately. "pooled" states
    weigh by their own counts, which add up: they must have no values in common. Counts of updates
    become the largest, and all else is averaged.

    Args:
      statistics: of norms, each leaf [replicas, ...]: a state of a method, the `batch_stats` of
        Linen, an `nnx.State`, or any tree of these.
      axis_name: the mapped axis of the replicas, inside of `shard_map`, `pmap` or `vmap`; each then
        gives its own statistics, without an axis in front.
      counts: how much each replica weighs, such as its number of samples, [replicas] or one number
        of each; None: all alike.

    Returns the same tree without the axis of replicas. ValueError for whitening matrices, which
    have no mean, and for leaves with different numbers of replicas.

    Example:
      >>> import jax.numpy as jnp, normjax.population as population
      >>> two = {"norm": {"mean": jnp.array([[0.0], [2.0]]), "var": jnp.array([[1.0], [1.0]])}}
      >>> one = population.sync(two)["norm"]
      >>> one["mean"].tolist(), one["var"].tolist()
      ([1.0], [2.0])
    """
    leaves, structure = jax.tree.flatten_with_path(statistics)
    paths = [tuple(_key(key) for key in path if _key(key) != "value") for path, _ in leaves]
    if wrong := ["/".join(path) for path in paths if path[-1] == "matrix"]:
        raise ValueError(
            f"sync: {wrong[0]}: whitening matrices of replicas have no mean. Recalibrate, or keep "
            "covariances (stored='covariance', form='covariance')."
        )
    arrays = [jnp.asarray(leaf) for _, leaf in leaves]
    if axis_name is not None:
        return structure.unflatten(_merged(paths, arrays, counts, axis_name))
    sizes = {a.shape[:1] for a in (*arrays, *([] if counts is None else [jnp.asarray(counts)]))}
    if len(sizes) != 1 or () in sizes:
        shapes = sorted({a.shape for a in arrays})
        raise ValueError(
            f"sync: statistics of shapes {shapes} with counts={counts}: the first axis of all is "
            "that of the replicas; inside of a mapped function give its axis_name."
        )
    one = functools.partial(_merged, paths, axis_name="replicas")
    mapped = jax.vmap(one, axis_name="replicas", out_axes=None)
    return structure.unflatten(mapped(arrays, None if counts is None else jnp.asarray(counts)))


def _key(key):
    return jax.tree_util.keystr((key,), simple=True)


def _merged(paths, arrays, counts, axis_name):
    """The leaves of all replicas along `axis_name`, merged node by node."""
    nodes = collections.defaultdict(dict)
    for path, a in zip(paths, arrays, strict=True):
        depth = 2 if "pool" in path[-2:-1] else 1
        nodes[path[:-depth]]["/".join(path[-depth:])] = a
    merged = {node: _merged_node(leaves, counts, axis_name) for node, leaves in nodes.items()}
    flat = {(*node, *name.split("/")): a for node in merged for name, a in merged[node].items()}
    return [flat[path].astype(a.dtype) for path, a in zip(paths, arrays, strict=True)]


def _merged_node(leaves, counts, axis_name):
    """The leaves of one state, by name."""
    own = leaves.get("pool/count")
    weight = jnp.ones(()) if counts is None else counts
    if own is not None:
        weight = own[0] if "mean_real" in leaves else own
        weight = jnp.where(lax.psum(weight, axis_name) > 0, weight, 1)
    total = lax.psum(weight, axis_name)
    average = lambda a: lax.psum(weight.astype(a.dtype) * a, axis_name) / total.astype(a.dtype)
    gaps = [a - average(a) for name, a in leaves.items() if name in MEANS]
    new = {}
    for name, a in leaves.items():
        if name == "var":
            a = average(a + sum(map(jnp.square, gaps)))
        elif name == "cov":
            a = average(a + sum(_outer(gap, a.shape) for gap in gaps))
        elif name in ("count", "pool/count"):
            a = (lax.pmax if name == "count" else lax.psum)(a, axis_name)
        elif name.startswith("pool/"):
            a = jnp.zeros_like(a)
        else:
            a = average(a)
        new[name] = a
    return new


def _outer(gap, shape):
    """Products of the features of each group, of the shape of covariances."""
    rows = gap.reshape(math.prod(shape[:-3]), -1)
    blocks = jax.vmap(lambda row: matrices.block_features(row, shape[-1]))(rows)
    return (blocks[..., :, None] * blocks[..., None, :]).reshape(shape)
