"""Compiled steps of training and evaluation, for one device or many, from one loss function.

Devices share the work in one of three ways, the `mode` of a step:

- "jit": by the shardings of the state (`place`) and of the batch (`shard_batch`), over Auto or
  Explicit axes. Statistics are global by themselves.
- "shard_map": the samples are divided over an axis of a mesh, which norms must name, by
  `axis_name`. They send one message forward and one backward, where "jit" may need two forward.
- "pmap": the same over all local devices, with the state of `replicate`.

Parameters that share an axis with the samples (FSDP) are gathered for the step, and their gradients
are divided again. The optimizer sees whole arrays.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen, nnx
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

from normjax.core import checks
from normjax.core.compat import is_traced
from normjax.core.structs import several
from normjax.training.models import Device, opener, unsown
from normjax.training.placement import Rules, count_samples, placement, require_divisible

Model = linen.Module | nnx.Module
Mode = Literal["jit", "shard_map", "pmap"]
IS_MODE = checks.one_of("jit", "shard_map", "pmap")


class TrainState(NamedTuple):
    """All that a training run is made of; `create_train_state` makes it.

    Example:
      >>> import jax, flax.linen as nn, optax, normjax.training as training
      >>> x, key = jax.numpy.ones((2, 3)), jax.random.key(0)
      >>> state = training.create_train_state(nn.Dense(4), optax.sgd(0.1), key, x)
      >>> state.step.item(), state.params["kernel"].shape
      (0, (3, 4))
    """

    step: jax.Array  # i32[], steps done
    params: Any  # what the optimizer moves
    statistics: Any  # Linen: the other collections by name; NNX: all other state
    opt_state: Any
    key: jax.Array | None = None  # the source of all random numbers in Linen; NNX has its own
    ema: Any = None  # exponential moving average of the parameters, in at least float32


class Loss(NamedTuple):
    """What a loss function returns: a loss for each sample, or position, and how much it counts.

    Attributes:
      values: [...], of the batch that the function got.
      weights: of the same shape, such as a mask, and constant: no gradient flows through them.
        None: all count alike. Values of weight zero may be anything, NaN included; their gradients
        must be finite, which that of `log(0)` is not.
      metrics: further values of this shape by name, averaged like the loss.
      penalty: a scalar that is added to the mean, such as a regularizer.

    Example:
      >>> import jax.numpy as jnp, normjax.training as training
      >>> losses = jnp.array([1.0, 3.0, jnp.nan])
      >>> loss = training.Loss(losses, jnp.array([True, True, False]), {"hit": losses < 2})
      >>> training.measure(loss).means()
      {'loss': Array(2., dtype=float32), 'hit': Array(0.5, dtype=float32)}
    """

    values: jax.Array
    weights: jax.Array | None = None
    metrics: Mapping[str, jax.Array] = {}
    penalty: jax.Array | float = 0.0


class Metrics(NamedTuple):
    """Weighted sums of the loss and the metrics of a batch, and the sum of the weights.

    Those of several batches add up exactly: `jax.tree.map(jnp.add, first, second)`.

    Example:
      >>> import jax, jax.numpy as jnp, normjax.training as training
      >>> ragged = [training.measure(training.Loss(jnp.array(v))) for v in ([1.0, 2.0], [6.0])]
      >>> jax.tree.map(jnp.add, *ragged).means()
      {'loss': Array(3., dtype=float32)}
    """

    sums: dict[str, jax.Array]  # f32[]
    weight: jax.Array  # f32[]

    def means(self) -> dict[str, jax.Array]:
        """The weighted means; zero where nothing counts."""
        return {name: _ratio(value, self.weight) for name, value in self.sums.items()}


def measure(loss: Loss) -> Metrics:
    """The sums of a loss function's result, in at least float32.

    TypeError for what is no `Loss`. ValueError where shapes differ, the penalty is no scalar, or a
    metric is named "loss".

    Example:
      >>> import jax.numpy as jnp, normjax.training as training
      >>> training.measure(training.Loss(jnp.array([1.0, 3.0]))).weight.item()
      2.0
    """
    if not isinstance(loss, Loss):
        kind = "an array" if isinstance(loss, jax.Array) else type(loss).__name__
        raise TypeError(
            f"Loss: the loss function returned {kind}. Return a Loss, with a value for each "
            "sample instead of their mean."
        )
    if jnp.shape(loss.penalty) != ():
        raise ValueError(
            f"Loss: the penalty has the shape {jnp.shape(loss.penalty)}, and is a scalar: sum it."
        )
    values = jnp.asarray(loss.values)
    weights = jnp.ones(values.shape, bool) if loss.weights is None else jnp.asarray(loss.weights)
    weights = lax.stop_gradient(weights)
    every = {"loss": values, **loss.metrics}
    for name, array in {"weights": weights, **every}.items():
        if jnp.shape(array) != values.shape:
            raise ValueError(
                f"Loss: {name} has the shape {jnp.shape(array)}, and the values {values.shape}. "
                "Each of them needs a value for each loss."
            )
    if "loss" in loss.metrics:
        raise ValueError("Loss: a metric is named 'loss', which is the name of the loss itself.")
    wide = lambda a: jnp.asarray(a, jnp.promote_types(jnp.result_type(a), jnp.float32))
    counted = lambda a: jnp.sum(jnp.where(weights != 0, wide(a) * wide(weights), 0))
    return Metrics({name: counted(a) for name, a in every.items()}, jnp.sum(wide(weights)))


def _ratio(sums, weight):
    return jnp.where(weight > 0, sums / jnp.where(weight > 0, weight, 1), 0)


def create_train_state(
    model: Model,
    optimizer: optax.GradientTransformation,
    key: jax.Array | None = None,
    *args: Any,
    ema: bool = False,
    mesh: Mesh | None = None,
    fsdp: str | None = None,
    rules: Rules | None = None,
    **kwargs: Any,
) -> TrainState:
    """The state at the start of training.

    Args:
      model: a Linen module, which is initialized, or an NNX module, whose arrays are copied.
        `nnx.update(model, state.params, state.statistics)` brings them back.
      optimizer: of optax.
      key: the source of initial values and of random numbers in training; for Linen.
      *args: of the model's call, for Linen, with `kwargs`.
      ema: whether to average the parameters too.
      mesh: where the state is made, by `placement` with `fsdp` and `rules`: no device ever holds
        more than its share. None: on the default device.

    Example:
      >>> import optax, normjax.training as training
      >>> from flax import nnx
      >>> state = training.create_train_state(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), optax.sgd(0.1))
      >>> state.params["kernel"][...].shape, state.ema
      ((3, 4), None)
    """

    def make(params, statistics):
        wide = lambda a: jnp.array(a, jnp.promote_types(a.dtype, jnp.float32))
        average = jax.tree.map(wide, params) if ema else None
        opt_state = optimizer.init(params)
        ours = None if key is None else jax.random.fold_in(key, 1)
        return TrainState(jnp.int32(0), params, statistics, opt_state, ours, average)

    def start():
        if not isinstance(model, linen.Module):
            return make(*jax.tree.map(jnp.copy, own))
        assert key is not None
        rngs = {"params": jax.random.fold_in(key, 0)}
        variables = dict(linen.unbox(model.init(rngs, *args, **kwargs)))
        return make(variables.pop("params", {}), variables)

    if not isinstance(model, linen.Module):
        _, *own = nnx.split(unsown(model), nnx.Param, ...)
    elif key is None:
        raise ValueError("create_train_state: a Linen module needs a key, and arguments of a call.")
    if mesh is None:
        return jax.jit(start)()
    where = placement(jax.eval_shape(start), mesh, fsdp=fsdp, rules=rules)
    return jax.jit(start, out_shardings=where)()


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    loss: Callable[[Callable[..., Any], Any, bool], Loss],
    *,
    mode: Mode = "jit",
    mesh: Mesh | None = None,
    axis: str | tuple[str, ...] = "data",
    ema_decay: float | None = None,
    streams: tuple[str, ...] = ("dropout",),
    gradient: Callable[..., Any] | None = None,
) -> "Step":
    """A compiled training step, `step(state, batch) -> (state, Metrics)`.

    The gradient is that of the weighted mean of the losses of the global batch, whatever the
    devices and however many samples of each count. Statistics move once. The old state is donated:
    its arrays are gone after the step. Shapes and shardings of the state stay, so that all steps
    with batches of one shape run one program.

    Args:
      model: a Linen or NNX module.
      optimizer: of optax.
      loss: `loss(model, batch, train)` returns a `Loss`. Its `model` is called as the module is, as
        often as needed: Linen's holds its variables and random streams, NNX's is in training mode
        (`model.train()`). `train` is True here, and False in `make_eval_step`. What is
        sown, such as a loss of a layer, Linen's returns by `y, sown = model(x, mutable="losses")`
        (not under `accumulate`), and NNX's gives by `nnx.pop(model, nnx.Intermediate)`.
      mode: how several devices share the work, see `normjax.training.steps`.
      mesh: for "shard_map".
      axis: name of the axis of samples in "shard_map" and "pmap"; in "shard_map" also several.
      ema_decay: the average of the parameters keeps this share of itself; needs a state with `ema`.
      streams: Linen's random streams besides "ghost". In "shard_map" and "pmap" each device draws
        numbers of its own from them, as from NNX's; "ghost" is the same on all of them.
      gradient: what takes the gradient, such as `accumulate(model, loss, parts=4)`, which takes
        it in parts of the batch; None: of the batch as a whole.

    ValueError for state and batch on different devices, for samples that the devices do not
    divide, and for statistics that differ between devices.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, optax, normjax.linen
      >>> import normjax.training as training
      >>> model, optimizer = nn.Sequential([nn.Dense(8), normjax.linen.LayerNorm()]), optax.sgd(0.1)
      >>> x = jnp.ones((4, 3))
      >>> def loss(model, batch, train):
      ...     return training.Loss(jnp.square(model(batch) - 1.0).mean(-1))
      >>> state = training.create_train_state(model, optimizer, jax.random.key(0), x)
      >>> step = training.make_train_step(model, optimizer, loss)
      >>> state, metrics = step(state, x)
      >>> state.step.item(), float(metrics.means()["loss"]) > 0
      (1, True)
    """
    opened = opener("make_train_step", model, streams)
    if ema_decay is not None:
        checks.require("make_train_step", "ema_decay", ema_decay, checks.interval(0, 1))
    body = functools.partial(_reduced, gradient or functools.partial(_gradient, opened, loss))
    update = functools.partial(_update, optimizer, ema_decay)
    return Step("make_train_step", body, mode, mesh, axis, update)


def _reduced(gradient, state, batch, device):
    """The gradient as it lies in the state, the sums of all devices, and the statistics."""
    whole = state._replace(params=device.gather(state.params))
    gradients, (found, statistics) = gradient(whole, batch, device)
    gradients, found = device.reduce(gradients, found)
    device.check(statistics)
    return gradients, found, statistics


def _gradient(opened, loss, state, batch, device):
    """The device's part of the gradient, its sums, and the statistics."""
    key = None if state.key is None else jax.random.fold_in(state.key, state.step)

    def objective(params):
        call, finish = opened(params, state.statistics, key, True, device)
        result = loss(call, batch, True)
        found = measure(result)
        weight = device.sum(found.weight)
        value = _ratio(found.sums["loss"], weight) + result.penalty / device.number
        return value, (found, finish())

    return jax.grad(objective, has_aux=True)(device.own(state.params))


