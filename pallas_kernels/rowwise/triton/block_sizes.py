"""How the Triton kernels divide rows into programs."""

from typing import NamedTuple

# A norm's row stays in registers: 32 numbers of it in each thread of 16 warps.
MAX_NORM_WIDTH = 16_384
# Columns of a gate's tile.
GATE_TILE = 1024
# Numbers of a step in each thread: one load of 16 bytes of bfloat16. With two rows of a norm in a
# step, Triton passes their moments through shared memory.
_NUMBERS_PER_THREAD = 8
# Widest rows whose gradients load the next row ahead: wider ones have no registers for it.
_MAX_PREFETCHED = 2048
# Programs of four warps per multiprocessor; more than fit run in further waves.
_FORWARD_PROGRAMS, _BACKWARD_PROGRAMS = 16, 8


class RowPrograms(NamedTuple):
    """How rows are divided.

    Attributes:
      block: columns of a step, a power of two.
      rows_per_step: rows of a step.
      num_warps: warps of a program.
      num_programs: programs along the rows.
      prefetch: whether a norm's next rows are loaded ahead.
    """

    block: int
    rows_per_step: int
    num_warps: int
    num_programs: int
    prefetch: bool


def choose_programs(
    num_rows: int, width: int, multiprocessors: int, *, norm: bool, backward: bool
) -> RowPrograms:
    """The division of (num_rows, width) numbers, for a GPU with so many multiprocessors."""
    block = max(128, 1 << (width - 1).bit_length())
    if not norm:
        block = min(block, GATE_TILE)
    num_warps = min(16, max(4, block // (256 if backward else 512)))
    rows_per_step = max(1, _NUMBERS_PER_THREAD * 32 * num_warps // block)
    per_multiprocessor = _BACKWARD_PROGRAMS if backward else _FORWARD_PROGRAMS
    wanted = max(1, multiprocessors * per_multiprocessor * 4 // num_warps)
    steps = -(-num_rows // rows_per_step)
    tiles = 1 if norm else -(-width // block)
    num_programs = min(steps, max(1, wanted // tiles))
    prefetch = not backward or block <= _MAX_PREFETCHED
    return RowPrograms(block, rows_per_step, num_warps, num_programs, prefetch)
