"""Training steps: one device and many, both front ends, ragged batches, placement, errors."""

import functools
import pathlib
import socket
import subprocess
import sys

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import normjax as nj
from normjax import linen as norms
from normjax import nnx as nnx_norms
from normjax import training
from normjax.core.method import feature_sizes, traits
from normjax.testing.subject import with_axis_name

SAMPLES, CLASSES = 16, 4
OPTIMIZER = optax.sgd(0.05, momentum=0.9)
WAYS = {
    "jit, Auto": ("jit", AxisType.Auto),
    "jit, Explicit": ("jit", AxisType.Explicit),
    "shard_map": ("shard_map", AxisType.Auto),
    "pmap": ("pmap", None),
}


class Net(nn.Module):
    """A residual block between a stem and a head; `whole` are inputs of norms for all samples."""

    method: object
    whole: object = ()

    @nn.compact
    def __call__(self, x, *, train, mask, **inputs):
        def norm(x):
            how = {"use_running_average": not train} if traits(self.method).trains else {}
            how |= {**inputs, **dict(self.whole)}
            return norms.Norm(self.method)(x, mask=mask[:, None, None, None], **how)

        x = nn.relu(norm(nn.Conv(24, (3, 3), use_bias=False)(x)))
        y = nn.relu(norm(nn.Conv(24, (3, 3), (2, 2), use_bias=False)(x)))
        y = norm(nn.Conv(24, (3, 3), use_bias=False)(y))
        x = nn.relu(nn.Conv(24, (1, 1), (2, 2), use_bias=False)(x) + y)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class NnxNet(nnx.Module):
    """A convolution with a norm, and dropout."""

    def __init__(self, rngs, axis_name=None, rate=0.0):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx_norms.BatchNorm(4, axis_name=axis_name, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.head = nnx.Linear(4, CLASSES, rngs=rngs)

    def __call__(self, x, *, mask):
        x = nnx.relu(self.norm(self.conv(x), mask=mask[:, None, None, None]))
        return self.head(self.dropout(x).mean((1, 2)))


def loss(model, batch, _, **how):
    logits = model(batch["image"], mask=batch["mask"], **how)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return training.Loss(losses, batch["mask"], {"hit": logits.argmax(-1) == batch["label"]})


def linen_loss(model, batch, train):
    return loss(model, batch, None, train=train, **batch.get("inputs", {}))


def batches(number, inputs=lambda: {}):
    """Batches of numbers, the last one ragged."""
    rng = np.random.default_rng(0)
    for i in range(number):
        n = SAMPLES if i < number - 1 else SAMPLES - 5
        image = rng.normal(1, 2, size=(n, 6, 6, 3)).astype(np.float32)
        batch = {"image": image, "label": rng.integers(0, CLASSES, n)}
        yield training.pad_batch(batch, SAMPLES) | inputs()


def train(model, loss, way, number=3, inputs=lambda: {}, **how):
    """The state after some steps, their metrics, and those of an evaluation."""
    mode, kind = way
    mesh = None if kind is None else jax.make_mesh((8,), ("data",), axis_types=(kind,))
    where = {"mesh": mesh} if mode == "shard_map" else {}
    linen = isinstance(model, nn.Module)
    first = next(batches(1, inputs))
    args = (jax.random.key(0), first["image"]) if linen else ()
    call = {"mask": first["mask"], "train": False, **first.get("inputs", {})} if linen else {}
    state = training.create_train_state(model, OPTIMIZER, *args, ema=True, mesh=mesh, **how, **call)
    state = training.replicate(state) if mode == "pmap" else state
    step = training.make_train_step(
        model, OPTIMIZER, loss, ema_decay=0.9, mode=mode, axis="data", **where
    )
    evaluate = training.make_eval_step(model, loss, ema=True, mode=mode, axis="data", **where)
    kinds = functools.partial(jax.tree.map, jax.typeof)
    seen = []
    for batch in batches(number, inputs):
        batch = batch if mesh is None else training.shard_batch(batch, mesh)
        old, kept = state, kinds(state)
        state, metrics = step(state, batch)
        assert all(a.is_deleted() for a in jax.tree.leaves(old))
        assert kinds(state) == kept
        seen.append(metrics)
    result = state, seen, evaluate(state, batch)
    result = jax.tree.map(lambda a: a[0], result) if mode == "pmap" else result
    return jax.device_get(jax.tree.map(plain, result))


def plain(a):
    """An array as one of numbers, keys too."""
    return jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("front", ["linen", "nnx"])
def test_devices_agree(front, way):
    named = "data" if WAYS[way][0] != "jit" else None
    if front == "linen":
        make = lambda axis: (Net(nj.BatchNorm(axis_name=axis)), linen_loss)
    else:
        make = lambda axis: (NnxNet(nnx.Rngs(0), axis), loss)
    wanted = train(*make(None), ("jit", None))
    chex.assert_trees_all_close(train(*make(named), WAYS[way]), wanted, atol=1e-5)
    assert wanted[1][-1].weight == SAMPLES - 5


def is_stateful(case):
    features = feature_sizes(case.method, case.shape)
    state = jax.eval_shape(lambda: case.method.init(jax.random.key(0), features)[1])
    return case.tier == 1 and bool(jax.tree.leaves(state))


STATEFUL = [name for name, case in CASES.items() if is_stateful(case)]


def of_case(name, axis_name=None):
    """Network and further inputs of a line of the table."""
    case = CASES[name]
    given = case.extra(jnp.float32, (SAMPLES, 6, 6, 24)) if case.extra else {}
    kinds = traits(case.method).inputs
    whole = tuple((key, value) for key, value in given.items() if kinds[key] == "whole")
    each = {key: value for key, value in given.items() if kinds[key] == "sample"}
    method = case.method if axis_name is None else with_axis_name(case.method, axis_name)
    inputs = lambda: {"inputs": each} if each else {}
    return Net(method, whole), inputs


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", STATEFUL)
def test_every_method_with_statistics_agrees(name, way):
    alone, inputs = of_case(name)
    model, _ = of_case(name, None if WAYS[way][0] == "jit" else "data")
    for steps in (1, 20):
        wanted = train(alone, linen_loss, ("jit", None), steps, inputs)
        got = train(model, linen_loss, WAYS[way], steps, inputs)
        chex.assert_trees_all_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", ["jit, Auto", "jit, Explicit", "shard_map"])
def test_parameters_shared_with_the_samples_are_gathered(way):
    mode, kind = WAYS[way]
    wanted = train(Net(nj.BatchNorm()), linen_loss, ("jit", None))
    model = Net(nj.BatchNorm(axis_name="data" if mode == "shard_map" else None))
    got = train(model, linen_loss, WAYS[way], fsdp="data")
    chex.assert_trees_all_close(got, wanted, atol=1e-5)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    where = training.placement(wanted[0], mesh, fsdp="data")
    for tree in (where.params, where.ema, where.opt_state[0].trace):
        assert tree["Conv_2"]["kernel"].spec == P(None, None, "data", None)
        assert tree["Norm_0"]["scale"].spec == P()
    assert where.statistics["batch_stats"]["Norm_0"]["mean"].spec == P()


def test_channels_are_shared_by_rules():
    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x, *, train, mask):
            x = nn.Dense(16, name="up")(x.reshape(len(x), -1))
            x = norms.BatchNorm(not train, name="norm")(x, mask=mask[:, None])
            return nn.Dense(CLASSES, name="down")(nn.relu(x))

    wanted = train(Mlp(), linen_loss, ("jit", None))
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rules = {"up": P("model"), "up/kernel": P(None, "model"), "norm": P("model")}
    rules["down/kernel"] = P("model", None)
    batch = next(batches(1))
    how = {"mask": batch["mask"], "train": False}
    key = jax.random.key(0)
    args = (Mlp(), OPTIMIZER, key, batch["image"])
    state = training.create_train_state(*args, ema=True, mesh=mesh, rules=rules, **how)
    again = training.place(training.create_train_state(*args, ema=True, **how), mesh, rules=rules)
    assert jax.tree.map(lambda a: a.sharding, state) == jax.tree.map(lambda a: a.sharding, again)
    step = training.make_train_step(Mlp(), OPTIMIZER, linen_loss, ema_decay=0.9)
    for batch in batches(3):
        state, _ = step(state, training.shard_batch(batch, mesh))
    assert state.statistics["batch_stats"]["norm"]["mean"].sharding.spec == P("model")
    assert state.opt_state[0].trace["norm"]["scale"].sharding.spec == P("model")
    got = jax.device_get((state.params, state.statistics))
    chex.assert_trees_all_close(got, (wanted[0].params, wanted[0].statistics), atol=1e-5)


