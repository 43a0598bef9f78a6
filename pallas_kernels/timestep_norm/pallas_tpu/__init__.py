"""TimestepNorm kernels for TPU (Pallas Mosaic TPU)."""
