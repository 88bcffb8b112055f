"""Parameters and statistics from and to other libraries, and checkpoints that know their norms.

Arrays of torch (torchvision, timm), haiku, keras and equinox become the variables of a Flax model,
and back: names, layouts of kernels, variances. No other library is imported. Files are safetensors,
which need the package of that name.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

import normjax.linen
import normjax.nnx
from normjax import modules
from normjax.core import checks
from normjax.paths import flatten, matches

__all__ = [
    "Exchange",
    "batch_norm_fields",
    "check_configuration",
    "configuration",
    "load",
    "save",
]

Library = Literal["torch", "haiku", "keras", "equinox"]
Rename = Mapping[str, str] | Callable[[str], str] | None
METADATA = "normjax"  # the entry in the metadata of a file
PLACING = ("param_dtype", "axis_name", "axis_index_groups")  # fields that change no number
SHAPES = "shapes that differ (of a transposed convolution only `calls` tell)"


class _Rules(NamedTuple):
    """How a library stores what Flax has: names, and the order of the axes of kernels.

    In an order "O" is the axis of outputs, "I" that of inputs, "*" those of positions. `flips`: a
    transposed convolution has the kernel of the convolution that it transposes; else it slides its
    kernel over the input as it is.
    """

    leaves: Mapping[str, tuple[str, ...]]  # the names that Flax may have for a name
    derived: frozenset[str] = frozenset()  # what Flax may lack, for it follows from the rest
    kernel: str = "*IO"
    transposed: str = "*OI"
    flips: bool = False
    unbiased: bool = False  # whether running variances are divided by n - 1


WEIGHT = {"weight": ("kernel", "scale", "embedding"), "bias": ("bias",)}
RUNNING = {"running_mean": ("mean",), "running_var": ("var",)}
COUNTERS = frozenset({"mean_ema/counter", "var_ema/counter"})
HIDDEN = frozenset({"mean_ema/hidden", "var_ema/hidden"})
LIBRARIES = {
    "torch": _Rules(
        WEIGHT | RUNNING | {"num_batches_tracked": ("count",)},
        frozenset({"num_batches_tracked"}),
        kernel="OI*",
        transposed="IO*",
        flips=True,
        unbiased=True,
    ),
    "haiku": _Rules(
        {
            "w": ("kernel",),
            "b": ("bias",),
            "offset": ("bias",),
            "embeddings": ("embedding",),
            "mean_ema/average": ("mean",),
            "var_ema/average": ("var",),
            "mean_ema/counter": ("count",),
        },
        COUNTERS | HIDDEN,
    ),
    "keras": _Rules(
        {
            "gamma": ("scale",),
            "beta": ("bias",),
            "moving_mean": ("mean",),
            "moving_variance": ("var",),
            "embeddings": ("embedding",),
        },
        flips=True,
    ),
    "equinox": _Rules(WEIGHT | RUNNING, kernel="OI*", transposed="OI*"),
}


class _Pair(NamedTuple):
    """An array and the leaf of Flax that it is: their positions, the module's path, the name."""

    array: int
    leaf: int | None  # None: none, for the array is derived
    module: str
    name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    r"""Between the arrays of another library and the variables of a Flax model, both ways.

    Every leaf of the model is exactly one array, and every array is one leaf; shapes agree. Paths
    are written with slashes, whatever the library writes. An array belongs to the module that has
    its path, after `rename`, and is there:

    | library | scale, bias | mean, var | kernel |
    | --- | --- | --- | --- |
    | torch | weight, bias | running_mean, running_var | weight [out, in, ...] |
    | haiku | scale, offset | mean_ema/average, var_ema/average | w [..., in, out] |
    | keras | gamma, beta | moving_mean, moving_variance | kernel [..., in, out] |
    | equinox | weight, bias | running_mean, running_var | weight [out, in, ...] |

    Other names are the same. Shapes may differ by axes of size one, as in haiku's [1, 1, 1, C] and
    equinox's [C, 1, 1]. Kernels of keras' depthwise layers are those of grouped convolutions. A
    counter is a leaf `count`, or left out, and so is haiku's `hidden`, which is
    `average * (1 - decay_rate**counter)`. Equinox has statistics apart from the model: name those
    of mode "ema" running_mean and running_var; those of mode "batch" are divided by
    `1 - momentum**counter` in evaluation, so divide them.

    What arrays do not tell: padding, and epsilon and momentum (`batch_norm_fields`). A dense layer
    behind a flattened image has its inputs in the order [C, H, W] in torch: order its weight anew,
    by `w.reshape(-1, C, H, W).transpose(0, 2, 3, 1).reshape(len(w), -1)`.

    Attributes:
      library: "torch" (timm too), "haiku", "keras" or "equinox".
      rename: the path of a module of the model for that of the library: a function, or regular
        expressions and what `re.sub` puts in their place, one after the other, such as
        `{r"layer(\d)/(\d)": r"layer\1_\2"}`.
      calls: what `modules.visit` returns for the model. It tells transposed convolutions, which
        without it are taken for convolutions, and the fields of norms, for the next three.
      epsilon: that of the library's norms, by pattern of module paths or of all: ValueError where
        a norm of the model has another one. It needs `calls`.
      scale_offset: what norms of the library add to their scales, such as 1 in Gemma. With `calls`
        what norms of the model add is subtracted; without, both must add the same.
      samples: of how many values a variance was in training, by pattern of module paths or of all.
        Where one side divides variances by n - 1 (torch; the field `unbiased_running_var`) and
        the other by n, they are converted. None: they stay.
      ignore: patterns of arrays that are not for the model, such as "head"; `*` crosses slashes.
      keep: patterns of leaves of the model, such as "params/head", that are not in the arrays.

    Raises:
      ValueError: for a field out of range. In the methods, for arrays that are no leaf, leaves that
        are no array, and shapes that differ, each listed; for a pattern that matches nothing.
      TypeError: for `rename` of another kind. In the methods, for what is no array of numbers.

    Example:
      >>> import jax, flax.linen as nn, normjax.linen, numpy as np, normjax.interop as interop
      >>> model = nn.Sequential([nn.Conv(4, (3, 3)), normjax.linen.GroupNorm(2)])
      >>> variables = model.init(jax.random.key(0), np.ones((1, 5, 5, 3)))
      >>> shapes = {"0.weight": (4, 3, 3, 3), "0.bias": (4,), "1.weight": (4,), "1.bias": (4,)}
      >>> arrays = {name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()}
      >>> torch = interop.Exchange("torch", rename={"^": "layers_"})
      >>> variables = torch.to_flax(arrays, variables)
      >>> variables["params"]["layers_1"]["scale"].tolist()
      [0.5, 0.5, 0.5, 0.5]
      >>> torch.from_flax(variables, like=arrays)["0.weight"].shape
      (4, 3, 3, 3)
    """

    library: Library = dataclasses.field(kw_only=False)
    rename: Rename = None
    calls: Sequence[modules.Visit] = ()
    epsilon: float | Mapping[str, float] | None = None
    scale_offset: float = 0.0
    samples: int | Mapping[str, int] | None = None
    ignore: Collection[str] = ()
    keep: Collection[str] = ()

    def __post_init__(self):
        checks.require("Exchange", "library", self.library, checks.one_of(*LIBRARIES))
        if not (self.rename is None or callable(self.rename) or isinstance(self.rename, Mapping)):
            rule = "is no mapping of regular expressions and no function of a path"
            raise TypeError(f"Exchange: rename={self.rename!r} {rule}.")
        checks.require("Exchange", "scale_offset", self.scale_offset, checks.interval())
        for name in ("epsilon", "scale_offset"):
            value = getattr(self, name)
            hint = "it needs the fields of the model's norms: give calls=modules.visit(model, ...)."
            if value and not self.calls:
                raise ValueError(f"Exchange: {name}={value!r} without calls: {hint}")

    def to_flax(self, arrays: Any, target: Any) -> Any:
        """Variables with the structure of `target` and the numbers of `arrays`.

        Args:
          arrays: by name, such as a `state_dict` or what `safetensors.numpy.load_file` returns, or
            nested, such as haiku's `{**params, **state}`: NumPy's, JAX's, or what converts.
          target: variables of Linen, or a state of NNX, `nnx.state(model, (nnx.Param,
            nnx.BatchStat))`. They give structure, shapes, dtypes and shardings, and may hold
            `jax.ShapeDtypeStruct`s.
        """
        names, values, _ = _named(arrays)
        paths, leaves, structure = flatten(target)
        pairs = [p for p in self._pairs(names, target) if p.leaf is not None]
        self._check_epsilon(pairs)
        wrong = []
        for pair, factor in zip(pairs, self._factors(pairs), strict=True):
            a, like = _array(names[pair.array], values[pair.array]), leaves[pair.leaf]
            order, flipped = self._layout(pair, a.ndim)
            moved = np.flip(a.transpose(order), flipped)
            if self._fits(pair, moved.shape, like.shape):
                moved = _scaled(moved, factor, self._shift(pair)).reshape(like.shape)
                leaves[pair.leaf] = _placed(moved, like)
            else:
                both = f"{a.shape} for {'/'.join(paths[pair.leaf])} {tuple(like.shape)}"
                wrong.append(f"{names[pair.array]} {both}")
        _refuse("Exchange", {SHAPES: wrong})
        return structure.unflatten(leaves)

    def from_flax(
        self, variables: Any, like: Any, *, updates: int = 0, momentum: float | None = None
    ) -> Any:
        """Arrays of NumPy with the names, shapes and dtypes of `like`: the inverse of `to_flax`.

        Args:
          variables: variables of Linen or a state of NNX.
          like: a state of the other library's model, such as a `state_dict`: arrays, tensors of
            torch, or shapes with dtypes. Those that `ignore` names are returned as they are.
          updates: how many steps the statistics are of, for counters, where the norms do not count.
          momentum: haiku's `decay_rate`, for its `hidden`: ValueError where it is needed and is not
            in [0, 1), or there are no updates.
        """
        names, models, structure = _named(like)
        paths, leaves, _ = flatten(variables)
        every = self._pairs(names, variables)
        pairs = [p for p in every if p.leaf is not None]
        found, wrong, made = {}, [], list(models)
        for pair, factor in zip(pairs, self._factors(pairs), strict=True):
            a, model = _array("/".join(paths[pair.leaf]), leaves[pair.leaf]), models[pair.array]
            order, flipped = self._layout(pair, len(model.shape))
            moved = tuple(model.shape[i] for i in order)
            if self._fits(pair, moved, a.shape):
                found[pair.module, pair.name] = a
                b = _scaled(a, 1 / factor, -self._shift(pair)).reshape(moved)
                made[pair.array] = _like(np.flip(b, flipped).transpose(np.argsort(order)), model)
            else:
                both = f"{tuple(model.shape)} of {'/'.join(paths[pair.leaf])} {a.shape}"
                wrong.append(f"{names[pair.array]} {both}")
        _refuse("Exchange", {SHAPES: wrong})
        for pair in every:
            if pair.leaf is None:
                n = int(found.get((pair.module, "count"), updates))
                made[pair.array] = _like(_derived(pair, found, n, momentum), models[pair.array])
        return structure.unflatten(made)

    @functools.cached_property
    def _known(self) -> dict[str, Any]:
        """The modules of the model by path; of the norms of this package their methods."""
        return {"/".join(map(str, call.path)): _method(call.module) for call in self.calls}

    def _pairs(self, names, target):
        """What each array is in the target: ValueError unless that is one leaf each, and all."""
        paths, *_ = flatten(target)
        index = {place: i for i, place in enumerate(_places(target, paths))}
        rules = LIBRARIES[self.library]
        split = [_split(rules, name) for name in names]
        ignored = matches("Exchange: ignore", [tuple(n.split("/")) for n in names], self.ignore)
        taken = matches("Exchange: keep", paths, self.keep)
        pairs, extra, twice = [], [], []
        for i, module in enumerate(_renamed([module for module, _ in split], self.rename)):
            name = split[i][1]
            options = rules.leaves.get(name, (name,))
            j = next((index[module, n] for n in options if (module, n) in index), None)
            if i in ignored:
                continue
            if j is not None and j not in taken:
                taken.add(j)
                pairs.append(_Pair(i, j, module, paths[j][-1]))
            elif j is not None:
                twice.append(f"{names[i]} for {'/'.join(paths[j])}")
            elif name in rules.derived:
                pairs.append(_Pair(i, None, module, name))
            else:
                extra.append(f"{names[i]} for {' or '.join(f'{module}/{n}' for n in options)}")
        missing = ["/".join(path) for i, path in enumerate(paths) if i not in taken]
        problems = {
            "arrays without a leaf (`rename` the modules, or `ignore` the arrays)": extra,
            "leaves without an array (`rename` the modules, or `keep` the leaves)": missing,
            "arrays for leaves that are kept, or that another array is": twice,
        }
        _refuse("Exchange", problems)
        return pairs

    def _check_epsilon(self, pairs):
        """ValueError where a norm of the model has another epsilon than the library's."""
        found = {p.module: getattr(self._known.get(p.module), "epsilon", None) for p in pairs}
        found = {path: value for path, value in found.items() if value is not None}
        wanted = _per_path("Exchange: epsilon", self.epsilon, list(found))
        wrong = [
            f"{path}: {found[path]} in the model and {value} in the library"
            for path, value in zip(found, wanted, strict=True)
            if value is not None and not math.isclose(found[path], value, rel_tol=1e-6)
        ]
        _refuse("Exchange", {"norms with another epsilon": wrong})

    def _factors(self, pairs):
        """By what each array is multiplied: running variances, for what they are divided by."""
        at = [i for i, pair in enumerate(pairs) if pair.name == "var"]
        wanted = _per_path("Exchange: samples", self.samples, [pairs[i].module for i in at])
        factors = [1.0] * len(pairs)
        for i, n in zip(at, wanted, strict=True):
            if n is None:
                continue
            if checks.positive(n) or n == 1:
                raise ValueError(f"Exchange: samples={n!r} is not an integer > 1.")
            ours = getattr(self._known.get(pairs[i].module), "unbiased_running_var", False)
            factors[i] = (n / (n - 1)) ** (int(ours) - int(LIBRARIES[self.library].unbiased))
        return factors

    def _layout(self, pair, ndim):
        """The axes of an array of the library in Flax's order, and which of these are reversed."""
        if pair.name != "kernel" or ndim < 2:
            return tuple(range(ndim)), ()
        rules, module = LIBRARIES[self.library], self._known.get(pair.module)
        transposed = isinstance(module, linen.ConvTranspose | nnx.ConvTranspose)
        whole = transposed and module.transpose_kernel  # that of the convolution it transposes
        theirs = _spread(rules.transposed if transposed else rules.kernel, ndim)
        ours = _spread("*OI" if whole else "*IO", ndim)
        flipped = range(ndim - 2) if transposed and rules.flips != whole else ()
        return tuple(theirs.index(axis) for axis in ours), tuple(flipped)

    def _fits(self, pair, shape, wanted):
        """Whether an array, its axes in Flax's order, is one of the wanted shape but for ones."""
        kernel = pair.name == "kernel"
        if self.library == "keras" and kernel and (*shape[:-2], 1, math.prod(shape[-2:])) == wanted:
            return True  # of a depthwise layer
        same = [n for n in shape if n != 1] == [n for n in wanted if n != 1]
        return same and (not kernel or shape[-2:] == wanted[-2:])

    def _shift(self, pair):
        """What is added to an array of the library: to scales that are learned around zero."""
        if pair.name != "scale" or pair.module not in self._known:
            return 0.0
        return self.scale_offset - getattr(self._known[pair.module], "scale_offset", 0.0)


