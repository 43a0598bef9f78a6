"""CEMA on Hopper GPUs: the device check."""

from jaxtyping import Array, Complex, Float, Int32

from pallas_kernels.cema.mosaic_gpu.block_sizes import choose_split_size
from pallas_kernels.cema.mosaic_gpu.launch import MOSAIC_GPU_KERNELS
from pallas_kernels.cema.row_splits.op import CemaBackend, cema_by_splits
from pallas_kernels.cema.types import CemaOutput, CemaParams
from pallas_kernels.common.mosaic_gpu import interpret_params
from pallas_kernels.common.target import check_hopper_or_blackwell


def cema_mosaic_gpu(
    x: Float[Array, "B L D"],
    params: CemaParams,
    initial_state: Complex[Array, "B D N"] | None,
    segment_ids: Int32[Array, "B L"] | None,
    *,
    block_size: int | None = None,
    sequence_axis: str | None = None,
) -> CemaOutput:
    """CEMA by the Hopper kernels; contract as in `cema_by_splits`.

    Raises:
      ValueError: float64, a split that is no multiple of 32, or a device that is neither Hopper nor
        Blackwell.
    """
    check_hopper_or_blackwell("mosaic_gpu")
    backend = CemaBackend("mosaic_gpu", MOSAIC_GPU_KERNELS, choose_split_size, interpret_params())
    return cema_by_splits(
        x,
        params,
        initial_state,
        segment_ids,
        backend=backend,
        block_size=block_size,
        sequence_axis=sequence_axis,
    )
