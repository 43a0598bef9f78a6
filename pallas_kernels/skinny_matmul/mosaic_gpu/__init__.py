"""Products of a few rows with a matrix on NVIDIA Hopper GPUs (Pallas Mosaic GPU)."""
