"""Labels, decay masks, divided learning rates, freezing, and the recipe that they make up."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import vector_files
from flax import linen as nn
from flax import nnx as fnnx

import normjax as nj
from normjax import linen, nnx, optim, paths

KEY = jax.random.key(0)
OPTIMIZER_FILES = vector_files.names("bn_param_groups")


def by_path(tree):
    """Leaves by path, the variables of NNX as their values."""
    names, leaves, _ = paths.flatten(tree)
    return dict(zip(map("/".join, names), leaves, strict=True))


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


class Linen(nn.Module):
    """A layer of every kind, most of them with one feature."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(5, 4, name="embed")(tokens)
        x = nn.Conv(4, (3,), name="conv")(x)
        x = nn.BatchNorm(use_running_average=True, name="batch")(x)
        x = nn.BatchNorm(True, use_scale=False, name="batch_shift")(x)
        x = nn.GroupNorm(2, name="group")(x)
        x = nn.MultiHeadDotProductAttention(2, normalize_qk=True, name="attention")(x, x)
        x = nn.PReLU(name="prelu")(x)
        x = linen.Norm(nj.chain(nj.LayerNorm(), nj.Affine(use_bias=False)), name="chain")(x)
        x = linen.DynamicTanh(name="tanh")(x)
        x = linen.RMSNorm(name="rms")(x)
        x = linen.BatchNorm(use_bias=False, name="input")(x, use_running_average=True)
        x = linen.Norm(nj.Ghost(nj.BatchNorm(), groups=1), name="ghost")(x, True)
        x = linen.InstanceNorm(use_scale=False, use_bias=False, name="bare")(x)
        x = nn.WeightNorm(nn.Dense(3, name="dense"), name="weight_norm")(x)
        x = nn.Dense(1, name="one")(x)
        return nn.LayerNorm(name="layer_of_one")(x)


LINEN = {
    "attention/key/bias": "bias",
    "attention/key/kernel": "kernel",
    "attention/key_ln/scale": "norm_scale",
    "attention/out/bias": "bias",
    "attention/out/kernel": "kernel",
    "attention/query/bias": "bias",
    "attention/query/kernel": "kernel",
    "attention/query_ln/scale": "norm_scale",
    "attention/value/bias": "bias",
    "attention/value/kernel": "kernel",
    "batch/bias": "norm_bias",
    "batch/scale": "norm_scale",
    "batch_shift/bias": "norm_bias",
    "chain/Affine_1/scale": "norm_scale",
    "chain/LayerNorm_0/bias": "norm_bias",
    "chain/LayerNorm_0/scale": "norm_scale",
    "conv/bias": "bias",
    "conv/kernel": "kernel",
    "dense/bias": "bias",
    "dense/kernel": "kernel",
    "embed/embedding": "embedding",
    "ghost/bias": "norm_bias",
    "ghost/scale": "norm_scale",
    "group/bias": "norm_bias",
    "group/scale": "norm_scale",
    "input/scale": "norm_scale",
    "layer_of_one/bias": "norm_bias",
    "layer_of_one/scale": "norm_scale",
    "one/bias": "bias",
    "one/kernel": "kernel",
    "prelu/negative_slope": "other",
    "rms/scale": "norm_scale",
    "tanh/alpha": "other",
    "tanh/bias": "norm_bias",
    "tanh/scale": "norm_scale",
    "weight_norm/dense/kernel/scale": "norm_scale",
}


