"""Exchange with other libraries, files with configurations, and training with qwix.

Tests that name a library in `library` compare with it, and are skipped where it is not installed;
the others compare with its formulas in NumPy.
"""

import functools
import json
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normjax as nj
from normjax import interop, modules
from normjax import linen as norms
from normjax import nnx as nnx_norms

EPSILON, SLOTS = 1e-5, r"(layer\d|downsample)/(\d)"
RENAME = {SLOTS: r"\1_\2"}  # Linen has no lists of modules: layer1_0 for layer1/0
fields = interop.batch_norm_fields("torch", momentum=0.1, epsilon=EPSILON)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
library = pytest.importorskip
rng = np.random.default_rng


def draw(shape, seed=0):
    return rng(seed).normal(size=shape).astype(np.float32)


def batch_norm(name, size):
    """The arrays of torch's BatchNorm2d."""
    made = {"weight": draw(size, 1), "bias": draw(size, 2), "running_mean": draw(size, 3)}
    made |= {"running_var": draw(size, 4) ** 2 + 0.5, "num_batches_tracked": np.array(7)}
    return {f"{name}.{key}": value for key, value in made.items()}


@functools.cache
def resnet_arrays():
    """A state as torchvision names it: a stem, two basic blocks, a downsampling, a head."""
    arrays = {"conv1.weight": draw((4, 3, 3, 3), 5)} | batch_norm("bn1", 4)
    for block, i, o in (("layer1.0", 4, 4), ("layer2.0", 4, 6)):
        arrays |= {f"{block}.conv1.weight": draw((o, i, 3, 3), 6)} | batch_norm(f"{block}.bn1", o)
        arrays |= {f"{block}.conv2.weight": draw((o, o, 3, 3), 7)} | batch_norm(f"{block}.bn2", o)
    arrays["layer2.0.downsample.0.weight"] = draw((6, 4, 1, 1), 8)
    arrays |= batch_norm("layer2.0.downsample.1", 6)
    return arrays | {"fc.weight": draw((5, 6), 9), "fc.bias": draw(5, 10)}


IMAGES = draw((2, 8, 8, 3), 11)


def numpy_resnet(a, x):
    """The forward pass of evaluation in NumPy, with torch's layouts: x [N, C, H, W]."""

    def conv(x, w, stride=1):
        pad = w.shape[-1] // 2
        x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], (2, 3))
        return np.einsum("nihwab,oiab->nohw", windows[:, :, ::stride, ::stride], w)

    def norm(x, name):
        scale, bias, mean, var = (
            a[f"{name}.{key}"][:, None, None]
            for key in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / np.sqrt(var + EPSILON) * scale + bias

    x = np.maximum(norm(conv(x, a["conv1.weight"]), "bn1"), 0)
    for block, stride in (("layer1.0", 1), ("layer2.0", 2)):
        y = conv(x, a[f"{block}.conv1.weight"], stride)
        y = conv(np.maximum(norm(y, f"{block}.bn1"), 0), a[f"{block}.conv2.weight"])
        if f"{block}.downsample.0.weight" in a:
            x = conv(x, a[f"{block}.downsample.0.weight"], stride)
            x = norm(x, f"{block}.downsample.1")
        x = np.maximum(norm(y, f"{block}.bn2") + x, 0)
    return x.mean((2, 3)) @ a["fc.weight"].T + a["fc.bias"]


class Block(nn.Module):
    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(nn.Conv, self.features, use_bias=False, padding=1)
        norm = functools.partial(norms.BatchNorm, not train, **fields)
        strides = (self.stride, self.stride)
        y = nn.relu(norm(name="bn1")(conv((3, 3), strides, name="conv1")(x)))
        y = norm(name="bn2")(conv((3, 3), name="conv2")(y))
        if x.shape != y.shape:
            x = nn.Conv(self.features, (1, 1), strides, use_bias=False, name="downsample_0")(x)
            x = norm(name="downsample_1")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), padding=1, use_bias=False, name="conv1")(x)
        x = nn.relu(norms.BatchNorm(not train, **fields, name="bn1")(x))
        x = Block(6, 2, name="layer2_0")(Block(4, name="layer1_0")(x, train), train)
        return nn.Dense(5, name="fc")(x.mean((1, 2)))


