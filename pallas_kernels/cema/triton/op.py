"""CEMA by Triton kernels: the device check."""

from jaxtyping import Array, Complex, Float, Int32

from pallas_kernels.cema.row_splits.op import CemaBackend, cema_by_splits
from pallas_kernels.cema.triton.block_sizes import choose_split_size
from pallas_kernels.cema.triton.launch import TRITON_KERNELS
from pallas_kernels.cema.types import CemaOutput, CemaParams
from pallas_kernels.common.target import is_interpreted
from pallas_kernels.common.triton import check_triton


def cema_triton(
    x: Float[Array, "B L D"],
    params: CemaParams,
    initial_state: Complex[Array, "B D N"] | None,
    segment_ids: Int32[Array, "B L"] | None,
    *,
    block_size: int | None = None,
    sequence_axis: str | None = None,
) -> CemaOutput:
    """CEMA by the Triton kernels; contract as in `cema_by_splits`.

    Raises:
      ValueError: float64, a split that is no multiple of 32, no GPU or one older than Ampere, or
        triton or jax-triton is not installed.
    """
    check_triton("triton")
    backend = CemaBackend("triton", TRITON_KERNELS, choose_split_size, is_interpreted())
    return cema_by_splits(
        x,
        params,
        initial_state,
        segment_ids,
        backend=backend,
        block_size=block_size,
        sequence_axis=sequence_axis,
    )
