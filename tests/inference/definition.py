"""Sampling by its definition: NumPy, float64, with a sort, one row and one token at a time."""

import numpy as np

from megalodon_jax.inference.sampling import SamplingParams


def penalized(
    logits: np.ndarray, params: SamplingParams, prompt: list[int], output: list[int]
) -> np.ndarray:
    x = logits.astype(np.float64)
    for token, bias in params.logit_bias.items():
        x[token] += bias
    for token in set(prompt) | set(output):
        penalty = params.repetition_penalty
        x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
    for token in output:
        x[token] -= params.frequency_penalty
    for token in set(output):
        x[token] -= params.presence_penalty
    return x


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def probabilities(x: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Probabilities after temperature, top-k, top-p and min-p, in this order."""
    x = x.astype(np.float64)
    if params.temperature == 0.0:
        return np.eye(len(x))[x.argmax()]
    x = x / params.temperature
    order = np.argsort(-x, kind="stable")
    if params.top_k:
        x[order[params.top_k :]] = -np.inf
    if params.top_p < 1.0:
        ranked = softmax(x)[order]
        outside = np.cumsum(ranked) - ranked >= float(np.float32(params.top_p))
        outside[0] = False
        x[order[outside]] = -np.inf
    x[softmax(x) < params.min_p * softmax(x).max()] = -np.inf
    return softmax(x)
