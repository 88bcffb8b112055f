"""The geometry of norms: how they place the linear regions of a network over the data.

A network of affine steps and activations such as relu is affine on each of many regions of its
inputs. What decides where they lie are the boundaries of units, where an activation changes.

Linear regions, of any function f from an input (without a batch axis) to an array, such as
`lambda x: model.apply(variables, x[None])[0]`:

- `regions_2d(f, plane, window)`: the exact polygons in a slice of the inputs, a `Regions` with
  `count`, `polygons`, `areas`, `maps`, `boundaries()` by layer and unit, `decision()` (where the
  two largest outputs are equal), `classes()` and `locate(samples)`. `Plane.through(a, b, c)` makes
  a plane through three inputs; without a plane the inputs are two numbers.
- `regions_on_segment(f, start, end)`: the exact breaks between two inputs of any shape, a `Pieces`
  with `count`, `breaks`, `maps`, `decision()`.
- `plot_regions({"title": regions, ...}, samples, classes, path="file.png")`: partitions side by
  side, with samples on top.

Data and batches, of any Flax model in evaluation mode: first the model, then what it is called
with, as `model, variables, x` of Linen or `model, x` of NNX:

- `tls_objective`, `tls_fit`: the squared distances of data from the boundary of a linear unit, and
  the bias that makes them least, which is that of batch norm.
- `distances`, `nearest`, `crossings`: how near samples are to the boundaries of all units, by
  layer, for which of them the first order is exact, and how many boundaries meet a ball.
- `margins`: how far samples are from the decision boundary.
- `jitter`, `decision_jitter`: how far boundaries and the decision boundary move from mini-batch to
  mini-batch, measured and by formula.
- `smart_init`: statistics from data for random weights, kept or folded into the weights.
- `plot_distances`, `plot_jitter`.

Balestriero & Baraniuk, *Batch Normalization Explained*, 2022, https://arxiv.org/abs/2209.14778.
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
from normjax.analysis.geometry.drawing import plot_regions
from normjax.analysis.geometry.initialization import smart_init
from normjax.analysis.geometry.jitter import Jitter, Swing, decision_jitter, jitter
from normjax.analysis.geometry.margins import Margins, margins
from normjax.analysis.geometry.partition import (
    Lines,
    Pieces,
    Regions,
    regions_2d,
    regions_on_segment,
)
from normjax.analysis.geometry.pictures import plot_distances, plot_jitter
from normjax.analysis.geometry.planes import Plane
from normjax.analysis.geometry.values import Layer

__all__ = [
    "Fit",
    "Jitter",
    "Layer",
    "Lines",
    "Margins",
    "Nearest",
    "Pieces",
    "Plane",
    "Regions",
    "Swing",
    "crossings",
    "decision_jitter",
    "distances",
    "jitter",
    "margins",
    "nearest",
    "plot_distances",
    "plot_jitter",
    "plot_regions",
    "regions_2d",
    "regions_on_segment",
    "smart_init",
    "tls_fit",
    "tls_objective",
]
