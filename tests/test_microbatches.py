"""Gradients in parts of a batch against those of the whole, and statistics that move once."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from agreement import close, draw, ragged
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType

import normjax as nj
import normjax.linen
import normjax.nnx
from normjax import training

OPTIMIZER = optax.sgd(0.1)
KEY = jax.random.key(0)
SAMPLES, PARTS = 16, 4


class Net(nn.Module):
    """Dense, norm, dense; the norm trains unless it is frozen."""

    method: object
    frozen: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, batch, train=False):
        norm = nn.remat(normjax.linen.Norm) if self.remat else normjax.linen.Norm
        x = nn.Dense(4, kernel_init=nn.initializers.orthogonal())(batch["x"])
        norm = norm(self.method, use_running_average=self.frozen or not train, name="norm")
        x = jnp.sin(norm(x, mask=batch["mask"]))
        return nn.Dense(2)(x)


def batch_of(tail=(3,), share=0.7):
    """Samples with a ragged mask; the second of four parts has none that counts."""
    mask = ragged(3, SAMPLES, *(1,) * len(tail), share=share)
    mask[4:8] = False
    return {"x": draw(0, SAMPLES, *tail) + 2, "y": draw(1, SAMPLES, 2), "mask": mask}


def loss(model, batch, train):
    out = model(batch, train)
    out = out.reshape(len(batch["y"]), -1, 2).mean(1)
    values = jnp.square(out - batch["y"]).mean(-1)
    return training.Loss(values, batch["mask"].reshape(-1), {"first": out[:, 0]}, penalty=0.5)


def start(model, batch):
    return training.create_train_state(model, OPTIMIZER, KEY, batch)


def of_batch(model, state, batch):
    """Gradient, metrics and statistics of the whole batch, by JAX alone."""

    def objective(params):
        seen = []

        def call(*args):
            y, new = model.apply(
                {"params": params, **state.statistics}, *args, mutable=list(state.statistics)
            )
            seen.append(new)
            return y

        metrics = training.measure(loss(call, batch, True))
        return metrics.means()["loss"], (metrics, dict(seen[0]))

    return jax.jit(jax.grad(objective, has_aux=True))(state.params)


def of_parts(model, state, batch, **how):
    gradient = training.accumulate(model, loss, PARTS, **how)
    return jax.jit(gradient)(state, batch)


@pytest.mark.parametrize(
    ("net", "tail"),
    (
        (Net(nj.LayerNorm()), (3,)),
        (Net(nj.GroupNorm(2)), (5, 3)),
        (Net(nj.RMSNorm()), (3,)),
        (Net(nj.BatchNorm(), frozen=True), (3,)),
    ),
)
def test_with_norms_of_samples_and_frozen_ones_it_is_the_whole_batch(net, tail):
    batch = batch_of(tail)
    state = start(net, batch)
    found, wanted = of_parts(net, state, batch), of_batch(net, state, batch)
    chex.assert_trees_all_equal_structs(found, wanted)
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("average", "remat"), (("exponential", False), ("cumulative", True), ("pooled", False))
)
def test_batch_norm_is_ghost_norm_whose_statistics_are_those_of_the_batch(average, remat):
    method, batch = nj.BatchNorm(momentum=0.5, running_average=average), batch_of()
    net = Net(method, remat=remat)
    state = start(net, batch)
    gradients, (metrics, statistics) = of_parts(net, state, batch)
    ghost = Net(nj.Ghost(nj.BatchNorm(momentum=0.5), PARTS))
    wanted = of_batch(ghost, start(ghost, batch), batch)
    chex.assert_trees_all_close((gradients, metrics), (wanted[0], wanted[1][0]), atol=1e-5)
    _, (_, whole) = of_batch(Net(method), state, batch)
    chex.assert_trees_all_close(statistics, whole, rtol=1e-5, atol=1e-6)
    dense = jax.tree.map(np.float64, state.params["Dense_0"])
    x = (batch["x"] @ dense["kernel"] + dense["bias"])[batch["mask"][:, 0]]
    keep = {"exponential": 0.5, "cumulative": 0, "pooled": 0}[average]
    close(statistics["batch_stats"]["norm"]["var"], np.float32(keep + (1 - keep) * x.var(0)), 1e-5)
    if average == "cumulative":
        assert statistics["batch_stats"]["norm"]["count"] == 1


@pytest.mark.parametrize("how", ("averaged", "sequential"))
def test_statistics_of_parts_by_choice(how):
    method, batch = nj.BatchNorm(momentum=0.5), batch_of()
    net = Net(method)
    state = start(net, batch)
    _, (_, found) = of_parts(net, state, batch, statistics=how)
    ghost = Net(nj.Ghost(method, PARTS))
    _, (_, wanted) = of_batch(ghost, state, batch)
    if how == "sequential":
        x = nn.Dense(4).apply({"params": state.params["Dense_0"]}, batch["x"])
        params, own = method.init(None, 4)
        for i in range(PARTS):
            part = slice(4 * i, 4 * i + 4)
            _, own = method.apply(params, own, x[part], train=True, mask=batch["mask"][part])
        wanted = {"batch_stats": {"norm": {"mean": own.mean, "var": own.var}}}
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_links_of_a_chain_and_norms_that_use_old_statistics_move_once():
    batch = batch_of()
    method = nj.chain(nj.BatchRenorm(r_max=2.0, d_max=1.0, momentum=0.5), nj.Affine())
    net = Net(method)
    state = start(net, batch)
    _, (_, found) = of_parts(net, state, batch)
    _, (_, wanted) = of_batch(net, state, batch)
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-6)


class Model(nnx.Module):
    def __init__(self, norm, rngs):
        self.first, self.last = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
        self.norm = normjax.nnx.Norm(norm, 4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, batch, train):
        x = self.norm(self.first(batch["x"]), mask=batch["mask"])
        noise = self.dropout(jnp.ones(4), deterministic=not train)
        return self.last(jnp.sin(x)) + 0 * noise.sum()


def test_of_a_model_of_nnx():
    batch, method = batch_of(), nj.BatchNorm(momentum=0.5)
    model = Model(method, nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
    state = training.create_train_state(model, OPTIMIZER)
    gradients, (metrics, statistics) = of_parts(model, state, batch)
    chex.assert_trees_all_equal_structs(gradients, state.params)
    chex.assert_trees_all_equal_structs(statistics, state.statistics)
    numbers = nnx.to_pure_dict(statistics)
    assert numbers["dropout"]["rngs"]["count"] == PARTS
    step = training.make_train_step(Model(nj.Ghost(method, PARTS), nnx.Rngs(0)), OPTIMIZER, loss)
    moved, wanted = step(training.create_train_state(model, OPTIMIZER), batch)
    chex.assert_trees_all_close(metrics, wanted, rtol=1e-5)
    change = lambda new, old, g: close(new - old, -0.1 * g, 1e-6)
    jax.tree.map(change, moved.params, state.params, gradients)
    whole = model.first(batch["x"])[batch["mask"][:, 0]]
    close(numbers["norm"]["var"], 0.5 + 0.5 * jnp.var(whole, 0), 1e-5)
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)), before)


@pytest.mark.parametrize("kind", ("auto", "explicit", "shard_map"))
def test_on_a_mesh_as_on_one_device(kind):
    batch = {name: np.concatenate([a, a[::-1]]) for name, a in batch_of(share=0.9).items()}
    mapped = {"axis_name": "data"} if kind == "shard_map" else {}
    net = Net(nj.BatchNorm(momentum=0.5, **mapped))
    types = (AxisType.Explicit if kind == "explicit" else AxisType.Auto,)
    mesh = jax.make_mesh((8,), ("data",), types)
    make = functools.partial(training.make_train_step, net, OPTIMIZER, loss)
    how = {"mode": "shard_map", "mesh": mesh} if mapped else {}
    step = make(gradient=training.accumulate(net, loss, PARTS), **how)
    state = start(net, batch)
    alone = batch
    if mapped:  # the parts are those of each device
        order = np.arange(32).reshape(8, PARTS, 1).swapaxes(0, 1).reshape(-1)
        alone = jax.tree.map(lambda a: a[order], batch)
    placed = training.place(jax.tree.map(jnp.copy, state), mesh)
    found, metrics = step(placed, training.shard_batch(batch, mesh))
    ghost = Net(nj.Ghost(nj.BatchNorm(momentum=0.5), PARTS))
    gradients, (wanted, _) = of_batch(ghost, state, alone)
    _, (_, statistics) = of_batch(Net(nj.BatchNorm(momentum=0.5)), state, batch)
    chex.assert_trees_all_close(metrics, wanted, rtol=1e-5)
    params = optax.apply_updates(state.params, jax.tree.map(lambda g: -0.1 * g, gradients))
    numbers = jax.device_get((found.params, found.statistics))
    chex.assert_trees_all_close(numbers, (params, statistics), rtol=1e-5, atol=1e-5)


def test_gradients_of_half_precision_are_summed_in_float32():
    class Scale(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x * self.param("scale", nn.initializers.ones, (), jnp.bfloat16)

    x = np.full(1024, 1.0, "float32")
    state = start(Scale(), x)
    total = lambda model, x, train: training.Loss(model(x), 1024 * jnp.ones(x.shape))
    gradients, _ = training.accumulate(Scale(), total, 1024)(state, x)
    assert gradients["scale"].dtype == jnp.bfloat16 and gradients["scale"] == 1.0


def test_accumulator_of_optax_pools_statistics():
    method, x = nj.BatchNorm(), draw(0, 12, 3)
    kinds = {"sum": optax.microbatching.AccumulationType.SUM}
    kinds["seen"] = training.statistics_accumulator()
    part = lambda x: {"sum": x.sum(), "seen": {"norm": method.observe(x)}}
    found = optax.microbatch(part, 0, microbatch_size=3, accumulator=kinds)(jnp.asarray(x))
    wanted = {"sum": x.sum(), "seen": {"norm": method.observe(x)}}
    chex.assert_trees_all_close(found, wanted, rtol=1e-6, atol=1e-6)
    stacked = jax.vmap(part)(x.reshape(4, 3, 3))["seen"]
    chex.assert_trees_all_close(kinds["seen"].aggregate(stacked), wanted["seen"], rtol=1e-6)


def test_errors():
    net, batch = Net(nj.BatchNorm()), batch_of()
    with pytest.raises(ValueError, match="parts=0"):
        training.accumulate(net, loss, 0)
    with pytest.raises(ValueError, match="statistics='mean'"):
        training.accumulate(net, loss, 2, statistics="mean")
    with pytest.raises(ValueError, match="parts=3 do not divide a batch of shape"):
        training.accumulate(net, loss, 3)(start(net, batch), batch)
    mesh = jax.make_mesh((8,), ("data",))
    batch = {name: np.concatenate([a, a]) for name, a in batch.items()}
    state = training.place(start(net, batch), mesh)
    for how in ("pooled", "sequential"):
        gradient = training.accumulate(net, loss, 2, statistics=how)
        where = dict(mode="shard_map", mesh=mesh)
        step = training.make_train_step(net, OPTIMIZER, loss, gradient=gradient, **where)
        with pytest.raises(ValueError, match="Give its norm axis_name='data'"):
            step(state, training.shard_batch(batch, mesh))
