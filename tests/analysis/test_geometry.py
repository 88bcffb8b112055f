"""Boundaries, jitter, margins and smart initialization, against NumPy in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import close, draw
from flax import nnx

import normjax.linen
import normjax.nnx
from normjax.analysis import geometry

EPSILON = 1e-3


class Net(nn.Module):
    """Two hidden layers with batch norms."""

    activation: object = nn.relu

    @nn.compact
    def __call__(self, x, train=False):
        for i, width in enumerate((6, 5)):
            x = nn.Dense(width, name=f"dense_{i}")(x)
            how = dict(use_running_average=not train, epsilon=EPSILON, name=f"norm_{i}")
            x = self.activation(normjax.linen.BatchNorm(**how)(x))
        return nn.Dense(3, name="head")(x)


class NnxNet(nnx.Module):
    """The same, with the variables of a `Net`."""

    def __init__(self, variables):
        rngs = nnx.Rngs(0)
        linear = lambda *sizes: nnx.Linear(*sizes, rngs=rngs)
        norm = lambda size: normjax.nnx.BatchNorm(size, epsilon=EPSILON, rngs=rngs)
        self.dense_0, self.norm_0 = linear(3, 6), norm(6)
        self.dense_1, self.norm_1, self.head = linear(6, 5), norm(5), linear(5, 3)
        for name, own in variables["params"].items():
            for leaf, value in {**own, **variables["batch_stats"].get(name, {})}.items():
                getattr(getattr(self, name), leaf).set_value(value)

    def __call__(self, x):
        for i in range(2):
            x = nnx.relu(getattr(self, f"norm_{i}")(getattr(self, f"dense_{i}")(x)))
        return self.head(x)


def random_variables(seed, model, x):
    """Variables of a model, all of them random, and variances positive."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x))
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        value = rng.normal(size=leaf.shape)
        value = 1 + value**2 if path[-1].key in ("var", "scale") else value
        return jnp.asarray(value, jnp.float32)

    return jax.tree.map_with_path(fill, shapes)


def arguments(front, variables, x):
    """A model of a front end and the arguments of its call."""
    if front == "linen":
        return Net(), variables, x
    model = NnxNet(variables)
    model.eval()
    return model, x


def oracle(variables, x):
    """Values u, logits and their Jacobians for samples f64[N, 3], by layer."""
    wide = jax.tree.map(lambda a: np.asarray(a, "float64"), variables)
    params, stats = wide["params"], wide["batch_stats"]
    y = np.asarray(x, "float64")
    slopes = np.broadcast_to(np.eye(3), (len(y), 3, 3))
    found = []
    for i in range(2):
        dense, norm, run = params[f"dense_{i}"], params[f"norm_{i}"], stats[f"norm_{i}"]
        factor = norm["scale"] / np.sqrt(run["var"] + EPSILON)
        y = (y @ dense["kernel"] + dense["bias"] - run["mean"]) * factor + norm["bias"]
        slopes = (slopes @ dense["kernel"]) * factor
        found.append((y, slopes))
        slopes, y = slopes * (y > 0)[:, None], np.maximum(y, 0)
    head = params["head"]
    return found, (y @ head["kernel"] + head["bias"], slopes @ head["kernel"])


def oracle_distances(variables, x):
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = [np.abs(u) / np.linalg.norm(j, axis=1) for u, j in oracle(variables, x)[0]]
    return ratios


X = draw(0, 40, 3)
VARIABLES = random_variables(1, Net(), X)


def test_total_least_squares():
    kernel, z = draw(0, 7, 4, dtype="float64"), 3 + draw(1, 50, 2, 7, dtype="float64")
    with jax.enable_x64(True):
        fit = geometry.tls_fit(kernel, z)
        values = z.reshape(-1, 7) @ kernel
        lengths = np.linalg.norm(kernel, axis=0)
        close(fit.bias, -values.mean(0), 1e-10)
        close(fit.objective, np.sum((values - values.mean(0)) ** 2, 0) / lengths**2, 1e-10)
        close(fit.var, lengths**2 * np.asarray(fit.objective) / 100, 1e-10)
        step = 1e-3
        up, down = (geometry.tls_objective(kernel, fit.bias + s, z) for s in (step, -step))
        close((up - down) / (2 * step), np.zeros(4), 1e-8)
        close((up + down - 2 * fit.objective) / step**2, 200 / lengths**2, 1e-4)


