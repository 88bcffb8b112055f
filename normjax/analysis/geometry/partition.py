"""Linear regions on planes and segments of the space of inputs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from normjax.analysis.geometry.cells import Cells, decide, divide
from normjax.analysis.geometry.planes import Plane, finite
from normjax.analysis.geometry.program import Program
from normjax.analysis.geometry.subdivision import subdivide
from normjax.analysis.geometry.values import Layer

Window = tuple[tuple[float, float], tuple[float, float]]
LIMIT = 1_000_000
TOLERANCE = 2.0**-40


class Lines(NamedTuple):
    """Pieces of the lines in a plane where units change.

    Attributes:
      ends: coordinates of the ends of each piece, [pieces, 2, 2].
      layer: the number of the layer in `Regions.layers`, [pieces].
      unit: the number of the unit in the layer, its place in an array of `layer.shape`, [pieces].

    Example:
      >>> import jax, normjax.analysis.geometry as geometry
      >>> lines = geometry.regions_2d(jax.nn.relu, window=((-1, 1), (-1, 3))).boundaries()
      >>> lines.unit.tolist(), lines.ends[0].tolist()
      ([0, 1, 1, 0], [[0.0, 3.0], [0.0, 0.0]])
    """

    ends: np.ndarray
    layer: np.ndarray
    unit: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Regions:
    """The linear regions of a function in a window of a plane, made by `regions_2d`.

    Attributes:
      plane, window: those of `regions_2d`.
      layers: the nonlinear steps of the function, in their order.

    Example:
      >>> import jax, normjax.analysis.geometry as geometry
      >>> found = geometry.regions_2d(jax.nn.relu, window=((-1, 3), (-1, 1)))
      >>> found.count, sorted(found.areas.tolist()), found.locate([[2.0, 0.5]]).shape
      (4, [1.0, 1.0, 3.0, 3.0], (1,))
    """

    plane: Plane
    window: Window
    layers: tuple[Layer, ...]
    _cells: Cells  # in coordinates in [-1, 1]
    _outputs: np.ndarray

    def __repr__(self):
        return f"<{self.count} regions in {self.window}>"

    @property
    def count(self) -> int:
        """The number of regions."""
        return len(self._outputs)

    @functools.cached_property
    def vertices(self) -> np.ndarray:
        """Coordinates [regions, vertices, 2], counterclockwise; the last one is repeated."""
        return _outward(self._cells.vertices, self.window)

    @property
    def polygons(self) -> list[np.ndarray]:
        """The vertices of each region alone, [vertices, 2]."""
        return _polygons(self._cells, self.window)

    @property
    def areas(self) -> np.ndarray:
        """The area of each region in the coordinates of the plane, [regions]."""
        return _areas(self._cells) * np.prod(_halves(self.window))

    @functools.cached_property
    def maps(self) -> np.ndarray:
        """The function in each region as `maps @ (u, v, 1)`, [regions, *output, 3]."""
        return _affine_maps(self._outputs, self.window)

    def boundaries(self) -> Lines:
        """Where units change: each piece of a line is there once.

        Of lines that coincide, that of the first unit is there. A unit whose change has no effect
        on the output counts like others, so that two regions may have the same map.

        Example:
          >>> import jax, normjax.analysis.geometry as geometry
          >>> lines = geometry.regions_2d(abs).boundaries()
          >>> lines.layer.tolist(), lines.unit.tolist()
          ([0, 0, 0], [0, 1, 1])
        """
        ends, labels = _edges(self._cells)
        layer, unit = _units(labels, self.layers)
        return Lines(_outward(ends, self.window), layer, unit)

    def decision(self) -> np.ndarray:
        """Where the two largest outputs are equal: ends of straight pieces, [pieces, 2, 2].

        The output is an array of scores of classes. ValueError for fewer than two.

        Example:
          >>> import normjax.analysis.geometry as geometry
          >>> geometry.regions_2d(lambda x: x).decision().round(6).tolist()
          [[[1.0, 1.0], [-1.0, -1.0]]]
        """
        cells, _ = _decided("Regions.decision", self._cells, self._outputs)
        return _outward(_edges(cells)[0], self.window)

    def classes(self) -> tuple[list[np.ndarray], np.ndarray]:
        """The polygons on which one output is the largest, and the number of that output.

        Each lies in one region. The output is an array of scores, as for `decision`.

        Example:
          >>> import normjax.analysis.geometry as geometry
          >>> polygons, largest = geometry.regions_2d(lambda x: x).classes()
          >>> [len(polygon) for polygon in polygons], largest.tolist()
          ([3, 3], [0, 1])
        """
        cells, largest = _decided("Regions.classes", self._cells, self._outputs)
        return _polygons(cells, self.window), largest

    def locate(self, samples: Any, *, project: bool = False) -> np.ndarray:
        """The number of the region of each of the inputs [N, *shape].

        On a boundary it is one of the regions beside it. ValueError for inputs that are not in the
        plane (unless `project`, see `Plane.coordinates`), or not in the window.

        Example:
          >>> import normjax.analysis.geometry as geometry
          >>> geometry.regions_2d(lambda x: 2 * x).locate([[0.5, 0.2], [0.0, -0.1]]).tolist()
          [0, 0]
        """
        points = inside("Regions.locate", self, samples, project)
        middles, halves = _middles(self.window), _halves(self.window)
        corners = self._cells.vertices
        edges = np.roll(corners, -1, axis=1) - corners
        found = []
        for point in (points - middles) / halves:
            x, y = np.moveaxis(point - corners, 2, 0)
            found.append((edges[..., 0] * y - edges[..., 1] * x).min(1).argmax())
        return np.array(found, int)


def inside(caller: str, regions: Regions, samples: Any, project: bool) -> np.ndarray:
    """Coordinates of inputs [N, *shape]; ValueError if one is not in the window."""
    points = regions.plane.coordinates(samples, project=project)
    off = np.abs(points - _middles(regions.window)) > _halves(regions.window) * (1 + 1e-9)
    if off.any():
        i = int(off.any(1).argmax())
        at = ", ".join(f"{c:.6g}" for c in points[i])
        raise ValueError(
            f"{caller}: sample {i} at ({at}) is outside of the window {regions.window}: take a "
            "larger window, or leave it out."
        )
    return points


def regions_2d(
    f: Callable[[Any], Any],
    plane: Plane | None = None,
    window: Window = ((-1.0, 1.0), (-1.0, 1.0)),
    *,
    limit: int = LIMIT,
    tolerance: float = TOLERANCE,
) -> Regions:
    """Divides a window of a plane into the polygons on which a function is affine, exactly.

    The program that JAX makes of `f` is run in float64, with all its constants, on every polygon at
    once: as long as it is affine, its values are kept as affine functions of the coordinates. Where
    it branches (relu, leaky_relu, abs, relu6, maximum, max_pool, comparisons), the polygons are
    divided by the zero line of each unit that crosses them. A region is where each unit stays on
    one side. Norms must evaluate with fixed statistics: `normjax.population.recalibrate` makes
    running statistics of those of given data.

    A line within `tolerance` of a vertex, as a part of the window, goes through it. Lines of units
    with batch norm and no bias meet in the mean of the data, but of statistics in float32 only up
    to their rounding, which makes tiny regions there: tolerance=1e-5 takes them for one point.
    Balestriero & Baraniuk, *Batch Normalization Explained*, 2022, https://arxiv.org/abs/2209.14778.

    Args:
      f: a function from an input, without a batch axis, to an array, such as
        `lambda x: model.apply(variables, x[None])[0]`, or `lambda x: model(x[None])[0]` in NNX.
      plane: the plane; None: the input is an array of two numbers, which are the coordinates.
      window: the lowest and the highest first and second coordinate.
      limit: ValueError for more regions.
      tolerance: relative, within which values are equal.

    Raises:
      ValueError: for a function that is not piecewise affine in its input, naming the primitive of
        JAX; for values that are not finite, an empty window, a tolerance that is not in
        (0, 1e-3], or more regions than `limit`.
      TypeError: for what returns anything but one floating array.

    Example:
      >>> import jax, flax.linen as nn, normjax.analysis.geometry as geometry
      >>> model = nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(3)])
      >>> variables = model.init(jax.random.key(0), jax.numpy.ones(2))
      >>> f = lambda x: model.apply(variables, x)
      >>> found = geometry.regions_2d(f, window=((-2, 2), (-1, 1)))
      >>> found.count, round(float(found.areas.sum()), 9), found.maps.shape
      (10, 8.0, (10, 3, 3))
    """
    plane = Plane([0.0, 0.0], [1.0, 0.0], [0.0, 1.0]) if plane is None else plane
    window = _checked(window)
    program = Program.of("regions_2d", f, plane.shape, 2)
    axes = np.stack([plane.first, plane.second])
    slopes = axes * _halves(window).reshape(2, *(1,) * plane.origin.ndim)
    start = np.concatenate([slopes, plane.points(_middles(window)[None])])
    cells, outputs = subdivide(program, start, limit, tolerance)
    if abs(_areas(cells).sum() - 4) > 1e4 * tolerance:
        raise ArithmeticError("regions_2d: the regions do not tile the window.")
    return Regions(plane, window, program.layers, cells, outputs)


def _checked(window) -> Window:
    bounds = finite("regions_2d", "window", window)
    if bounds.shape != (2, 2) or (bounds[:, 0] >= bounds[:, 1]).any():
        raise ValueError(
            f"regions_2d: window={window}: give ((low, high), (low, high)), with low < high."
        )
    (left, right), (bottom, top) = bounds.tolist()
    return (left, right), (bottom, top)


@dataclasses.dataclass(frozen=True, eq=False)
class Pieces:
    """The linear regions of a function on a segment, in their order.

    Attributes:
      breaks: where they end, as parts of the length from the start, [count - 1].
      layer, unit: the layer and the unit that change there, as in `Lines`.
      maps: the function in each piece as `maps @ (t, 1)`, [count, *output, 2].
      layers: the nonlinear steps of the function, in their order.

    Example:
      >>> import jax, normjax.analysis.geometry as geometry
      >>> found = geometry.regions_on_segment(jax.nn.relu, [-1.0, -1.0], [1.0, 3.0])
      >>> found.count, found.breaks.tolist(), found.unit.tolist()
      (3, [0.25, 0.5], [1, 0])
    """

    breaks: np.ndarray
    layer: np.ndarray
    unit: np.ndarray
    maps: np.ndarray
    layers: tuple[Layer, ...]
    _cells: Cells = dataclasses.field(repr=False)
    _outputs: np.ndarray = dataclasses.field(repr=False)

    @property
    def count(self) -> int:
        """The number of pieces."""
        return len(self.maps)

    def decision(self) -> np.ndarray:
        """Where the two largest outputs are equal and others behind, as `breaks`.

        The output is an array of scores of classes. ValueError for fewer than two.

        Example:
          >>> import normjax.analysis.geometry as geometry
          >>> geometry.regions_on_segment(lambda x: x, [1.0, 0.0], [0.0, 3.0]).decision().tolist()
          [0.25]
        """
        cells, winners = _decided("Pieces.decision", self._cells, self._outputs)
        cells, order = _in_order(cells)
        changes = winners[order][1:] != winners[order][:-1]
        return (cells.vertices[1:, 0, 0][changes] + 1) / 2


def regions_on_segment(
    f: Callable[[Any], Any],
    start: Any,
    end: Any,
    *,
    limit: int = LIMIT,
    tolerance: float = TOLERANCE,
) -> Pieces:
    """Divides a segment between two inputs into the pieces on which a function is affine, exactly.

    As `regions_2d`, in inputs of any dimension.

    Args:
      f: a function of an input, without a batch axis, as in `regions_2d`.
      start, end: two inputs of one shape.
      limit: ValueError for more pieces.
      tolerance: relative, within which values are equal.

    Raises:
      ValueError: as for `regions_2d`, and for two equal inputs, or of different shapes.
      TypeError: for what returns anything but one floating array.

    Example:
      >>> import jax, normjax.analysis.geometry as geometry
      >>> found = geometry.regions_on_segment(jax.nn.relu6, [-3.0, 0.0], [9.0, 0.0])
      >>> found.breaks.tolist(), found.maps[:, 0].tolist()
      ([0.25, 0.75], [[0.0, 0.0], [12.0, -3.0], [0.0, 6.0]])
    """
    start, end = (
        finite("regions_on_segment", name, x) for name, x in (("start", start), ("end", end))
    )
    if start.shape != end.shape or np.array_equal(start, end):
        raise ValueError(
            f"regions_on_segment: start and end of shapes {start.shape} and {end.shape} must be "
            "two different inputs of one shape."
        )
    program = Program.of("regions_on_segment", f, start.shape, 1)
    line = np.stack([(end - start) / 2, (start + end) / 2])
    cells, outputs = subdivide(program, line, limit, tolerance)
    cells, order = _in_order(cells)
    outputs = outputs[order]
    # The label of a change is at the end of one piece or, inverted, at the start of the other.
    labels = np.maximum(cells.labels[1:, 0], ~cells.labels[1:, 0])
    layer, unit = _units(labels, program.layers)
    breaks = (cells.vertices[1:, 0, 0] + 1) / 2
    maps = np.stack([2 * outputs[:, 0], outputs[:, 1] - outputs[:, 0]], axis=-1)
    return Pieces(breaks, layer, unit, maps, program.layers, cells, outputs)


def _in_order(cells):
    order = cells.vertices[:, 0, 0].argsort()
    return cells.at(order), order


def _middles(window):
    return np.mean(window, axis=1)


def _halves(window):
    return np.diff(window, axis=1)[:, 0] / 2


def _outward(points, window):
    """Coordinates in a window, of those in [-1, 1]."""
    return _middles(window) + points * _halves(window)


def _polygons(cells, window):
    pairs = zip(_outward(cells.vertices, window), cells.count, strict=True)
    return [vertices[:count] for vertices, count in pairs]


def _areas(cells):
    x, y = np.moveaxis(cells.vertices - cells.vertices[:, :1], 2, 0)
    return (x[:, :-1] * y[:, 1:] - x[:, 1:] * y[:, :-1]).sum(1) / 2


def _affine_maps(outputs, window):
    """Outputs over coordinates in [-1, 1] as `maps @ (u, v, 1)`."""
    slopes = np.moveaxis(outputs[:, :2], 1, -1) / _halves(window)
    return np.concatenate([slopes, (outputs[:, 2] - slopes @ _middles(window))[..., None]], -1)


def _edges(cells):
    """Ends [pieces, 2, 2] and labels of the edges where units change, each once."""
    ends = np.take_along_axis(cells.vertices, cells.next()[:, :, None], 1)
    ends = np.stack([cells.vertices, ends], axis=2)
    here = cells.used() & (cells.labels >= 0)
    return ends[here], cells.labels[here]


def _units(labels, layers):
    """Layers and units of labels, which number the units of all layers."""
    sizes = [int(np.prod(layer.shape)) for layer in layers]
    last = np.cumsum(sizes, dtype=int)
    layer = np.searchsorted(last, labels, side="right")
    return layer, labels - (last - sizes)[layer] if len(labels) else labels


def _decided(caller, cells, outputs):
    """Cells divided by which output is the largest, and which it is."""
    scores = outputs.reshape(*outputs.shape[:2], -1)
    if scores.shape[2] < 2:
        raise ValueError(f"{caller}: f has a single output: give one with a score for each class.")
    plain = cells._replace(labels=np.full_like(cells.labels, -1))
    sizes = np.abs(scores).sum(1).max(1)
    cells, parents = divide(plain, scores[:, :, None], sizes[:, None], 0, TOLERANCE)
    return cells, decide(cells, scores[parents][:, :, None])[:, 0]
