"""The public function of chunk decoding: check, choose an implementation, call it."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.chunk_attention.types import KeyValueCache, check_scales
from pallas_kernels.chunk_decode import reference, xla
from pallas_kernels.chunk_decode.block_sizes import TPUS_FASTER_THAN_XLA
from pallas_kernels.chunk_decode.mosaic_gpu import op as mosaic_gpu
from pallas_kernels.chunk_decode.pallas_tpu import op as pallas_tpu
from pallas_kernels.chunk_decode.types import (
    ChunkDecodeOutput,
    QueryKeyVectors,
    RotaryFactors,
    SharedRepresentation,
    query_of,
)
from pallas_kernels.common.devices import canonical_tpu_kind
from pallas_kernels.common.dispatch import Implementation, check_implementation
from pallas_kernels.common.symbolic import has_symbolic_shape
from pallas_kernels.common.target import find_target

# All called as f(q, k, v, cache, positions, gate); `mosaic_gpu` takes a shared representation too.
IMPLEMENTATIONS: dict[str, Callable[..., ChunkDecodeOutput]] = {
    "reference": reference.chunk_decode,
    "xla": xla.chunk_decode,
    "mosaic_gpu": mosaic_gpu.chunk_decode,
    "pallas_tpu": pallas_tpu.chunk_decode,
}


def chunk_decode(
    q: Float[Array, "B H Dk"] | SharedRepresentation,
    k: Float[Array, "B H Dk"] | None,
    v: Float[Array, "B H Dv"],
    cache: KeyValueCache,
    positions: Int32[Array, " B"],
    *,
    gate: Float[Array, "B H Dv"] | None = None,
    implementation: Implementation | None = None,
) -> ChunkDecodeOutput:
    """One token of `chunk_attention` a row: o = Σ_j softmax_j(q·k[j]) v[j], j = 0..position mod C.

    The token's own key and value go to slot position mod C first. The scores are not scaled (Ma et
    al. 2024, section 3.3, as released: the scale is in q). The softmax is float32 (float64 for
    float64 operands). Under `jax.jit` with a donated cache, or in the carry of `jax.lax.scan`, the
    cache is updated in place.

    A cache of `Int8Slots` gets the token's key and value rounded to 8-bit integers, and every score
    and sum is that of the rounded keys and values: keys' scales multiply the scores, values' the
    weights of the softmax.

    Args:
      q: queries after RoPE; or the shared representation of queries and keys, from which both are
        made and rounded to the dtype of v: in the kernels of "mosaic_gpu", elsewhere before.
      k: keys after RoPE; None with a shared representation.
      v: values.
      cache: key (S, H, C, Dk) and value (S, H, C, Dv), S >= B, both in the dtype of k and v or both
        `Int8Slots`. Row i belongs to query i; rows from B on are neither read nor changed. Slots
        after the token's may hold anything.
      positions: each token's position in its document, at least 0.
      gate: the outputs are multiplied by silu(gate) before they are rounded; None: by 1.
      implementation: "reference" (by definition), "xla" (any platform and dtype), "mosaic_gpu"
        (kernels for NVIDIA Hopper; bfloat16, Dk a multiple of 64 up to 512, Dv of 128, at least
        64 slots), "pallas_tpu" (a kernel for TPU; bfloat16 or float32), or None for the fastest
        known here.

    Returns:
      The outputs and the next cache.

    Raises:
      ValueError: shapes or dtypes do not fit together, the implementation does not exist or cannot
        run these operands on this device.
    """
    _check_operands(q, k, v, positions)
    if gate is not None and (gate.shape != v.shape or gate.dtype != v.dtype):
        raise ValueError(f"gate is {gate.dtype}{gate.shape}; expected {v.dtype}{v.shape} as v")
    query = query_of(q, v)
    _check_cache(cache, query, v)
    check_implementation("chunk decoding", implementation, IMPLEMENTATIONS)
    name = implementation or _choose_implementation(query, v, cache)
    if isinstance(q, SharedRepresentation) and name != "mosaic_gpu":
        q, k = q.queries_and_keys(v.dtype)
    return IMPLEMENTATIONS[name](q, k, v, cache, positions, gate)


def _choose_implementation(q: Any, v: Array, cache: KeyValueCache) -> Implementation:
    """The kernels where they run: they read the filled slots, XLA but on a CPU all of them."""
    if has_symbolic_shape(v):
        return "xla"
    target = find_target()
    if target.is_hopper and mosaic_gpu.find_obstacle(q, v, cache) is None:
        return "mosaic_gpu"
    is_tpu = target.platform == "tpu" and canonical_tpu_kind(target.kind) in TPUS_FASTER_THAN_XLA
    return "pallas_tpu" if is_tpu and pallas_tpu.find_obstacle(q, v, cache) is None else "xla"


def _check_operands(q: Any, k: Array | None, v: Array, positions: Array) -> None:
    if isinstance(q, SharedRepresentation):
        _check_shared(q, k, v)
    elif k is None:
        raise ValueError("k is None; give keys, or a SharedRepresentation of queries and keys as q")
    else:
        _check_queries_and_keys(q, k, v)
    if positions.shape != v.shape[:1] or not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(
            f"positions is {positions.dtype}{positions.shape}; expected int32({v.shape[0]},): one "
            "token a row"
        )


def _check_shared(shared: SharedRepresentation, k: Array | None, v: Array) -> None:
    if k is not None:
        raise ValueError(
            "k is an array beside a SharedRepresentation, which has the keys; pass None"
        )
    z, rotation = shared.z, shared.rotation
    if z.ndim != 3 or v.ndim != 3 or z.shape[:2] != v.shape[:2]:
        raise ValueError(
            f"z and v have shapes {z.shape}, {v.shape}; expected (B, H, Dk), (B, H, Dv)"
        )
    if (shared.swapped_z is None) != (rotation is None):
        raise ValueError("one of swapped_z and rotation is None; a rotation needs both")
    rows, heads, width = z.shape
    expected = {"z": z.shape, "swapped_z": z.shape}
    expected |= dict.fromkeys(QueryKeyVectors._fields, (2, heads, width))
    expected |= dict.fromkeys(RotaryFactors._fields, (rows, 1, width))
    given = {"z": z, "swapped_z": shared.swapped_z, **shared.vectors._asdict()}
    given |= {} if rotation is None else rotation._asdict()
    for name, array in given.items():
        if array is not None and (array.shape != expected[name] or array.dtype != jnp.float32):
            raise ValueError(
                f"{name} is {array.dtype}{array.shape}; expected float32{expected[name]} beside z "
                f"{z.shape}"
            )


def _check_queries_and_keys(q: Array, k: Array, v: Array) -> None:
    if q.ndim != 3 or q.shape != k.shape or v.ndim != 3 or q.shape[:2] != v.shape[:2]:
        raise ValueError(
            f"q, k, v have shapes {q.shape}, {k.shape}, {v.shape}; "
            "expected (B, H, Dk), (B, H, Dk), (B, H, Dv)"
        )
    if q.dtype != k.dtype:
        raise ValueError(f"q and k are {q.dtype} and {k.dtype}; cast them to one dtype")


def _check_cache(cache: KeyValueCache, k: Any, v: Array) -> None:
    rows, heads = k.shape[:2]
    if len(cache.key.shape) != 4 or cache.key.shape[0] < rows or cache.key.shape[2] < 1:
        raise ValueError(
            f"cache.key has shape {cache.key.shape}; expected (S, {heads}, C, {k.shape[2]}) with "
            f"S >= {rows} rows and C >= 1 slots"
        )
    for name, slots, new in (("key", cache.key, k), ("value", cache.value, v)):
        expected = (cache.key.shape[0], heads, cache.key.shape[2], new.shape[2])
        dtype = jnp.dtype(jnp.int8) if cache.is_quantized else new.dtype
        if slots.shape != expected or slots.dtype != dtype:
            raise ValueError(
                f"cache.{name} is {slots.dtype}{slots.shape}; expected {dtype}{expected}: the "
                "heads, width and dtype of the new tokens, the rows and slots of cache.key"
            )
        check_scales(f"cache.{name}", slots, cache.is_quantized)
