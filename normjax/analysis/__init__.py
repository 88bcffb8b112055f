"""Measurements of networks, one file per question."""

from normjax.analysis import layers as layers
from normjax.analysis import noise as noise
from normjax.analysis import propagation as propagation
from normjax.analysis import spectra as spectra

__all__ = ["layers", "noise", "propagation", "spectra"]
