"""The products of a decoding step as the step calls them, for `bench decode_kernels`."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

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
from megalodon_jax.config import ModelConfig
from megalodon_jax.config.model import WeightFormat
from megalodon_jax.inference.weights import Projection, prepare
from megalodon_jax.models import abstract_model
from pallas_kernels.skinny_matmul import (
    Epilogue,
    Int8Matrix,
    Part,
    RowNorm,
    skinny_matmul,
    sum_weights,
    xla,
)
from pallas_kernels.skinny_matmul.block_sizes import (
    MAX_ROWS,
    MMA_ROWS,
    WideTiling,
    choose_wide_tiling,
    wide_tilings,
)
from pallas_kernels.skinny_matmul.mosaic_gpu import op as mosaic_gpu
from pallas_kernels.skinny_matmul.types import values_of


@dataclasses.dataclass(frozen=True)
class ProductCase:
    """A product of one layer, or that of the logits, as `inference.step` calls it.

    Attributes:
      name: of the product.
      rows: rows B.
      format: of the weights.
      projection: shapes of the matrix, the bias and the sums of weights.
      parts: of the output features.
      arrays: matrices in turn.
      x_dtype: dtype of the rows.
      norm: of the rows.
      activation: after the product.
      added: dtypes of what is added.
      has_scale: whether the output features have a scale.
      dtype: of the operands of the product.
    """

    name: str
    rows: int
    format: WeightFormat
    projection: Projection
    parts: tuple[Part, ...]
    arrays: int
    x_dtype: Any
    norm: RowNorm | None = None
    activation: Literal["silu", "swiglu"] | None = None
    added: tuple[Any, ...] = ()
    has_scale: bool = False
    dtype: Any = jnp.bfloat16
    op: DecodeKernel = dataclasses.field(default="skinny_matmul", init=False)

    @property
    def call(self) -> str:
        features, columns = values_of(self.projection.kernel).shape
        return f"{self.name}, {columns} x {features}"

    @property
    def calls(self) -> int:
        return self.arrays

    @property
    def array_bytes(self) -> int:
        return num_bytes(self.projection.kernel)

    @property
    def least_bytes(self) -> int:
        # The sums of weights follow from the matrix: they are not counted.
        fixed = jax.eval_shape(dataclasses.replace(self, arrays=1).make_operands).fixed
        results = sum(
            self.rows * part.width * jnp.dtype(part.dtype).itemsize for part in self.parts
        )
        return num_bytes((fixed[0], fixed[1], fixed[3])) + results

    def make_operands(self) -> Operands:
        """x, matrices, their sums, and the arrays of the epilogue; nothing is donated."""
        kernel, bias, weight_sums = self.projection
        values, width = values_of(kernel), self._width
        features, columns = values.shape
        rng = np.random.default_rng(features)

        def matrix(seed: int) -> Any:
            numbers = random_array(seed, (features, columns), values.dtype, columns**-0.5)
            if not isinstance(kernel, Int8Matrix):
                return numbers
            # Integers of this range have the standard deviation 73.
            scale = rng.uniform(0.5, 1.5, features).astype(np.float32)
            return Int8Matrix(numbers, jnp.asarray(scale / (73 * columns**0.5), jnp.float32))

        kernels = [matrix(seed) for seed in range(self.arrays)]
        sums = [None] * self.arrays
        if weight_sums is not None:
            sums = [sum_weights(each) for each in kernels]
        # A mean that the norms of rows have to see.
        x = normal(rng, (self.rows, columns)) + np.float32(0.3)
        epilogue = (
            None if bias is None else normal(rng, bias.shape),
            normal(rng, (width,)) if self.has_scale else None,
            [normal(rng, (self.rows, width), dtype) for dtype in self.added],
        )
        return Operands((x.astype(self.x_dtype), kernels, sums, epilogue), ())

    def program(self, variant: Variant) -> Callable[[Any, Any], tuple[Any, Any]]:
        def run(fixed: Any, donated: Any) -> tuple[Any, Any]:
            x, kernels, sums, epilogue = fixed
            results = []
            for kernel, weight_sums in zip(kernels, sums, strict=True):
                results.append(self._multiply(variant, x, kernel, weight_sums, epilogue))
                x, results[-1] = jax.lax.optimization_barrier((x, results[-1]))
            return results, donated

        return run

    def measure_error(self, variant: Variant) -> KernelErrors:
        fixed = dataclasses.replace(self, arrays=1).make_operands().fixed
        x, (kernel,), (weight_sums,), epilogue = fixed
        found = jax.jit(partial(self._multiply, variant))(x, kernel, weight_sums, epilogue)
        with jax.default_matmul_precision("highest"):
            exact = jax.jit(self._multiply_in_float32)(x, kernel, epilogue)
        return KernelErrors(relative_error(found, exact))

    def tilings(self) -> list[WideTiling]:
        if not MMA_ROWS < self.rows <= MAX_ROWS:
            return []
        values = values_of(self.projection.kernel)
        sizes: Any = (
            2 * MMA_ROWS if self.rows <= 2 * MMA_ROWS else MAX_ROWS,
            values.shape[1],
            [part.width for part in self.parts if not part.is_swapped],
        )
        options: Any = {
            "weight_bytes": values.dtype.itemsize,
            "is_paired": self.activation == "swiglu",
        }
        chosen = choose_wide_tiling(*sizes, **options)
        return [
            each
            for each in wide_tilings(*sizes, **options)
            if each != chosen and _are_neighbours(each, chosen)
        ]

    @property
    def _width(self) -> int:
        return sum(part.width for part in self.parts if not part.is_swapped)

    def _multiply(
        self, variant: Variant, x: Any, kernel: Any, weight_sums: Any, epilogue: Any
    ) -> tuple[Any, ...]:
        bias, scale, added = epilogue
        epilogue = Epilogue(bias, self.activation, scale, added)
        if variant.tiling is None:
            return skinny_matmul(
                x, kernel, parts=self.parts, norm=self.norm, epilogue=epilogue,
                dtype=jnp.dtype(self.dtype), weight_sums=weight_sums,
                implementation=variant.implementation,
            )  # fmt: skip
        tiling: Any = variant.tiling
        return mosaic_gpu.skinny_matmul(
            x, kernel, self.norm, epilogue, self.parts, jnp.dtype(self.dtype), weight_sums,
            tiling=tiling,
        )  # fmt: skip

    def _multiply_in_float32(self, x: Any, kernel: Any, epilogue: Any) -> tuple[Any, ...]:
        bias, scale, added = epilogue
        if isinstance(kernel, Int8Matrix):
            wide = kernel.values.astype(jnp.float32) * kernel.scale[:, None]
        else:
            wide = kernel.astype(jnp.float32)
        return xla.skinny_matmul(
            x.astype(jnp.float32),
            wide,
            self.norm,
            Epilogue(bias, self.activation, scale, added),
            [part._replace(dtype=jnp.float32) for part in self.parts],
            jnp.dtype(jnp.float32),
        )


def product_cases(
    config: ModelConfig, rows: int, weights: WeightFormat, arrays: int
) -> Iterator[ProductCase]:
    """The products of a layer, in the order of a step, and that of the logits.

    Args:
      config: of the model.
      rows: rows B.
      weights: format of the matrices.
      arrays: matrices in turn.
    """
    graphdef, params = abstract_model(dataclasses.replace(config, num_layers=1, skip_attention=0))
    shapes = jax.eval_shape(lambda params: prepare(nnx.merge(graphdef, params), weights), params)
    (layer,) = shapes.layers
    (mixed,), (ffn_input,) = layer.mixed, layer.ffn_input
    dtype, wide = jnp.dtype(config.dtype), jnp.dtype(jnp.float32)
    D, Z = config.model_dim, config.z_dim
    of_z = [Part(Z, wide)] if config.rope_base is None else [Part(Z, wide), Part(Z, wide, True)]
    of_mixed = (*of_z, Part(config.value_dim, dtype), Part(D, wide))
    residual = wide if config.residual_connection == "pre_norm" else dtype
    case = partial(ProductCase, rows=rows, format=weights, arrays=arrays, dtype=dtype)
    values = (Part(config.value_dim, dtype),)
    yield case("value", projection=layer.values, parts=values, x_dtype=dtype, activation="silu")
    rms, layer_norm = (RowNorm(kind, config.norm_eps) for kind in ("rms", "layer"))
    yield case("mixed", projection=mixed, parts=of_mixed, x_dtype=dtype, norm=rms)
    yield case(
        "attention output",
        projection=layer.attention_output,
        parts=(Part(D, wide),),
        x_dtype=dtype,
        added=(wide, dtype),
    )
    yield case(
        "FFN input",
        projection=ffn_input,
        parts=(Part(config.ffn_hidden_dim, dtype),),
        x_dtype=wide,
        norm=layer_norm,
        activation="swiglu" if config.swiglu else "silu",
    )
    yield case(
        "FFN output",
        projection=layer.ffn_output,
        parts=(Part(D, dtype),),
        x_dtype=dtype,
        added=(residual,),
        has_scale=layer.ffn_scale is not None,
    )
    of_logits = (Part(config.num_outputs, wide),)
    yield case("logits", projection=shapes.output, parts=of_logits, x_dtype=dtype)


def _are_neighbours(one: WideTiling, other: WideTiling) -> bool:
    """Whether features and splits are the same, half or twice as many."""
    pairs = ((one.features, other.features), (one.splits, other.splits))
    return all(a == b or a == 2 * b or 2 * a == b for a, b in pairs)
