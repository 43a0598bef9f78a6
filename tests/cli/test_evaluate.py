"""`megalodon evaluate --task` and `megalodon examples`."""

import json

import pytest

from megalodon_jax.cli.main import main
from megalodon_jax.evaluation import loss_by_position, passkey_accuracy, perplexity_by_context
from megalodon_jax.pretrained import load


def run(arguments: list[str], capsys) -> str:
    assert main(arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def read(path) -> list[str]:
    return path.read_text().splitlines()


def evaluate(task: str, *options: str, run_dir: str, path, capsys) -> tuple[str, dict]:
    arguments = ["evaluate", "--checkpoint", run_dir, "--task", task, *options]
    out = run([*arguments, "--json", str(path)], capsys)
    return out, json.loads(path.read_text())


@pytest.mark.slow
def test_tasks_print_a_table_and_write_json(trained_run, text_file, tmp_path, capsys):
    run_dir, path = trained_run.run_dir, tmp_path / "results.json"
    options = {"run_dir": run_dir, "path": path, "capsys": capsys}
    text = ["--files", str(text_file), "--document_separator", "\0", "--max_tokens", "900"]
    small = ["--tokens_per_call", "256"]
    out, content = evaluate(
        "perplexity_by_context", *text, *small, "--contexts", "32", "0", "--tail", "8", **options
    )
    model, tokenizer = load(run_dir)
    assert tokenizer is not None
    documents = text_file.read_text().split("\0")
    settings = {"max_tokens": 900, "tokens_per_call": 256}
    expected = perplexity_by_context(
        model, tokenizer, documents, contexts=(32, 0), tail=8, **settings
    )
    for result, each in zip(content["results"], expected, strict=True):
        assert {**result, "seconds": 0} == {**each._asdict(), "seconds": 0}
    assert content["options"]["contexts"] == [32, 0]
    assert content["checkpoint"] == run_dir
    assert content["model"]["chunk_size"] == 16
    assert len(out.splitlines()) == 3
    assert out.split()[:3] == ["context", "loss", "perplexity"]

    _, content = evaluate("loss_by_position", *text, *small, **options)
    expected = loss_by_position(model, tokenizer, documents, **settings)
    assert content["results"] == [each._asdict() for each in expected]

    problems = ["--count", "2", *small]
    _, content = evaluate("passkey", "--lengths", "300", *problems, **options)
    expected = passkey_accuracy(model, tokenizer, lengths=[300], count=2, tokens_per_call=256)
    assert content["results"] == [each._asdict() for each in expected]
    for task, name in (("copy", "distance"), ("recall", "distance"), ("addition", "digits")):
        option = "--distances" if name == "distance" else "--digits"
        out, content = evaluate(task, option, "200", *problems, **options)
        assert content["results"][0][name] == 200
        assert content["results"][0]["exact_match"] == 0.0
        assert "teacher_forcing" in out


@pytest.mark.slow
def test_the_default_task_prints_a_line(trained_run, text_file, tmp_path, capsys):
    text = ["--files", str(text_file), "--document_separator", "\0", "--piece_length", "64"]
    options = {"run_dir": trained_run.run_dir, "path": tmp_path / "a.json", "capsys": capsys}
    out, content = evaluate("text", *text, **options)
    (result,) = content["results"]
    assert out == run(["evaluate", "--checkpoint", trained_run.run_dir, *text], capsys)
    assert out.startswith(f"bits per byte {result['bits_per_byte']:.4f}  perplexity per token ")
    _, content = evaluate("text", *text, "--weights", "int8", "--kv", "int8", **options)
    (rounded,) = content["results"]
    assert rounded["num_tokens"] == result["num_tokens"]
    assert 0 < abs(rounded["loss"] / result["loss"] - 1) <= 5e-3


@pytest.mark.slow
def test_costs(trained_run, text_file, tmp_path, capsys):
    options = {"run_dir": trained_run.run_dir, "path": tmp_path / "a.json", "capsys": capsys}
    _, content = evaluate("prefill_cost", "--lengths", "20", "40", "--repeats", "1", **options)
    assert [each["length"] for each in content["results"]] == [20, 40]
    once = ["--lengths", "20", "--repeats", "1"]
    arguments = ["evaluate", "--checkpoint", trained_run.run_dir, "--task", "prefill_cost", *once]
    assert main(arguments) == 0
    assert "prefill of 1 x 20 tokens: 0." in capsys.readouterr().err
    text = ["--files", str(text_file), "--document_separator", "\0"]
    text += ["--max_tokens", "100", "--tokens_per_call", "64"]
    _, content = evaluate("skip_attention", *text, "--skip", "0", "1", "--repeats", "1", **options)
    first, second = content["results"]
    assert (first["skipped"], second["skipped"]) == (0, 1)
    assert first["loss"] != second["loss"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "passkey", "--files", "a"], "--files is not an option of --task passkey"),
        (["--task", "loss_by_position"], "name it with --files"),
        ([], "name it with --files"),
        (["--task", "passkey", "--lengths", "0"], "--lengths is 0; use 1 or more"),
        (["--task", "copy", "--json", "nowhere/a.json"], "in a folder that does not exist"),
        (["--task", "copy", "--count", "0"], "--count is 0; use 1 or more"),
        (["--files", "a", "--tail", "3"], "--tail is not an option of --task text"),
        (["--task", "copy", "--kv", "int8"], "--kv is not an option of --task copy"),
        (
            ["--task", "perplexity_by_context", "--files", "a", "--contexts", "-1"],
            "--contexts is -1",
        ),
    ],
)
def test_wrong_options_are_refused_before_the_model_is_loaded(arguments, message, capsys):
    assert main(["evaluate", "--checkpoint", "nowhere", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_window_is_for_a_transformer(trained_run, text_file, capsys):
    arguments = ["evaluate", "--checkpoint", trained_run.run_dir, "--files", str(text_file)]
    assert main([*arguments, "--task", "loss_by_position", "--window", "8"]) == 1
    assert "a Megalodon has no attention window" in capsys.readouterr().err


@pytest.mark.slow
def test_examples_of_every_problem(trained_run, tmp_path, capsys):
    for problem, option in (
        ("passkey", ["--lengths", "300", "400"]),
        ("copy", ["--distances", "100"]),
        ("recall", ["--distances", "200"]),
        ("addition", ["--digits", "2", "3"]),
    ):
        path = tmp_path / f"{problem}.jsonl"
        out = run(["examples", problem, "--out", str(path), "--count", "4", *option], capsys)
        assert out == f"{path}: 4 examples\n"
        for line in read(path):
            assert sorted(json.loads(line)) == ["prompt", "response"]
    lengths = [len(json.loads(line)["prompt"]) for line in read(tmp_path / "passkey.jsonl")]
    assert lengths == [299, 299, 299, 399]
    path = tmp_path / "round.jsonl"
    labelled = ["--label_with", trained_run.run_dir, "--digits", "4", "--count", "3"]
    out = run(["examples", "addition", "--out", str(path), *labelled], capsys)
    assert "examples labelled by" in out
    assert all(len(json.loads(line)["prompt"]) == 10 for line in read(path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["addition", "--count", "0"], "--count is 0"),
        (["addition", "--count", "1", "--digits", "0"], "--digits is 0"),
        (["addition", "--count", "1", "--label_with", "x"], "needs one number of digits"),
        (["copy", "--count", "1", "--label_with", "x"], "--label_with is not an option of copy"),
    ],
)
def test_wrong_options_of_examples_are_refused(arguments, message, tmp_path, capsys):
    assert main(["examples", *arguments, "--out", str(tmp_path / "a")]) == 2
    assert message in capsys.readouterr().err
