"""Ahead-of-time compilation for tests: TPUs by name, and NVIDIA's H100 and H200.

The result cannot run, but its compiler reports whether a kernel is accepted, the memory that it
takes, and for Mosaic GPU kernels the registers and spills.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from megalodon_jax.compiled import topologies
from megalodon_jax.compiled.ptxas import KernelUsage, ptxas_reports, ptxas_usage, record_usage
from pallas_kernels.common.devices import GPU_LIMITS, HOPPER

__all__ = [
    "KernelUsage",
    "blackwell_device",
    "compile_for",
    "compile_lowered",
    "h100_device",
    "h200_device",
    "ptxas_usage",
    "tpu_device",
]

type Device = Any  # jax.Device, which is a variable to type checkers


@functools.cache
def tpu_device(name: str) -> Device:
    """The first device of a TPU topology such as "v5e:1x1", "v4:2x2x1", "v5p:1x1x1", "v6e:1x1"."""
    if not topologies.has_tpu_compiler():
        pytest.skip("the TPU compiler, libtpu, is not installed: pip install -e '.[aot]'")
    return topologies.tpu_devices(name)[0]


def h200_device() -> Device:
    """One H200."""
    return _gpu_device("h200")


def h100_device() -> Device:
    """One H100 (SXM)."""
    return _gpu_device("h100")


@functools.cache
def blackwell_device(capability: int) -> Device:
    """One B200 (100) or RTX PRO 6000 (120), as far as the compiler looks at it."""
    from jax.experimental import topologies as jax_topologies

    if not topologies.has_cuda_compiler():
        pytest.skip("the CUDA compiler, jax-cuda13-plugin, is not installed: pip install '.[aot]'")
    kind = {100: "NVIDIA B200", 120: "NVIDIA RTX PRO 6000 Blackwell Server Edition"}[capability]
    limits = GPU_LIMITS[capability]
    target = (
        topologies.gpu_target("h200")
        .replace("NVIDIA H200", kind)
        .replace("major: 9 minor: 0", f"major: {capability // 10} minor: 0")
        .replace(f"core_count: {HOPPER.multiprocessors}", f"core_count: {limits.multiprocessors}")
        .replace(str(HOPPER.shared_memory), str(limits.shared_memory))
        .replace(str(HOPPER.shared_memory + 1024), str(limits.shared_memory + 1024))
    )
    return jax_topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=target, topology="1x1x1"
    ).devices[0]


@functools.cache
def _gpu_device(chip: str) -> Device:
    if not topologies.has_cuda_compiler():
        pytest.skip("the CUDA compiler, jax-cuda13-plugin, is not installed: pip install '.[aot]'")
    return topologies.gpu_devices(chip)[0]


def compile_for(
    device: Device,
    function: Callable[..., Any],
    *arguments: Any,
    donate_argnums: int | tuple[int, ...] = (),
) -> jax.stages.Compiled:
    """Compiles function(*arguments) for a device of `tpu_device` or `h200_device`.

    Args:
      device: the device to compile for.
      function: a traceable function; bind static arguments with functools.partial.
      arguments: arrays or jax.ShapeDtypeStructs, or trees of them; only shape and dtype count.
      donate_argnums: as in `jax.jit`.
    """
    mesh = Mesh(np.array([device]), ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments
    )
    # Without the mesh, Pallas takes the target from the process's own backend.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return compile_lowered(jax.jit(function, donate_argnums=donate_argnums).lower(*shapes))


def compile_lowered(lowered: jax.stages.Lowered) -> Any:
    """Compiles a program that was lowered for a device of this module, and keeps the reports on its
    Mosaic GPU kernels, each of which a process compiles once."""
    with ptxas_reports() as reports:
        # Optimized as on a device, whatever tests/conftest.py sets for the CPU.
        compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 3})
        record_usage(compiled, reports)
    return compiled
