"""What is captured of Flax models: every output, sown value and input, in the order of calls."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from agreement import close, draw
from flax import linen as nn
from flax import nnx

import normjax.linen
import normjax.nnx
from normjax.analysis import layers

KEY = jax.random.key(0)
BLOCK = ("conv", "norm", "drop", "sum")


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        y = nn.Conv(3, (3, 3), name="conv")(x)
        y = normjax.linen.BatchNorm(use_running_average=not train, name="norm")(y)
        y = nn.Dropout(0.5, deterministic=not train, name="drop")(y)
        self.sow("intermediates", "sum", x + y)
        return nn.relu(x + y)


class Net(nn.Module):
    block: type[nn.Module] = Block

    @nn.compact
    def __call__(self, x, train=False):
        late, early = Block(name="b"), self.block(name="a")
        x = early(late(x, train), train)
        self.sow("intermediates", "between", x)
        x = late(x, train)
        self.sow("intermediates", "count", jnp.ones((3, 3), int))
        return nn.Dense(2, name="head")(x.mean((1, 2))), {"maps": x, "rank 1": x[0, 0, 0]}


class BlockNNX(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 3, (3, 3), rngs=rngs)
        self.norm = normjax.nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        y = self.drop(self.norm(self.conv(x)))
        self.sow(nnx.Intermediate, "sum", x + y)
        return nnx.relu(x + y)


class NetNNX(nnx.Module):
    def __init__(self, call=lambda block, x: block(x)):
        rngs = nnx.Rngs(0)
        self.a, self.b = BlockNNX(rngs), BlockNNX(rngs)
        self.head = nnx.Linear(3, 2, rngs=rngs)
        self.call = call

    def __call__(self, x):
        x = self.call(self.a, self.b(x))
        self.sow(nnx.Intermediate, "between", x)
        x = self.b(x)
        self.sow(nnx.Intermediate, "count", jnp.ones((3, 3), int))
        return self.head(x.mean((1, 2))), {"maps": x, "rank 1": x[0, 0, 0]}


NAMES = [
    *(f"b/{name}" for name in BLOCK),
    "b",
    *(f"a/{name}" for name in BLOCK),
    "a",
    "between",
    *(f"b/{name}#2" for name in BLOCK),
    "b#2",
    "head",
    "__call__[0]",
    "__call__[1]['maps']",
]


def run_linen(block=Block, train=True):
    """Input, captured maps, and the outputs of an ordinary call."""
    net, x = Net(block), draw(0, 4, 5, 6, 3)
    variables = net.init(KEY, x)
    before = jax.tree.map(np.asarray, variables)
    maps = layers.capture(net, variables, x, train=train, rngs={"dropout": KEY})
    chex.assert_trees_all_equal(variables, before)
    how = dict(train=train, rngs={"dropout": KEY}, mutable=["batch_stats"])
    return x, maps, net.apply(variables, x, **how)[0]


def run_nnx(call=lambda block, x: block(x), train=True):
    net, x = NetNNX(call), draw(0, 4, 5, 6, 3)
    net.train() if train else net.eval()
    structure, before = nnx.split(nnx.clone(net))
    maps = layers.capture(net, x)
    chex.assert_trees_all_equal(nnx.state(net), before)
    assert nnx.graphdef(net) == structure
    return x, maps, nnx.capture(net, nnx.Intermediate)(x)[0]


class CaptureTest(parameterized.TestCase):
    @parameterized.product(
        run=(
            run_linen,
            run_nnx,
            lambda train: run_linen(nn.remat(Block, static_argnums=2), train),
            lambda train: run_nnx(nnx.jit(lambda block, x: block(x)), train),
            lambda train: run_nnx(nnx.remat(lambda block, x: block(x)), train),
        ),
        train=(True, False),
    )
    def test_maps(self, run, train):
        x, maps, (logits, rest) = run(train=train)
        self.assertEqual(list(maps), NAMES)
        close(maps["__call__[0]"], logits, 1e-6)
        close(maps["__call__[1]['maps']"], rest["maps"], 1e-6)
        for start, block, call in (
            (x, "b", ""),
            (maps["b"], "a", ""),
            (maps["between"], "b", "#2"),
        ):
            total = maps[f"{block}/sum{call}"]
            close(total, start + maps[f"{block}/drop{call}"], 1e-6)
            close(maps[block + call], jax.nn.relu(total), 0)

    def test_names_keep_their_order_under_jit(self):
        net, x = Net(), draw(0, 4, 5, 6, 3)
        variables = net.init(KEY, x)
        maps = jax.jit(lambda *inputs: layers.capture(net, *inputs))(variables, x)
        self.assertEqual(list(maps), NAMES)
        self.assertEqual(list(nnx.jit(layers.capture)(NetNNX(), x)), NAMES)

    def test_parts_of_an_output(self):
        net, x = nn.RNN(nn.LSTMCell(3), name="rnn"), jnp.ones((2, 4, 3), jnp.bfloat16)
        maps = layers.capture(net, net.init(KEY, x), x, return_carry=True)
        shapes = {"__call__[0][0]": (2, 3), "__call__[0][1]": (2, 3), "__call__[1]": (2, 4, 3)}
        self.assertEqual({name: y.shape for name, y in maps.items()}, shapes)

    def test_scanned_layers_are_stacked(self):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.Dense(3, name="dense")(x), None

        axes = {"params": 0, "intermediates": 0}
        stack = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=5)()
        x = draw(0, 4, 3)
        maps = layers.capture(stack, stack.init(KEY, x, None), x, None)
        self.assertEqual(maps["dense"].shape, (5, 4, 3))

    @parameterized.parameters(
        (lambda x: x, (jnp.ones((2, 3)),), "not a module"),
        (nnx.Linear, (jnp.ones((2, 3)),), "not a module"),
        (nn.Dense(3), (), "variables"),
        (nn.Dense(3), (jnp.ones((2, 3)),), "variables"),
    )
    def test_rejects(self, model, args, message):
        with self.assertRaisesRegex(TypeError, message):
            layers.capture(model, *args)


INPUTS = [
    "__call__",
    *(name + call for call in ("", "#2") for name in ("b", *(f"b/{part}" for part in BLOCK[:3]))),
]
INPUTS = [*INPUTS[:5], *(f"a{name[1:]}" for name in INPUTS[1:5]), *INPUTS[5:], "head"]


def linen_inputs(block=Block, what=layers.capture_inputs):
    net, x = Net(block), draw(0, 4, 5, 6, 3)
    variables = net.init(KEY, x)
    before = jax.tree.map(np.asarray, variables)
    found = [
        capture(net, variables, x, train=True, rngs={"dropout": KEY})
        for capture in (what, layers.capture)
    ]
    chex.assert_trees_all_equal(variables, before)
    return x, *found


def nnx_inputs(call=lambda block, x: block(x), what=layers.capture_inputs):
    net, x = NetNNX(call), draw(0, 4, 5, 6, 3)
    structure, before = nnx.split(nnx.clone(net))
    inputs = what(net, x)
    chex.assert_trees_all_equal(nnx.state(net), before)
    assert nnx.graphdef(net) == structure
    return x, inputs, layers.capture(net, x)


class CaptureInputsTest(parameterized.TestCase):
    @parameterized.parameters(
        linen_inputs,
        nnx_inputs,
        lambda: linen_inputs(nn.remat(Block, static_argnums=2)),
        lambda: nnx_inputs(nnx.remat(lambda block, x: block(x))),
    )
    def test_inputs_are_the_outputs_before(self, run):
        x, inputs, maps = run()
        self.assertEqual(list(inputs), INPUTS)
        close(inputs["__call__"], x, 0)
        for block, call, start in (
            ("b", "", x),
            ("a", "", maps["b"]),
            ("b", "#2", maps["between"]),
        ):
            parts = (inputs[f"{block}{part}{call}"] for part in ("", "/conv", "/norm", "/drop"))
            befores = start, start, maps[f"{block}/conv{call}"], maps[f"{block}/norm{call}"]
            for part, before in zip(parts, befores, strict=True):
                close(part, before, 1e-6)
        close(inputs["head"], maps["b#2"].mean((1, 2)), 1e-6)

    @parameterized.parameters(linen_inputs, nnx_inputs)
    def test_jit_keeps_the_order(self, run):
        def under_jit(net, *args, **how):
            if isinstance(net, nn.Module):
                return jax.jit(lambda *args: layers.capture_inputs(net, *args, **how))(*args)
            return nnx.jit(layers.capture_inputs)(net, *args)

        _, inputs, _ = run(what=under_jit)
        self.assertEqual(list(inputs), INPUTS)

    def test_modules_without_an_array_to_take_are_left_out(self):
        class Odd(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.Dense(3, name="named")(inputs=x)
                x = nn.Dense(3, name="whole")(jnp.ones((2, 3), jnp.float32) + x)
                return nn.Embed(4, 3, name="embed")(jnp.zeros((2, 3), int)).sum(1) + x

        net, x = Odd(), jnp.ones((2, 5))
        found = layers.capture_inputs(net, net.init(KEY, x), x)
        self.assertEqual(list(found), ["__call__", "whole"])

    @parameterized.parameters(
        (lambda x: x, (jnp.ones((2, 3)),), "capture_inputs: .* not a module"),
        (nn.Dense(3), (jnp.ones((2, 3)),), "capture_inputs: .* variables"),
    )
    def test_rejects(self, model, args, message):
        with self.assertRaisesRegex(TypeError, message):
            layers.capture_inputs(model, *args)


PLACES = [
    (),
    *((block, *part) for block in "bab" for part in ((), *((name,) for name in BLOCK[:3]))),
    ("head",),
]
KINDS = ["Block", "Conv", "BatchNorm", "Dropout"]


def linen_calls(block=Block):
    """A model, its arguments and its keywords."""
    net, x = Net(block), draw(0, 4, 5, 6, 3)
    variables = net.init(KEY, x)
    return net, (variables, x), {"train": True, "rngs": {"dropout": KEY}}


def nnx_calls(call=lambda block, x: block(x)):
    return NetNNX(call), (draw(0, 4, 5, 6, 3),), {}


class Doubled(nn.Dense):
    def __call__(self, x):
        return 2 * super().__call__(inputs=x)


class CallsTest(parameterized.TestCase):
    @parameterized.parameters(
        linen_calls,
        nnx_calls,
        lambda: linen_calls(nn.remat(Block, static_argnums=2)),
        lambda: nnx_calls(nnx.remat(lambda block, x: block(x))),
        lambda: nnx_calls(nnx.jit(lambda block, x: block(x))),
    )
    def test_functions_repeat_the_calls(self, make):
        net, args, how = make()
        state = lambda: jax.tree.leaves(args[0] if how else nnx.to_pure_dict(nnx.state(net)))
        before = state()
        calls, maps = layers.calls(net, *args, **how), layers.capture(net, *args, **how)
        self.assertEqual([call.path for call in calls], PLACES)
        kinds = [call.kind.removesuffix("NNX") for call in calls]
        self.assertEqual(kinds[1:-1], 3 * KINDS)
        for call in calls:
            chex.assert_trees_all_close(call.function(*call.args, **call.kwargs), call.output)
            chex.assert_tree_all_finite(call.output)
        for call, name in ((calls[2], "b/conv"), (calls[9], "b#2"), (calls[12], "b/drop#2")):
            close(call.output, maps[name], 0)
        self.assertEqual((calls[0].name, calls[2].name), ("__call__", "b/conv"))
        own = calls[2].variables
        self.assertEqual((own["params"] if how else own)["kernel"].shape, (3, 3, 3, 3))
        assert all(a is b for a, b in zip(state(), before, strict=True))
        assert how or (calls[3].module is net.b.norm and type(net.b) is BlockNNX)

    @parameterized.parameters(linen_calls, nnx_calls)
    def test_functions_under_transformations(self, make):
        net, args, how = make()
        block = layers.calls(net, *args, **how)[1]
        (x, *rest), other = block.args, draw(1, 2, 5, 6, 3)
        loss = lambda x: jnp.sum(jnp.square(block.function(x, *rest)))
        slope = (loss(x + 1e-3) - loss(x - 1e-3)) / 2e-3
        close(jnp.sum(jax.jit(jax.grad(loss))(x)), slope, 1e-2)
        alone = jnp.stack([block.function(part, *rest) for part in (other, 2 * other)])
        mapped = jax.vmap(lambda x: block.function(x, *rest))(jnp.stack([other, 2 * other]))
        close(mapped, alone, 1e-5)
        run = lambda *args: [call.output for call in layers.calls(net, *args, **how)]
        jitted = jax.jit(run)(*args)
        chex.assert_trees_all_close(jitted, run(*args), rtol=1e-5, atol=1e-6)

    def test_keywords_are_part_of_a_call(self):
        class Two(nn.Module):
            @nn.compact
            def __call__(self, x):
                norm = normjax.linen.BatchNorm(name="norm")
                x = norm(x, use_running_average=False)
                return Doubled(3, name="dense")(norm(x, use_running_average=True))

        net, x, said = Two(), draw(0, 6, 2), "use_running_average"
        variables = net.init(KEY, x)
        _, batch, running, dense = layers.calls(net, variables, x)
        self.assertEqual((batch.kwargs, running.kwargs), ({said: False}, {said: True}))
        close(batch.output.mean(0), np.zeros(2), 1e-6)
        close(running.function(x, use_running_average=False), batch.output, 1e-6)
        moved = jnp.broadcast_to(0.01 * x.mean(0), x.shape)  # by the first call
        close(running.function(moved, use_running_average=True), np.zeros(x.shape), 1e-6)
        self.assertEqual((dense.kind, dense.args), ("Doubled", (running.output,)))
        close(dense.output, 2 * running.output @ variables["params"]["dense"]["kernel"], 1e-6)

    def test_a_scan_calls_often(self):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + nn.Dense(3, name="dense")(x), None

        axes = {"params": 0, "intermediates": 0}
        stack = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=5)()
        x = draw(0, 4, 3)
        calls = layers.calls(stack, stack.init(KEY, x, None), x, None)
        self.assertEqual([call.path for call in calls], 5 * [()] + 5 * [("dense",)])
        for layer, after, dense in zip(calls, [*calls[1:5], None], calls[5:], strict=False):
            close(layer.output[0], layer.args[0] + dense.output, 1e-6)
            close(layer.function(x, None)[0], x + dense.function(x), 1e-6)
            assert after is None or jnp.array_equal(after.args[0], layer.output[0])

    @parameterized.parameters(
        (lambda x: x, (jnp.ones((2, 3)),), "calls: .* not a module"),
        (nn.Dense(3), (jnp.ones((2, 3)),), "calls: .* variables"),
    )
    def test_rejects(self, model, args, message):
        with self.assertRaisesRegex(TypeError, message):
            layers.calls(model, *args)
