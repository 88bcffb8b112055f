"""Oracles of the methods over kernels, which take a kernel in place of an input."""

import math

import numpy as np
from oracles import ORACLES, as_axes, f64, layout


def rows(method, kernel):
    """The axes along which rows lie, and the shape of what there is one of for each row."""
    at = as_axes(method.feature_axes, kernel.ndim)
    along = tuple(i for i in range(kernel.ndim) if i not in at)
    return along, layout(kernel.shape, method.feature_axes).leaf


def strides_of(method, kernel):
    window = kernel.ndim - 2
    return (method.strides,) * window if isinstance(method.strides, int) else method.strides


@ORACLES("WeightNorm", "StrictWeightNorm")
def weight_norm(method, params, state, kernel, mask, train):
    along, leaf = rows(method, kernel)
    square = (kernel**2).sum(along, keepdims=True) / math.prod(strides_of(method, kernel))
    norm = np.sqrt(square) + method.epsilon
    if method.epsilon_place == "square":
        norm = np.sqrt(square + method.epsilon)
    return kernel / norm * (f64(params.scale, leaf) if params else 1), state


@ORACLES("WeightStandardization", "ScaledWeightStandardization")
def standardization(method, params, state, kernel, mask, train):
    along, leaf = rows(method, kernel)
    mean, var = (f(kernel, along, keepdims=True) for f in (np.mean, np.var))
    y = (kernel - mean) / np.sqrt(var + method.epsilon)
    if type(method).__name__ == "WeightStandardization":
        return y, state
    fan_in = kernel.size / math.prod(leaf)
    return y * method.gamma / math.sqrt(fan_in) * f64(params.scale, leaf), state


def matrix(method, kernel):
    """[rest, features]."""
    at = as_axes(method.feature_axes, kernel.ndim)
    last = np.moveaxis(kernel, at, range(-len(at), 0))
    return last.reshape(-1, math.prod(last.shape[last.ndim - len(at) :]))


@ORACLES("SpectralWeightNorm")
def spectral(method, params, state, kernel, mask, train):
    if method.operator == "torus":
        size = np.linalg.norm(dense(kernel, method.map_size), 2)
        return kernel / np.sqrt(size**2 + method.epsilon), state
    m, vector = matrix(method, kernel), f64(state.vector).ravel()
    for _ in range(method.iterations if train else 0):
        vector = m.T @ (m @ vector)
        vector /= np.linalg.norm(vector)
    size = np.linalg.norm(m @ vector)
    if method.operator == "bound":
        pairs = zip(kernel.shape[:-2], strides_of(method, kernel), strict=True)
        size *= math.sqrt(math.prod(math.ceil(n / stride) for n, stride in pairs))
    moved = state._replace(vector=vector.reshape(np.shape(state.vector)))
    return kernel / np.sqrt(size**2 + method.epsilon), moved


def dense(kernel, size):
    """The matrix of a convolution of periodic maps, with stride one: [positions out, in]."""
    *window, inputs, features = kernel.shape
    whole = np.zeros((*size, features, *size, inputs))
    for place in np.ndindex(*size):
        for tap in np.ndindex(*window):
            source = tuple((p + t) % n for p, t, n in zip(place, tap, size, strict=True))
            whole[(*place, slice(None), *source)] += kernel[tap].T
    return whole.reshape(math.prod(size) * features, -1)
