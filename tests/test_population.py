"""Recalibrated statistics against those of all values in float64, and merged replicas."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import close, draw, ragged
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import normjax as nj
import normjax.linen
import normjax.nnx
from normjax import population

SIZES = 7, 7, 7  # of one shape: masks make them unequal, and each shape takes a program
KEY = jax.random.key(0)
STACKED = dict(variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})


def batches(seed=0, sizes=SIZES, tail=(4,)):
    """Batches [n, *tail] at an offset, with masks of samples, one without any."""
    whole = [x * np.float32(2) + 3 for x in (draw(seed + i, n, *tail) for i, n in enumerate(sizes))]
    masks = [ragged(seed + 10 + i, n, *(1,) * len(tail)) for i, n in enumerate(sizes)]
    masks[0] |= True
    if len(sizes) > 1:
        masks[1] &= False
    return [{"x": x, "mask": mask} for x, mask in zip(whole, masks, strict=True)]


def valid(parts):
    """All valid samples of batches in float64."""
    every = [part["x"][part["mask"].reshape(-1)] for part in parts]
    return np.concatenate(every).astype("float64")


def call(model, batch):
    """As for evaluation; Linen's `Norm` is told so, NNX's need not be."""
    evaluate = (True,) if isinstance(model, normjax.linen.Front) else ()
    batch = dict(batch)
    return model(batch.pop("x"), *evaluate, **batch)


def of_norm(method, parts, **how):
    """The state of a Linen norm alone, recalibrated."""
    norm = normjax.linen.Norm(method)
    first = dict(parts[0])
    variables = norm.init(KEY, first.pop("x"), True, **first)
    old = variables["batch_stats"]
    new = population.recalibrate(norm, parts, variables=variables, call=call, **how)
    chex.assert_trees_all_equal_shapes_and_dtypes(new["batch_stats"], old)
    return new["batch_stats"]


def moments(x, unbiased=False):
    axes = tuple(range(x.ndim - 1))
    return {"mean": x.mean(axes), "var": x.var(axes, ddof=1 if unbiased else 0)}


def agree(state, wanted, tolerance=1e-6):
    wanted = jax.tree.map(np.float32, wanted)
    chex.assert_trees_all_close({k: state[k] for k in wanted}, wanted, rtol=tolerance)


EXACT = {
    "exponential": nj.BatchNorm(),
    "unbiased": nj.BatchNorm(unbiased_running_var=True),
    "scheduled": nj.BatchNorm(momentum=nj.Ramp(0.5, 0.9, 0, 9)),
    "debiased": nj.BatchNorm(running_average="debiased"),
    "pooled": nj.BatchNorm(running_average="pooled", skip_nonfinite=True),
    "GhostBatchNorm": nj.GhostBatchNorm(1, axis=-1),
    "Ghost": nj.Ghost(nj.BatchRenorm(), groups=1),
    "EvalNorm": nj.EvalNorm(1),
    "ExclusiveBatchNorm": nj.ExclusiveBatchNorm(),
    "KalmanNorm": nj.KalmanNorm(gain="computed"),
    "RunningNorm": nj.RunningNorm(),
}


@pytest.mark.parametrize("name", EXACT)
def test_are_the_statistics_of_all_valid_values(name):
    method, parts = EXACT[name], batches(tail=(3, 4))
    state = of_norm(method, parts)
    x = valid(parts)
    agree(state, moments(x, getattr(method, "unbiased_running_var", False)))
    if "count" in state:
        assert state["count"] == 1
    if "pool" in state:
        np.testing.assert_array_equal(state["pool"]["count"], x.size // 4)


@pytest.mark.parametrize(
    "method",
    (
        nj.IterativeNorm(group_size=2, unbiased_running_var=True),
        nj.DecorrelatedBatchNorm(group_size=2, stored="matrix", epsilon=1e-3),
        nj.StochasticWhiteningBatchNorm(group_size=2),
        nj.StochasticWhiteningBatchNorm(group_size=2, form="covariance"),
    ),
)
def test_of_whitening_are_covariances(method):
    parts = batches()
    state, x = of_norm(method, parts), valid(parts)
    groups = [x[:, i : i + 2].T for i in (0, 2)]
    cov = np.stack([np.cov(g, bias=not method.unbiased_running_var) for g in groups])
    agree(state, {"mean": x.mean(0)})
    if isinstance(method, nj.StochasticWhiteningBatchNorm):
        agree(state, {"var": x.var(0)})
        corr = np.stack([np.corrcoef(g) for g in groups]) if method.form == "covariance" else None
        leaf = "matrix" if corr is None else "cov"
        corr = np.stack([np.eye(2)] * 2) if corr is None else corr
        chex.assert_trees_all_close(state[leaf], corr.astype("float32"), atol=1e-5)
    elif method.stored == "covariance":
        close(state["cov"], cov.astype("float32"), 5e-6)
    else:
        product = state["matrix"] @ np.float32(cov + 1e-3 * np.eye(2)) @ state["matrix"]
        chex.assert_trees_all_close(product, np.stack([np.eye(2, dtype="float32")] * 2), atol=1e-5)


def test_of_spectra():
    parts = batches(tail=(4, 4, 3))
    state = of_norm(nj.SpectralBatchNorm(), parts)
    spectrum = np.fft.fft2(valid(parts), axes=(1, 2), norm="ortho")
    mean = spectrum.mean((0, 1, 2))
    var = (np.abs(spectrum - mean) ** 2).mean((0, 1, 2))
    agree(state, {"mean_real": mean.real, "var": var}, 2e-6)


def test_of_branches_are_those_of_their_own_batches():
    parts = [part | {"branch": np.int32(i % 2)} for i, part in enumerate(batches(sizes=(7,) * 4))]
    for method in (nj.AuxBatchNorm(3), nj.MultiStats(nj.BatchNorm(), 3)):
        state = of_norm(method, parts)
        for branch in (0, 1):
            mine = moments(valid(parts[branch::2]))
            agree({name: a[branch] for name, a in state.items()}, mine)
        chex.assert_trees_all_equal(state["var"][2], jnp.ones(4))


def test_of_conditioned_and_weighted_norms():
    parts = [
        {"x": p["x"], "weights": np.float32(i + p["mask"]), "condition": np.arange(len(p["x"])) % 3}
        for i, p in enumerate(batches())
    ]
    state = of_norm(nj.ConditionalBatchNorm(num_classes=3), parts)
    x = np.concatenate([p["x"] for p in parts]).astype("float64")
    w = np.concatenate([p["weights"] for p in parts])[:, 0]
    mean = np.average(x, 0, weights=w)
    agree(state, {"mean": mean, "var": np.average((x - mean) ** 2, 0, weights=w)})


def test_links_of_a_chain_follow_each_other():
    method, parts = nj.chain(nj.BatchNorm(), nj.Affine(), nj.BatchNorm()), batches()
    state, layerwise = of_norm(method, parts), of_norm(method, parts, layerwise=True)
    assert set(state) == {"BatchNorm_0", "BatchNorm_2"}
    agree(state["BatchNorm_0"], moments(valid(parts)))
    first = moments(valid(parts))
    z = (valid(parts) - first["mean"]) / np.sqrt(first["var"] + 1e-5)
    agree(layerwise["BatchNorm_2"], {"var": z.var(0)}, 1e-5)


class Net(nn.Module):
    """Two blocks with a dropout that must stay off."""

    @nn.compact
    def __call__(self, x, train, mask=None):
        for i in range(2):
            x = nn.Dense(4, name=f"dense_{i}")(x)
            norm = normjax.linen.BatchNorm(use_running_average=not train, name=f"norm_{i}")
            x = nn.relu(norm(x, mask=mask))
            x = nn.Dropout(0.5, deterministic=not train)(x)
        return x


evaluate = lambda net, batch: net(batch["x"], False, mask=batch["mask"])


def oracle(params, parts, layerwise):
    """Statistics of both norms in float64."""
    params, found = jax.tree.map(np.float64, params), {}
    xs = [part["x"].astype("float64") for part in parts]
    for i in range(2):
        dense = params[f"dense_{i}"]
        xs = [x @ dense["kernel"] + dense["bias"] for x in xs]
        seen = moments(valid([{"x": x, "mask": p["mask"]} for x, p in zip(xs, parts, strict=True)]))
        found[f"norm_{i}"] = seen
        for j, (x, part) in enumerate(zip(xs, parts, strict=True)):
            own = x[part["mask"].reshape(-1)] if not layerwise else None
            use = seen if layerwise else moments(own) if len(own) else {"mean": 0, "var": 1}
            xs[j] = np.maximum((x - use["mean"]) / np.sqrt(use["var"] + 1e-5), 0)
    return found


@pytest.mark.parametrize("layerwise", (False, True))
def test_of_layers_against_float64(layerwise):
    parts = batches(sizes=(7, 2, 12))
    variables = Net().init(KEY, parts[0]["x"], False)
    spoilt = jax.tree.map(lambda a: a * np.float32(np.nan), variables["batch_stats"])
    for given in (variables, variables | {"batch_stats": spoilt}):
        how = dict(variables=given, call=evaluate, layerwise=layerwise)
        new = population.recalibrate(Net(), parts, **how)["batch_stats"]
        wanted = oracle(variables["params"], parts, layerwise)
        agree(new["norm_0"], wanted["norm_0"], 2e-5)
        agree(new["norm_1"], wanted["norm_1"], 2e-4)


def test_evaluation_uses_exactly_these_whatever_the_batches():
    (whole,) = batches(sizes=(24,))
    variables = Net().init(KEY, whole["x"], False)
    pieces = [jax.tree.map(lambda a, i=i: a[i : i + 5], whole) for i in range(0, 24, 5)]
    for parts in (pieces, lambda: iter(pieces)):
        new = population.recalibrate(
            Net(), parts, variables=variables, call=evaluate, layerwise=True
        )
        seen = Net().apply(new, whole["x"], False, whole["mask"], mutable=["moments"])[1]
        for name, stats in new["batch_stats"].items():
            (found,) = seen["moments"][name]["seen"]
            close(stats["mean"], found.mean, 1e-5)
            close(stats["var"], found.var, 1e-5)


class Shared(nn.Module):
    """One norm for an input and twice the input."""

    @nn.compact
    def __call__(self, x, mask):
        norm = normjax.linen.BatchNorm(use_running_average=True)
        return norm(x, mask=mask) + norm(2 * x, mask=mask)


def test_a_shared_norm_has_the_statistics_of_all_calls():
    parts = batches()
    call = lambda net, batch: net(batch["x"], batch["mask"])
    variables = Shared().init(KEY, **parts[0])
    new = population.recalibrate(Shared(), parts, variables=variables, call=call)
    x = valid(parts)
    agree(new["batch_stats"]["BatchNorm_0"], moments(np.concatenate([x, 2 * x])))


def test_sums_do_not_round_with_their_number():
    parts = [{"x": 1e3 + draw(i, 3, 2)} for i in range(100)]
    state = of_norm(nj.BatchNorm(), parts)
    x = np.concatenate([part["x"] for part in parts]).astype("float64")
    agree(state, {"mean": x.mean(0)}, 1e-7)
    agree(state, {"var": x.var(0)}, 1e-5)


@pytest.mark.parametrize("layerwise", (False, True))
def test_on_a_mesh_as_on_one_device(layerwise):
    parts = batches(sizes=(16, 8))
    variables = Net().init(KEY, parts[0]["x"], False)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    shard = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
    how = dict(call=evaluate, layerwise=layerwise)
    one = population.recalibrate(Net(), parts, variables=variables, **how)
    divided = [shard(part, PartitionSpec("data")) for part in parts]
    placed = shard(variables, PartitionSpec())
    many = population.recalibrate(Net(), divided, variables=placed, **how)
    chex.assert_trees_all_close(many, one, rtol=1e-5, atol=1e-5)
    assert all(a.sharding.is_fully_replicated for a in jax.tree.leaves(many["batch_stats"]))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = nn.Dense(4, kernel_init=nn.initializers.orthogonal())(x)
        return normjax.linen.BatchNorm(use_running_average=True)(x), None


def test_of_layers_that_linen_scans_remats_and_maps():
    x = draw(0, 9, 4) + 3
    layers = nn.scan(nn.remat(Layer), length=3, **STACKED)()
    variables = layers.init(KEY, x)
    for layerwise in (False, True):
        how = dict(variables=variables, layerwise=layerwise)
        new = population.recalibrate(layers, [x], **how)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, variables)
        z = x.astype("float64")
        for i in range(3):
            params = jax.tree.map(lambda a, i=i: np.float64(a[i]), variables["params"])
            z = z @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
            own = jax.tree.map(lambda a, i=i: a[i], new["batch_stats"]["BatchNorm_0"])
            chex.assert_trees_all_close(own, jax.tree.map(np.float32, moments(z)), atol=1e-5)
            z = (z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5)
    models = nn.vmap(Layer, in_axes=(None, None), axis_size=2, **STACKED)()
    variables = models.init(KEY, x, None)
    new = population.recalibrate(
        models, [x[:5], x[5:]], variables=variables, call=lambda model, x: model(x, None)
    )
    z = x @ variables["params"]["Dense_0"]["kernel"]
    close(new["batch_stats"]["BatchNorm_0"]["var"], z.var(1), 1e-5)


def test_of_a_cell_that_linen_scans_over_time():
    class Steps(nn.Module):
        @nn.compact
        def __call__(self, xs):
            norm = normjax.linen.BatchNorm(use_running_average=True)
            if self.is_initializing():
                return norm(xs[0])
            body = lambda norm, _, x: (None, norm(x))
            carried = dict(variable_broadcast="params", variable_carry="batch_stats")
            return nn.scan(body, split_rngs={"params": False}, **carried)(norm, None, xs)[1]

    xs = draw(0, 3, 6, 4)
    new = population.recalibrate(Steps(), [xs], variables=Steps().init(KEY, xs))
    agree(new["batch_stats"]["BatchNorm_0"], moments(xs.astype("float64").reshape(-1, 4)), 2e-6)


class Own(normjax.nnx.BatchNorm):
    """A norm whose user has another signature."""

    def __call__(self, x, batch):
        return super().__call__(x, mask=batch["mask"])


class Blocks(nnx.Module):
    def __init__(self, rngs):
        self.norm = Own(4, running_average="cumulative", axis_name="data", rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        stack = nnx.vmap(lambda rngs: normjax.nnx.BatchNorm(4, momentum=0.5, rngs=rngs))
        self.stack = nnx.split_rngs(splits=2)(stack)(rngs)
        self.frozen = normjax.nnx.BatchNorm(4, use_running_average=True, rngs=rngs)

    def __call__(self, batch):
        x = self.dropout(nnx.relu(self.norm(batch["x"], batch)))

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def layers(norm, x):
            return jnp.sin(norm(x, mask=batch["mask"]))

        return self.frozen(layers(self.stack, x))


def test_a_model_of_nnx_changes_in_place():
    parts = batches()
    model = Blocks(nnx.Rngs(0))
    before = nnx.to_pure_dict(nnx.state(model))
    where = lambda path, method: path != ("frozen",)
    assert population.recalibrate(model, parts, where=where, layerwise=True) is model
    after = nnx.to_pure_dict(nnx.state(model))
    chex.assert_trees_all_equal_shapes_and_dtypes(after, before)
    chex.assert_trees_all_equal(after["frozen"], before["frozen"])
    x = valid(parts)
    agree(after["norm"], moments(x))
    assert after["norm"]["count"] == 1
    x = np.maximum((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), 0)
    for i in range(2):
        own = {name: after["stack"][name][i] for name in ("mean", "var")}
        chex.assert_trees_all_close(own, jax.tree.map(np.float32, moments(x)), atol=2e-5)
        x = np.sin((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5))


@pytest.mark.parametrize(
    ("method", "how", "message"),
    (
        (nj.BatchNorm(), dict(batches=[]), "no batches"),
        (nj.BatchNorm(), dict(batches=iter([]), layerwise=True), "list_iterator: give a list"),
        (nj.LayerNorm(), {}, "reaches no norm that has running statistics"),
        (nj.BatchNorm(), dict(where=lambda path, method: False), "reaches no norm"),
        (nj.Ghost(nj.chain(nj.BatchNorm()), 1), {}, "the norm: the statistics of Ghost cannot"),
        (nj.SpectralBatchNorm(unbiased_running_var=True), {}, "SpectralBatchNorm: unbiased_runn"),
        (nj.BatchNorm(axis_name="i", axis_index_groups=((0,),)), {}, "take layerwise=True"),
    ),
)
def test_what_cannot_be_recalibrated_is_an_error(method, how, message):
    norm, x = normjax.linen.Norm(method), jnp.ones((4, 2, 2, 3))
    how = {"batches": [{"x": x}], "call": call} | how
    with pytest.raises(ValueError, match=message):
        population.recalibrate(norm, variables=norm.init(KEY, x, True), **how)


def test_arguments_of_a_wrong_type_are_errors():
    norm = normjax.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="of NNX none"):
        population.recalibrate(norm, [], variables={})
    with pytest.raises(TypeError, match="of a Linen model"):
        population.recalibrate(normjax.linen.BatchNorm(), [])
    with pytest.raises(TypeError, match="not a module of flax"):
        population.recalibrate(nj.BatchNorm(), [])
    for batch in (np.ones((4, 3)), jnp.ones((4, 3)), {"x": jnp.ones((4, 3))}):
        with pytest.raises(TypeError, match="a single batch"):
            population.recalibrate(norm, batch)


def mixture(states, weights):
    """Mean and variance of a mixture, in float64."""
    w = np.asarray(weights, "float64")[:, None]
    w = w / w.sum()
    mean, var = (np.asarray(states[name], "float64") for name in ("mean", "var"))
    middle = (w * mean).sum(0)
    return {"mean": middle, "var": (w * (var + (mean - middle) ** 2)).sum(0)}


class TestSync:
    def test_is_the_mixture_of_replicas(self):
        states = {"mean": 100 + draw(0, 8, 3), "var": 1 + draw(1, 8, 3) ** 2}
        mesh = Mesh(np.array(jax.devices()), ("data",))
        for counts in (None, np.arange(1, 9, dtype="float32")):
            wanted = mixture(states, np.ones(8) if counts is None else counts)
            agree(population.sync({"norm": states}, counts=counts)["norm"], wanted)

            def one(own, count, given=counts):
                own, count = jax.tree.map(lambda a: a[0], (own, count))
                return population.sync(own, axis_name="data", counts=count)

            whole, rows = PartitionSpec(), PartitionSpec("data")
            specs = rows, whole if counts is None else rows
            run = jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=whole)
            agree(jax.jit(run)(states, counts), wanted)

    def test_of_pooled_states_is_that_of_all_values(self):
        method, parts = nj.BatchNorm(running_average="pooled"), batches()
        _, start = method.init(None, 4)
        absorbed = [method.absorb(start, method.observe(p["x"], p["mask"])) for p in parts]
        one = population.sync(jax.tree.map(lambda *a: jnp.stack(a), *absorbed))
        agree(one._asdict(), moments(valid(parts)))
        np.testing.assert_array_equal(one.pool.count, len(valid(parts)))
        chex.assert_trees_all_equal(population.sync(jax.tree.map(lambda a: a[None], start)), start)

    def test_of_covariances_spectra_and_counts(self):
        method = nj.IterativeNorm(group_size=2, last_group="smaller", running_average="cumulative")
        xs = np.stack([draw(i, 40, 3) * (i + 1) + i for i in range(2)])
        _, start = method.init(None, 3)
        absorb = lambda method, start: jax.vmap(lambda x: method.absorb(start, method.observe(x)))
        states = jax.jit(absorb(method, start))(xs)
        one = population.sync(jax.tree.map(lambda a: a[:, None], states))
        close(one.cov[0, 0], np.cov(xs.reshape(-1, 3).T, bias=True)[:2, :2].astype("float32"), 1e-5)
        assert one.count.tolist() == [1.0]
        method = nj.SpectralBatchNorm(spectrum="half", momentum=0.0)
        maps = np.stack([draw(i, 6, 4, 4, 2) + i for i in range(2)])
        _, start = method.init(None, 2)
        one = population.sync(jax.jit(absorb(method, start))(maps))
        both = jax.jit(absorb(method, start))(maps.reshape(1, 12, 4, 4, 2))
        chex.assert_trees_all_close(one, jax.tree.map(lambda a: a[0], both), rtol=1e-5, atol=1e-6)

    def test_what_cannot_be_merged_is_an_error(self):
        _, state = nj.IterativeNorm(stored="matrix").init(None, 4)
        with pytest.raises(ValueError, match="norm/matrix: whitening matrices"):
            population.sync({"norm": state})
        with pytest.raises(ValueError, match="first axis of all"):
            population.sync({"mean": jnp.zeros((2, 3)), "var": jnp.zeros((3, 3))})
