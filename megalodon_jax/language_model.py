"""The interface of all language models: embedding, hidden features, logits, a streaming cache."""

import abc
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.export
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.config import KvFormat, LanguageModelConfig
from megalodon_jax.modules.embedding import Embedding, check_embeddings, check_tokens
from megalodon_jax.modules.matmul import interceptable_matmul, is_quantized, is_wrapped_by_qwix
from megalodon_jax.modules.parameters import axis_names, embedding_initializer
from megalodon_jax.typing import Array, Bool, Float, Float32, Int32, PRNGKey


class StreamingCache(Protocol):
    """The state of a model between two calls: a pytree, rows may be at different positions.

    Attributes:
      position: tokens seen of each row's current document.
      segment: segment id of each row's current document, 0 before the first token.
    """

    @property
    def position(self) -> Int32[Array, " B"]: ...

    @property
    def segment(self) -> Int32[Array, " B"]: ...

    def check_room(self, length: int) -> None:
        """Raises OverflowError if `length` more tokens do not fit; call it outside `jit`."""
        ...

    def replace_rows(self, rows: Bool[Array, " B"], initial: Self) -> Self:
        """A copy in which the rows where `rows` is true come from `initial`."""
        ...


class HiddenOutput(NamedTuple):
    """Features after the final norm, and the new cache if one came in."""

    hidden: Float[Array, "B L D"]
    cache: Any


class HiddenStatesOutput(NamedTuple):
    """Features of every layer, and those after the final norm.

    Attributes:
      hidden: after the final norm, the argument of `LanguageModel.logits`.
      hidden_states: the embeddings, then the output of every block, in `config.dtype`: S is the
        number of layers + 1. The last one is before the final norm.
      cache: the new cache if one came in.
    """

    hidden: Float[Array, "B L D"]
    hidden_states: Float[Array, "S B L D"]
    cache: Any


class ModelOutput(NamedTuple):
    """Scores of the next token, and the new cache if one came in."""

    logits: Float32[Array, "B L V"]
    cache: Any


class ModelInputs(NamedTuple):
    """The arguments of a call of a model, see `LanguageModel.__call__`."""

    tokens: Int32[Array, "B L"] | None
    inputs_embeds: Float[Array, "B L D"] | None
    segment_ids: Int32[Array, "B L"] | None
    cache: Any
    dropout_key: PRNGKey | None

    def check(self, config: LanguageModelConfig) -> tuple[int, int]:
        """Rows B and tokens L; raises ValueError as `LanguageModel.__call__` does."""
        tokens, embeddings = self.tokens, self.inputs_embeds
        if (tokens is None) == (embeddings is None):
            given = "neither" if tokens is None else "both"
            raise ValueError(f"pass tokens or inputs_embeds, one of the two; {given} came in")
        if embeddings is not None:
            check_embeddings(embeddings, config.model_dim)
            shape = embeddings.shape
        else:
            assert tokens is not None
            check_tokens(tokens, config.vocab_size)
            shape = tokens.shape
        if jax.export.is_symbolic_dim(shape[1]):
            raise ValueError(
                f"the length {shape[1]} is symbolic; chunks and scans are laid out for a length "
                "that is a number: export one (rows may be symbolic), and pad shorter rows or "
                "stream longer ones through a cache"
            )
        return shape[0], shape[1]


class OutputLayer(nnx.Linear):
    """The output matrix of a model, not tied to the embedding."""

    def interceptable_scores(self, hidden: Float[Array, "... D"]) -> Float32[Array, "... V"]:
        """Scores by a product that Qwix intercepts."""
        dtype = self.dtype or jnp.float32
        return interceptable_matmul(hidden, self.kernel[...], dtype).astype(jnp.float32)


