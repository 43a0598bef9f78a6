"""Chunk attention kernels for TPU (Pallas Mosaic TPU)."""
