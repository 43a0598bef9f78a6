"""Runs of encoders: training, held-out accuracy, pictures, resumption, evaluate and classify."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.baselines.transformer_encoder import TransformerEncoder
from megalodon_jax.checkpoints.compatibility import check_same_model
from megalodon_jax.cli.main import main
from megalodon_jax.config import (
    AnyEncoderConfig,
    DataConfig,
    EncoderConfig,
    ExamplesConfig,
    MeshConfig,
    OptimConfig,
    TrainConfig,
    TransformerEncoderConfig,
    load_config,
)
from megalodon_jax.data import ByteTokenizer
from megalodon_jax.encoder import Encoder
from megalodon_jax.errors import ConfigError, MismatchError
from megalodon_jax.evaluation.pictures import confusion_matrix, learning_curve
from megalodon_jax.evaluation.summary import Evaluation
from megalodon_jax.interop.initial_weights import read_initial_weights
from megalodon_jax.tasks import find_task
from megalodon_jax.tasks.classification import class_loss
from megalodon_jax.tasks.masked_language import mask_tokens
from megalodon_jax.training.encoder_runs import (
    classify_files,
    embed_files,
    evaluate_run,
    load_encoder,
)
from megalodon_jax.training.loop import train
from megalodon_jax.training.result import TrainResult
from megalodon_jax.typing import Batch

pytestmark = pytest.mark.usefixtures("shared_compilation", "short_prefetch")

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "configs/tasks").glob("*.toml"))
TINY = EncoderConfig(
    num_layers=1, model_dim=8, z_dim=4, value_dim=8, ffn_hidden_dim=8, cema_ndim=2, num_classes=2,
    chunk_size=8, norm_num_groups=2, cema_implementation="reference", vocab_size=257,
)  # fmt: skip


TINY_TRANSFORMER = TransformerEncoderConfig(
    num_layers=1, model_dim=8, num_heads=2, ffn_hidden_dim=8, num_classes=2, chunk_size=None,
    vocab_size=258,
)  # fmt: skip


def write_images(folder: Path, count: int = 48) -> Path:
    """Images of 4 x 4 pixels whose class is the brighter half, upper or lower, in an .npz file."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 40, (count, 4, 4))
    labels = rng.integers(0, 2, count)
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 2] += 200
    path = folder / "images.npz"
    heldout = {"heldout_images": images[:16].astype(np.uint8), "heldout_labels": labels[:16]}
    np.savez(path, images=images.astype(np.uint8), labels=labels, **heldout)
    return path


def heldout_of(result: TrainResult) -> Evaluation:
    assert result.heldout is not None
    return result.heldout


def pixels_run(folder: Path, **changes) -> TrainConfig:
    settings = {
        "task": "pixels", "run_dir": str(folder / "run"), "steps": 60, "log_every": 5,
        "eval_every": 20, "eval_batches": 4, "checkpoint_every": 20, "compilation_cache": "",
        **changes,
    }  # fmt: skip
    return TrainConfig(
        model=dataclasses.replace(TINY, input="values"),
        data=DataConfig(seq_len=32, batch_size=4, num_shards=1),
        examples=ExamplesConfig(path=str(write_images(folder)), mean=0.4, std=0.4, max_documents=2,
                                classes=("upper", "lower")),
        optim=OptimConfig(lr=3e-2, schedule="constant", warmup_steps=2),
        **settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shared_compilation, short_prefetch):
    folder = tmp_path_factory.mktemp("pixels")
    config = pixels_run(folder)
    return folder, config, train(config)


def test_a_run_learns_and_logs_accuracy(trained):
    folder, _, result = trained
    heldout = heldout_of(result)
    assert heldout.accuracy is not None
    assert heldout.confusion is not None
    assert heldout.accuracy >= 0.9
    assert heldout.confusion.sum() == 16
    assert np.trace(heldout.confusion) == round(heldout.accuracy * 16)
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    accuracies = [line["heldout_accuracy"] for line in lines if "heldout_accuracy" in line]
    assert accuracies[-1] == heldout.accuracy
    report = next(line for line in lines if "input_tokens" in line)
    # Two images of 16 pixels a row.
    assert report["input_tokens"] == 5 * 4 * 2 * 16
    assert report["tokens"] == 5 * 4 * 2


def test_a_run_leaves_pictures(trained):
    folder, _, _ = trained
    curve = (folder / "run/learning_curve.svg").read_text()
    assert "heldout accuracy" in curve
    picture = (folder / "run/confusion.svg").read_text()
    assert "upper" in picture
    assert picture.count('class="cell"') == 4


