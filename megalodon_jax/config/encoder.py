"""Configuration of the encoder: what enters it, its blocks, its head."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from megalodon_jax.config.checks import Rule, check, check_keys, none_from_text
from megalodon_jax.config.model import (
    InitMode,
    ModelOperation,
    MovingAverage,
    Remat,
    ResidualConnection,
)
from megalodon_jax.config.ranges import Range, Rate, Size, TokenIds
from megalodon_jax.presets import read_preset
from pallas_kernels.common.dispatch import Implementation

EncoderInputKind = Literal["tokens", "values", "patches"]
EncoderHead = Literal["classes", "pairs", "tokens"]
EncoderNorm = Literal["sequence", "timestep", "layer", "rms"]
EncoderDType = Literal["float32", "bfloat16", "float64"]

RULES = (
    Rule(
        lambda c: c.z_dim % c.num_heads == 0 and c.value_dim % c.num_heads == 0,
        "model.z_dim {c.z_dim} and value_dim {c.value_dim} must be multiples of num_heads "
        "{c.num_heads}",
    ),
    Rule(
        lambda c: c.head_dim % 2 == 0 and c.head_dim > 0,
        "z_dim / num_heads is {c.head_dim}; must be even for rotary pairs",
    ),
    Rule(
        lambda c: c.norm_num_groups is None or c.model_dim % c.norm_num_groups == 0,
        "model_dim {c.model_dim} must be a multiple of norm_num_groups {c.norm_num_groups}",
    ),
    Rule(
        lambda c: (
            c.time_norm != "timestep"
            or (c.norm_num_groups is not None and c.model_dim > c.norm_num_groups)
        ),
        "model.time_norm is 'timestep' with norm_num_groups {c.norm_num_groups}; TimestepNorm "
        "needs groups of two channels or more",
    ),
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
        lambda c: c.causal or c.implementation in (None, "reference", "xla", "triton"),
        "model.implementation is {c.implementation!r}, but non-causal attention has 'reference', "
        "'xla' and 'triton'; use one of them, or cema_implementation and rowwise_implementation",
    ),
    Rule(
        lambda c: c.rowwise_implementation != "pallas_tpu",
        "model.rowwise_implementation is 'pallas_tpu', but norms and gates have no kernels for "
        "TPU; use 'xla', or leave it out",
    ),
)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Sizes and numerics of an encoder; the defaults are those of ListOps in the paper."""

    kind: Literal["encoder"] = "encoder"
    """Architecture."""
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
    """Number of blocks, each a gated attention and a feed-forward network."""
    model_dim: Size = 80
    """Width D of the residual stream."""
    z_dim: Size = 64
    """Width Z of queries and keys, over all heads."""
    value_dim: Size = 160
    """Width E of values and of their gate, over all heads."""
    num_heads: Size = 1
    """Number of attention heads H."""
    ffn_hidden_dim: Size = 200
    """Hidden width F of the feed-forward network."""
    moving_average: MovingAverage = "cema"
    """Moving average before queries, keys and gate: complex (CEMA), real (EMA), or none."""
    cema_ndim: Annotated[int, Range(low=1, high=32)] = 16
    """Order N of the moving average in each direction, 1 to 32."""
    average_activation: Literal["rms", "silu"] = "rms"
    """Activation after the moving average: RMSNorm or SiLU."""
    causal: bool = False
    """See only the tokens up to each token, as a language model does, for comparisons."""
    chunk_size: Annotated[int | None, Range(low=1, high=2_000_000_000)] = None
    """Tokens C of an attention chunk; attention does not cross chunks. None ("none" in a file and
    on the command line): attention over whole documents."""
    time_norm: EncoderNorm = "sequence"
    """Norm before attention and after the last block: SequenceNorm (over a document), TimestepNorm,
    LayerNorm or RMSNorm."""
    norm_num_groups: Annotated[int | None, Range(low=1, high=1_000_000)] = None
    """Number of feature groups G in SequenceNorm and TimestepNorm; None ("none"): every channel is
    a group."""
    norm_eps: Annotated[float, Range(low=1e-12, high=1.0)] = 1e-5
    """Epsilon added to variances."""
    residual_connection: ResidualConnection = "two_hop"
    """Second residual of a block: from the block's input (two-hop), or from the attention's output
    (pre-norm)."""
    rescale_nffn: bool = False
    """Multiply the feed-forward output by a learned vector with initial value 0.1 * 0.5^layer."""
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
    dtype: EncoderDType = "float32"
    """Dtype of matrix products and activations; norms, averages, softmax and scores are float32.
    float64, for checks, needs JAX's x64 mode."""
    param_dtype: EncoderDType = "float32"
    """Dtype of the parameters; those of CEMA are float32 (float64 with float64)."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which devices sum their gradients of the blocks' matrices."""
    remat: Remat = "none"
    """Rematerialization in the backward pass, in order of falling memory: "none" (only pointwise
    operations), "inputs" (also averages and the projections that attention needs), "dots" (all but
    matrix products), "block" (whole blocks)."""
    scan_layers: bool = True
    """Run the blocks in one `scan`, so that compile time does not grow with depth. False unrolls
    the blocks, which compiles longer and avoids the scan's copies of activations."""
    implementation: Implementation | None = None
    """Implementation of all operations; overrides the four settings below."""
    cema_implementation: Implementation | None = None
    """Implementation of CEMA; None: the fastest known for the platform."""
    timestep_norm_implementation: Implementation | None = None
    """Implementation of TimestepNorm; None: the fastest known for the platform."""
    attention_implementation: Literal["reference", "xla", "triton"] | None = None
    """Implementation of attention; None: the fastest known for the platform."""
    rowwise_implementation: Implementation | None = None
    """Implementation of RMSNorm, LayerNorm and SiLU gates; None: the fastest known for the
    platform."""

    def __post_init__(self) -> None:
        check(self, "model", RULES)

    @property
    def head_dim(self) -> int:
        """Width of one query/key head."""
        return self.z_dim // self.num_heads

    @property
    def has_dropout(self) -> bool:
        """Whether training needs dropout keys."""
        return bool(self.dropout or self.hidden_dropout or self.attention_dropout)

    @property
    def skip_attention(self) -> int:
        """Blocks without attention at inference: an option of language models."""
        return 0

    @property
    def num_outputs(self) -> int:
        """Scores of a document, or of a token."""
        return self.vocab_size if self.head == "tokens" else self.num_classes

    def implementation_of(self, operation: ModelOperation) -> Implementation | None:
        """The implementation of an operation; None: the fastest known for the platform."""
        return self.implementation or getattr(self, f"{operation}_implementation")

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """A named size from `configs/models/<name>.toml`, with overrides."""
        table = none_from_text(cls, read_preset("models", name), "model")
        return cls(**check_keys(cls, {**table, **overrides}, "model"))
