"""Linear regions, against the function in float64, brute force and formulas."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

import normjax
import normjax.linen
import normjax.nnx
from normjax import population
from normjax.analysis import geometry

RNG = np.random.default_rng(0)
PLANE = geometry.Plane.through(*RNG.normal(size=(3, 4)))
SLICE = geometry.Plane.through(*RNG.normal(size=(3, 6, 6, 2)))
WINDOW = ((-2.0, 3.0), (-1.5, 2.0))


def wide(f, inputs):
    """A function of inputs in float64."""
    with jax.enable_x64(True):
        return np.asarray(jax.jit(jax.vmap(f))(jnp.asarray(inputs, float)))


def inner(regions, seed):
    """A random point inside of each region."""
    shares = np.random.default_rng(seed).random(regions.vertices.shape[:2]) + 0.01
    return np.einsum("rv,rvd->rd", shares / shares.sum(1, keepdims=True), regions.vertices)


def check(regions, f):
    """Regions tile the window, and the function is affine in each, and is its map."""
    size = np.prod(np.diff(regions.window, axis=1))
    assert abs(regions.areas.sum() / size - 1) < 1e-9
    assert (regions.areas > 0).all()
    a, b = inner(regions, 1), inner(regions, 2)
    values = [wide(f, regions.plane.points(points)) for points in (a, b, a / 4 + b * 3 / 4)]
    scale = np.abs(values).max()
    assert np.abs(values[0] / 4 + values[1] * 3 / 4 - values[2]).max() < 1e-12 * scale
    ends = np.concatenate([a, np.ones((len(a), 1))], axis=1)
    maps = np.einsum("r...c,rc->r...", regions.maps, ends)
    assert np.abs(maps - values[0]).max() < 1e-12 * scale
    np.testing.assert_array_equal(regions.locate(regions.plane.points(a)), np.arange(len(a)))
    # Every edge is the frame's, or a boundary between two regions.
    length = lambda ends: np.linalg.norm(ends[:, 0] - ends[:, 1], axis=1).sum()
    around = sum(length(np.stack([p, np.roll(p, -1, 0)], 1)) for p in regions.polygons)
    frame = 2 * np.sum(np.diff(regions.window, axis=1))
    np.testing.assert_allclose(around, frame + 2 * length(regions.boundaries().ends), rtol=1e-9)


def filled(model, x):
    """A Linen model with variables drawn by NumPy, as a function of an input."""
    shapes, rng = jax.eval_shape(model.init, jax.random.key(0), x), np.random.default_rng(3)
    kernel = lambda path: "kernel" in str(path)
    positive = lambda path: "var" in str(path) or "scale" in str(path)
    draw = lambda path, a: rng.normal(size=a.shape) * (0.3 + kernel(path)) + 2 * positive(path)
    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    return lambda x: model.apply(variables, x[None])[0]


def linen_mlp():
    norm = lambda: normjax.linen.BatchNorm(use_running_average=True)
    layers = [nn.Dense(9), norm(), nn.relu, nn.Dense(8), norm(), nn.leaky_relu, nn.Dense(3)]
    return filled(nn.Sequential(layers), jnp.ones((1, 4)))


def nnx_mlp():
    rngs = nnx.Rngs(0)
    layers = nnx.Linear(4, 9, rngs=rngs), normjax.nnx.BatchNorm(9, rngs=rngs), jax.nn.relu
    model = nnx.Sequential(*layers, nnx.Linear(9, 3, rngs=rngs))
    model.eval()
    return lambda x: model(x[None])[0]


class Conv(nn.Module):
    """Groups, strides, dilations, pools, and a residual sum."""

    @nn.compact
    def __call__(self, x):
        norm = lambda: normjax.linen.BatchNorm(use_running_average=True)
        x = nn.relu(norm()(nn.Conv(4, (3, 3), feature_group_count=2)(x)))
        y = nn.Conv(4, (2, 3), kernel_dilation=2, padding=((2, 0), (1, 3)))(x)
        x = nn.max_pool(x + y, (3, 3), (2, 2), "SAME")
        x = nn.relu(nn.ConvTranspose(3, (3, 3), strides=(2, 2))(x))
        return nn.Dense(3)(nn.avg_pool(x, (2, 2), (2, 2), "SAME").mean((1, 2)))


def conv():
    return filled(Conv(), jnp.ones((1, 6, 6, 2)))


@pytest.mark.parametrize(
    ("make", "plane"),
    [(linen_mlp, PLANE), (nnx_mlp, PLANE), (conv, SLICE)],
    ids=["linen", "nnx", "conv"],
)
def test_regions_tile_the_window_and_the_function_is_affine_in_each(make, plane):
    f = make()
    regions = geometry.regions_2d(f, plane, WINDOW)
    assert regions.count > 30
    check(regions, f)


def matrix(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape)


M = matrix(4, 4)


@jax.checkpoint
def inner_program(x):
    return jax.jit(jnp.tanh)(M)[0] * jnp.maximum(x, 0.2)


FUNCTIONS = {
    "abs": lambda x: abs(x @ M),
    "minimum, maximum": lambda x: jnp.minimum(x @ M, jnp.maximum(x, 0.3)),
    "relu6": lambda x: jax.nn.relu6(4 * x) / 3,
    "hard tanh": lambda x: jax.nn.hard_tanh(x) - x,
    "clip": lambda x: jnp.clip(x @ M, -0.5, 0.7),
    "clamp": lambda x: lax.clamp(-0.3, x, 0.8),
    "where": lambda x: jnp.where(x > 0.1, 2.0, x) + jnp.where(x <= 0.4, x, -x),
    "both sides": lambda x: jnp.where((x > 0) & ~(x[::-1] < 0.2), x, 3.0),
    "sign": lambda x: jnp.sign(x) * (x @ M) + (x > 0.5),
    "max": lambda x: jnp.stack([(M @ x).max(), (M @ x + 1).min(), x.max()]),
    "relu then max": lambda x: nn.max_pool(jax.nn.relu(M @ x)[:, None], (3,), (1,), "SAME")[:, 0],
    "equal to a third": lambda x: jnp.stack([0 * x, x, -x]).max(0),
    "moved": lambda x: jnp.concatenate(
        [x[::-1], jnp.pad(x, (1, 2)), x[np.array([2, 0])], x.reshape(2, 2).T.ravel(), np.ones(2)]
    ),
    "updated": lambda x: lax.dynamic_update_slice(abs(x), x[:2], (1,)),
    "sums": lambda x: jnp.cumsum(jnp.concatenate([x.sum(keepdims=True), -x]), axis=0) / 3,
    "einsum": lambda x: jnp.einsum("ab,cbd->cad", x.reshape(2, 2), matrix(3, 2, 2)),
    "products in batches": lambda x: jnp.einsum(
        "abc,dab->bdc", matrix(2, 3, 2), abs(x[:, None, None] * matrix(1, 2, 3))
    ),
    "axes of a convolution": lambda x: lax.conv_general_dilated(
        *(x.reshape(1, 2, 2, 1), matrix(2, 1, 1, 3), (1, 1), "SAME"),
        dimension_numbers=("NHWC", "HWIO", "HCWN"),
    ),
    "half precision": lambda x: (x.astype("bfloat16") @ M.astype("bfloat16")).astype("float32"),
    "programs inside": lambda x: inner_program(x) + jax.nn.relu(x),
    "scan": lambda x: lax.scan(
        lambda c, m: (jax.nn.relu(c @ m), c[:2]), x, matrix(3, 4, 4), reverse=True
    )[1],
    "no branch": lambda x: 2 * x - 1,
    "constant": lambda x: jnp.arange(3.0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_kind_of_step(name):
    f = FUNCTIONS[name]
    exact = f if name != "half precision" else lambda x: x @ M.astype("bfloat16").astype(float)
    check(geometry.regions_2d(f, PLANE, WINDOW), exact)


NORMS = (
    normjax.BatchNorm(),
    normjax.KalmanNorm(),
    normjax.CholeskyBatchNorm(),
    normjax.SpectralBatchNorm(),
)


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: type(norm).__name__)
def test_norms_with_running_statistics_are_affine(norm):
    params, state = norm.init(None, 2)
    state = jax.tree.map(lambda a: a + 0.3, state)
    f = lambda x: norm.apply(params, state, x[None], train=False)[0][0]
    regions = geometry.regions_2d(f, SLICE, WINDOW)
    assert regions.count == 1
    check(regions, f)


@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_lines_in_general_position(n):
    kernel, bias = matrix(2, n), matrix(n)
    f = lambda x: jax.nn.relu(x @ kernel + bias)
    regions = geometry.regions_2d(f, window=((-1e4, 1e4), (-1e4, 1e4)))
    assert regions.count == 1 + n + n * (n - 1) // 2
    lines = regions.boundaries()
    np.testing.assert_array_equal(np.unique(lines.unit), np.arange(n))
    values = np.einsum("sed,ds->se", lines.ends, kernel[:, lines.unit]) + bias[lines.unit][:, None]
    assert np.abs(values).max() < 1e-8
    assert not lines.layer.any()


def test_lines_that_meet_or_coincide():
    kernels = [np.random.default_rng(n).integers(-1, 2, (n, 6)).astype(float) for n in (2, 6)]

    def f(x):
        x = jax.nn.relu(x @ kernels[0])
        x = abs(x @ kernels[1])
        return jnp.stack([x.max(), jnp.maximum(x[0], x[1]), x.min() - x[2]])

    regions = geometry.regions_2d(f, window=((-1, 2), (-1, 1)))
    assert regions.count > 8
    check(regions, f)


def test_batch_norm_without_bias_centres_the_lines_of_a_layer():
    """Up to the rounding of the statistics, which are float32."""
    data = RNG.normal(size=(50, 2)).astype("float32") + np.float32([1, -2])
    kernel, norm = matrix(2, 7).astype("float32"), normjax.linen.BatchNorm(use_running_average=True)
    model = nn.Sequential([lambda x: x @ kernel, norm, nn.relu])
    variables = model.init(jax.random.key(1), data)
    variables = population.recalibrate(model, [data], variables=variables)
    f = lambda x: model.apply(variables, x[None])[0]
    regions = geometry.regions_2d(f, window=((-5, 5), (-5, 5)), tolerance=1e-5)
    assert regions.count == 2 * 7
    assert np.abs(regions.boundaries().ends - data.mean(0)).max(2).min(1).max() < 1e-5
    exact = geometry.regions_2d(f, window=((-5, 5), (-5, 5)))
    assert np.sort(exact.areas)[: -2 * 7].max(initial=0) < 1e-9


def test_a_boundary_is_there_once():
    f = lambda x: jax.nn.relu(jax.nn.relu(x @ np.eye(2) - 0.5) @ np.ones((2, 2)) - 0.25)
    regions = geometry.regions_2d(f, window=((0, 1), (0, 1)))
    lines = regions.boundaries()
    lengths = np.linalg.norm(lines.ends[:, 0] - lines.ends[:, 1], axis=1)
    per_layer = [lengths[lines.layer == i].sum() for i in (0, 1)]
    # Two lines of length 1; a diagonal of the upper quarter, with two straight arms of 1/2.
    np.testing.assert_allclose(per_layer, [2, 0.25 * np.sqrt(2) + 1], rtol=1e-12)
    assert regions.layers == (geometry.Layer("max", (2,)),) * 2


def kinks(f, start, end, points):
    """How many breaks a scan of a segment shows, those of neighbouring points taken as one."""
    values = wide(lambda t: f(start + t * (end - start)), np.linspace(0, 1, points))
    bends = np.abs(np.diff(values, 2, axis=0)).reshape(points - 2, -1).max(1)
    at = np.flatnonzero(bends > 1e-11)
    return 1 + np.count_nonzero(np.diff(at) > 1) if len(at) else 0


@pytest.mark.parametrize(("make", "plane"), [(linen_mlp, PLANE), (conv, SLICE)])
def test_pieces_of_a_segment_are_those_of_a_scan(make, plane):
    f = make()
    start, end = plane.points([[-2.0, 0.3], [2.5, -0.9]])
    pieces = geometry.regions_on_segment(f, start, end)
    # Where a unit changes that has no effect, there is nothing to see.
    changes = np.abs(np.diff(pieces.maps, axis=0)).max((1, 2)) > 1e-9
    assert kinks(f, start, end, 5001) == np.count_nonzero(changes) > 10
    t = np.concatenate([[0], pieces.breaks, [1]])
    middles = (t[1:] + t[:-1]) / 2
    values = wide(lambda t: f(start + t * (end - start)), middles)
    got = np.einsum("ric,cr->ri", pieces.maps, np.stack([middles, np.ones(pieces.count)]))
    np.testing.assert_allclose(got, values, rtol=1e-10, atol=1e-12)


def test_a_segment_meets_the_regions_of_its_plane():
    f = linen_mlp()
    regions = geometry.regions_2d(f, PLANE, WINDOW)
    corners = [[-2.0, -1.5], [3.0, 2.0]]
    pieces = geometry.regions_on_segment(f, *PLANE.points(corners))
    t = np.concatenate([[0], pieces.breaks, [1]])
    middles = (t[1:] + t[:-1])[:, None] / 2
    points = (1 - middles) * corners[0] + middles * corners[1]
    met = regions.locate(PLANE.points(points))
    assert len(set(met)) == pieces.count
    lines = regions.boundaries()
    changes = (1 - pieces.breaks[:, None]) * corners[0] + pieces.breaks[:, None] * corners[1]
    start, length = lines.ends[:, 0], np.diff(lines.ends, axis=1)[:, 0]
    for point, *change in zip(changes, pieces.layer, pieces.unit, strict=True):
        along = np.einsum("sd,sd->s", point - start, length) / np.square(length).sum(1)
        feet = start + np.clip(along, 0, 1)[:, None] * length
        nearest = np.linalg.norm(point - feet, axis=1).argmin()
        assert [lines.layer[nearest], lines.unit[nearest]] == change


def test_decision_boundary():
    f = linen_mlp()
    regions = geometry.regions_2d(f, PLANE, WINDOW)
    ends = regions.decision()
    for points in (ends[:, 0], ends.mean(1)):
        scores = np.sort(wide(f, PLANE.points(points)), axis=1)
        np.testing.assert_allclose(scores[:, -1], scores[:, -2], atol=1e-12)
    polygons, largest = regions.classes()
    middles = np.stack([polygon.mean(0) for polygon in polygons])
    np.testing.assert_array_equal(wide(f, PLANE.points(middles)).argmax(1), largest)
    assert len(polygons) > regions.count
    start, end = PLANE.points([[-2.0, -1.5], [3.0, 2.0]])
    crossings = geometry.regions_on_segment(f, start, end).decision()
    scan = wide(lambda t: f(start + t * (end - start)), np.linspace(0, 1, 5001)).argmax(1)
    assert len(crossings) == np.count_nonzero(np.diff(scan)) > 0
    scores = np.sort(wide(lambda t: f(start + t * (end - start)), crossings), axis=1)
    np.testing.assert_allclose(scores[:, -1], scores[:, -2], atol=1e-12)


def test_cells_run_in_batches(monkeypatch):
    f = linen_mlp()
    whole = geometry.regions_2d(f, PLANE, WINDOW)
    monkeypatch.setattr("normjax.analysis.geometry.subdivision.BYTES", 1)
    parts = geometry.regions_2d(f, PLANE, WINDOW)
    check(parts, f)
    assert parts.count == whole.count


def test_figures_are_saved(tmp_path):
    f, path = linen_mlp(), tmp_path / "regions.png"
    panels = {
        "norm": geometry.regions_2d(f, PLANE, WINDOW),
        "none": geometry.regions_2d(lambda x: x.sum(), PLANE, WINDOW),
    }
    samples = PLANE.points([[0.0, 0.0], [1.0, 1.0], [2.0, 0.5]])
    figure = geometry.plot_regions(panels, samples, [0, 1, 1], path=path)
    assert path.stat().st_size > 10_000
    first, second, bar = figure.axes
    assert [axes.get_title() for axes in (first, second)] == [
        f"norm: {panels['norm'].count} regions",
        "none: 1 region",
    ]
    assert sum(len(c.get_offsets()) for c in first.collections if c.get_offsets().any()) >= 2
    assert bar.get_ylabel() == "layer"


LINE = [0.0, 0.0], [1.0, 1.0]
SQUARE = ((-1, 1), (-1, 1))


class Norms(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x):
        return getattr(normjax.linen, self.kind)()(x)


def evaluated(kind):
    model, x = Norms(kind), jnp.ones((3, 2))
    variables = model.init(jax.random.key(0), x)
    return lambda x: model.apply(variables, x[None], mutable=["batch_stats"])[0][0]


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (ValueError, lambda: geometry.regions_2d(jax.nn.gelu), "`integer_pow`|`tanh`|`mul`"),
        (ValueError, lambda: geometry.regions_2d(jnp.tanh), "regions_2d: `tanh` of a value"),
        (ValueError, lambda: geometry.regions_on_segment(jnp.tanh, *LINE), "on_segment: `tanh`"),
        (ValueError, lambda: geometry.regions_2d(evaluated("LayerNorm")), "norms"),
        (ValueError, lambda: geometry.regions_2d(lambda x: x * x[::-1]), "`mul` of two values"),
        (ValueError, lambda: geometry.regions_2d(lambda x: x @ x), "`dot_general` of two values"),
        (ValueError, lambda: geometry.regions_2d(lambda x: 1 / x), "`div` by a value"),
        (ValueError, lambda: geometry.regions_2d(lambda x: x.astype(int) * 1.0), "to int"),
        (ValueError, lambda: geometry.regions_2d(lambda x: jnp.sort(x)), "`sort`"),
        (ValueError, lambda: geometry.regions_2d(lambda x: x * jnp.inf), "not finite"),
        (TypeError, lambda: geometry.regions_2d(lambda x: (x, x)), "one floating array"),
        (TypeError, lambda: geometry.regions_2d(lambda x: x > 0), "one floating array"),
        (ValueError, lambda: geometry.regions_2d(abs, window=((1, 1), (0, 1))), "low < high"),
        (ValueError, lambda: geometry.regions_2d(abs, window=((0, np.nan), (0, 1))), "finite"),
        (ValueError, lambda: geometry.regions_2d(abs, limit=3), "more than limit=3 regions"),
        (ValueError, lambda: geometry.regions_2d(abs, tolerance=0.0), "tolerance=0.0"),
        (ValueError, lambda: geometry.Plane([0, 0], [1, 2], [2, 4]), "linearly independent"),
        (ValueError, lambda: geometry.Plane([0, 0], [1, 2], [0, 0]), "linearly independent"),
        (ValueError, lambda: geometry.Plane([0, 0], [1, 2], [0, 0, 1]), "shapes"),
        (ValueError, lambda: geometry.Plane([0, np.inf], [1, 2], [0, 1]), "origin .* finite"),
        (ValueError, lambda: geometry.Plane([0, 1j], [1, 2], [0, 1]), "real numbers"),
        (ValueError, lambda: PLANE.coordinates([np.ones(4)]), "off the plane"),
        (ValueError, lambda: PLANE.coordinates(np.ones(4)), r"\[N, \*\(4,\)\]"),
        (
            ValueError,
            lambda: geometry.regions_2d(abs).locate([[0.5, 1.5]]),
            "outside of the window",
        ),
        (ValueError, lambda: geometry.regions_2d(jnp.sum).decision(), "single output"),
        (ValueError, lambda: geometry.plot_regions({}), "no panels"),
        (
            ValueError,
            lambda: geometry.plot_regions(geometry.regions_2d(abs), [[0.0, 2.0]]),
            "sample 0 at .* outside",
        ),
        (
            ValueError,
            lambda: geometry.plot_regions(geometry.regions_2d(abs), [[0.0, 0.5]], [1, 2]),
            "classes of shape",
        ),
        (ValueError, lambda: geometry.regions_on_segment(abs, [1.0], [1.0]), "different inputs"),
        (ValueError, lambda: geometry.regions_on_segment(abs, [1.0], [1.0, 2]), "one shape"),
    ],
)
def test_bad_input(error, call, message):
    with pytest.raises(error) as caught:
        call()
    assert re.search(message, str(caught.value))