class Nnx(fnnx.Module):
    def __init__(self, rngs):
        self.embed = fnnx.Embed(5, 4, rngs=rngs)
        self.conv = fnnx.Conv(4, 4, (3,), rngs=rngs)
        self.batch = fnnx.BatchNorm(4, rngs=rngs)
        self.group = fnnx.GroupNorm(4, num_groups=2, rngs=rngs)
        self.attention = fnnx.MultiHeadAttention(
            2, 4, normalize_qk=True, use_bias=False, decode=False, rngs=rngs
        )
        self.prelu = fnnx.PReLU()
        self.chain = nnx.Norm(nj.chain(nj.LayerNorm(), nj.Affine()), 4, rngs=rngs)
        self.input = nnx.BatchNorm(4, use_bias=False, rngs=rngs)
        self.shift = nnx.BatchNorm(4, use_scale=False, rngs=rngs)
        self.head = fnnx.Sequential(
            fnnx.Linear(4, 1, rngs=rngs), fnnx.LayerNorm(1, rngs=rngs), fnnx.RMSNorm(1, rngs=rngs)
        )

    def __call__(self, tokens):
        x = self.prelu(self.attention(self.group(self.batch(self.conv(self.embed(tokens))))))
        return self.head(self.shift(self.input(self.chain(x))))


NNX = {
    "attention/key/kernel": "kernel",
    "attention/key_ln/scale": "norm_scale",
    "attention/out/kernel": "kernel",
    "attention/query/kernel": "kernel",
    "attention/query_ln/scale": "norm_scale",
    "attention/value/kernel": "kernel",
    "batch/bias": "norm_bias",
    "batch/scale": "norm_scale",
    "chain/Affine_1/bias": "norm_bias",
    "chain/Affine_1/scale": "norm_scale",
    "chain/LayerNorm_0/bias": "norm_bias",
    "chain/LayerNorm_0/scale": "norm_scale",
    "conv/bias": "bias",
    "conv/kernel": "kernel",
    "embed/embedding": "embedding",
    "group/bias": "norm_bias",
    "group/scale": "norm_scale",
    "head/layers/0/bias": "bias",
    "head/layers/0/kernel": "kernel",
    "head/layers/1/bias": "norm_bias",
    "head/layers/1/scale": "norm_scale",
    "head/layers/2/scale": "norm_scale",
    "input/scale": "norm_scale",
    "prelu/negative_slope": "other",
    "shift/bias": "norm_bias",
}
TOKENS = jnp.zeros((2, 6), jnp.int32)


def ones(shapes):
    return jax.tree.map(lambda a: np.ones(a.shape, a.dtype), shapes)


@functools.cache
def linen_params():
    return ones(jax.eval_shape(Linen().init, KEY, TOKENS)["params"])


@functools.cache
def nnx_params():
    return fnnx.state(fnnx.eval_shape(lambda: Nnx(fnnx.Rngs(0))), fnnx.Param)


def test_labels_of_linen_modules():
    labels = optim.label_parameters(linen_params())
    chex.assert_trees_all_equal_structs(labels, linen_params())
    expected = dict(LINEN)
    assert by_path(labels) == expected


def test_labels_of_nnx_modules():
    state = nnx_params()
    labels = optim.label_parameters(state)
    chex.assert_trees_all_equal_structs(labels, state)
    assert by_path(labels) == NNX


def test_labels_of_methods():
    def labels(method):
        return optim.label_parameters(method.init(KEY, 1)[0])

    assert labels(nj.BatchNorm()) == nj.AffineParams("norm_scale", "norm_bias")
    assert labels(nj.RMSNorm()) == nj.AffineParams("norm_scale", None)
    assert labels(nj.BatchNorm(use_scale=False)) == nj.AffineParams(None, "norm_bias")
    assert labels(nj.DynamicTanh()).alpha == "other"
    assert labels(nj.InstanceNorm(use_scale=False, use_bias=False)) == nj.AffineParams()
    both = {"BatchNorm_0": nj.AffineParams("norm_scale", "norm_bias"), "LayerNorm_1": ()}
    method = nj.chain(nj.BatchNorm(), nj.LayerNorm(use_scale=False, use_bias=False))
    assert labels(method) == both | {"LayerNorm_1": nj.AffineParams()}


