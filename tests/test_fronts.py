"""Both Flax front ends: Flax's variable trees, call sites, transforms and checkpoints."""

import dataclasses
import functools
import json
from typing import ClassVar

import chex
import flax
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
import stubs
import trees
from flax import linen as nn
from flax import nnx as fnnx
from jax.sharding import Mesh, PartitionSpec

import normjax as nj
from normjax import linen, nnx

FLAX = ("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm")
CLOSE = dict(rtol=2e-6, atol=2e-6)
X = 0.5 + jax.random.normal(jax.random.key(0), (8, 4, 4, 32))


def switch(name, value):
    return {"use_running_average": value} if name == "BatchNorm" else {}


@pytest.mark.parametrize("front", ("linen", "nnx"))
def test_variable_trees_equal_the_golden_files(front):
    golden = json.loads((trees.GOLDEN / f"{front}.json").read_text())
    assert trees.trees()[front] == golden, "if intended: python -m tests.trees"


def test_stubs_are_those_of_the_fields():
    for path, text in stubs.stubs().items():
        assert path.read_text() == text, "run python -m tests.stubs"


@pytest.mark.parametrize("name", FLAX)
def test_trees_equal_those_of_flax(name):
    ours, theirs = getattr(linen, name)(), getattr(nn, name)()
    assert trees.linen_tree(ours) == describe_flax(theirs, name)
    rngs = fnnx.Rngs(0)
    ours = getattr(nnx, name)(32, rngs=rngs)
    assert trees.nnx_tree(ours) == trees.nnx_tree(getattr(fnnx, name)(32, rngs=rngs))


def describe_flax(module, name):
    return trees.describe(
        jax.eval_shape(lambda: module.init(jax.random.key(0), trees.X, **switch(name, True)))
    )


@pytest.mark.parametrize("name", FLAX)
def test_linen_fields_are_flax_fields_in_flax_order(name):
    theirs = [f.name for f in dataclasses.fields(getattr(nn, name))]
    ours = [f.name for f in dataclasses.fields(getattr(linen, name))]
    shared = theirs[: theirs.index("use_fast_variance")]
    assert ours[: len(shared)] == shared
    assert set(theirs) <= set(ours)
    for field in shared:
        a, b = getattr(getattr(linen, name), field), getattr(getattr(nn, name), field)
        assert a == b, field


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("name", FLAX)
def test_linen_gives_what_flax_gives_from_flax_variables(name, masked):
    shape = X.shape if name == "GroupNorm" else (8, 1, 1, 1)
    mask = jnp.broadcast_to(jnp.arange(8).reshape(8, 1, 1, 1) < 5, shape) if masked else None
    rows = slice(0, 5) if masked else slice(None)
    module = getattr(nn, name)()
    variables = module.init(jax.random.key(1), X, **switch(name, False))
    variables = jax.tree.map(lambda a: a + 0.1, variables)
    for evaluate in (False, True):
        calls = dict(mask=mask, mutable=["batch_stats"], **switch(name, evaluate))
        wanted, stats = module.apply(variables, X, **calls)
        got, new = getattr(linen, name)().apply(variables, X, **calls)
        chex.assert_trees_all_close(got[rows], wanted[rows], **CLOSE)
        chex.assert_trees_all_close(new, stats, **CLOSE)


@pytest.mark.parametrize("name", FLAX)
def test_nnx_gives_what_flax_gives(name):
    ours = getattr(nnx, name)(32, rngs=fnnx.Rngs(0))
    theirs = getattr(fnnx, name)(32, rngs=fnnx.Rngs(0))
    fnnx.update(ours, jax.tree.map(lambda a: a + 0.1, fnnx.state(theirs)))
    fnnx.update(theirs, jax.tree.map(lambda a: a + 0.1, fnnx.state(theirs)))
    for _ in range(2):
        chex.assert_trees_all_close(ours(X), theirs(X), **CLOSE)
    ours.eval(), theirs.eval()
    chex.assert_trees_all_close(ours(X), theirs(X), **CLOSE)
    wanted = fnnx.to_pure_dict(fnnx.state(theirs))
    chex.assert_trees_all_close(fnnx.to_pure_dict(fnnx.state(ours)), wanted, **CLOSE)


