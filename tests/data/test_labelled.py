"""Labelled examples: generated and read sets, packing into rows, resumption."""

import dataclasses
import gzip
import json
import struct
import wave

import numpy as np
import pytest

from megalodon_jax.config import DataConfig, load_config
from megalodon_jax.data import ByteTokenizer, merge_states
from megalodon_jax.data.example_sets import arrays, listops, pathfinder, sound, texts, tfds
from megalodon_jax.data.labelled import (
    ExampleSet,
    LabelledExample,
    LabelledFormat,
    decode_example,
    encode_example,
)
from megalodon_jax.data.labelled_loader import make_labelled_loader
from megalodon_jax.data.sources import digest_of
from megalodon_jax.errors import DataError
from megalodon_jax.presets import configs_dir
from megalodon_jax.tasks import find_task


class Counting(ExampleSet):
    """Example i has i % 7 + 1 tokens i, and class i % 3; pairs have a second document."""

    def __init__(self, count: int, *, pairs: bool = False, values: bool = False):
        self.count, self.pairs, self.values = count, pairs, values

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return str(index)

    def example(self, index: int) -> LabelledExample:
        document = np.full(index % 7 + 1, index, np.int32)
        if self.values:
            document = np.stack([document, -document], axis=1).astype(np.float32)
        return LabelledExample((document,) * (1 + self.pairs), index % 3)

    def fingerprint(self) -> str:
        return digest_of(self.count)


def loader(examples, *, repeat=False, layout=LabelledFormat(20, 4, 1, 0), **data):  # noqa: B008
    config = DataConfig(**{"seq_len": 20, "batch_size": 2, **data})
    return make_labelled_loader(examples, layout, config, rows=(0, 1), repeat=repeat)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
def test_examples_survive_encoding(dtype):
    documents = (np.arange(5).astype(dtype), np.arange(6).reshape(2, 3).astype(dtype))
    found = decode_example(encode_example(LabelledExample(documents, -3)))
    assert found.label == -3
    for actual, expected in zip(found.documents, documents, strict=True):
        assert actual.dtype == dtype
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("align", [1, 4])
@pytest.mark.parametrize("kind", ["tokens", "values", "pairs"])
def test_a_pass_has_every_example_once(kind: str, align: int):
    examples = Counting(23, pairs=kind == "pairs", values=kind == "values")
    layout = LabelledFormat(7, 4, align, 2 if kind == "values" else 0)
    seen = []
    for batch in loader(examples, layout=layout):
        assert batch.tokens.shape == ((2, 20, 2) if kind == "values" else (2, 20))
        tokens = batch.tokens[..., 0] if kind == "values" else batch.tokens
        for row, ids in enumerate(batch.segment_ids):
            assert ids.max() <= 4
            for number in range(1, ids.max() + 1):
                columns = np.flatnonzero(ids == number)
                index = int(tokens[row, columns[0]])
                assert columns[0] % align == 0
                assert len(columns) == index % 7 + 1
                assert (tokens[row, columns] == index).all()
                is_last = kind != "pairs" or number % 2 == 0
                assert batch.weights[row, columns[-1]] == is_last
                if is_last:
                    assert batch.targets[row, columns[-1]] == index % 3
                    seen.append(index)
        assert batch.weights.sum() == np.count_nonzero(batch.weights)
    assert sorted(seen) == list(range(23))


def test_padded_rows_have_one_example():
    batches = list(loader(Counting(5), packing="pad"))
    assert [batch.segment_ids.max() for batch in batches] == [1, 1, 1]


def test_an_endless_loader_is_resumed_exactly():
    first = loader(Counting(50), repeat=True, shuffle_seed=3)
    for _ in range(4):
        next(first)
    state = merge_states([json.loads(json.dumps(first.state_dict()))])
    second = loader(Counting(50), repeat=True, shuffle_seed=3)
    second.load_state_dict(state)
    for _ in range(30):
        for a, b in zip(next(first), next(second), strict=True):
            np.testing.assert_array_equal(a, b)
    other = loader(Counting(49), repeat=True, shuffle_seed=3)
    with pytest.raises(DataError, match="documents was"):
        other.load_state_dict(state)
    for each in (first, second, other):
        each.close()


