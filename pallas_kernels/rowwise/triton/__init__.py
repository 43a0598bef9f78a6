"""Norms and gates of rows on NVIDIA GPUs of every generation, by Triton."""
