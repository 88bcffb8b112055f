"""Checkpoints of a training run by orbax, with the configuration of the norms beside the arrays."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from normjax.interop import check_configuration
from normjax.paths import flatten
from normjax.training.steps import TrainState

if TYPE_CHECKING:
    from orbax.checkpoint import CheckpointManager


def save(manager: "CheckpointManager", state: TrainState, configuration: Mapping[str, Any]) -> bool:
    """Writes a state as the checkpoint of its step, if the manager's options ask for one.

    A checkpoint has all that the run is made of: parameters, statistics, the optimizer's state,
    keys, the number of steps (by which schedules go) and the average. It is there as a whole or not
    at all: a process that is killed loses the steps since the last one. With several processes all
    of them call this.

    Args:
      manager: an `orbax.checkpoint.CheckpointManager`, which decides when to write, how many to
        keep, and may write while training goes on.
      state: of a train step; a next step may donate it.
      configuration: `normjax.interop.configuration` of the model.

    Returns whether it was written. ValueError for the state of `replicate`, ImportError without
    orbax.

    Example:
      >>> import os, tempfile, jax, flax.linen as nn, optax, orbax.checkpoint as ocp
      >>> import normjax.linen, normjax.interop as interop, normjax.training as training
      >>> model, x, key = normjax.linen.RMSNorm(), jax.numpy.ones((2, 3)), jax.random.key(0)
      >>> fields = interop.configuration(model, model.init(key, x), x)
      >>> state = training.create_train_state(model, optax.sgd(0.1), key, x)
      >>> with tempfile.TemporaryDirectory() as folder, ocp.CheckpointManager(folder) as manager:
      ...     written = training.save(manager, state, fields)
      ...     again = training.restore(manager, state, fields)
      >>> written, again.params["scale"].tolist()
      (True, [1.0, 1.0, 1.0])
    """
    args = _orbax().args
    if jnp.shape(state.step) != ():
        raise ValueError(
            f"save: state.step has the shape {jnp.shape(state.step)}. Of the state of `replicate` "
            "save one copy, jax.tree.map(lambda a: a[0], state)."
        )
    items = args.Composite(
        state=args.StandardSave(state), configuration=args.JsonSave(dict(configuration))
    )
    return bool(manager.save(int(state.step), args=items))


def restore(
    manager: "CheckpointManager",
    like: TrainState,
    configuration: Mapping[str, Any],
    *,
    step: int | None = None,
) -> TrainState:
    """The state of a checkpoint, where and how `like` lies.

    The number of devices may be another one than that which saved it: `like` is the state of
    `create_train_state` on the mesh of now, or one of `jax.ShapeDtypeStruct`s with shardings, for
    which nothing is computed.

    Args:
      manager: as for `save`.
      like: tells structure, shapes, dtypes and shardings.
      configuration: of the model as it is now.
      step: which checkpoint; None: the last one.

    FileNotFoundError without a checkpoint. ValueError where it is of other norms
    (`normjax.interop.check_configuration`), and for leaves that it lacks, has besides, or has in
    another shape or dtype.

    Example:
      >>> import normjax.training as training
      >>> training.restore.__kwdefaults__
      {'step': None}
    """
    args = _orbax().args
    manager.wait_until_finished()
    step = manager.latest_step() if step is None else step
    if step is None or step not in manager.all_steps():
        raise FileNotFoundError(f"restore: {manager.directory} has no checkpoint of step {step}.")
    only = args.Composite(configuration=args.JsonRestore())
    check_configuration(manager.restore(step, args=only)["configuration"], configuration)
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=getattr(a, "sharding", None)),
        like,
    )
    only = args.Composite(state=args.StandardRestore(shapes))
    try:
        return manager.restore(step, args=only)["state"]
    finally:  # orbax knows how to read what a checkpoint has when it has been asked for it
        _check(manager.item_metadata(step)["state"].tree, like)


def _check(saved, like):
    """ValueError where the leaves of a checkpoint are not those of `like`."""
    found, wanted = _kinds(saved), _kinds(jax.eval_shape(lambda: jax.tree.map(_numbers, like)))
    text = lambda path: "/".join(path)
    lines = [f"lacks {text(path)}" for path in wanted.keys() - found.keys()]
    lines += [f"has {text(path)} besides" for path in found.keys() - wanted.keys()]
    lines += [
        f"has {text(path)} as {found[path]}, not {wanted[path]}"
        for path in wanted.keys() & found.keys()
        if found[path] != wanted[path]
    ]
    if lines:
        lines = ";\n  it ".join(sorted(lines))
        raise ValueError(f"restore: the checkpoint is of another model or optimizer. It {lines}.")


def _kinds(tree):
    """Dtypes and shapes of leaves by path; orbax writes variables of NNX with their `value`."""
    paths, leaves, _ = flatten(tree)
    last = lambda path: path[:-1] if path[-1] == "value" else path
    pairs = zip(paths, leaves, strict=True)
    return {last(path): f"{a.dtype}{list(a.shape)}" for path, a in pairs}


def _numbers(a):
    """The numbers that a key is, which are what is written."""
    is_key = jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(jnp.empty(a.shape, a.dtype)) if is_key else a


def _orbax():
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError("Checkpoints need orbax: pip install orbax-checkpoint") from error
    return orbax.checkpoint
