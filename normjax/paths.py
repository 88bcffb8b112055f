"""Leaves of trees of Flax and optax by name: their paths, and patterns of these."""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import optax


def flatten(tree: Any) -> tuple[list[tuple[str, ...]], list[Any], Any]:
    """Paths as tuples of names, leaves and structure; a masked part counts as one leaf."""
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_masked)
    return [_names(path) for path, _ in pairs], [leaf for _, leaf in pairs], structure


def _names(path):
    """The names on a path, without the `value` of a variable of NNX or a box of Linen."""
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return tuple(jax.tree_util.keystr(path, simple=True, separator="/").split("/"))


def is_masked(leaf: Any) -> bool:
    """Whether `leaf` is the placeholder of `optax.masked`."""
    return isinstance(leaf, optax.MaskedNode)


def arrays_of(tree: Any) -> tuple[dict[int, Any], Callable[[Mapping[int, Any]], Any]]:
    """The arrays of a tree by their number, and a function that puts others in their place."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = {i: a for i, a in enumerate(leaves) if hasattr(a, "shape") and hasattr(a, "dtype")}
    rest = [None if i in arrays else leaf for i, leaf in enumerate(leaves)]
    given = lambda new: structure.unflatten(new.get(i, leaf) for i, leaf in enumerate(rest))
    return arrays, given


def starts(path: Sequence[str]) -> list[str]:
    """A path and those of all that it is in, as text."""
    return list(itertools.accumulate(path, "{}/{}".format))


def matches(
    name: str, paths: Sequence[Sequence[str]], patterns: Collection[str], *, within: bool = False
) -> set[int]:
    """Indices of the paths that a pattern matches, in whole or up to a slash.

    `within`: patterns may begin anywhere in a path, behind a slash. ValueError, which begins with
    `name`, for one that matches nothing.
    """
    tails = [range(len(path)) if within else (0,) for path in paths]
    texts = [[t for k in at for t in starts(p[k:])] for p, at in zip(paths, tails, strict=True)]
    found = set()
    for pattern in patterns:
        hits = {i for i, names in enumerate(texts) if any(fnmatchcase(n, pattern) for n in names)}
        if not hits:
            some = ", ".join("/".join(path) for path in paths[:5])
            raise ValueError(f"{name}: the pattern {pattern!r} matches none of {some}, ...")
        found |= hits
    return found


def require_fixed(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """ValueError for a collection of Linen that has more leaves, or fewer, after a call."""
    for name, tree in new.items():
        if len(jax.tree.leaves(tree)) != len(jax.tree.leaves(old[name])):
            raise ValueError(
                f"Calls of the model change the number of variables in the collection {name!r}, as "
                "`sow` does, and it must stay. Take the collection out of the variables, or out of "
                "the statistics of a train state: what is sown there is dropped then."
            )
