"""Configuration of the model: sizes, dtypes, rematerialization, implementations."""

from dataclasses import dataclass
from typing import Any, Literal, Self

from megalodon_jax.config.checks import check_keys, check_literals, none_from_text, require
from megalodon_jax.presets import read_preset
from pallas_kernels.common.dispatch import Implementation

DType = Literal["float32", "bfloat16"]
InitMode = Literal["he", "xavier", "bert", "gaussian"]
Remat = Literal["none", "inputs", "dots", "block"]
MovingAverage = Literal["cema", "ema", "none"]
TimeNorm = Literal["timestep", "layer", "rms"]
ResidualConnection = Literal["two_hop", "pre_norm"]
ModelOperation = Literal["cema", "timestep_norm", "attention", "rowwise"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and numerics of a MEGALODON model; the defaults are those of `mega200M`."""

    kind: Literal["megalodon"] = "megalodon"
    """Architecture."""
    num_layers: int = 12
    """Number of blocks, each a gated chunk attention and a feed-forward network."""
    model_dim: int = 1024
    """Width D of the residual stream."""
    z_dim: int = 256
    """Width Z of queries and keys, over all heads."""
    value_dim: int = 2048
    """Width E of values and of their gate, over all heads."""
    num_heads: int = 1
    """Number of attention heads H."""
    ffn_hidden_dim: int = 2560
    """Hidden width F of the feed-forward network."""
    moving_average: MovingAverage = "cema"
    """Moving average before queries, keys and gate: complex (CEMA), real (EMA), or none."""
    cema_ndim: int = 16
    """Order N of the moving average (CEMA or EMA), 1 to 32."""
    chunk_size: int = 2048
    """Tokens C of an attention chunk; attention does not cross chunks."""
    vocab_size: int = 32_000
    """Number of token ids V, the rows of the embedding."""
    output_size: int | None = None
    """Columns of the output matrix; None: `vocab_size`."""
    time_norm: TimeNorm = "timestep"
    """Norm before attention and after the last block: TimestepNorm, LayerNorm or RMSNorm."""
    norm_num_groups: int = 32
    """Number of feature groups G in TimestepNorm."""
    norm_affine: bool = True
    """Learned scale (and bias) in RMSNorm and LayerNorm; TimestepNorm always has them."""
    norm_eps: float = 1e-5
    """Epsilon added to variances."""
    norm_prior_count: int = 0
    """Weight of TimestepNorm's learned prior in tokens; 0: no prior, as in all released models."""
    residual_connection: ResidualConnection = "two_hop"
    """Second residual of a block: from the block's input (two-hop), or from the attention's output
    (pre-norm)."""
    qk_norm: bool = True
    """RMSNorm of every head of the shared projection of queries and keys; False: SiLU instead, and
    scores scaled by 1 / sqrt(z_dim / num_heads)."""
    rope_base: float | None = 10_000.0
    """Base of the rotary position embedding; None ("none" in a file and on the command line): no
    position embedding."""
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
    dropout: float = 0.0
    """Dropout rate of embeddings and of both sub-layers' outputs."""
    hidden_dropout: float = 0.0
    """Dropout rate of hidden activations inside the sub-layers."""
    attention_dropout: float = 0.0
    """Dropout rate of attention."""
    attention_dropout_mode: Literal["softmax", "dropkey"] = "softmax"
    """Attention dropout of the weights after the softmax, or of the scores before it (DropKey)."""
    dtype: DType = "float32"
    """Dtype of matrix products and activations; norms, CEMA, softmax and logits are float32."""
    param_dtype: DType = "float32"
    """Dtype of the parameters; those of CEMA are float32."""
    remat: Remat = "none"
    """Rematerialization in the backward pass, in order of falling memory: "none" (only pointwise
    operations), "inputs" (also TimestepNorm, CEMA and the projections that attention needs), "dots"
    (all but matrix products), "block" (whole blocks)."""
    scan_layers: bool = True
    """Run the blocks in one `scan`, so that compile time does not grow with depth. False unrolls
    the blocks, which compiles longer and avoids the scan's copies of activations."""
    implementation: Implementation | None = None
    """Implementation of all operations; overrides the four settings below. With `pallas_tpu`, norms
    and gates use `xla`, because they have no TPU kernels."""
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
        for name in (
            "num_layers", "model_dim", "z_dim", "value_dim", "num_heads", "ffn_hidden_dim",
            "chunk_size", "vocab_size", "norm_num_groups",
        ):  # fmt: skip
            require(
                getattr(self, name) >= 1,
                f"model.{name} is {getattr(self, name)}; must be at least 1",
            )
        require(1 <= self.cema_ndim <= 32, f"model.cema_ndim is {self.cema_ndim}; use 1 to 32")
        for name in ("dropout", "hidden_dropout", "attention_dropout"):
            rate = getattr(self, name)
            require(0.0 <= rate < 1.0, f"model.{name} is {rate}; must be in [0, 1)")
        for name, dim in (("z_dim", self.z_dim), ("value_dim", self.value_dim)):
            require(
                dim % self.num_heads == 0,
                f"model.{name} {dim} is not a multiple of num_heads {self.num_heads}",
            )
        require(
            self.head_dim % 2 == 0,
            f"z_dim / num_heads is {self.head_dim}; must be even for rotary pairs",
        )
        self._check_norms()
        require(
            self.rope_base is None or self.rope_base > 0.0,
            f"model.rope_base is {self.rope_base}; must be positive, or None",
        )
        for name in ("dtype", "param_dtype"):
            require(
                getattr(self, name) != "float16",
                f"model.{name} is 'float16', which overflows (at 65,504) in the gated products and "
                "needs loss scaling; use 'bfloat16'",
            )
        check_literals(self, "model")
        require(
            self.rowwise_implementation != "pallas_tpu",
            "model.rowwise_implementation is 'pallas_tpu', but norms and gates have no kernels for "
            "TPU; use 'xla', or leave it out",
        )
        require(
            not self.share_emb or self.output_size in (None, self.vocab_size),
            f"model.output_size is {self.output_size} and vocab_size {self.vocab_size}; with "
            "share_emb they must be equal",
        )

    def _check_norms(self) -> None:
        if self.time_norm != "timestep":
            require(
                self.norm_prior_count == 0,
                f"model.norm_prior_count is {self.norm_prior_count} and time_norm "
                f"{self.time_norm!r}; only TimestepNorm has a prior: use 0, or 'timestep'",
            )
            return
        require(
            self.model_dim % self.norm_num_groups == 0 and self.model_dim > self.norm_num_groups,
            f"model_dim {self.model_dim} must be a multiple, two or more, of norm_num_groups "
            f"{self.norm_num_groups}",
        )

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
        if self.implementation == "pallas_tpu" and operation == "rowwise":
            return "xla"
        return self.implementation or getattr(self, f"{operation}_implementation")

    @property
    def num_outputs(self) -> int:
        """Columns of the output matrix."""
        return self.vocab_size if self.output_size is None else self.output_size

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """A named size from `configs/models/<name>.toml`, with overrides."""
        table = none_from_text(cls, read_preset("models", name), "model")
        return cls(**check_keys(cls, {**table, **overrides}, "model"))
