"""TimestepNorm as a Flax module; the operation is `pallas_kernels.timestep_norm`."""

from typing import Self

from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike

from megalodon_jax.config import ModelConfig
from megalodon_jax.modules.parameters import parameter
from megalodon_jax.parallel.sharding import (
    axis_size,
    partition_spec,
    sequence_axis,
    shard_map_logical,
)
from megalodon_jax.typing import Array, Float, Int32
from pallas_kernels.common.dispatch import Implementation
from pallas_kernels.timestep_norm import (
    TimestepNormOutput,
    TimestepNormState,
    broadcast_to_rows,
    timestep_norm,
)


class TimestepNorm(nnx.Module):
    """Group normalization by the moments of all tokens so far (Ma et al. 2024, section 3.2).

    y[t] = (x[t] - mean[t]) / sqrt(var[t] + eps) * (1 + weight) + bias, where mean and var are those
    of all features of a group in all tokens 0..t of the document. `weight` and `bias` are always
    learned, as released.

    Args:
      features: channels D.
      num_groups: groups G; divides D.
      eps: added to the variance.
      prior_count: above 0 every document starts from learned moments of so many tokens.
      dtype: of the result; moments are float32.
      param_dtype: of `weight` and `bias`.
      implementation: see `pallas_kernels.timestep_norm.timestep_norm`; None: the fastest known.
      rngs: not used; initial values are constants.

    Example:
      y, final_state = TimestepNorm(32, num_groups=4)(x)
    """

    def __init__(
        self,
        features: int,
        *,
        num_groups: int,
        eps: float = 1e-5,
        prior_count: int = 0,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        del rngs
        self.num_groups = num_groups
        self.eps = eps
        self.dtype = jnp.dtype(dtype)
        self.implementation: Implementation | None = implementation
        self.weight = parameter(jnp.zeros(features, param_dtype), "channels")
        self.bias = parameter(jnp.zeros(features, param_dtype), "channels")
        self.prior_count = prior_count
        zeros = jnp.zeros(num_groups, jnp.float32)
        self.prior_mean = parameter(zeros, "norm_groups") if prior_count else None
        self.prior_logv = parameter(zeros, "norm_groups") if prior_count else None

    @classmethod
    def from_config(cls, config: ModelConfig, *, rngs: nnx.Rngs | None = None) -> Self:
        """The TimestepNorm of a model's blocks and of its end."""
        return cls(
            config.model_dim,
            num_groups=config.norm_num_groups,
            eps=config.norm_eps,
            prior_count=config.norm_prior_count,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            implementation=config.implementation_of("timestep_norm"),
            rngs=rngs,
        )

    def __call__(
        self,
        x: Float[Array, "B L D"],
        *,
        segment_ids: Int32[Array, "B L"] | None = None,
        initial_state: TimestepNormState | None = None,
    ) -> TimestepNormOutput:
        """Normalizes x; see `pallas_kernels.timestep_norm.timestep_norm` for the arguments."""

        def normalize(x, scale, bias, initial_state, prior, segment_ids) -> TimestepNormOutput:
            return timestep_norm(
                x,
                scale,
                bias,
                num_groups=self.num_groups // axis_size("model"),
                eps=self.eps,
                initial_state=initial_state,
                prior=prior,
                segment_ids=segment_ids,
                implementation=self.implementation,
                sequence_axis=sequence_axis(),
            )

        tokens = partition_spec("batch", "length", "channels")
        channels, groups = partition_spec("channels"), partition_spec("batch", "norm_groups")
        moments = TimestepNormState(partition_spec("batch"), groups, groups)
        prior = self._prior()
        prior_groups = partition_spec("norm_groups")
        y, final_state = shard_map_logical(
            normalize,
            in_specs=(
                tokens,
                channels,
                channels,
                None if initial_state is None else moments,
                None
                if prior is None
                else TimestepNormState(partition_spec(), prior_groups, prior_groups),
                None if segment_ids is None else partition_spec("batch", "length"),
            ),
            out_specs=TimestepNormOutput(tokens, moments),
        )(
            x,
            1.0 + self.weight[...].astype(jnp.float32),
            self.bias[...].astype(jnp.float32),
            initial_state,
            prior,
            segment_ids,
        )
        return TimestepNormOutput(y.astype(self.dtype), final_state)

    def init_state(self, batch_size: int) -> TimestepNormState:
        """The state of documents before their first token."""
        prior = self._prior()
        if prior is None:
            # Two arrays: a cache whose leaves share memory cannot be donated.
            mean, var = (jnp.zeros((batch_size, self.num_groups), jnp.float32) for _ in range(2))
            return TimestepNormState(jnp.zeros(batch_size, jnp.int32), mean, var)
        return broadcast_to_rows(prior, batch_size)

    def _prior(self) -> TimestepNormState | None:
        if self.prior_mean is None or self.prior_logv is None:
            return None
        return TimestepNormState(
            jnp.asarray(self.prior_count, jnp.int32),
            self.prior_mean[...],
            jnp.exp(self.prior_logv[...]),
        )
