"""CEMA on NVIDIA GPUs of every generation: Triton kernels, called through jax-triton."""
