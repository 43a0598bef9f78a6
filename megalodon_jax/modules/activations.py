"""SiLU and its gates, on every device's own tokens and features."""

from megalodon_jax.config import DType, RowwiseImplementation
from megalodon_jax.sharding import axes, mapped
from megalodon_jax.typing import Array, Float
from pallas_kernels import rowwise


def silu(
    x: Float[Array, "B L D"],
    bias: Float[Array, " D"] | None,
    *,
    features: str,
    dtype: DType,
    implementation: RowwiseImplementation | None,
) -> Float[Array, "B L D"]:
    """SiLU of x + bias in float32, rounded to `dtype`; `features` names the last axis."""

    def activate(x, bias) -> Array:
        return rowwise.silu(x, bias, dtype=dtype, implementation=implementation)

    tokens = axes("batch", "length", features)
    vector = None if bias is None else axes(features)
    return mapped(activate, inputs=(tokens, vector), outputs=tokens)(x, bias)


def silu_gate(
    x: Float[Array, "B L D"],
    bias: Float[Array, " D"] | None,
    y: Float[Array, "B L D"],
    *,
    features: str,
    dtype: DType,
    implementation: RowwiseImplementation | None,
) -> Float[Array, "B L D"]:
    """SiLU of x + bias, times y, like `silu`."""

    def gate(x, bias, y) -> Array:
        return rowwise.silu_gate(x, bias, y, dtype=dtype, implementation=implementation)

    tokens = axes("batch", "length", features)
    vector = None if bias is None else axes(features)
    return mapped(gate, inputs=(tokens, vector, tokens), outputs=tokens)(x, bias, y)
