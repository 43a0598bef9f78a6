"""Chunk attention in numpy float64, one query at a time, from the definition."""

import numpy as np
import pytest


def _attend_token_by_token(q, k, v, chunk_size, positions, segment_ids, cached=None):
    """Row by row; `cached` (B, M, H, ...) k and v of the tokens before each row's first token."""
    B, L, H, _ = q.shape
    out = np.zeros((B, L, H, v.shape[-1]))
    for row in range(B):
        documents = {}
        if cached is not None:
            documents[segment_ids[row, 0]] = list(zip(*(x[row] for x in cached)))
        for t in range(L):
            document = segment_ids[row, t]
            if document == 0:
                continue
            seen = documents.setdefault(document, [])
            if positions[row, t] % chunk_size == 0:
                seen.clear()
            seen.append((k[row, t], v[row, t]))
            keys, values = (np.stack(x).astype(np.float64) for x in zip(*seen))
            for head in range(H):
                scores = keys[:, head] @ q[row, t, head].astype(np.float64)
                weights = np.exp(scores - scores.max())
                out[row, t, head] = weights @ values[:, head] / weights.sum()
    return out


@pytest.fixture(scope="session")
def attend_token_by_token():
    return _attend_token_by_token
