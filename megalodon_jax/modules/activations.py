"""SiLU and the SiLU gate, on every device's own tokens and features."""

from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from megalodon_jax.modules.matmul import ACTIVATION
from megalodon_jax.parallel.sharding import partition_spec, shard_map_logical
from megalodon_jax.typing import Array, Float
from pallas_kernels import rowwise
from pallas_kernels.common.dispatch import Implementation


def silu(
    x: Float[Array, "B L D"],
    bias: Float[Array, " D"] | None,
    *,
    features: str,
    dtype: DTypeLike,
    implementation: Implementation | None,
) -> Float[Array, "B L D"]:
    """SiLU of x + bias in float32, cast to `dtype`; `features` is the last axis's logical name."""

    def activate(x, bias) -> Array:
        return rowwise.silu(x, bias, dtype=dtype, implementation=implementation)

    tokens = partition_spec("batch", "length", features)
    vector = None if bias is None else partition_spec(features)
    activate_shards = shard_map_logical(activate, in_specs=(tokens, vector), out_specs=tokens)
    return checkpoint_name(activate_shards(x, bias), ACTIVATION)


def silu_gate(
    x: Float[Array, "B L D"],
    bias: Float[Array, " D"] | None,
    y: Float[Array, "B L D"],
    *,
    features: str,
    dtype: DTypeLike,
    implementation: Implementation | None,
) -> Float[Array, "B L D"]:
    """SiLU(x + bias) * y, with the arguments of `silu`."""

    def gate(x, bias, y) -> Array:
        return rowwise.silu_gate(x, bias, y, dtype=dtype, implementation=implementation)

    tokens = partition_spec("batch", "length", features)
    vector = None if bias is None else partition_spec(features)
    gate_shards = shard_map_logical(gate, in_specs=(tokens, vector, tokens), out_specs=tokens)
    return checkpoint_name(gate_shards(x, bias, y), ACTIVATION)
