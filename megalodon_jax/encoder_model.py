"""The base of encoders: inputs, a stack of blocks, a final norm, a mean of documents, a head."""

import abc
from typing import Any

from flax import nnx
from jax import numpy as jnp

from megalodon_jax.config import AnyEncoderConfig
from megalodon_jax.layer_stack import run_blocks, stack_blocks
from megalodon_jax.modules.drop_path import draw_path_scales
from megalodon_jax.modules.dropout import dropout, fold_key, split_key
from megalodon_jax.modules.embedding import check_tokens
from megalodon_jax.modules.heads import Classifier, PairClassifier, Pool, mean_of_documents
from megalodon_jax.modules.inputs import EncoderInput, PatchInput, TokenInput, ValueInput
from megalodon_jax.modules.parameters import axis_names, embedding_initializer
from megalodon_jax.modules.positions import PositionInfo, document_positions, position_info
from megalodon_jax.modules.time_norm import TimeNormModule, normalize
from megalodon_jax.typing import Array, Float, Float32, Int32, PRNGKey


class EncoderModel(nnx.Module):
    """Input, a stack of blocks that see both directions, a final norm, a mean, a head.

    A call takes rows. A row is one document, or several that `segment_ids` numbers from 1 in order;
    0 is padding. Documents are computed as if each were alone. `max_documents` is the most that a
    row has: M documents, or M / 2 pairs of neighbours. Vectors and scores of documents that a row
    lacks mean nothing, those of a row with more documents are NaN.

    A kind of encoder defines `_make_block` and `_make_final_norm`.

    Args:
      config: sizes and numerics.
      rngs: source of initial values.
    """

    config: AnyEncoderConfig

    def __init__(self, config: AnyEncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtypes: Any = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        self.inputs = _make_input(config, dtypes, rngs)
        self.layers = stack_blocks(self._make_block, config.num_layers, rngs=rngs)
        self.final_norm = self._make_final_norm()
        pool: Any = {"residual": config.pooling_residual, "init_mode": config.init_mode}
        has_pool = config.head != "tokens"
        self.pool = Pool(config.model_dim, rngs=rngs, **pool, **dtypes) if has_pool else None
        self.head = _make_head(config, rngs)

    @abc.abstractmethod
    def _make_block(self, layer: Float32[Array, ""], rngs: nnx.Rngs) -> nnx.Module:
        """The block of a layer, numbered from 0; `stack_blocks` calls it."""

    @abc.abstractmethod
    def _make_final_norm(self) -> TimeNormModule:
        """The norm after the last block."""

    def __call__(
        self,
        inputs: Array,
        *,
        segment_ids: Int32[Array, "B L"] | None = None,
        max_documents: int | None = None,
        aligned: bool = False,
        dropout_key: PRNGKey | None = None,
    ) -> Float32[Array, "B K"] | Float32[Array, "B M K"] | Float32[Array, "B L V"]:
        """Scores of classes; of tokens with `config.head = "tokens"`.

        Args:
          inputs: token ids (B, L); values (B, L, c); patches (B, L, numbers of a patch).
          segment_ids: documents of each row, numbered from 1; 0 is padding. None: rows are whole.
          max_documents: M; None: every row has one document, and the result no axis of documents.
          aligned: every document begins at a multiple of `chunk_size` in its row, as the loader
            lays them: then a chunk has C keys, else the 3C around it.
          dropout_key: turns dropout on.

        Raises:
          ValueError: inputs of another shape; several documents a row without segment ids; pairs
            without two documents a row.
        """
        stack_key, head_key = split_key(dropout_key, 2)
        options: Any = {
            "segment_ids": segment_ids, "max_documents": max_documents, "aligned": aligned
        }  # fmt: skip
        if self.pool is None:
            hidden = self.hidden(inputs, dropout_key=stack_key, **options)
            return jnp.matmul(hidden, self.output_matrix(), preferred_element_type=jnp.float32)
        vectors = self.vectors(inputs, dropout_key=stack_key, **options)
        if isinstance(self.head, PairClassifier):
            if max_documents is None or max_documents % 2:
                raise ValueError(
                    f"max_documents is {max_documents}; a pair is two documents of a row: give "
                    "segment_ids and an even max_documents"
                )
            return self.head(vectors[:, ::2], vectors[:, 1::2], dropout_key=head_key)
        assert isinstance(self.head, Classifier)
        return self.head(vectors, dropout_key=head_key)

    def vectors(
        self,
        inputs: Array,
        *,
        segment_ids: Int32[Array, "B L"] | None = None,
        max_documents: int | None = None,
        aligned: bool = False,
        dropout_key: PRNGKey | None = None,
    ) -> Float32[Array, "B D"] | Float32[Array, "B M D"]:
        """One vector of every document, before the head; arguments as in `__call__`.

        With `config.head = "tokens"` it is the plain mean of `hidden`.
        """
        hidden, info = self._run(
            inputs, segment_ids, max_documents or 1, aligned=aligned, dropout_key=dropout_key
        )
        pool = mean_of_documents if self.pool is None else self.pool
        vectors = pool(hidden, segment_ids=segment_ids, lengths=info.lengths)
        return vectors[:, 0] if max_documents is None else vectors

    def hidden(
        self,
        inputs: Array,
        *,
        segment_ids: Int32[Array, "B L"] | None = None,
        max_documents: int | None = None,
        aligned: bool = False,
        dropout_key: PRNGKey | None = None,
    ) -> Float[Array, "B L D"]:
        """Features of every token after the final norm; arguments as in `__call__`."""
        return self._run(
            inputs, segment_ids, max_documents or 1, aligned=aligned, dropout_key=dropout_key
        )[0]

    def output_matrix(self) -> Float[Array, "D V"]:
        """The matrix from features to scores of tokens, in `config.dtype`.

        Raises:
          ValueError: the head gives scores of classes.
        """
        if not isinstance(self.head, nnx.Linear):
            raise ValueError(
                f"model.head is {self.config.head!r}: this encoder has scores of classes, and no "
                "matrix of tokens"
            )
        return self.head.kernel[...].astype(self.config.dtype)

    def _run(
        self,
        inputs: Array,
        segment_ids: Int32[Array, "B L"] | None,
        max_documents: int,
        *,
        aligned: bool,
        dropout_key: PRNGKey | None,
    ) -> tuple[Float[Array, "B L D"], PositionInfo]:
        config = self.config
        shape = self._check_inputs(inputs)
        if segment_ids is None and max_documents > 1:
            raise ValueError(
                f"max_documents is {max_documents} without segment_ids, which tell where the "
                "documents of a row are; pass both"
            )
        info = position_info(
            shape,
            chunk_size=config.chunk_size,
            head_dim=config.head_dim,
            rope_base=config.rope_base,
            segment_ids=segment_ids,
            max_documents=max_documents,
            aligned=aligned and not config.causal,
            dtype=config.dtype,
        )
        positions = info.positions
        if positions is None and isinstance(self.inputs, PatchInput):
            positions = document_positions(shape, segment_ids, None)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
        input_key, layers_key = split_key(dropout_key, 2)
        x = dropout(self.inputs(inputs, positions), config.dropout, input_key)
        x = run_blocks(
            self.layers,
            config,
            x,
            info,
            dropout_key=layers_key,
            path_scales=self._path_scales(dropout_key, (shape[0], max_documents)),
        ).x
        hidden, _ = normalize(
            self.final_norm,
            x,
            segment_ids=segment_ids,
            initial_state=None,
            lengths=info.lengths,
        )
        return hidden, info

    def _path_scales(
        self, dropout_key: PRNGKey | None, shape: tuple[int, int]
    ) -> Float32[Array, "S 2 B M"] | None:
        config, key = self.config, fold_key(dropout_key, 0)
        if key is None or config.drop_path == 0.0:
            return None
        return draw_path_scales(key, config.drop_path, num_layers=config.num_layers, shape=shape)

    def _check_inputs(self, inputs: Array) -> tuple[int, int]:
        config = self.config
        if config.input == "tokens":
            check_tokens(inputs, config.vocab_size)
        elif inputs.ndim != 3 or inputs.shape[1] < 1 or inputs.shape[2] != config.input_size:
            raise ValueError(
                f"inputs have shape {inputs.shape}; model.input = {config.input!r} needs (batch, "
                f"length >= 1, {config.input_size})"
            )
        return inputs.shape[0], inputs.shape[1]


def _make_input(config: AnyEncoderConfig, dtypes: dict[str, Any], rngs: nnx.Rngs) -> EncoderInput:
    if config.input == "tokens":
        return TokenInput(config.vocab_size, config.model_dim, rngs=rngs, **dtypes)
    if config.input == "values":
        return ValueInput(config.input_size, config.model_dim, rngs=rngs, **dtypes)
    return PatchInput(
        config.input_size,
        config.model_dim,
        max_positions=config.max_positions,
        init_mode=config.init_mode,
        rngs=rngs,
        **dtypes,
    )


def _make_head(
    config: AnyEncoderConfig, rngs: nnx.Rngs
) -> Classifier | PairClassifier | nnx.Linear:
    options: Any = {"dropout": config.dropout, "param_dtype": config.param_dtype, "rngs": rngs}
    if config.head == "classes":
        return Classifier(
            config.model_dim, config.num_classes, use_bias=config.head_bias, **options
        )
    if config.head == "pairs":
        return PairClassifier(
            config.model_dim, config.num_classes, init_mode=config.init_mode, **options
        )
    return nnx.Linear(
        config.model_dim,
        config.vocab_size,
        use_bias=False,
        kernel_init=embedding_initializer(config.model_dim),
        kernel_metadata=axis_names("embed", "vocab"),
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        rngs=rngs,
    )
