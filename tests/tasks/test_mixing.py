"""Mixup, cutmix and label smoothing: shares of pixels and of labels are the same numbers."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from megalodon_jax.errors import ConfigError
from megalodon_jax.tasks.classification import MixedLabels, class_loss
from megalodon_jax.tasks.mixing import mix_images, neighbours


def mixed_shares(patch_size: int, colors: int, **alphas: float) -> list[tuple[np.ndarray, float]]:
    """Weights of each image's own pixels (h, w), and the labels' share, of many draws."""
    grid = 12 // patch_size
    # An image of ones beside one of zeros, and the other way round.
    own = np.array([1.0, 0.0, 0.0, 1.0], np.float32)
    shape = (4, grid * grid, patch_size**2 * colors)
    tokens = jnp.asarray(np.broadcast_to(own[:, None, None], shape))
    mix = jax.jit(lambda key: mix_images(tokens, key, patch_size=patch_size, **alphas))
    found = []
    for seed in range(40):
        mixed, share = jax.tree.map(np.asarray, mix(jax.random.key(seed)))
        images = mixed.reshape(4, grid, grid, patch_size, patch_size, colors)
        images = images.swapaxes(2, 3).reshape(4, 12, 12, colors)
        np.testing.assert_allclose(images, np.broadcast_to(images[..., :1], images.shape))
        weights = np.where(own[:, None, None] == 1, images[..., 0], 1 - images[..., 0])
        np.testing.assert_allclose(weights, np.broadcast_to(weights[:1], weights.shape), atol=1e-6)
        found.append((weights[0], float(share)))
    return found


def test_mixup_weighs_pixels_and_labels_alike():
    shares = []
    for weights, share in mixed_shares(1, 1, mixup=0.8, cutmix=0.0):
        np.testing.assert_allclose(weights, share, atol=1e-6)
        shares.append(share)
    # Beta(0.8, 0.8) has the mean 1/2 and the variance 1 / (4 * 2.6).
    assert np.mean(shares) == pytest.approx(0.5, abs=0.15)
    assert np.var(shares) == pytest.approx(1 / (4 * 2.6), rel=0.5)


@pytest.mark.parametrize(("patch_size", "colors"), [(1, 1), (4, 3)])
def test_cutmix_puts_in_a_rectangle_of_the_labels_share(patch_size: int, colors: int):
    areas = []
    for weights, share in mixed_shares(patch_size, colors, mixup=0.0, cutmix=1.0):
        assert set(np.unique(weights)) <= {0.0, 1.0}
        cut = weights == 0
        np.testing.assert_array_equal(cut, cut.any(axis=1)[:, None] & cut.any(axis=0))
        assert share == pytest.approx(weights.mean(), abs=1e-6)
        areas.append(cut.mean())
    assert 0.0 <= min(areas) < 0.1 < 0.4 < max(areas)


def test_both_are_chosen_equally_often():
    found = mixed_shares(1, 1, mixup=5.0, cutmix=5.0)
    is_cut = [set(np.unique(weights)) <= {0.0, 1.0} for weights, _ in found]
    assert 0.25 < np.mean(is_cut) < 0.75


def test_neighbours_swap():
    np.testing.assert_array_equal(neighbours(jnp.arange(6)), [1, 0, 3, 2, 5, 4])
    with pytest.raises(ConfigError, match=r"seq_len is 15, which is no square image"):
        mix_images(jnp.zeros((2, 15, 1)), jax.random.key(0), mixup=1.0, cutmix=1.0, patch_size=1)


def test_loss_of_soft_labels_by_hand():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(4, 1, 5)).astype(np.float32)
    labels, ids = np.array([[0], [3], [4], [4]]), np.ones((4, 2), np.int32)
    others, weights = np.asarray(neighbours(jnp.asarray(labels))), np.ones((4, 1), np.float32)
    mixed = MixedLabels(jnp.asarray(others), jnp.float32(0.3))
    sums = class_loss(
        jnp.asarray(scores), jnp.asarray(labels), jnp.asarray(weights), jnp.asarray(ids),
        mixed=mixed, label_smoothing=0.1,
    )  # fmt: skip
    targets = 0.3 * np.eye(5)[labels] + 0.7 * np.eye(5)[others]
    targets = 0.9 * targets + 0.1 / 5
    log_probs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    np.testing.assert_allclose(sums.loss_sum, -(targets * log_probs).sum(), rtol=1e-5)
    # The other image has the larger share.
    assert sums.correct_sum == (scores.argmax(-1) == others).sum()
