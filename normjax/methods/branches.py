"""Statistics of their own for each branch: domains, clean and attacked images, previous layers."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from normjax.core import checks
from normjax.core.checks import field
from normjax.core.compat import is_traced
from normjax.core.fields import Configuration, Initializer
from normjax.core.method import Normalizer, Traits, feature_axes, traits
from normjax.core.structs import Axes, Features, Key, Mask
from normjax.methods.batch import BatchFields, BatchNorm
from normjax.methods.conditional import (
    ClassAffine,
    Conditioned,
    Preset,
    class_rows,
    near_one,
    plain,
)


@dataclasses.dataclass(frozen=True)
class MultiStats(Configuration):
    """A method with a state for each of several branches; every call uses and moves that of one.

    Li et al., *Adaptive Batch Normalization*, 2016, https://arxiv.org/abs/1603.04779, which gives
    each domain statistics of its own; Xie et al., *Adversarial Examples Improve Image Recognition*,
    2020, section 3.2, https://arxiv.org/abs/1911.09665, for clean and adversarial examples.

    Leaves of the state are [num_branches, ...]; parameters are shared. The input `branch` is an
    integer for the whole batch, static or traced. One that is out of range is a ValueError where it
    is known; in a traced function it is clipped to the nearest branch. A `Conditioned` method
    inside has the branch as its condition, unless it is given another one.

    Attributes:
      method: the method, such as `BatchNorm()`.
      num_branches: how many states there are.

    Raises:
      ValueError: for a branch that there is none of; TypeError for one that is not an integer.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> method, x = nj.MultiStats(nj.BatchNorm(), 2), jnp.arange(12.0).reshape(4, 3)
      >>> params, state = method.init(None, 3)
      >>> y, state = method.apply(params, state, x, train=True, branch=1)
      >>> [f"{mean:.3f}" for mean in state.mean[:, 0]]
      ['0.000', '0.045']
    """

    method: Any = dataclasses.field(metadata=checks.rule(checks.method))
    num_branches: int = dataclasses.field(metadata=checks.rule(checks.positive))

    @property
    def feature_axes(self) -> Axes:
        """The feature axes of the method."""
        return feature_axes(self.method)

    @property
    def traits(self) -> Traits:
        """Those of the method, with the branch as a further input."""
        of = traits(self.method)
        return dataclasses.replace(of, inputs={**of.inputs, "branch": "whole"})

    def init(self, key: Key, features: Features) -> tuple[Any, Any]:
        """Parameters of the method, and its state for every branch, stacked on axis 0."""
        params, state = self.method.init(key, features)
        every = lambda a: jnp.broadcast_to(a, (self.num_branches, *a.shape))
        return params, jax.tree.map(every, state)

    def check_training(self, x: Any) -> None:
        """ValueError for an input of which the method would make nothing."""
        self.method.check_training(x)

    def apply(
        self,
        params: Any,
        state: Any,
        x: jax.Array,
        *,
        train: bool,
        mask: Mask = None,
        key: Key = None,
        branch: Any = None,
        **inputs: Any,
    ) -> tuple[jax.Array, Any]:
        """`apply` of the method with the state of `branch`, which alone moves."""
        own, inputs = self._of(state, branch), self._with_condition(branch, inputs)
        how = dict(train=train, mask=mask, key=key, **inputs)
        y, moved = self.method.apply(params, own, x, **how)
        return y, self._put(state, moved, branch)

    def observe(self, x: Any, mask: Mask = None, **inputs: Any) -> Any:
        """Statistics of the method."""
        return self.method.observe(x, mask, **inputs)

    def evaluation(
        self,
        params: Any,
        state: Any,
        x: Any = None,
        mask: Mask = None,
        *,
        branch: Any = None,
        **inputs: Any,
    ) -> Normalizer:
        """That of the method with the statistics of `branch`."""
        own, inputs = self._of(state, branch), self._with_condition(branch, inputs)
        return self.method.evaluation(params, own, x, mask, **inputs)

    def absorb(self, state: Any, seen: Any, *, branch: Any = None) -> Any:
        """The state with the statistics of `branch` moved."""
        return self._put(state, self.method.absorb(self._of(state, branch), seen), branch)

    def _of(self, state, branch):
        index = self._index(branch)
        return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, 0, False), state)

    def _put(self, state, moved, branch):
        index = self._index(branch)
        put = lambda a, b: lax.dynamic_update_index_in_dim(a, b, index, 0)
        return jax.tree.map(put, state, moved)

    def _index(self, branch):
        hint = f"give an integer from 0 to {self.num_branches - 1} for the whole batch."
        if branch is None:
            raise ValueError(f"MultiStats: branch=None: {hint}")
        index = jnp.asarray(branch)
        if index.ndim or not jnp.issubdtype(index.dtype, jnp.integer):
            given = f"a branch of dtype {index.dtype} and shape {index.shape}"
            raise TypeError(f"MultiStats: {given}: {hint}")
        if not is_traced(index) and not 0 <= np.asarray(index) < self.num_branches:
            raise ValueError(f"MultiStats: branch={branch} of num_branches: {hint}")
        return jnp.clip(index, 0, self.num_branches - 1)

    def _with_condition(self, branch, inputs):
        wanted = "condition" in traits(self.method).inputs and inputs.get("condition") is None
        return inputs | {"condition": self._index(branch)} if wanted else inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuxBatchNorm(Preset, BatchFields):
    """A complete batch normalization, statistics, scale and bias, for each of several branches.

    Xie et al., *Adversarial Examples Improve Image Recognition*, 2020, section 3.2 (auxiliary batch
    norm), https://arxiv.org/abs/1911.09665; the baseline of Gong et al., *Sandwich Batch
    Normalization*, 2022, https://arxiv.org/abs/2102.11382

    `MultiStats` of a `Conditioned` norm whose condition is the branch. The input `branch` is one
    integer for the whole batch, such as 0 for clean and 1 for attacked images.

    Attributes:
      num_branches: how many branches there are.
      use_scale, use_bias, scale_init, bias_init: of the rows of each branch.
      axis, momentum, epsilon, dtype, param_dtype, axis_name, axis_index_groups, activation,
        running_average, unbiased_running_var, skip_nonfinite, constant_statistics: as in
        `BatchNorm`.

    Raises:
      ValueError, TypeError: as in `BatchNorm` and `MultiStats`.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> method, x = nj.AuxBatchNorm(2), jnp.arange(12.0).reshape(4, 3)
      >>> params, state = method.init(None, 3)
      >>> y, state = method.apply(params, state, x, train=True, branch=0)
    """

    traits: ClassVar[Traits] = Traits(inputs={"branch": "whole", "weights": "sample"})

    num_branches: int = dataclasses.field(
        default=2, kw_only=False, metadata=checks.rule(checks.positive)
    )

    def expand(self) -> MultiStats:
        """The method that this one stands for."""
        norm = plain(BatchNorm, self, use_scale=False, use_bias=False)
        names = "axis", "param_dtype", "use_scale", "use_bias", "scale_init", "bias_init"
        rows = ClassAffine(self.num_branches, **{name: getattr(self, name) for name in names})
        return MultiStats(Conditioned(norm, rows), self.num_branches)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SandwichAuxBatchNorm(Preset, BatchFields):
    """Statistics of each branch, an affine map that all share, then one of each branch.

    Gong et al., *Sandwich Batch Normalization*, 2022, sections 4.2 and 4.3,
    https://arxiv.org/abs/2102.11382, as in the public implementation
    (VITA-Group/Sandwich-Batch-Normalization), where the shared scale starts near one like those of
    the branches. There it is one more row of their table; here it is `norm` of the parameters.

    `MultiStats` of a `Conditioned` norm whose condition is the branch: 0 for clean and 1 for
    attacked images, or in the search of architectures the operations before the layer
    (`operation_index`). The first layer of a cell there has the shared map alone:
    `MultiStats(BatchNorm(scale_init=near_one), num_branches)`.

    Attributes:
      num_branches: how many branches there are.
      scale_init: of the shared scale, `near_one`.
      use_scale, use_bias, bias_init: of the shared affine map, as in `BatchNorm`.
      class_scale_init, class_bias_init: initializers of the branches' rows: `near_one` and zeros.
      axis, momentum, epsilon, dtype, param_dtype, axis_name, axis_index_groups, activation,
        running_average, unbiased_running_var, skip_nonfinite, constant_statistics: as in
        `BatchNorm`.

    Raises:
      ValueError, TypeError: as in `BatchNorm` and `MultiStats`.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> method, x = nj.SandwichAuxBatchNorm(2), jnp.arange(12.0).reshape(4, 3)
      >>> params, state = method.init(jax.random.key(0), 3)
      >>> y, state = method.apply(params, state, x, train=True, branch=0)
    """

    traits: ClassVar[Traits] = Traits(inputs={"branch": "whole", "weights": "sample"})

    num_branches: int = dataclasses.field(
        default=2, kw_only=False, metadata=checks.rule(checks.positive)
    )
    scale_init: Initializer = field(near_one, checks.initializer)
    class_scale_init: Initializer = field(near_one, checks.initializer)
    class_bias_init: Initializer = field(jax.nn.initializers.zeros, checks.initializer)

    def expand(self) -> MultiStats:
        """The method that this one stands for."""
        rows = class_rows(self, self.num_branches)
        return MultiStats(Conditioned(plain(BatchNorm, self), rows), self.num_branches)


def operation_index(operations: Any, num_operations: int) -> Any:
    """The branch of a layer behind others in a search of architectures, of which each has a choice.

    Gong et al., *Sandwich Batch Normalization*, 2022, section 4.2,
    https://arxiv.org/abs/2102.11382: `sum_i num_operations^i operations[i]`, one of
    `num_operations^nodes`, for the integers `operations`, [nodes], static or traced. ValueError for
    one out of range, where it is known.

    Example:
      >>> import normjax as nj
      >>> nj.operation_index([1, 0, 2], num_operations=3).item()
      19
    """
    if not is_traced(operations):
        outside = [a for a in np.asarray(operations).tolist() if not 0 <= a < num_operations]
        if outside:
            given = f"operation {outside[0]} of num_operations={num_operations}"
            raise ValueError(f"operation_index: {given}: they are 0 to {num_operations - 1}.")
    operations = jnp.asarray(operations)
    return jnp.sum(operations * num_operations ** jnp.arange(len(operations)))