@pytest.mark.parametrize("front", ["linen", "nnx"])
def test_distances(front):
    found = geometry.distances(*arguments(front, VARIABLES, X))
    assert [*found] == ["relu_0", "relu_1"]
    for ours, right in zip(found.values(), oracle_distances(VARIABLES, X), strict=True):
        known = np.isfinite(right)
        assert (np.isinf(ours) == ~known).all() and known.mean() > 0.5
        close(np.asarray(ours)[known], right[known], 1e-4)
    counts = geometry.crossings(found, 0.5)["relu_1"]
    close(counts, (oracle_distances(VARIABLES, X)[1] <= 0.5).sum(1), 0)


def test_the_foot_point():
    found = geometry.nearest(Net(), VARIABLES, X)
    distances = oracle_distances(VARIABLES, X)
    pairs = oracle(VARIABLES, X)[0]
    signs = lambda x, layer: np.sign(oracle(VARIABLES, x)[0][layer][0])
    for layer, of_layer in enumerate(found.values()):
        unit = np.argmin(distances[layer], 1)
        close(of_layer.unit, unit, 0)
        rows = np.arange(len(X))
        u, g = pairs[layer][0][rows, unit], pairs[layer][1][rows, :, unit]
        length = np.sum(g**2, 1)
        foot = X - (u / np.where(length > 0, length, 1))[:, None] * g
        same = [np.all(signs(foot, i) == signs(X, i), 1) for i in range(layer)]
        exact = (length > 0) & (np.all(same, 0) if same else True)
        assert (np.asarray(of_layer.exact) == exact).all()
    assert 0.2 < np.mean(found["relu_1"].exact) < 1 and found["relu_0"].exact.all()


