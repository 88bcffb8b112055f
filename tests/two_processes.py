"""One of two processes that train together: python two_processes.py PORT NUMBER FILE.

Each has four devices and gives its half of every batch.
"""

import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[1])]

if __name__ == "__main__":
    import jax

    port, number, file = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=number)

    import numpy as np
    from test_training import OPTIMIZER, SAMPLES, Net, batches, linen_loss

    import normjax as nj
    from normjax import training

    mesh = jax.make_mesh((8,), ("data",))
    model, half = Net(nj.BatchNorm()), slice(number * SAMPLES // 2, (number + 1) * SAMPLES // 2)
    first = next(batches(1))
    how = {"mask": first["mask"], "train": False}
    args = (model, OPTIMIZER, jax.random.key(0), first["image"])
    made = training.create_train_state(*args, ema=True, mesh=mesh, **how)
    state = training.place(jax.device_get(made.params), mesh)
    state = made._replace(params=state)
    step = training.make_train_step(model, OPTIMIZER, linen_loss, ema_decay=0.9)
    for batch in batches(3):
        mine = {name: a[half] for name, a in batch.items()}
        state, _ = step(state, training.shard_batch(mine, mesh))
    if number == 0:
        np.savez(file, *jax.device_get(jax.tree.leaves((state.params, state.statistics))))
