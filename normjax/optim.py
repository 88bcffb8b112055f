"""Optimizers that know norms from weights: labels, decay masks, learning rates and freezing.

Every function takes any tree of parameters: nested dicts of Flax Linen, `nnx.State`, the
NamedTuples of the methods. Leaves are named by their path, such as "block_1/norm/scale". A pattern
names leaves as a shell names files (`*` also crosses slashes), and a pattern that matches the path
of a subtree names all leaves below it: "block_1", "*/norm_?", "head/bias".
"""

import collections
import fnmatch
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from normjax.core import checks

LABELS = ("norm_scale", "norm_bias", "bias", "kernel", "embedding", "other")
DECAYED = ("kernel", "embedding")

__all__ = [
    "batch_norm_init_recipe",
    "decay_mask",
    "effective_learning_rates",
    "freeze",
    "keep_statistics",
    "label_parameters",
    "scale_learning_rate",
]


def label_parameters(params: Any, overrides: Mapping[str, str] | None = None) -> Any:
    """What each parameter is, as a tree of the structure of `params`.

    - "kernel", "embedding": leaves of that name, of any shape: the kernel [5, 1] of a dense layer
      with one output is one.
    - "norm_scale": a `scale` that has no kernel beside it.
    - "bias": a `bias` beside a kernel or an embedding; "norm_bias": one beside a `scale`, or alone,
      as in a norm without scale.
    - "other": all else, such as the slope of a PReLU or the `alpha` of `DynamicTanh`.

    Shapes play no part. (The public implementation of `batch_norm_init_recipe` goes by them, and
    takes slopes and kernels with one output for norm scales, and norms of one feature for weights.)

    Args:
      params: a tree of parameters; the placeholders of `optax.masked` stay as they are.
      overrides: labels by pattern, the last match wins, such as `{"pos_embedding": "embedding"}`.

    Returns:
      The labels, for `optax.multi_transform` and the like.

    Raises:
      ValueError: for an override that matches nothing, or whose label is none of `LABELS`.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, normjax.linen, normjax.optim
      >>> net = nn.Sequential([nn.Dense(4), normjax.linen.LayerNorm(), nn.PReLU(), nn.Dense(1)])
      >>> params = net.init(jax.random.key(0), jnp.ones((2, 3)))["params"]
      >>> labels = normjax.optim.label_parameters(params)
      >>> labels["layers_1"], labels["layers_2"]
      ({'bias': 'norm_bias', 'scale': 'norm_scale'}, {'negative_slope': 'other'})
      >>> labels["layers_3"]
      {'bias': 'bias', 'kernel': 'kernel'}
    """
    paths, leaves, structure = _flatten(params)
    siblings = collections.defaultdict(set)
    for path in paths:
        siblings[path[:-1]].add(path[-1])
    labels = [_label(path[-1], siblings[path[:-1]]) for path in paths]
    for pattern, label in (overrides or {}).items():
        if label not in LABELS:
            raise ValueError(
                f"label_parameters: {pattern!r}: {label!r} is not one of {', '.join(LABELS)}."
            )
        for i in _matches("label_parameters", paths, [pattern]):
            labels[i] = label
    pairs = zip(leaves, labels, strict=True)
    return structure.unflatten(leaf if _is_masked(leaf) else label for leaf, label in pairs)


def _label(name, siblings):
    weights = siblings & {"kernel", "embedding"}
    match name:
        case "kernel" | "embedding":
            return name
        case "scale" if not weights:
            return "norm_scale"
        case "bias" if weights:
            return "bias"
        case "bias" if "scale" in siblings or len(siblings) == 1:
            return "norm_bias"
        case "bias":
            return "bias"
    return "other"


def decay_mask(
    params: Any,
    labels: Collection[str] = DECAYED,
    overrides: Mapping[str, str] | None = None,
) -> Any:
    """Which parameters weight decay is for: kernels and embeddings, no norms, biases or others.

    Args:
      params: a tree of parameters.
      labels: the labels of `label_parameters` that are decayed.
      overrides: as in `label_parameters`.

    Returns:
      A tree of True and False; the function itself is a `mask` for optax.

    Raises:
      ValueError: for a label that is none of `LABELS`, and as `label_parameters`.

    Example:
      >>> import normjax as nj, optax
      >>> from normjax import optim
      >>> params, _ = nj.BatchNorm().init(None, 3)
      >>> optim.decay_mask({"dense": {"kernel": 0.0}, "norm": params})
      {'dense': {'kernel': True}, 'norm': AffineParams(scale=False, bias=False)}
      >>> optimizer = optax.adamw(1e-3, weight_decay=0.1, mask=optim.decay_mask)
    """
    for label in labels:
        if label not in LABELS:
            raise ValueError(f"decay_mask: {label!r} is not one of {', '.join(LABELS)}.")
    return jax.tree.map(lambda label: label in labels, label_parameters(params, overrides))


