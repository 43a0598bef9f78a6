"""The settings that encoders of every kind share: input, pool and head, sizes, dropout, dtypes."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from megalodon_jax.config.checks import Rule, check_keys, none_from_text
from megalodon_jax.config.model import InitMode, Remat
from megalodon_jax.config.ranges import Range, Rate, Size, TokenIds
from megalodon_jax.presets import read_preset
from pallas_kernels.common.dispatch import Implementation

EncoderInputKind = Literal["tokens", "values", "patches"]
EncoderHead = Literal["classes", "pairs", "tokens"]
EncoderDType = Literal["float32", "bfloat16", "float64"]

# Rules of every kind of encoder.
ENCODER_RULES = (
    Rule(
        lambda c: c.rope_base is None or 1.0 <= c.rope_base <= 1e12,
        "model.rope_base is {c.rope_base}; must be in [1, 1e12], or None",
    ),
    Rule(
        lambda c: c.head != "tokens" or c.input == "tokens",
        "model.head is 'tokens', the tokens behind masks, but model.input is {c.input!r}; use "
        "input = 'tokens'",
    ),
    Rule(
        lambda c: c.rowwise_implementation != "pallas_tpu",
        "model.rowwise_implementation is 'pallas_tpu', but norms and gates have no kernels for "
        "TPU; use 'xla', or leave it out",
    ),
)


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """Settings that all kinds of encoders share."""

    input: EncoderInputKind = "tokens"
    """Input: token ids, real values (pixels, samples of sound), or patches of images."""
    input_size: Size = 1
    """Numbers of a token: channels of a real value, or numbers of a patch."""
    vocab_size: TokenIds = 256
    """Number of token ids V, the rows of the embedding."""
    max_positions: Size = 196
    """Most patches of an image, the rows of the learned positions of patches."""
    head: EncoderHead = "classes"
    """Scores: of classes of a document, of classes of pairs of documents, or of tokens (masked
    language modeling)."""
    num_classes: Size = 10
    """Number of classes."""
    head_bias: bool = False
    """Learned offset of the classes' scores, as in the authors' encoder of images."""
    pooling_residual: bool = True
    """Add the features inside the SiLU before the mean over a document; False in the authors'
    encoder of images."""
    num_layers: Annotated[int, Range(low=1, high=100_000)] = 6
    """Number of blocks, each an attention and a feed-forward network."""
    model_dim: Size = 80
    """Width D of the residual stream."""
    num_heads: Size = 1
    """Number of attention heads H."""
    ffn_hidden_dim: Size = 200
    """Hidden width F of the feed-forward network."""
    chunk_size: Annotated[int | None, Range(low=1, high=2_000_000_000)] = None
    """Tokens C of an attention chunk; attention does not cross chunks. None ("none" in a file and
    on the command line): attention over whole documents."""
    norm_eps: Annotated[float, Range(low=1e-12, high=1.0)] = 1e-5
    """Epsilon added to variances."""
    rope_base: Annotated[float | None, Range(low=0.0, open_low=True)] = 10_000.0
    """Base of the rotary position embedding; None ("none"): no position embedding."""
    init_mode: InitMode = "bert"
    """Initializer of the linear weights."""
    dropout: Rate = 0.0
    """Dropout rate of embeddings, of both sub-layers' outputs, and of the head."""
    hidden_dropout: Rate = 0.0
    """Dropout rate of hidden activations inside the sub-layers."""
    attention_dropout: Rate = 0.0
    """Dropout rate of attention."""
    attention_dropout_mode: Literal["softmax", "dropkey"] = "softmax"
    """Attention dropout of the weights after the softmax, or of the scores before it (DropKey)."""
    drop_path: Rate = 0.0
    """Rate at which training skips whole sub-layers of a document (stochastic depth) in the last
    block; 0 in the first one, and rising linearly between."""
    dtype: EncoderDType = "float32"
    """Dtype of matrix products and activations; norms, averages, softmax and scores are float32.
    float64, for checks, needs JAX's x64 mode."""
    param_dtype: EncoderDType = "float32"
    """Dtype of the parameters."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which devices sum their gradients of the blocks' matrices."""
    remat: Remat = "none"
    """Rematerialization in the backward pass, in order of falling memory: "off" (nothing; FSDP
    keeps gathered weights), "none" (only pointwise operations), "inputs" (also norms, averages and
    the projections that attention needs), "dots" (all but matrix products), "block" (whole
    blocks)."""
    scan_layers: bool = True
    """Run the blocks in one `scan`, so that compile time does not grow with depth. False unrolls
    the blocks, which compiles longer and avoids the scan's copies of activations."""
    attention_implementation: Literal["reference", "xla", "triton"] | None = None
    """Implementation of attention; None: the fastest known for the platform."""
    rowwise_implementation: Implementation | None = None
    """Implementation of RMSNorm, LayerNorm and SiLU gates; None: the fastest known for the
    platform."""

    @property
    def has_dropout(self) -> bool:
        """Whether training needs dropout keys."""
        rates = (self.dropout, self.hidden_dropout, self.attention_dropout, self.drop_path)
        return any(rates)

    @property
    def skip_attention(self) -> int:
        """Blocks without attention at inference: an option of language models."""
        return 0

    @property
    def num_outputs(self) -> int:
        """Scores of a document, or of a token."""
        return self.vocab_size if self.head == "tokens" else self.num_classes

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """A named size from `configs/models/<name>.toml`, with overrides."""
        table = none_from_text(cls, read_preset("models", name), "model")
        return cls(**check_keys(cls, {**table, **overrides}, "model"))