@pytest.mark.parametrize("slope", [0.9999, 0.5, 0.0])
def test_a_foot_point_behind_another_boundary(slope):
    class Bent(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.relu(nn.leaky_relu(x, slope) + 1)

    first, second = geometry.nearest(Bent(), {}, jnp.array([[1.0], [-0.5]])).values()
    assert first.exact.all()
    close(second.distance[0], 2.0, 1e-6)
    assert second.exact.tolist() == [False, slope > 0]


def test_pools_may_switch_before_the_foot_point():
    class Pooled(nn.Module):
        @nn.compact
        def __call__(self, x):
            pooled = nn.max_pool(x[..., None], (2,))[..., 0]
            return nn.relu(pooled - jnp.array([[1.0]]))

    (found,) = geometry.nearest(Pooled(), {}, jnp.array([[3.0, 2.0], [3.0, 0.5]])).values()
    close(found.distance, np.array([2.0, 2.0]), 1e-6)
    assert found.exact.tolist() == [False, True]


def test_kinds_of_boundaries():
    def model(x):
        x = nn.leaky_relu(x - 1) + nn.hard_tanh(x) + jnp.maximum(2 * x, x - 3)
        return nn.max_pool(jnp.abs(x)[..., None], (2,))[..., 0]

    class Kinds(nn.Module):
        @nn.compact
        def __call__(self, x):
            return model(x)

    x = jnp.array([[0.5, 4.0]])
    found = geometry.distances(Kinds(), {}, x)
    assert [name.rpartition("_")[0] for name in found] == [
        *("leaky_relu", "hard_tanh", "hard_tanh", "max", "abs")
    ]
    leaky, low, high, larger, _ = found.values()
    close(leaky, np.array([[0.5, 3.0]]), 1e-6)
    assert sorted([float(low[0, 0]), float(high[0, 0])]) == [0.5, 1.5]
    close(larger, np.array([[3.5, 7.0]]), 1e-6)  # 2 x = x - 3


def test_convolutions_have_a_unit_for_each_position():
    model = nn.Sequential([nn.Conv(2, (3, 3)), nn.relu])
    x = jnp.asarray(draw(0, 2, 5, 5, 1))
    variables = model.init(jax.random.key(0), x)
    (found,) = geometry.distances(model, variables, x).values()
    kernel = np.asarray(variables["params"]["layers_0"]["kernel"], "float64")
    u = np.asarray(model.apply(variables, x, method=lambda m, x: m.layers[0](x)), "float64")
    length = np.linalg.norm(kernel.reshape(-1, 2), axis=0)
    assert found.shape == (2, 5, 5, 2)
    close(found[:, 2, 3], np.abs(u[:, 2, 3]) / length, 1e-5)


@pytest.mark.parametrize("front", ["linen", "nnx"])
def test_margins(front):
    labels = jnp.arange(len(X)) % 3
    found = geometry.margins(*arguments(front, VARIABLES, X), labels=labels)
    logits, slopes = oracle(VARIABLES, X)[1]
    predicted = logits.argmax(1)
    rows = np.arange(len(X))
    gaps = logits[rows, predicted][:, None] - logits
    lengths = np.linalg.norm(slopes[rows, :, predicted][:, :, None] - slopes, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(lengths > 0, gaps / lengths, np.inf)
    close(found.predicted, predicted, 0)
    sign = np.where(predicted == labels, 1, -1)
    known = np.isfinite(ratios.min(1))
    close(np.asarray(found.first_order)[known], (sign * ratios.min(1))[known], 1e-4)
    met = np.isfinite(found.along)
    assert met.sum() > 20
    for i in np.flatnonzero(met):
        g = (slopes[i, :, predicted[i]] - slopes[i, :, found.other[i]]) / lengths[i, found.other[i]]
        for factor, same in ((0.999, True), (1.001, False)):
            at = oracle(VARIABLES, X[i : i + 1] - factor * float(found.along[i]) * g)[1][0]
            assert (at.argmax() == predicted[i]) == same


@pytest.mark.parametrize(("front", "upstream"), [("linen", False), ("nnx", True)])
def test_jitter(front, upstream):
    x = draw(2, 300, 3)
    how = dict(batch_size=20, key=jax.random.key(0), batches=50, upstream=upstream)
    found = geometry.jitter(*arguments(front, VARIABLES, x), **how)
    assert [*found] == ["norm_0", "norm_1"]
    first = found["norm_0"]
    wide = jax.tree.map(lambda a: np.asarray(a, "float64"), VARIABLES["params"])
    a = np.asarray(x, "float64") @ wide["dense_0"]["kernel"] + wide["dense_0"]["bias"]
    ratio = wide["norm_0"]["bias"] / wide["norm_0"]["scale"]
    keys = jax.random.split(how["key"], 50)
    order = jax.vmap(lambda key: jax.random.permutation(key, 300)[:20])(keys)
    batches = a[np.asarray(order)]
    deviation = np.sqrt(batches.var(1) + EPSILON)
    right = batches.mean(1) - ratio * deviation
    close(first.thresholds, right, 1e-4)
    for name, values in (("threshold", right), ("mean", batches.mean(1)), ("deviation", deviation)):
        close(getattr(first, f"{name}_var"), values.var(0), 1e-4)
    whole = np.sqrt(a.var(0) + EPSILON)
    influence = (a - a.mean(0)) - ratio * ((a - a.mean(0)) ** 2 - a.var(0)) / (2 * whole)
    close(first.threshold_law / (influence.var(0) / 20 * 280 / 299), np.ones(6), 0.1)


def test_thresholds_behind_a_norm_that_trains_move_less():
    x = draw(2, 300, 3)
    how = dict(batch_size=10, key=jax.random.key(0), batches=200)
    one, two = (
        geometry.jitter(Net(), VARIABLES, x, **how, upstream=upstream)["norm_1"]
        for upstream in (False, True)
    )
    alone = one.threshold_var / one.threshold_law
    close(alone, np.ones(5), 0.4)
    assert np.mean(two.threshold_var / two.threshold_law) < 0.5 * np.mean(alone)


class Plain(nn.Module):
    """A batch norm alone, of features or of a map."""

    @nn.compact
    def __call__(self, x):
        return normjax.linen.BatchNorm(use_running_average=True, epsilon=0.0, name="norm")(x)


def jitter_of(x, ratios, batch_size, batches):
    variables = Plain().init(jax.random.key(0), x)
    variables["params"]["norm"]["bias"] = jnp.asarray(ratios, jnp.float32)
    how = dict(batch_size=batch_size, key=jax.random.key(1), batches=batches)
    return geometry.jitter(Plain(), variables, x, **how)["norm"]


@pytest.mark.parametrize(
    ("kind", "batch_size"), [("gaussian", 512), ("skewed", 32), ("skewed", 512), ("maps", 32)]
)
def test_the_law_of_jitter(kind, batch_size):
    rng = np.random.default_rng(0)
    ratios = np.array([0.0, 0.5, 1.5, -1.0])
    shape = (1000, 4)
    x = rng.normal(size=shape) if kind == "gaussian" else rng.gamma(4, size=shape)
    if kind == "maps":  # correlated over positions
        x = x[:, None] + 0.5 * rng.normal(size=(1000, 3, 4))
    found = jitter_of(jnp.asarray(x, jnp.float32), ratios, batch_size, 1500)
    for name in ("threshold", "mean", "deviation"):
        ratio = getattr(found, f"{name}_var") / getattr(found, f"{name}_law")
        assert abs(np.mean(ratio) - 1) < 0.05, name


def test_no_jitter_with_all_samples():
    found = jitter_of(jnp.asarray(draw(0, 30, 4)), np.ones(4), 30, 5)
    close(found.threshold_law, np.zeros(4), 0)
    close(found.threshold_var, np.zeros(4), 1e-12)


@pytest.mark.parametrize("front", ["linen", "nnx"])
def test_jitter_of_the_decision_boundary(front):
    x = draw(2, 200, 3)
    how = dict(points=X, batch_size=50, key=jax.random.key(0), batches=3)
    found = geometry.decision_jitter(*arguments(front, VARIABLES, x), **how)
    stats = lambda batch: Net().apply(
        VARIABLES, batch, train=True, mutable=["moments", "batch_stats"]
    )[1]["moments"]

    def logits(batch):
        seen = {name: own["seen"][0] for name, own in stats(batch).items()}
        own = {name: {"mean": s.mean, "var": s.var} for name, s in seen.items()}
        return oracle({**VARIABLES, "batch_stats": own}, X)[1]

    own = logits(x)[0].argmax(1)
    rows = np.arange(len(X))
    for key, margins in zip(jax.random.split(how["key"], 3), found.margins, strict=True):
        f, slopes = logits(x[np.asarray(jax.random.permutation(key, 200)[:50])])
        lengths = np.linalg.norm(slopes[rows, :, own][:, :, None] - slopes, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.where(lengths > 0, (f[rows, own][:, None] - f) / lengths, np.inf)
        known = np.isfinite(ratios.min(1))
        close(np.asarray(margins)[known], ratios.min(1)[known], 1e-3)
    close(found.flips, np.mean(np.asarray(found.margins) < 0, 0), 1e-6)


@pytest.mark.parametrize(("front", "deviation"), [("linen", True), ("linen", False), ("nnx", True)])
def test_smart_init(front, deviation):
    given = arguments(front, VARIABLES, 2 + X)
    new = geometry.smart_init(*given, deviation=deviation)
    if front == "linen":
        stats = new["batch_stats"]
    else:
        assert new is given[0]
        stats = nnx.to_pure_dict(nnx.state(new, nnx.BatchStat))
    for layer in range(2):
        found = oracle({**VARIABLES, "batch_stats": stats}, 2 + X)[0][layer][0]
        norm = jax.tree.map(np.asarray, VARIABLES["params"][f"norm_{layer}"])
        standard = (found - norm["bias"]) / norm["scale"]
        close(standard.mean(0), np.zeros(standard.shape[1]), 1e-4)
        var = np.asarray(stats[f"norm_{layer}"]["var"])
        if deviation:
            close(standard.std(0) ** 2 * (var + EPSILON), var, 1e-3)
        else:
            close(var, np.ones_like(var), 0)
    want = given[0](2 + X) if front == "nnx" else Net().apply(new, 2 + X)
    done = geometry.smart_init(*given, deviation=deviation, fold=True)
    model, variables = done.model, done.variables
    close(model(2 + X) if front == "nnx" else model.apply(variables, 2 + X), want, 1e-3)
    assert [*done.folded] == ["norm_0", "norm_1"]


def test_pictures(tmp_path):
    x = X[:, :2]
    variables = random_variables(1, Net(), x)
    how = dict(key=jax.random.key(0), draws=2, resolution=5, labels=np.arange(40) % 2)
    path = tmp_path / "jitter.png"
    figure = geometry.plot_jitter(Net(), variables, x, batch_sizes=[8, 16], path=path, **how)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    panels = "relu_0", "relu_1", "decision"
    assert titles == [f"{name}, batch {size}" for size in (8, 16) for name in panels]
    assert path.stat().st_size > 1000
    groups = {"net": geometry.distances(Net(), variables, x)}
    figure = geometry.plot_distances(groups, unit=2.0)
    line, middle = figure.axes[0].lines
    d = np.sort(np.ravel(groups["net"]["relu_0"])) / 2
    close(np.asarray(line.get_xdata()), d[np.isfinite(d)], 1e-5)
    close(np.asarray(middle.get_xdata()), np.median(d, keepdims=True), 1e-5)


class Affine(nn.Module):
    """No activation and no norm."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x)


def linen(model, x=X):
    return model, model.init(jax.random.key(0), x), x


KEY = dict(key=jax.random.key(0))
BAD = [
    ("no boundary", ValueError, lambda: geometry.distances(*linen(Net(nn.tanh))), "tanh of its"),
    (
        "statistics of the sample",
        ValueError,
        lambda: geometry.distances(*linen(nn.Sequential([normjax.linen.LayerNorm(), nn.relu]))),
        "of its input, which is not piecewise affine",
    ),
    ("affine", ValueError, lambda: geometry.nearest(*linen(Affine())), "no activation"),
    ("training", ValueError, lambda: geometry.distances(*linen(Net()), train=True), "evaluate"),
    ("no model", TypeError, lambda: geometry.distances(nn.relu, X), "not a module"),
    ("integers", ValueError, lambda: geometry.distances(Net(), VARIABLES, X.astype(int)), "int64"),
    ("radius", ValueError, lambda: geometry.crossings({}, -1.0), "radius=-1.0"),
    (
        "no norms",
        ValueError,
        lambda: geometry.jitter(*linen(Affine()), batch_size=4, **KEY),
        "Affine has no BatchNorm",
    ),
    (
        "large batch",
        ValueError,
        lambda: geometry.jitter(Net(), VARIABLES, X, batch_size=41, **KEY),
        "batch_size=41 is more than the 40 samples",
    ),
    (
        "points",
        ValueError,
        lambda: geometry.decision_jitter(Net(), VARIABLES, X, points=X[:, :2], batch_size=4, **KEY),
        "points of shape",
    ),
    (
        "labels",
        ValueError,
        lambda: geometry.margins(Net(), VARIABLES, X, labels=jnp.zeros((40, 3), int)),
        r"labels of shape \(40, 3\) for 40 samples",
    ),
    (
        "real labels",
        TypeError,
        lambda: geometry.margins(Net(), VARIABLES, X, labels=jnp.zeros(40)),
        "labels are float32",
    ),
    (
        "one class",
        ValueError,
        lambda: geometry.margins(*linen(nn.Dense(1))),
        r"shape \(40, 1\)",
    ),
    ("no layers", ValueError, lambda: geometry.plot_distances({}), "layers are"),
    (
        "no plane",
        ValueError,
        lambda: geometry.plot_jitter(Net(), VARIABLES, X, batch_sizes=[4], **KEY),
        r"samples of shape \(40, 3\)",
    ),
    ("kernel", ValueError, lambda: geometry.tls_fit(jnp.ones((4, 2)), X), r"\(4, 2\)"),
    (
        "nothing to set",
        ValueError,
        lambda: geometry.smart_init(*linen(Affine())),
        "smart_init: .* no norm",
    ),
]


@pytest.mark.parametrize(("error", "call", "text"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(error, call, text):
    with pytest.raises(error, match=text):
        call()
