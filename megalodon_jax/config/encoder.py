"""Configuration of MEGALODON's encoder: its moving average, norms and residuals."""

from dataclasses import dataclass
from typing import Annotated, Literal

from megalodon_jax.config.checks import Rule, check
from megalodon_jax.config.encoder_settings import ENCODER_RULES, EncoderDType, EncoderSettings
from megalodon_jax.config.model import ModelOperation, MovingAverage, ResidualConnection
from megalodon_jax.config.ranges import Range, Size
from pallas_kernels.common.dispatch import Implementation

EncoderNorm = Literal["sequence", "timestep", "layer", "rms"]

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
        lambda c: c.causal or c.implementation in (None, "reference", "xla", "triton"),
        "model.implementation is {c.implementation!r}, but non-causal attention has 'reference', "
        "'xla' and 'triton'; use one of them, or cema_implementation and rowwise_implementation",
    ),
    *ENCODER_RULES,
)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(EncoderSettings):
    """Sizes and numerics of an encoder; the defaults are those of ListOps in the paper."""

    kind: Literal["encoder"] = "encoder"
    """Architecture."""
    z_dim: Size = 64
    """Width Z of queries and keys, over all heads."""
    value_dim: Size = 160
    """Width E of values and of their gate, over all heads."""
    moving_average: MovingAverage = "cema"
    """Moving average before queries, keys and gate: complex (CEMA), real (EMA), or none."""
    cema_ndim: Annotated[int, Range(low=1, high=32)] = 16
    """Order N of the moving average in each direction, 1 to 32."""
    average_activation: Literal["rms", "silu"] = "rms"
    """Activation after the moving average: RMSNorm or SiLU."""
    causal: bool = False
    """See only the tokens up to each token, as a language model does, for comparisons."""
    time_norm: EncoderNorm = "sequence"
    """Norm before attention and after the last block: SequenceNorm (over a document), TimestepNorm,
    LayerNorm or RMSNorm."""
    norm_num_groups: Annotated[int | None, Range(low=1, high=1_000_000)] = None
    """Number of feature groups G in SequenceNorm and TimestepNorm; None ("none"): every channel is
    a group."""
    residual_connection: ResidualConnection = "two_hop"
    """Second residual of a block: from the block's input (two-hop), or from the attention's output
    (pre-norm)."""
    rescale_nffn: bool = False
    """Multiply the feed-forward output by a learned vector with initial value 0.1 * 0.5^layer."""
    param_dtype: EncoderDType = "float32"
    """Dtype of the parameters; those of CEMA are float32 (float64 with float64)."""
    implementation: Implementation | None = None
    """Implementation of all operations; overrides those of single ones."""
    cema_implementation: Implementation | None = None
    """Implementation of CEMA; None: the fastest known for the platform."""
    timestep_norm_implementation: Implementation | None = None
    """Implementation of TimestepNorm; None: the fastest known for the platform."""

    def __post_init__(self) -> None:
        check(self, "model", RULES)

    @property
    def head_dim(self) -> int:
        """Width of one query/key head."""
        return self.z_dim // self.num_heads

    def implementation_of(self, operation: ModelOperation) -> Implementation | None:
        """The implementation of an operation; None: the fastest known for the platform."""
        return self.implementation or getattr(self, f"{operation}_implementation")
