"""The kernels of a model by path, normalized: what the wrappers of both front ends share."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from normjax.core import checks
from normjax.core.method import traits
from normjax.core.structs import from_dict, to_dict
from normjax.paths import matches

__all__: list[str] = []

Path = tuple[str, ...]
Tree = dict[Path, Any]  # by the path of a kernel


def require(method: Any) -> None:
    """ValueError unless `method` is over kernels."""
    checks.require("NormalizedKernels", "method", method, checks.method)
    if traits(method).over != "kernel":
        raise ValueError(
            f"NormalizedKernels: method={method!r} normalizes activations, and is a module of its "
            "own. Give a method over kernels, such as normjax.WeightNorm()."
        )


def choose(parameters: Mapping[Path, Any], patterns: Sequence[str] | None) -> Tree:
    """The parameters that `patterns` name; None: those that are called `kernel`.

    ValueError for a pattern that matches nothing, and without any kernel.
    """
    paths = list(parameters)
    if patterns is not None:
        found = matches("NormalizedKernels", paths, patterns)
    else:
        found = {i for i, path in enumerate(paths) if path[-1] == "kernel"}
    if not found:
        some = ", ".join("/".join(path) for path in paths[:5]) or "no parameters at all"
        raise ValueError(
            f"NormalizedKernels: there is no parameter called `kernel`, but {some}. Name those to "
            "normalize by `patterns`, such as ('*/embedding',)."
        )
    return {paths[i]: parameters[paths[i]] for i in sorted(found)}


def initial(method: Any, key: Any, kernels: Tree) -> tuple[Tree, Tree]:
    """Parameters and state for each kernel, as dicts."""
    made = {}
    for i, (path, kernel) in enumerate(kernels.items()):
        made[path] = method.init(jax.random.fold_in(key, i), kernel)
    return tuple({path: to_dict(both[i]) for path, both in made.items()} for i in (0, 1))


def normalize(
    method: Any, kernels: Tree, params: Tree, state: Tree, *, train: bool = False
) -> tuple[Tree, Tree]:
    """The normalized kernels, and the state, moved if `train`."""
    key, results = jax.random.key(0), {}
    for path, kernel in kernels.items():
        spec = jax.eval_shape(method.init, key, kernel)
        values = (from_dict(one, tree.get(path, {})) for one, tree in zip(spec, (params, state)))
        results[path] = method.apply(*values, kernel, train=train)
    return (
        {path: kernel for path, (kernel, _) in results.items()},
        {path: to_dict(moved) for path, (_, moved) in results.items()},
    )
