"""The public function of CEMA: check the inputs, choose an implementation, call it."""

import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Int32

from pallas_kernels.cema.block_sizes import SHORTEST_GPU_LENGTH, SHORTEST_TPU_LENGTH
from pallas_kernels.cema.context_parallel import CemaImplementation, with_context_parallelism
from pallas_kernels.cema.mosaic_gpu.op import cema_mosaic_gpu
from pallas_kernels.cema.pallas_tpu.block_sizes import TPUS_FASTER_THAN_XLA
from pallas_kernels.cema.pallas_tpu.op import cema_pallas_tpu, final_state_pallas_tpu
from pallas_kernels.cema.reference import cema_reference
from pallas_kernels.cema.triton.op import cema_triton
from pallas_kernels.cema.types import CemaOutput, CemaParams
from pallas_kernels.cema.xla import cema_xla
from pallas_kernels.common.dispatch import Implementation, check_implementation
from pallas_kernels.common.measured_choice import find_measured
from pallas_kernels.common.symbolic import has_symbolic_shape
from pallas_kernels.common.target import find_target

LARGEST_ORDER = 32

IMPLEMENTATIONS: dict[str, CemaImplementation] = {
    "reference": with_context_parallelism(cema_reference),
    "xla": with_context_parallelism(cema_xla),
    "mosaic_gpu": cema_mosaic_gpu,
    "pallas_tpu": with_context_parallelism(cema_pallas_tpu, final_state_pallas_tpu),
    "triton": cema_triton,
}


def cema(
    x: Float[Array, "B L D"],
    params: CemaParams,
    *,
    initial_state: Complex[Array, "B D N"] | None = None,
    segment_ids: Int32[Array, "B L"] | None = None,
    implementation: Implementation | None = None,
    block_size: int | None = None,
    sequence_axis: str | None = None,
) -> CemaOutput:
    """Complex EMA: h[t] = q·h[t-1] + p·x[t],  y[t] = Re(Σ_n gamma_n/√N·h[t,n]) + omega·x[t].

    p = sigmoid(alpha);  q = (1 - sigmoid(alpha) sigmoid(delta)) exp(i n sigmoid(theta) 2π/N) for
    n = 1..N. Ma et al. 2024 (arXiv 2404.08801), with p and gamma as in the authors' released code.

    Differentiable in x, the parameters and the initial state, in reverse mode.

    Args:
      x: bfloat16, float32 or float64. The computation inside has the parameters' dtype.
      params: float32, or float64 to compute in float64.
      initial_state: h before the row's first token; zero if None.
      segment_ids: the document of every token, contiguous; 0 is padding, whose y is 0 and which
        leaves the state unchanged. The row's first document starts from `initial_state`, every
        other one from zero. None: one document without padding.
      implementation: "reference", the recurrence; "xla", for every platform; "mosaic_gpu", kernels
        for NVIDIA Hopper; "pallas_tpu", kernels for TPU; "triton", kernels for NVIDIA GPUs from
        Ampere on (extra `triton`); None: the fastest one known here.
      block_size: tokens of a block in "xla"; of a split of the row in "mosaic_gpu" and "triton", a
        multiple of 32; of a grid step in "pallas_tpu", a multiple of 1,024. None: a measured
        choice (README.md).
      sequence_axis: inside `jax.shard_map`, the mesh axis of the sequence shards; x and segment_ids
        are this device's shard, segment ids are numbered along whole rows, and rows start from
        zero. None: every device has whole rows.

    Returns:
      y in x's dtype, and the state after each row's last token that is not padding; of a sequence
      shard, after the shard's.

    Raises:
      ValueError: a shape, dtype, implementation or block size that cannot be used here, or an
        initial state together with `sequence_axis`.
    """
    _check_inputs(x, params, initial_state, segment_ids)
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size is {block_size}; use a positive number of tokens or None")
    if sequence_axis is not None and initial_state is not None:
        raise ValueError("rows sharded along the sequence start from zero; pass initial_state=None")
    check_implementation("CEMA", implementation, IMPLEMENTATIONS)
    if implementation is None:
        implementation = _choose_implementation(x, params)
    if initial_state is not None:
        initial_state = initial_state.astype(jnp.result_type(params.alpha, jnp.complex64))
    return IMPLEMENTATIONS[implementation](
        x,
        params,
        initial_state,
        segment_ids,
        block_size=block_size,
        sequence_axis=sequence_axis,
    )


def _choose_implementation(x: Array, params: CemaParams) -> Implementation:
    """The fastest by measurement (GPU) or by the compiler's estimate (TPU); README.md has both.

    A measurement on the user's device (`megalodon tune`) comes first.

    float32 x on a GPU takes the more exact `xla`, which keeps the last bits of a long memory.
    """
    if has_symbolic_shape(x):
        return "xla"
    target, length = find_target(), x.shape[1]
    if params.alpha.dtype == jnp.float64:
        return "xla"
    measured = find_measured("cema", x, tokens=x.shape[0] * length)
    if measured is not None and IMPLEMENTATIONS.get(measured) is not None:
        return measured
    if target.is_hopper and x.dtype == jnp.bfloat16 and length >= SHORTEST_GPU_LENGTH:
        return "mosaic_gpu"
    if target.kind in TPUS_FASTER_THAN_XLA and length >= SHORTEST_TPU_LENGTH:
        return "pallas_tpu"
    return "xla"


def _check_inputs(
    x: Array, params: CemaParams, initial_state: Array | None, segment_ids: Array | None
) -> None:
    if x.ndim != 3 or x.shape[1] < 1:
        raise ValueError(f"x has shape {x.shape}; needs (B, L, D) with L >= 1")
    if x.dtype not in (jnp.bfloat16, jnp.float32, jnp.float64):
        raise ValueError(f"x is {x.dtype}; use bfloat16, float32 or float64")
    if params.alpha.ndim != 2 or not 1 <= params.alpha.shape[1] <= LARGEST_ORDER:
        raise ValueError(
            f"alpha has shape {params.alpha.shape}; needs (D, N), N from 1 to {LARGEST_ORDER}"
        )
    rows, length, channels = x.shape
    order = params.alpha.shape[1]
    matrix, vector = (channels, order), (channels,)
    expected = (matrix, matrix, vector, (*matrix, 2), vector)
    for name, value, shape in zip(CemaParams._fields, params, expected, strict=True):
        if value.shape != shape:
            raise ValueError(f"{name} has shape {value.shape}; x {x.shape} and N need {shape}")
        if value.dtype != params.alpha.dtype or value.dtype not in (jnp.float32, jnp.float64):
            raise ValueError(
                f"{name} is {value.dtype} and alpha {params.alpha.dtype}; CEMA's parameters stay "
                "float32 (or are all float64): bfloat16 cannot hold |q| near 1"
            )
    if initial_state is not None and (
        initial_state.shape != (rows, channels, order) or not jnp.iscomplexobj(initial_state)
    ):
        raise ValueError(
            f"initial_state is {initial_state.dtype}{initial_state.shape}; needs complex "
            f"({rows}, {channels}, {order})"
        )
    if segment_ids is not None and (
        segment_ids.shape != (rows, length) or not jnp.issubdtype(segment_ids.dtype, jnp.integer)
    ):
        raise ValueError(
            f"segment_ids is {segment_ids.dtype}{segment_ids.shape}; needs int32 ({rows}, {length})"
        )