class NNXBlock(nnx.Module):
    def __init__(self, i, o, stride, rngs):
        conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
        norm = functools.partial(nnx_norms.BatchNorm, rngs=rngs, **fields)
        self.conv1, self.bn1 = conv(i, o, (3, 3), stride, padding=1), norm(o)
        self.conv2, self.bn2 = conv(o, o, (3, 3), padding=1), norm(o)
        self.downsample = nnx.List([conv(i, o, (1, 1), stride), norm(o)] if stride > 1 else [])

    def __call__(self, x):
        y = self.bn2(self.conv2(nnx.relu(self.bn1(self.conv1(x)))))
        for layer in self.downsample:
            x = layer(x)
        return nnx.relu(x + y)


class NNXResNet(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 4, (3, 3), padding=1, use_bias=False, rngs=rngs)
        self.bn1 = nnx_norms.BatchNorm(4, rngs=rngs, **fields)
        self.layer1 = nnx.List([NNXBlock(4, 4, 1, rngs)])
        self.layer2 = nnx.List([NNXBlock(4, 6, 2, rngs)])
        self.fc = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer2[0](self.layer1[0](x)).mean((1, 2)))


@functools.cache
def shapes():
    return jax.eval_shape(ResNet().init, jax.random.key(0), IMAGES)


@functools.cache
def calls():
    return modules.visit(ResNet(), shapes(), IMAGES)


def test_a_resnet_of_torch_evaluates_as_in_numpy_and_goes_back_bit_for_bit():
    arrays = resnet_arrays()
    torch = interop.Exchange("torch", rename=RENAME, calls=calls(), epsilon=EPSILON)
    variables = torch.to_flax(arrays, shapes())
    y = ResNet().apply(variables, IMAGES)
    close(y, numpy_resnet(arrays, IMAGES.transpose(0, 3, 1, 2)))
    back = torch.from_flax(variables, like=arrays, updates=7)
    assert back.keys() == arrays.keys()
    assert all((back[n] == a).all() and back[n].dtype == a.dtype for n, a in arrays.items())


def test_a_state_of_nnx_has_the_names_of_torch():
    model, arrays = NNXResNet(nnx.Rngs(0)), resnet_arrays()
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    nnx.update(model, interop.Exchange("torch").to_flax(arrays, state))
    model.eval()
    close(model(IMAGES), numpy_resnet(arrays, IMAGES.transpose(0, 3, 1, 2)))


def test_a_resnet_of_torch_itself():
    torch = library("torch")

    class TorchBlock(torch.nn.Module):
        def __init__(self, i, o, stride):
            super().__init__()
            self.conv1 = torch.nn.Conv2d(i, o, 3, stride, 1, bias=False)
            self.bn1, self.bn2 = torch.nn.BatchNorm2d(o), torch.nn.BatchNorm2d(o)
            self.conv2 = torch.nn.Conv2d(o, o, 3, 1, 1, bias=False)
            layers = [torch.nn.Conv2d(i, o, 1, stride, bias=False), torch.nn.BatchNorm2d(o)]
            self.downsample = torch.nn.Sequential(*layers if stride > 1 else [])

        def forward(self, x):
            y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            return torch.relu(y + self.downsample(x))

    class TorchResNet(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = torch.nn.Conv2d(3, 4, 3, 1, 1, bias=False)
            self.bn1 = torch.nn.BatchNorm2d(4)
            self.layer1 = torch.nn.Sequential(TorchBlock(4, 4, 1))
            self.layer2 = torch.nn.Sequential(TorchBlock(4, 6, 2))
            self.fc = torch.nn.Linear(6, 5)

        def forward(self, x):
            x = self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x)))))
            return self.fc(x.mean((2, 3)))

    model = TorchResNet()
    load = lambda a: model.load_state_dict({n: torch.from_numpy(v.copy()) for n, v in a.items()})
    load({name: np.asarray(a) for name, a in resnet_arrays().items()})
    images = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())
    exchange = interop.Exchange("torch", rename=RENAME)
    variables = exchange.to_flax(model.state_dict(), shapes())
    y, moved = ResNet().apply(variables, IMAGES, train=True, mutable=["batch_stats"])
    close(y, model(images).detach())  # a training step
    mine = exchange.from_flax(variables | moved, like=model.state_dict(), updates=8)
    for name, a in model.state_dict().items():
        close(mine[name], a, err_msg=name)
    load(mine)
    close(ResNet().apply(variables | moved, IMAGES), model.eval()(images).detach())


