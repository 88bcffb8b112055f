"""Oracles of methods that treat parts of the batch apart, and their recorded layers."""

import types

import numpy as np
from oracles import (
    GRADIENTS,
    ORACLES,
    apply,
    f64,
    finish,
    gradients,
    layout,
    moments,
    pull_affine,
    tree_mean,
    update,
)
from vector_files import LAYERS

import normjax as nj


def split(groups, *arrays):
    """The parts of each array, part by part."""
    return zip(*(np.split(a, groups) for a in arrays), strict=True)


def inputs_of(part, inputs):
    """The inputs of one part: its own of `EachPart`, the others whole."""
    own = lambda a: type(a.value)(*(leaf[part] for leaf in a.value))
    return {name: own(a) if isinstance(a, nj.EachPart) else a for name, a in inputs.items()}


@ORACLES("Ghost")
def ghost(method, params, state, x, mask, train, **inputs):
    if not train:
        return apply(method.method, params, state, x, train=False, mask=mask)
    results, filled = [], []
    for i, (part, valid) in enumerate(split(method.groups, x, mask)):
        own = inputs_of(i, inputs)
        results.append(apply(method.method, params, state, part, train=True, mask=valid, **own))
        filled.append(valid.any() and (method.running == "all" or i == 0))
    y, states = zip(*results, strict=True)
    states = [new for new, one in zip(states, filled, strict=True) if one]
    return np.concatenate(y), tree_mean(states) if states else state


@GRADIENTS("Ghost")
def ghost_gradients(method, params, state, x, g, mask):
    parts = [
        gradients(method.method, params, state, part, part_g, mask=valid)
        for part, part_g, valid in split(method.groups, x, g, mask)
    ]
    dx, dscale, dbias = zip(*parts, strict=True)
    return np.concatenate(dx), sum(dscale), sum(dbias)


def as_ghost(method, x):
    """The `Ghost` around a batch norm that a ghost batch norm is."""
    inner = type("BatchNorm", (types.SimpleNamespace,), {})(**vars(method))
    groups = len(x) // (method.ghost_batch_size or len(x))
    return types.SimpleNamespace(method=inner, groups=groups, running="all")


@ORACLES("GhostBatchNorm")
def ghost_batch_norm(method, params, state, x, mask, train):
    return ghost(as_ghost(method, x), params, state, x, mask, train)


@GRADIENTS("GhostBatchNorm", "EvalNorm")
def ghost_batch_norm_gradients(method, params, state, x, g, mask):
    return ghost_gradients(as_ghost(method, x), params, state, x, g, mask)


@ORACLES("EvalNorm")
def eval_norm(method, params, state, x, mask, train):
    if train:
        return ghost_batch_norm(method, params, state, x, mask, train)
    at = layout(x.shape, method.axis, kept=(0,))
    count, own_mean, own_var = moments(x, mask, at.axes)
    weight = method.ghost_batch_size ** -(2.0 if method.own_weight == "1/N^2" else 1.0)
    weight = np.where(count > 0, weight, 0)
    mean, var = f64(state.mean, at.leaf), f64(state.var, at.leaf)
    # Mean and variance of a mixture of two distributions.
    both = (1 - weight) * mean + weight * own_mean
    square = (1 - weight) * (var + mean**2) + weight * (own_var + own_mean**2)
    y = (np.where(mask, x, 0) - both) / np.sqrt(square - both**2 + method.epsilon)
    return finish(method, params, y, at.leaf), state


def others_of(method, x):
    """Of each sample, which others are in its group."""
    size = method.ghost_batch_size or len(x)
    for i in range(len(x)):
        first = i - i % size
        yield i, [j for j in range(first, first + size) if j != i]


@ORACLES("ExclusiveBatchNorm")
def exclusive_batch_norm(method, params, state, x, mask, train):
    if not train:
        return ORACLES["BatchNorm"](method, params, state, x, mask, train)
    at, y = layout(x.shape, method.axis), np.empty_like(x)
    for i, others in others_of(method, x):
        count, mean, var = moments(x[others], mask[others], at.axes)
        _, own_mean, own_var = moments(x[i : i + 1], mask[i : i + 1], at.axes)
        mean, var = np.where(count > 0, mean, own_mean), np.where(count > 0, var, own_var)
        y[i] = ((np.where(mask[i], x[i], 0) - mean) / np.sqrt(var + method.epsilon))[0]
    count, mean, var = moments(x, mask, at.axes)
    state = update(method, state, count, count, mean=mean, var=var)
    return finish(method, params, y, at.leaf), state


@GRADIENTS("ExclusiveBatchNorm")
def exclusive_gradients(method, params, state, x, g, mask):
    """With the others' mean and variance by hand; every sample must have valid others."""
    _, axes, leaf = layout(x.shape, method.axis)
    scale = np.ones(leaf) if params.scale is None else f64(params.scale, leaf)
    dx, z = np.zeros_like(x), np.empty_like(x)
    for i, others in others_of(method, x):
        count, mean, var = moments(x[others], mask[others], axes)
        assert count.all()
        s, one = 1 / np.sqrt(var + method.epsilon), slice(i, i + 1)
        c, h = np.where(mask[one], x[one], 0) - mean, g[one] * scale
        z[one] = c * s
        dx[one] += h * s
        dmean = -(h * s).sum(axes, keepdims=True)
        dvar = -s / (var + method.epsilon) / 2 * (h * c).sum(axes, keepdims=True)
        gaps = np.where(mask[others], x[others] - mean, 0)
        dx[others] += np.where(mask[others], (dmean + 2 * gaps * dvar) / count, 0)
    affine = (a.reshape(np.shape(state.mean)) for a in pull_affine(leaf, z, g))
    return np.where(mask, dx, 0), *affine


@LAYERS("ghost_batch_norm")
def recorded_ghost_batch_norm(config, arrays, common, running):
    own = {"constant_statistics": config["stop_stats_grad"]}
    return nj.GhostBatchNorm(config["ghost_size"], **common, **running, **own)


@LAYERS("exclusive_batch_norm")
def recorded_exclusive_batch_norm(config, arrays, common, running):
    return nj.ExclusiveBatchNorm(config["group_size"], **common, **running)


@LAYERS("eval_norm")
def recorded_eval_norm(config, arrays, common, running):
    return nj.EvalNorm(config["ghost_size"], **common, **running, own_weight="1/N^2")
