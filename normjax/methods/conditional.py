"""Norms whose scale and bias depend on a condition: a class, or a vector, per sample or position.

Scale and bias of the condition and those of the norm make one pair, before the pass over `x`:

    (n(x) scale + bias) g(c) + b(c) = n(x) (scale g(c)) + (bias g(c) + b(c))
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from normjax.core import checks, passes, seam
from normjax.core.checks import field
from normjax.core.compat import is_traced
from normjax.core.fields import (
    COUNT,
    DTYPE,
    ActivationFields,
    AffineFields,
    AxisFields,
    Configuration,
    Initializer,
    ReductionFields,
    StatisticsFields,
)
from normjax.core.method import Normalizer, Traits, feature_axes, feature_positions, traits
from normjax.core.sharding import spec
from normjax.core.structs import AffineParams, Axes, Features, Key, Mask, affine_params, several
from normjax.core.tracing import traced_once
from normjax.core.variance import is_weighted
from normjax.methods.batch import BatchFields, BatchNorm
from normjax.methods.group import GroupNorm
from normjax.methods.layer import LayerNorm, RowFields

CONDITION: dict[str, Literal["sample", "whole"]] = {"condition": "sample", "weights": "sample"}
Form = Literal["film", "adaln_zero", "tadam"]
FORMS = checks.one_of("film", "adaln_zero", "tadam")
ONE_PASS = seam.apply, GroupNorm.apply, RowFields.apply  # methods that `Conditioned` does in one


def near_one(key: Key, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Normal numbers of mean 1 and deviation 0.02: an initializer for the scales of classes.

    Of the public implementation of Gong et al., *Sandwich Batch Normalization*, 2022,
    https://arxiv.org/abs/2102.11382 (VITA-Group/Sandwich-Batch-Normalization).

    Example:
      >>> import jax, normjax as nj
      >>> scale = nj.near_one(jax.random.key(0), (10, 64))
      >>> f"{scale.mean():.2f} {scale.std():.2f}"
      '1.00 0.02'
    """
    if key is None:
        raise ValueError("near_one: key=None, but it draws random numbers: give `init` a key.")
    return 1 + 0.02 * jax.random.normal(key, shape, dtype)


@traced_once
def apply(
    self: Any,
    params: Any,
    state: tuple[()],
    x: jax.Array,
    *,
    train: bool,
    mask: Mask = None,
    key: Key = None,
    condition: Any = None,
) -> tuple[jax.Array, tuple[()]]:
    """Scales and shifts `x` as `condition` says; `train` and `key` change nothing."""
    x, mask = passes.inputs(self, x, mask)
    n = self.evaluation(params, state, x, mask, condition=condition)
    at = feature_positions(self, x.shape)
    return passes.apply(x, n, at, activation=self.epilogue(), dtype=self.dtype), state


def evaluation(
    self: Any,
    params: Any,
    state: Any,
    x: Any = None,
    mask: Mask = None,
    *,
    condition: Any = None,
) -> Normalizer:
    """Scale and bias of `condition`; without `x` of one for the whole batch, [features]."""
    if x is not None:
        condition = self.arrange(condition, x, mask)
    return Normalizer(None, None, *self.scale_and_bias(params, condition))


def arrange(method: Any, condition: Any, own: int, x: Any, mask: Mask, meaning: str) -> Any:
    """`condition`, whose last `own` axes are its own, with an axis for every position of `x`.

    One for the whole batch stays as it is. Zero where nothing is valid, so that no NaN of padding
    gets into a gradient. ValueError for a shape that does not fit; `meaning` names what is wanted.
    """
    at = feature_positions(method, x.shape)
    others = [i for i in range(x.ndim) if i not in at]
    sizes, lead = [x.shape[i] for i in others], condition.shape[: condition.ndim - own]
    if not lead:
        return condition
    each = len(lead) == len(sizes) and all(n in (1, m) for n, m in zip(lead, sizes, strict=True))
    if not each and lead != tuple(sizes[:1]):
        raise ValueError(
            f"{type(method).__name__}: a condition of shape {condition.shape} for an input of "
            f"shape {x.shape}: give {meaning} for each sample, of shape [{sizes[0]}, ...], for "
            f"each position, {sizes}, or one for the whole batch."
        )
    lacking = len(sizes) - len(lead)
    condition = jnp.expand_dims(condition, tuple(range(len(lead), len(lead) + lacking)))
    if mask is None or not jnp.issubdtype(condition.dtype, jnp.floating):
        return condition
    over = [i for i, n in zip(others, condition.shape, strict=False) if n == 1]
    counts = mask > 0 if is_weighted(mask) else mask
    valid = jnp.any(counts, (*over, *at), keepdims=True).squeeze(at)
    return passes.keep(jnp.expand_dims(valid, tuple(range(-own, 0))), condition)