@pytest.mark.parametrize("name", FLAX)
def test_arguments_that_only_flax_has_are_taken(name):
    linen_norm = getattr(linen, name)(use_fast_variance=False, force_float32_reductions=True)
    linen_norm.init(jax.random.key(0), X, **switch(name, True))
    getattr(nnx, name)(32, use_fast_variance=False, rngs=fnnx.Rngs(0))(X)
    with pytest.raises(ValueError, match="promote_dtype"):
        getattr(nnx, name)(32, promote_dtype=lambda *a, dtype: a, rngs=fnnx.Rngs(0))


def test_use_running_average_is_a_field_or_an_argument():
    variables = linen.BatchNorm(use_running_average=True).init(jax.random.key(0), X)
    field = linen.BatchNorm(use_running_average=True).apply(variables, X)
    argument = linen.BatchNorm().apply(variables, X, True)
    chex.assert_trees_all_equal(field, argument)
    with pytest.raises(ValueError, match="use_running_average"):
        linen.BatchNorm().apply(variables, X)
    with pytest.raises(ValueError, match="use_running_average"):
        linen.BatchNorm(use_running_average=True).apply(variables, X, False)
    norm = nnx.BatchNorm(32, use_running_average=None, rngs=fnnx.Rngs(0))
    with pytest.raises(ValueError, match="use_running_average"):
        norm(X)
    chex.assert_trees_all_close(norm(X, True), field)


def test_methods_that_do_not_care_take_use_running_average_too():
    for name in ("LayerNorm", "RMSNorm", "GroupNorm", "DynamicTanh"):
        norm = getattr(linen, name)()
        variables = norm.init(jax.random.key(0), X)
        chex.assert_trees_all_equal(norm.apply(variables, X), norm.apply(variables, X, False))


def test_initialization_leaves_statistics_alone_and_needs_no_mapped_axis():
    norm = linen.BatchNorm(use_running_average=False, axis_name="batch")
    variables = norm.init(jax.random.key(0), X)
    chex.assert_trees_all_equal(variables["batch_stats"]["mean"], jnp.zeros(32))
    evaluated = norm.clone(use_running_average=True).apply(variables, X)
    chex.assert_shape(evaluated, X.shape)
    with pytest.raises(NameError, match="batch"):
        norm.apply(variables, X, mutable=["batch_stats"])


def test_training_under_pmap_and_shard_map():
    norm = linen.BatchNorm(axis_name="batch")
    variables = norm.init(jax.random.key(0), X, True)
    train = lambda v, x: norm.apply(v, x, False, mutable=["batch_stats"])
    wanted = linen.BatchNorm().apply(variables, X, False, mutable=["batch_stats"])
    y, new = jax.pmap(train, axis_name="batch", in_axes=(None, 0))(variables, X[:, None])
    chex.assert_trees_all_close((y[:, 0], jax.tree.map(lambda a: a[0], new)), wanted, **CLOSE)
    mesh = Mesh(jax.devices(), ("batch",))
    whole, rows = PartitionSpec(), PartitionSpec("batch")
    specs = dict(mesh=mesh, in_specs=(whole, rows), out_specs=(rows, whole))
    chex.assert_trees_all_close(jax.shard_map(train, **specs)(variables, X), wanted, **CLOSE)


