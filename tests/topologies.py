"""Compilers for devices that are not there: TPUs by name, and one NVIDIA H200.

Nothing compiled here can run, but it says what a compiler says: whether a kernel is accepted, the
memory that it takes, and for Mosaic GPU kernels the registers and spills.
"""

import contextlib
import functools
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from megalodon_jax.plan import topologies

type Device = Any  # jax.Device, which is a variable to type checkers


class KernelUsage(NamedTuple):
    """What ptxas reports of one Mosaic GPU kernel.

    Attributes:
      name: name of the kernel's body function.
      registers: registers of a thread.
      spill_bytes: bytes of registers stored to local memory and loaded from it.
    """

    name: str
    registers: int
    spill_bytes: int


# A process compiles every kernel once, so ptxas speaks of it once; by the kernel's hash.
_known_usage: dict[str, KernelUsage] = {}


@functools.cache
def tpu_device(name: str) -> Device:
    """The first device of a TPU topology such as "v5e:1x1", "v4:2x2x1", "v5p:1x1x1", "v6e:1x1"."""
    if not topologies.has_tpu_compiler():
        pytest.skip("the TPU compiler, libtpu, is not installed: pip install -e '.[aot]'")
    return topologies.tpu_devices(name)[0]


@functools.cache
def h200_device() -> Device:
    """One H200."""
    if not topologies.has_cuda_compiler():
        pytest.skip("the CUDA compiler, jax-cuda13-plugin, is not installed: pip install '.[aot]'")
    return topologies.h200_devices()[0]


def compile_for(
    device: Device, function: Callable[..., Any], *arguments: Any
) -> jax.stages.Compiled:
    """Compiles function(*arguments) for a device of `tpu_device` or `h200_device`.

    Args:
      device: what to compile for.
      function: traceable; bind what is static with functools.partial.
      arguments: arrays or jax.ShapeDtypeStructs, or trees of them; only shape and dtype count.
    """
    mesh = Mesh(np.array([device]), ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments
    )
    # Without the mesh, Pallas asks the process's own backend what to compile for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), _ptxas_reports() as reports:
        # Optimized as on a device, whatever tests/conftest.py asks of the CPU.
        compiled = (
            jax.jit(function)
            .lower(*shapes)
            .compile(compiler_options={"xla_backend_optimization_level": 3})
        )
        if device.platform != "tpu":
            _remember(compiled, reports)
    return compiled


def ptxas_usage(compiled: jax.stages.Compiled) -> list[KernelUsage]:
    """Registers and spills of the Mosaic GPU kernels in a result of `compile_for`, as they run.

    Raises:
      ValueError: there is no such kernel in it, or it was compiled without `compile_for` before.
    """
    kernels = _mosaic_gpu_kernels(compiled)
    if not kernels:
        raise ValueError("there is no Mosaic GPU kernel in this function")
    missing = [name for kernel_hash, name in kernels.items() if kernel_hash not in _known_usage]
    if missing:
        raise ValueError(
            f"no ptxas report on {', '.join(missing)}; compile it with compile_for, and not before "
            "by other means: a process compiles a kernel once"
        )
    return [_known_usage[kernel_hash] for kernel_hash in kernels]


@contextlib.contextmanager
def _ptxas_reports() -> Iterator[Path]:
    # Mosaic GPU reads its environment at every compilation.
    names = ("MOSAIC_GPU_DUMP_TO", "MOSAIC_GPU_DUMP_PTXAS")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory() as directory:
        os.environ.update(zip(names, (directory, "1"), strict=True))
        try:
            yield Path(directory)
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _remember(compiled: jax.stages.Compiled, reports: Path) -> None:
    """Files the ptxas reports of new kernels under their hashes."""
    new: dict[str, list[str]] = {}
    for kernel_hash, name in _mosaic_gpu_kernels(compiled).items():
        if kernel_hash not in _known_usage:
            new.setdefault(name, []).append(kernel_hash)
    # Kernels of one name are numbered, and listed in the program, in the order of compilation.
    files = sorted(reports.glob("*.ptxas"), key=lambda path: int(path.stem.rpartition("_")[2]))
    for file in files:
        usage = _parse_report(file.read_text())
        if new.get(usage.name):
            _known_usage[new[usage.name].pop(0)] = usage


def _mosaic_gpu_kernels(compiled: jax.stages.Compiled) -> dict[str, str]:
    """Names of a program's Mosaic GPU kernels by their hashes, in the order of the program."""
    kernels = {}
    program = compiled.as_text()
    assert program is not None
    for line in program.splitlines():
        kernel_hash = re.search(r'kernel_hash = "((?:[^"\\]|\\.)*)"', line)
        if kernel_hash:
            name = re.search(r"\\00(?!stable_mosaic_gpu)(\w+)_mosaic_gpu\\00", line)
            assert name, "a Mosaic GPU kernel without a name"
            kernels[kernel_hash[1]] = name[1]
    return kernels


def _parse_report(report: str) -> KernelUsage:
    name = re.search(r"Compiling entry function '(\w+?)(?:_mosaic_gpu)?(?:_kernel)?'", report)
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.findall(r"(\d+) bytes spill", report)
    assert name, report
    assert registers, report
    assert spills, report
    return KernelUsage(name[1], int(registers[1]), sum(map(int, spills)))