def in_place(method: Any, a: Any) -> Any:
    """`a`, whose last axes are features, with these where `method` has them in an input."""
    features = len(several(feature_axes(method)))
    if a is None or a.ndim == features:
        return a
    return jnp.moveaxis(a, range(-features, 0), feature_positions(method, a.shape))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassAffine(ActivationFields, AffineFields, AxisFields):
    """The affine map of conditional norms by class: `x * scale[c] + bias[c]`.

    Dumoulin, Shlens & Kudlur, *A Learned Representation for Artistic Style*, 2017, equation 5,
    https://arxiv.org/abs/1610.07629; with the initial values of Gong et al., *Sandwich Batch
    Normalization*, 2022, https://arxiv.org/abs/2102.11382

    Used in `Conditioned`, or by itself as `Affine`. The condition is a class for each sample, int
    [batch], or each position, or one for the whole batch, int []; or a mixture of the classes'
    rows, of floating dtype with the weights of the classes on a last axis. Integers outside of
    [0, num_classes) are a ValueError where they are known; in a traced function they are clipped
    to the nearest class.

    Attributes:
      num_classes: how many rows of scales and biases there are.
      scale_init: `near_one` by default.
      axis, dtype, param_dtype, use_scale, use_bias, bias_init, activation: as in `Affine`.

    Raises:
      ValueError: for a class that there is none of, or a condition that does not fit the input;
        and as in `Affine`.
      TypeError: for a condition of another dtype.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> method = nj.ClassAffine(num_classes=10)
      >>> params, state = method.init(jax.random.key(0), 3)
      >>> labels = jnp.array([1, 0, 9, 1])
      >>> y, _ = method.apply(params, state, jnp.ones((4, 8, 3)), train=True, condition=labels)
    """

    traits: ClassVar[Traits] = Traits(trains=False, inputs={"condition": "sample"})

    num_classes: int = dataclasses.field(kw_only=False, metadata=checks.rule(checks.positive))
    scale_init: Initializer = field(near_one, checks.initializer)

    apply, evaluation = apply, evaluation

    def init(self, key: Key, features: Features) -> tuple[AffineParams, tuple[()]]:
        """Scale and bias (`param_dtype`) [num_classes, features]; no state."""
        shape = checks.as_features("ClassAffine", features)
        return affine_params(self, key, (self.num_classes, *shape)), ()

    def check_inputs(self, *, condition: Any = None, **inputs: Any) -> None:
        """ValueError for a class that there is none of, where that is known."""
        super().check_inputs(**inputs)
        if condition is None or is_traced(condition):
            return
        if not getattr(condition, "is_fully_addressable", True):
            return
        classes = np.asarray(condition)
        outside = (classes < 0) | (classes >= self.num_classes)
        if jnp.issubdtype(classes.dtype, jnp.integer) and outside.any():
            raise ValueError(
                f"ClassAffine: class {classes[outside][0]} of num_classes={self.num_classes}: "
                f"classes are 0 to {self.num_classes - 1}."
            )

    def arrange(self, condition: Any, x: Any, mask: Mask) -> Any:
        """The condition with an axis for every position of `x`; see `arrange`."""
        condition, own = self._checked(condition)
        return arrange(self, condition, own, x, mask, "a class, or weights of classes,")

    def scale_and_bias(self, params: AffineParams, condition: Any) -> tuple[Any, Any]:
        """Rows of an arranged condition, of the rank of the input, or [features]."""
        condition, own = self._checked(condition)

        def pick(rows):
            if own:
                wide = passes.widen(condition), rows.astype(passes.wide(condition.dtype))
                return jnp.tensordot(*wide, 1, precision=lax.Precision.HIGHEST)
            parts, where = (*spec(condition), *spec(rows)[1:]), None
            if any(part is not None for part in parts):
                mesh = jax.typeof(rows).sharding.mesh
                where = NamedSharding(mesh, PartitionSpec(*parts))
            return rows.at[condition].get(mode="clip", out_sharding=where)

        scale, bias = (None if a is None else in_place(self, pick(a)) for a in params)
        return scale, bias

    def _checked(self, condition):
        """The condition as an array, and whether its last axis is of classes."""
        if condition is None:
            raise ValueError("ClassAffine: condition=None: give the class of each sample.")
        condition = jnp.asarray(condition)
        if jnp.issubdtype(condition.dtype, jnp.integer):
            return condition, 0
        if not jnp.issubdtype(condition.dtype, jnp.floating):
            raise TypeError(
                f"ClassAffine: the condition has dtype {condition.dtype}, but is integers, or "
                "floating weights of the classes."
            )
        if condition.shape[-1:] != (self.num_classes,):
            raise ValueError(
                f"ClassAffine: a condition of dtype {condition.dtype} and shape {condition.shape}: "
                f"weights of classes have {self.num_classes} on the last axis."
            )
        return condition, 1


