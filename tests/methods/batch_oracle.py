"""Oracles of BatchNorm and BatchRenorm, and the layers that their vectors were recorded from."""

import jax
import numpy as np
from oracles import GRADIENTS, ORACLES, f64, finish, layout, moments, pull, update
from vector_files import LAYERS

import normjax as nj


@ORACLES("BatchNorm", "BatchRenorm")
def batch_norm(method, params, state, x, mask, train):
    at = layout(x.shape, method.axis)
    mean, var, r, d = f64(state.mean, at.leaf), f64(state.var, at.leaf), 1.0, 0.0
    if train:
        count, mean, var = moments(x, mask, at.axes)
        r, d = correction(method, state, mean, var)
        state = update(method, state, count, count, mean=mean, var=var)
    y = (np.where(mask, x, 0) - mean) / np.sqrt(var + method.epsilon) * r + d
    return finish(method, params, y, at.leaf), state


@GRADIENTS("BatchNorm", "BatchRenorm")
def batch_norm_gradients(method, params, state, x, g, mask):
    at = layout(x.shape, method.axis)
    count, mean, var = moments(x, mask, at.axes)
    r, d = correction(method, state, mean, var)
    constant = method.constant_statistics
    dx, *rest = pull(
        at, params, (count, mean, var), method.epsilon, x, g, mask, r=r, d=d, constant=constant
    )
    return dx, *(a.reshape(np.shape(state.mean)) for a in rest)


def correction(method, state, mean, var):
    """Batch renormalization's r and d, from the running statistics before the update."""
    if type(method).__name__ != "BatchRenorm":
        return 1.0, 0.0
    r_max, d_max = (
        float(limit(float(state.count))) if callable(limit) else limit
        for limit in (method.r_max, method.d_max)
    )
    old_mean, old_var = f64(state.mean, mean.shape), f64(state.var, mean.shape)
    old_sigma = np.sqrt(old_var + method.epsilon)
    r = np.clip(np.sqrt(var + method.epsilon) / old_sigma, 1 / r_max, r_max)
    return r, np.clip((mean - old_mean) / old_sigma, -d_max, d_max)


@LAYERS("batch_norm")
def recorded_batch_norm(config, arrays, common, running):
    return nj.BatchNorm(**common, **running, unbiased_running_var=True)


@LAYERS("scale_batch_norm")
def recorded_scale_batch_norm(config, arrays, common, running):
    start = config["scale_init"] if config["scale_init"] > 0 else 1.0
    initial = {"scale_init": jax.nn.initializers.constant(start)}
    return nj.BatchNorm(**common, **running, **initial, unbiased_running_var=True)