def test_evaluate_and_classify(trained, capsys):
    folder, config, result = trained
    run = load_encoder(config.run_dir)
    assert evaluate_run(run).accuracy == heldout_of(result).accuracy
    picture = folder / "again.svg"
    options = ["--compilation_cache", ""]
    arguments = ["evaluate", "--checkpoint", config.run_dir, "--picture", str(picture), *options]
    assert main(arguments) == 0
    assert f"accuracy {heldout_of(result).accuracy:.2%} (16 answers" in capsys.readouterr().out
    assert picture.exists()
    with np.load(folder / "images.npz") as file:
        images, labels = file["images"][:10], file["labels"][:10]
    np.save(folder / "some.npy", images)
    found = list(classify_files(run, [folder / "some.npy"]))
    assert [prediction.name.partition("#")[2] for prediction in found] == list(map(str, range(10)))
    assert np.mean([p.label == label for p, label in zip(found, labels, strict=True)]) >= 0.9
    np.testing.assert_allclose([p.probabilities.sum() for p in found], 1, rtol=1e-5)
    some = str(folder / "some.npy")
    assert main(["classify", config.run_dir, some, "--json", "--best", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[0])["class"] in ("upper", "lower")
    assert len(lines) == 10


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(trained, tmp_path):
    config = dataclasses.replace(trained[1], run_dir=str(tmp_path / "run"))
    train(dataclasses.replace(config, steps=40))
    train(dataclasses.replace(config, resume=True))
    leaves = (
        jax.tree.leaves(nnx.state(load_encoder(path).model, nnx.Param))
        for path in (trained[1].run_dir, config.run_dir)
    )
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_loss_of_packed_rows_is_that_of_padded_ones(tmp_path):
    """The same examples, two a row or one a row: sums, confusion and gradients agree."""
    config = pixels_run(tmp_path)
    model = Encoder(config.model, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model, nnx.Param)
    task = find_task("pixels")

    def total(packing: str):
        data = dataclasses.replace(config.data, packing=packing)
        run = dataclasses.replace(config, data=data)
        _, heldout = task.open_loaders(run, ByteTokenizer(), rows=range(4), num_shards=1)

        @jax.jit
        def sums(params, batch):
            def loss(params):
                out = task.loss(nnx.merge(graphdef, params), batch, config=run)
                return out.loss_sum, out

            return jax.value_and_grad(loss, has_aux=True)(params)

        results = [
            sums(params, jax.tree.map(jnp.asarray, batch)) for batch, _ in heldout[""].with_bytes()
        ]
        return jax.tree.map(lambda *leaves: np.sum(np.stack(leaves), axis=0), *results)

    packed, padded = total("pack"), total("pad")
    assert packed[0][1].weight_sum == 16
    for a, b in zip(jax.tree.leaves(packed), jax.tree.leaves(padded), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_class_loss_by_hand():
    lacking = [np.nan, 0.0, 0.0]
    examples = [([1.0, 2.0, 0.0], 0), ([0.0, 0.0, 3.0], 2), ([1.0, 0.0, 0.0], 1)]
    (first, _), (second, _), (third, _) = examples
    scores = jnp.asarray([[first, lacking], [second, third]])
    labels, weights = jnp.asarray([[0, 0], [2, 1]]), jnp.asarray([[1.0, 0.0], [1.0, 1.0]])
    sums = class_loss(scores, labels, weights, jnp.ones((2, 5), jnp.int32))
    expected = sum(np.log(np.exp(s).sum()) - s[label] for s, label in examples)
    np.testing.assert_allclose(sums.loss_sum, expected, rtol=1e-6)
    assert (sums.weight_sum, sums.correct_sum, sums.num_tokens) == (3, 1, 10)
    np.testing.assert_array_equal(sums.confusion, [[0, 1, 0], [1, 0, 0], [0, 0, 1]])
    gradient = jax.grad(
        lambda s: class_loss(s, labels, weights, jnp.ones((2, 5), jnp.int32)).loss_sum
    )(scores)
    assert np.isfinite(gradient).all()


@pytest.mark.slow
def test_retrieval_text_and_masked_language_train(tmp_path, capsys):
    pairs = [
        {"text1": "abc" * (1 + n % 3), "text2": "xyz", "label": n % 2} for n in range(40)
    ]  # fmt: skip
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, pairs)))
    common = {
        "steps": 2, "log_every": 1, "eval_every": 0, "checkpoint_every": 0, "compilation_cache": "",
    }  # fmt: skip
    optim = OptimConfig(warmup_steps=1)
    data = DataConfig(seq_len=64, batch_size=2, heldout_fraction=0.2, num_shards=1)
    result = train(
        TrainConfig(
            model=dataclasses.replace(TINY, head="pairs"), task="retrieval", data=data,
            run_dir=str(tmp_path / "pairs"), examples=ExamplesConfig(path=str(path)), optim=optim,
            **common,
        )
    )  # fmt: skip
    assert heldout_of(result).accuracy is not None
    write_mail(tmp_path)
    result = train(
        TrainConfig(
            model=TINY, task="text", data=data, run_dir=str(tmp_path / "text"), optim=optim,
            examples=ExamplesConfig(path=str(tmp_path / "mail"), heldout_by="order"), **common,
        )
    )  # fmt: skip
    assert np.shape(heldout_of(result).confusion) == (2, 2)
    check_masked_language(tmp_path, dataclasses.replace(TINY, vocab_size=258), common, capsys)


