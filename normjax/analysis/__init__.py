"""Measurements of networks, one file per question."""

from normjax.analysis import (
    balance,
    figures,
    geometry,
    layers,
    noise,
    propagation,
    reconstruction,
    spectra,
    whitening,
)

__all__ = [
    "balance",
    "figures",
    "geometry",
    "layers",
    "noise",
    "propagation",
    "reconstruction",
    "spectra",
    "whitening",
]