def test_labels_of_other_trees():
    assert optim.label_parameters(jnp.ones(3)) == "other"
    assert optim.label_parameters([{"bias": 0.0, "w": 0.0}]) == [{"bias": "bias", "w": "other"}]
    tree = {"quantized": {"kernel": 0.0, "scale": 0.0, "bias": 0.0}}
    labels = {"quantized": {"kernel": "kernel", "scale": "other", "bias": "bias"}}
    assert optim.label_parameters(tree) == labels
    boxed = nn.Dense(1, kernel_init=nn.with_partitioning(nn.initializers.ones, ("a", None)))
    labels = optim.label_parameters(boxed.init(KEY, jnp.ones((1, 2)))["params"])
    assert by_path(labels) == {"bias": "bias", "kernel": "kernel"}


def test_labels_beside_masked_parts():
    """A transformation inside a mask sees no kernel where the outer one keeps it to itself."""
    masked = {"dense": {"kernel": optax.MaskedNode(), "bias": 0.0}}
    labels = {"dense": {"kernel": optax.MaskedNode(), "bias": "bias"}}
    assert optim.label_parameters(masked) == labels


def test_label_overrides():
    params = {"pos": {"table": 0.0}, "a": {"scale": 0.0, "bias": 0.0}, "ab": {"scale": 0.0}}
    labels = optim.label_parameters(params, {"pos": "embedding", "a*": "other", "a/b*": "kernel"})
    assert labels == {
        "pos": {"table": "embedding"},
        "a": {"scale": "other", "bias": "kernel"},
        "ab": {"scale": "other"},
    }
    assert optim.label_parameters(params, {"a": "kernel"})["ab"] == {"scale": "norm_scale"}


def test_multi_transform_takes_the_labels():
    rates = {label: 1.0 + i for i, label in enumerate(optim.LABELS)}
    optimizer = optax.multi_transform(
        {label: optax.sgd(rate) for label, rate in rates.items()}, optim.label_parameters
    )
    found = optim.effective_learning_rates(optimizer, linen_params())
    assert found == {path: rates[label] for path, label in LINEN.items()}


def test_decay_mask():
    mask = optim.decay_mask(linen_params())
    decayed = {path for path, decays in by_path(mask).items() if decays}
    expected = {path for path, label in LINEN.items() if label in ("kernel", "embedding")}
    assert decayed == expected
    mask = optim.decay_mask(linen_params(), ["other"], {"embed": "other"})
    assert {p for p, m in by_path(mask).items() if m} == {
        "embed/embedding", "prelu/negative_slope", "tanh/alpha"
    }  # fmt: skip


