"""A program over a line or plane: the cells on which it is affine, and its output there."""

from collections.abc import Iterator

import numpy as np

from normjax.analysis.geometry.cells import Cells, decide, divide, join
from normjax.analysis.geometry.program import Branch, Program

BYTES = 2**25  # about what the values take of the cells that a step runs on


def subdivide(
    program: Program, start: np.ndarray, limit: int, tolerance: float
) -> tuple[Cells, np.ndarray]:
    """The cells on which a program is affine, and its output there.

    Args:
      program: a function as steps.
      start: its input for coordinates in [-1, 1], [coordinates + 1, *shape].
      limit: ValueError for more cells.
      tolerance: relative, within which values are equal; ValueError unless in (0, 1e-3].

    Returns:
      Cells, and the output [cells, coordinates + 1, *shape].
    """
    if not 0 < tolerance <= 1e-3:
        raise ValueError(f"{program.caller}: tolerance={tolerance} must be in (0, 1e-3].")
    found, count = [], 0
    values, whole = {program.input.number: start[None]}, Cells.whole(program.dimension)
    with np.errstate(all="ignore"):  # what is not finite is an error
        for cells, output in _pieces(program, 0, values, whole, (limit, tolerance)):
            count += len(output)
            _check_count(program, count, limit)
            found.append((cells, output))
    return join([cells for cells, _ in found]), np.concatenate([output for _, output in found])


def _pieces(program, first, values, cells, bounds) -> Iterator[tuple[Cells, np.ndarray]]:
    """What the steps from `first` on make of cells, and of the arrays of nodes there."""
    for i in range(first, len(program.steps)):
        step = program.steps[i]
        inputs = [values[number] for number in step.inputs]
        if isinstance(step, Branch):
            yield from _branches(program, i, values, cells, bounds)
            return
        values = _after(program, i, values, step.run(*inputs))
    output = values[program.output.number]
    _check_finite(program, output)
    yield cells, output


def _branches(program, i, values, cells, bounds):
    """`_pieces` from a branch on, a batch of cells at a time."""
    step = program.steps[i]
    functions, sizes = step.functions(*(values[number] for number in step.inputs))
    _check_finite(program, functions)
    limit, tolerance = bounds
    parts, parents = divide(cells, functions, sizes, step.label, tolerance)
    _check_count(program, len(parents), limit)
    batch = max(1, BYTES // (8 * program.size))
    for begin in range(0, len(parents), batch):
        rows = parents[begin : begin + batch]
        part = parts.at(slice(begin, begin + batch))
        own = {number: a[rows] for number, a in values.items()}
        decided = decide(part, functions[rows])
        output = step.finish(decided, *(own[number] for number in step.inputs))
        yield from _pieces(program, i + 1, _after(program, i, own, [output]), part, bounds)


def _after(program, i, values, outputs):
    """The arrays that the steps behind `i` take."""
    values = values | dict(zip(program.steps[i].outputs, outputs, strict=True))
    return {number: a for number, a in values.items() if number in program.alive[i]}


def _check_count(program, count, limit):
    if count > limit:
        raise ValueError(
            f"{program.caller}: more than limit={limit} regions. Take a smaller window, or raise "
            "the limit: a region takes some hundreds of bytes, and the output on it."
        )


def _check_finite(program, a):
    if not np.isfinite(a).all():
        raise ValueError(
            f"{program.caller}: f has values that are not finite. Look for NaN or inf in its "
            "variables, and for masks that put -inf in place of values."
        )
