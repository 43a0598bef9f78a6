"""Pathfinder from local files: Long Range Arena's folders, or an .npz file.

Long Range Arena has folders `metadata/*.npy` (lines of text: folder, image, ..., with the class in
the fourth column) beside the images, and takes 80, 10 and 10 % of them.
"""

from pathlib import Path

import numpy as np

from megalodon_jax.data.example_sets.arrays import (
    ArrayExamples,
    LabelledArrays,
    PixelOptions,
    read_images,
)
from megalodon_jax.errors import DataError

CLASSES = ("apart", "connected")
_SEED = 42


def open_pathfinder(path: str, options: PixelOptions) -> dict[str, ArrayExamples]:
    """The parts train, valid and test of a folder or file.

    An .npz file has its own held-out part, or none: then it is split as a folder is.

    Raises:
      DataError: the files are missing or malformed.
    """
    if Path(path).suffix == ".npz":
        data, _ = read_images(path, "train")
    else:
        data = _read_folder(Path(path))
    order = np.random.default_rng(_SEED).permutation(len(data.labels))
    cuts = [len(order) * 8 // 10, len(order) * 9 // 10]
    parts = dict(zip(("train", "valid", "test"), np.split(order, cuts), strict=True))
    return {
        name: ArrayExamples(
            LabelledArrays(data.arrays[part], data.labels[part]),
            options,
            f"pathfinder/{name}",
            CLASSES,
        )
        for name, part in parts.items()
    }


def _read_folder(root: Path) -> LabelledArrays:
    lists = sorted((root / "metadata").glob("*.npy")) if root.is_dir() else []
    if not lists:
        raise DataError(
            f"{root} has no metadata/*.npy; name the folder of one level of Pathfinder of Long "
            "Range Arena, such as pathfinder32/curv_contour_length_14, or an .npz file"
        )
    images, labels = [], []
    for listed in lists:
        for line in listed.read_text(encoding="utf-8").splitlines():
            columns = line.split()
            if len(columns) < 4 or columns[3] not in ("0", "1"):
                raise DataError(f"{listed}: {line!r:.80} is no line of an image and its class")
            images.append(_read_png(root / columns[0] / columns[1]))
            labels.append(int(columns[3]))
    return LabelledArrays(np.stack(images), np.array(labels))


def _read_png(path: Path) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            f"{path} is read by Pillow, which is not installed: pip install pillow"
        ) from error
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L"), np.uint8)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error
