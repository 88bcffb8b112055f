"""Normalization methods for JAX as pairs of pure functions.

A method is a frozen configuration with `init(key, features)` and
`apply(params, state, x, train=...)`. `normjax.linen` and `normjax.nnx` wrap every method as a Flax
module; `normjax.testing` checks the contract. `normjax.propagate` predicts the statistics behind a
layer.
"""

from normjax import propagate as propagate
from normjax.core.structs import AffineParams as AffineParams
from normjax.core.structs import Moments as Moments
from normjax.core.structs import Running as Running
from normjax.methods.batch import BatchNorm as BatchNorm
from normjax.methods.batch import BatchRenorm as BatchRenorm
from normjax.methods.batch import ExclusiveBatchNorm as ExclusiveBatchNorm
from normjax.methods.batch import InputNorm as InputNorm
from normjax.methods.batch import Ramp as Ramp
from normjax.methods.chain import Chain as Chain
from normjax.methods.chain import chain as chain
from normjax.methods.ghost import Ghost as Ghost
from normjax.methods.ghost_noise import AnalyticGhostNoise as AnalyticGhostNoise
from normjax.methods.ghost_noise import GhostNoise as GhostNoise
from normjax.methods.ghost_noise import NoiseState as NoiseState
from normjax.methods.group import GroupNorm as GroupNorm
from normjax.methods.group import InstanceNorm as InstanceNorm
from normjax.methods.kalman import KalmanNorm as KalmanNorm
from normjax.methods.kalman import KalmanParams as KalmanParams
from normjax.methods.kalman import KalmanRunning as KalmanRunning
from normjax.methods.layer import LayerNorm as LayerNorm
from normjax.methods.layer import RMSNorm as RMSNorm
from normjax.methods.pointwise import Affine as Affine
from normjax.methods.pointwise import DynamicTanh as DynamicTanh
from normjax.methods.pointwise import DynamicTanhParams as DynamicTanhParams
from normjax.methods.presets import EvalNorm as EvalNorm
from normjax.methods.presets import GhostBatchNorm as GhostBatchNorm
from normjax.methods.presets import GhostNoiseBatchNorm as GhostNoiseBatchNorm
from normjax.methods.presets import SpatialSpectralBatchNorm as SpatialSpectralBatchNorm
from normjax.methods.spectral.method import SpectralBatchNorm as SpectralBatchNorm
from normjax.methods.spectral.method import SpectralRunning as SpectralRunning

__version__ = "0.1.0"
__all__ = [
    "Affine",
    "AffineParams",
    "AnalyticGhostNoise",
    "BatchNorm",
    "BatchRenorm",
    "Chain",
    "DynamicTanh",
    "DynamicTanhParams",
    "EvalNorm",
    "ExclusiveBatchNorm",
    "Ghost",
    "GhostBatchNorm",
    "GhostNoise",
    "GhostNoiseBatchNorm",
    "GroupNorm",
    "InputNorm",
    "InstanceNorm",
    "KalmanNorm",
    "KalmanParams",
    "KalmanRunning",
    "LayerNorm",
    "Moments",
    "NoiseState",
    "RMSNorm",
    "Ramp",
    "Running",
    "SpatialSpectralBatchNorm",
    "SpectralBatchNorm",
    "SpectralRunning",
    "chain",
    "propagate",
]
