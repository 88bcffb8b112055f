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

Balestriero & Baraniuk, *Batch Normalization Explained*, 2022, https://arxiv.org/abs/2209.14778.
"""

from normjax.analysis.geometry.drawing import plot_regions
from normjax.analysis.geometry.partition import (
    Lines,
    Pieces,
    Regions,
    regions_2d,
    regions_on_segment,
)
from normjax.analysis.geometry.planes import Plane
from normjax.analysis.geometry.values import Layer

__all__ = [
    "Layer",
    "Lines",
    "Pieces",
    "Plane",
    "Regions",
    "plot_regions",
    "regions_2d",
    "regions_on_segment",
]