def scale_learning_rate(
    c: float | jax.Array, overrides: Mapping[str, str] | None = None
) -> optax.GradientTransformation:
    """Divides the updates of norm scales by `c`.

    Placed last, behind momentum and schedule, this divides their learning rate, and all of them
    follow the same schedule. (To divide the gradient would do nothing under Adam.)

    Args:
      c: above 1 slows the scales; a number or a scalar array.
      overrides: as in `label_parameters`.

    Returns:
      A transformation without state.

    Raises:
      ValueError: unless `c` > 0; in `init`, if no parameter is a norm's scale.

    Example:
      >>> import normjax as nj, optax
      >>> from normjax import optim
      >>> params, _ = nj.RMSNorm().init(None, 2)
      >>> optimizer = optax.chain(optax.sgd(0.5), optim.scale_learning_rate(4.0))
      >>> updates, _ = optimizer.update(params, optimizer.init(params))
      >>> updates.scale.tolist()
      [-0.125, -0.125]
    """
    checks.number(
        "scale_learning_rate", "c", c, 0, above=True, hint="It divides the rate; 1 leaves it."
    )

    def init(params):
        labels = jax.tree.leaves(label_parameters(params, overrides))
        if "norm_scale" not in labels:
            raise ValueError(
                "scale_learning_rate: no parameter is the scale of a norm. Norms keep it in a "
                "leaf named `scale`; `overrides` labels leaves with other names."
            )
        return optax.EmptyState()

    def update(updates, state, params=None):
        del params

        def divide(label, update):
            return update / jnp.asarray(c, update.dtype) if label == "norm_scale" else update

        return jax.tree.map(divide, label_parameters(updates, overrides), updates), state

    return optax.GradientTransformation(init, update)


def freeze(*patterns: str) -> optax.GradientTransformation:
    """Sets the updates of the named parameters to zero, NaN included.

    Placed last in the chain, it keeps them as they are, bit for bit, weight decay and momentum
    notwithstanding. Running statistics are no parameters: `keep_statistics` freezes them.

    Args:
      *patterns: what to freeze; see the top of this module.

    Returns:
      A transformation without state.

    Raises:
      ValueError: without patterns; in `init`, for a pattern that matches nothing.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from normjax import optim
      >>> params = {"stem": {"scale": jnp.ones(2)}, "head": {"kernel": jnp.ones(2)}}
      >>> optimizer = optax.chain(optax.sgd(0.5), optim.freeze("stem"))
      >>> updates, _ = optimizer.update(params, optimizer.init(params))
      >>> updates["stem"]["scale"].tolist(), updates["head"]["kernel"].tolist()
      ([0.0, 0.0], [-0.5, -0.5])
    """
    _need("freeze", patterns)

    def init(params):
        _matches("freeze", _flatten(params)[0], patterns)
        return optax.EmptyState()

    def update(updates, state, params=None):
        del params
        paths, leaves, structure = _flatten(updates)
        for i in _matches("freeze", paths, patterns):
            leaves[i] = jax.tree.map(jnp.zeros_like, leaves[i])
        return structure.unflatten(leaves), state

    return optax.GradientTransformation(init, update)


def keep_statistics(new: Any, old: Any, *patterns: str) -> Any:
    """`new` with the named leaves of `old`: running statistics that stay where they were.

    The layers keep normalizing with the statistics of the batch in training, and with the kept
    ones in evaluation.

    Args:
      new: the statistics after a step, such as `updates["batch_stats"]` of Linen or
        `nnx.state(model, nnx.BatchStat)`.
      old: those before it. A module of NNX changes its variables in place: take
        `jax.tree.map(lambda a: a, nnx.state(model, nnx.BatchStat))` before the step.
      *patterns: what to keep; see the top of this module.

    Returns:
      A tree of the structure of `new`.

    Raises:
      ValueError: without patterns, for a pattern that matches nothing, and for trees of different
        structure.

    Example:
      >>> from normjax import optim
      >>> old = {"stem": {"mean": 0.0}, "head": {"mean": 0.0}}
      >>> new = {"stem": {"mean": 1.0}, "head": {"mean": 1.0}}
      >>> optim.keep_statistics(new, old, "stem")
      {'head': {'mean': 1.0}, 'stem': {'mean': 0.0}}
    """
    _need("keep_statistics", patterns)
    paths, leaves, structure = _flatten(new)
    old_paths, old_leaves, _ = _flatten(old)
    if paths != old_paths:
        different = ["/".join(path) for path in set(paths) ^ set(old_paths)]
        raise ValueError(
            f"keep_statistics: the new and the old statistics differ in {', '.join(different)}."
        )
    for i in _matches("keep_statistics", paths, patterns):
        leaves[i] = old_leaves[i]
    return structure.unflatten(leaves)


