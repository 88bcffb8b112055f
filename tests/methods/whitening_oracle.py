"""Oracles of the whitening norms, and the layers that their vectors were recorded from.

Inputs become rows: positions by features, or by the features of a group where all groups share one
matrix. Covariances and whitening matrices of all groups are one matrix that is zero between groups;
`blocks_of` and `matrix_of` go from there to the state, [groups, g, g], and back.
"""

import functools
from typing import NamedTuple

import numpy as np
from oracles import (
    GRADIENTS,
    ORACLES,
    Params,
    activate,
    as_axes,
    f64,
    finish,
    layout,
    pull,
    pull_affine,
    update,
)
from vector_files import LAYERS, STATES

import normjax as nj


class Whitened(NamedTuple):
    """State, with None for what a method does not keep."""

    mean: np.ndarray
    var: np.ndarray | None = None
    cov: np.ndarray | None = None
    matrix: np.ndarray | None = None
    count: np.ndarray | None = None


@ORACLES("DecorrelatedBatchNorm", "CholeskyBatchNorm", "IterativeNorm")
def batch_whitening(method, params, state, x, mask, train):
    rows, valid = rows_of(method, x, mask)
    if train:
        count, mean, cov = moments(rows, valid)
        matrix = in_groups(method, root, cov)
        stored = {"matrix": matrix} if method.stored == "matrix" else {"cov": cov}
        stored = {name: blocks_of(method, a) for name, a in stored.items()}
        state = update(method, state, count, count, mean=mean, **stored)
    else:
        mean, width = f64(state.mean).ravel(), rows.shape[1]
        if method.stored == "matrix":
            matrix = matrix_of(method, state.matrix, width)
        else:
            matrix = in_groups(method, root, matrix_of(method, state.cov, width))
    z = restored(method, product(method, rows - mean, matrix.T), x.shape)
    return finish(method, params, z, layout(x.shape, method.axis).leaf), state


@GRADIENTS("DecorrelatedBatchNorm", "CholeskyBatchNorm", "IterativeNorm")
def batch_whitening_gradients(method, params, state, x, g, mask):
    rows, valid = rows_of(method, x, mask)
    count, mean, cov = moments(rows, valid)
    matrix, c = in_groups(method, root, cov), rows - mean
    dz = pull_scale(method, params, g)
    # z = W c and c = x - mean: dW = sum dz c^T, dc = W^T dz, dmean = -sum dc. The covariance,
    # sum c c^T / n over the valid positions, has no derivative in the mean.
    dc = product(method, dz, matrix)
    dmean, dcov = -dc.sum(0), in_groups(method, pull_root, cov, dz.T @ c)
    if method.constant_statistics:
        dmean, dcov = np.zeros_like(dmean), np.zeros_like(dcov)
    dmoments = (dmean + 2 * product(method, c, dcov)) / max(count, 1)
    dx = np.where(valid, dc + dmoments, 0)
    z = restored(method, product(method, c, matrix.T), x.shape)
    return restored(method, dx, x.shape), *affine_gradients(method, z, g)


@ORACLES("SampleWhitening")
def sample_whitening(method, params, state, x, mask, train):
    y, of = np.zeros_like(x), of_samples(method)
    for own in groups_of_samples(method, mask):
        rows, valid = rows_of(of, x[own], mask[own])
        _, mean, cov = moments(rows, valid)
        y[own] = restored(of, (rows - mean) @ root(of, cov).T, x[own].shape)
    return activate(method, y), state


@GRADIENTS("SampleWhitening")
def sample_whitening_gradients(method, params, state, x, g, mask):
    dx = np.zeros_like(x)
    for own in groups_of_samples(method, mask):
        parts = (a[own] for a in (x, g, mask))
        dx[own], *_ = batch_whitening_gradients(of_samples(method), Params(), None, *parts)
    return dx, None, None


def of_samples(method):
    """What does to features, those along the axis of the batch, as `method` does to samples."""
    if method.steps is None:
        return nj.DecorrelatedBatchNorm(axis=0, epsilon=method.epsilon, group_size=None)
    return nj.IterativeNorm(axis=0, epsilon=method.epsilon, group_size=None, steps=method.steps)


