"""Norms folded into the layers beside them: models that compute the same with fewer operations.

In evaluation with running statistics a norm is an affine map of each feature, or for whitening a
matrix of features. A dense or convolutional layer takes it into its kernel and bias, whether the
norm is behind the layer (`into_previous`) or in front of it (`into_next`). Of a norm with
statistics of its input, such as `LayerNorm`, the layers behind it take scale and bias. `fold` does
it for a whole model.

Jacob et al., *Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference*, 2018, section 3.2, https://arxiv.org/abs/1712.05877, for batch norm behind a layer;
Graef, Makraduli, Wasielewski & Clapp, *FlashNorm*, 2024, https://arxiv.org/abs/2407.09577, for
scales in front of one. Departure from the latter: the division by the root mean square stays in
front of the layer.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

import normjax
from normjax import modules
from normjax.core import passes
from normjax.core.method import Linear, Normalizer, feature_positions, feature_sizes, traits
from normjax.core.structs import several
from normjax.folding.arrays import into_next, into_previous
from normjax.folding.models import FoldedModel, LinenEdit, NnxEdit, Rest
from normjax.folding.program import Program

__all__ = ["Folded", "FoldedModel", "Rest", "fold", "into_next", "into_previous"]

# Of these, which have statistics of their input or are no affine maps, scale and bias come last.
AFFINE_LAST = (
    normjax.LayerNorm,
    normjax.RMSNorm,
    normjax.GroupNorm,
    normjax.InstanceNorm,
    normjax.EvalNorm,
    normjax.DynamicTanh,
    normjax.Derf,
)


class Folded(NamedTuple):
    """A folded model, what was folded and what was not, and how far the outputs are apart.

    Norms and layers are named by their path, such as "block_1/norm".

    Attributes:
      model: Linen: a `FoldedModel`; NNX: a model of its own, with `Rest` in place of norms.
      variables: Linen: its variables; NNX: None, the model holds them.
      folded: the layers that took each norm, or its scale and bias.
      kept: why each other norm was left.
      absolute, relative: largest difference between the outputs of both models for the arguments
        of `fold`; relative to the largest value of an output.

    Example:
      >>> import jax, flax.linen as nn, normjax.folding as folding, normjax.linen
      >>> model = nn.Sequential([nn.Dense(2), normjax.linen.GroupNorm(2), nn.relu])
      >>> x = jax.numpy.ones((2, 3, 4))
      >>> done = folding.fold(model, model.init(jax.random.key(0), x), x)
      >>> done.folded, list(done.kept), done.absolute
      ({}, ['layers_1'], 0.0)
    """

    model: Any
    variables: Any
    folded: dict[str, tuple[str, ...]]
    kept: dict[str, str]
    absolute: float
    relative: float


def fold(
    model: linen.Module | nnx.Module,
    *args: Any,
    pairs: Iterable[tuple[str, str | tuple[str, ...]]] | None = None,
    norm_inputs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Folded:
    """Folds the norms of a model into its layers, for evaluation.

    A norm goes into the dense or convolutional layer whose output it takes, if nothing else takes
    that, or else into the layers that take its output, if nothing else does. No reshape, nor an
    activation of its own, may lie between; the `activation` of a method stays. Of `LayerNorm`,
    `RMSNorm`, `GroupNorm` and the like, scale and bias go into the layers behind. Layers without
    bias get one if there is a shift. What takes which output, and that nothing else uses it or a
    kernel, is read from the program that JAX makes of the model. Layers that `scan` or `vmap` stack
    on axis 0 are folded like others.

    Norms are those of normjax, and must evaluate (NNX: `model.eval()`). Those that get a mask, and
    set their input to zero there, are left; a folded one takes a mask and does not use it. Of a
    `chain`, make modules of their own.

    Args:
      model: a model of Linen or NNX; it stays as it is.
      *args, **kwargs: those of its call, in Linen those of `model.apply`, with the variables first.
      pairs: norms with the layers that shall take them, by path, as
        [("norm_1", "conv_1"), ("norm_2", ("query", "key"))]; None: all that can be folded.
      norm_inputs: the class or branch for which norms that need one are folded, as
        {"condition": 3, "branch": 0}.

    Raises:
      TypeError: for what is no Flax module, or no variables in Linen.
      ValueError: for a pair that cannot be folded, with the reason, and for paths, and inputs of
        norms, that there are none of.

    Example:
      >>> import jax, flax.linen as nn, normjax.folding as folding, normjax.linen
      >>> norm = normjax.linen.BatchNorm(use_running_average=True)
      >>> model = nn.Sequential([nn.Conv(4, (3, 3), use_bias=False), norm, nn.relu])
      >>> x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
      >>> done = folding.fold(model, model.init(jax.random.key(1), x), x)
      >>> done.folded, done.kept, done.relative < 1e-6
      ({'layers_1': ('layers_0',)}, {}, True)
      >>> y = done.model.apply(done.variables, x)
      >>> jax.tree.map(jax.numpy.shape, done.variables)
      {'params': {'layers_0': {'bias': (4,), 'kernel': (3, 3, 3, 4)}}}
    """
    kwargs.pop("mutable", None)
    program = Program.of(model, args, kwargs)
    edit = NnxEdit(model) if isinstance(model, nnx.Module) else LinenEdit(model, args[0])
    done, kept = _fold_norms(program, edit, pairs, dict(norm_inputs or {}))
    new, variables = edit.result()
    given = args if variables is None else (variables, *args[1:])
    differences = _differences((model, args, kwargs), (new, given, kwargs))
    return Folded(new, variables, done, kept, *differences)


def _fold_norms(program, edit, pairs, norm_inputs):
    """Folds the norms of a program; returns by path what took them, and why others were left."""
    _check_inputs(program, norm_inputs)
    wanted = None if pairs is None else _wanted(program, pairs)
    done, kept = {}, {}
    for i in program.norms():
        name = program.name(i)
        if wanted is not None and name not in wanted:
            continue
        try:
            takers, kernels, left = _find(program, edit, i, norm_inputs, (wanted or {}).get(name))
        except ValueError as error:
            if wanted is not None:
                raise ValueError(f"fold: {name!r} cannot be folded: {error}.") from None
            kept[name] = str(error)
            continue
        for taker, arrays in zip(takers, kernels, strict=True):
            edit.write(program.calls[taker], *arrays)
        edit.leave(program.calls[i], left)
        done[name] = tuple(map(program.name, takers))
    return done, kept


def _find(program, edit, i, norm_inputs, wanted):
    """The layers that take norm `i`, their new arrays, what is left of it; ValueError: why none."""
    reasons = {}
    for where, find in (("in front", _previous), ("behind", _next)):
        try:
            found = find(program, edit, i, norm_inputs)
            names = [program.name(taker) for taker in found[0]]
            if wanted in (None, sorted(names)):
                return found
            reasons[where] = f"what can take it is {', '.join(names)}"
        except ValueError as error:
            reasons[where] = str(error).rstrip(".")
    if len(set(reasons.values())) == 1:
        raise ValueError(reasons["behind"])
    raise ValueError("; ".join(f"{where}: {reason}" for where, reason in reasons.items()))


def _check_inputs(program, norm_inputs):
    """ValueError for an input that no norm takes."""
    taken = {name for i in program.norms() for name in traits(program.method(i)).inputs}
    for name in norm_inputs.keys() - taken:
        raise ValueError(f"fold: norm_inputs has {name!r}, which no norm of the model takes.")


def _wanted(program, pairs):
    """The paths of layers by norm; ValueError for one that the model lacks."""
    wanted = {norm: sorted(several(layers)) for norm, layers in pairs}
    norms = [program.name(i) for i in program.norms()]
    layers = [program.name(i) for i in program.layers()]
    for kind, names, have in (
        ("norm", wanted, norms),
        ("layer", (name for many in wanted.values() for name in many), layers),
    ):
        for name in names:
            if name not in have:
                known = ", ".join(have[:8])
                raise ValueError(f"fold: no {kind} has the path {name!r}. There are: {known}.")
    return wanted


def _previous(program, edit, i, norm_inputs):
    """How the layer in front of norm `i` takes it: layers, their arrays, what is left of it."""
    call = program.norm(i)
    method, *variables = edit.norm(call)
    shapes = _shapes(method, call)
    evaluation = _evaluation(method, shapes, call, norm_inputs)
    p = program.producers.get(i)
    if p is None or program.layout(p) is None:
        raise ValueError("its input is not the output of a dense or convolutional layer")
    if program.takers[p] != [i]:
        raise ValueError(f"something else takes the output of {program.name(p)} too")
    layout, depth, *arrays = program.layer(p, edit)
    how: Any = dict(axes=tuple(layout.outputs.values()), groups=layout.groups)

    def take(variables, kernel, bias):
        shape = program.calls[p].output.shape
        normalizer = _on_axes(evaluation(*variables), method, shape, layout.outputs)
        return into_previous(kernel, bias, normalizer, **how)

    _require_depth(variables, shapes, depth, program.name(p))
    return [p], [_stacked(take, depth)(variables, *arrays)], _left(method)


def _next(program, edit, i, norm_inputs):
    """How the layers behind norm `i` take it, or its scale and bias."""
    call = program.norm(i)
    method, *variables = edit.norm(call)
    shapes = _shapes(method, call)
    if isinstance(method, AFFINE_LAST):
        evaluation, left = _affine_last(method, variables, call), None
        activation = getattr(method, "activation", None)
    else:
        evaluation, left = _evaluation(method, shapes, call, norm_inputs), _left(method)
        activation = left[0]
    if activation is not None:
        raise ValueError("its activation lies in front of what takes its output")
    takers = program.takers[i]
    if not takers or any(t is None or program.layout(t) is None for t in takers):
        raise ValueError("its output goes to what is no dense or convolutional layer")
    new = []
    for t in takers:
        layout, depth, *arrays = program.layer(t, edit)
        axes = dict(inputs=tuple(layout.inputs.values()), outputs=tuple(layout.outputs.values()))
        how: Any = dict(**axes, groups=layout.groups, padded=layout.padded)

        def take(variables, kernel, bias, layout=layout, how=how):
            normalizer = _on_axes(evaluation(*variables), method, call.output.shape, layout.inputs)
            return into_next(kernel, bias, normalizer, **how)

        _require_depth(variables, shapes, depth, program.name(t))
        new.append(_stacked(take, depth)(variables, *arrays))
    return takers, new, left


def _shapes(method, call):
    """Shapes of the variables of a norm: more axes are those of layers that are stacked."""
    features = feature_sizes(method, call.output.shape)
    return jax.eval_shape(lambda: method.init(jax.random.key(0), features))


def _evaluation(method, shapes, call, norm_inputs):
    """The affine map of a norm as a function of its variables; ValueError if it has none."""
    if not hasattr(method, "evaluation"):
        raise ValueError(f"{type(method).__name__} is no affine map in evaluation")
    if call.kwargs.get("mask") is not None:
        raise ValueError("it gets a mask, where it sets its input to zero: call the model without")
    names = traits(method).inputs.keys() & {"branch", "condition"}
    given = {name: norm_inputs.get(name) for name in names}
    evaluation = functools.partial(method.evaluation, **given)
    jax.eval_shape(evaluation, *shapes)
    return evaluation


def _affine_last(method, variables, call):
    """Scale and bias of a norm, which come last in it, as a function of its variables."""
    if call.kwargs.get("gate") is not None:
        raise ValueError("its gate lies behind scale and bias")
    if variables[0].scale is None and variables[0].bias is None:
        raise ValueError(f"{type(method).__name__} has neither scale nor bias")

    def evaluation(params, _):
        scale = params.scale
        if scale is not None:
            scale = scale.astype(passes.wide(scale.dtype)) + getattr(method, "scale_offset", 0)
        return Normalizer(scale=scale, bias=params.bias)

    return evaluation


def _stacked(take, depth):
    """`take` for variables that layers of `scan` or `vmap` have stacked `depth` times on axis 0."""
    return take if depth == 0 else jax.vmap(_stacked(take, depth - 1))


def _require_depth(variables, shapes, depth, name):
    """ValueError unless the variables of a norm are stacked as those of the layer `name`."""
    leaves = lambda tree: jax.tree.leaves(tree, is_leaf=lambda a: a is None)
    pairs = zip(leaves(tuple(variables)), leaves(shapes), strict=True)
    if any(a is not None and a.ndim != b.ndim + depth for a, b in pairs):
        raise ValueError(f"its variables are not stacked as those of {name}")


def _left(method):
    """Activation and dtype of a method: what is left of it when it is folded."""
    while not hasattr(method, "epilogue"):  # a wrapper
        method = method.method
    return method.epilogue(), method.dtype


def _on_axes(normalizer, method, shape, axes):
    """`normalizer` for all of the `axes` of features of an array of `shape`."""
    at = feature_positions(method, shape)
    if not set(at) <= axes.keys() or (isinstance(normalizer, Linear) and len(at) < len(axes)):
        raise ValueError(f"its features lie on axes {at}, those of the layer on {tuple(axes)}")
    if isinstance(normalizer, Linear):
        return normalizer
    lacking = tuple(n for n, axis in enumerate(axes) if axis not in at)
    lift = lambda a: jnp.expand_dims(a, lacking) if a.ndim == len(at) else a
    return Normalizer(*(None if a is None else lift(a) for a in normalizer))


def _differences(old, new):
    """The largest absolute and relative difference of the outputs of two calls of models."""
    pairs = [
        [np.asarray(value).astype("float64") for value in pair]
        for pair in zip(_outputs(*old), _outputs(*new), strict=True)
        if jnp.issubdtype(pair[0].dtype, jnp.floating) and pair[0].size
    ]
    gaps = [np.max(np.abs(a - b)) for a, b in pairs]
    sizes = [np.max(np.abs(a)) or 1 for a, _ in pairs]
    relative = [gap / size for gap, size in zip(gaps, sizes, strict=True)]
    return float(np.max(gaps, initial=0)), float(np.max(relative, initial=0))


def _outputs(model, args, kwargs):
    plain = lambda path, module, call, args, kwargs: call(*args, **kwargs)
    run, *inputs = modules.intercept(model, plain, *args, **kwargs)
    return jax.jit(run)(*inputs)
