"""Oracle of SpectralBatchNorm, and the layers that vectors were recorded from.

It works on maps [samples, *positions, features] and on spectra [samples, frequencies, features]: of
the whole plane, or of the half plane that `rfftn` stores. Each frequency belongs to a group, whose
frequencies share statistics [groups, features].
"""

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from oracles import GRADIENTS, ORACLES, activate, as_axes, f64, update
from vector_files import CHAINS, LAYERS

import normjax as nj


class SpectralRunning(NamedTuple):
    mean_real: np.ndarray
    mean_imag: np.ndarray
    var: np.ndarray
    count: np.ndarray | None = None


@ORACLES("SpectralBatchNorm")
def spectral_batch_norm(method, params, state, x, mask, train):
    maps, valid, restore = as_maps(method, x, mask)
    sizes, features = maps.shape[1:-1], maps.shape[-1]
    scale, bias = affine_of(params, features)
    if train:
        count, mean, var = spectral_moments(method, maps, valid)
        size = features * len(groups_of(method, sizes, plane_of(method)))
        moments = {"mean_real": mean.real, "mean_imag": mean.imag, "var": var}
        state = update(method, state, count, size, **moments)
    else:
        real = method.statistics != "frequency" and method.spectrum == "full"
        mean = f64(state.mean_real) + 1j * f64(state.mean_imag) * (not real)
        mean, var = mean.reshape(-1, features), f64(state.var, (-1, features))
    group = groups_of(method, sizes, "half")
    spectra = transform(method, maps, "half") - mean[group]
    spectra = spectra / np.sqrt(var[group] + method.epsilon) * scale + bias
    return activate(method, restore(inverse(method, spectra, sizes))), state


@GRADIENTS("SpectralBatchNorm")
def spectral_gradients(method, params, state, x, g, mask):
    (maps, valid, restore), (g, _, _) = as_maps(method, x, mask), as_maps(method, g, True)
    (samples, *sizes, features), plane = maps.shape, plane_of(method)
    positions = math.prod(sizes)
    scale, _ = affine_of(params, features)
    count, mean, var = spectral_moments(method, maps, valid)

    # The transforms as matrices: of a map x the spectrum is U[k] = sum_p x[p] to[p, k], and of a
    # spectrum S the map is y[p] = sum_k real[k, p] Re S[k] + imag[k, p] Im S[k]. The gradient of a
    # complex number has those of its real and its imaginary part as its own.
    units = np.eye(positions).reshape(positions, *sizes, 1)
    to_half, to_plane = (transform(method, units, p)[..., 0] for p in ("half", plane))
    units = np.eye(to_half.shape[1])[..., None]
    real, imag = (inverse(method, u, sizes).reshape(-1, positions) for u in (units, 1j * units))
    dspectra = np.einsum("kp,npf->nkf", real + 1j * imag, g.reshape(samples, positions, features))

    # S = c s scale + bias at the stored frequencies, where c = U - mean, s = (var + epsilon)^(-1/2)
    group = groups_of(method, sizes, "half")
    c, s = transform(method, maps, "half") - mean[group], 1 / np.sqrt(var + method.epsilon)
    dbias = dspectra.real.sum((0, 1))
    dscale = (dspectra.conj() * c * s[group]).real.sum((0, 1))
    dc = dspectra * s[group] * scale
    dmean = -group_sums(method, dc.sum(0), group)
    dvar = -(s**2) / 2 * group_sums(method, (dc.conj() * c).real.sum(0), group)

    # mean = sum U / n and var = sum |U - mean|^2 / n over the valid samples and each group of the
    # plane: d var = 2 Re conj(U - mean) dU / n (var has no derivative in mean)
    group, n = groups_of(method, sizes, plane), np.maximum(count, 1)
    c = transform(method, maps, plane) - mean[group]
    dmoments = (dmean / n)[group] + 2 * c * (dvar / n)[group]
    dx = np.einsum("pk,nkf->npf", to_half.conj(), dc).real
    dx = dx + np.einsum("pk,nkf->npf", to_plane.conj(), dmoments).real
    dx = np.where(valid[:, None], dx, 0).reshape(maps.shape)
    shape = tuple(x.shape[i] for i in as_axes(method.axis, x.ndim))
    return restore(dx), dscale.reshape(shape), dbias.reshape(shape)


