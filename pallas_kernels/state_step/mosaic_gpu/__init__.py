"""A step of CEMA on NVIDIA Hopper GPUs (Pallas Mosaic GPU)."""
