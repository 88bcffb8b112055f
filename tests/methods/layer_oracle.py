"""Oracles of LayerNorm and RMSNorm, and the layers that their vectors were recorded from."""

import numpy as np
from oracles import GRADIENTS, ORACLES, finish, layout, moments, pull
from vector_files import LAYERS

import normjax as nj


def statistics_of(method, x, mask):
    """Layout, and count, mean (RMSNorm: None) and variance about it."""
    at = layout(x.shape, method.feature_axes, reduced=np.atleast_1d(method.reduction_axes))
    if type(method).__name__ != "RMSNorm":
        return at, moments(x, mask, at.axes)
    count, square, _ = moments(x**2, mask, at.axes)
    return at, (count, None, square)


@ORACLES("LayerNorm", "RMSNorm")
def layer_norm(method, params, state, x, mask, train):
    at, (_, mean, var) = statistics_of(method, x, mask)
    y = (np.where(mask, x, 0) - (0 if mean is None else mean)) / np.sqrt(var + method.epsilon)
    return finish(method, params, y, at.leaf), state


@GRADIENTS("LayerNorm", "RMSNorm")
def layer_norm_gradients(method, params, state, x, g, mask):
    at, statistics = statistics_of(method, x, mask)
    features = [x.shape[i] for i in sorted(np.atleast_1d(method.feature_axes) % x.ndim)]
    dx, *rest = pull(at, params, statistics, method.epsilon, x, g, mask)
    return dx, *(a.reshape(features) for a in rest)


@LAYERS("layer_norm")
def recorded_layer_norm(config, arrays, common, running):
    axes = tuple(config["normalized_axes"])
    return nj.LayerNorm(**common, reduction_axes=axes, feature_axes=axes)


@LAYERS("rms_norm")
def recorded_rms_norm(config, arrays, common, running):
    axes = tuple(config["normalized_axes"])
    del common["use_bias"]
    return nj.RMSNorm(**common, reduction_axes=axes, feature_axes=axes)