def test_the_second_step_is_not_traced():
    traces = []

    def counted(model, batch, train):
        traces.append(train)
        return linen_loss(model, batch, train)

    for way in WAYS.values():
        traces.clear()
        train(Net(nj.BatchNorm(axis_name="data" if way[0] != "jit" else None)), counted, way)
        assert sorted(traces) == [False, True]


def test_devices_draw_their_own_dropout_and_the_same_noise():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            drop, ghost = (
                jax.random.uniform(self.make_rng(n), (1, 1)) for n in ("dropout", "ghost")
            )
            y = nn.Dense(1)(x) + drop
            return y, drop, ghost

    def spread(model, batch, train):
        y, *found = model(batch)
        of = lambda a: jax.lax.all_gather(a, "data").std() * jnp.ones(len(batch))
        drop, ghost = map(of, found)
        return training.Loss(y[:, 0], None, {"drop": drop, "ghost": ghost})

    x = jnp.ones((8, 2))
    rngs = {name: jax.random.key(1) for name in ("params", "dropout", "ghost")}
    params = Noisy().init(rngs, x)["params"]
    state = training.TrainState(jnp.int32(0), params, {}, OPTIMIZER.init(params), jax.random.key(0))
    state, how = training.place(state, mesh), {"mode": "shard_map", "mesh": mesh}
    drawn = training.make_train_step(Noisy(), OPTIMIZER, spread, **how)(state, x)[1].means()
    assert drawn["drop"] > 0.1 and drawn["ghost"] < 1e-6