def batch_norm_fields(
    library: Library, *, momentum: float | None, epsilon: float
) -> dict[str, Any]:
    """Fields of `BatchNorm` and its relatives for the arguments of another library's batch norm.

    torch's momentum weighs the new statistics (`1 - momentum` here; None: all batches alike), and
    its running variances are divided by n - 1. haiku debiases its averages. Keras and equinox mean
    what is meant here; equinox's averages begin with the first batch. Defaults: torch 0.1 and 1e-5,
    haiku no momentum and 1e-5, keras 0.99 and 1e-3, equinox 0.99 and 1e-5. ValueError for a number
    out of range.

    Example:
      >>> import normjax as nj, normjax.interop as interop
      >>> norm = nj.BatchNorm(**interop.batch_norm_fields("torch", momentum=0.1, epsilon=1e-5))
      >>> norm.momentum, norm.unbiased_running_var
      (0.9, True)
    """
    name = "batch_norm_fields"
    checks.require(name, "library", library, checks.one_of(*LIBRARIES))
    checks.require(name, "epsilon", epsilon, checks.interval(0))
    fields = {"epsilon": epsilon, "unbiased_running_var": LIBRARIES[library].unbiased}
    if library == "torch" and momentum is None:
        return fields | {"running_average": "cumulative"}
    checks.require(name, "momentum", momentum, checks.interval(0, 1))
    debiased = {"running_average": "debiased"} if library == "haiku" else {}
    weight: Any = momentum
    return fields | debiased | {"momentum": 1 - weight if library == "torch" else weight}


