"""How the Hopper kernels divide a matrix into blocks."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pallas_kernels.common.devices import HOPPER

# Without tensor cores a warp has whole rows of the matrix: 32 threads with 8 adjacent weights each,
# 16 bytes of bfloat16.
WARPS, WIDTH = 4, 256
# Multiply-adds of 8 rows took 56 us for 32,000 x 1,024 on an H200, and 5 us for 1,024 x 2,048 (2.6
# for 2 rows).
MAX_MULTIPLY_ADD_ROWS = 4
# The first operand of `mma.sync` has 16 rows, that of `wgmma` 64.
MMA_ROWS, WGMMA_ROWS = 16, 64
MAX_ROWS = WGMMA_ROWS
# Weights that a block loads at once: 64 registers of every thread.
BYTES_IN_FLIGHT = 128 * 256
# Numbers of x that are loaded with the weights of a step: 64 registers.
MAX_LOADED_AHEAD = 8 * WIDTH


# Most output features of a block with tensor cores, columns of a warp, and of a tile.
TENSOR_CORE_FEATURES, WARP_WIDTH = 16, 32
TENSOR_CORE_WIDTH = WARPS * WARP_WIDTH
# Registers of a thread for the tiles of x that are loaded together.
ROW_REGISTERS = 64
# Fewer blocks do not read with all multiprocessors of a card, 132.
MIN_BLOCKS = 128
# Shared memory of a block for its weights.
MAX_WEIGHT_BYTES = 200 * 1024

# Columns of a step of `wgmma`: 128 bytes of bfloat16, a row of swizzled shared memory.
WGMMA_DEPTH = 64
# Bytes of a number of x there: float32 rows are rounded before.
_WIDE_ROW_BYTES = 2
# The axis of a cluster's blocks, which have a share of the columns each.
CLUSTER_AXIS = "split"
# Most columns of a `wgmma` product, and of the tiles in which outputs are finished.
_WGMMA_FEATURES, _OUTPUT_COLUMNS = 256, 64
# Most output features of a block in a cluster.
_CLUSTER_FEATURES = 128
# Shared memory of a block, so that two run on a multiprocessor; of one that runs alone.
_SHARED_MEMORY = (110 * 1024, 220 * 1024)
_MAX_STAGES = 6
# Bytes a second that all multiprocessors read from L2 together, and one of them; multiply-adds a
# second of one multiprocessor's tensor cores; seconds that a cluster of two blocks waits for its
# sums, and that twice as many output features of a block take after their product, from
# _FEW_FEATURES on. They rank the tilings, fitted to 49 calls on an H200 (README.md).
_L2_RATE, _MULTIPROCESSOR_RATE, _MULTIPLY_ADD_RATE = 4.7e12, 55e9, 0.8e12
_EXCHANGE_SECONDS, _FEATURES_SECONDS, _FEW_FEATURES = 0.2e-6, 0.65e-6, 32


class WideTiling(NamedTuple):
    """How a matrix is divided for 17 to 64 rows.

    Attributes:
      features: output features of a block; for SwiGLU of each half.
      splits: blocks of a cluster, which share the columns.
      stages: steps of WGMMA_DEPTH columns in shared memory.
    """

    features: int
    splits: int
    stages: int

    @property
    def columns(self) -> int:
        """Output features that a block finishes together: a power of two."""
        return min(_OUTPUT_COLUMNS, self.features & -self.features)


class TensorCoreTiling(NamedTuple):
    """How the columns of a matrix are divided for tensor cores.

    Attributes:
      tiles: tiles of columns that are loaded together.
      features: output features of a block, 8 or 16.
    """

    tiles: int
    features: int


class SkinnyTiling(NamedTuple):
    """How a matrix is divided without tensor cores.

    Attributes:
      rows_per_warp: rows of the matrix, output features, of a warp.
      step: columns of the matrix, a multiple of WIDTH, that are loaded together.
    """

    rows_per_warp: int
    step: int

    @property
    def rows(self) -> int:
        """Rows of the matrix of a block."""
        return WARPS * self.rows_per_warp


def choose_tiling(out_features: int, in_features: int, *, is_paired: bool) -> SkinnyTiling:
    """The tiling of a matrix.

    Args:
      out_features: rows of the matrix; of each half for SwiGLU.
      in_features: its columns.
      is_paired: whether a block has rows of both halves.
    """
    rows_per_warp = 1 if is_paired or out_features % (2 * WARPS) else 2
    rows = WARPS * rows_per_warp * (2 if is_paired else 1)
    widths = in_features // WIDTH
    most = max(1, BYTES_IN_FLIGHT // (2 * WIDTH * rows))
    steps = -(-widths // most)
    return SkinnyTiling(rows_per_warp, WIDTH * -(-widths // steps))


def choose_tensor_core_tiling(
    rows: int,
    in_features: int,
    widths: Sequence[int],
    *,
    row_bytes: int,
    weight_bytes: int,
    is_paired: bool,
) -> TensorCoreTiling | None:
    """The tiling of a matrix for tensor cores; None if a block's weights do not fit.

    Args:
      rows: of x, 2, 4, 8 or 16.
      in_features: columns of the matrix.
      widths: output features of every part.
      row_bytes: bytes of a number of x.
      weight_bytes: bytes of a weight.
      is_paired: whether a block has rows of both halves.
    """
    halves = 2 if is_paired else 1
    registers = max(8, rows) * row_bytes * TENSOR_CORE_WIDTH // (4 * 32 * WARPS)
    # The sums of both halves take registers too.
    tiles = min(in_features // TENSOR_CORE_WIDTH, ROW_REGISTERS // halves // registers)
    for features in (TENSOR_CORE_FEATURES, TENSOR_CORE_FEATURES // 2):
        fits = features * halves * in_features * weight_bytes <= MAX_WEIGHT_BYTES
        is_last = features < TENSOR_CORE_FEATURES
        blocks = sum(widths) // features
        is_divisor = all(width % features == 0 for width in widths)
        if fits and is_divisor and (is_last or blocks >= MIN_BLOCKS):
            return TensorCoreTiling(tiles, features)
    return None


def choose_wide_tiling(
    rows: int,
    in_features: int,
    widths: Sequence[int],
    *,
    weight_bytes: int,
    is_paired: bool,
) -> WideTiling:
    """The tiling of a matrix for 32 or 64 rows that is read fastest by the estimates above.

    Arguments as in `choose_tensor_core_tiling`, for bfloat16 rows; a multiple of 256 columns, of 8
    output features.
    """
    halves = 2 if is_paired else 1

    def seconds(tiling: WideTiling) -> float:
        blocks = sum(widths) // tiling.features * tiling.splits
        waves = -(-blocks // HOPPER.multiprocessors)
        columns, features = in_features // tiling.splits, tiling.features * halves
        exchanged = 4 * rows * features if tiling.splits > 1 else 0
        block_bytes = columns * (features * weight_bytes + rows * _WIDE_ROW_BYTES) + exchanged
        multiply_adds = WGMMA_ROWS * features * columns
        fixed = _EXCHANGE_SECONDS * math.log2(tiling.splits)
        fixed += _FEATURES_SECONDS * math.log2(max(features, _FEW_FEATURES))
        return fixed + max(
            blocks * block_bytes / _L2_RATE,
            waves * block_bytes / _MULTIPROCESSOR_RATE,
            waves * multiply_adds / _MULTIPLY_ADD_RATE,
        )

    tilings = wide_tilings(
        rows,
        in_features,
        widths,
        weight_bytes=weight_bytes,
        is_paired=is_paired,
    )
    return min(tilings, key=seconds)


def wide_tilings(
    rows: int,
    in_features: int,
    widths: Sequence[int],
    *,
    weight_bytes: int,
    is_paired: bool,
) -> Iterator[WideTiling]:
    """The tilings that fit, with as many stages as shared memory and columns allow.

    Arguments as in `choose_wide_tiling`.
    """
    halves = 2 if is_paired else 1
    common = math.gcd(*widths)
    for features in range(8, min(common, _WGMMA_FEATURES // halves) + 1, 8):
        # Outputs are finished in tiles of a power of two. 1,024 x 2,560: 11.8 us with 160 features,
        # five tiles, 8.0 with 128.
        if common % features or (features > _OUTPUT_COLUMNS and features % _OUTPUT_COLUMNS):
            continue
        for splits in (1, 2, 4, 8):
            steps = in_features // WGMMA_DEPTH // splits
            columns = WideTiling(features, splits, 1).columns
            # Every thread finishes an output; two stages, one is read while the other is filled.
            if steps < 2 or rows // splits * columns < 32 * WARPS:
                continue
            # 2,048 x 6,656 with clusters of four: 12.4 us with 256 features, 11.4 with 128.
            if splits > 1 and features > _CLUSTER_FEATURES:
                continue
            stage = WGMMA_DEPTH * (features * halves * weight_bytes + WGMMA_ROWS * _WIDE_ROW_BYTES)
            # Sums, and integers as bfloat16.
            fixed = WGMMA_ROWS * (features * halves + 8) * 4
            fixed += 2 * WGMMA_DEPTH * features * halves * 2 if weight_bytes == 1 else 0
            for memory in _SHARED_MEMORY:
                stages = min(_MAX_STAGES, steps, (memory - fixed) // stage)
                if stages >= min(3, steps):
                    yield WideTiling(features, splits, stages)
                    break
