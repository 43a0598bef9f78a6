"""Weights in and out: the authors' released checkpoints, safetensors, Linen."""
