"""Mixup and cutmix: a training image is mixed with that of its neighbour row, labels alike."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from megalodon_jax.errors import ConfigError
from megalodon_jax.typing import Array, Float, Float32, PRNGKey


class MixedImages(NamedTuple):
    """Mixed images, and the share of a row's own image; the neighbour's is the rest."""

    tokens: Float[Array, "B L c"]
    share: Float32[Array, ""]


def neighbours(rows: Array) -> Array:
    """Rows 1, 0, 3, 2, ...: each row's partner; it lies on the same device in sharded batches."""
    pairs = rows.reshape(rows.shape[0] // 2, 2, *rows.shape[1:])
    return pairs[:, ::-1].reshape(rows.shape)


def mix_images(
    tokens: Float[Array, "B L c"], key: PRNGKey, *, mixup: float, cutmix: float, patch_size: int
) -> MixedImages:
    """Mixes square images of an even number of rows, all by one draw as in DeiT.

    Mixup (Zhang et al. 2018): s x + (1 - s) x', s from Beta(mixup, mixup). Cutmix (Yun et al.
    2019): a rectangle of x' with about (1 - s) of the area, s from Beta(cutmix, cutmix), cut at the
    borders of the image; the share is then that of the pixels. With both one of the two is chosen
    with equal probability.

    Args:
      tokens: pixels in raster order, or patches.
      key: of the draw.
      mixup: alpha; 0: none.
      cutmix: alpha; 0: none.
      patch_size: height and width of a patch; 1: a token is a pixel.

    Raises:
      ConfigError: the tokens of a row are not those of a square image.
    """
    choice_key, share_key, box_key = jax.random.split(key, 3)
    uses_cutmix = jnp.asarray(cutmix > 0)
    if mixup and cutmix:
        uses_cutmix = jax.random.bernoulli(choice_key)
    alpha = jnp.where(uses_cutmix, cutmix or 1.0, mixup or 1.0)
    share = jax.random.beta(share_key, alpha, alpha)
    box = _box_tokens(tokens.shape, box_key, share, patch_size)
    own = jnp.where(uses_cutmix, 1.0 - box, share)
    mixed = own * tokens + (1.0 - own) * neighbours(tokens)
    return MixedImages(mixed.astype(tokens.dtype), jnp.where(uses_cutmix, 1 - box.mean(), share))


def _box_tokens(
    shape: tuple[int, ...], key: PRNGKey, share: Float32[Array, ""], patch_size: int
) -> Float32[Array, "L c"]:
    """1 in a random rectangle of an image, arranged as its tokens."""
    _, length, numbers = shape
    grid, P = math.isqrt(length), patch_size
    if grid * grid != length:
        raise ConfigError(
            f"data.seq_len is {length}, which is no square image; mixup and cutmix need rows of "
            "exactly one square image: set data.seq_len to its tokens"
        )
    side = grid * P
    center = jax.random.randint(key, (2,), 0, side)
    half = jnp.floor(side * jnp.sqrt(1.0 - share)).astype(jnp.int32) // 2
    low, high = jnp.maximum(center - half, 0), jnp.minimum(center + half, side)
    at = jnp.arange(side)
    inside = [(at >= low[axis]) & (at < high[axis]) for axis in range(2)]
    box = (inside[0][:, None] & inside[1]).astype(jnp.float32)
    patches = box.reshape(grid, P, grid, P).swapaxes(1, 2).reshape(length, P * P)
    return jnp.repeat(patches, numbers // (P * P), axis=1)
