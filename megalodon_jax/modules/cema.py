"""CEMA and its real counterpart EMA as Flax modules; the operation is `pallas_kernels.cema`."""

import math
from typing import Self

import jax
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.config import ModelConfig, MovingAverage
from megalodon_jax.modules.parameters import parameter, truncated_normal
from megalodon_jax.parallel.sharding import partition_spec, sequence_axis, shard_map_logical
from megalodon_jax.typing import Array, Complex64, Float, Int32
from pallas_kernels.cema import CemaOutput, CemaParams, cema
from pallas_kernels.common.dispatch import Implementation


class CEMA(nnx.Module):
    """Complex exponential moving average of every channel, N orders each (Ma et al. 2024, eq. 2-3).

    h[t] = q * h[t-1] + p * x[t],  y[t] = Re(sum_n gamma_n h[t, n]) / sqrt(N) + omega * x[t], with
    p = sigmoid(alpha), |q| = 1 - sigmoid(alpha) sigmoid(delta) and
    angle n * sigmoid(theta) * 2 pi / N for n = 1..N. Parameters stay float32 whatever the model's
    `param_dtype` is: the memory of a channel hangs on the last bits of q.

    Args:
      features: channels D.
      order: complex orders N of every channel, 1 to 32.
      implementation: see `pallas_kernels.cema.cema`; None: the fastest known for the platform.
      rngs: source of initial values.

    Example:
      y, final_state = CEMA(32, order=4, rngs=nnx.Rngs(0))(x)
    """

    def __init__(
        self,
        features: int,
        *,
        order: int = 16,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        D, N = features, order
        self.implementation: Implementation | None = implementation
        self.alpha = parameter(0.2 * jax.random.normal(rngs.params(), (D, N)), "channels", None)
        self.delta = parameter(0.2 * jax.random.normal(rngs.params(), (D, N)), "channels", None)
        self.theta = parameter(initial_theta(rngs.params(), D), "channels")
        gamma = jax.random.normal(rngs.params(), (D, N))
        self.gamma = parameter(
            jnp.stack([gamma, jnp.zeros_like(gamma)], -1), "channels", None, None
        )
        self.omega = parameter(truncated_normal(0.25, 1.0)(rngs.params(), (D,)), "channels")

    @classmethod
    def from_config(cls, config: ModelConfig, *, rngs: nnx.Rngs) -> Self:
        """The CEMA of a model's blocks."""
        return cls(
            config.model_dim,
            order=config.cema_ndim,
            implementation=config.implementation_of("cema"),
            rngs=rngs,
        )

    def __call__(
        self,
        x: Float[Array, "B L D"],
        *,
        segment_ids: Int32[Array, "B L"] | None = None,
        initial_state: Complex64[Array, "B D N"] | None = None,
    ) -> CemaOutput:
        """Averages x over time; see `pallas_kernels.cema.cema` for arguments and result."""
        implementation = self.implementation
        return _average(x, self.params, segment_ids, initial_state, implementation=implementation)

    @property
    def params(self) -> CemaParams:
        """The arrays that the operation takes."""
        return CemaParams(
            self.alpha[...], self.delta[...], self.theta[...], self.gamma[...], self.omega[...]
        )


class EMA(nnx.Module):
    """Real exponential moving average of every channel, N orders each (Ma et al. 2024, eq. 1).

    h[t] = q * h[t-1] + p * x[t],  y[t] = sum_n gamma_n h[t, n] / sqrt(N) + omega * x[t], with
    p = sigmoid(alpha) beta and q = 1 - sigmoid(alpha) sigmoid(delta). It is CEMA at angle 0 with
    gamma * beta as its output weights, and runs as such: the state is h / beta, a complex number
    whose imaginary part is 0 up to rounding. Parameters are float32, as those of CEMA. Arguments as
    for `CEMA`.

    Example:
      y, final_state = EMA(32, order=4, rngs=nnx.Rngs(0))(x)
    """

    def __init__(
        self,
        features: int,
        *,
        order: int = 16,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        D, N = features, order
        self.implementation: Implementation | None = implementation

        def normal(std: float, *shape: int) -> Array:
            return std * jax.random.normal(rngs.params(), shape)

        self.alpha = parameter(normal(0.2, D, N), "channels", None)
        self.delta = parameter(normal(0.2, D, N), "channels", None)
        signs = 1.0 - 2.0 * (jnp.arange(N) % 2)  # +1, -1, +1, ...: orders differ from the start
        self.beta = parameter(signs + normal(0.02, D, N), "channels", None)
        self.gamma = parameter(normal(1.0, D, N), "channels", None)
        self.omega = parameter(normal(1.0, D), "channels")

    @classmethod
    def from_config(cls, config: ModelConfig, *, rngs: nnx.Rngs) -> Self:
        """The EMA of a model's blocks."""
        return cls(
            config.model_dim,
            order=config.cema_ndim,
            implementation=config.implementation_of("cema"),
            rngs=rngs,
        )

    def __call__(
        self,
        x: Float[Array, "B L D"],
        *,
        segment_ids: Int32[Array, "B L"] | None = None,
        initial_state: Complex64[Array, "B D N"] | None = None,
    ) -> CemaOutput:
        """Averages x over time; see `pallas_kernels.cema.cema` for arguments and result."""
        implementation = self.implementation
        return _average(x, self.params, segment_ids, initial_state, implementation=implementation)

    @property
    def params(self) -> CemaParams:
        """CEMA's arrays for this average."""
        return real_average(self.alpha, self.delta, self.gamma, self.beta, self.omega)


def real_average(
    alpha: nnx.Param, delta: nnx.Param, gamma: nnx.Param, beta: nnx.Param, omega: nnx.Param
) -> CemaParams:
    """CEMA's arrays for a real moving average: angle 0 and real weights gamma beta."""
    weights = gamma[...] * beta[...]
    return CemaParams(
        alpha[...],
        delta[...],
        # sigmoid(-inf) is 0, with a finite gradient (0): the angle of q.
        jnp.full(weights.shape[:1], -jnp.inf, weights.dtype),
        jnp.stack([weights, jnp.zeros_like(weights)], axis=-1),
        omega[...],
    )


def make_moving_average(
    kind: MovingAverage,
    features: int,
    *,
    order: int,
    implementation: Implementation | None,
    rngs: nnx.Rngs,
) -> CEMA | EMA | None:
    """The moving average of a kind, None for "none"; raises ValueError for an unknown kind."""
    match kind:
        case "cema":
            return CEMA(features, order=order, implementation=implementation, rngs=rngs)
        case "ema":
            return EMA(features, order=order, implementation=implementation, rngs=rngs)
        case "none":
            return None
        case _:
            raise ValueError(f"moving_average is {kind!r}; use 'cema', 'ema' or 'none'")


def _average(
    x: Array,
    params: CemaParams,
    segment_ids: Array | None,
    initial_state: Array | None,
    *,
    implementation: Implementation | None,
) -> CemaOutput:
    """`cema` on every device's own rows, tokens and channels."""

    def average(x, params, initial_state, segment_ids) -> CemaOutput:
        return cema(
            x,
            params,
            initial_state=initial_state,
            segment_ids=segment_ids,
            implementation=implementation,
            sequence_axis=sequence_axis(),
        )

    features = partition_spec("batch", "length", "channels")
    states = partition_spec("batch", "channels", None)
    per_channel = CemaParams(
        *(partition_spec("channels", *[None] * (value.ndim - 1)) for value in params)
    )
    return shard_map_logical(
        average,
        in_specs=(
            features,
            per_channel,
            None if initial_state is None else states,
            None if segment_ids is None else partition_spec("batch", "length"),
        ),
        out_specs=CemaOutput(features, states),
    )(x, params, initial_state, segment_ids)


def initial_theta(key: Array, D: int) -> Array:
    """Logits of D frequencies, geometric from 1/D to almost 1, in random order over channels."""
    k = jax.random.permutation(key, jnp.arange(1, D + 1))
    log_frequency = -math.log(D) / D * k.astype(jnp.float32)
    return log_frequency - jnp.log(-jnp.expm1(log_frequency))
