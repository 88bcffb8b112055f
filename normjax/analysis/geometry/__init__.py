"""The geometry of a piecewise affine network, as batch norm shapes it, for any Flax model.

Balestriero & Baraniuk, *Batch Normalization Explained*, 2022, https://arxiv.org/abs/2209.14778
"""

from normjax.analysis.geometry.boundaries import (
    Fit,
    Nearest,
    crossings,
    distances,
    nearest,
    tls_fit,
    tls_objective,
)
from normjax.analysis.geometry.initialization import smart_init
from normjax.analysis.geometry.jitter import Jitter, Swing, decision_jitter, jitter
from normjax.analysis.geometry.margins import Margins, margins
from normjax.analysis.geometry.pictures import plot_distances, plot_jitter

__all__ = [
    "Fit",
    "Jitter",
    "Margins",
    "Nearest",
    "Swing",
    "crossings",
    "decision_jitter",
    "distances",
    "jitter",
    "margins",
    "nearest",
    "plot_distances",
    "plot_jitter",
    "smart_init",
    "tls_fit",
    "tls_objective",
]
