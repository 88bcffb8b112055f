#!/usr/bin/env bash
# jax 0.12.0.1, libtpu 0.0.52, compiled ahead of time for a TPU v5e, no device needed. `cost_analysis()["bytes accessed"]` of
# a compiled program counts traffic of the memory on the chip as that of the device's memory. An input that fits on the chip
# is prefetched there between two passes, and the count is 7 bytes for each byte of the input; for twice the input, which does
# not fit, it is 3, and less in all. The count does not say what crosses the memory of the device. In the text of the program
# the memory space of every array tells the two apart: S(1) is on the chip.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.12.0.1 libtpu==0.0.52
cat > "$folder/run.py" <<'PY'
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

chips = topologies.get_topology_desc(topology_name="v5e:2x2", platform="tpu").devices
one = NamedSharding(Mesh(np.array(chips[:1]), ("chip",)), PartitionSpec())


def normalized(x):
    wide, axes = x.astype(jnp.float32), (0, 1, 2)
    mean = wide.mean(axes)
    var = (wide**2).mean(axes) - mean**2
    return ((wide - mean) * jax.lax.rsqrt(var + 1e-5)).astype(x.dtype)


counts, prefetched = {}, {}
for samples in (256, 512):
    x = jax.ShapeDtypeStruct((samples, 28, 28, 256), jnp.bfloat16, sharding=one)
    program = jax.jit(normalized).lower(x).compile()
    counts[samples] = program.cost_analysis()["bytes accessed"] / (2 * x.size)
    whole = f"bf16[{samples},28,28,256]"
    prefetched[samples] = any(
        whole in line and "copy-start" in line and "S(1)" in line
        for line in program.as_text().splitlines()
    )
    print(f"{samples} samples: {counts[samples]:.1f} bytes for each, on the chip: {prefetched[samples]}")
assert round(counts[256], 1) == 7.0 and prefetched[256]
assert round(counts[512], 1) == 3.0 and not prefetched[512]
PY
TPU_SKIP_MDS_QUERY=1 TPU_ACCELERATOR_TYPE=v5litepod-4 TPU_WORKER_HOSTNAMES=localhost TF_CPP_MIN_LOG_LEVEL=3 \
  JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/run.py" 2> /dev/null
# Seen:
# 256 samples: 7.0 bytes for each, on the chip: True
# 512 samples: 3.0 bytes for each, on the chip: False