def groups_of_samples(method, mask):
    """Indices of the samples of each group, without those that are masked as a whole."""
    size, present = method.group_size or len(mask), mask.reshape(len(mask), -1).any(1)
    groups = (np.arange(i, i + size) for i in range(0, len(mask), size))
    return [own[present[own]] for own in groups if present[own].any()]


@ORACLES("StochasticWhiteningBatchNorm")
def stochastic_whitening(method, params, state, x, mask, train):
    rows, valid = rows_of(method, x, mask)
    if train:
        count, mean, cov = moments(rows, valid)
        var = np.diag(cov)
        matrix, learnt = learn(method, state, cov)
        moved = update(method, state, count, count, mean=mean, var=var)
        # A batch that was skipped has left the very same state.
        state = moved._replace(**learnt) if count and moved is not state else moved
    else:
        mean, var = f64(state.mean).ravel(), f64(state.var).ravel()
        if method.form == "update":
            matrix = matrix_of(method, state.matrix, len(mean))
        else:
            matrix = in_groups(method, inverse_root, matrix_of(method, state.cov, len(mean)))
    standard = (rows - mean) / np.sqrt(var + method.epsilon)
    z = restored(method, product(method, standard, matrix.T), x.shape)
    return finish(method, params, z, layout(x.shape, method.axis).leaf), state


@GRADIENTS("StochasticWhiteningBatchNorm")
def stochastic_whitening_gradients(method, params, state, x, g, mask):
    """Those of batch normalization behind a constant matrix."""
    rows, valid = rows_of(method, x, mask)
    count, mean, cov = moments(rows, valid)
    var, (matrix, _) = np.diag(cov), learn(method, state, cov)
    standard = (rows - mean) / np.sqrt(var + method.epsilon)
    dstandard = product(method, pull_scale(method, params, g), matrix)
    dx, _, _ = pull(
        layout(rows.shape, -1),
        Params(),
        (count, mean, var),
        method.epsilon,
        rows,
        dstandard,
        np.broadcast_to(valid, rows.shape),
        constant=method.constant_statistics,
    )
    z = restored(method, product(method, standard, matrix.T), x.shape)
    return restored(method, dx, x.shape), *affine_gradients(method, z, g)


# Rows and groups.


def order_of(method, ndim):
    """Axes of positions, then those of features; and how many are of positions."""
    features = as_axes(method.axis, ndim)
    positions = tuple(i for i in range(ndim) if i not in features)
    return (*positions, *features), len(positions)


def as_rows(method, a):
    order, positions = order_of(method, a.ndim)
    moved = a.transpose(order)
    width = int(np.prod(moved.shape[positions:]))
    return moved.reshape(
        -1, group_width(method, width) if getattr(method, "shared_matrix", False) else width
    )


def rows_of(method, x, mask):
    """Rows of `x`, zero where masked, and which are valid, [rows, 1]."""
    valid = as_rows(method, mask)[:, :1]
    return np.where(valid, as_rows(method, x), 0), valid


def restored(method, rows, shape):
    """The array of `shape` that rows were made of."""
    order, _ = order_of(method, len(shape))
    return rows.reshape([shape[i] for i in order]).transpose(np.argsort(order))


def group_width(method, features):
    return min(method.group_size or features, features)


def groups_of(method, features):
    """The features of each group."""
    step = group_width(method, features)
    return [slice(i, min(i + step, features)) for i in range(0, features, step)]


def in_groups(method, function, *matrices):
    """`function(method, ...)` of the blocks of each group."""
    result = np.zeros_like(matrices[0])
    for group in groups_of(method, len(result)):
        result[group, group] = function(method, *(a[group, group] for a in matrices))
    return result


def product(method, rows, matrix):
    """`rows @ matrix`, group by group, so that none spoils another."""
    groups = groups_of(method, len(matrix))
    return np.concatenate([rows[:, group] @ matrix[group, group] for group in groups], 1)


def blocks_of(method, matrix):
    return padded([matrix[group, group] for group in groups_of(method, len(matrix))])


def padded(blocks):
    """Square blocks of one width, zero beyond their own."""
    width = max(map(len, blocks))
    return np.stack([np.pad(block, (0, width - len(block))) for block in blocks])


