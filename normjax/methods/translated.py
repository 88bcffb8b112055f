"""What goes with strict weight normalization: activations with a threshold, and an addition."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from normjax.core import checks, passes
from normjax.core.checks import field
from normjax.core.fields import DTYPE, AxisFields, Initializer
from normjax.core.method import Traits, feature_positions
from normjax.core.structs import Features, Key, Mask
from normjax.core.tracing import traced_once
from normjax.methods.weights import RootFields


class ThresholdParams(NamedTuple):
    """Thresholds of the features and, where the method has them, slopes below.

    Example:
      >>> import normjax as nj
      >>> params, _ = nj.TPReLU().init(None, 2)
      >>> params.bias.tolist(), params.slope.tolist()
      ([0.0, 0.0], [0.25, 0.25])
    """

    bias: jax.Array
    slope: jax.Array | None = None


class AdditionParams(NamedTuple):
    """How much of each operand a weight normalized addition takes.

    Example:
      >>> import normjax as nj
      >>> nj.WeightNormalizedAddition().init(None, 2)[0].weight.tolist()
      [[0.0, 0.0], [1.0, 1.0]]
    """

    weight: jax.Array  # [operands, *features]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PointwiseFields(AxisFields):
    """Dtypes of output and parameters."""

    dtype: Any = field(None, DTYPE)
    param_dtype: Any = field(jnp.float32, checks.floating)


def _pointwise(method: Any, function: Callable[..., Any], x: Any, mask: Any, others: Any, *params):
    """`function(inputs, *params)`, computed wide; reverse mode keeps the inputs alone."""
    x, _ = passes.inputs(method, x, mask)
    at = feature_positions(method, x.shape)
    checks.require_features(type(method).__name__, "axis", at, x.shape, params)

    def run(params, *inputs):
        inputs = [passes.widen(a) for a in inputs]
        wide = jnp.result_type(*inputs)
        params = (passes.lift(a.astype(wide), at, x.ndim) for a in params)
        return function(inputs, *params).astype(passes.output_dtype(method.dtype, x))

    return jax.checkpoint(run)(params, passes.value(x), *others)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TReLU(PointwiseFields):
    """Translated ReLU: `max(x, a)` with a learned threshold `a` for each feature.

    Xiang & Li, *On the Effects of Batch and Weight Normalization in Generative Adversarial
    Networks*, 2017, https://arxiv.org/abs/1704.03971

    Behind a layer with strict weight norm it makes what ReLU makes behind a plain one, up to an
    affine map that the next layer can take in: `relu(w x + b)` is `|w| max(w x / |w|, a) + b` with
    `a = -b / |w|`. Not so where that layer pads with zeros, which stand for other values.

    Attributes:
      axis, dtype, param_dtype: as in `Affine`.
      bias_init: initializer of the threshold.

    Raises:
      ValueError, TypeError: as in `Affine`.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> method, x = nj.TReLU(), jnp.array([[-1.0, 2.0]])
      >>> method.apply(*method.init(None, 2), x, train=True)[0].tolist()
      [[0.0, 2.0]]
    """

    traits: ClassVar[Traits] = Traits(trains=False)

    bias_init: Initializer = field(jax.nn.initializers.zeros, checks.initializer)

    def init(self, key: Key, features: Features) -> tuple[ThresholdParams, tuple[()]]:
        """The threshold [features], `param_dtype`; no state."""
        shape = checks.as_features("TReLU", features)
        return ThresholdParams(self.bias_init(key, shape, self.param_dtype)), ()

    @traced_once
    def apply(
        self,
        params: ThresholdParams,
        state: tuple[()],
        x: jax.Array,
        *,
        train: bool,
        mask: Mask = None,
        key: Key = None,
    ) -> tuple[jax.Array, tuple[()]]:
        """Maps `x`, with masked positions taken as zero; `train` and `key` change nothing."""
        del train, key

        def above(inputs, bias):
            return jnp.where(inputs[0] > bias, inputs[0], bias)

        return _pointwise(self, above, x, mask, (), params.bias), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class TPReLU(PointwiseFields):
    """Translated parametric ReLU: `x` above a learned threshold, and a learned slope below it.

    Xiang & Li, *On the Effects of Batch and Weight Normalization in Generative Adversarial
    Networks*, 2017, https://arxiv.org/abs/1704.03971

    `prelu(x - a; s) + a` for each feature, with the slope taken to the nearest in [0, 1]: at 1 it
    is the identity, at 0 `TReLU`. As in the public implementation (stormraiser/gan-weightnorm-
    resnet) a slope outside gets no gradient.

    Attributes:
      axis, dtype, param_dtype: as in `Affine`.
      bias_init, slope_init: initializers of threshold and slope.

    Raises:
      ValueError, TypeError: as in `Affine`.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> method, x = nj.TPReLU(), jnp.array([[-1.0, 2.0]])
      >>> method.apply(*method.init(None, 2), x, train=True)[0].tolist()
      [[-0.25, 2.0]]
    """

    traits: ClassVar[Traits] = Traits(trains=False)

    bias_init: Initializer = field(jax.nn.initializers.zeros, checks.initializer)
    slope_init: Initializer = field(jax.nn.initializers.constant(0.25), checks.initializer)

    def init(self, key: Key, features: Features) -> tuple[ThresholdParams, tuple[()]]:
        """Threshold and slope [features], `param_dtype`; no state."""
        shape = checks.as_features("TPReLU", features)
        keys = (None, None) if key is None else jax.random.split(key)
        starts = zip((self.bias_init, self.slope_init), keys, strict=True)
        return ThresholdParams(*(start(k, shape, self.param_dtype) for start, k in starts)), ()

    @traced_once
    def apply(
        self,
        params: ThresholdParams,
        state: tuple[()],
        x: jax.Array,
        *,
        train: bool,
        mask: Mask = None,
        key: Key = None,
    ) -> tuple[jax.Array, tuple[()]]:
        """Maps `x`, with masked positions taken as zero; `train` and `key` change nothing."""
        del train, key

        def above(inputs, bias, slope):
            inside = (slope >= 0) & (slope <= 1)  # at the ends a gradient, unlike `jnp.clip`
            slope = jnp.where(inside, slope, jnp.where(slope > 0, 1.0, 0.0).astype(slope.dtype))
            over = inputs[0] - bias
            return jnp.where(over > 0, inputs[0], bias + slope * over)

        return _pointwise(self, above, x, mask, (), params.bias, params.slope), state


def _initial(value):
    """Two finite numbers or more, one of them not zero."""
    several = isinstance(value, tuple) and len(value) > 1
    if not several or any(map(checks.interval(), value)) or not any(value):
        return "is not two finite numbers or more, of which one is not zero"


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightNormalizedAddition(RootFields, PointwiseFields):
    """Weight normalized addition: `(a u + b v) / sqrt(a^2 + b^2)` with learned weights a and b.

    Xiang & Li, *On the Effects of Batch and Weight Normalization in Generative Adversarial
    Networks*, 2017, https://arxiv.org/abs/1704.03971; the equation is that of the public
    implementation, stormraiser/gan-weightnorm-resnet.

    For residual blocks: independent inputs of variance one give an output of variance one. Every
    feature has weights of its own, for two inputs or more.

    Attributes:
      initial: the initial weight of `x` and of each of the `others`: two numbers or more, one of
        them not zero. (0, 1), a residual branch and its shortcut, starts as the shortcut alone.
      epsilon: added to the sum of squares of the weights, a number > 0.
      epsilon_place: "norm": added to its root, as in the public implementation with 1e-8.
      axis, dtype, param_dtype: as in `Affine`.

    Raises:
      ValueError: as in `Affine`; in `apply`, for `others` that do not fit.
      TypeError: as in `Affine`.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> method, x = nj.WeightNormalizedAddition(initial=(3, 4)), jnp.ones((1, 2))
      >>> print(method.apply(*method.init(None, 2), x, train=True, others=x)[0].round(4))
      [[1.4 1.4]]
    """

    traits: ClassVar[Traits] = Traits(trains=False, inputs={"others": "sample"})

    initial: tuple[float, ...] = field((0.0, 1.0), _initial)

    def init(self, key: Key, features: Features) -> tuple[AdditionParams, tuple[()]]:
        """Weights [operands, *features], `param_dtype`; no state."""
        shape = checks.as_features("WeightNormalizedAddition", features)
        rows = [jnp.full(shape, a, self.param_dtype) for a in self.initial]
        return AdditionParams(jnp.stack(rows)), ()

    @traced_once
    def apply(
        self,
        params: AdditionParams,
        state: tuple[()],
        x: jax.Array,
        *,
        train: bool,
        mask: Mask = None,
        key: Key = None,
        others: Any = None,
    ) -> tuple[jax.Array, tuple[()]]:
        """Adds `x` and `others`, an array or a tuple of several, each of the shape of `x`.

        Masked positions are taken as zero; `train` and `key` change nothing.
        """
        del train, key
        others = tuple(others) if isinstance(others, tuple | list) else (others,)
        shapes = [None if a is None else jnp.shape(a) for a in others]
        wanted = len(self.initial) - 1
        if shapes != [jnp.shape(x)] * wanted:
            raise ValueError(
                f"WeightNormalizedAddition: others of shapes {shapes} for an input of shape "
                f"{jnp.shape(x)} and initial={self.initial}: give {wanted} of the input's shape."
            )
        others = tuple(passes.value(passes.inputs(self, a, mask)[0]) for a in others)

        def add(inputs, *weights):
            norm = self.root(jnp.sum(jnp.square(jnp.stack(weights)), 0))
            return sum(a * (w / norm) for a, w in zip(inputs, weights, strict=True))

        return _pointwise(self, add, x, mask, others, *params.weight), state
