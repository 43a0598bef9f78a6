"""Models whose predictions are known: a table of the last token, and a copier with a memory."""

import dataclasses
from typing import Any, Self

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.config import KvFormat, ModelConfig
from megalodon_jax.language_model import LanguageModel, ModelInputs

VOCAB_SIZE = 257
CONFIG = ModelConfig(
    num_layers=1, model_dim=8, z_dim=4, value_dim=8, ffn_hidden_dim=8, cema_ndim=2, chunk_size=16,
    vocab_size=VOCAB_SIZE, norm_num_groups=2,
)  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenCache:
    """The tokens of each row's document so far; -1 where there is none yet."""

    position: Any
    segment: Any
    tokens: Any

    def check_room(self, length: int) -> None:
        """A test's documents fit."""

    def replace_rows(self, rows: Any, initial: Self) -> Self:
        return jax.tree.map(
            lambda old, new: jnp.where(rows.reshape(-1, *[1] * (old.ndim - 1)), new, old),
            self,
            initial,
        )


class _KnownModel(LanguageModel):
    """A model whose features are its scores. `memory` is the number of tokens that it keeps."""

    config: ModelConfig = CONFIG

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.embed = None  # type: ignore[assignment]
        self.output = None

    def init_cache(
        self, batch_size: int, *, max_length: int | None = None, kv: KvFormat = "model"
    ) -> TokenCache:
        # Two arrays: donated buffers are not shared.
        position, segment = (jnp.zeros(batch_size, jnp.int32) for _ in range(2))
        return TokenCache(position, segment, jnp.full((batch_size, self.memory), -1, jnp.int32))

    def _initial_rows(self, cache: TokenCache) -> TokenCache:
        return self.init_cache(cache.position.shape[0])

    def logits(self, hidden: Any) -> Any:
        return hidden

    def scores(self, cache: TokenCache, token: Any) -> Any:
        """Scores after a token, which is already in the cache."""
        raise NotImplementedError

    def _run(self, inputs: ModelInputs, *, hidden_states: bool) -> Any:
        tokens, ids = inputs.tokens, inputs.segment_ids
        assert tokens is not None
        assert not hidden_states
        ids = jnp.ones(tokens.shape, jnp.int32) if ids is None else ids

        def step(cache: TokenCache, column: Any) -> Any:
            token, segment = column
            fresh = self.init_cache(token.shape[0])
            is_new = (segment != cache.segment) & (segment != 0)
            cache = cache.replace_rows(is_new, fresh)
            is_token = segment != 0
            index = jnp.where(is_token, cache.position, self.memory)
            written = jax.vmap(lambda row, i, t: row.at[i].set(t, mode="drop"))
            cache = TokenCache(
                cache.position + is_token,
                jnp.where(is_token, segment, cache.segment),
                written(cache.tokens, index, token),
            )
            return cache, self.scores(cache, token)

        start = inputs.cache or self.init_cache(tokens.shape[0])
        cache, scores = jax.lax.scan(step, start, (tokens.T, ids.T))
        return jnp.moveaxis(scores, 0, 1), None, cache


class TokenTable(_KnownModel):
    """A recurrence without memory: the scores are a table's row of the last token."""

    def __init__(self, table: np.ndarray) -> None:
        super().__init__(memory=1)
        self.table = nnx.Param(jnp.asarray(table, jnp.float32))

    def scores(self, cache: TokenCache, token: Any) -> Any:
        return self.table[...][token]


class Copier(_KnownModel):
    """Predicts what followed the last six tokens when they last came before."""

    def __init__(self, memory: int) -> None:
        super().__init__(memory)
        self.sharpness = nnx.Param(jnp.float32(20.0))

    def scores(self, cache: TokenCache, token: Any) -> Any:
        def predict(row: Any, position: Any) -> Any:
            ends = jnp.arange(self.memory)
            # Entry i: tokens i-5 .. i are the last six, and there is a token after them.
            matches = (ends >= 5) & (ends < position - 1)
            for back in range(6):
                matches &= jnp.roll(row, back) == row[position - 1 - back]
            found = jnp.max(jnp.where(matches, ends, -1))
            return jnp.where(found < 0, VOCAB_SIZE - 1, row[found + 1])

        predicted = jax.vmap(predict)(cache.tokens, cache.position)
        return jax.nn.one_hot(predicted, VOCAB_SIZE) * self.sharpness[...]


def uniform() -> TokenTable:
    """A model that gives every token the same probability."""
    return TokenTable(np.zeros((VOCAB_SIZE, VOCAB_SIZE)))


def bigram(seed: int = 0) -> TokenTable:
    """A model that knows the last token alone."""
    return TokenTable(np.random.default_rng(seed).normal(size=(VOCAB_SIZE, VOCAB_SIZE)))


def digits_by_chance() -> TokenTable:
    """A model without memory whose most probable token is always a digit."""
    table = np.random.default_rng(0).normal(size=(VOCAB_SIZE, VOCAB_SIZE))
    table[:, ord("0") : ord("9") + 1] += 50
    return TokenTable(table)
