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
    about = {"norms": dict(configuration), "leaves": _kinds(state)}
    items = args.Composite(state=args.StandardSave(state), normjax=args.JsonSave(about))
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
    about = manager.restore(step, args=args.Composite(normjax=args.JsonRestore()))["normjax"]
    check_configuration(about["norms"], configuration)
    _check(about["leaves"], _kinds(like))
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=getattr(a, "sharding", None)),
        like,
    )
    only = args.Composite(state=args.StandardRestore(shapes))
    return manager.restore(step, args=only)["state"]


def _check(found, wanted):
    """ValueError where the leaves of a checkpoint are not those that are wanted."""
    lines = [f"lacks {path}" for path in wanted.keys() - found.keys()]
    lines += [f"has {path} besides" for path in found.keys() - wanted.keys()]
    lines += [
        f"has {path} as {found[path]}, not {wanted[path]}"
        for path in wanted.keys() & found.keys()
        if found[path] != wanted[path]
    ]
    if lines:
        lines = ";\n  it ".join(sorted(lines))
        raise ValueError(f"restore: the checkpoint is of another model or optimizer. It {lines}.")


def _kinds(state):
    """Dtypes and shapes of leaves by path."""
    paths, leaves, _ = flatten(state)
    pairs = zip(paths, leaves, strict=True)
    return {"/".join(path): f"{a.dtype}{list(a.shape)}" for path, a in pairs}


def _orbax():
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError("Checkpoints need orbax: pip install orbax-checkpoint") from error
    return orbax.checkpoint
