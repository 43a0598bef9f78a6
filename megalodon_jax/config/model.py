"""The shape of a MEGALODON model and how it computes."""

from dataclasses import dataclass
from typing import Any, Literal, Self

from megalodon_jax.config.checks import check_keys, check_literals, require
from megalodon_jax.presets import read_preset
from pallas_kernels.common.dispatch import Implementation

DType = Literal["float32", "bfloat16"]
InitMode = Literal["he", "xavier", "bert", "gaussian"]
Remat = Literal["none", "inputs", "dots", "block"]
ModelOperation = Literal["cema", "timestep_norm", "attention", "rowwise"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a MEGALODON model and how it computes. Defaults are `mega200M`'s."""

    kind: Literal["megalodon"] = "megalodon"
    """Architecture of the model."""
    num_layers: int = 12
    """Blocks, each one gated chunk attention and one feed-forward network."""
    model_dim: int = 1024
    """Width D of the residual stream."""
    z_dim: int = 256
    """Width Z of queries and keys, all heads together."""
    value_dim: int = 2048
    """Width E of values and of their gate, all heads together."""
    num_heads: int = 1
    """Attention heads H."""
    ffn_hidden_dim: int = 2560
    """Hidden width F of the feed-forward network."""
    cema_ndim: int = 16
    """Orders N of the complex moving average in every channel, 1 to 32."""
    chunk_size: int = 2048
    """Tokens C that attend to one another; attention never crosses a chunk."""
    vocab_size: int = 32_000
    """Rows V of the embedding."""
    output_size: int | None = None
    """Columns of the output matrix; `vocab_size` if not set."""
    norm_num_groups: int = 32
    """Feature groups G of every TimestepNorm."""
    norm_affine: bool = True
    """Learned scale (and bias) in RMSNorm and LayerNorm. TimestepNorm always has them."""
    norm_eps: float = 1e-5
    """Added to variances before the square root."""
    norm_prior_count: int = 0
    """Tokens that TimestepNorm's learned prior weighs; 0: none, as in every released model."""
    rope_base: float = 10_000.0
    """Base of the rotary angles."""
    swiglu: bool = False
    """Gate the feed-forward network: (silu(x W1) * (x W3)) W2."""
    rescale_nffn: bool = False
    """Multiply the feed-forward output by a learned vector that starts at 0.1 * 0.5^layer."""
    scale_emb: bool = False
    """Multiply embeddings by sqrt(model_dim)."""
    share_emb: bool = False
    """Use the embedding, transposed, as the output matrix."""
    init_mode: InitMode = "he"
    """Start values of the linear weights."""
    dropout: float = 0.0
    """Dropped fraction of embeddings and of both sub-layers' outputs."""
    hidden_dropout: float = 0.0
    """Dropped fraction inside the sub-layers."""
    attention_dropout: float = 0.0
    """Dropped fraction of attention."""
    attention_dropout_mode: Literal["softmax", "dropkey"] = "softmax"
    """Where attention drops: weights after the softmax, or scores before it (DropKey)."""
    dtype: DType = "float32"
    """Type of matrix products and activations. Norms, CEMA, softmax and logits stay float32."""
    param_dtype: DType = "float32"
    """Type in which weights are kept. CEMA's parameters stay float32."""
    remat: Remat = "none"
    """What the backward pass computes again beside pointwise work: nothing ("none"), TimestepNorm,
    CEMA and the projections that attention needs ("inputs"), all but matrix products ("dots"), or
    whole blocks ("block"). In this order memory falls."""
    scan_layers: bool = True
    """Run the blocks in one loop, so that compile time does not grow with depth. False writes them
    out one after another, which compiles longer and saves the loop's copies of activations."""
    implementation: Implementation | None = None
    """Implementation of all operations, in place of the four settings below; if not set, they
    decide. `pallas_tpu` has no kernels for norms and gates, which then use `xla`."""
    cema_implementation: Implementation | None = None
    """Implementation of CEMA; the fastest known for the platform if not set."""
    timestep_norm_implementation: Implementation | None = None
    """Implementation of TimestepNorm; the fastest known for the platform if not set."""
    attention_implementation: Implementation | None = None
    """Implementation of chunk attention; the fastest known for the platform if not set."""
    rowwise_implementation: Implementation | None = None
    """Implementation of RMSNorm, LayerNorm and SiLU gates; the fastest known for the platform if
    not set."""

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
            f"z_dim / num_heads is {self.head_dim}; rotary pairs need an even number",
        )
        require(
            self.model_dim % self.norm_num_groups == 0 and self.model_dim > self.norm_num_groups,
            f"model_dim {self.model_dim} must be a multiple, two or more, of norm_num_groups "
            f"{self.norm_num_groups}",
        )
        for name in ("dtype", "param_dtype"):
            require(
                getattr(self, name) != "float16",
                f"model.{name} float16 is refused: its range (65,504) overflows in the gated "
                "products and needs loss scaling; use bfloat16",
            )
        check_literals(self, "model")
        require(
            self.rowwise_implementation != "pallas_tpu",
            "model.rowwise_implementation is 'pallas_tpu', but norms and gates have no kernels for "
            "TPU; use 'xla', or leave it out",
        )
        require(
            not self.share_emb or self.output_size in (None, self.vocab_size),
            f"share_emb needs output_size == vocab_size, got {self.output_size} and "
            f"{self.vocab_size}",
        )

    @property
    def head_dim(self) -> int:
        """Width of one query/key head."""
        return self.z_dim // self.num_heads

    @property
    def value_head_dim(self) -> int:
        """Width of one value head."""
        return self.value_dim // self.num_heads

    def implementation_of(self, operation: ModelOperation) -> Implementation | None:
        """The implementation that an operation uses; None: the fastest known for the platform."""
        if self.implementation == "pallas_tpu" and operation == "rowwise":
            return "xla"
        return self.implementation or getattr(self, f"{operation}_implementation")

    @property
    def num_outputs(self) -> int:
        """Columns of the output matrix."""
        return self.vocab_size if self.output_size is None else self.output_size

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """A named size, read from `configs/models/<name>.toml`, with some fields changed."""
        table = read_preset("models", name)
        return cls(**check_keys(cls, {**table, **overrides}, "model"))
