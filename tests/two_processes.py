"""One of two processes that train together: python two_processes.py PORT NUMBER FOLDER STEPS NAMES.

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

    port, number, folder, steps, *names = sys.argv[1:]
    number, steps = int(number), int(steps)
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=number)

    import numpy as np
    from test_training import OPTIMIZER, SAMPLES, batches, linen_loss, of_case

    from normjax import training

    mesh = jax.make_mesh((8,), ("data",))
    half = slice(number * SAMPLES // 2, (number + 1) * SAMPLES // 2)
    for place, name in enumerate(names):
        model, inputs = of_case(name)
        first = next(batches(1, inputs))
        how = {"mask": first["mask"], "train": False, **first.get("inputs", {})}
        args = (model, OPTIMIZER, jax.random.key(0), first["image"])
        made = training.create_train_state(*args, ema=True, mesh=mesh, **how)
        params = training.place(jax.device_get(made.params), mesh)  # as if read from a file
        state = made._replace(params=params)
        step = training.make_train_step(model, OPTIMIZER, linen_loss, ema_decay=0.9)
        for batch in batches(steps, inputs):
            mine = jax.tree.map(lambda a: np.asarray(a)[half], batch)
            state, _ = step(state, training.shard_batch(mine, mesh))
        if number == 0:
            leaves = jax.device_get(jax.tree.leaves((state.params, state.statistics)))
            np.savez(f"{folder}/{place}.npz", *leaves)
