"""Weights that fit the data before training: batch norm at initialization only."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen, nnx

from normjax import folding, modules
from normjax.analysis.geometry.networks import Network
from normjax.core import checks
from normjax.core.fields import RunningFields
from normjax.core.method import parts
from normjax.core.statistics import Moments
from normjax.methods.batch import BatchNorm
from normjax.observers import observer


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Centred(BatchNorm):
    """Batch norm that takes the variance of the batch to be one."""

    def observe(self, *args: Any, **kwargs: Any) -> Any:
        seen = super().observe(*args, **kwargs)
        return Moments(seen.count, seen.mean, jnp.ones_like(seen.var))


def smart_init(
    model: linen.Module | nnx.Module,
    *args: Any,
    deviation: bool = True,
    fold: bool = False,
    **kwargs: Any,
) -> Any:
    """Statistics of batch norms from data, for weights that have not been trained.

    Balestriero & Baraniuk, *Batch Normalization Explained*, 2022, https://arxiv.org/abs/2209.14778:
    the boundaries of units with random weights then go through the data, which they call a smart
    initialization. What follows is up to the caller: train on with norms that evaluate (statistics
    stay those of the initialization), or fold them into the weights, which gives a network without
    norms that starts from there. As all samples are one batch, the statistics of every norm are
    exactly those that it meets behind the new ones of the norms in front.

    Args:
      model: of Linen or NNX; its norms are those of normjax.
      *args, **kwargs: those of `model.apply` in Linen, the variables first, and of the call in
        NNX; the first input are the samples, f[N, ...]. To fold, as for evaluation.
      deviation: True: mean and variance. False: the mean alone, and the variance stays one, as
        with biases that depend on the data: boundaries go through the mean of the inputs all the
        same. All norms with running statistics must then be `BatchNorm`.
      fold: return what `folding.fold` does: a model without the norms, and its variables. Norms
        that no layer can take, as some of residual networks, stay, with the new statistics.

    Returns the variables of Linen with new statistics. A model of NNX changes in place, and is
    returned. With `fold`, a `normjax.folding.Folded`; an NNX model that was given stays as it was.

    Raises:
      TypeError: for what is no Flax module, or no variables in Linen.
      ValueError: for samples that are not real numbers, a model without norms that have running
        statistics, and without `deviation` other norms than `BatchNorm`.

    Example:
      >>> import jax, flax.linen as nn, normjax.linen
      >>> from normjax.analysis import geometry
      >>> norm = normjax.linen.BatchNorm(use_running_average=True)
      >>> model = nn.Sequential([nn.Dense(8), norm, nn.relu, nn.Dense(2)])
      >>> x = 5 + jax.random.normal(jax.random.key(0), (100, 3))
      >>> variables = model.init(jax.random.key(1), x)
      >>> variables = geometry.smart_init(model, variables, x)
      >>> values = geometry.smart_init(model, variables, x, fold=True).variables["params"]
      >>> sorted(values), values["layers_0"]["bias"].shape
      (['layers_0', 'layers_3'], (8,))
    """
    for name, value in (("deviation", deviation), ("fold", fold)):
        checks.require("smart_init", name, value, checks.flag)
    network = Network.of("smart_init", model, args, kwargs)
    _require_norms(modules.norms(model, *args, **kwargs))
    variables = network.observed(network.x) if deviation else _centred(network)
    if isinstance(model, nnx.Module):
        new = nnx.merge(nnx.split(model)[0], variables, copy=True)
        if fold:
            return folding.fold(new, *args, **kwargs)
        nnx.update(model, nnx.filter_state(variables, nnx.BatchStat))
        return model
    if fold:
        return folding.fold(model, variables, *network.args, **kwargs)
    return variables


def _centred(network):
    """The variables with the means of the data, each behind the new ones in front of it."""

    def choose(path, method):
        if isinstance(method, BatchNorm):
            return _Centred(**{f.name: getattr(method, f.name) for f in dataclasses.fields(method)})
        if _runs(method):
            raise ValueError(
                f"smart_init: {'/'.join(map(str, path))} is {type(method).__name__}, but the mean "
                "alone can be set in BatchNorm: take deviation=True."
            )
        return None

    run = observer(network.model, network.call, train=True, choose=choose)
    seen = run(network.variables, network.x).seen
    move = lambda method, state, seen: state._replace(mean=seen.mean, var=seen.var)
    return run.moved(network.variables, seen, move)


def _require_norms(norms):
    if not any(map(_runs, norms.values())):
        raise ValueError("smart_init: the model calls no norm that has running statistics.")


def _runs(method):
    return isinstance(method, RunningFields) or any(map(_runs, parts(method)))


__all__ = ["smart_init"]
