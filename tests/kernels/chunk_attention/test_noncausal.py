"""Non-causal chunk attention and attention without chunks, over all implementations."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels.chunk_attention import (
    AttentionDropout,
    KeyValueCache,
    chunk_attention,
    noncausal,
)

pytestmark = pytest.mark.usefixtures("runnable")
LENGTH, CHUNK = 37, 8
DOCUMENTS = [[5, 17, 9], [37], [1, 1, 30]]


def rows_of(documents=DOCUMENTS, length=LENGTH, align=1):
    """Segment ids and positions; documents begin at multiples of `align`."""
    ids, positions = np.zeros((2, len(documents), length), np.int32)
    for row, lengths in enumerate(documents):
        at = 0
        for number, count in enumerate(lengths, start=1):
            tokens = slice(at, at + count)
            ids[row, tokens], positions[row, tokens] = number, np.arange(count)
            at += -(-count // align) * align
    return ids, positions


def draw(seed=0, rows=3, length=LENGTH, heads=2, dk=6, dv=10):
    rng = np.random.default_rng(seed)
    shape = (rows, length, heads)
    return [rng.normal(size=(*shape, d)).astype(np.float32) for d in (dk, dk, dv, dv)]


def define(q, k, v, chunk_size, positions, ids):
    """One query at a time, in float64, from the definition."""
    out = np.zeros(v.shape)
    for b, t, h in np.ndindex(q.shape[:3]):
        if ids[b, t] == 0:
            continue
        seen = ids[b] == ids[b, t]
        if chunk_size is not None:
            seen &= positions[b] // chunk_size == positions[b, t] // chunk_size
        scores = k[b, seen, h].astype(np.float64) @ q[b, t, h]
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights @ v[b, seen, h] / weights.sum()
    return out


def relative(actual, expected):
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)


def differentiate(qkv, cotangent, **options):
    @jax.jit
    def run(qkv, cotangent):
        out, backward = jax.vjp(lambda *qkv: chunk_attention(*qkv, **options).out, *qkv)
        return out, backward(cotangent)

    return run(tuple(qkv), cotangent)


def exact(qkv, cotangent, **options):
    with jax.enable_x64(True):
        wide = [jnp.asarray(a, jnp.float64) for a in (*qkv, cotangent)]
        out, gradients = differentiate(wide[:3], wide[3], implementation="reference", **options)
        return np.asarray(out), [np.asarray(g) for g in gradients]


CASES = {
    "whole": (None, 1, False),
    "chunks": (CHUNK, 1, False),
    "one chunk": (64, 1, False),
    "packed": (None, 1, True),
    "packed chunks": (CHUNK, 1, True),
    "aligned chunks": (CHUNK, CHUNK, True),
}


# Causal attention in chunks has its own tests (test_contract.py).
WITH_CAUSAL = [(case, False) for case in CASES]
WITH_CAUSAL += [(case, True) for case, (chunk_size, *_) in CASES.items() if chunk_size is None]
# In Triton's interpreter every case takes seconds: these two go through all of its code.
WITH_TRITON = [(case, False, "triton") for case in ("whole", "aligned chunks")]
WITH_TRITON += [
    pytest.param(*case, "triton", marks=pytest.mark.slow)
    for case in WITH_CAUSAL
    if (*case, "triton") not in WITH_TRITON
]


@pytest.mark.parametrize(
    ("case", "causal", "implementation"), [(*case, "xla") for case in WITH_CAUSAL] + WITH_TRITON
)
def test_matches_definition_with_gradients(case: str, causal: bool, implementation: str):
    chunk_size, align, packed = CASES[case]
    documents = [[5, 11], [37], [3, 2, 6]] if align > 1 else DOCUMENTS
    ids, positions = rows_of(documents if packed else [[LENGTH]] * 3, align=align)
    *qkv, cotangent = draw()
    given = {"positions": positions, "segment_ids": ids} if packed else {}
    if align > 1:
        given.pop("positions")
    if causal:
        expected = np.concatenate([
            define(*(a[:, : t + 1] for a in qkv), None, positions, ids[:, : t + 1])[:, -1:]
            for t in range(LENGTH)
        ], axis=1)  # fmt: skip
    else:
        expected = define(*qkv, chunk_size, positions, ids)
    options = {"chunk_size": chunk_size, "causal": causal, **given}
    exact_out, exact_gradients = exact(qkv, cotangent, **options)
    assert relative(exact_out, expected) <= 1e-12
    out, gradients = differentiate(qkv, cotangent, implementation=implementation, **options)
    assert relative(out, expected) <= 1e-6
    for found, wanted in zip(gradients, exact_gradients, strict=True):
        assert relative(found, wanted) <= 5e-6
    assert not np.any(np.asarray(out)[ids == 0])


@pytest.mark.parametrize("case", ["packed", "packed chunks", "aligned chunks"])
def test_result_is_independent_of_tiles_and_groups(case: str, monkeypatch):
    chunk_size, align, _ = CASES[case]
    ids, positions = rows_of([[5, 11], [37], [3, 2, 6]], align=align)
    *qkv, cotangent = draw(1)
    given = {"segment_ids": ids} | ({} if align > 1 else {"positions": positions})
    options = {"chunk_size": chunk_size, "causal": False, **given}
    expected = exact(qkv, cotangent, **options)
    for tile, scores in ((3, 2 * LENGTH * 3), (5, 2 * 3 * CHUNK * 5), (4, 1)):
        monkeypatch.setattr(noncausal, "_MAX_SCORES", scores)
        monkeypatch.setattr(noncausal, "_TILE_MULTIPLE", tile)
        out, gradients = differentiate(qkv, cotangent, **options)
        assert relative(out, expected[0]) <= 1e-6
        for found, wanted in zip(gradients, expected[1], strict=True):
            assert relative(found, wanted) <= 5e-6


def test_groups_in_rematerialized_code(monkeypatch):
    """Constants among the residuals are numbers there; whole rows in groups of one."""
    monkeypatch.setattr(noncausal, "_MAX_SCORES", 1)
    monkeypatch.setattr(noncausal, "_TILE_MULTIPLE", LENGTH)
    q, k, v, cotangent = draw(1)

    def loss(qkv):
        return jnp.sum(chunk_attention(*qkv, chunk_size=None, causal=False).out * cotangent)

    policy = jax.checkpoint_policies.save_only_these_names("chunk_attention")
    saved = jax.checkpoint(loss, policy=policy)
    found = jax.jit(jax.grad(saved))((q, k, v))
    _, expected = exact((q, k, v), cotangent, chunk_size=None, causal=False)
    for gradient, wanted in zip(found, expected, strict=True):
        assert relative(gradient, wanted) <= 5e-6


# The one chunk is longer than a shard, which is refused.
@pytest.mark.parametrize("case", [case for case in CASES if case != "one chunk"])
def test_sequence_shards_equal_one_device(case: str):
    chunk_size, align, packed = CASES[case]
    length, rows = 32, [[5, 22, 4], [32], [16, 0, 9]]
    if align > 1:
        rows = [[5, 6, 8], [32], [15, 0, 9]]
    ids, positions = rows_of(rows, length, align)
    *qkv, cotangent = draw(2, length=length)
    given = {"segment_ids": ids, "positions": positions} if packed else {}
    if align > 1:
        given.pop("positions")
    mesh = Mesh(np.array(jax.devices()[:4]), ("chunk",))
    spec = PartitionSpec(None, "chunk")

    def attend(qkv, given, axis):
        return chunk_attention(
            *qkv, chunk_size=chunk_size, causal=False, sequence_axis=axis, **given
        ).out

    def run(function):
        total = lambda qkv: jnp.sum(function(qkv, given) * cotangent)  # noqa: E731
        return jax.jit(lambda qkv: (function(qkv, given), jax.grad(total)(qkv)))(tuple(qkv))

    expected = run(lambda qkv, given: attend(qkv, given, None))
    sharded = run(
        jax.shard_map(
            lambda qkv, given: attend(qkv, given, "chunk"),
            mesh=mesh,
            in_specs=(spec, spec),
            out_specs=spec,
            check_vma=False,
        )
    )
    for found, wanted in zip(jax.tree.leaves(sharded), jax.tree.leaves(expected), strict=True):
        assert relative(found, np.asarray(wanted, np.float64)) <= 2e-6


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_bfloat16_stays_near_float32(implementation: str):
    *qkv, cotangent = draw(3)
    options = {"chunk_size": CHUNK, "causal": False}
    out, gradients = differentiate(
        [jnp.asarray(a, jnp.bfloat16) for a in qkv], jnp.asarray(cotangent, jnp.bfloat16),
        implementation=implementation, **options,
    )  # fmt: skip
    assert out.dtype == jnp.bfloat16
    expected = exact(qkv, cotangent, **options)
    assert relative(out, expected[0]) <= 1e-2
    assert max(map(relative, gradients, expected[1])) <= 2e-2


@pytest.mark.parametrize("mode", ["softmax", "dropkey"])
def test_dropout(mode):
    q, k, v, cotangent = draw(4, heads=1)
    ids, positions = rows_of()
    options = {"causal": False, "positions": positions, "segment_ids": ids}
    dropout = AttentionDropout(0.3, jax.random.key(0), mode)
    ones = np.ones_like(v)
    for chunk_size in (None, CHUNK):
        forward = jax.jit(
            partial(chunk_attention, chunk_size=chunk_size, dropout=dropout, **options)
        )
        total = np.asarray(forward(q, k, ones).out)[ids != 0]
        if mode == "dropkey":
            # The softmax is over the keys that are left, the token's own at least.
            np.testing.assert_allclose(total, 1.0, rtol=1e-6)
        else:
            assert abs(total.mean() - 1.0) < 0.15
            assert total.std() > 0.1
        _, gradients = differentiate(
            (q, k, v), cotangent, chunk_size=chunk_size, dropout=dropout, **options
        )
        assert all(np.isfinite(g).all() for g in gradients)
        step = 1e-2

        def value(v, forward=forward):
            return float(np.sum(np.asarray(forward(q, k, v).out) * cotangent))

        # Linear in v, with the mask of the forward pass.
        found = float(np.sum(np.asarray(gradients[2]) * cotangent))
        expected = (value(v + step * cotangent) - value(v - step * cotangent)) / (2 * step)
        assert found == pytest.approx(expected, rel=1e-3)


def test_what_cannot_run_says_so():
    x = jnp.zeros((1, 8, 1, 2))
    for options in ({"causal": False, "chunk_size": 4}, {"chunk_size": None}):
        for name in ("mosaic_gpu", "pallas_tpu"):
            with pytest.raises(ValueError, match=f"no implementation '{name}'.*'reference', 'xla'"):
                chunk_attention(x, x, x, implementation=name, **options)
        cache = KeyValueCache(jnp.zeros((1, 1, 4, 2)), jnp.zeros((1, 1, 4, 2)))
        with pytest.raises(ValueError, match="has no cache"):
            chunk_attention(x, x, x, cache=cache, **options)
    with pytest.raises(ValueError, match=r"needs whole rows.*'chunk'"):
        chunk_attention(x, x, x, chunk_size=None, sequence_axis="chunk")
    with pytest.raises(ValueError, match=r"8 tokens, fewer than a chunk of 16"):
        chunk_attention(
            x, x, x, chunk_size=16, causal=False, sequence_axis="chunk",
            positions=jnp.zeros((1, 8), jnp.int32),
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"8 tokens, no multiple of the chunk of 3"):
        chunk_attention(x, x, x, chunk_size=3, causal=False, sequence_axis="chunk")
    with pytest.raises(ValueError, match=r"segment_ids has shape \(1, 7\)"):
        chunk_attention(
            x, x, x, chunk_size=None, causal=False, segment_ids=jnp.ones((1, 7), jnp.int32)
        )


def test_kernels_are_not_chosen(monkeypatch):
    """On a Hopper GPU, whose default kernels are causal, bfloat16 rows still run in XLA."""
    from pallas_kernels.common import target

    hopper = target.find_target()._replace(platform="gpu", kind="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("pallas_kernels.chunk_attention.api.find_target", lambda: hopper)
    x = jnp.zeros((1, 1024, 1, 64), jnp.bfloat16)
    assert chunk_attention(x, x, x, chunk_size=128, causal=False).out.shape == x.shape
