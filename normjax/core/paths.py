"""Leaves of trees by path, and patterns of paths."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax

Path = tuple[str, ...]


def flatten(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[Path], list[Any], Any]:
    """Paths, leaves and structure of a tree: nested dicts, `nnx.State`, NamedTuples."""
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [_names(path) for path, _ in pairs], [leaf for _, leaf in pairs], structure


def _names(path):
    """The names on a path, without the `value` of a variable of NNX or a box of Linen."""
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return tuple(jax.tree_util.keystr(path, simple=True, separator="/").split("/"))


def matches(name: str, paths: Sequence[Path], patterns: Iterable[str]) -> set[int]:
    """Indices of the paths that a pattern matches, in whole or up to a slash.

    A pattern names paths as a shell names files, but `*` also crosses slashes. ValueError, which
    begins with `name`, for one that matches nothing.
    """
    starts = [list(itertools.accumulate(path, "{}/{}".format)) for path in paths]
    found = set()
    for pattern in patterns:
        hits = {i for i, names in enumerate(starts) if any(fnmatchcase(n, pattern) for n in names)}
        if not hits:
            some = ", ".join(names[-1] for names in starts[:5])
            raise ValueError(f"{name}: the pattern {pattern!r} matches none of {some}, ...")
        found |= hits
    return found
