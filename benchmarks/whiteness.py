"""Whitening without training: identities, chance and conditioning, for `benchmarks.whitening`."""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy import stats

import normjax as nj
from benchmarks import models, training
from normjax.analysis import whitening
from normjax.core import roots
from normjax.core.statistics import Covariances
from normjax.linen import Norm

SIZE = 64  # features of the covariances of the roots
STEPS = range(1, 26)
CONDITIONS = (1e2, 1e3, 1e4, 1e5)
EIGENVALUES = (10.0, 5.0, 2.0, 0.5, 0.1)
SCHEDULE = 34_000  # steps at the full rate of a run on CIFAR-10
SCALINGS = ("trace", "frobenius", "power")
BATCHES = (32, 64, 128, 256)
MEASURED = 512  # images
ALPHAS = (1e-5, 1e-4, 1e-3)
BN = nj.BatchNorm(momentum=0.9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PCABatchNorm(nj.DecorrelatedBatchNorm):
    """Whitening by principal components, `W = L^(-1/2) U^T` of `S + epsilon I = U L U^T`.

    The eigenvectors have the order and the signs of `jnp.linalg.eigh`, whose derivative it has too.
    """

    def root(self, cov: jax.Array, eye: jax.Array) -> jax.Array:
        """The matrix, for groups of one size."""
        del eye
        values, vectors = jnp.linalg.eigh(cov)
        return vectors.mT / jnp.sqrt(values)[..., None]


class Net(nn.Module):
    """Four convolutions, each with a norm and a ReLU; the maps of the last are averaged.

    Attributes:
      methods: the norms.
      classes: number of classes.
    """

    methods: tuple[Any, ...]
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits f32[N, classes] of images f32[N, H, W, C]."""
        strides = (2, 2, 2, 1) if x.shape[1] >= 16 else (1, 2, 1, 1)
        for i, (method, stride) in enumerate(zip(self.methods, strides, strict=True), 1):
            features, size = (16, 5) if i == 1 else (64, 3)
            x = models.conv(features, size, stride, f"conv_{i}")(x)
            x = nn.relu(Norm(method, name=f"norm_{i}")(x, use_running_average=not train))
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))


def iterative(group_size: int, steps: int) -> Any:
    """Iterative normalization with the momentum of all arms."""
    return nj.IterativeNorm(group_size=group_size, steps=steps, momentum=0.9)


def decorrelated(group_size: int | None) -> Any:
    """The same of decorrelated batch normalization."""
    return nj.DecorrelatedBatchNorm(group_size=group_size, momentum=0.9)


def stochastic(alpha: float, criterion: Any = "kl") -> Any:
    """The same of stochastic whitening."""
    return nj.StochasticWhiteningBatchNorm(alpha=alpha, criterion=criterion, momentum=0.9)


def published(cov: jax.Array, steps: int) -> jax.Array:
    """The iteration of Huang et al. for any number of steps; normjax stops it after seven."""
    scale = jnp.trace(cov, axis1=-2, axis2=-1)[..., None, None]
    p = roots.identity_like(cov)
    for _ in range(steps):
        p = 1.5 * p - 0.5 * roots.product(roots.product(roots.product(p, p), p), cov / scale)
    return p / jnp.sqrt(scale)


def coupled(cov: jax.Array, steps: int) -> jax.Array:
    """The same sequence as normjax computes it."""
    return roots.newton_schulz(cov, roots.steps_of("cubic", steps, 0, 1.0))


def finite(value: Any) -> float | None:
    """A number as files hold it: None for one that is not finite."""
    return float(value) if np.isfinite(value) else None


def distance(cov: np.ndarray, matrix: jax.Array) -> float | None:
    """Root mean square of the eigenvalues of W S W - I, the median over S."""
    wide = np.asarray(matrix, np.float64)
    with np.errstate(all="ignore"):
        gap = wide @ cov @ wide.mT - np.eye(cov.shape[-1])
        each = np.sqrt(np.sum(gap**2, (-2, -1)) / cov.shape[-1])
    return finite(np.median(np.where(np.isfinite(each), each, np.inf)))


def root_errors(seeds: int) -> list[dict[str, Any]]:
    """Distances from the identity by iteration, condition number, dtype and steps."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(seeds, SIZE, SIZE)))
    rows = []
    for condition in CONDITIONS:
        cov = (basis * np.geomspace(1, 1 / condition, SIZE)) @ basis.mT
        for dtype in ("float32", "float64"):
            with jax.enable_x64(dtype == "float64"):
                for name, run in (("published", published), ("coupled", coupled)):
                    of = {"iteration": name, "condition": condition, "dtype": dtype}
                    for steps in STEPS:
                        error = distance(cov, run(jnp.asarray(cov, dtype), steps))
                        rows.append({**of, "steps": steps, "error": error})
    return rows


def correlation(eigenvalues: Any, seed: int) -> np.ndarray:
    """A random correlation matrix with these eigenvalues, whose sum is their number."""
    return stats.random_correlation.rvs(np.array(eigenvalues), random_state=seed)


def moved(method: Any, state: Any, cov: jax.Array, steps: int) -> Any:
    """The state after so many batches of one covariance."""
    one = Covariances(jnp.full(1, 1.0, cov.dtype), jnp.zeros_like(cov[:1]), cov[None])
    step = lambda _, state: method.absorb(state, one)
    return jax.jit(lambda state: lax.fori_loop(0, steps, step, state))(state)


def averages(seeds: int) -> list[dict[str, Any]]:
    """How far W^-2 is from the moving average of correlations, after a sum of rates of one."""
    rows = []
    for alpha in (1e-4, 1e-3, 1e-2):
        for noisy in (False, True):
            values = [_gap(alpha, noisy, jax.random.key(seed)) for seed in range(seeds)]
            rows.append({"alpha": alpha, "noisy": noisy, "deviation": values})
    return rows


def _gap(alpha, noisy, key, features=16):
    """Relative deviation, in the Frobenius norm, on batches of 64 samples: many, or always one."""
    forms = [nj.StochasticWhiteningBatchNorm(alpha=alpha, form=f) for f in ("update", "covariance")]
    first, mixing, each = jax.random.split(key, 3)
    mix = jnp.eye(features) + jax.random.normal(mixing, (features, features)) / 4

    def step(states, key):
        x = jax.random.normal(key if noisy else first, (64, features)) @ mix
        return [m.absorb(s, m.observe(x)) for m, s in zip(forms, states, strict=True)], None

    states = [method.init(None, features)[1] for method in forms]
    keys = jax.random.split(each, round(1 / alpha))
    update, average = jax.jit(lambda states: lax.scan(step, states, keys)[0])(states)
    inverse = np.linalg.inv(np.asarray(update.matrix[0], np.float64))
    cov = np.asarray(average.cov[0], np.float64)
    return float(np.linalg.norm(inverse @ inverse - cov) / np.linalg.norm(cov))


def stability(seeds: int) -> list[dict[str, Any]]:
    """By what factor 200 steps change a small error of W, at rates near the bound."""
    rows = []
    with jax.enable_x64(True):
        for condition in (10.0, 100.0, 3150.0):
            values = np.geomspace(1, condition, 8)
            for factor in (0.9, 1.1):
                alpha = factor * nj.largest_rate(condition)
                method = nj.StochasticWhiteningBatchNorm(alpha=alpha, epsilon=0.0)
                ratios = []
                for seed in range(seeds):
                    corr = correlation(values * 8 / values.sum(), seed)
                    ratios.append(_growth(method, corr, np.random.default_rng(seed)))
                rows.append({"condition": condition, "factor": factor, "growth": ratios})
    return rows


def _growth(method, corr, rng):
    values, vectors = np.linalg.eigh(corr)
    root = vectors / np.sqrt(values) @ vectors.T
    noise = rng.normal(size=root.shape)
    start = root + 1e-6 * (noise + noise.T)
    _, state = method.init(None, len(corr))
    state = jax.tree.map(lambda a: a.astype("float64"), state)._replace(matrix=start[None])
    end = np.asarray(moved(method, state, jnp.asarray(corr), 200).matrix[0])
    return finite(np.linalg.norm(end - root) / np.linalg.norm(start - root))


def partial(alpha: float) -> dict[str, Any]:
    """Variances in the output, by eigenvalue of the correlations, after the schedule."""
    rest = (20 - sum(EIGENVALUES)) / (20 - len(EIGENVALUES))
    corr = correlation([*EIGENVALUES, *[rest] * (20 - len(EIGENVALUES))], 0)
    method = nj.StochasticWhiteningBatchNorm(alpha=alpha, epsilon=0.0)
    _, state = method.init(None, 20)
    matrix = np.asarray(moved(method, state, jnp.asarray(corr, jnp.float32), SCHEDULE).matrix[0])
    values, vectors = np.linalg.eigh(corr)
    found = []
    for wanted in EIGENVALUES:
        v = vectors[:, np.argmin(np.abs(values - wanted))]
        found.append(float(v @ matrix @ corr @ matrix.T @ v))
    decay = math.exp(-2 * alpha * SCHEDULE)
    law = [value / (value - (value - 1) * decay) for value in EIGENVALUES]
    return {"alpha": alpha, "eigenvalues": EIGENVALUES, "variances": found, "law": law}


def kept() -> list[dict[str, Any]]:
    """Deviation of the output for exactly white input of `SIZE` features."""
    x = np.random.default_rng(0).normal(size=(1024, SIZE))
    white = math.sqrt(len(x)) * np.linalg.qr(x - x.mean(0))[0]
    rows = []
    for scaling in SCALINGS:
        for steps in range(1, 10):
            method = nj.IterativeNorm(steps=steps, scaling=scaling, group_size=SIZE)
            variables = method.init(None, SIZE)
            y, _ = method.apply(*variables, jnp.asarray(white, jnp.float32), train=True)
            rows.append({"scaling": scaling, "steps": steps, "deviation": float(jnp.std(y))})
    return rows


def identities(seeds: int) -> dict[str, Any]:
    """Roots, and stochastic whitening on given correlations."""
    return {
        "roots": root_errors(seeds),
        "averages": averages(seeds),
        "stability": stability(seeds),
        "partial": [partial(alpha) for alpha in ALPHAS],
        "kept": kept(),
    }


def disturbance(seeds: int) -> dict[str, Any]:
    """Rows of `whitening.compare`, with a value for each seed: of the features and of all draws."""
    methods: dict[str, Any] = {"BN": nj.BatchNorm()}
    methods |= {f"ZCA {size}": nj.DecorrelatedBatchNorm(group_size=size) for size in (4, 16)}
    methods["PCA 16"] = PCABatchNorm(group_size=16)
    methods |= {f"IterNorm 16 T={t}": nj.IterativeNorm(steps=t, group_size=16) for t in (3, 5, 7)}
    tables = []
    for seed in range(seeds):
        features, mixing, key = jax.random.split(jax.random.key(seed), 3)
        mix = jnp.eye(16) + jax.random.normal(mixing, (16, 16)) / 4
        x = jax.random.normal(features, (2048, 16)) @ mix
        tables.append(whitening.compare(methods, x, BATCHES, key=key))
    rows = [
        row | {"disturbance": [each["disturbance"] for each in of_seeds]}
        for row, *_, of_seeds in ((table[0], table) for table in zip(*tables, strict=True))
    ]
    return {"rows": rows}


def conditioning(inputs: training.Inputs, classes: int, seeds: int, passes: int) -> dict[str, Any]:
    """Measures of the outputs of the norms by layer, [seeds][layers], None where not finite."""
    methods: dict[str, Any] = {"no norm": nj.Affine(), "BN": BN, "ZCA": decorrelated(64)}
    methods |= {f"IterNorm T={steps}": iterative(64, steps) for steps in (3, 5, 7)}
    methods |= {f"SWBN {alpha:.0e}": stochastic(alpha) for alpha in ALPHAS}
    rows = []
    for name, method in methods.items():
        network = Net((method,) * 4, classes)
        updates = passes if name.startswith("SWBN") else 0
        found = [_conditioning(network, updates, inputs, seed) for seed in range(seeds)]
        measures = jax.tree.map(lambda *a: np.array(a), *found)
        row = {
            field: [[finite(value) for value in layers] for layers in values]
            for field, values in measures._asdict().items()
        }
        rows.append({"method": name, **row})
    return {"rows": rows}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _conditioning(network, updates, inputs, seed):
    """Measures [layers], with random weights, after so many batches that moved the statistics."""
    first, each = jax.random.split(jax.random.key(seed))
    images = training.scale(inputs.train_images[:MEASURED], inputs)
    variables = network.init(first, images[:1], train=False)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})

    def step(batch_stats, key):
        chosen = jax.random.randint(key, (64,), 0, len(inputs.train_images))
        seen = training.scale(inputs.train_images[chosen], inputs)
        return training.forward(network, params, batch_stats, seen)[1], None

    batch_stats, _ = lax.scan(step, batch_stats, jax.random.split(each, updates))
    variables = {"params": params, "batch_stats": batch_stats}
    maps = whitening.capture(network, variables, images, train=True)
    found = whitening.measure({name: y for name, y in maps.items() if name.startswith("norm_")})
    return jax.tree.map(lambda *a: jnp.stack(a), *found.values())