class ConditionalParams(NamedTuple):
    """The linear map of a condition vector: rows of scale, bias and gate, as far as there are.

    Perez et al., *FiLM*, 2018, https://arxiv.org/abs/1709.07871

    Example:
      >>> import normjax as nj
      >>> params, _ = nj.ConditionalAffine(8, form="adaln_zero").init(None, 3)
      >>> params.kernel.shape, params.bias.shape, params.gain
      ((8, 3, 3), (3, 3), None)
    """

    kernel: jax.Array | None = None  # [condition_features, rows, features]
    bias: jax.Array | None = None  # [rows, features]
    gain: jax.Array | None = None  # [rows, features], of "tadam"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConditionalAffine(ActivationFields, AxisFields):
    """The affine map of conditional norms by vector: `x * (1 + u) + v`, with u and v linear in it.

    Perez et al., *FiLM*, 2018, section 2.1, https://arxiv.org/abs/1709.07871; Michalski et al., *An
    Empirical Study of Batch Normalization and Group Normalization in Conditional Computation*,
    2019, https://arxiv.org/abs/1908.00061; the forms of Peebles & Xie, *Scalable Diffusion Models
    with Transformers*, 2023, https://arxiv.org/abs/2212.09748 (adaLN-Zero), and Oreshkin,
    Rodriguez & Lacoste, *TADAM*, 2018, section 3.3, https://arxiv.org/abs/1805.10123

    Used in `Conditioned`, or by itself as `Affine`. The condition is a vector for each sample,
    [batch, condition_features], or each position, or one for the whole batch. Every form starts as
    the identity. The one is added in at least float32. For positions, scale and bias are as large
    as the input, and are kept for the backward pass.

    Departures: FiLM leaves the network that makes u and v open, TADAM has one of three layers; here
    it is the last, linear one: give the output of the layers before as the condition, for
    adaLN-Zero that of a SiLU.

    Attributes:
      condition_features: size of the condition's last axis; None: there are no parameters, and the
        condition is the pair (u, v) itself, each [batch, features] or for each position.
      form: "film": u and v start at zero. "adaln_zero": so does a gate for what comes behind the
        norm (`gate`). "tadam": u and v are products of a vector that is learned from zero, `gain`
        (on which TADAM has an L2 penalty), and of a map that starts random.
      kernel_init: initializer of the map, called for shape (condition_features, outputs); None:
        zeros, in "tadam" `lecun_normal()`.
      use_scale, use_bias: whether there is u, and v.
      axis, dtype, param_dtype, activation: as in `Affine`.

    Raises:
      ValueError: for a condition that does not fit, and as in `Affine`.
      TypeError: for a condition that is not of real numbers.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> method = nj.ConditionalAffine(8)
      >>> params, state = method.init(jax.random.key(0), 3)
      >>> x, text = jnp.ones((4, 16, 16, 3)), jnp.ones((4, 8))
      >>> y, _ = method.apply(params, state, x, train=True, condition=text)
    """

    traits: ClassVar[Traits] = Traits(trains=False, inputs={"condition": "sample"})

    condition_features: int | None = dataclasses.field(kw_only=False, metadata=checks.rule(COUNT))
    form: Form = field("film", FORMS)
    kernel_init: Initializer | None = field(None, checks.optional(checks.initializer))
    dtype: Any = field(None, DTYPE)
    param_dtype: Any = field(jnp.float32, checks.floating)
    use_scale: bool = field(True, checks.flag)
    use_bias: bool = field(True, checks.flag)

    apply, evaluation = apply, evaluation

    def __post_init__(self):
        super().__post_init__()
        if self.condition_features is None and (self.form != "film" or self.kernel_init):
            raise ValueError(
                f"ConditionalAffine: condition_features=None with form={self.form!r} and "
                f"kernel_init={self.kernel_init}: these are of a map, which needs a number."
            )

    def init(self, key: Key, features: Features) -> tuple[ConditionalParams, tuple[()]]:
        """Kernel [condition_features, rows, features], bias, gain (`param_dtype`); no state.

        Rows are of scale, bias and gate, those of them that there are.
        """
        shape = len(self._rows()), *checks.as_features("ConditionalAffine", features)
        if self.condition_features is None:
            return ConditionalParams(), ()
        start: Any = self.kernel_init
        if start is None:
            initializers, random = jax.nn.initializers, self.form == "tadam"
            start = initializers.lecun_normal() if random else initializers.zeros
        matrix = self.condition_features, math.prod(shape)
        kernel = start(key, matrix, self.param_dtype)
        zeros = jnp.zeros(shape, self.param_dtype)
        gain = zeros if self.form == "tadam" else None
        return ConditionalParams(kernel.reshape(matrix[0], *shape), zeros, gain), ()

    def arrange(self, condition: Any, x: Any, mask: Mask) -> Any:
        """The condition with an axis for every position of `x`; see `arrange`."""
        own, meaning = (1, "a vector") if self.condition_features else (self._features, "u and v")
        one = lambda a: arrange(self, a, own, x, mask, meaning)
        return jax.tree.map(one, self._checked(condition))

    def scale_and_bias(self, params: ConditionalParams, condition: Any) -> tuple[Any, Any]:
        """One plus u, and v, of an arranged condition; of the rank of the input, or [features]."""
        made = self._make(params, condition)
        scale = made.get("scale")
        scale = None if scale is None else 1 + scale
        return in_place(self, scale), in_place(self, made.get("bias"))

    def gate(self, params: ConditionalParams, x: jax.Array, condition: Any) -> jax.Array:
        """The output gate of "adaln_zero" for an input `x`: it broadcasts to it, in its dtype.

        It multiplies what a block makes of the norm's output, before that is added to the input:
        `x + gate * block(norm(x))`.
        """
        if self.form != "adaln_zero":
            raise ValueError(f"ConditionalAffine: form={self.form!r} has no gate.")
        gate = in_place(self, self._make(params, self.arrange(condition, x, None))["gate"])
        return passes.lift(gate, feature_positions(self, x.shape), x.ndim).astype(x.dtype)

    @property
    def _features(self):
        return len(several(self.axis))

    def _rows(self):
        used = {"scale": self.use_scale, "bias": self.use_bias, "gate": self.form == "adaln_zero"}
        return [name for name, present in used.items() if present]

    def _make(self, params, condition):
        """What `_rows` names, [..., features], in at least float32."""
        condition = self._checked(condition)
        if isinstance(condition, tuple):
            return dict(zip(self._rows(), map(passes.widen, condition), strict=True))
        z, axis = passes.widen(condition), condition.ndim - 1
        lifted = lambda a: jnp.expand_dims(a.astype(z.dtype), tuple(range(axis)))
        rows = jnp.tensordot(z, params.kernel.astype(z.dtype), 1) + lifted(params.bias)
        rows = rows if params.gain is None else rows * lifted(params.gain)
        pick = lambda i: lax.index_in_dim(rows, i, axis, keepdims=False)
        return {name: pick(i) for i, name in enumerate(self._rows())}

    def _checked(self, condition) -> Any:
        """The condition as a real array, or as one for each of `_rows`."""
        if condition is None:
            wanted = "a vector" if self.condition_features else "the pair (u, v)"
            raise ValueError(f"ConditionalAffine: condition=None: give {wanted} for each sample.")
        real = lambda a: checks.as_real("ConditionalAffine, condition", a)
        if self.condition_features is None:
            rows = self._rows()
            if not isinstance(condition, tuple | list) or len(condition) != len(rows):
                raise ValueError(
                    "ConditionalAffine: condition_features=None needs as the condition a tuple, "
                    f"one array for each of {', '.join(rows)}; given was {type(condition)}."
                )
            return tuple(map(real, condition))
        condition = real(condition)
        if condition.shape[-1:] != (self.condition_features,):
            raise ValueError(
                f"ConditionalAffine: a condition of shape {condition.shape}, but "
                f"condition_features={self.condition_features}, the size of its last axis."
            )
        return condition


