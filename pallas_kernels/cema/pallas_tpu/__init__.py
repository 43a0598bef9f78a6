"""CEMA kernels for TPU (Pallas Mosaic TPU)."""
