"""The layout of channels, orders and time in CEMA's TPU kernels, and the products in it.

Time runs in blocks of T = 128 tokens, one lane each. A kernel works on 128 channels at a time and
transposes every block to (channels, T). The states of a group of channels fill the 128 lanes of one
register row: real parts of every channel's orders, then imaginary parts, so that multiplying by i
is a rotation by 64 lanes. README.md derives the block form.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Complex, Float, Int32

BLOCK = 128
CHANNELS = 128
LANES = 128
HALF = LANES // 2
SUBLANES = 8
# Transposed blocks are an odd number of rows apart: loads with a sublane stride that is a multiple
# of 8 take one instruction per row, with an odd stride one per eight rows.
BLOCK_STRIDE = BLOCK + 1
_PADDED_ORDERS = (16, 32)


class CemaTpuPlan(NamedTuple):
    """Static choices that a kernel is specialised for.

    Attributes:
      length: L, tokens of a row.
      blocks: blocks of T tokens in one grid step.
      order: N rounded up to 16 or 32.
      exact: float32 products; otherwise bfloat16 products with tables and states in two terms.
      unroll: groups of channels in flight at once.
      vmem_limit: bytes of VMEM that a kernel may use.
      interpret: as in `pallas_call`.
    """

    length: int
    blocks: int
    order: int
    exact: bool
    unroll: int
    vmem_limit: int
    interpret: bool | pltpu.InterpretParams

    @property
    def tile_size(self) -> int:
        """Tokens of one grid step."""
        return self.blocks * BLOCK

    @property
    def num_tiles(self) -> int:
        """Grid steps of a row."""
        return -(-self.length // self.tile_size)

    @property
    def group_size(self) -> int:
        """Channels whose states share a register row."""
        return HALF // self.order

    @property
    def num_groups(self) -> int:
        """Groups of the channels of one grid step."""
        return CHANNELS // self.group_size

    @property
    def state_stride(self) -> int:
        """Distance of two blocks' states in scratch; odd like `BLOCK_STRIDE`."""
        return self.num_groups + 1


class CemaTpuDocuments(NamedTuple):
    """Segment pieces of packed rows, by blocks; rows are right-padded to whole tiles.

    Attributes:
      piece: number of the token's piece in its block, 0 continues the block before; -1 is padding.
      piece_from_end: the same counted from the block's last piece; -1 is padding.
      cuts: boundaries between the pieces of every block.
      most_cuts: the most boundaries that any block of the tile has.
    """

    piece: Int32[Array, "B J T"]
    piece_from_end: Int32[Array, "B J T"]
    cuts: Int32[Array, "B J"]
    most_cuts: Int32[Array, "B K"]


def padded_order(order: int) -> int:
    """N rounded up to what the kernels compute."""
    return next(size for size in _PADDED_ORDERS if size >= order)


