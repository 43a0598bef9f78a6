"""Passes over packed documents, with a stand-in for cuDNN's kernel that runs anywhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megalodon_jax.baselines.documents import document_numbers
from megalodon_jax.baselines.packed import DocumentOffsets, document_offsets, packed_attention
from tests.baselines.definition import draw, exact_attention, lay_out, relative_error

PER_CALL = 16


class StandIn:
    """Dense attention by offsets that, like cuDNN, gives anything outside of its documents.

    Attributes:
      documents: of the fullest row, one number for each call of the forward kernel.
    """

    def __init__(self):
        self.documents: list[int] = []

    def __call__(self, q, k, v, offsets: DocumentOffsets):
        return _kernel(self, q, k, v, offsets)

    def record(self, lengths):
        self.documents.append(int((lengths > 0).sum(axis=1).max()))


def _members(offsets: DocumentOffsets, L: int):
    """Which tokens belong to which document, (B, M, L)."""
    starts, index = offsets.starts[:, :-1, None], jnp.arange(L)
    return (starts >= 0) & (index >= starts) & (index < starts + offsets.lengths[:, :, None])


def _dense(q, k, v, offsets: DocumentOffsets):
    L, d = q.shape[1], q.shape[3]
    members = _members(offsets, L).astype(jnp.float32)
    same = jnp.einsum("bmt,bms->bts", members, members)[:, None] * jnp.tri(L) > 0
    scores = jnp.einsum("bthd,bshd->bhts", q, k, precision="highest") / d**0.5
    weights = jnp.where(same, jnp.exp(scores), 0)
    weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
    return jnp.einsum("bhts,bshd->bthd", weights, v, precision="highest")


def _poison(x, offsets: DocumentOffsets):
    return jnp.where(_members(offsets, x.shape[1]).any(axis=1)[..., None, None], x, jnp.nan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernel(stand_in, q, k, v, offsets):
    jax.debug.callback(stand_in.record, offsets.lengths)
    return _poison(_dense(q, k, v, offsets), offsets)


def _kernel_backward(stand_in, operands, do):
    *qkv, offsets = operands
    gradients = jax.vjp(lambda *qkv: _dense(*qkv, offsets), *qkv)[1](do)
    return *(_poison(gradient, offsets) for gradient in gradients), None


_kernel.defvjp(
    lambda stand_in, *operands: (_kernel(stand_in, *operands), operands), _kernel_backward
)


def row_of(documents, L):
    """Segment ids of a row with documents of two tokens and more, padding between some of them."""
    ids = np.zeros(L, np.int32)
    begin = L % 3
    for number in range(documents):
        length = 2 + number % 2 if number + 1 < documents else max(2, (L - begin) // 2)
        ids[begin : begin + length] = number + 1
        begin += length + (number % 5 == 0)
    assert begin <= L + 1
    return ids


@pytest.mark.parametrize(
    ("counts", "passes"), [((0, 1, 16), 1), ((0, 0, 0), 1), ((1, 17, 3), 2), ((16, 40, 33), 3)]
)
def test_any_number_of_documents(counts, passes):
    L = 127
    segment_ids = np.stack([row_of(count, L) for count in counts])
    *qkv, cotangent = draw(8, 3, L, H=2, K=2, d=4)
    stand_in = StandIn()

    @jax.jit
    def forward(*qkv):
        return packed_attention(
            stand_in, *qkv, segment_ids=jnp.asarray(segment_ids), documents_per_call=PER_CALL
        )

    @jax.jit
    def differentiate(cotangent, *qkv):
        out, pull_back = jax.vjp(forward, *qkv)
        return out, *pull_back(cotangent)

    inference = forward(*qkv)
    jax.effects_barrier()
    # The usual rows take one call, and no call takes more documents than it may.
    assert len(stand_in.documents) == passes
    assert max(stand_in.documents) == min(PER_CALL, max(counts))

    stand_in.documents.clear()
    results = differentiate(cotangent, *qkv)
    jax.effects_barrier()
    # The first pass keeps its residuals; the backward pass runs the others again.
    assert len(stand_in.documents) == 2 * passes - 1

    expected = exact_attention(*qkv, cotangent, segment_ids=segment_ids)
    assert relative_error(inference, expected.out) < 2e-6
    for name, actual, exact in zip(expected._fields, results, expected, strict=True):
        assert relative_error(actual, exact) < 2e-6, name


def test_offsets_of_documents():
    numbers = document_numbers(
        jnp.asarray(lay_out([(1, 3), (2, 1), (0, 2), (3, 2)], [(0, 2), (7, 6)], [(0, 8)]))
    )
    np.testing.assert_array_equal(
        numbers,
        [[0, 0, 0, 1, -1, -1, 2, 2], [-1, -1, 0, 0, 0, 0, 0, 0], [-1] * 8],
    )
    starts, lengths = document_offsets(numbers, 0, 2)
    np.testing.assert_array_equal(starts, [[0, 3, -1], [2, -1, -1], [-1, -1, -1]])
    np.testing.assert_array_equal(lengths, [[3, 1], [6, -1], [-1, -1]])
    starts, lengths = document_offsets(numbers, 2, 2)
    np.testing.assert_array_equal(starts, [[6, -1, -1], [-1, -1, -1], [-1, -1, -1]])
    np.testing.assert_array_equal(lengths, [[2, -1], [-1, -1], [-1, -1]])


def test_a_segment_id_that_returns_is_another_document():
    numbers = document_numbers(jnp.asarray([[1, 1, 0, 1, 2, 1]], jnp.int32))
    np.testing.assert_array_equal(numbers, [[0, 0, -1, 1, 2, 3]])
