"""Configuration of the Transformer that MEGALODON is compared with."""

from dataclasses import dataclass
from typing import Any, Literal, Self

from megalodon_jax.config.checks import check_keys, check_literals, none_from_text, require
from megalodon_jax.config.model import DType, InitMode, Remat
from megalodon_jax.presets import read_preset
from pallas_kernels.common.dispatch import Implementation

AttentionImplementation = Literal["reference", "xla", "cudnn", "splash"]


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes and numerics of a Llama-2-shaped Transformer; the defaults are `transformer200M`."""

    kind: Literal["transformer"] = "transformer"
    """Architecture."""
    num_layers: int = 12
    """Number of blocks, each an attention and a feed-forward network."""
    model_dim: int = 1024
    """Width D of the residual stream."""
    num_heads: int = 8
    """Number of query heads H, each `model_dim / num_heads` wide."""
    num_kv_heads: int | None = None
    """Number of key and value heads (grouped-query attention); None: `num_heads`."""
    ffn_hidden_dim: int = 2816
    """Hidden width F of the SwiGLU feed-forward network."""
    attention_window: int | None = None
    """Tokens that a token sees, its own included (sliding window); None: all before it."""
    vocab_size: int = 32_000
    """Number of token ids V, the rows of the embedding."""
    output_size: int | None = None
    """Columns of the output matrix; None: `vocab_size`."""
    norm_eps: float = 1e-5
    """Epsilon added to mean squares in RMSNorm."""
    rope_base: float | None = 10_000.0
    """Base of the rotary position embedding; none: no position embedding."""
    share_emb: bool = False
    """Tie the output matrix to the embedding."""
    init_mode: InitMode = "bert"
    """Initializer of the linear weights; "bert" is N(0, 0.02^2)."""
    dtype: DType = "float32"
    """Dtype of matrix products and activations; norms, softmax and logits are float32."""
    param_dtype: DType = "float32"
    """Dtype of the parameters."""
    remat: Remat = "none"
    """Rematerialization in the backward pass, in order of falling memory: "none" (only pointwise
    operations), "inputs" (also norms and the projections that attention needs), "dots" (all but
    matrix products), "block" (whole blocks)."""
    scan_layers: bool = True
    """Run the blocks in one `scan`, so that compile time does not grow with depth. False unrolls
    the blocks, which compiles longer and avoids the scan's copies of activations."""
    attention_implementation: AttentionImplementation | None = None
    """Implementation of attention: cuDNN's kernels on NVIDIA GPUs ("cudnn"), splash attention on
    TPUs ("splash"), plain JAX ("xla"); None: the fastest known for the platform."""
    rowwise_implementation: Implementation | None = None
    """Implementation of RMSNorm and the SiLU gate; None: the fastest known for the platform."""

    def __post_init__(self) -> None:
        for name in (
            "num_layers", "model_dim", "num_heads", "num_kv_heads", "ffn_hidden_dim",
            "attention_window", "vocab_size", "output_size",
        ):  # fmt: skip
            value = getattr(self, name)
            require(value is None or value >= 1, f"model.{name} is {value}; must be at least 1")
        require(
            self.model_dim % self.num_heads == 0 and self.head_dim % 2 == 0,
            f"model.model_dim {self.model_dim} over num_heads {self.num_heads} must give an even "
            "head width, for rotary pairs",
        )
        require(
            self.num_heads % self.kv_heads == 0,
            f"model.num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}",
        )
        for name in ("dtype", "param_dtype"):
            require(
                getattr(self, name) != "float16",
                f"model.{name} is 'float16', which needs loss scaling; use 'bfloat16'",
            )
        require(
            self.rope_base is None or self.rope_base > 0,
            f"model.rope_base is {self.rope_base}; must be positive, or none",
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
