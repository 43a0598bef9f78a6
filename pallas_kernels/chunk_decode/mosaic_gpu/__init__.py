"""Chunk decoding on NVIDIA Hopper GPUs (Pallas Mosaic GPU)."""
