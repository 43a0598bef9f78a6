"""Weights prepared once for decoding: a tuple of layers, cast, joined, with CEMA's tables ready."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.config import ModelConfig, WeightFormat
from megalodon_jax.layer_stack import unstack_layers
from megalodon_jax.model import Megalodon
from megalodon_jax.modules.block import Block
from megalodon_jax.modules.feed_forward import FeedForward
from megalodon_jax.modules.linear import Linear
from megalodon_jax.modules.matmul import LogicalAxes
from megalodon_jax.modules.time_norm import TimeNormModule
from megalodon_jax.parallel.sharding import axis_size, constrain
from megalodon_jax.typing import Array, Float, Float32
from pallas_kernels.chunk_decode import QueryKeyVectors
from pallas_kernels.chunk_decode.types import swap_pairs
from pallas_kernels.common.int8 import quantize
from pallas_kernels.skinny_matmul import Int8Matrix, sum_weights
from pallas_kernels.skinny_matmul.types import Matrix
from pallas_kernels.state_step import CemaStepTables, cema_step_tables


class Projection(NamedTuple):
    """x Wᵀ + b of one or several linear layers side by side.

    Attributes:
      kernel: W.
      bias: b; None: 0.
      weight_sums: `skinny_matmul.sum_weights` of W, for a projection of rows with LayerNorm.
    """

    kernel: Matrix
    bias: Float32[Array, " out"] | None
    weight_sums: Float32[Array, " out"] | None = None


class NormVectors(NamedTuple):
    """The learned scale (1 added) and bias of a norm; None where it has none."""

    scale: Float32[Array, " D"] | None
    bias: Float32[Array, " D"] | None


class DecodeLayer(NamedTuple):
    """One block.

    Attributes:
      norm: TimestepNorm, LayerNorm or RMSNorm before attention.
      average: tables of CEMA or EMA; None without a moving average.
      values: D to E.
      mixed: D to Z, E, D (queries and keys, gate, linear path): one projection, or three under
        tensor parallelism.
      queries_and_keys: from the normalized z.
      attention_output: E to D.
      ffn_input: D to F, or D to 2F with SwiGLU (two projections under tensor parallelism).
      ffn_output: F to D.
      ffn_scale: `alpha`; None without `rescale_nffn`.
    """

    norm: NormVectors
    average: CemaStepTables | None
    values: Projection
    mixed: Sequence[Projection]
    queries_and_keys: QueryKeyVectors
    attention_output: Projection
    ffn_input: Sequence[Projection]
    ffn_output: Projection
    ffn_scale: Float32[Array, " D"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeWeights:
    """The weights of a model for `inference.step.decode`.

    Attributes:
      embedding: token embeddings, in the model's dtype.
      layers: the blocks.
      final_norm: the norm after them.
      output: from features to scores.
      config: of the model.
    """

    embedding: Float[Array, "V D"]
    layers: tuple[DecodeLayer, ...]
    final_norm: NormVectors
    output: Projection
    config: ModelConfig = dataclasses.field(metadata={"static": True})


def prepare(model: Megalodon, weights: WeightFormat = "model") -> DecodeWeights:
    """The weights of a model, prepared for decoding; call it inside or outside `jit`.

    Args:
      model: the model.
      weights: "model": matrices in `config.dtype`; "int8": matrices of blocks and output as 8-bit
        integers with a float32 scale for every output feature, half the bytes of bfloat16. Norms,
        biases, CEMA and the embedding are not quantized.

    Raises:
      ValueError: there is no such format.
    """
    if weights not in ("model", "int8"):
        raise ValueError(f"weights is {weights!r}; use 'model' or 'int8'")
    config = model.config
    make = _Preparation(jnp.dtype(config.dtype), is_int8=weights == "int8")
    graphdef, params = nnx.split(model.layers)
    layers = (
        make.layer(nnx.merge(graphdef, layer))
        for layer in unstack_layers(params, config.num_layers)
    )
    return DecodeWeights(
        embedding=constrain(model.embed.embedding[...].astype(config.dtype), None, "channels"),
        layers=tuple(layers),
        final_norm=_norm_vectors(model.final_norm),
        output=make.projection(model.output_matrix(), None, (None, "vocab")),
        config=config,
    )


class _Preparation(NamedTuple):
    dtype: Any
    is_int8: bool

    def layer(self, block: Block) -> DecodeLayer:
        mega, ffn = block.mega, block.nffn
        assert mega.rmsnorm is not None, "decoding is that of language models"
        heads = (2, mega.num_heads, mega.head_dim)
        scale, offset = (each.reshape(heads) for each in mega.scale_and_offset())
        return DecodeLayer(
            norm=_norm_vectors(mega.timenorm),
            average=None if mega.cema is None else cema_step_tables(mega.cema.params),
            values=self.join(mega.wv)[0],
            mixed=self.join(
                mega.wz, mega.wr, mega.wh1, norm=NormVectors(_one_plus(mega.rmsnorm.weight), None)
            ),
            queries_and_keys=QueryKeyVectors(scale, offset, swap_pairs(scale), swap_pairs(offset)),
            attention_output=self.join(mega.wh2)[0],
            ffn_input=self.join(*_ffn_inputs(ffn), norm=_norm_vectors(ffn.norm), is_centered=True),
            ffn_output=self.join(ffn.fc2)[0],
            ffn_scale=None if ffn.alpha is None else ffn.alpha[...].astype(jnp.float32),
        )

    def join(
        self, *linears: Linear, norm: NormVectors | None = None, is_centered: bool = False
    ) -> tuple[Projection, ...]:
        """One projection of several layers, or one for each where columns are sharded.

        Args:
          *linears: layers of the same input.
          norm: vectors of the norm of this input, which the projection takes in: the rows of the
            kernel are scaled, and the norm's bias becomes part of the layer's.
          is_centered: whether this norm subtracts the mean, which needs the sums of the weights.
        """
        norm = NormVectors(None, None) if norm is None else norm
        kernels = [linear.kernel[...] for linear in linears]
        biases = [
            _with_norm_bias(linear.offset, kernel, norm.bias)
            for linear, kernel in zip(linears, kernels, strict=True)
        ]
        if norm.scale is not None:
            kernels = [kernel.astype(jnp.float32) * norm.scale[:, None] for kernel in kernels]
        if axis_size("model") > 1:
            axes = [linear.axes for linear in linears]
            return tuple(
                self.projection(*of_layer, is_centered=is_centered)
                for of_layer in zip(kernels, biases, axes, strict=True)
            )
        offsets = [
            jnp.zeros(kernel.shape[1], jnp.float32) if bias is None else bias
            for kernel, bias in zip(kernels, biases, strict=True)
        ]
        bias = None if all(bias is None for bias in biases) else jnp.concatenate(offsets)
        kernel = jnp.concatenate(kernels, axis=1)
        return (self.projection(kernel, bias, is_centered=is_centered),)

    def projection(
        self,
        kernel: Array,
        bias: Array | None,
        axes: LogicalAxes = (None, None),
        *,
        is_centered: bool = False,
    ) -> Projection:
        # Sharded over `model` alone: a step would gather what FSDP shards.
        inputs, outputs = (None if axis == "embed" else axis for axis in axes)
        bias = None if bias is None else constrain(bias, outputs)
        if self.is_int8:
            values, scale = quantize(kernel.T)
            matrix = Int8Matrix(constrain(values, outputs, inputs), constrain(scale, outputs))
        else:
            matrix = constrain(kernel.astype(self.dtype).T, outputs, inputs)
        weight_sums = constrain(sum_weights(matrix), outputs) if is_centered else None
        return Projection(matrix, bias, weight_sums)


def _ffn_inputs(ffn: FeedForward) -> tuple[Linear, ...]:
    return (ffn.fc1,) if ffn.fc3 is None else (ffn.fc1, ffn.fc3)


def _norm_vectors(norm: TimeNormModule) -> NormVectors:
    bias = getattr(norm, "bias", None)
    return NormVectors(
        _one_plus(norm.weight), None if bias is None else bias[...].astype(jnp.float32)
    )


def _with_norm_bias(bias: Array | None, kernel: Array, norm_bias: Array | None) -> Array | None:
    if norm_bias is None:
        return bias
    taken_in = jnp.matmul(
        norm_bias.astype(jnp.float32),
        kernel.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return taken_in if bias is None else bias + taken_in


def _one_plus(weight: nnx.Param | None) -> Float32[Array, " D"] | None:
    return None if weight is None else 1.0 + weight[...].astype(jnp.float32)
