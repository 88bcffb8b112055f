"""What a model's norms and layers take from one another, read from the program that JAX makes."""

import collections
import dataclasses
import string
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from flax import linen, nnx
from jax.ad_checkpoint import checkpoint_name

import normjax.linen
import normjax.nnx
from normjax import modules, paths
from normjax.core.method import traits
from normjax.core.structs import several


class Layout(NamedTuple):
    """How a layer applies its kernel: axes of its input and output and those of the kernel."""

    inputs: dict[int, int]
    outputs: dict[int, int]  # increasing, as the axes of the bias
    rank: int
    groups: int = 1
    padded: bool = False  # with zeros, around the input or between its positions


def _dense(module, x, y):
    return Layout({x.ndim - 1: 0}, {y.ndim - 1: 1}, 2)


def _general(module, x, y):
    batch = tuple(getattr(module, "batch_axis", None) or getattr(module, "batch_dims", ()))
    axis = sorted(a % x.ndim for a in several(module.axis))
    features = len(several(getattr(module, "features", None) or module.out_features))
    inputs = {a: len(batch) + n for n, a in enumerate(axis)}
    rank = len(batch) + len(axis) + features
    outputs: dict[int, int] = {n: n for n in batch}
    outputs |= {y.ndim - n: rank - n for n in range(features, 0, -1)}
    return Layout(inputs, outputs, rank)


def _einsum(module, x, y):
    sides, result = module.einsum_str.replace(" ", "").split("->")
    left, kernel = sides.split(",")
    free = [c for c in string.ascii_letters if c not in module.einsum_str]
    dots = "".join(free[: x.ndim - len(left.replace("...", ""))])
    left, result = (side.replace("...", dots) for side in (left, result))
    outputs = {n: kernel.index(c) for n, c in enumerate(result) if c in kernel}
    inputs = {n: kernel.index(c) for n, c in enumerate(left) if c in kernel and c not in result}
    simple = (
        all(len(set(side)) == len(side) for side in (left, kernel, result)),
        set(left) <= set(kernel + result) and set(kernel) <= set(left + result),
        all([*axes.values()] == sorted(axes.values()) for axes in (inputs, outputs)),
    )
    return Layout(inputs, outputs, len(kernel)) if all(simple) else None


def _conv(module, x, y):
    sizes, padding = several(module.kernel_size), module.padding
    rank = len(sizes)
    if isinstance(padding, str):
        pads = padding not in ("VALID", "CIRCULAR", "REFLECT") and set(sizes) != {1}
    else:
        pads = any(jax.tree.leaves(padding))
    spreads = any(n > 1 for n in several(module.input_dilation or 1))
    axes = {x.ndim - 1: rank}, {y.ndim - 1: rank + 1}
    return Layout(*axes, rank + 2, module.feature_group_count, pads or spreads)


def _transposed(module, x, y):
    rank = len(several(module.kernel_size))
    swap = module.transpose_kernel
    axes = {x.ndim - 1: rank + swap}, {y.ndim - 1: rank + 1 - swap}
    return Layout(*axes, rank + 2, padded=True)


LAYERS = (
    (linen.Dense, _dense),
    (nnx.Linear, _dense),
    (linen.DenseGeneral, _general),
    (nnx.LinearGeneral, _general),
    (linen.Einsum, _einsum),
    (nnx.Einsum, _einsum),
    (linen.Conv, _conv),
    (nnx.Conv, _conv),
    (linen.ConvTranspose, _transposed),
    (nnx.ConvTranspose, _transposed),
)
NORMS = normjax.linen.Front, normjax.nnx.Norm