@pytest.mark.slow
def test_a_transformer_encoder_trains_embeds_and_starts_a_classifier(tmp_path, capsys):
    common = {
        "steps": 2, "log_every": 1, "eval_every": 0, "checkpoint_every": 0, "compilation_cache": "",
    }  # fmt: skip
    write_mail(tmp_path)
    check_masked_language(tmp_path, TINY_TRANSFORMER, common, capsys)
    run = load_encoder(tmp_path / "tuned")
    assert isinstance(run.model, TransformerEncoder)
    result = evaluate_run(run)
    json_file = tmp_path / "result.json"
    arguments = ["evaluate", "--checkpoint", str(tmp_path / "tuned"), "--json", str(json_file)]
    assert main([*arguments, "--compilation_cache", ""]) == 0
    (found,) = json.loads(json_file.read_text())["results"]
    assert found["accuracy"] == result.accuracy
    assert found["count"] == result.num_tokens
    with pytest.raises(MismatchError, match="is of a transformer_encoder, the run asks for a"):
        check_same_model(TINY_TRANSFORMER, TINY, "there")


@pytest.mark.slow
def test_a_run_with_all_augmentations_resumes_and_shards(tmp_path):
    """The recipe of ImageNet: a run resumed on eight devices equals one on one device."""
    images = np.random.default_rng(0).integers(0, 256, (12, 20, 20, 3)).astype(np.uint8)
    labels = np.arange(12) % 2
    path = tmp_path / "colors.npz"
    np.savez(path, images=images, labels=labels, heldout_images=images, heldout_labels=labels)
    recipe = load_config(SHIPPED[0].with_name("imagenet.toml"))
    examples = dataclasses.replace(
        recipe.examples, tfds_name="", path=str(path), image_size=16, patch_size=4
    )
    model = dataclasses.replace(
        TINY_TRANSFORMER, input="patches", input_size=48, max_positions=16, num_layers=2,
        drop_path=0.5,
    )  # fmt: skip
    config = TrainConfig(
        model=model, task="patches", examples=examples, steps=4, log_every=1, eval_every=0,
        checkpoint_every=2, compilation_cache="", run_dir=str(tmp_path / "whole"),
        data=DataConfig(seq_len=16, batch_size=8, packing="pad", num_shards=2),
        optim=OptimConfig(warmup_steps=1, lr=1e-2),
    )  # fmt: skip
    whole = train(config)
    assert heldout_of(whole).num_tokens == 12
    resumed = dataclasses.replace(config, run_dir=str(tmp_path / "resumed"))
    train(dataclasses.replace(resumed, steps=2))
    train(dataclasses.replace(resumed, resume=True, mesh=MeshConfig(data=8)))
    losses = []
    for each in (config, resumed):
        lines = (Path(each.run_dir) / "metrics.jsonl").read_text().splitlines()
        losses.append([entry["loss"] for entry in map(json.loads, lines) if "loss" in entry])
    assert len(losses[0]) == 4
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    longer = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=25))
    with pytest.raises(ConfigError, match=r"an image has 16 tokens and data.seq_len is 25"):
        find_task("patches").open_loaders(longer, ByteTokenizer(), rows=range(8), num_shards=1)


def write_mail(folder: Path) -> None:
    for name in ("ham", "spam"):
        (folder / "mail" / name).mkdir(parents=True)
        for number in range(10):
            (folder / "mail" / name / f"{number}.txt").write_text(f"{name} {number} " * 5)


def check_masked_language(tmp_path: Path, model: AnyEncoderConfig, common, capsys) -> None:
    """Masked language modeling, vectors, and a classifier from its weights."""
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 200)
    data = DataConfig(
        seq_len=64, batch_size=2, heldout_fraction=0.2, num_shards=1, packing="pad",
        files=(str(tmp_path / "text.txt"),),
    )  # fmt: skip
    result = train(
        TrainConfig(
            model=dataclasses.replace(model, head="tokens"), task="masked_language", data=data,
            run_dir=str(tmp_path / "masked"), optim=OptimConfig(warmup_steps=1), **common,
        )
    )  # fmt: skip
    assert heldout_of(result).accuracy is not None
    assert heldout_of(result).num_tokens > 10
    check_embed(tmp_path, capsys)
    check_fresh_head(tmp_path, data, model, common)