class LanguageModel(nnx.Module):
    """A model of the next token: an embedding, a stack of blocks, a final norm, an output matrix.

    Trainer, evaluation, generation and checkpoints need no more than this interface.

    Attributes:
      config: sizes and numerics.
      embed: the token embedding.
      output: the output matrix; None if it is tied to the embedding.
    """

    config: LanguageModelConfig
    embed: Embedding
    output: OutputLayer | None

    @property
    def piece_length(self) -> int:
        """Most tokens of a long text that go through the model at a time when streaming."""
        return 2048

    def __call__(
        self,
        tokens: Int32[Array, "B L"] | None = None,
        *,
        inputs_embeds: Float[Array, "B L D"] | None = None,
        segment_ids: Int32[Array, "B L"] | None = None,
        cache: Any = None,
        dropout_key: PRNGKey | None = None,
    ) -> ModelOutput:
        """Scores of the token that follows each token.

        Args:
          tokens: token ids in [0, vocab_size), any length L >= 1. An id out of range raises where
            ids are known on the host (numpy); inside `jit` it gives NaN.
          inputs_embeds: embeddings in place of tokens, such as `model.embed(tokens)` with some
            vectors replaced; `config.dtype`, and `scale_emb` applies to them.
          segment_ids: documents of each row, numbered from 1; 0 is padding. Every document is
            computed as if it were alone. None: a row is one document.
          cache: state of the tokens before these; the first document of a row continues it if its
            segment id is the cache's (or segment_ids is None), else starts anew.
          dropout_key: turns dropout on.

        Returns:
          float32 logits (B, L, V) and, if a cache came in, the cache after the last token.

        Raises:
          ValueError: tokens and inputs_embeds are both given or both missing, or have wrong shapes.
        """
        hidden, cache = self.hidden(
            tokens,
            inputs_embeds=inputs_embeds,
            segment_ids=segment_ids,
            cache=cache,
            dropout_key=dropout_key,
        )
        return ModelOutput(self.logits(hidden), cache)

    def hidden(
        self,
        tokens: Int32[Array, "B L"] | None = None,
        *,
        inputs_embeds: Float[Array, "B L D"] | None = None,
        segment_ids: Int32[Array, "B L"] | None = None,
        cache: Any = None,
        dropout_key: PRNGKey | None = None,
    ) -> HiddenOutput:
        """Like calling the model, but stops before the output matrix: (B, L, D)."""
        inputs = ModelInputs(tokens, inputs_embeds, segment_ids, cache, dropout_key)
        hidden, _, cache = self._run(inputs, hidden_states=False)
        return HiddenOutput(hidden, cache)

    def hidden_states(
        self,
        tokens: Int32[Array, "B L"] | None = None,
        *,
        inputs_embeds: Float[Array, "B L D"] | None = None,
        segment_ids: Int32[Array, "B L"] | None = None,
        cache: Any = None,
        dropout_key: PRNGKey | None = None,
    ) -> HiddenStatesOutput:
        """Like `hidden`, with the features of every layer, which are differentiable."""
        inputs = ModelInputs(tokens, inputs_embeds, segment_ids, cache, dropout_key)
        hidden, states, cache = self._run(inputs, hidden_states=True)
        assert states is not None
        return HiddenStatesOutput(hidden, states, cache)

    @abc.abstractmethod
    def _run(
        self, inputs: ModelInputs, *, hidden_states: bool
    ) -> tuple[Float[Array, "B L D"], Float[Array, "S B L D"] | None, Any]:
        """Features after the final norm, those of every layer if asked for, the new cache."""

    def _embed_inputs(self, inputs: ModelInputs) -> Float[Array, "B L D"]:
        if inputs.tokens is not None:
            return self.embed(inputs.tokens)
        assert inputs.inputs_embeds is not None
        return inputs.inputs_embeds.astype(self.config.dtype)

    def logits(self, hidden: Float[Array, "... D"]) -> Float32[Array, "... V"]:
        """Scores from features after the final norm: `config.dtype` products, float32 sums."""
        if self.output is not None and is_wrapped_by_qwix(self.output):
            return self.output.interceptable_scores(hidden)
        return jnp.matmul(hidden, self.output_matrix(), preferred_element_type=jnp.float32)

    def output_matrix(self) -> Float[Array, "D V"]:
        """The matrix from features to scores, in `config.dtype`.

        Raises:
          TypeError: Qwix has changed the output layer: call `logits`.
        """
        if self.output is None:
            return self.embed.embedding[...].T.astype(self.config.dtype)
        if is_wrapped_by_qwix(self.output):
            raise TypeError(
                "Qwix wraps this model, whose output layer may have LoRA factors or quantized "
                "weights; call the model, which gives logits, in place of output_matrix()"
            )
        kernel: Any = self.output.kernel[...]
        if is_quantized(kernel):
            import qwix

            kernel = qwix.dequantize(kernel)
        return kernel.astype(self.config.dtype)

    @abc.abstractmethod
    def init_cache(
        self, batch_size: int, *, max_length: int | None = None, kv: KvFormat = "model"
    ) -> Any:
        """The cache of `batch_size` rows before their first token.

        Args:
          batch_size: number of rows.
          max_length: most tokens of a document, for caches that grow with the context.
          kv: format of keys and values; "int8" only for MEGALODON.

        Raises:
          ValueError: the model does not have this format.
        """

    def reset_rows[C: StreamingCache](self, cache: C, rows: Bool[Array, " B"]) -> C:
        """The cache with some rows back at the state before their first token."""
        return cache.replace_rows(rows, self._initial_rows(cache))

    @abc.abstractmethod
    def _initial_rows(self, cache: Any) -> Any:
        """A cache of the same shapes before the first token."""

    def with_room[C: StreamingCache](self, cache: C, length: int) -> C:
        """A cache that has room for `length` more tokens; call it outside `jit`.

        Raises:
          OverflowError: there is no room, and this kind of cache does not grow.
        """
        cache.check_room(length)
        return cache

    def start_new_documents[C: StreamingCache](
        self, cache: C, segment_ids: Int32[Array, "B L"]
    ) -> C:
        """Resets the rows whose first document is not the cache's."""
        first = jnp.take_along_axis(segment_ids, jnp.argmax(segment_ids != 0, axis=1)[:, None], 1)
        first = first[:, 0]
        return self.reset_rows(cache, (first != 0) & (first != cache.segment))


def make_output_layer(config: LanguageModelConfig, *, rngs: nnx.Rngs) -> OutputLayer | None:
    """The output matrix of a model; None if `share_emb` ties it to the embedding."""
    if config.share_emb:
        return None
    return OutputLayer(
        config.model_dim,
        config.num_outputs,
        use_bias=False,
        kernel_init=embedding_initializer(config.model_dim),
        rngs=rngs,
        kernel_metadata=axis_names("embed", "vocab"),
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
    )
