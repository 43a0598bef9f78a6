"""From features of tokens to one vector of a document, and from vectors to scores of classes."""

import jax
from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike

from megalodon_jax.config import InitMode
from megalodon_jax.modules.documents import sum_documents
from megalodon_jax.modules.dropout import dropout, split_key
from megalodon_jax.modules.linear import Linear
from megalodon_jax.modules.parameters import kernel_initializer, parameter
from megalodon_jax.modules.precision import at_least_float32
from megalodon_jax.parallel.sharding import partition_spec, sequence_axis, shard_map_logical
from megalodon_jax.typing import Array, Float, Float32, Int32, PRNGKey


class Pool(nnx.Module):
    """The mean over a document's tokens of silu(x W + b + x).

    Args:
      features: width D.
      residual: whether x is added inside SiLU; not in the authors' encoder of images.
      init_mode: initializer of W by its released name.
      dtype: of the product; the mean is float32.
      param_dtype: of W and b.
      rngs: source of initial values.
    """

    def __init__(
        self,
        features: int,
        *,
        residual: bool = True,
        init_mode: InitMode = "bert",
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.residual = residual
        self.proj = Linear(
            features,
            features,
            axes=("embed", "embed_out"),
            init_mode=init_mode,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        x: Float[Array, "B L D"],
        *,
        segment_ids: Int32[Array, "B L"] | None = None,
        lengths: Int32[Array, "B M"] | None = None,
    ) -> Float32[Array, "B M D"]:
        """The vectors of the documents of every row; 0 where a row has fewer than M.

        Args:
          x: features after the final norm.
          segment_ids: documents of each row; None: a row is one document, and M is 1.
          lengths: tokens of the documents, from `document_lengths`; None only without segment ids.

        Raises:
          ValueError: segment ids without lengths.
        """
        y = self.proj(x)
        y = jax.nn.silu(y + x.astype(y.dtype) if self.residual else y)
        return mean_of_documents(y, segment_ids=segment_ids, lengths=lengths)


def mean_of_documents(
    x: Float[Array, "B L D"],
    *,
    segment_ids: Int32[Array, "B L"] | None = None,
    lengths: Int32[Array, "B M"] | None = None,
) -> Float32[Array, "B M D"]:
    """The mean over the tokens of every document, 0 where there is none; arguments as for `Pool`.

    Rows with more than M documents give NaN.

    Raises:
      ValueError: segment ids without lengths.
    """
    if segment_ids is not None and lengths is None:
        raise ValueError("segment_ids need lengths: pass document_lengths(segment_ids, M)")
    max_documents = 1 if lengths is None else lengths.shape[1]

    def total(x: Array, segment_ids: Array | None) -> Array:
        x = x.astype(at_least_float32(x.dtype))
        return sum_documents(x, segment_ids, max_documents, axis=sequence_axis())

    sums = shard_map_logical(
        total,
        in_specs=(
            partition_spec("batch", "length", "channels"),
            None if segment_ids is None else partition_spec("batch", "length"),
        ),
        out_specs=partition_spec("batch", None, "channels"),
    )(x, segment_ids)
    counts = x.shape[1] if lengths is None else jnp.maximum(lengths, 1)[..., None]
    means = sums / jnp.asarray(counts, sums.dtype)
    if segment_ids is None:
        return means
    has_more = jnp.max(segment_ids, axis=1)[:, None, None] > max_documents
    return jnp.where(has_more, jnp.nan, means)


class Classifier(nnx.Module):
    """Scores of classes from vectors: dropout(v) W, and b if it is there; float32.

    Args:
      features: width D.
      num_classes: scores.
      use_bias: whether b is there.
      dropout: dropped fraction of the vectors.
      param_dtype: of the parameters; W starts by Xavier's uniform rule.
      rngs: source of initial values.
    """

    def __init__(
        self,
        features: int,
        num_classes: int,
        *,
        use_bias: bool = False,
        dropout: float = 0.0,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dropout = dropout
        initialize = kernel_initializer("xavier")
        kernel = initialize(rngs.params(), (features, num_classes), jnp.dtype(param_dtype))
        self.kernel = parameter(kernel, "embed", None)
        self.bias = parameter(jnp.zeros(num_classes, param_dtype), None) if use_bias else None

    def __call__(
        self, vectors: Float[Array, "... D"], *, dropout_key: PRNGKey | None = None
    ) -> Float32[Array, "... K"]:
        """The scores of K classes."""
        vectors = dropout(vectors, self.dropout, dropout_key)
        scores = _wide_product(vectors, self.kernel[...])
        return scores if self.bias is None else scores + self.bias[...].astype(scores.dtype)


class PairClassifier(nnx.Module):
    """Scores of classes from two vectors: classifier(gelu([a; b; a * b; a - b] W + b)).

    GELU is exact (erf); dropout comes before W and before the classifier.

    Args:
      features: width D.
      num_classes: scores.
      dropout: dropped fraction.
      init_mode: initializer of W by its released name.
      param_dtype: of the parameters.
      rngs: source of initial values.
    """

    def __init__(
        self,
        features: int,
        num_classes: int,
        *,
        dropout: float = 0.0,
        init_mode: InitMode = "bert",
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dropout = dropout
        initialize = kernel_initializer(init_mode)
        kernel = initialize(rngs.params(), (4 * features, features), jnp.dtype(param_dtype))
        self.kernel = parameter(kernel, "embed", None)
        self.bias = parameter(jnp.zeros(features, param_dtype), None)
        self.classifier = Classifier(
            features, num_classes, dropout=dropout, param_dtype=param_dtype, rngs=rngs
        )

    def __call__(
        self,
        first: Float[Array, "... D"],
        second: Float[Array, "... D"],
        *,
        dropout_key: PRNGKey | None = None,
    ) -> Float32[Array, "... K"]:
        """The scores of K classes for pairs of vectors."""
        pair_key, classifier_key = split_key(dropout_key, 2)
        pair = jnp.concatenate([first, second, first * second, first - second], axis=-1)
        hidden = _wide_product(dropout(pair, self.dropout, pair_key), self.kernel[...])
        hidden = jax.nn.gelu(hidden + self.bias[...].astype(hidden.dtype), approximate=False)
        return self.classifier(hidden, dropout_key=classifier_key)


def _wide_product(x: Array, kernel: Array) -> Array:
    """x @ kernel without rounding to lower precisions: these products are small."""
    wide = at_least_float32(x.dtype)
    return jnp.matmul(x.astype(wide), kernel.astype(wide), precision=jax.lax.Precision.HIGHEST)
