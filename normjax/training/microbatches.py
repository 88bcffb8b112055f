"""Gradients of a batch in parts, one after the other, with the statistics of norms kept right.

The activations of one part are in memory at a time. The gradient is that of the weighted mean of
the losses of the whole batch, however many samples of each part count: a sum over parts in at least
float32, divided once. With norms of single samples (`LayerNorm`, `GroupNorm`), and with running
statistics that are frozen, it is that of the whole batch in one. Batch norms normalize every part
by its own statistics: with k parts they are `Ghost(norm, groups=k)`. Norms that depend on their old
statistics (`BatchRenorm`) see the same in all parts, where statistics move once. "pooled" records
the moments of the input of `KalmanNorm`; what it makes of a prior, the other ways do.

Parts are blocks of consecutive samples, as the groups of `Ghost`; under `shard_map` and `pmap` of
the samples of each device, whose gradients are summed over devices once. Under `jit` the samples of
a part lie over all devices, and gradients are summed over devices for every part.

`optax.MultiSteps(optimizer, k)` accumulates over k calls of a step instead, and weighs them alike:
exact where as many samples count in each. Norms then move at each call; with the momentum
`m ** (1 / k)` they forget as fast as with m once in k calls.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import linen, nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from normjax.core import checks, groups, running
from normjax.core.sharding import place, spec
from normjax.core.structs import several
from normjax.observers import merge, merge_stacked, observer
from normjax.training.models import Device, own_streams, stream_keys, unsown
from normjax.training.steps import Loss, Metrics, measure

__all__ = ["accumulate", "statistics_accumulator"]

MOVES = "pooled", "averaged", "sequential"
Gradient = Callable[..., tuple[Any, tuple[Metrics, Any]]]


def accumulate(
    model: linen.Module | nnx.Module,
    loss: Callable[[Callable[..., Any], Any, bool], Loss],
    parts: int,
    *,
    statistics: Literal["pooled", "averaged", "sequential"] = "pooled",
    streams: tuple[str, ...] = ("dropout",),
) -> Gradient:
    """A function that takes the gradient of a batch in parts, by `lax.scan`; see the module.

    Args:
      model, loss, streams: as in `make_train_step`. The penalty of a part counts as much as its
        losses do.
      parts: how many there are; divides the batch. Pad it, and give the padding no weight.
      statistics: how the norms' running statistics move. "pooled": once, by the statistics of the
        whole batch, which `nj.pool` makes of those of the parts. "averaged": by the mean of what
        each part makes of the old ones, over parts with a sample, as in `Ghost`. "sequential": by
        one part after the other. All other state moves from part to part.

    Returns `gradient(state, batch)`, which for a `TrainState` returns `(gradients, (metrics,
    statistics))` with the structure of its `params` and `statistics`: for a step of your own, or as
    the `gradient` of `make_train_step`. The batch is a tree of arrays, [samples, ...].

    ValueError for `parts` below one or that do not divide the batch, and other `statistics`.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, optax, normjax.linen
      >>> import normjax.training as training
      >>> model = nn.Sequential([nn.Dense(8), normjax.linen.BatchNorm(use_running_average=False)])
      >>> def loss(model, batch, train):
      ...     return training.Loss(jnp.square(model(batch["x"]) - 1).mean(-1), batch["mask"])
      >>> batch = {"x": jax.random.normal(jax.random.key(1), (8, 3)), "mask": jnp.arange(8) < 7}
      >>> optimizer, key = optax.sgd(0.1), jax.random.key(0)
      >>> state = training.create_train_state(model, optimizer, key, batch["x"])
      >>> gradient = training.accumulate(model, loss, parts=4)
      >>> gradients, (metrics, moved) = jax.jit(gradient)(state, batch)
      >>> metrics.weight.item(), moved["batch_stats"]["layers_1"]["mean"].shape
      (7.0, (8,))
      >>> step = training.make_train_step(model, optimizer, loss, gradient=gradient)
      >>> state, metrics = step(state, batch)
    """
    checks.require("accumulate", "parts", parts, checks.positive)
    checks.require("accumulate", "statistics", statistics, checks.one_of(*MOVES))
    model = unsown(model) if isinstance(model, nnx.Module) else model
    how = dict(parts=parts, statistics=statistics, streams=streams)
    return functools.partial(_gradient, model, loss, how)


def _gradient(model, loss, how, state, batch, device=None):
    """Gradients, and the metrics and statistics: what `accumulate` says."""
    parts, statistics, streams = how["parts"], how["statistics"], how["streams"]
    device = Device() if device is None else device
    run = observer(model, functools.partial(_loss_of_part, loss, device))
    join, split = _parting(model)
    key = None if state.key is None else jax.random.fold_in(state.key, state.step)

    def objective(params, now, batch, rngs):
        found = run(join(params, now), batch, rngs=rngs)
        sums = measure(found.output)
        penalty = sums.weight * found.output.penalty
        return sums.sums["loss"] + penalty, (sums, found.variables, found.seen)

    def part(carry, each):
        (total, now), (number, batch) = carry, each
        ours = None if key is None else jax.random.fold_in(key, number)
        rngs = None if ours is None else stream_keys(ours, streams, device)
        given = device.own(state.params), now, batch, rngs
        more, (sums, variables, seen) = jax.grad(objective, has_aux=True)(*given)
        total = jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, more)
        new = run.states(variables) if statistics == "averaged" else {}
        if statistics != "sequential":
            old = run.states(join(state.params, state.statistics))
            variables = run.put(variables, old)
        device.check(split(variables))
        return (total, split(variables)), (sums, seen, new)

    wide = lambda a: jnp.zeros_like(a, jnp.promote_types(a.dtype, jnp.float32))
    start = device.own(jax.tree.map(wide, state.params)), state.statistics
    each = jnp.arange(parts, dtype=jnp.int32), _divide(batch, parts, device)
    (total, now), (sums, seen, new) = lax.scan(part, start, each)
    sums = jax.tree.map(lambda a: jnp.sum(a, 0), sums)
    weight = device.sum(sums.weight)
    share = jnp.where(weight > 0, 1 / jnp.where(weight > 0, weight, 1), 0)
    mean = lambda total, a: (total * share.astype(total.dtype)).astype(a.dtype)
    moved = _committed(run, join(state.params, now), seen, new, statistics)
    return jax.tree.map(mean, total, state.params), (sums, split(moved))


def _loss_of_part(loss, device, model, batch):
    """The loss of a training step, as an observer calls it."""
    if not isinstance(model, nnx.Module):

        def call(*args, mutable=None, **kwargs):
            if mutable is not None:
                raise ValueError(
                    f"accumulate: mutable={mutable!r}: what a model sows is not to be had in parts "
                    "of a batch. Return what the loss needs from the model."
                )
            return model(*args, **kwargs)

        return loss(call, batch, True)
    model.train()
    restore = own_streams(model, device)
    found = loss(model, batch, True)
    restore()
    return found


def _parting(model):
    """Functions that make all variables of parameters and other state, and take them apart."""
    if isinstance(model, nnx.Module):
        return nnx.merge_state, lambda variables: nnx.split_state(variables, nnx.Param, ...)[1]
    join = lambda params, rest: {"params": params, **rest}
    return join, lambda variables: {k: a for k, a in variables.items() if k != "params"}


def _divide(batch, parts, device):
    """The batch with an axis of parts in front, each of them on all devices."""

    def divide(a):
        a = jnp.asarray(a)
        if a.ndim == 0 or a.shape[0] % parts:
            raise ValueError(
                f"accumulate: parts={parts} do not divide a batch of shape {a.shape}. pad_batch "
                "adds samples that a mask leaves out."
            )
        axes, rest = spec(a)[0], spec(a)[1:]
        a = groups.split(a, 0, parts)
        if axes is not None:
            mesh = jax.typeof(a).sharding.mesh
            fits = a.shape[1] % math.prod(mesh.shape[name] for name in several(axes)) == 0
            return place(a, (None, axes if fits else None, *rest), like=a)
        axes = () if device.axes else tuple(sorted(device.batch_axes))
        meshes = [s.mesh for s in jax.tree.leaves(device.where) if isinstance(s, NamedSharding)]
        if not axes or not meshes or a.shape[1] % math.prod(meshes[0].shape[n] for n in axes):
            return a
        return lax.with_sharding_constraint(a, NamedSharding(meshes[0], PartitionSpec(None, axes)))

    return jax.tree.map(divide, batch)


def _committed(run, variables, seen, new, how):
    """The variables with the norms' statistics after all parts."""
    if how == "pooled":
        return run.moved(variables, merge_stacked(seen), lambda m, state, one: m.absorb(state, one))
    old, moved = run.states(variables), {}
    for path, states in new.items():
        counts = [a.count for a in jax.tree.leaves(seen[path], is_leaf=_is_statistics)]
        filled = functools.reduce(jnp.logical_or, map(_any, counts))
        moved[path] = running.average_filled(old[path], states, filled)
    return run.put(variables, moved)


