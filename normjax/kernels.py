"""The kernels of a model by path, normalized: what the wrappers of both front ends share."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from normjax.core import checks
from normjax.core.structs import from_dict, to_dict
from normjax.paths import matches

__all__: list[str] = []

Path = tuple[str, ...]
Tree = dict[Path, Any]  # by the path of a kernel


def over(method: Any) -> bool:
    """Whether a method, or a class of methods, is over kernels."""
    return getattr(getattr(method, "traits", None), "over", "activation") == "kernel"


def require(method: Any) -> None:
    """ValueError unless `method` is over kernels."""
    checks.require("NormalizedKernels", "method", method, checks.method)
    if not over(method):
        raise ValueError(
            f"NormalizedKernels: method={method!r} normalizes activations, and is a module of its "
            "own. Give a method over kernels, such as normjax.WeightNorm()."
        )


def require_activations(method: Any) -> None:
    """ValueError unless `method` is one over activations, for a module `Norm`."""
    checks.require("Norm", "method", method, checks.method)
    if over(method):
        raise ValueError(
            f"Norm: method={method!r} normalizes the kernels of layers: give it and the layer to "
            "`NormalizedKernels`."
        )


def choose(name: str, paths: Sequence[Path], patterns: Sequence[str] | None) -> list[int]:
    """Indices of the paths that `patterns` name; without any: of those that end in `kernel`.

    ValueError, by `name`, for a pattern that matches nothing, and without any kernel.
    """
    if patterns:
        return sorted(matches(name, paths, patterns))
    found = [i for i, path in enumerate(paths) if path[-1] == "kernel"]
    if not found:
        some = ", ".join("/".join(path) for path in paths[:5]) or "no parameters at all"
        raise ValueError(
            f"{name}: there is no parameter called `kernel`, but {some}. Name those to normalize "
            "by patterns, such as '*/embedding'."
        )
    return found


def named(parameters: Mapping[Path, Any], patterns: Sequence[str] | None) -> Tree:
    """The parameters that are kernels: see `choose`."""
    paths = list(parameters)
    found = choose("NormalizedKernels", paths, patterns)
    return {paths[i]: parameters[paths[i]] for i in found}


def initial(method: Any, key: Any, kernels: Tree) -> tuple[Tree, Tree]:
    """Parameters and state for each kernel, as dicts by its path."""
    params, state = {}, {}
    for i, (path, kernel) in enumerate(kernels.items()):
        made = method.init(jax.random.fold_in(key, i), kernel)
        params[path], state[path] = map(to_dict, made)
    return params, state


def normalize(
    method: Any, kernels: Tree, params: Any, state: Any, *, train: bool = False
) -> tuple[Tree, Tree]:
    """The normalized kernels, and the state, moved if `train`, by path.

    `params` and `state` are nested dicts, as `initial` made them.
    """
    key, results = jax.random.key(0), {}
    for path, kernel in kernels.items():
        spec = jax.eval_shape(method.init, key, kernel)
        values = (
            from_dict(one, _at(tree, path)) for one, tree in zip(spec, (params, state), strict=True)
        )
        results[path] = method.apply(*values, kernel, train=train)
    normal = {path: kernel for path, (kernel, _) in results.items()}
    return normal, {path: to_dict(moved) for path, (_, moved) in results.items()}


def _at(tree, path):
    """What a nested dict holds at a path; nothing where the method has nothing."""
    for name in path:
        tree = tree.get(name, {})
    return tree