def _update(optimizer, ema_decay, state, gradients, found, statistics):
    """The state after the optimizer's step."""
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema_decay is not None:
        if ema is None:
            raise ValueError(
                f"make_train_step: ema_decay={ema_decay!r}, but the state has no average. "
                "create_train_state(..., ema=True) makes one."
            )
        ema = optax.incremental_update(optax.tree.cast_like(params, ema), ema, 1 - ema_decay)
    return TrainState(state.step + 1, params, statistics, opt_state, state.key, ema), found


def make_eval_step(
    model: Model,
    loss: Callable[[Callable[..., Any], Any, bool], Loss],
    *,
    ema: bool = False,
    mode: Mode = "jit",
    mesh: Mesh | None = None,
    axis: str | tuple[str, ...] = "data",
) -> "Step":
    """A compiled evaluation step, `step(state, batch) -> Metrics`: as `make_train_step`.

    Nothing moves, there are no random numbers, and NNX models are in evaluation mode.

    Args:
      ema: evaluate the averaged parameters. Running statistics belong to the others:
        `normjax.population.recalibrate` makes those of the average.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, optax, normjax.training as training
      >>> model, x = nn.Dense(2), jnp.ones((4, 3))
      >>> def loss(model, batch, train):
      ...     return training.Loss(jnp.square(model(batch["x"])).mean(-1), batch["mask"])
      >>> state = training.create_train_state(model, optax.sgd(0.1), jax.random.key(0), x)
      >>> evaluate = training.make_eval_step(model, loss)
      >>> evaluate(state, training.pad_batch({"x": x}, 8)).weight.item()
      4.0
    """
    opened = opener("make_eval_step", model, ())

    def body(state, batch, device):
        if ema and state.ema is None:
            raise ValueError("make_eval_step: ema=True, but the state has no average.")
        params = device.gather(state.params)
        if ema:
            params = optax.tree.cast_like(device.gather(state.ema, "ema"), state.params)
        call, _ = opened(params, state.statistics, None, False, device)
        return device.sum(measure(loss(call, batch, False)))

    return Step("make_eval_step", body, mode, mesh, axis)


