"""Convex cells of a line or plane, many at once, and their division by affine functions.

Coordinates lie in [-1, 1]. A value is zero within a tolerance, relative to the largest that its
function may have there: what is as near to a vertex as that goes through it.
"""

from typing import NamedTuple

import numpy as np

DIRECTION = np.array([1.0, 0.6180339887498949])  # that no line is parallel to, but by chance
FRAME = np.iinfo(np.int64).min  # the label of an edge of the whole


class Cells(NamedTuple):
    """Intervals or polygons, whose vertices go round; those beyond `count` repeat the last one.

    The label of the edge that begins at a vertex, or of the end of an interval, is the number of
    the unit that changes there; on one side of the edge it is inverted, so that the edges with a
    number that is not negative are each boundary once.
    """

    vertices: np.ndarray  # [cells, vertices, coordinates]
    count: np.ndarray  # [cells]
    labels: np.ndarray  # [cells, vertices]

    @classmethod
    def whole(cls, dimension: int) -> "Cells":
        """The interval or square over all coordinates in [-1, 1]."""
        corners = [[[-1.0], [1.0]], [[-1.0, -1], [1, -1], [1, 1], [-1, 1]]][dimension - 1]
        count = len(corners)
        return cls(np.array([corners]), np.array([count]), np.full((1, count), FRAME))

    def at(self, rows) -> "Cells":
        return Cells(*(a[rows] for a in self))

    def values(self, functions: np.ndarray) -> np.ndarray:
        """Affine functions [cells, coordinates + 1, n] at the vertices: [cells, vertices, n]."""
        return self.vertices @ functions[:, :-1] + functions[:, -1:]

    def centers(self) -> np.ndarray:
        """The mean of the vertices, [cells, coordinates]."""
        used = self.used()[:, :, None]
        return np.where(used, self.vertices, 0).sum(1) / self.count[:, None]

    def used(self) -> np.ndarray:
        return np.arange(self.vertices.shape[1]) < self.count[:, None]

    def next(self) -> np.ndarray:
        """The vertex behind each one."""
        behind = np.arange(1, self.vertices.shape[1] + 1)
        return np.where(behind < self.count[:, None], behind, 0)


def join(parts: list[Cells]) -> Cells:
    """Cells one after the other."""
    parts = [part for part in parts if len(part.count)] or parts[:1]
    width = max(part.vertices.shape[1] for part in parts)
    vertices, labels = [], []
    for part in parts:
        wide = np.minimum(np.arange(width), part.vertices.shape[1] - 1)
        vertices.append(part.vertices[:, wide])
        labels.append(part.labels[:, wide])
    counts = [part.count for part in parts]
    return Cells(*map(np.concatenate, (vertices, counts, labels)))


def clip(cells: Cells, values: np.ndarray, labels: np.ndarray) -> Cells:
    """The part of each cell where a function is not negative.

    `values` [cells, vertices] are exactly zero where the vertex lies on the zero line; some are
    positive and some negative. The new edges get `labels` [cells].
    """
    dimension, following = cells.vertices.shape[2], cells.next()
    used, new = cells.used(), labels[:, None]
    ahead = np.take_along_axis(values, following, 1)
    edges = used & (following > 0) if dimension == 1 else used
    leaves = edges & (values >= 0) & (ahead < 0)
    crossed = edges & (values * ahead < 0)
    share = np.divide(values, values - ahead, out=np.zeros_like(values), where=crossed)[:, :, None]
    ends = np.take_along_axis(cells.vertices, following[:, :, None], 1)
    points = cells.vertices + share * (ends - cells.vertices)
    pairs = lambda a, b: np.stack([a, b], 2).reshape(len(a), 2 * a.shape[1], *a.shape[2:])
    kept = pairs(used & (values >= 0), crossed)
    vertices = pairs(cells.vertices, points)
    on = leaves & (values == 0)
    cut = crossed if dimension == 1 else leaves
    names = pairs(np.where(on, new, cells.labels), np.where(cut, new, cells.labels))
    count = kept.sum(1)
    order = np.argsort(~kept, axis=1, kind="stable")
    last = np.minimum(np.arange(count.max(initial=0)), count[:, None] - 1)
    order = np.take_along_axis(order, last, 1)
    vertices = np.take_along_axis(vertices, order[:, :, None], 1)
    return Cells(vertices, count, np.take_along_axis(names, order, 1))


