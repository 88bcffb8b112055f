"""Optimizers that know norms from weights: labels, decay masks, learning rates and freezing.

Every function takes any tree of parameters: nested dicts of Flax Linen, `nnx.State`, the
NamedTuples of the methods. Leaves are named by their path, such as "block_1/norm/scale". A pattern
names leaves as a shell names files (`*` also crosses slashes), and a pattern that matches the path
of a subtree names all leaves below it: "block_1", "*/norm_?", "head/bias".
"""

import collections
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from normjax.core import checks
from normjax.kernels import choose
from normjax.methods.weights import StrictWeightNorm
from normjax.paths import flatten, is_masked, matches

LABELS = ("norm_scale", "norm_bias", "bias", "kernel", "embedding", "other")
DECAYED = ("kernel", "embedding")
IS_LABEL = checks.one_of(*LABELS)

__all__ = [
    "batch_norm_init_recipe",
    "decay_mask",
    "effective_learning_rates",
    "freeze",
    "keep_statistics",
    "label_parameters",
    "scale_learning_rate",
    "unit_rows",
]


def _named(name, paths, patterns):
    """Indices of the paths that a pattern matches; ValueError, by `name`, without patterns."""
    if not patterns:
        raise ValueError(f"{name}: no patterns are given, such as 'stem' or '*/norm_?'.")
    return matches(name, paths, patterns)


def label_parameters(params: Any, overrides: Mapping[str, str] | None = None) -> Any:
    """What each parameter is, in the structure of `params`: for `optax.multi_transform`.

    "kernel" and "embedding" are leaves of that name; "norm_scale" is a `scale` without a kernel
    beside it; "bias" a `bias` beside a kernel or an embedding; "norm_bias" one beside a `scale`, or
    alone; "other" all else, such as the slope of a PReLU or the `alpha` of `DynamicTanh`. The
    placeholders of `optax.masked` stay. `overrides` are labels by pattern, such as
    `{"pos_embedding": "embedding"}`; the last match wins. ValueError for one that matches nothing,
    or whose label is none of `LABELS`.

    The public implementation of `batch_norm_init_recipe` goes by shapes, and takes slopes and
    kernels with one output for norm scales, and norms of one feature for weights.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, normjax.linen, normjax.optim
      >>> net = nn.Sequential([nn.Dense(4), normjax.linen.LayerNorm(), nn.PReLU(), nn.Dense(1)])
      >>> params = net.init(jax.random.key(0), jnp.ones((2, 3)))["params"]
      >>> [list(label.values()) for label in normjax.optim.label_parameters(params).values()]
      [['bias', 'kernel'], ['norm_bias', 'norm_scale'], ['other'], ['bias', 'kernel']]
    """
    paths, leaves, structure = flatten(params)
    siblings = collections.defaultdict(set)
    for path in paths:
        siblings[path[:-1]].add(path[-1])
    labels = [_label(path[-1], siblings[path[:-1]]) for path in paths]
    for pattern, label in (overrides or {}).items():
        checks.require("label_parameters", "overrides", label, IS_LABEL)
        for i in matches("label_parameters", paths, [pattern]):
            labels[i] = label
    pairs = zip(leaves, labels, strict=True)
    return structure.unflatten(leaf if is_masked(leaf) else label for leaf, label in pairs)


def _label(name, siblings):
    if name in DECAYED:
        return name
    weighs = not siblings.isdisjoint(DECAYED)
    if name == "bias":
        of_norm = not weighs and ("scale" in siblings or len(siblings) == 1)
        return "norm_bias" if of_norm else "bias"
    return "norm_scale" if name == "scale" and not weighs else "other"


def decay_mask(
    params: Any, labels: Collection[str] = DECAYED, overrides: Mapping[str, str] | None = None
) -> Any:
    """Which parameters weight decay is for, as a tree of True and False: a `mask` for optax.

    Those with one of the `labels`, by `label_parameters`, whose `overrides` and errors it has.

    Example:
      >>> import normjax as nj, optax, normjax.optim as optim
      >>> params, _ = nj.BatchNorm().init(None, 3)
      >>> optim.decay_mask({"dense": {"kernel": 0.0}, "norm": params})
      {'dense': {'kernel': True}, 'norm': AffineParams(scale=False, bias=False)}
      >>> optimizer = optax.adamw(1e-3, weight_decay=0.1, mask=optim.decay_mask)
    """
    for label in labels:
        checks.require("decay_mask", "labels", label, IS_LABEL)
    return jax.tree.map(lambda label: label in labels, label_parameters(params, overrides))