def matrix_of(method, blocks, features):
    matrix = np.zeros((features, features))
    for group, block in zip(groups_of(method, features), f64(blocks), strict=True):
        width = group.stop - group.start
        matrix[group, group] = block[:width, :width]
    return matrix


def moments(rows, valid):
    """Number of valid rows, their mean and their covariance."""
    count = valid.sum()
    mean = rows.sum(0) / max(count, 1)
    c = np.where(valid, rows - mean, 0)
    return count, mean, c.T @ c / max(count, 1)


# Scale and bias.


def pull_scale(method, params, g):
    """The gradient of what is scaled, as rows."""
    if params.scale is not None:
        g = g * f64(params.scale, layout(g.shape, method.axis).leaf)
    return as_rows(method, g)


def affine_gradients(method, z, g):
    features = [g.shape[i] for i in as_axes(method.axis, g.ndim)]
    return (a.reshape(features) for a in pull_affine(layout(g.shape, method.axis).leaf, z, g))


# Whitening matrices of a covariance.


def shrunk(method, cov):
    s = method.shrinkage
    return (1 - s) * cov + s * np.trace(cov) / len(cov) * np.eye(len(cov))


def root(method, cov):
    """The whitening matrix."""
    if not np.isfinite(cov).all():
        return np.full_like(cov, np.nan)
    regular = shrunk(method, cov) + method.epsilon * np.eye(len(cov))
    if type(method).__name__ == "CholeskyBatchNorm":
        return np.linalg.inv(np.linalg.cholesky(regular))
    values, vectors = np.linalg.eigh(regular)
    c, _ = scale_of(method, values)
    of_values, _ = spectral_function(method, values / c)
    return vectors * of_values / np.sqrt(c) @ vectors.T


def pull_root(method, cov, dmatrix):
    """The gradient of the covariance, symmetric, from that of the whitening matrix."""
    regular = shrunk(method, cov) + method.epsilon * np.eye(len(cov))
    if type(method).__name__ == "CholeskyBatchNorm":
        dregular = pull_cholesky(np.linalg.inv(np.linalg.cholesky(regular)), dmatrix)
    else:
        dregular = pull_spectral(method, regular, dmatrix)
    return shrunk(method, (dregular + dregular.T) / 2)  # shrinkage is its own transpose


def pull_cholesky(w, dw):
    """Of A = L L^T and W = L^-1: dW = -half(W dA W^T) W.

    `half` takes the lower triangle with half of the diagonal.
    """
    half = np.tril(dw @ w.T) - np.diag(np.diag(dw @ w.T)) / 2
    return -w.T @ half @ w


def pull_spectral(method, a, dw):
    """Of W = f(A / c) / sqrt(c), in the basis in which A is diagonal (Daleckii & Krein).

    There the derivative of f is the product, entry by entry, with its divided differences.
    """
    values, vectors = np.linalg.eigh(a)
    c, gradient_of_c = scale_of(method, values)
    of_values, differences = spectral_function(method, values / c)
    dw = vectors.T @ dw @ vectors
    dscaled = differences * dw / np.sqrt(c)
    dc = -(np.diag(dscaled) @ values) / c**2 - np.diag(dw) @ of_values / c**1.5 / 2
    return vectors @ (dscaled / c + np.diag(dc * gradient_of_c)) @ vectors.T


def scale_of(method, values):
    """What a matrix is divided by, from its eigenvalues; and the gradient."""
    if type(method).__name__ != "IterativeNorm":
        return 1.0, np.zeros_like(values)
    if method.scaling == "trace":
        return values.sum(), np.ones_like(values)
    assert method.scaling == "frobenius"
    norm = np.sqrt((values**2).sum())
    return norm, values / norm


def spectral_function(method, values):
    """What becomes of eigenvalues, [d], and the divided differences of this function, [d, d].

    These are (f(a) - f(b)) / (a - b), and f'(a) where a = b.
    """
    if type(method).__name__ != "IterativeNorm":
        roots = np.sqrt(values)
        return 1 / roots, -1 / (np.outer(roots, roots) * np.add.outer(roots, roots))
    assert not method.minimax_steps
    # P <- P (a + b M + c M^2), M = P^2 A; "cubic" and "published" are the same sequence.
    a, b, c = (15 / 8, -10 / 8, 3 / 8) if method.iteration == "quintic" else (3 / 2, -1 / 2, 0)
    p, x = (np.ones_like(values), np.zeros((len(values), len(values)))), (values, 1.0)
    for _ in range(method.steps):
        m = times(times(p, p), x)
        mm = times(m, m)
        p = times(p, (a + b * m[0] + c * mm[0], b * m[1] + c * mm[1]))
    return p


