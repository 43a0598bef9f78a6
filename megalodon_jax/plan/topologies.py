"""Devices that are not there, for which a program can be compiled all the same."""

import functools
import importlib.util
import os
import re
from typing import Any

from megalodon_jax.errors import ConfigError

# What XLA wants to know of a GPU (GpuTargetConfigProto): NVIDIA's data sheet of the H200 SXM, and
# the limits of compute capability 9.0 in the CUDA C++ programming guide.
H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
gpu_device_info {
  name: "NVIDIA H200"
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 141000000000
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  runtime_version: "13.0.0"
  driver_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
}
dnn_version_info { major: 9 minor: 12 }
"""
KNOWN = (
    "v4:2x2x1, v5e:2x2 (4x4, 16x16, ...), v5p:2x2x1 (4x4x8, ...), v6e:2x2 (16x16, ...), "
    "tpu7x:2x2x1, and h200:1 to h200:8"
)
_DIMENSIONS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}
_NAME = re.compile(r"(\w+):(\d+(?:x\d+)*)(?:x(\d+)slices)?")

type Device = Any  # jax.Device, which is a variable to type checkers


def find_devices(name: str, *, slices: int = 1) -> list[Device]:
    """Devices of a machine by its name, for compiling only.

    Args:
      name: a TPU and the shape of its torus, "v5p:4x4x8" (chips); or GPUs of one host, "h200:2".
        "v5e:16x16x2slices" is the same as `slices=2`.
      slices: how many such TPUs, connected by the data center's network.

    Raises:
      ConfigError: the name is not known or not a shape that exists, or the compiler is not
        installed.
    """
    match = _NAME.fullmatch(name)
    kind = match[1] if match else ""
    if match is None or kind not in (*_DIMENSIONS, "h200"):
        raise ConfigError(f"no topology {name!r}; there are: {KNOWN}")
    if match[3]:
        if slices not in (1, int(match[3])):
            raise ConfigError(f"topology {name!r} and {slices} slices contradict each other")
        slices = int(match[3])
    if kind == "h200":
        if match[2] not in map(str, range(1, 9)) or slices > 1:
            raise ConfigError(f"topology {name!r}: GPUs are those of one host, h200:1 to h200:8")
        return list(h200_devices(int(match[2])))
    shape = tuple(int(size) for size in match[2].split("x"))
    if len(shape) != _DIMENSIONS[kind]:
        raise ConfigError(
            f"topology {name!r}: {kind} is a torus of {_DIMENSIONS[kind]} dimensions; for example "
            f"{KNOWN}"
        )
    return list(tpu_devices(f"{kind}:{match[2]}", slices))


@functools.cache
def tpu_devices(name: str, slices: int = 1) -> tuple[Device, ...]:
    """All devices of a TPU topology such as "v5e:4x4".

    Raises:
      ConfigError: libtpu is not installed, or does not know the shape.
    """
    import jax
    from jax.experimental import topologies

    if not has_tpu_compiler():
        raise ConfigError("the TPU compiler, libtpu, is not installed: pip install -e '.[aot]'")
    # libtpu takes a lock that a second process would not get.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # It would ask Google Cloud what machine this is, and complain that nobody answers.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # JAX's v4 is a whole chip; the compiler must be asked for that.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    if slices > 1:
        # A host has up to 2 x 2 chips; several slices must be told.
        sizes = [int(size) for size in name.partition(":")[2].split("x")]
        hosts = [min(size, 2) for size in sizes[:2]] + [1]
        options |= {"num_slices": slices, "chips_per_host_bounds": tuple(hosts)}
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"topology {name!r}: {reason}; for example {KNOWN}") from error
    return tuple(topology.devices)


@functools.cache
def h200_devices(count: int = 1) -> tuple[Device, ...]:
    """H200s of one host.

    Raises:
      ConfigError: the CUDA plugin is not installed.
    """
    from jax.experimental import topologies

    if not has_cuda_compiler():
        raise ConfigError(
            "the CUDA compiler, jax-cuda13-plugin, is not installed: pip install -e '.[aot]'"
        )
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=H200, topology=f"1x1x{count}"
    )
    return tuple(topology.devices)


def has_tpu_compiler() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def has_cuda_compiler() -> bool:
    """Whether JAX's CUDA plugin is installed."""
    return importlib.util.find_spec("jax_cuda13_plugin") is not None
