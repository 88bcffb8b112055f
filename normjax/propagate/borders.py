"""Which taps of a window lie inside a map, at each kind of position."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

Padding = str | int | Sequence[int | tuple[int, int]]


def borders(name, size, window, strides, padding, input_dilation, kernel_dilation):
    """For each axis the taps of a window that lie inside, booleans [kinds, window].

    Positions differ only in these: one of each kind will do. Also their shares, [*kinds].
    """
    given = size, window, strides, input_dilation, kernel_dilation
    size, window, strides, inner, outer = (_each(name, len(size), a) for a in given)
    reach = [(k - 1) * d + 1 for k, d in zip(window, outer, strict=True)]
    pads = _pads(name, size, reach, strides, padding, inner)
    taps, shares = [], []
    axes = zip(size, window, reach, strides, inner, outer, pads, strict=True)
    for n, k, r, s, i, o, (low, high) in axes:
        length = (n - 1) * i + 1
        number = (length + low + high - r) // s + 1
        if number < 1:
            raise ValueError(
                f"{name}: a window of {window} does not fit into maps of size {size} with "
                f"padding={padding!r}."
            )
        at = np.arange(number)[:, None] * s + np.arange(k) * o - low
        valid = (at >= 0) & (at < length) | (padding == "CIRCULAR")
        kinds, counts = np.unique(valid & (at % i == 0), axis=0, return_counts=True)
        taps.append(kinds)
        shares.append(counts / number)
    return taps, functools.reduce(np.multiply.outer, shares)


def inside(name, size, window, strides, padding):
    """How many positions of a window lie inside, and the share of such windows, both [kinds]."""
    taps, share = borders(name, size, window, strides, padding, 1, 1)
    number = functools.reduce(np.multiply.outer, [kinds.sum(1) for kinds in taps])
    if not number.all():
        raise ValueError(f"{name}: with padding={padding!r} a window lies in the padding alone.")
    return number.ravel(), share.ravel()


def _pads(name, size, reach, strides, padding, inner):
    """A pair (low, high) for each spatial axis: how many positions of padding there are."""
    rank = len(reach)
    if padding == "CIRCULAR":
        return [((r - 1) // 2, r // 2) for r in reach]
    if padding == "CAUSAL" and rank == 1:
        return [(reach[0] - 1, 0)]
    if isinstance(padding, str):
        if padding not in ("SAME", "SAME_LOWER", "VALID"):
            raise ValueError(f"{name}: padding={padding!r} is not one whose moments are known.")
        if max(inner) > 1:
            raise ValueError(f"{name}: padding={padding!r} with input_dilation={inner}.")
        return lax.padtype_to_pads(size, reach, strides, padding)
    each = (padding,) * rank if isinstance(padding, int) else tuple(padding)
    pairs: list[Any] = [(p, p) if isinstance(p, int) else tuple(p) for p in each]
    if len(pairs) != rank or not all(len(p) == 2 for p in pairs):
        raise ValueError(f"{name}: padding={padding!r} does not fit {rank} spatial axes.")
    return pairs


def _each(name, rank, value):
    """One positive integer for each spatial axis."""
    values: tuple[Any, ...] = (value,) * rank if isinstance(value, int) else tuple(value)
    if (
        not rank
        or len(values) != rank
        or not all(isinstance(v, int | np.integer) and v > 0 for v in values)
    ):
        raise ValueError(
            f"{name}: {value!r} is not a positive integer, or one for each of {rank} spatial axes."
        )
    return values
