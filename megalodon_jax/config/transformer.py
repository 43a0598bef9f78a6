"""Configuration of the Transformer that MEGALODON is compared with."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from megalodon_jax.config.checks import Rule, check, check_keys, none_from_text
from megalodon_jax.config.model import SHARED_RULES, DType, InitMode, Remat
from megalodon_jax.config.ranges import Range, Size, TokenIds
from megalodon_jax.presets import read_preset
from pallas_kernels.common.dispatch import Implementation

AttentionImplementation = Literal["reference", "xla", "cudnn", "splash"]

RULES = (
    Rule(
        lambda c: c.model_dim % c.num_heads == 0 and c.head_dim % 2 == 0,
        "model.model_dim {c.model_dim} over num_heads {c.num_heads} must give an even head width, "
        "for rotary pairs",
    ),
    Rule(
        lambda c: c.num_heads % c.kv_heads == 0,
        "model.num_heads {c.num_heads} is not a multiple of num_kv_heads {c.kv_heads}",
    ),
    *SHARED_RULES,
)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes and numerics of a Llama-2-shaped Transformer; the defaults are `transformer200M`."""

    kind: Literal["transformer"] = "transformer"
    """Architecture."""
    num_layers: Annotated[int, Range(low=1, high=100_000)] = 12
    """Number of blocks, each an attention and a feed-forward network."""
    model_dim: Size = 1024
    """Width D of the residual stream."""
    num_heads: Size = 8
    """Number of query heads H, each `model_dim / num_heads` wide."""
    num_kv_heads: Annotated[int | None, Range(low=1, high=1_000_000)] = None
    """Number of key and value heads (grouped-query attention); None: `num_heads`."""
    ffn_hidden_dim: Size = 2816
    """Hidden width F of the SwiGLU feed-forward network."""
    attention_window: Annotated[int | None, Range(low=1, high=2_000_000_000)] = None
    """Tokens that a token sees, its own included (sliding window); None: all before it."""
    vocab_size: TokenIds = 32_000
    """Number of token ids V, the rows of the embedding."""
    output_size: Annotated[int | None, Range(low=1, high=100_000_000)] = None
    """Columns of the output matrix; None: `vocab_size`."""
    norm_eps: Annotated[float, Range(low=1e-12, high=1.0)] = 1e-5
    """Epsilon added to mean squares in RMSNorm."""
    rope_base: Annotated[float | None, Range(low=0.0, open_low=True)] = 10_000.0
    """Base of the rotary position embedding; none: no position embedding."""
    skip_attention: Annotated[int, Range(low=0, high=100_000)] = 0
    """Last blocks whose attention is left out at inference (Tyukin et al. 2024); a training run
    refuses it."""
    share_emb: bool = False
    """Tie the output matrix to the embedding."""
    init_mode: InitMode = "bert"
    """Initializer of the linear weights; "bert" is N(0, 0.02^2)."""
    dtype: DType = "float32"
    """Dtype of matrix products and activations; norms, softmax and logits are float32."""
    param_dtype: DType = "float32"
    """Dtype of the parameters."""
    reduce_dtype: DType = "float32"
    """Dtype in which devices sum their gradients of the blocks' matrices. "bfloat16" halves the
    bytes of these collectives, and rounds the gradients. One device keeps float32."""
    remat: Remat = "none"
    """Rematerialization in the backward pass, in order of falling memory: "off" (nothing; FSDP
    keeps gathered weights), "none" (only pointwise operations), "inputs" (also norms and the
    projections that attention needs), "dots" (all but matrix products), "block" (whole blocks)."""
    scan_layers: bool = True
    """Run the blocks in one `scan`, so that compile time does not grow with depth. False unrolls
    the blocks, which compiles longer and avoids the scan's copies of activations."""
    attention_implementation: AttentionImplementation | None = None
    """Implementation of attention: cuDNN's kernels on NVIDIA GPUs ("cudnn"), splash attention on
    TPUs ("splash"), plain JAX ("xla"); None: the fastest known for the platform."""
    rowwise_implementation: Implementation | None = None
    """Implementation of RMSNorm and the SiLU gate; None: the fastest known for the platform."""

    def __post_init__(self) -> None:
        check(self, "model", RULES)

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.model_dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def num_outputs(self) -> int:
        """Columns of the output matrix."""
        return self.vocab_size if self.output_size is None else self.output_size

    def implementation_of(
        self, operation: Literal["attention", "rowwise"]
    ) -> AttentionImplementation | Implementation | None:
        """The implementation of an operation; None: the fastest known for the platform."""
        if operation == "attention":
            return self.attention_implementation
        return self.rowwise_implementation

    @property
    def has_dropout(self) -> bool:
        """Whether training needs dropout keys; Llama-2 has no dropout."""
        return False

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """A named size from `configs/models/<name>.toml`, with overrides."""
        table = none_from_text(cls, read_preset("models", name), "model")
        return cls(**check_keys(cls, {**table, **overrides}, "model"))