class ConditionedParams(NamedTuple):
    """Parameters of a norm and of its condition's scale and bias.

    Gong et al., *Sandwich Batch Normalization*, 2022, https://arxiv.org/abs/2102.11382

    Example:
      >>> import jax, normjax as nj
      >>> params, _ = nj.SandwichBatchNorm(num_classes=10).init(jax.random.key(0), 3)
      >>> params.norm.scale.shape, params.condition.scale.shape
      ((3,), (10, 3))
    """

    norm: Any
    condition: Any


def _is_conditional(value):
    fits = isinstance(value, ClassAffine | ConditionalAffine)
    return None if fits else "is not a ClassAffine(...) or ConditionalAffine(...)"


@dataclasses.dataclass(frozen=True)
class Conditioned(Configuration):
    """A norm with a scale and a bias that depend on a condition, behind its own if it has these.

    Michalski et al., *An Empirical Study of Batch Normalization and Group Normalization in
    Conditional Computation*, 2019, https://arxiv.org/abs/1908.00061; with a scale and a bias of the
    norm, which all conditions share, Gong et al., *Sandwich Batch Normalization*, 2022, section
    3.1, https://arxiv.org/abs/2102.11382

    Both affine maps are one, made before the pass over the input, and reverse mode keeps the input
    and what has no positions. Norms with a pass of their own (`SpectralBatchNorm`, `GhostNoise`, a
    chain, segments, a row norm with a gate or `cast="before_scale"`) are followed by a second one.
    The norm's activation is taken last. Of `Ghost` the conditioned norm is the method, not the
    other way: `Ghost(Conditioned(...), groups)`.

    Attributes:
      method: the norm, such as `GroupNorm(use_scale=False, use_bias=False)`.
      affine: `ClassAffine(...)` or `ConditionalAffine(...)`, with the feature axes of the norm.

    Raises:
      ValueError: for other values of the two; in `apply`, those of both.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> method = nj.Conditioned(nj.InstanceNorm(), nj.ClassAffine(10))
      >>> params, state = method.init(jax.random.key(0), 3)
      >>> x, labels = jnp.ones((2, 8, 8, 3)), jnp.array([3, 7])
      >>> y, _ = method.apply(params, state, x, train=True, condition=labels)
    """

    method: Any = dataclasses.field(metadata=checks.rule(checks.method))
    affine: Any = dataclasses.field(metadata=checks.rule(_is_conditional))

    def __post_init__(self):
        super().__post_init__()
        own, wanted = (several(feature_axes(m)) for m in (self.affine, self.method))
        if own != wanted:
            raise ValueError(
                f"Conditioned: {type(self.affine).__name__} has axis={own}, but the features of "
                f"{type(self.method).__name__} lie on {wanted}: give the same to both."
            )
        if "condition" in traits(self.method).inputs or hasattr(self.method, "groups"):
            raise ValueError(
                f"Conditioned: {type(self.method).__name__} is a wrapper: condition what it holds."
            )

    @property
    def feature_axes(self) -> Axes:
        """The feature axes of the norm."""
        return feature_axes(self.method)

    @property
    def traits(self) -> Traits:
        """Those of the norm, with the condition as a further input."""
        of = traits(self.method)
        return dataclasses.replace(of, inputs={**of.inputs, "condition": "sample"})

    def init(self, key: Key, features: Features) -> tuple[ConditionedParams, Any]:
        """Parameters of both; the state of the norm."""
        keys = (None, None) if key is None else jax.random.split(key)
        params, state = self.method.init(keys[0], features)
        return ConditionedParams(params, self.affine.init(keys[1], features)[0]), state

    def check_training(self, x: Any) -> None:
        """ValueError for an input of which the norm would make nothing."""
        self.method.check_training(x)

    def check_inputs(self, *, condition: Any = None, **inputs: Any) -> None:
        """ValueError for a class that there is none of, and as of the norm, where that is known."""
        self.affine.check_inputs(condition=condition)
        self.method.check_inputs(**inputs)

    @traced_once
    def apply(
        self,
        params: ConditionedParams,
        state: Any,
        x: jax.Array,
        *,
        train: bool,
        mask: Mask = None,
        weights: Any = None,
        key: Key = None,
        condition: Any = None,
        **inputs: Any,
    ) -> tuple[jax.Array, Any]:
        """The norm's `apply`, with scale and bias of `condition` behind its own."""
        inputs |= {} if weights is None else {"weights": weights}
        if not self._is_one_pass(inputs):
            x = checks.as_real("Conditioned", x)
            return self._in_two(params, state, x, train, mask, key, condition, **inputs)
        inputs.pop("weights", None)
        x, mask = passes.inputs(self, x, mask, weights)
        at = seam.require_variables(self.method, params.norm, state, x)
        condition = self.affine.arrange(condition, x, mask)
        if train:
            seen = self.observe(x, mask)
            how = dict(key=key, condition=condition, **inputs)
            n = self.coefficients(params, state, seen, **how)
            state = self.absorb(state, seen)
        else:
            n = self.method.evaluation(params.norm, state, x, mask, **inputs)
            n = self._join(params, n, condition)
        of = self.method
        return passes.apply(x, n, at, activation=of.epilogue(), dtype=of.dtype), state

    def observe(self, x: Any, mask: Mask = None, **inputs: Any) -> Any:
        """Statistics of the norm."""
        return self.method.observe(x, mask, **inputs)

    def coefficients(
        self, params: ConditionedParams, state: Any, seen: Any, *, condition: Any, **how: Any
    ) -> Normalizer:
        """Those of the norm with scale and bias of `condition`, arranged or of the whole batch."""
        n = self.method.coefficients(params.norm, state, seen, **how)
        return self._join(params, n, condition)

    def evaluation(
        self,
        params: ConditionedParams,
        state: Any,
        x: Any = None,
        mask: Mask = None,
        *,
        condition: Any,
    ) -> Normalizer:
        """As of the norm. Without `x`, of one condition for the whole batch, it can be folded."""
        if x is not None:
            condition = self.affine.arrange(condition, x, mask)
        return self._join(params, self.method.evaluation(params.norm, state, x, mask), condition)

    def absorb(self, state: Any, seen: Any) -> Any:
        """As of the norm."""
        return self.method.absorb(state, seen)

    def _is_one_pass(self, inputs):
        cast = getattr(self.method, "cast", "output") == "output"
        own = inputs.keys() & {"gate", "segment_ids"}
        return type(self.method).apply in ONE_PASS and cast and not own

    def _join(self, params, n, condition):
        """`n` with scale and bias of the condition behind its own."""
        scale, bias = self.affine.scale_and_bias(params.condition, condition)
        given = [a for a in (*n, scale, bias) if a is not None]
        rank = max((a.ndim for a in given), default=0)
        dtype = max((passes.wide(a.dtype) for a in given), key=lambda d: jnp.finfo(d).bits)
        features = len(several(self.feature_axes))
        at = feature_positions(self, (1,) * rank) if rank > features else ()
        lifted = lambda a: None if a is None else passes.lift(a, at, rank).astype(dtype)
        own, shift, scale, bias = map(lifted, (n.scale, n.bias, scale, bias))
        if scale is not None:
            own = scale if own is None else own * scale
            shift = None if shift is None else shift * scale
        if shift is not None and bias is not None:
            bias = shift + bias
        return n._replace(scale=own, bias=shift if bias is None else bias)

    def _in_two(self, params, state, x, train, mask, key, condition, **inputs):
        method, last, wide = self.method, {}, passes.wide(x.dtype)
        if hasattr(method, "activation"):
            last["activation"] = method.activation
            method = dataclasses.replace(method, activation=None)
        if hasattr(method, "dtype"):  # it rounds once, at the end
            method = dataclasses.replace(method, dtype=wide)
        last["dtype"] = passes.output_dtype(getattr(self.method, "dtype", None), x)
        how = dict(train=train, mask=mask, key=key, **inputs)
        y, state = method.apply(params.norm, state, x, **how)
        affine, how = dataclasses.replace(self.affine, **last), dict(train=train, mask=mask)
        return affine.apply(params.condition, (), y, condition=condition, **how)[0], state


