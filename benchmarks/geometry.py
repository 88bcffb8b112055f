"""Batch norm and where a network's boundaries lie: `python -m benchmarks.geometry`.

Five studies, each with a file of its own; those named are run, or all. Claims are those of
Balestriero & Baraniuk, *Batch Normalization Explained*, 2022, https://arxiv.org/abs/2209.14778.
The networks have random weights, or are trained on 8x8 handwritten digits.

distances: of data from the boundaries of units, with biases that are zero, random, or those of
batch norm, and how many linear regions lie where points of a plane are.

probe: accuracy of linear classifiers on random features, by the same biases and by means alone.

start: training from these weights, with norms that keep their first statistics, and with norms.

jitter: of the thresholds of a trained network and of its decision boundary, by batch size.

margins: of networks trained with statistics of small and of large batches, fixed ones, and none.

All arms of a seed share initial weights and order of batches.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import make_moons
from threadpoolctl import threadpool_limits

import normjax as nj
from benchmarks import data, machine, training
from benchmarks.options import Studies, rate, whole
from normjax.analysis import geometry
from normjax.linen import Norm

BN = nj.BatchNorm(momentum=0.9)
BATCHES = (8, 16, 32, 64, 128, 256, 512)
SHIFTS = (0.0, 3.0)  # of the data, in their deviations
ARMS = ("zero", "random", "mean", "mean and deviation")  # where biases come from


class Net(nn.Module):
    """Dense layers of `widths`, or of convolutions, each with a norm (None: a bias) and a ReLU."""

    widths: tuple[int, ...]
    classes: int
    norm: Any = None
    convolutions: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits f32[N, classes]."""
        how: Any = dict(use_bias=self.norm is None, kernel_init=nn.initializers.he_normal())
        for i, width in enumerate(self.widths):
            if self.convolutions:
                x = nn.Conv(width, (3, 3), strides=1 + i % 2, name=f"layer_{i}", **how)(x)
            else:
                x = nn.Dense(width, name=f"layer_{i}", **how)(x.reshape(len(x), -1))
            if self.norm is not None:
                x = Norm(self.norm, name=f"norm_{i}")(x, use_running_average=not train)
            x = nn.relu(x)
        return nn.Dense(self.classes, name="head")(x.reshape(len(x), -1))


def network_of(arm: str, net: Net, x: jax.Array, seed: int) -> tuple[Any, Any]:
    """A network without norms and its variables: weights by the seed, biases by the arm."""
    plain, normed = net.clone(norm=None), net.clone(norm=BN)
    variables = normed.init(jax.random.key(seed), x[:1])
    if arm.startswith("mean"):
        how = dict(deviation=arm != "mean", fold=True)
        done = geometry.smart_init(normed, variables, x, **how)
        return plain, done.variables
    rng = np.random.default_rng(seed)
    params = {name: dict(own) for name, own in variables["params"].items() if "norm" not in name}
    for name in params.keys() - {"head"}:
        kernel: Any = params[name]["kernel"]
        bound = np.prod(kernel.shape[:-1]) ** -0.5 if arm == "random" else 0.0
        bias = rng.uniform(-bound, bound, kernel.shape[-1])
        params[name]["bias"] = jnp.asarray(bias, jnp.float32)
    return plain, {"params": params}


