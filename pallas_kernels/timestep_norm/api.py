"""The public function of TimestepNorm: checks, choice of an implementation, call."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.common.dispatch import Implementation, check_implementation
from pallas_kernels.common.measured_choice import find_measured
from pallas_kernels.common.symbolic import has_symbolic_shape
from pallas_kernels.common.target import find_target
from pallas_kernels.timestep_norm import reference, xla
from pallas_kernels.timestep_norm.context_parallel import with_sequence_axis
from pallas_kernels.timestep_norm.mosaic_gpu import op as mosaic_gpu
from pallas_kernels.timestep_norm.pallas_tpu import op as pallas_tpu
from pallas_kernels.timestep_norm.pallas_tpu.block_sizes import (
    SHORTEST_LENGTH,
    TPUS_FASTER_THAN_XLA,
)
from pallas_kernels.timestep_norm.triton import op as triton
from pallas_kernels.timestep_norm.types import (
    TimestepNormOutput,
    TimestepNormState,
    broadcast_to_rows,
    empty_prior,
    moments_dtype,
)

# Called with (x, scale, bias, num_groups, eps, initial_state, prior, segment_ids, sequence_axis);
# the states are complete and have the dtype of the moments.
IMPLEMENTATIONS: dict[str, Callable[..., TimestepNormOutput]] = {
    "reference": with_sequence_axis(reference.timestep_norm),
    "xla": with_sequence_axis(xla.timestep_norm),
    "mosaic_gpu": mosaic_gpu.timestep_norm,
    "pallas_tpu": with_sequence_axis(pallas_tpu.timestep_norm),
    "triton": triton.timestep_norm,
}


def timestep_norm(
    x: Float[Array, "B L D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
    *,
    num_groups: int,
    eps: float = 1e-5,
    initial_state: TimestepNormState | None = None,
    prior: TimestepNormState | None = None,
    segment_ids: Int32[Array, "B L"] | None = None,
    implementation: Implementation | None = None,
    sequence_axis: str | None = None,
) -> TimestepNormOutput:
    """y[t] = (x[t] - mean[t]) / sqrt(var[t] + eps) * scale + bias, moments over all tokens 0..t.

    mean[t] and var[t] are the moments of all numbers that a group of D/G features has in the
    document's tokens up to and including t (Ma et al. 2024, section 3.2, as released), together
    with the numbers that the initial state or the prior stands for.

    Args:
      x: input; bfloat16, float16, float32 or float64. Moments are float32, or float64 if x is.
      scale: the multiplier itself; where a stored weight is scale - 1, pass 1 + weight.
      bias: added after the multiplication.
      num_groups: groups G; divides D.
      eps: added to the variance.
      initial_state: count (B,), mean and var (B, G) before the row's first token; the row's first
        document continues them, in place of the prior.
      prior: count (), mean and var (G,) that every document starts from; None is a count of 0.
      segment_ids: documents of a row numbered 1, 2, ... in order; 0 is padding, between documents
        or inside one: y is 0 there, and the moments do not change. None: one document, no padding.
      implementation: "reference" (token by token), "xla" (parallel over tokens, any platform),
        "mosaic_gpu" (kernels for NVIDIA Hopper), "pallas_tpu" (kernels for TPU), "triton" (kernels
        for NVIDIA GPUs from Ampere on; extra `triton`), or None for the fastest known on the target
        device.
      sequence_axis: inside `jax.shard_map`, the mesh axis over which the sequence is sharded
        (context parallelism); rows then start from the prior. None: every device has whole rows.

    Returns:
      y, and the moments after each row's last token. A row of padding alone returns its initial
      state. Under context parallelism the last device has the row's final state.

    Raises:
      ValueError: shapes that do not fit, an unknown implementation, or one that cannot run here.
    """
    _check_shapes(x, scale, bias, num_groups, segment_ids)
    _check_states(initial_state, prior, x.shape[0], num_groups, sequence_axis)
    check_implementation("TimestepNorm", implementation, IMPLEMENTATIONS)
    name = implementation or _choose_implementation(x, num_groups)
    dtype = moments_dtype(x.dtype)
    prior = empty_prior(num_groups, dtype) if prior is None else _cast_state(prior, dtype)
    if initial_state is None:
        initial_state = broadcast_to_rows(prior, x.shape[0])
    else:
        initial_state = _cast_state(initial_state, dtype)
    return IMPLEMENTATIONS[name](
        x, scale, bias, num_groups, eps, initial_state, prior, segment_ids, sequence_axis
    )


def _choose_implementation(x: Array, num_groups: int) -> Implementation:
    """The fastest by measurement (GPU) or by the compiler's estimate (TPU); README.md has both.

    A measurement on the user's device (`megalodon tune`) comes first.
    """
    if has_symbolic_shape(x):
        return "xla"
    target = find_target()
    measured = find_measured("timestep_norm", x, tokens=x.shape[0] * x.shape[1])
    if measured is not None and IMPLEMENTATIONS.get(measured) is not None:
        return measured
    if target.is_hopper and mosaic_gpu.is_faster(x, num_groups):
        return "mosaic_gpu"
    if (
        target.kind in TPUS_FASTER_THAN_XLA
        and x.shape[1] >= SHORTEST_LENGTH
        and pallas_tpu.fits_well(x, num_groups)
    ):
        return "pallas_tpu"
    return "xla"


def _cast_state(state: TimestepNormState, dtype: jnp.dtype) -> TimestepNormState:
    # Where count is 0, mean and var may hold anything, and 0 times NaN is NaN.
    has_tokens = (state.count > 0)[..., None]
    return TimestepNormState(
        state.count.astype(jnp.int32),
        jnp.where(has_tokens, state.mean.astype(dtype), 0),
        jnp.where(has_tokens, state.var.astype(dtype), 0),
    )


def _check_shapes(
    x: Array, scale: Array, bias: Array, num_groups: int, segment_ids: Array | None
) -> None:
    if x.ndim != 3 or x.shape[1] < 1:
        raise ValueError(f"x has shape {x.shape}; expected (B, L, D) with at least one token")
    D = x.shape[2]
    if num_groups < 1 or D % num_groups:
        raise ValueError(f"num_groups {num_groups} does not divide the {D} features of x")
    if scale.shape != (D,) or bias.shape != (D,):
        raise ValueError(f"scale and bias have shapes {scale.shape}, {bias.shape}; expected ({D},)")
    if segment_ids is not None and segment_ids.shape != x.shape[:2]:
        raise ValueError(
            f"segment_ids has shape {segment_ids.shape}; expected (B, L) = {x.shape[:2]}"
        )


def _check_states(
    initial_state: TimestepNormState | None,
    prior: TimestepNormState | None,
    num_rows: int,
    num_groups: int,
    sequence_axis: str | None,
) -> None:
    if initial_state is not None:
        _check_state("initial_state", initial_state, (num_rows,), num_groups)
        if sequence_axis is not None:
            raise ValueError("with sequence_axis rows start from the prior; pass no initial_state")
    if prior is not None:
        _check_state("prior", prior, (), num_groups)


def _check_state(
    name: str, state: TimestepNormState, batch: tuple[int, ...], num_groups: int
) -> None:
    shapes = tuple(jnp.shape(field) for field in state)
    expected = (batch, (*batch, num_groups), (*batch, num_groups))
    if shapes != expected:
        raise ValueError(f"{name} has shapes {shapes}; expected count, mean, var {expected}")
    if not jnp.issubdtype(state.count.dtype, jnp.integer):
        raise ValueError(f"{name}.count is {state.count.dtype}; it counts tokens, pass int32")