def test_dropout_of_nnx_differs_between_devices_and_its_streams_move_alike():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.scale = nnx.Param(jnp.ones(()))

        def __call__(self, x):
            return self.dropout(x) * self.scale

    def kept(model, batch, train):
        y = model(batch).mean(-1)
        std = jax.lax.all_gather(y, "data").std()
        return training.Loss(y, None, {"std": jnp.full_like(y, std)})

    model = Net(nnx.Rngs(0))
    state = training.create_train_state(model, OPTIMIZER, mesh=mesh)
    key = jax.device_get(jax.random.key_data(state.statistics["dropout"]["rngs"]["key"][...]))
    step = training.make_train_step(model, OPTIMIZER, kept, mode="shard_map", mesh=mesh)
    state, metrics = step(state, jnp.ones((8, 32)))
    assert metrics.means()["std"] > 0
    assert not any(a.is_deleted() for a in jax.tree.leaves(nnx.state(model)))
    assert state.statistics["dropout"]["rngs"]["count"][...] == 1
    same = jax.random.key_data(state.statistics["dropout"]["rngs"]["key"][...])
    np.testing.assert_array_equal(same, key)


def test_a_step_with_nothing_that_counts_moves_nothing():
    model, batch = Net(nj.BatchNorm()), next(batches(1))
    batch["mask"][:] = False
    how = {"mask": batch["mask"], "train": False}
    args = (model, OPTIMIZER, jax.random.key(0), batch["image"])
    state = training.create_train_state(*args, **how)
    before = jax.device_get((state.params, state.statistics))
    state, metrics = training.make_train_step(model, OPTIMIZER, linen_loss)(state, batch)
    chex.assert_trees_all_equal(jax.device_get((state.params, state.statistics)), before)
    assert metrics.means() == {"loss": 0, "hit": 0}


