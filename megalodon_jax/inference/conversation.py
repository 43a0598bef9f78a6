"""A conversation whose state is kept between turns."""

import dataclasses
import os
from collections.abc import Generator, Sequence

from megalodon_jax.data.chat_template import ChatTemplate, Message
from megalodon_jax.data.tokenizer import Tokenizer
from megalodon_jax.errors import SessionError
from megalodon_jax.inference.engine import Engine
from megalodon_jax.inference.requests import FinishReason, Request
from megalodon_jax.inference.sampling_params import SamplingParams
from megalodon_jax.inference.sessions import Session


@dataclasses.dataclass(frozen=True)
class ConversationState:
    """Where a conversation is; immutable, so that it can be kept and returned to.

    Attributes:
      session: state of the tokens that have been through the model, or None.
      unseen: tokens after them, which the next turn feeds first.
    """

    session: Session | None = None
    unseen: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of the conversation."""
        return (0 if self.session is None else self.session.num_tokens) + len(self.unseen)

    def ends_with(self, token: int) -> bool:
        """Whether this is the newest token, as far as that is known."""
        pending = () if self.session is None else self.session.pending
        return (*pending, *self.unseen)[-1:] == (token,)


class Conversation:
    """Turns of one conversation; each feeds only its new text.

    Attributes:
      state: where the conversation is; may be set to an earlier one.
      finish_reason: of the last answer; "cancelled" if it was stopped.

    Args:
      engine: with a tokenizer, and without a limit of length for a conversation of any length.
      params: of all answers.
      template: of chats; None: texts are continued as they are.
    """

    def __init__(self, engine: Engine, params: SamplingParams, template: ChatTemplate | None):
        assert engine.tokenizer is not None
        self.state = ConversationState()
        self.finish_reason: FinishReason | None = None
        self._engine, self._template = engine, template
        self._tokenizer: Tokenizer = engine.tokenizer
        stop = () if template is None else template.stop
        self._params = dataclasses.replace(
            params,
            stop=(*params.stop, *stop),
            stop_ids=(*params.stop_ids, self._tokenizer.eos_id),
        )

    def say(self, text: str) -> Generator[str]:
        """The answer to a text, as it comes.

        There is a piece after every step of the engine, empty without new text. Closing the
        generator between two pieces ends the answer; what there is of it stays part of the
        conversation.

        Raises:
          RequestError: the engine cannot run the turn.
          DataError: the chat template refuses it.
        """
        before = self.state
        new = self._encode(text)
        prompt = [*before.unseen, *new]
        stream = self._engine.submit(
            Request(prompt=prompt, params=self._params, session=before.session, keep_session=True)
        )
        try:
            num_read = 0
            while True:
                pieces = stream.text_pieces()
                yield "".join(pieces[num_read:])
                num_read = len(pieces)
                if stream.is_finished:
                    return
                self._engine.step()
        finally:
            self._engine.cancel(stream)
            self.finish_reason = stream.finish_reason
            if stream.session is not None:
                self.state = ConversationState(stream.session)
            elif stream.finish_reason != "invalid":
                self.state = ConversationState(before.session, (*prompt, *stream.tokens))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the conversation's state to a file that `Engine.load_session` reads.

        Raises:
          SessionError: nothing has been said.
        """
        session, unseen = self.state.session, self.state.unseen
        if session is None and not unseen:
            raise SessionError("there is nothing to save yet; say something first")
        if session is None:
            session = self._prefilled(unseen)
        elif unseen:
            session = session.with_pending(unseen)
        self.state = ConversationState(session)
        session.save(path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Continues a saved conversation.

        Raises:
          SessionError: the file is damaged, or the session belongs to another model.
        """
        self.state = ConversationState(self._engine.load_session(path))

    def _prefilled(self, tokens: Sequence[int]) -> Session:
        """The state before the last of some tokens, which waits."""
        prompt = tokens[:-1]
        params = SamplingParams(temperature=0.0, max_tokens=1)
        stream = self._engine.submit(Request(prompt=prompt, params=params, keep_session=True))
        stream.result()
        assert stream.session is not None
        # The drawn token is no part of the conversation.
        return dataclasses.replace(stream.session, pending=tuple(tokens[len(prompt) :]))

    def _encode(self, text: str) -> list[int]:
        tokenizer, template = self._tokenizer, self._template
        is_start = self.state.num_tokens == 0
        if template is None:
            ids = tokenizer.encode(text).tolist()
            return [tokenizer.bos_id, *ids] if is_start else ids
        messages = [Message("user", text)]
        if is_start:
            return template.encode(tokenizer, messages).tolist()
        ends = self.state.ends_with(tokenizer.eos_id)
        return template.encode_turn(tokenizer, messages, answer_has_eos=ends).tolist()
