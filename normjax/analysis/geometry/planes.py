"""Planes in the space of inputs."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Plane:
    """The inputs `origin + u * first + v * second`, a plane with coordinates u and v.

    Arrays of one shape, that of an input without a batch axis; kept in float64.

    Raises:
      ValueError: for shapes that differ, values that are not finite, and directions of which one is
        a multiple of the other.

    Example:
      >>> import numpy as np, normjax.analysis.geometry as geometry
      >>> plane = geometry.Plane(np.zeros(3), [1, 0, 0], [0, 2, 0])
      >>> plane.points([[0.5, 1.0]])
      array([[0.5, 2. , 0. ]])
      >>> plane.coordinates([[0.5, 2.0, 0.0]])
      array([[0.5, 1. ]])
    """

    origin: Any
    first: Any
    second: Any

    def __post_init__(self):
        for name in ("origin", "first", "second"):
            object.__setattr__(self, name, finite("Plane", name, getattr(self, name)))
        shapes = {name: getattr(self, name).shape for name in ("origin", "first", "second")}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"Plane: the shapes {shapes} differ: give three arrays of one shape.")
        lengths = np.linalg.norm(self._directions(), axis=1)
        unit = self._directions() / np.where(lengths, lengths, 1)[:, None]
        if lengths.min() == 0 or np.linalg.svd(unit, compute_uv=False)[-1] < 1e-7:
            raise ValueError(
                "Plane: first and second are multiples of each other, or zero, and span no plane: "
                "give two directions that are linearly independent."
            )

    @classmethod
    def through(cls, a: Any, b: Any, c: Any) -> "Plane":
        """The plane through three inputs, with orthonormal directions, the first from a to b.

        Coordinates are distances in the space of inputs, from `a`. ValueError as for a `Plane`, and
        for three points on a line.

        Example:
          >>> import numpy as np, normjax.analysis.geometry as geometry
          >>> a, b, c = np.array([[1.0, 1, 1], [1, 3, 1], [1, 2, 5]])
          >>> plane = geometry.Plane.through(a, b, c)
          >>> plane.coordinates([a, b, c]).round(6)
          array([[0., 0.],
                 [2., 0.],
                 [1., 4.]])
        """
        a, b, c = (
            finite("Plane.through", name, x) for name, x in zip("abc", (a, b, c), strict=True)
        )
        plane = cls(a, b - a, c - a)
        first = plane.first / np.linalg.norm(plane.first)
        second = plane.second - np.vdot(first, plane.second) * first
        return cls(a, first, second / np.linalg.norm(second))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an input."""
        return self.origin.shape

    def _directions(self):
        return np.stack([self.first.ravel(), self.second.ravel()])

    def points(self, coordinates: Any) -> np.ndarray:
        """The inputs [N, *shape] at coordinates [N, 2].

        Example:
          >>> import normjax.analysis.geometry as geometry
          >>> geometry.Plane([0, 0], [1, 0], [0, 1]).points([[1, 2], [3, 4]])
          array([[1., 2.],
                 [3., 4.]])
        """
        flat = np.asarray(coordinates, float) @ self._directions()
        return self.origin + flat.reshape(-1, *self.shape)

    def coordinates(self, samples: Any, *, project: bool = False) -> np.ndarray:
        """The coordinates [N, 2] of inputs [N, *shape].

        With `project` those of the nearest points of the plane; else ValueError for inputs that do
        not lie in it.

        Example:
          >>> import normjax.analysis.geometry as geometry
          >>> plane = geometry.Plane([0, 0, 0], [1, 0, 0], [0, 1, 0])
          >>> plane.coordinates([[1, 2, 3]], project=True)
          array([[1., 2.]])
        """
        samples = finite("Plane.coordinates", "samples", samples)
        if samples.shape[1:] != self.shape or samples.ndim == len(self.shape):
            raise ValueError(
                f"Plane.coordinates: samples of shape {samples.shape}: give [N, *{self.shape}]."
            )
        offsets = (samples - self.origin).reshape(len(samples), -1)
        found = np.linalg.lstsq(self._directions().T, offsets.T, rcond=None)[0].T
        misses = np.linalg.norm(offsets - found @ self._directions(), axis=1)
        size = np.linalg.norm(samples.reshape(len(samples), -1), axis=1)
        off = misses > 1e-6 * (size + np.linalg.norm(self.origin))
        if off.any() and not project:
            i = int(off.argmax())
            raise ValueError(
                f"Plane.coordinates: sample {i} is {misses[i]:.3g} off the plane: take "
                "Plane.through for a plane through samples, or project=True for the nearest points."
            )
        return found


def finite(caller: str, name: str, value: Any) -> np.ndarray:
    """An array in float64; ValueError if it is not real or not finite."""
    array = np.asarray(value)
    if array.dtype.kind not in "fiub" and not np.can_cast(array.dtype, float):
        raise ValueError(f"{caller}: {name} has dtype {array.dtype}: give real numbers.")
    array = array.astype(float)
    if not np.isfinite(array).all():
        raise ValueError(f"{caller}: {name} has values that are not finite: give finite numbers.")
    return array
