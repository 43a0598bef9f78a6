"""Kernels of chunk decoding: attention over splits of the slots, then their combination.

A block has one split of a row's head and some columns of its values. With s[j] = q·k[j] over the
split's filled slots

    m = max_j s[j],    l = Σ_j exp(s[j] - m),    a = Σ_j exp(s[j] - m) v[j]

and the combination is Σ_i exp(m_i - M) a_i / Σ_i exp(m_i - M) l_i with M = max_i m_i over splits i.
Splits without a filled slot return at once: their results are undefined and never read.

A cache of 8-bit integers is converted in registers: the scale of a key multiplies its score, that
of a value its weight in a.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.chunk_attention.types import Int8Slots, KeyValueCache
from pallas_kernels.chunk_decode.block_sizes import (
    KEY_BYTES,
    SCORE_SLOTS,
    THREADS,
    DecodeTiling,
)
from pallas_kernels.common.mosaic_gpu import widen_int8


def key_layout(columns: int) -> Any:
    """Keys of SCORE_SLOTS slots and some columns in registers.

    A warp has 16 slots. Four threads share a slot, with a quarter of the columns each: a load of 16
    bytes if the columns have KEY_BYTES.
    """
    return plgpu.Layout.TILED(
        plgpu.Tiling(((SCORE_SLOTS, columns), (16, columns), (8, columns), (columns // 4,))),
        warp_dims=(-7,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )


# The same for any number of columns.
SCORE_LAYOUT = key_layout(32).reduce(1)


class DecodeOperands(NamedTuple):
    """Operands of `decode_kernel`: references, of which the cache is written as well.

    Attributes:
      q: queries.
      token: the new tokens' keys (B, H, Dk) and values (B, H, Dv) in the cache's format.
      positions: of the tokens.
      cache: keys and values.
    """

    q: Any
    token: KeyValueCache
    positions: Any
    cache: KeyValueCache


class SplitResults(NamedTuple):
    """Results of every split, float32.

    Attributes:
      acc: (B, H, splits, Dv), the sums a of weighted values.
      m: (B, H, splits), greatest scores.
      l: (B, H, splits), sums of weights.
    """

    acc: Any
    m: Any
    l: Any  # noqa: E741


def value_layout(columns: int, itemsize: int = 2) -> Any:
    """One row of values in registers: adjacent columns of a thread have up to 16 bytes."""
    sizes = (16 // itemsize, 8, 4, 2, 1)
    vec_size = next(size for size in sizes if columns % (size * THREADS) == 0)
    return plgpu.Layout.WG_STRIDED((columns,), vec_size=vec_size)


class _DecodeKernelCall(NamedTuple):
    operands: DecodeOperands
    results: SplitResults
    weights_smem: Any
    tiling: DecodeTiling
    row: Any
    head: Any
    split: Any
    value_block: Any
    slot: Any
    is_interpreted: bool

    @property
    def key(self) -> Any:
        """The cache's keys, without their scales."""
        return _values(self.operands.cache.key)

    @property
    def value(self) -> Any:
        """The cache's values, without their scales."""
        return _values(self.operands.cache.value)

    @property
    def value_layout(self) -> Any:
        """The layout of the block's columns of a value."""
        return value_layout(self.tiling.value_tile, self.value.dtype.itemsize)

    @property
    def key_columns(self) -> int:
        """Columns of keys that are loaded together."""
        return KEY_BYTES // self.key.dtype.itemsize

    @property
    def first_slot(self) -> Any:
        return self.split * self.tiling.slots_per_block

    @property
    def base(self) -> Any:
        """The slot at the start of shared memory: the last split may begin in the previous one."""
        num_slots = self.key.shape[2]
        return jnp.minimum(self.first_slot, num_slots - self.tiling.slots_per_block)

    @property
    def has_own_slot(self) -> Any:
        return self.slot < self.first_slot + self.tiling.slots_per_block

    @property
    def columns(self) -> Any:
        return pl.ds(self.value_block * self.tiling.value_tile, self.tiling.value_tile)

    def run(self) -> None:
        """Computes the split, and writes the token's key and value if their slot is in it."""
        values = self.load_values(0) if self.tiling.prefetch else None
        self.store_weights()
        v = self.load_row(_values(self.operands.token.value).at[self.row, self.head, self.columns])
        self.results.acc[self.row, self.head, self.split, self.columns] = self.sum_values(values, v)
        pl.when(self.has_own_slot)(lambda: self.write_slot(v))

    def store_weights(self) -> None:
        """Stores weights of the filled slots in shared memory, their sum and maximum in results."""
        size = self.tiling.slots_per_block
        num_filled = jnp.minimum(self.slot + 1 - self.base, size)
        num_tiles = lax.div(num_filled + (SCORE_SLOTS - 1), SCORE_SLOTS)
        own_scores = self.compute_own_score()

        def store_scores(tile, greatest):
            scores = self.compute_scores(self.base + tile * SCORE_SLOTS, own_scores)
            self.weights_smem[pl.ds(tile * SCORE_SLOTS, SCORE_SLOTS)] = scores
            return jnp.maximum(greatest, scores)

        lowest = jnp.full((SCORE_SLOTS,), -jnp.inf, jnp.float32)
        greatest = plgpu.layout_cast(lowest, SCORE_LAYOUT)
        m_i = jnp.max(lax.fori_loop(0, num_tiles, store_scores, greatest))

        def exponentiate(tile, sums):
            # A thread reads the scores that it wrote.
            smem = self.weights_smem.at[pl.ds(tile * SCORE_SLOTS, SCORE_SLOTS)]
            weights = jnp.exp(plgpu.load(smem, layout=SCORE_LAYOUT, optimized=False) - m_i)
            smem[...] = self.scale_of_values(weights, self.base + tile * SCORE_SLOTS)
            return sums + weights

        zeros = plgpu.layout_cast(jnp.zeros((SCORE_SLOTS,), jnp.float32), SCORE_LAYOUT)
        l_i = jnp.sum(lax.fori_loop(0, num_tiles, exponentiate, zeros))
        plgpu.commit_smem()

        @pl.when(self.value_block == 0)
        def _():
            self.results.m[self.row, self.head, self.split] = m_i
            self.results.l[self.row, self.head, self.split] = l_i

    def compute_scores(self, first: Any, own_scores: Any) -> Any:
        """Scores of SCORE_SLOTS slots; -inf where a slot is empty or the previous split's."""
        slots = pl.ds(first, SCORE_SLOTS)

        def load_keys(columns):
            gmem = self.key.at[self.row, self.head, slots, columns]
            layout = key_layout(self.key_columns)
            return self.widen(plgpu.load(gmem, layout=layout, optimized=False), layout)

        scores = self.multiply_query(load_keys)
        if isinstance(self.operands.cache.key, Int8Slots):
            scores = scores * self.load_scales(self.operands.cache.key, first)
        index = _slot_indices(first)
        scores = jnp.where(index == self.slot, own_scores, scores)
        return jnp.where((index >= self.first_slot) & (index <= self.slot), scores, -jnp.inf)

    def compute_own_score(self) -> Any:
        """The score of the token's key, which is not in the cache yet, for every slot."""
        key = self.operands.token.key
        scores = self.multiply_query(
            lambda columns: self.over_slots(self.load_key_columns(_values(key), columns))
        )
        return scores * key.scale[self.row, self.head] if isinstance(key, Int8Slots) else scores

    def scale_of_values(self, weights: Any, first: Any) -> Any:
        """Weights of SCORE_SLOTS slots, times the scales of their values if those are integers."""
        value, own = self.operands.cache.value, self.operands.token.value
        if not isinstance(value, Int8Slots) or not isinstance(own, Int8Slots):
            return weights
        own_scale = own.scale[self.row, self.head]
        is_own = _slot_indices(first) == self.slot
        return weights * jnp.where(is_own, own_scale, self.load_scales(value, first))

    def load_scales(self, slots: Int8Slots, first: Any) -> Any:
        """Scales of SCORE_SLOTS slots."""
        gmem: Any = slots.scale
        gmem = gmem.at[self.row, self.head, pl.ds(first, SCORE_SLOTS)]
        return plgpu.load(gmem, layout=SCORE_LAYOUT, optimized=False)

    def multiply_query(self, load_keys: Callable[[Any], Any]) -> Any:
        """Products of the query with keys that `load_keys` loads for some of their columns."""
        products = None
        for column in range(0, self.operands.q.shape[2], self.key_columns):
            columns = pl.ds(column, self.key_columns)
            q = self.over_slots(self.load_key_columns(self.operands.q, columns))
            product = load_keys(columns) * q
            products = product if products is None else products + product
        assert products is not None
        return products.sum(axis=1)

    def load_key_columns(self, ref: Any, columns: Any) -> Any:
        """Some columns of the token's query or key, as float32."""
        gmem, layout = ref.at[self.row, self.head, columns], key_layout(self.key_columns).reduce(0)
        return plgpu.load(gmem, layout=layout, optimized=False).astype(jnp.float32)

    def over_slots(self, columns: Any) -> Any:
        """Columns of a query or key, the same for SCORE_SLOTS slots."""
        shape = (SCORE_SLOTS, self.key_columns)
        return plgpu.layout_cast(
            lax.broadcast_in_dim(columns, shape, [1]), key_layout(self.key_columns)
        )

    def sum_values(self, values: Any, v: Any) -> Any:
        """Weighted sum of the split's values.

        Args:
          values: of the first step, if they were loaded ahead.
          v: the token's own value.
        """
        per_step, last = self.tiling.slots_per_step, self.tiling.slots_per_block - 1
        num_cached = jnp.minimum(self.slot - self.first_slot, self.tiling.slots_per_block)
        num_steps = lax.div(num_cached + (per_step - 1), per_step)
        offset = self.first_slot - self.base

        def weight(index: Any, is_used: Any) -> Any:
            return jnp.where(is_used, self.weights_smem[jnp.minimum(offset + index, last)], 0.0)

        def add(step, loaded, acc):
            for i, value in enumerate(loaded):
                index = step * per_step + i
                acc = acc + self.widen(value, self.value_layout) * weight(index, index < num_cached)
            return acc

        def prefetching_step(step, carry):
            loaded, acc = carry
            # The last step loads its own values again: no traffic from memory.
            following = self.load_values(jnp.minimum(step + 1, num_steps - 1))
            return following, add(step, loaded, acc)

        acc = self.widen(v, self.value_layout) * weight(num_cached, self.has_own_slot)
        if values is not None:
            return lax.fori_loop(0, num_steps, prefetching_step, (values, acc))[1]
        return lax.fori_loop(
            0, num_steps, lambda step, acc: add(step, self.load_values(step), acc), acc
        )

    def load_values(self, step: Any) -> list[Any]:
        """Values of a step's slots; the last filled slot stands for those after it."""
        end = jnp.minimum(self.slot, self.first_slot + self.tiling.slots_per_block)
        first = self.first_slot + step * self.tiling.slots_per_step
        loaded = []
        for i in range(self.tiling.slots_per_step):
            slot = jnp.maximum(jnp.minimum(first + i, end - 1), 0)
            gmem = self.value.at[self.row, self.head, slot, self.columns]
            loaded.append(self.load_row(gmem))
        return loaded

    def load_row(self, gmem: Any) -> Any:
        return plgpu.load(gmem, layout=self.value_layout)

    def widen(self, values: Any, layout: Any) -> Any:
        """Keys or values as float32."""
        if values.dtype == jnp.int8:
            return widen_int8(values, layout, is_interpreted=self.is_interpreted)
        return values.astype(jnp.float32)

    def write_slot(self, v: Any) -> None:
        """Writes the token's value, and its key in the first of the blocks that share the split."""
        token, slot = self.operands.token, self.slot
        self.value[self.row, self.head, slot, self.columns] = v

        @pl.when(self.value_block == 0)
        def _():
            gmem, layout = _values(token.key), key_layout(self.key_columns).reduce(0)
            k = plgpu.load(gmem.at[self.row, self.head], layout=layout, optimized=False)
            self.key[self.row, self.head, slot] = k
            for slots, own in zip(self.operands.cache, token, strict=True):
                if isinstance(slots, Int8Slots) and isinstance(own, Int8Slots):
                    scale: Any = slots.scale
                    scale[self.row, self.head, slot] = own.scale[self.row, self.head]


