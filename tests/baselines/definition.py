"""Attention and its gradients by the definition, in NumPy and float64, one query at a time."""

from typing import NamedTuple

import numpy as np


class Exact(NamedTuple):
    """Outputs, and gradients of sum(out * cotangent)."""

    out: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray


def runs(segment_ids) -> np.ndarray:
    """A different number for every run of equal ids in a row; 0 at padding."""
    numbers = np.zeros(np.shape(segment_ids), int)
    for row, ids in enumerate(np.asarray(segment_ids)):
        for t, segment in enumerate(ids):
            if segment:
                continues = t and ids[t - 1] == segment
                numbers[row, t] = numbers[row, t - 1] if continues else numbers[row].max() + 1
    return numbers


def exact_attention(q, k, v, cotangent, *, window=None, segment_ids=None) -> Exact:
    """Softmax attention to tokens of the same document at a distance below `window`."""
    q, k, v, cotangent = (np.asarray(x, np.float64) for x in (q, k, v, cotangent))
    B, L, H, d = q.shape
    documents = np.ones((B, L), int) if segment_ids is None else runs(segment_ids)
    result = Exact(*(np.zeros(x.shape) for x in (q, q, k, v)))
    for b, t, h in np.ndindex(B, L, H):
        if documents[b, t] == 0:
            continue
        seen = [
            s
            for s in range(t + 1)
            if documents[b, s] == documents[b, t] and (window is None or t - s < window)
        ]
        query, do, head = q[b, t, h], cotangent[b, t, h], h // (H // k.shape[2])
        keys, values = k[b, seen, head], v[b, seen, head]
        weights = np.exp(keys @ query / d**0.5 - np.max(keys @ query) / d**0.5)
        weights /= weights.sum()
        d_weights = values @ do
        d_scores = weights * (d_weights - weights @ d_weights) / d**0.5
        result.out[b, t, h] = weights @ values
        result.dq[b, t, h] = d_scores @ keys
        result.dk[b, seen, head] += np.outer(d_scores, query)
        result.dv[b, seen, head] += np.outer(weights, do)
    return result


def draw(seed, B, L, H, K, d) -> list[np.ndarray]:
    """q, k, v and a cotangent, float32."""
    rng = np.random.default_rng(seed)
    shapes = ((B, L, H, d), (B, L, K, d), (B, L, K, d), (B, L, H, d))
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def lay_out(*rows) -> np.ndarray:
    """Segment ids of rows of (id, tokens) pairs."""
    return np.stack([np.repeat(*np.transpose(row)) for row in rows]).astype(np.int32)


def relative_error(actual, expected) -> float:
    """Norm of the difference over the norm of `expected`, if that is not 0."""
    expected = np.asarray(expected, np.float64)
    difference = np.linalg.norm(np.asarray(actual, np.float64) - expected)
    return difference / (np.linalg.norm(expected) or 1.0)
