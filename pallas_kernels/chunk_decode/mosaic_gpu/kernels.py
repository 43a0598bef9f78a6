"""Kernels of chunk decoding: attention over splits of the slots, then their combination.

A block has one split of a row's head and some columns of its values. With s[j] = q·k[j] over the
split's filled slots

    m = max_j s[j],    l = Σ_j exp(s[j] - m),    a = Σ_j exp(s[j] - m) v[j]

and the combination is Σ_i exp(m_i - M) a_i / Σ_i exp(m_i - M) l_i with M = max_i m_i over splits i.
Splits without a filled slot return at once: their results are undefined and never read.

A block makes the token's query from its shared representation; blocks of the split with the token's
slot make its key too, round it and the value to the cache's format, and write them.

A cache of 8-bit integers is converted in registers: the scale of a key multiplies its score, that
of a value its weight in a.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.chunk_attention.types import Int8Slots, KeyValueCache
from pallas_kernels.chunk_decode.block_sizes import (
    KEY_BYTES,
    SCORE_SLOTS,
    DecodeTiling,
)
from pallas_kernels.chunk_decode.mosaic_gpu.layouts import (
    SCORE_LAYOUT,
    key_layout,
    value_layout,
)
from pallas_kernels.chunk_decode.mosaic_gpu.token import (
    QueryAndKey,
    RoundedToken,
    load_query_and_key,
)
from pallas_kernels.chunk_decode.types import SharedRepresentation
from pallas_kernels.common.mosaic_gpu import store, widen_bfloat16, widen_int8


class DecodeOperands(NamedTuple):
    """Operands of `decode_kernel`: references, of which the cache is written as well.

    Attributes:
      source: of queries and keys.
      v: values (B, H, Dv).
      positions: of the tokens.
      cache: keys and values.
    """

    source: QueryAndKey | SharedRepresentation
    v: Any
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


class DecodeMemory(NamedTuple):
    """Shared memory of a block, float32.

    Attributes:
      query: (Dk,), the token's.
      weights: (slots_per_block,), scores and then weights.
      value_scales: (slots_per_block,), of 8-bit values; None without.
    """

    query: Any
    weights: Any
    value_scales: Any


class _OwnToken(NamedTuple):
    """The token's own share of the split's results; without meaning in the other splits.

    Attributes:
      score: q·k.
      value: the block's columns of its value, float32; whole numbers in a cache of integers.
      value_scale: their factor.
    """

    score: Any
    value: Any
    value_scale: Any


class _DecodeKernelCall(NamedTuple):
    operands: DecodeOperands
    results: SplitResults
    memory: DecodeMemory
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
    def column_blocks(self) -> list[Any]:
        """Columns of keys, those that are loaded together."""
        width = self.key.shape[3]
        return [pl.ds(column, self.key_columns) for column in range(0, width, self.key_columns)]

    @property
    def is_quantized(self) -> bool:
        return self.operands.cache.is_quantized

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
        # Loads from memory that are under way while the token's query and key are computed.
        values = self.load_values(0) if self.tiling.prefetch else None
        keys = self.load_keys(self.base) if self.tiling.prefetch_keys else None
        own = self.prepare_token()
        self.store_weights(keys, own)
        self.results.acc[self.row, self.head, self.split, self.columns] = self.sum_values(
            values, own
        )

    def prepare_token(self) -> _OwnToken:
        """Stores the query in shared memory; the split with the token's slot writes the token."""
        q, k = load_query_and_key(self.operands.source, self.row, self.head)
        store(self.memory.query, q)
        plgpu.commit_smem()

        def skip_token() -> _OwnToken:
            empty = jnp.zeros((self.tiling.value_tile,), jnp.float32)
            zero = jnp.zeros((), jnp.float32)
            return _OwnToken(zero, plgpu.layout_cast(empty, self.value_layout), zero)

        return lax.cond(self.has_own_slot, lambda: self.write_token(q, k), skip_token)

    def write_token(self, q: Any, k: Any) -> _OwnToken:
        """Writes the token's value, and its key in the first of the blocks that share the split."""
        gmem = self.operands.v.at[self.row, self.head]
        v = self.load_row(gmem.at[self.columns]).astype(jnp.float32)
        key, value = RoundedToken(k, None), RoundedToken(v, None)
        if self.is_quantized:
            row = plgpu.load(gmem, layout=value_layout(gmem.shape[0]))
            key, value = RoundedToken.of(k, k), RoundedToken.of(v, row.astype(jnp.float32))
        score = jnp.sum(q * key.levels)
        target = self.value.at[self.row, self.head, self.slot, self.columns]
        target[...] = value.levels.astype(self.value.dtype)

        @pl.when(self.value_block == 0)
        def _():
            levels = key.levels.astype(self.key.dtype)
            store(self.key.at[self.row, self.head, self.slot], levels)
            for slots, own in zip(self.operands.cache, (key, value), strict=True):
                if isinstance(slots, Int8Slots):
                    scale: Any = slots.scale
                    scale[self.row, self.head, self.slot] = own.scale

        if self.is_quantized:
            return _OwnToken(score * key.scale, value.levels, value.scale)
        return _OwnToken(score, value.levels, jnp.zeros((), jnp.float32))

    def store_weights(self, keys: list[Any] | None, own: _OwnToken) -> None:
        """Stores weights of the filled slots in shared memory, their sum and maximum in results.

        Args:
          keys: of the first SCORE_SLOTS slots, if they were loaded ahead.
          own: the token's.
        """
        size = self.tiling.slots_per_block
        num_filled = jnp.minimum(self.slot + 1 - self.base, size)
        num_tiles = lax.div(num_filled + (SCORE_SLOTS - 1), SCORE_SLOTS)

        def store_scores(tile, keys):
            first, slots = self.base + tile * SCORE_SLOTS, pl.ds(tile * SCORE_SLOTS, SCORE_SLOTS)
            scores = self.compute_scores(first, keys, own.score)
            self.memory.weights[slots] = scores
            value = self.operands.cache.value
            if isinstance(value, Int8Slots):
                # Loaded with the keys, and not after their maximum.
                is_own = _slot_indices(first) == self.slot
                scales = jnp.where(is_own, own.value_scale, self.load_scales(value, first))
                self.memory.value_scales[slots] = scales
            return scores

        def store_next(tile, greatest):
            keys = self.load_keys(self.base + tile * SCORE_SLOTS)
            return jnp.maximum(greatest, store_scores(tile, keys))

        first_scores = store_scores(0, self.load_keys(self.base) if keys is None else keys)
        m_i = jnp.max(lax.fori_loop(1, num_tiles, store_next, first_scores))

        def exponentiate(tile, sums):
            # A thread reads the scores and scales that it wrote.
            slots = pl.ds(tile * SCORE_SLOTS, SCORE_SLOTS)
            weights = jnp.exp(self.load_memory(self.memory.weights.at[slots]) - m_i)
            scaled = weights
            if self.is_quantized:
                scaled = weights * self.load_memory(self.memory.value_scales.at[slots])
            self.memory.weights[slots] = scaled
            return sums + weights

        zeros = plgpu.layout_cast(jnp.zeros((SCORE_SLOTS,), jnp.float32), SCORE_LAYOUT)
        l_i = jnp.sum(lax.fori_loop(0, num_tiles, exponentiate, zeros))
        plgpu.commit_smem()

        @pl.when(self.value_block == 0)
        def _():
            self.results.m[self.row, self.head, self.split] = m_i
            self.results.l[self.row, self.head, self.split] = l_i

    def load_memory(self, smem: Any) -> Any:
        return plgpu.load(smem, layout=SCORE_LAYOUT, optimized=False)

    def load_keys(self, first: Any) -> list[Any]:
        """Keys of SCORE_SLOTS slots, some columns after the other."""
        gmem = self.key.at[self.row, self.head, pl.ds(first, SCORE_SLOTS)]
        layout = key_layout(self.key_columns)
        return [
            plgpu.load(gmem.at[:, columns], layout=layout, optimized=False)
            for columns in self.column_blocks
        ]

    def compute_scores(self, first: Any, keys: list[Any], own_score: Any) -> Any:
        """Scores of SCORE_SLOTS slots; -inf where a slot is empty or the previous split's."""
        layout = key_layout(self.key_columns)
        scores = None
        for columns, block in zip(self.column_blocks, keys, strict=True):
            smem = self.memory.query.at[columns]
            q = plgpu.load(smem, layout=layout.reduce(0), optimized=False)
            q = plgpu.layout_cast(lax.broadcast_in_dim(q, block.shape, [1]), layout)
            # A sum over threads for each block: products of all blocks would take 32 registers.
            product = (self.widen(block, layout) * q).sum(axis=1)
            scores = product if scores is None else scores + product
        assert scores is not None
        if isinstance(self.operands.cache.key, Int8Slots):
            scores = scores * self.load_scales(self.operands.cache.key, first)
        index = _slot_indices(first)
        scores = jnp.where(index == self.slot, own_score, scores)
        return jnp.where((index >= self.first_slot) & (index <= self.slot), scores, -jnp.inf)

    def load_scales(self, slots: Int8Slots, first: Any) -> Any:
        """Scales of SCORE_SLOTS slots."""
        gmem: Any = slots.scale
        gmem = gmem.at[self.row, self.head, pl.ds(first, SCORE_SLOTS)]
        return plgpu.load(gmem, layout=SCORE_LAYOUT, optimized=False)

    def sum_values(self, values: Any, own: _OwnToken) -> Any:
        """Weighted sum of the split's values.

        Args:
          values: of the first step, if they were loaded ahead.
          own: the token's.
        """
        per_step, last = self.tiling.slots_per_step, self.tiling.slots_per_block - 1
        num_cached = jnp.minimum(self.slot - self.first_slot, self.tiling.slots_per_block)
        num_steps = lax.div(num_cached + (per_step - 1), per_step)
        offset = self.first_slot - self.base

        def weight(index: Any, is_used: Any) -> Any:
            return jnp.where(is_used, self.memory.weights[jnp.minimum(offset + index, last)], 0.0)

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

        acc = own.value * weight(num_cached, self.has_own_slot)
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
        widen = widen_int8 if values.dtype == jnp.int8 else widen_bfloat16
        return widen(values, layout, is_interpreted=self.is_interpreted)


def _values(slots: Any) -> Any:
    return slots.values if isinstance(slots, Int8Slots) else slots


def _slot_indices(first: Any) -> Any:
    return plgpu.broadcasted_iota(jnp.int32, (SCORE_SLOTS,), 0, layout=SCORE_LAYOUT) + first


def decode_kernel(
    operands: DecodeOperands,
    results: SplitResults,
    memory: DecodeMemory,
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
        memory,
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
