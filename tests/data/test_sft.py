"""Examples of supervised fine-tuning: masks by hand, packing, what is left out, resumption."""

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from megalodon_jax.config import DataConfig, HeldoutSet, MixtureSource, SftConfig, TrainConfig
from megalodon_jax.data import (
    ByteTokenizer,
    load_tokenizer,
    merge_states,
    pipeline,
    total_counts,
)
from megalodon_jax.data.chat_template import ChatTemplate, Message
from megalodon_jax.data.examples import encode_example
from megalodon_jax.errors import ConfigError, DataError
from megalodon_jax.tasks import find_task
from tests.data.test_chat_template import CHATML, expected_ids, own_template, write_tokenizer
from tests.fixtures_runs import TINY_MODEL

WITH_BLOCKS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETS = (
    "{% for message in messages %}{% if loop.last or message.role == 'user' %}"
    "{{ message.role }}: {{ message.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TALK = [
    {"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Me."},
]  # fmt: skip


def test_a_pair_by_hand():
    pair = {"prompt": "ab", "response": "cd"}
    for record in (pair, {"prompt": "ab", "completion": "cd"}):
        example = encode_example(json.dumps(record), ByteTokenizer(), None)
        assert example.stream.tolist() == [256, 97, 98, 99, 100, 256]
        assert example.is_response.tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("template", [WITH_BLOCKS, CHATML])
def test_a_conversation_by_hand(tmp_path, template):
    """With generation blocks, and by rendering prefixes: both know what the assistant writes."""
    tokenizer = load_tokenizer(str(write_tokenizer(tmp_path, {"chat_template": template})))
    found = own_template(tokenizer)
    example = encode_example(json.dumps({"messages": TALK}), tokenizer, found)
    start, end, bos = "<|im_start|>", "<|im_end|>", "<|end|>"
    parts = [
        (False, (bos, start, "system\nBe short.", end, "\n", start, "user\nHi", end, "\n")),
        (False, (start, "assistant\n")),
        (True, ("Hello.", end)),
        (False, ("\n", start, "user\nWho?", end, "\n", start, "assistant\n")),
        (True, ("Me.", end)),
    ]
    ids, mask = [], []
    for is_assistant, texts in parts:
        new = expected_ids(tokenizer, *texts)
        ids += new
        mask += [is_assistant] * len(new)
    assert example.stream.tolist() == ids
    assert example.is_response.tolist() == mask[1:]
    # The marks are seen nowhere else.
    messages = [Message(**entry) for entry in TALK]
    assert found.render(messages) == ChatTemplate(CHATML).render(messages)
    same = ChatTemplate(CHATML).encode(tokenizer, messages, add_generation_prompt=False)
    np.testing.assert_array_equal(
        found.encode(tokenizer, messages, add_generation_prompt=False), same
    )
    again = pickle.loads(pickle.dumps(found)).encode_with_mask(tokenizer, messages)
    assert again.ids.tolist()[: len(ids)] == ids


def test_the_plain_template_ends_the_last_answer():
    template = ChatTemplate.load("plain")
    example = encode_example(json.dumps({"messages": TALK[1:]}), ByteTokenizer(), template)
    text = b"User: Hi\nAssistant: Hello.\nUser: Who?\nAssistant: Me.\n"
    assert example.stream.tolist() == [256, *text, 256]
    responses = np.asarray(example.stream[1:])[example.is_response]
    assert responses.tolist() == [*b" Hello.\n", *b" Me.\n", 256]


def test_an_end_outside_of_the_block_is_not_repeated(tmp_path):
    outside = WITH_BLOCKS.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    assert outside != WITH_BLOCKS
    tokenizer = load_tokenizer(str(write_tokenizer(tmp_path, {"chat_template": outside})))
    found = own_template(tokenizer).encode_with_mask(tokenizer, [Message(**e) for e in TALK])
    assert found.ids[-2:].tolist() == expected_ids(tokenizer, "<|im_end|>", "\n")
    example = encode_example(json.dumps({"messages": TALK}), tokenizer, own_template(tokenizer))
    assert example.stream[-3:].tolist() == expected_ids(tokenizer, "Me.")


