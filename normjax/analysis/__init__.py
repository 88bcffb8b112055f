"""Measurements of networks, one file per question."""

from normjax.analysis import figures, layers, noise, propagation, spectra

__all__ = ["figures", "layers", "noise", "propagation", "spectra"]
