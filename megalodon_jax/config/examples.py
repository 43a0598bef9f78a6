"""Configuration of the examples of encoders: what a task reads or generates."""

from dataclasses import dataclass
from typing import Annotated, Literal

from megalodon_jax.config.checks import Rule, check
from megalodon_jax.config.ranges import Interval, LocalPath, Range, Rate, Seed, Size

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
    """Height and width to which images of a tensorflow-datasets set are cropped and resized; 0:
    they keep theirs."""
    patch_size: Interval = 0
    """Height and width of a patch (task = "patches")."""
    sample_rate: Size = 16_000
    """Samples of sound per second; files of another rate are refused."""
    mask_fraction: Rate = 0.15
    """Fraction of tokens that masked language modeling hides, 0.15 to 0.3 usually."""

    def __post_init__(self) -> None:
        check(self, "examples", RULES)
