"""Float64 NumPy oracles for the methods, written from the papers' equations.

`apply(method, params, state, x, train=..., mask=...)` returns what a method's `apply` should, and
`gradients` what its derivative should. A method is known by the name of its class and read through
its fields, so that any object with those fields will do.

Masks: statistics are over the valid positions, count 0 gives mean 0 and variance 0, and the output
formula sees x = 0 at the masked positions. Masks of spectra hide whole samples.
"""

import math
import types
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import scipy.special


class Params(NamedTuple):
    scale: np.ndarray | None = None
    bias: np.ndarray | None = None
    alpha: np.ndarray | None = None


class Running(NamedTuple):
    mean: np.ndarray
    var: np.ndarray
    count: np.ndarray | None = None


class SpectralRunning(NamedTuple):
    mean_real: np.ndarray
    mean_imag: np.ndarray
    var: np.ndarray
    count: np.ndarray | None = None


def apply(method, params, state, x, *, train, mask=None, prior=None):
    """Output and new state, both in float64."""
    x, mask = _prepare(x, mask)
    if type(method).__name__ == "KalmanNorm":
        return _kalman_norm(method, params, state, x, mask, train, prior)
    return APPLY[type(method).__name__](method, params, state, x, mask, train)


def gradients(method, params, state, x, cotangent, *, mask=None):
    """Gradients of `sum(y * cotangent)` in training with respect to x, scale and bias.

    Those with respect to the scales and the biases of a chain are dicts by method.
    """
    x, mask = _prepare(x, mask)
    g = _f64(cotangent)
    if type(method).__name__ in ("Chain", "SpatialSpectralBatchNorm"):
        return _chain_gradients(method, params, state, x, g, mask)
    if type(method).__name__ == "SpectralBatchNorm":
        return _spectral_gradients(method, params, x, g, mask)
    if type(method).__name__ == "ExclusiveBatchNorm":
        return _exclusive_gradients(method, params, x, g, mask)
    if type(method).__name__ in ("Ghost", "GhostBatchNorm", "EvalNorm"):
        method = _as_ghost(method, x)
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
    if getattr(method, "constant_statistics", False):
        dmean, dvar = np.zeros_like(dmean), np.zeros_like(dvar)
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
    return _activate(method, y)


def _activate(method, y):
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
        state = _update(method, state, count, count, mean=mean, var=var)
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


def _update(method, state, count, size, **moments):
    """Running averages; a channel without valid positions keeps its own.

    `state.count` is the number of updates. The unbiased variance is that of `size` values.
    """
    if method.skip_nonfinite and not all(np.isfinite(a).all() for a in moments.values()):
        return state
    if method.unbiased_running_var:
        moments["var"] = moments["var"] * size / np.maximum(size - 1, 1)
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
    moved = {name: blend(getattr(state, name), batch) for name, batch in moments.items()}
    return state._replace(**moved, count=advanced)


# Spectral batch normalization works on maps [samples, *positions, features] and on spectra
# [samples, frequencies, features]: of the whole plane, or of the half plane that `rfftn` stores.
# Each frequency belongs to a group, whose frequencies share statistics [groups, features].


def _spectral_batch_norm(method, params, state, x, mask, train):
    maps, valid, restore = _maps(method, x, mask)
    sizes, features = maps.shape[1:-1], maps.shape[-1]
    scale, bias = _spectral_affine(params, features)
    if train:
        count, mean, var = _spectral_moments(method, maps, valid)
        size = features * len(_groups(method, sizes, _plane(method)))
        moments = {"mean_real": mean.real, "mean_imag": mean.imag, "var": var}
        state = _update(method, state, count, size, **moments)
    else:
        real = method.statistics != "frequency" and method.spectrum == "full"
        mean = _f64(state.mean_real) + 1j * _f64(state.mean_imag) * (not real)
        mean, var = mean.reshape(-1, features), _f64(state.var, (-1, features))
    group = _groups(method, sizes, "half")
    spectra = _transform(method, maps, "half") - mean[group]
    spectra = spectra / np.sqrt(var[group] + method.epsilon) * scale + bias
    return _activate(method, restore(_inverse(method, spectra, sizes))), state


