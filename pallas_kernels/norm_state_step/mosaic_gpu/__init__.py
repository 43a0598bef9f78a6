"""TimestepNorm and CEMA of one token a row on NVIDIA Hopper GPUs (Pallas Mosaic GPU)."""
