"""Chunk attention kernels for NVIDIA Hopper GPUs (Pallas Mosaic GPU)."""
