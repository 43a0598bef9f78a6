"""Augmentations of images: exact properties of each, and their place in the order of training."""

import dataclasses
import functools

import numpy as np
import pytest

from megalodon_jax.config import DataConfig, EncoderConfig, ExamplesConfig, TrainConfig
from megalodon_jax.data import merge_states
from megalodon_jax.data.example_sets.arrays import ArrayExamples, LabelledArrays, PixelOptions
from megalodon_jax.data.example_sets.augmentation import (
    OPERATIONS,
    ImageAugmentation,
    _Draws,
    erase,
    from_pillow,
    random_crop,
    to_pillow,
)
from megalodon_jax.data.labelled import LabelledFormat
from megalodon_jax.data.labelled_loader import make_labelled_loader
from megalodon_jax.errors import ConfigError, DataError

pytest.importorskip("PIL")
RNG = np.random.default_rng(0)
COLOR = RNG.integers(0, 256, (20, 20, 3)).astype(np.uint8)
GRAY = COLOR[..., 0]
OPTIONS = PixelOptions(0.4, 0.3, patch_size=4)


def apply(name: str, image: np.ndarray, strength: float) -> np.ndarray:
    draws = _Draws(np.random.default_rng(1), fill=7)
    return from_pillow(OPERATIONS[name](to_pillow(image), strength, draws), image)


@pytest.mark.parametrize("image", [COLOR, GRAY, GRAY[..., None]], ids=["color", "gray", "1"])
def test_nothing_changes_at_strength_0(image: np.ndarray):
    augment = ImageAugmentation(OPTIONS)
    np.testing.assert_array_equal(augment(image, np.random.default_rng(0)), OPTIONS(image))
    # Three operations have no strength, and posterize keeps four bits at 0.
    without = {"auto_contrast", "equalize", "invert", "posterize"}
    for name in OPERATIONS.keys() - without:
        np.testing.assert_array_equal(apply(name, image, 0.0), image, err_msg=name)
    everything = ImageAugmentation(
        OPTIONS, flip=True, magnitude=9.0, erasing=1.0, smallest_area=0.5
    )
    everything = everything._replace(options=OPTIONS._replace(size=16))
    found = everything(image, np.random.default_rng(0))
    assert found.shape == (16, 16 * (3 if image.ndim == 3 and image.shape[2] == 3 else 1))


def test_operations_on_bytes_by_their_definitions():
    wide = COLOR.astype(int)
    np.testing.assert_array_equal(apply("invert", COLOR, 0.3), 255 - wide)
    np.testing.assert_array_equal(apply("posterize", COLOR, 0.9), wide & 0x80)
    np.testing.assert_array_equal(apply("posterize", COLOR, 0.0), wide & 0xF0)
    solarized = np.where(wide < 256 - 230, wide, 255 - wide)
    np.testing.assert_array_equal(apply("solarize", COLOR, 0.9), solarized)
    brighter = np.where(wide < 128, np.minimum(255, wide + 55), wide)
    np.testing.assert_array_equal(apply("solarize_add", COLOR, 0.5), brighter)
    by = [np.clip(wide * (1 + sign * 0.45), 0, 255) for sign in (1, -1)]
    assert min(np.abs(apply("brightness", COLOR, 0.5) - each).max() for each in by) <= 1


def test_operations_on_places_by_their_definitions():
    # 0.45 of 20 pixels are 9, to one of the two sides; the outside has the fill.
    for name, image in (("translate_x", GRAY), ("translate_y", GRAY.T)):
        moved = apply(name, np.ascontiguousarray(image), 1.0)
        moved = moved if name == "translate_x" else moved.T
        left = np.concatenate([GRAY[:, 9:], np.full((20, 9), 7)], axis=1)
        right = np.concatenate([np.full((20, 9), 7), GRAY[:, :-9]], axis=1)
        assert any(np.array_equal(moved, each) for each in (left, right))
    # Three times the largest angle is a right one.
    turned = apply("rotate", COLOR, 3.0).astype(int)
    assert min(np.abs(turned - np.rot90(COLOR, k)).max() for k in (1, -1)) <= 1
    # A shear by 0.15 moves the middle of row y by 0.15 (y + 1/2) pixels; Pillow truncates bytes.
    ramp = np.broadcast_to(np.arange(20, dtype=np.uint8) * 10, (20, 20))
    for name, image in (("shear_x", ramp), ("shear_y", ramp.T)):
        sheared = apply(name, np.ascontiguousarray(image), 0.5).astype(float)
        moved = (sheared if name == "shear_x" else sheared.T) - ramp
        expected = 10 * 0.15 * (np.arange(20) + 0.5)[:, None]
        assert min(np.abs(moved - sign * expected)[:, 5:-5].max() for sign in (1, -1)) <= 2


