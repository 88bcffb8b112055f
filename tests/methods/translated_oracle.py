"""Oracles of TReLU, TPReLU and WeightNormalizedAddition."""

import numpy as np
from oracles import ORACLES, f64, layout
from vector_files import LAYERS

import normjax as nj


@ORACLES("TReLU", "TPReLU")
def translated(method, params, state, x, mask, train):
    leaf = layout(x.shape, method.axis).leaf
    slope = 0.0 if params.slope is None else np.clip(f64(params.slope, leaf), 0, 1)
    a, x = f64(params.bias, leaf), np.where(mask, x, 0)
    return np.maximum(x - a, 0) + slope * np.minimum(x - a, 0) + a, state


@ORACLES("WeightNormalizedAddition")
def addition(method, params, state, x, mask, train, others):
    others = others if isinstance(others, tuple) else (others,)
    leaf = layout(x.shape, method.axis).leaf
    weights = [f64(w, leaf) for w in params.weight]
    square = sum(w**2 for w in weights)
    norm = np.sqrt(square) + method.epsilon
    if method.epsilon_place == "square":
        norm = np.sqrt(square + method.epsilon)
    operands = (np.where(mask, f64(a), 0) for a in (x, *others))
    return sum(w * a for w, a in zip(weights, operands, strict=True)) / norm, state


@LAYERS("tprelu")
def recorded_tprelu(config, arrays, common, running):
    return nj.TPReLU()
