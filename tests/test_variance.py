"""Mean and variance as the compilers for TPU and GPU are given them, run on CPU."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from jax import export
from jax.sharding import AxisType

from normjax import testing
from normjax.core import cpu, passes, variance

SCHEDULES = {
    "tpu": variance._on_tpu,
    "gpu": variance._on_gpu,
    "about zero": variance._about_zero,
}
SHAPE = (64, 14, 14, 8)


@pytest.fixture(params=SCHEDULES)
def schedule(request, monkeypatch):
    """Programs for CPU take the schedule of another platform."""
    run = variance._by(SCHEDULES[request.param])
    monkeypatch.setattr(variance, "_bind", run)
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


def data():
    rng = np.random.default_rng(0)
    normal, sample = rng.normal(size=SHAPE), np.arange(SHAPE[0])[:, None, None, None]
    row = np.arange(SHAPE[1])[:, None, None]
    outlier = normal.copy()
    outlier[0, 0, 0] = 1e6
    ragged = sample * 0 + row >= rng.integers(0, 14, (64, 1, 1, 1))
    return {
        "offset 1e3": (normal + 1e3, None),
        "offset 1e6": (normal + 1e6, None),
        "an outlier of 1e6 in the share": (outlier, None),
        "a share at 1e4, the rest at zero": (normal + 1e4 * (row < 1), None),
        "first samples at 1e4, the rest at zero": (normal + 1e4 * (sample < 2), None),
        "sorted samples": (np.sort(normal + 1e3, 0), None),
        "sorted rows": (np.sort(normal + 1e3, 1), None),
        "small": (1e-12 * (normal + 3), None),
        "one step in a constant": (np.full(SHAPE, 1e4) + (sample > 50), None),
        "ragged mask": (normal + 1e3, ragged),
        "mask without the share": (normal + 1e3, np.broadcast_to(row > 2, (64, 14, 1, 1))),
        "mask without most channels": (normal + 1e3, np.arange(8).reshape(1, 1, 1, 8) < 3),
    }


def exact(x, mask, axes):
    x = np.float64(np.float32(x))
    where = np.broadcast_to(True if mask is None else mask, x.shape)
    with warnings.catch_warnings(action="ignore"):  # nothing counts
        found = x.mean(axes, where=where, keepdims=True), x.var(axes, where=where, keepdims=True)
    return np.nan_to_num(found)


@pytest.mark.parametrize("axes", ((0, 1, 2), (1, 2), (0,), (3,)))
@pytest.mark.parametrize("name", data())
def test_variance_is_exact_in_float32(schedule, name, axes):
    x, mask = data()[name]
    mean, var = exact(x, mask, axes)
    with cpu.in_training(True):  # rows that nobody differentiates take two passes on GPU
        seen = jax.jit(lambda x: passes.moments(x, axes, mask=mask))(jnp.float32(x))
    rounding = np.square(2**-24 * mean)  # of the mean, where two passes are made about it
    assert np.all(np.abs(seen.var - var) <= 2e-5 * var + rounding)
    assert np.all(np.abs(seen.mean - mean) <= 1e-6 * np.abs(mean) + 1e-5 * np.sqrt(var))


def test_groups_of_channels_share_statistics(schedule):
    x, mask = data()["ragged mask"]
    x = x * np.arange(1, 9)
    seen = jax.jit(lambda x: passes.moments(x, (1, 2), mask=mask, channel_groups=4))
    found, parts = seen(jnp.float32(x)), x.reshape(64, 14, 14, 4, 2)
    mean, var = exact(parts, mask[..., None], (1, 2, 4))
    rows = lambda a: np.repeat(a[:, 0, 0], 2, -1).reshape(64, 1, 1, 8)
    np.testing.assert_allclose(found.var, rows(var), rtol=2e-5)
    np.testing.assert_allclose(found.mean, rows(mean), rtol=2e-5)


def test_groups_of_channels_alone(schedule):
    x = np.float32(data()["offset 1e3"][0])
    found = jax.jit(lambda x: passes.moments(x, (), channel_groups=2).var)(x)
    var = x.reshape(64, 14, 14, 2, 4).astype("float64").var(-1)
    np.testing.assert_allclose(found, np.repeat(var, 4, -1), rtol=1e-4)


@pytest.mark.parametrize("shape", ((0, 14, 14, 8), (64, 0, 14, 8)))
def test_nothing_has_the_mean_and_variance_zero(schedule, shape):
    with cpu.in_training(True):
        seen = jax.jit(lambda x: passes.moments(x, (0, 1, 2)))(np.zeros(shape, "float32"))
    assert [float(jnp.max(jnp.abs(a))) for a in seen] == [0, 0, 0]


@pytest.mark.parametrize("value", (np.nan, np.inf, 1e25))
def test_what_is_not_finite_stays_in_its_channel(schedule, value):
    x = np.random.default_rng(0).normal(size=SHAPE).astype("float32")
    clean = exact(x, None, (0, 1, 2))[1]
    x[3, 5, 5, 2] = value
    var = np.ravel(jax.jit(lambda x: passes.moments(x, (0, 1, 2)).var)(x))
    assert not np.isfinite(var[2])
    np.testing.assert_allclose(np.delete(var, 2), np.delete(clean.ravel(), 2), rtol=2e-5)


HEADS = ("BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "ExclusiveBatchNorm")


@pytest.mark.parametrize("check", ("masks", "transforms", "devices"))
@pytest.mark.parametrize("name", HEADS)
def test_contract(schedule, name, check):
    if (schedule == "about zero") == (name == "LayerNorm"):  # else it is that of the TPU
        testing.CHECKS[check](CASES[name])


@pytest.mark.parametrize("parts", (("d",), (None, "d"), (None, None, None, "d"), ("d", "e")))
def test_arrays_sharded_over_an_explicit_mesh(schedule, parts):
    x, mask = data()["ragged mask"]
    mesh = jax.make_mesh((4, 2), ("d", "e"), axis_types=(AxisType.Explicit,) * 2)
    x = np.float32(np.concatenate([x, x[:, :2]], 1))
    mask = np.concatenate([mask, mask[:, :2]], 1)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, jax.NamedSharding(mesh, jax.P(*parts)))
        for given in (None, mask):
            seen = jax.jit(lambda x, given=given: passes.moments(x, (0, 1, 2), mask=given))(placed)
            mean, var = exact(x, given, (0, 1, 2))
            np.testing.assert_allclose(seen.var, var, rtol=2e-5)
            np.testing.assert_allclose(seen.mean, mean, rtol=1e-6)


@pytest.mark.parametrize("name", HEADS)
def test_each_platform_gets_its_own(name):
    """A loop makes sums exact on TPU, but for rows: these, and GPU, have a centre from a share."""
    method = CASES[name].method
    variables = method.init(None, 16)
    loss = lambda x: jnp.sum(jnp.sin(method.apply(*variables, x, train=True)[0]))
    x, grad = jax.ShapeDtypeStruct((64, 16, 16, 16), jnp.float32), jax.jit(jax.grad(loss))
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    for platform in ("cpu", "cuda", "tpu"):
        text = export.export(grad, platforms=[platform])(x).mlir_module()
        rows = name == "LayerNorm"
        assert ("stablehlo.while" in text) == (platform == "tpu" and not rows)
        assert ("stablehlo.slice" in text) == (platform == "cuda" or (platform == "tpu" and rows))
        with jax.set_mesh(mesh):
            sharded = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.P("d"))
            export.export(grad, platforms=[platform])(sharded)
