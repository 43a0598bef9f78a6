"""Limits of each kind of device that kernels are sized by, in one place."""

from typing import NamedTuple

MIB = 2**20


class GpuLimits(NamedTuple):
    """Resources of one GPU.

    Attributes:
      multiprocessors: streaming multiprocessors of the card.
      registers: 32-bit registers of a multiprocessor.
      max_registers_per_thread: registers that one thread can address.
      shared_memory: bytes of shared memory that one block may use.
    """

    multiprocessors: int
    registers: int
    max_registers_per_thread: int
    shared_memory: int


# H100 SXM and H200 (NVIDIA data sheets; CUDA C++ programming guide, compute capability 9.0). Parts
# with fewer multiprocessors run the same kernels; their last blocks start in a second wave.
HOPPER = GpuLimits(
    multiprocessors=132, registers=65_536, max_registers_per_thread=255, shared_memory=227 * 1024
)

# VMEM that the compiler gives a kernel on every TPU generation without a request.
DEFAULT_VMEM = 16 * MIB
# VMEM that a kernel may request: what the kernels were compiled with, below each chip's total.
TPU_VMEM = {
    "TPU v4": DEFAULT_VMEM,
    "TPU v5 lite": 110 * MIB,
    "TPU v5": 60 * MIB,
    "TPU v6 lite": 110 * MIB,
    "TPU7x": 60 * MIB,
}
_TPU_ALIASES = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}


def canonical_tpu_kind(device_kind: str) -> str:
    """The name under which the tables list a TPU generation that JAX may name in two ways."""
    return _TPU_ALIASES.get(device_kind, device_kind)