def as_maps(method, x, mask):
    """`x` as maps, zero where masked; the valid samples, [samples, features]; the way back."""
    features = as_axes(method.axis, x.ndim)
    if method.spatial_axes is None:
        spatial = tuple(i for i in range(1, x.ndim) if i not in features)
    else:
        spatial = as_axes(method.spatial_axes, x.ndim)
    samples = tuple(i for i in range(x.ndim) if i not in (*spatial, *features))
    order = (*samples, *spatial, *features)
    moved = tuple(x.shape[i] for i in order)
    first, last = len(samples), len(samples) + len(spatial)
    shape = (math.prod(moved[:first]), *moved[first:last], math.prod(moved[last:]))

    valid = np.broadcast_to(mask, x.shape).transpose(order).reshape(shape)
    maps = np.where(valid, x.transpose(order).reshape(shape), 0)
    valid = valid[(slice(None), *[0] * len(spatial))]
    return maps, valid, lambda y: y.reshape(moved).transpose(np.argsort(order))


def affine_of(params, features):
    """Scale and bias, [features]."""
    scale = np.ones(features) if params.scale is None else f64(params.scale, features)
    bias = np.zeros(features) if params.bias is None else f64(params.bias, features)
    return scale, bias


def transform(method, maps, plane):
    """Spectra of maps: the "full" plane or the stored "half"."""
    transform = np.fft.rfftn if plane == "half" else np.fft.fftn
    norm = "forward" if method.fft_norm == "full" else method.fft_norm
    spectra = transform(maps, axes=range(1, maps.ndim - 1), norm=norm)
    return spectra.reshape(len(maps), -1, maps.shape[-1])


def inverse(method, spectra, sizes):
    """Maps of stored spectra: complex inverses over all axes but the last, there the real one."""
    norm = "backward" if method.fft_norm == "full" else method.fft_norm
    maps = spectra.reshape(len(spectra), *sizes[:-1], sizes[-1] // 2 + 1, spectra.shape[-1])
    for axis in range(1, len(sizes)):
        maps = np.fft.ifft(maps, axis=axis, norm=norm)
    return np.fft.irfft(maps, sizes[-1], axis=len(sizes), norm=norm)


def plane_of(method):
    """The frequencies that enter the statistics; both planes have the same of each frequency."""
    return "half" if method.statistics == "frequency" else method.spectrum


def groups_of(method, sizes, plane):
    """The group of each frequency of a plane, [frequencies]."""
    shape = (*sizes[:-1], sizes[-1] // 2 + 1) if plane == "half" else sizes
    if method.statistics == "frequency":
        return np.arange(math.prod(shape))
    if method.statistics == "ring":
        return np.array([band_of(k, sizes, method.bands) for k in np.ndindex(*shape)])
    return np.zeros(math.prod(shape), int)


def band_of(k, sizes, bands):
    """The least integer that is >= (bands - 1) |k| / (sqrt(d) / 2), |k| in cycles per position."""
    square = sum(Fraction(min(j, n - j), n) ** 2 for j, n in zip(k, sizes, strict=True))
    return next(b for b in range(bands) if b**2 * len(sizes) >= 4 * (bands - 1) ** 2 * square)


def group_sums(method, a, group):
    """Sums of [frequencies, ...] over the frequencies of each group."""
    number = method.bands if method.statistics == "ring" else group.max() + 1
    return np.array([a[group == i].sum(0) for i in range(number)])


def spectral_moments(method, maps, valid):
    """Count, complex mean and variance of each group over the valid samples."""
    plane = plane_of(method)
    spectra, group = transform(method, maps, plane), groups_of(method, maps.shape[1:-1], plane)
    valid = np.broadcast_to(valid[:, None], spectra.shape)
    count = group_sums(method, valid.sum(0), group)
    n = np.maximum(count, 1)
    mean = group_sums(method, np.where(valid, spectra, 0).sum(0), group) / n
    square = np.abs(spectra - mean[group]) ** 2
    return count, mean, group_sums(method, np.where(valid, square, 0).sum(0), group) / n


@LAYERS("spectral_batch_norm")
def recorded_spectral_batch_norm(config, arrays, common, running):
    own = {"spectrum": "half", "fft_norm": config["fft_norm"], "unbiased_running_var": True}
    return nj.SpectralBatchNorm(**common, **running, **own)


# What the names of the arrays of each method begin with.
CHAINS["spatial_spectral_batch_norm"] = {
    "BatchNorm_0": "spatial_",
    "SpectralBatchNorm_1": "spectral_",
}


@LAYERS("spatial_spectral_batch_norm")
def recorded_spatial_spectral_batch_norm(config, arrays, common, running):
    before = nj.BatchNorm(**common, **running, unbiased_running_var=True)
    return nj.chain(before, recorded_spectral_batch_norm(config, arrays, common, running))
