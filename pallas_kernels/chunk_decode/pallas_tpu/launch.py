"""The launch of the kernel: grid, blocks and index maps."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.chunk_attention.types import Int8Slots, KeyValueCache
from pallas_kernels.chunk_decode.block_sizes import PADDED_QUERIES, SLOTS_PER_WRITE
from pallas_kernels.chunk_decode.pallas_tpu.kernels import DecodeRefs, decode_kernel
from pallas_kernels.chunk_decode.types import ChunkDecodeOutput
from pallas_kernels.common.pallas_tpu import launch

_LANES = 128


def launch_decode(
    q: Float[Array, "B H Dk"],
    token: KeyValueCache,
    cache: KeyValueCache,
    slot: Int32[Array, " B"],
    gate: Float[Array, "B H Dv"] | None,
    *,
    dtype: Any,
    size: int,
    vmem_limit: int,
    interpret: Any,
) -> ChunkDecodeOutput:
    """Attends over the slots of each row up to its token's, and writes the token's.

    Args:
      q: queries.
      token: keys (B, H, Dk) and values (B, H, Dv) of the tokens in the cache's format.
      cache: keys and values; scales with the token's own.
      slot: slots of the tokens.
      gate: of the outputs.
      dtype: of the outputs.
      size: slots of a block.
      vmem_limit: bytes of VMEM that the kernel may use.
      interpret: as in `pl.pallas_call`.
    """
    rows, heads, key_width = q.shape
    num_slots, value_width = cache.value.shape[2:]

    def block_of(row: Any, step: Any, slot: Any) -> Any:
        return jnp.minimum(step, slot[row] // size)

    def slots_block(row: Any, head: Any, step: Any, slot: Any) -> Any:
        return row, head, block_of(row, step, slot), 0

    def scale_block(row: Any, head: Any, step: Any, slot: Any) -> Any:
        return row, head, 0, block_of(row, step, slot)

    def row_block(row: Any, head: Any, step: Any, slot: Any) -> Any:
        del step, slot
        return row, head, 0, 0

    def vector(width: int, count: int = 1) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, count, width), row_block)

    # The fewest slots that the kernel can write, if blocks divide into them.
    written = SLOTS_PER_WRITE if num_slots % SLOTS_PER_WRITE == 0 else size

    def written_block(row: Any, head: Any, step: Any, slot: Any) -> Any:
        del step
        return row, head, slot[row] // written, 0

    padded = jnp.pad(q[:, :, None], ((0, 0), (0, 0), (0, PADDED_QUERIES - 1), (0, 0)))
    inputs: dict[str, Any] = {"q": (padded, vector(key_width, PADDED_QUERIES))}
    outputs: dict[str, Any] = {
        "out": (jax.ShapeDtypeStruct((rows, heads, 1, value_width), dtype), vector(value_width))
    }
    for name, slots, new in (("key", cache.key, token.key), ("value", cache.value, token.value)):
        values = slots.values if isinstance(slots, Int8Slots) else slots
        new = new.values if isinstance(new, Int8Slots) else new
        inputs[name[0]] = (new[:, :, None], vector(new.shape[2]))
        outputs[f"new_{name}"] = (
            jax.ShapeDtypeStruct(values.shape, values.dtype),
            pl.BlockSpec((None, None, written, values.shape[3]), written_block),
        )
        spec = pl.BlockSpec((None, None, size, values.shape[3]), slots_block)
        inputs[name] = (values, spec)
        if isinstance(slots, Int8Slots):
            scale_spec = pl.BlockSpec((None, None, 1, size), scale_block)
            inputs[f"{name}_scale"] = (slots.scale[:, :, None], scale_spec)
    if gate is not None:
        inputs["gate"] = (gate[:, :, None], vector(value_width))
    absent = {"key_scale": None, "value_scale": None, "gate": None}

    def kernel(**refs: Any) -> None:
        decode_kernel(DecodeRefs(**(absent | refs)), size=size)

    column = pltpu.VMEM((PADDED_QUERIES, _LANES), jnp.float32)
    results = launch(
        kernel,
        name="chunk_decode",
        grid=(rows, heads, pl.cdiv(num_slots, size)),
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        prefetched={"slot": slot},
        inputs=inputs,
        outputs=outputs,
        aliases={"key": "new_key", "value": "new_value"},
        scratch={
            "acc": pltpu.VMEM((PADDED_QUERIES, value_width), jnp.float32),
            "m_i": column,
            "l_i": column,
        },
        vmem_limit=vmem_limit,
        flops=2 * rows * heads * num_slots * PADDED_QUERIES * (key_width + value_width),
        # Unknown: it depends on the positions which blocks are fetched.
        bytes_accessed=0,
        interpret=interpret,
    )
    key, value = results["new_key"], results["new_value"]
    if cache.is_quantized:
        key, value = cache.key._replace(values=key), cache.value._replace(values=value)
    return ChunkDecodeOutput(results["out"][:, :, 0], KeyValueCache(key, value))