def batch_norm_init_recipe(
    learning_rate: float | jax.Array | Callable[[Any], Any] = 0.1,
    *,
    c: float | jax.Array = 100.0,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    overrides: Mapping[str, str] | None = None,
) -> optax.GradientTransformation:
    """SGD for norms whose scales start below one and move slowly.

    Davis & Frank, *Revisiting Batch Norm Initialization*, 2022, https://arxiv.org/abs/2110.13989,
    with the settings of its public implementation (osu-cvl/revisiting-bn-init): momentum 0.9, the
    learning rate of all norm scales divided by `c`, weight decay on kernels (and embeddings) alone.
    Parameters are told apart by name, not by shape (`label_parameters`), so that it works for every
    norm. What else belongs to the recipe:

    - `scale_init=jax.nn.initializers.constant(0.1)` in all norms, biases zero;
    - `InputNorm` with the same `scale_init` on images in [0, 1], in place of the moments of the
      data set;
    - He initialization; a learning rate of 0.1 with cosine decay to 1e-8.

    With `c=1` and scales that start at one it is `optax.sgd` with weight decay on kernels.

    Args:
      learning_rate: of all other parameters, or its schedule.
      c: divisor of the learning rate of norm scales.
      momentum: of the gradients, in [0, 1).
      weight_decay: added to the gradients of kernels and embeddings, times their values.
      overrides: as in `label_parameters`.

    Returns:
      An optax optimizer; `update` needs the parameters.

    Raises:
      ValueError: for an argument outside its range, and as `scale_learning_rate`.

    Example:
      >>> import jax, normjax as nj, optax
      >>> from normjax import optim
      >>> norm = nj.BatchNorm(scale_init=jax.nn.initializers.constant(0.1))
      >>> params, _ = norm.init(None, 2)
      >>> schedule = optax.cosine_decay_schedule(0.1, decay_steps=1000, alpha=1e-7)
      >>> optimizer = optim.batch_norm_init_recipe(schedule)
      >>> rates = optim.effective_learning_rates(optimizer, params)
      >>> f"{rates['scale']:.4f} {rates['bias']:.4f}"
      '0.0010 0.1000'
    """
    name = "batch_norm_init_recipe"
    if not callable(learning_rate):
        checks.number(name, "learning_rate", learning_rate, 0)
    checks.number(name, "weight_decay", weight_decay, 0)
    checks.number(name, "momentum", momentum, 0)
    if checks.is_number(momentum) and momentum >= 1:
        raise ValueError(f"{name}: momentum={momentum!r} is not in [0, 1).")
    return optax.chain(
        optax.add_decayed_weights(weight_decay, lambda p: decay_mask(p, overrides=overrides)),
        optax.sgd(learning_rate, momentum=momentum),
        scale_learning_rate(c, overrides),
    )


def effective_learning_rates(
    optimizer: optax.GradientTransformation, params: Any, state: Any = None
) -> dict[str, float]:
    """How far the next step of `optimizer` moves each parameter per unit of its gradient.

    Measured, not read from the arguments: schedules, masks, freezing and divided rates all show.
    For SGD this is the learning rate (with Nesterov momentum, 1 + momentum times it); where a step
    is not proportional to the gradient, as in Adam, it is the slope at gradient one.

    Args:
      optimizer: any optax optimizer that is differentiable.
      params: its parameters.
      state: its state; None: that before the first step.

    Returns:
      The rates by path, means over the elements of a parameter.

    Raises:
      ValueError: as `init` of the optimizer.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from normjax import optim
      >>> optimizer = optax.chain(optax.sgd(0.5), optim.freeze("head"))
      >>> optim.effective_learning_rates(optimizer, {"stem": jnp.ones(2), "head": jnp.ones(3)})
      {'head': 0.0, 'stem': 0.5}
    """
    state = optimizer.init(params) if state is None else state
    ones = jax.tree.map(jnp.ones_like, params)
    less = jax.tree.map(jnp.negative, ones)
    _, slopes = jax.jvp(lambda g: optimizer.update(g, state, params)[0], (ones,), (less,))
    paths, leaves, _ = _flatten(slopes)
    return {"/".join(p): float(jnp.mean(leaf)) for p, leaf in zip(paths, leaves, strict=True)}


def _flatten(tree):
    """Paths as tuples of names, leaves and structure; a masked part counts as one leaf."""
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_masked)
    return [_names(path) for path, _ in pairs], [leaf for _, leaf in pairs], structure


def _names(path):
    """The names on a path, without the `value` of a variable of NNX or a box of Linen."""
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return tuple(jax.tree_util.keystr(path, simple=True, separator="/").split("/"))


def _is_masked(leaf):
    return isinstance(leaf, optax.MaskedNode)


def _need(name, patterns):
    if not patterns:
        raise ValueError(f"{name}: no patterns are given, such as 'stem' or '*/norm_?'.")


def _matches(name, paths, patterns):
    """Indices of the paths that a pattern matches, in whole or up to a slash."""
    found = set()
    for pattern in patterns:
        hits = {
            i
            for i, path in enumerate(paths)
            if any(
                fnmatch.fnmatchcase("/".join(path[:n]), pattern) for n in range(1, len(path) + 1)
            )
        }
        if not hits:
            some = ", ".join("/".join(path) for path in paths[:5])
            raise ValueError(f"{name}: the pattern {pattern!r} matches none of {some}, ...")
        found |= hits
    return sorted(found)
