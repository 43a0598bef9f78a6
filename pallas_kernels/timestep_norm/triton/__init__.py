"""TimestepNorm on NVIDIA GPUs of every generation, by Triton."""
