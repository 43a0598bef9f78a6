"""The norm before attention and after the last block: over time, or of single tokens."""

from typing import Any, Literal, NamedTuple

from jax import numpy as jnp
from jax.typing import DTypeLike

from megalodon_jax.config import ModelConfig, TimeNorm
from megalodon_jax.modules.norms import LayerNorm, RMSNorm
from megalodon_jax.modules.options import Implementations
from megalodon_jax.modules.sequence_norm import SequenceNorm
from megalodon_jax.modules.timestep_norm import TimestepNorm
from megalodon_jax.typing import Array, Float, Int32
from pallas_kernels.timestep_norm import TimestepNormState

TimeNormModule = TimestepNorm | SequenceNorm | LayerNorm | RMSNorm


class TimeNormOutput(NamedTuple):
    """Normalized features; the state after them, None but for TimestepNorm."""

    y: Float[Array, "B L D"]
    final_state: TimestepNormState | None


def make_time_norm(
    kind: TimeNorm | Literal["sequence"],
    features: int,
    *,
    num_groups: int | None = 32,
    prior_count: int = 0,
    eps: float = 1e-5,
    affine: bool = True,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    implementations: Implementations | None = None,
) -> TimeNormModule:
    """The norm of a kind.

    Args:
      kind: "timestep", "layer" or "rms"; "sequence" in encoders.
      features: channels D.
      num_groups: groups of TimestepNorm and SequenceNorm; None: every channel is one.
      prior_count: see `TimestepNorm`.
      eps: added to variances.
      affine: whether LayerNorm and RMSNorm have learned parameters; the others always have them.
      dtype: of the result.
      param_dtype: of the parameters.
      implementations: of the operations; None: the fastest known for the platform.

    Raises:
      ValueError: there is no such kind.
    """
    implementations = implementations or Implementations()
    options: Any = {"eps": eps, "dtype": dtype, "param_dtype": param_dtype}
    by_row: Any = {"affine": affine, "implementation": implementations.rowwise, **options}
    match kind:
        case "timestep":
            return TimestepNorm(
                features,
                num_groups=features if num_groups is None else num_groups,
                prior_count=prior_count,
                implementation=implementations.timestep_norm,
                **options,
            )
        case "sequence":
            return SequenceNorm(features, num_groups=num_groups, **options)
        case "layer":
            return LayerNorm(features, **by_row)
        case "rms":
            return RMSNorm(features, **by_row)
        case _:
            raise ValueError(f"time_norm is {kind!r}; use 'timestep', 'sequence', 'layer' or 'rms'")


def time_norm_from_config(config: ModelConfig) -> TimeNormModule:
    """The norm after a model's last block."""
    return make_time_norm(
        config.time_norm,
        config.model_dim,
        num_groups=config.norm_num_groups,
        prior_count=config.norm_prior_count,
        eps=config.norm_eps,
        affine=config.norm_affine,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        implementations=Implementations.from_config(config),
    )


def normalize(
    norm: TimeNormModule,
    x: Float[Array, "B L D"],
    *,
    segment_ids: Int32[Array, "B L"] | None,
    initial_state: TimestepNormState | None,
    lengths: Int32[Array, "B M"] | None = None,
) -> TimeNormOutput:
    """Normalizes x; arguments as in `TimestepNorm` and `SequenceNorm`, other norms need only x.

    Padding becomes 0 in norms over time; other norms normalize it like a token.
    """
    if isinstance(norm, SequenceNorm):
        return TimeNormOutput(norm(x, segment_ids=segment_ids, lengths=lengths), None)
    if isinstance(norm, TimestepNorm):
        return TimeNormOutput(*norm(x, segment_ids=segment_ids, initial_state=initial_state))
    return TimeNormOutput(norm(x), None)


def init_norm_state(norm: TimeNormModule, batch_size: int) -> TimestepNormState | None:
    """The state of documents before their first token; None for norms without one."""
    return norm.init_state(batch_size) if isinstance(norm, TimestepNorm) else None
