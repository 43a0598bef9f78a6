"""Chunk attention kernels in Triton."""
