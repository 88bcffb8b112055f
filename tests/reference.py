"""Float64 NumPy oracles for the methods, written from the papers' equations.

`apply(method, params, state, x, train=..., mask=...)` returns what a method's `apply` should, and
`gradients` what its derivative should. A method is known by the name of its class and read through
its fields, so that any object with those fields will do.

Masks: statistics are over the valid positions, count 0 gives mean 0 and variance 0, and the output
formula sees x = 0 at the masked positions.
"""

from typing import NamedTuple

import numpy as np


class Params(NamedTuple):
    scale: np.ndarray | None = None
    bias: np.ndarray | None = None
    alpha: np.ndarray | None = None


class Running(NamedTuple):
    mean: np.ndarray
    var: np.ndarray
    count: np.ndarray | None = None


def apply(method, params, state, x, *, train, mask=None):
    """Output and new state, both in float64."""
    x, mask = _prepare(x, mask)
    return APPLY[type(method).__name__](method, params, state, x, mask, train)


def gradients(method, params, state, x, cotangent, *, mask=None):
    """Gradients of `sum(y * cotangent)` in training with respect to x, scale and bias."""
    x, mask = _prepare(x, mask)
    g = _f64(cotangent)
    if type(method).__name__ == "Ghost":
        parts = [
            gradients(method.method, params, state, part, part_g, mask=part_mask)
            for part, part_g, part_mask in zip(*_split(method.groups, x, g, mask), strict=True)
        ]
        dx, dscale, dbias = zip(*parts, strict=True)
        return np.concatenate(dx), sum(dscale), sum(dbias)

    work, axes, leaf = _layout(method, x.shape)
    shape, features = x.shape, tuple(x.shape[i] for i in _feature_axes(method, x.ndim))
    x, mask, g = x.reshape(work), mask.reshape(work), g.reshape(work)
    scale = np.ones(leaf) if params.scale is None else _f64(params.scale, leaf)

    count, mean, var = _moments(method, x, mask, axes)
    r, d = _correction(method, state, mean, var)
    s = r / np.sqrt(var + method.epsilon)
    c = np.where(mask, x, 0) - mean
    # y = (c s + d) scale + bias, where c = x - mean, s = r (var + epsilon)^(-1/2) and r, d are
    # constants (1 and 0 but in batch renormalization). Through each path:
    #   mean: dL/dmean = -sum(g scale s); d mean / dx = 1 / n     (var has no derivative in mean)
    #   var:  dL/dvar  = -s / (var + epsilon) / 2 sum(g scale c); d var / dx = 2 c / n
    dmean = -(g * scale * s).sum(axes, keepdims=True)
    dvar = -s / (var + method.epsilon) / 2 * (g * scale * c).sum(axes, keepdims=True)
    if type(method).__name__ == "RMSNorm":
        dmean = np.zeros_like(dmean)
    dx = np.where(mask, g * scale * s + (dmean + 2 * c * dvar) / np.maximum(count, 1), 0)

    over = tuple(i for i, n in enumerate(leaf) if n == 1)
    dscale, dbias = (a.sum(over).reshape(features) for a in (g * (c * s + d), g))
    return dx.reshape(shape), dscale, dbias


def _f64(a, shape=None):
    a = np.asarray(a).astype(np.float64)
    return a if shape is None else a.reshape(shape)


def _prepare(x, mask):
    x = _f64(x)
    return x, np.broadcast_to(True if mask is None else np.asarray(mask), x.shape)


def _axes(axes, ndim):
    return tuple(sorted(i % ndim for i in np.atleast_1d(axes)))


def _feature_axes(method, ndim):
    if type(method).__name__ == "GroupNorm":
        return (ndim - 1,)
    return _axes(method.feature_axes if hasattr(method, "feature_axes") else method.axis, ndim)


