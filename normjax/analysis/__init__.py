"""Measurements of networks, one file per question."""

from normjax.analysis import (
    balance,
    depth,
    figures,
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
    "layers",
    "noise",
    "programs",
    "propagation",
    "reconstruction",
    "spectra",
    "whitening",
]
