"""GPU time by kind of kernel, from the profiler's trace."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData

# The first pattern found in a kernel's name decides.
_KINDS = {
    "collectives": r"nccl|all_?gather|all_?reduce|reduce_?scatter|all_?to_?all|collective",
    "chunk attention": r"chunk_attention",
    "cuDNN attention": r"sdpa|fmha|flash",
    "CEMA": r"cema",
    "TimestepNorm": r"timestep_norm",
    "norms and gates": r"rowwise",
    "chunk decoding": r"chunk_decode",
    "CEMA step": r"state_step",
    "matrix products": r"gemm|nvjet|cutlass|xmma|cublas|skinny_matmul",
    "copies": r"memcpy|memset|dynamic_update_slice|dynamic_slice",
    "other": r"",
}


class KernelTimes(NamedTuple):
    """The kernels of one kind in one call.

    Attributes:
      kind: name of the kind, from the table in this file.
      seconds: time of all of them together, on one device.
      launches: their number.
    """

    kind: str
    seconds: float
    launches: float


def kernel_times(call: Callable[[], Any], *, calls: int = 3) -> list[KernelTimes]:
    """Profiles a compiled function: kinds of kernels, the longest first; empty on a CPU.

    With several devices of this host the times are their mean.

    Args:
      call: the function.
      calls: number of profiled calls.
    """
    jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                result = call()
            jax.block_until_ready(result)
        traces = list(Path(folder).rglob("*.xplane.pb"))
        planes = [plane for trace in traces for plane in ProfileData.from_file(str(trace)).planes]
        planes = [plane for plane in planes if "device:GPU" in plane.name]
        share = 1 / (calls * max(1, len(planes)))
        totals: dict[str, list[float]] = {}
        for line in (line for plane in planes for line in plane.lines):
            if "Stream" not in line.name:
                continue
            for event in line.events:
                total = totals.setdefault(kind_of(event.name), [0.0, 0.0])
                total[0] += event.duration_ns * 1e-9 * share
                total[1] += share
    rows = [KernelTimes(kind, *total) for kind, total in totals.items()]
    return sorted(rows, key=lambda row: -row.seconds)


def kind_of(kernel: str) -> str:
    """The kind of a kernel by its name."""
    return next(
        kind for kind, pattern in _KINDS.items() if re.search(pattern, kernel, re.IGNORECASE)
    )