CONVOLVED = {  # sums over a position i and a place k of the kernel: output at stride * i + place
    "torch": lambda w: w.transpose(2, 0, 1),
    "keras": lambda w: w.transpose(0, 2, 1),
    "haiku": lambda w: w.transpose(0, 2, 1)[::-1],
    "equinox": lambda w: w.transpose(2, 1, 0)[::-1],
}
KERNELS = {"torch": (2, 3, 4), "keras": (4, 3, 2), "haiku": (4, 3, 2), "equinox": (3, 2, 4)}
NAMES = {"torch": ("weight", "bias"), "keras": ("kernel", "bias"), "haiku": ("w", "b")}


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("name", CONVOLVED)
def test_transposed_convolutions(name, transpose_kernel):
    x, w = draw((1, 5, 2)), draw(KERNELS[name], 1)
    how = dict(strides=(2,), padding="VALID", transpose_kernel=transpose_kernel, use_bias=False)
    model = nn.Sequential([nn.ConvTranspose(3, (4,), **how)])
    variables = model.init(jax.random.key(0), x)
    exchange = interop.Exchange(name, calls=modules.visit(model, variables, x))
    arrays = {f"layers_0.{NAMES.get(name, NAMES['torch'])[0]}": w}
    variables = exchange.to_flax(arrays, variables)
    expected = np.zeros((1, 2 * 4 + 4, 3), np.float32)
    for i in range(5):
        expected[:, 2 * i : 2 * i + 4] += np.einsum("ni,kio->nko", x[:, i], CONVOLVED[name](w))
    close(model.apply(variables, x), expected)
    (back,) = exchange.from_flax(variables, arrays).values()
    np.testing.assert_array_equal(back, w)