def to_lanes(z: Complex[Array, "*S D N"], order: int) -> Float[Array, "*S G 128"]:
    """States or decays of all channels in the kernels' layout, zero-padded to `order`."""
    group = HALF // order
    widths = [(0, 0)] * (z.ndim - 1) + [(0, order - z.shape[-1])]
    padded = jnp.pad(z, widths).reshape(*z.shape[:-2], z.shape[-2] // group, HALF)
    return jnp.concatenate([padded.real, padded.imag], axis=-1)


def from_lanes(a: Float[Array, "*S G 128"], padded: int, order: int) -> Complex[Array, "*S D N"]:
    """The inverse of `to_lanes`, from `padded` orders to `order` of them."""
    z = lax.complex(a[..., :HALF], a[..., HALF:])
    return z.reshape(*a.shape[:-2], -1, padded)[..., :order]


def split_terms(a: Array, exact: bool) -> tuple[Array, ...]:
    """Terms of float32 numbers for `multiply`: one, or two in bfloat16 (error 2^-17)."""
    if exact:
        return (a,)
    high = a.astype(jnp.bfloat16)
    return high, (a - high.astype(jnp.float32)).astype(jnp.bfloat16)


def stack(rows: list[Float[Array, "J T"]], plan: CemaTpuPlan) -> tuple[Array, ...]:
    """Rows of tokens stacked for `multiply`; tokens are a single term."""
    stacked = jnp.concatenate(rows, axis=0)
    return (stacked,) if plan.exact else (stacked.astype(jnp.bfloat16),)


def multiply(
    a: tuple[Array, ...], b: tuple[Array, ...], contracted: tuple[int, int], plan: CemaTpuPlan
) -> Float[Array, "M K"]:
    """The matrix product of sums of terms, without the products of two low terms."""
    num_terms = max(len(a), len(b))
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    total = None
    for i, left in enumerate(a):
        for right in b[: num_terms - i]:
            if plan.interpret:
                # The CPU lacks some bfloat16 products. Products of bfloat16 numbers are exact in
                # float32, so the result is the same.
                left, right = left.astype(jnp.float32), right.astype(jnp.float32)
            product = lax.dot_general(
                left,
                right,
                dimensions,
                precision=lax.Precision.HIGHEST if left.dtype == jnp.float32 else None,
                preferred_element_type=jnp.float32,
            )
            total = product if total is None else total + product
    assert total is not None
    return total


def zero_unless(mask: Array | None, a: Array) -> Array:
    """Zero where not `mask`; None selects everything."""
    return a if mask is None else jnp.where(mask, a, 0.0)


def channel_blocks(channel: Array, plan: CemaTpuPlan) -> pl.Slice:
    """Slice of one channel's (J, T) tokens in transposed blocks."""
    return pl.ds(channel, plan.blocks, stride=BLOCK_STRIDE)


def group_rows(ref: Any, group: Array, plan: CemaTpuPlan) -> list[Float[Array, "J T"]]:
    """The tokens of every channel of a group, from transposed blocks."""
    first = group * plan.group_size
    return [ref[channel_blocks(first + i, plan), :] for i in range(plan.group_size)]


def group_states(group: Array, plan: CemaTpuPlan) -> pl.Slice:
    """Slice of one group's (J, 128) states in scratch."""
    return pl.ds(group, plan.blocks, stride=plan.state_stride)


def block_states(block: Array, plan: CemaTpuPlan) -> pl.Slice:
    """Slice of one block's (groups, 128) states in scratch."""
    return pl.ds(block * plan.state_stride, plan.num_groups)


def load_transposed(
    source: Array, target: Array, piece: Array | None, tile: Array, plan: CemaTpuPlan
) -> None:
    """Copies a (tile, channels) block to scratch as transposed blocks, with 0 for padding."""
    position = lax.broadcasted_iota(jnp.int32, (1, BLOCK), 1) + tile * plan.tile_size
    for j in range(plan.blocks):
        block = source[0, pl.ds(j * BLOCK, BLOCK), :].astype(jnp.float32).T
        if piece is not None:
            block = jnp.where(piece[0, pl.ds(j, 1), :] >= 0, block, 0.0)
        elif plan.length % plan.tile_size:
            block = jnp.where(position + j * BLOCK < plan.length, block, 0.0)
        target[pl.ds(j * BLOCK_STRIDE, BLOCK), :] = block


def store_transposed(source: Array, target: Array, piece: Array | None, plan: CemaTpuPlan) -> None:
    """Copies transposed blocks back to a (tile, channels) block, with 0 for padding."""
    for j in range(plan.blocks):
        block = source[pl.ds(j * BLOCK_STRIDE, BLOCK), :]
        if piece is not None:
            block = jnp.where(piece[0, pl.ds(j, 1), :] >= 0, block, 0.0)
        target[0, pl.ds(j * BLOCK, BLOCK), :] = block.T.astype(target.dtype)


def pack_taps(taps: Float[Array, "8 T"], plan: CemaTpuPlan) -> list[Array]:
    """Terms of taps for `toeplitz`: float32, or int32 pairs of bfloat16.

    A pair has the elements of two successive rows of the matrix in one column. The TPU packs two
    rows of bfloat16 in the same way, so the matrix needs no conversion.
    """
    if plan.exact:
        return [taps]
    pairs = []
    for term in split_terms(taps, plan.exact):
        # A bfloat16 is the upper half of a float32.
        bits = lax.bitcast_convert_type(term.astype(jnp.float32), jnp.int32)
        pairs.append(lax.shift_right_logical(bits, 16) | (pltpu.roll(bits, 1, 1) & -0x10000))
    return pairs


def toeplitz_mask(plan: CemaTpuPlan, *, keep_upper: bool) -> Array:
    """The triangle for `toeplitz`: columns from the diagonal on, or up to it."""
    if plan.exact:
        row = lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), 0)
        column = lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), 1)
        return column >= row if keep_upper else column <= row
    pair = lax.broadcasted_iota(jnp.int32, (BLOCK // 2, BLOCK), 0) * 2
    column = lax.broadcasted_iota(jnp.int32, (BLOCK // 2, BLOCK), 1)
    first = column >= pair if keep_upper else column <= pair
    second = column >= pair + 1 if keep_upper else column <= pair + 1
    return jnp.where(first, 0xFFFF, 0) | jnp.where(second, -0x10000, 0)


def toeplitz(taps: Array, mask: Array, plan: CemaTpuPlan) -> tuple[Array, ...]:
    """Terms of the (T, T) matrix whose row i is `taps` rotated right by i, zero outside the mask.

    Args:
      taps: one channel of `pack_taps`, (terms, T).
      mask: from `toeplitz_mask`.
      plan: the kernel's.
    """
    if plan.exact:
        return (jnp.where(mask, _rotated_rows(taps, 1, BLOCK), 0.0),)
    pairs = [
        _rotated_rows(taps[term : term + 1], 2, BLOCK // 2) & mask for term in range(taps.shape[0])
    ]
    return tuple(pltpu.bitcast(pair, jnp.bfloat16) for pair in pairs)


def _rotated_rows(row: Array, stride: int, count: int) -> Array:
    # Eight rows by three conditional rotations, the others from them: all shifts are static, since
    # TPU v4 has no others.
    base = jnp.broadcast_to(row, (SUBLANES, BLOCK))
    sublane = lax.broadcasted_iota(jnp.int32, (SUBLANES, BLOCK), 0)
    for bit in (1, 2, 4):
        base = jnp.where(sublane & bit, pltpu.roll(base, bit * stride, 1), base)
    shifts = range(0, count * stride, SUBLANES * stride)
    return jnp.concatenate([pltpu.roll(base, s, 1) if s else base for s in shifts], axis=0)


def fold_diagonals(products: Float[Array, "T T"]) -> Float[Array, "8 T"]:
    """Rotates row s left by s - s % 8 and sums the rows modulo 8; see `unfold_diagonals`."""
    rows = [products[:SUBLANES]] + [
        pltpu.roll(products[first : first + SUBLANES], BLOCK - first, 1)
        for first in range(SUBLANES, BLOCK, SUBLANES)
    ]
    # A tree of sums, so that no sum waits for all rotations before it.
    while len(rows) > 1:
        rows = [a + b for a, b in zip(rows[::2], rows[1::2], strict=True)]
    return rows[0]


def unfold_diagonals(folded: Float[Array, "8 T"]) -> Float[Array, "1 T"]:
    """Sums along the diagonals t - s = τ of products from `fold_diagonals`."""
    sublane = lax.broadcasted_iota(jnp.int32, folded.shape, 0)
    for bit in (1, 2, 4):
        folded = jnp.where(sublane & bit, pltpu.roll(folded, BLOCK - bit, 1), folded)
    return folded.sum(axis=0, keepdims=True)


def rotate_half(a: Array) -> Array:
    """Swaps real and imaginary parts."""
    return pltpu.roll(a, HALF, 1)


def table_of_group(table: Array, group: Array) -> tuple[Array, ...]:
    """The terms of one group's table in scratch."""
    return tuple(table[group, term] for term in range(table.shape[1]))
