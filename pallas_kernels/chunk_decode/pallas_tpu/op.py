"""Chunk decoding on TPU: checks, and the kernel over filled slots, which updates the cache."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.chunk_attention.types import KeyValueCache
from pallas_kernels.chunk_decode.block_sizes import choose_tpu_block
from pallas_kernels.chunk_decode.pallas_tpu.launch import launch_decode
from pallas_kernels.chunk_decode.types import ChunkDecodeOutput
from pallas_kernels.common.devices import DEFAULT_VMEM, TPU_VMEM, canonical_tpu_kind
from pallas_kernels.common.target import check_tpu, is_interpreted


def find_obstacle(q: Array, v: Array, cache: KeyValueCache) -> str | None:
    """The reason why the kernel cannot take these operands; None if it can."""
    dtypes = {q.dtype, v.dtype}
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}:
        return f"takes bfloat16 or float32, q and v are {q.dtype} and {v.dtype}"
    if not q.size or not v.size:
        return f"needs one row; q and v have shapes {q.shape} and {v.shape}"
    if choose_tpu_block(cache.key, cache.value) is None:
        return (
            f"keeps blocks of 128 slots in VMEM, which {q.shape[2]} + {v.shape[2]} numbers of a "
            "slot exceed"
        )
    return None


def chunk_decode(
    q: Float[Array, "B H Dk"],
    k: Float[Array, "B H Dk"],
    v: Float[Array, "B H Dv"],
    cache: KeyValueCache,
    positions: Int32[Array, " B"],
    gate: Float[Array, "B H Dv"] | None = None,
) -> ChunkDecodeOutput:
    """A kernel that reads filled slots only. Arguments as in `api`.

    Raises:
      ValueError: a shape or dtype that the kernel does not have, or a device that is no TPU.
    """
    interpret = is_interpreted()
    kind = None if interpret else check_tpu("pallas_tpu")
    obstacle = find_obstacle(q, v, cache)
    if obstacle is not None:
        raise ValueError(f"chunk decoding: pallas_tpu {obstacle}; use implementation 'xla' or None")
    size = choose_tpu_block(cache.key, cache.value)
    assert size is not None
    slot = positions.astype(jnp.int32) % cache.key.shape[2]
    token = cache.encode(k, v)
    if cache.is_quantized:
        # The kernel writes the integers.
        key, value = (
            old._replace(scale=_write_scale(old.scale, new.scale, slot))
            for old, new in zip(cache, token, strict=True)
        )
        cache = KeyValueCache(key, value)
    return launch_decode(
        q,
        token,
        cache,
        slot,
        gate,
        dtype=v.dtype,
        size=size,
        vmem_limit=DEFAULT_VMEM if kind is None else TPU_VMEM[canonical_tpu_kind(kind)],
        interpret=interpret,
    )


def _write_scale(
    scale: Float32[Array, "S H C"], new: Float32[Array, "B H"], slot: Int32[Array, " B"]
) -> Float32[Array, "S H C"]:
    """A pass over all scales: a TPU's scatter takes longer."""
    after = (0, scale.shape[0] - slot.shape[0])
    slot = jnp.pad(slot, after, constant_values=-1)[:, None, None]
    new = jnp.pad(new, (after, (0, 0)))[..., None]
    return jnp.where(jnp.arange(scale.shape[2]) == slot, new, scale)