def replicate(state: Any, axis: str = "data") -> Any:
    """A copy of a state for each local device on a new first axis, for the mode "pmap" over `axis`.

    `jax.tree.map(lambda a: a[0], state)` undoes it.

    Example:
      >>> import jax, normjax.training as training
      >>> training.replicate(jax.numpy.ones(3)).shape == (jax.local_device_count(), 3)
      True
    """
    number = jax.local_device_count()
    stacked = jax.tree.map(lambda a: jnp.broadcast_to(a, (number, *a.shape)), state)
    return jax.pmap(lambda state: state, axis_name=axis)(stacked)


def _explicit_mesh(state):
    """The Explicit mesh of the state as the current one: some operations of JAX ask for it."""
    for a in jax.tree.leaves(state):
        mesh = getattr(getattr(a, "sharding", None), "mesh", None)
        if isinstance(mesh, Mesh) and AxisType.Explicit in mesh.axis_types:
            return jax.set_mesh(mesh)
    return contextlib.nullcontext()


def _named(names, sharding):
    """The spec of a sharding as far as it is over `names`."""
    inside = lambda part: part if part is not None and set(several(part)) <= set(names) else None
    return PartitionSpec(*map(inside, getattr(sharding, "spec", ())))


class Step:
    """A step that compiles when it is first called with states and batches of new kinds.

    Example:
      >>> import jax.numpy as jnp, flax.linen as nn, normjax.training as training
      >>> loss = lambda model, batch, train: training.Loss(model(batch))
      >>> isinstance(training.make_eval_step(nn.Dense(2), loss), training.Step)
      True
    """

    def __init__(self, name, body, mode, mesh, axis, update=None):
        checks.require(name, "mode", mode, IS_MODE)
        if (mode == "shard_map") != (mesh is not None):
            hint = "shard_map needs a mesh, and no other mode takes one."
            raise ValueError(f"{name}: mode={mode!r} with mesh={mesh!r}: {hint}")
        if mode == "pmap" and not isinstance(axis, str):
            raise ValueError(f"{name}: axis={axis!r}, but the mode 'pmap' has one axis: name one.")
        if mesh is not None and not set(several(axis)) <= set(mesh.axis_names):
            names = ", ".join(mesh.axis_names)
            raise ValueError(f"{name}: axis={axis!r}, but the axes of the mesh are {names}.")
        self._name, self._body, self._update, self._axis = name, body, update, axis
        self._mode, self._mesh = mode, mesh
        self._compiled = functools.lru_cache(self._compile)

    def __call__(self, state: TrainState, batch: Any) -> Any:
        """The new state and the metrics, or the metrics alone.

        Works inside of `jax.jit` and `lax.scan` too, but not with parameters that share an Explicit
        axis with the samples: JAX asks where they lie, and in there a step does not know it.
        """
        if self._mode == "pmap":
            batch = self._divided(state, batch)
        with _explicit_mesh(state):
            return self._program(state, batch)(state, batch)

    def lower(self, state: TrainState, batch: Any) -> Any:
        """The program for these, arrays or `jax.ShapeDtypeStruct`s, lowered but not compiled."""
        with _explicit_mesh(state):
            return self._program(state, batch).lower(state, batch)

    def _program(self, state, batch):
        leaves, structure = jax.tree.flatten(state)
        self._check_samples(batch)
        placed = not any(is_traced(a) or getattr(a, "sharding", None) is None for a in leaves)
        if self._mode == "pmap" or not placed:
            return self._compiled(structure, None, frozenset())
        shardings = tuple(a.sharding for a in leaves)
        if self._mesh is not None:
            self._check_devices(shardings, set(self._mesh.devices.flat))
        used = {axis for a in jax.tree.leaves(batch) for axis in self._axes_of(a, shardings)}
        return self._compiled(structure, shardings, frozenset(used))

    def _axes_of(self, a, shardings):
        """The mesh axes that share the samples of an array of the batch."""
        mine = getattr(a, "sharding", None)
        if mine is None or not getattr(a, "committed", True):
            return ()
        self._check_devices(shardings, mine.device_set)
        spec = getattr(mine, "spec", PartitionSpec())
        return () if not spec or spec[0] is None else several(spec[0])

    def _check_devices(self, shardings, devices):
        if any(each.device_set != devices for each in shardings):
            raise ValueError(
                f"{self._name}: state and batch, or mesh, are of different devices. Put the state "
                "on the mesh by place(state, mesh), and batches by shard_batch(batch, mesh)."
            )

    def _compile(self, structure, shardings, batch_axes):
        donated = () if self._update is None else (0,)
        where = None if shardings is None else structure.unflatten(shardings)
        if self._mode == "pmap":
            run = self._run(functools.partial(self._body, device=Device(several(self._axis))))
            return jax.pmap(run, axis_name=self._axis, donate_argnums=donated)
        if self._mode == "shard_map":
            run = self._run(self._mapped(structure, where))
        else:
            device = Device(where=where, batch_axes=batch_axes)
            run = self._run(functools.partial(self._body, device=device))
        # One device needs none, which would bind the state to it, and compile the next step anew.
        spread = any(len(each.device_set) > 1 for each in shardings or ())
        out = (where, None) if spread and self._update is not None else None
        return jax.jit(run, donate_argnums=donated, out_shardings=out)

    def _run(self, body):
        """`body`, and the update with what it returns: it sees whole arrays, not a device's own."""
        update = self._update
        if update is None:
            return body
        return lambda state, batch: update(state, *body(state, batch))

    def _mapped(self, structure, where):
        """The body mapped over the devices that share the samples."""
        named, mesh = several(self._axis), self._mesh
        assert mesh is not None
        whole = structure.unflatten([PartitionSpec()] * structure.num_leaves)
        specs = whole if where is None else jax.tree.map(functools.partial(_named, named), where)
        device = Device(named, typed=True, where=where, batch_axes=frozenset(named))
        out = PartitionSpec()
        out = out if self._update is None else (specs.params, out, whole.statistics)
        mapped = jax.shard_map(
            functools.partial(self._body, device=device),
            mesh=mesh,
            in_specs=(specs, PartitionSpec(self._axis)),
            out_specs=out,
            axis_names=set(named),
        )
        kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
        if AxisType.Explicit not in {kinds[name] for name in named}:
            return mapped
        divided = jax.NamedSharding(mesh, PartitionSpec(self._axis))
        return lambda state, batch: mapped(state, jax.sharding.reshard(batch, divided))

    def _check_samples(self, batch):
        if self._mesh is None:
            return
        devices = math.prod(self._mesh.shape[name] for name in several(self._axis))
        for a in jax.tree.leaves(batch):
            require_divisible(self._name, count_samples(self._name, a), devices)

    def _divided(self, state, batch):
        """A batch with an axis of devices in front."""
        devices = jax.local_device_count()
        if state.step.shape != (devices,):
            raise ValueError(f"{self._name}: the mode 'pmap' needs the state of replicate(state).")

        def divide(a):
            require_divisible(self._name, count_samples(self._name, a), devices)
            return jnp.reshape(a, (devices, -1, *jnp.shape(a)[1:]))

        return jax.tree.map(divide, batch)
