"""Float64 NumPy oracles for the methods: what they share, and how they are called.

The oracles, written from the papers' equations, lie beside the tests of their methods in
`methods/*_oracle.py`. `apply(method, params, state, x, train=..., mask=...)` returns what a
method's `apply` should, and `gradients` what its derivative should. A method is known by the name
of its class and read through its fields, so that any object with those fields will do.

Masks: statistics are over the valid positions, count 0 gives mean 0 and variance 0, and the output
formula sees x = 0 at the masked positions. Masks of spectra hide whole samples.
"""

from typing import NamedTuple

import numpy as np
from registry import Registry

from normjax.core.method import parts

ORACLES = Registry()  # by class: (method, params, state, x, mask, train, **inputs) -> output, state
GRADIENTS = Registry()  # by class: (method, params, state, x, g, mask) -> of x, scale and bias


class Params(NamedTuple):
    scale: np.ndarray | None = None
    bias: np.ndarray | None = None
    alpha: np.ndarray | None = None


class Running(NamedTuple):
    mean: np.ndarray
    var: np.ndarray
    count: np.ndarray | None = None


class Layout(NamedTuple):
    """How statistics and parameters lie over an input."""

    shape: tuple[int, ...]  # in which to work
    axes: tuple[int, ...]  # which the statistics reduce
    leaf: tuple[int, ...]  # of scale and bias there


def apply(method, params, state, x, *, train, mask=None, **inputs):
    """Output and new state, both in float64."""
    x, mask = prepare(x, mask)
    return ORACLES[type(method).__name__](method, params, state, x, mask, train, **inputs)


def gradients(method, params, state, x, cotangent, *, mask=None):
    """Gradients of `sum(y * cotangent)` in training with respect to x, scale and bias.

    Those with respect to the scales and the biases of a chain are dicts by method.
    """
    x, mask = prepare(x, mask)
    return GRADIENTS[type(method).__name__](method, params, state, x, f64(cotangent), mask)


def has_gradients(method):
    """Whether `gradients` knows `method` and all that it is made of; activations it does not."""
    own = type(method).__name__ in GRADIENTS and getattr(method, "activation", None) is None
    return own and all(map(has_gradients, parts(method)))


def f64(a, shape=None):
    a = np.asarray(a).astype(np.float64)
    return a if shape is None else a.reshape(shape)


def prepare(x, mask):
    x = f64(x)
    return x, np.broadcast_to(True if mask is None else np.asarray(mask), x.shape)


def as_axes(axes, ndim):
    return tuple(sorted(i % ndim for i in np.atleast_1d(axes)))


def layout(shape, features, *, reduced=None, kept=()):
    """That of parameters for `features`; `reduced`: all axes but those and the ones `kept`."""
    features = as_axes(features, len(shape))
    if reduced is None:
        reduced = [i for i in range(len(shape)) if i not in (*features, *kept)]
    leaf = tuple(n if i in features else 1 for i, n in enumerate(shape))
    return Layout(shape, as_axes(reduced, len(shape)), leaf)


def moments(x, mask, axes):
    """Count, mean and population variance over the valid positions."""
    count = mask.sum(axes, keepdims=True)
    n = np.maximum(count, 1)
    mean = np.where(mask, x, 0).sum(axes, keepdims=True) / n
    return count, mean, np.where(mask, (x - mean) ** 2, 0).sum(axes, keepdims=True) / n


def finish(method, params, y, leaf):
    """Scale, shift and activation."""
    for name, combine in (("scale", np.multiply), ("bias", np.add)):
        value = getattr(params, name, None)
        y = y if value is None else combine(y, f64(value, leaf))
    return activate(method, y)


def activate(method, y):
    activation = getattr(method, "activation", None)
    return y if activation is None else f64(activation(y))


