"""Limits of each kind of device that kernels are sized by, in one place."""

import re
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

# By compute capability, for parts whose limits no live device tells: the largest part's
# multiprocessors (A100, A10/RTX 3090, L40S, H100, B200, RTX PRO 6000; NVIDIA's data sheets) and the
# shared memory of CUDA C++ programming guide's table of technical specifications.
_REGISTERS = {"registers": 65_536, "max_registers_per_thread": 255}
GPU_LIMITS = {
    80: GpuLimits(multiprocessors=108, shared_memory=163 * 1024, **_REGISTERS),
    86: GpuLimits(multiprocessors=84, shared_memory=99 * 1024, **_REGISTERS),
    89: GpuLimits(multiprocessors=142, shared_memory=99 * 1024, **_REGISTERS),
    90: HOPPER,
    100: GpuLimits(multiprocessors=148, shared_memory=227 * 1024, **_REGISTERS),
    120: GpuLimits(multiprocessors=188, shared_memory=99 * 1024, **_REGISTERS),
}
# Device kinds by name, for compiling without the device; a live device tells its capability itself.
_CAPABILITIES = (
    (re.compile(r"\bG?H(20|100|200|800)\b"), 90),
    (re.compile(r"\bG?B(100|200)\b"), 100),
    (re.compile(r"\bRTX (PRO \d000 Blackwell|50\d0)"), 120),
    (re.compile(r"\bL(4|20|40S?)\b|\bRTX (40\d0|\d000 Ada)"), 89),
    (re.compile(r"\bA(10G?|16|40)\b|\bRTX (30\d0|A\d000)"), 86),
    (re.compile(r"\bA(30|100|800)\b"), 80),
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


def capability_of(device_kind: str) -> int | None:
    """Compute capability of an NVIDIA GPU by its name, 90 for "NVIDIA H200"; None if unknown."""
    for pattern, capability in _CAPABILITIES:
        if pattern.search(device_kind):
            return capability
    return None


def canonical_tpu_kind(device_kind: str) -> str:
    """The name under which the tables list a TPU generation that JAX may name in two ways."""
    return _TPU_ALIASES.get(device_kind, device_kind)
