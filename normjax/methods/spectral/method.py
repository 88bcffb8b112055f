"""Spectral batch normalization: batch normalization of the spectra of feature maps."""

import dataclasses
import functools
import math
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from normjax.core import checks, passes, running
from normjax.core.checks import field
from normjax.core.compat import is_sum
from normjax.core.fields import RunningFields
from normjax.core.method import Traits
from normjax.core.statistics import Moments, Parted, over_devices
from normjax.core.structs import AffineParams, Axes, Features, Key, Pool, Running, affine_params
from normjax.core.tracing import traced_once
from normjax.methods.spectral import bands, spatial, transforms

LARGEST_PRODUCT = 64  # the longest axis for which "auto" multiplies by a matrix


_saves = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names("moments", "rounded"), is_sum
)


class SpectralRunning(NamedTuple):
    """Running statistics of spectra: a complex mean as two real arrays, and a real variance.

    Cakaj, Mehnert & Yang, *Spectral Batch Normalization*, 2023, https://arxiv.org/abs/2306.16999

    Example:
      >>> import normjax as nj
      >>> nj.SpectralBatchNorm(statistics="ring", bands=4).init(None, 3)[1].mean_real.shape
      (4, 3)
    """

    mean_real: jax.Array  # f32[..., features]
    mean_imag: jax.Array  # f32[..., features]
    var: jax.Array  # f32[..., features]
    count: jax.Array | None = None  # f32[], of updates
    pool: Pool | None = None  # of real and imaginary parts on axis 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpectralBatchNorm(RunningFields):
    """Spectral batch normalization: batch normalization of the Fourier transforms of feature maps.

    Cakaj, Mehnert & Yang, *Spectral Batch Normalization: Normalization in the Frequency Domain*,
    2023, https://arxiv.org/abs/2306.16999

    The spectrum U of each map over its spatial axes becomes `(U - mean) / sqrt(var + epsilon) *
    scale + bias` with a complex mean and a real variance `mean(|U - mean|^2)` over the batch
    (evaluation: the running statistics), and is transformed back. Which frequencies share
    statistics, and how the transforms are scaled, could not be settled from the paper; every
    reading is an option. The public implementation (uladzislau-varabei/spectral-batch-norm) does as
    `statistics="channel", spectrum="half", fft_norm="full", unbiased_running_var=True`, and notes
    that the paper places the layer behind batch normalization in the deeper blocks of a network.

    For "ortho", "backward", "forward", "full" and a map of M positions, the forward transform is
    multiplied by 1 / sqrt(M), 1, 1 / M, 1 / M and the inverse by 1 / sqrt(M), 1 / M, 1, 1 / M. A
    spectrum of variance one makes maps with a root mean square of 1, 1 / sqrt(M), sqrt(M),
    1 / sqrt(M), and epsilon acts on the mean square of the maps as epsilon times 1, 1 / M, M, M.

    Dtypes are as in `BatchNorm`. Reverse mode keeps the input (for the half plane also two sums of
    each row) or, with a transform, the spectrum: of an input in half precision, its distances from
    the mean rounded to that precision.

    Attributes:
      epsilon: added to the variance of the spectrum, >= 0.
      use_bias: whether `init` makes a bias, which is added to every frequency: a spike at the
        origin of each map.
      axis, momentum, use_scale, scale_init, bias_init, dtype, param_dtype, axis_name,
        axis_index_groups, activation, running_average, skip_nonfinite: as in `BatchNorm`.
      unbiased_running_var: store n / (n - 1) times the variance with n = channels * frequencies of
        one sample, as the public implementation does (the batch is missing in its n). Only for
        channel statistics.
      statistics: "channel": one mean and variance for each channel. That is a factor for each
        channel and a constant at the origin of each map (with `spectrum="half"`: on the row through
        it along the last axis); the shape of a spectrum stays. "frequency": one for each channel
        and frequency, for maps of one size; the spectrum of the batch becomes flat. "ring": one for
        each channel and band of |k|.
      spectrum: over which frequencies channel and ring statistics are taken. "full": the full
        plane; its mean is real. "half": all stored frequencies of the half plane alike; the mean is
        complex, and the inverse drops what cannot belong to a real map.
      fft_norm: "ortho", "backward", "forward" or "full".
      spatial_axes: the axes to transform, the last of them halved; None: all but axis 0 and the
        features. Other axes are like the batch.
      map_size: sizes of the spatial axes; for, and only for, the statistics of each frequency.
      bands: number of bands for ring statistics. Band 0 is the zero frequency; the others are rings
        of equal width up to the largest |k|. With one band all frequencies are in it.
      route: "spatial": without a transform, for channel statistics. "matmul": products with
        matrices of cosines and sines. "fft": `jnp.fft`. "auto": "spatial" where it can be, else
        "matmul" up to an axis of 64, else "fft". All agree to rounding.

    Raises:
      ValueError: for fields that contradict each other; in `apply`, for an input without spatial
        axes or of another size than `map_size`, and a mask that varies within a map.

    Example:
      >>> import jax, normjax as nj
      >>> x, norm = jax.random.normal(jax.random.key(1), (8, 4, 4, 3)), nj.SpectralBatchNorm()
      >>> y, state = norm.apply(*norm.init(None, 3), x, train=True)
    """

    traits: ClassVar[Traits] = Traits()

    statistics: Literal["channel", "frequency", "ring"] = field(
        "channel", checks.one_of("channel", "frequency", "ring")
    )
    spectrum: Literal["full", "half"] = field("full", checks.one_of("full", "half"))
    fft_norm: Literal["ortho", "backward", "forward", "full"] = field(
        "ortho", checks.one_of("ortho", "backward", "forward", "full")
    )
    spatial_axes: Axes | None = field(None, checks.optional(checks.integers))
    map_size: tuple[int, ...] | None = field(None, checks.optional(checks.sizes))
    bands: int = field(8, checks.positive)
    route: Literal["auto", "spatial", "matmul", "fft"] = field(
        "auto", checks.one_of("auto", "spatial", "matmul", "fft")
    )

    def __post_init__(self):
        super().__post_init__()
        name = type(self).__name__
        for option, value in (("unbiased_running_var", True), ("route", "spatial")):
            if getattr(self, option) == value and self.statistics != "channel":
                raise ValueError(
                    f"{name}: {option}={value!r} is for statistics='channel' only, not "
                    f"statistics={self.statistics!r}."
                )
        if (self.map_size is not None) != (self.statistics == "frequency"):
            raise ValueError(
                f"{name}: map_size={self.map_size} with statistics={self.statistics!r}: those of "
                "each frequency need the sizes of the spatial axes, others take none."
            )

    def init(self, key: Key, features: Features) -> tuple[AffineParams, SpectralRunning]:
        """Scale and bias (`param_dtype`) of shape [features]; running mean 0, variance 1 (float32).

        The statistics have the shape [features] for each channel, [bands, features] for each ring,
        and [*stored, features] for each frequency: `stored` is the shape of `rfftn` of a map.
        """
        features = checks.as_features(type(self).__name__, features)
        mean, var, count, pool = running.init(self, (*self._leading(), *features))
        if pool is not None:
            pool = jax.tree.map(lambda a: jnp.stack([a, a]), pool)
        return affine_params(self, key, features), SpectralRunning(mean, mean, var, count, pool)

    def check_training(self, x: Any) -> None:
        """ValueError for statistics of single values."""
        layout = self._layout(x)
        over = layout.batch if self.statistics == "frequency" else layout.samples
        sizes, instead = [layout.shape[i] for i in over], "give more samples, or evaluate"
        checks.require_several_values(self, sizes, layout.shape, instead)

    def observe(self, x: Any, mask: jax.Array | None = None) -> Moments | Parted:
        """Moments of the spectra: real and imaginary parts on axis 0, then as in the state."""
        x, mask = passes.inputs(self, x, mask)
        layout = self._layout(x)
        return self._see(x, self._spectrum(x, layout), mask, layout)[0]

    def evaluation(
        self, params: Any, state: Any, x: Any = None, mask: jax.Array | None = None
    ) -> Any:
        """ValueError: constants go to the origin of each map, and frequencies may differ."""
        raise ValueError(
            f"{type(self).__name__}: evaluation is no affine map of each channel and cannot be "
            "folded: constants go to the origin of each map, and frequencies may differ."
        )

    def absorb(
        self, state: SpectralRunning, seen: Moments | Parted, size: int | None = None
    ) -> SpectralRunning:
        """The state moved by what `observe` saw.

        `unbiased_running_var` needs `size`, the channels times stored frequencies of a sample.
        """
        if self.unbiased_running_var:
            if size is None:
                raise ValueError(f"{type(self).__name__}: unbiased_running_var=True needs a size.")
            correct = lambda part: part._replace(var=part.var * (size / max(size - 1, 1)))
            parted = isinstance(seen, Parted)
            seen = seen._replace(parts=correct(seen.parts)) if parted else correct(seen)
        mean = jnp.stack([state.mean_real, state.mean_imag])
        var = jnp.stack([state.var, jnp.zeros_like(state.var)])
        population = dataclasses.replace(self, unbiased_running_var=False)
        moved = running.absorb(population, Running(mean, var, state.count, state.pool), seen)
        real, imag = moved.mean
        return SpectralRunning(real, imag, moved.var.sum(0), moved.count, moved.pool)

    @traced_once
    def apply(
        self,
        params: AffineParams,
        state: SpectralRunning,
        x: jax.Array,
        *,
        train: bool,
        mask: jax.Array | None = None,
        key: Key = None,
    ) -> tuple[jax.Array, SpectralRunning]:
        """As `BatchNorm.apply`, but that `mask` has size one on the spatial axes."""
        del key
        x, mask = passes.inputs(self, x, mask)
        layout = self._layout(x)
        name = type(self).__name__
        checks.require_features(name, "axis", layout.features, x.shape, params)
        running.require_state(self, state)
        wanted = self._shape(layout)
        if wrong := {a.shape for a in state[:3]} - {wanted}:
            raise ValueError(
                f"{name}: statistics of shape {min(wrong)}, but statistics={self.statistics!r} of "
                f"an input of shape {x.shape} have shape {wanted}."
            )
        if mask is not None and any(mask.shape[i] != 1 for i in layout.spatial):
            raise ValueError(
                f"{name}: a mask of shape {mask.shape} varies along the spatial axes "
                f"{layout.spatial} of an input of shape {x.shape}: mask whole samples."
            )
        spectrum = self._spectrum(x, layout)
        if not train:
            mean = self._grouped(jnp.stack([state.mean_real, state.mean_imag]), 1, layout)
            var = self._grouped(state.var, 0, layout)
            return self._normalize(x, spectrum, mean, var, params, layout), state
        batch = functools.partial(self._batch, layout=layout)
        if spectrum is not None:
            # The many numbers of a spectrum's statistics are cheaper made again than kept.
            batch = jax.checkpoint(batch, policy=_saves)
        y, seen = batch(params, x, spectrum, mask)
        frequencies = layout.stored if self.spectrum == "half" else layout.sizes
        size = math.prod((*frequencies, *(x.shape[i] for i in layout.features)))
        return y, self.absorb(state, seen, size)

    def _grouped(self, a, axis, layout):
        """Statistics as in the state, with one axis of groups of frequencies at `axis`."""
        sizes = (layout.shape[i] for i in layout.features)
        return a.reshape(*a.shape[:axis], self._groups(), *sizes)

    def _spectrum(self, x, layout):
        route = self._route(layout)
        return None if route == "spatial" else transforms.forward(passes.value(x), layout, route)

    def _batch(self, params, x, spectrum, mask, layout):
        """Output, and what was seen of the batch."""
        seen, kept = self._see(x, spectrum, mask, layout)
        mean = self._grouped(seen.mean, 1, layout)
        how = mean, self._grouped(seen.var, 1, layout).sum(0), params
        y = self._normalize(x, kept, *how, layout)
        if kept is not spectrum:
            exact, *how = lax.stop_gradient((spectrum, *how))
            y = bands.straight_through(self._normalize(x, exact, *how, layout), y)
        return y, seen

    def _see(self, x, spectrum, mask, layout):
        """Moments over devices, and the spectrum that reverse mode keeps."""
        half = self.spectrum == "half"
        if spectrum is None:
            now = spatial.moments(x, layout, half=half, mask=mask)
            others = tuple(i + 1 for i in layout.samples)
            now = Moments(*(a.squeeze(others)[:, None] for a in now))
        else:
            members = self._members(layout)
            how = layout, members, self._groups()
            now = bands.moments(spectrum, *how, half=half, mask=mask)
            if x.dtype.itemsize < 4:  # reverse mode keeps no more than the input has
                now = checkpoint_name(lax.stop_gradient(now), "moments")
                spectrum = bands.store_rounded(spectrum, now, layout, members, x.dtype)
                again = bands.moments(spectrum, *how, half=half, mask=mask)
                now = bands.straight_through(now, again)
        factor, _ = transforms.factors(self.fft_norm, math.prod(layout.sizes))
        now = Moments(*(a.reshape(2, *self._shape(layout)) for a in now))
        now = Moments(now.count, now.mean * factor, now.var * factor**2)
        if self.axis_name is None:
            return now, spectrum
        own, groups = over_devices(now, self.axis_name, self.axis_index_groups)
        return (own if groups is None else Parted(*own, groups)), spectrum

    def _layout(self, x):
        name = type(self).__name__
        features = checks.as_axes(name, "axis", self.axis, x.shape)
        spatial = tuple(i for i in range(1, x.ndim) if i not in features)
        if self.spatial_axes is not None:
            spatial = checks.as_axes(name, "spatial_axes", self.spatial_axes, x.shape)
        if 0 in features or 0 in spatial or set(features) & set(spatial) or not spatial:
            raise ValueError(
                f"{name}: axis={self.axis} and spatial_axes={self.spatial_axes} of an input of "
                f"shape {x.shape}: besides the batch on axis 0 and the features, spatial axes are "
                "needed."
            )
        batch = tuple(i for i in range(x.ndim) if i not in features + spatial)
        layout = transforms.Layout(x.shape, batch, spatial, features)
        if self.map_size is not None and layout.sizes != self.map_size:
            raise ValueError(
                f"{name}: maps of size {layout.sizes} in an input of shape {x.shape}, but "
                f"map_size={self.map_size}. Statistics of rings or channels fit maps of any size."
            )
        return layout

    def _leading(self):
        """Shape of the statistics before the features."""
        if self.map_size is not None:
            return (*self.map_size[:-1], self.map_size[-1] // 2 + 1)
        return (self.bands,) if self.statistics == "ring" else ()

    def _shape(self, layout):
        return (*self._leading(), *(layout.shape[i] for i in layout.features))

    def _groups(self):
        return math.prod(self._leading())

    def _route(self, layout) -> Any:
        if self.route != "auto":
            return self.route
        if self.statistics == "channel":
            return "spatial"
        return "matmul" if max(layout.sizes) <= LARGEST_PRODUCT else "fft"

    def _members(self, layout) -> Any:
        """The group of each stored frequency; None: every frequency is a group."""
        if self.statistics == "frequency":
            return None
        return bands.rings(layout.sizes, self._groups()).reshape(-1)

    def _normalize(self, x, spectrum, mean, var, params, layout):
        """The output for statistics [2, g, *features] and [g, *features]."""
        there, back = transforms.factors(self.fft_norm, math.prod(layout.sizes))
        dtype = passes.wide(x.dtype)
        scale, bias = (None if a is None else a.astype(dtype)[None, None] for a in params)
        mean = mean.astype(dtype)
        if self.spectrum == "full" and self.statistics != "frequency":  # that of a plane is real
            mean = jnp.stack([mean[0], jnp.zeros_like(mean[1])])
        gain = passes.inverse_deviation(var.astype(dtype), self.epsilon)[None]
        gain = gain if scale is None else gain * scale
        bias = jnp.zeros_like(gain[:, :1]) if bias is None else bias
        bias = jnp.concatenate([bias, jnp.zeros_like(bias)])
        factor = there * back
        if spectrum is None:
            others = tuple(i + 1 for i in layout.samples)
            constant = (bias - gain * mean) * back
            slope = jnp.expand_dims(gain[:, 0] * factor, others)[0]
            constant = jnp.expand_dims(constant[:, 0], others)
            how: Any = dict(activation=self.activation, dtype=self.dtype)
            return spatial.affine(x, slope, constant, layout, half=self.spectrum == "half", **how)
        members, small = self._members(layout), (mean / there, gain * factor, bias * back)
        small = (bands.unlisted(a, layout, members) for a in small)
        spectrum = passes.affine(spectrum, *small)
        output = passes.output_dtype(self.dtype, x)
        exact = output if self.activation is None else dtype
        y = transforms.inverse(spectrum, layout, self._route(layout), exact)
        return passes.activate(self.activation, y).astype(output)