def test_a_penalty_counts_once_on_all_devices():
    model = nn.Dense(1, use_bias=False)

    def ridge(call, batch, train):
        return training.Loss(jnp.zeros(len(batch)), None, {}, penalty=call(jnp.ones((1, 2)))[0, 0])

    x, mesh = jnp.ones((8, 2)), jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    moved = []
    for where, how in ((None, {}), (mesh, {"mode": "shard_map", "mesh": mesh})):
        key = jax.random.key(0)
        state = training.create_train_state(model, OPTIMIZER, key, x, mesh=where)
        before = jax.device_get(state.params["kernel"])
        state, _ = training.make_train_step(model, OPTIMIZER, ridge, **how)(state, x)
        moved.append(before - jax.device_get(state.params["kernel"]))
    np.testing.assert_allclose(moved, np.full((2, 2, 1), 0.05), rtol=1e-5)


def test_statistics_of_single_devices_are_refused():
    with pytest.raises(ValueError, match=r"Norm_0/mean differs .* axis_name='data'"):
        train(Net(nj.BatchNorm()), linen_loss, WAYS["shard_map"])


MESH = functools.partial(jax.make_mesh, (8,), ("data",))


def squares(model, batch, train):
    return training.Loss(jnp.square(model(batch) - 1).mean(-1), batch[:, 0] ** 2)


class Layers(nn.Module):
    """Two dense layers, in what precision and with what is sown as one likes."""

    dtype: object = jnp.float32
    sows: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8, dtype=self.dtype, param_dtype=self.dtype)(x))
        if self.sows:
            self.sow("losses", "size", jnp.mean(x))
        return nn.Dense(4, dtype=self.dtype, param_dtype=self.dtype)(x)


class Sower(nnx.Module):
    """A norm that leaves its output in the model."""

    def __init__(self):
        self.norm = nnx_norms.BatchNorm(5, rngs=nnx.Rngs(0))

    def __call__(self, x):
        self.output = nnx.Intermediate(self.norm(x))
        return self.output[...]


X = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)


def started(model=None, optimizer=OPTIMIZER, **how):
    return training.create_train_state(model or Layers(), optimizer, jax.random.key(0), X, **how)


def test_the_second_step_on_one_device_compiles_nothing(caplog):
    step = training.make_train_step(Layers(), OPTIMIZER, squares)
    state, _ = step(started(), X)
    with jax.log_compiles():
        step(state, X)
    assert not [record for record in caplog.records if "ompil" in record.getMessage()]


def test_averages_of_bfloat16_move():
    model = Layers(jnp.bfloat16)
    step = training.make_train_step(model, OPTIMIZER, squares, ema_decay=0.999)
    state = started(model, ema=True)
    before = np.asarray(state.ema["Dense_1"]["bias"])
    for _ in range(3):
        state, _ = step(state, X)
    moved = np.abs(state.ema["Dense_1"]["bias"] - before)
    assert moved.dtype == np.float32 and np.all(moved > 0) and np.all(moved < 1e-3)
    training.make_eval_step(model, squares, ema=True)(state, X)


@pytest.mark.parametrize("sown_before", ["state", "step", None])
@pytest.mark.parametrize("parts", [None, 2])
def test_what_nnx_models_have_sown_is_no_state(sown_before, parts):
    model = Sower()
    if sown_before == "state":
        model(X)
    state = training.create_train_state(model, OPTIMIZER)
    if sown_before == "step":
        model(X)
    gradient = parts and training.accumulate(model, squares, parts)
    step = training.make_train_step(model, OPTIMIZER, squares, gradient=gradient)
    kept = jax.tree.structure(state)
    state, _ = step(state, X)
    assert jax.tree.structure(state) == kept


