"""TimestepNorm as a Flax module; the operation is `pallas_kernels.timestep_norm`."""

from flax import nnx
from jax import numpy as jnp

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
    before_rows,
    timestep_norm,
)


class TimestepNorm(nnx.Module):
    """Group normalization by the moments of all tokens so far (Ma et al. 2024, section 3.2).

    y[t] = (x[t] - mean[t]) / sqrt(var[t] + eps) * (1 + weight) + bias, where mean and var run over
    all features of a group in all tokens 0..t of the document. `weight` and `bias` are always
    learned, as released. With `config.norm_prior_count` > 0 every document starts from learned
    moments that count as so many tokens.
    """

    def __init__(self, config: ModelConfig):
        self.num_groups = config.norm_num_groups
        self.eps = config.norm_eps
        self.dtype = config.dtype
        self.implementation: Implementation | None = config.implementation_of("timestep_norm")
        self.weight = parameter(jnp.zeros(config.model_dim, config.param_dtype), "channels")
        self.bias = parameter(jnp.zeros(config.model_dim, config.param_dtype), "channels")
        self.prior_count = config.norm_prior_count
        prior = jnp.zeros(self.num_groups, jnp.float32)
        has_prior = self.prior_count > 0
        self.prior_mean = parameter(prior, "norm_groups") if has_prior else None
        self.prior_logv = parameter(prior, "norm_groups") if has_prior else None

    def __call__(
        self,
        x: Float[Array, "B L D"],
        *,
        segment_ids: Int32[Array, "B L"] | None = None,
        state: TimestepNormState | None = None,
    ) -> TimestepNormOutput:
        """Normalizes x; see `pallas_kernels.timestep_norm.timestep_norm` for the arguments."""

        def normalize(x, scale, bias, state, prior, segment_ids) -> TimestepNormOutput:
            return timestep_norm(
                x,
                scale,
                bias,
                num_groups=self.num_groups // axis_size("model"),
                eps=self.eps,
                initial_state=state,
                prior=prior,
                segment_ids=segment_ids,
                implementation=self.implementation,
                sequence_axis=sequence_axis(),
            )

        features, channels = (
            partition_spec("batch", "length", "channels"),
            partition_spec("channels"),
        )
        moments = TimestepNormState(
            partition_spec("batch"), *[partition_spec("batch", "norm_groups")] * 2
        )
        prior = self._prior()
        y, last = shard_map_logical(
            normalize,
            inputs=(
                features,
                channels,
                channels,
                None if state is None else moments,
                None
                if prior is None
                else TimestepNormState(partition_spec(), *[partition_spec("norm_groups")] * 2),
                None if segment_ids is None else partition_spec("batch", "length"),
            ),
            outputs=TimestepNormOutput(features, moments),
        )(
            x,
            1.0 + self.weight[...].astype(jnp.float32),
            self.bias[...].astype(jnp.float32),
            state,
            prior,
            segment_ids,
        )
        return TimestepNormOutput(y.astype(self.dtype), last)

    def init_state(self, batch_size: int) -> TimestepNormState:
        """The state of a document that has not begun."""
        prior = self._prior()
        if prior is None:
            # Arrays of their own, so that a cache may be donated.
            mean, var = (jnp.zeros((batch_size, self.num_groups), jnp.float32) for _ in range(2))
            return TimestepNormState(jnp.zeros(batch_size, jnp.int32), mean, var)
        return before_rows(prior, batch_size)

    def _prior(self) -> TimestepNormState | None:
        if self.prior_mean is None or self.prior_logv is None:
            return None
        return TimestepNormState(
            jnp.asarray(self.prior_count, jnp.int32),
            self.prior_mean[...],
            jnp.exp(self.prior_logv[...]),
        )
