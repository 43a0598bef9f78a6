"""How a model scores the tokens of long texts: one compiled program, rows of packed documents."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.baselines.transformer import Transformer
from megalodon_jax.cache import MAX_POSITION
from megalodon_jax.evaluation.streaming import streaming_batches
from megalodon_jax.evaluation.variants import with_cache_in_place
from megalodon_jax.generate import max_length
from megalodon_jax.inference.graph import HashedGraphDef
from megalodon_jax.inference.prefill import empty_prefill_state
from megalodon_jax.language_model import LanguageModel, StreamingCache
from megalodon_jax.modules.positions import document_positions
from megalodon_jax.typing import Array, Bool, Float, Float32, Int32

# Tokens of a call of the model, all rows together: enough for a GPU, at 30M parameters as well.
TOKENS_PER_CALL = 16_384
# Tokens whose logits exist at a time.
_SCORED_TOKENS = 2048


class BatchScores(NamedTuple):
    """Scores of the targets of a batch; on the host NumPy arrays.

    Attributes:
      segment_ids: number of each token's document, from 1; 0 is padding, whose scores have no
        meaning.
      position: tokens of the document before the target's input token.
      nats: -log of each target's probability after all tokens before it.
      is_greedy: whether the target is the most probable token; ties prefer lower ids.
    """

    segment_ids: Int32[Array, "B L"]
    position: Int32[Array, "B L"]
    nats: Float32[Array, "B L"]
    is_greedy: Bool[Array, "B L"]


def score_batches(
    model: LanguageModel,
    documents: Sequence[Int32[np.ndarray, " n"]],
    *,
    tokens_per_call: int = TOKENS_PER_CALL,
) -> Iterator[BatchScores]:
    """Scores every token of documents from the second on, in batches, on the host.

    Every document begins with the empty state. Device memory is that of `tokens_per_call` tokens
    and of the cache, whatever the documents' lengths.

    Args:
      model: the model.
      documents: token ids, bos first.
      tokens_per_call: tokens that go through the model at a time.

    Raises:
      OverflowError: a document exceeds the largest 32-bit position.
    """
    lengths = [len(document) - 1 for document in documents]
    longest = max(lengths)
    if longest > MAX_POSITION:
        raise OverflowError(
            f"a document of {longest:,} tokens exceeds the largest 32-bit position {MAX_POSITION:,}"
        )
    tokens = min(tokens_per_call, _power_of_two(sum(lengths)))
    shape = BatchShape.for_model(model, longest, tokens)
    split = nnx.split(with_cache_in_place(model))
    graphdef, params = HashedGraphDef(split[0]), split[1]
    # The last piece of a document may have padding, for which there is room too.
    room = max_length(model, -(-longest // shape.length) * shape.length)
    cache = empty_prefill_state(graphdef, params, shape.rows, room).cache
    waiting: collections.deque[BatchScores] = collections.deque()
    for batch in streaming_batches(
        iter(documents), batch_size=shape.rows, length=shape.length, packed=shape.is_packed
    ):
        arrays = (batch.tokens, batch.targets, batch.segment_ids)
        scores, cache = _score_step(graphdef, params, cache, *arrays, shape.is_packed)
        waiting.append(scores)
        # One batch runs while the host reads the scores of the one before it.
        if len(waiting) > 1:
            yield jax.device_get(waiting.popleft())
    yield from map(jax.device_get, waiting)


class BatchShape(NamedTuple):
    """The batches of `score_batches`.

    Attributes:
      rows: of a batch.
      length: tokens of a row.
      is_packed: whether documents are packed behind each other in a row.
    """

    rows: int
    length: int
    is_packed: bool

    @classmethod
    def for_model(cls, model: LanguageModel, longest: int, tokens: int) -> "BatchShape":
        """The shape for documents of at most `longest` tokens, in calls of `tokens` tokens.

        MEGALODON reads all documents in one row: no row waits for another, and the program does not
        depend on their lengths. The program of a Transformer depends on the room of its cache
        anyway, and its attention to the cache is fast where a row has one document.
        """
        if not isinstance(model, Transformer):
            return cls(1, tokens, is_packed=True)
        if longest < tokens:
            return cls(tokens // longest, longest, is_packed=False)
        return cls(1, tokens, is_packed=False)


@partial(jax.jit, static_argnums=(0, 6), donate_argnums=2)
def _score_step(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    cache: StreamingCache,
    tokens: Int32[Array, "B L"],
    targets: Int32[Array, "B L"],
    segment_ids: Int32[Array, "B L"],
    is_packed: bool,
) -> tuple[BatchScores, StreamingCache]:
    model: LanguageModel = nnx.merge(graphdef, params)
    cache = model.start_new_documents(cache, segment_ids)
    rows, length = tokens.shape
    position = document_positions((rows, length), segment_ids, cache.position)
    assert position is not None
    if is_packed:
        hidden, new_cache = model.hidden(tokens, segment_ids=segment_ids, cache=cache)
    else:
        # Padding comes only behind a document, whose state nothing reads any more.
        hidden, new_cache = model.hidden(tokens, cache=cache)
        segment = jnp.where(segment_ids[:, 0] != 0, segment_ids[:, 0], cache.segment)
        new_cache = dataclasses.replace(new_cache, segment=segment)
    nats, is_greedy = _score_hidden(model, hidden, targets)
    return BatchScores(segment_ids, position, nats, is_greedy), new_cache


def _score_hidden(
    model: LanguageModel, hidden: Float[Array, "B L D"], targets: Int32[Array, "B L"]
) -> tuple[Float32[Array, "B L"], Bool[Array, "B L"]]:
    # The rows are one sequence here: every slice has the same size, whatever B and L are.
    count = targets.size
    size = min(count, _SCORED_TOKENS)
    after = -count % size
    features = jnp.pad(hidden.reshape(count, -1), ((0, after), (0, 0)))
    ids = jnp.pad(targets.reshape(count), (0, after))

    def score(operands: tuple[Array, Array]) -> tuple[Array, Array]:
        features, ids = operands
        logits = model.logits(features)
        target = jnp.take_along_axis(logits, ids[:, None], axis=1)[:, 0]
        return jax.nn.logsumexp(logits, axis=1) - target, jnp.argmax(logits, axis=1) == ids

    slices = (features.reshape(-1, size, features.shape[1]), ids.reshape(-1, size))
    nats, is_greedy = (x.reshape(-1)[:count] for x in jax.lax.map(score, slices))
    return nats.reshape(targets.shape), is_greedy.reshape(targets.shape)


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()
