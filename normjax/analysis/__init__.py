"""Measurements of networks, one file per question."""

from normjax.analysis import (
    balance,
    depth,
    figures,
    geometry,
    layers,
    noise,
    programs,
    propagation,
    reconstruction,
    spectra,
    whitening,
)

__all__ = [
    "balance",
    "depth",
    "figures",
    "geometry",
    "layers",
    "noise",
    "programs",
    "propagation",
    "reconstruction",
    "spectra",
    "whitening",
]