def _spectral_gradients(method, params, x, g, mask):
    (maps, valid, restore), (g, _, _) = _maps(method, x, mask), _maps(method, g, True)
    (samples, *sizes, features), plane = maps.shape, _plane(method)
    positions = math.prod(sizes)
    scale, _ = _spectral_affine(params, features)
    count, mean, var = _spectral_moments(method, maps, valid)

    # The transforms as matrices: of a map x the spectrum is U[k] = sum_p x[p] to[p, k], and of a
    # spectrum S the map is y[p] = sum_k real[k, p] Re S[k] + imag[k, p] Im S[k]. The gradient of a
    # complex number has those of its real and its imaginary part as its own.
    units = np.eye(positions).reshape(positions, *sizes, 1)
    to_half, to_plane = (_transform(method, units, p)[..., 0] for p in ("half", plane))
    units = np.eye(to_half.shape[1])[..., None]
    real, imag = (_inverse(method, u, sizes).reshape(-1, positions) for u in (units, 1j * units))
    dspectra = np.einsum("kp,npf->nkf", real + 1j * imag, g.reshape(samples, positions, features))

    # S = c s scale + bias at the stored frequencies, where c = U - mean, s = (var + epsilon)^(-1/2)
    group = _groups(method, sizes, "half")
    c, s = _transform(method, maps, "half") - mean[group], 1 / np.sqrt(var + method.epsilon)
    dbias = dspectra.real.sum((0, 1))
    dscale = (dspectra.conj() * c * s[group]).real.sum((0, 1))
    dc = dspectra * s[group] * scale
    dmean = -_group_sums(method, dc.sum(0), group)
    dvar = -(s**2) / 2 * _group_sums(method, (dc.conj() * c).real.sum(0), group)

    # mean = sum U / n and var = sum |U - mean|^2 / n over the valid samples and each group of the
    # plane: d var = 2 Re conj(U - mean) dU / n (var has no derivative in mean)
    group, n = _groups(method, sizes, plane), np.maximum(count, 1)
    c = _transform(method, maps, plane) - mean[group]
    dmoments = (dmean / n)[group] + 2 * c * (dvar / n)[group]
    dx = np.einsum("pk,nkf->npf", to_half.conj(), dc).real
    dx = dx + np.einsum("pk,nkf->npf", to_plane.conj(), dmoments).real
    dx = np.where(valid[:, None], dx, 0).reshape(maps.shape)
    shape = tuple(x.shape[i] for i in _feature_axes(method, x.ndim))
    return restore(dx), dscale.reshape(shape), dbias.reshape(shape)


def _maps(method, x, mask):
    """`x` as maps, zero where masked; the valid samples, [samples, features]; the way back."""
    features = _feature_axes(method, x.ndim)
    if method.spatial_axes is None:
        spatial = tuple(i for i in range(1, x.ndim) if i not in features)
    else:
        spatial = _axes(method.spatial_axes, x.ndim)
    samples = tuple(i for i in range(x.ndim) if i not in (*spatial, *features))
    order = (*samples, *spatial, *features)
    moved = tuple(x.shape[i] for i in order)
    first, last = len(samples), len(samples) + len(spatial)
    shape = (math.prod(moved[:first]), *moved[first:last], math.prod(moved[last:]))

    valid = np.broadcast_to(mask, x.shape).transpose(order).reshape(shape)
    maps = np.where(valid, x.transpose(order).reshape(shape), 0)
    valid = valid[(slice(None), *[0] * len(spatial))]
    return maps, valid, lambda y: y.reshape(moved).transpose(np.argsort(order))


def _spectral_affine(params, features):
    """Scale and bias, [features]."""
    scale = np.ones(features) if params.scale is None else _f64(params.scale, features)
    bias = np.zeros(features) if params.bias is None else _f64(params.bias, features)
    return scale, bias


def _transform(method, maps, plane):
    """Spectra of maps: the "full" plane or the stored "half"."""
    transform = np.fft.rfftn if plane == "half" else np.fft.fftn
    norm = "forward" if method.fft_norm == "full" else method.fft_norm
    spectra = transform(maps, axes=range(1, maps.ndim - 1), norm=norm)
    return spectra.reshape(len(maps), -1, maps.shape[-1])


