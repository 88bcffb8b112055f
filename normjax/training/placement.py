"""Where the arrays of a training run lie on a mesh: the state, and batches."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from normjax.core.structs import several
from normjax.optim import label_parameters
from normjax.paths import flatten, is_masked, matches

Rules = Mapping[str, PartitionSpec]
SPLIT = ("kernel", "embedding")
FACTORED = frozenset({"v_row", "v_col"})  # of optax's adafactor, which multiplies them


def placement(tree: Any, mesh: Mesh, *, fsdp: str | None = None, rules: Rules | None = None) -> Any:
    """The sharding of each leaf of a training state, of variables or of parameters, on a mesh.

    Leaves are replicated, but for two kinds:

    - Those that `rules` name are sharded as these say, such as
      `{"mlp_1/kernel": P(None, "model"), "norm_1": P("model")}` where channels are shared by the
      devices of an axis. A norm is placed like the activation that it normalizes: its parameters
      and statistics get the axis of the channels. Patterns are those of `normjax.optim`, but may
      begin behind any slash: one names a parameter, its average and its optimizer's state. The last
      match wins.
    - With `fsdp`, an axis of the mesh, leaves named "kernel" and "embedding" are split over it too:
      along their largest axis that it divides and no rule has taken. Norms are never split by it.
      Their few bytes would cost a message each, in the middle of a layer. Nor are the factored
      moments of `optax.adafactor`.

    Args:
      tree: arrays, or `jax.ShapeDtypeStruct`s.
      mesh: with Auto or Explicit axes.
      fsdp: the axis of the mesh that divides what is large.
      rules: specs by pattern.

    Returns a tree of `jax.sharding.NamedSharding` with the structure of `tree`. ValueError for an
    axis that the mesh lacks, a pattern that matches nothing, and a spec that does not fit an array.

    Example:
      >>> import jax, normjax.training as training
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> scale = jax.numpy.ones(8)
      >>> tree = {"dense": {"kernel": jax.numpy.ones((16, 8))}, "norm": {"scale": scale}}
      >>> shardings = training.placement(tree, mesh, fsdp="data")
      >>> shardings["dense"]["kernel"].spec, shardings["norm"]["scale"].spec
      (P('data', None), P())
    """
    for axis in (fsdp, *(axis for spec in (rules or {}).values() for axis in _axes(spec))):
        if axis is not None and axis not in mesh.axis_names:
            names = ", ".join(mesh.axis_names)
            raise ValueError(f"placement: the mesh has the axes {names}, and no {axis!r}.")
    paths, leaves, structure = flatten(tree)
    specs = [PartitionSpec()] * len(leaves)
    for pattern, spec in (rules or {}).items():
        for i in matches("placement", paths, [pattern], within=True):
            specs[i] = spec
    for path, leaf, spec in zip(paths, leaves, specs, strict=True):
        if not is_masked(leaf):
            _check(path, leaf, mesh, spec)
    if fsdp is not None:
        labels = flatten(label_parameters(tree))[1]
        for i, label in enumerate(labels):
            if label in SPLIT and FACTORED.isdisjoint(paths[i]):
                specs[i] = _split(leaves[i].shape, mesh, fsdp, specs[i])
    return structure.unflatten(NamedSharding(mesh, spec) for spec in specs)


def _axes(spec):
    return [axis for part in spec if part is not None for axis in several(part)]


def _check(path, leaf, mesh, spec):
    where = f"placement: {'/'.join(path)} of shape {leaf.shape} cannot lie as {spec}"
    if len(spec) > leaf.ndim:
        raise ValueError(f"{where}: it has {leaf.ndim} axes. Give it a rule of its own.")
    for size, part in zip(leaf.shape, spec, strict=False):
        devices = int(np.prod([mesh.shape[a] for a in several(part)])) if part is not None else 1
        if size % devices:
            raise ValueError(f"{where}: {devices} devices do not divide {size}.")


def _split(shape, mesh, axis, spec):
    parts = [*spec, *[None] * (len(shape) - len(spec))]
    free = [i for i, n in enumerate(shape) if parts[i] is None and n % mesh.shape[axis] == 0]
    if axis in _axes(spec) or not free:
        return spec
    parts[max(free, key=lambda i: shape[i])] = axis
    return PartitionSpec(*parts)


def place(tree: Any, mesh: Mesh, *, fsdp: str | None = None, rules: Rules | None = None) -> Any:
    """`tree` on a mesh, where `placement` says: also of state that was made or read before.

    It is a copy: steps may donate it, and `tree` stays. With several processes each of them gives
    the whole arrays, the same ones.

    Example:
      >>> import jax, normjax as nj, normjax.training as training
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> params, state = training.place(nj.BatchNorm().init(None, 3), mesh)
      >>> state.mean.sharding.is_fully_replicated
      True
    """
    where = placement(tree, mesh, fsdp=fsdp, rules=rules)
    own = lambda a: jnp.copy(a) if isinstance(a, jax.Array) else a
    return jax.device_put(jax.tree.map(own, tree), where)


def count_samples(name: str, a: Any) -> int:
    """The number of samples of an array of a batch; ValueError for a scalar, which has none."""
    if not np.shape(a):
        raise ValueError(
            f"{name}: the batch has a scalar, {a!r}, and all its arrays need the samples on axis 0."
        )
    return np.shape(a)[0]


def require_divisible(name: str, samples: int, devices: int) -> None:
    """ValueError, which begins with `name`, for samples that devices cannot share equally."""
    if samples % devices:
        raise ValueError(
            f"{name}: {devices} devices do not divide {samples} samples. pad_batch adds samples "
            "that a mask leaves out."
        )


def pad_batch(batch: Mapping[str, Any], size: int) -> dict[str, Any]:
    """`batch` with samples of zeros behind its own up to `size`, and a `mask` that leaves them out.

    So a ragged last batch takes the compiled step of all others. A "mask" that `batch` has is
    continued with False. ValueError for more than `size` samples, or arrays of different lengths.

    Args:
      batch: NumPy arrays by name, the samples on axis 0.
      size: number of samples after padding.

    Example:
      >>> import numpy as np, normjax.training as training
      >>> batch = training.pad_batch({"image": np.ones((3, 2))}, 4)
      >>> batch["image"].shape, batch["mask"].tolist()
      ((4, 2), [True, True, True, False])
    """
    lengths = {name: count_samples("pad_batch", a) for name, a in batch.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"pad_batch: the numbers of samples differ, {lengths}.")
    length = next(iter(lengths.values()))
    if length > size:
        raise ValueError(f"pad_batch: size={size} is less than the {length} samples of the batch.")
    batch = {"mask": np.ones(length, bool), **batch}
    longer = lambda a: np.pad(a, ((0, size - length), *((0, 0),) * (np.ndim(a) - 1)))
    return {name: longer(np.asarray(a)) for name, a in batch.items()}


def shard_batch(batch: Any, mesh: Mesh, axis: str | tuple[str, ...] = "data") -> Any:
    """A batch on a mesh, its samples shared by the devices of `axis`.

    With several processes each gives its own samples, as many as the others; the result is the
    global batch. ValueError for an axis that the mesh lacks and for samples that the devices do not
    divide: see `pad_batch`.

    Args:
      batch: a tree of arrays, the samples on axis 0.
      mesh: with Auto or Explicit axes.
      axis: one or several axes of the mesh.

    Example:
      >>> import jax, normjax.training as training
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> x = training.shard_batch(jax.numpy.ones((16, 3)), mesh)
      >>> x.sharding.is_equivalent_to(jax.NamedSharding(mesh, jax.P("data")), x.ndim)
      True
    """
    for name in several(axis):
        if name not in mesh.axis_names:
            names = ", ".join(mesh.axis_names)
            raise ValueError(f"shard_batch: the mesh has the axes {names}, and no {name!r}.")
    sharding = NamedSharding(mesh, PartitionSpec(axis))
    devices = int(np.prod([mesh.shape[name] for name in several(axis)]))

    def put(a):
        samples = count_samples("shard_batch", a) * jax.process_count()
        require_divisible("shard_batch", samples, devices)
        if jax.process_count() == 1:
            return jax.device_put(a, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(a))

    return jax.tree.map(put, batch)
