"""`megalodon chat`: turns, commands, Ctrl-C, in the process and in a terminal."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from megalodon_jax.checkpoints import load_trained
from megalodon_jax.cli.main import main
from megalodon_jax.data.chat_template import ChatTemplate
from megalodon_jax.inference.conversation import Conversation
from megalodon_jax.inference.engine import Engine
from megalodon_jax.inference.sampling_params import SamplingParams

TOKENS = 24


@pytest.fixture
def chat(trained_run, capsys, monkeypatch):
    """Runs the command with these lines as its input; returns what it printed."""

    def run(*lines: str, options: tuple[str, ...] = ()) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        fixed = ("--max_tokens", str(TOKENS), "--temperature", "0")
        assert main(["chat", trained_run.run_dir, *fixed, *options]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def answers(trained_run):
    """The answers of a conversation in the library."""

    def run(*texts: str, template: str = "") -> list[str]:
        model, tokenizer = load_trained(trained_run.run_dir)
        engine = Engine(model, slots=2, tokenizer=tokenizer, short_blocks=True)
        params = SamplingParams(temperature=0.0, max_tokens=TOKENS)
        found = ChatTemplate.load(template) if template else None
        talk = Conversation(engine, params, found)
        return ["".join(talk.say(text)) for text in texts]

    return run


def lines(*texts: str) -> str:
    return "".join(f"{text}\n" for text in texts)


def test_turns_continue_one_conversation(chat, answers):
    first, second = answers("doc", "ument 3")
    assert first != second
    assert chat("doc", "ument 3", "/exit", "never read") == lines(first, second)


@pytest.mark.slow
def test_a_chat_template(chat, answers):
    found = answers("one", "two", template="plain")
    # The end of the input ends the line of the prompt.
    assert chat("one", "two", options=("--chat_template", "plain")) == lines(*found, "")


def test_commands(chat, answers, tmp_path):
    path = tmp_path / "talk.session"
    first, second = answers("doc", "ument")
    (other,) = answers("doc", "other")[1:]
    printed = chat(
        "doc", f"/save {path}", "/fork", "other", "/fork 1", "ument", "/reset", "doc",
        f"/load {path}", "ument", "/fork 7", "/sav", "/save", "/exit",
    )  # fmt: skip
    tokens = printed.partition("saved ")[2].partition(" ")[0]
    assert printed == lines(
        first,
        f"saved {tokens} tokens to {path}",
        "branch 2; /fork 1 goes back to branch 1",
        other,
        f"branch 1, {tokens} tokens",
        second,
        "a new conversation",
        first,
        f"loaded {tokens} tokens from {path}",
        second,
        "error: there are branches 1 to 2, not 7",
        "unknown command /sav; did you mean '/save'?",
        "error: give a file: /save talk.session",
    )
    # bos, the text, the answer.
    assert int(tokens) == 1 + 3 + TOKENS


def test_help_and_a_missing_file(chat, tmp_path):
    printed = chat("/help", f"/load {tmp_path / 'none'}", "/exit")
    assert printed.startswith("/save FILE")
    assert "none cannot be read as a session" in printed


def test_ctrl_c_stops_the_answer_only(chat, monkeypatch):
    whole = chat("doc", "/exit").removesuffix("\n")

    class Output(io.StringIO):
        def write(self, text: str) -> int:
            if text and not self.getvalue():
                os.kill(os.getpid(), signal.SIGINT)
            return super().write(text)

    output = Output()
    monkeypatch.setattr(sys, "stdout", output)
    chat("doc", "/fork", "/exit")
    stopped, found, rest = output.getvalue().partition(" [stopped]\n")
    assert found
    assert rest.startswith("branch 2")
    assert len(stopped) < len(whole)
    assert whole.startswith(stopped)


@pytest.mark.slow
def test_in_a_terminal(trained_run):
    leader, follower = pty.openpty()
    # Ctrl-C goes to the processes of a controlling terminal.
    program = (
        "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        "from megalodon_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "chat", trained_run.run_dir, "--max_tokens", "5"],
        stdin=follower, stdout=follower, stderr=subprocess.DEVNULL, start_new_session=True,
        env=os.environ | {"TERM": "dumb"},
    )  # fmt: skip
    os.close(follower)
    seen = b""

    def read_until(text: bytes) -> None:
        nonlocal seen
        end = time.monotonic() + 120
        while text not in seen:
            ready, _, _ = select.select([leader], [], [], max(0.0, end - time.monotonic()))
            assert ready, seen
            seen += os.read(leader, 4096)
        seen = seen.partition(text)[2]

    try:
        read_until(b"/help lists the commands.")
        read_until(b"> ")
        os.write(leader, b"doc\n/fork\n")
        read_until(b"branch 2; /fork 1 goes back")
        read_until(b"> ")
        # Python sees a signal that comes between the prompt and its wait for a key at the next one.
        end = time.monotonic() + 120
        while b"/exit ends." not in seen:
            os.write(leader, b"\x03")
            while select.select([leader], [], [], 1.0)[0]:
                seen += os.read(leader, 4096)
            assert time.monotonic() < end
        os.write(leader, b"/exit\n")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(leader)
