"""Oracles of ghost noise for given draws, and the layers that vectors were recorded from."""

import numpy as np
from oracles import f64, layout
from vector_files import LAYERS

import normjax as nj


def own_axes(method, x):
    """All axes but the samples and the features."""
    return layout(x.shape, method.axis, kept=(0,)).axes


def ghost_noise(method, x, ghosts):
    """Shift and scale of every sample, whose ghost has the samples `ghosts` [B, N]."""
    x = f64(x)
    axes = (0, *own_axes(method, x))
    mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    drawn = [x[members] for members in ghosts]
    shift = np.concatenate([a.mean(axes, keepdims=True) - mean for a in drawn])
    own = np.concatenate([a.var(axes, keepdims=True) for a in drawn])
    scale = np.sqrt((own + method.epsilon) / (var + method.epsilon))
    return of_kind(method, shift, scale)


def analytic_noise(method, x, normal, chi2):
    """Shift and scale of standard normal and chi-squared numbers."""
    shift = normal / np.sqrt(method.ghost_batch_size)
    if method.shift_unit != "one":
        shift = shift * f64(x).std(own_axes(method, x), keepdims=True)
    return of_kind(method, shift, np.sqrt(chi2 / method.ghost_batch_size))


def of_kind(method, shift, scale):
    return {"both": (shift, scale), "shift": (shift, 1.0), "scale": (0.0, scale)}[method.noise]


def kind(config):
    if config["scale_noise"] and config["shift_noise"]:
        return "both"
    return "scale" if config["scale_noise"] else "shift"


@LAYERS("ghost_noise_injector_replacement")
def recorded_replacement(config, arrays, common, running):
    return nj.GhostNoise(config["ghost_size"], noise=kind(config), epsilon=common["epsilon"])


@LAYERS("ghost_noise_injector_shuffle")
def recorded_shuffle(config, arrays, common, running):
    own = {"noise": kind(config), "epsilon": common["epsilon"]}
    drawing = "shuffle" if config["shuffle"] else "consecutive"
    return nj.GhostNoise(config["ghost_size"], drawing=drawing, **own)


@LAYERS("noisy_affine_transform")
def recorded_noisy_affine(config, arrays, common, running):
    unit = "deviation, differentiated" if config["scale_shift_by_std"] else "one"
    return nj.AnalyticGhostNoise(config["ghost_size"], shift_unit=unit, noise=kind(config))
