"""Weights in and out: the authors' released checkpoints and safetensors files."""
