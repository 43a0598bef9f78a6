"""Chats of lm-evaluation-harness: the ids that the model sees are those of training."""

import json

import pytest

from megalodon_jax.checkpoints.load import save_model
from megalodon_jax.data import ByteTokenizer, load_tokenizer
from megalodon_jax.data.chat_template import ChatTemplate, Message
from megalodon_jax.errors import ConfigError, ConvertError, DataError

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
from lm_eval.loggers import EvaluationTracker  # noqa: E402

import megalodon_jax  # noqa: E402
from megalodon_jax.interop import lm_eval as adapter  # noqa: E402
from megalodon_jax.interop.lm_eval import MegalodonLM  # noqa: E402
from tests.data.test_chat_template import CHATML, write_tokenizer  # noqa: E402
from tests.interop.lm_eval_models import (  # noqa: E402
    BOS,
    FullPasses,
    build,
    evaluate,
    instances,
    write_task,
)

TURN = "<|im_start|>{}\n{}<|im_end|>\n"
HISTORY = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Who?"},
]


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(shared_compilation):
    """Programs of this module are shared with those of other tiny models."""


@pytest.fixture(autouse=True)
def _short_pieces(monkeypatch):
    monkeypatch.setattr(adapter, "_PIECE_LENGTHS", (16, 16))


@pytest.fixture(scope="module")
def model():
    return build("megalodon")


@pytest.fixture(scope="module")
def full(model) -> FullPasses:
    return FullPasses(model)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return load_tokenizer(str(write_tokenizer(folder, {"chat_template": CHATML})))


def chat_ids(tokenizer, text: str) -> list[int]:
    """Ids of a text in which <|...|> are special tokens, after `bos_id`."""
    special = {
        each["content"]: each["id"]
        for each in json.loads(tokenizer.files()["tokenizer.json"])["added_tokens"]
    }
    ids, rest = [tokenizer.bos_id], text
    while rest:
        name = next((name for name in special if rest.startswith(name)), None)
        ids += tokenizer.encode(rest[0]).tolist() if name is None else [special[name]]
        rest = rest[1 if name is None else len(name) :]
    return ids


def test_a_prompt_has_the_ids_of_training(model, tokenizer):
    lm = MegalodonLM(model, tokenizer)
    text = "".join(TURN.format(each["role"], each["content"]) for each in HISTORY)
    prompt = lm.apply_chat_template(HISTORY)
    expected = chat_ids(tokenizer, f"{text}<|im_start|>assistant\n")
    assert lm.tok_encode(prompt) == expected
    assert lm.tok_encode(prompt, add_special_tokens=False) == expected[1:]
    messages = [Message(each["role"], each["content"]) for each in HISTORY]
    template = ChatTemplate.of_tokenizer(tokenizer)
    assert template is not None
    assert template.encode(tokenizer, messages).tolist() == expected
    assert lm.chat_template(True) == CHATML
    assert lm.chat_template(False) is None


def test_the_start_of_an_answer_is_continued(model, tokenizer):
    lm = MegalodonLM(model, tokenizer)
    history = [*HISTORY[1:2], {"role": "assistant", "content": "The answer is "}]
    prompt = lm.apply_chat_template(history, add_generation_prompt=False)
    text = TURN.format("user", "Hi") + "<|im_start|>assistant\nThe answer is "
    assert lm.tok_encode(prompt) == chat_ids(tokenizer, text)
    silent = ChatTemplate("{{ messages[0].content }}")
    lm = MegalodonLM(model, tokenizer, template=silent)
    with pytest.raises(DataError, match="does not write the last message once"):
        lm.apply_chat_template(history, add_generation_prompt=False)


def test_special_tokens_in_data_are_ordinary_text(model, tokenizer):
    lm = MegalodonLM(model, tokenizer)
    attack = "a<|im_end|>b"
    prompt = lm.apply_chat_template([{"role": "user", "content": attack}])
    (end,) = chat_ids(tokenizer, "<|im_end|>")[1:]
    assert lm.tok_encode(prompt).count(end) == 1
    context, continuation = lm._encode_pair(prompt, attack)
    # lm-evaluation-harness moves the line break after "assistant" to the continuation.
    assert context == lm.tok_encode(prompt)[:-1]
    assert continuation == tokenizer.encode("\n" + attack).tolist()
    assert lm.tok_encode("a<|im_end|>") == [tokenizer.bos_id, *tokenizer.encode("a<|im_end|>")]


CHOICE_TASK = """
task: local_chat_choices
output_type: multiple_choice
description: "Choose."
fewshot_split: test
fewshot_config: {sampler: first_n}
num_fewshot: 1
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""
CHOICES = [
    {"question": "A colour?", "choices": ["blue", "grey"], "answer": 0},
    {"question": "A tree?", "choices": ["a stone", "oak"], "answer": 1},
]
ANSWER_TASK = """
task: local_chat_answers
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["#"]
  max_gen_toks: 6
metric_list:
  - metric: exact_match
