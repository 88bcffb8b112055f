"""What the norms of a Flax model observe while it runs, and their statistics moved by it.

`observer(model, call)` runs a model as a pure function, for Linen and NNX alike, and returns beside
the output the statistics of the input of every norm that keeps some. It reaches the norms inside of
chains, of branches and of Flax's transforms, and shared norms are pooled over their calls.
"""

import abc
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict
from flax.typing import PathParts

import normjax.linen
import normjax.nnx
from normjax.core import statistics
from normjax.core.method import feature_sizes, observes, of_statistics, traits
from normjax.core.statistics import whole
from normjax.core.structs import from_dict, to_dict
from normjax.core.tracing import as_written
from normjax.methods.branches import MultiStats
from normjax.methods.chain import Chain
from normjax.methods.conditional import Preset
from normjax.methods.ghost_noise import NoiseState
from normjax.paths import require_fixed

__all__ = ["Observation", "Observer", "merge", "merge_stacked", "observer"]

SEEN = "observed"  # the variable beside the statistics of a norm that holds what it saw
STATISTICS = "batch_stats"
Call = Callable[..., Any]
Choose = Callable[[PathParts, Any], Any]
Move = Callable[[Any, Any, Any], Any]


class Observation(NamedTuple):
    """A run of a model: what it returned, what became of its variables, and what its norms saw.

    `seen` has for the path of each norm what its method's `observe` returned, without parts: of a
    chain a dict by link, of branches with those on axis 0, of stacked layers with these in front.

    Example:
      >>> import jax.numpy as jnp, normjax as nj, normjax.linen, normjax.observers as observers
      >>> norm, x = normjax.linen.BatchNorm(use_running_average=False), jnp.eye(2)
      >>> run = observers.observer(norm, lambda norm, x: norm(x))
      >>> run(norm.init(jax.random.key(0), x), x).seen[()].var.tolist()
      [0.25, 0.25]
    """

    output: Any
    variables: Any
    seen: dict[PathParts, Any]


@dataclasses.dataclass
class _Site:
    """A norm of a model: its method, and shapes of its state and of what it observes."""

    method: Any
    state: Any
    seen: Any


def merge(*seen: Any) -> Any:
    """Trees of statistics, such as `Observation.seen`, pooled node by node.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> seen = {"norm": nj.BatchNorm().observe(jnp.eye(2))}
      >>> merge(seen, seen)["norm"].count.tolist()
      [4.0, 4.0]
    """
    return merge_stacked(jax.tree.map(lambda *a: jnp.stack(a), *seen))


def merge_stacked(seen: Any) -> Any:
    """As `merge`, of trees that are stacked on axis 0.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> x = jnp.arange(12.0).reshape(2, 3, 2)
      >>> merge_stacked(jax.vmap(nj.BatchNorm().observe)(x)).mean.tolist()
      [5.0, 6.0]
    """
    return jax.tree.map(statistics.merge, seen, is_leaf=lambda node: hasattr(node, "_fields"))


def observer(
    model: linen.Module | nnx.Module,
    call: Call,
    *,
    train: bool | None = None,
    choose: Choose = lambda path, method: method,
) -> "Observer":
    """An `Observer` of a Linen or NNX model.

    Args:
      call: is called with the model, bound to its variables, and the further arguments of a run.
      train: whether norms that keep statistics train, whatever the model says; None: as it says,
        and only those in training are observed and move their statistics.
      choose: a function of path and method that says what a norm runs as; None: as it is, unseen.

    Raises:
      TypeError: for a model that is no module of Flax.

    Example:
      >>> import jax, jax.numpy as jnp, normjax.nnx, normjax.observers as observers
      >>> norm = normjax.nnx.BatchNorm(2, momentum=0.5, rngs=nnx.Rngs(0))
      >>> run = observers.observer(norm, lambda norm, x: norm(x))
      >>> found = run(nnx.state(norm), jnp.eye(2))
      >>> found.variables["mean"].get_value().tolist(), norm.mean.get_value().tolist()
      ([0.25, 0.25], [0.0, 0.0])
    """
    if isinstance(model, nnx.Module):
        return _NNXObserver(model, call, train, choose)
    if isinstance(model, linen.Module):
        return _LinenObserver(model, call, train, choose)
    raise TypeError(f"observer: {model!r} is not a module of flax.linen or flax.nnx.")