def times(f, g):
    """The product of two functions, each its values and its divided differences."""
    (f, df), (g, dg) = f, g
    return f * g, df * g + f[:, None] * dg


# Whitening matrices that are learnt.


def learn(method, state, cov):
    """The matrix after this batch, and what the state keeps of it, by name."""
    deviation = np.sqrt(np.diag(cov) + method.epsilon)
    correlation = in_groups(method, shrunk, cov / np.outer(deviation, deviation))
    alpha = rate(method, state)
    if method.form == "covariance":
        old = matrix_of(method, state.cov, len(cov))
        moved = (1 - 2 * alpha) * old + 2 * alpha * correlation
        return in_groups(method, inverse_root, moved), {"cov": blocks_of(method, moved)}

    def step(method, w, s):
        error = w @ s @ w.T - np.eye(len(w))
        direction = error @ w
        if method.criterion == "frobenius":
            norm = np.linalg.norm(error)
            direction = direction @ s / norm if norm else np.zeros_like(w)
        w = w - alpha * direction
        return (w + w.T) / 2

    matrix = in_groups(method, step, matrix_of(method, state.matrix, len(cov)), correlation)
    return matrix, {"matrix": blocks_of(method, matrix)}


def rate(method, state):
    """The size of this step."""
    if method.half_life is not None:
        return np.log(2) / (2 * method.half_life)
    return float(method.alpha(float(state.count))) if callable(method.alpha) else method.alpha


def inverse_root(method, a):
    if not np.isfinite(a).all():
        return np.full_like(a, np.nan)
    values, vectors = np.linalg.eigh(a)
    return vectors / np.sqrt(values) @ vectors.T


# Recorded layers, and their states as ours.


def recorded_iterative(config, arrays, common, running, last_group="equal"):
    own = {"scaling": "trace", "iteration": "published", "stored": "matrix"}
    own |= {"group_size": config["channels_per_group"], "steps": config["T"]}
    return nj.IterativeNorm(**common, **running, **own, last_group=last_group)


def recorded_decorrelated(config, arrays, common, running, stored="matrix"):
    own = {"group_size": config["block_width"], "shared_matrix": True, "stored": stored}
    return nj.DecorrelatedBatchNorm(**common, **running, **own)


LAYERS["iter_norm"] = recorded_iterative
LAYERS["iter_norm_flex_group"] = functools.partial(recorded_iterative, last_group="smaller")
LAYERS["dbn"] = recorded_decorrelated
LAYERS["dbn2"] = functools.partial(recorded_decorrelated, stored="covariance")


@LAYERS("swbn")
def recorded_stochastic(config, arrays, common, running):
    criterion = {"kl": "kl", "fro": "frobenius"}[config["criterion"]]
    own = {"criterion": criterion, "alpha": config["alpha"]}
    return nj.StochasticWhiteningBatchNorm(**common, **running, **own)


@STATES("iter_norm")
def iterative_state(config, mean, whiten):
    return {"mean": mean.ravel(), "matrix": whiten}


@STATES("iter_norm_flex_group")
def flexible_state(config, **arrays):
    groups = range(len(arrays) // 2)
    means, blocks = ([arrays[f"{k}_{i}"] for i in groups] for k in ("mean", "whiten"))
    return {"mean": np.concatenate(means), "matrix": padded(blocks)}


@STATES("dbn")
def decorrelated_state(config, mean, matrix):
    return {"mean": mean, "matrix": matrix[None]}


@STATES("dbn2")
def covariance_state(config, mean, matrix):
    return {"mean": mean, "cov": (matrix - config["eps"] * np.eye(len(mean)))[None]}


@STATES("swbn")
def stochastic_state(config, mean, var, whiten):
    return {"mean": mean, "var": var, "matrix": whiten[None]}
