"""The oracle of SpectralBatchNorm against finite differences, other oracles and by hand."""

import dataclasses

import numpy as np
import oracles
from absl.testing import parameterized
from methods.spectral_oracle import SpectralRunning
from oracles import Params, close, draw, params_for, running_for

import normjax as nj

SPECTRAL = (
    nj.SpectralBatchNorm(),
    nj.SpectralBatchNorm(spectrum="half", fft_norm="backward"),
    nj.SpectralBatchNorm(statistics="ring", bands=4, fft_norm="forward"),
    nj.SpectralBatchNorm(statistics="ring", bands=4, spectrum="half"),
    nj.SpectralBatchNorm(statistics="frequency", map_size=(4, 5)),
    nj.SpectralBatchNorm(statistics="frequency", map_size=(4, 5), spectrum="half", fft_norm="full"),
)  # for maps of size [4, 5]


def spectral_running_for(method, *features, sizes=(4, 5), count=None):
    stored = (*sizes[:-1], sizes[-1] // 2 + 1)
    groups = {"channel": (), "ring": (method.bands,), "frequency": stored}[method.statistics]
    shape = (*groups, *features)
    return SpectralRunning(draw(3, *shape), draw(4, *shape), 0.5 + draw(5, *shape) ** 2, count)


class SpectralTest(parameterized.TestCase):
    def train(self, x, state=None, **fields):
        method, features = nj.SpectralBatchNorm(**fields), x.shape[-1]
        if state is None:
            state = spectral_running_for(method, features, sizes=x.shape[1:-1])
        return oracles.apply(method, params_for(features), state, x, train=True)

    def same(self, first, second):
        (y, new), (z, expected) = first, second
        close(y, z)
        for a, b in zip(new[:3], expected[:3], strict=True):
            close(a.ravel(), b.ravel())

    @parameterized.product(
        fields=(
            dict(statistics="channel"),
            dict(statistics="ring", bands=1),
            dict(statistics="frequency", map_size=(1, 1)),
        ),
        spectrum=("full", "half"),
        fft_norm=("ortho", "backward", "forward", "full"),
    )
    def test_of_single_positions_it_is_batch_norm(self, fields, spectrum, fft_norm):
        x = draw(0, 6, 1, 1, 3)
        y, new = self.train(x, **fields, spectrum=spectrum, fft_norm=fft_norm, momentum=0.0)
        state = running_for(3)
        method = nj.BatchNorm(momentum=0.0)
        z, expected = oracles.apply(method, params_for(3), state, x, train=True)
        close(y, z)
        close(new.mean_real.reshape(3), expected.mean)
        close(new.mean_imag, 0)
        close(new.var.reshape(3), expected.var)

    def test_statistics_of_the_plane_are_those_of_the_corner_and_the_energy(self):
        x, params = draw(0, 6, 4, 5, 3), params_for(3)
        y, new = self.train(x, fft_norm="backward", momentum=0.0)
        corner = x[:, 0, 0].mean(0)
        var = 20 * (x**2).mean((0, 1, 2)) - corner**2
        close(new.mean_real, corner)
        close(new.mean_imag, 0)
        close(new.var, var)
        slope = params.scale / np.sqrt(var + 1e-5)
        expected = slope * x
        expected[:, 0, 0] += params.bias - slope * corner
        close(y, expected)

    @parameterized.parameters((4, 5), (5, 4), (3, 4, 2))
    def test_the_plane_has_the_inner_frequencies_of_the_half_twice(self, *sizes):
        x, axes = draw(0, 6, *sizes, 3), range(1, len(sizes) + 1)
        _, new = self.train(x, momentum=0.0)
        spectra = np.fft.rfftn(x, axes=axes, norm="ortho")
        weights = np.full(spectra.shape[-2], 2)
        weights[0] = 1
        weights[-1] -= sizes[-1] % 2 == 0
        weights = np.broadcast_to(weights[:, None], spectra.shape)
        axes = (0, *axes)
        mean = np.average(spectra, axes, weights).real
        close(new.mean_real, mean)
        close(new.var, np.average(np.abs(spectra - mean) ** 2, axes, weights))

    def test_half_statistics_are_plain_means_of_the_stored_frequencies(self):
        x = draw(0, 6, 4, 5, 3)
        _, new = self.train(x, spectrum="half", fft_norm="backward", momentum=0.0)
        spectra = np.fft.rfft2(x, axes=(1, 2))
        mean = spectra.mean((0, 1, 2))
        close(new.mean_real + 1j * new.mean_imag, mean)
        close(new.var, (np.abs(spectra - mean) ** 2).mean((0, 1, 2)))
        self.assertGreater(np.abs(new.mean_imag).min(), 1e-3)

    @parameterized.parameters("full", "half")
    def test_each_frequency_becomes_standard(self, spectrum):
        x, method = draw(0, 9, 4, 5, 3), dataclasses.replace(SPECTRAL[-2], spectrum=spectrum)
        method = dataclasses.replace(method, epsilon=0.0)
        state = spectral_running_for(method, 3)
        y, _ = oracles.apply(method, Params(), state, x, train=True)
        spectra = np.fft.fft2(y, axes=(1, 2), norm="ortho")
        close(spectra.mean(0), 0)
        close((np.abs(spectra) ** 2).mean(0), 1)

    @parameterized.product(spectrum=("full", "half"), sizes=((4, 5), (6,)))
    def test_one_ring_is_the_channel(self, spectrum, sizes):
        x, state = draw(0, 6, *sizes, 3), SpectralRunning(draw(3, 3), draw(4, 3), np.ones(3))
        rings = SpectralRunning(*(a[None] for a in state[:3]))
        self.same(
            self.train(x, state, spectrum=spectrum),
            self.train(x, rings, statistics="ring", bands=1, spectrum=spectrum),
        )

    def test_a_ring_per_stored_frequency_is_the_frequency(self):
        x = draw(0, 6, 8, 3)
        self.same(
            self.train(x, statistics="ring", bands=5, spectrum="half"),
            self.train(x, statistics="frequency", map_size=(8,)),
        )

    def test_rings_of_a_small_map(self):
        ring = np.array([[0, 1, 2], [1, 1, 2], [2, 2, 2], [1, 1, 2]])
        h, w = np.meshgrid(np.arange(4), np.arange(4), indexing="ij")
        for i, j in np.ndindex(4, 3):
            x = np.cos(np.pi / 2 * (i * h + j * w))[None, ..., None]
            _, new = self.train(x, statistics="ring", bands=3, spectrum="half", momentum=0.0)
            power = (new.var + new.mean_real**2 + new.mean_imag**2)[:, 0]
            self.assertEqual(np.flatnonzero(power > 1e-9).tolist(), [ring[i, j]])

    def test_an_empty_ring_keeps_its_statistics(self):
        method = nj.SpectralBatchNorm(statistics="ring", bands=8)
        x, state = draw(0, 6, 2, 2, 3), spectral_running_for(method, 3)
        _, new = self.train(x, state, statistics="ring", bands=8)
        for before, after in zip(state[:3], new[:3], strict=True):
            moved = (before != after).any(1)
            self.assertEqual(np.flatnonzero(moved).tolist(), [0, 5, 7])

    @parameterized.parameters(("ortho", 0.5, 0.5), ("forward", 1, 1), ("full", 1, 0))
    def test_scalings_differ_in_epsilon_and_size(self, fft_norm, forward, size):
        x, positions = draw(0, 6, 4, 5, 3), 20
        y, _ = self.train(x, fft_norm=fft_norm, epsilon=1e-3)
        z, _ = self.train(x, fft_norm="backward", epsilon=1e-3 * positions ** (2 * forward))
        close(y, z * positions**size)

    @parameterized.parameters(*SPECTRAL)
    def test_evaluation_with_the_statistics_of_the_batch_is_training(self, method):
        x, params = draw(0, 6, 4, 5, 3), params_for(3)
        method = dataclasses.replace(method, momentum=0.0)
        state = spectral_running_for(method, 3)
        y, state = oracles.apply(method, params, state, x, train=True)
        z, after = oracles.apply(method, params, state, x, train=False)
        close(y, z)
        self.assertIs(after, state)

    @parameterized.parameters(*SPECTRAL)
    def test_axes_may_lie_anywhere(self, method):
        x, params, state = draw(0, 6, 4, 5, 3), params_for(3), spectral_running_for(method, 3)
        y, new = oracles.apply(method, params, state, x, train=True)
        first = dataclasses.replace(method, axis=1)
        z, expected = oracles.apply(first, params, state, np.moveaxis(x, -1, 1), train=True)
        self.same((np.moveaxis(y, -1, 1), new), (z, expected))
        split = dataclasses.replace(method, spatial_axes=(2, 3))
        z, expected = oracles.apply(split, params, state, x.reshape(2, 3, 4, 5, 3), train=True)
        self.same((y.reshape(z.shape), new), (z, expected))

    @parameterized.parameters(*SPECTRAL)
    def test_masked_samples_are_as_if_dropped(self, method):
        x, mask = draw(0, 6, 4, 5, 2), np.random.default_rng(2).random((6, 1, 1, 2)) < 0.7
        params, state = params_for(2), spectral_running_for(method, 2)
        x = np.where(mask, x, np.nan)
        y, new = oracles.apply(method, params, state, x, train=True, mask=mask)
        self.assertTrue(np.isfinite(y).all())
        for c in range(2):
            one, keep = slice(c, c + 1), mask[:, 0, 0, c]
            own = Params(params.scale[one], params.bias[one])
            before, after = (SpectralRunning(*(a[..., one] for a in s[:3])) for s in (state, new))
            z, expected = oracles.apply(method, own, before, x[keep][..., one], train=True)
            self.same((y[keep][..., one], after), (z, expected))

    @parameterized.product(method=SPECTRAL, average=("exponential", "debiased", "cumulative"))
    def test_empty_batch_changes_nothing(self, method, average):
        method = dataclasses.replace(method, running_average=average)
        count = None if average == "exponential" else 3.0
        x, state = draw(0, 6, 4, 5, 3), spectral_running_for(method, 3, count=count)
        y, new = oracles.apply(method, params_for(3), state, x, train=True, mask=False)
        for before, after in zip(state, new, strict=True):
            np.testing.assert_array_equal(before, after)
        close(y[:, 1:], 0)
        close(y[:, 0, 1:], 0)
        self.assertTrue(y[:, 0, 0].all())

    @parameterized.parameters(
        *((method, (1, 2)) for method in SPECTRAL),
        (nj.SpectralBatchNorm(axis=1, spectrum="half", fft_norm="full"), (2, 3)),
        (nj.SpectralBatchNorm(axis=(1, 3), statistics="ring", bands=3), (2,)),
        (nj.SpectralBatchNorm(axis=(1, 3), spectrum="half"), (2,)),
        (nj.SpectralBatchNorm(spatial_axes=1, statistics="frequency", map_size=(4,)), (1,)),
        (nj.SpectralBatchNorm(spatial_axes=2, statistics="ring", spectrum="half"), (2,)),
    )
    def test_central_differences_with_ragged_samples(self, method, spatial):
        x = draw(0, 6, 4, 5, 2)
        mask = np.random.default_rng(2).random(x.shape) < 0.7
        mask = mask[tuple(slice(1) if i in spatial else slice(None) for i in range(x.ndim))]
        features = [x.shape[i] for i in np.atleast_1d(method.axis)]
        sizes = [x.shape[i] for i in spatial]
        state = spectral_running_for(method, *features, sizes=sizes)
        oracles.check_slope(method, params_for(*features), state, x, mask)
