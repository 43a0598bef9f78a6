"""Configuration of the model: sizes, dtypes, rematerialization, implementations."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from megalodon_jax.config.checks import Rule, check, check_keys, none_from_text
from megalodon_jax.config.ranges import Range, Rate, Size, TokenIds, Tokens
from megalodon_jax.presets import read_preset
from pallas_kernels.common.dispatch import Implementation

DType = Literal["float32", "bfloat16"]
InitMode = Literal["he", "xavier", "bert", "gaussian"]
Remat = Literal["off", "none", "inputs", "dots", "block"]
MovingAverage = Literal["cema", "ema", "none"]
TimeNorm = Literal["timestep", "layer", "rms"]
ResidualConnection = Literal["two_hop", "pre_norm"]
ModelOperation = Literal["cema", "timestep_norm", "attention", "rowwise"]
# Formats of decoding: the dtype of the model, or 8-bit integers.
WeightFormat = Literal["model", "int8"]
KvFormat = Literal["model", "int8"]

# Operations that have no kernels of an implementation.
_WITHOUT_KERNELS = {("pallas_tpu", "rowwise")}

# Rules of every kind of model.
SHARED_RULES = (
    Rule(
        # Smaller and larger bases give angles that float32 cannot hold.
        lambda c: c.rope_base is None or 1.0 <= c.rope_base <= 1e12,
        "model.rope_base is {c.rope_base}; must be in [1, 1e12], or None",
    ),
    Rule(
        lambda c: c.rowwise_implementation != "pallas_tpu",
        "model.rowwise_implementation is 'pallas_tpu', but norms and gates have no kernels for "
        "TPU; use 'xla', or leave it out",
    ),
    Rule(
        lambda c: not c.share_emb or c.output_size in (None, c.vocab_size),
        "model.output_size is {c.output_size} and vocab_size {c.vocab_size}; with share_emb they "
        "must be equal",
    ),
    Rule(
        lambda c: c.skip_attention <= c.num_layers,
        "model.skip_attention is {c.skip_attention}, but the model has {c.num_layers} layers",
    ),
)
RULES = (
    Rule(
        lambda c: c.z_dim % c.num_heads == 0,
        "model.z_dim {c.z_dim} is not a multiple of num_heads {c.num_heads}",
    ),
    Rule(
        lambda c: c.value_dim % c.num_heads == 0,
        "model.value_dim {c.value_dim} is not a multiple of num_heads {c.num_heads}",
    ),
    Rule(
        lambda c: c.head_dim % 2 == 0 and c.head_dim > 0,
        "z_dim / num_heads is {c.head_dim}; must be even for rotary pairs",
    ),
    Rule(
        lambda c: c.time_norm == "timestep" or c.norm_prior_count == 0,
        "model.norm_prior_count is {c.norm_prior_count} and time_norm {c.time_norm!r}; only "
        "TimestepNorm has a prior: use 0, or 'timestep'",
    ),
    Rule(
        lambda c: (
            c.time_norm != "timestep"
            or (c.model_dim % c.norm_num_groups == 0 and c.model_dim > c.norm_num_groups)
        ),
        "model_dim {c.model_dim} must be a multiple, two or more, of norm_num_groups "
        "{c.norm_num_groups}",
    ),
    *SHARED_RULES,
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and numerics of a MEGALODON model; the defaults are those of `mega200M`."""

    kind: Literal["megalodon"] = "megalodon"
    """Architecture."""
    num_layers: Annotated[int, Range(low=1, high=100_000)] = 12
    """Number of blocks, each a gated chunk attention and a feed-forward network."""
    model_dim: Size = 1024
    """Width D of the residual stream."""
    z_dim: Size = 256
    """Width Z of queries and keys, over all heads."""
    value_dim: Size = 2048
    """Width E of values and of their gate, over all heads."""
    num_heads: Size = 1
    """Number of attention heads H."""
    ffn_hidden_dim: Size = 2560
    """Hidden width F of the feed-forward network."""
    moving_average: MovingAverage = "cema"
    """Moving average before queries, keys and gate: complex (CEMA), real (EMA), or none."""
    cema_ndim: Annotated[int, Range(low=1, high=32)] = 16
    """Order N of the moving average (CEMA or EMA), 1 to 32."""
    chunk_size: Tokens = 2048
    """Tokens C of an attention chunk; attention does not cross chunks."""
    vocab_size: TokenIds = 32_000
    """Number of token ids V, the rows of the embedding."""
    output_size: Annotated[int | None, Range(low=1, high=100_000_000)] = None
    """Columns of the output matrix; None: `vocab_size`."""
    time_norm: TimeNorm = "timestep"
    """Norm before attention and after the last block: TimestepNorm, LayerNorm or RMSNorm."""
    norm_num_groups: Size = 32
    """Number of feature groups G in TimestepNorm."""
    norm_affine: bool = True
    """Learned scale (and bias) in RMSNorm and LayerNorm; TimestepNorm always has them."""
    norm_eps: Annotated[float, Range(low=1e-12, high=1.0)] = 1e-5
    """Epsilon added to variances."""
    norm_prior_count: Annotated[int, Range(low=0, high=1_000_000_000)] = 0
    """Weight of TimestepNorm's learned prior in tokens; 0: no prior, as in all released models."""
    residual_connection: ResidualConnection = "two_hop"
    """Second residual of a block: from the block's input (two-hop), or from the attention's output
    (pre-norm)."""
    qk_norm: bool = True
    """RMSNorm of every head of the shared projection of queries and keys; False: SiLU instead, and
    scores scaled by 1 / sqrt(z_dim / num_heads)."""
    qk_gain: Annotated[float, Range(low=0.0, high=100.0, open_low=True)] = 1.0
    """Initial scale of queries and of keys; with qk_norm a score is at most its square at first. 1
    is the released one."""
    rope_base: Annotated[float | None, Range(low=0.0, open_low=True)] = 10_000.0
    """Base of the rotary position embedding; None ("none" in a file and on the command line): no
    position embedding."""
    skip_attention: Annotated[int, Range(low=0, high=100_000)] = 0
    """Last blocks whose attention sub-layer is left out at inference (Tyukin et al. 2024); a
    training run refuses it."""
    swiglu: bool = False
    """SwiGLU feed-forward network: (silu(x W1) * (x W3)) W2."""
    rescale_nffn: bool = False
    """Multiply the feed-forward output by a learned vector with initial value 0.1 * 0.5^layer."""
    scale_emb: bool = False
    """Multiply embeddings by sqrt(model_dim)."""
    share_emb: bool = False
    """Tie the output matrix to the embedding."""
    init_mode: InitMode = "he"
    """Initializer of the linear weights."""
    dropout: Rate = 0.0
    """Dropout rate of embeddings and of both sub-layers' outputs."""
    hidden_dropout: Rate = 0.0
    """Dropout rate of hidden activations inside the sub-layers."""
    attention_dropout: Rate = 0.0
    """Dropout rate of attention."""
    attention_dropout_mode: Literal["softmax", "dropkey"] = "softmax"
    """Attention dropout of the weights after the softmax, or of the scores before it (DropKey)."""
    dtype: DType = "float32"
    """Dtype of matrix products and activations; norms, CEMA, softmax and logits are float32."""
    param_dtype: DType = "float32"
    """Dtype of the parameters; those of CEMA are float32."""
    reduce_dtype: DType = "float32"
    """Dtype in which devices sum their gradients of the blocks' matrices. "bfloat16" halves the
    bytes of these collectives, and rounds the gradients. One device keeps float32."""
    remat: Remat = "none"
    """Rematerialization in the backward pass, in order of falling memory: "off" (nothing; FSDP
    keeps gathered weights), "none" (only pointwise operations), "inputs" (also TimestepNorm, CEMA
    and the projections that attention needs), "dots" (all but matrix products), "block" (whole
    blocks)."""
    scan_layers: bool = True
    """Run the blocks in one `scan`, so that compile time does not grow with depth. False unrolls
    the blocks, which compiles longer and avoids the scan's copies of activations."""
    implementation: Implementation | None = None
    """Implementation of all operations; overrides the four settings below. Norms and gates, which
    have no `pallas_tpu` kernels, then use `xla`. So does, with `triton`, the attention of rows of
    one document without a cache, where `xla` was the faster one (docs/gpus.md)."""
    cema_implementation: Implementation | None = None
    """Implementation of CEMA; None: the fastest known for the platform."""
    timestep_norm_implementation: Implementation | None = None
    """Implementation of TimestepNorm; None: the fastest known for the platform."""
    attention_implementation: Implementation | None = None
    """Implementation of chunk attention; None: the fastest known for the platform."""
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
    def value_head_dim(self) -> int:
        """Width of one value head."""
        return self.value_dim // self.num_heads

    @property
    def has_dropout(self) -> bool:
        """Whether training needs dropout keys."""
        return bool(self.dropout or self.hidden_dropout or self.attention_dropout)

    def implementation_of(self, operation: ModelOperation) -> Implementation | None:
        """The implementation of an operation; None: the fastest known for the platform."""
        if (self.implementation, operation) in _WITHOUT_KERNELS:
            return "xla"
        return self.implementation or getattr(self, f"{operation}_implementation")

    @property
    def whole_row_attention_implementation(self) -> Implementation | None:
        """The implementation of attention over rows of one document, without a cache."""
        return "xla" if self.implementation == "triton" else self.implementation_of("attention")

    @property
    def num_outputs(self) -> int:
        """Columns of the output matrix."""
        return self.vocab_size if self.output_size is None else self.output_size

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """A named size from `configs/models/<name>.toml`, with overrides."""
        table = none_from_text(cls, read_preset("models", name), "model")
        return cls(**check_keys(cls, {**table, **overrides}, "model"))