def _layout(method, shape):
    """Shape to work in, axes that the statistics reduce, shape of scale and bias there."""
    ndim, name, features = len(shape), type(method).__name__, _feature_axes(method, len(shape))
    if name == "GroupNorm":
        size = method.group_size or shape[-1] // method.num_groups
        groups = (shape[-1] // size, size)
        every = method.reduction_axes is None
        reduced = range(1, ndim) if every else _axes(method.reduction_axes, ndim)
        reduced = tuple(i for i in reduced if i != ndim - 1)
        return (*shape[:-1], *groups), (*reduced, ndim), (1,) * (ndim - 1) + groups
    if hasattr(method, "reduction_axes"):
        reduced = _axes(method.reduction_axes, ndim)
    else:
        kept = (0, *features) if name == "InstanceNorm" else features
        reduced = tuple(i for i in range(ndim) if i not in kept)
    return shape, reduced, tuple(n if i in features else 1 for i, n in enumerate(shape))


def _moments(method, x, mask, axes):
    """Count, mean and population variance over the valid positions; RMSNorm's are about zero."""
    count = mask.sum(axes, keepdims=True)
    n = np.maximum(count, 1)
    mean = np.where(mask, x, 0).sum(axes, keepdims=True) / n
    if type(method).__name__ == "RMSNorm":
        mean = np.zeros_like(mean)
    var = np.where(mask, (x - mean) ** 2, 0).sum(axes, keepdims=True) / n
    return count, mean, var


def _finish(method, params, y, leaf):
    """Scale, shift and activation."""
    for name, combine in (("scale", np.multiply), ("bias", np.add)):
        value = getattr(params, name, None)
        y = y if value is None else combine(y, _f64(value, leaf))
    activation = getattr(method, "activation", None)
    return y if activation is None else _f64(activation(y))


def _stateless(method, params, state, x, mask, train):
    work, axes, leaf = _layout(method, x.shape)
    shape, x, mask = x.shape, x.reshape(work), mask.reshape(work)
    _, mean, var = _moments(method, x, mask, axes)
    y = (np.where(mask, x, 0) - mean) / np.sqrt(var + method.epsilon)
    return _finish(method, params, y, leaf).reshape(shape), state


def _batch_norm(method, params, state, x, mask, train):
    _, axes, leaf = _layout(method, x.shape)
    mean, var, r, d = _f64(state.mean, leaf), _f64(state.var, leaf), 1.0, 0.0
    if train:
        count, mean, var = _moments(method, x, mask, axes)
        r, d = _correction(method, state, mean, var)
        state = _update(method, state, count, mean, var)
    y = (np.where(mask, x, 0) - mean) / np.sqrt(var + method.epsilon) * r + d
    return _finish(method, params, y, leaf), state


def _correction(method, state, mean, var):
    """Batch renormalization's r and d, from the running statistics before the update."""
    if type(method).__name__ != "BatchRenorm":
        return 1.0, 0.0
    r_max, d_max = (
        float(limit(float(state.count))) if callable(limit) else limit
        for limit in (method.r_max, method.d_max)
    )
    old_mean, old_var = _f64(state.mean, mean.shape), _f64(state.var, mean.shape)
    old_sigma = np.sqrt(old_var + method.epsilon)
    r = np.clip(np.sqrt(var + method.epsilon) / old_sigma, 1 / r_max, r_max)
    return r, np.clip((mean - old_mean) / old_sigma, -d_max, d_max)


def _update(method, state, count, mean, var):
    """Running averages; a channel without valid positions keeps its own.

    `count` is the number of updates.
    """
    if method.skip_nonfinite and not (np.isfinite(mean).all() and np.isfinite(var).all()):
        return state
    if method.unbiased_running_var:
        var = var * count / np.maximum(count - 1, 1)
    m, done = method.momentum, None if state.count is None else float(state.count)
    if method.running_average == "exponential":
        old, new = m, 1 - m
    elif method.running_average == "debiased":
        total = 1 - m ** (done + 1)
        old, new = (m - m ** (done + 1)) / total, (1 - m) / total
    else:
        old, new = done / (done + 1), 1 / (done + 1)

    def blend(running, batch):
        running = _f64(running)
        moved = new * batch.reshape(running.shape) + (old * running if old else 0)
        return np.where(count.reshape(running.shape) > 0, moved, running)

    advanced = None if done is None else done + float((count > 0).any())
    return state._replace(mean=blend(state.mean, mean), var=blend(state.var, var), count=advanced)


def _affine(method, params, state, x, mask, train):
    _, _, leaf = _layout(method, x.shape)
    return _finish(method, params, np.where(mask, x, 0), leaf), state


def _dynamic_tanh(method, params, state, x, mask, train):
    _, _, leaf = _layout(method, x.shape)
    return _finish(method, params, np.tanh(float(params.alpha) * np.where(mask, x, 0)), leaf), state


def _split(groups, *arrays):
    return [np.split(a, groups) for a in arrays]


def _ghost(method, params, state, x, mask, train):
    if not train:
        return apply(method.method, params, state, x, train=False, mask=mask)
    masks = _split(method.groups, mask)[0]
    parts = [
        apply(method.method, params, state, part, train=True, mask=part_mask)
        for part, part_mask in zip(*_split(method.groups, x, mask), strict=True)
    ]
    y, states = zip(*parts, strict=True)
    filled = [new for new, part_mask in zip(states, masks, strict=True) if part_mask.any()]
    return np.concatenate(y), _tree_mean(filled or states)


def _tree_mean(trees):
    first = trees[0]
    if first is None:
        return None
    if isinstance(first, dict):
        return {k: _tree_mean([t[k] for t in trees]) for k in first}
    if isinstance(first, tuple):
        leaves = [_tree_mean(leaf) for leaf in zip(*trees, strict=True)]
        return type(first)(*leaves) if hasattr(first, "_fields") else tuple(leaves)
    return np.mean(trees, axis=0)


def _chain(method, params, state, x, mask, train):
    new = {}
    for i, link in enumerate(method.methods):
        name = f"{type(link).__name__}_{i}"
        x, new[name] = apply(link, params[name], state[name], x, train=train, mask=mask)
    return x, new


APPLY = {
    "BatchNorm": _batch_norm,
    "BatchRenorm": _batch_norm,
    "LayerNorm": _stateless,
    "RMSNorm": _stateless,
    "GroupNorm": _stateless,
    "InstanceNorm": _stateless,
    "Affine": _affine,
    "DynamicTanh": _dynamic_tanh,
    "Ghost": _ghost,
    "Chain": _chain,
}
