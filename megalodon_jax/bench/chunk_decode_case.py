"""Chunk decoding of one layer as a decoding step calls it, for `bench decode_kernels`."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from megalodon_jax.bench.decode_bytes import num_bytes
from megalodon_jax.bench.decode_kernel_case import (
    KernelErrors,
    Operands,
    Variant,
    normal,
    random_array,
    relative_error,
)
from megalodon_jax.bench.options import DecodeKernel
from megalodon_jax.cache import empty_keys_and_values
from megalodon_jax.config import ModelConfig
from megalodon_jax.config.model import KvFormat
from pallas_kernels.chunk_attention.types import KeyValueCache
from pallas_kernels.chunk_decode import (
    QueryKeyVectors,
    RotaryFactors,
    SharedRepresentation,
    chunk_decode,
    xla,
)
from pallas_kernels.chunk_decode.block_sizes import (
    BYTES_PER_STEP,
    MAX_SPLITS,
    SCORE_SLOTS,
    VALUE_TILES,
    DecodeTiling,
    choose_tiling,
)
from pallas_kernels.chunk_decode.mosaic_gpu import op as mosaic_gpu
from pallas_kernels.chunk_decode.types import swap_pairs

# Steps of a program.
STEPS = 4


@dataclasses.dataclass(frozen=True)
class ChunkDecodeCase:
    """Chunk decoding of one layer, from the shared representation of queries and keys.

    Attributes:
      config: of the model.
      rows: rows B.
      format: of keys and values.
      position: of every row's token; the check adds 37 for every next row.
      arrays: caches in turn.
    """

    config: ModelConfig
    rows: int
    format: KvFormat
    position: int
    arrays: int
    op: DecodeKernel = dataclasses.field(default="chunk_decode", init=False)

    @property
    def call(self) -> str:
        c = self.config
        sizes = f"{c.num_heads} x {c.head_dim}, {c.value_head_dim}"
        return f"{sizes}, {self._filled} of {c.chunk_size} slots"

    @property
    def calls(self) -> int:
        return STEPS * self.arrays

    @property
    def array_bytes(self) -> int:
        """Keys and values of the filled slots, of which the token's is written."""
        return num_bytes(self._cache_shapes()) // self.config.chunk_size * self._filled

    @property
    def least_bytes(self) -> int:
        token = jax.eval_shape(self._make_token)
        results = num_bytes(token[1])  # The outputs have the size of v.
        positions = 4 * self.rows
        return self.array_bytes + num_bytes(token) + positions + results

    def make_operands(self) -> Operands:
        caches = tuple(self._make_cache(seed) for seed in range(self.arrays))
        positions = jnp.full(self.rows, self.position, jnp.int32)
        return Operands((self._make_token(), positions), caches)

    def program(self, variant: Variant) -> Callable[[Any, Any], tuple[Any, Any]]:
        decode = self._decode(variant)

        def run(fixed: Any, caches: Any) -> tuple[Any, Any]:
            (shared, v, gate), positions = fixed

            def step(_: Any, carry: Any) -> Any:
                v, caches = carry[0], list(carry[1])
                for i, cache in enumerate(caches):
                    token, v = jax.lax.optimization_barrier((shared, v))
                    v, caches[i] = decode(token, v, cache, positions, gate)
                return v, tuple(caches)

            return jax.lax.fori_loop(0, STEPS, step, (v, caches))

        return run

    def measure_error(self, variant: Variant) -> KernelErrors:
        shared, v, gate = self._make_token()
        positions = self.position + 37 * jnp.arange(self.rows, dtype=jnp.int32)
        operands = (shared, v, positions, gate)
        decode = self._decode(variant)
        with jax.default_matmul_precision("highest"):
            exact, written = jax.jit(_decode_in_float32)(*operands, self._make_cache(0))
        found, cache = jax.jit(
            lambda shared, v, positions, gate, cache: decode(shared, v, cache, positions, gate),
            donate_argnums=4,
        )(*operands, self._make_cache(0))
        pairs = zip(jax.tree.leaves(cache), jax.tree.leaves(written), strict=True)
        differing = sum(int((a != b).sum()) for a, b in pairs)
        return KernelErrors(relative_error([found], [exact]), differing)

    def tilings(self) -> list[DecodeTiling]:
        c = self.config
        itemsize = 1 if self.format == "int8" else jnp.dtype(c.dtype).itemsize
        sizes = (self.rows * c.num_heads, c.chunk_size, c.value_head_dim, itemsize)
        chosen = choose_tiling(*sizes)
        return neighbouring_tilings(chosen, *sizes[1:])

    @property
    def _filled(self) -> int:
        return self.position % self.config.chunk_size + 1

    def _decode(self, variant: Variant) -> Callable[..., Any]:
        def decode(shared: Any, v: Any, cache: Any, positions: Any, gate: Any) -> Any:
            if variant.tiling is None:
                return chunk_decode(
                    shared, None, v, cache, positions,
                    gate=gate, implementation=variant.implementation,
                )  # fmt: skip
            tiling: Any = variant.tiling
            return mosaic_gpu.chunk_decode(shared, None, v, cache, positions, gate, tiling=tiling)

        return decode

    def _make_token(self) -> tuple[SharedRepresentation, Any, Any]:
        return _random_token(self.config, self.rows)

    def _cache_shapes(self) -> KeyValueCache:
        return jax.eval_shape(partial(empty_keys_and_values, self.rows, self.config, self.format))

    def _make_cache(self, seed: int) -> KeyValueCache:
        shapes, treedef = jax.tree.flatten(self._cache_shapes())
        return treedef.unflatten(
            # Scales of 8-bit integers, which have the standard deviation 73.
            jnp.full(each.shape, 1 / 73, each.dtype)
            if each.ndim == 3
            else random_array(len(shapes) * seed + number, each.shape, each.dtype)
            for number, each in enumerate(shapes)
        )