def test_an_example_that_fits_no_row_is_refused():
    with pytest.raises(DataError, match=r"2 documents, \d+ tokens.*row of 8 tokens"):
        next(loader(Counting(50, pairs=True), seq_len=8))
    layout = LabelledFormat(3, 4, 1, 0)
    batches = list(loader(Counting(14), layout=layout))
    assert max(np.bincount(row).max() for b in batches for row in b.tokens if row.any()) >= 3


class WithBad(Counting):
    """Every third example cannot be read."""

    def example(self, index: int) -> LabelledExample:
        if index % 3 == 0:
            raise DataError("unreadable")
        return super().example(index)


def test_bad_examples_stop_the_pass_or_are_left_out():
    with pytest.raises(DataError, match=r"unreadable.*'skip' leaves such examples out"):
        list(loader(WithBad(12)))
    reader = loader(WithBad(12), on_bad_document="skip")
    assert sum(batch.weights.sum() for batch in reader) == 8
    # The last bad example may come after the last row.
    assert reader.bad_documents in (3, 4)


def value_of(tokens: list[int]) -> int:
    """The value of a tree, by a stack; not derived from the generator."""
    stack: list = []
    for token in tokens:
        if token == 15:
            values = []
            while isinstance(stack[-1], int):
                values.append(stack.pop())
            name = stack.pop()
            results = {
                "MIN": min(values), "MAX": max(values), "MED": int(np.median(values)),
                "SM": int(np.sum(values)) % 10,
            }  # fmt: skip
            stack.append(results[name])
        elif token >= 11:
            stack.append(("MIN", "MAX", "MED", "SM")[token - 11])
        else:
            stack.append(token - 1)
    assert len(stack) == 1
    return stack[0]


def test_listops_follows_its_rules(tmp_path):
    parts = listops.open_listops(num_train=60, num_heldout=10, seed=0, cache=tmp_path)
    lengths, labels, seen = [], [], set()
    for name, part in parts.items():
        assert len(part) == (60 if name == "train" else 10)
        for index in range(len(part)):
            example = part.example(index)
            *tokens, end = example.documents[0].tolist()
            assert end == listops.EOS
            assert example.label == value_of(tokens)
            lengths.append(len(tokens))
            labels.append(example.label)
            seen.add(tuple(tokens))
    assert len(seen) == 80
    assert min(lengths) > 500
    assert max(lengths) < 2000
    assert 800 < np.mean(lengths) < 1300
    again = listops.open_listops(num_train=60, num_heldout=10, seed=0, cache=tmp_path)
    np.testing.assert_array_equal(
        again["test"].example(3).documents[0], parts["test"].example(3).documents[0]
    )
    assert len(list(tmp_path.iterdir())) == 1
    fresh = listops.open_listops(num_train=60, num_heldout=10, seed=0, cache=None)
    assert fresh["train"].fingerprint() == parts["train"].fingerprint()
    other = listops.open_listops(num_train=60, num_heldout=10, seed=1, cache=None)
    assert other["train"].fingerprint() != parts["train"].fingerprint()


def write_idx(path, array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def test_idx_images_as_pixels_and_patches(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 4, 6)).astype(np.uint8)
    files = {"train-images-idx3-ubyte": images, "train-labels-idx1-ubyte": np.array([2, 0, 1])}
    for name, array in files.items():
        write_idx(tmp_path / f"{name}.gz", array)
    data, _ = arrays.read_images(str(tmp_path), "train")
    np.testing.assert_array_equal(data.arrays, images)
    pixels = arrays.PixelOptions(0.48, 0.24)(images[1])
    np.testing.assert_allclose(pixels[:, 0], ((images[1] / 255 - 0.48) / 0.24).ravel(), rtol=1e-5)
    patches = arrays.PixelOptions(patch_size=2)(images[1])
    assert patches.shape == (6, 4)
    np.testing.assert_allclose(patches[4], images[1, 2:4, 2:4].ravel() / 255, rtol=1e-6)
    gray = arrays.PixelOptions(gray=True)(np.stack([images[0]] * 2 + [images[1]], axis=-1))
    expected = (2.0 * images[0] + images[1]) / 3 / 255
    np.testing.assert_allclose(gray[:, 0], expected.ravel(), rtol=1e-5)
    with pytest.raises(DataError, match="4 x 6 pixels does not divide into patches of 4"):
        arrays.PixelOptions(patch_size=4)(images[0])
    with pytest.raises(DataError, match="has no t10k-images"):
        arrays.read_images(str(tmp_path), "heldout")
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(b"no")
    with pytest.raises(DataError, match="cannot read"):
        arrays.read_images(str(tmp_path), "train")
    with pytest.raises(DataError, match="dataset-fashion-mnist"):
        arrays.read_images(str(tmp_path / "nowhere"), "train")


