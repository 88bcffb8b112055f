"""SpectralBatchNorm, alone and behind BatchNorm."""

import dataclasses
import functools
from itertools import cycle, product

import agreement
import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import vector_files
from absl.testing import parameterized
from agreement import OFFSET_TOLERANCE, TOLERANCE, close, draw, ragged, run, variables
from flax import nnx as flax_nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import normjax as nj
from normjax import linen, nnx
from normjax.core.method import replace

KEY = jax.random.key(0)
ROUTES = ("spatial", "matmul", "fft")
SPECTRA = ("full", "half")
NORMS = ("ortho", "backward", "forward", "full")
STATISTICS = (
    dict(statistics="channel"),
    dict(statistics="ring", bands=3),
    dict(statistics="frequency", map_size=(4, 5)),
)  # for maps of size [4, 5]
CONFIGURATIONS = tuple(
    fields | {"spectrum": spectrum, "route": route}
    for fields, spectrum, route in product(STATISTICS, SPECTRA, ROUTES)
    if route != "spatial" or fields["statistics"] == "channel"
)
FILES = tuple(
    name
    for prefix in ("spectral_batch_norm", "spatial_spectral_batch_norm")
    for name in vector_files.names(prefix)
)
NEAR = 1e-12  # error relative to the largest entry of an array
FLOOR = 1e-3  # or to this, if that is smaller: entries that are zero but for rounding
TRANSFORM_TOLERANCE = 5e-5  # float32 variance where each frequency is rounded before it is centred
OFFSET_OUTPUT_TOLERANCE = 2e-3  # a float32 output where offset / std is 1e4


def behind(**fields):
    """A BatchNorm, then a SpectralBatchNorm with the activation; both with the other fields."""
    names = {field.name for field in dataclasses.fields(nj.BatchNorm)} - {"activation"}
    shared = {name: value for name, value in fields.items() if name in names}
    return nj.chain(nj.BatchNorm(**shared), nj.SpectralBatchNorm(**fields))


BOTH = (nj.SpectralBatchNorm, behind)


def case(*shape, **fields):
    """A case for `agreement.check_case`; its mask is ragged over samples and features."""
    axis = np.atleast_1d(fields.get("axis", -1)) % len(shape)
    spatial = fields.get("spatial_axes")
    if spatial is None:
        spatial = [i for i in range(1, len(shape)) if i not in axis]
    spatial = np.atleast_1d(spatial) % len(shape)
    features = tuple(shape[i] for i in axis)
    mask = tuple(1 if i in spatial else n for i, n in enumerate(shape))
    return fields | {"shape": shape, "features": features, "mask": mask}


CASES = (
    case(6, 7, 3, spectrum="half"),
    case(6, 8, 3, spectrum="half", statistics="ring", bands=4, fft_norm="backward"),
    case(4, 2, 3, 4, 2, spectrum="half", fft_norm="forward", use_scale=False),
    case(4, 3, 2, 5, 2, statistics="frequency", map_size=(3, 2, 5), use_bias=False),
    case(5, 3, 4, 6, axis=1, spectrum="half", momentum=0.0),
    case(5, 2, 4, 3, 3, axis=(1, -1), statistics="ring", use_bias=False, use_scale=False),
    case(3, 2, 4, 5, 3, spatial_axes=(-2, 2), spectrum="half", running_average="debiased"),
    case(3, 5, 4, 3, spatial_axes=1, statistics="frequency", map_size=[5],
         running_average="cumulative"),
    case(4, 6, 2, 3, spectrum="half", unbiased_running_var=True, skip_nonfinite=True),
    case(4, 2, 5, 3, axis=(1, 3), spatial_axes=2, unbiased_running_var=True),
    case(4, 3, 6, 2, spectrum="half", activation=jax.nn.relu),
    case(4, 3, 6, 2, statistics="ring", activation=jax.nn.silu),
    case(1, 1, 3, 2, spectrum="half", epsilon=0.1),
)  # fmt: skip
# Even axes long enough to be multiplied by parity.
SPLIT = (
    case(3, 26, 3, 2, statistics="frequency", map_size=(26, 3)),
    case(3, 24, 2, 4, 1, statistics="ring", spectrum="half"),
)


def train(method, x, *, gradients=False, **given):
    """Output, new state and perhaps gradients; variables have the dtype of `x`, or are `given`."""
    params, state = variables(method, x.shape[-1], dtype=x.dtype)
    cotangent = draw(2, *x.shape, dtype=x.dtype) if gradients else None
    return run(method, params._replace(**given), state, x, cotangent=cotangent)


class VectorsTest(parameterized.TestCase):
    @parameterized.parameters(*zip(FILES, cycle(("spatial", "matmul", "spatial", "fft"))))
    def test_vectors(self, name, route):
        agreement.check_vectors(name, route=route)

    @parameterized.product(name=FILES, route=ROUTES)
    @pytest.mark.slow
    def test_all_vectors_by_all_routes(self, name, route):
        agreement.check_vectors(name, route=route)


