"""lm-evaluation-harness with models of this package, compared with full passes in float64."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from megalodon_jax.checkpoints.load import save_model
from megalodon_jax.data import ByteTokenizer
from megalodon_jax.errors import ConfigError, DataError

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
from lm_eval.api.registry import get_model  # noqa: E402

from megalodon_jax.interop import lm_eval as adapter  # noqa: E402
from megalodon_jax.interop.lm_eval import MegalodonLM  # noqa: E402
from tests.interop.lm_eval_models import (  # noqa: E402
    BOS,
    LONGEST,
    FullPasses,
    build,
    evaluate,
    instances,
    tokens_of,
    write_task,
)

# Chunks have 16 tokens; a document of several chunks, of an odd length, with multi-byte text.
DOCUMENT = "Ein längerer Text über Ψ und 木, " * 4 + "zu Ende."
PAIRS = [
    ("The sky is", " blue"),
    ("", "An empty context."),
    ("The sky is ", "grün und 木"),
    ("a" * 50, " continuation longer than two chunks of sixteen tokens"),
    (" ", "x"),
    ("The sky is", " a"),
]


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(shared_compilation):
    """Programs of this module are shared with those of other tiny models."""


@pytest.fixture(autouse=True)
def _short_pieces(monkeypatch):
    """Pieces of 16 tokens: every longer text crosses several."""
    monkeypatch.setattr(adapter, "_PIECE_LENGTHS", (16, 16))


@pytest.fixture(scope="module")
def models() -> dict:
    """The models by kind, each with its full passes."""
    built = {kind: build(kind) for kind in ("megalodon", "transformer")}
    return {kind: (model, FullPasses(model)) for kind, model in built.items()}


@pytest.fixture(scope="module")
def model(models):
    return models["megalodon"][0]


@pytest.fixture(scope="module")
def full(models) -> FullPasses:
    return models["megalodon"][1]


@pytest.mark.parametrize(
    ("kind", "batch_size"),
    [("megalodon", 1), ("megalodon", 3), ("megalodon", 64), ("transformer", 3)],
)
def test_loglikelihood_equals_full_passes(models, kind, batch_size):
    model, full = models[kind]
    lm = MegalodonLM(model, ByteTokenizer(), batch_size=batch_size)
    likely = bytes(full.greedy("The", 3))
    pairs = [*PAIRS, ("The", likely.decode()), ("The", likely.decode() + "?")]
    found = lm.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    expected = [full.score([BOS, *tokens_of(a)], tokens_of(b)) for a, b in pairs]
    # Spaces at the end of a context belong to the continuation.
    expected[2] = full.score([BOS, *b"The sky is"], tokens_of(" grün und 木"))
    expected[4] = full.score([BOS], tokens_of(" x"))
    np.testing.assert_allclose([f[0] for f in found], [e[0] for e in expected], rtol=2e-6)
    assert [f[1] for f in found] == [e[1] for e in expected]
    assert [f[1] for f in found[-2:]] == [True, False]


def test_a_continuation_needs_tokens_of_its_own(model, tmp_path):
    lm = MegalodonLM(model, ByteTokenizer())
    with pytest.raises(DataError, match="request 1 has an empty continuation"):
        lm.loglikelihood(instances("loglikelihood", [("", "a"), ("", "")]))
    # "ab" is one token of this tokenizer: the context's token is the whole text's only one.
    tokenizer = MergingTokenizer()
    merging = MegalodonLM(model, tokenizer)
    assert merging.tok_encode("ab") == [BOS, ord("A")]
    with pytest.raises(DataError, match=r"'b' adds no token to its context, which ends in 'a'"):
        merging.loglikelihood(instances("loglikelihood", [("a", "b")]), disable_tqdm=True)


class MergingTokenizer(ByteTokenizer):
    """Bytes, and one token for "ab"."""

    def encode(self, text):
        return super().encode(text.replace("ab", "A"))


def test_context_and_continuation_are_split_as_one_text(model, full):
    lm = MegalodonLM(model, MergingTokenizer())
    pairs = [("xa", "bc"), ("xab", "c")]
    found = lm.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    # "xabc" is x A c: two tokens belong to either context, so that c alone is scored; the first
    # context keeps its own tokens x a.
    expected = [full.score([BOS, *b"xa"], [ord("c")]), full.score([BOS, *b"xA"], [ord("c")])]
    assert [f[0] for f in found] == pytest.approx([e[0] for e in expected], rel=2e-6)


@pytest.mark.parametrize(
    ("kind", "batch_size"), [("megalodon", 1), ("megalodon", 3), ("transformer", 3)]
)
def test_documents_of_any_length_are_scored_whole(models, kind, batch_size):
    model, full = models[kind]
    lm = MegalodonLM(model, ByteTokenizer(), batch_size=batch_size)
    texts = ["short", DOCUMENT, "", "é", DOCUMENT[::-1], "a" * 16]
    assert 8 * 16 < len(DOCUMENT.encode()) < LONGEST
    found = lm.loglikelihood_rolling(
        instances("loglikelihood_rolling", [(text,) for text in texts]), disable_tqdm=True
    )
    expected = [full.score([BOS], tokens_of(text))[0] if text else 0.0 for text in texts]
    np.testing.assert_allclose(found, expected, rtol=2e-6)


@pytest.mark.slow
def test_max_length_limits_what_a_token_sees(model, full):
    limit, stream = 20, [BOS, *tokens_of(DOCUMENT)]
    lm = MegalodonLM(model, ByteTokenizer(), batch_size=3, max_length=limit)
    (found,) = lm.loglikelihood_rolling(
        instances("loglikelihood_rolling", [(DOCUMENT,)]), disable_tqdm=True
    )
    # Windows of 20 predictions; the last one begins earlier, so that it is a whole window too.
    expected = 0.0
    for start in range(0, len(stream) - 1, limit):
        stop = min(start + limit, len(stream) - 1)
        first = start if stop - start == limit else stop - limit
        expected += full.score(stream[first : start + 1], stream[start + 1 : stop + 1])[0]
    assert found == pytest.approx(expected, rel=2e-6)
    assert abs(found - full.score([BOS], stream[1:])[0]) > 1e-3

    pair = ("b" * 30, "end")
    (one,) = lm.loglikelihood(instances("loglikelihood", [pair]), disable_tqdm=True)
    assert one[0] == pytest.approx(full.score(tokens_of("b" * 18), tokens_of("end"))[0], rel=2e-6)
    with pytest.raises(DataError, match="has 21 tokens, max_length is 20"):
        lm.loglikelihood(instances("loglikelihood", [("a", "b" * 21)]), disable_tqdm=True)

    prompt = "The quick brown fox jumps"
    requests = instances("generate_until", [(prompt, {"max_gen_toks": 8})])
    continued = [bytes(full.continue_tokens(tokens_of(prompt[-n:]), 8)) for n in (11, 12, 13)]
    assert continued[1] not in (continued[0], continued[2])
    assert lm.generate_until(requests, disable_tqdm=True) == [continued[1].decode()]


@pytest.mark.parametrize(
    ("kind", "batch_size"),
    [
        ("megalodon", 3),
        pytest.param("megalodon", 1, marks=pytest.mark.slow),
        pytest.param("transformer", 3, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_generation_is_the_greedy_one(models, kind, batch_size):
    model, full = models[kind]
    arguments = [
        ("The sky is", {"until": ["\n"], "max_gen_toks": 20}),
        ("木" * 4, {"until": "\n", "max_new_tokens": 19, "do_sample": False}),
        ("", {"max_gen_toks": 5, "temperature": 0.0, "num_beams": 1}),
    ]
    counts = [20, 19, 5]
    texts = [
        bytes(full.greedy(text, count)).decode()
        for (text, _), count in zip(arguments, counts, strict=True)
    ]
    # A stop text ends the continuation before it.
    stop = texts[0][7:9]
    arguments.append(("The sky is", {"until": ["#", stop], "max_gen_toks": 20}))
    texts.append(texts[0][: texts[0].index(stop)])
    lm = MegalodonLM(model, ByteTokenizer(), batch_size=batch_size)
    assert lm.generate_until(instances("generate_until", arguments), disable_tqdm=True) == texts


@pytest.mark.slow
def test_samples_depend_on_the_seed_and_the_request_alone(model, full):
    settings = {"max_gen_toks": 12, "do_sample": True, "temperature": 1.5}
    arguments = [("one", settings), ("two two", settings)] * 3
    requests = instances("generate_until", [*arguments, ("one", settings | {"top_k": 1})])

    def sample(batch_size: int, seed: int) -> list[str]:
        lm = MegalodonLM(model, ByteTokenizer(), batch_size=batch_size, seed=seed)
        return lm.generate_until(requests, disable_tqdm=True)

    first = sample(3, 0)
    assert first == sample(1, 0) != sample(3, 100)
    assert len(set(first)) == len(first)
    assert first[-1] == bytes(full.greedy("one", 12)).decode()


def test_unknown_settings_are_refused_by_name(model):
    lm = MegalodonLM(model, ByteTokenizer(), max_length=10)

    def generate(**settings):
        return lm.generate_until(instances("generate_until", [("a", settings)]))

    with pytest.raises(ConfigError, match="'num_beams', which this model does not know"):
        generate(num_beams=4)
    with pytest.raises(ConfigError, match="top_p is 2"):
        generate(max_gen_toks=2, top_p=2.0)
    with pytest.raises(ConfigError, match="max_gen_toks 10 leaves no room"):
        generate(max_gen_toks=10)
    with pytest.raises(ConfigError, match="batch_size is 'auto'"):
        MegalodonLM(model, ByteTokenizer(), batch_size="auto")
    for arguments, message in (
        ("batch_size=2", "model_args has no path"),
        ("path=runs/first,max_lenght=5", "did you mean 'max_length'"),
    ):
        with pytest.raises(ConfigError, match=message):
            MegalodonLM.create_from_arg_string(arguments)


def test_nan_scores_are_an_error():
    broken = build("megalodon")
    assert broken.output is not None
    broken.output.kernel[...] = np.nan
    lm = MegalodonLM(broken, ByteTokenizer())
    with pytest.raises(FloatingPointError, match="NaN"):
        lm.loglikelihood(instances("loglikelihood", [("a", "b")]), disable_tqdm=True)
    with pytest.raises(FloatingPointError, match="NaN"):
        lm.generate_until(instances("generate_until", [("a", {})]), disable_tqdm=True)


# ---- Tasks from local files.

CHOICES = [
    {"question": "Which is a colour?", "choices": ["blue", "seventeen and a half"], "answer": 0},
    {"question": "Welches ist ein Baum?", "choices": ["木 oder Eiche", "ein Stein"], "answer": 1},
    {"question": "", "choices": ["abc", "abcd"], "answer": 1},
]
CHOICE_TASK = """
task: local_choices
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""
DOCUMENTS = [{"text": DOCUMENT}, {"text": "Two short words."}]
DOCUMENT_TASK = """
task: local_documents
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
"""
ANSWER_TASK = """
task: local_answers
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["\n"]
  max_gen_toks: 6
metric_list:
  - metric: exact_match
"""