def test_digits_hold_out_a_part():
    pytest.importorskip("sklearn")
    train, _ = arrays.read_images("digits", "train")
    heldout, _ = arrays.read_images("digits", "heldout")
    assert (len(train.labels), len(heldout.labels)) == (1437, 360)
    assert train.arrays.max() == 1.0


def test_folders_of_texts(tmp_path):
    for folder, count in (("easy_ham", 8), ("hard_ham", 4), ("spam_2", 5)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            (tmp_path / folder / f"{number:03d}.txt").write_bytes(b"\xff" + folder.encode())
    files, names = texts.find_labelled_files(str(tmp_path), ("ham", "spam"))
    assert names == ("ham", "spam")
    assert [file.label for file in files] == [0] * 12 + [1] * 5
    examples = texts.TextExamples(files, names)
    assert examples.example(0).documents[0].tolist() == [255, *b"easy_ham", texts.EOS]
    parts = texts.split_files(files, 0.25, by_order=True)
    assert [file.name for file in parts["heldout"]] == [
        "easy_ham/006.txt", "easy_ham/007.txt", "hard_ham/003.txt", "spam_2/004.txt",
    ]  # fmt: skip
    assert texts.find_labelled_files(str(tmp_path), ())[1] == ("easy_ham", "hard_ham", "spam_2")
    with pytest.raises(DataError, match="easy_ham belongs to 0 of the classes news"):
        texts.find_labelled_files(str(tmp_path), ("news",))
    with pytest.raises(DataError, match="has no folders"):
        texts.find_labelled_files(str(tmp_path / "spam_2"), ())


def test_lines_of_texts_and_pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = [{"text1": "ab", "text2": "c", "label": n % 2} for n in range(4)]
    path.write_text("\n".join(map(json.dumps, lines)))
    files, names = texts.read_labelled_lines(str(path), (), fields=("text1", "text2"))
    example = texts.TextExamples(files, names).example(1)
    assert [d.tolist() for d in example.documents] == [[97, 98, 256], [99, 256]]
    assert (example.label, names) == (1, ("0", "1"))
    with pytest.raises(DataError, match="line 1: needs text, label"):
        texts.read_labelled_lines(str(path), (), fields=("text",))


def write_wav(path, samples, rate=8000):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())


def test_wav_files_and_their_moments(tmp_path):
    rng = np.random.default_rng(0)
    waves = rng.uniform(-0.9, 0.9, (6, 50))
    for number, samples in enumerate(waves):
        folder = tmp_path / ("yes" if number % 2 else "no")
        folder.mkdir(exist_ok=True)
        write_wav(folder / f"{number}.wav", samples[: 50 - number])
    files, classes = texts.find_labelled_files(str(tmp_path), (), suffixes=(".wav",))
    options = {"sample_rate": 8000, "length": 48}
    mean, std = sound.SoundExamples(files, classes, **options).moments()
    examples = sound.SoundExamples(files, classes, mean=mean, std=std, **options)
    values = np.stack([examples.example(i).documents[0][:, 0] for i in range(6)])
    np.testing.assert_allclose(values.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(values.std(axis=0), 1, atol=1e-3)
    with pytest.raises(DataError, match="8000 samples a second"):
        sound.read_wav(files[0].path, 16_000)
    words = sound.synthetic_words(20, num_classes=4, length=400, sample_rate=8000, seed=1)
    assert words.arrays.shape == (20, 400)
    assert set(words.labels) <= {0, 1, 2, 3}


def test_pathfinder_of_a_file_and_a_folder(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 4)).astype(np.uint8)
    labels = np.arange(20) % 2
    np.savez(tmp_path / "path.npz", images=images, labels=labels)
    parts = pathfinder.open_pathfinder(str(tmp_path / "path.npz"), arrays.PixelOptions(0.5, 0.5))
    assert {name: len(part) for name, part in parts.items()} == {"train": 16, "valid": 2, "test": 2}
    documents = (part.example(i).documents[0] for part in parts.values() for i in range(len(part)))
    firsts = {document.tobytes() for document in documents}
    assert len(firsts) == 20
    with pytest.raises(DataError, match="no metadata"):
        pathfinder.open_pathfinder(str(tmp_path), arrays.PixelOptions())


