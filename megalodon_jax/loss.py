"""Next-token cross-entropy that never holds the scores of the whole batch."""

from typing import NamedTuple

import jax
from jax import numpy as jnp

from megalodon_jax.typing import Array, Float, Float32, Int32


class LossOutput(NamedTuple):
    """Sums over tokens, so that batches and devices add up; the mean loss is loss_sum / weight_sum.

    Attributes:
      loss_sum: weighted cross-entropy in nats.
      weight_sum: sum of the weights.
      z_loss_sum: weighted z_loss * log(Z)^2; train on (loss_sum + z_loss_sum) / weight_sum.
      correct_sum: weighted count of tokens whose highest score is the target's.
    """

    loss_sum: Float32[Array, ""]
    weight_sum: Float32[Array, ""]
    z_loss_sum: Float32[Array, ""]
    correct_sum: Float32[Array, ""]


def cross_entropy(
    hidden: Float[Array, "B L D"],
    output_matrix: Float[Array, "D V"],
    targets: Int32[Array, "B L"],
    weights: Float32[Array, "B L"],
    *,
    z_loss: float = 0.0,
    chunk_size: int = 2048,
) -> LossOutput:
    """Sums of -log softmax(hidden @ output_matrix)[target], a slice of the sequence at a time.

    At most about `chunk_size` tokens' scores exist at once, forward and backward: each slice's
    scores are computed again in the backward pass.

    Args:
      hidden: features after the final norm, any float type; products are summed in float32.
      output_matrix: the model's `output_matrix()`.
      targets: token ids in [0, V).
      weights: weight of each token, 0.0 to leave it out.
      z_loss: weight of log(Z)^2, which keeps the scores near zero (PaLM, section 5).
      chunk_size: tokens whose scores exist at a time.
    """
    B, L, _ = hidden.shape
    length = min(L, max(1, chunk_size // B))
    slices = -(-L // length)

    def sliced(x: Array) -> Array:
        padding = ((0, 0), (0, slices * length - L)) + ((0, 0),) * (x.ndim - 2)
        x = jnp.pad(x, padding).reshape(B, slices, length, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    @jax.checkpoint
    def add_slice(sums: LossOutput, x: tuple[Array, Array, Array]) -> tuple[LossOutput, None]:
        new = _slice_sums(x[0], output_matrix, x[1], x[2], z_loss)
        return jax.tree.map(jnp.add, sums, new), None

    zeros = LossOutput(*[jnp.zeros((), jnp.float32)] * 4)
    xs = (sliced(hidden), sliced(targets), sliced(weights.astype(jnp.float32)))
    return jax.lax.scan(add_slice, zeros, xs)[0]


def _slice_sums(
    hidden: Array, output_matrix: Array, targets: Array, weights: Array, z_loss: float
) -> LossOutput:
    logits = jnp.matmul(hidden, output_matrix, preferred_element_type=jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    # A weight of 0 must silence its token even if the score is not finite (padding past L).
    counted = weights != 0
    return LossOutput(
        loss_sum=jnp.sum(jnp.where(counted, (log_z - chosen) * weights, 0.0)),
        weight_sum=jnp.sum(weights),
        z_loss_sum=z_loss * jnp.sum(jnp.where(counted, jnp.square(log_z) * weights, 0.0)),
        correct_sum=jnp.sum(weights * (jnp.argmax(logits, axis=-1) == targets)),
    )
