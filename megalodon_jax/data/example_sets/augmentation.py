"""Augmentations of training images, drawn from a generator: crops, flips, RandAugment, erasing.

The recipe is that of DeiT (Touvron et al. 2021), which the paper's encoder of images is trained
with; operations on whole images are Pillow's.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from megalodon_jax.data.example_sets.arrays import PixelOptions
from megalodon_jax.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

# Random crops (Szegedy et al. 2015) and erased rectangles (Zhong et al. 2020): bounds of the aspect
# ratio, of the erased area, and tries to place a rectangle.
_CROP_RATIO = 4 / 3
_ERASED_RATIO = 1 / 0.3
_ERASED_AREA = (0.02, 1 / 3)
_TRIES = 10
# RandAugment: operations an image, the probability of each, and the largest magnitude.
_NUM_OPERATIONS = 2
_PROBABILITY = 0.5
LARGEST_MAGNITUDE = 10.0


class ImageAugmentation(NamedTuple):
    """How a training image becomes a document; every part is off by default.

    Attributes:
      options: size, normalization and patches.
      smallest_area: of a random crop, as a fraction of the image; 0: no random crop.
      flip: mirror half of the images.
      magnitude: of RandAugment, up to 10; 0: none.
      magnitude_std: its standard deviation.
      erasing: probability that a rectangle becomes noise.
    """

    options: PixelOptions
    smallest_area: float = 0.0
    flip: bool = False
    magnitude: float = 0.0
    magnitude_std: float = 0.5
    erasing: float = 0.0

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The document of an image (h, w) or (h, w, c) of 1 or 3 channels.

        Raises:
          DataError: crops and RandAugment of an image that is not of bytes, or without Pillow.
        """
        if self.smallest_area:
            image = random_crop(image, self.options.size, self.smallest_area, rng)
        else:
            image = self.options.resize(image)
        if self.flip and rng.random() < 0.5:
            image = image[:, ::-1]
        if self.magnitude:
            image = self._rand_augment(image, rng)
        pixels = self.options.normalize(image)
        if self.erasing and rng.random() < self.erasing:
            pixels = erase(pixels, rng)
        return self.options.tokens(pixels)

    def _rand_augment(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        found = to_pillow(image)
        fill = round(255 * self.options.mean)
        for number in rng.integers(len(OPERATIONS), size=_NUM_OPERATIONS):
            if rng.random() < _PROBABILITY:
                drawn = rng.normal(self.magnitude, self.magnitude_std)
                magnitude = float(np.clip(drawn, 0.0, LARGEST_MAGNITUDE))
                operation = tuple(OPERATIONS.values())[number]
                found = operation(found, magnitude / LARGEST_MAGNITUDE, _Draws(rng, fill))
        return from_pillow(found, image)


def random_crop(
    image: np.ndarray, size: int, smallest_area: float, rng: np.random.Generator
) -> np.ndarray:
    """A random rectangle of an image, resized to `size` x `size` by bicubic interpolation.

    The area is uniform from `smallest_area` to 1 of the image's, the logarithm of the aspect ratio
    from that of 3/4 to that of 4/3.
    """
    height, width = image.shape[:2]
    top, left, h, w = 0, 0, height, width
    for _ in range(_TRIES):
        area = rng.uniform(smallest_area, 1.0) * height * width
        ratio = math.exp(rng.uniform(-math.log(_CROP_RATIO), math.log(_CROP_RATIO)))
        tall, wide = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < tall <= height and 0 < wide <= width:
            top, left = rng.integers(height - tall + 1), rng.integers(width - wide + 1)
            h, w = tall, wide
            break
    else:
        # No try fits into a long image: the largest rectangle of an allowed ratio in its middle.
        w, h = min(w, round(h * _CROP_RATIO)), min(h, round(w * _CROP_RATIO))
        top, left = (height - h) // 2, (width - w) // 2
    resized = to_pillow(image).resize((size, size), _bicubic(), box=(left, top, left + w, top + h))
    return from_pillow(resized, image)


def erase(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Normalized pixels with standard normal noise in a random rectangle."""
    height, width = pixels.shape[:2]
    for _ in range(_TRIES):
        area = rng.uniform(*_ERASED_AREA) * height * width
        ratio = math.exp(rng.uniform(-math.log(_ERASED_RATIO), math.log(_ERASED_RATIO)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < h < height and 0 < w < width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            erased = pixels.copy()
            shape = (h, w, pixels.shape[2])
            erased[top : top + h, left : left + w] = rng.standard_normal(shape, np.float32)
            return erased
    return pixels


def to_pillow(image: np.ndarray) -> "Image.Image":
    """A Pillow image of bytes (h, w), (h, w, 1) or (h, w, 3).

    Raises:
      DataError: it has another form, or Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            "random crops and RandAugment need Pillow, which is not installed: pip install "
            "'megalodon-flax[images]'"
        ) from error
    flat = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
    if flat.dtype != np.uint8 or (flat.ndim != 2 and flat.shape[2:] != (3,)):
        raise DataError(
            f"random crops and RandAugment take images of bytes with 1 or 3 channels, not "
            f"{image.dtype} of shape {image.shape}; use examples.random_crop = 0 and rand_augment "
            "= 0"
        )
    return Image.fromarray(np.ascontiguousarray(flat))


def from_pillow(found: "Image.Image", like: np.ndarray) -> np.ndarray:
    """The array of a Pillow image, with as many axes as `like`."""
    array = np.asarray(found, np.uint8)
    return array[..., None] if array.ndim < like.ndim else array


class _Draws(NamedTuple):
    """The random numbers of an operation, and the gray that fills the outside of an image."""

    rng: np.random.Generator
    fill: int

    def sign(self) -> float:
        return 1.0 if self.rng.random() < 0.5 else -1.0


# An operation takes an image, its strength in [0, 1], and random numbers.
Operation = Callable[["Image.Image", float, _Draws], "Image.Image"]


def _affine(image: "Image.Image", matrix: tuple[float, ...], draws: _Draws) -> "Image.Image":
    """The image whose pixel (x, y) is that at (a x + b y + c, d x + e y + f).

    The middle of the first pixel is (1/2, 1/2).
    """
    from PIL import Image

    fill = draws.fill if image.mode == "L" else (draws.fill,) * 3
    methods = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
    resample = methods[draws.rng.integers(2)]
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=resample, fillcolor=fill
    )


