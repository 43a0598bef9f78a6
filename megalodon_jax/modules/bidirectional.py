"""Bidirectional CEMA and EMA as Flax modules; the operation is `pallas_kernels.cema`."""

import jax
from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike

from megalodon_jax.config import MovingAverage
from megalodon_jax.modules.cema import initial_theta, real_average
from megalodon_jax.modules.parameters import parameter
from megalodon_jax.parallel.sharding import partition_spec, sequence_axis, shard_map_logical
from megalodon_jax.typing import Array, Float, Int32
from pallas_kernels.cema import CemaParams, bidirectional_cema
from pallas_kernels.common.dispatch import Implementation


class BidirectionalCEMA(nnx.Module):
    """Complex exponential moving averages of the tokens before and after each token.

    y[t] = sum_{s <= t} kf[t-s] x[s] + sum_{s > t} kb[s-t-1] x[s] + omega x[t], with the kernels k
    of `CEMA` (Ma et al. 2024, appendix C, as in the authors' encoders). Rows 0..D-1 of the
    parameters are the forward average, D..2D-1 the backward one; both start with the same
    frequencies.

    Args:
      features: channels D.
      order: complex orders N of every channel and direction, 1 to 32.
      param_dtype: of the parameters; float32, or float64 for checks.
      implementation: see `pallas_kernels.cema.cema`; None: the fastest known for the platform.
      rngs: source of initial values.

    Example:
      y = BidirectionalCEMA(32, order=4, rngs=nnx.Rngs(0))(x)
    """

    def __init__(
        self,
        features: int,
        *,
        order: int = 16,
        param_dtype: DTypeLike = jnp.float32,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        D, N = features, order
        self.implementation: Implementation | None = implementation

        def normal(std: float, *shape: int) -> Array:
            return std * jax.random.normal(rngs.params(), shape, param_dtype)

        # The two halves are shards of one axis for no mesh: every device has all of it.
        self.alpha = parameter(normal(0.2, 2 * D, N), None, None)
        self.delta = parameter(normal(0.2, 2 * D, N), None, None)
        theta = initial_theta(rngs.params(), D).astype(param_dtype)
        self.theta = parameter(jnp.concatenate([theta, theta]), None)
        gamma = normal(1.0, 2 * D, N)
        self.gamma = parameter(jnp.stack([gamma, jnp.zeros_like(gamma)], -1), None, None, None)
        self.omega = parameter(normal(1.0, D), None)

    def __call__(
        self, x: Float[Array, "B L D"], *, segment_ids: Int32[Array, "B L"] | None = None
    ) -> Float[Array, "B L D"]:
        """Averages x over time; see `pallas_kernels.cema.bidirectional_cema`."""
        return _average(x, self.params, segment_ids, implementation=self.implementation)

    @property
    def params(self) -> CemaParams:
        """The arrays that the operation takes."""
        return CemaParams(
            self.alpha[...], self.delta[...], self.theta[...], self.gamma[...], self.omega[...]
        )


class BidirectionalEMA(nnx.Module):
    """Real exponential moving averages of the tokens before and after each token.

    It is to `EMA` as `BidirectionalCEMA` is to `CEMA`, whose arguments it has.
    """

    def __init__(
        self,
        features: int,
        *,
        order: int = 16,
        param_dtype: DTypeLike = jnp.float32,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        D, N = features, order
        self.implementation: Implementation | None = implementation

        def normal(std: float, *shape: int) -> Array:
            return std * jax.random.normal(rngs.params(), shape, param_dtype)

        self.alpha = parameter(normal(0.2, 2 * D, N), None, None)
        self.delta = parameter(normal(0.2, 2 * D, N), None, None)
        signs = (1.0 - 2.0 * (jnp.arange(N) % 2)).astype(param_dtype)
        self.beta = parameter(signs + normal(0.02, 2 * D, N), None, None)
        self.gamma = parameter(normal(1.0, 2 * D, N), None, None)
        self.omega = parameter(normal(1.0, D), None)

    def __call__(
        self, x: Float[Array, "B L D"], *, segment_ids: Int32[Array, "B L"] | None = None
    ) -> Float[Array, "B L D"]:
        """Averages x over time; see `pallas_kernels.cema.bidirectional_cema`."""
        return _average(x, self.params, segment_ids, implementation=self.implementation)

    @property
    def params(self) -> CemaParams:
        """CEMA's arrays for these averages, see `EMA`."""
        return real_average(self.alpha, self.delta, self.gamma, self.beta, self.omega)


def make_bidirectional_average(
    kind: MovingAverage,
    features: int,
    *,
    order: int,
    param_dtype: DTypeLike = jnp.float32,
    implementation: Implementation | None,
    rngs: nnx.Rngs,
) -> BidirectionalCEMA | BidirectionalEMA | None:
    """The bidirectional average of a kind, None for "none"; ValueError for an unknown kind."""
    classes = {"cema": BidirectionalCEMA, "ema": BidirectionalEMA, "none": None}
    if kind not in classes:
        raise ValueError(f"moving_average is {kind!r}; use 'cema', 'ema' or 'none'")
    if (average := classes[kind]) is None:
        return None
    return average(
        features,
        order=order,
        param_dtype=param_dtype,
        implementation=implementation,
        rngs=rngs,
    )


def _average(
    x: Array,
    params: CemaParams,
    segment_ids: Array | None,
    *,
    implementation: Implementation | None,
) -> Array:
    """`bidirectional_cema` on every device's own rows, tokens and channels."""

    def average(x, params, segment_ids) -> Array:
        # (2, d, ...) of this device's channels to (2d, ...).
        alpha, delta, theta, gamma = (v.reshape(-1, *v.shape[2:]) for v in params[:4])
        return bidirectional_cema(
            x,
            CemaParams(alpha, delta, theta, gamma, params.omega),
            segment_ids=segment_ids,
            implementation=implementation,
            sequence_axis=sequence_axis(),
        )

    # One axis of directions, so that a mesh can shard the channels of both.
    alpha, delta, theta, gamma = (v.reshape(2, -1, *v.shape[1:]) for v in params[:4])
    features = partition_spec("batch", "length", "channels")
    matrix, vector = partition_spec(None, "channels", None), partition_spec(None, "channels")
    weights = partition_spec(None, "channels", None, None)
    per_channel = CemaParams(matrix, matrix, vector, weights, partition_spec("channels"))
    return shard_map_logical(
        average,
        in_specs=(
            features,
            per_channel,
            None if segment_ids is None else partition_spec("batch", "length"),
        ),
        out_specs=features,
    )(x, CemaParams(alpha, delta, theta, gamma, params.omega), segment_ids)
