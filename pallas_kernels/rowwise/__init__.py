"""Norms and gates of rows: what stands between the matrix products of a block."""

from pallas_kernels.rowwise.api import Implementation, layer_norm, rms_norm, silu, silu_gate

__all__ = ["Implementation", "layer_norm", "rms_norm", "silu", "silu_gate"]
