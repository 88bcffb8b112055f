"""Measurements of networks, one file per question."""

from normjax.analysis import (
    balance,
    figures,
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
    "layers",
    "noise",
    "propagation",
    "reconstruction",
    "spectra",
    "whitening",
]