def write_pathfinder_level(folder, count: int = 24, per_list: int = 2) -> np.ndarray:
    """A level in Long Range Arena's layout; image n has its first pixel n, and class n % 2."""
    Image = pytest.importorskip("PIL.Image")
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32)).astype(np.uint8)
    images[:, 0, 0] = np.arange(count)
    (folder / "metadata").mkdir(parents=True)
    for number in range(count // per_list):
        (folder / f"imgs/{number}").mkdir(parents=True)
        lines = []
        for n in range(number * per_list, (number + 1) * per_list):
            Image.fromarray(images[n]).save(folder / f"imgs/{number}/sample_{n}.png")
            # Folder, image, number of the image, class, and the generator's settings.
            lines.append(f"imgs/{number} sample_{n}.png {n} {n % 2} 0 0.4 3 8 3 1 6 1.0")
        (folder / f"metadata/{number}.npy").write_text("\n".join(lines) + "\n")
    return images


def test_pathfinder_in_the_layout_of_long_range_arena(tmp_path):
    """Read through the shipped run: every image once in one of the parts, with its own class."""
    config = load_config(configs_dir() / "tasks/pathfinder.toml")
    folder = tmp_path / "pathfinder32/curv_baseline"
    images = write_pathfinder_level(folder)
    # The file of the release that is empty.
    (folder / "imgs/0/sample_172.png").touch()
    with (folder / "metadata/0.npy").open("a") as listed:
        listed.write("imgs/0 sample_172.png 172 1 0 0.4\n")
    seen = []
    for split in ("valid", "test"):
        settings = dataclasses.replace(
            config.examples, path=str(folder), heldout_split=split, max_documents=1
        )
        sets = find_task("pathfinder").example_sets(dataclasses.replace(config, examples=settings))
        parts = [sets.train, sets.heldout[""]] if split == "valid" else [sets.heldout[""]]
        for part in parts:
            assert part.classes == ("apart", "connected")
            for index in range(len(part)):
                (document,), label = part.example(index)
                pixels = np.round((document[:, 0] * 0.5 + 0.5) * 255).astype(int)
                number = pixels[0]
                np.testing.assert_array_equal(pixels, images[number].reshape(-1))
                assert label == number % 2
                assert part.name(index).endswith(f"/{number // 2}/sample_{number}.png")
                seen.append(number)
    assert sorted(seen) == list(range(24))
    settings = dataclasses.replace(config.examples, path=str(folder))
    data = dataclasses.replace(config.data, batch_size=4)
    run = dataclasses.replace(config, examples=settings, data=data)
    training, heldout = find_task("pathfinder").open_loaders(
        run, ByteTokenizer(), rows=range(4), num_shards=1
    )
    batch = next(training)
    assert batch.tokens.shape == (4, 1024, 1)
    np.testing.assert_array_equal(batch.weights.sum(axis=1), 1)
    assert sum(int(batch.weights.sum()) for batch, _ in heldout[""].with_bytes()) == 2
    training.close()
    (folder / "metadata/3.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match=r"3\.npy cannot be read as lines of text"):
        pathfinder.open_pathfinder(str(folder), arrays.PixelOptions())


def test_images_are_cropped_to_a_square_and_averaged():
    image = np.zeros((4, 8, 1), np.uint8)
    image[:2, 2:4], image[2:, 4:6] = 100, 40
    np.testing.assert_array_equal(arrays.crop_and_resize(image, 2)[..., 0], [[100, 0], [0, 40]])
    assert arrays.crop_and_resize(np.full((5, 7, 3), 9, np.uint8), 3).shape == (3, 3, 3)
    with pytest.raises(DataError, match="use one of cifar10"):
        tfds.TfdsExamples("mnist", "train", directory="", transform=np.asarray)