@dataclasses.dataclass
class Program:
    """The calls of norms and layers of a model, and what JAX's program of it does between them."""

    calls: dict[int, modules.Visit]
    producers: dict[int, int]  # of a call, that whose output it takes
    takers: dict[int, list[int | None]]  # those that take the output of a call; None: anything else
    repeated: set[int]  # calls in programs that JAX keeps and runs again
    uses: dict[tuple[str, ...], int]  # how often the program uses a variable

    @classmethod
    def of(cls, model, args, kwargs):
        """Traces a model whose norms and layers mark what they take and return."""
        calls = {}

        def mark(path, module, call, args, kwargs):
            if not (_layout(module) or isinstance(module, NORMS)):
                return call(*args, **kwargs)
            i = len(calls)
            marked = [checkpoint_name(x, f"{MARK}takes {i}") for x in args[:1]]
            output = checkpoint_name(call(*marked, *args[1:], **kwargs), f"{MARK}gives {i}")
            calls[i] = modules.Visit(path, module, args, kwargs, output)
            return output

        run, variables, arrays = modules.intercept(model, mark, *args, **kwargs)
        program = jax.make_jaxpr(run)(variables, arrays).jaxpr
        found = cls({}, {}, {}, set(), {})
        found._read(program)
        found.calls = {i: calls[i] for i in sorted(found.takers)}
        names, counts = paths.flatten(variables)[0], _uses(program)
        found.uses = {path: counts[v] for path, v in zip(names, program.invars, strict=False)}
        return found

    def _read(self, program):
        """Notes the marks of a program and of those inside of it."""
        users = collections.defaultdict(list)
        for eqn in program.eqns:
            for v in eqn.invars:
                if not hasattr(v, "val"):  # no constant
                    users[v].append(_mark(eqn, "takes"))
        for v in program.outvars:
            if not hasattr(v, "val"):
                users[v].append(None)
        for eqn in program.eqns:
            i = _mark(eqn, "gives")
            if i is not None:
                self.repeated |= {i} if i in self.takers else set()
                self.takers[i] = users[eqn.outvars[0]]
                self.producers |= {j: i for j in self.takers[i] if j is not None}
            for inner in _inside(eqn):
                self._read(inner)

    def name(self, i):
        return "/".join(map(str, self.calls[i].path))

    def norms(self):
        return [i for i, call in self.calls.items() if isinstance(call.module, NORMS)]

    def layers(self):
        return [i for i, call in self.calls.items() if _layout(call.module)]

    def method(self, i):
        module = self.calls[i].module
        return module.method if isinstance(module, normjax.nnx.Norm) else module.method_of()

    def norm(self, i):
        """The call of a norm; ValueError if it cannot be folded for how it is called."""
        call = self.calls[i]
        self._require_once(i)
        if not call.args:
            raise ValueError("its input is given by name")
        said = call.kwargs.get("use_running_average", call.args[1] if call.args[1:] else None)
        if traits(self.method(i)).trains and not _evaluates(call.module, said):
            raise ValueError("it is called for training, with statistics of the batch")
        return call

    def layout(self, i):
        """The layout of a call of a layer; None for one of a norm, or if it is not simple."""
        call = self.calls[i]
        layout = _layout(call.module)
        plain = len(call.args) == 1 and call.kwargs.keys() <= {"out_sharding"}
        return layout(call.module, call.args[0], call.output) if layout and plain else None

    def layer(self, i, edit):
        """Layout, how often stacked, kernel and bias of a layer; ValueError if it takes no norm."""
        call, name = self.calls[i], self.name(i)
        self._require_once(i)
        layout: Any = self.layout(i)
        if getattr(call.module, "mask", None) is not None:
            raise ValueError(f"{name} has a mask of its kernel")
        for leaf in ("kernel", "bias"):
            if self.uses.get(edit.leaf(call, leaf), leaf == "bias") != 1:
                raise ValueError(f"something else uses the {leaf} of {name} too")
        kernel, bias = edit.layer(call)
        x, y, depth = call.args[0], call.output, kernel.ndim - layout.rank
        own = kernel.shape[max(depth, 0) :]
        sizes = [(own[k] * layout.groups, x.shape[n]) for n, k in layout.inputs.items()]
        sizes += [(own[k], y.shape[n]) for n, k in layout.outputs.items()]
        if depth < 0 or any(a != b for a, b in sizes):
            shapes = f"{kernel.shape} for an input of shape {x.shape}"
            raise ValueError(f"the kernel of {name} is not stacked on axis 0, or divided: {shapes}")
        return layout, depth, kernel, bias

    def _require_once(self, i):
        path = self.calls[i].path
        times = sum(call.path == path for call in self.calls.values())
        if times > 1:
            raise ValueError(f"{self.name(i)} is called {times} times")
        if i in self.repeated:
            raise ValueError(f"{self.name(i)} runs in a `jit` that others run too")


MARK = "normjax.folding "


def _mark(eqn, kind):
    """The number in a mark of this kind; None for any other step of a program."""
    name = str(eqn.params.get("name")) if eqn.primitive.name == "name" else ""
    return int(name.split()[-1]) if name.startswith(f"{MARK}{kind} ") else None


def _inside(eqn) -> Iterator[Any]:
    """The programs in a step of a program."""
    for value in eqn.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            each = getattr(each, "jaxpr", each)
            if hasattr(each, "eqns"):
                yield each


def _uses(program, results=()):
    """How often each variable of a program is used in it, and in programs inside.

    `results` are the uses of what it returns, as `nnx.remat` returns all variables of a module.
    """
    counts = collections.Counter()
    for v, times in zip(program.outvars, results, strict=False):
        if not hasattr(v, "val"):
            counts[v] += times
    for eqn in reversed(program.eqns):
        inner = list(_inside(eqn))
        for part in inner:
            known = [counts[v] for v in eqn.outvars]
            own = _uses(part, known if len(known) == len(part.outvars) else [1] * len(part.outvars))
            for v, a in zip(reversed(eqn.invars), reversed(part.invars), strict=False):
                if not hasattr(v, "val"):
                    counts[v] += own[a]
        if not inner:
            counts.update(v for v in eqn.invars if not hasattr(v, "val"))
    return counts


def _layout(module):
    """How to find the layout of a layer; None for what is none.

    Of a subclass that has a call of its own nothing is known.
    """
    for kind, layout in LAYERS:
        if isinstance(module, kind) and type(module).__call__ is kind.__call__:
            return layout
    return None


def _evaluates(module, said):
    if isinstance(module, normjax.nnx.Norm):
        return module.use_running_average if said is None else said
    return module.evaluates(said)
