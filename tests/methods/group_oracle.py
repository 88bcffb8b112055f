"""Oracles of GroupNorm and InstanceNorm, and the layers that vectors were recorded from."""

import numpy as np
from oracles import GRADIENTS, ORACLES, Layout, as_axes, finish, layout, moments, pull
from vector_files import LAYERS

import normjax as nj


def layout_of(method, shape):
    """InstanceNorm's; GroupNorm's works with an axis of groups before one of their channels."""
    if type(method).__name__ == "InstanceNorm":
        return layout(shape, method.feature_axes, kept=(0,))
    ndim, size = len(shape), method.group_size or shape[-1] // method.num_groups
    groups = (shape[-1] // size, size)
    every = method.reduction_axes is None
    reduced = range(1, ndim) if every else as_axes(method.reduction_axes, ndim)
    reduced = tuple(i for i in reduced if i != ndim - 1)
    return Layout((*shape[:-1], *groups), (*reduced, ndim), (1,) * (ndim - 1) + groups)


@ORACLES("GroupNorm", "InstanceNorm")
def group_norm(method, params, state, x, mask, train):
    shape, at = x.shape, layout_of(method, x.shape)
    x, mask = x.reshape(at.shape), mask.reshape(at.shape)
    _, mean, var = moments(x, mask, at.axes)
    y = (np.where(mask, x, 0) - mean) / np.sqrt(var + method.epsilon)
    return finish(method, params, y, at.leaf).reshape(shape), state


@GRADIENTS("GroupNorm", "InstanceNorm")
def group_norm_gradients(method, params, state, x, g, mask):
    at = layout_of(method, x.shape)
    statistics = moments(x.reshape(at.shape), mask.reshape(at.shape), at.axes)
    features = as_axes(getattr(method, "feature_axes", -1), x.ndim)
    dx, *rest = pull(at, params, statistics, method.epsilon, x, g, mask)
    return dx, *(a.reshape([x.shape[i] for i in features]) for a in rest)


@LAYERS("group_norm")
def recorded_group_norm(config, arrays, common, running):
    return nj.GroupNorm(**common, num_groups=config["num_groups"])


@LAYERS("instance_norm")
def recorded_instance_norm(config, arrays, common, running):
    if not running:
        return nj.InstanceNorm(**common)
    instances = nj.BatchNorm(**common, **running, unbiased_running_var=True)
    return nj.Ghost(instances, groups=len(arrays["x_1"]))
