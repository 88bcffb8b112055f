"""Path lengths against enumeration in NumPy, and the blocks and gains of networks."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import close, draw
from flax import linen as nn
from flax import nnx

import normjax.linen
from normjax.analysis import depth, figures

KEY = jax.random.key(0)
GAINS = [0.0, 0.1, 0.3, 0.5, 1.0, 1.7, 3.0, 0.2, 0.9, 2.5, 0.7, 1.1]


def enumerated(gains, weights="amplitude"):
    """Shares of the numbers of branches, of all paths one by one."""
    total = np.zeros(len(gains) + 1)
    for path in itertools.product((False, True), repeat=len(gains)):
        weight = math.prod(g for g, taken in zip(gains, path, strict=True) if taken)
        total[sum(path)] += weight**2 if weights == "energy" else weight
    total = total**2 if weights == "squared" else total
    return total / total.sum()


@pytest.mark.parametrize("weights", ["amplitude", "energy", "squared"])
@pytest.mark.parametrize("number", [1, 2, 5, 12])
def test_lengths_are_those_of_all_paths(number, weights):
    gains = GAINS[-number:]
    found = depth.path_lengths(gains, weights=weights, fixed=3)
    share = enumerated(gains, weights)
    close(found.share, share, 1e-14)
    assert found.length.tolist() == list(range(3, number + 4))
    close(found.mean, share @ found.length, 1e-14)
    close(found.deviation**2, share @ found.length**2 - found.mean**2, 1e-12)
    assert found.mode == 3 + np.argmax(share)
    low, high = found.band(0.9)
    inside = (found.length >= low) & (found.length <= high)
    below, above = share[found.length < low].sum(), share[found.length > high].sum()
    assert share[inside].sum() >= 0.9 and max(below, above) <= 0.05
    both = depth.path_lengths([gains, gains[::-1]], weights=weights, fixed=3)
    close(both.share, np.stack([share, share]), 1e-14)


def test_equal_gains_are_a_binomial():
    share = depth.path_lengths([0.5] * 53).share
    terms = [math.comb(53, k) * 2.0 ** (53 - k) / 3.0**53 for k in range(54)]
    close(share, np.array(terms), 1e-14)
    for beta in (0.1, 0.5, 2.0):
        found = depth.path_lengths([beta] * 99, weights="squared")
        assert abs(found.mode / 100 - beta / (1 + beta)) <= 1 / 100
        close(depth.equivalent_beta([beta] * 99), beta, 1e-12)


def test_limits():
    inf = math.inf
    assert depth.path_lengths([0.0, 0.0]).share.tolist() == [1, 0, 0]
    for weights in ("amplitude", "energy", "squared"):
        assert depth.path_lengths([inf, inf], weights=weights).share.tolist() == [0, 0, 1]
        close(depth.path_lengths([1e300, 1e-300], weights=weights).share, np.eye(3)[1], 1e-12)
    assert depth.path_lengths([0.0, inf], fixed=0).share.tolist() == [0, 1, 0]
    assert depth.equivalent_beta([inf]) == inf and depth.equivalent_beta([0.0]) == 0


def test_mass_of_squares_gathers_at_the_peak():
    masses = []
    for layers in (20, 100, 500):
        found = depth.path_lengths([0.5] * (layers - 1), weights="squared")
        near = np.abs(found.length / layers - 1 / 3) <= 0.1
        masses.append(found.share[near].sum())
    assert masses == sorted(masses) and masses[-1] > 0.99


def test_critical_rate():
    gains = [0.3, 0.8, 1.5, 0.2]
    squares, r = enumerated(gains, "squared"), np.arange(1, 6)
    one, two = squares @ r, squares @ (r * (r - 1))
    expected = 0.5 * np.log(two / one) - (two - one) / (two + one)
    close(depth.critical_rate(gains), expected, 1e-12)
    rates = [depth.critical_rate([beta] * 49).item() for beta in np.geomspace(0.01, 1e3, 30)]
    assert rates == sorted(rates)
    pure = depth.critical_rate([math.inf] * 49)
    close(pure, 0.5 * np.log(49) - 48 / 50, 1e-12)
    assert max(rates) < pure
    assert depth.critical_rate([0.0]) == -math.inf and depth.critical_rate([math.inf]) == 0


def test_a_common_scale_of_batch_norms_saturates():
    skip, gains = 1.0, []
    for _ in range(54):
        gains.append(2.0 / math.sqrt(skip))
        skip += 2.0**2
    close(depth.batch_norm_gains(54, 2.0), np.array(gains), 1e-12)
    means = [depth.path_lengths(depth.batch_norm_gains(54, s)).mean for s in (0.5, 1, 2, 4, 1e9)]
    assert [round(mean, 1) for mean in means] == [10.2, 11.2, 11.6, 11.8, 12.0]


class Scaled(nn.Module):
    """A block of a linear residual network: its branch is `gain` times an orthogonal matrix."""

    gain: float

    @nn.compact
    def __call__(self, x):
        init = lambda key, shape, dtype: self.gain * nn.initializers.orthogonal()(key, shape, dtype)
        return x + nn.Dense(4, use_bias=False, kernel_init=init)(x)


@pytest.mark.parametrize("samples", [None, 3])
def test_paths_of_a_linear_network_have_the_energies_of_the_polynomial(samples):
    gains = [0.5, 2.0, 1.0, 0.25] if samples is None else [0.7] * 5
    net, x = nn.Sequential([nn.Dense(4), *map(Scaled, gains), nn.relu]), draw(0, 3, 6)
    variables = net.init(KEY, x)
    found = depth.sample(net, variables, x, key=KEY, samples=samples)
    close(found.share, enumerated(gains, "energy"), 1e-5)
    measured = depth.measure(net, variables, x, key=KEY)
    ratios = np.array([[found.forward, found.jacobian] for found in measured.values()])
    close(ratios, np.stack([gains, gains], 1), 1e-5)
    lengths = depth.network_lengths(measured, weights="energy")
    close(lengths.share, found.share, 1e-5)


class Block(nn.Module):
    stride: int = 1
    after: bool = False

    @nn.compact
    def __call__(self, x):
        norm = lambda **how: normjax.linen.BatchNorm(use_running_average=False, **how)
        y = nn.relu(norm(name="first")(nn.Conv(3, (3, 3), self.stride)(x)))
        z = nn.Conv(3, (1, 1))(y)
        y = norm(scale_init=nn.initializers.constant(-0.5), name="last")(z)
        skip = nn.Conv(3, (1, 1), self.stride, name="shortcut")(x) if self.stride > 1 else x
        self.sow("intermediates", "parts", jnp.stack([skip, y, z]))
        return nn.relu(skip + y) if self.after else skip + y


class Net(nn.Module):
    after: bool = False
    wrap: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.wrap else Block
        offset = self.param("offset", nn.initializers.ones, (1, 1, 1, 3))
        x = nn.Conv(3, (3, 3), name="stem")(x) + offset
        x = block(after=self.after, name="a")(x)
        x = block(2, self.after, name="b")(x)
        x = block(after=self.after, name="c")(x)
        x = x + jax.nn.gelu(x)  # without a layer
        return nn.Dense(2, name="head")(x.mean((1, 2)))


@pytest.mark.parametrize(("after", "wrap"), [(False, False), (True, False), (True, True)])
def test_gains_of_blocks(after, wrap):
    net, x = Net(after, wrap), draw(0, 5, 6, 6, 2)
    variables = net.init(KEY, x)
    found = depth.measure(net, variables, x, key=KEY, probes=2)
    assert list(found) == ["a", "b", "c"]
    assert [gains.projection for gains in found.values()] == [False, True, False]
    _, sown = net.apply(variables, x, mutable=["intermediates", "batch_stats"])
    for name, gains in found.items():
        skip, branch, z = np.asarray(sown["intermediates"][name]["parts"][0], float)
        close(gains.forward, np.linalg.norm(branch) / np.linalg.norm(skip), 1e-5)
        close(gains.scale, 0.5, 1e-6)
        close(gains.over_deviation, 0.5 / np.sqrt(z.var((0, 1, 2)).mean()), 1e-4)
    only = depth.measure(net, variables, x, key=KEY, blocks=["c", "a"])
    assert list(only) == ["a", "c"]
    lengths = depth.network_lengths(found)
    assert lengths.length.tolist() == [2, 3, 4], "the projection is a layer of all paths"


class Dense(nnx.Module):
    def __init__(self, rngs):
        self.one, self.two = nnx.Linear(5, 7, rngs=rngs), nnx.Linear(7, 5, rngs=rngs)

    def __call__(self, x):
        return x + self.two(nnx.relu(self.one(x)))


class Flat(nnx.Module):
    """Two sums in one module, the second around a `scan` of three blocks."""

    def __init__(self, rngs):
        self.one, self.inner = nnx.Linear(5, 5, rngs=rngs), Dense(rngs)

    def __call__(self, x):
        x = x + self.one(x)
        return x + self.one(jax.lax.scan(lambda x, _: (self.inner(x), None), x, length=3)[0])


def test_jacobian_gains_of_an_nnx_model():
    net, x = Dense(nnx.Rngs(0)), draw(0, 4, 5)
    net.two.bias[...] = jnp.full(5, 3.0)  # which values have, and no change
    one, two = (np.asarray(layer.kernel[...], float) for layer in (net.one, net.two))
    gates = np.asarray(x, float) @ one > 0
    jacobians = np.einsum("if,bf,fo->bio", one, gates, two)
    expected = np.linalg.norm(jacobians) / math.sqrt(4 * 5)
    found = depth.measure(net, x, key=KEY, probes=400)["__call__"]
    close(found.jacobian, expected, 0.05)
    assert (found.projection, found.scale, found.over_deviation) == (False, None, None)


def test_blocks_of_scans_and_sums_that_hold_others():
    net, x = Flat(nnx.Rngs(0)), draw(0, 4, 5)
    found = depth.measure(net, x, key=KEY)
    assert list(found) == ["__call__", "inner", "inner#2", "inner#3"]
    paths = depth.sample(net, x, key=KEY, blocks=["inner"])
    assert paths.length.tolist() == [1, 2, 3, 4]


def test_rows_over_training():
    gains = lambda *forward: {
        name: depth.Gains(g, 2 * g, name == "b", 1.0, None)
        for name, g in zip("abc", forward, strict=True)
    }
    history = {0: gains(0.5, 9.0, 0.5), 10: gains(1.0, 9.0, 2.0)}
    rows = depth.table(history)
    places = [(row["step"], row["depth"], row["block"]) for row in rows]
    assert places[2:4] == [(0, 2, "c"), (10, 0, "a")]
    assert rows[3]["jacobian"] == 2 and rows[3]["over_deviation"] is None
    first, last = depth.summary(history, by="forward")
    close(np.array([first["mean"], first["beta"]]), np.array([2 + 2 / 3, 0.5]), 1e-12)
    assert (first["mode"], first["low"], first["high"]) == (2, 2, 4) and last["beta"] > 0.5
    assert last["rate"] == depth.critical_rate([1.0, 2.0], fixed=2)
    close(first["relative"], 2 / 3, 1e-12)
    shares = depth.distributions(history)  # by Jacobian gains 1, 1
    close(np.array([row["share"] for row in shares[:3]]), np.array([0.25, 0.5, 0.25]), 1e-12)
    assert [row["length"] for row in shares] == 2 * [2, 3, 4]
    (axes,) = figures.plot(shares, "length", ["share"], by="step").axes
    one, two = axes.lines
    assert one.get_marker() != two.get_marker() and one.get_linestyle() != two.get_linestyle()


@pytest.mark.parametrize(
    ("run", "text"),
    [
        (lambda: depth.path_lengths([0.5, -0.1]), "path_lengths: a gain is -0.1, .*>= 0"),
        (lambda: depth.equivalent_beta([math.nan]), "equivalent_beta: a gain is nan"),
        (lambda: depth.critical_rate([]), "critical_rate: gains have shape"),
        (lambda: depth.path_lengths(0.5), "one for each block"),
        (lambda: depth.path_lengths([1.0], fixed=-1), "fixed=-1 is not a whole number"),
        (lambda: depth.path_lengths([1.0], weights="paths"), "weights='paths'"),
        (lambda: depth.path_lengths([1.0]).band(1.5), "share=1.5"),
        (lambda: depth.batch_norm_gains(0, 1.0), "number=0"),
        (lambda: depth.batch_norm_gains(2, -1.0), "-1.0"),
        (lambda: depth.summary({}), "no blocks"),
        (lambda: depth.table({0: {"a": 1}, 1: {"b": 1}}), "differ in their blocks"),
    ],
)
def test_bad_input(run, text):
    with pytest.raises(ValueError, match=text):
        run()


def test_models_without_blocks():
    x = jnp.ones((2, 3))
    plain = nn.Sequential([nn.Dense(3), nn.gelu, lambda x: x + x])
    variables = plain.init(KEY, x)
    for run in (depth.measure, depth.sample):
        with pytest.raises(ValueError, match="Sequential has no residual block"):
            run(plain, variables, x, key=KEY)
        with pytest.raises(TypeError, match="not a module"):
            run(jnp.tanh, x, key=KEY)
    net = nn.Sequential([Scaled(0.5) for _ in range(13)])
    inputs = net, net.init(KEY, jnp.ones((2, 4))), jnp.ones((2, 4))
    with pytest.raises(ValueError, match="blocks: the pattern 'stage' matches none of layers_0"):
        depth.measure(*inputs, key=KEY, blocks=["stage"])
    with pytest.raises(ValueError, match="13 blocks have too many paths"):
        depth.sample(*inputs, key=KEY)
    with pytest.raises(ValueError, match="probes=0"):
        depth.measure(*inputs, key=KEY, probes=0)
