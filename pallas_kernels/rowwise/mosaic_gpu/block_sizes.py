"""How the Hopper kernels share out rows, from one sweep on an H200 (README.md).

What counts is that all blocks run at once, which their registers decide, or that there are many
more: a second, partly filled wave of blocks doubled the time of a gate.
"""

from typing import NamedTuple

# An H200's and an H100 SXM's; on parts with fewer, the last blocks wait for the first.
MULTIPROCESSORS = 132
# Numbers in the rows from which on kernels are the default: fewer pass in less time than a launch
# takes, and XLA fuses them with their surroundings.
SMALLEST_SIZE = 2**20
# Widths whose multiples are the default: all loads are 16 bytes wide. Others run by name.
DEFAULT_WIDTH = 1024


class Choice(NamedTuple):
    """See `mosaic_gpu_kernels.Shape`; blocks are those of one multiprocessor."""

    rows_at_once: int
    blocks: int
    keep_vectors: bool = True
    ahead: bool = True


# By the widest rows, forward and backward. RMSNorm above 1,024 and LayerNorm at 2,048 were not
# measured: what fits into registers, chosen by analogy.
NORMS: dict[str, dict[int, tuple[Choice, Choice]]] = {
    "rms_norm": {
        1024: (Choice(2, 8), Choice(2, 4)),
        2048: (Choice(1, 6), Choice(1, 3)),
        4096: (Choice(1, 4), Choice(1, 2, keep_vectors=False)),
    },
    "layer_norm": {
        1024: (Choice(2, 4), Choice(2, 3)),
        2048: (Choice(1, 4), Choice(1, 3, keep_vectors=False, ahead=False)),
        4096: (Choice(1, 3, keep_vectors=False), Choice(1, 2, keep_vectors=False, ahead=False)),
    },
}
# A row of a norm stays in registers; a gate's is cut into tiles, the widest that divides it.
WIDEST_NORM = 4096
GATE_TILES = (1024, 512, 256, 128)
GATES = Choice(1, 32, keep_vectors=False, ahead=False), Choice(2, 4)
