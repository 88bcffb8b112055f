"""The table: one line per method and variant buys every check of the contract."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import normjax as nj
from normjax.testing import Subject


@dataclasses.dataclass(frozen=True)
class Case(Subject):
    """A line of the table; what is a fast test in which tier says test_contract.py."""

    tier: int = 1


def prior(dtype, shape, axis=-1):
    """A prediction for a multiple of four features; its numbers are exact in every dtype."""
    mean, var = jnp.array([0.25, 0.5, 1.0, -0.25], dtype), jnp.array([1.0, 0.5, 2.0, 1.5], dtype)
    mean, var = (jnp.tile(a, shape[axis] // 4) for a in (mean, var))
    return {"prior": nj.propagate.prediction(mean, var)}


def gate(dtype, shape):
    """A gate; its numbers are exact in every dtype."""
    z = np.random.default_rng(10).normal(size=shape)
    return {"gate": jnp.asarray(np.round(8 * z) / 8, dtype)}


def classes(dtype, shape):
    """Classes of samples, of three."""
    return {"condition": jnp.arange(shape[0]) % 3}


def mixtures(dtype, shape):
    """Weights of three classes for samples; their numbers are exact in every dtype."""
    weights = np.random.default_rng(11).random((shape[0], 3))
    return {"condition": jnp.asarray(np.round(8 * weights) / 8, dtype)}


def vectors(dtype, shape, *, positions=()):
    """A vector of five numbers for each sample, or position; exact in every dtype."""
    z = np.random.default_rng(12).normal(size=(shape[0], *positions, 5))
    return {"condition": jnp.asarray(np.round(8 * z) / 8, dtype)}


def pairs(dtype, shape):
    """Offsets of scale and bias for each sample."""
    u, v = np.round(8 * np.random.default_rng(13).normal(size=(2, shape[0], shape[-1]))) / 8
    return {"condition": (jnp.asarray(u, dtype), jnp.asarray(v, dtype))}


def style(dtype, shape):
    """Maps of a style, larger than those of the content by a row."""
    z = np.random.default_rng(14).normal(size=(shape[0], shape[1] + 1, *shape[2:]))
    return {"style": jnp.asarray(np.round(8 * z) / 8, dtype)}


def operands(dtype, shape):
    """Two further operands of the shape of the input; exact in every dtype."""
    u, v = np.round(8 * np.random.default_rng(15).normal(size=(2, *shape))) / 8
    return {"others": (jnp.asarray(u, dtype), jnp.asarray(v, dtype))}


def branch(dtype, shape):
    """The second of several branches."""
    return {"branch": 1}


def weights(dtype, shape):
    """Weights of samples, zero among them; the numbers are exact in every dtype."""
    w = np.random.default_rng(11).integers(0, 9, (shape[0], *(1,) * (len(shape) - 1)))
    return {"weights": jnp.asarray(w / 4, dtype)}


def segment_ids(dtype, shape):
    """Ids of two of three segments for all positions, features last, and of padding."""
    ids = np.random.default_rng(12).choice([0, 0, 0, 2, 2, 2, -1], (*shape[:-1], 1))
    return {"segment_ids": jnp.asarray(ids, jnp.int32)}


WEIGHTED, SEGMENTS = {"extra": weights}, {"extra": segment_ids}
GATED = {"extra": gate, "residual_bytes": 3.1}  # a gate in float32 beside bfloat16
MAPS = {"masks_positions": False}
WHOLE = {"masks_positions": False}  # masks of whole vectors
variant = functools.partial(Case, tier=2)
CASES = {
    "BatchNorm": Case(nj.BatchNorm(momentum=0.9), (16, 3, 3, 4)),
    "BatchNorm, features": variant(nj.BatchNorm(), (16, 5)),
    "BatchNorm, channels first": variant(nj.BatchNorm(axis=1), (16, 4, 5)),
    "BatchNorm, two axes": variant(nj.BatchNorm(axis=(1, -1)), (16, 2, 3, 2)),
    "BatchNorm, no affine": variant(nj.BatchNorm(use_scale=False, use_bias=False), (16, 4)),
    "BatchNorm, relu inside": variant(nj.BatchNorm(activation=jax.nn.relu), (16, 3, 3, 4)),
    "BatchNorm, debiased": variant(nj.BatchNorm(running_average="debiased"), (16, 4)),
    "BatchNorm, cumulative": variant(nj.BatchNorm(running_average="cumulative"), (16, 4)),
    "BatchNorm, pooled": variant(nj.BatchNorm(running_average="pooled"), (16, 4)),
    "BatchNorm, scheduled momentum": variant(
        nj.BatchNorm(momentum=nj.Ramp(0.5, 0.9, 0, 2)), (16, 4)
    ),
    "BatchNorm, unbiased, guarded": variant(
        nj.BatchNorm(unbiased_running_var=True, skip_nonfinite=True), (16, 4)
    ),
    "BatchNorm, weighted": variant(
        nj.BatchNorm(unbiased_running_var=True), (16, 3, 3, 4), **WEIGHTED
    ),
    "BatchNorm, segments": variant(
        nj.BatchNorm(num_segments=3, activation=jax.nn.relu), (16, 3, 3, 4), **SEGMENTS
    ),
    "BatchRenorm": Case(nj.BatchRenorm(r_max=1.5, d_max=0.5), (16, 3, 3, 4)),
    "BatchRenorm, ramps": variant(nj.BatchRenorm(), (16, 4)),
    "RunningNorm": Case(nj.RunningNorm(), (16, 4)),
    "RunningNorm, clipped, debiased": variant(
        nj.RunningNorm(clip=1.0, running_average="debiased", use_scale=True, axis=1), (16, 4, 3)
    ),
    "RunningNorm, weighted": variant(nj.RunningNorm(), (16, 4), **WEIGHTED),
    "LayerNorm": Case(nj.LayerNorm(), (16, 3, 6)),
    "LayerNorm, all axes": variant(
        nj.LayerNorm(reduction_axes=(1, 2), feature_axes=(1, 2)), (16, 3, 4)
    ),
    "LayerNorm, gelu inside": variant(nj.LayerNorm(activation=jax.nn.gelu), (16, 6)),
    "LayerNorm, weighted": variant(nj.LayerNorm(reduction_axes=(1, 2)), (16, 5, 4), **WEIGHTED),
    "LayerNorm, segments": variant(
        nj.LayerNorm(reduction_axes=(1, 2), num_segments=3),
        (16, 18, 4),
        **SEGMENTS,
    ),
    "LayerNorm, feature axis elsewhere": variant(
        nj.LayerNorm(reduction_axes=(1, 2), feature_axes=-1), (16, 9, 4)
    ),
    "LayerNorm, groups, gated in front": variant(
        nj.LayerNorm(num_groups=2, gate_place="before", gate_activation=jax.nn.sigmoid),
        (16, 3, 8),
        **GATED,
    ),
    "RMSNorm": Case(nj.RMSNorm(), (16, 3, 6)),
    "RMSNorm, offset, one scale": variant(
        nj.RMSNorm(scale_offset=1.0, feature_axes=()),
        (16, 3, 6),
        residual_bytes=1.3,  # six numbers of each row of 48
    ),
    "RMSNorm, cast before the scale": variant(
        nj.RMSNorm(cast="before_scale"), (16, 3, 6), roundings=3
    ),
    "RMSNorm, groups": variant(nj.RMSNorm(num_groups=2), (16, 8)),
    "RMSNorm, gated": variant(nj.RMSNorm(), (16, 3, 6), **GATED),
    "GroupNorm": Case(nj.GroupNorm(2), (16, 3, 3, 4)),
    "GroupNorm, features": variant(nj.GroupNorm(2), (16, 16)),
    "GroupNorm, relu inside": variant(nj.GroupNorm(None, 2, activation=jax.nn.relu), (16, 3, 3, 4)),
    "GroupNorm, segments": variant(
        nj.GroupNorm(2, num_segments=3), (16, 24, 4), residual_bytes=1.2, **SEGMENTS
    ),
    "InstanceNorm, segments": variant(
        nj.InstanceNorm(num_segments=3), (16, 24, 4), residual_bytes=1.2, **SEGMENTS
    ),
    "InstanceNorm": Case(nj.InstanceNorm(), (16, 3, 3, 4)),
    "Affine": Case(nj.Affine(), (16, 4)),
    "Derf": Case(nj.Derf(), (16, 4)),
    "DynamicTanh": Case(nj.DynamicTanh(), (16, 4)),
    "Ghost, 4 groups": variant(nj.Ghost(nj.BatchNorm(), groups=4), (16, 6, 4), drops_rows=False),
    "Ghost, 8 groups": variant(nj.Ghost(nj.BatchNorm(), groups=8), (16, 6, 4), drops_rows=False),
    "Ghost, renorm": variant(
        nj.Ghost(nj.BatchRenorm(r_max=2.0, d_max=1.0), groups=2), (16, 6, 4), drops_rows=False
    ),
    "Ghost, random": variant(nj.Ghost(nj.GhostNoise(2), groups=8), (32, 3, 3, 4), drops_rows=False),
    "GhostBatchNorm": Case(nj.GhostBatchNorm(4), (16, 6, 4), drops_rows=False),
    "GhostBatchNorm, one part per device": variant(
        nj.GhostBatchNorm(2, activation=jax.nn.relu), (16, 6, 4), drops_rows=False
    ),
    "ExclusiveBatchNorm": Case(nj.ExclusiveBatchNorm(), (16, 3, 3, 4)),
    "ExclusiveBatchNorm, on one device": variant(
        nj.ExclusiveBatchNorm(2, axis=1), (16, 4, 3, 3), drops_rows=False
    ),
    "ExclusiveBatchNorm, over devices": variant(
        nj.ExclusiveBatchNorm(8, running_average="debiased"), (16, 3, 3, 4), drops_rows=False
    ),
    "EvalNorm": Case(nj.EvalNorm(4), (16, 6, 4), drops_rows=False),
    "GhostNoise": Case(nj.GhostNoise(12), (16, 3, 3, 4)),
    "GhostNoise, two samples": variant(nj.GhostNoise(2), (32, 3, 3, 4)),
    "GhostNoise, each channel": variant(
        nj.GhostNoise(4, independent_channels=True, axis=1), (16, 4, 3, 3)
    ),
    "GhostNoise, effective size": variant(
        nj.GhostNoise(effective_size=8.5, unbiased_scale=True), (16, 3, 3, 4)
    ),
    "GhostNoise, partition": variant(
        nj.GhostNoise(4, drawing="partition", noise="scale"), (16, 3, 3, 4), drops_rows=False
    ),
    "GhostNoise, shuffle": variant(
        nj.GhostNoise(4, drawing="shuffle", noise="shift"), (16, 3, 3, 4), drops_rows=False
    ),
    "GhostNoise, consecutive, scheduled": variant(
        nj.GhostNoise(4, drawing="consecutive", strength=nj.Ramp(0.0, 1.0, 0, 2)),
        (16, 3, 3, 4),
        drops_rows=False,
    ),
    "AnalyticGhostNoise": Case(nj.AnalyticGhostNoise(8), (16, 3, 3, 4), drops_rows=False),
    "AnalyticGhostNoise, deviations, scheduled": variant(
        nj.AnalyticGhostNoise(
            8, shift_unit="deviation", strength=nj.Ramp(0.0, 1.0, 0, 2), unbiased_scale=True
        ),
        (16, 3, 3, 4),
        drops_rows=False,
    ),
    "GhostNoiseBatchNorm": Case(nj.GhostNoiseBatchNorm(4), (16, 3, 3, 4)),
    "GhostNoiseBatchNorm, scheduled, relu inside": variant(
        nj.GhostNoiseBatchNorm(
            4,
            drawing="partition",
            strength=nj.Ramp(0.0, 1.0, 0, 2),
            unbiased_scale=True,
            activation=jax.nn.relu,
        ),
        (16, 3, 3, 4),
        drops_rows=False,
    ),
    "chain, ghost noise": variant(
        nj.chain(nj.BatchNorm(use_scale=False, use_bias=False), nj.GhostNoise(4), nj.Affine()),
        (16, 3, 3, 4),
        residual_bytes=3.1,
        roundings=3,
        collectives=2,
    ),
    "KalmanNorm": Case(nj.KalmanNorm(), (16, 3, 3, 4), extra=prior),
    "KalmanNorm, without a prior": variant(nj.KalmanNorm(running_average="debiased"), (16, 4)),
    "KalmanNorm, learned gain, relu inside": variant(
        nj.KalmanNorm(gain="learned", gain_per="channel", activation=jax.nn.relu, axis=1),
        (16, 4, 3),
        extra=functools.partial(prior, axis=1),
    ),
    "KalmanNorm, computed gain": variant(
        nj.KalmanNorm(gain="computed", effective_size=8.0), (16, 3, 3, 4), extra=prior
    ),
    "KalmanNorm, groups, guarded": variant(
        nj.Ghost(nj.KalmanNorm(gain=0.25, guard=100), groups=8, running="first"),
        (16, 3, 3, 4),
        drops_rows=False,
        extra=prior,
    ),
    "KalmanNorm, groups of devices, computed gain": variant(
        nj.Ghost(nj.KalmanNorm(gain="computed", gain_per="channel"), groups=2),
        (16, 3, 3, 4),
        drops_rows=False,
        extra=prior,
    ),
    "KalmanNorm, learned transition": variant(
        nj.KalmanNorm(transition="learned", prior_features=4),
        (16, 3, 3, 5),
        extra=lambda dtype, _: prior(dtype, (4,)),
    ),
    "DecorrelatedBatchNorm": Case(nj.DecorrelatedBatchNorm(), (48, 3, 3, 4), **WHOLE),
    "DecorrelatedBatchNorm, shared, authors' average, relu inside": variant(
        nj.DecorrelatedBatchNorm(
            group_size=2, shared_matrix=True, stored="matrix", activation=jax.nn.relu
        ),
        (48, 3, 4),
        **WHOLE,
    ),
    "DecorrelatedBatchNorm, shuffled": variant(
        nj.DecorrelatedBatchNorm(group_size=2, shuffle=True), (64, 3, 4), **WHOLE
    ),
    "CholeskyBatchNorm": Case(nj.CholeskyBatchNorm(group_size=2), (48, 3, 4), **WHOLE),
    "CholeskyBatchNorm, smaller group, shrunk, debiased": variant(
        nj.CholeskyBatchNorm(
            group_size=2, last_group="smaller", shrinkage=0.1, running_average="debiased"
        ),
        (64, 4, 5),
        **WHOLE,
    ),
    "IterativeNorm": Case(nj.IterativeNorm(group_size=2), (48, 3, 3, 4), **WHOLE),
    "IterativeNorm, two axes, weighted": variant(
        nj.IterativeNorm(group_size=3, axis=(1, -1), unbiased_running_var=True),
        (64, 2, 3, 3),
        **WHOLE,
        **WEIGHTED,
    ),
    "IterativeNorm, minimax steps, channels first, guarded": variant(
        nj.IterativeNorm(
            steps=7, minimax_steps=4, scaling="power", axis=1, skip_nonfinite=True, use_bias=False
        ),
        (64, 4, 3),
        **WHOLE,
    ),
    "IterativeNorm, published, smaller group": variant(
        nj.IterativeNorm(
            iteration="published", group_size=2, last_group="smaller", stored="matrix"
        ),
        (48, 3, 5),
        **WHOLE,
    ),
    "IterativeNorm, quintic, frobenius": variant(
        nj.IterativeNorm(iteration="quintic", scaling="frobenius", use_scale=False),
        (96, 4),
        **WHOLE,
    ),
    "SampleWhitening": Case(
        nj.SampleWhitening(group_size=2), (16, 24, 4), drops_rows=False, **WHOLE
    ),
    "SampleWhitening, steps, relu inside": variant(
        nj.SampleWhitening(group_size=2, steps=5, activation=jax.nn.relu),
        (16, 64),
        drops_rows=False,
        **WHOLE,
    ),
    "StochasticWhiteningBatchNorm": Case(
        nj.StochasticWhiteningBatchNorm(alpha=0.1), (48, 3, 3, 4), **WHOLE
    ),
    "StochasticWhiteningBatchNorm, frobenius, groups, scheduled": variant(
        nj.StochasticWhiteningBatchNorm(
            criterion="frobenius", group_size=2, last_group="smaller", alpha=nj.Ramp(0.1, 0.0, 0, 9)
        ),
        (48, 4, 5),
        **WHOLE,
    ),
    "StochasticWhiteningBatchNorm, average, shrunk": variant(
        nj.StochasticWhiteningBatchNorm(
            form="covariance", half_life=3.0, shrinkage=0.1, activation=jax.nn.relu
        ),
        (96, 4),
        **WHOLE,
    ),
    "SpectralBatchNorm": Case(nj.SpectralBatchNorm(), (16, 3, 4, 4), **MAPS),
    "SpectralBatchNorm, half, public scaling": variant(
        nj.SpectralBatchNorm(spectrum="half", fft_norm="full", unbiased_running_var=True),
        (16, 3, 4, 4),
        residual_bytes=1.15,  # two sums of each row of 32
        **MAPS,
    ),
    "SpectralBatchNorm, volumes, channels first": variant(
        nj.SpectralBatchNorm(axis=1, fft_norm="forward"), (8, 4, 2, 1, 3), **MAPS
    ),
    "SpectralBatchNorm, frames, relu inside": variant(
        nj.SpectralBatchNorm(spatial_axes=(2, 3), activation=jax.nn.relu), (8, 2, 3, 4, 4), **MAPS
    ),
    "SpectralBatchNorm, sequences, fft": variant(
        nj.SpectralBatchNorm(route="fft", spectrum="half", fft_norm="backward"),
        (16, 5, 4),
        keeps_rounded=True,
        **MAPS,
    ),
    "SpectralBatchNorm, frequency": variant(
        nj.SpectralBatchNorm(statistics="frequency", map_size=(3, 8)),
        (16, 3, 8, 4),
        residual_bytes=1.25,  # the spectrum of a row of 8 has 10 numbers
        fits_positions=False,
        keeps_rounded=True,
        **MAPS,
    ),
    "SpectralBatchNorm, ring": variant(
        nj.SpectralBatchNorm(statistics="ring", bands=3),
        (16, 5, 4, 4),
        residual_bytes=1.15,  # a row of 32 has 34 numbers, and each frequency some
        keeps_rounded=True,
        **MAPS,
    ),
    "SpectralBatchNorm, behind BatchNorm": variant(
        nj.chain(nj.BatchNorm(), nj.SpectralBatchNorm()),
        (16, 3, 4, 4),
        residual_bytes=2.1,
        roundings=2,
        collectives=2,
        **MAPS,
    ),
    "chain": Case(
        nj.chain(nj.BatchNorm(use_bias=False), nj.Affine()),
        (16, 9, 4),
        residual_bytes=2.1,
        roundings=2,
    ),
    "chain, three": variant(
        nj.chain(nj.LayerNorm(use_scale=False), nj.BatchNorm(use_bias=False), nj.Affine()),
        (16, 3, 4),
        residual_bytes=3.1,
        roundings=3,
    ),
    # Of 24 positions; scales and biases of samples and channels are kept in float32.
    "ClassAffine": Case(nj.ClassAffine(3), (16, 3, 4), extra=classes, residual_bytes=1.3),
    "ClassAffine, mixtures, channels first": variant(
        nj.ClassAffine(3, axis=1, activation=jax.nn.relu),
        (16, 4, 3),
        extra=mixtures,
        residual_bytes=1.3,
    ),
    "ConditionalAffine": Case(
        nj.ConditionalAffine(5), (16, 3, 4), extra=vectors, residual_bytes=1.3
    ),
    "ConditionalAffine, positions": variant(
        nj.ConditionalAffine(5, use_bias=False, form="tadam"),
        (16, 3, 4),
        residual_bytes=None,  # the scale is as large as the input
        fits_positions=False,
        drops_rows=True,
        extra=functools.partial(vectors, positions=(3,)),
    ),
    "Conditioned": Case(
        nj.Conditioned(nj.BatchRenorm(axis=1), nj.ClassAffine(3, axis=1)),
        (16, 4, 9),
        extra=classes,
    ),
    "Conditioned, two passes": variant(
        nj.Conditioned(nj.RMSNorm(cast="before_scale", activation=jax.nn.relu), nj.ClassAffine(3)),
        (16, 3, 6),
        residual_bytes=3.3,  # what is between the two, in float32
        roundings=3,
        keeps_rounded=True,
        extra=classes,
    ),
    "Conditioned, pair": variant(
        nj.Conditioned(nj.InstanceNorm(activation=jax.nn.relu), nj.ConditionalAffine(None)),
        (16, 3, 3, 4),
        extra=pairs,
    ),
    "Conditioned, ghosts": variant(
        nj.Ghost(nj.Conditioned(nj.BatchNorm(), nj.ClassAffine(3)), groups=4),
        (16, 6, 4),
        residual_bytes=1.3,
        drops_rows=False,
        extra=mixtures,
    ),
    "ConditionalBatchNorm": Case(
        nj.ConditionalBatchNorm(num_classes=3), (16, 3, 3, 4), extra=classes
    ),
    "ConditionalBatchNorm, vectors, relu inside": variant(
        nj.ConditionalBatchNorm(condition_features=5, activation=jax.nn.relu),
        (16, 3, 3, 4),
        extra=vectors,
    ),
    "ConditionalBatchNorm, features": variant(
        nj.ConditionalBatchNorm(num_classes=3), (16, 4), residual_bytes=None, extra=classes
    ),
    "ConditionalGroupNorm": Case(
        nj.ConditionalGroupNorm(2, num_classes=3), (16, 3, 3, 4), extra=mixtures
    ),
    "AdaptiveLayerNorm": Case(
        nj.AdaptiveLayerNorm(condition_features=5, form="adaln_zero"), (16, 3, 6), extra=vectors
    ),
    "AdaptiveLayerNorm, pair": variant(
        nj.AdaptiveLayerNorm(), (16, 3, 6), extra=pairs, residual_bytes=1.5
    ),
    "SandwichBatchNorm": Case(nj.SandwichBatchNorm(3), (16, 3, 3, 4), extra=classes),
    "MultiStats": Case(
        nj.MultiStats(nj.BatchNorm(running_average="pooled"), 3), (16, 9, 4), extra=branch
    ),
    "AuxBatchNorm": Case(nj.AuxBatchNorm(), (16, 3, 3, 4), extra=branch),
    "SandwichAuxBatchNorm": Case(nj.SandwichAuxBatchNorm(3), (16, 3, 3, 4), extra=branch),
    "AdaptiveInstanceNorm": Case(
        nj.AdaptiveInstanceNorm(), (16, 3, 3, 4), extra=style, residual_bytes=3.3
    ),
    "SandwichAdaptiveInstanceNorm": Case(
        nj.SandwichAdaptiveInstanceNorm(axis=-1),
        (16, 3, 3, 4),
        extra=style,
        residual_bytes=3.3,  # the style in float32
    ),
    "TReLU": Case(nj.TReLU(), (16, 4)),
    "TPReLU": Case(nj.TPReLU(axis=1), (16, 4, 3)),
    "WeightNormalizedAddition": Case(
        nj.WeightNormalizedAddition(initial=(0.5, 1.0, -1.0)),
        (16, 4),
        extra=operands,
        residual_bytes=5.1,  # the others in float32 beside bfloat16
    ),
}
# Methods over kernels, with the shape of a kernel.
KERNELS = {
    "WeightNorm": Case(nj.WeightNorm(), (16, 3, 6)),
    "WeightNorm, norm of all, authors' epsilon": variant(
        nj.WeightNorm(feature_axes=(), epsilon=1e-8, epsilon_place="norm"), (16, 4)
    ),
    "StrictWeightNorm": Case(nj.StrictWeightNorm(feature_axes=(1, -1)), (16, 3, 4)),
    "StrictWeightNorm, transposed": variant(nj.StrictWeightNorm(strides=(2, 1)), (8, 3, 2, 4)),
    "WeightStandardization": Case(nj.WeightStandardization(), (16, 3, 4), collectives=2),
    "ScaledWeightStandardization": variant(
        nj.ScaledWeightStandardization(gamma=1.7), (16, 3, 4), collectives=2
    ),
    "SpectralWeightNorm": Case(nj.SpectralWeightNorm(), (16, 3, 4), collectives=2),
    "SpectralWeightNorm, two axes, two steps": variant(
        nj.SpectralWeightNorm(feature_axes=(1, -1), iterations=2), (8, 3, 2, 4), collectives=3
    ),
}