def check_embed(tmp_path, capsys):
    """Vectors of documents are means over their own tokens, whatever the padding."""
    run = load_encoder(tmp_path / "masked")
    for number, length in enumerate((3, 300)):
        (tmp_path / f"doc{number}.txt").write_text("mat" * length)
    paths = [str(tmp_path / f"doc{number}.txt") for number in range(2)]
    vectors = list(embed_files(run, ByteTokenizer(), paths))
    assert [vector.num_tokens for vector in vectors] == [10, 901]
    ids = np.concatenate([[256], np.frombuffer(b"mat" * 300, np.uint8)]).astype(np.int32)[None]
    expected = np.mean(np.asarray(run.model.hidden(ids))[0], axis=0)
    np.testing.assert_allclose(vectors[1].values, expected, rtol=1e-3, atol=1e-4)
    output = tmp_path / "vectors.npy"
    arguments = ["embed", str(tmp_path / "masked"), *paths, "--output", str(output)]
    assert main([*arguments, "--compilation_cache", ""]) == 0
    assert "2 vectors of 8 numbers" in capsys.readouterr().out
    np.testing.assert_allclose(np.load(output)[1], vectors[1].values, rtol=1e-5)


def check_fresh_head(tmp_path, data, model, common):
    """A classifier starts from the masked language model, with a pool and head of its own."""
    data = dataclasses.replace(data, files=(), packing="pack")
    config = TrainConfig(
        model=model, task="text", data=data,
        run_dir=str(tmp_path / "tuned"), init_from=str(tmp_path / "masked"),
        examples=ExamplesConfig(path=str(tmp_path / "mail")), optim=OptimConfig(warmup_steps=1),
        **common,
    )  # fmt: skip
    weights = read_initial_weights(config.init_from, config, None)
    assert weights.changes == {"model.head": ("tokens", "classes")}
    trained = nnx.state(load_encoder(tmp_path / "masked").model, nnx.Param)
    for name in ("inputs", "layers", "final_norm"):
        pairs = zip(*map(jax.tree.leaves, (weights.params[name], trained[name])), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)
    assert weights.params["head"]["kernel"].shape == (8, 2)
    assert heldout_of(train(config)).accuracy is not None


def test_masks_hide_the_asked_fraction_of_tokens_and_no_padding():
    ids = np.ones((8, 500), np.int32)
    ids[:, 400:] = 0
    tokens = np.random.default_rng(0).integers(0, 256, (8, 500)).astype(np.int32)
    batch = Batch(tokens, tokens, ids, np.ones((8, 500), np.float32))
    hidden, chosen = (np.asarray(a) for a in mask_tokens(batch, jax.random.key(0), 0.2, 258))
    assert not chosen[:, 400:].any()
    assert chosen[:, :400].mean() == pytest.approx(0.2, abs=0.02)
    assert (hidden == tokens)[~chosen].all()
    assert (hidden[chosen] == 257).mean() == pytest.approx(0.8, abs=0.05)
    assert (hidden[chosen] == tokens[chosen]).mean() == pytest.approx(0.1, abs=0.04)


def test_settings_that_do_not_fit(tmp_path):
    with pytest.raises(ConfigError, match=r"task is 'language' and model.kind 'encoder'"):
        TrainConfig(model=TINY)
    with pytest.raises(ConfigError, match=r"head 'tokens'"):
        TrainConfig(model=TINY, task="masked_language")
    config = pixels_run(tmp_path)
    task = find_task("pixels")
    wrong = dataclasses.replace(config, model=TINY)
    with pytest.raises(ConfigError, match=r"need model.input = 'values'"):
        task.open_loaders(wrong, ByteTokenizer(), rows=range(4), num_shards=1)
    one = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=1))
    with pytest.raises(ConfigError, match="have 2 classes"):
        task.open_loaders(one, ByteTokenizer(), rows=range(4), num_shards=1)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_tasks_fit_their_models(path: Path):
    """Every shipped task names a model that takes its examples, and rows that hold them."""
    config = load_config(path)
    task = find_task(config.task)
    if config.task != "masked_language":
        task.check_model(config)
        layout = task.layout(config)
        assert layout.max_length * task.documents_per_example <= config.data.seq_len
    assert "# Data:" in path.read_text()


def test_pictures_show_their_numbers():
    curve = learning_curve({"accuracy": [(1, 0.25), (10, 0.5)]}, title="a < b")
    assert "a &lt; b" in curve
    assert "accuracy: 50.0%" in curve
    many = confusion_matrix(np.eye(30, dtype=int), (), title="x")
    assert many.count('class="cell"') == 900
