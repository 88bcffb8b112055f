"""Norms folded into the layers beside them: `normjax.folding`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import close, draw
from flax import nnx

import normjax as nj
from normjax import folding
from normjax import linen as norms
from normjax import nnx as nnx_norms

KEY = jax.random.key(0)
IMAGES = draw(0, 2, 8, 8, 3)
TOLERANCE = 1e-5


def value(name, shape, rng):
    """Random numbers for a variable of this name: none of them is what training starts with."""
    a = rng.normal(size=shape)
    if name == "var":
        return 0.5 + a**2
    if name in ("cov", "matrix"):
        return 0.5 * np.eye(shape[-1]) + a @ a.swapaxes(-1, -2) / shape[-1]
    if name == "scale":
        return 1 + 0.3 * a
    return a / np.sqrt(np.prod(shape[:-1])) if name == "kernel" else a


def variables(model, *args, dtype=None, **kwargs):
    """Random variables of a Linen model."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: model.init(KEY, *args, **kwargs))
    draw = lambda path, a: jnp.asarray(value(path[-1].key, a.shape, rng), dtype or a.dtype)
    return jax.tree.map_with_path(draw, shapes)


def randomized(model):
    """An NNX model in evaluation, with random variables."""
    rng = np.random.default_rng(1)
    for path, variable in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))):
        variable.set_value(jnp.asarray(value(path[-1], variable.shape, rng), variable.dtype))
    model.eval()
    return model


class ResNet(nn.Module):
    """A block that halves the maps and has a convolution in its shortcut."""

    method: nj.Method | None
    use_bias: bool = False

    @nn.compact
    def __call__(self, x, **inputs):
        def normalized(name, x, *args, **how):
            x = nn.Conv(*args, use_bias=self.use_bias, name=f"conv_{name}", **how)(x)
            if self.method is None:
                return x
            norm = norms.Norm(self.method, use_running_average=True, name=f"norm_{name}")
            return norm(x, **inputs)

        x = nn.relu(normalized("stem", x, 6, (3, 3)))
        y = nn.relu(normalized("a", x, 6, (3, 3), strides=2))
        y = normalized("b", y, 6, (3, 3)) + normalized("c", x, 6, (1, 1), strides=2)
        return nn.Dense(5)(nn.relu(y).mean((1, 2)))


class NnxResNet(nnx.Module):
    """As `ResNet`."""

    def __init__(self, method, rngs):
        self.convs, self.norms = nnx.Dict(), nnx.Dict()
        for name in ("stem", "a", "b", "c"):
            inputs, size = 3 if name == "stem" else 6, 1 if name == "c" else 3
            strides = 2 if name in ("a", "c") else 1
            how = dict(strides=strides, use_bias=False, rngs=rngs)
            self.convs[name] = nnx.Conv(inputs, 6, (size, size), **how)
            self.norms[name] = nnx_norms.Norm(method, 6, rngs=rngs)
        self.head = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x, **inputs):
        normalized = lambda name, x: self.norms[name](self.convs[name](x), **inputs)
        x = nnx.relu(normalized("stem", x))
        y = normalized("b", nnx.relu(normalized("a", x))) + normalized("c", x)
        return self.head(nnx.relu(y).mean((1, 2)))


METHODS = (
    (nj.BatchNorm(), {}),
    (nj.BatchNorm(use_scale=False, use_bias=False, activation=jax.nn.gelu), {}),
    (nj.BatchRenorm(), {}),
    (nj.Ghost(nj.KalmanNorm(), groups=2), {}),
    (nj.GhostBatchNorm(2), {}),
    (nj.RunningNorm(clip=1.5), {}),
    (nj.Ghost(nj.ConditionalBatchNorm(num_classes=4), groups=2), {"condition": 3}),
    (nj.SandwichAuxBatchNorm(2), {"branch": 1}),
    (nj.MultiStats(nj.BatchNorm(), 2), {"branch": 1}),
    (nj.Affine(use_scale=False), {}),
    (nj.IterativeNorm(group_size=4, last_group="smaller"), {}),
    (nj.DecorrelatedBatchNorm(group_size=2, shared_matrix=True, stored="matrix"), {}),
    (nj.StochasticWhiteningBatchNorm(activation=jax.nn.relu), {}),
)