class Observer(abc.ABC):
    """Runs a model as a pure function and observes its norms; made by `observer`.

    Variables are the collections of a Linen model, or the `nnx.State` of one of NNX. `sites`, which
    the first run fills, has the norms by path.

    Example:
      >>> import jax.numpy as jnp, normjax.linen, normjax.observers as observers
      >>> norm, x = normjax.linen.BatchNorm(momentum=0.5), jnp.eye(2)
      >>> variables = norm.init(jax.random.key(0), x, True)
      >>> run = observers.observer(norm, lambda norm, x: norm(x, True), train=True)
      >>> seen = run(variables, x).seen
      >>> move = lambda method, state, seen: method.absorb(state, seen)
      >>> run.moved(variables, seen, move)["batch_stats"]["mean"].tolist()
      [0.25, 0.25]
    """

    def __init__(self, model: Any, call: Call, train: bool | None, choose: Choose):
        self.model, self.call = model, call
        self.sites: dict[PathParts, _Site] = {}
        self._train, self._choose = train, choose
        self._surveyed = False

    def __call__(self, variables: Any, *args: Any, rngs: Any = None) -> Observation:
        """Runs `call(model, *args)`; `rngs` are those of a Linen model."""
        if not self._surveyed:
            run = lambda variables, args, rngs: self._run(variables, args, rngs).output
            jax.eval_shape(run, variables, args, rngs)
            self._surveyed = True
        return self._run(variables, args, rngs)

    def moved(self, variables: Any, seen: Mapping[PathParts, Any], move: Move) -> Any:
        """`variables` with the state of every norm moved: `move(method, state, seen)` of it."""
        states = self.states(variables)
        return self.put(variables, {p: self._moved(p, states[p], seen[p], move) for p in seen})

    @abc.abstractmethod
    def states(self, variables: Any) -> dict[PathParts, Any]:
        """The states of the norms among `variables`, by path."""

    @abc.abstractmethod
    def put(self, variables: Any, states: Mapping[PathParts, Any]) -> Any:
        """`variables` with other states of the norms."""

    @abc.abstractmethod
    def _run(self, variables, args, rngs) -> Observation:
        """A run, in which `_normalize` is what every norm does."""

    def _normalize(self, path, method, variables, x, evaluate, mask, make_key, inputs):
        """What a norm returns, and its new state and what it saw, or None where it stays."""
        params, state = variables
        chosen = self._choose(path, method)
        watched = chosen is not None and jax.tree.leaves(state) != []
        forced = watched and self._train is not None
        train = bool(self._train) if forced else not evaluate
        runs = method if chosen is None else chosen
        key = make_key() if train and traits(runs).random else None
        how = dict(train=train, mask=mask, key=key)

        def run():
            if forced or (watched and train):
                return _follow(runs, params, state, x, how, inputs)
            y, new = runs.apply(params, state, x, **how, **inputs)
            return y, (new, None)

        try:
            y, (new, seen) = as_written(run, x)
        except _Unobserved as error:
            raise ValueError(f"{_name(path)}: {error}") from None
        if not self._surveyed and seen:
            features = feature_sizes(runs, x.shape)
            wanted = jax.eval_shape(lambda: runs.init(jax.random.key(0), features)[1])
            shape = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)
            self.sites[path] = _Site(runs, wanted, jax.tree.map(shape, seen))
        return y, new if train and not forced else None, seen

    def _nothing(self, path, state):
        """No values, for all that a norm observes, with the axes of stacked layers in front."""
        site, lead = self.sites[path], _lead(path, self.sites[path], state)
        return jax.tree.map(lambda a: jnp.zeros((*lead, *a.shape), a.dtype), site.seen)

    def _moved(self, path, state, seen, move):
        site = self.sites[path]
        run = functools.partial(_move, site.method, move=move)
        for _ in _lead(path, site, state):
            run = jax.vmap(run)
        return run(state, seen)