def test_grouped_and_one_dimensional_convolutions_and_embeddings_of_torch():
    model = nn.Sequential([nn.Embed(7, 6), nn.Conv(4, (3,), feature_group_count=2), nn.Conv(2, 1)])
    ids = np.array([[1, 6, 2, 0]])
    variables = model.init(jax.random.key(0), ids)
    arrays = {"0.weight": draw((7, 6), 1), "1.weight": draw((4, 3, 3), 2), "1.bias": draw(4, 3)}
    arrays |= {"2.weight": draw((2, 4, 1), 4), "2.bias": draw(2, 5)}
    variables = interop.Exchange("torch", rename={"^": "layers_"}).to_flax(arrays, variables)
    x = np.pad(arrays["0.weight"][ids[0]], ((1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, 3, 0)  # [position, channel, place]
    parts = np.split(windows, 2, 1), np.split(arrays["1.weight"], 2)
    y = [np.einsum("pik,oik->po", a, w) for a, w in zip(*parts, strict=True)]
    y = np.concatenate(y, 1) + arrays["1.bias"]
    y = y @ arrays["2.weight"][..., 0].T + arrays["2.bias"]
    close(model.apply(variables, ids)[0], y)


def test_running_variances_change_what_they_are_divided_by():
    arrays = resnet_arrays()
    var = lambda exchange: exchange.to_flax(arrays, shapes())["batch_stats"]["bn1"]["var"]
    stored = arrays["bn1.running_var"]
    torch = functools.partial(interop.Exchange, "torch", rename=RENAME)
    np.testing.assert_array_equal(var(torch()), stored)
    close(var(torch(samples=5)), stored * 0.8)
    close(var(torch(samples={"layer*": 5})), stored)
    # These norms store the unbiased variance themselves.
    np.testing.assert_array_equal(var(torch(samples=5, calls=calls())), stored)
    halved = torch(samples={"*": 9, "bn1": 2})
    back = halved.from_flax(halved.to_flax(arrays, shapes()), arrays)
    close(back["bn1.running_var"], stored)
    close(back["layer1.0.bn2.running_var"], arrays["layer1.0.bn2.running_var"])


@pytest.mark.parametrize(("theirs", "ours"), [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_scales_around_zero(theirs, ours):
    model, x = nn.Sequential([norms.RMSNorm(scale_offset=ours)]), draw((2, 4))
    variables = model.init(jax.random.key(0), x)
    arrays = {"layers_0.weight": draw(4, 1)}
    found = modules.visit(model, variables, x)
    exchange = interop.Exchange("torch", calls=found, scale_offset=theirs)
    variables = exchange.to_flax(arrays, variables)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True)) * (theirs + arrays["layers_0.weight"])
    close(model.apply(variables, x), expected)
    close(exchange.from_flax(variables, arrays)["layers_0.weight"], arrays["layers_0.weight"])


def haiku_arrays(batches, decay):
    """What haiku's batch norm stores after batches [N, C], by its formula."""
    arrays = {"net/~/bn": {"scale": draw((1, 4), 1), "offset": draw((1, 4), 2)}}
    for kind, values in (("mean", batches.mean(1)), ("var", batches.var(1))):
        hidden = np.zeros((1, 4))
        for counter, value in enumerate(values, 1):
            hidden = decay * hidden + (1 - decay) * value
            average = hidden / (1 - decay**counter)
        state = {"hidden": hidden, "average": average, "counter": np.array(counter, np.int32)}
        arrays[f"net/~/bn/~/{kind}_ema"] = state
    return jax.tree.map(lambda a: a if a.dtype == np.int32 else a.astype(np.float32), arrays)


@pytest.mark.parametrize("counts", [True, False])
def test_averages_of_haiku_go_on_and_go_back(counts):
    batches, decay = draw((4, 6, 4)), 0.7
    how = interop.batch_norm_fields("haiku", momentum=decay, epsilon=EPSILON)
    how |= {} if counts else {"running_average": "exponential"}
    model = norms.BatchNorm(**how, name="bn")
    arrays, after = haiku_arrays(batches[:3], decay), haiku_arrays(batches, decay)
    made = jax.eval_shape(lambda: model.init(jax.random.key(0), batches[0], True))
    haiku = interop.Exchange("haiku", rename={"^net/bn$": ""})
    variables = haiku.to_flax(arrays, made)
    close(variables["batch_stats"]["mean"], arrays["net/~/bn/~/mean_ema"]["average"][0])
    back = haiku.from_flax(variables, arrays, momentum=decay, updates=0 if counts else 3)
    jax.tree.map(close, back, arrays)
    if counts:
        _, moved = model.apply(variables, batches[3], False, mutable=["batch_stats"])
        jax.tree.map(close, haiku.from_flax(variables | moved, after, momentum=decay), after)
    else:
        with pytest.raises(ValueError, match="give momentum"):
            haiku.from_flax(variables, arrays, momentum=decay)


def test_layers_of_keras_and_shapes_of_equinox():
    model = nn.Sequential([nn.Conv(6, (2,), feature_group_count=3), norms.BatchNorm(True)])
    x, w = draw((1, 4, 3)), draw((2, 3, 2), 1)
    variables = model.init(jax.random.key(0), x)
    arrays = {"net/depthwise/kernel:0": w, "net/depthwise/bias:0": draw(6, 2)}
    for name in ("gamma", "beta", "moving_mean", "moving_variance"):
        arrays[f"net/norm/{name}:0"] = draw(6, len(name)) ** 2
    rename = {"net/depthwise": "layers_0", "net/norm": "layers_1"}
    keras = interop.Exchange("keras", rename=rename)
    variables = keras.to_flax(arrays, variables)
    padded = np.pad(x[0], ((0, 1), (0, 0)))
    y = np.einsum("pck,kcm->pcm", np.lib.stride_tricks.sliding_window_view(padded, 2, 0), w)
    gamma, beta, mean, var = list(arrays.values())[2:]
    y = y.reshape(4, 6) + arrays["net/depthwise/bias:0"]
    close(model.apply(variables, x)[0], (y - mean) / np.sqrt(var + 1e-5) * gamma + beta)
    np.testing.assert_array_equal(keras.from_flax(variables, arrays)["net/depthwise/kernel:0"], w)

    arrays = {"layers_0": {"weight": draw((6, 1, 2)), "bias": draw((6, 1), 1)}}
    arrays["layers_1"] = {"weight": draw(6), "bias": draw(6)}
    arrays["layers_1"] |= {"running_mean": draw(6), "running_var": draw(6)}
    equinox = interop.Exchange("equinox")
    back = equinox.from_flax(equinox.to_flax(arrays, variables), arrays)
    jax.tree.map(np.testing.assert_array_equal, back, arrays)


def changed(**arrays):
    left = {
        n: a for n, a in resnet_arrays().items() if arrays.get(n.replace(".", "_"), 1) is not None
    }
    return left | {n: a for n, a in arrays.items() if a is not None}


@pytest.mark.parametrize(
    ("arrays", "how", "texts"),
    [
        (changed(head=draw(3)), {}, ["head for /head", "ignore"]),
        (changed(fc_bias=None), {}, ["params/fc/bias", "keep"]),
        (resnet_arrays(), {"rename": None}, ["layer1/0/bn1/weight for layer1/0/bn1/kernel or"]),
        (resnet_arrays(), {"rename": {"stem": "conv1"}}, ["'stem' matches none of bn1, conv1"]),
        (resnet_arrays(), {"rename": lambda _: "bn1"}, ["another array is", "bn1/weight"]),
        (resnet_arrays(), {"ignore": ["head"]}, ["'head' matches none"]),
        (resnet_arrays(), {"ignore": ["fc"]}, ["params/fc/bias, params/fc/kernel"]),
        (resnet_arrays(), {"keep": ["params/fc"]}, ["fc/weight for params/fc/kernel"]),
        (changed() | {"fc.weight": draw((6, 5))}, {}, [r"fc/weight (6, 5)", "(6, 5)", "calls"]),
        (resnet_arrays(), {"samples": 1}, ["samples=1"]),
    ],
)
def test_what_does_not_fit_is_listed(arrays, how, texts):
    exchange = interop.Exchange("torch", **{"rename": RENAME, **how})
    with pytest.raises(ValueError) as raised:
        exchange.to_flax(arrays, shapes())
    assert [text for text in texts if text not in str(raised.value)] == []


def test_another_epsilon_is_refused():
    how = {"rename": RENAME, "calls": calls(), "epsilon": {"*": EPSILON, "layer2*": 1e-3}}
    with pytest.raises(ValueError, match=r"layer2_0/bn1: 1e-05 .* 0\.001 in the lib"):
        interop.Exchange("torch", **how).to_flax(resnet_arrays(), shapes())


def test_parts_that_are_left_out_stay():
    arrays = resnet_arrays()
    exchange = interop.Exchange("torch", rename=RENAME, ignore=["fc"], keep=["params/fc"])
    target = jax.tree.map(lambda a: np.full(a.shape, 3, a.dtype), shapes())
    variables = exchange.to_flax(arrays, target)
    assert variables["params"]["fc"]["bias"] is target["params"]["fc"]["bias"]
    like = {name: np.zeros_like(a) for name, a in arrays.items()}
    back = exchange.from_flax(variables, like)
    assert not back["fc.weight"].any() and (back["conv1.weight"] == arrays["conv1.weight"]).all()


def test_fields_out_of_range_are_refused():
    with pytest.raises(ValueError, match="library='jax'"):
        interop.Exchange("jax")
    with pytest.raises(TypeError, match="rename='layers_'"):
        interop.Exchange("torch", rename="layers_")
    for how in ({"epsilon": 1e-5}, {"scale_offset": 1.0}):
        with pytest.raises(ValueError, match="without calls"):
            interop.Exchange("torch", **how)
    for how in ({"momentum": 1.1, "epsilon": 1e-5}, {"momentum": 0.9, "epsilon": -1.0}):
        with pytest.raises(ValueError, match="batch_norm_fields"):
            interop.batch_norm_fields("keras", **how)
    with pytest.raises(TypeError, match="bn: object is no array"):
        interop.Exchange("torch").to_flax({"bn": object()}, {"bn": np.ones(2)})
    cumulative = interop.batch_norm_fields("torch", momentum=None, epsilon=1e-5)
    assert nj.BatchNorm(**cumulative).running_average == "cumulative"


def test_dtypes_and_shardings_are_those_of_the_target():
    mesh = jax.make_mesh((4,), ("data",))
    spread = jax.NamedSharding(mesh, jax.P("data"))
    target = {"bn": {"scale": jax.device_put(jnp.zeros(8, jnp.bfloat16), spread)}}
    made = interop.Exchange("torch").to_flax({"bn.weight": draw(8)}, target)["bn"]["scale"]
    assert made.sharding == spread and made.dtype == jnp.bfloat16
    np.testing.assert_array_equal(made, draw(8).astype(jnp.bfloat16))
    like = {"bn.weight": jax.ShapeDtypeStruct((8,), "bfloat16")}
    back = interop.Exchange("torch").from_flax({"bn": {"scale": made}}, like)
    assert back["bn.weight"].dtype == jnp.bfloat16
    wide = interop.Exchange("torch").to_flax(back, {"bn": {"scale": np.ones(8, np.float32)}})
    np.testing.assert_array_equal(wide["bn"]["scale"], np.asarray(made, np.float32))


CHAIN = nj.chain(nj.RMSNorm(param_dtype="bfloat16"), nj.Affine(use_scale=False))


class Norms(nn.Module):
    """Norms with a norm inside, a schedule, a function, and parameters in half precision."""

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x):
        x = norms.Norm(CHAIN, name="chain")(x)
        momentum = nj.Ramp(start=0.5, stop=0.9, begin=0, end=10)
        how = {"momentum": momentum, "activation": functools.partial(nn.leaky_relu)}
        return norms.BatchNorm(True, epsilon=self.epsilon, **how, name="norm")(x)


def norms_of(**how):
    x = draw((2, 4))
    variables = Norms().init(jax.random.key(0), x)
    return variables, interop.configuration(Norms(**how), variables, x)


def test_the_configuration_of_norms_is_json_and_is_compared():
    _, current = norms_of()
    assert current["chain"]["methods"][0] == {"class": "RMSNorm"} | current["chain"]["methods"][0]
    assert current["norm"]["momentum"]["stop"] == 0.9 and current["norm"]["dtype"] is None
    assert not {"scale_init", "param_dtype", "axis_name"} & current["norm"].keys()
    saved = json.loads(json.dumps(current))
    interop.check_configuration(saved, current)
    del saved["norm"]["skip_nonfinite"]  # a field that an older version did not have
    interop.check_configuration(saved, current)
    saved["norm"] |= {"epsilon": 1e-3, "momentum": 0.9}
    saved["chain"]["methods"][1]["class"] = "Derf"
    saved["head"] = saved["norm"]
    with pytest.raises(ValueError) as raised:
        interop.check_configuration(saved, current)
    lines = str(raised.value).splitlines()[1:-1]
    assert "  norm: epsilon is 0.001 in the checkpoint and 1e-05 in the model" in lines
    assert "  chain: methods/1/class is Derf in the checkpoint and Affine in the model" in lines
    assert "  head: a norm of the checkpoint alone" in lines
    assert sum("chain" in line for line in lines) == 1  # not the fields of another class
    other = {"norm": interop.configuration(nnx_norms.RMSNorm(4, rngs=nnx.Rngs(0)))[""]}
    alone = r"model:\n  norm: class is BatchNorm in .* RMSNorm .*\nGive"
    with pytest.raises(ValueError, match=alone):
        interop.check_configuration({"norm": current["norm"]}, other)


def test_files_keep_paths_and_dtypes_and_refuse_other_norms(tmp_path):
    library("safetensors")
    file = tmp_path / "model.safetensors"
    variables, fields = norms_of()
    variables = jax.tree.map(lambda a: draw(a.shape).astype(a.dtype), variables)
    interop.save(file, variables, fields)
    loaded = interop.load(file, jax.eval_shape(lambda: variables), fields)
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(variables), strict=True):
        assert a.dtype == b.dtype and isinstance(a, jax.Array)
        np.testing.assert_array_equal(a, b)
    assert loaded["params"]["chain"]["RMSNorm_0"]["scale"].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"norm: epsilon is 1e-05 .* and 0\.001 in"):
        interop.load(file, variables, norms_of(epsilon=1e-3)[1])
    target = jax.tree.map(lambda a: a, variables)
    target["params"]["norm"] = {"scale": np.ones(4, np.float16), "slope": np.ones(4)}
    with pytest.raises(ValueError) as raised:
        interop.load(file, target, fields)
    texts = ["have: params/norm/slope;", "have: params/norm/bias;", "float32[4] and float16[4]"]
    assert [text for text in texts if text not in str(raised.value)] == []
    library("safetensors.numpy").save_file({"a": np.ones(2)}, file)
    with pytest.raises(ValueError, match="no configuration"):
        interop.load(file, target, fields)
    with pytest.raises(TypeError, match=r"rngs/.*nnx\.Param"):
        interop.save(file, nnx.state(nnx_norms.Norm(nj.GhostNoise(4), 2, rngs=nnx.Rngs(0))), {})
    with pytest.raises(ValueError, match="several leaves have one path: a/0"):
        interop.save(file, {"a": {0: np.ones(1)}, "a/0": np.ones(1)}, {})