@pytest.mark.parametrize(("method", "inputs"), METHODS)
def test_a_resnet_of_linen(method, inputs):
    model = ResNet(method)
    old = variables(model, IMAGES, **inputs)
    done = folding.fold(model, old, IMAGES, norm_inputs=inputs, **inputs)
    names = ("stem", "a", "b", "c")
    assert done.folded == {f"norm_{name}": (f"conv_{name}",) for name in names}
    assert done.kept == {} and done.relative <= TOLERANCE
    wanted = jax.jit(lambda x: model.apply(old, x, **inputs))(IMAGES)
    y = jax.jit(lambda x: done.model.apply(done.variables, x, **inputs))(IMAGES)
    close(y, wanted, TOLERANCE)
    np.testing.assert_allclose(done.absolute, np.max(np.abs(y - wanted)), atol=1e-6)
    assert list(done.variables) == ["params"]
    if not getattr(method, "activation", None) and not hasattr(method, "clip"):
        without = ResNet(None, use_bias=True)  # the same code without norms takes the variables
        close(jax.jit(without.apply)(done.variables, IMAGES), wanted, TOLERANCE)


QUICK = 1, 8, 10  # an activation, a branch, matrices: what models and not arrays must get right


@pytest.mark.parametrize(
    ("method", "inputs"),
    [
        pytest.param(*case, marks=[] if i in QUICK else [pytest.mark.slow])
        for i, case in enumerate(METHODS)
    ],
)
def test_a_resnet_of_nnx(method, inputs):
    model = randomized(NnxResNet(method, nnx.Rngs(0)))
    done = folding.fold(model, IMAGES, norm_inputs=inputs, **inputs)
    assert len(done.folded) == 4 and done.kept == {} and done.relative <= TOLERANCE
    assert done.folded["norms/c"] == ("convs/c",) and done.variables is None
    close(done.model(IMAGES, **inputs), model(IMAGES, **inputs), TOLERANCE)
    assert nnx.state(done.model, nnx.BatchStat) == nnx.State({})
    assert isinstance(model.norms["c"], nnx_norms.Norm)
    assert isinstance(done.model.norms["c"], folding.Rest)


