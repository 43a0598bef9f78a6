"""Pathfinder from local files: Long Range Arena's folders, or an .npz file.

The folder of a level, such as `pathfinder32/curv_contour_length_14`, has images `imgs/N/*.png` and
lists `metadata/N.npy`. A list is lines of text, in spite of its name: folder, image, number, class,
and settings of the generator. Long Range Arena takes 80, 10 and 10 % of the images.
"""

from pathlib import Path

import numpy as np

from megalodon_jax.data.example_sets.arrays import (
    ArrayExamples,
    LabelledArrays,
    PixelOptions,
    read_images,
)
from megalodon_jax.data.labelled import ExampleSet, LabelledExample
from megalodon_jax.data.sources import digest_of
from megalodon_jax.errors import DataError

CLASSES = ("apart", "connected")
_SEED = 42
_PARTS = ("train", "valid", "test")
# An image of Long Range Arena's release that is an empty file: level, folder and name.
_EMPTY_IMAGES = {("curv_baseline", "imgs/0", "sample_172.png")}


class PathfinderFiles(ExampleSet):
    """Images of a level's folder, read on access.

    Args:
      files: paths and classes of the images.
      options: how an image becomes a document.
      name: of the part.
    """

    classes = CLASSES

    def __init__(self, files: list[tuple[Path, int]], options: PixelOptions, name: str):
        self._files, self._options, self._name = files, options, name

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        path = self._files[index][0]
        return f"{self._name}/{path.parent.name}/{path.name}"

    def example(self, index: int) -> LabelledExample:
        path, label = self._files[index]
        return LabelledExample((self._options(read_png(path)),), label)

    def fingerprint(self) -> str:
        first = self.name(0) if self._files else ""
        return digest_of(self._name, len(self), first)


def open_pathfinder(path: str, options: PixelOptions) -> dict[str, ExampleSet]:
    """The parts train, valid and test of a folder or file.

    An .npz file is split as a folder is.

    Raises:
      DataError: the files are missing or malformed.
    """
    if Path(path).suffix == ".npz":
        data, _ = read_images(path, "train")
        return {
            part: ArrayExamples(
                LabelledArrays(data.arrays[at], data.labels[at]), options, _name(part), CLASSES
            )
            for part, at in _split(len(data.labels)).items()
        }
    files = _list_files(Path(path))
    return {
        part: PathfinderFiles([files[index] for index in at], options, _name(part))
        for part, at in _split(len(files)).items()
    }


def _name(part: str) -> str:
    return f"pathfinder/{part}"


def _split(count: int) -> dict[str, np.ndarray]:
    order = np.random.default_rng(_SEED).permutation(count)
    cuts = [count * 8 // 10, count * 9 // 10]
    return dict(zip(_PARTS, np.split(order, cuts), strict=True))


def _list_files(root: Path) -> list[tuple[Path, int]]:
    lists = list((root / "metadata").glob("*.npy")) if root.is_dir() else []
    if not lists:
        raise DataError(
            f"{root} has no metadata/*.npy; name the folder of one level of Pathfinder of Long "
            "Range Arena, such as pathfinder32/curv_contour_length_14, or an .npz file"
        )
    # In the order of their numbers: 2 before 10.
    lists.sort(key=lambda path: (len(path.stem), path.stem))
    files = []
    for listed in lists:
        for line in _read_lines(listed):
            columns = line.split()
            if len(columns) < 4 or columns[3] not in ("0", "1"):
                raise DataError(f"{listed}: {line!r:.80} is no line of an image and its class")
            if (root.name, columns[0], columns[1]) not in _EMPTY_IMAGES:
                files.append((root / columns[0] / columns[1], int(columns[3])))
    return files


def _read_lines(listed: Path) -> list[str]:
    try:
        return listed.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{listed} cannot be read as lines of text, the form of Long Range Arena: {error}"
        ) from error


def read_png(path: Path) -> np.ndarray:
    """The gray pixels (h, w) of an image file.

    Raises:
      DataError: it cannot be read, or Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            f"{path} is read by Pillow, which is not installed: pip install "
            "'megalodon-flax[images]'"
        ) from error
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L"), np.uint8)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error
