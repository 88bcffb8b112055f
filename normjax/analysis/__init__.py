"""Measurements of networks, one file per question."""

from normjax.analysis import spectra as spectra

__all__ = ["spectra"]
