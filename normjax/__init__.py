"""Normalization methods for JAX as pairs of pure functions.

A method is a frozen configuration with `init(key, features)` and
`apply(params, state, x, train=...)`. `normjax.linen` and `normjax.nnx` wrap every method as a Flax
module; `normjax.testing` checks the contract. `normjax.propagate` predicts the statistics behind a
layer.
"""

from normjax import propagate as propagate
from normjax.core.method import Linear as Linear
from normjax.core.method import Method as Method
from normjax.core.method import Normalization as Normalization
from normjax.core.method import Normalizer as Normalizer
from normjax.core.method import Traits as Traits
from normjax.core.statistics import Covariances as Covariances
from normjax.core.statistics import Moments as Moments
from normjax.core.statistics import Parted as Parted
from normjax.core.statistics import pool as pool
from normjax.core.structs import AffineParams as AffineParams
from normjax.core.structs import Pool as Pool
from normjax.core.structs import Running as Running
from normjax.methods.adaptive_instance import AdaptiveInstanceNorm as AdaptiveInstanceNorm
from normjax.methods.adaptive_instance import (
    SandwichAdaptiveInstanceNorm as SandwichAdaptiveInstanceNorm,
)
from normjax.methods.affine import Affine as Affine
from normjax.methods.batch import BatchNorm as BatchNorm
from normjax.methods.batch import BatchRenorm as BatchRenorm
from normjax.methods.batch import Ramp as Ramp
from normjax.methods.batch import relu_scale as relu_scale
from normjax.methods.branches import AuxBatchNorm as AuxBatchNorm
from normjax.methods.branches import MultiStats as MultiStats
from normjax.methods.branches import SandwichAuxBatchNorm as SandwichAuxBatchNorm
from normjax.methods.branches import operation_index as operation_index
from normjax.methods.chain import Chain as Chain
from normjax.methods.chain import chain as chain
from normjax.methods.conditional import AdaptiveLayerNorm as AdaptiveLayerNorm
from normjax.methods.conditional import ClassAffine as ClassAffine
from normjax.methods.conditional import ConditionalAffine as ConditionalAffine
from normjax.methods.conditional import ConditionalBatchNorm as ConditionalBatchNorm
from normjax.methods.conditional import ConditionalGroupNorm as ConditionalGroupNorm
from normjax.methods.conditional import ConditionalParams as ConditionalParams
from normjax.methods.conditional import Conditioned as Conditioned
from normjax.methods.conditional import ConditionedParams as ConditionedParams
from normjax.methods.conditional import SandwichBatchNorm as SandwichBatchNorm
from normjax.methods.conditional import near_one as near_one
from normjax.methods.derf import Derf as Derf
from normjax.methods.derf import DerfParams as DerfParams
from normjax.methods.dynamic import DynamicTanh as DynamicTanh
from normjax.methods.dynamic import DynamicTanhParams as DynamicTanhParams
from normjax.methods.ghost import EachPart as EachPart
from normjax.methods.ghost import EvalNorm as EvalNorm
from normjax.methods.ghost import ExclusiveBatchNorm as ExclusiveBatchNorm
from normjax.methods.ghost import Ghost as Ghost
from normjax.methods.ghost import GhostBatchNorm as GhostBatchNorm
from normjax.methods.ghost_noise import AnalyticGhostNoise as AnalyticGhostNoise
from normjax.methods.ghost_noise import GhostNoise as GhostNoise
from normjax.methods.ghost_noise import GhostNoiseBatchNorm as GhostNoiseBatchNorm
from normjax.methods.ghost_noise import NoiseState as NoiseState
from normjax.methods.group import GroupNorm as GroupNorm
from normjax.methods.group import InstanceNorm as InstanceNorm
from normjax.methods.kalman import KalmanNorm as KalmanNorm
from normjax.methods.kalman import KalmanParams as KalmanParams
from normjax.methods.kalman import KalmanRunning as KalmanRunning
from normjax.methods.layer import LayerNorm as LayerNorm
from normjax.methods.layer import RMSNorm as RMSNorm
from normjax.methods.running_norm import RunningNorm as RunningNorm
from normjax.methods.spectral.method import SpectralBatchNorm as SpectralBatchNorm
from normjax.methods.spectral.method import SpectralRunning as SpectralRunning
from normjax.methods.translated import AdditionParams as AdditionParams
from normjax.methods.translated import ThresholdParams as ThresholdParams
from normjax.methods.translated import TPReLU as TPReLU
from normjax.methods.translated import TReLU as TReLU
from normjax.methods.translated import WeightNormalizedAddition as WeightNormalizedAddition
from normjax.methods.weights import PowerIteration as PowerIteration
from normjax.methods.weights import ScaledWeightStandardization as ScaledWeightStandardization
from normjax.methods.weights import SpectralWeightNorm as SpectralWeightNorm
from normjax.methods.weights import StrictWeightNorm as StrictWeightNorm
from normjax.methods.weights import WeightNorm as WeightNorm
from normjax.methods.weights import WeightStandardization as WeightStandardization
from normjax.methods.whitening import CholeskyBatchNorm as CholeskyBatchNorm
from normjax.methods.whitening import DecorrelatedBatchNorm as DecorrelatedBatchNorm
from normjax.methods.whitening import IterativeNorm as IterativeNorm
from normjax.methods.whitening import SampleWhitening as SampleWhitening
from normjax.methods.whitening import StochasticWhiteningBatchNorm as StochasticWhiteningBatchNorm
from normjax.methods.whitening import Whitening as Whitening
from normjax.methods.whitening import largest_rate as largest_rate

__version__ = "0.1.0"
__all__ = [
    "AdaptiveInstanceNorm",
    "AdaptiveLayerNorm",
    "AdditionParams",
    "Affine",
    "AffineParams",
    "AnalyticGhostNoise",
    "AuxBatchNorm",
    "BatchNorm",
    "BatchRenorm",
    "Chain",
    "CholeskyBatchNorm",
    "ClassAffine",
    "ConditionalAffine",
    "ConditionalBatchNorm",
    "ConditionalGroupNorm",
    "ConditionalParams",
    "Conditioned",
    "ConditionedParams",
    "Covariances",
    "DecorrelatedBatchNorm",
    "Derf",
    "DerfParams",
    "DynamicTanh",
    "DynamicTanhParams",
    "EachPart",
    "EvalNorm",
    "ExclusiveBatchNorm",
    "Ghost",
    "GhostBatchNorm",
    "GhostNoise",
    "GhostNoiseBatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "IterativeNorm",
    "KalmanNorm",
    "KalmanParams",
    "KalmanRunning",
    "LayerNorm",
    "Linear",
    "Method",
    "Moments",
    "MultiStats",
    "NoiseState",
    "Normalization",
    "Normalizer",
    "Parted",
    "Pool",
    "PowerIteration",
    "RMSNorm",
    "Ramp",
    "Running",
    "RunningNorm",
    "SampleWhitening",
    "SandwichAdaptiveInstanceNorm",
    "SandwichAuxBatchNorm",
    "SandwichBatchNorm",
    "ScaledWeightStandardization",
    "SpectralBatchNorm",
    "SpectralRunning",
    "SpectralWeightNorm",
    "StochasticWhiteningBatchNorm",
    "StrictWeightNorm",
    "TPReLU",
    "TReLU",
    "ThresholdParams",
    "Traits",
    "WeightNorm",
    "WeightNormalizedAddition",
    "WeightStandardization",
    "Whitening",
    "chain",
    "largest_rate",
    "near_one",
    "operation_index",
    "pool",
    "propagate",
    "relu_scale",
]