def pull(layout, params, statistics, epsilon, x, g, mask, *, r=1.0, d=0.0, constant=False):
    """Gradients of x, scale and bias, [features], for `((x - mean) s + d) scale + bias`.

    `s = r (var + epsilon)^(-1/2)`, with the `statistics` count, mean (None: zero) and var; r and d
    are constants, and so are mean and var if `constant`.
    """
    shape, scale = x.shape, np.ones(layout.leaf)
    if params.scale is not None:
        scale = f64(params.scale, layout.leaf)
    x, mask, g = (a.reshape(layout.shape) for a in (x, mask, g))
    count, mean, var = statistics
    s = r / np.sqrt(var + epsilon)
    c = np.where(mask, x, 0) - (0 if mean is None else mean)
    # Through each path:
    #   mean: dL/dmean = -sum(g scale s); d mean / dx = 1 / n     (var has no derivative in mean)
    #   var:  dL/dvar  = -s / (var + epsilon) / 2 sum(g scale c); d var / dx = 2 c / n
    dmean = -(g * scale * s).sum(layout.axes, keepdims=True)
    dvar = -s / (var + epsilon) / 2 * (g * scale * c).sum(layout.axes, keepdims=True)
    if mean is None:
        dmean = np.zeros_like(dmean)
    if constant:
        dmean, dvar = np.zeros_like(dmean), np.zeros_like(dvar)
    dx = np.where(mask, g * scale * s + (dmean + 2 * c * dvar) / np.maximum(count, 1), 0)
    return dx.reshape(shape), *pull_affine(layout.leaf, c * s + d, g)


def pull_affine(leaf, z, g):
    """Gradients of scale and bias, as flat as `leaf` without its axes of size one."""
    over = tuple(i for i, n in enumerate(leaf) if n == 1)
    return tuple(a.sum(over) for a in (g * z, g))


def update(method, state, count, size, **moments):
    """Running averages; a channel without valid positions keeps its own.

    `state.count` is the number of updates. The unbiased variance and covariance are those of `size`
    values.
    """
    if method.skip_nonfinite and not all(np.isfinite(a).all() for a in moments.values()):
        return state
    if method.unbiased_running_var:
        for name in moments.keys() & {"var", "cov"}:
            moments[name] = moments[name] * size / np.maximum(size - 1, 1)
    done = None if state.count is None else float(state.count)
    m = momentum_at(method, done)
    if method.running_average == "exponential":
        old, new = m, 1 - m
    elif method.running_average == "debiased":
        total = 1 - m ** (done + 1)
        old, new = (m - m ** (done + 1)) / total, (1 - m) / total
    else:
        assert method.running_average == "cumulative"
        old, new = done / (done + 1), 1 / (done + 1)

    def blend(running, batch):
        running = f64(running)
        moved = new * batch.reshape(running.shape) + (old * running if old else 0)
        valid = np.broadcast_to(count > 0, batch.shape).reshape(running.shape)
        return np.where(valid, moved, running)

    advanced = None if done is None else done + float((count > 0).any())
    moved = {name: blend(getattr(state, name), batch) for name, batch in moments.items()}
    return state._replace(**moved, count=advanced)


def momentum_at(method, done):
    """The weight of the old statistics after `done` updates."""
    return float(method.momentum(done)) if callable(method.momentum) else method.momentum


def tree_mean(trees):
    """The mean of states."""
    first = trees[0]
    if first is None:
        return None
    if isinstance(first, dict):
        return {k: tree_mean([t[k] for t in trees]) for k in first}
    if isinstance(first, tuple):
        leaves = [tree_mean(leaf) for leaf in zip(*trees, strict=True)]
        return type(first)(*leaves) if hasattr(first, "_fields") else tuple(leaves)
    return np.mean(trees, axis=0)


# What tests of oracles share.


def close(actual, desired, atol=1e-10):
    np.testing.assert_allclose(actual, desired, rtol=0, atol=atol)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def params_for(*features, seed=7):
    return Params(1 + 0.3 * draw(seed, *features), draw(seed + 1, *features))


def running_for(features, count=None):
    return Running(draw(3, features), 0.5 + draw(4, features) ** 2, count)


def check_slope(method, params, state, x, mask):
    """`gradients` against central differences along a random direction."""
    g, along_x = draw(1, *x.shape), draw(5, *x.shape)
    along = params_for(*params.scale.shape, seed=11)
    if params.bias is None:
        along = along._replace(bias=np.zeros(params.scale.shape))

    def loss(h):
        bias = None if params.bias is None else params.bias + h * along.bias
        moved = Params(params.scale + h * along.scale, bias)
        y, _ = apply(method, moved, state, x + h * along_x, train=True, mask=mask)
        return np.sum(y * g)

    dx, dscale, dbias = gradients(method, params, state, x, g, mask=mask)
    slope = (dx * along_x).sum() + (dscale * along.scale).sum() + (dbias * along.bias).sum()
    h = 1e-5
    close(slope, (loss(h) - loss(-h)) / (2 * h), atol=1e-6)
    assert not dx[~np.broadcast_to(mask, x.shape)].any()