def _is_statistics(node):
    return hasattr(node, "count") and hasattr(node, "_fields")


def _any(count):
    """Whether parts have values, of their counts [parts, ...]."""
    return jnp.any(count > 0, range(1, count.ndim))


def statistics_accumulator() -> optax.microbatching.Accumulator:
    """Pools statistics over the parts of `optax.microbatch`, an accumulator beside those of optax.

    For any tree of what methods observe: the other outputs of the function are accumulated as
    `optax.microbatching.AccumulationType` says, and the statistics absorbed once.

    Example:
      >>> import jax.numpy as jnp, normjax as nj, optax, normjax.training as training
      >>> norm, x = nj.BatchNorm(momentum=0.5), jnp.arange(16.0).reshape(8, 2)
      >>> params, state = norm.init(None, 2)
      >>> def part(x):
      ...     y, _ = norm.apply(params, state, x, train=True)
      ...     return jnp.sum(y**2), norm.observe(x)
      >>> how = optax.microbatching.AccumulationType.SUM, training.statistics_accumulator()
      >>> total, seen = optax.microbatch(part, 0, microbatch_size=4, accumulator=how)(x)
      >>> norm.absorb(state, seen).mean.tolist()
      [3.5, 4.0]
    """
    nothing = lambda value: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), value)
    update = lambda carry, value, index: merge(carry, value)
    return optax.microbatching.Accumulator(nothing, update, lambda carry: carry, merge_stacked)