def neighbouring_tilings(
    chosen: DecodeTiling, num_slots: int, value_width: int, itemsize: int
) -> list[DecodeTiling]:
    """Tilings that differ from the chosen one in the length of a split, in values loaded ahead or
    in both; in the width of a tile; in keys loaded ahead; or in twice the slots of a step.

    Args:
      chosen: the tiling.
      num_slots: slots C of a chunk.
      value_width: Dv.
      itemsize: bytes of a number in the cache.
    """

    def of(slots: int, tile: int, prefetch: bool, prefetch_keys: bool) -> DecodeTiling:
        # As many bytes of values on their way, ahead or not.
        step = (1 if prefetch else 2) * BYTES_PER_STEP // (itemsize * tile)
        return DecodeTiling(
            slots, tile, min(SCORE_SLOTS, step), prefetch, chosen.combine_tile, prefetch_keys
        )

    slots, tile, _, prefetch, _, keys = chosen
    lengths = [
        each
        for each in (slots // 2, slots, 2 * slots)
        if each % SCORE_SLOTS == 0 and each <= num_slots and num_slots <= MAX_SPLITS * each
    ]
    tiles = [
        each for each in (tile // 2, 2 * tile) if each in VALUE_TILES and value_width % each == 0
    ]
    found = [of(each, tile, ahead, keys) for each in lengths for ahead in (False, True)]
    found += [of(slots, each, prefetch, keys) for each in tiles]
    found.append(chosen._replace(prefetch_keys=not keys))
    if not prefetch and 2 * chosen.slots_per_step <= SCORE_SLOTS:
        found.append(chosen._replace(slots_per_step=2 * chosen.slots_per_step))
    return [each for each in dict.fromkeys(found) if each != chosen]


def _decode_in_float32(
    shared: SharedRepresentation, v: Any, positions: Any, gate: Any, cache: KeyValueCache
) -> tuple[Any, KeyValueCache]:
    """The outputs for rounded queries, keys and values, and the cache with the token."""
    wide = jnp.dtype(jnp.float32)
    q, k = shared.queries_and_keys(v.dtype)
    new = cache.encode(k, v)
    slot = positions % cache.key.shape[2]
    written = jax.tree.map(partial(xla.write_slots, slot=slot), cache, new)

    def widen(cache: KeyValueCache) -> KeyValueCache:
        return jax.tree.map(lambda each: each.astype(wide), cache.decode(wide, wide))

    # A cache of the tokens alone has one slot.
    token = widen(jax.tree.map(lambda each: each[:, :, None], new))
    k, v = (each[:, :, 0] for each in token)
    out, _ = xla.chunk_decode(q.astype(wide), k, v, widen(written), positions, gate.astype(wide))
    return out, written


def _random_token(config: ModelConfig, rows: int) -> tuple[SharedRepresentation, Any, Any]:
    """The shared representation of queries and keys, v and the gate."""
    rng = np.random.default_rng(0)
    heads, width = config.num_heads, config.head_dim
    z = normal(rng, (rows, heads, width))
    vectors = [normal(rng, (2, heads, width)) / np.float32(width**0.5) for _ in range(2)]
    angle = rng.uniform(0, 2 * np.pi, (rows, 1, width)).astype(np.float32)
    has_rotation = config.rope_base is not None
    shared = SharedRepresentation(
        z,
        QueryKeyVectors(*vectors, *map(swap_pairs, vectors)),
        swap_pairs(z) if has_rotation else None,
        RotaryFactors(jnp.asarray(np.cos(angle)), jnp.asarray(np.sin(angle)))
        if has_rotation
        else None,
        config.norm_eps if config.qk_norm else None,
    )
    values = (rows, heads, config.value_head_dim)
    return shared, normal(rng, values, config.dtype), normal(rng, values, config.dtype)
