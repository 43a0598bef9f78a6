"""Moving-average equipped gated attention inside chunks, the first sub-layer of a block."""

import functools
import math
from typing import Any, Literal, NamedTuple, Self

import jax
from flax import nnx
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from megalodon_jax.cache import LayerCache, slot_specs
from megalodon_jax.config import InitMode, ModelConfig, MovingAverage, TimeNorm
from megalodon_jax.modules.activations import silu, silu_gate
from megalodon_jax.modules.bidirectional import (
    BidirectionalCEMA,
    BidirectionalEMA,
    make_bidirectional_average,
)
from megalodon_jax.modules.cema import make_moving_average
from megalodon_jax.modules.dropout import (
    dropout,
    drops,
    dtype_before_dropout,
    fold_key,
    split_key,
)
from megalodon_jax.modules.linear import Linear, SharedInput
from megalodon_jax.modules.matmul import PRODUCT, PROJECTION
from megalodon_jax.modules.norms import RMSNorm, l2_normalize, rms_normalize
from megalodon_jax.modules.options import DropoutRates, Implementations
from megalodon_jax.modules.parameters import parameter
from megalodon_jax.modules.positions import PositionInfo, position_info
from megalodon_jax.modules.precision import at_least_float32
from megalodon_jax.modules.rotary import Rotation, rotate
from megalodon_jax.modules.time_norm import make_time_norm, normalize
from megalodon_jax.parallel.sharding import (
    fold_in_device_index,
    partition_spec,
    sequence_axis,
    shard_map_logical,
)
from megalodon_jax.typing import Array, Float, Float32, Int32, PRNGKey
from pallas_kernels.chunk_attention import (
    AttentionDropout,
    ChunkAttentionOutput,
    KeyValueCache,
    chunk_attention,
)
from pallas_kernels.state_step import pack_state, unpack_state


class AttentionOutput(NamedTuple):
    """The sub-layer's output before the residual, and the layer's new streaming state.

    Attributes:
      product: the output without `bias`; a LayerNorm that follows adds the two in its kernel.
      bias: to be added to every token; None where dropout has already been applied to the sum.
      cache: None if none came in.
    """

    product: Float[Array, "B L D"]
    bias: Float32[Array, " D"] | None
    cache: LayerCache | None

    @property
    def out(self) -> Float32[Array, "B L D"]:
        """product + bias, in float32."""
        out = self.product.astype(at_least_float32(self.product.dtype))
        return out if self.bias is None else out + self.bias


