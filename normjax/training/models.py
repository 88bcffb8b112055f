"""Flax models as a step calls them, and what a step does as one of several devices."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import linen, nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from normjax.core.compat import varying
from normjax.core.structs import several
from normjax.paths import flatten, require_fixed

SHARED = "ghost"  # the stream of random methods, which draw for the global batch


class Device:
    """One of several devices in a step.

    Attributes:
      axes: names that samples are mapped over; none under `jit`.
      typed: whether types say over which of them an array varies, as in `shard_map`.
      where: the shardings of the state, if they are known.
      batch_axes: the mesh axes that share the samples.
    """

    def __init__(self, axes=(), *, typed=False, where=None, batch_axes=frozenset()):
        self.axes, self.typed, self.where = axes, typed, where
        self.batch_axes = frozenset(batch_axes)

    @property
    def number(self) -> int:
        """How many devices share the samples by name."""
        return lax.axis_size(self.axes) if self.axes else 1

    def sum(self, tree: Any) -> Any:
        """The sums over all devices, in one message."""
        return lax.psum(tree, self.axes) if self.axes else tree

    def own(self, params: Any) -> Any:
        """Parameters as a device's own, so that their gradients are not summed over devices yet."""
        if not self.typed:
            return params

        def own(a):
            missing = tuple(set(self.axes) - varying(a))
            return lax.pcast(a, missing, to="varying") if missing else a

        return jax.tree.map(own, params)

    def fold(self, key: jax.Array) -> jax.Array:
        """A key of this device's own."""
        return jax.random.fold_in(key, lax.axis_index(self.axes)) if self.axes else key

    def gather(self, params: Any, name: str = "params") -> Any:
        """Parameters with what shares an axis with the samples made whole on each device."""

        def gather(a, spec, mesh):
            if not self.axes:
                return _put(a, mesh, [None if self._shares(part) else part for part in spec])
            for i, part in enumerate(spec):
                if self._shares(part):
                    a = lax.all_gather(a, part, axis=i, tiled=True)
            return a

        return self._map_shared(gather, params, name)

    def reduce(self, gradients: Any, found: Any) -> tuple[Any, Any]:
        """Sums over all devices: of gradients of gathered parameters as these lie in the state."""
        if not self.axes:
            return self._map_shared(lambda a, spec, mesh: _put(a, mesh, spec), gradients), found
        scattered = []

        def scatter(a, spec, mesh):
            for i, part in enumerate(spec):
                if self._shares(part):
                    a = lax.psum_scatter(a, part, scatter_dimension=i, tiled=True)
            used = {axis for part in spec if self._shares(part) for axis in several(part)}
            rest = tuple(axis for axis in self.axes if axis not in used)
            scattered.append(lax.psum(a, rest) if rest else a)
            return None

        rest = self._map_shared(scatter, gradients)
        rest, found = self.sum((rest, found))
        own = iter(scattered)
        missing = lambda a: next(own) if a is None else a
        return jax.tree.map(missing, rest, is_leaf=lambda a: a is None), found

    def _shares(self, part):
        if part is None:
            return False
        if self.axes:  # others are whole in here, see `steps._named`
            return self.batch_axes.issuperset(several(part))
        return not self.batch_axes.isdisjoint(several(part))

    def _map_shared(self, function, tree, name="params"):
        """`function` of each leaf that shares an axis with the samples, its spec and its mesh."""
        if self.where is None:
            return tree

        def one(a, sharding):
            spec = getattr(sharding, "spec", ())
            return function(a, spec, sharding.mesh) if any(map(self._shares, spec)) else a

        return jax.tree.map(one, tree, getattr(self.where, name))

    def check(self, statistics: Any) -> None:
        """ValueError for statistics that are a device's own."""
        paths, leaves, _ = flatten(statistics)
        own = [path for path, leaf in zip(paths, leaves, strict=True) if varying(leaf)]
        if self.typed and own:
            raise ValueError(
                f"make_train_step: {'/'.join(own[0])} differs between the devices of "
                f"{self.axes}. Give its norm axis_name={self.axes[0]!r}."
            )


def _put(a, mesh, parts):
    """An array under `jit` as `parts` say."""
    put = jax.sharding.reshard if AxisType.Explicit in mesh.axis_types else None
    return (put or lax.with_sharding_constraint)(a, NamedSharding(mesh, PartitionSpec(*parts)))


Opened = tuple[Callable[..., Any], Callable[[], Any]]


def unsown(model: Any) -> Any:
    """A model of NNX, with the arrays of `model`, without what calls have sown in it."""
    copy = nnx.merge(*nnx.split(model))
    nnx.pop(copy, nnx.Intermediate)
    return copy


def opener(name: str, model: Any, streams: tuple[str, ...]) -> Callable[..., Opened]:
    """A function that makes of variables a model to call, and what gives its statistics then."""
    if isinstance(streams, str):
        raise TypeError(f"{name}: streams={streams!r} is one name; give a tuple, ({streams!r},).")
    if isinstance(model, linen.Module):
        return functools.partial(_open_linen, model, streams)
    if isinstance(model, nnx.Module):
        return functools.partial(_open_nnx, nnx.split(unsown(model), nnx.Param, ...)[0])
    raise TypeError(f"{name}: {model!r} is not a module of flax.linen or flax.nnx.")


def stream_keys(key: jax.Array, streams: tuple[str, ...], device: Device) -> dict[str, jax.Array]:
    """Keys of Linen's streams: of the device's own, but that for the global batch."""
    keys = jax.random.split(key, 1 + len(streams))
    named = zip((SHARED, *streams), keys, strict=True)
    return {name: one if name == SHARED else device.fold(one) for name, one in named}


def _open_linen(model, streams, params, statistics, key, train, device):
    calls, now = 0, statistics

    def call(*args, mutable=None, **kwargs):
        nonlocal calls, now
        names = () if mutable is None else several(mutable)
        if known := set(names) & now.keys():
            raise ValueError(
                f"the model of a loss function: mutable={mutable!r}, but the state has {known}: "
                "take what is sown out of its statistics, from which it would be carried on."
            )
        rngs = {}
        if train and key is not None:
            rngs = stream_keys(jax.random.fold_in(key, calls), streams, device)
        calls += 1
        how = dict(rngs=rngs, mutable=[*names, *(now if train else ())])
        y, new = model.apply({"params": params, **now}, *args, **how, **kwargs)
        sown = {name: new.pop(name) for name in names if name in new}
        if train:
            require_fixed(now, new)
            now = {**now, **new}
        return y if mutable is None else (y, sown)

    return call, lambda: now


def _open_nnx(structure, params, statistics, key, train, device):
    del key
    model = nnx.merge(structure, params, statistics, copy=True)  # of this trace
    model.train() if train else model.eval()
    restore = own_streams(model, device)

    def finish():
        restore()
        nnx.pop(model, nnx.Intermediate)
        return nnx.split(model, nnx.Param, ...)[2]

    return model, finish


def own_streams(model: nnx.Module, device: Device) -> Callable[[], None]:
    """Gives the streams of a model keys of the device's own, and returns what takes them back."""
    streams = [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.RngStream)]
    own = [stream for stream in streams if stream.tag != SHARED] if device.axes else []
    keys = [stream.key[...] for stream in own]
    for stream, key in zip(own, keys, strict=True):
        stream.key[...] = device.fold(key)

    def restore():
        for stream, key in zip(own, keys, strict=True):
            stream.key[...] = key

    return restore
