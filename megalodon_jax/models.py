"""Every kind of model, by the name in `model.kind`."""

from typing import Any, overload

from flax import nnx

from megalodon_jax.baselines.transformer import Transformer
from megalodon_jax.baselines.transformer_encoder import TransformerEncoder
from megalodon_jax.config import (
    AnyEncoderConfig,
    AnyModelConfig,
    EncoderConfig,
    LanguageModelConfig,
    ModelConfig,
    TransformerEncoderConfig,
)
from megalodon_jax.encoder import Encoder
from megalodon_jax.encoder_model import EncoderModel
from megalodon_jax.language_model import LanguageModel
from megalodon_jax.model import Megalodon


@overload
def build_model(config: LanguageModelConfig, *, rngs: nnx.Rngs) -> LanguageModel: ...
@overload
def build_model(config: AnyEncoderConfig, *, rngs: nnx.Rngs) -> EncoderModel: ...
@overload
def build_model(config: AnyModelConfig, *, rngs: nnx.Rngs) -> Any: ...
def build_model(config: AnyModelConfig, *, rngs: nnx.Rngs) -> Any:
    """A model of `config.kind` with fresh weights: a `LanguageModel`, or an `EncoderModel`."""
    if isinstance(config, EncoderConfig):
        return Encoder(config, rngs=rngs)
    if isinstance(config, TransformerEncoderConfig):
        return TransformerEncoder(config, rngs=rngs)
    if isinstance(config, ModelConfig):
        return Megalodon(config, rngs=rngs)
    return Transformer(config, rngs=rngs)


def abstract_model(config: AnyModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """A model's static structure and its parameters' shapes and dtypes, without any memory."""
    model = nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model, nnx.Param)
    return graphdef, params
