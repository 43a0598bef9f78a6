"""Configuration of the examples of encoders: what a task reads or generates."""

from dataclasses import dataclass
from typing import Annotated, Literal

from megalodon_jax.config.checks import Rule, check
from megalodon_jax.config.ranges import (
    Interval,
    LocalPath,
    Range,
    Rate,
    Ratio,
    Seed,
    Size,
    Weight,
)

# Value of `cache`: the cache directory of the user.
USER_CACHE = "user"

RULES = (
    Rule(
        lambda c: c.std > 0.0,
        "examples.std is {c.std}; values are divided by it: use a number above 0",
    ),
    Rule(
        lambda c: not (c.tfds_name and c.path),
        "examples.tfds_name and examples.path are both set; the examples come from one of them",
    ),
    Rule(
        lambda c: not c.random_crop or c.image_size > 0,
        "examples.random_crop is {c.random_crop} with image_size 0; set examples.image_size, to "
        "which crops are resized",
    ),
)


@dataclass(frozen=True, kw_only=True)
class ExamplesConfig:
    """The examples of a task of an encoder; a task reads the settings that its data has."""

    path: LocalPath = ""
    """Folder or file of the examples, as the task describes; "digits": the 8 x 8 digits inside
    scikit-learn; "synthetic": generated tones (task = "audio")."""
    heldout_path: LocalPath = ""
    """Folder or file of the held-out examples; empty: those that the data set holds out itself, or
    a part of `path`."""
    heldout_by: Literal["hash", "order"] = "hash"
    """Part of `path` that is held out, of `data.heldout_fraction`: by a hash of the names, or the
    last names of every class, which are the latest e-mails of a folder in order of time."""
    heldout_split: Literal["valid", "test"] = "valid"
    """Held-out part of data with both: for decisions, or for the final result."""
    tfds_name: str = ""
    """Prepared tensorflow-datasets set in place of `path`: cifar10, imagenet2012, speech_commands,
    imdb_reviews; nothing is downloaded."""
    tfds_dir: LocalPath = ""
    """Directory of prepared tensorflow-datasets sets; empty: the library's own."""
    classes: tuple[str, ...] = ()
    """Names of the classes in the order of their numbers; a folder belongs to the class whose name
    its own name contains. Empty: every folder, or label of a file, is a class, in sorted order."""
    max_length: Interval = 0
    """Most tokens of a document, whose rest is left out; 0: those of a row, or half for pairs."""
    max_documents: Size = 8
    """Most documents that are packed into a row (`data.packing = "pack"`)."""
    num_train: Size = 96_000
    """Generated training examples."""
    num_heldout: Size = 2_000
    """Generated examples of each held-out part."""
    seed: Seed = 0
    """Seed of generated examples."""
    cache: LocalPath = USER_CACHE
    """Directory in which generated examples are kept; `user`: $XDG_CACHE_HOME/megalodon, by default
    in ~/.cache; empty: none, they are generated at every start."""
    mean: Annotated[float, Range()] = 0.0
    """Subtracted from values in [0, 1] (pixels) or [-1, 1] (sound)."""
    std: Annotated[float, Range()] = 1.0
    """Divides the values after that."""
    normalize: Literal["constant", "time"] = "constant"
    """Values minus `mean` over `std`, or minus the mean and over the deviation of each time step in
    the training examples."""
    gray: bool = False
    """Mean of the colors of an image, as in Long Range Arena."""
    image_size: Interval = 0
    """Height and width to which images are cropped and resized; 0: they keep theirs."""
    center_crop: Annotated[float, Range(low=0.0, high=1.0, open_low=True)] = 1.0
    """Side of the square in the middle of an image that is resized, as a fraction of the image's
    shorter side."""
    random_crop: Ratio = 0.0
    """Smallest area of the random crops of training images, as a fraction of the image; 0: no
    random crops. Their aspect ratios are 3/4 to 4/3."""
    random_flip: bool = False
    """Mirror half of the training images, left to right."""
    rand_augment: Annotated[float, Range(low=0.0, high=10.0)] = 0.0
    """Magnitude of RandAugment (Cubuk et al. 2020), two random operations on each training image;
    0: none."""
    rand_augment_std: Weight = 0.5
    """Standard deviation of that magnitude, which is drawn for each operation."""
    random_erasing: Ratio = 0.0
    """Probability that a rectangle of a training image becomes noise."""
    mixup: Weight = 0.0
    """Alpha of mixup (Zhang et al. 2018): images are averages of two, by a weight from Beta(alpha,
    alpha); 0: none. With cutmix each batch has one of the two."""
    cutmix: Weight = 0.0
    """Alpha of cutmix (Yun et al. 2019): a rectangle of an image is that of another; 0: none."""
    label_smoothing: Rate = 0.0
    """Probability that training spreads evenly over all classes."""
    repeats: Size = 1
    """Times that a training example follows itself, each time with other augmentations (repeated
    augmentation, Hoffer et al. 2020)."""
    patch_size: Interval = 0
    """Height and width of a patch (task = "patches")."""
    sample_rate: Size = 16_000
    """Samples of sound per second; files of another rate are refused."""
    mask_fraction: Rate = 0.15
    """Fraction of tokens that masked language modeling hides, 0.15 to 0.3 usually."""

    @property
    def is_augmented(self) -> bool:
        """Whether training images are changed at random before they become tokens."""
        chosen = (self.random_crop, self.random_flip, self.rand_augment, self.random_erasing)
        return any(chosen)

    @property
    def is_mixed(self) -> bool:
        """Whether training images are mixed with others of their batch."""
        return bool(self.mixup or self.cutmix)

    def __post_init__(self) -> None:
        check(self, "examples", RULES)