def test_partitioning_metadata():
    init = nn.with_partitioning(nn.initializers.ones, ("model",))
    norm = linen.BatchNorm(scale_init=init)
    variables = norm.init(jax.random.key(0), X, True)
    assert isinstance(variables["params"]["scale"], nn.Partitioned)
    spec = nn.get_partition_spec(variables)
    assert spec["params"]["scale"] == PartitionSpec("model")
    y, _ = norm.apply(variables, X, False, mutable=["batch_stats"])
    plain = linen.BatchNorm().apply(nn.unbox(variables), X, False, mutable=["batch_stats"])[0]
    chex.assert_trees_all_equal(y, plain)
    norm = nnx.BatchNorm(32, scale_metadata={"note": "wide"}, rngs=fnnx.Rngs(0))
    assert norm.scale.get_metadata()["note"] == "wide"
    scale_init = fnnx.with_metadata(fnnx.initializers.ones_init(), note="from the initializer")
    norm = nnx.LayerNorm(32, scale_init=scale_init, rngs=fnnx.Rngs(0))
    assert norm.scale.get_metadata()["note"] == "from the initializer"
    chex.assert_shape(norm(X), X.shape)


class Block(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x, _):
        x = nn.Dense(x.shape[-1])(x)
        return self.norm(use_running_average=False, momentum=0.5)(x), None


def test_linen_scan_remat_and_vmap():
    x = X[:, 0, 0]
    stacked = dict(variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})
    results = []
    for norm in (linen.BatchNorm, nn.BatchNorm):
        layers = nn.scan(nn.remat(Block), length=3, **stacked)(norm)
        variables = layers.init(jax.random.key(0), x, None)
        (y, _), new = layers.apply(variables, x, None, mutable=["batch_stats"])
        models = nn.vmap(Block, in_axes=(0, None), **stacked)(norm)
        ensemble = models.init(jax.random.key(1), jnp.stack([x, x]), None)
        (z, _), more = models.apply(ensemble, jnp.stack([x, 2 * x]), None, mutable=["batch_stats"])
        results.append((variables, y, new, ensemble, z, more))
    ours, theirs = (jax.tree.map(lambda a: a, r) for r in results)
    rename = lambda tree: json.loads(json.dumps(jax.tree.map(lambda a: a.tolist(), tree)))
    chex.assert_trees_all_close(rename(ours), rename(theirs), rtol=2e-5, atol=2e-5)


def test_linen_scan_may_carry_the_statistics():
    class Steps(nn.Module):
        @nn.compact
        def __call__(self, xs):
            norm = linen.BatchNorm(use_running_average=False, momentum=0.5)
            if self.is_initializing():
                return norm(xs[0])
            body = lambda norm, _, x: (None, norm(x))
            carried = dict(variable_broadcast="params", variable_carry="batch_stats")
            return nn.scan(body, split_rngs={"params": False}, **carried)(norm, None, xs)[1]

    xs = jnp.stack([X, 2 * X, X - 1])
    variables = Steps().init(jax.random.key(0), xs)
    y, new = Steps().apply(variables, xs, mutable=["batch_stats"])
    method = nj.BatchNorm(momentum=0.5)
    params, state = method.init(None, 32)
    for i in range(3):
        wanted, state = method.apply(params, state, xs[i], train=True)
        chex.assert_trees_all_close(y[i], wanted, **CLOSE)
    (stats,) = new["batch_stats"].values()
    chex.assert_trees_all_close(stats["var"], state.var, **CLOSE)


class Net(fnnx.Module):
    def __init__(self, norm, rngs):
        self.dense = fnnx.Linear(32, 32, rngs=rngs)
        self.norm = norm(32, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.dense(x))


