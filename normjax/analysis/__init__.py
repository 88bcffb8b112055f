"""Measurements of networks, one file per question."""

from normjax.analysis import layers, noise, propagation, spectra

__all__ = ["layers", "noise", "propagation", "spectra"]
