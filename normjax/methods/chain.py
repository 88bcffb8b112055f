"""Methods one after the other."""

import dataclasses
from typing import Any

import jax

from normjax.core import checks
from normjax.core.fields import Configuration
from normjax.core.method import Traits, feature_axes, traits
from normjax.core.structs import Axes, Features, Key, Mask


def _methods(value):
    if not isinstance(value, tuple):
        return "is not a sequence of methods"
    return None if value else "needs at least one method"


@dataclasses.dataclass(frozen=True)
class Chain(Configuration):
    """Runs methods one after the other; made by `chain`. Parameters and state are dicts by method.

    Composition as in optax, https://optax.readthedocs.io/en/latest/api/combining_optimizers.html

    Attributes:
      methods: the methods, first to last. ValueError if there is none, one is not a method, or they
        take one input in different ways.

    Example:
      >>> import jax, normjax as nj
      >>> method = nj.Chain((nj.RMSNorm(), nj.Affine(use_scale=False)))
      >>> sorted(method.init(jax.random.key(0), 4)[0])
      ['Affine_1', 'RMSNorm_0']
    """

    methods: tuple[Any, ...] = dataclasses.field(metadata=checks.rule(_methods))

    def __post_init__(self):
        super().__post_init__()
        for method in self.methods:
            checks.require("Chain", "method", method, checks.method)
        kinds = [item for method in self.methods for item in traits(method).inputs.items()]
        if len(set(kinds)) != len(dict(kinds)):
            raise ValueError(f"Chain: methods take one input in different ways: {kinds}.")

    @property
    def feature_axes(self) -> Axes:
        """The feature axes of the first method."""
        return feature_axes(self.methods[0])

    @property
    def traits(self) -> Traits:
        """Those of all methods together."""
        every = [traits(method) for method in self.methods]
        return Traits(
            trains=any(one.trains for one in every),
            random=any(one.random for one in every),
            inputs={name: kind for one in every for name, kind in one.inputs.items()},
        )

    def init(self, key: Key, features: Features) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parameters and state under "<class>_<position>"; `features` is the same for all."""
        params, state = {}, {}
        for name, method, part in self.named(key):
            params[name], state[name] = method.init(part, features)
        return params, state

    def apply(
        self,
        params: dict[str, Any],
        state: dict[str, Any],
        x: jax.Array,
        *,
        train: bool,
        mask: Mask = None,
        key: Key = None,
        **inputs: Any,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Feeds each method the output of the one before, the mask, its own key and its inputs."""
        if unknown := inputs.keys() - self.traits.inputs.keys():
            names = ", ".join(type(method).__name__ for method in self.methods)
            raise TypeError(f"Chain: no method of {names} takes an input {min(unknown)!r}.")
        new = {}
        for name, method, part in self.named(key):
            own = {k: value for k, value in inputs.items() if k in traits(method).inputs}
            x, new[name] = method.apply(
                params[name], state[name], x, train=train, mask=mask, key=part, **own
            )
        return x, new

    def named(self, key: Key) -> list[tuple[str, Any, Key]]:
        """The name, the method and the key of each."""
        number = len(self.methods)
        keys = [None] * number if key is None else list(jax.random.split(key, number))
        return [(f"{type(m).__name__}_{i}", m, keys[i]) for i, m in enumerate(self.methods)]


def chain(*methods: Any) -> Chain:
    """A method that runs `methods` one after the other.

    Example:
      >>> import normjax as nj
      >>> len(nj.chain(nj.LayerNorm(use_scale=False), nj.Affine(use_bias=False)).methods)
      2
    """
    return Chain(methods)