@pytest.fixture
def task_dir(tmp_path, monkeypatch, full) -> Path:
    """Three tasks; the second answer is not what the model says."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    answers = [bytes(full.greedy(prompt, 6)).decode() for prompt in ("Say", "Tell")]
    rows = [
        {"prompt": "Say", "answer": answers[0]},
        {"prompt": "Tell", "answer": answers[1] + "!"},
    ]
    for name, task, examples in (
        ("choices", CHOICE_TASK, CHOICES),
        ("documents", DOCUMENT_TASK, DOCUMENTS),
        ("answers", ANSWER_TASK, rows),
    ):
        write_task(tmp_path, name, task, examples)
    return tmp_path


def test_tasks_give_the_metrics_of_full_passes(model, full, task_dir):
    lm = MegalodonLM(model, ByteTokenizer(), batch_size=3)
    tasks = ["local_choices", "local_documents", "local_answers"]
    results = evaluate(lm, task_dir, tasks)["results"]

    by_sum, by_byte = [], []
    for example in CHOICES:
        scores = [
            full.score([BOS, *tokens_of(example["question"])], tokens_of(" " + choice))[0]
            for choice in example["choices"]
        ]
        lengths = [len(choice) for choice in example["choices"]]
        by_sum.append(int(np.argmax(scores)) == example["answer"])
        by_byte.append(int(np.argmax(np.divide(scores, lengths))) == example["answer"])
    assert by_sum != by_byte
    assert results["local_choices"]["acc,none"] == pytest.approx(np.mean(by_sum))
    assert results["local_choices"]["acc_norm,none"] == pytest.approx(np.mean(by_byte))

    texts = [each["text"] for each in DOCUMENTS]
    bits = bits_per_byte(full)
    bytes_per_word = sum(len(t.encode()) for t in texts) / sum(len(t.split()) for t in texts)
    documents = results["local_documents"]
    assert documents["bits_per_byte,none"] == pytest.approx(bits)
    assert documents["byte_perplexity,none"] == pytest.approx(2**bits)
    # The exponential of some hundred nats multiplies rounding errors: its logarithm is compared.
    bits_per_word = math.log2(documents["word_perplexity,none"])
    assert bits_per_word == pytest.approx(bits * bytes_per_word)
    assert results["local_answers"]["exact_match,none"] == 0.5


def bits_per_byte(full) -> float:
    texts = [each["text"] for each in DOCUMENTS]
    nats = -sum(full.score([BOS], tokens_of(text))[0] for text in texts)
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


@pytest.mark.slow
def test_a_run_is_evaluated_by_name(model, full, session_config, task_dir):
    save_model(model, str(task_dir / "run"), session_config)
    model_args = f"path={task_dir / 'run'},batch_size=2,max_length=1000,seed=3"
    results = evaluate(
        "megalodon", task_dir, ["local_documents"], model_args=model_args, batch_size=1
    )["results"]
    found = results["local_documents"]["bits_per_byte,none"]
    assert found == pytest.approx(bits_per_byte(full))
    lm = MegalodonLM.create_from_arg_string(model_args, {"batch_size": "1", "device": "cuda:0"})
    assert (lm.batch_size, lm.max_length, lm.seed) == (2, 1000, 3)


# The command reads all tasks that lm-evaluation-harness comes with.
@pytest.mark.slow
def test_command_line_evaluates_a_run(model, full, session_config, task_dir, monkeypatch):
    assert get_model("megalodon") is MegalodonLM
    save_model(model, str(task_dir / "run"), session_config)
    monkeypatch.setattr(
        "sys.argv",
        ["lm_eval", "run", "--model", "megalodon", "--model_args", f"path={task_dir / 'run'}",
         "--batch_size", "2", "--tasks", "local_documents", "--include_path", str(task_dir),
         "--output_path", str(task_dir / "output")],
    )  # fmt: skip
    adapter.main()
    (written,) = (task_dir / "output").rglob("results_*.json")
    results = json.loads(written.read_text())["results"]["local_documents"]
    assert results["bits_per_byte,none"] == pytest.approx(bits_per_byte(full))
