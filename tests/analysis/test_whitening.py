"""Measures of correlation and of disturbance, against NumPy in float64, and their laws."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import close, draw

import normjax as nj
from normjax.analysis import figures, whitening
from normjax.linen import Norm


def correlated(seed, samples, features, dtype="float64"):
    """Gaussian samples with correlated features of different deviations."""
    x = draw(seed, samples, features, dtype="float64") @ draw(seed + 1, features, features)
    return (x * np.arange(1, 1 + features) + 5).astype(dtype)


def oracle(x):
    """Of features f64[..., C]."""
    rows = np.asarray(x, "float64").reshape(-1, x.shape[-1])
    corr = np.corrcoef(rows.T)
    pairs = corr[~np.eye(len(corr), dtype=bool)]
    conditions = (np.linalg.cond(matrix) for matrix in (np.cov(rows.T), corr))
    return whitening.Measures(*conditions, np.mean(pairs**2))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("float64", 1e-9)])
def test_oracle(dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        maps = {
            "a": correlated(0, 200, 7, dtype),
            "b": correlated(2, 60, 6, dtype).reshape(3, 4, 5, 6),
        }
        found = jax.jit(whitening.measure)(maps)
        assert [*found] == [*maps]
        for name, x in maps.items():
            close(found[name], oracle(x), tolerance)


def test_the_variance_of_the_eigenvalues_is_the_mass():
    x = correlated(0, 500, 9)
    values = np.linalg.eigvalsh(np.corrcoef(x.T))
    found = whitening.measure({"x": jnp.asarray(x, jnp.float32)})["x"]
    close(8 * found.off_diagonal, np.var(values), 1e-5)


def test_chance_correlations():
    x = draw(0, 400, 20, 40)
    found = jax.vmap(lambda x: whitening.measure({"x": x})["x"].off_diagonal)(x)
    error = np.std(found) / 20
    assert abs(np.mean(found) - 1 / 19) < 4 * error < 2e-3


def test_large_condition_numbers_in_float32():
    basis, _ = np.linalg.qr(draw(0, 8, 8, dtype="float64"))
    centred = draw(1, 100, 8, dtype="float64")
    white, _ = np.linalg.qr(centred - centred.mean(0))
    for condition in (1e4, 1e8):
        x = white * np.geomspace(1, condition**0.5, 8) @ basis.T
        found = whitening.measure({"x": x.astype("float32")})["x"]
        close(found.condition / condition, 1, 0.01)


def test_batch_norm_leaves_correlations_and_whitening_none():
    x = jnp.asarray(correlated(0, 300, 6), jnp.float32)
    methods = nj.BatchNorm(epsilon=0.0), nj.DecorrelatedBatchNorm(epsilon=0.0)
    bn, zca = (m.apply(*m.init(None, 6), x, train=True)[0] for m in methods)
    found = whitening.measure({"x": x, "bn": bn, "zca": zca})
    close(found["bn"].condition, found["x"].correlation_condition, 1e-2)
    close(found["bn"].off_diagonal, found["x"].off_diagonal, 1e-4)
    close(found["zca"].condition, 1.0, 1e-3)
    assert found["zca"].off_diagonal < 1e-8 < 1e-2 < found["x"].off_diagonal


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
@pytest.mark.parametrize("still", [0.0, 3.3])
def test_features_that_do_not_vary(scale, still):
    x = np.stack([np.full(50, still), *correlated(0, 50, 4).T], 1)
    found = whitening.measure({"x": (scale * x).astype("float32")})["x"]
    assert found.condition == np.inf
    close(found[1:], oracle(x[:, 1:])[1:], 1e-3)


def test_too_few_vectors_and_features():
    maps = {"few": draw(0, 5, 5), "one": draw(1, 9, 1), "still": np.ones((9, 3), "float32")}
    few, one, still = whitening.measure(maps).values()
    assert few.condition == few.correlation_condition == np.inf
    assert (one.condition, one.correlation_condition) == (1, 1)
    assert np.isnan(one.off_diagonal) and np.isnan(still.off_diagonal)
    assert still.condition == still.correlation_condition == np.inf


def test_captured_maps():
    zca = nj.DecorrelatedBatchNorm(epsilon=0.0)
    net = nn.Sequential([nn.Dense(6), Norm(zca, use_running_average=False)])
    x = jnp.asarray(draw(0, 300, 6) + draw(1, 300, 1))
    maps = whitening.capture(net, net.init(jax.random.key(0), x), x)
    found = whitening.measure(maps)
    assert found["layers_1"].off_diagonal < 1e-6 < 1e-3 < found["layers_0"].off_diagonal


def test_table():
    x = jnp.asarray(correlated(0, 30, 3), jnp.float32)
    history = {i: whitening.measure({"a": x * 2**i, "b": x[:, :1]}) for i in (0, 10)}
    rows = whitening.table(history)
    assert [(row["step"], row["depth"], row["map"]) for row in rows] == [
        *((0, 0, "a"), (0, 1, "b")),
        *((10, 0, "a"), (10, 1, "b")),
    ]
    close(rows[0]["condition"], oracle(x).condition, 1e-3 * oracle(x).condition)
    close(rows[2]["off_diagonal"], rows[0]["off_diagonal"], 1e-6)
    assert rows[1]["off_diagonal"] is None
    figure = figures.plot(rows, "step", ["condition", "off_diagonal"], by="map")
    assert [len(axes.lines) for axes in figure.axes] == [2, 2]
    for broken in ({}, {0: {}}, {0: history[0], 1: {"a": history[0]["a"]}}):
        with pytest.raises(ValueError, match="table"):
            whitening.table(broken)


def by_hand(x, outputs, size):
    """The disturbance of all samples over every batch of `size` of x f64[N, C]: small N."""
    others = np.arange(len(x))
    grid = np.stack(np.meshgrid(*[others] * (size - 1), indexing="ij"), -1).reshape(-1, size - 1)
    distances = []
    for i in others:
        batches = [b for b in grid if len({i, *b}) == size and (np.diff(b) > 0).all()]
        y = np.stack([outputs(x[[i, *batch]])[0] for batch in batches])
        gap = np.linalg.norm(y - y.mean(0), axis=-1)
        distances.append(gap.mean())
    return np.mean(distances)


def standardized(x):
    return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)


def whitened(x):
    gap = x - x.mean(0)
    values, vectors = np.linalg.eigh(gap.T @ gap / len(x) + 1e-5 * np.eye(x.shape[1]))
    return gap @ (vectors / np.sqrt(values)) @ vectors.T


@pytest.mark.parametrize(
    ("method", "outputs"),
    [(nj.BatchNorm(), standardized), (nj.DecorrelatedBatchNorm(), whitened)],
)
def test_disturbance_over_every_batch(method, outputs):
    x = correlated(0, 8, 2)
    exact = by_hand(x, outputs, 4)
    how = dict(key=jax.random.key(0), samples=8, batches=2000)
    found = whitening.disturbance(method, jnp.asarray(x, jnp.float32), 4, **how)
    close(found / exact, 1, 0.03)


def test_disturbance_of_positions_and_dimensions():
    x, key = jnp.asarray(correlated(0, 12, 3), jnp.float32), jax.random.key(0)
    method, how = nj.BatchNorm(), dict(key=key, samples=5, batches=6)
    found = whitening.disturbance(method, x, 4, **how)
    spread = jnp.broadcast_to(x[:, None, None], (12, 2, 2, 3))
    close(whitening.disturbance(method, spread, 4, **how), found, 1e-5)
    close(whitening.disturbance(method, x, 4, per_feature=True, **how), found / 3, 1e-6)
    close(whitening.disturbance(method, x, 12, **how), 0.0, 1e-5)
    doubled = nj.AffineParams(2 * jnp.ones(3), jnp.ones(3)), method.init(None, 3)[1]
    close(whitening.disturbance(method, x, 4, variables=doubled, **how), 2 * found, 1e-5)
    assert whitening.disturbance(nj.LayerNorm(), x, 4, **how) < 1e-6


def test_disturbance_of_a_method_that_draws():
    x = jnp.asarray(correlated(0, 64, 3), jnp.float32)
    noise = nj.GhostNoise(ghost_batch_size=4)
    how = dict(key=jax.random.key(0), samples=8, batches=8)
    assert whitening.disturbance(noise, x, 64, **how) > 0.1


@pytest.mark.parametrize("batch_size", [32, 256])
def test_order_of_disturbance(batch_size):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1024, 16)) @ (np.eye(16) + rng.normal(size=(16, 16)) / 4)
    grouped = {f"ZCA {size}": nj.DecorrelatedBatchNorm(group_size=size) for size in (4, 16)}
    steps = {f"T = {steps}": nj.IterativeNorm(steps=steps) for steps in (3, 5, 7)}
    rows = whitening.compare(
        {"BN": nj.BatchNorm()} | grouped | steps,
        jnp.asarray(x, jnp.float32),
        [batch_size],
        key=jax.random.key(0),
        samples=24,
        batches=24,
    )
    assert [row["batch_size"] for row in rows] == 6 * [batch_size]
    found = {row["method"]: row["disturbance"] for row in rows}
    assert found["BN"] < found["ZCA 4"] < found["ZCA 16"]
    assert found["T = 3"] < found["T = 5"] < found["T = 7"] < found["ZCA 16"]


@pytest.mark.parametrize(
    ("x", "sizes", "words"),
    [
        (draw(0, 6, 2), {"batch_size": 7}, "batch_size=7, but x has 6"),
        (draw(0, 6, 2), {"batch_size": 0}, "batch_size=0"),
        (draw(0, 6, 2), {"batch_size": 4, "samples": 7}, "samples=7, but x has 6"),
        (draw(0, 6, 2), {"batch_size": 4, "batches": 0}, "batches=0"),
        (draw(0, 6), {"batch_size": 4}, r"shape \(6,\)"),
    ],
)
def test_disturbance_errors(x, sizes, words):
    with pytest.raises(ValueError, match=words):
        whitening.disturbance(nj.BatchNorm(), x, key=jax.random.key(0), **{"samples": 2, **sizes})


def test_measure_errors():
    with pytest.raises(TypeError, match="maps is list"):
        whitening.measure([draw(0, 3, 3)])
    for x in (draw(0, 3), draw(0, 0, 3)):
        with pytest.raises(ValueError, match="'x' has shape"):
            whitening.measure({"x": x})
    with pytest.raises(TypeError, match="complex"):
        whitening.measure({"x": np.ones((3, 3), "complex64")})
