"""Networks, augmentation, evaluation and fairness of the training comparison."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import normjax as nj
from benchmarks import models, training
from benchmarks.data import Data


def small(number=50, tests=300):
    """Learnable images of 4x4 pixels and three classes; 300 test images make two padded batches."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, number + tests).astype(np.int32)
    images = rng.integers(0, 60, (number + tests, 4, 4, 1))
    images[np.arange(number + tests), labels] += 100
    images = images.astype(np.uint8)
    return Data(images[:number], labels[:number], images[number:], labels[number:], ("a", "b", "c"))


@functools.cache
def trained(method):
    """Network, initial state and states after each of two epochs, over two seeds."""
    network = models.build("mlp", method, classes=3)
    inputs = training.put(small())
    program = training.compile(
        network, inputs, seeds=2, epochs=2, batch_size=16, learning_rate=0.1, augment=True
    )
    states = [program.init(jnp.arange(2))]
    for _ in range(2):
        states.append(program.evaluate(program.train(states[-1], inputs), inputs))
    return network, states


def test_evaluation_is_of_the_whole_test_set():
    network, states = trained(nj.BatchNorm(momentum=0.9))
    data = small()
    x = data.train_images.astype(np.float64)
    images = (data.test_images - x.mean((0, 1, 2))) / x.std((0, 1, 2))
    logits_of = jax.jit(functools.partial(network.apply, train=False))
    for seed in range(2):
        params, stats = (
            jax.tree.map(lambda a, s=seed: a[s], part)
            for part in (states[2].params, states[2].batch_stats)
        )
        variables = {"params": params, "batch_stats": stats}
        logits = logits_of(variables, images.astype(np.float32))
        logits = np.asarray(logits, np.float64)
        losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(300), data.test_labels]
        assert states[2].correct[seed, 1] == (logits.argmax(1) == data.test_labels).sum()
        np.testing.assert_allclose(states[2].test_loss[seed, 1], losses.mean(), rtol=1e-4)


def test_pixels_are_scaled_by_the_moments_of_the_train_set():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3000, 2, 2, 3)).astype(np.uint8)
    images[..., 2] = 200
    labels = np.zeros(3000, np.int32)
    inputs = training.put(Data(images, labels, images[:1], labels[:1], ("a", "b")))
    np.testing.assert_allclose(inputs.mean[0, 0, 0], images.mean((0, 1, 2)), rtol=1e-6)
    expected = [images[..., 0].std(), images[..., 1].std(), 1.0]
    np.testing.assert_allclose(inputs.std[0, 0, 0], expected, rtol=1e-6)
    assert inputs.train_images.dtype == jnp.uint8


def test_history():
    _, states = trained(nj.BatchNorm(momentum=0.9))
    np.testing.assert_array_equal(states[1].epoch, [1, 1])
    assert np.isnan(states[1].train_loss[:, 1]).all()
    assert (states[1].correct[:, 1] == -1).all()
    np.testing.assert_array_equal(states[1].train_loss[:, 0], states[2].train_loss[:, 0])
    assert (states[2].train_loss[:, 1] < states[2].train_loss[:, 0]).all()
    assert states[2].train_loss[0, 0] != states[2].train_loss[1, 0]


def test_methods_meet_the_same_weights_and_batches():
    _, states = trained(nj.BatchNorm(momentum=0.9))
    _, others = trained(nj.chain(nj.BatchNorm(momentum=0.9)))
    for state, other in zip(states, others, strict=True):
        for layer in ("dense_1", "dense_2", "dense_3", "head"):
            for ours, its in zip(
                jax.tree.leaves(state.params[layer]),
                jax.tree.leaves(other.params[layer]),
                strict=True,
            ):
                np.testing.assert_allclose(ours, its, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(states[2].train_loss, others[2].train_loss, rtol=1e-3)


@pytest.mark.parametrize("model", models.MODELS)
def test_initial_weights_do_not_depend_on_the_method(model):
    def kernels(method):
        network = models.build(model, method, classes=10, width=4)
        key = jax.random.key(1, impl="rbg")
        variables = network.init(key, jnp.zeros((2, 8, 8, 1)), train=False)
        return {
            jax.tree_util.keystr(path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"])
            if "norm" not in jax.tree_util.keystr(path)
        }

    ours, others = kernels(nj.BatchNorm()), kernels(nj.DynamicTanh())
    assert ours.keys() == others.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], others[name])