def test_nnx_transforms_and_modes():
    x = X[:, 0, 0]
    results = []
    for norm in (nnx.BatchNorm, fnnx.BatchNorm):
        net = Net(norm, fnnx.Rngs(0))

        @fnnx.jit
        def step(net, x):
            loss = lambda net: jnp.sum(jnp.sin(net(x)))
            return fnnx.value_and_grad(loss)(net)

        value, gradient = step(net, x)
        again, _ = step(net, 2 * x)
        net.eval()
        frozen = fnnx.to_pure_dict(fnnx.state(net, fnnx.BatchStat))
        outputs = net(x)
        chex.assert_trees_all_equal(fnnx.to_pure_dict(fnnx.state(net, fnnx.BatchStat)), frozen)
        net.train()
        assert net.norm.use_running_average is False

        @fnnx.scan(in_axes=(fnnx.Carry, 0), out_axes=(fnnx.Carry, 0))
        def scanned(net, x):
            return net, net(x)

        _, scan = scanned(net, jnp.stack([x, 2 * x]))

        make = fnnx.vmap(functools.partial(Net, norm))
        nets = fnnx.split_rngs(splits=3)(make)(fnnx.Rngs(1))
        many = fnnx.vmap(lambda net, x: net(x), in_axes=(0, None))(nets, x)
        abstract = fnnx.eval_shape(functools.partial(Net, norm), fnnx.Rngs(0))
        shapes = jax.tree.map(lambda a: list(a.shape), fnnx.to_pure_dict(fnnx.state(abstract)))
        numbers = (value, again, fnnx.to_pure_dict(gradient), outputs, scan, many)
        stats = [fnnx.to_pure_dict(fnnx.state(n, fnnx.BatchStat)) for n in (net, nets)]
        results.append((numbers, frozen, stats, shapes))
    chex.assert_trees_all_close(results[0][:3], results[1][:3], rtol=2e-5, atol=2e-5)
    assert results[0][3] == results[1][3]


def test_nnx_view_split_and_reading_of_fields():
    net = Net(nnx.BatchNorm, fnnx.Rngs(0))
    evaluating = fnnx.view(net, use_running_average=True)
    assert evaluating.norm.use_running_average and not net.norm.use_running_average
    graph, state = fnnx.split(net)
    chex.assert_trees_all_close(fnnx.merge(graph, state)(X[:, 0, 0]), net(X[:, 0, 0]))
    assert net.norm.momentum == 0.99
    with pytest.raises(AttributeError, match="nonsense"):
        _ = net.norm.nonsense
    assert nnx.BatchNorm(3, use_bias=False, rngs=fnnx.Rngs(0)).bias is None
    assert fnnx.clone(net).norm.method == net.norm.method


def test_nnx_abstract_call():
    net = Net(nnx.BatchNorm, fnnx.Rngs(0))
    out = fnnx.eval_shape(lambda net, x: net(x), net, X[:, 0, 0])
    assert out.shape == (8, 32)


@pytest.mark.parametrize("name", FLAX)
def test_checkpoints_of_flax_load_and_save(name, tmp_path):
    module = getattr(nn, name)()
    variables = module.init(jax.random.key(1), X, **switch(name, False))
    variables = jax.tree.map(lambda a: a + 0.25, variables)
    ours = getattr(linen, name)().init(jax.random.key(2), X, **switch(name, True))

    restored = flax.serialization.from_bytes(ours, flax.serialization.to_bytes(variables))
    chex.assert_trees_all_equal(restored, variables)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "linen", variables)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "linen", jax.eval_shape(lambda: ours))
        chex.assert_trees_all_equal(restored, variables)

        theirs = getattr(fnnx, name)(32, rngs=fnnx.Rngs(0))
        fnnx.update(theirs, jax.tree.map(lambda a: a + 0.5, fnnx.state(theirs)))
        checkpointer.save(tmp_path / "nnx", fnnx.to_pure_dict(fnnx.state(theirs)))
        checkpointer.wait_until_finished()
        norm = getattr(nnx, name)(32, rngs=fnnx.Rngs(0))
        target = fnnx.to_pure_dict(fnnx.state(norm))
        pure = checkpointer.restore(tmp_path / "nnx", jax.eval_shape(lambda: target))
        state = fnnx.state(norm)
        fnnx.replace_by_pure_dict(state, pure)
        fnnx.update(norm, state)
        chex.assert_trees_all_equal(fnnx.to_pure_dict(fnnx.state(norm)), pure)