LAYERS = {
    "dense": (nn.Dense(6), (2, 4)),
    "grouped": (nn.Conv(6, (3,), strides=2, feature_group_count=2, padding="VALID"), (2, 9, 4)),
    "dilated": (nn.Conv(6, (2, 3), kernel_dilation=2, padding="CIRCULAR"), (2, 8, 8, 4)),
    "one by one": (nn.Conv(6, (1, 1), strides=2, use_bias=False), (2, 8, 8, 4)),
    "general": (nn.DenseGeneral((2, 3), axis=(1, -1), use_bias=False), (2, 5, 4)),
    "batched": (nn.DenseGeneral(6, batch_dims=(0,)), (2, 5, 4)),
    "einsum": (nn.Einsum((3, 4, 6), "...ha,hab->...hb"), (2, 5, 3, 4)),
    "einsum_sum": (nn.Einsum((3, 4, 6), "...ha,hab->...b", use_bias=False), (2, 5, 3, 4)),
    "transposed": (nn.ConvTranspose(6, (3, 3), strides=(2, 2), use_bias=False), (2, 5, 5, 4)),
    "swapped": (nn.ConvTranspose(6, (3,), (2,), "VALID", transpose_kernel=True), (2, 5, 4)),
    "padded": (nn.Conv(6, (3,), padding=1), (2, 5, 4)),
    "spread": (nn.Conv(6, (3,), padding=0, input_dilation=2), (2, 5, 4)),
}
PADDED = ("transposed", "swapped", "padded", "spread")


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_takes_the_norm_behind_it(name):
    layer, shape = LAYERS[name]
    axes = {"general": (-2, -1), "einsum": (2, 3)}.get(name, -1)
    model = nn.Sequential([layer, norms.BatchNorm(use_running_average=True, axis=axes)])
    x = draw(0, *shape)
    done = folding.fold(model, variables(model, x), x)
    assert done.folded == {"layers_1": ("layers_0",)} and done.relative <= TOLERANCE
    assert list(done.variables) == ["params"] and list(done.variables["params"]) == ["layers_0"]
    assert set(done.variables["params"]["layers_0"]) == {"kernel", "bias"}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_takes_the_norm_in_front_of_it(name):
    layer, shape = LAYERS[name]
    axes = {"general": (1, -1), "einsum_sum": (2, 3)}.get(name, -1)
    of = lambda **how: [norms.BatchNorm(use_running_average=True, axis=axes, **how), layer]
    model, x = nn.Sequential(of()), draw(0, *shape)
    old = variables(model, x)
    done = folding.fold(model, old, x)
    if name in PADDED:
        assert "pads with zeros" in done.kept["layers_0"] and done.absolute == 0
        model = nn.Sequential(of(use_bias=False))
        old = jax.tree.map(jnp.copy, variables(model, x))
        old["batch_stats"]["layers_0"]["mean"] *= 0  # without a shift it commutes with padding
        done = folding.fold(model, old, x)
    assert done.folded == {"layers_0": ("layers_1",)} and done.relative <= TOLERANCE
    assert "kernel" in done.variables["params"]["layers_1"]


def test_layers_of_nnx():
    rngs = nnx.Rngs(0)

    class Net(nnx.Module):
        def __init__(self):
            norm = lambda n, axis=-1: nnx_norms.BatchNorm(n, axis=axis, rngs=rngs)
            self.conv = nnx.Conv(4, 8, (3,), feature_group_count=2, use_bias=False, rngs=rngs)
            self.up = nnx.ConvTranspose(8, 4, (3,), (2,), transpose_kernel=True, rngs=rngs)
            self.heads = nnx.LinearGeneral(4, (2, 6), rngs=rngs)
            self.join = nnx.Einsum("...ha,hab->...b", (2, 6, 4), rngs=rngs)
            self.norms = nnx.List([norm(8), norm(4), norm((2, 6), (-2, -1)), norm(4)])

        def __call__(self, x):
            layers = self.conv, self.up, self.heads, self.join
            for layer, norm in zip(layers, self.norms, strict=True):
                x = norm(layer(x))
            return x

    model, x = randomized(Net()), draw(0, 2, 6, 4)
    done = folding.fold(model, x)
    assert [*done.folded.values()] == [("conv",), ("up",), ("heads",), ("join",)]
    assert done.relative <= TOLERANCE and done.model.join.bias.shape == (4,)
    assert jax.tree.leaves(nnx.state(done.model.norms)) == []


@pytest.mark.parametrize("in_front", (False, True))
@pytest.mark.parametrize("groups", (1, 2))
def test_blocks_of_whitening_within_groups_of_a_convolution(groups, in_front):
    norm = norms.Norm(nj.DecorrelatedBatchNorm(group_size=3), use_running_average=True)
    layer = nn.Conv(6, (3,), feature_group_count=groups, padding="VALID")
    model, x = nn.Sequential([norm, layer] if in_front else [layer, norm]), draw(0, 2, 7, 6)
    done = folding.fold(model, variables(model, x), x)
    assert done.kept == {} and done.relative <= TOLERANCE
    if groups > 1:
        method = nj.DecorrelatedBatchNorm(group_size=6)
        normalizer = method.evaluation(*method.init(KEY, 6))
        take = folding.into_next if in_front else folding.into_previous
        with pytest.raises(ValueError, match=r"blocks of 6 .* across 2 groups"):
            take(jnp.ones((3, 3, 6)), None, normalizer, groups=2)


