"""The model `megalodon` of lm-evaluation-harness (extra `eval`).

`python -m megalodon_jax.interop.lm_eval` is the command `lm_eval` with this model registered.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from tqdm import tqdm

from megalodon_jax.data.chat_template import (
    ChatTemplate,
    Message,
    as_ordinary_text,
    encode_rendered,
    is_rendered,
)
from megalodon_jax.data.tokenizer import Tokenizer
from megalodon_jax.errors import ConfigError, DataError, did_you_mean
from megalodon_jax.evaluation.streaming import score_sequences
from megalodon_jax.generate import max_length as room_for
from megalodon_jax.generate import text_request
from megalodon_jax.inference.engine import Engine
from megalodon_jax.inference.requests import Request
from megalodon_jax.inference.sampling import SamplingParams
from megalodon_jax.language_model import LanguageModel
from megalodon_jax.pretrained import load_with_tokenizer

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import (
        get_rolling_token_windows,
        make_disjoint_window,
        simple_parse_args_string,
    )
except ImportError as error:
    raise ImportError(
        f"lm-evaluation-harness cannot be imported ({error}); pip install 'megalodon-flax[eval]'"
    ) from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_BATCH_SIZE = 8
_PIECE_LENGTHS = (16, 1024)
_MAX_PREFILL_ROWS = 8
_MODEL_ARGS = (
    "path", "tokenizer", "chat_template", "step", "batch_size", "max_length", "seed",
    "allow_unverified",
)  # fmt: skip
# Settings of a request besides `until`, `do_sample`, `temperature` and the number of tokens.
_SAMPLING_ARGS = (
    "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip


class _Scored(NamedTuple):
    """A token sequence of which the last `count` tokens are scored."""

    tokens: Sequence[int]
    count: int


class _Score(NamedTuple):
    logprob: float
    is_greedy: bool


@register_model("megalodon")
class MegalodonLM(TemplateLM):
    """A language model of this package for lm-evaluation-harness.

    `lm_eval.simple_evaluate(model=MegalodonLM(model, tokenizer), tasks=[...])`. A text begins with
    the tokenizer's `bos_id`, as in training. Sequences are streamed through the model's cache, so
    that contexts and documents of any length are scored whole; results do not depend on
    `batch_size`, up to rounding.

    Args:
      model: the model, MEGALODON or the Transformer.
      tokenizer: the tokenizer that the model was trained with.
      batch_size: most sequences or requests that run together, at least 1.
      max_length: most tokens that a prediction sees, for comparisons with models of limited
        context: contexts lose their first tokens, documents are cut into windows as
        lm-evaluation-harness does for such models. None: no limit.
      seed: of the first request that is sampled; request i of a call draws with seed + i.
      template: chat template for `apply_chat_template=True`; None: the tokenizer's own.

    Raises:
      ConfigError: a setting is out of range.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        batch_size: int = _BATCH_SIZE,
        max_length: int | None = None,
        seed: int = 0,
        template: ChatTemplate | None = None,
    ):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = _whole_number("batch_size", batch_size)
        self.max_length = None if max_length is None else _whole_number("max_length", max_length)
        self.seed = _whole_number("seed", seed, low=0)
        self._given_template = template

    # ---- Construction from `--model_args`.

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> Self:
        """The model of `path=RUN,tokenizer=FILE,...`, see `create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> Self:
        """A trained model.

        Args:
          arg_dict: `path`, whatever `megalodon_jax.load` reads; `tokenizer`, a file instead of the
            model's own; `chat_template`, "plain" or a Jinja file instead of the tokenizer's own;
            `step`, of a run's checkpoint; `allow_unverified`; `batch_size`, `max_length` and `seed`
            of the class.
          additional_config: `batch_size` of the command line, which that of `arg_dict` overrides.
            `device` and `max_batch_size` are not used: JAX chooses the device (`JAX_PLATFORMS`).

        Raises:
          ConfigError: an argument is missing, unknown or out of range, or the model has no
            tokenizer.
          ConvertError: there is no model at `path`, or its files are damaged.
          CheckpointError: the run has no readable checkpoint.
          DataError: the tokenizer or the chat template cannot be read.
        """
        for name in arg_dict:
            if name not in _MODEL_ARGS:
                raise ConfigError(
                    f"model_args has {name!r}; use {', '.join(_MODEL_ARGS)}"
                    f"{did_you_mean(name, _MODEL_ARGS)}"
                )
        if "path" not in arg_dict:
            raise ConfigError("model_args has no path; give path=RUN, a run or a saved model")
        # `device` and `max_batch_size` are of PyTorch; the command line always sends a device.
        common = additional_config or {}
        settings = {"batch_size": common.get("batch_size") or _BATCH_SIZE} | arg_dict
        step = settings.pop("step", None)
        named = settings.pop("chat_template", None)
        template = None if named is None else ChatTemplate.load(str(named))
        loaded = load_with_tokenizer(
            str(settings.pop("path")),
            step=None if step is None else _whole_number("step", step, low=0),
            tokenizer=str(settings.pop("tokenizer", "")),
            allow_unverified=bool(settings.pop("allow_unverified", False)),
        )
        return cls(loaded.model, loaded.tokenizer, template=template, **settings)

    # ---- Tokens.

    @property
    def eot_token_id(self) -> int:
        """The boundary token after a document."""
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The boundary token before a document."""
        return self.tokenizer.bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text or of a chat after `bos_id`; without it if `add_special_tokens` is False.

        A chat is a text of `apply_chat_template`: special tokens of its template are single ids.
        """
        if is_rendered(string):
            ids = encode_rendered(self.tokenizer, string).tolist()
        else:
            ids = [self.prefix_token_id, *self.tokenizer.encode(string).tolist()]
        return ids[1:] if add_special_tokens is False else ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if is_rendered(context):
            continuation = as_ordinary_text(self.tokenizer, continuation)
        return super()._encode_pair(context, continuation)

    # ---- Chats.

    @property
    def tokenizer_name(self) -> str:
        """Fingerprint of tokenizer and chat template, for lm-evaluation-harness's request cache."""
        template = hashlib.sha256(self._template.source.encode()).hexdigest()[:16]
        return f"{self.tokenizer.fingerprint()}:{template}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The Jinja text of the chat template, for the log of results; None if it is not used.

        Raises:
          ConfigError: a template is named, or there is none.
        """
        if isinstance(chat_template, str):
            raise ConfigError(
                f"apply_chat_template names {chat_template!r}; leave the name out. Instead of the "
                "tokenizer's own template give chat_template=plain or a Jinja file in model_args"
            )
        return self._template.source if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a conversation, which `tok_encode` turns into the ids of training.

        Args:
          chat_history: messages with `role` and `content`.
          add_generation_prompt: ends with what begins an answer; False: ends inside the last
            message, which is the start of an answer.

        Raises:
          ConfigError: there is no chat template.
          DataError: the template refuses the messages.
        """
        messages = [Message(each["role"], each["content"]) for each in chat_history]
        return self._template.render_for_encoding(
            self.tokenizer, messages, continues_last=not add_generation_prompt
        )

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        template = self._given_template or ChatTemplate.of_tokenizer(self.tokenizer)
        if template is None:
            raise ConfigError(
                "apply_chat_template: the tokenizer has no chat template; name one by "
                "chat_template=plain or a Jinja file in model_args"
            )
        return template

    # ---- Requests.

    def loglikelihood(
        self, requests: "list[Instance]", disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-probability of continuations, and whether greedy decoding gives them.

        Args:
          requests: with `args` (context, continuation). Both are encoded as one text and split
            after the context's own tokens; an empty context is `bos_id`.
          disable_tqdm: no progress bars.

        Returns:
          for every request the natural logarithm of the continuation's probability after its
          context, and whether each of its tokens is the most probable one.

        Raises:
          DataError: a continuation has no token, or more than `max_length`.
          FloatingPointError: the model's scores are NaN.
        """
        for index, request in enumerate(requests):
            if "" in request.args[1:]:
                raise DataError(f"request {index} has an empty continuation; remove it")
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        sequences = []
        for (context, continuation), context_ids, ids in requests:
            if not ids:
                raise DataError(
                    f"continuation {continuation!r:.80} adds no token to its context, which ends "
                    f"in {context[-40:]!r}; divide the text elsewhere"
                )
            if self.max_length is not None and len(ids) > self.max_length:
                raise DataError(
                    f"continuation {continuation!r:.80} has {len(ids)} tokens, max_length is "
                    f"{self.max_length}; raise it, or leave it out"
                )
            sequences.append(_Scored(self._last_tokens(context_ids + ids), len(ids)))
        scores = self._score(sequences, "Scoring continuations", disable_tqdm)
        for (arguments, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", arguments, tuple(score))
        return [(score.logprob, score.is_greedy) for score in scores]

    def loglikelihood_rolling(
        self, requests: "list[Instance]", disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole documents; every token sees all tokens before it.

        Args:
          requests: with `args` (text,), of any length. `bos_id` is the first token's context, and
            the end of the document is not predicted.
          disable_tqdm: no progress bars.

        Returns:
          the natural logarithm of every document's probability; 0 for an empty text.

        Raises:
          FloatingPointError: the model's scores are NaN.
        """
        sequences: list[_Scored] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            windows = self._windows(self.tok_encode(request.args[0], add_special_tokens=False))
            sequences += windows
            owners += [index] * len(windows)
        totals = [0.0] * len(requests)
        scores = self._score(sequences, "Scoring documents", disable_tqdm)
        for owner, score in zip(owners, scores, strict=True):
            totals[owner] += score.logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[str]:
        """Continues texts; a continuation ends at the tokenizer's `eos_id` too.

        Args:
          requests: with `args` (context, settings): `until`, `max_gen_toks` (256), `do_sample`,
            `temperature`, `top_k`, `top_p`, `min_p` and the penalties of `SamplingParams`.
          disable_tqdm: no progress bars.

        Returns:
          the new text of every request, without the stop text.

        Raises:
          ConfigError: a setting is unknown or out of range, or `max_length` leaves no room.
          RequestError: a request cannot be run.
          FloatingPointError: the model's scores are NaN.
        """
        if not requests:
            return []
        prepared = [
            self._request(*request.args, seed=self.seed + index)
            for index, request in enumerate(requests)
        ]
        longest = max(len(each.prompt) + each.params.max_tokens for each in prepared)
        slots = max(2, self.batch_size)
        engine = Engine(
            self.model,
            slots=slots,
            tokenizer=self.tokenizer,
            max_length=room_for(self.model, longest),
            max_waiting=len(prepared),
            prefill_rows=min(slots, _MAX_PREFILL_ROWS),
            fixed_bucket=True,
            fill_slots_first=True,
        )
        # Neighbours of about one length share their prefill.
        order = sorted(range(len(prepared)), key=lambda index: -len(prepared[index].prompt))
        streams = {index: engine.submit(prepared[index]) for index in order}
        texts = [""] * len(requests)
        for index in tqdm(order, desc="Generating", disable=disable_tqdm):
            stream = streams[index]
            stream.result()
            if stream.finish_reason == "invalid":
                raise FloatingPointError(
                    f"the model's scores of request {index} are NaN after {len(stream.tokens)} new "
                    "tokens; check the weights"
                )
            texts[index] = stream.text
            self.cache_hook.add_partial("generate_until", requests[index].args, stream.text)
        return texts

    def _request(self, context: str, settings: Mapping[str, Any], *, seed: int) -> Request:
        given: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings)))
        max_tokens, until = given.pop("max_gen_toks"), given.pop("until")
        temperature = given.pop("temperature", 1.0)
        if not given.pop("do_sample"):
            temperature = 0.0
        if given.get("num_beams") == 1:
            # Tasks name it for other backends: no beam search.
            del given["num_beams"]
        for name in given:
            if name not in _SAMPLING_ARGS:
                raise ConfigError(
                    f"generation_kwargs has {name!r}, which this model does not know; use until, "
                    f"max_gen_toks, do_sample, temperature, {', '.join(_SAMPLING_ARGS)}"
                )
        try:
            params = SamplingParams(
                temperature=temperature,
                max_tokens=max_tokens,
                stop=tuple(until),
                seed=seed,
                **given,
            )
        except ValueError as error:
            raise ConfigError(f"generation_kwargs {dict(settings)}: {error}") from error
        if is_rendered(context):
            params = dataclasses.replace(params, stop=(*params.stop, *self._template.stop))
        # The context's ids: a chat has special tokens.
        request = dataclasses.replace(
            text_request(self.tokenizer, "", params),
            prompt=np.asarray(self.tok_encode(context), np.int32),
        )
        if self.max_length is None:
            return request
        room = self.max_length - max_tokens
        if room < 1:
            raise ConfigError(
                f"max_gen_toks {max_tokens} leaves no room for a context in max_length "
                f"{self.max_length}; raise it, or leave it out"
            )
        return Request(prompt=request.prompt[-room:], params=request.params)

    # ---- Scores.

    def _last_tokens(self, tokens: list[int]) -> list[int]:
        """The tokens that the last prediction may see, and the token that it predicts."""
        return tokens if self.max_length is None else tokens[-(self.max_length + 1) :]

    def _windows(self, ids: list[int]) -> list[_Scored]:
        """Sequences in which every token of a document is scored once."""
        if not ids:
            return []
        if self.max_length is None:
            return [_Scored([self.prefix_token_id, *ids], len(ids))]
        windows = get_rolling_token_windows(
            ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
        )
        pairs = map(make_disjoint_window, windows)
        return [_Scored([*context, *predicted], len(predicted)) for context, predicted in pairs]

    def _score(
        self, sequences: Sequence[_Scored], description: str, disable_tqdm: bool
    ) -> list[_Score]:
        """Scores of sequences, in their order."""
        # The longest first: rows of the batch then end at about the same time.
        order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index].tokens))
        batch_size = max(1, min(self.batch_size, len(sequences)))
        num_tokens = sum(len(each.tokens) for each in sequences)
        results: dict[int, _Score] = {}
        streamed = score_sequences(
            self.model,
            (np.asarray(sequences[index].tokens, np.int32) for index in order),
            batch_size=batch_size,
            piece_length=_piece_length(num_tokens, batch_size),
        )
        for scores in tqdm(streamed, total=len(order), desc=description, disable=disable_tqdm):
            index = order[scores.index]
            count = sequences[index].count
            # In float64: a float32 sum over a million tokens loses the increments.
            logprob = float(np.sum(scores.logprobs[-count:], dtype=np.float64))
            if np.isnan(logprob):
                raise FloatingPointError(
                    f"the model's scores of sequence {index} are NaN; check the weights"
                )
            results[index] = _Score(logprob, bool(scores.is_greedy[-count:].all()))
        return [results[index] for index in range(len(sequences))]


def _piece_length(num_tokens: int, batch_size: int) -> int:
    """A power of two: a few short sequences need no long piece, and each length compiles."""
    shortest, longest = _PIECE_LENGTHS
    rows = -(-num_tokens // batch_size)
    return min(longest, max(shortest, 1 << (rows - 1).bit_length())) if rows else shortest


def _whole_number(name: str, value: object, *, low: int = 1) -> int:
    """The value of a setting, which the command line may give as a text."""
    try:
        number = int(value) if isinstance(value, int | str) else None
    except ValueError:
        number = None
    if number is None or isinstance(value, bool) or number < low:
        raise ConfigError(f"{name} is {value!r}; use a whole number from {low}")
    return number


def main() -> None:
    """The command line of lm-evaluation-harness, which then knows `--model megalodon`."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