@pytest.mark.parametrize("parts", [None, 2])
def test_collections_that_grow_are_refused(parts):
    model = Layers(sows=True)
    state = started(model)
    gradient = parts and training.accumulate(model, squares, parts)
    step = training.make_train_step(model, OPTIMIZER, squares, gradient=gradient)
    with pytest.raises(ValueError, match="collection 'losses'"):
        step(state, X)
    step(state._replace(statistics={}), X)


def test_a_loss_function_takes_what_is_sown():
    def loss(model, batch, train):
        y, sown = model(batch, mutable="losses")
        return training.Loss(jnp.square(y).mean(-1), penalty=3 * sown["losses"]["size"][0])

    model, free = Layers(sows=True), Layers()
    state = started(free)
    step = training.make_train_step(model, optax.sgd(1.0), loss)
    opt_state = optax.sgd(1.0).init(state.params)

    def wanted(params):
        hidden = nn.relu(X @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None])
        y = free.apply({"params": params}, X)
        return jnp.square(y).mean() + 3 * hidden.mean()

    slopes = jax.grad(wanted)(state.params)
    after = jax.tree.map(jnp.subtract, state.params, slopes)
    moved, _ = step(state._replace(opt_state=opt_state), X)
    chex.assert_trees_all_close(moved.params, after, rtol=1e-5, atol=1e-6)
    evaluate = training.make_eval_step(model, loss)
    assert evaluate(moved, X).weight == len(X)
    with pytest.raises(ValueError, match="the state has"):
        evaluate(started(model), X)
    with pytest.raises(ValueError, match="accumulate: mutable='losses'"):
        training.accumulate(model, loss, 2)(moved, X)


ROOM = functools.partial(jax.make_mesh, (2, 2), ("data", "model"))
BOTH = {"Dense_0/kernel": P(None, ("data", "model"))}


@pytest.mark.parametrize(
    "axis, how",
    [(("data", "model"), {"fsdp": "data"}), ("data", {"rules": BOTH})],
    ids=["fsdp", "rules"],
)
def test_parameters_share_some_of_the_axes_of_samples(axis, how):
    mesh = ROOM(axis_types=(AxisType.Auto,) * 2)
    wanted, _ = training.make_train_step(Layers(), OPTIMIZER, squares)(started(), X)
    where = {"mode": "shard_map", "mesh": mesh, "axis": axis}
    step = training.make_train_step(Layers(), OPTIMIZER, squares, **where)
    got, _ = step(started(mesh=mesh, **how), training.shard_batch(X, mesh, axis))
    chex.assert_trees_all_close(*map(jax.device_get, (got.params, wanted.params)), atol=1e-6)


MASKED = optax.masked(optax.adam(0.1), lambda tree: jax.tree.map(lambda a: a.ndim == 1, tree))
FACTORED = optax.adafactor(0.1, min_dim_size_to_factor=2)
KERNELS = {"Dense_*/kernel": P(None, "model")}
SMALL = {f"{part}/Dense_*/kernel": P() for part in ("v", "v_row", "v_col")}


@pytest.mark.parametrize(
    "optimizer, how",
    [
        (MASKED, {"rules": KERNELS}),
        (FACTORED, {"fsdp": "data"}),
        (FACTORED, {"rules": KERNELS | SMALL}),
    ],
    ids=["masked", "factored", "last rule"],
)
def test_states_of_optimizers_are_placed(optimizer, how):
    mesh = ROOM()
    step = training.make_train_step(Layers(), optimizer, squares)
    wanted, _ = step(started(optimizer=optimizer), X)
    state = started(optimizer=optimizer, mesh=mesh, **how)
    got, _ = step(state, training.shard_batch(X, mesh))
    chex.assert_trees_all_close(*map(jax.device_get, (got.params, wanted.params)), atol=1e-5)


