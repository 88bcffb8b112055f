"""Devices to compile for that need not be there."""

import dataclasses
import functools
import importlib.metadata
import os
from pathlib import Path
from typing import Any

from benchmarks.compilers import traffic

# Published properties of the card, as XLA's protocol buffer `GpuTargetConfig` has them.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 12 minor: 8 patch: 0 }
"""
CARDS = {"H100": H100}
SLICES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
PODS = {"v5e": ("v5e:2x2", "v5e:8x8", "v5e:16x16")}
DEFAULTS = (*SLICES, *CARDS)
# Packages of the compilers; the extra with that name behind `compilers-` installs them.
COMPILERS = {"cuda": ("jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12"), "tpu": ("libtpu",)}
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
CHANGING = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # variables that would change the programs


@dataclasses.dataclass(frozen=True)
class Target:
    """What to compile for, by a name such as "v5e", "v5e:16x16" or "H100"."""

    name: str

    @property
    def kind(self) -> str:
        """Of its compiler, a key of `COMPILERS`."""
        return "cuda" if self.name in CARDS else "tpu"

    @property
    def pods(self) -> tuple[str, ...]:
        """Names of slices with many chips."""
        return PODS.get(self.name, (self.name,) if ":" in self.name else ())

    @property
    def file(self) -> str:
        """Name of its file of results."""
        return self.name.replace(":", "-") + ".json"

    @property
    def packages(self) -> tuple[str, ...]:
        """Those of its compiler."""
        return COMPILERS[self.kind]

    def missing(self) -> str | None:
        """What to install, in a sentence; None if the compiler is there."""
        try:
            for package in self.packages:
                importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            extras = f"benchmarks,compilers-{self.kind}"
            return f"{self.name} needs {error.name}: pip install -e '.[{extras}]'"
        return None

    def devices(self) -> list[Any]:
        """Its devices, on which programs can be compiled but not run.

        Raises:
          ValueError: for a name that the TPU compiler does not know.
        """
        from jax.experimental import topologies

        if self.kind == "cuda":
            how = {"target_config": CARDS[self.name], "topology": "1x1x1"}
            return topologies.get_topology_desc(platform="cuda", topology_name="", **how).devices
        name = SLICES.get(self.name, self.name)
        try:
            return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
        except Exception as error:
            first = str(error).partition("\n")[0]
            raise ValueError(f"no topology {self.name!r}: {first}") from None


def prepare() -> None:
    """Sets the environment of a process that will compile; to be called before JAX is imported."""
    for name in CHANGING:
        os.environ.pop(name, None)
    os.environ.update(ENVIRONMENT)


def placed(tree: Any, sharding: Any) -> Any:
    """Shapes of arrays on devices that are not there, for the arrays or shapes of `tree`."""
    import jax

    one = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    return jax.tree.map(one, tree)


class Compiler:
    """Compiles for a target, and counts.

    Attributes:
      target: what to compile for.
      devices: of the target.
    """

    def __init__(self, target: Target, dump: Path | None = None):
        self.target = target
        self.devices = target.devices()
        self._dump = dump

    @functools.cached_property
    def one(self) -> Any:
        """The sharding of arrays on a single device."""
        import jax

        return jax.sharding.SingleDeviceSharding(self.devices[0])

    def figures(self, lowered: Any, label: str) -> dict[str, Any]:
        """Compiles a lowered program.

        Args:
          lowered: by `jax.jit(...).lower(...)` with arguments that are `placed`.
          label: words by which to name the file with the program's text.

        Returns:
          Bytes `read` and `written` in the memory of a device, `kernels`, `temporaries` and
          `workspace` in bytes, `collectives`, and what the compiler itself says of bytes
          `accessed`, on the chip too, and of `seconds`, for programs without loops.
        """
        options = {"xla_gpu_autotune_level": 0} if self.target.kind == "cuda" else None
        compiled = lowered.compile(compiler_options=options)
        text = compiled.as_text()
        if self._dump is not None:
            folder = self._dump / self.target.file.removesuffix(".json")
            folder.mkdir(parents=True, exist_ok=True)
            name = "".join(c if c.isalnum() or c in ".-" else "_" for c in label)
            (folder / f"{name}.txt").write_text(text)
        found = dataclasses.asdict(traffic.count(text))
        found["temporaries"] = compiled.memory_analysis().temp_size_in_bytes
        cost = compiled.cost_analysis() or {}
        loops = [line for line in text.splitlines() if " while(" in line]
        if cost and all(map(traffic.is_exception, loops)):
            found["accessed"] = int(cost["bytes accessed"])
            seconds = cost.get("optimal_seconds", -1.0)
            found["seconds"] = seconds if seconds > 0 else None
        return found
