"""The float64 oracles against recorded outputs, finite differences and each other."""

import dataclasses

import numpy as np
import reference
import vector_files
from absl.testing import parameterized
from reference import Params, Running, SpectralRunning

import normjax as nj

ATOL = 1e-10
VECTORS_ATOL = {"float64": ATOL, "float32": 2e-5}
PREFIXES = (
    "batch_norm",
    "group_norm",
    "layer_norm",
    "rms_norm",
    "instance_norm",
    "ghost_batch_norm",
    "exclusive_batch_norm",
    "eval_norm",
    "channel_affine",
    "spectral_batch_norm",
    "spatial_spectral_batch_norm",
    "scale_batch_norm",
)
FILES = [name for prefix in PREFIXES for name in vector_files.names(prefix)]
SPECTRAL = (
    nj.SpectralBatchNorm(),
    nj.SpectralBatchNorm(spectrum="half", fft_norm="backward"),
    nj.SpectralBatchNorm(statistics="ring", bands=4, fft_norm="forward"),
    nj.SpectralBatchNorm(statistics="ring", bands=4, spectrum="half"),
    nj.SpectralBatchNorm(statistics="frequency", map_size=(4, 5)),
    nj.SpectralBatchNorm(statistics="frequency", map_size=(4, 5), spectrum="half", fft_norm="full"),
)  # for maps of size [4, 5]


def close(actual, desired, atol=ATOL):
    np.testing.assert_allclose(actual, desired, rtol=0, atol=atol)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def params_for(*features, seed=7):
    return Params(1 + 0.3 * draw(seed, *features), draw(seed + 1, *features))


def running_for(features, count=None):
    return Running(draw(3, features), 0.5 + draw(4, features) ** 2, count)


