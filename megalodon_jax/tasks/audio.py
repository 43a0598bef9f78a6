"""Raw sound: the word of a recording from its samples."""

from pathlib import Path

import numpy as np

from megalodon_jax.config import AnyEncoderConfig, TrainConfig
from megalodon_jax.tasks.classification import Classification, ExampleSets, ModelNeeds
from megalodon_jax.tasks.images import tfds_heldout_split

SYNTHETIC = "synthetic"
_SYNTHETIC_TRAIN_SEED, _SYNTHETIC_HELDOUT_SEED = 1, 2


class AudioTask(Classification):
    """The class of a recording: a folder of WAV files for each class, or "synthetic" tones."""

    def example_sets(self, config: TrainConfig) -> ExampleSets:
        """Recordings, normalized by constants or by the training examples' time steps."""
        from megalodon_jax.data.example_sets.sound import SoundExamples
        from megalodon_jax.data.example_sets.texts import find_labelled_files, split_files

        settings = config.examples
        if settings.tfds_name:
            return self._tfds(config)
        if settings.path == SYNTHETIC:
            return self._synthetic(config)
        files, classes = find_labelled_files(settings.path, settings.classes, suffixes=(".wav",))
        if settings.heldout_path:
            heldout, _ = find_labelled_files(settings.heldout_path, classes, suffixes=(".wav",))
            parts = {"train": files, "heldout": heldout}
        else:
            by_order = settings.heldout_by == "order"
            parts = split_files(files, config.data.heldout_fraction, by_order=by_order)
        options = {"sample_rate": settings.sample_rate, "length": _length(config)}
        moments = (settings.mean, settings.std)
        if settings.normalize == "time":
            moments = SoundExamples(parts["train"], classes, **options).moments()
        train, heldout = (
            SoundExamples(parts[name], classes, mean=moments[0], std=moments[1], **options)
            for name in ("train", "heldout")
        )
        return ExampleSets(train, {"": heldout})

    def _synthetic(self, config: TrainConfig) -> ExampleSets:
        from megalodon_jax.data.example_sets.arrays import ArrayExamples, PixelOptions
        from megalodon_jax.data.example_sets.sound import synthetic_words

        settings, model = config.examples, config.model
        assert isinstance(model, AnyEncoderConfig)
        classes = tuple(f"word {number}" for number in range(model.num_classes))

        def draw(count: int, seed: int) -> ArrayExamples:
            data = synthetic_words(
                count,
                num_classes=model.num_classes,
                length=_length(config),
                sample_rate=settings.sample_rate,
                seed=seed + 1000 * settings.seed,
            )
            data = data._replace(arrays=data.arrays[..., None])
            options = PixelOptions(settings.mean, settings.std)
            return ArrayExamples(data, options, f"synthetic_words_{seed}", classes)

        train = draw(settings.num_train, _SYNTHETIC_TRAIN_SEED)
        return ExampleSets(train, {"": draw(settings.num_heldout, _SYNTHETIC_HELDOUT_SEED)})

    def _tfds(self, config: TrainConfig) -> ExampleSets:
        from megalodon_jax.data.example_sets.sound import fit_length
        from megalodon_jax.data.example_sets.tfds import TfdsExamples

        settings, length = config.examples, _length(config)

        def transform(samples: np.ndarray) -> np.ndarray:
            values = fit_length(np.asarray(samples, np.float32) / 32_768, length)
            return ((values - settings.mean) / settings.std).astype(np.float32)[:, None]

        splits = ("train", tfds_heldout_split(config))
        train, heldout = (
            TfdsExamples(
                settings.tfds_name, split, directory=settings.tfds_dir, transform=transform
            )
            for split in splits
        )
        return ExampleSets(train, {"": heldout})

    def needs(self, config: TrainConfig) -> ModelNeeds:
        """Real values, one a time step."""
        del config
        return ModelNeeds("values", 1)

    def read_file(self, path: Path, config: TrainConfig) -> list[tuple[np.ndarray, ...]]:
        """A WAV file; with `normalize = "time"` by the moments of the training examples."""
        from megalodon_jax.data.example_sets.sound import SoundExamples
        from megalodon_jax.data.example_sets.texts import LabelledFile

        settings = config.examples
        mean, std = settings.mean, settings.std
        if settings.normalize == "time":
            train = self.example_sets(config).train
            assert isinstance(train, SoundExamples)
            mean, std = train.normalization
        options = {"sample_rate": settings.sample_rate, "length": _length(config)}
        file = SoundExamples([LabelledFile(path.name, path, 0)], (), mean=mean, std=std, **options)
        return [file.example(0).documents]


def _length(config: TrainConfig) -> int:
    return config.examples.max_length or config.data.seq_len