def divide(cells, functions, sizes, first, tolerance):
    """Divides cells until one function of each unit is the largest in all of a cell.

    Args:
      functions: [cells, coordinates + 1, units, functions]; a single function stands against zero.
      sizes: how large the functions were before cancellation, [cells, units].
      first: the label of the first unit.
      tolerance: the part of `sizes` within which values are equal.

    Returns:
      New cells, and the cell that each is a part of.
    """
    units, sizes = functions.shape[2], tolerance * sizes
    split, unsettled = (_by_sign, _two_signs) if functions.shape[3] == 1 else (_by_winner, _contest)
    rows = np.arange(len(cells.count))
    labels = np.broadcast_to(first + np.arange(units), (len(rows), units))
    done = []
    while len(rows):
        values = cells.values(functions.reshape(*functions.shape[:2], -1))
        values = values.reshape(*values.shape[:2], *functions.shape[2:])
        open_ = unsettled(values, sizes)
        todo = open_.any(1)
        done.append((cells.at(~todo), rows[~todo]))
        cells, rows, open_ = cells.at(todo), rows[todo], open_[todo]
        if not len(rows):
            break
        order = np.argsort(~open_, axis=1, kind="stable")[:, : open_.sum(1).max()]
        functions = np.take_along_axis(functions[todo], order[:, None, :, None], 2)
        sizes, labels = (np.take_along_axis(a[todo], order, 1) for a in (sizes, labels))
        unit = functions[:, :, 0], sizes[:, :1], labels[:, 0]
        cells, parents = split(cells, *unit)
        rows, functions = rows[parents], functions[parents, :, 1:]
        sizes, labels = sizes[parents, 1:], labels[parents, 1:]
    return join([part for part, _ in done]), np.concatenate([part for _, part in done])


def decide(cells, functions):
    """For each cell and unit, 1 for a positive function, or which of several is the largest."""
    centers = cells.centers()
    values = np.einsum("rd,rduk->ruk", centers, functions[:, :-1]) + functions[:, -1]
    return (values[..., 0] > 0).astype(int) if values.shape[2] == 1 else values.argmax(2)


def _two_signs(values, tolerance):
    values = values[..., 0]
    return (values.max(1) > tolerance) & (values.min(1) < -tolerance)


def _by_sign(cells, functions, tolerance, labels):
    """Cells divided by the zero line of a function, and what each is a part of."""
    values = cells.values(functions)[:, :, 0]
    values = np.where(np.abs(values) <= tolerance, 0, values)
    line = functions[:, :, 0]
    sides = [clip(cells, sign * values, _on_side(labels, sign * line)) for sign in (1, -1)]
    return join(sides), np.tile(np.arange(len(labels)), 2)


def _on_side(labels, lines):
    """Labels of edges of cells where affine functions are positive: one side's are inverted."""
    across = lines[:, :-1] @ DIRECTION[: lines.shape[1] - 1]
    return np.where(across > 0, labels, ~labels)


def _contest(values, tolerance):
    ahead = values >= values.max(-1, keepdims=True) - tolerance[:, None, :, None]
    return ~ahead.all(1).any(-1)


def _by_winner(cells, functions, tolerance, labels):
    """Cells divided by which of several functions is the largest: the first of equal ones."""
    found = []
    rivals = _rivals(cells.values(functions))
    for one in rivals:
        part, rows = cells, np.arange(len(labels))
        for other in rivals[rivals != one]:
            gap = functions[rows, :, one] - functions[rows, :, other]
            values = part.values(gap[:, :, None])[:, :, 0]
            values = np.where(np.abs(values) <= tolerance[rows], 0, values)
            more, less = (values > 0).any(1), (values < 0).any(1)
            whole, cut = ~less & (more | (one < other)), more & less
            names = _on_side(labels[rows[cut]], gap[cut])
            part = join([part.at(whole), clip(part.at(cut), values[cut], names)])
            rows = np.concatenate([rows[whole], rows[cut]])
        found.append((part, rows))
    return join([part for part, _ in found]), np.concatenate([rows for _, rows in found])


def _rivals(values):
    """The functions that no other one exceeds in all of a cell, by values at the vertices."""
    beaten = np.zeros((len(values), values.shape[2]), bool)
    for best in values.argmax(2).T:
        above = np.take_along_axis(values, best[:, None, None], 2) >= values
        beaten |= above.all(1) & (np.arange(values.shape[2]) != best[:, None])
    return np.flatnonzero(~beaten.all(0))
