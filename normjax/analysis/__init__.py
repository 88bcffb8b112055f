"""Measurements of networks, one file per question."""

from normjax.analysis import balance, figures, layers, noise, propagation, spectra, whitening

__all__ = ["balance", "figures", "layers", "noise", "propagation", "spectra", "whitening"]