class _LinenObserver(Observer):
    def _run(self, variables, args, rngs):
        given, seen, paths = dict(variables), {}, list(self.sites)
        for path in paths:
            stats = _nested(given[STATISTICS])
            nothing = self._nothing(path, self._state(linen.unbox(stats), path))
            given[STATISTICS] = _put(stats, (*path, SEEN), nothing)
        # A collection of its own keeps the traces of nn.jit inside of the model apart from others.
        mutable = [*(name for name in given if name != "params"), SEEN]
        with linen.intercept_methods(self._intercept):
            run = linen.apply(self.call, self.model, mutable=mutable)
            output, updates = run(given, *args, rngs=rngs)
        new = {name: _nested(updates.get(name, given[name])) for name in given}
        for path in paths:
            new[STATISTICS], seen[path] = _pop(new[STATISTICS], (*path, SEEN))
        return Observation(output, _like(variables, new), seen)

    def _intercept(self, call, args, kwargs, context):
        module, of_norm = context.module, inspect.unwrap(normjax.linen.Front.__call__)
        if getattr(context.orig_method, "func", None) is not of_norm or module.is_initializing():
            return call(*args, **kwargs)
        return self._front(module, *args, **kwargs)

    def _front(self, module, x, use_running_average=None, *, mask=None, **inputs):
        path, method = module.path, module.method_of()
        evaluate = module.evaluates(use_running_average)
        given = x, evaluate, mask, lambda: module.make_rng("ghost"), inputs
        y, new, seen = self._normalize(path, method, module.unpack(x), *given)
        for name, value in to_dict(() if new is None else new).items():
            old = module.get_variable(STATISTICS, name)
            module.put_variable(STATISTICS, name, linen.meta.replace_boxed(old, value))
        if self._surveyed and path in self.sites and seen is not None:
            before = module.get_variable(STATISTICS, SEEN)
            module.put_variable(STATISTICS, SEEN, merge(before, seen))
        return y

    def states(self, variables: Any) -> dict[PathParts, Any]:
        stats = linen.unbox(_nested(variables.get(STATISTICS, {})))
        return {path: self._state(stats, path) for path in self.sites}

    def put(self, variables: Any, states: Mapping[PathParts, Any]) -> Any:
        new = dict(variables)
        for path, state in states.items():
            for at, value in flatten_dict(to_dict(state)).items():
                new = _put(new, (STATISTICS, *path, *at), value)
        return _like(variables, new)

    def _state(self, stats, path):
        here = functools.reduce(lambda tree, name: tree[name], path, stats)
        return from_dict(self.sites[path].state, here)


class _NNXObserver(Observer):
    def __init__(self, model, *how):
        super().__init__(model, *how)
        self._structure = nnx.split(model)[0]

    def _run(self, variables, args, rngs):
        model = nnx.merge(self._structure, variables, copy=True)
        norms, paths = dict(_norms(model)), list(self.sites)
        for path, module in norms.items():
            object.__setattr__(module, "__class__", _observed(type(module)))
            object.__setattr__(module, "_observer", (self, path))
            if path in paths:
                nothing = self._nothing(path, module.unpack()[1])
                setattr(module, SEEN, _Observed(nothing))
        output, seen = self.call(model, *args), {}
        for path in paths:
            seen[path] = getattr(norms[path], SEEN).get_value()
            delattr(norms[path], SEEN)
        nnx.pop(model, nnx.Intermediate)
        return Observation(output, nnx.state(model), seen)

    def front(self, path, module, x, evaluate, mask, inputs):
        variables = module.unpack()
        given = x, evaluate, mask, lambda: module.rngs(), inputs
        y, new, seen = self._normalize(path, module.method, variables, *given)
        if new is not None:
            module.pack(new)
        if self._surveyed and path in self.sites and seen is not None:
            variable = getattr(module, SEEN)
            variable.set_value(merge(variable.get_value(), seen))
        return y

    def states(self, variables: Any) -> dict[PathParts, Any]:
        norms = dict(_norms(nnx.merge(self._structure, variables, copy=True)))
        return {path: norms[path].unpack()[1] for path in self.sites}

    def put(self, variables: Any, states: Mapping[PathParts, Any]) -> Any:
        model = nnx.merge(self._structure, variables, copy=True)
        for path, module in _norms(model):
            if path in states:
                module.pack(states[path])
        return nnx.state(model)


class _Observed(nnx.Variable):
    """What a norm has observed in a run."""


@functools.cache
def _observed(kind):
    """A subclass of a module class of norms whose calls an observer makes."""

    class Observed(kind):
        def _normalize(self, x, evaluate, mask, inputs):
            observer, path = self._observer
            return observer.front(path, self, x, evaluate, mask, inputs)

    return Observed


def _norms(model):
    modules = nnx.iter_modules(model)
    return [(path, module) for path, module in modules if isinstance(module, normjax.nnx.Norm)]


class _Unobserved(ValueError):
    """A method whose statistics cannot be had, and why."""


