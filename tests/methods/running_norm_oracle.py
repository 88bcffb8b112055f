"""Oracle of RunningNorm: it moves the statistics, then normalizes by them."""

import numpy as np
from oracles import ORACLES, f64, finish, layout, moments, update


def pooled(state, count, mean, var):
    """The statistics of all values, of those of the state and of a batch."""
    pool = state.pool
    done = f64(pool.count) + f64(pool.count_rest)
    old_mean, old_var = f64(state.mean) + pool.mean_rest, f64(state.var) + pool.var_rest
    total = np.maximum(done + count, 1)
    new_mean = (done * old_mean + count * mean) / total
    second = done * (old_var + old_mean**2) + count * (var + mean**2)
    seen = count > 0
    return (
        np.where(seen, new_mean, state.mean),
        np.where(seen, second / total - new_mean**2, state.var),
        np.where(seen, done + count, pool.count),
    )


@ORACLES("RunningNorm")
def running_norm(method, params, state, x, mask, train):
    at = layout(x.shape, method.axis)
    if train:
        count, mean, var = moments(x, mask, at.axes)
        if method.running_average == "pooled":
            flat = (np.reshape(a, np.shape(state.mean)) for a in (count, mean, var))
            mean, var, count = pooled(state, *flat)
            rest = np.zeros_like(mean)
            state = state._replace(mean=mean, var=var, pool=type(state.pool)(count, *(rest,) * 3))
        else:
            state = update(method, state, count, count, mean=mean, var=var)
    mean, var = f64(state.mean, at.leaf), f64(state.var, at.leaf)
    y = (np.where(mask, x, 0) - mean) / np.sqrt(var + method.epsilon)
    scaled = finish(type("Linear", (), {}), params, y, at.leaf)
    clip = np.inf if method.clip is None else method.clip
    scaled = np.clip(scaled, -clip, clip)
    return scaled if method.activation is None else f64(method.activation(scaled)), state