@dataclasses.dataclass(frozen=True)
class Jitter:
    """A method of a user's own: scaled by a random factor in training, and by `gain`."""

    traits: ClassVar[nj.Traits] = nj.Traits(random=True, inputs={"gain": "whole"})

    def init(self, key, features):
        return (), ()

    def apply(self, params, state, x, *, train, mask=None, key=None, gain=1.0):
        if train:
            if key is None:
                raise ValueError("Jitter: training needs a key.")
            x = x * (1 + 0.1 * jax.random.normal(key, x.shape[:1] + (1,) * (x.ndim - 1)))
        return gain * x, state


def test_random_methods_draw_from_the_stream_ghost():
    norm = linen.Norm(nj.chain(nj.LayerNorm(), Jitter()))
    variables = norm.init(jax.random.key(0), X, True)
    draw = lambda seed: norm.apply(variables, X, False, rngs={"ghost": jax.random.key(seed)})
    chex.assert_trees_all_equal(draw(1), draw(1))
    assert jnp.any(draw(1) != draw(2))
    with pytest.raises(flax.errors.InvalidRngError, match="ghost"):
        norm.apply(variables, X, False)
    chex.assert_trees_all_equal(norm.apply(variables, X, True), norm.apply(variables, X, True))

    rngs = fnnx.Rngs(0, ghost=1)
    norm = nnx.Norm(nj.Ghost(Jitter(), groups=2), 32, rngs=rngs)
    assert jnp.any(norm(X) != norm(X))
    norm.eval()
    chex.assert_trees_all_equal(norm(X), X)


def test_other_inputs_reach_the_method():
    y = linen.Norm(Jitter()).apply({}, X, True, gain=2.0)
    chex.assert_trees_all_close(y, 2 * X)
    chex.assert_trees_all_close(nnx.Norm(Jitter(), 32, rngs=fnnx.Rngs(0))(X, True, gain=2.0), 2 * X)


def test_module_and_pure_function_are_one_program():
    method = nj.BatchNorm()
    params, state = method.init(None, 32)
    norm = linen.BatchNorm()
    variables = norm.init(jax.random.key(0), X, True)

    def pure(params, state, x):
        return method.apply(params, state, x, train=True)

    def module(params, state, x):
        tree = {"params": params._asdict(), "batch_stats": {"mean": state.mean, "var": state.var}}
        y, new = norm.apply(tree, x, False, mutable=["batch_stats"])
        return y, nj.Running(**new["batch_stats"])

    count = lambda f: len(
        jax.jit(f).lower(params, state, X).compile().as_text().split("ENTRY")[1].splitlines()
    )
    assert count(pure) == count(module)
    assert set(variables) == {"params", "batch_stats"}


def test_what_is_no_method_is_refused():
    with pytest.raises(ValueError, match="is not a method"):
        linen.Norm("BatchNorm").init(jax.random.key(0), X, True)
    with pytest.raises(ValueError, match="is not a method"):
        nnx.Norm(3, 32, rngs=fnnx.Rngs(0))
    with pytest.raises(TypeError, match="positional"):
        nnx.GroupNorm(32, 4, None, 1e-5, rngs=fnnx.Rngs(0))
    with pytest.raises(ValueError, match=r"axis=7 .*\(8, 4, 4, 32\)"):
        linen.BatchNorm(axis=7).init(jax.random.key(0), X, True)
    with pytest.raises(ValueError, match="momentum=2"):
        linen.BatchNorm(momentum=2).init(jax.random.key(0), X, True)
    norm = nnx.BatchNorm(31, rngs=fnnx.Rngs(0))
    with pytest.raises(ValueError, match=r"\(32,\).*\(31,\)"):
        norm(X)
