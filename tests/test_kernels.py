"""Layers and models with normalized kernels, and rows that an optimizer keeps at length one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from agreement import close, draw
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import normjax as nj
from normjax import linen as norms
from normjax import nnx as nnx_norms
from normjax import optim

KEY = jax.random.key(0)


class Net(nn.Module):
    """All kinds of layers with kernels, and a norm with running statistics."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3))(x)
        x = norms.BatchNorm(use_running_average=not train)(x)
        x = nn.ConvTranspose(3, (4, 4), (2, 2))(x)
        x = nn.Einsum((3, 5), "nhwc,cd->nhwd")(x)
        return nn.Dense(2)(x.mean((1, 2)))


def net(rngs):
    return nnx.Sequential(
        nnx.Conv(2, 4, (3, 3), rngs=rngs),
        nnx_norms.BatchNorm(4, rngs=rngs),
        nnx.ConvTranspose(4, 3, (4, 4), (2, 2), rngs=rngs),
        nnx.Einsum("nhwc,cd->nhwd", (3, 5), (5,), rngs=rngs),
        nnx.Linear(5, 2, rngs=rngs),
    )


X = jnp.asarray(draw(0, 2, 4, 4, 2))


def values(module):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module)))


def same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_linen_wrapping_a_trained_model_changes_nothing_and_unwrapping_gives_it_back():
    variables = Net().init(KEY, X)
    model = norms.NormalizedKernels(Net(), nj.WeightNorm())
    wrapped = model.wrap(variables)
    made = jax.tree.map(jnp.shape, model.init(KEY, X))
    assert made == jax.tree.map(jnp.shape, wrapped)
    close(model.apply(wrapped, X), Net().apply(variables, X), 1e-6)
    moved = jax.tree.map(lambda a: a + 0.1, wrapped)
    y, new = model.apply(moved, X, True, mutable=["batch_stats"])
    plain = model.unwrap(moved)
    z, stats = Net().apply(plain, X, True, mutable=["batch_stats"])
    same((y, new["batch_stats"]["module"]), (z, stats["batch_stats"]))
    kernel = moved["params"]["module"]["Conv_0"]["kernel"]
    scale = moved["params"]["kernels"]["Conv_0"]["kernel"]["scale"]
    wanted = oracles.apply(model.method, nj.AffineParams(scale), (), kernel, train=False)[0]
    close(plain["params"]["Conv_0"]["kernel"], wanted.astype("float32"), 1e-6)


def test_nnx_wrapping_a_trained_model_changes_nothing_and_unwrapping_gives_it_back():
    plain = nnx.view(net(nnx.Rngs(0)), use_running_average=True)
    before = values(plain)
    model = nnx_norms.NormalizedKernels(plain, nj.WeightNorm())
    close(model(X), plain(X), 1e-6)
    for variable in jax.tree.leaves(
        nnx.state(model.kernels), is_leaf=lambda a: isinstance(a, nnx.Param)
    ):
        variable.set_value(variable[...] + 0.1)
    removed = model.unwrap()
    same(removed(X), model(X))
    same(values(plain), before)
    removed.layers[0].kernel.set_value(removed.layers[0].kernel[...] * 0)
    same(values(plain), before)
    model.train()
    model(X)
    assert np.any(plain.layers[1].mean[...] != before["layers"][1]["mean"])


def test_linen_forward_passes_move_nothing_and_share_an_estimate():
    """The vectors move by `step`, which is a call with `kernel_stats` mutable."""
    model = norms.NormalizedKernels(Net(), nj.SpectralWeightNorm())
    variables = model.init(KEY, X)
    variables = {**variables, "params": jax.tree.map(lambda a: a + 0.1, variables["params"])}

    @jax.jit
    def step(variables, real, fake):
        variables = model.step(variables)
        return variables, [model.apply(variables, x) for x in (real, fake, real)]

    new, (real, fake, again) = step(variables, X, X + 1)
    same(real, again)
    plain = model.unwrap(new)
    close((real, fake), tuple(Net().apply(plain, x) for x in (X, X + 1)), 1e-6)
    _, others = model.apply(new, X, True, mutable=["batch_stats"])
    assert list(others) == ["batch_stats"]
    start, moved = variables.pop("kernel_stats"), new.pop("kernel_stats")
    same(new, variables)
    _, called = model.apply(variables | {"kernel_stats": start}, X, mutable=["kernel_stats"])
    close(called["kernel_stats"], moved, 1e-6)
    for name in ("Conv_0", "ConvTranspose_0", "Einsum_0", "Dense_0"):
        pick = lambda tree, name=name: nj.PowerIteration(**tree["kernels"][name]["kernel"])
        kernel = variables["params"]["module"][name]["kernel"]
        once = nj.SpectralWeightNorm().apply((), pick(start), kernel, train=True)[1]
        close(pick(moved), once, 1e-6)
        assert np.any(pick(start).vector != once.vector)


