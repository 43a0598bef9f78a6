"""The loss of a text in decoding steps, with rounded weights or rounded keys and values."""

import dataclasses
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.inference.decoders import AnyDecodeWeights, decode
from megalodon_jax.language_model import LanguageModel
from megalodon_jax.loss import LossOutput
from megalodon_jax.typing import Array, Batch


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def decode_batch(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    weights: AnyDecodeWeights,
    cache: Any,
    batch: Batch,
) -> tuple[LossOutput, Any]:
    """Sums of the loss of a batch of `streaming_batches`, one token of every row at a time.

    Args:
      graphdef: of the model.
      params: of the model; read for the state before a document's first token alone.
      weights: from `prepare_decoding`.
      cache: state of the tokens before these; donated.
      batch: tokens, with documents numbered as in all batches.
    """
    model: LanguageModel = nnx.merge(graphdef, params)

    def step(carry: tuple[Any, LossOutput], token: Batch) -> tuple[tuple[Any, LossOutput], None]:
        cache, sums = carry
        segment, active = token.segment_ids, token.segment_ids != 0
        cache = model.start_new_documents(cache, segment[:, None])
        logits, cache = decode(weights, cache, token.tokens, active)
        cache = dataclasses.replace(cache, segment=jnp.where(active, segment, cache.segment))
        return (cache, jax.tree.map(jnp.add, sums, _sums(logits, token))), None

    zero = jnp.zeros((), jnp.float32)
    by_token = jax.tree.map(lambda leaf: leaf.T, batch)
    (cache, sums), _ = jax.lax.scan(step, (cache, LossOutput(zero, zero, zero, zero)), by_token)
    return sums, cache


def _sums(logits: Array, token: Batch) -> LossOutput:
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    target = jnp.take_along_axis(logprobs, token.targets[:, None], axis=-1)[:, 0]
    is_correct = jnp.argmax(logits, axis=-1) == token.targets
    # A row of padding has scores without meaning.
    losses = jnp.where(token.weights > 0, -target * token.weights, 0.0)
    return LossOutput(
        losses.sum(),
        token.weights.sum(),
        jnp.zeros((), jnp.float32),
        jnp.sum(is_correct * token.weights),
    )
