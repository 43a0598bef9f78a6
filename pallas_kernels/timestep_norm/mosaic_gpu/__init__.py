"""TimestepNorm kernels for NVIDIA Hopper GPUs (Pallas Mosaic GPU)."""
