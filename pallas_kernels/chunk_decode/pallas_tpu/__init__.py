"""Chunk decoding kernel for TPU (Pallas Mosaic TPU)."""