def test_what_was_placed_stays():
    state, mesh = started(), MESH()
    step = training.make_train_step(Layers(), OPTIMIZER, squares)
    step(training.place(state, mesh), training.shard_batch(X, mesh))
    assert not any(a.is_deleted() for a in jax.tree.leaves(state))


@pytest.mark.parametrize("state", ["without key", "of NumPy", "and an undivided batch"])
def test_other_states_do_as_well(state):
    given, how = started(), {}
    wanted, _ = training.make_train_step(Layers(), OPTIMIZER, squares)(started(), X)
    if state == "without key":
        given = given._replace(key=None)
    elif state == "of NumPy":
        given = jax.device_get(given)
    else:
        given, how = training.place(given, MESH()), {"mode": "shard_map", "mesh": MESH()}
    got, _ = training.make_train_step(Layers(), OPTIMIZER, squares, **how)(given, X)
    chex.assert_trees_all_close(*map(jax.device_get, (got.params, wanted.params)), atol=1e-6)


def test_weights_are_constants():
    loss = lambda scale: training.measure(training.Loss(scale * X, jnp.abs(scale * X)))
    got = jax.grad(lambda scale: loss(scale).sums["loss"])(jnp.float32(1))
    np.testing.assert_allclose(got, np.sum(X * np.abs(X)), rtol=1e-5)


TREE = {"dense": {"kernel": jnp.ones((6, 3))}, "norm": {"scale": jnp.ones(3)}}


def lay(**how):
    return training.placement(TREE, MESH(), **how)


def evaluation(**how):
    loss = lambda model, batch, train: training.Loss(model(batch))
    return training.make_eval_step(nn.Dense(2), loss, **how)


def measured(*args):
    return training.measure(training.Loss(jnp.ones(3), *args))