class OracleTest(parameterized.TestCase):
    @parameterized.parameters(*zip(CONFIGURATIONS[::2], cycle(NORMS), cycle(agreement.KINDS[::-1])))
    def test_configurations(self, fields, fft_norm, kind):
        tried = case(5, 4, 5, 2, **fields, fft_norm=fft_norm)
        agreement.check_case(nj.SpectralBatchNorm, tried, kind)

    @parameterized.product(
        how=(
            (nj.SpectralBatchNorm, agreement.KINDS[0]),
            (nj.SpectralBatchNorm, agreement.KINDS[1]),
            (behind, agreement.KINDS[1]),
        ),
        fields=CONFIGURATIONS,
        fft_norm=NORMS,
    )
    @pytest.mark.slow
    def test_all_configurations(self, how, fields, fft_norm):
        make, kind = how
        agreement.check_case(make, case(5, 4, 5, 2, **fields, fft_norm=fft_norm), kind)
        run.clear_cache()

    @parameterized.parameters(*zip(CASES, cycle(agreement.KINDS)))
    def test_cases(self, case, kind):
        agreement.check_case(nj.SpectralBatchNorm, case, kind)

    @parameterized.parameters(*zip(SPLIT, agreement.KINDS, strict=True))
    def test_split_axes(self, case, kind):
        agreement.check_case(nj.SpectralBatchNorm, case, kind)

    @parameterized.parameters(*zip(SPLIT, agreement.KINDS[::-1], strict=True))
    @pytest.mark.slow
    def test_split_axes_of_the_other_kind(self, case, kind):
        agreement.check_case(nj.SpectralBatchNorm, case, kind)

    @parameterized.product(make=BOTH, case=CASES, kind=agreement.KINDS)
    @pytest.mark.slow
    def test_all_cases(self, make, case, kind):
        agreement.check_case(make, case, kind)

    @parameterized.parameters(*zip(CASES[2::3], cycle(agreement.KINDS)))
    def test_spatial_spectral_cases(self, case, kind):
        agreement.check_case(behind, case, kind)

    @parameterized.parameters(*zip(CASES[1::2], cycle(BOTH)))
    def test_evaluation(self, case, make):
        agreement.check_case(make, case, ("float64", True), train=False)

    @hypothesis.settings(deadline=None, derandomize=True, max_examples=15)
    @hypothesis.given(
        seed=st.integers(0, 2**16),
        share=st.floats(0, 1),
        by=st.sampled_from([(4, 1, 1, 2), (4, 1, 1, 1), (2,), (1, 1, 1, 2)]),
    )
    def test_any_mask(self, seed, share, by):
        mask = np.broadcast_to(ragged(seed, *by, share=share), (4, 1, 1, 2))
        method = nj.SpectralBatchNorm(spectrum="half", unbiased_running_var=True)
        x = draw(seed, 4, 3, 4, 2)
        agreement.check_oracle(method, 2, x, mask=mask, dtype="float64")

    @parameterized.parameters((6, 1, 1, 1), (2,))
    def test_mask_broadcasts(self, *shape):
        method = nj.SpectralBatchNorm(statistics="ring", bands=3)
        agreement.check_oracle(method, 2, draw(0, 6, 3, 4, 2), mask=ragged(2, *shape))

    @parameterized.parameters(*STATISTICS)
    def test_nonfinite_batch_is_skipped(self, **fields):
        x = draw(0, 6, 4, 5, 3)
        x[2, 1, 1, 1] = np.nan
        method = nj.SpectralBatchNorm(skip_nonfinite=True, **fields)
        params, state = variables(method, 3)
        y, new, _ = run(method, params, state, x)
        chex.assert_trees_all_equal(new, state)
        chex.assert_tree_all_finite(y[..., ::2])
        _, spoilt, _ = run(nj.SpectralBatchNorm(**fields), params, state, x)
        self.assertTrue(np.isnan(spoilt.var[..., 1]).all())
        chex.assert_tree_all_finite([a[..., ::2] for a in spoilt[:3]])

    @parameterized.parameters(*CONFIGURATIONS[:6:2])
    def test_evaluation_keeps_maps_apart(self, **fields):
        x = draw(0, 4, 4, 5, 3)
        method = nj.SpectralBatchNorm(**fields)
        params, state = variables(method, 3)
        expected, _, _ = run(method, params, state, x, train=False)
        x[1, 0, 0, 1] = np.inf
        y, _, _ = run(method, params, state, x, train=False)
        others = np.ones((4, 3), bool)
        others[1, 1] = False
        maps = [np.moveaxis(a, 3, 1)[others] for a in (y, expected)]
        close(*maps, TOLERANCE["float32"])


FAST_COMPILATION = {"xla_backend_optimization_level": 0}


@functools.partial(jax.jit, static_argnames="method", compiler_options=FAST_COMPILATION)
def derivatives(method, params, state, x, weight):
    """Output and state, gradients of a loss, and how those change along a direction."""

    def gradients(params, x):
        def loss(params, x):
            y, new = method.apply(params, state, x, train=True)
            return jnp.sum(jnp.sin(y) * weight), (y, new)

        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    direction = jax.tree.map(jnp.cos, (params, x))
    return jax.jvp(gradients, (params, x), direction, has_aux=True)


