"""The linear layer of every block."""

from typing import NamedTuple, Self

import jax
from flax import nnx
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from megalodon_jax.config import InitMode, ModelConfig
from megalodon_jax.modules.collective_matmul import (
    column_parallel_matmul,
    is_column_parallel,
    is_row_parallel,
    row_parallel_matmul,
)
from megalodon_jax.modules.dropout import dropout, fold_key
from megalodon_jax.modules.matmul import (
    PRODUCT,
    LogicalAxes,
    interceptable_matmul,
    is_quantized,
    is_wrapped_by_qwix,
    mixed_matmul,
    quantized_matmul,
)
from megalodon_jax.modules.parameters import kernel_initializer, parameter
from megalodon_jax.modules.precision import at_least_float32
from megalodon_jax.typing import Array, Float, Float32, PRNGKey


class LoraFactors(NamedTuple):
    """How the factors of a layer act: `scale` is alpha / rank, `dropout` a rate on their input."""

    scale: float
    dropout: float


class Linear(nnx.Module):
    """X W + b: the product in `dtype` with float32 accumulation, then the bias in float32.

    Args:
      in_features: rows of W.
      out_features: columns of W.
      use_bias: whether b is there; it starts at zero.
      axes: logical names of W's two axes, for sharding.
      init_mode: initializer of W by its released name.
      dtype: of the product.
      param_dtype: of W and b.
      reduce_dtype: in which devices sum their gradients of W.
      rngs: source of initial values.

    `kernel` may hold a `qwix.QArray`; Qwix may also add LoRA factors beside it (`docs/flax.md`).
    `megalodon_jax.lora` sets `lora`, `lora_a` (in, r) and `lora_b` (r, out): then the product is
    X W + scale * dropout(X) A B.
    """

    lora: LoraFactors | None = None
    lora_a: nnx.LoRAParam
    lora_b: nnx.LoRAParam

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        axes: LogicalAxes = (None, None),
        init_mode: InitMode = "he",
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        reduce_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        initialize = kernel_initializer(init_mode)
        self.dtype = jnp.dtype(dtype)
        self.reduce_dtype = jnp.dtype(reduce_dtype)
        self.axes = axes
        kernel = initialize(rngs.params(), (in_features, out_features), jnp.dtype(param_dtype))
        self.kernel = parameter(kernel, *axes)
        self.bias = parameter(jnp.zeros(out_features, param_dtype), axes[1]) if use_bias else None

    @classmethod
    def from_config(
        cls,
        config: ModelConfig,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool,
        axes: LogicalAxes,
        rngs: nnx.Rngs,
    ) -> Self:
        """A linear layer with a model's initializer and dtypes."""
        return cls(
            in_features,
            out_features,
            use_bias=use_bias,
            axes=axes,
            init_mode=config.init_mode,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            reduce_dtype=config.reduce_dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        x: "Float[Array, '... in'] | SharedInput",
        *,
        name: str = PRODUCT,
        dropout_key: PRNGKey | None = None,
    ) -> Float32[Array, "... out"]:
        """Maps the last axis of x; `name` is the product's checkpoint name."""
        y = self.product(x, name=name, dropout_key=dropout_key)
        y = y.astype(at_least_float32(y.dtype))
        offset = self.offset
        return y if offset is None else y + offset

    def product(
        self,
        x: "Float[Array, '... in'] | SharedInput",
        *,
        name: str | None = None,
        dropout_key: PRNGKey | None = None,
    ) -> Float[Array, "... out"]:
        """X W in `dtype`, under a checkpoint name if there is one.

        `dropout_key` turns the dropout of LoRA on; a `SharedInput` has its own.
        """
        if not isinstance(x, SharedInput):
            x = SharedInput(x, self, dropout_key=dropout_key)
        y = x.product(self)
        return y if name is None else checkpoint_name(y, name)

    def lora_product(
        self, x: Float[Array, "... in"], dropout_key: PRNGKey | None
    ) -> Float[Array, "... out"]:
        """scale * dropout(X) A B in `dtype`."""
        assert self.lora is not None
        # Channels of the residual stream stay sharded: devices sum the product of rank r alone.
        rows, columns = ("channels" if axis == "embed" else axis for axis in self.axes)
        x = dropout(x, self.lora.dropout, dropout_key)
        h = mixed_matmul(x, self.lora_a[...], self.dtype, (rows, None), self.reduce_dtype)
        b = self.lora_b[...] * self.lora.scale
        return mixed_matmul(h, b, self.dtype, (None, columns), self.reduce_dtype)

    @property
    def offset(self) -> Float32[Array, " out"] | None:
        """b in float32."""
        if self.bias is None:
            return None
        return self.bias[...].astype(at_least_float32(self.bias.dtype))


class SharedInput:
    """The input of several linear layers; under tensor parallelism they share one exchange of it.

    Args:
      x: the input.
      linears: the layers, with one `dtype` and one `reduce_dtype`.
      dropout_key: turns the dropout of LoRA on, with another mask for every layer.

    Example:
      n = SharedInput(n, fc1, fc3)
      hidden = silu(fc1.product(n)) * fc3.product(n)
    """

    def __init__(
        self, x: Float[Array, "... in"], *linears: Linear, dropout_key: PRNGKey | None = None
    ):
        self.x = x
        self._dropout_key = dropout_key
        self._linears = linears
        self._products: tuple[Array, ...] | None = None
        first, axes = linears[0], tuple(linear.axes for linear in linears)
        if any(is_wrapped_by_qwix(each) or is_quantized(each.kernel[...]) for each in linears):
            return
        if all(is_column_parallel(each, x.ndim) for each in axes):
            kernels = tuple(linear.kernel[...] for linear in linears)
            self._products = column_parallel_matmul(
                x, kernels, first.dtype, axes, first.reduce_dtype
            )

    def finish_before(self, y: Array, *, name: str) -> Array:
        """y; under tensor parallelism the exchange and the products end before y is read.

        The exchange then runs beside the operations that compute y, and not beside the next
        exchange, which would wait for it.

        Args:
          y: computed from the same input.
          name: checkpoint name of the products.
        """
        if self._products is None:
            return y
        products = checkpoint_name(self._products, name)
        y, self._products = jax.lax.optimization_barrier((y, products))
        return y

    def product(self, linear: Linear) -> Float[Array, "... out"]:
        """X W of one of the layers, in its `dtype`, with what LoRA adds."""
        y = self._base_product(linear)
        if linear.lora is None:
            return y
        key = self._dropout_key
        key = None if key is None else fold_key(key, self._index(linear))
        return y + linear.lora_product(self.x, key)

    def _index(self, linear: Linear) -> int:
        # `nnx.tabulate` calls copies of the layers, which are none of these.
        return next(i for i, each in enumerate(self._linears) if each is linear)

    def _base_product(self, linear: Linear) -> Array:
        if self._products is not None:
            return self._products[self._index(linear)]
        if is_wrapped_by_qwix(linear):
            return interceptable_matmul(self.x, linear.kernel[...], linear.dtype, linear.axes)
        if is_quantized(linear.kernel[...]):
            return quantized_matmul(self.x, linear.kernel[...], linear.dtype, linear.axes)
        matmul = row_parallel_matmul if is_row_parallel(linear.axes, self.x.ndim) else mixed_matmul
        return matmul(self.x, linear.kernel[...], linear.dtype, linear.axes, linear.reduce_dtype)
