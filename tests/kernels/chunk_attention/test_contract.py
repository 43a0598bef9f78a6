"""Contract of chunk attention, over all implementations."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.chunk_attention import KeyValueCache, blocks, chunk_attention

GOLDEN = np.load(Path(__file__).resolve().parents[2] / "golden" / "ops_attention.npz")
CASES = json.loads(GOLDEN["__meta__"].item())["cases"]
pytestmark = pytest.mark.usefixtures("runnable")
IMPLEMENTATIONS = ("reference", "xla", "triton")
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
# Many launches, which take seconds in Triton's interpreter.
slow_in_triton = pytest.mark.parametrize(
    "implementation", ["reference", "xla", pytest.param("triton", marks=pytest.mark.slow)]
)

run = jax.jit(chunk_attention, static_argnames=("chunk_size", "implementation"))


def relative(actual, expected):
    expected = np.asarray(expected, np.float64)
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)


def trace_and_differentiate(qkv, cotangent, *, chunk_size, implementation: Any = "xla", **rows):
    """Outputs, and gradients by q, k, v of sum(out * cotangent)."""

    def attend(*qkv):
        return chunk_attention(
            *qkv, chunk_size=chunk_size, implementation=implementation, **rows
        ).out

    out, backward = jax.vjp(attend, *qkv)
    return out, backward(cotangent)


differentiate = jax.jit(trace_and_differentiate, static_argnames=("chunk_size", "implementation"))


def exact_differentiate(qkv, cotangent, **options):
    """Float64 automatic differentiation through the dense softmax."""
    with jax.enable_x64(True):
        double = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (qkv, cotangent))
        out, grads = differentiate(*double, implementation="reference", **options)
        assert out.dtype == jnp.float64
        return np.asarray(out), jax.tree.map(np.asarray, grads)


def draw(seed, B, L, H=2, Dk=8, Dv=12) -> tuple[Any, Any]:
    """q, k, v and a cotangent."""
    rng = np.random.default_rng(seed)
    shapes = ((B, L, H, Dk), (B, L, H, Dk), (B, L, H, Dv), (B, L, H, Dv))
    *qkv, cotangent = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return tuple(qkv), cotangent


def lay_out(lengths_by_row, L):
    """Segment ids, positions and (row, tokens) of documents that lie end to end, before padding."""
    ids = np.zeros((len(lengths_by_row), L), np.int32)
    positions = np.zeros_like(ids)
    documents = []
    for row, lengths in enumerate(lengths_by_row):
        at = 0
        for number, length in enumerate(lengths):
            tokens = slice(at, at + length)
            ids[row, tokens], positions[row, tokens] = number + 1, np.arange(length)
            documents.append((row, tokens))
            at += length
    return ids, positions, documents


def rotate(x, base, chunk_size):
    """RoPE on adjacent pairs, positions restarting in every chunk."""
    L, width = x.shape[1], x.shape[3]
    angle = np.outer(np.arange(L) % chunk_size, base ** (-np.arange(0, width, 2) / width))
    cos, sin = (jnp.asarray(f(angle), jnp.float32)[:, None] for f in (np.cos, np.sin))
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)


@slow_in_triton
@pytest.mark.parametrize("case", CASES)
def test_matches_released_code(case, implementation):
    load = {key.split("/")[1]: GOLDEN[key] for key in GOLDEN.files if key.startswith(case + "/")}
    settings = {word.rstrip("0123456789"): word for word in case.split("_")}
    H, C, base = (int(settings[n].removeprefix(n)) for n in ("H", "C", "base"))

    @jax.jit
    def attend(q, k, v):
        q, k, v = (x.reshape(*x.shape[:2], H, -1) for x in (q, k, v))
        q, k = (rotate(x, base or 10_000, C) for x in (q, k))
        out = chunk_attention(q, k, v, chunk_size=C, implementation=implementation).out
        return out.reshape(*out.shape[:2], -1)

    @jax.jit
    def with_gradients(qkv, cotangent):
        y, backward = jax.vjp(attend, *qkv)
        return y, backward(cotangent)

    y, grads = with_gradients([load[n] for n in "qkv"], load["cot_y"])
    assert relative(y, load["y"]) <= 1e-6
    for name, grad in zip("qkv", grads):
        assert relative(grad, load[f"grad_{name}"]) <= 5e-6


@pytest.mark.parametrize("L", [1, 31, 32, 63, 65, 100])  # In chunks of 32.
def test_matches_definition(L, attend_token_by_token):
    C = 32
    qkv, cotangent = draw(L, 2, L)
    positions = np.tile(np.arange(L, dtype=np.int32), (2, 1))
    expected = attend_token_by_token(*qkv, C, positions, np.ones_like(positions))
    exact, exact_grads = exact_differentiate(qkv, cotangent, chunk_size=C)
    assert relative(exact, expected) <= 1e-12
    # None is the path without masks per token; explicit positions take the other one.
    paths = [("xla", None), ("xla", positions)] + [("reference", positions)] * (L == 65)
    for implementation, given in paths:
        out, grads = differentiate(
            qkv, cotangent, chunk_size=C, positions=given, implementation=implementation
        )
        assert relative(out, expected) <= 1e-6
        assert relative(grads[2], exact_grads[2]) <= 5e-6
        if L > 1:  # One key's weight is 1 whatever q and k are.
            assert relative(grads[0], exact_grads[0]) <= 5e-6
            assert relative(grads[1], exact_grads[1]) <= 5e-6


@pytest.mark.slow
def test_result_is_independent_of_tiles_and_groups(monkeypatch):
    """Several query tiles in a block, blocks in a loop: sizes that small inputs do not reach."""
    C, L = 260, 1040
    qkv, cotangent = draw(0, 1, L, H=1)
    ids, positions, _ = lay_out([[400, 100, 500]], L)
    packed = {"positions": positions, "segment_ids": ids}
    exact = [exact_differentiate(qkv, cotangent, chunk_size=C, **rows) for rows in ({}, packed)]
    for group in (1, 2, 4):
        monkeypatch.setattr(blocks, "_MAX_SCORES", group * 128 * 2 * C)
        sizes = blocks.AttentionBlocks.make((1, L, 1, 8), C, key_offset=C)
        found_sizes = len(list(sizes.tiles())), sizes.num_blocks, sizes.blocks_per_group
        assert found_sizes == (3, 4, group)
        for rows, (out, grads) in zip(({}, packed), exact, strict=True):
            if group > 1 and not rows:
                continue  # Half the keys: these are groups of 4, in one step.

            # A new function each time: jit would return what it compiled for another size.
            @jax.jit
            def fresh(qkv, cotangent, rows):
                return trace_and_differentiate(qkv, cotangent, chunk_size=C, **rows)

            found, found_grads = fresh(qkv, cotangent, rows)
            assert relative(found, out) <= 1e-6
            for a, b in zip(found_grads, grads):
                assert relative(a, b) <= 5e-6


ROWS = ([31, 32, 1, 31], [64, 31], [0], [1, 64, 31])


@slow_in_triton
def test_packed_documents_equal_documents_alone(implementation, attend_token_by_token):
    C, L = 32, 96
    qkv, cotangent = draw(1, len(ROWS), L)
    ids, positions, documents = lay_out(ROWS, L)
    options = {"chunk_size": C, "implementation": implementation}
    out, grads = differentiate(qkv, cotangent, positions=positions, segment_ids=ids, **options)
    expected = attend_token_by_token(*qkv, C, positions, ids)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6)
    for array in (out, *grads):
        assert not np.asarray(array)[ids == 0].any()
    for row, tokens in documents:
        if tokens.start == tokens.stop:
            continue
        alone = [a[row : row + 1, tokens] for a in (*qkv, cotangent)]
        out_alone, grads_alone = differentiate(tuple(alone[:3]), alone[3], **options)
        np.testing.assert_allclose(out[row, tokens], out_alone[0], rtol=0, atol=2e-6)
        for packed, by_itself in zip(grads, grads_alone):
            np.testing.assert_allclose(packed[row, tokens], by_itself[0], rtol=0, atol=1e-5)


@each_implementation
def test_documents_are_independent(implementation):
    C, L = 32, 96
    (q, k, v), cotangent = draw(2, 2, L)
    ids, positions, documents = lay_out(([20, 70], [40, 56]), L)
    options = {"positions": positions, "segment_ids": ids, "chunk_size": C}

    def second_documents(*qkv_cotangent):
        *qkv, cotangent = qkv_cotangent
        out, grads = differentiate(tuple(qkv), cotangent, implementation=implementation, **options)
        return [
            np.asarray(a)[row, tokens] for row, tokens in documents[1::2] for a in (out, *grads)
        ]

    first = (ids == 1)[..., None, None]
    # The scores between the documents overflow to infinity.
    disturbed = [np.where(first, a * 1e30, a) for a in (q, k, v, cotangent)]
    plain = second_documents(q, k, v, cotangent)
    for a, b in zip(plain, second_documents(*disturbed), strict=True):
        np.testing.assert_array_equal(a, b)


def feed(qkv, sizes, chunk_size, implementation, cache, positions, segment_ids, **options):
    """Feeds rows in several calls; joins the outputs."""
    outs, at = [], 0
    for size in sizes:
        tokens = slice(at, at + size)
        out, cache = run(
            *(x[:, tokens] for x in qkv),
            chunk_size=chunk_size,
            positions=positions[:, tokens],
            segment_ids=None if segment_ids is None else segment_ids[:, tokens],
            cache=cache,
            implementation=implementation,
            **options,
        )
        outs.append(out)
        at += size
    return jnp.concatenate(outs, axis=1), cache


def empty_cache(B, C, H=2, Dk=8, Dv=12, fill=0.0):
    return KeyValueCache(
        jnp.full((B, H, C, Dk), fill, jnp.float32), jnp.full((B, H, C, Dv), fill, jnp.float32)
    )


@slow_in_triton
def test_streaming_equals_one_call(implementation):
    C, sizes = 32, (1, 40, 22, 1, 1, 40)
    L = sum(sizes)
    qkv, cotangent = draw(3, 2, L)
    positions = np.tile(np.arange(L, dtype=np.int32), (2, 1))
    whole, whole_grads = exact_differentiate(qkv, cotangent, chunk_size=C)
    # Slots without a token are ignored whatever they hold.
    cache = empty_cache(2, C, fill=0.0 if implementation == "reference" else np.nan)

    @jax.jit
    def with_gradients(qkv):
        def loss(qkv):
            cache = empty_cache(2, C)
            out, _ = feed(qkv, sizes, C, implementation, cache, positions, None)
            return (out * cotangent).sum()

        return jax.grad(loss)(qkv)

    out, cache = feed(qkv, sizes, C, implementation, cache, positions, None)
    assert relative(out, whole) <= 1e-6
    filled = L % C
    key, value = cache.swap_heads_and_slots()
    np.testing.assert_array_equal(key[:, :filled], qkv[1][:, L - filled :])
    np.testing.assert_array_equal(value[:, :filled], qkv[2][:, L - filled :])
    for a, b in zip(with_gradients(qkv), whole_grads):
        assert relative(a, b) <= 5e-6


@slow_in_triton
@pytest.mark.parametrize("sizes", [(24, 1, 1, 24), (50,)])
def test_rows_at_different_positions(sizes, implementation, attend_token_by_token):
    """Rows begin anywhere in a chunk, calls end in padding, documents end inside calls."""
    C, B = 16, 4
    rng = np.random.default_rng(4)
    L = sum(sizes)
    begin = np.array([0, 5, 15, 37], np.int32)
    qkv, _ = draw(5, B, L)
    cached = [[rng.normal(size=(begin[r] % C, 2, w)).astype(np.float32) for r in range(B)]
            for w in (8, 12)]  # fmt: skip
    cache = jax.tree.map(np.array, empty_cache(B, C))
    for row in range(B):
        cache.key[row, :, : begin[row] % C] = cached[0][row].swapaxes(0, 1)
        cache.value[row, :, : begin[row] % C] = cached[1][row].swapaxes(0, 1)
    at, outs, expected_rows = 0, [], []
    position, seen = begin.copy(), [list(map(list, zip(*(x[r] for x in cached))))
                                    for r in range(B)]  # fmt: skip
    for size in sizes:
        call = slice(at, at + size)
        ids, positions = np.zeros((B, size), np.int32), np.zeros((B, size), np.int32)
        for row in range(B):
            tokens = rng.integers(0, size + 1) if row else size
            border = rng.integers(1, tokens) if row % 2 and tokens > 1 else tokens
            ids[row, :border], ids[row, border:tokens] = 1, 2
            positions[row, :border] = position[row] + np.arange(border)
            positions[row, border:tokens] = np.arange(tokens - border)
            positions[row, tokens:] = 7777
            if tokens == 0:
                positions[row] = position[row]
        call_qkv = [x[:, call] for x in qkv]
        for row in range(B):
            so_far = tuple(np.array([s[i] for s in seen[row]]).reshape(-1, 2, w)[None]
                           for i, w in ((0, 8), (1, 12)))  # fmt: skip
            expected_rows.append(
                attend_token_by_token(
                    *(x[row : row + 1] for x in call_qkv), C, positions[row : row + 1],
                    ids[row : row + 1], cached=so_far,
                )
            )  # fmt: skip
            for t in np.flatnonzero(ids[row]):
                if positions[row, t] % C == 0:
                    seen[row].clear()
                seen[row].append([call_qkv[1][row, t], call_qkv[2][row, t]])
                position[row] = positions[row, t] + 1
                if position[row] % C == 0:
                    seen[row].clear()
        before = cache
        out, cache = run(
            *call_qkv, chunk_size=C, positions=positions, segment_ids=ids, cache=cache,
            implementation=implementation,
        )  # fmt: skip
        outs.append(out)
        for row in range(B):
            filled = position[row] % C
            assert filled == len(seen[row])
            if filled:
                key, value = cache.swap_heads_and_slots()
                np.testing.assert_array_equal(key[row, :filled], [s[0] for s in seen[row]])
                np.testing.assert_array_equal(value[row, :filled], [s[1] for s in seen[row]])
            if not ids[row].any():
                for new, old in zip(cache, before):
                    np.testing.assert_array_equal(new[row], old[row])
        at += size
    expected = [np.concatenate(expected_rows[i : i + B]) for i in range(0, B * len(sizes), B)]
    np.testing.assert_allclose(
        np.concatenate(outs, 1), np.concatenate(expected, 1), rtol=0, atol=2e-6
    )


@each_implementation
@pytest.mark.parametrize("L", [1, 5])
def test_rows_of_padding_alone(L, implementation):
    """Output 0, the cache as it came, and gradients of 0 rather than NaN."""
    C = 8
    qkv, cotangent = draw(6, 2, L)
    cache = jax.tree.map(lambda a: a + 1.0, empty_cache(2, C))
    ids = jnp.stack([jnp.zeros(L, jnp.int32), jnp.ones(L, jnp.int32)])
    positions = jnp.stack([jnp.full(L, 3), 3 + jnp.arange(L)])

    def loss(qkv, cache):
        result = chunk_attention(
            *qkv, chunk_size=C, positions=positions, segment_ids=ids, cache=cache,
            implementation=implementation,
        )  # fmt: skip
        return (result.out * cotangent).sum(), result

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (grads, cache_grads), (out, after) = gradient(qkv, cache)
    assert not np.asarray(out[0]).any()
    np.testing.assert_array_equal(after.key[0], cache.key[0])
    np.testing.assert_array_equal(after.value[0], cache.value[0])
    for grad in (*grads, *cache_grads):
        assert np.isfinite(grad).all()
        assert not np.asarray(grad[0]).any()
        assert np.asarray(grad[1]).any()


def largest_intermediate(jaxpr):
    """Numbers in the largest array that a jaxpr, or one inside it, makes."""
    largest = 0
    for equation in jaxpr.eqns:
        largest = max(largest, *(v.aval.size for v in equation.outvars))
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                largest = max(largest, largest_intermediate(inner))
    return largest


@pytest.mark.parametrize("packed", [False, True])
def test_memory_is_linear_in_the_length(packed):
    L, C, H = 131_072, 2048, 2
    qkv = tuple(jax.ShapeDtypeStruct((1, L, H, w), jnp.bfloat16) for w in (64, 64, 128))
    row = jax.ShapeDtypeStruct((1, L), jnp.int32)

    def loss(qkv, positions, ids):
        rows = {"positions": positions, "segment_ids": ids} if packed else {}
        out = chunk_attention(*qkv, chunk_size=C, implementation="xla", **rows).out
        return out.astype(jnp.float32).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(qkv, row, row)
    largest = largest_intermediate(jaxpr.jaxpr)
    # v itself is the smallest bound there could be; dense chunks would make 32 times as much.
    assert L * H * 128 <= largest <= max(2 * L * H * 128, blocks._MAX_SCORES)


@each_implementation
def test_bfloat16(implementation):
    C, L = 32, 65
    qkv, cotangent = draw(7, 2, L)
    narrow = tuple(jnp.asarray(x, jnp.bfloat16) for x in qkv)
    cotangent = jnp.asarray(cotangent, jnp.bfloat16)
    wide = jax.tree.map(lambda a: np.asarray(a, np.float32), (narrow, cotangent))
    out, grads = differentiate(narrow, cotangent, chunk_size=C, implementation=implementation)
    exact, exact_grads = exact_differentiate(*wide, chunk_size=C)
    assert out.dtype == jnp.bfloat16
    # Rounding weights and outputs to 8 bits: 2^-9 each, root mean square about 0.6 of that.
    assert relative(out, exact) <= 4e-3
    for a, b in zip(grads, exact_grads):
        assert a.dtype == jnp.bfloat16
        assert relative(a, b) <= 6e-3


def test_errors_say_what_to_do():
    qkv, _ = draw(8, 2, 5)
    with pytest.raises(
        ValueError, match=r"no implementation 'cuda'.*'reference', 'xla', 'mosaic_gpu'"
    ):
        chunk_attention(*qkv, chunk_size=4, implementation="cuda")  # type: ignore
    with pytest.raises(ValueError, match="positions are None"):
        chunk_attention(*qkv, chunk_size=4, segment_ids=jnp.ones((2, 5), jnp.int32))
    with pytest.raises(ValueError, match=r"positions has shape \(5,\)"):
        chunk_attention(*qkv, chunk_size=4, positions=jnp.arange(5))
    positions = jnp.tile(jnp.arange(5), (2, 1))
    with pytest.raises(ValueError, match=r"cache.key is float32\(2, 2, 3, 8\).*chunk_size slots"):
        chunk_attention(*qkv, chunk_size=4, positions=positions, cache=empty_cache(2, 3))
    with pytest.raises(ValueError, match="have shapes"):
        chunk_attention(qkv[0], qkv[1][:, :4], qkv[2], chunk_size=4)
    with pytest.raises(ValueError, match="shards the sequence over devices; pass None for cache"):
        chunk_attention(
            *qkv, chunk_size=4, positions=positions, cache=empty_cache(2, 4), sequence_axis="chunk"
        )
    with pytest.raises(ValueError, match="chunk_size is 0"):
        chunk_attention(*qkv, chunk_size=0)
