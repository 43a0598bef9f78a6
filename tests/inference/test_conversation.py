"""Conversations whose state is kept between turns, against one long prompt."""

import contextlib

import pytest

from megalodon_jax.data import ByteTokenizer
from megalodon_jax.data.chat_template import ChatTemplate
from megalodon_jax.errors import SessionError
from megalodon_jax.inference.conversation import Conversation, ConversationState
from megalodon_jax.inference.engine import Engine
from megalodon_jax.inference.requests import Request
from megalodon_jax.inference.sampling_params import SamplingParams
from tests.fixtures_runs import TINY_MODEL
from tests.model.conftest import perturbed

# Letters alone: every token has a text of its own.
BIAS = {ord(letter): 90.0 for letter in "abcdef"}
PARAMS = SamplingParams(max_tokens=24, temperature=0.0, logit_bias=BIAS)
pytestmark = pytest.mark.usefixtures("shared_compilation")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(perturbed(TINY_MODEL), slots=2, tokenizer=ByteTokenizer(), short_blocks=True)


def answer(engine: Engine, prompt: list[int]) -> list[int]:
    return engine.submit(Request(prompt=prompt, params=PARAMS)).result()


@pytest.mark.slow
def test_turns_are_one_long_prompt(engine):
    talk = Conversation(engine, PARAMS, None)
    texts = ["".join(talk.say(text)) for text in ("one", " two", " three")]
    prompt = [256]
    for text, found in zip(("one", " two", " three"), texts, strict=True):
        prompt += text.encode()
        tokens = answer(engine, prompt)
        assert found == ByteTokenizer().decode(tokens)
        prompt += tokens
    assert talk.state.num_tokens == len(prompt)
    assert talk.finish_reason == "length"


@pytest.mark.slow
@pytest.mark.parametrize(
    "template",
    [
        pytest.param(None, id="text"),
        pytest.param(ChatTemplate.load("plain"), id="chat"),
    ],
)
def test_a_stopped_answer_stays(engine, template):
    talk = Conversation(engine, PARAMS, template)
    with contextlib.closing(talk.say("one")) as pieces:
        seen = ""
        while not seen:
            seen += next(pieces)
    assert talk.finish_reason == "cancelled"
    begin = b"User: one\nAssistant:" if template else b"one"
    stopped = talk.state.num_tokens
    assert len(begin) + 1 < stopped < len(begin) + 1 + 24
    found = "".join(talk.say(" two"))
    tokens = answer(engine, [256, *begin])[: stopped - len(begin) - 1]
    turn = b"\nUser:  two\nAssistant:".replace(b"  ", b" ") if template else b" two"
    expected = answer(engine, [256, *begin, *tokens, *turn])
    assert found == ByteTokenizer().decode(expected)


@pytest.mark.slow
def test_a_state_is_returned_to(engine):
    talk = Conversation(engine, PARAMS, None)
    "".join(talk.say("one"))
    kept = talk.state
    first = "".join(talk.say(" two"))
    talk.state = kept
    "".join(talk.say(" other"))
    talk.state = kept
    assert "".join(talk.say(" two")) == first


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True])
def test_save_and_load(engine, tmp_path, stopped):
    talk = Conversation(engine, PARAMS, None)
    with pytest.raises(SessionError, match="nothing to save"):
        talk.save(tmp_path / "talk.session")
    with contextlib.closing(talk.say("one")) as pieces:
        for piece in pieces:
            if stopped and piece:
                break
    before = talk.state
    talk.save(tmp_path / "talk.session")
    other = Conversation(engine, PARAMS, None)
    other.load(tmp_path / "talk.session")
    assert other.state.num_tokens == before.num_tokens
    talk.state = before
    assert "".join(other.say(" two")) == "".join(talk.say(" two"))


def test_the_beginning_has_no_tokens():
    assert ConversationState().num_tokens == 0
    assert not ConversationState().ends_with(256)
