"""The requests that an engine can run."""

from typing import NamedTuple

import numpy as np

from megalodon_jax.cache import MAX_POSITION
from megalodon_jax.errors import RequestError
from megalodon_jax.inference.blocks import padded_stop_ids
from megalodon_jax.inference.requests import Request, check_prompt
from megalodon_jax.inference.sampling import MAX_LOGPROBS, check_sampling


class RequestLimits(NamedTuple):
    """Limits of an engine's requests.

    Attributes:
      vocab_size: token ids of a prompt are below it.
      num_outputs: of the model.
      num_tokens: ids that may be drawn are below it; None: all outputs.
      max_length: most tokens of prompt, session and answer together; None: no limit.
      has_tokenizer: whether stop strings can be searched for.
    """

    vocab_size: int
    num_outputs: int
    num_tokens: int | None
    max_length: int | None
    has_tokenizer: bool

    def check(self, request: Request) -> None:
        """Raises RequestError, which says why, if the request cannot be run."""
        prompt, params = np.asarray(request.prompt), request.params
        pending = () if request.session is None else request.session.pending
        check_prompt(prompt, self.vocab_size, may_be_empty=bool(pending))
        if params.stop and not self.has_tokenizer:
            raise RequestError("stop strings need a tokenizer: pass Engine(..., tokenizer=)")
        seen = 0 if request.session is None else request.session.num_tokens
        total = seen + len(prompt) + params.max_tokens
        if self.max_length is not None and total > self.max_length:
            raise RequestError(
                f"{seen + len(prompt)} tokens and max_tokens {params.max_tokens} exceed the "
                f"engine's max_length {self.max_length}"
            )
        if total > MAX_POSITION:
            raise RequestError(f"{total} tokens exceed the largest position, {MAX_POSITION}")
        wanted = request.prompt_logprobs
        if wanted is not None and not 0 <= wanted <= MAX_LOGPROBS:
            raise RequestError(f"prompt_logprobs is {wanted}; use 0 to {MAX_LOGPROBS}, or None")
        try:
            padded_stop_ids(params.stop_ids)
            num_tokens = self.num_outputs if self.num_tokens is None else self.num_tokens
            check_sampling(params, self.num_outputs, num_tokens, seed=0)
        except ValueError as error:
            raise RequestError(str(error)) from error
