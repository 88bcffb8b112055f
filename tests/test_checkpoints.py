"""Checkpoints: resumed runs equal uninterrupted ones, also after a kill and on fewer devices."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType

import normjax as nj
from normjax import interop, training
from normjax import linen as norms
from normjax import nnx as nnx_norms

OPTIMIZER = optax.adamw(optax.cosine_decay_schedule(1e-2, 10))
MOMENTUM = nj.Ramp(0.5, 0.9, 0, 4)  # a schedule, of which the statistics count the steps
SAMPLES = 16


class Net(nn.Module):
    """Batch norm of groups with a schedule, noise, dropout."""

    axis_name: str | None = None
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dense(8, use_bias=False, name="first")(x)
        ghost = nj.Ghost(nj.BatchNorm(momentum=MOMENTUM, epsilon=self.epsilon), groups=4)
        x = norms.Norm(ghost, not train, name="norm")(x)
        x = norms.Norm(nj.GhostNoise(effective_size=8), not train, name="noise")(x)
        return nn.Dense(1)(nn.Dropout(0.5)(nn.relu(x), deterministic=not train))


class NnxNet(nnx.Module):
    """Batch norm and dropout."""

    def __init__(self, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx_norms.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


def batch(step):
    rng = np.random.default_rng(step)
    return rng.normal(size=(SAMPLES, 4)).astype(np.float32)


def linen_loss(model, x, train):
    return training.Loss(jnp.square(model(x, train=train)[:, 0] - 1.0))


def nnx_loss(model, x, train):
    return training.Loss(jnp.square(model(x)[:, 0] - 1.0))


def fields_of(model):
    init = lambda: model.init(jax.random.key(0), batch(0), train=False)
    return interop.configuration(model, jax.eval_shape(init), batch(0), train=False)


def start(front, **how):
    """Step, state and configuration of a front end."""
    if front == "linen":
        model, key = Net(), jax.random.key(0)
        state = training.create_train_state(
            model, OPTIMIZER, key, batch(0), ema=True, train=False, **how
        )
        fields = fields_of(model)
        step = training.make_train_step(model, OPTIMIZER, linen_loss, ema_decay=0.9)
    else:
        model = NnxNet(nnx.Rngs(0))
        state = training.create_train_state(model, OPTIMIZER, ema=True, **how)
        fields = interop.configuration(model)
        step = training.make_train_step(model, OPTIMIZER, nnx_loss, ema_decay=0.9)
    return step, state, fields


def run(step, state, first, last):
    for i in range(first, last):
        state, _ = step(state, batch(i))
    return state


def numbers(state):
    is_key = lambda a: jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
    return jax.device_get(jax.tree.map(lambda a: jax.random.key_data(a) if is_key(a) else a, state))


@pytest.mark.parametrize("front", ["linen", "nnx"])
def test_a_resumed_run_equals_an_uninterrupted_one(front, tmp_path):
    step, state, fields = start(front)
    with ocp.CheckpointManager(tmp_path) as manager:
        assert training.save(manager, run(step, state, 0, 3), fields)
        step, like, fields = start(front)
        resumed = run(step, training.restore(manager, like, fields), 3, 5)
    _, state, _ = start(front)
    chex.assert_trees_all_equal(numbers(resumed), numbers(run(step, state, 0, 5)))


def test_fewer_devices_go_on_with_the_same_groups(tmp_path):
    # Explicit axes would not do: Linen's dropout does not run with samples shared over them.
    how = {"axis_types": (AxisType.Auto,)}
    meshes = [jax.make_mesh((n,), ("data",), devices=jax.devices()[:n], **how) for n in (8, 4)]
    states = []
    with ocp.CheckpointManager(tmp_path) as manager:
        step, state, fields = start("linen", mesh=meshes[0], fsdp="data")
        for i in range(2):
            state, _ = step(state, training.shard_batch(batch(i), meshes[0]))
        training.save(manager, state, fields)
        like = start("linen", mesh=meshes[1], fsdp="data")[1]
        shapes = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like
        )
        pair = state, training.restore(manager, shapes, fields)
    for mesh, state in zip(meshes, pair, strict=True):
        assert state.params["first"]["kernel"].sharding.device_set == set(mesh.devices.flat)
        states.append(step(state, training.shard_batch(batch(2), mesh))[0])
    chex.assert_trees_all_close(*map(numbers, states), atol=1e-6)


def test_a_killed_run_loses_the_steps_since_its_last_checkpoint(tmp_path):
    worker = subprocess.Popen([sys.executable, __file__, tmp_path])
    try:
        end = time.monotonic() + 240
        while len(saved := ocp.utils.checkpoint_steps(tmp_path) if tmp_path.exists() else []) < 2:
            assert worker.poll() is None and time.monotonic() < end
            time.sleep(0.1)
    finally:
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
    step, like, fields = start("linen")
    with ocp.CheckpointManager(tmp_path) as manager:
        state = training.restore(manager, like, fields)
    assert state.step >= max(saved)
    steps = int(state.step)
    wanted = run(step, start("linen")[1], 0, steps + 1)
    chex.assert_trees_all_equal(numbers(run(step, state, steps, steps + 1)), numbers(wanted))


def test_checkpoints_of_something_else_are_refused(tmp_path):
    _, state, fields = start("linen")
    with ocp.CheckpointManager(tmp_path) as manager:
        with pytest.raises(FileNotFoundError, match="no checkpoint"):
            training.restore(manager, state, fields)
        training.save(manager, state, fields)
        with pytest.raises(ValueError, match="epsilon is 1e-05 in the checkpoint and"):
            training.restore(manager, state, fields_of(Net(epsilon=1e-3)))
        more = state._replace(statistics={**state.statistics, "more": {"a": jnp.ones(3)}})
        with pytest.raises(ValueError, match="lacks statistics/more/a"):
            training.restore(manager, more, fields)
        with pytest.raises(ValueError, match=r"has ema/first/kernel besides"):
            training.restore(manager, state._replace(ema=None), fields)
        wide = state._replace(step=jnp.zeros((2,), jnp.int32))
        with pytest.raises(ValueError, match=r"has step as int32\[\], not int32\[2\]"):
            training.restore(manager, wide, fields)
        with pytest.raises(ValueError, match=r"state.step has the shape \(2,\)"):
            training.save(manager, wide, fields)
        like = jax.device_get(state._replace(key=None))._replace(key=state.key)
        chex.assert_trees_all_equal(*map(numbers, (training.restore(manager, like, fields), state)))


def main(folder):
    """Trains for ever, with a checkpoint every other step."""
    step, state, fields = start("linen")
    options = ocp.CheckpointManagerOptions(save_interval_steps=2)
    with ocp.CheckpointManager(pathlib.Path(folder), options=options) as manager:
        while True:
            training.save(manager, state, fields)
            state, _ = step(state, batch(int(state.step)))


if __name__ == "__main__":
    main(sys.argv[1])