def moons(number: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Points f64[N, 2] of two classes, half moons."""
    points, labels = make_moons(number, noise=noise, random_state=seed)
    return np.asarray(points), np.asarray(labels)


def spread(x: Any) -> float:
    """Root mean square distance of samples from their mean, for each dimension."""
    return float(np.sqrt(np.mean(np.var(np.reshape(x, (len(x), -1)), 0))))


def pixels() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Digits with pixels from 0 to 1, and their labels, to train and to test."""
    dataset = data.load("digits")
    images = dataset.train_images, dataset.test_images
    train, test = (a.astype(np.float32) / 16 for a in images)
    return train, dataset.train_labels, test, dataset.test_labels


def distances(options: argparse.Namespace) -> dict[str, Any]:
    """Median distances by layer in units of the data's deviation, and regions by place."""
    rows = []
    images = pixels()[0][:200]
    for seed in range(options.seeds):
        points = moons(200, 0.1, seed)[0]
        points = (points - points.mean(0)) / points.std(0)
        cases = [(f"moons, shifted by {s:.0f}", points + s, Net((32,) * 3, 2)) for s in SHIFTS]
        cases.append(("digits", images, Net((16, 32), 10, convolutions=True)))
        for name, x, net in cases:
            x = jnp.asarray(x, jnp.float32)
            for arm in ARMS:
                model, variables = network_of(arm, net, x, seed)
                row = {"data": name, "arm": arm, "seed": seed}
                near = geometry.nearest(model, variables, x)
                every = geometry.distances(model, variables, x)
                row["every"] = [float(np.median(d)) / spread(x) for d in every.values()]
                row["nearest"] = [float(np.median(d.distance)) / spread(x) for d in near.values()]
                row["exact"] = [float(np.mean(d.exact)) for d in near.values()]
                if name != "digits":
                    row |= regions(model, variables, np.asarray(x), seed)
                rows.append(row)
    return {"rows": rows}


def regions(model: nn.Module, variables: Any, x: np.ndarray, seed: int) -> dict[str, int]:
    """Linear regions in the box of the samples, and in a box as large at a random place near it.

    The center of the other box is three of the samples' deviations away from theirs.
    """
    f = lambda x: model.apply(variables, x[None])[0]
    low, high = x.min(0), x.max(0)
    angle = np.random.default_rng(seed).uniform(0, 2 * np.pi)
    away = 3 * x.std(0) * np.array([np.cos(angle), np.sin(angle)]) * np.sqrt(2)

    def count(low, high):
        window = (low[0], high[0]), (low[1], high[1])
        return geometry.regions_2d(f, window=window).count

    return {"inside": count(low, high), "outside": count(low + away, high + away)}


def probe(options: argparse.Namespace) -> dict[str, Any]:
    """Test accuracies of ridge classifiers on the last of three layers of 128 random features."""
    train, labels, test, test_labels = pixels()
    digits = {"digits, pixels from 0 to 1": 0.0, "digits, centred": -train.mean(0)}
    digits["digits, pixels from 1 to 2"] = 1.0
    found: dict[tuple[str, str], list[float]] = {}
    for seed in range(options.seeds):
        both = [moons(300, 0.2, seed), moons(2000, 0.2, seed + 99)]
        center = both[0][0].mean(0)
        cases = [(name, train + s, labels, test + s, test_labels) for name, s in digits.items()]
        for shift in SHIFTS:
            (x, own), (unseen, right) = ((a - center + shift, wanted) for a, wanted in both)
            cases.append((f"moons, shifted by {shift:.0f}", x, own, unseen, right))
        for name, x, own, unseen, right in cases:
            x, unseen = (jnp.asarray(a, jnp.float32) for a in (x, unseen))
            for arm in ARMS:
                model, variables = network_of(arm, Net((128,) * 3, 10), x, seed)
                features = [hidden(model, variables, a) for a in (x, unseen)]
                accuracy = ridge(features[0], own, features[1], right)
                found.setdefault((name, arm), []).append(accuracy)
    rows = [{"inputs": name, "arm": arm, "accuracy": of} for (name, arm), of in found.items()]
    return {"rows": rows}


def hidden(model: nn.Module, variables: Any, x: jax.Array) -> np.ndarray:
    """The last hidden features, f64."""
    eye = jnp.eye(variables["params"]["head"]["kernel"].shape[0])
    head = {"kernel": eye, "bias": jnp.zeros(len(eye))}
    params = variables["params"] | {"head": head}
    features = model.clone(classes=len(eye)).apply({"params": params}, x)
    return np.asarray(features, np.float64)


def ridge(x: np.ndarray, labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> float:
    """Accuracy of least squares on the classes, whose penalty a fifth of the data chooses."""
    center = x.mean(0)
    x, test = x - center, test - center
    wanted = np.eye(labels.max() + 1)[labels]
    own = np.arange(len(x)) % 5 > 0
    scale = np.trace(x.T @ x) / x.shape[1]

    def right(penalty, x, wanted, test, labels):
        offset = wanted.mean(0)
        gram = x.T @ x + penalty * scale * np.eye(x.shape[1])
        weights = np.linalg.solve(gram, x.T @ (wanted - offset))
        return float(np.mean((test @ weights + offset).argmax(1) == labels))

    penalties = 10.0 ** np.arange(-6, 1)
    chosen = [right(p, x[own], wanted[own], x[~own], labels[~own]) for p in penalties]
    return right(penalties[np.argmax(chosen)], x, wanted, test, test_labels)


def trained(
    net: Net,
    inputs: training.Inputs,
    options: argparse.Namespace,
    batch_size: int,
    begin: Callable[[Any, int], Any] | None = None,
    fixed: bool = False,
) -> tuple[training.State, list[float], list[list[float]]]:
    """The states of all seeds, test accuracies, and losses [seeds][epochs].

    `begin` makes the first variables of a seed from those of the network; `fixed`: norms evaluate.
    """

    def loss(params, batch_stats, images, labels, key, inputs):
        images = training.scale(images, inputs)
        logits, stats = training.forward(net, params, batch_stats, images, key, train=not fixed)
        return training.cross_entropy(logits, labels).mean(), stats

    number = len(inputs.train_labels)
    epochs = max(round(options.steps * batch_size / number), 1)
    how: Any = dict(seeds=options.seeds, epochs=epochs, batch_size=batch_size, loss=loss)
    program = training.compile(net, inputs, learning_rate=options.learning_rate, **how)
    state = program.init(jnp.arange(options.seeds))
    if begin is not None:
        every = [begin(jax.tree.map(lambda a, i=i: a[i], state), i) for i in range(options.seeds)]
        new = jax.tree.map(lambda *a: jnp.stack(a), *every)
        state = state._replace(params=new["params"], batch_stats=new.get("batch_stats", {}))
    for _ in range(epochs):
        state = program.train(state, inputs)
    state = program.evaluate(state, inputs)
    right = np.asarray(state.correct)[:, -1] / np.sum(np.asarray(inputs.test_labels) >= 0)
    return state, right.tolist(), np.asarray(state.train_loss, float).tolist()


def start(options: argparse.Namespace) -> dict[str, Any]:
    """Accuracies and losses after training from weights with biases of an arm, or with norms."""
    dataset = data.load("digits")
    inputs = training.put(dataset)
    x = training.scale(inputs.train_images, inputs)
    plain, normed = Net((128,) * 3, 10), Net((128,) * 3, 10, BN)
    rows = []

    def observed(state, seed):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        return geometry.smart_init(normed, variables, x)

    for arm in (*ARMS, "fixed statistics", "batch norm"):
        if arm in ARMS:
            begin = lambda state, seed, arm=arm: network_of(arm, plain, x, seed)[1]
            _, right, losses = trained(plain, inputs, options, 64, begin)
        else:
            fixed = arm == "fixed statistics"
            _, right, losses = trained(normed, inputs, options, 64, observed, fixed)
        rows.append({"arm": arm, "accuracy": right, "train_loss": losses})
    return {"data": data.describe(dataset), "rows": rows}


def jitter(options: argparse.Namespace) -> dict[str, Any]:
    """Median variances of thresholds and their laws by batch size and layer, after training."""
    dataset = data.load("digits")
    inputs = training.put(dataset)
    net = Net((16, 32), 10, BN, convolutions=True)
    state, right, _ = trained(net, inputs, options, 64)
    x = training.scale(inputs.train_images, inputs)
    rows = []
    for seed in range(options.seeds):
        own = jax.tree.map(lambda a, i=seed: a[i], (state.params, state.batch_stats))
        variables = dict(zip(("params", "batch_stats"), own, strict=True))
        for size in BATCHES:
            row: dict[str, Any] = {"seed": seed, "batch_size": size}
            how: Any = dict(batch_size=size, key=jax.random.key(seed), batches=options.draws)
            for name, upstream in (("alone", False), ("training", True)):
                found = geometry.jitter(net, variables, x, upstream=upstream, **how)
                row[name] = [float(np.median(f.threshold_var)) for f in found.values()]
                row["law"] = [float(np.median(f.threshold_law)) for f in found.values()]
            how["batches"] = max(options.draws // 4, 2)
            swing = geometry.decision_jitter(net, variables, x, points=x[:100], **how)
            row["decision"] = float(np.median(swing.deviation)) / spread(x)
            row["flips"] = float(np.mean(swing.flips))
            rows.append(row)
    return {"data": data.describe(dataset), "accuracy": right, "samples": len(x), "rows": rows}


def margins(options: argparse.Namespace) -> dict[str, Any]:
    """Margins of test images of networks that trained with statistics of different batches."""
    dataset = data.load("digits")
    inputs = training.put(dataset)
    x, test = (
        jnp.asarray((a - np.asarray(inputs.mean)) / np.asarray(inputs.std), jnp.float32)
        for a in (dataset.train_images, dataset.test_images)
    )
    ghost = nj.GhostBatchNorm(ghost_batch_size=16, momentum=0.9)
    arms: dict[str, tuple[Any, int, bool]] = {
        "batch 256, statistics of 256": (BN, 256, False),
        "batch 256, statistics of 16": (ghost, 256, False),
        "batch 256, fixed statistics": (BN, 256, True),
        "batch 256, no norm": (None, 256, False),
        "batch 16, statistics of 16": (BN, 16, False),
        "batch 16, no norm": (None, 16, False),
    }
    rows = []
    for name, (norm, size, fixed) in arms.items():
        net = Net((128,) * 3, 10, norm)
        observed = lambda state, seed, net=net: geometry.smart_init(
            net, {"params": state.params, "batch_stats": state.batch_stats}, x
        )
        begin = observed if fixed else None
        state, right, _ = trained(net, inputs, options, size, begin, fixed)
        row: dict[str, Any] = {"arm": name, "accuracy": right, "first_order": [], "along": []}
        for seed in range(options.seeds):
            own = jax.tree.map(lambda a, i=seed: a[i], (state.params, state.batch_stats))
            variables = dict(zip(("params", "batch_stats"), own, strict=True))
            found = geometry.margins(net, variables, test, labels=jnp.asarray(dataset.test_labels))
            wrong = np.asarray(found.first_order) < 0
            row["first_order"].append(float(np.median(found.first_order)) / spread(x))
            row["along"].append(float(np.median(np.where(wrong, -1, 1) * found.along)) / spread(x))
        rows.append(row)
    return {"data": data.describe(dataset), "rows": rows}


STUDIES = {
    "distances": (distances, ("seeds",)),
    "probe": (probe, ("seeds",)),
    "start": (start, ("seeds", "steps", "learning_rate")),
    "jitter": (jitter, ("seeds", "steps", "learning_rate", "draws")),
    "margins": (margins, ("seeds", "steps", "learning_rate")),
}
SEEDS = {"probe": 10, "jitter": 3}  # where they are not 8


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the studies and writes a file for each; returns 0, or 2 after a line on bad input."""
    options = _options(sys.argv[1:] if argv is None else argv)
    try:
        for name in options.studies:
            study, fields = STUDIES[name]
            own = argparse.Namespace(**vars(options))
            own.seeds = options.seeds or SEEDS.get(name, 8)
            with threadpool_limits(1, user_api="blas"):
                found = study(own)
            about = {"study": name, "configuration": {f: getattr(own, f) for f in fields}}
            heading = machine.heading("geometry", "flax", "scikit-learn")
            machine.write({**heading, **about, **found}, options.output / f"{name}.json", None)
            print(f"Written to {options.output}/{name}.json")
    except (ValueError, OSError) as error:
        print("geometry:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def _options(argv):
    parser = Studies("geometry", __doc__, STUDIES)
    parser.add_argument("--seeds", type=whole, help=f"by default 8, {SEEDS}")
    parser.add_argument("--steps", type=whole, default=300, help="of training, about")
    parser.add_argument("--learning-rate", type=rate, default=0.1)
    parser.add_argument("--draws", type=whole, default=300, help="mini-batches of the jitter")
    return parser.read(argv)


if __name__ == "__main__":
    sys.exit(main())