@pytest.mark.parametrize(
    ("model", "shape", "depth", "norms", "parameters"),
    [
        ("mlp", (8, 8, 1), 1, 3, 64 * 128 + 2 * 128 * 128 + 128 * 10 + 10 + 6 * 128),
        ("residual", (8, 8, 1), 1, 5, None),
        ("residual", (32, 32, 3), 2, 13, None),
    ],
)
def test_networks(model, shape, depth, norms, parameters):
    network = models.build(model, nj.BatchNorm(), classes=10, width=4, depth=depth)
    images = jnp.zeros((2, *shape))
    variables = jax.eval_shape(lambda: network.init(jax.random.key(0), images, train=False))
    logits = jax.eval_shape(lambda v: network.apply(v, images, train=False), variables)
    assert logits.shape == (2, 10)
    assert len(variables["batch_stats"]) == norms
    if parameters:
        assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters


def test_norms_are_told_whether_to_train():
    told = []

    class Spy(nn.Module):
        @nn.compact
        def __call__(self, x, use_running_average):
            told.append(use_running_average)
            return x

    images = jnp.zeros((2, 8, 8, 1))
    for network in (models.Residual(Spy, 10), models.MLP(Spy, 10)):
        for train in (True, False):
            told.clear()
            jax.eval_shape(lambda n=network, t=train: n.init(jax.random.key(0), images, train=t))
            assert set(told) == {not train}


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("height", [7, 8])
def test_convolution_by_patches(size, stride, height):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, height, 8, 3)).astype(np.float32)
    kernel = rng.normal(size=(size, size, 3, 5)).astype(np.float32)

    def plain(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def ours(x, kernel):
        return models.conv_by_patches(x, kernel, (stride, stride), "SAME")

    def results(f, x, kernel):
        y, pull = jax.vjp(f, x, kernel)
        return y, pull(2 * y)

    found, wanted = (jax.jit(functools.partial(results, f))(x, kernel) for f in (ours, plain))
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-5)
    for ours_grad, grad in zip(found[1], wanted[1], strict=True):
        np.testing.assert_allclose(ours_grad, grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("flip", [True, False])
def test_augmentation_crops_and_flips(flip):
    images = np.arange(1, 1 + 200 * 4 * 4, dtype=np.uint8).reshape(200, 4, 4, 1)
    found = np.asarray(training._augment(jax.random.key(0), jnp.asarray(images), 1, flip))
    assert (found.shape, found.dtype) == (images.shape, images.dtype)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    crops = {
        (row, column, step): padded[:, row : row + 4, column : column + 4][:, :, ::step]
        for row in range(3)
        for column in range(3)
        for step in ((1, -1) if flip else (1,))
    }
    seen = [next(k for k in crops if np.array_equal(crops[k][i], found[i])) for i in range(200)]
    assert set(seen) == set(crops)


def test_weight_decay_is_on_kernels_alone():
    network = models.build("residual", nj.DynamicTanh(), classes=3)
    images = jnp.zeros((1, 8, 8, 1))
    params = jax.eval_shape(lambda: network.init(jax.random.key(0), images, train=False))["params"]
    decayed = {
        jax.tree_util.keystr(path)
        for path, decays in jax.tree_util.tree_leaves_with_path(training._kernels(params))
        if decays
    }
    assert len(decayed) == 7
    assert "['head']['kernel']" in decayed
    assert all(name.endswith("['kernel']") for name in decayed)


def test_accuracy_in_both_modes_and_on_validation_images():
    network, states = trained(nj.BatchNorm(momentum=0.9))
    data = small()
    rng = np.random.default_rng(1)
    images = rng.integers(0, 160, (7, 4, 4, 1)).astype(np.uint8)
    inputs = training.put(
        data._replace(validation_images=images, validation_labels=np.arange(7, dtype=np.int32) % 3)
    )
    order = np.random.default_rng(0).permutation(50)[:48].reshape(3, 16)
    apply = jax.jit(
        functools.partial(network.apply, mutable=["batch_stats"]), static_argnames="train"
    )
    for seed in range(2):
        state = jax.tree.map(lambda a, s=seed: a[s], states[2])
        variables = {"params": state.params, "batch_stats": state.batch_stats}

        def right(images, labels, train, variables=variables):
            logits, _ = apply(variables, training.scale(images, inputs), train=train)
            return (np.asarray(logits).argmax(1) == labels).sum()

        found = training.validation_accuracy(network, states[2], inputs)[seed]
        assert found == right(images, np.arange(7) % 3, False) / 7
        for train in (True, False):
            each = [right(data.train_images[i], data.train_labels[i], train) for i in order]
            how = {"batch_size": 16, "train": train}
            found = training.train_accuracy(network, states[2], inputs, **how)[seed]
            assert found == sum(each) / 48


def test_noise_is_drawn_in_training_mode():
    network, states = trained(nj.GhostNoiseBatchNorm(ghost_batch_size=2, momentum=0.9))
    inputs = training.put(small())
    quiet, noisy, again = (
        training.train_accuracy(network, states[2], inputs, batch_size=16, train=train)
        for train in (False, True, True)
    )
    assert (noisy != quiet).any()
    np.testing.assert_array_equal(noisy, again)