class Block(nn.Module):
    """A block of a transformer, whose scales go into the layers behind the norms."""

    first: nj.Method
    second: nj.Method

    @nn.compact
    def __call__(self, x):
        y = norms.Norm(self.first, name="first")(x)
        heads = nn.MultiHeadDotProductAttention(2, use_bias=False, name="attention")
        x = x + heads(y)
        y = norms.Norm(self.second, name="second")(x)
        gate, up = nn.Dense(5, name="gate")(y), nn.Dense(5, use_bias=False, name="up")(y)
        return x + nn.Dense(4, name="down")(nn.silu(gate) * up)


@pytest.mark.parametrize(
    ("first", "second"),
    (
        (nj.LayerNorm(), nj.RMSNorm(scale_offset=1.0)),
        (nj.RMSNorm(feature_axes=()), nj.DynamicTanh()),
        (nj.Derf(use_scale=False), nj.GroupNorm(2)),
    ),
)
def test_scale_and_bias_go_into_attention_and_mlp(first, second):
    model, x = Block(first, second), draw(0, 2, 3, 4)
    done = folding.fold(model, variables(model, x), x)
    queries = tuple(f"attention/{name}" for name in ("query", "key", "value"))
    assert done.folded == {"first": queries, "second": ("gate", "up")}
    assert done.kept == {} and done.relative <= TOLERANCE
    params = done.variables["params"]
    left = {name: set(params.get(name, {})) for name in ("first", "second")}
    of = {nj.DynamicTanh: {"alpha"}, nj.Derf: {"alpha", "shift"}}
    assert left == {"first": of.get(type(first), set()), "second": of.get(type(second), set())}
    needed = getattr(first, "use_bias", False)
    assert ("bias" in params["attention"]["query"]) == needed, "a bias only where there is a shift"


def test_scale_and_bias_leave_a_norm_of_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx_norms.LayerNorm(4, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)

        def __call__(self, x):
            return x + self.attention(self.norm(x))

    model = randomized(Net(nnx.Rngs(0)))
    done = folding.fold(model, draw(0, 2, 3, 4))
    assert done.folded == {"norm": tuple(f"attention/{name}" for name in ("query", "key", "value"))}
    assert done.relative <= TOLERANCE and model.norm.scale is not None
    assert jax.tree.leaves(nnx.state(done.model.norm)) == [] and not done.model.norm.use_scale


OTHERS = {
    "own statistics": nj.GroupNorm(2),
    "spectral": nj.SpectralBatchNorm(),
    "chain": nj.chain(nj.BatchNorm(), nj.Affine()),
}


class Cases(nn.Module):
    """What cannot be folded, by name."""

    case: str

    @nn.compact
    def __call__(self, x):
        how = dict(use_running_average=self.case != "training", name="norm")
        if self.case in ("own statistics", "spectral", "chain"):
            norm = norms.Norm(OTHERS[self.case], **how)
        else:
            axis, activation = -1, None
            if self.case == "other axis":
                axis = 1
            if self.case == "activation inside":
                activation = nn.relu
            norm = norms.BatchNorm(axis=axis, activation=activation, **how)
        mask = jnp.ones((1, 4, 4)) if self.case == "mask" else None
        layer = nn.Conv(4, (1,), mask=mask, name="layer")
        if self.case == "masked":
            return norm(layer(x), mask=x > 0)
        if self.case == "by name":
            return norm(x=layer(x))
        if self.case == "two consumers":
            y = layer(x)
            return norm(y) + y
        if self.case == "output too":
            y = layer(x)
            return norm(y), y
        if self.case == "called twice":
            return norm(layer(norm(layer(x))))
        if self.case == "layer called twice":
            return norm(layer(layer(x)))
        if self.case == "activation":
            return nn.Dense(3, name="next")(nn.relu(norm(nn.relu(layer(x)))))
        if self.case == "activation inside":
            return layer(norm(x))
        if self.case == "tied":
            y = norm(layer(x))
            return y @ layer.variables["params"]["kernel"][0].T
        if self.case == "weight norm":
            return norm(nn.WeightNorm(layer, name="outer")(x))
        return norm(layer(x))


