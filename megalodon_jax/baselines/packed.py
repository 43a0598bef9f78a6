"""Packed rows by an attention that takes few documents of a row at a time.

cuDNN takes packed documents by their offsets, with a static maximum of documents a row, and its
workspace grows with the maximum. The first pass takes the first documents of every row, which are
usually all; further passes run in a loop whose number of trips depends on the rows.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from megalodon_jax.baselines.documents import document_numbers
from megalodon_jax.typing import Array, Bool, Float, Int32
from pallas_kernels.common.residuals import Operation, name_residuals

# The name of chunk attention, whose residuals `blocked` saves too.
RESIDUALS: Operation = "chunk_attention"
# Scope of the loop over further passes: costs of a program are counted without it.
LATER_PASSES = "later_document_passes"


class DocumentOffsets(NamedTuple):
    """Documents of one pass, at most M in a row, in the form that cuDNN takes.

    Attributes:
      starts: index of each document's first token; -1 after the row's last document.
      lengths: tokens of each document; -1 after the row's last document.
    """

    starts: Int32[Array, "B M+1"]
    lengths: Int32[Array, "B M"]


# attend(q, k, v, offsets): attention inside the documents; anything at other tokens, which it does
# not read. Differentiable.
AttendDocuments = Callable[[Array, Array, Array, DocumentOffsets], Array]


def packed_attention(
    attend: AttendDocuments,
    q: Float[Array, "B L H d"],
    k: Float[Array, "B L K d"],
    v: Float[Array, "B L K d"],
    *,
    segment_ids: Int32[Array, "B L"],
    documents_per_call: int,
) -> Float[Array, "B L H d"]:
    """Attention inside documents, any number of them in a row; 0 at padding.

    Args:
      attend: attention inside at most `documents_per_call` documents of a row.
      q: queries.
      k: keys.
      v: values.
      segment_ids: documents of the rows, 0 for padding.
      documents_per_call: static maximum M of documents of a row in one call.
    """
    return _attend(attend, documents_per_call, q, k, v, document_numbers(segment_ids))


def document_offsets(
    numbers: Int32[Array, "B L"], first: Array | int, count: int
) -> DocumentOffsets:
    """Offsets of the documents first .. first + count - 1 of every row.

    Args:
      numbers: document of each token, from 0; -1 at padding.
      first: number of the first document.
      count: documents M of a row.
    """
    L = numbers.shape[1]
    index = jnp.arange(L, dtype=jnp.int32)[:, None]
    # A comparison with every document and a reduction: a scatter serializes on GPUs.
    is_in = numbers[:, :, None] == first + jnp.arange(count, dtype=jnp.int32)
    lengths = jnp.sum(is_in, axis=1, dtype=jnp.int32)
    starts = jnp.min(jnp.where(is_in, index, L), axis=1)
    exists = lengths > 0
    starts = jnp.pad(jnp.where(exists, starts, -1), ((0, 0), (0, 1)), constant_values=-1)
    return DocumentOffsets(starts, jnp.where(exists, lengths, -1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(attend: AttendDocuments, count: int, q, k, v, numbers):
    documents = _DocumentsOfPass.make(numbers, 0, count)
    out = attend(*documents.select((q, k, v)), documents.offsets)
    return _later_passes(attend, count, q, k, v, numbers, documents.select(out))


def _attend_forward(attend: AttendDocuments, count: int, q, k, v, numbers):
    documents = _DocumentsOfPass.make(numbers, 0, count)
    out, pull_back = vjp_with_named_residuals(
        lambda q, k, v: attend(q, k, v, documents.offsets), *documents.select((q, k, v))
    )
    out = _later_passes(attend, count, q, k, v, numbers, documents.select(out))
    return out, (q, k, v, numbers, pull_back)


def _attend_backward(attend: AttendDocuments, count: int, residuals, do):
    q, k, v, numbers, pull_back = residuals
    documents = _DocumentsOfPass.make(numbers, 0, count)
    gradients = documents.select(pull_back(documents.select(do)))

    def add_pass(number: Array, gradients: tuple[Array, ...]) -> tuple[Array, ...]:
        documents = _DocumentsOfPass.make(numbers, number, count)
        pull_back = jax.vjp(
            lambda q, k, v: attend(q, k, v, documents.offsets), *documents.select((q, k, v))
        )[1]
        # Every token is in one pass: the gradients of the other passes are 0 there.
        added = documents.select(pull_back(documents.select(do)))
        return jax.tree.map(jnp.add, gradients, added)

    return *_for_later_passes(numbers, count, add_pass, gradients), None


_attend.defvjp(_attend_forward, _attend_backward)


def _later_passes(attend: AttendDocuments, count: int, q, k, v, numbers, out):
    def add_pass(number: Array, out: Array) -> Array:
        documents = _DocumentsOfPass.make(numbers, number, count)
        new = attend(*documents.select((q, k, v)), documents.offsets)
        return out + documents.select(new)

    return _for_later_passes(numbers, count, add_pass, out)


def _for_later_passes[T](
    numbers: Int32[Array, "B L"], count: int, add_pass: Callable[[Array, T], T], total: T
) -> T:
    if numbers.shape[1] <= count:
        return total
    passes = jnp.max(numbers) // count + 1

    def body(carry: tuple[Array, T]) -> tuple[Array, T]:
        number, total = carry
        return number + 1, add_pass(number, total)

    with jax.named_scope(LATER_PASSES):
        return jax.lax.while_loop(lambda carry: carry[0] < passes, body, (jnp.int32(1), total))[1]


class _DocumentsOfPass(NamedTuple):
    """Documents of one pass, and which tokens are theirs."""

    offsets: DocumentOffsets
    is_in: Bool[Array, "B L 1 1"]

    @classmethod
    def make(cls, numbers: Int32[Array, "B L"], number: Array | int, count: int) -> Self:
        first = number * count
        is_in = (numbers >= first) & (numbers < first + count)
        return cls(document_offsets(numbers, first, count), is_in[:, :, None, None])

    def select[T](self, arrays: T) -> T:
        """The same tree with zeros at other tokens, where cuDNN leaves its results uninitialized.

        A selection: 0 times NaN is NaN.
        """
        return jax.tree.map(lambda x: jnp.where(self.is_in, x, 0), arrays)


def vjp_with_named_residuals(function: Callable[..., Array], *operands: Array) -> tuple[Array, Any]:
    """`jax.vjp` under the name by which remat saves attention; operands stay without a name."""
    out, pull_back = jax.vjp(function, *operands)
    # The output under its own name too: what follows in the layer needs it in the backward pass.
    named_out = name_residuals(out, RESIDUALS)
    leaves = [
        leaf
        if any(leaf is operand for operand in operands)
        else (named_out if leaf is out else name_residuals(leaf, RESIDUALS))
        for leaf in jax.tree.leaves(pull_back)
    ]
    return named_out, jax.tree.unflatten(jax.tree.structure(pull_back), leaves)
