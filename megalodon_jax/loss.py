"""Next-token cross-entropy that never holds the scores of the whole batch."""

from functools import partial
from typing import NamedTuple

import jax
from jax import numpy as jnp

from megalodon_jax.parallel.sharding import (
    axis_size,
    has_multiple_devices,
    partition_spec,
    shard_map_logical,
)
from megalodon_jax.typing import Array, Bool, Float, Float32, Int32


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

    At most about `chunk_size` tokens' scores exist at once, forward and backward: where gradients
    are asked for, the forward pass makes them from each slice's scores while it has them, and the
    backward pass scales them. Scores are products of hidden's type, summed in float32.

    Args:
      hidden: features after the final norm, any float type.
      output_matrix: the model's `output_matrix()`.
      targets: token ids in [0, V).
      weights: weight of each token, 0.0 to leave it out.
      z_loss: weight of log(Z)^2, which keeps the scores near zero (PaLM, section 5).
      chunk_size: tokens whose scores exist at a time.
    """
    options = {"z_loss": z_loss, "chunk_size": chunk_size}
    if not has_multiple_devices():
        return _sums(hidden, output_matrix, targets, weights, vocab_axis=None, **options)
    vocab_axis = "model" if axis_size("model") > 1 else None

    def of_part(*arrays: Array) -> LossOutput:
        sums = _sums(*arrays, vocab_axis=vocab_axis, **options)
        return jax.lax.psum(sums, ("replica", "data", "chunk"))

    tokens = partition_spec("batch", "length")
    return shard_map_logical(
        of_part,
        in_specs=(
            partition_spec("batch", "length", None),
            partition_spec(None, "vocab"),
            tokens,
            tokens,
        ),
        out_specs=LossOutput(*[partition_spec()] * 4),
    )(hidden, output_matrix, targets, weights)


def _sums(
    hidden: Float[Array, "B L D"],
    output_matrix: Float[Array, "D V"],
    targets: Int32[Array, "B L"],
    weights: Float32[Array, "B L"],
    *,
    z_loss: float,
    chunk_size: int,
    vocab_axis: str | None,
) -> LossOutput:
    """Of one device's tokens; over `vocab_axis` of the mesh the devices share the columns."""
    B, L, _ = hidden.shape
    length = min(L, max(1, chunk_size // B))
    slices = -(-L // length)

    def sliced(x: Array) -> Array:
        padding = ((0, 0), (0, slices * length - L)) + ((0, 0),) * (x.ndim - 2)
        x = jnp.pad(x, padding).reshape(B, slices, length, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    xs = sliced(hidden), sliced(targets), sliced(weights.astype(jnp.float32))
    return _sum_slices(z_loss, vocab_axis, xs[0], output_matrix, *xs[1:])


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_slices(
    z_loss: float,
    vocab_axis: str | None,
    hidden: Float[Array, "S B l D"],
    matrix: Float[Array, "D V"],
    targets: Int32[Array, "S B l"],
    weights: Float32[Array, "S B l"],
) -> LossOutput:
    matrix = matrix.astype(hidden.dtype)

    def add_slice(sums: LossOutput, x: tuple[Array, Array, Array]) -> tuple[LossOutput, None]:
        measured = _measure(z_loss, vocab_axis, matrix, *x)
        return jax.tree.map(jnp.add, sums, measured.sums), None

    return jax.lax.scan(add_slice, _zero_sums(), (hidden, targets, weights))[0]


class _Slice(NamedTuple):
    """Of a slice, its sums; of every token, its scores, log Z, -log p, and whether p is the top."""

    sums: LossOutput
    logits: Float32[Array, "B l V"]
    log_z: Float32[Array, "B l"]
    token_loss: Float32[Array, "B l"]
    is_correct: Bool[Array, "B l"]


def _measure(
    z_loss: float,
    vocab_axis: str | None,
    matrix: Array,
    hidden: Array,
    targets: Array,
    weights: Array,
) -> _Slice:
    logits = jnp.matmul(hidden, matrix, preferred_element_type=jnp.float32)
    top = jnp.max(logits, axis=-1)
    if vocab_axis is not None:
        top = jax.lax.pmax(top, vocab_axis)
    total = jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)
    column = _own_column(targets, matrix, vocab_axis)
    is_own = (column >= 0) & (column < matrix.shape[1])
    index = targets if vocab_axis is None else jnp.where(is_own, column, 0)
    chosen = jnp.take_along_axis(logits, index[..., None], axis=-1)[..., 0]
    if vocab_axis is not None:
        total = jax.lax.psum(total, vocab_axis)
        chosen = jax.lax.psum(jnp.where(is_own, chosen, 0), vocab_axis)
    log_z = top + jnp.log(total)
    is_correct = chosen == top
    # A weight of 0 must silence its token even if the score is not finite (padding past L).
    counted = weights != 0
    token_loss = jnp.where(counted, log_z - chosen, 0.0)
    sums = LossOutput(
        loss_sum=jnp.sum(token_loss * weights),
        weight_sum=jnp.sum(weights),
        z_loss_sum=z_loss * jnp.sum(jnp.where(counted, jnp.square(log_z) * weights, 0.0)),
        correct_sum=jnp.sum(weights * is_correct),
    )
    return _Slice(sums, logits, log_z, token_loss, is_correct)


def _own_column(targets: Array, matrix: Array, vocab_axis: str | None) -> Array:
    """The target's column among this device's, outside [0, V) if another device has it."""
    if vocab_axis is None:
        return targets
    return targets - jax.lax.axis_index(vocab_axis) * matrix.shape[1]


def _zero_sums() -> LossOutput:
    return LossOutput(*[jnp.zeros((), jnp.float32)] * 4)


class _Gradients(NamedTuple):
    """Of one of the sums, per slice and of the matrix."""

    hidden: Float[Array, "S B l D"]
    matrix: Float32[Array, "D V"]


def _sum_slices_forward(z_loss, vocab_axis, hidden, matrix, targets, weights):
    has_z_loss, matrix_dtype = z_loss != 0, matrix.dtype
    matrix = matrix.astype(hidden.dtype)

    def of_scores(x: Array, d_logits: Array) -> tuple[Array, Array]:
        d_logits = d_logits.astype(x.dtype)
        d_hidden = jnp.einsum("blv,dv->bld", d_logits, matrix, preferred_element_type=x.dtype)
        of_matrix = jnp.einsum("bld,blv->dv", x, d_logits, preferred_element_type=jnp.float32)
        return d_hidden, of_matrix

    def add_slice(carry, xs):
        sums, of_matrix = carry
        x, target, weight = xs
        one = _measure(z_loss, vocab_axis, matrix, *xs)
        silent = (weight == 0)[..., None]
        shares = jnp.exp(one.logits - one.log_z[..., None]) * weight[..., None]
        hit = (
            jax.nn.one_hot(
                _own_column(target, matrix, vocab_axis), matrix.shape[1], dtype=jnp.float32
            )
            * weight[..., None]
        )
        d_logits = [jnp.where(silent, 0.0, shares - hit)]
        if has_z_loss:
            factor = 2 * z_loss * one.log_z[..., None]
            d_logits.append(jnp.where(silent, 0.0, factor * shares))
        counted_x = jnp.where(silent, 0, x)
        new = [of_scores(counted_x, d) for d in d_logits]
        of_matrix = [total + more for total, (_, more) in zip(of_matrix, new, strict=True)]
        sums = jax.tree.map(jnp.add, sums, one.sums)
        of_weight = one.token_loss, jnp.square(one.log_z), one.is_correct
        return (sums, of_matrix), ([d_hidden for d_hidden, _ in new], of_weight)

    start = [jnp.zeros(matrix.shape, jnp.float32)] * (2 if has_z_loss else 1)
    (sums, of_matrix), (of_hidden, of_weight) = jax.lax.scan(
        add_slice, (_zero_sums(), start), (hidden, targets, weights)
    )
    gradients = [_Gradients(*pair) for pair in zip(of_hidden, of_matrix, strict=True)]
    return sums, (gradients, of_weight, weights, jnp.zeros((), matrix_dtype))


def _sum_slices_backward(z_loss, vocab_axis, kept, cotangents):
    gradients, (token_loss, log_z_squared, correct), weights, like_matrix = kept
    # Devices that share the vocabulary hold the same sums, and shard_map deals out the cotangents
    # among them; each has the gradients of its own columns only.
    shared = 1 if vocab_axis is None else jax.lax.axis_size(vocab_axis)
    factors = shared * cotangents.loss_sum, shared * cotangents.z_loss_sum

    def scaled(parts: list[Array], dtype: jnp.dtype) -> Array:
        total = sum(f * part.astype(jnp.float32) for f, part in zip(factors, parts, strict=False))
        return jnp.asarray(total, dtype)

    d_hidden = scaled([each.hidden for each in gradients], gradients[0].hidden.dtype)
    d_matrix = scaled([each.matrix for each in gradients], like_matrix.dtype)

    d_weights = cotangents.loss_sum * token_loss + cotangents.weight_sum
    d_weights += cotangents.correct_sum * correct
    d_weights += jnp.where(weights != 0, cotangents.z_loss_sum * z_loss * log_z_squared, 0.0)
    return d_hidden, d_matrix, None, d_weights


_sum_slices.defvjp(_sum_slices_forward, _sum_slices_backward)