def _follow(method, params, state, x, how, inputs):
    """Output, new state, and what `method` observes: of a chain, that of every link."""
    if isinstance(method, Preset):
        method = method.expand()
    if isinstance(method, Chain):
        new, seen = {}, {}
        for name, link, key in method.named(how["key"]):
            own = {k: value for k, value in inputs.items() if k in traits(link).inputs}
            part = params[name], state[name], x, how | {"key": key}, own
            x, (new[name], found) = _follow(link, *part)
            if found is not None:
                seen[name] = found
        return x, (new, seen)
    y, new = method.apply(params, state, x, **how, **inputs)
    return y, (new, _observe(method, state, x, how["mask"], inputs))


def _observe(method, state, x, mask, inputs):
    """What `method` observes of `x`, as constants; None if its state has no statistics."""
    if isinstance(method, Preset):
        method = method.expand()
    if not jax.tree.leaves(state) or isinstance(state, NoiseState):
        return None
    if isinstance(method, MultiStats):
        own = {name: value for name, value in inputs.items() if name != "branch"}
        seen = _observe(method.method, state, x, mask, own)
        branch = jnp.clip(jnp.asarray(inputs["branch"]), 0, method.num_branches - 1)
        here = jnp.arange(method.num_branches, dtype=branch.dtype) == branch
        spread = lambda a: jnp.where(here.reshape(-1, *(1,) * a.ndim), a, jnp.zeros((), a.dtype))
        return jax.tree.map(spread, seen)
    if not observes(method):
        raise _Unobserved(
            f"the statistics of {type(method).__name__} cannot be had: it, or a method inside of "
            "it, has no observe and absorb. Wrap the norms inside of a chain, not the chain."
        )
    seen = jax.lax.stop_gradient(whole(method.observe(x, mask, **of_statistics(inputs))))
    return _finite(seen) if getattr(_core(method), "skip_nonfinite", False) else seen


def _finite(seen):
    """No values in place of statistics that are not all finite."""
    good = jnp.all(jnp.isfinite(seen[1])) & jnp.all(jnp.isfinite(seen[2]))
    return jax.tree.map(lambda a: jnp.where(good, a, jnp.zeros((), a.dtype)), seen)


def _core(method):
    """The method that wrappers around one hold, whose state they have."""
    while hasattr(method, "method"):
        method = method.method
    return method


def _move(method, state, seen, *, move):
    """`move` of the methods with statistics that `method` is made of."""
    if isinstance(method, Preset):
        method = method.expand()
    if isinstance(method, Chain):
        links = {name: link for name, link, _ in method.named(None) if name in seen}
        new = {
            name: _move(link, state[name], seen[name], move=move) for name, link in links.items()
        }
        return state | new
    if isinstance(method, MultiStats):
        return jax.vmap(functools.partial(_move, method.method, move=move))(state, seen)
    return move(method, state, seen)


def _lead(path, site, state):
    """Sizes of the axes on which layers are stacked, in front of those of a state."""
    own, wanted = jax.tree.leaves(state), jax.tree.leaves(site.state)
    lead = own[0].shape[: own[0].ndim - wanted[0].ndim]
    if [a.shape for a in own] != [(*lead, *a.shape) for a in wanted]:
        raise ValueError(
            f"{_name(path)}: statistics of shapes {[a.shape for a in own]}, but {site.method!r} "
            f"has {[a.shape for a in wanted]}: stack layers on the first axis."
        )
    return lead


def _name(path):
    return "/".join(map(str, path)) or "the norm"


def _nested(tree):
    return tree.unfreeze() if isinstance(tree, FrozenDict) else tree


def _like(variables, new):
    """Collections with the containers and boxes of `variables`."""
    require_fixed(variables, new)
    restore = lambda old, new: jax.tree.unflatten(jax.tree.structure(old), jax.tree.leaves(new))
    made = {name: restore(old, new[name]) for name, old in variables.items()}
    return FrozenDict(made) if isinstance(variables, FrozenDict) else made


def _put(tree, path, value):
    """Nested dicts with `value` at `path`."""
    first, *rest = path
    return {**tree, first: _put(tree.get(first, {}), rest, value) if rest else value}


def _pop(tree, path):
    """Nested dicts without what is at `path`, and that."""
    first, *rest = path
    if not rest:
        return {name: part for name, part in tree.items() if name != first}, tree[first]
    part, value = _pop(tree[first], rest)
    return {**tree, first: part}, value