def test_a_template_without_agreeing_prefixes_is_refused():
    template = ChatTemplate(FORGETS, name="the template")
    with pytest.raises(DataError, match=r"the template renders message 1 .*% generation %"):
        encode_example(json.dumps({"messages": TALK[1:]}), ByteTokenizer(), template)
    # A conversation with a single answer has one way only.
    assert encode_example(json.dumps({"messages": TALK[1:3]}), ByteTokenizer(), template)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], "expected an object"),
        ({"text": "a"}, "the record has the fields text; an example has messages, or prompt"),
        ({"prompt": "a", "response": "b", "completion": "c"}, "an example has messages, or prompt"),
        ({"prompt": "a", "response": ""}, "response is empty"),
        ({"prompt": None, "response": "b"}, "prompt is None; it must be a text"),
        ({"messages": []}, "must be a list with a message"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "must have a role of system, user"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content is .*a text"),
        ({"messages": [{"role": "user", "content": "\ufdd3"}]}, r"noncharacter U\+FDD3"),
        ({"messages": TALK, "tools": [{}]}, "the record has tools"),
    ],
)
def test_other_records_are_refused(record, message):
    with pytest.raises(DataError, match=message):
        encode_example(json.dumps(record), ByteTokenizer(), ChatTemplate.load("plain"))
    with pytest.raises(DataError, match="not a line of JSON"):
        encode_example("{", ByteTokenizer(), None)
    with pytest.raises(DataError, match=r"no chat template; name one in sft.chat_template"):
        encode_example(json.dumps({"messages": TALK}), ByteTokenizer(), None)


SEQ_LEN = 31


@pytest.fixture(scope="module")
def records() -> list[tuple[str, str]]:
    """Prompts and responses of 3 to 44 bytes together, all different."""
    rng = np.random.default_rng(0)
    return [
        (f"{number:02}" + "p" * int(rng.integers(0, 18)), "r" * int(rng.integers(1, 25)))
        for number in range(41)
    ]


@pytest.fixture
def config(tmp_path, records, short_prefetch) -> TrainConfig:
    path = tmp_path / "examples.jsonl"
    lines = (json.dumps({"prompt": prompt, "response": response}) for prompt, response in records)
    path.write_text("\n".join(lines))
    data = DataConfig(files=(str(path),), seq_len=SEQ_LEN, batch_size=4, heldout_fraction=0.0)
    return TrainConfig(model=TINY_MODEL, data=data, task="sft")


def loader_of(config: TrainConfig, *, rows=range(4), num_shards: int = 1):
    return find_task("sft").open_loaders(
        config, ByteTokenizer(), rows=list(rows), num_shards=num_shards
    )[0]


def examples_of(batch) -> list[tuple[bytes, bytes]]:
    """Prompts and responses in a batch, from its arrays."""
    found = []
    for tokens, targets, segments, weights in zip(*map(np.asarray, batch), strict=True):
        for segment in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == segment)
            assert np.array_equal(at, np.arange(at[0], at[-1] + 1))
            assert tokens[at[0]] == 256
            np.testing.assert_array_equal(tokens[at[1:]], targets[at[:-1]])
            is_response = weights[at] == 1
            assert np.all(np.diff(is_response.astype(int)) >= 0), "the response is the end"
            stream = targets[at]
            prompt, response = stream[~is_response], stream[is_response]
            found.append((bytes(prompt.tolist()), bytes(x for x in response.tolist() if x < 256)))
        assert np.all(weights[segments == 0] == 0)
    return found


def epoch_of(loader, count: int):
    """Batches until `count` examples have been seen."""
    found: list[tuple[bytes, bytes]] = []
    while len(found) < count:
        found += examples_of(next(loader))
    return found


def test_examples_are_packed_whole(config, records):
    fitting = [(p.encode(), r.encode()) for p, r in records if len(p) + len(r) + 1 <= SEQ_LEN]
    assert 0 < len(fitting) < len(records)
    loader = loader_of(config)
    found = epoch_of(loader, len(fitting))
    assert sorted(found[: len(fitting)]) == sorted(fitting)
    (counts,) = total_counts([loader.counts()])
    assert counts.dropped >= len(records) - len(fitting)
    assert counts.truncated == 0
    loader.close()


def test_long_examples_are_truncated(config, records):
    truncating = dataclasses.replace(config, sft=SftConfig(too_long="truncate", max_length=23))
    loader = loader_of(truncating)
    # An example whose response begins after the limit has none.
    kept = [(p.encode(), r.encode()) for p, r in records if len(p) < 23]
    wanted = [(p, r[: 23 - len(p)]) for p, r in kept]
    found = epoch_of(loader, len(kept))
    assert sorted(found[: len(kept)]) == sorted(wanted)
    (counts,) = total_counts([loader.counts()])
    assert counts.truncated >= sum(len(p) + len(r) + 1 > 23 for p, r in kept) > 0
    loader.close()