def test_without_safetensors_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install 'safetensors"):
        interop.save("model.safetensors", {"a": np.ones(1)}, {})


class Stack(nn.Module):
    """What the models of all libraries below are."""

    fields: Any
    epsilon: float

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = norms.BatchNorm(not train, **self.fields, name="bn")(x)
        x = nn.ConvTranspose(6, (3, 3), strides=(2, 2), padding="VALID", name="up")(x)
        x = norms.GroupNorm(num_groups=3, epsilon=self.epsilon, name="gn")(x)
        return nn.Dense(2, name="fc")(norms.LayerNorm(epsilon=self.epsilon, name="ln")(x))


BATCHES = draw((3, 2, 6, 6, 3), 12) + 1


def torch_stack(torch):
    layers = {"conv": torch.nn.Conv2d(3, 4, 3, padding=1), "bn": torch.nn.BatchNorm2d(4, 1e-5, 0.2)}
    layers |= {"up": torch.nn.ConvTranspose2d(4, 6, 3, 2), "gn": torch.nn.GroupNorm(3, 6)}
    layers |= {"ln": torch.nn.LayerNorm(6), "fc": torch.nn.Linear(6, 2)}
    model = torch.nn.ModuleDict(layers)
    state = lambda: {name: a.clone() for name, a in model.state_dict().items()}

    def run(x, train):
        model.train(train)
        x = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
        for name in ("conv", "bn", "up", "gn"):
            x = model[name](x)
        y = model["fc"](model["ln"](x.permute(0, 2, 3, 1)))
        return state() if train else y.detach().numpy()

    return {"momentum": 0.2, "epsilon": 1e-5}, run


