"""Norms and gates of rows: the operations between the matrix products of a block."""

from pallas_kernels.rowwise.api import layer_norm, rms_norm, silu, silu_gate

__all__ = ["layer_norm", "rms_norm", "silu", "silu_gate"]
