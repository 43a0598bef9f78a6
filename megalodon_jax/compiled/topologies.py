"""Devices for ahead-of-time compilation: TPUs and GPUs that this host does not have."""

import functools
import importlib.util
import os
import re
from typing import Any

from megalodon_jax.chips import CHIPS, device_kind_of
from megalodon_jax.errors import ConfigError
from pallas_kernels.common.devices import HOPPER

# XLA's description of a GPU (GpuTargetConfigProto). Limits of compute capability 9.0 that kernels
# here are not sized by, L2 cache included, are from NVIDIA's Hopper data sheets and the CUDA C++
# programming guide. A multiprocessor reserves 1 KiB of its shared memory for the system.
_HOPPER_TARGET = """
platform_name: "CUDA"
device_description_str: "{kind}"
gpu_device_info {{
  name: "{kind}"
  cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
  core_count: {limits.multiprocessors}
  fpus_per_core: 128
  clock_rate_ghz: {clock_ghz}
  device_memory_size: {memory_bytes}
  memory_bandwidth: {memory_bytes_per_second}
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: {limits.registers}
  registers_per_core_limit: {limits.registers}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {limits.shared_memory}
  shared_memory_per_core: {shared_memory_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  runtime_version: "13.0.0"
  driver_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
}}
dnn_version_info {{ major: 9 minor: 12 }}
"""
_GPUS = ("h100", "h200")
_GPUS_PER_HOST = 8
_TORUS_DIMENSIONS = {chip.name: chip.torus_dimensions for chip in CHIPS.values()}
KNOWN_TOPOLOGIES = (
    "v4:2x2x1, v5e:2x2 (4x4, 16x16, ...), v5p:2x2x1 (4x4x8, ...), v6e:2x2 (16x16, ...), "
    "tpu7x:2x2x1, h100:1 to h100:8, and h200:1 to h200:8"
)
_NAME = re.compile(r"(\w+):(\d+(?:x\d+)*)(?:x(\d+)slices)?")

type Device = Any  # jax.Device, which is a variable to type checkers


def find_devices(name: str, *, slices: int = 1) -> list[Device]:
    """Devices by the name of a topology, for compiling only.

    Args:
      name: a TPU and the shape of its torus in chips, "v5p:4x4x8"; or the GPUs of one host,
        "h200:2". "v5e:16x16x2slices" is the same as `slices=2`.
      slices: number of such TPUs, connected by the data center's network.

    Raises:
      ConfigError: the name is unknown or not a shape that exists, or the compiler is not installed.
    """
    match = _NAME.fullmatch(name)
    chip = match[1] if match else ""
    if match is None or not (chip in _GPUS or _TORUS_DIMENSIONS.get(chip)):
        raise ConfigError(f"no topology {name!r}; there are: {KNOWN_TOPOLOGIES}")
    if match[3]:
        if slices not in (1, int(match[3])):
            raise ConfigError(f"topology {name!r} and {slices} slices contradict each other")
        slices = int(match[3])
    if chip in _GPUS:
        if match[2] not in map(str, range(1, _GPUS_PER_HOST + 1)) or slices > 1:
            raise ConfigError(
                f"topology {name!r}: GPUs are those of one host, {chip}:1 to "
                f"{chip}:{_GPUS_PER_HOST}"
            )
        return list(gpu_devices(chip, int(match[2])))
    dimensions = _TORUS_DIMENSIONS[chip]
    if match[2].count("x") + 1 != dimensions:
        raise ConfigError(
            f"topology {name!r}: {chip} is a torus of {dimensions} dimensions; for example "
            f"{KNOWN_TOPOLOGIES}"
        )
    return list(tpu_devices(f"{chip}:{match[2]}", slices))


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
    # Otherwise libtpu asks Google Cloud's metadata server for the machine, and complains that
    # nobody answers.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # JAX makes one device of a v4 chip; the compiler must be asked for that.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    if slices > 1:
        # A host has up to 2 x 2 chips; with several slices libtpu must be told.
        sizes = [int(size) for size in name.partition(":")[2].split("x")]
        hosts = [min(size, 2) for size in sizes[:2]] + [1]
        options |= {"num_slices": slices, "chips_per_host_bounds": tuple(hosts)}
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"topology {name!r}: {reason}; for example {KNOWN_TOPOLOGIES}") from error
    return tuple(topology.devices)


@functools.cache
def gpu_devices(chip: str, count: int = 1) -> tuple[Device, ...]:
    """Hopper GPUs of one host.

    Args:
      chip: "h100" or "h200", the SXM modules.
      count: number of GPUs.

    Raises:
      ConfigError: the CUDA plugin is not installed.
    """
    from jax.experimental import topologies

    if not has_cuda_compiler():
        raise ConfigError(
            "the CUDA compiler, jax-cuda13-plugin, is not installed: pip install -e '.[aot]'"
        )
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=gpu_target(chip),
        topology=f"1x1x{count}",
    )
    return tuple(topology.devices)


def gpu_target(chip: str) -> str:
    """XLA's text description of a Hopper GPU, "h100" or "h200"."""
    kind = device_kind_of(chip)
    sheet = CHIPS[kind]
    assert sheet.clock_hz is not None
    return _HOPPER_TARGET.format(
        kind=kind,
        limits=HOPPER,
        clock_ghz=sheet.clock_hz / 1e9,
        memory_bytes=round(sheet.memory_bytes),
        memory_bytes_per_second=round(sheet.memory_bytes_per_second),
        shared_memory_per_core=HOPPER.shared_memory + 1024,
    )


def has_tpu_compiler() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def has_cuda_compiler() -> bool:
    """Whether JAX's CUDA plugin is installed."""
    return importlib.util.find_spec("jax_cuda13_plugin") is not None
