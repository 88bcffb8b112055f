"""How deep a residual network is in effect: the paths through it, their lengths and weights.

Littwin & Wolf, *The Loss Surface of Residual Networks: Ensembles and the Role of Batch
Normalization*, 2016, https://arxiv.org/abs/1611.02525. A network of L blocks, each a skip plus a
branch, is the sum of 2^L paths, which take one of the two in every block. If branch l is `g_l`
times as large as its skip, the paths of k branches weigh together what t^k does in
`prod_l (1 + g_l t)`. With one gain for all it is the paper's eps_r, of p = L + 1 layers.

`measure` finds the blocks of a Flax model and their gains; `path_lengths` makes the distribution
of lengths of gains, exactly; `sample` checks it by the gradients of single paths; `table`,
`summary` and `distributions` list all over training, as `figures.plot` draws them.
"""

import collections
import functools
import itertools
import math
import operator
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax import lax
from numpy.typing import ArrayLike

from normjax import paths
from normjax.analysis import layers, programs
from normjax.core import checks

Weights = Literal["amplitude", "energy", "squared"]
WEIGHT_LAYERS = ("dot_general", "conv_general_dilated", "ragged_dot_general")


class Lengths(NamedTuple):
    """A distribution of path lengths, or one for each of several networks; float64.

    Example:
      >>> from normjax.analysis import depth
      >>> found = depth.path_lengths([1.0, 1.0])
      >>> found.share.tolist(), float(found.mean), int(found.mode), *map(int, found.band(0.5))
      ([0.25, 0.5, 0.25], 2.0, 2, 2, 2)
    """

    length: np.ndarray  # i[L + 1]
    share: np.ndarray  # f[..., L + 1], with sum 1

    @property
    def mean(self) -> np.ndarray:
        """The mean length, f[...]."""
        return self.share @ self.length

    @property
    def mode(self) -> np.ndarray:
        """The length with the largest share, i[...]; of several the first."""
        return self.length[np.argmax(self.share, -1)]

    @property
    def deviation(self) -> np.ndarray:
        """The standard deviation of the length, f[...]."""
        gap = self.length - self.mean[..., None]
        return np.sqrt(np.sum(self.share * np.square(gap), -1))

    def band(self, share: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """The central lengths: outside lies on either side at most half of what `share` leaves."""
        checks.require("band", "share", share, checks.interval(0, 1))
        below, tail = np.cumsum(self.share, -1), (1 - share) / 2
        low = np.sum(below <= tail + 1e-12, -1)
        high = np.sum(below < 1 - tail - 1e-12, -1)
        return self.length[low], self.length[np.minimum(high, len(self.length) - 1)]


def path_lengths(gains: ArrayLike, *, weights: Weights = "amplitude", fixed: int = 1) -> Lengths:
    """The distribution of the number of layers on a path, of the gains of the L blocks f[..., L].

    It is that of `fixed` plus a Poisson-binomial number, by convolution in float64. A gain of 0 is
    a block without a branch, inf one without a skip. ValueError for gains that are negative or NaN,
    and for none.

    Args:
      gains: how large each branch is, in sizes of its skip.
      weights: of a path. "amplitude": the product of its gains, signs and phases left aside.
        "energy": that of their squares, which sums do have if paths are incoherent. "squared": the
        square of all that paths of a length have together in amplitudes, which the paper normalizes
        (its eps_r^2); the mean is about that of amplitudes, the deviation smaller by sqrt(2).
      fixed: layers that all paths have: the paper's first one, and projections in place of skips.

    Example:
      >>> from normjax.analysis import depth
      >>> float(depth.path_lengths([1.0] * 8).mean), int(depth.path_lengths([2.0] * 99).mode)
      (5.0, 67)
    """
    checks.require("path_lengths", "weights", weights, checks.one_of(*Weights.__args__))
    if not isinstance(fixed, int) or fixed < 0:
        raise ValueError(f"path_lengths: fixed={fixed!r} is not a whole number >= 0.")
    odds = _gains("path_lengths", gains)
    if weights == "energy":
        odds = np.square(np.minimum(odds, 1e150))
    share = np.ones((*odds.shape[:-1], 1))
    for taken in np.moveaxis(_taken(odds), -1, 0)[..., None]:
        nothing = np.zeros_like(taken)
        skipped = np.concatenate([share * (1 - taken), nothing], -1)
        share = skipped + np.concatenate([nothing, share * taken], -1)
    if weights == "squared":
        share = np.square(share)
        share /= np.sum(share, -1, keepdims=True)
    return Lengths(np.arange(share.shape[-1]) + fixed, share)


def _gains(name, gains):
    gains = np.asarray(gains, float)
    if not gains.ndim or not gains.shape[-1]:
        raise ValueError(f"{name}: gains have shape {gains.shape}, but are one for each block.")
    if not np.all(gains >= 0):
        wrong = gains[~(gains >= 0)][0]
        raise ValueError(f"{name}: a gain is {wrong}, but is a ratio of sizes, >= 0 (inf: no skip)")
    return gains


def _taken(odds):
    """Shares of paths through a branch, of its odds."""
    return np.where(np.isinf(odds), 1.0, odds / (1 + np.where(np.isinf(odds), 0, odds)))


def equivalent_beta(gains: ArrayLike) -> np.ndarray:
    """The one gain whose paths have the mean length of those of the gains f[..., L]; f[...].

    Of amplitudes: beta / (1 + beta) is the mean of `g_l / (1 + g_l)`. The paper's beta; inf if no
    block has a skip.

    Example:
      >>> from normjax.analysis import depth
      >>> float(depth.equivalent_beta([0.0, 1.0, float("inf")]))
      1.0
    """
    taken = np.mean(_taken(_gains("equivalent_beta", gains)), -1)
    with np.errstate(divide="ignore"):
        return taken / (1 - taken)


def critical_rate(gains: ArrayLike, *, fixed: int = 1) -> np.ndarray:
    """The exponential rate of critical points of the spin glass with these gains f[..., L]; f[...].

    Section 5 of the paper, after Auffinger & Ben Arous 2013, https://arxiv.org/abs/1110.5872: with
    `v1 = sum_r r eps_r^2` and `v2 = sum_r r (r - 1) eps_r^2` the expected number of critical points
    of finite index in N dimensions grows as exp(N rate), and the rate is
    `log(v2 / v1) / 2 - (v2 - v1) / (v2 + v1)`. It is -inf if all paths have one layer, 0 for two,
    and of networks of p layers the largest for that without skips. The paper derives it for large
    N, a loss that is a spherical spin glass, and gates independent of the input.

    Example:
      >>> from normjax.analysis import depth
      >>> rates = [float(depth.critical_rate([beta] * 49)) for beta in (0.1, 1.0, float("inf"))]
      >>> [round(rate, 2) for rate in rates]
      [0.12, 0.68, 0.99]
    """
    gains = _gains("critical_rate", gains)
    length, share = path_lengths(gains, weights="squared", fixed=fixed)
    first, second = share @ length, share @ (length * (length - 1))
    with np.errstate(divide="ignore"):
        return np.log(second / first) / 2 - (second - first) / (second + first)


def batch_norm_gains(number: int, scale: ArrayLike) -> np.ndarray:
    """Gains of blocks whose branches end in a batch norm of one common scale; f[..., number].

    The skip grows with every branch that is added to it, `E x_l^2 = 1 + l scale^2` for independent
    branches of an input of size 1, and so the gain falls: `scale / sqrt(1 + l scale^2)`, for l from
    0. No scale makes the paths longer than `number` gains `1 / sqrt(l)`. The paper takes the scales
    of batch norms for the factor C in its beta, as which they act while they are small.

    Example:
      >>> from normjax.analysis import depth
      >>> means = depth.path_lengths(depth.batch_norm_gains(54, [0.1, 1.0, 100.0])).mean
      >>> [round(mean, 1) for mean in means.tolist()]
      [5.4, 11.2, 12.0]
    """
    checks.require("batch_norm_gains", "number", number, checks.positive)
    scale = _gains("batch_norm_gains", np.asarray(scale, float)[..., None])
    return scale / np.sqrt(1 + np.arange(number) * np.square(scale))


class Gains(NamedTuple):
    """The size of the branch of a block, over that of its skip, and of its last batch norm.

    Example:
      >>> from normjax.analysis import depth
      >>> depth.Gains._fields
      ('forward', 'jacobian', 'projection', 'scale', 'over_deviation')
    """

    forward: float  # root of mean squares of the values
    jacobian: float  # the same of what a random change of the input of the block becomes
    projection: bool  # whether the skip holds a layer too
    scale: float | None  # mean size of the scales of the last batch norm in the branch
    over_deviation: float | None  # this over the deviation of its input, by the mean variance


class _Block(NamedTuple):
    """A sum of a skip and a branch, by numbers of values of a program."""

    name: str
    fork: int  # what both are made of
    skip: int
    branch: int
    place: int  # step of the sum
    projection: bool


def measure(
    model: linen.Module | nnx.Module,
    *args: Any,
    key: jax.Array,
    probes: int = 1,
    blocks: Sequence[str] = (),
    **kwargs: Any,
) -> OrderedDict[str, Gains]:
    """The gains of all residual blocks of a model, by name, in order.

    A block is a sum, in the program of the model, of two arrays that depend on one: the skip,
    without a layer (a matrix product or a convolution) or with one as a projection, and the branch,
    with more of them. So blocks need not be modules, and may lie in `remat`, `jit` and `scan`, but
    not in a `while` or `cond`. Sums that hold others are left out. A block has the path of the
    module that makes the sum, "__call__" for the model itself, and "#2" if it makes two.

    The model is called as by `layers.calls` and stays as it is; norms use running statistics, or
    those of the batch, as they are told. ValueError without any block, and for a pattern that
    matches none.

    Args:
      key: of the random directions, Gaussian and independent for all values, of which the
        Jacobian gain is the root of mean squares. (It is `|J_branch| / |J_skip|` in the Frobenius
        norm, in expectation.)
      probes: how many directions; each has a part for every sample.
      blocks: patterns of paths of modules, such as "stage_*/block_1": sums elsewhere do not count.

    Example:
      >>> import jax, flax.linen as nn, normjax.analysis.depth as depth
      >>> class Block(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         return x + nn.Dense(3, kernel_init=lambda *_: 0.5 * jax.numpy.eye(3))(x)
      >>> model, x = nn.Sequential([Block(), Block()]), jax.numpy.ones((2, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> found = depth.measure(model, variables, x, key=jax.random.key(1))
      >>> [(name, gains.forward, round(gains.jacobian, 6)) for name, gains in found.items()]
      [('layers_0', 0.5, 0.5), ('layers_1', 0.5, 0.5)]
    """
    checks.require("measure", "probes", probes, checks.positive)
    network = _Network("measure", model, args, kwargs, blocks)
    norms = network.norms(layers.calls(model, *args, **kwargs))
    rng = _generator(key)
    gains: OrderedDict[str, Gains] = OrderedDict()
    for block, values in network.walk():
        part, start = network.part(block), values[block.fork]

        def both(x, block=block, values=values, part=part):
            inside = collections.ChainMap({block.fork: x}, values)
            programs.run(part, inside)
            return inside[block.branch], inside[block.skip]

        draws = rng.standard_normal((probes, *start.shape))
        changes = [jax.jvp(both, (start,), (jnp.asarray(v, start.dtype),))[1] for v in draws]
        jacobian = jax.tree.map(lambda *a: jnp.stack(a), *changes)
        ratios = _ratio(values[block.branch], values[block.skip]), _ratio(*jacobian)
        gains[block.name] = Gains(*ratios, block.projection, *norms[block.name])
    return gains


def _generator(key):
    """NumPy's, whose numbers need no program for each shape."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def _ratio(branch, skip):
    """Of the roots of mean squares of two arrays."""
    one, two = (jnp.max(jnp.abs(a)) for a in (branch, skip))
    size = lambda a, scale: jnp.linalg.norm(jnp.ravel(a) / jnp.where(scale == 0, 1, scale))
    return float(one * size(branch, one) / (two * size(skip, two)))


class _Network:
    """The program of a model and the residual blocks in it."""

    def __init__(self, caller, model, args, kwargs, patterns):
        self.program = programs.trace(model, *args, **kwargs)
        self.above = _ancestors(self.program)
        steps = enumerate(self.program.steps)
        self.made = {number: place for place, step in steps for number in step.outputs}
        found = _outer(self.above, list(_sums(self.program, self.above)))
        if patterns and found:
            within = [_path(self.program, block.place) for block in found]
            hits = paths.matches(f"{caller}: blocks", within, patterns)
            found = [found[i] for i in sorted(hits)]
        if not found:
            raise ValueError(
                f"{caller}: {type(model).__name__} has no residual block: nowhere in its program "
                "is a sum of an array and of what at least one layer more makes of the same array."
            )
        self.blocks, times = [], collections.Counter()
        for block in found:
            name = "/".join(_path(self.program, block.place)) or layers.CALL
            times[name] += 1
            often = f"#{times[name]}" if times[name] > 1 else ""
            self.blocks.append(block._replace(name=name + often))

    def between(self, block):
        """The places of the steps behind the fork of a block, up to its sum."""
        return range(self.made.get(block.fork, -1) + 1, block.place + 1)

    def part(self, block):
        """The steps that make the skip and the branch of a block of its fork."""
        above = self.above[block.skip] | self.above[block.branch]
        steps = [self.program.steps[place] for place in self.between(block)[:-1]]
        needed = lambda number: above >> number & self.above.get(number, 0) >> block.fork & 1
        return [step for step in steps if any(map(needed, step.outputs))]

    def walk(self):
        """Each block, with the values that are known when its sum has been made."""
        steps, values = self.program.steps, dict(self.program.known)
        last = {number: place for place, step in enumerate(steps) for number in step.inputs}
        for block in self.blocks:
            inside = [number for place in self.between(block) for number in steps[place].inputs]
            last |= {number: max(last[number], block.place) for number in inside}
        begin = 0
        for block in self.blocks:
            programs.run(steps[begin : block.place + 1], values)
            yield block, values
            begin = block.place + 1
            for number in [n for n in values if last.get(n, -1) < begin]:
                del values[number]

    def norms(self, calls):
        """Scales of the last batch norm in the branch of each block, and over deviations."""
        often, every = collections.Counter(), {}
        for call in calls:
            every[call.path, often[call.path]] = call
            often[call.path] += 1
        often.clear()
        found: dict[str, tuple[Any, Any]] = {block.name: (None, None) for block in self.blocks}
        for site in self.program.sites:
            call = every.get((site.path, often[site.path]))
            often[site.path] += 1
            ratios = None if call is None else _scales(call)
            for block in () if ratios is None else self.blocks:
                inside = site.start in self.between(block) and site.stop in self.between(block)
                output = self.program.steps[site.stop].outputs[0]
                if inside and self.above[block.branch] >> output & 1:
                    found |= {block.name: ratios}
        return found


def _scales(call):
    """Mean size of the scales of a batch norm, and over the deviation of its input, or None."""
    names, leaves, _ = paths.flatten(call.variables)
    own = {name[-1]: np.asarray(leaf) for name, leaf in zip(names, leaves, strict=True)}
    own = {name: own[name] for name in ("scale", "var") if name in own}
    kinds = {leaf.shape for leaf in own.values()}
    if own.keys() != {"scale", "var"} or len(kinds) > 1 or not call.args:
        return None
    variance = jnp.var(call.args[0], range(call.args[0].ndim - 1))
    if own["scale"].shape != variance.shape:
        return None
    scale = np.mean(np.abs(own["scale"]))
    return float(scale), float(scale / jnp.sqrt(jnp.mean(variance)))


def _ancestors(program):
    """Of each value that depends on the inputs, those that it depends on and itself, as bits."""
    above = {number: 1 << number for number in program.inputs}
    for step in program.steps:
        known = [above[number] for number in step.inputs if number in above]
        if known:
            every = functools.reduce(operator.or_, known)
            above |= {number: every | 1 << number for number in step.outputs}
    return above


def _sums(program, above):
    """The sums of a skip and a branch."""
    for place, step in enumerate(program.steps):
        if step.kind not in ("add", "add_any") or not above.keys() >= set(step.inputs):
            continue
        one, two = step.inputs
        common, kind = above[one] & above[two], program.types[step.outputs[0]]
        fork = common.bit_length() - 1
        same = all(program.types[n].shape == kind.shape for n in step.inputs)
        if one == two or not common or not same or kind.ndim < 2 or not _alike(program, fork, kind):
            continue
        number = _layers(program, fork, place)
        (few, skip), (many, branch) = sorted((number[n], n) for n in step.inputs)
        if few <= 1 and few < many:
            yield _Block("", fork, skip, branch, place, few > 0)


def _alike(program, number, kind):
    """Whether a value has as many axes as that of type `kind`, and is real and floating."""
    own = program.types[number]
    return own.ndim == kind.ndim and jnp.issubdtype(own.dtype, jnp.floating)


def _layers(program, fork, place):
    """The smallest number of layers between a value and those that depend on it, up to a step."""
    number = {fork: 0}
    for step in program.steps[:place]:
        known = [number[n] for n in step.inputs if n in number]
        if known:
            here = min(known) + (step.kind in WEIGHT_LAYERS)
            number |= {n: here for n in step.outputs if n != fork}
    return number


def _outer(above, found):
    """The sums that hold no other one in their branch."""

    def holds(block, other):
        total = above[block.branch]
        inside = total >> other.skip & total >> other.branch & above[other.fork] >> block.fork & 1
        return inside and other.place < block.place and not above[block.fork] >> other.branch & 1

    return [b for b in found if not any(holds(b, other) for other in found if other is not b)]


def _path(program, place):
    """The path of the innermost module that is being called at a step."""
    open_ = [site for site in program.sites if site.start <= place <= site.stop]
    return tuple(map(str, open_[-1].path)) if open_ else ()


def network_lengths(
    gains: Mapping[str, Gains],
    *,
    by: Literal["forward", "jacobian"] = "jacobian",
    weights: Weights = "amplitude",
) -> Lengths:
    """`path_lengths` of what `measure` has found.

    A block with a projection is a layer of all paths. ValueError if all blocks have one.

    Example:
      >>> from normjax.analysis import depth
      >>> found = {"a": depth.Gains(1.0, 0.5, False, None, None)}
      >>> depth.network_lengths(found, by="forward").share.tolist()
      [0.5, 0.5]
    """
    checks.require("network_lengths", "by", by, checks.one_of("forward", "jacobian"))
    free = [getattr(found, by) for found in gains.values() if not found.projection]
    return path_lengths(free, weights=weights, fixed=1 + len(gains) - len(free))


def sample(
    model: linen.Module | nnx.Module,
    *args: Any,
    key: jax.Array,
    samples: int | None = None,
    blocks: Sequence[str] = (),
    **kwargs: Any,
) -> Lengths:
    """The distribution of path lengths by the gradients of single paths, at random or of all.

    A path goes through the branch of some blocks and the skips of the others, and is linear: gates
    and statistics are those of the whole network. Its energy is the squared norm of the gradient,
    from behind the last block to in front of the first, of a random projection. The share of a
    length is the mean energy of its paths times their number, which is what `weights="energy"` of
    `path_lengths` says if gains do not depend on where a path has been. Other arguments and errors
    are those of `measure`; ValueError without `samples` for more than 12 blocks.

    Args:
      key: of the projection and the paths.
      samples: paths of each length; None: all paths of all lengths.

    Example:
      >>> import jax, flax.linen as nn, normjax.analysis.depth as depth
      >>> class Block(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         return x + nn.Dense(3, kernel_init=lambda *_: 2.0 * jax.numpy.eye(3))(x)
      >>> model, x = nn.Sequential([Block(), Block()]), jax.numpy.ones((2, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> found = depth.sample(model, variables, x, key=jax.random.key(1))
      >>> [round(share) for share in (found.share / found.share[0]).tolist()]
      [1, 8, 16]
    """
    network = _Network("sample", model, args, kwargs, blocks)
    free = [block for block in network.blocks if not block.projection]
    if samples is not None:
        checks.require("sample", "samples", samples, checks.positive)
    elif len(free) > 12:
        raise ValueError(f"sample: {len(free)} blocks have too many paths for all: give samples=.")
    of_paths, of_projection = jax.random.split(key)
    masks = _masks(len(free), samples, of_paths)
    run = _through(network, free, of_projection)
    energies = np.asarray(jax.jit(lambda masks: lax.map(run, masks))(masks))
    number = masks.sum(1)
    share = np.array(
        [
            math.comb(len(free), k) * np.mean(energies[number == k], dtype=float)
            for k in range(len(free) + 1)
        ]
    )
    fixed = 1 + len(network.blocks) - len(free)
    return Lengths(np.arange(len(share)) + fixed, share / share.sum())


def _masks(number, samples, key):
    """Which branches paths take, bool[paths, number]: all, or `samples` of each length."""
    if samples is None:
        return np.array(list(itertools.product([False, True], repeat=number)))
    lengths = np.repeat(np.arange(number + 1), samples)
    return _generator(key).permuted(np.arange(number) < lengths[:, None], axis=1)


def _through(network, free, key):
    """The energy of a path through the blocks `free`, as a function of its mask."""
    first, last = network.blocks[0], network.blocks[-1]
    program, values = network.program, dict(network.program.known)
    begin = network.between(first).start
    programs.run(program.steps[:begin], values)
    steps = list(enumerate(program.steps))[begin : last.place + 1]
    places = {block.place: i for i, block in enumerate(free)}

    def path(x, mask):
        inside = collections.ChainMap({first.fork: x}, values)
        for place, step in steps:
            programs.run([step], inside)
            if place in places:
                block = free[places[place]]
                way = jnp.where(mask[places[place]], inside[block.branch], inside[block.skip])
                total = inside[step.outputs[0]]
                inside[step.outputs[0]] = way + lax.stop_gradient(total - way)
        return inside[steps[-1][1].outputs[0]]

    def energy(mask):
        y, pull = jax.vjp(lambda x: path(x, mask), values[first.fork])
        (gradient,) = pull(jax.random.normal(key, y.shape, y.dtype))
        return jnp.sum(jnp.square(gradient.astype(jnp.float32)))

    return energy


def table(history: Mapping[int, Mapping[str, Gains]]) -> list[dict[str, Any]]:
    """What `measure` returned, by step, as rows for `csv.DictWriter` or `pandas.DataFrame`.

    A row per step and block: "step", "depth" (the place of the block, from 0), "block", and the
    fields of `Gains`. ValueError for an empty history, or steps that differ in their blocks.

    Example:
      >>> from normjax.analysis import depth
      >>> history = {step: {"a": depth.Gains(1.0, 0.5 * step, False, 1.0, 2.0)} for step in (0, 1)}
      >>> [(row["step"], row["block"], row["jacobian"]) for row in depth.table(history)]
      [(0, 'a', 0.0), (1, 'a', 0.5)]
    """
    return [
        {"step": step, "depth": place, "block": name, **found._asdict()}
        for step, gains in _checked("table", history).items()
        for place, (name, found) in enumerate(gains.items())
    ]


def _checked(name, history):
    names = [list(gains) for gains in history.values()]
    if not names or not names[0]:
        raise ValueError(f"{name}: the history holds no blocks.")
    if any(each != names[0] for each in names):
        raise ValueError(f"{name}: the steps of the history differ in their blocks.")
    return history


def summary(
    history: Mapping[int, Mapping[str, Gains]],
    *,
    by: Literal["forward", "jacobian"] = "jacobian",
    weights: Weights = "amplitude",
) -> list[dict[str, Any]]:
    """The distribution of path lengths at every step in few numbers, as rows.

    A row per step: "step", "mean", "relative" (the mean over the length of the longest path),
    "mode", "deviation", the central 90 % from "low" to "high", "beta" (`equivalent_beta`) and
    "rate" (`critical_rate`). Errors as `table`.

    Example:
      >>> from normjax.analysis import depth
      >>> history = {step: {"a": depth.Gains(1.0, 1.0 * step, False, 1.0, 2.0)} for step in (0, 1)}
      >>> [(row["step"], row["mean"], row["beta"]) for row in depth.summary(history)]
      [(0, 1.0, 0.0), (1, 1.5, 1.0)]
    """
    rows = []
    for step, gains in _checked("summary", history).items():
        found = network_lengths(gains, by=by, weights=weights)
        free = [getattr(one, by) for one in gains.values() if not one.projection]
        low, high = found.band()
        numbers = {
            "mean": found.mean,
            "relative": found.mean / found.length[-1],
            "mode": found.mode,
            "deviation": found.deviation,
            "low": low,
            "high": high,
            "beta": equivalent_beta(free),
            "rate": critical_rate(free, fixed=1 + len(gains) - len(free)),
        }
        rows.append({"step": step} | {name: value.item() for name, value in numbers.items()})
    return rows


def distributions(
    history: Mapping[int, Mapping[str, Gains]],
    *,
    by: Literal["forward", "jacobian"] = "jacobian",
    weights: Weights = "amplitude",
) -> list[dict[str, Any]]:
    """The distribution of path lengths at every step, as rows "step", "length", "share".

    Errors as `table`.

    Example:
      >>> import io, normjax.analysis.depth as depth, normjax.analysis.figures as figures
      >>> gains = {name: depth.Gains(1.0, 0.5, False, 1.0, 2.0) for name in "abc"}
      >>> rows = depth.distributions({0: gains, 100: gains})
      >>> figures.plot(rows, "length", ["share"], by="step").savefig(io.BytesIO())
      >>> rows[0]["length"], round(rows[0]["share"], 3)
      (1, 0.296)
    """
    rows = []
    for step, gains in _checked("distributions", history).items():
        found = network_lengths(gains, by=by, weights=weights)
        pairs = zip(found.length.tolist(), found.share.tolist(), strict=True)
        rows += [{"step": step, "length": length, "share": share} for length, share in pairs]
    return rows


__all__ = [
    "Gains",
    "Lengths",
    "batch_norm_gains",
    "critical_rate",
    "distributions",
    "equivalent_beta",
    "measure",
    "network_lengths",
    "path_lengths",
    "sample",
    "summary",
    "table",
]