class RoutesTest(parameterized.TestCase):
    def check(self, sizes, routes=ROUTES, **fields):
        method = nj.SpectralBatchNorm(momentum=0.0, **fields)
        with jax.enable_x64(True):
            x, weight = (0.5 + draw(i, 3, *sizes, 2, dtype="float64") for i in (0, 1))
            params, state = variables(method, 2, dtype="float64")
            first, *others = (
                derivatives(dataclasses.replace(method, route=route), params, state, x, weight)
                for route in routes
            )
        derivatives.clear_cache()
        for other, route in zip(others, routes[1:], strict=True):
            for ours, theirs in zip(*map(jax.tree.leaves, (other, first)), strict=True):
                atol = NEAR * max(np.abs(theirs).max(), FLOOR)
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol, err_msg=route)

    @parameterized.parameters(
        ((1, 2), "matmul", "half", "backward", False),
        ((7,), "fft", "full", "full", True),
        ((33, 32), "matmul", "half", "forward", True),
    )
    def test_agree(self, sizes, route, spectrum, fft_norm, use_bias):
        fields = dict(spectrum=spectrum, fft_norm=fft_norm, use_bias=use_bias)
        self.check(sizes, ("spatial", route), **fields)

    @parameterized.parameters(
        ((1, 1), "matmul", "half", "ortho", True),
        ((7,), "fft", "half", "full", True),
        ((4, 3), "matmul", "full", "backward", True),
        ((3, 2, 4), "matmul", "half", "backward", True),
        ((5, 4), "fft", "half", "full", False),
        ((9, 13), "matmul", "half", "ortho", False),
        ((2, 3, 5), "fft", "full", "forward", False),
    )
    @pytest.mark.slow
    def test_agree_at_other_sizes(self, sizes, route, spectrum, fft_norm, use_bias):
        fields = dict(spectrum=spectrum, fft_norm=fft_norm, use_bias=use_bias)
        self.check(sizes, ("spatial", route), **fields)

    def test_transforms_agree(self):
        fields = dict(statistics="ring", bands=4, spectrum="half", fft_norm="full")
        self.check((6, 5), ROUTES[1:], **fields)

    @pytest.mark.slow
    def test_transforms_of_frequencies_agree(self):
        fields = dict(statistics="frequency", map_size=(5, 6), fft_norm="forward")
        self.check((5, 6), ROUTES[1:], **fields)

    @parameterized.product(height=tuple(range(1, 34)), width=tuple(range(1, 34)))
    @pytest.mark.slow
    def test_agree_at_all_sizes(self, height, width):
        """Options change with the size, so that each meets odd and even heights and widths."""
        fields = dict(
            spectrum=SPECTRA[(height // 2 + width // 2) % 2],
            fft_norm=NORMS[(5 * height + 3 * width) // 4 % 4],
            use_bias=(height + width) % 3 > 0,
        )
        self.check((height, width), **fields)

    @parameterized.product(
        sizes=((3, 4), (4, 3)), spectrum=SPECTRA, fft_norm=NORMS, use_bias=(False, True)
    )
    @pytest.mark.slow
    def test_agree_for_all_scalings(self, sizes, **fields):
        self.check(sizes, **fields)

    @parameterized.parameters(
        (dict(), 65, []),
        (dict(statistics="frequency", map_size=(3, 64)), 64, ["dot_general"]),
        (dict(statistics="frequency", map_size=(3, 65)), 65, ["fft"]),
    )
    def test_auto_route(self, fields, width, expected):
        method = nj.SpectralBatchNorm(**fields)
        apply = functools.partial(method.apply, *method.init(KEY, 1), train=False)
        text = jax.jit(apply).lower(np.ones((2, 3, width, 1), "float32")).as_text()
        self.assertEqual(expected, [k for k in ("fft", "dot_general") if f"stablehlo.{k}" in text])


class Float32Test(parameterized.TestCase):
    def check(self, x, *, output=TOLERANCE["float32"], **fields):
        """Statistics and output against the oracle's of the same float32 numbers."""
        method = nj.SpectralBatchNorm(momentum=0.0, use_scale=False, use_bias=False, **fields)
        x = x.astype("float32")
        params, state = method.init(KEY, x.shape[-1])
        y, new, _ = run(method, params, state, x)
        exact_y, exact = oracles.apply(method, params, state, x, train=True)
        tolerance = OFFSET_TOLERANCE if method.route == "spatial" else TRANSFORM_TOLERANCE
        np.testing.assert_allclose(new.var, exact.var, rtol=tolerance)
        size = np.abs(exact.mean_real + 1j * exact.mean_imag) + np.sqrt(exact.var)
        for name in ("mean_real", "mean_imag"):
            close(getattr(new, name) / size, getattr(exact, name) / size, OFFSET_TOLERANCE)
        np.testing.assert_allclose(y, exact_y, rtol=0, atol=output * max(np.abs(exact_y).max(), 1))

    @parameterized.product(spectrum=SPECTRA, route=ROUTES)
    def test_spike_at_the_origin(self, **fields):
        x = 0.1 * draw(0, 16, 8, 8, 3)
        x[:, 0, 0] += 1000
        self.check(x, output=OFFSET_OUTPUT_TOLERANCE, **fields)

    @parameterized.product(
        sizes=((8, 8), (1, 2)),
        how=(("full", "spatial"), ("half", "spatial"), ("half", "matmul")),
    )
    def test_large_offset(self, sizes, how):
        self.check_offset(sizes, how)

    @parameterized.product(
        sizes=((1, 1), (2, 2)),
        how=(("full", "spatial"), ("half", "spatial"), ("half", "matmul")),
    )
    @pytest.mark.slow
    def test_large_offset_of_other_sizes(self, sizes, how):
        self.check_offset(sizes, how)

    def check_offset(self, sizes, how):
        spectrum, route = how
        x = np.array([1e4, -1e4, 0]) + draw(0, 64, *sizes, 3)
        self.check(x, output=OFFSET_OUTPUT_TOLERANCE, spectrum=spectrum, route=route)

    @parameterized.product(width=(5, 8), route=ROUTES[:2])
    def test_imaginary_mean(self, width, route):
        angles = 2 * np.pi * np.outer(np.arange(width), np.arange(width // 2 + 1)) / width
        x = 0.1 * draw(0, 16, 8, width, 3)
        x[:, 0] += 1000 * np.sin(angles).sum(1)[:, None]
        self.check(x, spectrum="half", route=route)


class LimitsTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.enter_context(jax.enable_x64(True))

    def draw(self, *shape, seed=0):
        return draw(seed, *shape, dtype="float64")

    def same(self, actual, expected):
        close(actual, expected, TOLERANCE["float64"])

    def power(self, y):
        """Mean square over the batch of each frequency of the orthonormal spectrum."""
        return (np.abs(np.fft.fft2(y, axes=(1, 2), norm="ortho")) ** 2).mean(0)

    def whitened(self, **fields):
        """Input and output of a method without scale, bias and epsilon."""
        x = 0.5 + self.draw(9, 6, 5, 3)
        method = nj.SpectralBatchNorm(epsilon=0.0, use_scale=False, use_bias=False, **fields)
        y, _, _ = train(method, x)
        return x, np.asarray(y)

    def test_each_frequency_has_power_one(self):
        _, y = self.whitened(statistics="frequency", map_size=(6, 5))
        self.same(self.power(y), np.ones((6, 5, 3)))

    def test_each_ring_has_power_one(self):
        _, y = self.whitened(statistics="ring", bands=4)
        k = np.hypot(np.fft.fftfreq(6)[:, None], np.fft.fftfreq(5))
        ring = np.ceil(3 * k / np.sqrt(0.5))
        for i in range(4):
            self.same(self.power(y)[ring == i].mean(0), np.ones(3))

    @parameterized.parameters("spatial", "matmul")
    def test_channels_have_power_one_and_keep_their_shape(self, route):
        x, y = self.whitened(route=route)
        self.same(self.power(y).mean((0, 1)), np.ones(3))
        gain = y[:, 1:] / x[:, 1:]
        self.same(gain, np.broadcast_to(gain[0, 0, 0], gain.shape))
        rest = np.fft.fft2(y - gain[0, 0, 0] * x, axes=(1, 2))
        self.same(rest, np.broadcast_to(rest[0, 0, 0], rest.shape))

    @parameterized.parameters(("full", "spatial"), ("half", "spatial"), ("half", "matmul"))
    def test_of_single_positions_it_is_batch_norm(self, spectrum, route):
        x, shared = self.draw(6, 1, 1, 3), dict(momentum=0.0, epsilon=0.1)
        method = nj.SpectralBatchNorm(spectrum=spectrum, route=route, fft_norm="full", **shared)
        y, new, grads = train(method, x, gradients=True)
        z, expected, expected_grads = train(nj.BatchNorm(**shared), x, gradients=True)
        self.same((y, grads), (z, expected_grads))
        self.same(tuple(new[:3]), (expected.mean, np.zeros(3), expected.var))

    def test_one_ring_is_the_channel(self):
        self.check_one_ring("half")

    @pytest.mark.slow
    def test_one_ring_of_the_full_plane_is_the_channel(self):
        self.check_one_ring("full")

    def check_one_ring(self, spectrum):
        x, shared = self.draw(6, 4, 5, 3), dict(momentum=0.0, spectrum=spectrum)
        ring = nj.SpectralBatchNorm(statistics="ring", bands=1, **shared)
        y, new, grads = train(ring, x, gradients=True)
        z, expected, expected_grads = train(nj.SpectralBatchNorm(**shared), x, gradients=True)
        self.same((y, grads), (z, expected_grads))
        self.same(tuple(new[:3]), tuple(a[None] for a in expected[:3]))

    @parameterized.parameters((5, 1), (4, 2))
    def test_narrow_maps_have_one_spectrum(self, *sizes):
        x = self.draw(6, *sizes, 3)
        full, half = (
            train(nj.SpectralBatchNorm(spectrum=s, momentum=0.0), x, gradients=True)
            for s in SPECTRA
        )
        self.same(half, full)

    @parameterized.parameters(*CONFIGURATIONS[::6])
    def test_ignores_the_scale_of_the_input(self, **fields):
        self.check_scale_of_input(**fields)

    @parameterized.parameters(*CONFIGURATIONS[3::6])
    @pytest.mark.slow
    def test_others_ignore_the_scale_of_the_input(self, **fields):
        self.check_scale_of_input(**fields)

    def check_scale_of_input(self, **fields):
        x = self.draw(6, 4, 5, 3)
        method = nj.SpectralBatchNorm(epsilon=1e-15, **fields)
        (y, *_), (z, *_) = (train(method, a) for a in (x, 1000 * x))
        self.same(z, y)

    @parameterized.parameters(
        ("ortho", np.sqrt(20), STATISTICS[0]),
        ("backward", 1.0, STATISTICS[1]),
        ("forward", 20.0, STATISTICS[2]),
        ("full", 1.0, STATISTICS[0]),
    )
    def test_bias_is_a_spike_at_the_origin(self, fft_norm, height, fields):
        x, bias = self.draw(6, 4, 5, 3), self.draw(3, seed=1)
        method = nj.SpectralBatchNorm(fft_norm=fft_norm, **fields)
        with_bias, without = (train(method, x, bias=b)[0] for b in (bias, np.zeros(3)))
        spike = np.zeros(x.shape)
        spike[:, 0, 0] = height * bias
        self.same(with_bias - without, spike)

    @parameterized.parameters(*CONFIGURATIONS[::6])
    def test_training_is_evaluation_with_the_statistics_of_the_batch(self, **fields):
        self.check_evaluation(**fields)

    @parameterized.parameters(*CONFIGURATIONS[3::6])
    @pytest.mark.slow
    def test_training_of_others_is_evaluation_too(self, **fields):
        self.check_evaluation(**fields)

    def check_evaluation(self, **fields):
        method = nj.SpectralBatchNorm(momentum=0.0, **fields)
        x = self.draw(6, 4, 5, 3)
        params, state = variables(method, 3, dtype="float64")
        y, new, _ = run(method, params, state, x)
        z, _, _ = run(method, params, new, x, train=False)
        self.same(z, y)

    def test_scalings(self):
        x, shared = self.draw(6, 4, 5, 3), dict(momentum=0.0, spectrum="half")

        def result(fft_norm, epsilon):
            method = nj.SpectralBatchNorm(fft_norm=fft_norm, epsilon=epsilon, **shared)
            y, new, grads = train(method, x, gradients=True)
            return y, jnp.stack(new[:2]), new.var, grads

        y, mean, var, grads = result("backward", 4.0)
        self.same(result("full", 4.0 / 20**2), (y, mean / 20, var / 20**2, grads))
        for fft_norm, factor in (("ortho", 20**0.5), ("forward", 20.0)):
            expected = y * factor, mean / factor, var / factor**2
            self.same(result(fft_norm, 4.0 / factor**2)[:3], expected)

    @parameterized.parameters(("backward", 1 / 8), ("ortho", 1))
    def test_size_behind_batch_norm(self, fft_norm, expected):
        self.check_size(fft_norm, expected)

    @parameterized.parameters(("forward", 8), ("full", 1 / 8))
    @pytest.mark.slow
    def test_size_behind_batch_norm_of_other_scalings(self, fft_norm, expected):
        self.check_size(fft_norm, expected)

    def check_size(self, fft_norm, expected):
        method = behind(fft_norm=fft_norm)
        x = 3 + 5 * self.draw(32, 8, 8, 3)
        y, _, _ = run(method, *method.init(KEY, 3), x)
        np.testing.assert_allclose(np.sqrt(np.mean(y**2)), expected, rtol=0.01)

    @parameterized.parameters(*STATISTICS)
    def test_constant_maps(self, **fields):
        method = nj.SpectralBatchNorm(spectrum="half", **fields)
        for value in (0.0, 3.0):
            chex.assert_tree_all_finite(train(method, np.full((6, 4, 5, 3), value), gradients=True))

    @parameterized.parameters(*STATISTICS[:1])
    def test_ghost_takes_the_spectra_of_each_part(self, **fields):
        self.check_ghost(**fields)

    @parameterized.parameters(*STATISTICS[2:])
    @pytest.mark.slow
    def test_ghost_takes_the_frequencies_of_each_part(self, **fields):
        self.check_ghost(**fields)

    def check_ghost(self, **fields):
        method, x, g = nj.SpectralBatchNorm(**fields), self.draw(6, 4, 5, 3), self.draw(6, 4, 5, 3)
        params, state = variables(method, 3, dtype="float64")
        y, new, (_, dx) = run(nj.Ghost(method, groups=3), params, state, x, cotangent=g)
        parts = [
            run(method, params, state, part, cotangent=part_g)
            for part, part_g in zip(np.split(x, 3), np.split(g, 3), strict=True)
        ]
        self.same(y, np.concatenate([part[0] for part in parts]))
        self.same(dx, np.concatenate([part[2][1] for part in parts]))
        self.same(new, jax.tree.map(lambda *a: np.mean(a, 0), *(part[1] for part in parts)))


class RingsTest(parameterized.TestCase):
    def test_statistics_fit_maps_of_any_size(self):
        method = nj.SpectralBatchNorm(statistics="ring", spectrum="half")
        params, state = variables(method, 3)
        _, new, _ = run(method, params, state, draw(0, 6, 8, 8, 3))
        _, new, _ = run(method, params, new, draw(1, 6, 4, 9, 3))
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        x = draw(2, 4, 12, 5, 3)
        y, _, _ = run(method, params, new, x, train=False)
        expected, _ = oracles.apply(method, params, new, x, train=False)
        close(y, expected.astype("float32"), TOLERANCE["float32"])

    def test_empty_rings_keep_their_statistics(self):
        method = nj.SpectralBatchNorm(statistics="ring", bands=8)
        params, state = variables(method, 3)
        _, new, _ = run(method, params, state, draw(0, 6, 2, 2, 3))
        for old, moved in zip(state[:3:2], new[:3:2], strict=True):
            filled = [i for i in range(8) if not np.array_equal(moved[i], old[i])]
            self.assertEqual(filled, [0, 5, 7])


class DevicesTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.enter_context(jax.enable_x64(True))

    @parameterized.parameters(*zip(CONFIGURATIONS[3:6:2], (True, False), strict=True))
    def test_maps_stay_on_their_device(self, fields, mapped):
        self.check(nj.SpectralBatchNorm(**fields), mapped)

    def test_rings_stay_on_their_device(self):
        self.check(nj.SpectralBatchNorm(statistics="ring", bands=3, route="matmul"), False)

    @parameterized.product(fields=CONFIGURATIONS[3:6], mapped=(False, True))
    @pytest.mark.slow
    def test_all_maps_stay_on_their_device(self, fields, mapped):
        self.check(nj.SpectralBatchNorm(**fields), mapped)

    @parameterized.parameters(
        (nj.SpectralBatchNorm(**STATISTICS[2], route="fft"), False),
        (behind(), True),
    )
    @pytest.mark.slow
    def test_other_maps_stay_on_their_device(self, method, mapped):
        self.check(method, mapped)

    def check(self, method, mapped):
        """A training step on a sharded batch moves no maps, and equals that on one device."""
        if method.route == "fft" and not mapped and jax.__version_info__ < (0, 12):
            pytest.skip("before JAX 0.12 the compiler gathers what it transforms")
        params, state = variables(method, 3, dtype="float64")
        x, g = (draw(i, 16, 4, 5, 3, dtype="float64") for i in (0, 1))
        expected = run(method, params, state, x, cotangent=g)
        mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
        rows, whole = PartitionSpec("devices"), PartitionSpec()
        inputs, outputs = (whole, whole, rows, rows), (rows, whole, (whole, rows))
        if mapped:
            method = replace(method, axis_name="devices")

        def step(params, state, x, g):
            return run(method, params, state, x, cotangent=g)

        if mapped:
            step = jax.shard_map(step, mesh=mesh, in_specs=inputs, out_specs=outputs)
        args = params, state, x, g
        args = jax.device_put(args, tuple(NamedSharding(mesh, spec) for spec in inputs))
        compiled = jax.jit(step).lower(*args).compile()
        self.assertNotRegex(
            compiled.as_text(), r"\b(all-gather|all-to-all|collective-permute)(-start)?\("
        )
        close(jax.device_get(compiled(*args)), expected, TOLERANCE["float64"])

    def test_groups_of_devices(self):
        self.check_groups(**STATISTICS[0])

    @pytest.mark.slow
    def test_rings_of_groups_of_devices(self):
        self.check_groups(**STATISTICS[1])

    def check_groups(self, **fields):
        groups, method = ((0, 3), (1, 2)), nj.SpectralBatchNorm(spectrum="half", **fields)
        params, state = variables(method, 3, dtype="float64")
        x, g = (draw(i, 4, 2, 4, 5, 3, dtype="float64") for i in (0, 1))
        grouped = dataclasses.replace(method, axis_name="devices", axis_index_groups=groups)

        def step(x, g):
            return run(grouped, params, state, x, cotangent=g)

        y, new, (_, dx) = jax.device_get(jax.jit(jax.vmap(step, axis_name="devices"))(x, g))
        states = []
        for group in map(list, groups):
            ours = np.concatenate(y[group]), np.concatenate(dx[group])
            part, part_g = np.concatenate(x[group]), np.concatenate(g[group])
            z, after, (_, dz) = run(method, params, state, part, cotangent=part_g)
            close(ours, (z, dz), TOLERANCE["float64"])
            states.append(after)
        expected = jax.tree.map(lambda *a: np.broadcast_to(sum(a) / 2, (4, *a[0].shape)), *states)
        close(new, expected, TOLERANCE["float64"])


class DtypesTest(parameterized.TestCase):
    @parameterized.parameters(*zip(CONFIGURATIONS[::6], cycle(("float32", "bfloat16"))))
    def test_dtypes(self, fields, dtype):
        self.check_dtypes(fields, dtype)

    @parameterized.parameters(*zip(CONFIGURATIONS[3::6], cycle(("bfloat16", "float32"))))
    @pytest.mark.slow
    def test_dtypes_of_others(self, fields, dtype):
        self.check_dtypes(fields, dtype)

    def check_dtypes(self, fields, dtype):
        x = draw(0, 6, 4, 5, 3)
        agreement.check_dtypes(nj.SpectralBatchNorm(running_average="debiased", **fields), 3, x)
        method = nj.SpectralBatchNorm(dtype=dtype, **fields)
        agreement.check_dtypes(method, 3, x, output=dtype)

    def test_spatial_spectral_dtypes(self):
        x = draw(0, 6, 4, 5, 3)
        agreement.check_dtypes(behind(), 3, x)
        method = behind(dtype=jnp.bfloat16)
        agreement.check_dtypes(method, 3, x, output=jnp.bfloat16)

    def test_integers_become_float32(self):
        method, x = nj.SpectralBatchNorm(), np.arange(24, dtype="int32").reshape(2, 3, 2, 2)
        variables = method.init(KEY, 2)
        y, _, _ = run(method, *variables, x)
        chex.assert_type(y, "float32")
        chex.assert_trees_all_equal(y, run(method, *variables, x.astype("float32"))[0])

    def test_variables(self):
        params, state = nj.SpectralBatchNorm(param_dtype=jnp.bfloat16).init(KEY, 3)
        chex.assert_type(list(params), "bfloat16")
        chex.assert_type(list(state[:3]), "float32")
        close(list(state[:3]), [np.zeros(3, "float32")] * 2 + [np.ones(3, "float32")], 0)

    @parameterized.parameters(*CONFIGURATIONS[::6])
    def test_bfloat16_is_rounded_once(self, **fields):
        self.check_rounding(**fields)

    @parameterized.parameters(*CONFIGURATIONS[3::6])
    @pytest.mark.slow
    def test_bfloat16_of_others_is_rounded_once(self, **fields):
        self.check_rounding(**fields)

    def check_rounding(self, **fields):
        method = nj.SpectralBatchNorm(momentum=0.0, **fields)
        x = (2 + draw(0, 64, 4, 5, 3)).astype("bfloat16")
        agreement.check_rounding(method, 3, x)
        params, state = variables(method, 3)
        _, new, _ = run(method, params, state, x)
        _, expected = oracles.apply(method, params, state, x, train=True)
        np.testing.assert_allclose(new.var, expected.var, rtol=1e-5)


class ErrorsTest(parameterized.TestCase):
    @parameterized.parameters(
        (dict(statistics="pixel"), "statistics='pixel'", "'channel' or 'frequency' or 'ring'"),
        (dict(spectrum="quarter"), "spectrum='quarter'", "'full' or 'half'"),
        (dict(fft_norm="none"), "fft_norm='none'", "'ortho' or 'backward' or 'forward' or 'full'"),
        (dict(route="dft"), "route='dft'", "'auto' or 'spatial' or 'matmul' or 'fft'"),
        (dict(statistics="ring", bands=0), "bands=0", "positive integer"),
        (dict(bands=2.0), "bands=2.0", "positive integer"),
        (dict(spatial_axes=()), "spatial_axes=()", "non-empty"),
        (dict(spatial_axes="last"), "spatial_axes='last'", "integer"),
        (dict(statistics="frequency"), "map_size=None", "statistics='frequency'", "need"),
        (dict(map_size=(4, 5)), "map_size=(4, 5)", "statistics='channel'", "none"),
        (dict(statistics="ring", map_size=(4,)), "map_size=(4,)", "statistics='ring'", "none"),
        (dict(statistics="frequency", map_size=5), "map_size=5", "sequence"),
        (dict(statistics="frequency", map_size=()), "map_size=()", "sequence"),
        (dict(statistics="frequency", map_size=(4, 0)), "map_size=(4, 0)", "positive"),
        (dict(statistics="ring", route="spatial"), "route='spatial'", "statistics='ring'"),
        (dict(statistics="frequency", map_size=(4, 5), route="spatial"), "route='spatial'",
         "statistics='frequency'"),
        (dict(statistics="ring", unbiased_running_var=True), "unbiased_running_var=True",
         "statistics='ring'"),
        (dict(statistics="frequency", map_size=(4, 5), unbiased_running_var=True),
         "unbiased_running_var=True", "statistics='frequency'"),
        (dict(axis_index_groups=((0, 1),)), "axis_index_groups", "axis_name"),
    )  # fmt: skip
    def test_fields(self, fields, *pieces):
        pieces = ("SpectralBatchNorm", *pieces)
        agreement.check_rejects(self, pieces, nj.SpectralBatchNorm, **fields)

    @parameterized.parameters(
        (dict(), (6, 3), "(6, 3)", "spatial"),
        (dict(axis=(1, 2)), (6, 3, 3), "axis=(1, 2)", "(6, 3, 3)", "spatial"),
        (dict(axis=0), (3, 4, 5), "axis=0", "batch"),
        (dict(spatial_axes=(0, 1)), (6, 4, 3), "spatial_axes=(0, 1)", "batch"),
        (dict(spatial_axes=(1, -1)), (6, 4, 3), "spatial_axes=(1, -1)", "(6, 4, 3)"),
        (dict(spatial_axes=3), (6, 4, 3), "spatial_axes=3", "out of range"),
        (dict(spatial_axes=(1, 1)), (6, 4, 3), "spatial_axes=(1, 1)", "twice"),
        (dict(axis=4), (6, 4, 3), "axis=4", "out of range"),
        (dict(), (6, 4, 5, 2), "(6, 4, 5, 2)", "(2,)", "(3,)"),
        (dict(statistics="frequency", map_size=(4,)), (6, 4, 5, 3), "map_size=(4,)", "(4, 5)"),
        (dict(statistics="frequency", map_size=(5, 4)), (6, 4, 5, 3), "map_size=(5, 4)", "(4, 5)"),
        (dict(statistics="frequency", map_size=(4, 5)), (6, 4, 5, 2), "(6, 4, 5, 2)", "(3,)"),
    )
    def test_shapes(self, fields, shape, *pieces):
        for make in BOTH:
            method = make(**fields)
            features = (3, 3) if isinstance(fields.get("axis"), tuple) else 3
            params, state = variables(method, features)
            apply = functools.partial(method.apply, params, state, draw(0, *shape))
            agreement.check_rejects(self, ("BatchNorm", *pieces), apply, train=True)

    @parameterized.parameters(
        (draw(0, 6, 4, 5, 3).astype("complex64"), None, "complex64", "real"),
        (draw(0, 6, 4, 5, 3) > 0, None, "bool", "real"),
        (np.float32(1), None, "()"),
        (draw(0, 6, 4, 5, 3), np.ones((6, 4, 5, 1), bool), "(6, 4, 5, 1)", "varies", "(1, 2)"),
        (draw(0, 6, 4, 5, 3), np.ones((5, 3), bool), "(1, 1, 5, 3)", "varies", "(1, 2)"),
        (draw(0, 6, 4, 5, 3), np.ones((2, 1, 1, 1), bool), "(2, 1, 1, 1)", "broadcast"),
    )
    def test_input(self, x, mask, *pieces):
        agreement.check_rejects_input(self, nj.SpectralBatchNorm(), 3, x, mask, *pieces)

    @parameterized.parameters(
        (dict(), dict(statistics="ring"), "(8, 3)", "(3,)"),
        (dict(statistics="ring"), dict(statistics="ring", bands=4), "(4, 3)", "(8, 3)"),
        (dict(statistics="ring"), dict(), "(3,)", "(8, 3)"),
        (STATISTICS[2], dict(statistics="frequency", map_size=(4, 6)), "(4, 4, 3)"),
        (STATISTICS[2], dict(statistics="ring"), "(8, 3)", "(4, 3, 3)"),
        (dict(), dict(running_average="debiased"), "count"),
        (dict(running_average="cumulative"), dict(), "count"),
    )
    def test_state_of_another_configuration(self, fields, other, *pieces):
        method, (params, _) = nj.SpectralBatchNorm(**fields), nj.SpectralBatchNorm().init(KEY, 3)
        _, state = nj.SpectralBatchNorm(**other).init(KEY, 3)
        apply = functools.partial(method.apply, params, state, draw(0, 6, 4, 5, 3))
        for train in (False, True):
            agreement.check_rejects(self, ("SpectralBatchNorm", *pieces), apply, train=train)

    @parameterized.product(make=BOTH, features=(0, -3, 2.5, "four"))
    def test_features(self, make, features):
        agreement.check_rejects(self, ("BatchNorm", features), make().init, KEY, features)


class FrontsTest(parameterized.TestCase):
    @parameterized.parameters(
        (nj.SpectralBatchNorm, {"scale", "bias", "mean_real", "mean_imag", "var"}),
        (behind, {"BatchNorm_0", "SpectralBatchNorm_1"}),
    )
    def test_modules_are_the_method(self, make, names):
        method = make(momentum=0.5)
        x = draw(0, 6, 4, 5, 3)
        params, state = method.init(KEY, 3)
        y, state, _ = run(method, params, state, x)
        z, _, _ = run(method, params, state, x, train=False)

        module = linen.Norm(method)
        variables = module.init(KEY, x, use_running_average=True)
        self.assertEqual(set(variables), {"params", "batch_stats"})
        self.assertEqual(set(variables["params"]) | set(variables["batch_stats"]), names)
        trained, new = module.apply(variables, x, False, mutable="batch_stats")
        evaluated = module.apply(variables | new, x, True)
        close((trained, evaluated), (y, z), TOLERANCE["float32"])

        module = nnx.Norm(method, 3, rngs=flax_nnx.Rngs(0))
        self.assertEqual(set(flax_nnx.state(module)), names)
        trained = module(x)
        module.eval()
        close((trained, module(x)), (y, z), TOLERANCE["float32"])
