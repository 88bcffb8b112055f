"""Every method as a Flax NNX module; written by `python -m tests.stubs`."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
from flax import nnx as flax_nnx

class Norm(flax_nnx.Module):
    method: Any
    num_features: int | tuple[int, ...]
    use_running_average: bool
    def __init__(
        self,
        method: Any,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        metadata: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None: ...
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        **inputs: Any,
    ) -> jax.Array: ...
    def unpack(self) -> tuple[Any, Any]: ...
    def pack(self, state: Any) -> None: ...
    def set_view(self, use_running_average: bool | None = None) -> None: ...
    def __getattr__(self, name: str) -> Any: ...

class AdaptiveInstanceNorm(Norm):
    axis: int | tuple[int, ...]
    dtype: Any
    param_dtype: Any
    use_scale: bool
    scale_init: Callable[..., Any]
    use_bias: bool
    bias_init: Callable[..., Any]
    activation: Callable[[jax.Array], jax.Array] | None
    epsilon: float
    axis_name: str | tuple[str, ...] | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None
    unbiased_var: bool
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        axis: int | tuple[int, ...] = ...,
        dtype: Any = ...,
        param_dtype: Any = ...,
        use_scale: bool = ...,
        scale_init: Callable[..., Any] = ...,
        use_bias: bool = ...,
        bias_init: Callable[..., Any] = ...,
        activation: Callable[[jax.Array], jax.Array] | None = ...,
        epsilon: float = ...,
        axis_name: str | tuple[str, ...] | None = ...,
        axis_index_groups: tuple[tuple[int, ...], ...] | None = ...,
        unbiased_var: bool = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class AdaptiveLayerNorm(Norm):
    activation: Callable[[jax.Array], jax.Array] | None
    epsilon: float
    axis_name: str | tuple[str, ...] | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None
    reduction_axes: int | tuple[int, ...]
    feature_axes: int | tuple[int, ...]
    dtype: Any
    param_dtype: Any
    use_scale: bool
    scale_init: Callable[..., Any]
    use_bias: bool
    bias_init: Callable[..., Any]
    num_classes: int | None
    condition_features: int | None
    form: Literal["film", "adaln_zero", "tadam"]
    kernel_init: Callable[..., Any] | None
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        activation: Callable[[jax.Array], jax.Array] | None = ...,
        epsilon: float = ...,
        axis_name: str | tuple[str, ...] | None = ...,
        axis_index_groups: tuple[tuple[int, ...], ...] | None = ...,
        reduction_axes: int | tuple[int, ...] = ...,
        feature_axes: int | tuple[int, ...] = ...,
        dtype: Any = ...,
        param_dtype: Any = ...,
        use_scale: bool = ...,
        scale_init: Callable[..., Any] = ...,
        use_bias: bool = ...,
        bias_init: Callable[..., Any] = ...,
        num_classes: int | None = ...,
        condition_features: int | None = ...,
        form: Literal["film", "adaln_zero", "tadam"] = ...,
        kernel_init: Callable[..., Any] | None = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class Affine(Norm):
    axis: int | tuple[int, ...]
    dtype: Any
    param_dtype: Any
    use_scale: bool
    scale_init: Callable[..., Any]
    use_bias: bool
    bias_init: Callable[..., Any]
    activation: Callable[[jax.Array], jax.Array] | None
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        axis: int | tuple[int, ...] = ...,
        dtype: Any = ...,
        param_dtype: Any = ...,
        use_scale: bool = ...,
        scale_init: Callable[..., Any] = ...,
        use_bias: bool = ...,
        bias_init: Callable[..., Any] = ...,
        activation: Callable[[jax.Array], jax.Array] | None = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class AnalyticGhostNoise(Norm):
    axis: int | tuple[int, ...]
    dtype: Any
    axis_name: str | tuple[str, ...] | None
    noise: Literal["both", "shift", "scale"]
    strength: float | Callable[[Any], Any]
    unbiased_scale: bool
    ghost_batch_size: int
    shift_unit: Literal["one", "deviation", "deviation, differentiated"]
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        ghost_batch_size: int,
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        axis: int | tuple[int, ...] = ...,
        dtype: Any = ...,
        axis_name: str | tuple[str, ...] | None = ...,
        noise: Literal["both", "shift", "scale"] = ...,
        strength: float | Callable[[Any], Any] = ...,
        unbiased_scale: bool = ...,
        shift_unit: Literal["one", "deviation", "deviation, differentiated"] = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class AuxBatchNorm(Norm):
    axis: int | tuple[int, ...]
    dtype: Any
    param_dtype: Any
    use_scale: bool
    scale_init: Callable[..., Any]
    use_bias: bool
    bias_init: Callable[..., Any]
    activation: Callable[[jax.Array], jax.Array] | None
    epsilon: float
    axis_name: str | tuple[str, ...] | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None
    momentum: float | Callable[[Any], Any]
    running_average: Literal["exponential", "debiased", "cumulative", "pooled"]
    unbiased_running_var: bool
    skip_nonfinite: bool
    constant_statistics: bool
    num_branches: int
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        num_branches: int = ...,
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        axis: int | tuple[int, ...] = ...,
        dtype: Any = ...,
        param_dtype: Any = ...,
        use_scale: bool = ...,
        scale_init: Callable[..., Any] = ...,
        use_bias: bool = ...,
        bias_init: Callable[..., Any] = ...,
        activation: Callable[[jax.Array], jax.Array] | None = ...,
        epsilon: float = ...,
        axis_name: str | tuple[str, ...] | None = ...,
        axis_index_groups: tuple[tuple[int, ...], ...] | None = ...,
        momentum: float | Callable[[Any], Any] = ...,
        running_average: Literal["exponential", "debiased", "cumulative", "pooled"] = ...,
        unbiased_running_var: bool = ...,
        skip_nonfinite: bool = ...,
        constant_statistics: bool = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class BatchNorm(Norm):
    num_segments: int | None
    axis: int | tuple[int, ...]
    dtype: Any
    param_dtype: Any
    use_scale: bool
    scale_init: Callable[..., Any]
    use_bias: bool
    bias_init: Callable[..., Any]
    activation: Callable[[jax.Array], jax.Array] | None
    epsilon: float
    axis_name: str | tuple[str, ...] | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None
    momentum: float | Callable[[Any], Any]
    running_average: Literal["exponential", "debiased", "cumulative", "pooled"]
    unbiased_running_var: bool
    skip_nonfinite: bool
    constant_statistics: bool
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        num_segments: int | None = ...,
        axis: int | tuple[int, ...] = ...,
        dtype: Any = ...,
        param_dtype: Any = ...,
        use_scale: bool = ...,
        scale_init: Callable[..., Any] = ...,
        use_bias: bool = ...,
        bias_init: Callable[..., Any] = ...,
        activation: Callable[[jax.Array], jax.Array] | None = ...,
        epsilon: float = ...,
        axis_name: str | tuple[str, ...] | None = ...,
        axis_index_groups: tuple[tuple[int, ...], ...] | None = ...,
        momentum: float | Callable[[Any], Any] = ...,
        running_average: Literal["exponential", "debiased", "cumulative", "pooled"] = ...,
        unbiased_running_var: bool = ...,
        skip_nonfinite: bool = ...,
        constant_statistics: bool = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
        use_fast_variance: bool = ...,
        promote_dtype: Any = ...,
    ) -> None: ...

class BatchRenorm(Norm):
    axis: int | tuple[int, ...]
    dtype: Any
    param_dtype: Any
    use_scale: bool
    scale_init: Callable[..., Any]
    use_bias: bool
    bias_init: Callable[..., Any]
    activation: Callable[[jax.Array], jax.Array] | None
    epsilon: float
    axis_name: str | tuple[str, ...] | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None
    momentum: float | Callable[[Any], Any]
    running_average: Literal["exponential", "debiased", "cumulative", "pooled"]
    unbiased_running_var: bool
    skip_nonfinite: bool
    constant_statistics: bool
    r_max: float | Callable[[Any], Any]
    d_max: float | Callable[[Any], Any]
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        axis: int | tuple[int, ...] = ...,
        dtype: Any = ...,
        param_dtype: Any = ...,
        use_scale: bool = ...,
        scale_init: Callable[..., Any] = ...,
        use_bias: bool = ...,
        bias_init: Callable[..., Any] = ...,
        activation: Callable[[jax.Array], jax.Array] | None = ...,
        epsilon: float = ...,
        axis_name: str | tuple[str, ...] | None = ...,
        axis_index_groups: tuple[tuple[int, ...], ...] | None = ...,
        momentum: float | Callable[[Any], Any] = ...,
        running_average: Literal["exponential", "debiased", "cumulative", "pooled"] = ...,
        unbiased_running_var: bool = ...,
        skip_nonfinite: bool = ...,
        constant_statistics: bool = ...,
        r_max: float | Callable[[Any], Any] = ...,
        d_max: float | Callable[[Any], Any] = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class Chain(Norm):
    methods: tuple[Any, ...]
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        methods: tuple[Any, ...],
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class CholeskyBatchNorm(Norm):
    axis: int | tuple[int, ...]
    dtype: Any
    param_dtype: Any
    use_scale: bool
    scale_init: Callable[..., Any]
    use_bias: bool
    bias_init: Callable[..., Any]
    activation: Callable[[jax.Array], jax.Array] | None
    epsilon: float
    axis_name: str | tuple[str, ...] | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None
    momentum: float | Callable[[Any], Any]
    running_average: Literal["exponential", "debiased", "cumulative"]
    unbiased_running_var: bool
    skip_nonfinite: bool
    constant_statistics: bool
    group_size: int | None
    last_group: Literal["equal", "smaller"]
    shrinkage: float
    stored: Literal["covariance", "matrix"]
    shared_matrix: bool
    shuffle: bool
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        axis: int | tuple[int, ...] = ...,
        dtype: Any = ...,
        param_dtype: Any = ...,
        use_scale: bool = ...,
        scale_init: Callable[..., Any] = ...,
        use_bias: bool = ...,
        bias_init: Callable[..., Any] = ...,
        activation: Callable[[jax.Array], jax.Array] | None = ...,
        epsilon: float = ...,
        axis_name: str | tuple[str, ...] | None = ...,
        axis_index_groups: tuple[tuple[int, ...], ...] | None = ...,
        momentum: float | Callable[[Any], Any] = ...,
        running_average: Literal["exponential", "debiased", "cumulative"] = ...,
        unbiased_running_var: bool = ...,
        skip_nonfinite: bool = ...,
        constant_statistics: bool = ...,
        group_size: int | None = ...,
        last_group: Literal["equal", "smaller"] = ...,
        shrinkage: float = ...,
        stored: Literal["covariance", "matrix"] = ...,
        shared_matrix: bool = ...,
        shuffle: bool = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class ClassAffine(Norm):
    axis: int | tuple[int, ...]
    dtype: Any
    param_dtype: Any
    use_scale: bool
    scale_init: Callable[..., Any]
    use_bias: bool
    bias_init: Callable[..., Any]
    activation: Callable[[jax.Array], jax.Array] | None
    num_classes: int
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        num_classes: int,
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        axis: int | tuple[int, ...] = ...,
        dtype: Any = ...,
        param_dtype: Any = ...,
        use_scale: bool = ...,
        scale_init: Callable[..., Any] = ...,
        use_bias: bool = ...,
        bias_init: Callable[..., Any] = ...,
        activation: Callable[[jax.Array], jax.Array] | None = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class ConditionalAffine(Norm):
    axis: int | tuple[int, ...]
    activation: Callable[[jax.Array], jax.Array] | None
    condition_features: int | None
    form: Literal["film", "adaln_zero", "tadam"]
    kernel_init: Callable[..., Any] | None
    dtype: Any
    param_dtype: Any
    use_scale: bool
    use_bias: bool
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        condition_features: int | None,
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        axis: int | tuple[int, ...] = ...,
        activation: Callable[[jax.Array], jax.Array] | None = ...,
        form: Literal["film", "adaln_zero", "tadam"] = ...,
        kernel_init: Callable[..., Any] | None = ...,
        dtype: Any = ...,
        param_dtype: Any = ...,
        use_scale: bool = ...,
        use_bias: bool = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class ConditionalBatchNorm(Norm):
    axis: int | tuple[int, ...]
    dtype: Any
    param_dtype: Any
    use_scale: bool
    scale_init: Callable[..., Any]
    use_bias: bool
    bias_init: Callable[..., Any]
    activation: Callable[[jax.Array], jax.Array] | None
    epsilon: float
    axis_name: str | tuple[str, ...] | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None
    momentum: float | Callable[[Any], Any]
    running_average: Literal["exponential", "debiased", "cumulative", "pooled"]
    unbiased_running_var: bool
    skip_nonfinite: bool
    constant_statistics: bool
    num_classes: int | None
    condition_features: int | None
    form: Literal["film", "adaln_zero", "tadam"]
    kernel_init: Callable[..., Any] | None
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        axis: int | tuple[int, ...] = ...,
        dtype: Any = ...,
        param_dtype: Any = ...,
        use_scale: bool = ...,
        scale_init: Callable[..., Any] = ...,
        use_bias: bool = ...,
        bias_init: Callable[..., Any] = ...,
        activation: Callable[[jax.Array], jax.Array] | None = ...,
        epsilon: float = ...,
        axis_name: str | tuple[str, ...] | None = ...,
        axis_index_groups: tuple[tuple[int, ...], ...] | None = ...,
        momentum: float | Callable[[Any], Any] = ...,
        running_average: Literal["exponential", "debiased", "cumulative", "pooled"] = ...,
        unbiased_running_var: bool = ...,
        skip_nonfinite: bool = ...,
        constant_statistics: bool = ...,
        num_classes: int | None = ...,
        condition_features: int | None = ...,
        form: Literal["film", "adaln_zero", "tadam"] = ...,
        kernel_init: Callable[..., Any] | None = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class ConditionalGroupNorm(Norm):
    activation: Callable[[jax.Array], jax.Array] | None
    epsilon: float
    axis_name: str | tuple[str, ...] | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None
    dtype: Any
    param_dtype: Any
    use_scale: bool
    scale_init: Callable[..., Any]
    use_bias: bool
    bias_init: Callable[..., Any]
    num_classes: int | None
    condition_features: int | None
    form: Literal["film", "adaln_zero", "tadam"]
    kernel_init: Callable[..., Any] | None
    num_groups: int | None
    group_size: int | None
    reduction_axes: int | tuple[int, ...] | None
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        num_groups: int | None = ...,
        group_size: int | None = ...,
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        activation: Callable[[jax.Array], jax.Array] | None = ...,
        epsilon: float = ...,
        axis_name: str | tuple[str, ...] | None = ...,
        axis_index_groups: tuple[tuple[int, ...], ...] | None = ...,
        dtype: Any = ...,
        param_dtype: Any = ...,
        use_scale: bool = ...,
        scale_init: Callable[..., Any] = ...,
        use_bias: bool = ...,
        bias_init: Callable[..., Any] = ...,
        num_classes: int | None = ...,
        condition_features: int | None = ...,
        form: Literal["film", "adaln_zero", "tadam"] = ...,
        kernel_init: Callable[..., Any] | None = ...,
        reduction_axes: int | tuple[int, ...] | None = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class Conditioned(Norm):
    method: Any
    affine: Any
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        method: Any,
        affine: Any,
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class DecorrelatedBatchNorm(Norm):
    axis: int | tuple[int, ...]
    dtype: Any
    param_dtype: Any
    use_scale: bool
    scale_init: Callable[..., Any]
    use_bias: bool
    bias_init: Callable[..., Any]
    activation: Callable[[jax.Array], jax.Array] | None
    epsilon: float
    axis_name: str | tuple[str, ...] | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None
    momentum: float | Callable[[Any], Any]
    running_average: Literal["exponential", "debiased", "cumulative"]
    unbiased_running_var: bool
    skip_nonfinite: bool
    constant_statistics: bool
    group_size: int | None
    last_group: Literal["equal", "smaller"]
    shrinkage: float
    stored: Literal["covariance", "matrix"]
    shared_matrix: bool
    shuffle: bool
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        axis: int | tuple[int, ...] = ...,
        dtype: Any = ...,
        param_dtype: Any = ...,
        use_scale: bool = ...,
        scale_init: Callable[..., Any] = ...,
        use_bias: bool = ...,
        bias_init: Callable[..., Any] = ...,
        activation: Callable[[jax.Array], jax.Array] | None = ...,
        epsilon: float = ...,
        axis_name: str | tuple[str, ...] | None = ...,
        axis_index_groups: tuple[tuple[int, ...], ...] | None = ...,
        momentum: float | Callable[[Any], Any] = ...,
        running_average: Literal["exponential", "debiased", "cumulative"] = ...,
        unbiased_running_var: bool = ...,
        skip_nonfinite: bool = ...,
        constant_statistics: bool = ...,
        group_size: int | None = ...,
        last_group: Literal["equal", "smaller"] = ...,
        shrinkage: float = ...,
        stored: Literal["covariance", "matrix"] = ...,
        shared_matrix: bool = ...,
        shuffle: bool = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class Derf(Norm):
    axis: int | tuple[int, ...]
    dtype: Any
    param_dtype: Any
    use_scale: bool
    scale_init: Callable[..., Any]
    use_bias: bool
    bias_init: Callable[..., Any]
    alpha_init: float
    shift_init: float
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        axis: int | tuple[int, ...] = ...,
        dtype: Any = ...,
        param_dtype: Any = ...,
        use_scale: bool = ...,
        scale_init: Callable[..., Any] = ...,
        use_bias: bool = ...,
        bias_init: Callable[..., Any] = ...,
        alpha_init: float = ...,
        shift_init: float = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class DynamicTanh(Norm):
    axis: int | tuple[int, ...]
    dtype: Any
    param_dtype: Any
    use_scale: bool
    scale_init: Callable[..., Any]
    use_bias: bool
    bias_init: Callable[..., Any]
    alpha_init: float
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        axis: int | tuple[int, ...] = ...,
        dtype: Any = ...,
        param_dtype: Any = ...,
        use_scale: bool = ...,
        scale_init: Callable[..., Any] = ...,
        use_bias: bool = ...,
        bias_init: Callable[..., Any] = ...,
        alpha_init: float = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class EvalNorm(Norm):
    axis: int | tuple[int, ...]
    dtype: Any
    param_dtype: Any
    use_scale: bool
    scale_init: Callable[..., Any]
    use_bias: bool
    bias_init: Callable[..., Any]
    activation: Callable[[jax.Array], jax.Array] | None
    epsilon: float
    axis_name: str | tuple[str, ...] | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None
    momentum: float | Callable[[Any], Any]
    running_average: Literal["exponential", "debiased", "cumulative"]
    unbiased_running_var: bool
    skip_nonfinite: bool
    constant_statistics: bool
    ghost_batch_size: int
    own_weight: Literal["1/N", "1/N^2"]
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        ghost_batch_size: int,
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        axis: int | tuple[int, ...] = ...,
        dtype: Any = ...,
        param_dtype: Any = ...,
        use_scale: bool = ...,
        scale_init: Callable[..., Any] = ...,
        use_bias: bool = ...,
        bias_init: Callable[..., Any] = ...,
        activation: Callable[[jax.Array], jax.Array] | None = ...,
        epsilon: float = ...,
        axis_name: str | tuple[str, ...] | None = ...,
        axis_index_groups: tuple[tuple[int, ...], ...] | None = ...,
        momentum: float | Callable[[Any], Any] = ...,
        running_average: Literal["exponential", "debiased", "cumulative"] = ...,
        unbiased_running_var: bool = ...,
        skip_nonfinite: bool = ...,
        constant_statistics: bool = ...,
        own_weight: Literal["1/N", "1/N^2"] = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class ExclusiveBatchNorm(Norm):
    axis: int | tuple[int, ...]
    dtype: Any
    param_dtype: Any
    use_scale: bool
    scale_init: Callable[..., Any]
    use_bias: bool
    bias_init: Callable[..., Any]
    activation: Callable[[jax.Array], jax.Array] | None
    epsilon: float
    axis_name: str | tuple[str, ...] | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None
    momentum: float | Callable[[Any], Any]
    running_average: Literal["exponential", "debiased", "cumulative", "pooled"]
    unbiased_running_var: bool
    skip_nonfinite: bool
    constant_statistics: bool
    ghost_batch_size: int | None
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        ghost_batch_size: int | None = ...,
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        axis: int | tuple[int, ...] = ...,
        dtype: Any = ...,
        param_dtype: Any = ...,
        use_scale: bool = ...,
        scale_init: Callable[..., Any] = ...,
        use_bias: bool = ...,
        bias_init: Callable[..., Any] = ...,
        activation: Callable[[jax.Array], jax.Array] | None = ...,
        epsilon: float = ...,
        axis_name: str | tuple[str, ...] | None = ...,
        axis_index_groups: tuple[tuple[int, ...], ...] | None = ...,
        momentum: float | Callable[[Any], Any] = ...,
        running_average: Literal["exponential", "debiased", "cumulative", "pooled"] = ...,
        unbiased_running_var: bool = ...,
        skip_nonfinite: bool = ...,
        constant_statistics: bool = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class Ghost(Norm):
    method: Any
    groups: int
    running: Literal["all", "first"]
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        method: Any,
        groups: int,
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        running: Literal["all", "first"] = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class GhostBatchNorm(Norm):
    axis: int | tuple[int, ...]
    dtype: Any
    param_dtype: Any
    use_scale: bool
    scale_init: Callable[..., Any]
    use_bias: bool
    bias_init: Callable[..., Any]
    activation: Callable[[jax.Array], jax.Array] | None
    epsilon: float
    axis_name: str | tuple[str, ...] | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None
    momentum: float | Callable[[Any], Any]
    running_average: Literal["exponential", "debiased", "cumulative"]
    unbiased_running_var: bool
    skip_nonfinite: bool
    constant_statistics: bool
    ghost_batch_size: int | None
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        ghost_batch_size: int | None,
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        axis: int | tuple[int, ...] = ...,
        dtype: Any = ...,
        param_dtype: Any = ...,
        use_scale: bool = ...,
        scale_init: Callable[..., Any] = ...,
        use_bias: bool = ...,
        bias_init: Callable[..., Any] = ...,
        activation: Callable[[jax.Array], jax.Array] | None = ...,
        epsilon: float = ...,
        axis_name: str | tuple[str, ...] | None = ...,
        axis_index_groups: tuple[tuple[int, ...], ...] | None = ...,
        momentum: float | Callable[[Any], Any] = ...,
        running_average: Literal["exponential", "debiased", "cumulative"] = ...,
        unbiased_running_var: bool = ...,
        skip_nonfinite: bool = ...,
        constant_statistics: bool = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class GhostNoise(Norm):
    axis: int | tuple[int, ...]
    dtype: Any
    axis_name: str | tuple[str, ...] | None
    noise: Literal["both", "shift", "scale"]
    strength: float | Callable[[Any], Any]
    unbiased_scale: bool
    ghost_batch_size: int | None
    drawing: Literal["replacement", "partition", "shuffle", "consecutive"]
    independent_channels: bool
    effective_size: float | None
    epsilon: float
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        ghost_batch_size: int | None = ...,
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        axis: int | tuple[int, ...] = ...,
        dtype: Any = ...,
        axis_name: str | tuple[str, ...] | None = ...,
        noise: Literal["both", "shift", "scale"] = ...,
        strength: float | Callable[[Any], Any] = ...,
        unbiased_scale: bool = ...,
        drawing: Literal["replacement", "partition", "shuffle", "consecutive"] = ...,
        independent_channels: bool = ...,
        effective_size: float | None = ...,
        epsilon: float = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class GhostNoiseBatchNorm(Norm):
    axis: int | tuple[int, ...]
    dtype: Any
    param_dtype: Any
    use_scale: bool
    scale_init: Callable[..., Any]
    use_bias: bool
    bias_init: Callable[..., Any]
    activation: Callable[[jax.Array], jax.Array] | None
    epsilon: float
    axis_name: str | tuple[str, ...] | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None
    momentum: float | Callable[[Any], Any]
    running_average: Literal["exponential", "debiased", "cumulative", "pooled"]
    unbiased_running_var: bool
    skip_nonfinite: bool
    constant_statistics: bool
    noise: Literal["both", "shift", "scale"]
    strength: float | Callable[[Any], Any]
    unbiased_scale: bool
    ghost_batch_size: int | None
    drawing: Literal["replacement", "partition", "shuffle", "consecutive"]
    independent_channels: bool
    effective_size: float | None
    noise_epsilon: float
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        ghost_batch_size: int | None = ...,
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        axis: int | tuple[int, ...] = ...,
        dtype: Any = ...,
        param_dtype: Any = ...,
        use_scale: bool = ...,
        scale_init: Callable[..., Any] = ...,
        use_bias: bool = ...,
        bias_init: Callable[..., Any] = ...,
        activation: Callable[[jax.Array], jax.Array] | None = ...,
        epsilon: float = ...,
        axis_name: str | tuple[str, ...] | None = ...,
        axis_index_groups: tuple[tuple[int, ...], ...] | None = ...,
        momentum: float | Callable[[Any], Any] = ...,
        running_average: Literal["exponential", "debiased", "cumulative", "pooled"] = ...,
        unbiased_running_var: bool = ...,
        skip_nonfinite: bool = ...,
        constant_statistics: bool = ...,
        noise: Literal["both", "shift", "scale"] = ...,
        strength: float | Callable[[Any], Any] = ...,
        unbiased_scale: bool = ...,
        drawing: Literal["replacement", "partition", "shuffle", "consecutive"] = ...,
        independent_channels: bool = ...,
        effective_size: float | None = ...,
        noise_epsilon: float = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class GroupNorm(Norm):
    num_segments: int | None
    dtype: Any
    param_dtype: Any
    use_scale: bool
    scale_init: Callable[..., Any]
    use_bias: bool
    bias_init: Callable[..., Any]
    activation: Callable[[jax.Array], jax.Array] | None
    epsilon: float
    axis_name: str | tuple[str, ...] | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None
    num_groups: int | None
    group_size: int | None
    reduction_axes: int | tuple[int, ...] | None
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        num_groups: int | None = ...,
        group_size: int | None = ...,
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        num_segments: int | None = ...,
        dtype: Any = ...,
        param_dtype: Any = ...,
        use_scale: bool = ...,
        scale_init: Callable[..., Any] = ...,
        use_bias: bool = ...,
        bias_init: Callable[..., Any] = ...,
        activation: Callable[[jax.Array], jax.Array] | None = ...,
        epsilon: float = ...,
        axis_name: str | tuple[str, ...] | None = ...,
        axis_index_groups: tuple[tuple[int, ...], ...] | None = ...,
        reduction_axes: int | tuple[int, ...] | None = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
        use_fast_variance: bool = ...,
        promote_dtype: Any = ...,
    ) -> None: ...

class InstanceNorm(Norm):
    num_segments: int | None
    dtype: Any
    param_dtype: Any
    use_scale: bool
    scale_init: Callable[..., Any]
    use_bias: bool
    bias_init: Callable[..., Any]
    activation: Callable[[jax.Array], jax.Array] | None
    epsilon: float
    axis_name: str | tuple[str, ...] | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None
    feature_axes: int | tuple[int, ...]
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        num_segments: int | None = ...,
        dtype: Any = ...,
        param_dtype: Any = ...,
        use_scale: bool = ...,
        scale_init: Callable[..., Any] = ...,
        use_bias: bool = ...,
        bias_init: Callable[..., Any] = ...,
        activation: Callable[[jax.Array], jax.Array] | None = ...,
        epsilon: float = ...,
        axis_name: str | tuple[str, ...] | None = ...,
        axis_index_groups: tuple[tuple[int, ...], ...] | None = ...,
        feature_axes: int | tuple[int, ...] = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
        use_fast_variance: bool = ...,
        promote_dtype: Any = ...,
    ) -> None: ...

class IterativeNorm(Norm):
    axis: int | tuple[int, ...]
    dtype: Any
    param_dtype: Any
    use_scale: bool
    scale_init: Callable[..., Any]
    use_bias: bool
    bias_init: Callable[..., Any]
    activation: Callable[[jax.Array], jax.Array] | None
    epsilon: float
    axis_name: str | tuple[str, ...] | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None
    momentum: float | Callable[[Any], Any]
    running_average: Literal["exponential", "debiased", "cumulative"]
    unbiased_running_var: bool
    skip_nonfinite: bool
    constant_statistics: bool
    group_size: int | None
    last_group: Literal["equal", "smaller"]
    shrinkage: float
    stored: Literal["covariance", "matrix"]
    shared_matrix: bool
    shuffle: bool
    steps: int
    iteration: Literal["cubic", "quintic", "published"]
    scaling: Literal["trace", "frobenius", "power"]
    minimax_steps: int
    condition: float
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        axis: int | tuple[int, ...] = ...,
        dtype: Any = ...,
        param_dtype: Any = ...,
        use_scale: bool = ...,
        scale_init: Callable[..., Any] = ...,
        use_bias: bool = ...,
        bias_init: Callable[..., Any] = ...,
        activation: Callable[[jax.Array], jax.Array] | None = ...,
        epsilon: float = ...,
        axis_name: str | tuple[str, ...] | None = ...,
        axis_index_groups: tuple[tuple[int, ...], ...] | None = ...,
        momentum: float | Callable[[Any], Any] = ...,
        running_average: Literal["exponential", "debiased", "cumulative"] = ...,
        unbiased_running_var: bool = ...,
        skip_nonfinite: bool = ...,
        constant_statistics: bool = ...,
        group_size: int | None = ...,
        last_group: Literal["equal", "smaller"] = ...,
        shrinkage: float = ...,
        stored: Literal["covariance", "matrix"] = ...,
        shared_matrix: bool = ...,
        shuffle: bool = ...,
        steps: int = ...,
        iteration: Literal["cubic", "quintic", "published"] = ...,
        scaling: Literal["trace", "frobenius", "power"] = ...,
        minimax_steps: int = ...,
        condition: float = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class KalmanNorm(Norm):
    axis: int | tuple[int, ...]
    dtype: Any
    param_dtype: Any
    use_scale: bool
    scale_init: Callable[..., Any]
    use_bias: bool
    bias_init: Callable[..., Any]
    activation: Callable[[jax.Array], jax.Array] | None
    epsilon: float
    axis_name: str | tuple[str, ...] | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None
    momentum: float | Callable[[Any], Any]
    running_average: Literal["exponential", "debiased", "cumulative", "pooled"]
    unbiased_running_var: bool
    skip_nonfinite: bool
    constant_statistics: bool
    gain: float | Literal["learned", "computed"]
    gain_per: Literal["layer", "channel"]
    initial_gain: float
    effective_size: float | None
    guard: float | None
    require_prior: bool
    transition: str | None
    prior_features: int | None
    transition_init: Callable[..., Any]
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        axis: int | tuple[int, ...] = ...,
        dtype: Any = ...,
        param_dtype: Any = ...,
        use_scale: bool = ...,
        scale_init: Callable[..., Any] = ...,
        use_bias: bool = ...,
        bias_init: Callable[..., Any] = ...,
        activation: Callable[[jax.Array], jax.Array] | None = ...,
        epsilon: float = ...,
        axis_name: str | tuple[str, ...] | None = ...,
        axis_index_groups: tuple[tuple[int, ...], ...] | None = ...,
        momentum: float | Callable[[Any], Any] = ...,
        running_average: Literal["exponential", "debiased", "cumulative", "pooled"] = ...,
        unbiased_running_var: bool = ...,
        skip_nonfinite: bool = ...,
        constant_statistics: bool = ...,
        gain: float | Literal["learned", "computed"] = ...,
        gain_per: Literal["layer", "channel"] = ...,
        initial_gain: float = ...,
        effective_size: float | None = ...,
        guard: float | None = ...,
        require_prior: bool = ...,
        transition: str | None = ...,
        prior_features: int | None = ...,
        transition_init: Callable[..., Any] = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class LayerNorm(Norm):
    num_segments: int | None
    dtype: Any
    param_dtype: Any
    use_scale: bool
    scale_init: Callable[..., Any]
    use_bias: bool
    bias_init: Callable[..., Any]
    activation: Callable[[jax.Array], jax.Array] | None
    epsilon: float
    axis_name: str | tuple[str, ...] | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None
    reduction_axes: int | tuple[int, ...]
    feature_axes: int | tuple[int, ...]
    num_groups: int
    scale_offset: float
    cast: Literal["output", "before_scale"]
    gate_activation: Callable[[jax.Array], jax.Array] | None
    gate_place: Literal["before", "after"]
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        num_segments: int | None = ...,
        dtype: Any = ...,
        param_dtype: Any = ...,
        use_scale: bool = ...,
        scale_init: Callable[..., Any] = ...,
        use_bias: bool = ...,
        bias_init: Callable[..., Any] = ...,
        activation: Callable[[jax.Array], jax.Array] | None = ...,
        epsilon: float = ...,
        axis_name: str | tuple[str, ...] | None = ...,
        axis_index_groups: tuple[tuple[int, ...], ...] | None = ...,
        reduction_axes: int | tuple[int, ...] = ...,
        feature_axes: int | tuple[int, ...] = ...,
        num_groups: int = ...,
        scale_offset: float = ...,
        cast: Literal["output", "before_scale"] = ...,
        gate_activation: Callable[[jax.Array], jax.Array] | None = ...,
        gate_place: Literal["before", "after"] = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
        use_fast_variance: bool = ...,
        promote_dtype: Any = ...,
    ) -> None: ...

class MultiStats(Norm):
    method: Any
    num_branches: int
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        method: Any,
        num_branches: int,
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class NormalizedKernels(flax_nnx.Module):
    module: flax_nnx.Module
    patterns: tuple[str, ...] | None
    kernels: Any
    kernel_stats: Any
    def __init__(
        self,
        module: flax_nnx.Module,
        method: Any,
        patterns: tuple[str, ...] | None = None,
        *,
        rngs: flax_nnx.Rngs | None = None,
    ) -> None: ...
    @property
    def method(self) -> Any: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def step(self) -> None: ...
    def unwrap(self) -> Any: ...

class RMSNorm(Norm):
    num_segments: int | None
    dtype: Any
    param_dtype: Any
    use_scale: bool
    scale_init: Callable[..., Any]
    activation: Callable[[jax.Array], jax.Array] | None
    epsilon: float
    axis_name: str | tuple[str, ...] | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None
    reduction_axes: int | tuple[int, ...]
    feature_axes: int | tuple[int, ...]
    num_groups: int
    scale_offset: float
    cast: Literal["output", "before_scale"]
    gate_activation: Callable[[jax.Array], jax.Array] | None
    gate_place: Literal["before", "after"]
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        num_segments: int | None = ...,
        dtype: Any = ...,
        param_dtype: Any = ...,
        use_scale: bool = ...,
        scale_init: Callable[..., Any] = ...,
        activation: Callable[[jax.Array], jax.Array] | None = ...,
        epsilon: float = ...,
        axis_name: str | tuple[str, ...] | None = ...,
        axis_index_groups: tuple[tuple[int, ...], ...] | None = ...,
        reduction_axes: int | tuple[int, ...] = ...,
        feature_axes: int | tuple[int, ...] = ...,
        num_groups: int = ...,
        scale_offset: float = ...,
        cast: Literal["output", "before_scale"] = ...,
        gate_activation: Callable[[jax.Array], jax.Array] | None = ...,
        gate_place: Literal["before", "after"] = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
        use_fast_variance: bool = ...,
        promote_dtype: Any = ...,
    ) -> None: ...

class RunningNorm(Norm):
    axis: int | tuple[int, ...]
    dtype: Any
    param_dtype: Any
    use_scale: bool
    scale_init: Callable[..., Any]
    use_bias: bool
    bias_init: Callable[..., Any]
    activation: Callable[[jax.Array], jax.Array] | None
    epsilon: float
    axis_name: str | tuple[str, ...] | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None
    momentum: float | Callable[[Any], Any]
    running_average: Literal["exponential", "debiased", "cumulative", "pooled"]
    unbiased_running_var: bool
    skip_nonfinite: bool
    clip: float | None
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        axis: int | tuple[int, ...] = ...,
        dtype: Any = ...,
        param_dtype: Any = ...,
        use_scale: bool = ...,
        scale_init: Callable[..., Any] = ...,
        use_bias: bool = ...,
        bias_init: Callable[..., Any] = ...,
        activation: Callable[[jax.Array], jax.Array] | None = ...,
        epsilon: float = ...,
        axis_name: str | tuple[str, ...] | None = ...,
        axis_index_groups: tuple[tuple[int, ...], ...] | None = ...,
        momentum: float | Callable[[Any], Any] = ...,
        running_average: Literal["exponential", "debiased", "cumulative", "pooled"] = ...,
        unbiased_running_var: bool = ...,
        skip_nonfinite: bool = ...,
        clip: float | None = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class SampleWhitening(Norm):
    activation: Callable[[jax.Array], jax.Array] | None
    group_size: int | None
    steps: int | None
    epsilon: float
    dtype: Any
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        activation: Callable[[jax.Array], jax.Array] | None = ...,
        group_size: int | None = ...,
        steps: int | None = ...,
        epsilon: float = ...,
        dtype: Any = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class SandwichAdaptiveInstanceNorm(Norm):
    axis: int | tuple[int, ...]
    dtype: Any
    param_dtype: Any
    use_scale: bool
    scale_init: Callable[..., Any]
    use_bias: bool
    bias_init: Callable[..., Any]
    activation: Callable[[jax.Array], jax.Array] | None
    epsilon: float
    axis_name: str | tuple[str, ...] | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None
    unbiased_var: bool
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        axis: int | tuple[int, ...] = ...,
        dtype: Any = ...,
        param_dtype: Any = ...,
        use_scale: bool = ...,
        scale_init: Callable[..., Any] = ...,
        use_bias: bool = ...,
        bias_init: Callable[..., Any] = ...,
        activation: Callable[[jax.Array], jax.Array] | None = ...,
        epsilon: float = ...,
        axis_name: str | tuple[str, ...] | None = ...,
        axis_index_groups: tuple[tuple[int, ...], ...] | None = ...,
        unbiased_var: bool = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class SandwichAuxBatchNorm(Norm):
    axis: int | tuple[int, ...]
    dtype: Any
    param_dtype: Any
    use_scale: bool
    scale_init: Callable[..., Any]
    use_bias: bool
    bias_init: Callable[..., Any]
    activation: Callable[[jax.Array], jax.Array] | None
    epsilon: float
    axis_name: str | tuple[str, ...] | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None
    momentum: float | Callable[[Any], Any]
    running_average: Literal["exponential", "debiased", "cumulative", "pooled"]
    unbiased_running_var: bool
    skip_nonfinite: bool
    constant_statistics: bool
    num_branches: int
    class_scale_init: Callable[..., Any]
    class_bias_init: Callable[..., Any]
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        num_branches: int = ...,
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        axis: int | tuple[int, ...] = ...,
        dtype: Any = ...,
        param_dtype: Any = ...,
        use_scale: bool = ...,
        scale_init: Callable[..., Any] = ...,
        use_bias: bool = ...,
        bias_init: Callable[..., Any] = ...,
        activation: Callable[[jax.Array], jax.Array] | None = ...,
        epsilon: float = ...,
        axis_name: str | tuple[str, ...] | None = ...,
        axis_index_groups: tuple[tuple[int, ...], ...] | None = ...,
        momentum: float | Callable[[Any], Any] = ...,
        running_average: Literal["exponential", "debiased", "cumulative", "pooled"] = ...,
        unbiased_running_var: bool = ...,
        skip_nonfinite: bool = ...,
        constant_statistics: bool = ...,
        class_scale_init: Callable[..., Any] = ...,
        class_bias_init: Callable[..., Any] = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class SandwichBatchNorm(Norm):
    axis: int | tuple[int, ...]
    dtype: Any
    param_dtype: Any
    use_scale: bool
    scale_init: Callable[..., Any]
    use_bias: bool
    bias_init: Callable[..., Any]
    activation: Callable[[jax.Array], jax.Array] | None
    epsilon: float
    axis_name: str | tuple[str, ...] | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None
    momentum: float | Callable[[Any], Any]
    running_average: Literal["exponential", "debiased", "cumulative", "pooled"]
    unbiased_running_var: bool
    skip_nonfinite: bool
    constant_statistics: bool
    num_classes: int
    class_scale_init: Callable[..., Any]
    class_bias_init: Callable[..., Any]
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        num_classes: int,
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        axis: int | tuple[int, ...] = ...,
        dtype: Any = ...,
        param_dtype: Any = ...,
        use_scale: bool = ...,
        scale_init: Callable[..., Any] = ...,
        use_bias: bool = ...,
        bias_init: Callable[..., Any] = ...,
        activation: Callable[[jax.Array], jax.Array] | None = ...,
        epsilon: float = ...,
        axis_name: str | tuple[str, ...] | None = ...,
        axis_index_groups: tuple[tuple[int, ...], ...] | None = ...,
        momentum: float | Callable[[Any], Any] = ...,
        running_average: Literal["exponential", "debiased", "cumulative", "pooled"] = ...,
        unbiased_running_var: bool = ...,
        skip_nonfinite: bool = ...,
        constant_statistics: bool = ...,
        class_scale_init: Callable[..., Any] = ...,
        class_bias_init: Callable[..., Any] = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class Seen(flax_nnx.Intermediate[Any]): ...

class SpectralBatchNorm(Norm):
    axis: int | tuple[int, ...]
    dtype: Any
    param_dtype: Any
    use_scale: bool
    scale_init: Callable[..., Any]
    use_bias: bool
    bias_init: Callable[..., Any]
    activation: Callable[[jax.Array], jax.Array] | None
    epsilon: float
    axis_name: str | tuple[str, ...] | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None
    momentum: float | Callable[[Any], Any]
    running_average: Literal["exponential", "debiased", "cumulative", "pooled"]
    unbiased_running_var: bool
    skip_nonfinite: bool
    statistics: Literal["channel", "frequency", "ring"]
    spectrum: Literal["full", "half"]
    fft_norm: Literal["ortho", "backward", "forward", "full"]
    spatial_axes: int | tuple[int, ...] | None
    map_size: tuple[int, ...] | None
    bands: int
    route: Literal["auto", "spatial", "matmul", "fft"]
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        axis: int | tuple[int, ...] = ...,
        dtype: Any = ...,
        param_dtype: Any = ...,
        use_scale: bool = ...,
        scale_init: Callable[..., Any] = ...,
        use_bias: bool = ...,
        bias_init: Callable[..., Any] = ...,
        activation: Callable[[jax.Array], jax.Array] | None = ...,
        epsilon: float = ...,
        axis_name: str | tuple[str, ...] | None = ...,
        axis_index_groups: tuple[tuple[int, ...], ...] | None = ...,
        momentum: float | Callable[[Any], Any] = ...,
        running_average: Literal["exponential", "debiased", "cumulative", "pooled"] = ...,
        unbiased_running_var: bool = ...,
        skip_nonfinite: bool = ...,
        statistics: Literal["channel", "frequency", "ring"] = ...,
        spectrum: Literal["full", "half"] = ...,
        fft_norm: Literal["ortho", "backward", "forward", "full"] = ...,
        spatial_axes: int | tuple[int, ...] | None = ...,
        map_size: tuple[int, ...] | None = ...,
        bands: int = ...,
        route: Literal["auto", "spatial", "matmul", "fft"] = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class StochasticWhiteningBatchNorm(Norm):
    axis: int | tuple[int, ...]
    dtype: Any
    param_dtype: Any
    use_scale: bool
    scale_init: Callable[..., Any]
    use_bias: bool
    bias_init: Callable[..., Any]
    activation: Callable[[jax.Array], jax.Array] | None
    epsilon: float
    axis_name: str | tuple[str, ...] | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None
    momentum: float | Callable[[Any], Any]
    running_average: Literal["exponential", "debiased", "cumulative"]
    unbiased_running_var: bool
    skip_nonfinite: bool
    constant_statistics: bool
    group_size: int | None
    last_group: Literal["equal", "smaller"]
    shrinkage: float
    criterion: Literal["kl", "frobenius"]
    alpha: float | Callable[[Any], Any]
    half_life: float | None
    form: Literal["update", "covariance"]
    condition: float
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        axis: int | tuple[int, ...] = ...,
        dtype: Any = ...,
        param_dtype: Any = ...,
        use_scale: bool = ...,
        scale_init: Callable[..., Any] = ...,
        use_bias: bool = ...,
        bias_init: Callable[..., Any] = ...,
        activation: Callable[[jax.Array], jax.Array] | None = ...,
        epsilon: float = ...,
        axis_name: str | tuple[str, ...] | None = ...,
        axis_index_groups: tuple[tuple[int, ...], ...] | None = ...,
        momentum: float | Callable[[Any], Any] = ...,
        running_average: Literal["exponential", "debiased", "cumulative"] = ...,
        unbiased_running_var: bool = ...,
        skip_nonfinite: bool = ...,
        constant_statistics: bool = ...,
        group_size: int | None = ...,
        last_group: Literal["equal", "smaller"] = ...,
        shrinkage: float = ...,
        criterion: Literal["kl", "frobenius"] = ...,
        alpha: float | Callable[[Any], Any] = ...,
        half_life: float | None = ...,
        form: Literal["update", "covariance"] = ...,
        condition: float = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class TPReLU(Norm):
    axis: int | tuple[int, ...]
    dtype: Any
    param_dtype: Any
    bias_init: Callable[..., Any]
    slope_init: Callable[..., Any]
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        axis: int | tuple[int, ...] = ...,
        dtype: Any = ...,
        param_dtype: Any = ...,
        bias_init: Callable[..., Any] = ...,
        slope_init: Callable[..., Any] = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class TReLU(Norm):
    axis: int | tuple[int, ...]
    dtype: Any
    param_dtype: Any
    bias_init: Callable[..., Any]
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        axis: int | tuple[int, ...] = ...,
        dtype: Any = ...,
        param_dtype: Any = ...,
        bias_init: Callable[..., Any] = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

class WeightNormalizedAddition(Norm):
    axis: int | tuple[int, ...]
    dtype: Any
    param_dtype: Any
    epsilon: float
    epsilon_place: Literal["square", "norm"]
    initial: tuple[float, ...]
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool = False,
        rngs: flax_nnx.Rngs,
        axis: int | tuple[int, ...] = ...,
        dtype: Any = ...,
        param_dtype: Any = ...,
        epsilon: float = ...,
        epsilon_place: Literal["square", "norm"] = ...,
        initial: tuple[float, ...] = ...,
        scale_metadata: Mapping[str, Any] = ...,
        bias_metadata: Mapping[str, Any] = ...,
    ) -> None: ...

__all__ = [
    "AdaptiveInstanceNorm",
    "AdaptiveLayerNorm",
    "Affine",
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
    "Conditioned",
    "DecorrelatedBatchNorm",
    "Derf",
    "DynamicTanh",
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
    "LayerNorm",
    "MultiStats",
    "Norm",
    "NormalizedKernels",
    "RMSNorm",
    "RunningNorm",
    "SampleWhitening",
    "SandwichAdaptiveInstanceNorm",
    "SandwichAuxBatchNorm",
    "SandwichBatchNorm",
    "Seen",
    "SpectralBatchNorm",
    "StochasticWhiteningBatchNorm",
    "TPReLU",
    "TReLU",
    "WeightNormalizedAddition",
]
