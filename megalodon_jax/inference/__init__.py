"""Inference: sampling of tokens per row, and text from token ids."""