def configuration(model: linen.Module | nnx.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The fields of a model's norms by path, as JSON: for a checkpoint, beside its arrays.

    Left out are initializers and what places arrays (`param_dtype`, `axis_name`,
    `axis_index_groups`): the parameters tell what these made. Functions are written by name. The
    arguments are those of `modules.norms`: Linen needs variables and inputs, NNX none.

    Example:
      >>> import jax.numpy as jnp, flax.nnx as nnx, normjax.nnx, normjax.interop as interop
      >>> model = nnx.Sequential(normjax.nnx.LayerNorm(4, epsilon=1e-5, rngs=nnx.Rngs(0)))
      >>> interop.configuration(model)["layers/0"]["epsilon"]
      1e-05
    """
    found = modules.norms(model, *args, **kwargs)
    return {"/".join(map(str, path)): _as_json(method) for path, method in found.items()}


def check_configuration(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """ValueError unless two configurations are equal, with each path, field and both values.

    `saved` is that of a checkpoint, `current` what `configuration` returns for the model. Fields
    that only one of them has, as another version of normjax wrote it, must have their default.

    Example:
      >>> import normjax.interop as interop
      >>> saved = {"norm": {"class": "RMSNorm", "epsilon": 1e-5}}
      >>> interop.check_configuration(saved, {"norm": {"class": "RMSNorm", "epsilon": 1e-6}})
      Traceback (most recent call last):
      ValueError: check_configuration: the checkpoint is of other norms than the model:
        norm: epsilon is 1e-05 in the checkpoint and 1e-06 in the model
      Give the norms of the model these fields, or the checkpoint another model.
    """
    lines = list(_differences(saved, current))
    if lines:
        raise ValueError(
            "check_configuration: the checkpoint is of other norms than the model:\n  "
            + "\n  ".join(lines)
            + "\nGive the norms of the model these fields, or the checkpoint another model."
        )


def save(file: Any, variables: Any, configuration: Mapping[str, Any]) -> None:
    """Writes variables of Linen, or a state of NNX, and the configuration of norms as safetensors.

    An array is named by its path, with slashes, and keeps its dtype. The configuration is in the
    metadata of the file. TypeError for what is no array of numbers, such as keys of random numbers:
    give `nnx.state(model, (nnx.Param, nnx.BatchStat))`. ImportError without safetensors.

    Example:
      >>> import os, tempfile, jax, jax.numpy as jnp, normjax.linen, normjax.interop as interop
      >>> model, x = normjax.linen.RMSNorm(param_dtype=jnp.bfloat16), jnp.ones((2, 4))
      >>> variables = model.init(jax.random.key(0), x)
      >>> fields = interop.configuration(model, variables, x)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = os.path.join(folder, "model.safetensors")
      ...     interop.save(file, variables, fields)
      ...     print(interop.load(file, variables, fields)["params"]["scale"].dtype)
      bfloat16
    """
    _, save_file = _safetensors()
    names, values, _ = _joined("save", variables)
    arrays = {name: _array(name, a) for name, a in zip(names, values, strict=True)}
    contiguous = {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in arrays.items()}
    save_file(contiguous, file, metadata={METADATA: json.dumps(dict(configuration))})


def load(file: Any, target: Any, configuration: Mapping[str, Any]) -> Any:
    """Variables with the structure of `target` from a file of `save`.

    `configuration` is that of the model; the one in the file must be equal. `target` holds arrays,
    whose shardings are kept, or `jax.ShapeDtypeStruct`s. ValueError if names, shapes, dtypes or
    configurations differ, each listed, or if the file has no configuration: read what another
    library wrote by `safetensors.numpy.load_file` and `Exchange`. ImportError without
    safetensors.

    Example:
      >>> import os, tempfile, flax.nnx as nnx, normjax.nnx, normjax.interop as interop
      >>> model = normjax.nnx.BatchNorm(4, rngs=nnx.Rngs(0))
      >>> fields, state = interop.configuration(model), nnx.state(model)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = os.path.join(folder, "model.safetensors")
      ...     interop.save(file, state, fields)
      ...     nnx.update(model, interop.load(file, state, fields))
    """
    safe_open, _ = _safetensors()
    with safe_open(file, framework="np") as opened:
        text = (opened.metadata() or {}).get(METADATA)
        arrays = {name: opened.get_tensor(name) for name in opened.keys()}
    if text is None:
        raise ValueError(
            f"load: {file} has no configuration of norms, so `save` did not write it. "
            "Read its arrays by safetensors.numpy.load_file, and give them to Exchange."
        )
    check_configuration(json.loads(text), configuration)
    names, leaves, structure = _joined("load", target)
    about = lambda a: f"{jnp.dtype(a.dtype)}{list(a.shape)}"
    both = [n for n in names if n in arrays]
    of = dict(zip(names, leaves, strict=True))
    different = [n for n in both if about(arrays[n]) != about(of[n])]
    problems = {
        "leaves that the file does not have": [n for n in names if n not in arrays],
        "arrays that the target does not have": sorted(arrays.keys() - of.keys()),
        "in the file and in the target": [
            f"{n} {about(arrays[n])} and {about(of[n])}" for n in different
        ],
    }
    _refuse("load", problems)
    return structure.unflatten(_placed(arrays[n], of[n]) for n in names)


def _method(module):
    if isinstance(module, normjax.linen.Front):
        return module.method_of()
    return module.method if isinstance(module, normjax.nnx.Norm) else module


def _named(arrays):
    """Names with slashes, without what says nothing, of what may be arrays; and the structure."""
    paths, values, structure = flatten(arrays)
    names = ["/".join(path).removesuffix(":0").replace(".", "/") for path in paths]
    return ["/".join(n for n in name.split("/") if n != "~") for name in names], values, structure


def _split(rules, name):
    """The path of a module, and the library's name of the array in it, of one or two parts."""
    parts = name.split("/")
    two = "/".join(parts[-2:])
    size = 2 if two in rules.leaves or two in rules.derived else 1
    return "/".join(parts[:-size]), "/".join(parts[-size:])


def _renamed(names, rename):
    if callable(rename):
        return [rename(name) for name in names]
    for pattern, new in (rename or {}).items():
        if not any(re.search(pattern, name) for name in names):
            some = ", ".join(list(dict.fromkeys(names))[:5])
            raise ValueError(f"Exchange: rename of {pattern!r} matches none of {some}, ...")
        names = [re.sub(pattern, new, name) for name in names]
    return names


def _places(target, paths):
    """Module and name of each leaf; the collections of Linen are no part of it."""
    linen_variables = isinstance(target, Mapping) and not isinstance(target, nnx.State)
    start = int(linen_variables and not {"params", "batch_stats"}.isdisjoint(target))
    return [("/".join(path[start:-1]), path[-1]) for path in paths]


def _per_path(function, value, paths):
    """A value for each path: that of the last pattern that matches it, or of all, or None."""
    if not isinstance(value, Mapping):
        return [value] * len(paths)
    values = [None] * len(paths)
    for pattern, one in value.items():
        for i in matches(function, [tuple(path.split("/")) for path in paths], [pattern]):
            values[i] = one
    return values


def _spread(order, ndim):
    """The axes of an order, those of positions by number."""
    positions = [str(i) for i in range(ndim - 2)]
    return [axis for part in order for axis in (positions if part == "*" else part)]


def _scaled(a, factor, shift):
    return a if (factor, shift) == (1, 0) else a.astype(np.float64) * factor + shift


def _derived(pair, found, updates, momentum):
    """What the other library stores besides: a counter, or a sum that is not debiased."""
    if pair.name not in HIDDEN:
        return updates
    if momentum is None or checks.interval(0, 1)(momentum) or momentum == 1 or updates < 1:
        raise ValueError(
            f"Exchange: momentum={momentum!r} with updates={updates}, but {pair.module}/"
            f"{pair.name} is average * (1 - momentum**updates): give momentum in [0, 1), which "
            "haiku calls decay_rate, and updates > 0."
        )
    average = found[pair.module, "mean" if pair.name.startswith("mean") else "var"]
    return average * -math.expm1(updates * math.log(max(momentum, 1e-30)))


def _array(name, value):
    """An array of NumPy; TypeError for what is no array of numbers."""
    try:
        a = np.asarray(value)
    except TypeError as error:
        raise TypeError(
            f"{name}: {error} (Arrays must convert to NumPy: tensors of torch in bfloat16 go by "
            "way of safetensors; of a state of NNX take parameters and statistics, "
            "`nnx.state(model, (nnx.Param, nnx.BatchStat))`.)"
        ) from error
    if not (jnp.issubdtype(a.dtype, np.number) or a.dtype == bool):
        raise TypeError(f"{name}: {type(value).__name__} is no array of numbers.")
    return a


def _placed(a, like):
    """`a` with the dtype of `like`, on its devices."""
    a = np.asarray(a).astype(like.dtype)
    if isinstance(like, jax.Array) and len(like.sharding.device_set) > 1:
        return jax.device_put(a, like.sharding)
    return jnp.asarray(a)


def _like(value, model):
    """`value` as an array of NumPy with the shape and dtype of an array, or a tensor of torch."""
    dtype = jnp.dtype(str(model.dtype).removeprefix("torch."))
    return np.array(value, dtype, order="C").reshape(tuple(model.shape))


def _refuse(function, problems):
    """ValueError that lists problems by kind, if there are any."""
    lines = [f"{kind}: {', '.join(found)}" for kind, found in problems.items() if found]
    if lines:
        raise ValueError(f"{function}: " + "; ".join(lines) + ".")


def _as_json(value):
    """A field as JSON: methods by class and fields, functions by name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        kept = {n: v for n, v in fields.items() if _counts(n)}
        if kept.get("dtype") is not None:
            kept["dtype"] = jnp.dtype(kept["dtype"]).name
        return {"class": type(value).__name__} | {n: _as_json(v) for n, v in kept.items()}
    if isinstance(value, tuple | list):
        return [_as_json(v) for v in value]
    if isinstance(value, functools.partial):
        parts = (value.func, list(value.args), list(value.keywords.items()))
        return [_as_json(v) for v in parts]
    if isinstance(value, Mapping):
        return {str(name): _as_json(v) for name, v in value.items()}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__name__", type(value).__name__)


def _differences(saved, current):
    """A line for each field, or norm, in which two configurations differ."""
    for path in dict.fromkeys((*saved, *current)):
        if path not in saved or path not in current:
            yield f"{path}: a norm of the {'checkpoint' if path in saved else 'model'} alone"
            continue
        old, new = dict(_fields(saved[path])), dict(_fields(current[path]))
        unlike = [f for f in dict.fromkeys((*old, *new)) if _text(old, f) != _text(new, f)]
        other = [f.removesuffix("class") for f in unlike if f.split("/")[-1] == "class"]
        for field in unlike:  # of another class the class alone
            if not any(field.startswith(start) and field != f"{start}class" for start in other):
                values = f"{_text(old, field)} in the checkpoint and {_text(new, field)}"
                yield f"{path}: {field} is {values} in the model"


def _text(fields, name):
    return json.dumps(fields[name]).strip('"') if name in fields else "absent"


def _fields(value, at=""):
    """Names and values of fields, those of inner methods behind a slash."""
    if isinstance(value, Mapping):
        pairs = {**_defaults(value.get("class")), **value}.items()
    elif isinstance(value, list) and value:
        pairs = enumerate(value)
    else:
        yield at, value
        return
    for name, part in pairs:
        yield from _fields(part, f"{at}/{name}" if at else str(name))


def _defaults(name):
    """The fields of a class of this package that have a default, as JSON."""
    fields = getattr(getattr(normjax, str(name), None), "__dataclass_fields__", {}).values()
    made = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    return {n: _as_json(v) for n, v in made.items() if _counts(n)}


def _counts(field):
    return not (field.endswith("_init") or field in PLACING)


def _joined(function, tree):
    """Names of leaves, which must differ, leaves, and structure."""
    paths, leaves, structure = flatten(tree)
    names = ["/".join(path) for path in paths]
    if len(set(names)) < len(names):
        doubled = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{function}: several leaves have one path: {', '.join(doubled)}.")
    return names, leaves, structure


def _safetensors():
    try:
        from safetensors import safe_open
        from safetensors.numpy import save_file
    except ImportError as error:
        raise ImportError(
            "save and load of normjax.interop need safetensors: pip install 'safetensors>=0.5.3'"
        ) from error
    return safe_open, save_file