@pytest.mark.parametrize(
    ("case", "reason"),
    (
        ("two consumers", "in front: something else takes the output of layer too"),
        ("output too", "in front: something else takes the output of layer too"),
        ("called twice", "norm is called 2 times"),
        ("layer called twice", "in front: layer is called 2 times"),
        ("activation", "in front: its input is not the output of .*; behind: its output goes"),
        ("activation inside", "behind: its activation lies in front"),
        ("tied", "in front: something else uses the kernel of layer too"),
        ("weight norm", "in front: something else uses the kernel of"),
        ("other axis", r"in front: its features lie on axes \(1,\), those of the layer on \(2,\)"),
        ("mask", "in front: layer has a mask of its kernel"),
        ("masked", "it gets a mask"),
        ("by name", "its input is given by name"),
        ("training", "it is called for training, with statistics of the batch"),
        ("own statistics", "in front: GroupNorm: x=None, but evaluation takes statistics of x"),
        ("spectral", "SpectralBatchNorm: evaluation is no affine map of each channel"),
        ("chain", "Chain is no affine map in evaluation"),
    ),
)
def test_what_is_not_folded_and_why(case, reason):
    model, x = Cases(case), draw(0, 2, 3, 4)
    old = variables(model, x)
    done = folding.fold(model, old, x)
    assert done.folded == {} and done.absolute == 0
    assert list(done.kept) == ["norm"]
    with pytest.raises(ValueError, match=rf"fold: 'norm' cannot be folded: .*{reason}"):
        folding.fold(model, old, x, pairs=[("norm", "layer")])


@pytest.mark.parametrize("in_front", (False, True))
def test_transformed_layers(in_front):
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            norm = norms.BatchNorm(use_running_average=True, name="norm")
            layer = nn.Dense(4, use_bias=False, name="layer")
            return nn.relu(layer(norm(x)) if in_front else norm(layer(x))), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            how: dict = dict(split_rngs={"params": True})
            how["variable_axes"] = {"params": 0, "batch_stats": 0}
            x, _ = nn.scan(Body, **how, length=2)(name="scan")(x, None)
            each = nn.vmap(Body, **how, in_axes=(0, None), axis_size=2)
            x, _ = nn.scan(each, **how, length=3)(name="both")(jnp.stack([x, x]), None)
            how["variable_axes"] = {"params": 1, "batch_stats": 1}
            x, _ = nn.scan(Body, **how, length=3)(name="other_axis")(x[0], None)
            return nn.remat(Body)(name="remat")(x, None)[0]

    model, x = Net(), draw(0, 2, 4)
    done = folding.fold(model, variables(model, x), x)
    folded = ("scan", "both", "remat")
    assert done.folded == {f"{name}/norm": (f"{name}/layer",) for name in folded}
    assert done.relative <= TOLERANCE and list(done.kept) == ["other_axis/norm"]
    assert "kernel of other_axis/layer is not stacked on axis 0" in done.kept["other_axis/norm"]
    assert done.variables["params"]["both"]["layer"]["bias"].shape == (3, 2, 4)


@pytest.mark.parametrize("again", (False, True))
def test_what_remat_of_nnx_returns_as_it_was_is_no_use(again):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(3, 3, rngs=rngs)
            self.norm = nnx_norms.BatchNorm(3, rngs=rngs, use_running_average=True)

        def __call__(self, x):
            y = nnx.remat(lambda model, x: model.norm(model.layer(x)))(self, x)
            return y @ self.layer.kernel[...] if again else y

    done = folding.fold(randomized(Net(nnx.Rngs(0))), draw(0, 2, 3))
    if again:
        assert done.folded == {} and "something else uses the kernel" in done.kept["norm"]
    else:
        assert done.folded == {"norm": ("layer",)} and done.relative <= TOLERANCE