class Preset:
    """What methods share that stand for a `Conditioned` one, which `expand` makes of the fields."""

    expand: Any

    def init(self, key: Key, features: Features) -> tuple[ConditionedParams, Any]:
        """Parameters of the norm and of the condition, and the state of the norm."""
        return _expanded(self).init(key, features)

    def apply(
        self,
        params: Any,
        state: Any,
        x: jax.Array,
        *,
        train: bool,
        mask: Mask = None,
        key: Key = None,
        **inputs: Any,
    ) -> tuple[jax.Array, Any]:
        """Normalizes `x` as `BatchNorm.apply`, with the inputs that the traits name."""
        how = dict(train=train, mask=mask, key=key, **inputs)
        return _expanded(self).apply(params, state, x, **how)

    def check_training(self, x: Any) -> None:
        """ValueError for an input of which the norm would make nothing."""
        _expanded(self).check_training(x)

    def observe(self, x: Any, mask: Mask = None, **inputs: Any) -> Any:
        """Statistics of the norm."""
        return _expanded(self).observe(x, mask, **inputs)

    def evaluation(
        self, params: Any, state: Any, x: Any = None, mask: Mask = None, **inputs: Any
    ) -> Normalizer:
        """As of `Conditioned`."""
        return _expanded(self).evaluation(params, state, x, mask, **inputs)

    def absorb(self, state: Any, seen: Any, **inputs: Any) -> Any:
        """The state moved by what `observe` saw."""
        return _expanded(self).absorb(state, seen, **inputs)


