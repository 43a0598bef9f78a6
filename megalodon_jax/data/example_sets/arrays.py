"""Examples in memory: images and their classes, as pixels in raster order or as patches."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megalodon_jax.data.labelled import ExampleSet, LabelledExample
from megalodon_jax.data.sources import digest_of
from megalodon_jax.errors import DataError

# Where Debian's package dataset-fashion-mnist has its files.
DEBIAN_FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip
_IDX = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "heldout": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}

Transform = Callable[[np.ndarray], np.ndarray]


class LabelledArrays(NamedTuple):
    """Arrays (n, ...) and the numbers of their classes (n,)."""

    arrays: np.ndarray
    labels: np.ndarray


class ArrayExamples(ExampleSet):
    """Examples whose document is made of an array by `transform`."""

    def __init__(
        self, data: LabelledArrays, transform: Transform, name: str, classes: tuple[str, ...]
    ):
        if len(data.arrays) != len(data.labels):
            raise DataError(
                f"{name} has {len(data.arrays)} arrays and {len(data.labels)} labels; give one "
                "label for every array"
            )
        self._data, self._transform, self._name = data, transform, name
        self.classes = classes

    def __len__(self) -> int:
        return len(self._data.labels)

    def name(self, index: int) -> str:
        return f"{self._name}#{index}"

    def example(self, index: int) -> LabelledExample:
        document = self._transform(self._data.arrays[index])
        return LabelledExample((document,), int(self._data.labels[index]))

    def fingerprint(self) -> str:
        first = np.ascontiguousarray(self._data.arrays[:1]).tobytes()
        return digest_of(self._name, len(self), self._data.arrays.shape, first)


class PixelOptions(NamedTuple):
    """How an image becomes a document.

    Attributes:
      mean: subtracted from pixels in [0, 1].
      std: divides them after that.
      gray: the mean of the colors takes their place.
      patch_size: height and width of a patch; 0: a token is a pixel.
    """

    mean: float = 0.0
    std: float = 1.0
    gray: bool = False
    patch_size: int = 0

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """The document (tokens, numbers of a token) of an image (h, w) or (h, w, c).

        Raises:
          DataError: patches do not cover the image.
        """
        pixels = image[..., None] if image.ndim == 2 else image
        pixels = pixels.astype(np.float32) / 255 if pixels.dtype == np.uint8 else pixels
        if self.gray:
            pixels = pixels.mean(axis=-1, keepdims=True)
        pixels = ((pixels - self.mean) / self.std).astype(np.float32)
        if not self.patch_size:
            return pixels.reshape(-1, pixels.shape[-1])
        P, (h, w, c) = self.patch_size, pixels.shape
        if h % P or w % P:
            raise DataError(
                f"an image of {h} x {w} pixels does not divide into patches of {P} x {P}; set "
                "examples.patch_size or examples.image_size"
            )
        patches = pixels.reshape(h // P, P, w // P, P, c).swapaxes(1, 2)
        return np.ascontiguousarray(patches.reshape(-1, P * P * c))


def read_images(path: str, split: str) -> tuple[LabelledArrays, tuple[str, ...]]:
    """Images of a split, and the names of their classes.

    Args:
      split: "train" or "heldout".
      path: a folder with the four IDX files of MNIST or Fashion-MNIST, also .gz; an .npz file with
        `images` and `labels` (and `heldout_images`, `heldout_labels`); "digits".

    Raises:
      DataError: the files are missing or malformed.
    """
    if path == "digits":
        return _digits(split), tuple("0123456789")
    found = Path(path)
    if found.suffix == ".npz":
        return _npz(found, split), ()
    if not found.is_dir():
        raise DataError(
            f"{path or 'examples.path'} is no folder of IDX files and no .npz file; Debian's "
            f"package dataset-fashion-mnist has them in {DEBIAN_FASHION_MNIST}"
        )
    images, labels = (read_idx(found, name) for name in _IDX[split])
    classes = FASHION_CLASSES if "fashion" in str(found.resolve()).lower() else ()
    return LabelledArrays(images, labels), classes


def read_idx(folder: Path, name: str) -> np.ndarray:
    """The array of an IDX file of bytes, also compressed by gzip.

    Raises:
      DataError: it is missing or malformed.
    """
    for path in (folder / name, folder / f"{name}.gz"):
        if not path.exists():
            continue
        try:
            content = path.read_bytes()
            content = gzip.decompress(content) if path.suffix == ".gz" else content
            zero, kind, rank = struct.unpack_from(">HBB", content)
            shape = struct.unpack_from(f">{rank}I", content, 4)
            array = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
            if zero or kind != 8 or array.size != np.prod(shape):
                raise ValueError("not an IDX file of bytes")
        except (OSError, EOFError, struct.error, ValueError) as error:
            raise DataError(f"cannot read {path}: {error}") from error
        return array.reshape(shape)
    raise DataError(f"{folder} has no {name} and no {name}.gz")


def _digits(split: str) -> LabelledArrays:
    """The 8 x 8 digits inside scikit-learn; the last fifth is held out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            'examples.path is "digits", which come with scikit-learn: pip install scikit-learn'
        ) from error
    digits = load_digits()
    images, labels = digits.images / 16.0, digits.target  # pyright: ignore[reportAttributeAccessIssue]
    cut = len(labels) * 4 // 5
    part = slice(0, cut) if split == "train" else slice(cut, None)
    return LabelledArrays(images[part].astype(np.float32), labels[part])


def _npz(path: Path, split: str) -> LabelledArrays:
    prefix = "" if split == "train" else "heldout_"
    names = (f"{prefix}images", f"{prefix}labels")
    try:
        with np.load(path) as file:
            return LabelledArrays(*(file[name] for name in names))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"cannot read {names[0]} and {names[1]} from {path}: {error}") from error