@pytest.mark.parametrize("wrap", [optax.adamw, optax.lion])
def test_decay_mask_leaves_norms_and_biases_untouched(wrap):
    params = jax.tree.map(lambda a: a + 1, linen_params())
    optimizer = wrap(0.5, weight_decay=0.25, mask=optim.decay_mask)

    @jax.jit
    def step(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = optimizer.update(zeros, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    moved = by_path(step(params))
    for path, before in by_path(params).items():
        decays = LINEN[path] in ("kernel", "embedding")
        np.testing.assert_allclose(moved[path], before * (1 - 0.125 * decays), rtol=1e-6)


def two_norms(g0=1.0):
    """Images to 3 logits through two batch norms; the first dense layers have no bias."""
    initial = dict(scale_init=jax.nn.initializers.constant(g0), epsilon=0.0)
    return nn.Sequential(
        [
            nn.Dense(16, use_bias=False),
            linen.BatchNorm(False, **initial, activation=nn.relu),
            nn.Dense(16, use_bias=False),
            linen.BatchNorm(False, **initial, activation=nn.relu),
            nn.Dense(3),
        ]
    )


def start(network):
    return jax.jit(network.init)(KEY, X)


X = draw(0, 32, 8)
LABELS = jnp.arange(32) % 3


@functools.cache
def gradients(g0=1.0):
    network = two_norms(g0)
    variables = start(network)

    def loss(params):
        logits, _ = network.apply(variables | {"params": params}, X, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

    return variables["params"], jax.jit(jax.grad(loss))(variables["params"])


@pytest.mark.parametrize("g0", [0.1, 0.5])
def test_initial_scales_and_logits(g0):
    """A chain's norms undo the scale before them: the last one's is left, as a factor."""
    plain, small = (start(two_norms(g)) for g in (1.0, g0))
    scales = [v for p, v in by_path(small["params"]).items() if p.endswith("scale")]
    assert len(scales) == 2
    chex.assert_trees_all_equal(scales, [np.full(16, np.float32(g0))] * 2)
    apply = jax.jit(functools.partial(two_norms().apply, mutable=["batch_stats"]))
    logits, shrunk = (apply(variables, X)[0] for variables in (plain, small))
    np.testing.assert_allclose(shrunk, g0 * logits, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(shrunk.std(), g0 * logits.std(), rtol=1e-5)


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize("c", [1.0, 10, np.float64(100), jnp.float32(100)])
def test_one_step_of_the_recipe(c):
    params, grads = gradients(0.1)
    optimizer = optim.batch_norm_init_recipe(0.5, c=c, weight_decay=0.25)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    updates, grads, params = by_path(updates), by_path(grads), by_path(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    for path in params:
        kind = path.rpartition("/")[2]
        expected = grads[path] + (0.25 * params[path] if kind == "kernel" else 0)
        rate = 0.5 / float(c) if kind == "scale" else 0.5
        np.testing.assert_allclose(updates[path], -rate * expected, rtol=1e-6, atol=1e-9)


def test_neutral_recipe_is_the_baseline_bit_for_bit():
    """g0 = 1 and c = 1 against the optimizer and the norms that know nothing of either."""
    schedule = optax.cosine_decay_schedule(0.1, 20)
    kernels = functools.partial(
        jax.tree_util.tree_map_with_path, lambda path, _: path[-1].key == "kernel"
    )
    baseline = optax.chain(
        optax.add_decayed_weights(1e-4, kernels), optax.sgd(schedule, momentum=0.9)
    )
    plain = two_norms()
    layers = [
        linen.BatchNorm(False, epsilon=0.0, activation=nn.relu) if i in (1, 3) else layer
        for i, layer in enumerate(plain.layers)
    ]
    recipe = optim.batch_norm_init_recipe(schedule, c=1)
    ends = []
    for network, optimizer in ((nn.Sequential(layers), baseline), (plain, recipe)):
        variables = start(network)

        @jax.jit
        def step(params, stats, state, network=network, optimizer=optimizer):
            def loss(params):
                variables = {"params": params, "batch_stats": stats}
                logits, new = network.apply(variables, X, mutable=["batch_stats"])
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
                return losses.mean(), new["batch_stats"]

            grads, stats = jax.grad(loss, has_aux=True)(params)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), stats, state

        carry = variables["params"], variables["batch_stats"], optimizer.init(variables["params"])
        for _ in range(5):
            carry = step(*carry)
        ends.append(carry[:2])
    chex.assert_trees_all_equal(*ends)
    assert not np.array_equal(ends[0][0]["layers_1"]["scale"], np.ones(16))


def test_scales_follow_the_schedule_and_the_momentum():
    params = {"norm": nj.AffineParams(jnp.ones(2), jnp.ones(2))}
    schedule = optax.exponential_decay(0.5, 1, 0.5)
    optimizer = optim.batch_norm_init_recipe(schedule, c=8.0, momentum=0.5)
    state, velocity = optimizer.init(params), 0.0
    for step in range(4):
        grads = {"norm": nj.AffineParams(jnp.full(2, 1.0 + step), jnp.full(2, 1.0 + step))}
        rates = optim.effective_learning_rates(optimizer, params, state)
        assert rates == {"norm/scale": 0.5**step / 16, "norm/bias": 0.5**step / 2}
        updates, state = optimizer.update(grads, state, params)
        velocity = 0.5 * velocity + 1.0 + step
        np.testing.assert_allclose(updates["norm"].bias, -(0.5**step) / 2 * velocity)
        np.testing.assert_allclose(updates["norm"].scale, updates["norm"].bias / 8)


def test_scaling_the_update_slows_adam_too():
    """What scaling the gradient would not."""
    params, grads = gradients(0.1)
    plain, slow = optax.adam(0.1), optax.chain(optax.adam(0.1), optim.scale_learning_rate(100.0))
    ours, theirs = (
        by_path(jax.jit(lambda g, p, o=o: o.update(g, o.init(p))[0])(grads, params))
        for o in (slow, plain)
    )
    for path in ours:
        factor = 0.01 if path.endswith("scale") else 1.0
        np.testing.assert_allclose(ours[path], factor * theirs[path], rtol=1e-6)


def test_recipe_in_bfloat16_and_with_injected_arguments():
    params = {"norm": {"scale": jnp.ones(2, jnp.bfloat16)}, "kernel": jnp.ones(2, jnp.bfloat16)}
    optimizer = optax.inject_hyperparams(optim.batch_norm_init_recipe)(0.5, c=4.0, weight_decay=0.0)
    state = optimizer.init(params)
    updates, state = jax.jit(optimizer.update)(params, state, params)
    assert updates["norm"]["scale"].tolist() == [-0.125, -0.125]
    assert updates["kernel"].tolist() == [-0.5, -0.5]
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    state.hyperparams["c"] = jnp.float32(2.0)
    updates, _ = jax.jit(optimizer.update)(params, state, params)
    np.testing.assert_array_equal(updates["norm"]["scale"], updates["kernel"] / 2)


def test_input_norm_learns_slowly_and_has_no_shift():
    network = nn.Sequential(
        [linen.BatchNorm(use_running_average=False, use_bias=False), nn.Dense(2)]
    )
    variables = start(network)
    params = variables["params"]
    (name,) = (path for path in by_path(params) if "scale" in path)
    assert by_path(optim.label_parameters(params))[name] == "norm_scale"
    rates = optim.effective_learning_rates(optim.batch_norm_init_recipe(0.5, c=100), params)
    assert rates[name] == pytest.approx(0.005)
    assert len(by_path(params)) == 3

    def loss(params):
        y, _ = network.apply(variables | {"params": params}, X, mutable=["batch_stats"])
        return jnp.square(y).mean()

    slopes = jax.jit(jax.grad(loss))(params)
    assert (np.abs(by_path(slopes)[name]) > 1e-6).all()


@pytest.mark.parametrize("front", ["linen", "nnx"])
def test_freeze_a_part_of_a_network(front):
    """Affine and statistics of one norm stay bit for bit; the other's move."""
    optimizer = optax.chain(
        optim.batch_norm_init_recipe(0.5, weight_decay=0.1), optim.freeze("*1*", "*2")
    )
    if front == "linen":
        network = two_norms()
        variables = start(network)

        @jax.jit
        def step(variables, state):
            def loss(params):
                y, new = network.apply(variables | {"params": params}, X, mutable=["batch_stats"])
                return jnp.square(y - 1).mean(), new["batch_stats"]

            grads, stats = jax.grad(loss, has_aux=True)(variables["params"])
            updates, state = optimizer.update(grads, state, variables["params"])
            params = optax.apply_updates(variables["params"], updates)
            stats = optim.keep_statistics(stats, variables["batch_stats"], "layers_1")
            return {"params": params, "batch_stats": stats}, state

        first, state = variables, optimizer.init(variables["params"])
        for _ in range(3):
            variables, state = step(variables, state)
        before, after = by_path(first), by_path(variables)
        frozen = {path for path in before if "layers_1" in path or "params/layers_2" in path}
    else:
        rngs = fnnx.Rngs(0)
        model = fnnx.Sequential(
            fnnx.Linear(8, 4, rngs=rngs),
            nnx.BatchNorm(4, rngs=rngs),
            fnnx.Linear(4, 4, rngs=rngs),
            nnx.BatchNorm(4, rngs=rngs),
        )
        held = fnnx.Optimizer(model, optimizer, wrt=fnnx.Param)
        before = by_path(jax.tree.map(lambda a: a, fnnx.state(model)))
        before = {path: np.asarray(value) for path, value in before.items()}

        @fnnx.jit
        def step(model, held):
            old = jax.tree.map(lambda a: a, fnnx.state(model, fnnx.BatchStat))
            grads = fnnx.grad(lambda m: jnp.square(m(X) - 1).mean())(model)
            held.update(model, grads)
            new = fnnx.state(model, fnnx.BatchStat)
            fnnx.update(model, optim.keep_statistics(new, old, "layers/1"))

        for _ in range(3):
            step(model, held)
        after = by_path(fnnx.state(model))
        frozen = {path for path in before if path.startswith(("layers/1/", "layers/2/"))}
    assert len(frozen) in (5, 6)
    for path in before:
        assert np.array_equal(before[path], after[path]) == (path in frozen), path


def test_frozen_updates_are_zero_even_if_not_finite():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    optimizer = optim.freeze("a")
    updates, _ = optimizer.update(
        {"a": jnp.array([jnp.nan, jnp.inf]), "b": jnp.ones(2)}, optimizer.init(params)
    )
    assert updates["a"].tolist() == [0, 0]
    assert updates["b"].tolist() == [1, 1]


def test_effective_learning_rates_are_measured():
    params = linen_params()
    optimizer = optax.chain(
        optim.batch_norm_init_recipe(0.5, c=4.0, weight_decay=0.3), optim.freeze("attention")
    )
    expected = {
        path: 0.0 if path.startswith("attention/") else 0.125 if label == "norm_scale" else 0.5
        for path, label in LINEN.items()
    }
    assert optim.effective_learning_rates(optimizer, params) == pytest.approx(expected)
    state = ones(nnx_params())
    rates = optim.effective_learning_rates(optax.sgd(0.5, 0.5, nesterov=True), state)
    assert rates == dict.fromkeys(NNX, 0.75)


# The names of the recorded parameters in Flax, and where the recorded grouping, by shape, goes
# wrong: a norm of one feature is decayed and not slowed, the slope of a PReLU and the kernel of a
# dense layer with one output are slowed and the latter is not decayed, its bias is.
FLAX = {"bn1.weight": "bn1/scale", "bn_single.weight": "bn_single/scale"}
FLAX |= {"act.weight": "act/negative_slope"}
MISFILED = {
    "bn_single/scale": "kernel",
    "bn_single/bias": "kernel",
    "act/negative_slope": "norm_scale",
    "head/kernel": "norm_scale",
    "head/bias": "kernel",
}
# Ours by name, and by hand what a name does not tell: file 0 and 1 decay "temperature", file 2 has
# it and a kernel in its list of exceptions, which makes the latter slow.
BY_HAND = {
    "bn_param_groups_0": {"temperature": "kernel"},
    "bn_param_groups_1": {"temperature": "kernel"},
    "bn_param_groups_2": {"fc/kernel": "norm_scale"},
}


def recorded(name):
    """Configuration, and parameters before and after each of three steps and gradients by path."""
    config, arrays = vector_files.load(name)
    kept = {}
    for entry in config["parameters"]:
        torch = entry["torch_name"]
        path = FLAX.get(torch) or torch.replace(".", "/").replace("weight", "kernel")
        values = [
            arrays.get(f"p_{k}_{entry['key']}", arrays[f"p_0_{entry['key']}"]) for k in range(4)
        ]
        grads = [arrays.get(f"g_{k}_{entry['key']}", np.zeros_like(values[0])) for k in (1, 2, 3)]
        kept[path] = values, grads
    return config, kept


def nested(flat):
    tree = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jnp.asarray(value)
    return tree


def three_steps(name, overrides):
    """Our parameters by path after each step."""
    config, kept = recorded(name)
    optimizer = optax.chain(
        optim.batch_norm_init_recipe(
            config["learning_rate"],
            c=config["c"],
            momentum=config["sgd_momentum"],
            weight_decay=config["weight_decay"],
            overrides=overrides,
        ),
        optim.freeze("frozen"),
    )
    params = nested({path: values[0] for path, (values, _) in kept.items()})
    state = optimizer.init(params)

    @jax.jit
    def advance(grads, state, params):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    found = []
    for step in range(3):
        grads = nested({path: grads[step] for path, (_, grads) in kept.items()})
        params, state = advance(grads, state, params)
        found.append(by_path(params))
    return found


@pytest.mark.parametrize("name", OPTIMIZER_FILES)
def test_recorded_steps(name):
    """Three steps of the public implementation, and what is right where it errs."""
    config, kept = recorded(name)
    with jax.enable_x64(True):
        found = three_steps(name, BY_HAND[name])
    for path, (values, grads) in kept.items():
        if path not in MISFILED:
            for step in range(3):
                np.testing.assert_allclose(found[step][path], values[step + 1], rtol=0, atol=1e-10)
            continue
        rate = config["learning_rate"] / (config["c"] if path.endswith("scale") else 1)
        decay = config["weight_decay"] if path.endswith("kernel") else 0
        right, velocity = values[0], 0
        for step in range(3):
            velocity = config["sgd_momentum"] * velocity + grads[step] + decay * right
            right = right - rate * velocity
            np.testing.assert_allclose(found[step][path], right, rtol=0, atol=1e-10)
        same = config["c"] == 1 and path == "act/negative_slope"
        assert (np.abs(right - values[3]).max() < 1e-10) == same, path


@pytest.mark.parametrize("name", OPTIMIZER_FILES)
def test_recorded_steps_with_the_recorded_grouping(name):
    with jax.enable_x64(True):
        found = three_steps(name, MISFILED | BY_HAND[name])
    for path, (values, _) in recorded(name)[1].items():
        for step in range(3):
            np.testing.assert_allclose(found[step][path], values[step + 1], rtol=0, atol=1e-10)


NORM = {"norm": {"scale": np.ones(2)}}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: optim.scale_learning_rate(0), "scale_learning_rate: c=0 is not a finite number >"),
        (lambda: optim.scale_learning_rate(-1.0), "c=-1.0 is not"),
        (lambda: optim.scale_learning_rate(float("nan")), "c=nan is not"),
        (lambda: optim.scale_learning_rate("2"), "c='2' is not"),
        (lambda: optim.scale_learning_rate(2).init({"w": 1.0}), "no parameter is the scale of a"),
        (lambda: optim.batch_norm_init_recipe(-0.1), "recipe: learning_rate=-0.1 is not a finite"),
        (lambda: optim.batch_norm_init_recipe(0.1, c=0), "c=0 is not"),
        (lambda: optim.batch_norm_init_recipe(weight_decay=-1), "weight_decay=-1 is not"),
        (lambda: optim.batch_norm_init_recipe(momentum=1), "momentum=1 is not in [0, 1)"),
        (lambda: optim.batch_norm_init_recipe(momentum=-0.5), "momentum=-0.5 is not"),
        (lambda: optim.freeze().init(NORM), "freeze: no patterns"),
        (
            lambda: optim.freeze("nrom").init(NORM),
            "freeze: the pattern 'nrom' matches none of norm/",
        ),
        (lambda: optim.freeze("norm", "x").init(NORM), "the pattern 'x' matches none"),
        (lambda: optim.label_parameters(NORM, {"x": "bias"}), "label_parameters: the pattern 'x'"),
        (
            lambda: optim.label_parameters(NORM, {"norm": "gamma"}),
            "label_parameters: overrides='gamma' is not 'norm_scale' or",
        ),
        (lambda: optim.decay_mask(NORM, ["gamma"]), "decay_mask: labels='gamma' is not"),
        (lambda: optim.keep_statistics(NORM, NORM), "keep_statistics: no patterns"),
        (lambda: optim.keep_statistics(NORM, NORM, "x"), "the pattern 'x' matches none"),
        (lambda: optim.keep_statistics(NORM, {}, "norm"), "statistics differ in norm/scale"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