@functools.lru_cache
def _expanded(preset: Any) -> Any:
    """The method that a preset stands for."""
    return preset.expand()


def plain(kind: Any, preset: Any, **changes: Any) -> Any:
    """The method of class `kind` with the fields that `preset` shares with it."""
    names = {f.name for f in dataclasses.fields(kind)} - changes.keys()
    own = {f.name for f in dataclasses.fields(preset)}
    return kind(**{name: getattr(preset, name) for name in names & own}, **changes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConditionFields(AffineFields):
    """What the condition of a preset is, and the initial values of its scale and bias."""

    num_classes: int | None = field(None, COUNT)
    condition_features: int | None = field(None, COUNT)
    form: Form = field("film", FORMS)
    kernel_init: Initializer | None = field(None, checks.optional(checks.initializer))
    scale_init: Initializer = field(near_one, checks.initializer)

    traits: ClassVar[Traits] = Traits(inputs=CONDITION)

    def __post_init__(self):
        super().__post_init__()
        name, given = type(self).__name__, f"num_classes={self.num_classes}"
        if self.num_classes and self.condition_features:
            both = f"{given} and condition_features={self.condition_features}"
            raise ValueError(f"{name}: {both}: give one of them.")
        start = jax.nn.initializers.zeros
        changed = self.scale_init is not near_one or self.bias_init is not start
        if self.num_classes is None and changed:
            raise ValueError(f"{name}: {given}, but scale_init and bias_init are those of classes.")
        if self.num_classes and (self.form != "film" or self.kernel_init):
            raise ValueError(f"{name}: {given}, but form and kernel_init are those of vectors.")

    def conditioned(self, kind: Any, **fields: Any) -> Conditioned:
        """The norm of class `kind` without an affine map of its own, with that of the condition."""
        norm = plain(kind, self, use_scale=False, use_bias=False, **fields)
        how = dict(axis=feature_axes(norm), activation=None)
        of = ClassAffine if self.num_classes else ConditionalAffine
        return Conditioned(norm, plain(of, self, **how))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConditionalBatchNorm(Preset, ConditionFields, BatchFields):
    """Batch normalization with a scale and a bias of each class, or from a vector.

    de Vries et al., *Modulating Early Visual Processing by Language*, 2017, section 3.2,
    https://arxiv.org/abs/1707.00683; Michalski et al., *An Empirical Study of Batch Normalization
    and Group Normalization in Conditional Computation*, 2019, https://arxiv.org/abs/1908.00061

    `Conditioned` of a `BatchNorm` without scale and bias. Statistics are of the whole batch, of all
    conditions together. `condition` is that of `ClassAffine` or of `ConditionalAffine`.

    Attributes:
      num_classes: as in `ClassAffine`, for classes.
      condition_features, form, kernel_init: as in `ConditionalAffine`, for vectors; without them
        and `num_classes` the condition is the pair (u, v).
      use_scale, use_bias: whether the condition has a scale, and a bias.
      scale_init, bias_init: those of the rows of classes.
      axis, momentum, epsilon, dtype, param_dtype, axis_name, axis_index_groups, activation,
        running_average, unbiased_running_var, skip_nonfinite, constant_statistics: as in
        `BatchNorm`.

    Raises:
      ValueError, TypeError: as in `BatchNorm`, `ClassAffine` and `ConditionalAffine`.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> method = nj.ConditionalBatchNorm(num_classes=10)
      >>> params, state = method.init(jax.random.key(0), 3)
      >>> x, labels = jnp.arange(12.0).reshape(4, 3), jnp.array([1, 0, 9, 1])
      >>> y, state = method.apply(params, state, x, train=True, condition=labels)
    """

    def expand(self) -> Conditioned:
        """The method that this one stands for."""
        return self.conditioned(BatchNorm)


@dataclasses.dataclass(frozen=True)
class ConditionalGroupNorm(Preset, ConditionFields, StatisticsFields):
    """Group normalization with a scale and a bias of each class, or from a vector.

    Michalski et al., *An Empirical Study of Batch Normalization and Group Normalization in
    Conditional Computation*, 2019, https://arxiv.org/abs/1908.00061

    `Conditioned` of a `GroupNorm` without scale and bias: the output of a sample depends on it and
    its condition alone, in training as in evaluation. No state.

    Attributes:
      num_groups, group_size, reduction_axes, epsilon, axis_name, axis_index_groups: as in
        `GroupNorm` (the paper has 4 groups in question answering).
      num_classes, condition_features, form, kernel_init, use_scale, use_bias, scale_init,
        bias_init: as in `ConditionalBatchNorm`.
      dtype, param_dtype, activation: as in `BatchNorm`.

    Raises:
      ValueError, TypeError: as in `GroupNorm` and `ConditionalBatchNorm`.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> method = nj.ConditionalGroupNorm(4, condition_features=8)
      >>> params, state = method.init(jax.random.key(0), 16)
      >>> x, question = jnp.ones((2, 6, 6, 16)), jnp.ones((2, 8))
      >>> y, _ = method.apply(params, state, x, train=True, condition=question)
    """

    traits: ClassVar[Traits] = Traits(trains=False, inputs=CONDITION)

    num_groups: int | None = field(32, COUNT)
    group_size: int | None = field(None, COUNT)
    _: dataclasses.KW_ONLY
    reduction_axes: Axes | None = field(None, checks.optional(checks.integers))

    def expand(self) -> Conditioned:
        """The method that this one stands for."""
        return self.conditioned(GroupNorm)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveLayerNorm(Preset, ConditionFields, ReductionFields):
    """Layer normalization with a scale and a bias from a vector, or of each class.

    Peebles & Xie, *Scalable Diffusion Models with Transformers*, 2023, section 3.2 (adaLN and
    adaLN-Zero), https://arxiv.org/abs/2212.09748

    `Conditioned` of a `LayerNorm` without scale and bias. The vector is for each sample,
    [batch, condition_features], or each position. `form="adaln_zero"` adds an output gate from
    zero, `gate`. Where one layer of a network makes scale and shift of all norms of a block, give
    neither `condition_features` nor `num_classes`: the condition is then the pair (u, v), and the
    output `n(x) (1 + u) + v`.

    Attributes:
      num_classes, condition_features, form, kernel_init, use_scale, use_bias, scale_init,
        bias_init: as in `ConditionalBatchNorm`.
      epsilon, reduction_axes, feature_axes, axis_name, axis_index_groups: as in `LayerNorm`.
      dtype, param_dtype, activation: as in `BatchNorm`.

    Raises:
      ValueError, TypeError: as in `LayerNorm` and `ConditionalAffine`.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> method = nj.AdaptiveLayerNorm(condition_features=8, form="adaln_zero")
      >>> params, state = method.init(jax.random.key(0), 16)
      >>> x, time = jnp.ones((2, 5, 16)), jnp.ones((2, 8))
      >>> y, _ = method.apply(params, state, x, train=True, condition=time)
      >>> method.gate(params, x, time).shape
      (2, 1, 16)
    """

    traits: ClassVar[Traits] = Traits(trains=False, inputs=CONDITION)

    def expand(self) -> Conditioned:
        """The method that this one stands for."""
        return self.conditioned(LayerNorm)

    def gate(self, params: ConditionedParams, x: jax.Array, condition: Any) -> jax.Array:
        """The gate of "adaln_zero" for what comes behind; see `ConditionalAffine.gate`."""
        return _expanded(self).affine.gate(params.condition, x, condition)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SandwichBatchNorm(Preset, BatchFields):
    """Batch normalization, an affine map that all classes share, then one of each class.

    Gong et al., *Sandwich Batch Normalization*, 2022, equation 3,
    https://arxiv.org/abs/2102.11382, with the initial values of the public implementation
    (VITA-Group/Sandwich-Batch-Normalization).

    `Conditioned` of a `BatchNorm` with scale and bias, by `ClassAffine`. Only the product of the
    shared scale and the class's matters: weight decay and Adam treat the two differently from one.

    Attributes:
      num_classes: as in `ClassAffine`.
      use_scale, use_bias, scale_init, bias_init: of the shared affine map, as in `BatchNorm`.
      class_scale_init, class_bias_init: initializers of the classes' rows: `near_one` and zeros.
      axis, momentum, epsilon, dtype, param_dtype, axis_name, axis_index_groups, activation,
        running_average, unbiased_running_var, skip_nonfinite, constant_statistics: as in
        `BatchNorm`.

    Raises:
      ValueError, TypeError: as in `BatchNorm` and `ClassAffine`.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> method = nj.SandwichBatchNorm(10)
      >>> params, state = method.init(jax.random.key(0), 3)
      >>> x, labels = jnp.arange(12.0).reshape(4, 3), jnp.array([1, 0, 9, 1])
      >>> y, state = method.apply(params, state, x, train=True, condition=labels)
    """

    traits: ClassVar[Traits] = Traits(inputs=CONDITION)

    num_classes: int = dataclasses.field(kw_only=False, metadata=checks.rule(checks.positive))
    class_scale_init: Initializer = field(near_one, checks.initializer)
    class_bias_init: Initializer = field(jax.nn.initializers.zeros, checks.initializer)

    def expand(self) -> Conditioned:
        """The method that this one stands for."""
        return Conditioned(plain(BatchNorm, self), class_rows(self, self.num_classes))


def class_rows(preset: Any, number: int) -> ClassAffine:
    """The rows of a sandwich norm."""
    start = dict(scale_init=preset.class_scale_init, bias_init=preset.class_bias_init)
    of = dict(axis=preset.axis, param_dtype=preset.param_dtype)
    return ClassAffine(number, **of, **start)
