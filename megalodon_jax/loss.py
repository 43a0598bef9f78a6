"""Next-token cross-entropy that never stores the logits of the whole batch."""

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
      correct_sum: weighted count of tokens whose target has the highest logit.
      num_tokens: input tokens, where they are not the weighted targets; else None.
      confusion: counts of examples by their class (rows) and the class of the highest score; None
        where targets are tokens.
    """

    loss_sum: Float32[Array, ""]
    weight_sum: Float32[Array, ""]
    z_loss_sum: Float32[Array, ""]
    correct_sum: Float32[Array, ""]
    num_tokens: Float32[Array, ""] | None = None
    confusion: Float32[Array, "K K"] | None = None


def cross_entropy(
    hidden: Float[Array, "B L D"],
    output_matrix: Float[Array, "D V"],
    targets: Int32[Array, "B L"],
    weights: Float32[Array, "B L"],
    *,
    z_loss: float = 0.0,
    chunk_size: int = 2048,
) -> LossOutput:
    """Sums of -log softmax(hidden @ output_matrix)[target], one slice of the sequence at a time.

    The logits of at most about `chunk_size` tokens exist at once, forward and backward: the forward
    pass of a gradient computes the gradients of every slice while its logits exist, and the
    backward pass scales them. Logits are products in hidden's dtype with float32 accumulation.

    Args:
      hidden: features after the final norm, any float dtype.
      output_matrix: the model's `output_matrix()`.
      targets: token ids in [0, V).
      weights: weight of each token; 0.0 leaves it out.
      z_loss: weight of log(Z)^2, which keeps the logits near zero (PaLM, section 5).
      chunk_size: tokens whose logits exist at a time.
    """
    options = {"z_loss": z_loss, "chunk_size": chunk_size}
    if not has_multiple_devices():
        return _local_sums(hidden, output_matrix, targets, weights, vocab_axis=None, **options)
    vocab_axis = "model" if axis_size("model") > 1 else None

    def sum_shards(hidden: Array, *arrays: Array) -> LossOutput:
        if vocab_axis is not None:
            hidden = _gather_channels(hidden, vocab_axis)
        sums = _local_sums(hidden, *arrays, vocab_axis=vocab_axis, **options)
        return jax.lax.psum(sums, ("replica", "data", "chunk"))

    tokens = partition_spec("batch", "length")
    features = partition_spec("batch", "length", None if vocab_axis is None else "channels")
    return shard_map_logical(
        sum_shards,
        in_specs=(features, partition_spec(None, "vocab"), tokens, tokens),
        out_specs=LossOutput(*[partition_spec()] * 4),
    )(hidden, output_matrix, targets, weights)


def _gather_channels(hidden: Float[Array, "B L d"], axis: str) -> Float[Array, "B L D"]:
    # Shards travel row-major: a gather along the channels would be transposed before and after it.
    shards = jax.lax.all_gather(hidden, axis)
    return jnp.moveaxis(shards, 0, 2).reshape(*hidden.shape[:2], -1)


def _local_sums(
    hidden: Float[Array, "B L D"],
    output_matrix: Float[Array, "D V"],
    targets: Int32[Array, "B L"],
    weights: Float32[Array, "B L"],
    *,
    z_loss: float,
    chunk_size: int,
    vocab_axis: str | None,
) -> LossOutput:
    """Sums over this device's tokens; the columns are sharded over the mesh axis `vocab_axis`."""
    B, L, _ = hidden.shape
    length = min(L, max(1, chunk_size // B))
    num_slices = -(-L // length)

    def to_slices(x: Array) -> Array:
        padding = ((0, 0), (0, num_slices * length - L)) + ((0, 0),) * (x.ndim - 2)
        x = jnp.pad(x, padding).reshape(B, num_slices, length, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    xs = to_slices(hidden), to_slices(targets), to_slices(weights.astype(jnp.float32))
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

    def add_slice(sums: LossOutput, xs: tuple[Array, Array, Array]) -> tuple[LossOutput, None]:
        stats = _slice_stats(z_loss, vocab_axis, matrix, *xs)
        return jax.tree.map(jnp.add, sums, stats.sums), None

    return jax.lax.scan(add_slice, _zero_sums(), (hidden, targets, weights))[0]


class _SliceStats(NamedTuple):
    """The loss of one slice.

    Attributes:
      sums: over the slice.
      logits: of every token.
      log_z: log of the softmax denominator.
      token_loss: -log p(target), 0 where the weight is 0.
      is_correct: whether the target has the highest logit.
    """

    sums: LossOutput
    logits: Float32[Array, "B l V"]
    log_z: Float32[Array, "B l"]
    token_loss: Float32[Array, "B l"]
    is_correct: Bool[Array, "B l"]


def _slice_stats(
    z_loss: float,
    vocab_axis: str | None,
    matrix: Array,
    hidden: Array,
    targets: Array,
    weights: Array,
) -> _SliceStats:
    logits = jnp.matmul(hidden, matrix, preferred_element_type=jnp.float32)
    max_logit = jnp.max(logits, axis=-1)
    if vocab_axis is not None:
        max_logit = jax.lax.pmax(max_logit, vocab_axis)
    sum_exp = jnp.sum(jnp.exp(logits - max_logit[..., None]), axis=-1)
    column = _local_column(targets, matrix, vocab_axis)
    is_local = (column >= 0) & (column < matrix.shape[1])
    index = targets if vocab_axis is None else jnp.where(is_local, column, 0)
    target_logit = jnp.take_along_axis(logits, index[..., None], axis=-1)[..., 0]
    if vocab_axis is not None:
        sum_exp = jax.lax.psum(sum_exp, vocab_axis)
        target_logit = jax.lax.psum(jnp.where(is_local, target_logit, 0), vocab_axis)
    log_z = max_logit + jnp.log(sum_exp)
    is_correct = target_logit == max_logit
    # A token of weight 0 is masked even if its logits are not finite (padding past L).
    is_counted = weights != 0
    token_loss = jnp.where(is_counted, log_z - target_logit, 0.0)
    sums = LossOutput(
        loss_sum=jnp.sum(token_loss * weights),
        weight_sum=jnp.sum(weights),
        z_loss_sum=z_loss * jnp.sum(jnp.where(is_counted, jnp.square(log_z) * weights, 0.0)),
        correct_sum=jnp.sum(weights * is_correct),
    )
    return _SliceStats(sums, logits, log_z, token_loss, is_correct)


def _local_column(targets: Array, matrix: Array, vocab_axis: str | None) -> Array:
    """The target's column in this device's shard; outside [0, V) if another device has it."""
    if vocab_axis is None:
        return targets
    return targets - jax.lax.axis_index(vocab_axis) * matrix.shape[1]


def _zero_sums() -> LossOutput:
    return LossOutput(*[jnp.zeros((), jnp.float32)] * 4)


class _SumGradients(NamedTuple):
    """Gradients of one sum (the loss or the z-loss) in hidden, by slices, and in the matrix."""

    hidden: Float[Array, "S B l D"]
    matrix: Float32[Array, "D V"]


class _WeightGradients(NamedTuple):
    """Terms of the sums' gradients in the weights, by slices."""

    token_loss: Float32[Array, "S B l"]
    log_z_squared: Float32[Array, "S B l"]
    is_correct: Bool[Array, "S B l"]


def _sum_slices_forward(z_loss, vocab_axis, hidden, matrix, targets, weights):
    has_z_loss, matrix_dtype = z_loss != 0, matrix.dtype
    matrix = matrix.astype(hidden.dtype)

    def logit_gradients(stats: _SliceStats, target: Array, weight: Array) -> list[Array]:
        is_masked = (weight == 0)[..., None]
        probs = jnp.exp(stats.logits - stats.log_z[..., None]) * weight[..., None]
        column = _local_column(target, matrix, vocab_axis)
        one_hot = jax.nn.one_hot(column, matrix.shape[1], dtype=jnp.float32) * weight[..., None]
        d_logits = [jnp.where(is_masked, 0.0, probs - one_hot)]
        if has_z_loss:
            factor = 2 * z_loss * stats.log_z[..., None]
            d_logits.append(jnp.where(is_masked, 0.0, factor * probs))
        return d_logits

    def operand_gradients(x: Array, d_logits: Array) -> tuple[Array, Array]:
        d_logits = d_logits.astype(x.dtype)
        d_hidden = jnp.einsum("blv,dv->bld", d_logits, matrix, preferred_element_type=x.dtype)
        d_matrix = jnp.einsum("bld,blv->dv", x, d_logits, preferred_element_type=jnp.float32)
        return d_hidden, d_matrix

    def add_slice(carry, xs):
        sums, d_matrices = carry
        x, target, weight = xs
        stats = _slice_stats(z_loss, vocab_axis, matrix, *xs)
        counted_x = jnp.where((weight == 0)[..., None], 0, x)
        new = [operand_gradients(counted_x, d) for d in logit_gradients(stats, target, weight)]
        d_matrices = [total + more for total, (_, more) in zip(d_matrices, new, strict=True)]
        sums = jax.tree.map(jnp.add, sums, stats.sums)
        weight_grads = _WeightGradients(stats.token_loss, jnp.square(stats.log_z), stats.is_correct)
        return (sums, d_matrices), ([d_hidden for d_hidden, _ in new], weight_grads)

    zeros = [jnp.zeros(matrix.shape, jnp.float32)] * (2 if has_z_loss else 1)
    (sums, d_matrices), (d_hiddens, weight_grads) = jax.lax.scan(
        add_slice, (_zero_sums(), zeros), (hidden, targets, weights)
    )
    gradients = [_SumGradients(*pair) for pair in zip(d_hiddens, d_matrices, strict=True)]
    return sums, (gradients, weight_grads, weights, jnp.zeros((), matrix_dtype))


def _sum_slices_backward(z_loss, vocab_axis, residuals, cotangents):
    gradients, weight_grads, weights, like_matrix = residuals
    # Devices that share the vocabulary hold the same sums, and shard_map divides the cotangents
    # among them; each device has the gradients of its own columns only.
    num_shards = 1 if vocab_axis is None else jax.lax.axis_size(vocab_axis)
    factors = num_shards * cotangents.loss_sum, num_shards * cotangents.z_loss_sum

    def scale(terms: list[Array], dtype: jnp.dtype) -> Array:
        total = sum(f * term.astype(jnp.float32) for f, term in zip(factors, terms, strict=False))
        return jnp.asarray(total, dtype)

    d_hidden = scale([each.hidden for each in gradients], gradients[0].hidden.dtype)
    d_matrix = scale([each.matrix for each in gradients], like_matrix.dtype)

    d_weights = cotangents.loss_sum * weight_grads.token_loss + cotangents.weight_sum
    d_weights += cotangents.correct_sum * weight_grads.is_correct
    d_z_loss = cotangents.z_loss_sum * z_loss * weight_grads.log_z_squared
    d_weights += jnp.where(weights != 0, d_z_loss, 0.0)
    return d_hidden, d_matrix, None, d_weights


_sum_slices.defvjp(_sum_slices_forward, _sum_slices_backward)