def scale_learning_rate(
    c: float | jax.Array, overrides: Mapping[str, str] | None = None
) -> optax.GradientTransformation:
    """Divides the updates of norm scales by `c`.

    Placed last, behind momentum and schedule, this divides their learning rate. (To divide the
    gradient would do nothing under Adam.) `overrides` is that of `label_parameters`. ValueError
    unless `c` > 0 and, in `init`, if no parameter is a norm's scale.

    Example:
      >>> import normjax as nj, optax, normjax.optim as optim
      >>> params, _ = nj.RMSNorm().init(None, 2)
      >>> optimizer = optax.chain(optax.sgd(0.5), optim.scale_learning_rate(4.0))
      >>> updates, _ = optimizer.update(params, optimizer.init(params))
      >>> updates.scale.tolist()
      [-0.125, -0.125]
    """
    checks.require_number(
        "scale_learning_rate", "c", c, 0, above=True, hint="It divides the rate; 1 leaves it."
    )

    def scales(params):
        labels = label_parameters(params, overrides)
        if "norm_scale" not in jax.tree.leaves(labels):
            raise ValueError(
                "scale_learning_rate: no parameter is the scale of a norm. Norms keep it in a "
                "leaf named `scale`; `overrides` labels leaves with other names."
            )
        return jax.tree.map(lambda label: label == "norm_scale", labels)

    def divide(update):
        return update / jnp.asarray(c, update.dtype)

    return optax.masked(optax.stateless(lambda u, _: jax.tree.map(divide, u)), scales)


def freeze(*patterns: str) -> optax.GradientTransformation:
    """Sets the updates of the named parameters to zero, NaN included.

    Placed last in the chain, it keeps them as they are, bit for bit, weight decay and momentum
    notwithstanding. Running statistics are no parameters: `keep_statistics` freezes them.
    ValueError, in `init`, without patterns or for one that matches nothing.

    Example:
      >>> import jax.numpy as jnp, optax, normjax.optim as optim
      >>> params = {"stem": {"scale": jnp.ones(2)}, "head": {"kernel": jnp.ones(2)}}
      >>> optimizer = optax.chain(optax.sgd(0.5), optim.freeze("stem"))
      >>> updates, _ = optimizer.update(params, optimizer.init(params))
      >>> updates["stem"]["scale"].tolist(), updates["head"]["kernel"].tolist()
      ([0.0, 0.0], [-0.5, -0.5])
    """

    def named(params):
        paths, leaves, structure = flatten(params)
        found = _named("freeze", paths, patterns)
        return structure.unflatten(i in found for i in range(len(leaves)))

    return optax.masked(optax.set_to_zero(), named)


def unit_rows(
    *patterns: str, feature_axes: int | tuple[int, ...] = -1
) -> optax.GradientTransformation:
    """Ends every step with the rows of kernels at length one: a projection onto spheres.

    Loshchilov et al., *nGPT*, 2024, https://arxiv.org/abs/2410.01131

    Placed last in the chain it changes the updates, which then are in at least float32. The rows
    are those of `normjax.StrictWeightNorm(feature_axes=feature_axes)`, of the named parameters, or
    of all called `kernel`; a row of zeros stays. ValueError for a pattern that matches nothing,
    without any kernel, and in `update` without `params`.

    Example:
      >>> import jax.numpy as jnp, optax, normjax.optim as optim
      >>> params = {"kernel": jnp.array([[1.0], [0.0]]), "bias": jnp.zeros(1)}
      >>> optimizer = optax.chain(optax.sgd(1.0), optim.unit_rows())
      >>> gradient = {"kernel": jnp.array([[0.7], [-0.4]]), "bias": jnp.ones(1)}
      >>> updates, _ = optimizer.update(gradient, optimizer.init(params), params)
      >>> kernel = optax.apply_updates(params, updates)["kernel"]
      >>> print(f"{kernel[0, 0]:.4f} {kernel[1, 0]:.4f}")
      0.6000 0.8000
    """
    rows = StrictWeightNorm(feature_axes=feature_axes)

    def kernels(params):
        paths, leaves, structure = flatten(params)
        found = choose("unit_rows", paths, patterns)
        return structure.unflatten(i in found for i in range(len(leaves)))

    def project(updates, params):
        if params is None:
            raise ValueError("unit_rows: update(...) needs params, whose rows it measures.")

        def move(update, param):
            wide = jnp.promote_types(param.dtype, jnp.float32)
            old = param.astype(wide)
            return rows.apply((), (), old + update.astype(wide), train=True)[0] - old

        return jax.tree.map(move, updates, params)

    return optax.masked(optax.stateless(project), kernels)


