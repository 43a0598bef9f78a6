"""Examples in memory: images and their classes, as pixels in raster order or as patches."""

import gzip
import struct
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from megalodon_jax.data.contents import Content, MemoryContent
from megalodon_jax.data.labelled import ExampleSet, LabelledExample, encode_example
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
Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]


class LabelledArrays(NamedTuple):
    """Arrays (n, ...) and the numbers of their classes (n,)."""

    arrays: np.ndarray
    labels: np.ndarray


class TransformedExamples(ExampleSet):
    """Examples whose document is made of an array by `transform`; training may augment them."""

    def __init__(self, transform: Transform):
        self._transform = transform
        self._augment: Augment | None = None
        self._seed, self._repeats = 0, 1

    @abstractmethod
    def array(self, index: int) -> tuple[np.ndarray, int]:
        """The array of an example, and its class.

        Raises:
          DataError: it cannot be read.
        """

    def for_training(self, augment: Augment | None, *, seed: int, repeats: int) -> Self:
        """Makes documents in the order of training by `augment`; returns this set.

        Args:
          augment: from an array and a generator to a document, in place of `transform`; None: no
            augmentation.
          seed: the generator of a place in the order is that of the seed and the place's number.
          repeats: times that an example follows itself.
        """
        self._augment, self._seed, self._repeats = augment, seed, repeats
        return self

    @property
    def repeats(self) -> int:
        """Times that an example follows itself in the order of training."""
        return self._repeats

    def example(self, index: int) -> LabelledExample:
        array, label = self.array(index)
        return LabelledExample((self._transform(array),), label)

    def open_visit(self, index: int, visit: int) -> Content:
        """The example with the augmentations of its place in the order of training."""
        if self._augment is None:
            return self.open(index)
        array, label = self.array(index)
        document = self._augment(array, np.random.default_rng((self._seed, visit)))
        return MemoryContent(encode_example(LabelledExample((document,), label)))


class ArrayExamples(TransformedExamples):
    """Examples of arrays in memory."""

    def __init__(
        self, data: LabelledArrays, transform: Transform, name: str, classes: tuple[str, ...]
    ):
        super().__init__(transform)
        if len(data.arrays) != len(data.labels):
            raise DataError(
                f"{name} has {len(data.arrays)} arrays and {len(data.labels)} labels; give one "
                "label for every array"
            )
        self._data, self._name = data, name
        self.classes = classes

    def __len__(self) -> int:
        return len(self._data.labels)

    def name(self, index: int) -> str:
        return f"{self._name}#{index}"

    def array(self, index: int) -> tuple[np.ndarray, int]:
        return self._data.arrays[index], int(self._data.labels[index])

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
      size: height and width to which a square in the middle is resized; 0: images keep theirs.
      center_crop: side of that square, as a fraction of the shorter side.
    """

    mean: float = 0.0
    std: float = 1.0
    gray: bool = False
    patch_size: int = 0
    size: int = 0
    center_crop: float = 1.0

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """The document (tokens, numbers of a token) of an image (h, w) or (h, w, c).

        Raises:
          DataError: patches do not cover the image.
        """
        return self.tokens(self.normalize(self.resize(image)))

    def resize(self, image: np.ndarray) -> np.ndarray:
        """The image in the size of all."""
        if not self.size:
            return image
        return crop_and_resize(image, self.size, fraction=self.center_crop)

    def normalize(self, image: np.ndarray) -> np.ndarray:
        """The normalized pixels (h, w, c) of an image, in float32."""
        pixels = image[..., None] if image.ndim == 2 else image
        pixels = pixels.astype(np.float32) / 255 if pixels.dtype == np.uint8 else pixels
        if self.gray:
            pixels = pixels.mean(axis=-1, keepdims=True)
        return ((pixels - self.mean) / self.std).astype(np.float32)

    def tokens(self, pixels: np.ndarray) -> np.ndarray:
        """The document of normalized pixels (h, w, c)."""
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


def crop_and_resize(image: np.ndarray, size: int, *, fraction: float = 1.0) -> np.ndarray:
    """A square in the middle of an image (h, w) or (h, w, c), resized to `size` by averages.

    The side is a fraction of the image's shorter side. Every pixel of the result is the mean of the
    pixels under it, by the nearest borders; bytes are rounded.
    """
    side = max(1, round(fraction * min(image.shape[:2])))
    top, left = ((length - side) // 2 for length in image.shape[:2])
    square = image[top : top + side, left : left + side].astype(np.float32)
    borders = np.arange(size + 1) * side // size
    counts = np.maximum(np.diff(borders), 1).astype(np.float32)
    # An empty range of `reduceat` gives the pixel at its start.
    sums = np.add.reduceat(np.add.reduceat(square, borders[:-1], axis=0), borders[:-1], axis=1)
    areas = counts[:, None] * counts
    pixels = sums / (areas if image.ndim == 2 else areas[..., None])
    return np.round(pixels).astype(np.uint8) if image.dtype == np.uint8 else pixels


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