@pytest.mark.parametrize("truncates", [False, True])
def test_resumption_at_every_step(config, truncates):
    sft = SftConfig(too_long="truncate" if truncates else "drop", max_length=19)
    config = dataclasses.replace(config, sft=sft)
    loader = loader_of(config)
    states, batches, counts = [loader.state_dict()], [], []
    for _ in range(9):
        batches.append(next(loader))
        states.append(json.loads(json.dumps(merge_states([loader.state_dict()]))))
        counts.append(loader.counts())
    loader.close()
    for step in (1, 2, 5, 8):
        resumed = loader_of(config)
        resumed.load_state_dict(states[step])
        for number in range(step, 9):
            for got, want in zip(next(resumed), batches[number], strict=True):
                np.testing.assert_array_equal(got, want)
            assert resumed.counts() == counts[number]
        resumed.close()
    other = loader_of(dataclasses.replace(config, sft=dataclasses.replace(sft, max_length=20)))
    with pytest.raises(DataError, match=r"examples was .*max_length.: 19"):
        other.load_state_dict(states[3])
    other.close()


def test_processes_load_their_own_rows(config):
    data = dataclasses.replace(config.data, num_shards=2)
    config = dataclasses.replace(config, data=data)
    whole = loader_of(config)
    parts = [loader_of(config, rows=rows) for rows in ((0, 1), (2, 3))]
    for _ in range(4):
        want = next(whole)
        got = [next(part) for part in parts]
        for name, array in want._asdict().items():
            joined = np.concatenate([getattr(batch, name) for batch in got])
            np.testing.assert_array_equal(joined, array)
    for loader in (whole, *parts):
        loader.close()


def test_padding_and_bad_records(config, records):
    path = Path(config.data.files[0])
    path.write_text(path.read_text() + '\n{"prompt": "x"}')
    with pytest.raises(DataError, match=r"examples.jsonl:42: the record has the fields prompt"):
        epoch_of(loader_of(config), 100)
    data = dataclasses.replace(config.data, on_bad_document="skip", packing="pad")
    loader = loader_of(dataclasses.replace(config, data=data))
    batch = next(loader)
    assert batch.segment_ids.max() == 1
    epoch_of(loader, 50)
    assert loader.bad_documents >= 1
    loader.close()


def test_data_that_cannot_be_examples(config, tmp_path):
    text = tmp_path / "plain.txt"
    text.write_text("a")
    data = dataclasses.replace(config.data, files=(str(text),))
    with pytest.raises(DataError, match=r"plain.txt is no .jsonl file"):
        loader_of(dataclasses.replace(config, data=data))
    with pytest.raises(ConfigError, match="a source of the data is 'python_stdlib'"):
        loader_of(dataclasses.replace(config, data=DataConfig(seq_len=SEQ_LEN, batch_size=4)))
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "a", "response": "b"}')
    data = dataclasses.replace(config.data, files=(str(few),), heldout_fraction=0.5)
    with pytest.raises(DataError, match=r"without a whole record; name data.heldout_files"):
        loader_of(dataclasses.replace(config, data=data))
    with pytest.raises(ConfigError, match=r"sft.max_length is 32, more than the data.seq_len 31"):
        dataclasses.replace(config, sft=SftConfig(max_length=32))


def test_a_mixture_with_a_heldout_set(config, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "WINDOW_TOKENS", 1 << 10)
    lines = [json.dumps({"prompt": "other", "response": f"x{i}"}) for i in range(7)]
    for name in ("other", "check"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    sources = (
        MixtureSource(name="main", files=config.data.files, weight=3.0),
        MixtureSource(name="other", files=(str(tmp_path / "other.jsonl"),)),
    )
    heldout = HeldoutSet(name="check", files=(str(tmp_path / "check.jsonl"),))
    data = DataConfig(
        sources=sources, heldout_sets=(heldout,), seq_len=SEQ_LEN, batch_size=4
    )  # fmt: skip
    mixed = dataclasses.replace(config, data=data)
    training, sets = find_task("sft").open_loaders(
        mixed, ByteTokenizer(), rows=range(4), num_shards=1
    )
    for _ in range(20):
        next(training)
    main, other = total_counts([training.counts()])
    # Rows are whole: their tokens differ from window to window.
    assert 2.2 < main.tokens / other.tokens < 4.0
    found = [each for batch, _ in sets["check"].with_bytes() for each in examples_of(batch)]
    assert sorted(found) == [(b"other", f"x{i}".encode()) for i in range(7)]
    for loader in (training, sets["check"]):
        loader.close()
