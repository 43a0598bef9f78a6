"""`megalodon generate`: prompts in, text or lines of JSON out, interruptions, sessions."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megalodon_jax.checkpoints import load_trained
from megalodon_jax.cli.interrupt import Interrupt
from megalodon_jax.cli.main import main
from megalodon_jax.cli.progress import Progress
from megalodon_jax.cli.prompts import read_prompts
from megalodon_jax.errors import ConfigError
from megalodon_jax.generate import generate, generate_text
from megalodon_jax.inference.engine import Engine
from megalodon_jax.inference.sampling_params import SamplingParams

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS = SamplingParams(temperature=0.8, max_tokens=9, seed=0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def complete(trained_run, capsys):
    """Runs the command on the tiny run; returns the exit code and what it printed."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["generate", trained_run.run_dir, "--max_tokens", "9", *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def expected(trained_run):
    """The texts that the library gives."""

    def run(prompt: str, *, n: int = 1, **params) -> list[str]:
        model, tokenizer = load_trained(trained_run.run_dir)
        params = SamplingParams(**{"temperature": 0.8, "max_tokens": 9, **params})
        return [each.text for each in generate_text(model, tokenizer, [prompt], params, n=n)]

    return run


def records(text: str) -> dict:
    return {record["id"]: record for record in map(json.loads, text.splitlines())}


def texts(record: dict) -> list[str]:
    return [sample["text"] for sample in record["samples"]]


def test_one_prompt_prints_its_text(complete, expected):
    (text,) = expected("doc", seed=3)
    assert complete("doc", "--seed", "3") == (0, f"doc{text}\n", "")
    (text,) = expected("doc", temperature=0.0, stop=text[4:6])
    code, out, _ = complete("doc", "--temperature", "0", "--stop", "never", "--stop", text[4:6])
    assert (code, out) == (0, f"doc{text.partition(text[4:6])[0]}\n")


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_standard_input_is_a_prompt_and_not_repeated(arguments, complete, expected, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("document 7\n"))
    assert complete(*arguments) == (0, "".join(expected("document 7", seed=0)) + "\n", "")


@pytest.mark.slow
def test_several_prompts_and_samples_are_lines_of_json(complete, expected):
    code, out, _ = complete("a", "doc", "--n", "2", "--logprobs", "3")
    assert code == 0
    found = records(out)
    assert {number: record["prompt"] for number, record in found.items()} == {1: "a", 2: "doc"}
    # Sample i of prompt j has the seed j n + i.
    assert texts(found[1]) == expected("a", n=2, seed=0)
    assert texts(found[2]) == expected("doc", n=2, seed=2)
    for sample in found[1]["samples"]:
        assert sample["num_tokens"] == len(sample["logprobs"])
        assert sample["finish_reason"] in ("stop", "length")
        for entry in sample["logprobs"]:
            assert len(entry["top"]) == 3
            assert entry["logprob"] <= entry["top"][0][1] <= 0


@pytest.mark.slow
def test_a_file_of_objects_has_parameters_of_its_own(complete, expected, tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "doc"},
        {"id": "greedy", "prompt": "a", "temperature": 0, "max_tokens": 4},
        {"id": "two", "prompt": "a", "n": 2, "seed": 40},
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)))
    code, out, _ = complete("--prompts_file", str(path))
    found = records(out)
    assert code == 0
    assert found.keys() == {1, "greedy", "two"}
    assert texts(found[1]) == expected("doc", seed=0)
    assert texts(found["greedy"]) == expected("a", temperature=0.0, max_tokens=4)
    assert texts(found["two"]) == expected("a", n=2, seed=40)


def test_an_interrupted_output_is_continued(complete, tmp_path, monkeypatch):
    prompts, whole, output = (tmp_path / name for name in ("p.txt", "whole.jsonl", "out.jsonl"))
    prompts.write_text("".join(f"document {i}\n\n" for i in range(40)))
    arguments = ["--prompts_file", str(prompts), "--slots", "2", "--output"]
    assert complete(*arguments, str(whole)) == (0, "", "")
    expected = records(whole.read_text())
    assert set(expected) == {2 * i + 1 for i in range(40)}

    step, calls = Engine.step, iter(range(30))

    def interrupted_step(self) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", interrupted_step)
        code, _, err = complete(*arguments, str(output))
    assert (code, err) == (130, "megalodon: interrupted\n")
    first = output.read_bytes()
    assert 0 < len(records(first.decode())) < 40
    # A killed process may leave a part of a line.
    output.write_bytes(first + b'{"id": 79, "pro')
    code, _, err = complete(*arguments, str(output))
    assert code == 0
    assert "the last line was incomplete" in err
    assert output.read_bytes().startswith(first)
    assert records(output.read_text()) == expected
    # Nothing is left to do: the run is not even read.
    assert main(["generate", "nowhere", *arguments, str(output)]) == 0