def _shear_x(image: "Image.Image", strength: float, draws: _Draws) -> "Image.Image":
    return _affine(image, (1, 0.3 * strength * draws.sign(), 0, 0, 1, 0), draws)


def _shear_y(image: "Image.Image", strength: float, draws: _Draws) -> "Image.Image":
    return _affine(image, (1, 0, 0, 0.3 * strength * draws.sign(), 1, 0), draws)


def _translate_x(image: "Image.Image", strength: float, draws: _Draws) -> "Image.Image":
    pixels = 0.45 * strength * draws.sign() * image.width
    return _affine(image, (1, 0, pixels, 0, 1, 0), draws)


def _translate_y(image: "Image.Image", strength: float, draws: _Draws) -> "Image.Image":
    pixels = 0.45 * strength * draws.sign() * image.height
    return _affine(image, (1, 0, 0, 0, 1, pixels), draws)


def _rotate(image: "Image.Image", strength: float, draws: _Draws) -> "Image.Image":
    """Up to 30 degrees round the middle of the image."""
    angle = math.radians(30.0) * strength * draws.sign()
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = image.width / 2, image.height / 2
    matrix = (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)
    return _affine(image, matrix, draws)


def _enhance(name: str) -> Operation:
    """A blend with a degenerate image: the factor is 1 plus or minus 0.9 strength."""

    def enhance(image: "Image.Image", strength: float, draws: _Draws) -> "Image.Image":
        from PIL import ImageEnhance

        factor = max(0.1, 1.0 + 0.9 * strength * draws.sign())
        return getattr(ImageEnhance, name)(image).enhance(factor)

    return enhance


def _whole_image(name: str) -> Operation:
    """An operation without a strength."""

    def apply(image: "Image.Image", strength: float, draws: _Draws) -> "Image.Image":
        from PIL import ImageOps

        del strength, draws
        return getattr(ImageOps, name)(image)

    return apply


def _posterize(image: "Image.Image", strength: float, draws: _Draws) -> "Image.Image":
    """Keeps 4 bits of each byte, down to none."""
    del draws
    bits = 4 - int(4 * strength)
    return _map_bytes(image, lambda value: value & ~(2 ** (8 - bits) - 1))


def _solarize(image: "Image.Image", strength: float, draws: _Draws) -> "Image.Image":
    """Inverts bytes from a threshold on, 256 down to 0."""
    del draws
    threshold = 256 - int(256 * strength)
    return _map_bytes(image, lambda value: value if value < threshold else 255 - value)


def _solarize_add(image: "Image.Image", strength: float, draws: _Draws) -> "Image.Image":
    """Adds up to 110 to bytes below 128."""
    del draws
    added = int(110 * strength)
    return _map_bytes(image, lambda value: min(255, value + added) if value < 128 else value)


def _map_bytes(image: "Image.Image", function: Callable[[int], int]) -> "Image.Image":
    return image.point([function(value) for value in range(256)] * len(image.getbands()))


# The operations of "rand-m9-mstd0.5-inc1" in DeiT's recipe: a larger strength changes more.
OPERATIONS: dict[str, Operation] = {
    "auto_contrast": _whole_image("autocontrast"),
    "equalize": _whole_image("equalize"),
    "invert": _whole_image("invert"),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _enhance("Color"),
    "contrast": _enhance("Contrast"),
    "brightness": _enhance("Brightness"),
    "sharpness": _enhance("Sharpness"),
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}


def _bicubic() -> "Image.Resampling":
    from PIL import Image

    return Image.Resampling.BICUBIC