def _values(slots: Any) -> Any:
    return slots.values if isinstance(slots, Int8Slots) else slots


def _slot_indices(first: Any) -> Any:
    return plgpu.broadcasted_iota(jnp.int32, (SCORE_SLOTS,), 0, layout=SCORE_LAYOUT) + first


def decode_kernel(
    operands: DecodeOperands,
    results: SplitResults,
    weights_smem: Any,
    *,
    tiling: DecodeTiling,
    is_interpreted: bool,
) -> None:
    """One split of the slots of a row's head, for some of the value columns."""
    row, head, split = (lax.axis_index(name) for name in ("b", "h", "s"))
    slot = lax.rem(operands.positions[row], operands.cache.key.shape[2])
    call = _DecodeKernelCall(
        operands,
        results,
        weights_smem,
        tiling,
        row,
        head,
        split,
        lax.axis_index("d"),
        slot,
        is_interpreted,
    )
    pl.when(call.first_slot <= slot)(call.run)


class CombineOperands(NamedTuple):
    """Operands of `combine_kernel`: references; `gate` may be None."""

    splits: SplitResults
    positions: Any
    gate: Any


def combine_kernel(
    operands: CombineOperands, out: Any, *, num_slots: int, tiling: DecodeTiling
) -> None:
    """The output of a row's head from its splits, for some of the value columns."""
    row, head, tile = lax.axis_index("b"), lax.axis_index("h"), tiling.combine_tile
    columns = pl.ds(lax.axis_index("d") * tile, tile)
    slot = lax.rem(operands.positions[row], num_slots)
    last = lax.div(slot, tiling.slots_per_block)
    acc, m, l = operands.splits  # noqa: E741
    # Loads do not wait for each other; splits after the last one load that one again.
    used = [jnp.minimum(split, last) for split in range(tiling.count_splits(num_slots))]
    maxima = [m[row, head, split] for split in used]
    sums = [l[row, head, split] for split in used]
    accs = [
        plgpu.load(acc.at[row, head, split, columns], layout=value_layout(tile)) for split in used
    ]
    greatest = maxima[0]
    for m_i in maxima[1:]:
        greatest = jnp.maximum(greatest, m_i)
    # The first split always has a filled slot.
    weight = jnp.exp(maxima[0] - greatest)
    total, result = weight * sums[0], accs[0] * weight
    for split in range(1, len(used)):
        weight = jnp.where(split <= last, jnp.exp(maxima[split] - greatest), 0.0)
        total = total + weight * sums[split]
        result = result + accs[split] * weight
    result = result * (1.0 / total)
    if operands.gate is not None:
        gmem = operands.gate.at[row, head, columns]
        gate = plgpu.load(gmem, layout=value_layout(tile)).astype(jnp.float32)
        # One rsqrt instruction and a product; a float32 division takes ten instructions.
        root = lax.rsqrt(1 + jnp.exp(-gate))
        result = result * (gate * (root * root))
    out[row, head, columns] = result.astype(out.dtype)