def keep_statistics(new: Any, old: Any, *patterns: str) -> Any:
    """`new` with the named leaves of `old`: running statistics that stay where they were.

    `new` are those after a training step, such as `updates["batch_stats"]` of Linen, and `old` are
    those before it. A module of NNX changes its variables in place: copy them before the step, by
    `jax.tree.map(lambda a: a, nnx.state(model, nnx.BatchStat))`. In training the layers keep
    normalizing with the statistics of the batch. ValueError without patterns, for one that matches
    nothing, and if the trees differ.

    Example:
      >>> from normjax import optim
      >>> old, new = ({"stem": {"mean": mean}, "head": {"mean": mean}} for mean in (0.0, 1.0))
      >>> optim.keep_statistics(new, old, "stem")
      {'head': {'mean': 1.0}, 'stem': {'mean': 0.0}}
    """
    paths, leaves, structure = flatten(new)
    old_paths, old_leaves, _ = flatten(old)
    if paths != old_paths:
        different = ["/".join(path) for path in set(paths) ^ set(old_paths)]
        raise ValueError(
            f"keep_statistics: the new and the old statistics differ in {', '.join(different)}."
        )
    for i in _named("keep_statistics", paths, patterns):
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
    with the settings of its public implementation (osu-cvl/revisiting-bn-init); but parameters are
    told apart by name (`label_parameters`, with `overrides`), so that it works for every norm. It
    is `optax.sgd` with `momentum` and a `learning_rate`, or its schedule, with weight decay on
    kernels and embeddings alone, and the learning rate of norm scales divided by `c`. ValueError
    for an argument outside its range, and as `scale_learning_rate`.

    To the recipe belong also: `scale_init=jax.nn.initializers.constant(0.1)` in all norms, biases
    zero; `BatchNorm(use_bias=False, scale_init=normjax.relu_scale(...))` with that initializer for
    images in [0, 1], in place of the moments of the data set; He initialization; a learning rate of
    0.1 with cosine decay to 1e-8.

    Example:
      >>> import jax, normjax as nj, optax, normjax.optim as optim
      >>> params, _ = nj.BatchNorm(scale_init=jax.nn.initializers.constant(0.1)).init(None, 2)
      >>> schedule = optax.cosine_decay_schedule(0.1, decay_steps=1000, alpha=1e-7)
      >>> rates = optim.effective_learning_rates(optim.batch_norm_init_recipe(schedule), params)
      >>> f"{rates['scale']:.4f} {rates['bias']:.4f}"
      '0.0010 0.1000'
    """
    name = "batch_norm_init_recipe"
    if not callable(learning_rate):
        checks.require_number(name, "learning_rate", learning_rate, 0)
    checks.require_number(name, "weight_decay", weight_decay, 0)
    checks.require_number(name, "momentum", momentum, 0)
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
    is not proportional to the gradient, as in Adam, it is the slope at gradient one. By path, means
    over the elements of a parameter. Without a `state` it is the first step.

    Example:
      >>> import jax.numpy as jnp, optax, normjax.optim as optim
      >>> optimizer = optax.chain(optax.sgd(0.5), optim.freeze("head"))
      >>> optim.effective_learning_rates(optimizer, {"stem": jnp.ones(2), "head": jnp.ones(3)})
      {'head': 0.0, 'stem': 0.5}
    """
    state = optimizer.init(params) if state is None else state
    ones = jax.tree.map(jnp.ones_like, params)
    less = jax.tree.map(jnp.negative, ones)
    _, slopes = jax.jvp(lambda g: optimizer.update(g, state, params)[0], (ones,), (less,))
    paths, leaves, _ = flatten(slopes)
    return {"/".join(p): float(jnp.mean(leaf)) for p, leaf in zip(paths, leaves, strict=True)}