def haiku_stack(hk):
    def net(x, train):
        x = hk.BatchNorm(True, True, 0.8, name="bn")(hk.Conv2D(4, 3, name="conv")(x), train)
        x = hk.Conv2DTranspose(6, 3, 2, padding="VALID", name="up")(x)
        x = hk.LayerNorm(-1, True, True, name="ln")(hk.GroupNorm(3, name="gn")(x))
        return hk.Linear(2, name="fc")(x)

    model = hk.transform_with_state(net)
    params, start = model.init(jax.random.key(0), BATCHES[0], True)
    held = [start]

    def run(x, train):
        y, state = model.apply(params, held[0], None, x, train)
        held[0] = state
        return {**params, **state} if train else y

    return {"momentum": 0.8, "epsilon": 1e-5}, run


def keras_stack(keras):
    make = keras.layers
    names = {"conv": make.Conv2D(4, 3, padding="same"), "bn": make.BatchNormalization(momentum=0.8)}
    names |= {"up": make.Conv2DTranspose(6, 3, 2), "gn": make.GroupNormalization(3)}
    names |= {"ln": make.LayerNormalization(), "fc": make.Dense(2)}
    model = keras.Sequential(list(names.values()))
    model.build(BATCHES[0].shape)
    for i, weight in enumerate(model.trainable_weights):
        weight.assign(draw(weight.shape, i))

    def run(x, train):
        y = model(x, training=train)
        pairs = [(name, w) for name, layer in names.items() for w in layer.weights]
        return {f"{n}/{w.path.split('/')[-1]}": np.array(w.value) for n, w in pairs} if train else y

    return {"momentum": 0.8, "epsilon": 1e-3}, run


