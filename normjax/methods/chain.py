"""Methods one after the other."""

import dataclasses
from typing import Any

import jax

from normjax.core import checks
from normjax.core.structs import Axes, Features, Key


@dataclasses.dataclass(frozen=True)
class Chain:
    """Runs methods one after the other; made by `chain`. Parameters and state are dicts by method.

    Composition as in optax, https://optax.readthedocs.io/en/latest/api/combining_optimizers.html

    Attributes:
      methods: the methods, first to last.

    Raises:
      ValueError: if there is none, or one is not a method.

    Example:
      >>> import jax, normjax as nj
      >>> method = nj.Chain((nj.RMSNorm(), nj.Affine(use_scale=False)))
      >>> params, state = method.init(jax.random.key(0), 4)
      >>> sorted(params), sorted(state)
      (['Affine_1', 'RMSNorm_0'], ['Affine_1', 'RMSNorm_0'])
    """

    methods: tuple[Any, ...]

    def __post_init__(self):
        if not isinstance(self.methods, list | tuple):
            raise ValueError(f"chain: methods={self.methods!r} is not a sequence of methods.")
        object.__setattr__(self, "methods", tuple(self.methods))
        if not self.methods:
            raise ValueError("chain: needs at least one method.")
        for method in self.methods:
            checks.method("chain", method)
            checks.no_pair("chain", method, "call it by itself")

    @property
    def axis(self) -> Axes:
        """The feature axes of the first method."""
        return checks.feature_axes(self.methods[0])

    @property
    def random(self) -> bool:
        """Whether any method draws random numbers in training."""
        return any(map(checks.is_random, self.methods))

    @property
    def depends_on_train(self) -> bool:
        """Whether training and evaluation differ for any method."""
        return any(map(checks.depends_on_train, self.methods))

    def init(self, key: Key, features: Features) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parameters and state under "<class>_<position>"; `features` is the same for all."""
        params, state = {}, {}
        for (name, method), part in zip(self._named(), self._keys(key), strict=True):
            params[name], state[name] = method.init(part, features)
        return params, state

    def apply(
        self,
        params: dict[str, Any],
        state: dict[str, Any],
        x: jax.Array,
        *,
        train: bool,
        mask: jax.Array | None = None,
        key: Key = None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Feeds each method the output of the one before, the same mask and a key of its own."""
        new = {}
        for (name, method), part in zip(self._named(), self._keys(key), strict=True):
            x, new[name] = method.apply(
                params[name], state[name], x, train=train, mask=mask, key=part
            )
        return x, new

    def _named(self):
        return [(f"{type(method).__name__}_{i}", method) for i, method in enumerate(self.methods)]

    def _keys(self, key):
        number = len(self.methods)
        return [None] * number if key is None else list(jax.random.split(key, number))


def chain(*methods: Any) -> Chain:
    """A method that runs `methods` one after the other.

    Example:
      >>> import normjax as nj
      >>> len(nj.chain(nj.LayerNorm(use_scale=False), nj.Affine(use_bias=False)).methods)
      2
    """
    return Chain(methods)
