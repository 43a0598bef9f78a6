"""The encoder of Ma et al. 2024, appendix C: one model for text, images and sound."""

from typing import Any

from flax import nnx

from megalodon_jax.config import EncoderConfig
from megalodon_jax.encoder_model import EncoderModel
from megalodon_jax.modules.attention import MegaAttention
from megalodon_jax.modules.block import Block
from megalodon_jax.modules.feed_forward import FeedForward
from megalodon_jax.modules.options import DropoutRates, Implementations
from megalodon_jax.modules.time_norm import TimeNormModule, make_time_norm
from megalodon_jax.typing import Array, Float32


class Encoder(EncoderModel):
    """MEGALODON's encoder; `EncoderModel` documents what it takes and gives.

    Blocks are those of the language model with SequenceNorm, bidirectional CEMA and non-causal
    attention; they are stacked and run as the language model's (`layer_stack`).

    Args:
      config: sizes and numerics.
      rngs: source of initial values.

    Example:
      model = Encoder(EncoderConfig(input="values", chunk_size=128), rngs=nnx.Rngs(0))
      scores = model(pixels[..., None])  # (B, 784, 1) to (B, 10)
    """

    config: EncoderConfig

    def _make_block(self, layer: Float32[Array, ""], rngs: nnx.Rngs) -> Block:
        config = self.config
        options: Any = {
            "norm_eps": config.norm_eps,
            "init_mode": config.init_mode,
            "dtype": config.dtype,
            "param_dtype": config.param_dtype,
            "reduce_dtype": config.reduce_dtype,
            "rngs": rngs,
        }
        mega = MegaAttention(
            config.model_dim,
            z_dim=config.z_dim,
            value_dim=config.value_dim,
            chunk_size=config.chunk_size,
            num_heads=config.num_heads,
            cema_order=config.cema_ndim,
            norm_num_groups=config.norm_num_groups,
            moving_average=config.moving_average,
            time_norm=config.time_norm,
            qk_norm="l2",
            causal=config.causal,
            average_activation=config.average_activation,
            rope_base=config.rope_base,
            dropout=DropoutRates.from_config(config),
            implementations=_implementations(config),
            **options,
        )
        nffn = FeedForward(
            config.model_dim,
            config.ffn_hidden_dim,
            hidden_bias=True,
            rescale_start=0.1 * 0.5**layer if config.rescale_nffn else None,
            dropout=config.dropout,
            hidden_dropout=config.hidden_dropout,
            implementation=config.implementation_of("rowwise"),
            **options,
        )
        return Block(mega, nffn, residual_connection=config.residual_connection)

    def _make_final_norm(self) -> TimeNormModule:
        config = self.config
        return make_time_norm(
            config.time_norm,
            config.model_dim,
            num_groups=config.norm_num_groups,
            eps=config.norm_eps,
            implementations=_implementations(config),
            dtype=config.dtype,
            param_dtype=config.param_dtype,
        )


def _implementations(config: EncoderConfig) -> Implementations:
    return Implementations(
        cema=config.implementation_of("cema"),
        timestep_norm=config.implementation_of("timestep_norm"),
        attention=config.implementation_of("attention"),
        rowwise=config.implementation_of("rowwise"),
    )
