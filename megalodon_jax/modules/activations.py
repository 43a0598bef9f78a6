"""SiLU and its gates, on every device's own tokens and features."""

from megalodon_jax.config import DType
from megalodon_jax.parallel.sharding import partition_spec, shard_map_logical
from megalodon_jax.typing import Array, Float
from pallas_kernels import rowwise
from pallas_kernels.common.dispatch import Implementation


def silu(
    x: Float[Array, "B L D"],
    bias: Float[Array, " D"] | None,
    *,
    features: str,
    dtype: DType,
    implementation: Implementation | None,
) -> Float[Array, "B L D"]:
    """SiLU of x + bias in float32, rounded to `dtype`; `features` names the last axis."""

    def activate(x, bias) -> Array:
        return rowwise.silu(x, bias, dtype=dtype, implementation=implementation)

    tokens = partition_spec("batch", "length", features)
    vector = None if bias is None else partition_spec(features)
    return shard_map_logical(activate, inputs=(tokens, vector), outputs=tokens)(x, bias)


def silu_gate(
    x: Float[Array, "B L D"],
    bias: Float[Array, " D"] | None,
    y: Float[Array, "B L D"],
    *,
    features: str,
    dtype: DType,
    implementation: Implementation | None,
) -> Float[Array, "B L D"]:
    """SiLU of x + bias, times y, like `silu`."""

    def gate(x, bias, y) -> Array:
        return rowwise.silu_gate(x, bias, y, dtype=dtype, implementation=implementation)

    tokens = partition_spec("batch", "length", features)
    vector = None if bias is None else partition_spec(features)
    return shard_map_logical(gate, inputs=(tokens, vector, tokens), outputs=tokens)(x, bias, y)
