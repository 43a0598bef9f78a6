"""Raw sound: folders of WAV files, and synthetic words of tones for tests."""

import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megalodon_jax.data.example_sets.arrays import LabelledArrays
from megalodon_jax.data.example_sets.texts import LabelledFile
from megalodon_jax.data.labelled import ExampleSet, LabelledExample
from megalodon_jax.data.sources import digest_of
from megalodon_jax.errors import DataError


class SoundExamples(ExampleSet):
    """Samples of WAV files, normalized.

    Args:
      files: the files.
      classes: names of the classes.
      sample_rate: of all files.
      length: samples of a document; longer files lose their end, shorter ones end with silence.
      mean: subtracted from samples in [-1, 1], a number or one of every time step.
      std: divides them after that.
    """

    def __init__(
        self,
        files: Sequence[LabelledFile],
        classes: tuple[str, ...],
        *,
        sample_rate: int,
        length: int,
        mean: float | np.ndarray = 0.0,
        std: float | np.ndarray = 1.0,
    ):
        self._files, self.classes = files, classes
        self._sample_rate, self._length = sample_rate, length
        self._mean, self._std = mean, std

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return self._files[index].name

    def example(self, index: int) -> LabelledExample:
        file = self._files[index]
        samples = fit_length(read_wav(file.path, self._sample_rate), self._length)
        values = (samples - self._mean) / self._std
        return LabelledExample((values.astype(np.float32)[:, None],), file.label)

    def fingerprint(self) -> str:
        return digest_of(*((file.name, file.label) for file in self._files), self._length)

    @property
    def normalization(self) -> tuple[float | np.ndarray, float | np.ndarray]:
        """Mean and deviation by which samples are normalized."""
        return self._mean, self._std

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of every time step over all files; at least 1e-5."""
        total = square = np.zeros(self._length, np.float64)
        for file in self._files:
            samples = fit_length(read_wav(file.path, self._sample_rate), self._length)
            total, square = total + samples, square + samples.astype(np.float64) ** 2
        mean = total / len(self._files)
        variance = np.maximum(square / len(self._files) - mean**2, 1e-10)
        return mean, np.sqrt(variance)


def read_wav(path: Path, sample_rate: int) -> np.ndarray:
    """Samples in [-1, 1] of a WAV file of 8 or 16 bits; the mean of its channels.

    Raises:
      DataError: it cannot be read, or has another rate or form.
    """
    try:
        with wave.open(str(path)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            content = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if rate != sample_rate or width not in (1, 2):
        raise DataError(
            f"{path} has {rate} samples a second of {8 * width} bits; needs {sample_rate} of 8 or "
            "16: convert it, or set examples.sample_rate"
        )
    if width == 2:
        samples = np.frombuffer(content, "<i2").astype(np.float32) / 32_768
    else:
        samples = (np.frombuffer(content, np.uint8).astype(np.float32) - 128) / 128
    return samples.reshape(-1, channels).mean(axis=1)


def fit_length(samples: np.ndarray, length: int) -> np.ndarray:
    """The first `length` samples, with silence behind them."""
    return np.pad(samples[:length], (0, max(0, length - len(samples))))


def synthetic_words(
    count: int, *, num_classes: int, length: int, sample_rate: int, seed: int
) -> LabelledArrays:
    """Words of three tones, one order of pitches for each class, with noise and a random start.

    They test the path of raw sound; they are no speech.
    """
    rng = np.random.default_rng(seed)
    pitches = np.random.default_rng(0).permuted(
        np.tile(np.geomspace(200, 1600, 3), (num_classes, 1)), axis=1
    ) * np.linspace(1, 1.3, num_classes)[:, None]  # fmt: skip
    labels = rng.integers(0, num_classes, count)
    sounds = np.zeros((count, length), np.float32)
    tone = length // 4
    for sound, label in zip(sounds, labels, strict=True):
        start = rng.integers(0, length - 3 * tone + 1)
        time = np.arange(tone) / sample_rate
        speed, loudness = rng.uniform(0.97, 1.03), rng.uniform(0.2, 0.8)
        for part, pitch in enumerate(pitches[label]):
            place = slice(start + part * tone, start + (part + 1) * tone)
            wave_form = np.sin(2 * np.pi * pitch * speed * time + rng.uniform(0, 6))
            sound[place] = loudness * wave_form * np.hanning(tone)
        sound += rng.normal(0, 0.02, length)
    return LabelledArrays(sounds, labels)