def equinox_stack(eqx):
    keys, make = jax.random.split(jax.random.key(0), 3), eqx.nn
    layers = {
        "conv": make.Conv2d(3, 4, 3, padding=1, key=keys[0]),
        "bn": make.BatchNorm(4, "batch", momentum=0.8, mode="ema"),
        "up": make.ConvTranspose2d(4, 6, 3, 2, key=keys[1]),
        "gn": make.GroupNorm(3, 6),
        "ln": make.LayerNorm(6),
        "fc": make.Linear(6, 2, key=keys[2]),
    }
    held = [make.State(layers)]

    def one(x, state, inference):
        x, state = layers["bn"](layers["conv"](x), state, inference=inference)
        x = layers["gn"](layers["up"](x)).transpose(1, 2, 0)
        return jax.vmap(jax.vmap(lambda v: layers["fc"](layers["ln"](v))))(x), state

    def run(x, train):
        step = functools.partial(one, inference=not train)
        how = dict(axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        y, held[0] = jax.vmap(step, **how)(x.transpose(0, 3, 1, 2), held[0])
        if not train:
            return y
        leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(layers, eqx.is_array))
        name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
        mean, var = held[0].get(layers["bn"].ema_state_index)
        statistics = {"bn/running_mean": mean, "bn/running_var": var}
        return {name(path): a for path, a in leaves if "index" not in name(path)} | statistics

    return {"momentum": 0.8, "epsilon": 1e-5}, run


