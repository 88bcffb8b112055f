"""Spectral batch normalization: batch normalization of the spectra of feature maps."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from normjax.core import checks, passes, running, sync
from normjax.core.activation import activate
from normjax.core.cpu import sums_p
from normjax.core.structs import (
    AffineParams,
    Axes,
    AxisGroups,
    AxisName,
    Features,
    Key,
    Moments,
    Running,
    affine_params,
)
from normjax.core.tracing import traced_once
from normjax.methods.spectral import transforms as spectra

LARGEST_PRODUCT = 64  # the longest axis for which "auto" multiplies by a matrix


def _saves(primitive, *_, **how):
    """Whether to keep what `primitive` makes for the backward pass: sums, and what has a name."""
    named = primitive.name == "name" and how["name"] in ("moments", "rounded")
    return (
        named or primitive is sums_p or primitive.name in ("reduce_sum", "psum", "psum_invariant")
    )


class SpectralRunning(NamedTuple):
    """Running statistics of spectra: a complex mean as two real arrays, and a real variance.

    Cakaj, Mehnert & Yang, *Spectral Batch Normalization*, 2023, https://arxiv.org/abs/2306.16999

    Example:
      >>> import normjax as nj
      >>> _, state = nj.SpectralBatchNorm(statistics="ring", bands=4).init(None, 3)
      >>> state.mean_real.shape, state.count
      ((4, 3), None)
    """

    mean_real: jax.Array  # f32[..., features]
    mean_imag: jax.Array  # f32[..., features]
    var: jax.Array  # f32[..., features]
    count: jax.Array | None = None  # f32[]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpectralBatchNorm:
    """Spectral batch normalization: batch normalization of the Fourier transforms of feature maps.

    Cakaj, Mehnert & Yang, *Spectral Batch Normalization: Normalization in the Frequency Domain*,
    2023, https://arxiv.org/abs/2306.16999

    Each map is transformed over its spatial axes, its spectrum normalized to `(U - mean) /
    sqrt(var + epsilon) * scale + bias` with a complex mean and a real variance `mean(|U - mean|^2)`
    over the batch (evaluation: the running statistics), and transformed back. Which frequencies
    share statistics, and how the transforms are scaled, could not be settled from the paper; every
    reading is an option here. The public implementation (uladzislau-varabei/spectral-batch-norm)
    pools and scales as `statistics="channel", spectrum="half", fft_norm="full"` do, with
    `unbiased_running_var=True` for its running variance, and notes that the paper places the layer
    behind batch normalization in the deeper blocks of a network.

    What `statistics` decides:

    * "channel": one mean and variance for each channel, over all frequencies. That is exactly a
      factor for each channel and a constant added at the origin of each map (with
      `spectrum="half"`: to the row through the origin along the last axis), so no transform is
      needed. The shape of a spectrum stays.
    * "frequency": one for each channel and frequency. The spectrum of the batch becomes flat. Maps
      have one size, `map_size`.
    * "ring": one for each channel and band of |k|, for maps of any size; see `bands`.

    What `fft_norm` decides, for a map of M positions: the forward transform is multiplied by 1 /
    sqrt(M), 1, 1 / M, 1 / M ("ortho", "backward", "forward", "full"), the inverse by 1 / sqrt(M),
    1 / M, 1, 1 / M. A spectrum of variance one makes maps with a root mean square of 1, 1 /
    sqrt(M), sqrt(M), 1 / sqrt(M). Relative to the mean square of the maps, epsilon acts as
    epsilon times 1, 1 / M, M, M. "full" is the public implementation's scaling in both directions;
    it equals "backward" with epsilon times M^2.

    The output has the dtype of the input (integers: float32) unless `dtype` says otherwise;
    transforms, statistics and arithmetic are in at least float32. Reverse mode keeps the input (for
    the half plane also two sums of each row) or, with a transform, the spectrum: of an input in
    half precision, its distances from the mean rounded to that precision.

    Attributes:
      axis: the feature axis, or several, with their own scale, bias and statistics.
      momentum: weight of the old running statistics, in [0, 1].
      epsilon: added to the variance of the spectrum, >= 0.
      dtype: dtype of the output; None: that of the input.
      param_dtype: dtype of scale and bias.
      use_bias: whether `init` makes a bias, which is added to every frequency: a spike at the
        origin of each map.
      use_scale: whether `init` makes a scale.
      bias_init: initializer of the bias, called with (key, features, param_dtype).
      scale_init: initializer of the scale, called with (key, features, param_dtype).
      axis_name: mapped axis name(s) whose devices share statistics in training.
      axis_index_groups: groups of device indices along `axis_name` that share statistics among
        themselves. Running statistics average the groups.
      activation: pointwise function of the result.
      running_average: "exponential" with `momentum`; "debiased", the same without the initial
        values' share; "cumulative", all batches alike. The last two add a leaf `count` to the
        state.
      unbiased_running_var: store n / (n - 1) times the variance with n = channels * frequencies of
        one sample, as the public implementation does (the batch is missing in its n). Only for
        channel statistics.
      skip_nonfinite: leave the state alone when the moments of a batch are not all finite.
      statistics: "channel", "frequency" or "ring".
      spectrum: over which frequencies channel and ring statistics are taken. "full": the full
        plane; its mean is real. "half": all stored frequencies of the half plane alike, as the
        public implementation does; the mean is complex, and the inverse drops what cannot belong to
        a real map.
      fft_norm: "ortho", "backward", "forward" or "full".
      spatial_axes: the axes to transform, the last of them halved; None: all but axis 0 and the
        features. Other axes are like the batch.
      map_size: sizes of the spatial axes; for, and only for, the statistics of each frequency.
      bands: number of bands for ring statistics. Band 0 is the zero frequency; the others are rings
        of equal width up to the largest |k|. With one band all frequencies are in it.
      route: "spatial": without a transform, for channel statistics. "matmul": transforms as
        products with matrices of cosines and sines. "fft": `jnp.fft`. "auto": "spatial" where it
        can be, else "matmul" up to an axis of 64, else "fft". All agree to rounding.

    Raises:
      ValueError: for a field outside its range or fields that contradict each other; in `apply`,
        for an input without spatial axes, maps of another size than `map_size`, a mask that varies
        within a map, and axes or features that do not fit the input.
      TypeError: in `apply`, for complex or boolean input.

    Example:
      >>> import jax, normjax as nj
      >>> method = nj.SpectralBatchNorm()
      >>> params, state = method.init(jax.random.key(0), 3)
      >>> x = jax.random.normal(jax.random.key(1), (8, 4, 4, 3))
      >>> y, state = method.apply(params, state, x, train=True)
      >>> y.shape, state.mean_real.shape
      ((8, 4, 4, 3), (3,))
    """

    axis: Axes = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Callable[..., Any] = jax.nn.initializers.zeros
    scale_init: Callable[..., Any] = jax.nn.initializers.ones
    axis_name: AxisName = None
    axis_index_groups: AxisGroups = None
    activation: Callable[[jax.Array], jax.Array] | None = None
    running_average: Literal["exponential", "debiased", "cumulative"] = "exponential"
    unbiased_running_var: bool = False
    skip_nonfinite: bool = False
    statistics: Literal["channel", "frequency", "ring"] = "channel"
    spectrum: Literal["full", "half"] = "full"
    fft_norm: spectra.FftNorm = "ortho"
    spatial_axes: Axes | None = None
    map_size: tuple[int, ...] | None = None
    bands: int = 8
    route: Literal["auto", "spatial", "matmul", "fft"] = "auto"

    def __post_init__(self):
        checks.configuration(self)
        name = type(self).__name__
        if self.unbiased_running_var and self.statistics != "channel":
            raise ValueError(
                f"{name}: unbiased_running_var=True is the public implementation's correction of "
                f"statistics='channel'; there is none for statistics={self.statistics!r}."
            )
        if self.route == "spatial" and self.statistics != "channel":
            raise ValueError(
                f"{name}: route='spatial' knows statistics='channel' only; "
                f"statistics={self.statistics!r} needs a transform."
            )
        if (self.map_size is not None) != (self.statistics == "frequency"):
            raise ValueError(
                f"{name}: map_size={self.map_size} with statistics={self.statistics!r}: those of "
                "each frequency need the sizes of the spatial axes, others fit maps of any size "
                "and take none."
            )

    def init(self, key: Key, features: Features) -> tuple[AffineParams, SpectralRunning]:
        """Scale and bias (`param_dtype`) of shape [features]; running mean 0, variance 1 (float32).

        The statistics have the shape [features] for each channel, [bands, features] for each ring,
        and [*stored, features] for each frequency: `stored` is the shape of `rfftn` of a map.
        """
        features = checks.features(type(self).__name__, features)
        mean, var, count = running.init((*self._leading(), *features), counted=self._counted())
        return affine_params(self, key, features), SpectralRunning(mean, mean, var, count)

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
        """Normalizes the spectra of `x` with their own statistics (`train=True`) or running ones.

        Args:
          params: scale and bias from `init`.
          state: running statistics; returned moved if `train`, else unchanged.
          x: real array: the batch on axis 0, the features on `axis`, and spatial axes.
          train: whether to use and record the statistics of `x`.
          mask: broadcasts to `x` with size one on the spatial axes; samples where it is False do
            not enter the statistics, and nothing of them, NaN included, reaches the output of other
            samples or any gradient.
          key: unused.

        Returns:
          The output, of the shape of `x`, and the state.
        """
        del key
        name = type(self).__name__
        x, mask = passes.inputs(name, x, mask)
        layout = self._layout(x)
        checks.match(name, "axis", layout.features, x.shape, params)
        self._check_state(state, layout)
        if mask is not None and any(mask.shape[i] != 1 for i in layout.spatial):
            raise ValueError(
                f"{name}: a mask of shape {mask.shape} varies along the spatial axes "
                f"{layout.spatial} of an input of shape {x.shape}, but a spectrum is that of a "
                "whole map. Mask whole samples."
            )
        # Statistics of g groups of frequencies: real and imaginary parts [2, g, *features].
        sizes = tuple(x.shape[i] for i in layout.features)
        grouped = math.prod(self._leading()), *sizes
        mean = jnp.stack([a.reshape(grouped) for a in (state.mean_real, state.mean_imag)])
        var = state.var.reshape(grouped)
        if not train:
            spectrum = self._spectrum(x, layout)
            return self._normalize(x, spectrum, mean, var, params, layout), state

        over = layout.batch if self.statistics == "frequency" else layout.batch + layout.spatial
        instead = "give more samples, or evaluate"
        checks.several_values(name, [x.shape[i] for i in over], x.shape, self.axis_name, instead)
        batch = functools.partial(self._batch, layout=layout)
        if self._route(layout) != "spatial":
            # The many numbers of a spectrum's statistics are cheaper made again than kept.
            batch = jax.checkpoint(batch, policy=_saves)
        y, now, each = batch(params, x, self._spectrum(x, layout), mask)
        new = now if each is None else each
        if self.unbiased_running_var:
            n = math.prod(sizes) * math.prod(layout.stored if self._half() else layout.sizes)
            new = new._replace(var=new.var * (n / max(n - 1, 1)))
        update = running.update if each is None else running.update_groups
        moved = update(
            Running(mean, jnp.stack([var, jnp.zeros_like(var)]), state.count),
            new,
            self.momentum,
            average=self.running_average,
            skip_nonfinite=self.skip_nonfinite,
        )
        real, imag, var = (a.reshape(state.var.shape) for a in (*moved.mean, moved.var.sum(0)))
        return y, SpectralRunning(real, imag, var, moved.count)

    def _check_state(self, state, layout):
        name, sizes = type(self).__name__, tuple(layout.shape[i] for i in layout.features)
        wanted = (*self._leading(), *sizes)
        for a in (state.mean_real, state.mean_imag, state.var):
            if a.shape != wanted:
                raise ValueError(
                    f"{name}: statistics of shape {a.shape}, but statistics={self.statistics!r} of "
                    f"an input of shape {layout.shape} have shape {wanted}."
                )
        checks.counted(name, state, self._counted())

    def _spectrum(self, x, layout):
        route = self._route(layout)
        return None if route == "spatial" else spectra.forward(passes.value(x), layout, route)

    def _batch(self, params, x, spectrum, mask, layout):
        """Output, moments of the batch, and those of each group of devices."""
        exact = spectrum
        if spectrum is None:
            now = spectra.spatial_moments(x, layout, half=self._half(), mask=mask)
            others = tuple(i + 1 for i in layout.batch + layout.spatial)
            now = Moments(*(a.squeeze(others)[:, None] for a in now))
        else:
            now = self._moments(spectrum, mask, layout)
            if x.dtype.itemsize < 4:  # reverse mode keeps no more than the input has
                exact, now = lax.stop_gradient((spectrum, now))
                now = checkpoint_name(now, "moments")
                spectrum = spectra.rounded(spectrum, now, layout, self._members(layout), x.dtype)
                now = spectra.as_if(now, self._moments(spectrum, mask, layout))
        factor = self._factors(layout)[0]
        now = Moments(now.count, now.mean * factor, now.var * factor**2)
        each = None
        if self.axis_name is not None:
            now, each = sync.over_devices(now, self.axis_name, self.axis_index_groups)
        how = now.mean, now.var.sum(0), params
        y = self._normalize(x, spectrum, *how, layout)
        if exact is not spectrum:
            y = spectra.as_if(self._normalize(x, exact, *lax.stop_gradient(how), layout), y)
        return y, now, each

    def _moments(self, spectrum, mask, layout):
        now = spectra.moments(spectrum, layout, mask)
        if self.statistics == "frequency":
            return now
        members = self._members(layout)
        return spectra.merge(now, layout, members, self._bands(), half=self._half())

    def _layout(self, x):
        name = type(self).__name__
        features = checks.axes(name, "axis", self.axis, x.shape)
        spatial = tuple(i for i in range(1, x.ndim) if i not in features)
        if self.spatial_axes is not None:
            spatial = checks.axes(name, "spatial_axes", self.spatial_axes, x.shape)
        if 0 in features or 0 in spatial or set(features) & set(spatial) or not spatial:
            raise ValueError(
                f"{name}: axis={self.axis} and spatial_axes={self.spatial_axes} of an input of "
                f"shape {x.shape}: axis 0 is the batch, and besides it and the features one or "
                "more spatial axes are needed."
            )
        batch = tuple(i for i in range(x.ndim) if i not in features + spatial)
        layout = spectra.Layout(x.shape, batch, spatial, features)
        if self.map_size is not None and layout.sizes != self.map_size:
            raise ValueError(
                f"{name}: maps of size {layout.sizes} in an input of shape {x.shape}, but "
                f"map_size={self.map_size}: statistics of each frequency fit one size only. "
                "Those of rings or channels fit all."
            )
        return layout

    def _leading(self):
        """Shape of the statistics before the features."""
        if self.map_size is not None:
            return (*self.map_size[:-1], self.map_size[-1] // 2 + 1)
        return (self.bands,) if self.statistics == "ring" else ()

    def _counted(self):
        return self.running_average != "exponential"

    def _half(self):
        return self.spectrum == "half"

    def _route(self, layout) -> Any:
        if self.route != "auto":
            return self.route
        if self.statistics == "channel":
            return "spatial"
        return "matmul" if max(layout.sizes) <= LARGEST_PRODUCT else "fft"

    def _factors(self, layout):
        """What makes of the orthonormal spectrum that of `fft_norm`, and back (no inverses)."""
        positions = math.prod(layout.sizes)
        there, back = spectra.factors(self.fft_norm, positions)
        return there * math.sqrt(positions), back * math.sqrt(positions)

    def _members(self, layout) -> Any:
        """The group of each stored frequency; None: every frequency is a group."""
        if self.statistics == "frequency":
            return None
        return spectra.bands(layout.sizes, self._bands()).reshape(-1)

    def _bands(self):
        return self.bands if self.statistics == "ring" else 1

    def _normalize(self, x, spectrum, mean, var, params, layout):
        """The output for statistics [2, g, *features] and [g, *features]."""
        there, back = self._factors(layout)
        dtype = passes.wide(x.dtype)
        scale, bias = (None if a is None else a.astype(dtype)[None, None] for a in params)
        mean = mean.astype(dtype)
        if not self._half() and self.statistics != "frequency":  # the mean of a full plane is real
            mean = jnp.stack([mean[0], jnp.zeros_like(mean[1])])
        gain = passes.inverse_deviation(var.astype(dtype), self.epsilon)[None]
        gain = gain if scale is None else gain * scale
        bias = jnp.zeros_like(gain[:, :1]) if bias is None else bias
        bias = jnp.concatenate([bias, jnp.zeros_like(bias)])
        factor = there * back
        if spectrum is None:
            others = tuple(i + 1 for i in layout.batch + layout.spatial)
            constant = (bias - gain * mean) * back
            return spectra.spatial_affine(
                x,
                jnp.expand_dims(gain[:, 0] * factor, others)[0],
                jnp.expand_dims(constant[:, 0], others),
                layout,
                half=self._half(),
                activation=self.activation,
                dtype=self.dtype,
            )
        how = layout, self._members(layout)
        spectrum = spectra.affine(spectrum, mean / there, gain * factor, bias * back, *how)
        output = passes.output_dtype(self.dtype, x)
        exact = output if self.activation is None else dtype
        y = spectra.inverse(spectrum, layout, self._route(layout), exact)
        return activate(self.activation, y).astype(output)
