"""Gradients of conditions, against closed forms in NumPy and float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import close, draw

import normjax as nj
from normjax.analysis import balance

CLASSES, FEATURES, SAMPLES = 5, 7, 60


def oracle(gradients):
    """Of gradients [K, size]."""
    g = np.asarray(gradients, "float64").reshape(len(gradients), -1)
    norms = np.linalg.norm(g, axis=1)
    cosines = (g @ g.T) / np.outer(norms, norms)
    pairs = cosines[~np.eye(len(g), dtype=bool)]
    ratio = norms.max() / norms.min()
    return balance.Measures(norms, cosines, norms.std() / norms.mean(), ratio, pairs.mean())


def linear(dtype="float32"):
    """Squared errors of x W + b[condition]: their losses of a condition, and its gradients."""
    x, target = draw(0, SAMPLES, FEATURES, dtype=dtype), draw(1, SAMPLES, 2, dtype=dtype)
    params = {"dense": {"kernel": draw(2, FEATURES, 2, dtype=dtype)}}
    params["norm"] = nj.AffineParams(None, draw(3, CLASSES, 2, dtype=dtype))
    label = np.arange(SAMPLES) % CLASSES

    def losses(params):
        y = x @ params["dense"]["kernel"] + params["norm"].bias[label]
        return balance.by_condition(jnp.sum((y - target) ** 2, 1), label, CLASSES)

    wide = lambda a: np.asarray(a, "float64")
    error = wide(x) @ wide(params["dense"]["kernel"]) + wide(params["norm"].bias)[label] - target
    own = [2 / np.sum(label == i) * error * (label == i)[:, None] for i in range(CLASSES)]
    return losses, params, [wide(x).T @ e for e in own], [e.sum(0) for e in own]


@pytest.mark.parametrize("chunk", [1, 2, 9])
def test_oracle(chunk):
    for dtype, tolerance in (("float32", 1e-5), ("float64", 1e-12)):
        with jax.enable_x64(dtype == "float64"):
            losses, params, kernels, biases = linear(dtype)
            found = jax.jit(
                lambda params, losses=losses: balance.measure(
                    losses, params, ["dense/kernel"], ["norm/bias"], chunk=chunk
                )
            )(params)
            close(found["dense/kernel"], oracle(kernels), tolerance)
            close(found["norm/bias"], oracle(biases), tolerance)


def conditional(method):
    """Losses behind two norms, whose statistics are of all conditions; params in float64."""
    x, g = draw(0, SAMPLES, 4, dtype="float64"), draw(1, SAMPLES, 4, dtype="float64")
    x *= np.arange(1, 1 + SAMPLES)[:, None]
    label = np.arange(SAMPLES) % CLASSES
    shapes, state = method.init(jax.random.key(0), 4)
    scales = jax.tree.map(lambda a: 1 + 0.1 * draw(2, *a.shape, dtype="float64"), shapes)
    params = {"kernel": draw(3, 4, 4, dtype="float64"), "first": scales, "last": scales}

    def each(params):
        y, _ = method.apply(params["first"], state, x, train=True, condition=label)
        y = jnp.tanh(y) @ params["kernel"]
        y, _ = method.apply(params["last"], state, y, train=True, condition=label)
        return jnp.sum(g * y**2, 1)

    return each, params, label


@pytest.mark.parametrize("kind", [nj.ConditionalBatchNorm, nj.SandwichBatchNorm])
def test_gradients_of_a_condition_are_those_of_its_loss_in_the_whole_batch(kind):
    """Its loss depends on the rows of others, by the statistics; these are not its rows."""
    with jax.enable_x64(True):
        each, params, label = conditional(kind(num_classes=CLASSES))
        rows = ["first/condition/scale", "first/condition/bias", "last/condition/scale"]
        losses = lambda params: balance.by_condition(each(params), label, CLASSES)
        found = balance.measure(losses, params, ["kernel"], rows, chunk=2)
        loss = jax.jit(jax.grad(lambda p, i: jnp.mean(each(p), where=label == i)))
        grads = [loss(params, i) for i in range(CLASSES)]
        close(found["kernel"], oracle([g["kernel"] for g in grads]), 1e-10)
        for name, pick in (
            (rows[0], lambda g, i: g["first"].condition.scale[i]),
            (rows[1], lambda g, i: g["first"].condition.bias[i]),
            (rows[2], lambda g, i: g["last"].condition.scale[i]),
        ):
            close(found[name], oracle([pick(g, i) for i, g in enumerate(grads)]), 1e-10)
        others = np.abs(grads[0]["first"].condition.scale[1:])
        assert others.min() > 1e-6, "statistics of the whole batch tie conditions together"


def test_by_condition():
    losses, label = draw(0, 9), np.array([0, 2, 2, -1, 0, 4, 7, 2, 0])
    expected = [losses[label == i].mean() if i in (0, 2, 4) else 0 for i in range(5)]
    close(balance.by_condition(losses, label, 5), np.array(expected), 1e-6)
    losses[label == 7] = np.nan
    slopes = jax.grad(lambda losses: balance.by_condition(losses, label, 5)[2])(losses)
    close(slopes, np.where(label == 2, 1 / 3, 0).astype("float32"), 1e-7)


def test_a_zero_gradient_has_no_direction():
    vectors = np.array([[3.0, 4.0], [0.0, 0.0], [4.0, 3.0]], "float32")
    found = balance.measure(lambda params: vectors @ params["a"], {"a": np.ones(2, "f")}, ["a"])
    norms, cosines, variation, ratio, cosine = found["a"]
    close(norms, np.array([5.0, 0.0, 5.0], "float32"), 1e-6)
    expected = [[1, np.nan, 0.96], [np.nan] * 3, [0.96, np.nan, 1]]
    np.testing.assert_allclose(cosines, expected, rtol=1e-6)
    np.testing.assert_allclose((variation, ratio, cosine), (0.5**0.5, np.inf, 0.96), rtol=1e-6)
    found = balance.measure(lambda params: 0 * vectors @ params["a"], {"a": np.ones(2, "f")}, ["a"])
    assert all(np.isnan(value).all() for value in found["a"][1:])
    assert not found["a"].norms.any()
    (row,) = balance.table({0: found})
    assert [row[name] for name in ("variation", "ratio", "cosine", "norm_1")] == [None] * 3 + [0]


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_any_scale(scale):
    vectors = draw(0, 3, 40)
    losses = lambda params: np.float32(scale) * vectors @ params
    found = balance.measure(losses, jnp.zeros(40), [""])[""]
    expected = oracle(vectors)
    close(found._replace(norms=found.norms / scale), expected, 1e-5)


def test_vmap_over_networks():
    losses, params, _, _ = linear()
    several = jax.tree.map(lambda a: np.stack([a, 2 * a]), params)
    measure = lambda params: balance.measure(losses, params, ["dense/kernel"], ["norm/bias"])
    found = jax.vmap(measure)(several)
    for i in range(2):
        one = measure(jax.tree.map(lambda a, i=i: a[i], several))
        close(jax.tree.map(lambda a, i=i: a[i], dict(found)), dict(one), 1e-5)


def test_table():
    losses, params, _, _ = linear()
    found = balance.measure(losses, params, ["dense/kernel"], ["norm/bias"])
    rows = balance.table({0: found, 10: found})
    assert [(row["step"], row["parameter"]) for row in rows] == [
        (step, name) for step in (0, 10) for name in ("dense/kernel", "norm/bias")
    ]
    last = found["norm/bias"]
    assert [rows[-1][f"norm_{i}"] for i in range(CLASSES)] == last.norms.tolist()
    assert [rows[-1][name] for name in ("variation", "ratio", "cosine")] == [*map(float, last[2:])]
    for history in ({}, {0: {}}, {0: found, 1: {"dense/kernel": last}}):
        with pytest.raises(ValueError, match="table: the history"):
            balance.table(history)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((["dense/weight"],), "'dense/weight' is no parameter"),
        ((), "are none"),
        ((["dense/kernel"], ["dense/kernel"]), "some twice"),
        ((["dense/kernel"], ["head"]), "'head' of shape () has no row"),
        (([], ["dense/kernel"]), "'dense/kernel' of shape (7, 2) has no row for each of the 5"),
    ],
)
def test_bad_names(arguments, words):
    losses, params, _, _ = linear()
    with pytest.raises(ValueError, match=re.escape(words)):
        balance.measure(losses, params | {"head": 1.0}, *arguments)


def test_bad_losses():
    params = {"a": jnp.ones(3)}
    for losses in (
        lambda params: jnp.sum(params["a"]),
        lambda params: params["a"][:1],
        lambda params: params["a"][None],
        lambda params: jnp.arange(3),
    ):
        with pytest.raises(ValueError, match="at least two conditions"):
            balance.measure(losses, params, ["a"])
    with pytest.raises(ValueError, match="chunk=0"):
        balance.measure(lambda params: params["a"], params, ["a"], chunk=0)
    with pytest.raises(ValueError, match=re.escape("shape (2,)")):
        balance.by_condition(jnp.ones(3), jnp.zeros(2, int), 2)
    with pytest.raises(ValueError, match="num_conditions=0"):
        balance.by_condition(jnp.ones(3), jnp.zeros(3, int), 0)