def test_layers_of_one_jit_are_not_folded():
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x):
            return norms.BatchNorm(use_running_average=True, name="norm")(nn.Dense(4)(x))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            jitted = nn.jit(Body)  # JAX traces one of both
            return jitted(name="second")(jitted(name="first")(x))

    model, x = Net(), draw(0, 2, 4)
    done = folding.fold(model, variables(model, x), x)
    assert done.folded == {} and "`jit` that others run too" in done.kept["first/norm"]


def test_shared_modules_and_variables_of_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = (nnx.Linear(4, 4, rngs=rngs) for _ in range(2))
            self.b.kernel = self.a.kernel
            self.norms = nnx.List([nnx_norms.BatchNorm(4, rngs=rngs) for _ in range(2)])
            self.again = self.norms[1]
            self.last = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.norms[0](self.b(self.a(x))))
            return self.again(self.last(x))

    done = folding.fold(randomized(Net(nnx.Rngs(0))), draw(0, 2, 4))
    assert done.relative <= TOLERANCE and list(done.folded.values()) == [("last",)]
    assert "something else uses the kernel of b too" in done.kept["norms/0"]
    assert done.model.again is done.model.norms[1]


def test_a_list_that_is_no_module_of_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(4, 4, rngs=rngs)
            self.norms = nnx.data([nnx_norms.BatchNorm(4, rngs=rngs)])

        def __call__(self, x):
            return self.norms[0](self.layer(x))

    model, x = randomized(Net(nnx.Rngs(0))), draw(0, 2, 4)
    assert "nnx.List" in folding.fold(model, x).kept["norms/0"]
    model.train()
    assert "called for training" in folding.fold(model, x).kept["norms/0"]


@pytest.mark.parametrize("gated", (False, True))
def test_a_gate_stays_in_front_of_the_layer(gated):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = norms.RMSNorm(name="norm")(x, **({"gate": x} if gated else {}))
            return nn.Dense(3)(y)

    done = folding.fold(Net(), variables(Net(), draw(0, 2, 4)), draw(0, 2, 4))
    assert ("its gate lies behind" in done.kept.get("norm", "")) == gated
    assert ("norm" in done.folded) != gated


def test_pairs_by_path():
    model = nn.Sequential([nn.Dense(4), norms.BatchNorm(use_running_average=True), nn.Dense(3)])
    x = draw(0, 2, 4)
    old = variables(model, x)
    for layer in ("layers_0", "layers_2"):
        done = folding.fold(model, old, x, pairs=[("layers_1", layer)])
        assert done.folded == {"layers_1": (layer,)} and done.relative <= TOLERANCE
    for pair, text in (
        (("layers_7", "layers_0"), "no norm has the path 'layers_7'. There are: layers_1"),
        (("layers_1", "layers_1"), "no layer has the path 'layers_1'. There are: layers_0, lay"),
        (("layers_1", ("layers_0", "layers_2")), "what can take it is layers_0; .* is layers_2"),
    ):
        with pytest.raises(ValueError, match=text):
            folding.fold(model, old, x, pairs=[pair])
    with pytest.raises(ValueError, match="norm_inputs has 'branch', which no norm"):
        folding.fold(model, old, x, norm_inputs={"branch": 1})
    done = folding.fold(model, old, x, pairs=[])
    assert (done.folded, done.kept, done.absolute) == ({}, {}, 0.0)