def _inverse(method, spectra, sizes):
    """Maps of stored spectra: complex inverses over all axes but the last, there the real one."""
    norm = "backward" if method.fft_norm == "full" else method.fft_norm
    maps = spectra.reshape(len(spectra), *sizes[:-1], sizes[-1] // 2 + 1, spectra.shape[-1])
    for axis in range(1, len(sizes)):
        maps = np.fft.ifft(maps, axis=axis, norm=norm)
    return np.fft.irfft(maps, sizes[-1], axis=len(sizes), norm=norm)


def _plane(method):
    """The frequencies that enter the statistics; both planes have the same of each frequency."""
    return "half" if method.statistics == "frequency" else method.spectrum


def _groups(method, sizes, plane):
    """The group of each frequency of a plane, [frequencies]."""
    shape = (*sizes[:-1], sizes[-1] // 2 + 1) if plane == "half" else sizes
    if method.statistics == "frequency":
        return np.arange(math.prod(shape))
    if method.statistics == "ring":
        return np.array([_band(k, sizes, method.bands) for k in np.ndindex(*shape)])
    return np.zeros(math.prod(shape), int)


def _band(k, sizes, bands):
    """The least integer that is >= (bands - 1) |k| / (sqrt(d) / 2), |k| in cycles per position."""
    square = sum(Fraction(min(j, n - j), n) ** 2 for j, n in zip(k, sizes, strict=True))
    return next(b for b in range(bands) if b**2 * len(sizes) >= 4 * (bands - 1) ** 2 * square)


def _group_sums(method, a, group):
    """Sums of [frequencies, ...] over the frequencies of each group."""
    number = method.bands if method.statistics == "ring" else group.max() + 1
    return np.array([a[group == i].sum(0) for i in range(number)])


def _spectral_moments(method, maps, valid):
    """Count, complex mean and variance of each group over the valid samples."""
    plane = _plane(method)
    spectra, group = _transform(method, maps, plane), _groups(method, maps.shape[1:-1], plane)
    valid = np.broadcast_to(valid[:, None], spectra.shape)
    count = _group_sums(method, valid.sum(0), group)
    n = np.maximum(count, 1)
    mean = _group_sums(method, np.where(valid, spectra, 0).sum(0), group) / n
    square = np.abs(spectra - mean[group]) ** 2
    return count, mean, _group_sums(method, np.where(valid, square, 0).sum(0), group) / n


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


def _as_ghost(method, x):
    """The `Ghost` around a batch norm that a ghost batch norm is."""
    if hasattr(method, "method"):
        return method
    inner = type("BatchNorm", (types.SimpleNamespace,), {})(**vars(method))
    groups = len(x) // (method.ghost_batch_size or len(x))
    return types.SimpleNamespace(method=inner, groups=groups)


def _ghost_batch_norm(method, params, state, x, mask, train):
    if train or type(method).__name__ == "GhostBatchNorm":
        return _ghost(_as_ghost(method, x), params, state, x, mask, train)
    axes, leaf = _own_axes(method, x), _layout(method, x.shape)[2]
    count, own_mean, own_var = _moments(method, x, mask, axes)
    weight = method.ghost_batch_size ** -(2.0 if method.own_weight == "1/N^2" else 1.0)
    weight = np.where(count > 0, weight, 0)
    mean, var = _f64(state.mean, leaf), _f64(state.var, leaf)
    # Mean and variance of a mixture of two distributions.
    both = (1 - weight) * mean + weight * own_mean
    square = (1 - weight) * (var + mean**2) + weight * (own_var + own_mean**2)
    y = (np.where(mask, x, 0) - both) / np.sqrt(square - both**2 + method.epsilon)
    return _finish(method, params, y, leaf), state


def _own_axes(method, x):
    """All axes but the samples and the features."""
    return tuple(i for i in range(1, x.ndim) if i not in _feature_axes(method, x.ndim))


def _others(method, x):
    """Of each sample, which others are in its group."""
    size = method.ghost_batch_size or len(x)
    for i in range(len(x)):
        first = i - i % size
        yield i, [j for j in range(first, first + size) if j != i]


def _exclusive_batch_norm(method, params, state, x, mask, train):
    _, axes, leaf = _layout(method, x.shape)
    if not train:
        return _batch_norm(method, params, state, x, mask, train)
    y = np.empty_like(x)
    for i, others in _others(method, x):
        count, mean, var = _moments(method, x[others], mask[others], axes)
        _, own_mean, own_var = _moments(method, x[i : i + 1], mask[i : i + 1], axes)
        mean, var = np.where(count > 0, mean, own_mean), np.where(count > 0, var, own_var)
        y[i] = ((np.where(mask[i], x[i], 0) - mean) / np.sqrt(var + method.epsilon))[0]
    count, mean, var = _moments(method, x, mask, axes)
    return _finish(method, params, y, leaf), _update(
        method, state, count, count, mean=mean, var=var
    )


def _exclusive_gradients(method, params, x, g, mask):
    """With the others' mean and variance by hand; every sample must have valid others."""
    _, axes, leaf = _layout(method, x.shape)
    scale = np.ones(leaf) if params.scale is None else _f64(params.scale, leaf)
    dx, z = np.zeros_like(x), np.empty_like(x)
    for i, others in _others(method, x):
        count, mean, var = _moments(method, x[others], mask[others], axes)
        assert count.all()
        s, one = 1 / np.sqrt(var + method.epsilon), slice(i, i + 1)
        c, h = np.where(mask[one], x[one], 0) - mean, g[one] * scale
        z[one] = c * s
        dx[one] += h * s
        dmean = -(h * s).sum(axes, keepdims=True)
        dvar = -s / (var + method.epsilon) / 2 * (h * c).sum(axes, keepdims=True)
        gaps = np.where(mask[others], x[others] - mean, 0)
        dx[others] += np.where(mask[others], (dmean + 2 * gaps * dvar) / count, 0)
    over = tuple(i for i, n in enumerate(leaf) if n == 1)
    features = tuple(n for n in leaf if n != 1) or (1,)
    dscale, dbias = (a.sum(over).reshape(features) for a in (g * z, g))
    return np.where(mask, dx, 0), dscale, dbias


# Kalman normalization. The prior and the moments that come with the output are pairs (mean, var),
# [features] or, of several groups, [groups, features].


def _kalman_norm(method, params, state, x, mask, train, prior):
    _, axes, leaf = _layout(method, x.shape)
    shape = np.shape(state.mean)
    if not train:
        mean, var = _f64(state.mean, leaf), _f64(state.var, leaf)
        y = (np.where(mask, x, 0) - mean) / np.sqrt(var + method.epsilon)
        pair = _posterior(method, params, _f64(state.mean), _f64(state.var))
        return (_finish(method, params, y, leaf), pair), state

    parts = list(zip(*_split(method.groups, x, mask), strict=True))
    batches = [_moments(method, part, valid, axes) for part, valid in parts]
    priors = [_kalman_prior(method, params, prior, i, leaf) for i in range(method.groups)]
    if method.guard is not None and prior is not None:
        ratios = [var / now[2] for (_, var), now in zip(priors, batches, strict=True)]
        priors = priors if np.mean(ratios) < method.guard else [None] * method.groups
    outputs, states, posteriors = [], [], []
    for (part, valid), (count, mean, var), given in zip(parts, batches, priors, strict=True):
        errors = {}
        if given is not None:
            (q, p), gap = _kalman_gains(method, params, state, count, leaf), mean - given[0]
            q, p = np.where(count > 0, q, 0), np.where(count > 0, p, 0)
            level = given[1] + method.epsilon
            if state.mean_error is not None:
                wrong = np.log((var + method.epsilon) / level)
                errors = {"mean_error": gap**2 / level, "var_error": wrong**2}
            # Mean and variance of the mixture, if both gains are alike.
            mean = (1 - q) * given[0] + q * mean
            var = (1 - p) * given[1] + p * var + q * (1 - q) * gap**2
        y = (np.where(valid, part, 0) - mean) / np.sqrt(var + method.epsilon)
        outputs.append(_finish(method, params, y, leaf))
        new = _update(method, state, count, count, mean=mean, var=var)
        if errors:
            m = method.momentum
            moved = {
                name: np.where(
                    count.reshape(shape) > 0,
                    m * _f64(getattr(state, name)) + (1 - m) * error.reshape(shape),
                    _f64(getattr(state, name)),
                )
                for name, error in errors.items()
            }
            new = new._replace(**moved)
        states.append(new)
        posteriors.append(_posterior(method, params, mean.reshape(shape), var.reshape(shape)))
    filled = [valid.any() for _, valid in parts]
    if method.running_group == "first":
        filled = [f and not i for i, f in enumerate(filled)]
    states = [new for new, f in zip(states, filled, strict=True) if f]
    pair = posteriors[0]
    if method.posterior == "fused" and method.groups > 1:
        pair = tuple(map(np.stack, zip(*posteriors, strict=True)))
    return (np.concatenate(outputs), pair), _tree_mean(states) if states else state


def _kalman_prior(method, params, prior, group, leaf):
    """Mean and variance for one group, of the shape of the batch's."""
    if prior is None:
        return None
    mean, var = map(_f64, prior)
    if method.transition is not None:
        matrix = _f64(params.transition_matrix)
        mean, var = mean @ matrix, var @ matrix**2 + np.exp(_f64(params.transition_log_noise))
    features = sum(n != 1 for n in leaf)
    mean, var = (a if a.ndim == features else a[group] for a in (mean, var))
    return mean.reshape(leaf), var.reshape(leaf)


def _kalman_gains(method, params, state, count, leaf):
    """Weights of the batch's mean and variance."""
    if method.gain == "learned":
        gain = 1 / (1 + np.exp(-_f64(params.gain_logit)))
        return (gain.reshape(leaf) if gain.ndim else gain,) * 2
    if method.gain != "computed":
        return method.gain, method.gain
    n = np.maximum(method.effective_size or count, 1)
    freedom = np.maximum(n - 1, 1)  # of n values with a common mean
    offset = scipy.special.digamma(freedom / 2) - np.log(n / 2)
    noises = 1 / n, scipy.special.polygamma(1, freedom / 2) + offset**2
    gains = []
    for error, noise in zip((state.mean_error, state.var_error), noises, strict=True):
        error = _f64(error, leaf) if method.gain_per == "channel" else np.mean(_f64(error))
        tau = np.maximum(error - noise, 0)
        gains.append(tau / (tau + noise))
    return gains


def _posterior(method, params, mean, var):
    """Moments of the output, without an activation, or the statistics that made it."""
    if method.posterior == "fused":
        return mean, var
    scale, bias = (getattr(params, name) for name in ("scale", "bias"))
    mean = np.zeros_like(mean) if bias is None else _f64(bias)
    return mean, np.ones_like(mean) if scale is None else _f64(scale) ** 2


def ghost_noise(method, x, ghosts):
    """Shift and scale of every sample, whose ghost has the samples `ghosts` [B, N]."""
    x = _f64(x)
    axes = (0, *_own_axes(method, x))
    mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    drawn = [x[members] for members in ghosts]
    shift = np.concatenate([a.mean(axes, keepdims=True) - mean for a in drawn])
    own = np.concatenate([a.var(axes, keepdims=True) for a in drawn])
    scale = np.sqrt((own + method.epsilon) / (var + method.epsilon))
    return _noise_kind(method, shift, scale)


def analytic_noise(method, x, normal, chi2):
    """Shift and scale of standard normal and chi-squared numbers."""
    shift = normal / np.sqrt(method.ghost_batch_size)
    if method.shift_unit != "one":
        shift = shift * _f64(x).std(_own_axes(method, x), keepdims=True)
    return _noise_kind(method, shift, np.sqrt(chi2 / method.ghost_batch_size))


def _noise_kind(method, shift, scale):
    return {"both": (shift, scale), "shift": (shift, 1.0), "scale": (0.0, scale)}[method.noise]


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


def _links(method):
    """The methods of a chain by name."""
    if type(method).__name__ == "Chain":
        links = method.methods
    else:
        own = vars(method)
        before = type("BatchNorm", (types.SimpleNamespace,), {})
        after = type("SpectralBatchNorm", (types.SimpleNamespace,), {})
        links = before(**own | {"activation": None}), after(**own)
    return {f"{type(link).__name__}_{i}": link for i, link in enumerate(links)}


def _chain(method, params, state, x, mask, train):
    new = {}
    for name, link in _links(method).items():
        x, new[name] = apply(link, params[name], state[name], x, train=train, mask=mask)
    return x, new


def _chain_gradients(method, params, state, x, g, mask):
    inputs, dscale, dbias = {}, {}, {}
    for name, link in _links(method).items():
        inputs[name] = link, x
        x, _ = apply(link, params[name], state[name], x, train=True, mask=mask)
    for name, (link, x) in reversed(inputs.items()):
        g, dscale[name], dbias[name] = gradients(link, params[name], state[name], x, g, mask=mask)
    return g, dscale, dbias


APPLY = {
    "BatchNorm": _batch_norm,
    "BatchRenorm": _batch_norm,
    "InputNorm": _batch_norm,
    "LayerNorm": _stateless,
    "RMSNorm": _stateless,
    "GroupNorm": _stateless,
    "InstanceNorm": _stateless,
    "SpectralBatchNorm": _spectral_batch_norm,
    "SpatialSpectralBatchNorm": _chain,
    "Affine": _affine,
    "DynamicTanh": _dynamic_tanh,
    "Ghost": _ghost,
    "GhostBatchNorm": _ghost_batch_norm,
    "EvalNorm": _ghost_batch_norm,
    "ExclusiveBatchNorm": _exclusive_batch_norm,
    "Chain": _chain,
}
