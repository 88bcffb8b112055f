"""Leaves of a tree by name: paths such as "block_1/norm/scale", and patterns of them.

A pattern names leaves as a shell names files (`*` also crosses slashes), and a pattern that matches
the path of a subtree names all leaves below it: "block_1", "*/norm_?", "head/bias".
"""

import itertools
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax

Path = tuple[str, ...]


def names(path: Any) -> Path:
    """The names on a path of JAX, without the `value` of a variable of NNX or a box of Linen."""
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return tuple(jax.tree_util.keystr(path, simple=True, separator="/").split("/"))


def matches(name: str, paths: Sequence[Path], patterns: Sequence[str]) -> set[int]:
    """Indices of the paths that a pattern matches, in whole or up to a slash.

    ValueError, which begins with `name`, without patterns or for one that matches nothing.
    """
    if not patterns:
        raise ValueError(f"{name}: no patterns are given, such as 'stem' or '*/norm_?'.")
    starts = [list(itertools.accumulate(path, "{}/{}".format)) for path in paths]
    found = set()
    for pattern in patterns:
        hits = {i for i, parts in enumerate(starts) if any(fnmatchcase(n, pattern) for n in parts)}
        if not hits:
            some = ", ".join(parts[-1] for parts in starts[:5])
            raise ValueError(f"{name}: the pattern {pattern!r} matches none of {some}, ...")
        found |= hits
    return found