def test_nnx_forward_passes_move_nothing_and_share_an_estimate():
    plain = nnx.view(net(nnx.Rngs(0)), use_running_average=True)
    model = nnx_norms.NormalizedKernels(plain, nj.SpectralWeightNorm(), rngs=nnx.Rngs(1))
    plain.layers[0].kernel.set_value(plain.layers[0].kernel[...] + 0.1)
    before = values(model)

    @nnx.jit
    def passes(model, x):
        return [model(x), model(x + 1), model(x)]

    first, _, again = passes(model, X)
    same(first, again)
    same(values(model), before)
    nnx.jit(lambda model: model.step())(model)
    after = values(model)
    same(after["module"], before["module"])
    vector = lambda tree: tree["kernel_stats"]["layers"]["0"]["kernel"]["vector"]
    state, kernel = nj.PowerIteration(vector(before)), plain.layers[0].kernel[...]
    wanted = nj.SpectralWeightNorm().apply((), state, kernel, train=True)[1]
    close(vector(after), np.asarray(wanted.vector), 1e-6)
    assert np.any(vector(after) != vector(before))


def test_linen_gradients_reach_kernels_and_scales_under_every_transform():
    """Layers wrapped one by one inside of scan and remat are those of the whole stack by hand."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jnp.sin(norms.NormalizedKernels(nn.Dense(3), nj.WeightNorm())(x)), None

    axes = {"params": 0}
    stack = nn.scan(nn.remat(Block), axes, split_rngs={"params": True}, length=2, out_axes=0)()
    x = jnp.asarray(draw(1, 4, 3))
    params = stack.init(KEY, x, None)["params"]
    params = jax.tree.map(lambda a: a + 0.1, params)
    assert params["NormalizedKernels_0"]["kernels"]["kernel"]["scale"].shape == (2, 3)

    def by_hand(params, x):
        for i in range(2):
            p = jax.tree.map(lambda a, i=i: a[i], params)
            scale = p["NormalizedKernels_0"]["kernels"]["kernel"]["scale"]
            kernel = p["Dense_0"]["kernel"]
            kernel = kernel * (scale / jnp.sqrt(jnp.sum(kernel**2, 0)))[None]
            x = jnp.sin(x @ kernel + p["Dense_0"]["bias"][None])
        return x

    run = lambda params, x: stack.apply({"params": params}, x, None)[0]
    loss = lambda f: lambda params, x: jnp.sum(f(params, x) ** 2)
    found, wanted = (jax.jit(jax.value_and_grad(loss(f)))(params, x) for f in (run, by_hand))
    close(found, wanted, 1e-5)
    many = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), params)
    close(jax.vmap(run, (0, None))(many, x)[1], run(jax.tree.map(lambda a: 2 * a, params), x), 1e-6)


def test_nnx_gradients_reach_kernels_and_scales_under_every_transform():
    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def make(rngs):
        return nnx_norms.NormalizedKernels(nnx.Linear(3, 3, rngs=rngs), nj.WeightNorm())

    stack = make(nnx.Rngs(0))
    assert stack.kernels["kernel"]["scale"].shape == (2, 3)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    @nnx.remat
    def run(layer, x):
        return jnp.sin(layer(x))

    x = jnp.asarray(draw(1, 4, 3))
    gradients = nnx.to_pure_dict(nnx.grad(lambda stack, x: jnp.sum(run(stack, x) ** 2))(stack, x))

    def by_hand(kernel, scale, x):
        for k, s in zip(kernel, scale, strict=True):
            x = jnp.sin(x @ (k * (s / jnp.sqrt(jnp.sum(k**2, 0)))[None]))
        return jnp.sum(x**2)

    point = stack.module.kernel[...], stack.kernels["kernel"]["scale"][...]
    wanted = jax.grad(by_hand, (0, 1))(*point, x)
    found = gradients["module"]["kernel"], gradients["kernels"]["kernel"]["scale"]
    close(found, wanted, 1e-5)


DIVIDED = (
    nj.WeightNorm(),
    nj.SpectralWeightNorm(),
    nj.SpectralWeightNorm(operator="torus", map_size=(4,)),
)


@pytest.mark.parametrize("kind", (AxisType.Auto, AxisType.Explicit))
@pytest.mark.parametrize("method", DIVIDED)
def test_rows_may_be_divided_among_devices(kind, method):
    """Under `jit`, along both axes of a kernel: parameters and gradients stay where they are."""
    mesh = jax.make_mesh((4, 2), ("in", "out"), axis_types=(kind, kind))
    kernel = jnp.asarray(draw(0, 2, 8, 6))
    params, state = method.init(KEY, kernel)

    @jax.jit
    def step(params, kernel, state):
        run = lambda k: jnp.sum(jnp.sin(method.apply(params, state, k, train=True)[0]))
        return jax.grad(run)(kernel), method.apply(params, state, kernel, train=True)

    wanted = step(params, kernel, state)
    with jax.set_mesh(mesh):
        put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
        point = put(params, P("out")), put(kernel, P(None, "in", "out")), put(state, P("out"))
        found = step(*point)
    close(found, wanted, 1e-6)
    assert found[0].sharding.is_equivalent_to(point[1].sharding, 3)


def test_half_precision_kernels_are_measured_in_float32():
    layer = norms.NormalizedKernels(
        nn.Dense(8, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16), nj.WeightNorm()
    )
    x = jnp.asarray(draw(0, 2, 4096), jnp.bfloat16)
    variables = layer.init(KEY, x)
    kernel = np.asarray(variables["params"]["module"]["kernel"], np.float64)
    scale = variables["params"]["kernels"]["kernel"]["scale"]
    np.testing.assert_allclose(scale, np.linalg.norm(kernel, axis=0), rtol=1e-6)
    normal = layer.unwrap(variables)["params"]["kernel"]
    assert normal.dtype == jnp.bfloat16 and layer.apply(variables, x).dtype == jnp.bfloat16
    same(normal, variables["params"]["module"]["kernel"])


def test_partitioned_kernels_keep_their_boxes():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    layer = norms.NormalizedKernels(nn.Dense(3, kernel_init=init), nj.StrictWeightNorm())
    x = jnp.ones((2, 4))
    variables = layer.init(KEY, x)
    plain = layer.unwrap(variables)
    assert plain["params"]["kernel"].names == (None, "model")
    close(nn.Dense(3).apply(nn.unbox(plain), x), layer.apply(variables, x), 1e-6)


def test_patterns_choose_kernels():
    model = norms.NormalizedKernels(Net(), nj.StrictWeightNorm(), ("Conv*/kernel", "Einsum_0/k*"))
    variables = model.init(KEY, X)
    plain, old = model.unwrap(variables)["params"], variables["params"]["module"]
    changed = {name for name in old if np.any(plain[name].get("kernel") != old[name].get("kernel"))}
    assert changed == {"Conv_0", "ConvTranspose_0", "Einsum_0"}
    model = nnx_norms.NormalizedKernels(net(nnx.Rngs(0)), nj.WeightNorm(), ("layers/2/kernel",))
    assert list(nnx.to_pure_dict(nnx.state(model.kernels))["layers"]) == ["2"]


@pytest.mark.parametrize(
    ("linen_layer", "nnx_layer", "method", "patterns", "text"),
    [
        (nn.LayerNorm(), nnx.LayerNorm, nj.WeightNorm(), None, "no parameter called `kernel`"),
        (nn.Dense(3), nnx.Linear, nj.WeightNorm(), ("kernels",), "'kernels' matches none of"),
        (nn.Dense(3), nnx.Linear, nj.WeightNorm(), ("bias",), "has no rows"),
        (nn.Dense(3), nnx.Linear, nj.BatchNorm(), None, "normalizes activations"),
        (nn.Dense(3), nnx.Linear, nj.WeightNorm, None, "is not a method but a class"),
    ],
)
def test_wrappers_refuse_what_does_not_fit(linen_layer, nnx_layer, method, patterns, text):
    with pytest.raises(ValueError, match=text):
        norms.NormalizedKernels(linen_layer, method, patterns).init(KEY, jnp.ones((2, 4)))
    sizes = (4,) if nnx_layer is nnx.LayerNorm else (4, 3)
    plain = nnx_layer(*sizes, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=text):
        nnx_norms.NormalizedKernels(plain, method, patterns)


def test_a_norm_of_activations_is_not_one_of_kernels():
    with pytest.raises(ValueError, match="give it and the layer to `NormalizedKernels`"):
        norms.Norm(nj.WeightNorm()).init(KEY, X, True)
    with pytest.raises(ValueError, match="give it and the layer to `NormalizedKernels`"):
        nnx_norms.Norm(nj.WeightNorm(), 2, rngs=nnx.Rngs(0))


# The projection.


def test_unit_rows_end_every_step_on_spheres():
    params = {"a": {"kernel": jnp.asarray(draw(0, 4, 3)), "bias": jnp.ones(3)}}
    params["half"] = {"kernel": jnp.asarray(draw(1, 64, 3), jnp.bfloat16)}
    optimizer = optax.chain(optax.adam(0.1), optim.unit_rows())
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    new = optax.apply_updates(params, updates)
    norm = lambda leaf: np.linalg.norm(np.asarray(leaf, np.float64), axis=0)
    np.testing.assert_allclose(norm(new["a"]["kernel"]), 1, rtol=1e-6)
    np.testing.assert_allclose(norm(new["half"]["kernel"]), 1, rtol=2e-3)
    np.testing.assert_allclose(new["a"]["bias"], 0.9, rtol=1e-6)
    moved = params["a"]["kernel"] - 0.1 * jnp.sign(params["a"]["kernel"])
    close(new["a"]["kernel"], moved / jnp.linalg.norm(moved, axis=0, keepdims=True), 1e-5)
    named = optim.unit_rows("a", feature_axes=0)
    with pytest.raises(ValueError, match="has no rows"):
        named.update(params, named.init(params), params)
    with pytest.raises(ValueError, match="unit_rows: there is no parameter called `kernel`"):
        optim.unit_rows().init({"scale": jnp.ones(3)})
    with pytest.raises(ValueError, match="needs params"):
        optimizer.update(params, optimizer.init(params))