def test_ctrl_c_leaves_the_text_so_far(complete, expected, monkeypatch):
    (text,) = expected("doc", temperature=0.0, max_tokens=60)
    step, calls = Engine.step, iter(range(5))

    def interrupted_step(self) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(Engine, "step", interrupted_step)
    code, out, err = complete("doc", "--max_tokens", "60", "--temperature", "0")
    assert (code, err) == (130, "megalodon: interrupted\n")
    assert 4 < len(out) < len(text)
    assert f"doc{text}".startswith(out.removesuffix("\n"))


@pytest.mark.slow
def test_a_session_continues_the_conversation(complete, trained_run, tmp_path):
    model, tokenizer = load_trained(trained_run.run_dir)

    def greedy(tokens: list[int]) -> list[int]:
        new = generate(
            model, np.array([tokens]), max_tokens=9, temperature=0.0, stop_token=tokenizer.eos_id
        )
        return new[0].tolist()

    path = tmp_path / "talk.session"
    arguments = ["--temperature", "0", "--session", str(path)]
    prompt = [tokenizer.bos_id, *tokenizer.encode("doc").tolist()]
    answer = greedy(prompt)
    assert complete("doc", *arguments) == (0, f"doc{tokenizer.decode(answer)}\n", "")
    prompt += [*answer, *tokenizer.encode(" more").tolist()]
    assert complete(" more", *arguments) == (0, f" more{tokenizer.decode(greedy(prompt))}\n", "")

    path.write_bytes(path.read_bytes()[:-9])
    code, out, err = complete("doc", *arguments)
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert str(path) in err


@pytest.mark.slow
def test_a_terminal_sees_what_is_done(complete, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    complete("long " * 8000)
    shown = [line for line in terminal.getvalue().split("\r\x1b[K") if line]
    names = list(dict.fromkeys(line.split()[0] for line in shown))
    assert names == ["starting", "loading", "compiling", "prompt"]
    assert "/40,001 tokens" in shown[-1]
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_work_that_takes_long_is_reported():
    log = io.StringIO()
    with Progress(log, interval=0.02) as progress:
        progress.show("compiling")
        deadline = time.monotonic() + 20
        while "compiling\ncompiling\n" not in log.getvalue():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        progress.clear()
    assert set(log.getvalue().splitlines()) == {"compiling"}
    with Progress(log := io.StringIO()) as progress:
        progress.show("compiling")
    assert log.getvalue() == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "temprature": 1}', "line 2: unknown key 'temprature'; did you mean"),
        ('{"prompt": "a", "top_p": 2}', "line 2: .*top_p is 2"),
        ('{"prompt": "a", "stop": 5}', "line 2: .*"),
        ('{"prompt": "a", "n": 0}', "line 2: n is 0"),
        ('{"prompt": 5}', 'line 2: use an object with "prompt"'),
        ('{"id": 1, "prompt": "b"}', "line 2 has the id 1 of line 1"),
        ('{"id": 1.5, "prompt": "b"}', "line 2: id is 1.5"),
        ("prompt", "line 2: not JSON"),
    ],
)
def test_wrong_lines_are_named(line, message, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(ConfigError, match=message):
        read_prompts(str(path), DEFAULTS, 1)


def test_parameters_of_a_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "", "logit_bias": {"12": -3}, "stop": "x", "stop_ids": [4]}')
    (prompt,) = read_prompts(str(path), DEFAULTS, 3)
    assert prompt.params.logit_bias == {12: -3}
    assert (prompt.params.stop, prompt.params.stop_ids) == (("x",), (4,))
    assert (prompt.id, prompt.text, prompt.n, prompt.params.seed) == (1, "", 3, 0)


def test_errors_are_one_line(tmp_path, capsys):
    file, output = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    file.write_text("a\n")
    output.write_text('{"id": 1, "prompt": "b"}\n')
    (tmp_path / "other.jsonl").write_text("[]\n")
    for arguments, message in (
        (["a", "--prompts_file", str(file)], "give one of them"),
        (["--prompts_file", str(tmp_path / "none.txt")], "none.txt cannot be read"),
        (["--prompts_file", os.devnull], "has no prompts"),
        (["--prompts_file", str(file), "--output", str(output)], "another prompt with the id 1"),
        (["a", "--output", str(tmp_path / "other.jsonl")], "line 1 is no output of"),
        (["a", "b", "--session", "s"], "needs a single prompt"),
        (["-", "-"], "more than once"),
        (["a", "--min_p", "2", "--n", "0"], "min_p is 2"),
        (["a", "--n", "0"], "n is 0"),
        (["a", "--slots", "1"], "slots is 1"),
    ):
        assert main(["generate", "nowhere", *arguments]) == 2, arguments
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_was_dropped_is_raised_again():
    class Dropper:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        interrupt.check()
        Dropper()
        for _ in range(1000):
            pass
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.slow
def test_a_signal_ends_the_process_with_130(trained_run):
    command = [sys.executable, "-m", "megalodon_jax", "generate", trained_run.run_dir, "doc"]
    with subprocess.Popen(
        [*command, "--max_tokens", "100000000", "--temperature", "0"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.read(8)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode() == "megalodon: interrupted\n"