def test_random_crops_have_the_asked_areas():
    np.testing.assert_array_equal(random_crop(COLOR, 20, 1.0, np.random.default_rng(0)), COLOR)
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8), (200, 200))
    rng, sides = np.random.default_rng(0), []
    for _ in range(200):
        wide = np.ptp(random_crop(ramp, 50, 0.25, rng)[0].astype(int)) + 4
        tall = np.ptp(random_crop(np.ascontiguousarray(ramp.T), 50, 0.25, rng)[:, 0].astype(int))
        sides += [wide, tall + 4]
    # Sides from sqrt(area 3/4) to all of the image, and most of the crops are smaller than it.
    assert min(sides) >= 200 * np.sqrt(0.25 * 3 / 4) - 4
    assert max(sides) <= 204
    assert np.mean(sides) == pytest.approx(200 * 0.78, rel=0.05)
    # A long image: the middle, of an allowed ratio.
    long = np.zeros((30, 300), np.uint8)
    long[:, 130:170] = 200
    crop = random_crop(long, 40, 1.0, np.random.default_rng(0))
    assert crop.shape == (40, 40)
    assert (crop == 200).all()


def test_erased_rectangles_hold_noise():
    pixels = np.full((40, 40, 3), 9.0, np.float32)
    areas, noise = [], []
    for seed in range(200):
        erased = erase(pixels, np.random.default_rng(seed))
        changed = (erased != 9).all(axis=-1)
        rows, columns = changed.any(axis=1), changed.any(axis=0)
        np.testing.assert_array_equal(changed, rows[:, None] & columns)
        areas.append(changed.mean())
        noise.append(erased[changed])
    assert (pixels == 9).all()
    assert min(areas) > 0.01
    assert max(areas) < 0.36
    assert np.mean(areas) == pytest.approx(0.17, abs=0.03)
    noise = np.concatenate(noise)
    assert abs(noise.mean()) < 0.01
    assert noise.std() == pytest.approx(1, abs=0.01)
    augment = ImageAugmentation(PixelOptions(), erasing=0.25)
    plain = PixelOptions()(COLOR)
    rng = np.random.default_rng(0)
    share = np.mean([not np.array_equal(augment(COLOR, rng), plain) for _ in range(400)])
    assert share == pytest.approx(0.25, abs=0.06)


def test_half_of_the_images_are_mirrored():
    augment = ImageAugmentation(PixelOptions(), flip=True)
    rng, plain = np.random.default_rng(0), PixelOptions()
    found = [augment(COLOR, rng) for _ in range(200)]
    mirrored = [np.array_equal(each, plain(COLOR[:, ::-1])) for each in found]
    same = [np.array_equal(each, plain(COLOR)) for each in found]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert np.mean(mirrored) == pytest.approx(0.5, abs=0.1)


def loader_of(repeats: int, *, seed: int = 0, batch_size: int = 2, **settings):
    images = np.stack([np.roll(COLOR, n, axis=0) for n in range(5)])
    examples = ArrayExamples(LabelledArrays(images, np.arange(5)), OPTIONS, "images", ("",) * 5)
    augment = ImageAugmentation(OPTIONS, flip=True, magnitude=9.0, erasing=0.5)
    examples.for_training(augment, seed=seed, repeats=repeats)
    config = DataConfig(seq_len=25, batch_size=batch_size, packing="pad", **settings)
    layout = LabelledFormat(25, 1, 1, 48)
    return make_labelled_loader(examples, layout, config, rows=range(batch_size), repeat=True)


@pytest.mark.parametrize("repeats", [1, 3])
def test_a_resumed_order_has_the_same_augmentations(repeats: int):
    loader = loader_of(repeats)
    batches = [next(loader) for _ in range(9)]
    again = loader_of(repeats)
    for _ in range(4):
        next(again)
    state = merge_states([again.state_dict()])
    resumed = loader_of(repeats)
    resumed.load_state_dict(state)
    for batch in batches[4:]:
        for a, b in zip(batch, next(resumed), strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(next(loader_of(repeats, seed=1)).tokens, batches[0].tokens)
    if repeats == 1:
        return
    with pytest.raises(DataError, match="repeats"):
        loader_of(1).load_state_dict(state)


def test_repeats_follow_each_other_with_other_augmentations():
    loader = loader_of(3, batch_size=15, num_shards=1)
    for _ in range(2):
        batch = next(loader)
        labels = batch.targets[batch.weights > 0].reshape(5, 3)
        assert (labels == labels[:, :1]).all()
        assert sorted(labels[:, 0]) == list(range(5))
        assert len({row.tobytes() for row in batch.tokens}) >= 14


def test_what_is_refused():
    with pytest.raises(DataError, match="images of bytes with 1 or 3 channels, not float32"):
        to_pillow(COLOR.astype(np.float32))
    with pytest.raises(ConfigError, match=r"examples.random_crop is 0.5 with image_size 0"):
        ExamplesConfig(random_crop=0.5)
    run = functools.partial(
        TrainConfig, model=EncoderConfig(input="values"), task="pixels",
        data=DataConfig(packing="pad"),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="task 'listops' has no images to augment"):
        run(task="listops", examples=ExamplesConfig(random_flip=True))
    mixed = run(examples=ExamplesConfig(mixup=0.8))
    with pytest.raises(ConfigError, match=r"use data\.packing = 'pad'"):
        dataclasses.replace(mixed, data=DataConfig(packing="pack"))
