"""Images as pixels in raster order or as patches, and Pathfinder."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megalodon_jax.config import TrainConfig
from megalodon_jax.errors import DataError
from megalodon_jax.tasks.classification import (
    Classification,
    ExampleSets,
    ModelNeeds,
    heldout_part,
)

if TYPE_CHECKING:
    from megalodon_jax.data.example_sets.arrays import PixelOptions, TransformedExamples


class PixelsTask(Classification):
    """The class of an image from its pixels, a row of real values.

    `examples.path` is what `data.example_sets.arrays.read_images` takes, or `tfds_name` a set of
    images.
    """

    def example_sets(self, config: TrainConfig) -> ExampleSets:
        """The images of training, and those that the set holds out."""
        from megalodon_jax.data.example_sets.arrays import ArrayExamples, read_images

        if config.examples.tfds_name:
            return _tfds_images(config, self.options(config))

        def open_split(split: str) -> ArrayExamples:
            data, classes = read_images(config.examples.path, split)
            name = f"{Path(config.examples.path).name}/{split}"
            return ArrayExamples(
                data, self.options(config), name, config.examples.classes or classes
            )

        train = _for_training(open_split("train"), config, self.options(config))
        return ExampleSets(train, {"": open_split("heldout")})

    def options(self, config: TrainConfig) -> "PixelOptions":
        """How an image becomes a document."""
        from megalodon_jax.data.example_sets.arrays import PixelOptions

        settings = config.examples
        return PixelOptions(
            settings.mean,
            settings.std,
            settings.gray,
            size=settings.image_size,
            center_crop=settings.center_crop,
        )

    def needs(self, config: TrainConfig) -> ModelNeeds:
        """Real values; one of a pixel unless a set of colors is read as it is."""
        model: Any = config.model
        colors = 1 if config.examples.gray else model.input_size
        return ModelNeeds("values", colors)

    def class_names(self, config: TrainConfig) -> tuple[str, ...]:
        """Those of the settings, of Fashion-MNIST, or numbers."""
        from megalodon_jax.data.example_sets.arrays import FASHION_CLASSES

        if not config.examples.classes and "fashion" in config.examples.path.lower():
            return FASHION_CLASSES
        return super().class_names(config)

    def read_file(self, path: Path, config: TrainConfig) -> list[tuple[np.ndarray, ...]]:
        """The images of an .npy file (n, h, w) or (n, h, w, c), or of an IDX file."""
        from megalodon_jax.data.example_sets.arrays import read_idx

        if path.suffix == ".npy":
            try:
                images = np.load(path)
            except (OSError, ValueError) as error:
                raise DataError(f"cannot read {path}: {error}") from error
        else:
            images = read_idx(path.parent, path.name.removesuffix(".gz"))
        if images.ndim not in (3, 4):
            raise DataError(f"{path} has shape {images.shape}; needs (n, h, w) or (n, h, w, c)")
        options = self.options(config)
        return [(options(image),) for image in images]


class PatchesTask(PixelsTask):
    """The class of an image from patches of `examples.patch_size` pixels a side."""

    def options(self, config: TrainConfig) -> "PixelOptions":
        """How an image becomes a document."""
        return super().options(config)._replace(patch_size=config.examples.patch_size or 1)

    def needs(self, config: TrainConfig) -> ModelNeeds:
        """Patches of one color, or of as many as the model takes."""
        model: Any = config.model
        pixels = (config.examples.patch_size or 1) ** 2
        colors = 1 if config.examples.gray else max(1, model.input_size // pixels)
        return ModelNeeds("patches", pixels * colors)


class PathfinderTask(PixelsTask):
    """Whether a path connects two dots, from the pixels of local files."""

    def example_sets(self, config: TrainConfig) -> ExampleSets:
        """80 % of the images; of the rest `examples.heldout_split`."""
        from megalodon_jax.data.example_sets.pathfinder import open_pathfinder

        parts = open_pathfinder(config.examples.path, self.options(config))
        return ExampleSets(parts["train"], {"": heldout_part(parts, config)})

    def needs(self, config: TrainConfig) -> ModelNeeds:
        """Real values of gray pixels, two classes."""
        del config
        return ModelNeeds("values", 1, 2)


def _tfds_images(config: TrainConfig, options: "PixelOptions") -> ExampleSets:
    from megalodon_jax.data.example_sets.tfds import TfdsExamples

    settings = config.examples

    def open_split(split: str) -> TfdsExamples:
        return TfdsExamples(
            settings.tfds_name, split, directory=settings.tfds_dir, transform=options
        )

    train = _for_training(open_split("train"), config, options)
    return ExampleSets(train, {"": open_split(tfds_heldout_split(config))})


def _for_training(
    examples: "TransformedExamples", config: TrainConfig, options: "PixelOptions"
) -> "TransformedExamples":
    """The examples with the augmentations of the settings, in the order of the run's seed."""
    from megalodon_jax.data.example_sets.augmentation import ImageAugmentation

    settings, augment = config.examples, None
    if settings.is_augmented:
        augment = ImageAugmentation(
            options,
            smallest_area=settings.random_crop,
            flip=settings.random_flip,
            magnitude=settings.rand_augment,
            magnitude_std=settings.rand_augment_std,
            erasing=settings.random_erasing,
        )
    seed = config.data.shuffle_seed
    return examples.for_training(augment, seed=seed, repeats=settings.repeats)


def tfds_heldout_split(config: TrainConfig) -> str:
    """The split of a tensorflow-datasets set that the run holds out.

    Raises:
      DataError: the set is not known.
    """
    from megalodon_jax.data.example_sets.tfds import HELDOUT_SPLITS

    name = config.examples.tfds_name.partition("/")[0].partition(":")[0]
    if name not in HELDOUT_SPLITS:
        raise DataError(f"examples.tfds_name is {name!r}; use one of {', '.join(HELDOUT_SPLITS)}")
    valid, test = HELDOUT_SPLITS[name]
    return valid if config.examples.heldout_split == "valid" else test