class MegaAttention(nnx.Module):
    """Moving-average equipped gated attention (Ma et al. 2024, section 3.4, as released).

    u = TimestepNorm(x), m = RMSNorm(CEMA(u)); queries and keys come from m by one shared
    projection, values from u, the gate r and the linear path from m:
    out = m Wh1 + bh1 + (softmax(q k^T) v * r) Wh2.

    The authors' encoders (appendix C) have SequenceNorm, bidirectional CEMA, non-causal attention,
    m = RMSNorm or SiLU of CEMA, and queries and keys of the norm 1 (`qk_norm="l2"`).

    Args:
      features: width D of input and output.
      z_dim: width Z of queries and keys, all heads together.
      value_dim: width E of values and of their gate, all heads together.
      chunk_size: tokens C that attend to one another; attention never crosses a chunk. None: all
        tokens of a document do.
      num_heads: heads H.
      cema_order: orders N of CEMA.
      norm_num_groups: groups G of TimestepNorm or SequenceNorm; None: every channel is one.
      norm_prior_count: see `TimestepNorm`.
      norm_eps: added to variances.
      norm_affine: whether RMSNorm has a learned scale.
      moving_average: "cema", "ema", or "none": m = RMSNorm(u).
      time_norm: the norm of x: "timestep", "sequence", "layer" or "rms".
      qk_norm: RMSNorm of the heads of z, the shared projection of queries and keys. "l2": heads
        are z / max(|z|, 1e-5), the same but for where the epsilon is. False: z = silu(m Wz + bz),
        and softmax(q k^T / sqrt(Z / H)), as in MEGA (Ma et al. 2023).
      qk_gain: initial value of the learned scales of queries and of keys, 1 + `gamma`; with
        `qk_norm` a score is at most `qk_gain` squared at first.
      causal: False: the average runs in both directions, and attention sees the whole chunk; there
        is no cache.
      average_activation: m = RMSNorm or SiLU of the average.
      rope_base: base of the rotary angles; None: no position embedding.
      init_mode: initializer of the weights by its released name.
      dropout: dropped fractions; None: nothing is dropped.
      dtype: of products and activations; norm statistics, CEMA and softmax are float32.
      param_dtype: of the weights; CEMA's parameters are float32.
      reduce_dtype: in which devices sum their gradients of the matrices.
      implementations: of the operations; None: the fastest known for the platform.
      rngs: source of initial values.
    """

    def __init__(
        self,
        features: int,
        *,
        z_dim: int,
        value_dim: int,
        chunk_size: int | None,
        num_heads: int = 1,
        cema_order: int = 16,
        norm_num_groups: int | None = 32,
        norm_prior_count: int = 0,
        norm_eps: float = 1e-5,
        norm_affine: bool = True,
        moving_average: MovingAverage = "cema",
        time_norm: TimeNorm | Literal["sequence"] = "timestep",
        qk_norm: bool | Literal["l2"] = True,
        qk_gain: float = 1.0,
        causal: bool = True,
        average_activation: Literal["rms", "silu"] = "rms",
        rope_base: float | None = 10_000.0,
        init_mode: InitMode = "he",
        dropout: DropoutRates | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        reduce_dtype: DTypeLike = jnp.float32,
        implementations: Implementations | None = None,
        rngs: nnx.Rngs,
    ):
        D, Z, E = features, z_dim, value_dim
        self.chunk_size, self.rope_base, self.norm_eps = chunk_size, rope_base, norm_eps
        self.num_heads, self.qk_norm, self.causal = num_heads, qk_norm, causal
        self.head_dim, self.value_head_dim = Z // num_heads, E // num_heads
        self.dropout = dropout or DropoutRates()
        self.implementations = implementations = implementations or Implementations()
        self.dtype = jnp.dtype(dtype)
        dtypes: Any = {"dtype": dtype, "param_dtype": param_dtype}
        self.timenorm = make_time_norm(
            time_norm,
            D,
            num_groups=norm_num_groups,
            prior_count=norm_prior_count,
            eps=norm_eps,
            affine=norm_affine,
            implementations=implementations,
            **dtypes,
        )
        make_average = make_moving_average
        if not causal:
            wide = at_least_float32(param_dtype)
            make_average = functools.partial(make_bidirectional_average, param_dtype=wide)
        self.cema = make_average(
            moving_average, D, order=cema_order, implementation=implementations.cema, rngs=rngs
        )
        if average_activation not in ("rms", "silu"):
            raise ValueError(f"average_activation is {average_activation!r}; use 'rms' or 'silu'")
        norm = functools.partial(RMSNorm, implementation=implementations.rowwise, **dtypes)
        is_normed = average_activation == "rms"
        self.rmsnorm = norm(D, eps=norm_eps, affine=norm_affine) if is_normed else None
        options: Any = {
            "init_mode": init_mode, "reduce_dtype": reduce_dtype, "rngs": rngs, **dtypes
        }  # fmt: skip
        self.wv = Linear(D, E, axes=("embed", "value"), **options)
        self.wz = Linear(D, Z, axes=("embed", "query"), **options)
        self.wr = Linear(D, E, axes=("embed", "value"), **options)
        self.wh1 = Linear(D, D, axes=("embed", "embed_out"), **options)
        self.wh2 = Linear(E, D, axes=("value", "embed"), use_bias=False, **options)
        self.gamma = parameter(jnp.full((2, Z), qk_gain - 1.0, param_dtype), None, "query")
        self.beta = parameter(jnp.zeros((2, Z), param_dtype), None, "query")

    @classmethod
    def from_config(cls, config: ModelConfig, *, rngs: nnx.Rngs) -> Self:
        """The attention of a model's blocks."""
        return cls(
            config.model_dim,
            z_dim=config.z_dim,
            value_dim=config.value_dim,
            chunk_size=config.chunk_size,
            num_heads=config.num_heads,
            cema_order=config.cema_ndim,
            norm_num_groups=config.norm_num_groups,
            norm_prior_count=config.norm_prior_count,
            norm_eps=config.norm_eps,
            norm_affine=config.norm_affine,
            moving_average=config.moving_average,
            time_norm=config.time_norm,
            qk_norm=config.qk_norm,
            qk_gain=config.qk_gain,
            rope_base=config.rope_base,
            init_mode=config.init_mode,
            dropout=DropoutRates.from_config(config),
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            reduce_dtype=config.reduce_dtype,
            implementations=Implementations.from_config(config),
            rngs=rngs,
        )

    def __call__(
        self,
        x: Float[Array, "B L D"],
        *,
        segment_ids: Int32[Array, "B L"] | None = None,
        positions: PositionInfo | None = None,
        cache: LayerCache | None = None,
        dropout_key: PRNGKey | None = None,
    ) -> AttentionOutput:
        """Attends within chunks.

        Args:
          x: features.
          segment_ids: documents of each row, numbered from 1; 0 is padding. None: one document.
          positions: what `position_info` gives for these tokens, segment ids included: a model
            computes it once for all layers. None: rows begin at position 0. A cache needs it.
          cache: the state of the tokens before these.
          dropout_key: turns dropout on.

        Raises:
          ValueError: `positions` is missing beside a cache, given beside `segment_ids`, or has
            rotary angles for a module without them (or none for one with them); a cache without
            causality.
        """
        if positions is None:
            positions = self._positions_from_zero(x, segment_ids, cache)
        elif segment_ids is not None:
            raise ValueError("positions hold the segment ids already; pass only one of the two")
        if (positions.rotation is None) != (self.rope_base is None):
            raise ValueError(
                f"rope_base is {self.rope_base}, but positions.rotation is "
                f"{'None' if positions.rotation is None else 'not None'}; pass the same rope_base "
                "to position_info"
            )
        if cache is not None and not self.causal:
            raise ValueError("a non-causal layer sees the tokens to come: it has no cache")
        hidden_key, attention_key, gate_key, output_key = split_key(dropout_key, 4)
        segment_ids = positions.segment_ids
        u, norm_state = normalize(
            self.timenorm,
            x,
            segment_ids=segment_ids,
            initial_state=None if cache is None else cache.norm,
            lengths=positions.lengths,
        )
        averaged, cema_state = self._average(u, segment_ids, cache)
        value_input = SharedInput(u, self.wv, dropout_key=fold_key(dropout_key, 0))
        averaged = value_input.finish_before(averaged, name=PROJECTION)
        m = dropout(self._activate(averaged), self.dropout.hidden, hidden_key)
        m = SharedInput(m, self.wz, self.wr, self.wh1, dropout_key=fold_key(dropout_key, 1))
        query, key = self._queries_and_keys(m, positions.rotation)
        attended, keys_and_values = self._attend(
            (query, key, self._values(value_input)),
            positions,
            None if cache is None else cache.keys_and_values,
            attention_key,
        )
        gated = dropout(self._gate(m, attended, gate_key), self.dropout.hidden, gate_key)
        product = self.wh1.product(m)
        product = product + self.wh2.product(gated, dropout_key=fold_key(dropout_key, 2))
        product = checkpoint_name(product, PRODUCT)
        if cache is not None and keys_and_values is not None:
            packed = None if cema_state is None else pack_state(cema_state)
            cache = LayerCache(keys_and_values, norm_state, packed)
        out = AttentionOutput(product, self.wh1.offset, cache)
        if not drops(self.dropout.output, output_key):
            return out
        dropped = dropout(out.out, self.dropout.output, output_key)
        return out._replace(product=dropped, bias=None)

    def _positions_from_zero(
        self, x: Array, segment_ids: Array | None, cache: LayerCache | None
    ) -> PositionInfo:
        if cache is not None:
            raise ValueError(
                "a cache needs positions: pass positions=position_info(..., start=<tokens seen>)"
            )
        return position_info(
            (x.shape[0], x.shape[1]),
            chunk_size=self.chunk_size,
            head_dim=self.head_dim,
            rope_base=self.rope_base,
            segment_ids=segment_ids,
            dtype=self.dtype,
        )

    def _average(
        self, u: Float[Array, "B L D"], segment_ids: Array | None, cache: LayerCache | None
    ) -> tuple[Float[Array, "B L D"], Array | None]:
        """The moving average of u, and its state if it has one."""
        if self.cema is None:
            return u, None
        if isinstance(self.cema, BidirectionalCEMA | BidirectionalEMA):
            return self.cema(u, segment_ids=segment_ids), None
        state = None if cache is None or cache.cema is None else unpack_state(cache.cema)
        return self.cema(u, segment_ids=segment_ids, initial_state=state)

    def _activate(self, averaged: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        if self.rmsnorm is not None:
            return self.rmsnorm(averaged)
        return silu(
            averaged,
            None,
            features="channels",
            dtype=self.dtype,
            implementation=self.implementations.rowwise,
        )

    def _values(self, u: SharedInput) -> Float[Array, "B L H Dv"]:
        values = silu(
            self.wv.product(u, name=PROJECTION),
            self.wv.offset,
            features="value",
            dtype=self.dtype,
            implementation=self.implementations.rowwise,
        )
        return values.reshape(*values.shape[:2], self.num_heads, self.value_head_dim)

    def _gate(
        self, m: SharedInput, attended: Float[Array, "B L H Dv"], key: PRNGKey | None
    ) -> Float[Array, "B L E"]:
        return silu_gate(
            self.wr.product(m, name=PROJECTION),
            self.wr.offset,
            attended.reshape(*attended.shape[:2], -1),
            features="value",
            dtype=dtype_before_dropout(self.dtype, self.dropout.hidden, key),
            implementation=self.implementations.rowwise,
        )

    def _queries_and_keys(self, m: SharedInput, by: Rotation | None) -> tuple[Array, Array]:
        heads = (self.num_heads, self.head_dim)
        z = self.wz(m, name=PROJECTION)
        z = z.reshape(*z.shape[:2], *heads)
        if self.qk_norm == "l2":
            z = l2_normalize(z)
        else:
            z = rms_normalize(z, self.norm_eps) if self.qk_norm else jax.nn.silu(z)
        scale, offset = self.scale_and_offset()

        def transform(i: int) -> Array:
            projected = z * scale[i].reshape(heads) + offset[i].reshape(heads)
            return (projected if by is None else rotate(projected, by)).astype(self.dtype)

        return transform(0), transform(1)

    def scale_and_offset(self) -> tuple[Float32[Array, "2 Z"], Float32[Array, "2 Z"]]:
        """Scale and offset of z for queries (row 0) and keys (row 1), with the scores' scale."""
        wide = at_least_float32(self.gamma.dtype)
        scale, offset = 1.0 + self.gamma[...].astype(wide), self.beta[...].astype(wide)
        if self.qk_norm == "l2":
            return scale, offset
        if self.qk_norm:
            # As released: 1/sqrt(d) in q and in k, before the offsets.
            return scale / math.sqrt(self.head_dim), offset
        # Scores have 1/sqrt(d) as a whole, here in q alone, as in MEGA's code.
        query_only = jnp.array([[1 / math.sqrt(self.head_dim)], [1.0]], jnp.float32)
        return scale * query_only, offset * query_only

    def _attend(
        self,
        qkv: tuple[Array, Array, Array],
        info: PositionInfo,
        cache: KeyValueCache | None,
        key: PRNGKey | None,
    ) -> ChunkAttentionOutput:
        implementation = self.implementations.attention
        if info.segment_ids is None and cache is None:
            implementation = self.implementations.whole_row_attention or implementation

        def attend(qkv, positions, segment_ids, cache, key) -> ChunkAttentionOutput:
            return chunk_attention(
                *qkv,
                chunk_size=self.chunk_size,
                causal=self.causal,
                positions=positions,
                segment_ids=segment_ids,
                cache=cache,
                dropout=self._attention_dropout(key),
                implementation=implementation,
                sequence_axis=sequence_axis(),
            )

        tokens = partition_spec("batch", "length")
        features = partition_spec("batch", "length", "heads", None)
        cache_spec = None if cache is None else slot_specs(cache)
        return shard_map_logical(
            attend,
            in_specs=(
                (features,) * 3,
                None if info.positions is None else tokens,
                None if info.segment_ids is None else tokens,
                cache_spec,
                None if key is None else partition_spec(),
            ),
            out_specs=ChunkAttentionOutput(features, cache_spec),
        )(qkv, info.positions, info.segment_ids, cache, key)

    def _attention_dropout(self, key: PRNGKey | None) -> AttentionDropout | None:
        if key is None or self.dropout.attention == 0.0:
            return None
        return AttentionDropout(
            rate=self.dropout.attention,
            key=fold_in_device_index(key),
            mode=self.dropout.attention_mode,
        )