BAD = {
    "no such axis": (lambda: lay(fsdp="model"), "no 'model'"),
    "rule for no axis": (lambda: lay(rules={"norm": P("x")}), "no 'x'"),
    "rule for nothing": (lambda: lay(rules={"bn": P()}), "'bn' matches"),
    "rank": (lambda: lay(rules={"norm": P(None, "data")}), "norm/scale .* it has 1 axes"),
    "indivisible": (lambda: lay(rules={"norm": P("data")}), "8 devices do not divide 3"),
    "batch": (lambda: training.shard_batch(jnp.ones(12), MESH()), "do not divide 12.*pad_batch"),
    "batch axis": (lambda: training.shard_batch(jnp.ones(8), MESH(), "x"), "no 'x'"),
    "pad": (lambda: training.pad_batch({"x": np.ones(5)}, 4), "size=4 is less than the 5"),
    "lengths": (lambda: training.pad_batch({"x": np.ones(5), "y": np.ones(4)}, 8), "differ"),
    "mode": (lambda: evaluation(mode="xmap"), "mode='xmap'"),
    "mesh": (lambda: evaluation(mode="shard_map"), "shard_map needs a mesh"),
    "axis": (lambda: evaluation(mode="shard_map", mesh=MESH(), axis="batch"), "axis='batch'"),
    "key": (lambda: training.create_train_state(nn.Dense(2), OPTIMIZER), "needs a key"),
    "shapes": (lambda: measured(jnp.ones((3, 1))), r"weights has the shape \(3, 1\)"),
    "name": (lambda: measured(None, {"loss": jnp.ones(3)}), "named 'loss'"),
    "penalty": (lambda: measured(None, {}, jnp.ones(3)), r"penalty has the shape \(3,\)"),
    "scalar": (lambda: training.shard_batch({"t": 1.0}, MESH()), "a scalar, 1.0"),
    "scalar to pad": (lambda: training.pad_batch({"t": 1.0}, 4), "a scalar, 1.0"),
    "axes of pmap": (lambda: evaluation(mode="pmap", axis=("a", "b")), "has one axis"),
    "average": (
        lambda: training.make_train_step(nn.Dense(2), OPTIMIZER, squares, ema_decay=1.5),
        "ema_decay=1.5",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, text = BAD[name]
    with pytest.raises(ValueError, match=text):
        call()


def test_bad_input_of_steps():
    x, mesh = jnp.ones((8, 2)), MESH()
    model = nn.Dense(1)
    objective = lambda model, batch, train: training.Loss(model(batch)[:, 0])
    state = training.create_train_state(model, OPTIMIZER, jax.random.key(0), x)
    step = functools.partial(training.make_train_step, model, OPTIMIZER, objective)
    for how, batch in (
        ({}, training.shard_batch(x, mesh)),
        ({"mode": "shard_map", "mesh": mesh}, x),
    ):
        with pytest.raises(ValueError, match="different devices"):
            step(**how)(state, batch)
    with pytest.raises(ValueError, match="do not divide 4"):
        step(mode="shard_map", mesh=mesh)(training.place(state, mesh), x[:4])
    with pytest.raises(ValueError, match="replicate"):
        step(mode="pmap")(state, x)
    with pytest.raises(ValueError, match="do not divide 4"):
        step(mode="pmap")(training.replicate(state), x[:4])
    with pytest.raises(ValueError, match="no average"):
        step(ema_decay=0.9)(state, x)
    with pytest.raises(ValueError, match="no average"):
        training.make_eval_step(model, objective, ema=True)(state, x)
    with pytest.raises(TypeError, match=r"returned an array\. Return a Loss"):
        training.make_train_step(model, OPTIMIZER, lambda model, x, _: model(x).mean())(state, x)
    with pytest.raises(TypeError, match="streams='noise' is one name"):
        step(streams="noise")
    with pytest.raises(TypeError, match="not a module"):
        training.make_train_step(jnp.tanh, OPTIMIZER, objective)


@pytest.mark.parametrize(
    ("names", "steps"),
    [(["BatchNorm"], 3), pytest.param(STATEFUL, 20, marks=pytest.mark.slow)],
    ids=["BatchNorm", "all"],
)
def test_two_processes_agree_with_one(names, steps, tmp_path):
    worker = pathlib.Path(__file__).parent / "two_processes.py"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    run = lambda i: subprocess.Popen(
        [sys.executable, worker, port, str(i), tmp_path, str(steps), *names],
        stderr=subprocess.PIPE,
        text=True,
    )
    workers = [run(0), run(1)]
    errors = [process.communicate(timeout=3000)[1] for process in workers]
    assert [process.returncode for process in workers] == [0, 0], errors
    for number, name in enumerate(names):
        model, inputs = of_case(name)
        state, _, _ = train(model, linen_loss, ("jit", None), steps, inputs)
        wanted = jax.tree.leaves((state.params, state.statistics))
        with np.load(tmp_path / f"{number}.npz") as found:
            got = [found[key] for key in found]
        chex.assert_trees_all_close(got, wanted, atol=1e-5, rtol=1e-5, custom_message=name)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n == "BatchNorm" else pytest.mark.slow) for n in STATEFUL],
)
def test_lowering_for_accelerators(name):
    model, inputs = of_case(name)
    batch = next(batches(1, inputs))
    how = {"mask": batch["mask"], "train": False, **batch.get("inputs", {})}
    args = (model, OPTIMIZER, jax.random.key(0), batch["image"])
    state = training.create_train_state(*args, **how)
    step = training.make_train_step(model, OPTIMIZER, linen_loss)
    for platform in ("tpu", "cuda"):
        exported = jax.export.export(jax.jit(step), platforms=[platform])(state, batch)
        assert exported.platforms == (platform,)
    assert "stablehlo" in step.lower(state, batch).as_text()