def test_a_condition_is_needed():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, labels):
            norm = norms.ConditionalBatchNorm(num_classes=3, name="norm")
            return norm(nn.Dense(4)(x), True, condition=labels)

    x, labels = draw(0, 2, 4), np.array([2, 2])
    old = variables(Net(), x, labels)
    done = folding.fold(Net(), old, x, labels)
    assert "condition=None" in done.kept["norm"]
    done = folding.fold(Net(), old, x, labels, norm_inputs={"condition": 2})
    assert done.relative <= TOLERANCE
    other = folding.fold(Net(), old, x, np.array([1, 1]), norm_inputs={"condition": 2})
    assert other.relative > 0.1, "the difference tells that the data are of another class"


def test_half_precision_is_rounded_once():
    model = nn.Sequential(
        [nn.Dense(4, param_dtype="bfloat16"), norms.BatchNorm(use_running_average=True)]
    )
    x = draw(0, 2, 4).astype("bfloat16")
    old = variables(model, x)
    done = folding.fold(model, old, x)
    layer, method = old["params"]["layers_0"], nj.BatchNorm()
    params = nj.core.structs.AffineParams(**old["params"]["layers_1"])
    state = nj.core.structs.Running(**old["batch_stats"]["layers_1"])
    wide = jax.tree.map(lambda a: a.astype("float32"), layer)
    wanted = folding.into_previous(**wide, normalizer=method.evaluation(params, state))
    for name, a in zip(("kernel", "bias"), wanted, strict=True):
        found = done.variables["params"]["layers_0"][name]
        np.testing.assert_array_equal(found, a.astype("bfloat16"))
    assert 1e-4 < done.relative < 0.05


def test_a_folded_linen_model_is_a_module():
    model, x = ResNet(nj.BatchNorm()), IMAGES
    old = variables(model, x)
    old["params"] = jax.tree.map(
        lambda a: nn.Partitioned(a, names=("model",) * a.ndim), old["params"]
    )
    done = folding.fold(model, old, x)
    kernel = done.variables["params"]["conv_a"]["kernel"]
    assert isinstance(kernel, nn.Partitioned) and done.kept == {}

    class Outer(nn.Module):
        inner: nn.Module

        @nn.compact
        def __call__(self, x):
            return self.inner(x) + self.inner(x)

    outer = Outer(done.model)
    made = jax.eval_shape(outer.init, KEY, x)["params"]["inner"]
    shapes = lambda tree: jax.tree.map(jnp.shape, nn.unbox(tree))
    assert shapes(made) == shapes(done.variables["params"])
    y = outer.apply({"params": {"inner": done.variables["params"]}}, x)
    close(y, 2 * model.apply(old, x), TOLERANCE)
    count = lambda model, variables: str(jax.make_jaxpr(model.apply)(variables, x)).count("rsqrt")
    assert count(model, old) and not count(done.model, done.variables)


@pytest.mark.parametrize("take", (folding.into_previous, folding.into_next))
def test_shapes_that_do_not_fit(take):
    kernel, ones = jnp.ones((2, 4, 4)), jnp.ones(3)
    for bias, normalizer, how, text in (
        (ones, nj.Normalizer(), {}, r"bias of shape \(3,\) .* features \(4,\)"),
        (None, nj.Normalizer(scale=ones), {}, r"normalizer of \(3,\) features for \(4,\)"),
        (None, nj.Linear(ones[None], jnp.eye(3)[None].repeat(3, 0)), {}, r"do not fit .*\(4,\)"),
    ):
        with pytest.raises(ValueError, match=text):
            take(kernel, bias, normalizer, **how)


def test_an_inexact_shift_in_front_of_a_convolution_is_refused():
    kernel, shift = jnp.ones((3, 4, 4)), nj.Normalizer(bias=jnp.ones(4))
    with pytest.raises(ValueError, match="pads with zeros"):
        folding.into_next(kernel, None, shift, padded=True)
    with pytest.raises(ValueError, match="pads with zeros"):
        jax.jit(lambda b: folding.into_next(kernel, None, shift._replace(bias=b), padded=True))(
            jnp.zeros(4)
        )
    with pytest.raises(ValueError, match="groups=3"):
        folding.into_next(kernel, None, shift, groups=3)