STACKS = {
    "torch": torch_stack,
    "haiku": haiku_stack,
    "keras": keras_stack,
    "equinox": equinox_stack,
}


@pytest.mark.parametrize("name", STACKS)
def test_models_of_the_libraries_themselves(name, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    jax.config.update("jax_numpy_rank_promotion", "allow")  # theirs does
    try:
        how, run = STACKS[name](library(name))
        before, _, after, y = *(run(x, True) for x in BATCHES), run(BATCHES[0], False)
    finally:
        jax.config.update("jax_numpy_rank_promotion", "raise")
    model = Stack(interop.batch_norm_fields(name, **how), how["epsilon"])
    target = jax.eval_shape(model.init, jax.random.key(0), BATCHES[0])
    found = modules.visit(model, target, BATCHES[0])
    exchange = interop.Exchange(name, calls=found, epsilon=how["epsilon"])
    variables = exchange.to_flax(before, target)
    for x in BATCHES[1:]:
        _, moved = model.apply(variables, x, train=True, mutable=["batch_stats"])
        variables |= moved
    momentum = how["momentum"] if name == "haiku" else None
    mine = exchange.from_flax(variables, after, updates=3, momentum=momentum)
    jax.tree.map(functools.partial(close, atol=1e-4), mine, jax.tree.map(np.asarray, after))
    close(model.apply(exchange.to_flax(after, target), BATCHES[0]), y, atol=1e-4)


class QuantizedLinen(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x, train):
        x = self.norm(use_running_average=not train, name="norm")(nn.Dense(4)(x))
        return nn.Dense(2)(nn.relu(x))


class QuantizedNNX(nnx.Module):
    def __init__(self, norm, rngs):
        self.first, self.norm = nnx.Linear(6, 4, rngs=rngs), norm(4, rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x))))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # qwix uses old names of Flax
@pytest.mark.parametrize("provider", ["OdmlQatProvider", "QtProvider"])
def test_qwix_leaves_running_statistics_to_the_data(provider):
    qwix = library("qwix")
    rules = [qwix.QuantizationRule(weight_qtype=jnp.int8, act_qtype=jnp.int8)]
    quantize = lambda model, *x: qwix.quantize_model(model, getattr(qwix, provider)(rules), *x)
    x = jnp.asarray(draw((32, 6)) + 1)

    def linen(norm):
        model = quantize(QuantizedLinen(functools.partial(norm, momentum=0.9)))
        variables = model.init(jax.random.key(0), x, False)
        step = jax.jit(functools.partial(model.apply, train=True, mutable=True))
        for _ in range(3):
            y, variables = step(variables, x)
        return y, variables["batch_stats"]["norm"]

    def in_nnx(norm):
        model = QuantizedNNX(functools.partial(norm, momentum=0.9), nnx.Rngs(0))
        model, step = quantize(model, x), nnx.jit(lambda model, x: model(x))
        for _ in range(3):
            y = step(model, x)
        return y, {"mean": model.norm.mean[...], "var": model.norm.var[...]}

    for run, mine, flax in ((linen, norms, nn), (in_nnx, nnx_norms, nnx)):
        y, statistics = run(mine.BatchNorm)
        wanted, others = run(flax.BatchNorm)  # which qwix knows by name
        jax.tree.map(functools.partial(close, rtol=1e-4), (y, statistics), (wanted, others))