def spectral_running_for(method, *features, sizes=(4, 5), count=None):
    stored = (*sizes[:-1], sizes[-1] // 2 + 1)
    groups = {"channel": (), "ring": (method.bands,), "frequency": stored}[method.statistics]
    shape = (*groups, *features)
    return SpectralRunning(draw(3, *shape), draw(4, *shape), 0.5 + draw(5, *shape) ** 2, count)


def close_fields(actual, expected, atol):
    """The fields of `actual`, or of each method's if that is a dict, are the arrays `expected`."""
    for name, value in expected.items():
        part = actual[name] if isinstance(actual, dict) else getattr(actual, name)
        check = close_fields if isinstance(value, dict) else close
        check(part, value, atol)


def start(name):
    """Method, parameters and first state (any, if the file has none) of a vector file."""

    def filled(make, fields):
        chain = any(isinstance(value, dict) for value in fields.values())
        return {k: make(**part) for k, part in fields.items()} if chain else make(**fields)

    def running(**fields):
        make = SpectralRunning if "mean_real" in fields else Running
        return make(**fields, count=0.0)

    method, (_, arrays) = vector_files.method(name), vector_files.load(name)
    spectral = isinstance(method, nj.SpectralBatchNorm)
    untracked = ("mean_real", "mean_imag", "var") if spectral else ("mean", "var")
    untracked = dict.fromkeys(untracked, np.ones(arrays["x_1"].shape[-1]))
    params = filled(Params, vector_files.fields(name, "param_"))
    return method, params, filled(running, vector_files.fields(name, "state_0_") or untracked)


class VectorsTest(parameterized.TestCase):
    @parameterized.parameters(*FILES)
    def test_outputs_and_state(self, name):
        config, arrays = vector_files.load(name)
        method, params, state = start(name)
        atol = VECTORS_ATOL[vector_files.dtype(name)]
        for step in (1, 2, 3):
            y, state = reference.apply(method, params, state, arrays[f"x_{step}"], train=True)
            close(y, arrays[f"y_{step}"], atol)
            tracked = vector_files.fields(name, f"state_{step}_")
            close_fields(state, tracked, atol)
        if "eps_at_inference" in config:
            method = dataclasses.replace(method, epsilon=config["eps_at_inference"])
        y, after = reference.apply(method, params, state, arrays["x_eval"], train=not tracked)
        close(y, arrays["y_eval"], atol)
        self.assertTrue(not tracked or after == state)

    @parameterized.parameters(*(name for name in FILES if not name.startswith("channel_affine")))
    def test_gradients(self, name):
        _, arrays = vector_files.load(name)
        atol = VECTORS_ATOL[vector_files.dtype(name)]
        dx, dscale, dbias = reference.gradients(*start(name), arrays["x_1"], arrays["cotangent"])
        close(dx, arrays["grad_x"], atol)
        actual = {"x": dx, "scale": dscale, "bias": dbias}
        if isinstance(dscale, dict):
            actual = {k: {"scale": dscale[k], "bias": dbias[k]} for k in dscale}
        expected = vector_files.fields(name, "grad_")
        close_fields(actual, {k: v for k, v in expected.items() if k != "x"}, atol)

    @parameterized.parameters(
        *(
            name
            for kind in ("replacement", "minimal", "shuffle")
            for name in vector_files.names(f"ghost_noise_{kind}")
        )
    )
    def test_ghost_noise(self, name):
        _, arrays = vector_files.load(name)
        method, atol = vector_files.method(name), VECTORS_ATOL[vector_files.dtype(name)]
        for step in (1, 2, 3):
            x, samples = arrays[f"x_{step}"], len(arrays["x_1"])
            ghosts = arrays.get(f"draw_{step}_randint")
            if ghosts is None:
                order = arrays.get(f"draw_{step}_randperm", np.arange(samples))
                size = method.ghost_batch_size
                ghosts = np.repeat(order.reshape(-1, size), size, axis=0)
            shift, scale = reference.ghost_noise(method, x, ghosts)
            close((x - shift) / scale, arrays[f"y_{step}"], atol)
            if step == 1:
                close(arrays["cotangent"] / scale, arrays["grad_x"], atol)

    @parameterized.parameters(*vector_files.names("noisy_affine"))
    def test_analytic_noise(self, name):
        _, arrays = vector_files.load(name)
        method = vector_files.method(name)
        for step in (1, 2, 3):
            x, none = arrays[f"x_{step}"], np.nan
            normal, chi2 = (arrays.get(f"draw_{step}_{a}", none) for a in ("randn", "chi2"))
            shift, scale = reference.analytic_noise(method, x, normal, chi2)
            close((x - shift) / scale, arrays[f"y_{step}"])


class KalmanTest(parameterized.TestCase):
    @parameterized.parameters(*vector_files.names("kalman_norm"))
    def test_outputs_state_and_what_is_handed_on(self, name):
        config, arrays = vector_files.load(name)
        method, groups = vector_files.method(name), config["split"]
        lead = (groups, arrays["x_1"].shape[-1])[groups == 1 :]
        params = nj.KalmanParams(**vector_files.fields(name, "param_"))
        state = nj.KalmanRunning(**vector_files.fields(name, "state_0_"))
        for step in (1, 2, 3):
            prior = None
            if config["has_prior"]:
                parts = (arrays[f"aux_{step}_prior_{part}"] for part in ("mean", "var"))
                prior = tuple(a.reshape(lead) for a in parts)
            (y, (mean, var)), state = reference.apply(
                method, params, state, arrays[f"x_{step}"], train=True, prior=prior
            )
            close(y, arrays[f"y_{step}"])
            close_fields(state, vector_files.fields(name, f"state_{step}_"), ATOL)
            if prior is None:  # the unbiased variance
                size = arrays["x_1"][..., 0].size / groups
                var = var * size / (size - 1)
            close(mean, arrays[f"out_{step}_mean"].reshape(lead))
            close(var, arrays[f"out_{step}_var"].reshape(lead))
        method = dataclasses.replace(method, epsilon=config["eps"])
        (y, _), _ = reference.apply(method, params, state, arrays["x_eval"], train=False)
        close(y, arrays["y_eval"])


class GradientsTest(parameterized.TestCase):
    def check_slope(self, method, params, state, x, mask):
        """Central differences along a random direction."""
        g, along_x = draw(1, *x.shape), draw(5, *x.shape)
        along = params_for(*params.scale.shape, seed=11)
        if params.bias is None:
            along = along._replace(bias=np.zeros(params.scale.shape))

        def loss(h):
            bias = None if params.bias is None else params.bias + h * along.bias
            moved = Params(params.scale + h * along.scale, bias)
            y, _ = reference.apply(method, moved, state, x + h * along_x, train=True, mask=mask)
            return np.sum(y * g)

        dx, dscale, dbias = reference.gradients(method, params, state, x, g, mask=mask)
        slope = (dx * along_x).sum() + (dscale * along.scale).sum() + (dbias * along.bias).sum()
        h = 1e-5
        close(slope, (loss(h) - loss(-h)) / (2 * h), atol=1e-6)
        self.assertFalse(dx[~np.broadcast_to(mask, x.shape)].any())

    @parameterized.parameters(
        (nj.BatchNorm(axis=1), (3,)),
        (nj.LayerNorm(reduction_axes=(1, -1), feature_axes=(2, 3)), (2, 4)),
        (nj.RMSNorm(reduction_axes=(0, 2), feature_axes=1), (3,)),
        (nj.GroupNorm(num_groups=2), (4,)),
        (nj.GroupNorm(num_groups=None, group_size=1, reduction_axes=(2, 3)), (4,)),
        (nj.InstanceNorm(feature_axes=2), (2,)),
        (nj.Ghost(method=nj.BatchNorm(), groups=2), (4,)),
        (nj.GhostBatchNorm(2), (4,)),
        (nj.ExclusiveBatchNorm(2), (4,)),
        (nj.ExclusiveBatchNorm(axis=1), (3,)),
    )
    def test_central_differences_with_ragged_mask(self, method, features):
        x = draw(0, 4, 3, 2, 4)
        mask = np.random.default_rng(2).random(x.shape) < 0.7
        params = params_for(*features)
        if isinstance(method, nj.RMSNorm):
            params = params._replace(bias=None)
        state = Running(np.zeros(features[-1]), np.ones(features[-1]))
        self.check_slope(method, params, state, x, mask)

    @parameterized.parameters(
        *((method, (1, 2)) for method in SPECTRAL),
        (nj.SpectralBatchNorm(axis=1, spectrum="half", fft_norm="full"), (2, 3)),
        (nj.SpectralBatchNorm(axis=(1, 3), statistics="ring", bands=3), (2,)),
        (nj.SpectralBatchNorm(axis=(1, 3), spectrum="half"), (2,)),
        (nj.SpectralBatchNorm(spatial_axes=1, statistics="frequency", map_size=(4,)), (1,)),
        (nj.SpectralBatchNorm(spatial_axes=2, statistics="ring", spectrum="half"), (2,)),
    )
    def test_spectral_central_differences_with_ragged_samples(self, method, spatial):
        x = draw(0, 6, 4, 5, 2)
        mask = np.random.default_rng(2).random(x.shape) < 0.7
        mask = mask[tuple(slice(1) if i in spatial else slice(None) for i in range(x.ndim))]
        features = [x.shape[i] for i in np.atleast_1d(method.axis)]
        sizes = [x.shape[i] for i in spatial]
        state = spectral_running_for(method, *features, sizes=sizes)
        self.check_slope(method, params_for(*features), state, x, mask)


class LimitsTest(parameterized.TestCase):
    def same(self, first, second, x, *, state=None, params=None, mask=None):
        params = params_for(x.shape[-1]) if params is None else params
        state = running_for(x.shape[-1]) if state is None else state
        y, new = reference.apply(first, params, state, x, train=True, mask=mask)
        z, expected = reference.apply(second, params, state, x, train=True, mask=mask)
        close(y, z)
        close(new.mean, expected.mean)
        close(new.var, expected.var)

    def test_one_group_is_layer_norm_over_all_but_the_batch(self):
        layer = nj.LayerNorm(reduction_axes=(1, 2, 3))
        self.same(nj.GroupNorm(num_groups=1), layer, draw(0, 2, 3, 4, 5))

    def test_a_group_per_channel_is_instance_norm(self):
        self.same(nj.GroupNorm(num_groups=5), nj.InstanceNorm(), draw(0, 2, 3, 4, 5))
        single = nj.GroupNorm(num_groups=None, group_size=1)
        self.same(single, nj.InstanceNorm(), draw(0, 2, 3, 4, 5))

    def test_renorm_with_closed_clips_is_batch_norm(self):
        self.same(nj.BatchRenorm(r_max=1.0, d_max=0.0), nj.BatchNorm(), draw(0, 6, 3, 4))

    def test_renorm_with_open_clips_is_evaluation(self):
        x, params, state = draw(0, 6, 3, 4), params_for(4), running_for(4)
        method = nj.BatchRenorm(r_max=1e9, d_max=1e9)
        y, new = reference.apply(method, params, state, x, train=True)
        close(y, reference.apply(method, params, state, x, train=False)[0])
        self.assertFalse(np.allclose(new.mean, state.mean))

    def test_rms_norm_is_layer_norm_of_centred_input(self):
        x = draw(0, 5, 8)
        x -= x.mean(-1, keepdims=True)
        self.same(nj.RMSNorm(), nj.LayerNorm(use_bias=False), x, params=Params(draw(1, 8)))

    def test_one_ghost_is_the_method(self):
        ghost = nj.Ghost(method=nj.BatchNorm(), groups=1)
        self.same(ghost, nj.BatchNorm(), draw(0, 6, 4))

    def test_a_ghost_per_sample_is_instance_norm(self):
        ghost = nj.Ghost(method=nj.BatchNorm(epsilon=1e-6), groups=3)
        x, params, state = draw(0, 3, 4, 5), params_for(5), running_for(5)
        y, _ = reference.apply(ghost, params, state, x, train=True)
        close(y, reference.apply(nj.InstanceNorm(), params, (), x, train=True)[0])

    def test_chain_applies_in_order(self):
        batch, affine = nj.BatchNorm(), nj.Affine()
        x, state = draw(0, 6, 4), running_for(4)
        first, second = params_for(4), params_for(4, seed=20)
        y, new = reference.apply(
            nj.chain(batch, affine),
            {"BatchNorm_0": first, "Affine_1": second},
            {"BatchNorm_0": state, "Affine_1": ()},
            x,
            train=True,
        )
        z, expected = reference.apply(batch, first, state, x, train=True)
        close(y, z * second.scale + second.bias)
        close(new["BatchNorm_0"].var, expected.var)

    def test_dynamic_tanh_is_linear_near_zero(self):
        x, params = 1e-4 * draw(0, 6, 4), params_for(4)._replace(alpha=0.25)
        y, _ = reference.apply(nj.DynamicTanh(), params, (), x, train=True)
        close(y, params.scale * 0.25 * x + params.bias, atol=1e-12)

    def test_activation_comes_last(self):
        x, params, state = draw(0, 6, 4), params_for(4), running_for(4)
        y, _ = reference.apply(nj.BatchNorm(activation=np.tanh), params, state, x, train=True)
        z, _ = reference.apply(nj.BatchNorm(), params, state, x, train=True)
        close(y, np.tanh(z))


class SpectralTest(parameterized.TestCase):
    def train(self, x, state=None, **fields):
        method, features = nj.SpectralBatchNorm(**fields), x.shape[-1]
        if state is None:
            state = spectral_running_for(method, features, sizes=x.shape[1:-1])
        return reference.apply(method, params_for(features), state, x, train=True)

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
        z, expected = reference.apply(method, params_for(3), state, x, train=True)
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
        y, _ = reference.apply(method, Params(), state, x, train=True)
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
        y, state = reference.apply(method, params, state, x, train=True)
        z, after = reference.apply(method, params, state, x, train=False)
        close(y, z)
        self.assertIs(after, state)

    @parameterized.parameters(*SPECTRAL)
    def test_axes_may_lie_anywhere(self, method):
        x, params, state = draw(0, 6, 4, 5, 3), params_for(3), spectral_running_for(method, 3)
        y, new = reference.apply(method, params, state, x, train=True)
        first = dataclasses.replace(method, axis=1)
        z, expected = reference.apply(first, params, state, np.moveaxis(x, -1, 1), train=True)
        self.same((np.moveaxis(y, -1, 1), new), (z, expected))
        split = dataclasses.replace(method, spatial_axes=(2, 3))
        z, expected = reference.apply(split, params, state, x.reshape(2, 3, 4, 5, 3), train=True)
        self.same((y.reshape(z.shape), new), (z, expected))

    @parameterized.parameters(*SPECTRAL)
    def test_masked_samples_are_as_if_dropped(self, method):
        x, mask = draw(0, 6, 4, 5, 2), np.random.default_rng(2).random((6, 1, 1, 2)) < 0.7
        params, state = params_for(2), spectral_running_for(method, 2)
        x = np.where(mask, x, np.nan)
        y, new = reference.apply(method, params, state, x, train=True, mask=mask)
        self.assertTrue(np.isfinite(y).all())
        for c in range(2):
            one, keep = slice(c, c + 1), mask[:, 0, 0, c]
            own = Params(params.scale[one], params.bias[one])
            before, after = (SpectralRunning(*(a[..., one] for a in s[:3])) for s in (state, new))
            z, expected = reference.apply(method, own, before, x[keep][..., one], train=True)
            self.same((y[keep][..., one], after), (z, expected))

    @parameterized.product(method=SPECTRAL, average=("exponential", "debiased", "cumulative"))
    def test_empty_batch_changes_nothing(self, method, average):
        method = dataclasses.replace(method, running_average=average)
        count = None if average == "exponential" else 3.0
        x, state = draw(0, 6, 4, 5, 3), spectral_running_for(method, 3, count=count)
        y, new = reference.apply(method, params_for(3), state, x, train=True, mask=False)
        for before, after in zip(state, new, strict=True):
            np.testing.assert_array_equal(before, after)
        close(y[:, 1:], 0)
        close(y[:, 0, 1:], 0)
        self.assertTrue(y[:, 0, 0].all())


class MasksTest(parameterized.TestCase):
    @parameterized.parameters(
        nj.BatchNorm(unbiased_running_var=True),
        nj.BatchRenorm(r_max=1.2, d_max=0.3),
        nj.LayerNorm(reduction_axes=(0, 2), feature_axes=2),
        nj.RMSNorm(reduction_axes=(0, 2), feature_axes=2),
    )
    def test_masked_rows_are_as_if_dropped(self, method):
        x, keep = draw(0, 6, 3, 4), np.array([1, 0, 1, 1, 0, 1], bool)
        params, state = params_for(4), running_for(4)
        x[~keep] = np.nan
        y, new = reference.apply(method, params, state, x, train=True, mask=keep[:, None, None])
        z, expected = reference.apply(method, params, state, x[keep], train=True)
        close(y[keep], z)
        close(new.mean, expected.mean)
        close(new.var, expected.var)
        self.assertTrue(np.isfinite(y).all())

    @parameterized.parameters(
        nj.LayerNorm(reduction_axes=(1, 2)),
        nj.GroupNorm(num_groups=2),
        nj.InstanceNorm(),
    )
    def test_masked_positions_are_as_if_dropped(self, method):
        x, keep = draw(0, 2, 6, 4), np.array([1, 0, 1, 1, 0, 1], bool)
        y, _ = reference.apply(method, Params(), (), x, train=True, mask=keep[:, None])
        z, _ = reference.apply(method, Params(), (), x[:, keep], train=True)
        close(y[:, keep], z)

    def test_channel_without_valid_positions_keeps_its_statistics(self):
        x, mask, state = draw(0, 6, 4), np.array([True, False, True, True]), running_for(4)
        y, new = reference.apply(nj.BatchNorm(), Params(), state, x, train=True, mask=mask)
        self.assertEqual((new.mean[1], new.var[1]), (state.mean[1], state.var[1]))
        self.assertFalse(np.equal(new.mean, state.mean)[[0, 2, 3]].any())
        close(y[:, 1], 0)

    @parameterized.parameters("exponential", "debiased", "cumulative")
    def test_empty_batch_changes_nothing(self, average):
        count = None if average == "exponential" else 3.0
        x, state = draw(0, 6, 4), running_for(4, count)
        method = nj.BatchNorm(running_average=average)
        y, new = reference.apply(method, params_for(4), state, x, train=True, mask=False)
        for before, after in zip(state, new, strict=True):
            np.testing.assert_array_equal(before, after)
        close(y, np.broadcast_to(params_for(4).bias, y.shape))

    def test_skip_nonfinite(self):
        x, state = draw(0, 6, 4), running_for(4)
        x[2, 1] = np.inf
        method = nj.BatchNorm(skip_nonfinite=True)
        with np.errstate(invalid="ignore"):
            _, kept = reference.apply(method, Params(), state, x, train=True)
            method = dataclasses.replace(method, skip_nonfinite=False)
            _, spoilt = reference.apply(method, Params(), state, x, train=True)
        self.assertIs(kept, state)
        self.assertFalse(np.isfinite(spoilt.var).all())


class AveragesTest(parameterized.TestCase):
    def run_steps(self, **fields):
        method, state = nj.BatchNorm(**fields), Running(np.full(4, 9.0), np.full(4, 9.0), 0.0)
        xs = draw(0, 5, 8, 4)
        for x in xs:
            _, state = reference.apply(method, Params(), state, x, train=True)
        return xs, state

    def test_debiased_is_the_weighted_mean_of_the_batches(self):
        xs, state = self.run_steps(running_average="debiased", momentum=0.8)
        weights = 0.8 ** np.arange(4, -1, -1)
        close(state.mean, np.average(xs.mean(1), axis=0, weights=weights))
        close(state.var, np.average(xs.var(1), axis=0, weights=weights))
        self.assertEqual(state.count, 5)

    def test_cumulative_is_the_mean_of_the_batches(self):
        xs, state = self.run_steps(running_average="cumulative", unbiased_running_var=True)
        close(state.mean, xs.mean((0, 1)))
        close(state.var, xs.var(1, ddof=1).mean(0))

    def test_renorm_clips_follow_the_count(self):
        x, params, state = draw(0, 6, 4), Params(), running_for(4, 2.0)
        scheduled = nj.BatchRenorm(r_max=lambda t: 1 + 0.1 * t, d_max=lambda t: 0.05 * t)
        y, new = reference.apply(scheduled, params, state, x, train=True)
        fixed = nj.BatchRenorm(r_max=float(np.float32(1.2)), d_max=float(np.float32(0.1)))
        close(y, reference.apply(fixed, params, state, x, train=True)[0], atol=1e-6)
        self.assertEqual(new.count, 3)
