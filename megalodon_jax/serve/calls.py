"""Calls of the API as requests of the engine."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megalodon_jax.data.chat_template import ChatTemplate
from megalodon_jax.errors import DataError
from megalodon_jax.inference.requests import Request
from megalodon_jax.inference.sampling_params import SamplingParams
from megalodon_jax.inference.sessions import Session
from megalodon_jax.serve.errors import ApiError
from megalodon_jax.serve.fields import Call, ChatCall, CompletionCall
from megalodon_jax.serve.responses import ChatForm, CompletionForm, Form, TokenTexts
from megalodon_jax.serve.settings import ServerSettings


class Plan(NamedTuple):
    """The requests of a call, and how its answer is written.

    Attributes:
      requests: one for every prompt.
      form: of the answer.
    """

    requests: list[Request]
    form: Form


class Planner:
    """Turns calls into requests.

    Args:
      texts: the tokenizer and its tokens' texts.
      template: of chats; None: the model has none.
      settings: limits.
    """

    def __init__(self, texts: TokenTexts, template: ChatTemplate | None, settings: ServerSettings):
        self._texts, self._tokenizer = texts, texts.tokenizer
        self._template, self._settings = template, settings

    @property
    def has_chat_template(self) -> bool:
        """Whether chats can be answered."""
        return self._template is not None

    def plan(self, call: Call, session: Session | None, client: str) -> Plan:
        """The requests of a call.

        Args:
          call: of either endpoint.
          session: the state that it continues, or None.
          client: whose call it is.

        Raises:
          ApiError: 400: a prompt is too long, or the model has no chat template.
        """
        if isinstance(call, ChatCall):
            return self._plan_chat(call, session, client)
        assert isinstance(call, CompletionCall)
        return self._plan_completion(call, session, client)

    def _plan_completion(self, call: CompletionCall, session: Session | None, client: str) -> Plan:
        # Tokens of a prompt are taken as they are.
        tokens = [
            self._tokenizer.encode(prompt).tolist() if isinstance(prompt, str) else prompt
            for prompt in call.prompts
        ]
        requests = [
            self._request(
                call,
                # A text begins a document; a session goes on with one.
                [self._tokenizer.bos_id, *ids]
                if isinstance(prompt, str) and session is None
                else ids,
                session,
                client,
                param="prompt",
                prompt_logprobs=call.params.logprobs if call.echo else None,
            )
            for prompt, ids in zip(call.prompts, tokens, strict=True)
        ]
        return Plan(requests, CompletionForm(call, self._texts, tokens))

    def _plan_chat(self, call: ChatCall, session: Session | None, client: str) -> Plan:
        template = self._template
        if template is None:
            raise ApiError(
                400,
                "the model's tokenizer has no chat template; start the server with "
                "--chat_template plain or a file, or call /v1/completions",
                code="no_chat_template",
            )
        try:
            if session is None:
                ids = template.encode(self._tokenizer, call.messages)
            else:
                ends = session.pending[-1:] == (self._tokenizer.eos_id,)
                ids = template.encode_turn(self._tokenizer, call.messages, answer_has_eos=ends)
        except DataError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_value") from error
        params = dataclasses.replace(call.params, stop=(*call.params.stop, *template.stop))
        call = dataclasses.replace(call, params=params)
        request = self._request(call, ids, session, client, param="messages")
        return Plan([request], ChatForm(self._texts, has_logprobs=params.logprobs is not None))

    def _request(
        self,
        call: Call,
        prompt: Sequence[int] | np.ndarray,
        session: Session | None,
        client: str,
        *,
        param: str,
        prompt_logprobs: int | None = None,
    ) -> Request:
        most = self._settings.max_prompt_tokens
        if len(prompt) > most:
            raise ApiError(
                400, f"the prompt has {len(prompt):,} tokens; at most {most:,} are allowed",
                param=param, code="context_length_exceeded",
            )  # fmt: skip
        return Request(
            prompt=np.asarray(prompt, np.int32),
            params=_with_stop_id(call.params, self._tokenizer.eos_id),
            session=session,
            keep_session=call.session is not None,
            client=client,
            prompt_logprobs=prompt_logprobs,
        )


def _with_stop_id(params: SamplingParams, token: int) -> SamplingParams:
    return dataclasses.replace(params, stop_ids=(*params.stop_ids, token))
