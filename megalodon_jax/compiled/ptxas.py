"""Registers and spills of Mosaic GPU kernels, from the reports of NVIDIA's assembler ptxas."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax


class KernelUsage(NamedTuple):
    """The ptxas report of one Mosaic GPU kernel.

    Attributes:
      name: name of the kernel's body function.
      registers: registers of a thread.
      spill_bytes: bytes of registers stored to local memory and loaded from it.
    """

    name: str
    registers: int
    spill_bytes: int


# By the kernel's hash: a process compiles every kernel once, so ptxas reports on it once.
_known_usage: dict[str, KernelUsage] = {}


@contextlib.contextmanager
def ptxas_reports() -> Iterator[Path]:
    """Makes compilations inside write a report on each new kernel into the yielded directory."""
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


def record_usage(compiled: jax.stages.Compiled, reports: Path) -> None:
    """Keeps the reports on the new kernels of a function that was compiled in `ptxas_reports`.

    Args:
      compiled: the function.
      reports: the directory that `ptxas_reports` yielded.
    """
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


def ptxas_usage(compiled: jax.stages.Compiled) -> list[KernelUsage]:
    """Registers and spills of the Mosaic GPU kernels of a compiled function, in program order.

    Raises:
      ValueError: it has no such kernel, or a kernel was compiled before outside `ptxas_reports`.
    """
    kernels = _mosaic_gpu_kernels(compiled)
    if not kernels:
        raise ValueError("the function has no Mosaic GPU kernel")
    missing = [name for kernel_hash, name in kernels.items() if kernel_hash not in _known_usage]
    if missing:
        raise ValueError(
            f"no ptxas report on {', '.join(missing)}; compile it inside ptxas_reports, and not "
            "outside of it before: a process compiles a kernel once"
        )
    return [_known_usage[kernel_hash] for kernel_hash in kernels]


def _mosaic_gpu_kernels(compiled: jax.stages.Compiled) -> dict[str, str]:
    """Names of a program's Mosaic GPU kernels by their hashes, in program order."""
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
