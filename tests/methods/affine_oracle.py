"""Oracles of Affine and DynamicTanh, and the layers that vectors were recorded from."""

import numpy as np
from oracles import ORACLES, finish, layout
from vector_files import LAYERS

import normjax as nj


@ORACLES("Affine")
def affine(method, params, state, x, mask, train):
    return finish(method, params, np.where(mask, x, 0), layout(x.shape, method.axis).leaf), state


@ORACLES("DynamicTanh")
def dynamic_tanh(method, params, state, x, mask, train):
    y = np.tanh(float(params.alpha) * np.where(mask, x, 0))
    return finish(method, params, y, layout(x.shape, method.axis).leaf), state


@LAYERS("channel_affine")
def recorded_affine(config, arrays, common, running):
    del common["epsilon"]
    return nj.Affine(**common)
