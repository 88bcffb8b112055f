"""Carrying moments through Linen models: what is followed, what is not, and what it equals."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import normjax as nj
from normjax import linen, propagate
from normjax.linen.carry import add, carry, pointwise

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
METHOD = nj.KalmanNorm(gain=0.3, activation=nn.relu)


class Net(nn.Module):
    """A residual block with a stride, a dilation, groups, biases, and a dense head."""

    method: nj.KalmanNorm = METHOD

    @nn.compact
    def __call__(self, x, train):
        norm = lambda x: linen.Norm(self.method)(x, use_running_average=not train)
        x = norm(nn.Conv(4, (3, 3))(x))
        y = norm(
            nn.Conv(6, (3, 3), strides=2, feature_group_count=2, bias_init=nn.initializers.ones)(x)
        )
        y = nn.Conv(6, (3, 3), kernel_dilation=2, padding="CIRCULAR")(y)
        x = norm(add(nn.Conv(6, (1, 1), (2, 2))(x), y))
        x = linen.KalmanNorm(gain=0.3)(nn.Dense(5)(x), not train)
        return pointwise(nn.tanh, x)


def by_hand(variables, x, train):
    """`Net` with every moment passed on explicitly: output and priors."""
    params, stats = variables["params"], variables["batch_stats"]
    priors = []

    def norm(x, prior, name, method=METHOD):
        priors.append(prior)
        scale, bias = params[name]["scale"], params[name]["bias"]
        state = nj.KalmanRunning(stats[name]["mean"], stats[name]["var"])
        known = nj.KalmanParams(scale, bias)
        y, _ = method.apply(known, state, x, train=train, prior=prior)
        return y, method.posterior(known)

    def conv(x, moments, name, layer, **how):
        layer = layer.clone(parent=None)
        y = layer.apply({"params": params[name]}, x)
        if moments is None:
            return y, None
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        return y, propagate.conv(moments, kernel, bias, size=x.shape[1:3], **how)

    x, _ = conv(x, None, "Conv_0", nn.Conv(4, (3, 3)))
    x, m = norm(x, None, "Norm_0")
    layer = nn.Conv(6, (3, 3), strides=2, feature_group_count=2)
    y, n = conv(x, m, "Conv_1", layer, strides=2, feature_group_count=2)
    y, n = norm(y, n, "Norm_1")
    layer = nn.Conv(6, (3, 3), kernel_dilation=2, padding="CIRCULAR")
    y, n = conv(y, n, "Conv_2", layer, kernel_dilation=2, padding="CIRCULAR")
    x, m = conv(x, m, "Conv_3", nn.Conv(6, (1, 1), (2, 2)), strides=2)
    x, m = norm(x + y, propagate.add(m, n), "Norm_2")
    dense = params["Dense_0"]
    prior = propagate.dense(m, dense["kernel"], dense["bias"])
    x, _ = norm(
        nn.Dense(5).apply({"params": dense}, x), prior, "KalmanNorm_0", nj.KalmanNorm(gain=0.3)
    )
    return nn.tanh(x), priors


@pytest.fixture(scope="module")
def variables():
    with carry():
        return jax.jit(lambda: Net().init(KEY, X, train=False))()


@pytest.mark.parametrize("train", (True, False))
def test_it_equals_passing_by_hand(variables, train):
    @jax.jit
    def run(x):
        with carry() as known:
            y, _ = Net().apply(variables, x, train=train, mutable=["batch_stats"])
        return y, known.priors

    y, priors = run(X)
    wanted, by_layer = by_hand(variables, X, train)
    names = ("Norm_0", "Norm_1", "Norm_2", "KalmanNorm_0")
    assert priors["Norm_0"] is None
    chex.assert_trees_all_close(y, wanted, atol=1e-5)
    found = [priors[name] for name in names]
    chex.assert_trees_all_close(found, by_layer, atol=1e-5)


def test_gradients_flow_through_the_predictions(variables):
    @jax.jit
    def slopes_of(params):
        net = Net(nj.KalmanNorm(gain=0.0, activation=nn.relu))

        def loss(params):
            tree = {**variables, "params": params}
            with carry():
                y, _ = net.apply(tree, X, train=True, mutable=["batch_stats"])
            return jnp.sum(y**2)

        return jax.grad(loss)(params)

    slopes = slopes_of(variables["params"])
    chex.assert_tree_all_finite(slopes)
    assert np.abs(slopes["Norm_0"]["scale"]).max() > 1e-3


def test_what_is_not_known_is_batch_norm():
    class Broken(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i, between in enumerate(
                (nn.relu, lambda x: x, nn.ConvTranspose(4, (3, 3)), lambda x: x)
            ):
                how = {"padding": "REFLECT"} if i == 3 else {}
                x = nn.Conv(4, (3, 3), **how)(between(x))
                x = linen.KalmanNorm(gain=0.0)(x, use_running_average=False)
            return x

    with carry() as known:
        variables = Broken().init(KEY, X)
        known.priors.clear()
        Broken().apply(variables, X, mutable=["batch_stats"])
    told = [known.priors[f"KalmanNorm_{i}"] is not None for i in range(4)]
    assert told == [False, True, False, False]


def test_given_moments_reach_the_first_norm(variables):
    pixels = propagate.prediction(jnp.zeros(3), jnp.ones(3))
    with carry([(X, pixels)]) as known:
        Net().apply(variables, X, train=False)
    conv = variables["params"]["Conv_0"]
    wanted = propagate.conv(pixels, conv["kernel"], conv["bias"], size=(8, 8))
    chex.assert_trees_all_close(known.priors["Norm_0"], wanted)


def test_fused_posteriors_go_through_the_activation():
    method = nj.KalmanNorm(gain=0.3, activation=nn.relu)

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = linen.Norm(method)(x, use_running_average=False)
            return linen.Norm(method)(nn.Dense(5, use_bias=False)(x), use_running_average=False)

    with carry(posterior="fused") as known:
        variables = Two().init(KEY, X)
        Two().apply(variables, X, mutable=["batch_stats"])
    batch = propagate.prediction(X.mean((0, 1, 2)), X.var((0, 1, 2)))
    kernel = variables["params"]["Dense_0"]["kernel"]
    wanted = propagate.dense(propagate.relu(batch), kernel)
    chex.assert_trees_all_close(known.priors["Norm_1"], wanted, atol=1e-5)


class Block(nn.Module):
    """Two Kalman norms; with `own` in a `carry` of their own."""

    own: bool = False
    features: int = 4

    @nn.compact
    def __call__(self, x, train):
        with carry() if self.own else contextlib.nullcontext():
            for _ in range(2):
                x = nn.Conv(self.features, (3, 3), use_bias=False)(x)
                x = linen.KalmanNorm(gain=0.3, activation=nn.relu)(x, not train)
        return x


class Blocks(nn.Module):
    """Two blocks, behind a convolution or not, with or without rematerialization."""

    remat: bool = False
    own: bool = False
    block: type = Block

    @nn.compact
    def __call__(self, x, train):
        block = nn.remat(self.block, static_argnums=(2,)) if self.remat else self.block
        for name in "ab":
            x = block(own=self.own, name=name)(x, train)
        return x


def outputs(net, **how):
    with carry() as known:
        variables = Blocks(own=net.own).init(KEY, X, False)
        known.priors.clear()
        y, _ = net.apply(variables, X, True, mutable=["batch_stats"], **how)
    return y, known.priors


def test_rematerialization_changes_no_value_or_says_why_it_would():
    with pytest.raises(ValueError, match=r"a/\w+_0 .*nn\.remat.* open `carry\(\)`"):
        outputs(Blocks(remat=True))
    (plain, priors), (again, inside) = (outputs(Blocks(remat=r, own=True)) for r in (False, True))
    chex.assert_trees_all_close(plain, again, atol=1e-6)
    told = {name: prior is not None for name, prior in priors.items()}
    assert told == {f"{b}/KalmanNorm_{i}": i == 1 for b in "ab" for i in range(2)}
    assert inside == {}, "tracers of the rematerialized blocks"
    whole, _ = outputs(Blocks())
    assert np.abs(whole - plain).max() > 1e-3, "the second block knew nothing of the first anyway"


class Convolutions(nn.Module):
    """A block without a norm, through which moments pass."""

    own: bool = False

    @nn.compact
    def __call__(self, x, train):
        return nn.Conv(4, (3, 3))(x)


@pytest.mark.parametrize("known", (False, True))
def test_moments_that_a_transformation_would_drop_are_missed(known):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            if known:
                x = linen.KalmanNorm(activation=nn.relu)(x, not train)
            x = nn.remat(Convolutions, static_argnums=(2,))()(x, train)
            return linen.KalmanNorm()(x, not train)

    with carry() as found:
        if known:
            with pytest.raises(ValueError, match="Conv_0 runs inside of a transformation"):
                Net().apply(Net().init(KEY, X, False), X, True, mutable=["batch_stats"])
        else:
            Net().init(KEY, X, False)
            assert found.priors == {"KalmanNorm_0": None}


def test_scans_of_blocks_are_refused_too():
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return linen.KalmanNorm(use_running_average=False)(nn.Conv(3, (3, 3))(x)), None

    scanned = nn.scan(
        Step, length=2, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}
    )

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return scanned()(x, None)[0]

    with carry(), pytest.raises(ValueError, match=r"nn\.scan"):
        Net().apply(Net().init(KEY, X), X, mutable=["batch_stats"])


def test_gradients_and_jit_around_the_model_are_no_border():
    net = Blocks()
    with carry():
        variables = net.init(KEY, X, False)
        run = lambda v: net.apply(v, X, True, mutable=["batch_stats"])[0]
        plain = run(variables)
    with carry():
        jitted = jax.jit(run)(variables)
    with carry():
        slopes = jax.jit(jax.grad(lambda v: run(v).sum()))(variables)
    chex.assert_trees_all_close(plain, jitted, atol=1e-5)
    chex.assert_tree_all_finite(slopes["params"])


def test_one_inside_of_another_starts_anew_and_outside_nothing_happens():
    moments = propagate.prediction(jnp.zeros(3), jnp.ones(3))
    with carry([(X, moments)]) as known, carry() as inner:
        assert known.get(X) is moments and inner.get(X) is None
        assert inner.priors is known.priors
        y = add(X, X)
        assert known.get(y) is None
    norm = linen.KalmanNorm()
    output = norm.apply(norm.init(KEY, X, True), X, True)
    assert isinstance(output, jax.Array)
    chex.assert_trees_all_equal(add(X, X), X + X)
    chex.assert_trees_all_equal(pointwise(nn.relu, X), nn.relu(X))
