"""Measurements of networks, one file per question."""

from normjax.analysis import propagation as propagation
from normjax.analysis import spectra as spectra

__all__ = ["propagation", "spectra"]