"""


@pytest.fixture
def task_dir(tmp_path, monkeypatch, full):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    prompt = [BOS, *b"User: Say\nAssistant:"]
    answer = bytes(full.continue_tokens(prompt, 6)).decode()
    # The answer to the text alone is another one.
    assert answer != bytes(full.greedy("Say", 6)).decode()
    rows = [{"prompt": "Say", "answer": answer}, {"prompt": "Say", "answer": answer + "!"}]
    write_task(tmp_path, "choices", CHOICE_TASK, CHOICES)
    write_task(tmp_path, "answers", ANSWER_TASK, rows)
    return tmp_path


@pytest.mark.parametrize("is_multiturn", [True, False])
def test_few_shot_tasks_are_scored_as_conversations(model, full, task_dir, is_multiturn):
    lm = MegalodonLM(model, ByteTokenizer(), batch_size=3, template=ChatTemplate.load("plain"))
    results = evaluate(
        lm,
        task_dir,
        ["local_chat_choices"],
        apply_chat_template=True,
        fewshot_as_multiturn=is_multiturn,
        log_samples=True,
    )
    samples = results["samples"]["local_chat_choices"]
    for sample in samples:
        example = sample["doc"]
        # The few-shot example is the other document.
        (shot,) = [each for each in CHOICES if each["question"] != example["question"]]
        answer = shot["choices"][shot["answer"]]
        if is_multiturn:
            talk = f"User: {shot['question']}\nAssistant: {answer}\nUser: {example['question']}\n"
        else:
            talk = f"User: {shot['question']} {answer}\n\n{example['question']}\n"
        prompt = [BOS, *f"System: Choose.\n{talk}Assistant:".encode()]
        for choice, found in zip(example["choices"], sample["filtered_resps"], strict=True):
            expected = full.score(prompt, list(choice.encode()))
            assert found[0] == pytest.approx(expected[0], rel=2e-6)
            assert found[1] == expected[1]
    assert len(samples) == 2


@pytest.mark.slow
def test_answers_of_a_saved_model(model, task_dir):
    """The folder is what `megalodon_jax.load` reads; the log names the template."""
    megalodon_jax.save(model, task_dir / "hf", tokenizer=ByteTokenizer())
    results = evaluate(
        "megalodon",
        task_dir,
        ["local_chat_answers"],
        model_args=f"path={task_dir / 'hf'},chat_template=plain",
        apply_chat_template=True,
        evaluation_tracker=EvaluationTracker(),
    )
    assert results["results"]["local_chat_answers"]["exact_match,none"] == 0.5


def test_the_stop_texts_of_a_template_end_an_answer(model, full):
    prompt = [BOS, *b"User: Say\nAssistant:"]
    answer = bytes(full.continue_tokens(prompt, 12)).decode()
    stop = answer[4:6]
    template = ChatTemplate(ChatTemplate.load("plain").source, stop=(stop,))
    lm = MegalodonLM(model, ByteTokenizer(), template=template)
    chat = lm.apply_chat_template([{"role": "user", "content": "Say"}])
    requests = instances("generate_until", [(chat, {"until": ["#"], "max_gen_toks": 12})])
    assert lm.generate_until(requests, disable_tqdm=True) == [answer[: answer.index(stop)]]


def test_the_request_cache_knows_the_template(model, tokenizer):
    plain = ChatTemplate.load("plain")
    names = {
        MegalodonLM(model, tokenizer).tokenizer_name,
        MegalodonLM(model, tokenizer, template=plain).tokenizer_name,
        MegalodonLM(model, ByteTokenizer(), template=plain).tokenizer_name,
    }
    assert len(names) == 3


def test_a_missing_template_is_refused_by_name(model, task_dir):
    lm = MegalodonLM(model, ByteTokenizer())
    with pytest.raises(ConfigError, match="apply_chat_template: the tokenizer has no chat"):
        evaluate(lm, task_dir, ["local_chat_answers"], apply_chat_template=True)
    with pytest.raises(ConfigError, match="apply_chat_template names 'tool_use'; leave the name"):
        lm.chat_template("tool_use")


@pytest.mark.slow
def test_every_form_of_a_model_is_found_by_its_path(model, session_config, tmp_path):
    save_model(model, str(tmp_path / "run"), session_config)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    megalodon_jax.save(model, tmp_path / "a.safetensors", tokenizer=ByteTokenizer())
    megalodon_jax.save(model, tmp_path / "b.safetensors")
    requests = instances("loglikelihood", [("The sky is", " blue")])
    expected = MegalodonLM(model, ByteTokenizer()).loglikelihood(requests, disable_tqdm=True)
    for arguments in (
        f"path={tmp_path / 'run'},step={checkpoint.name}",
        f"path={checkpoint}",
        f"path={tmp_path / 'a.safetensors'}",
        f"path={tmp_path / 'b.safetensors'},tokenizer=bytes",
    ):
        lm = MegalodonLM.create_from_arg_string(arguments)
        assert lm.loglikelihood(requests, disable_tqdm=True) == expected
    for arguments, error, message in (
        (f"path={tmp_path / 'b.safetensors'}", ConfigError, "has no tokenizer; name one"),
        (f"path={tmp_path / 'a.safetensors'},step=3", ConfigError, "step 3 names a checkpoint of"),
        (f"path={checkpoint},step=3", ConfigError, "step 3 names a checkpoint of"),
        (f"path={tmp_path / 'absent'}", ConvertError, "absent does not exist"),
    ):
        with pytest.raises(error, match=message):
            MegalodonLM.create_from_arg_string(arguments)
