"""The modules from plain sizes, without a model: values, packed documents, streaming, errors."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.cache import LayerCache
from megalodon_jax.modules import (
    CEMA,
    Block,
    FeedForward,
    Implementations,
    LayerNorm,
    Linear,
    MegaAttention,
    PositionInfo,
    RMSNorm,
    TimestepNorm,
    position_info,
)
from pallas_kernels.chunk_attention import KeyValueCache
from tests.golden_files import relative_error

B, L, D, N, H, Z, E, C = 2, 24, 32, 4, 2, 16, 32, 8
ROPE_BASE = 1e4
# Documents that begin within a chunk, and padding at the end of the second row.
SEGMENT_IDS = np.repeat([[1, 2], [1, 0]], L // 2, axis=1).astype(np.int32)
SEGMENT_IDS[0, 11] = 2


@pytest.fixture(scope="module")
def x() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(B, L, D)), jnp.float32)


@pytest.fixture(scope="module")
def block() -> Block:
    rngs = nnx.Rngs(0)
    attention = MegaAttention(
        D, z_dim=Z, value_dim=E, chunk_size=C, num_heads=H, cema_order=N, norm_num_groups=4,
        rngs=rngs,
    )  # fmt: skip
    return Block(attention, FeedForward(D, 48, rngs=rngs))


def jitted(module: nnx.Module):
    graphdef, state = nnx.split(module)
    call = jax.jit(lambda state, x, **options: nnx.merge(graphdef, state)(x, **options))
    return lambda x, **options: call(state, x, **options)


@pytest.fixture(scope="module")
def call(block):
    """The jitted block; every combination of arguments is compiled once."""
    return jitted(block)


def positions_of(length: int, start: int | None = None, **options) -> PositionInfo:
    return position_info(
        (B, length),
        chunk_size=C,
        head_dim=Z // H,
        rope_base=ROPE_BASE,
        start=None if start is None else jnp.full(B, start, jnp.int32),
        **options,
    )


def test_cema_equals_the_recurrence_in_numpy(x):
    cema = CEMA(D, order=N, rngs=nnx.Rngs(0))
    y, final_state = jitted(cema)(x)
    alpha, delta, theta, gamma, omega = (
        np.asarray(getattr(cema, name)[...], np.float64)
        for name in ("alpha", "delta", "theta", "gamma", "omega")
    )
    p, d, frequency = (1 / (1 + np.exp(-value)) for value in (alpha, delta, theta))
    angle = np.arange(1, N + 1) * frequency[:, None] * 2 * np.pi / N
    q = (1 - p * d) * np.exp(1j * angle)
    state = np.zeros((B, D, N), complex)
    expected = np.zeros((B, L, D))
    for t in range(L):
        state = q * state + p * np.asarray(x, np.float64)[:, t, :, None]
        readout = ((gamma[..., 0] + 1j * gamma[..., 1]) * state).sum(-1).real / np.sqrt(N)
        expected[:, t] = readout + omega * np.asarray(x)[:, t]
    assert relative_error(y, expected) <= 1e-6
    assert relative_error(final_state, state) <= 1e-6


def test_timestep_norm_equals_cumulative_moments_in_numpy(x):
    y, final_state = jitted(TimestepNorm(D, num_groups=4))(x)
    grouped = np.asarray(x, np.float64).reshape(B, L, 4, D // 4)
    for t in range(L):
        seen = grouped[:, : t + 1]
        mean = seen.mean((1, 3))[..., None]
        std = np.sqrt(seen.var((1, 3))[..., None] + 1e-5)
        expected = (grouped[:, t] - mean) / std
        np.testing.assert_allclose(y[:, t], expected.reshape(B, D), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(final_state.count, [L] * B)


def test_norms_and_linear_equal_numpy(x):
    wide = np.asarray(x, np.float64)
    rms = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
    assert relative_error(RMSNorm(D)(x), rms) <= 1e-6
    centered = wide - wide.mean(-1, keepdims=True)
    normed = centered / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    assert relative_error(LayerNorm(D)(x), normed) <= 1e-6
    linear = Linear(D, 3, axes=(None, None), rngs=nnx.Rngs(0))
    expected = wide @ np.asarray(linear.kernel[...], np.float64)
    assert relative_error(linear(x), expected) <= 1e-6


@pytest.mark.slow
def test_block_without_positions_equals_explicit_positions(call, x):
    without, explicit = call(x).x, call(x, positions=positions_of(L)).x
    np.testing.assert_array_equal(without, explicit)
    packed = call(x, segment_ids=SEGMENT_IDS).x
    explicit = call(x, positions=positions_of(L, segment_ids=jnp.asarray(SEGMENT_IDS))).x
    np.testing.assert_array_equal(packed, explicit)
    assert not np.allclose(packed, without)


@pytest.mark.slow
def test_packed_documents_equal_separate_ones(call, x):
    packed = call(x, segment_ids=SEGMENT_IDS).x
    for row, start, stop in ((0, 0, 11), (0, 11, 24), (1, 0, 12)):
        # Padding at the right has no effect on the tokens before it.
        document = jnp.zeros_like(x).at[0, : stop - start].set(x[row, start:stop])
        separate = call(document).x[0, : stop - start]
        assert relative_error(packed[row, start:stop], separate) <= 2e-6


def test_streamed_pieces_equal_one_call(block, call, x):
    cache = LayerCache(
        KeyValueCache(jnp.zeros((B, H, C, Z // H)), jnp.zeros((B, H, C, E // H))),
        block.mega.timenorm.init_state(B),
        jnp.zeros((B, 2 * N, D)),
    )
    outputs = []
    for start in range(0, L, 12):
        piece, cache = call(
            x[:, start : start + 12], positions=positions_of(12, start), cache=cache
        )
        outputs.append(piece)
    assert relative_error(np.concatenate(outputs, 1), call(x).x) <= 2e-6
    with pytest.raises(ValueError, match="a cache needs positions"):
        block(x, cache=cache)


def test_positions_and_segment_ids_exclude_each_other(block, x):
    with pytest.raises(ValueError, match="pass only one of the two"):
        block(x, positions=positions_of(L), segment_ids=SEGMENT_IDS)


def test_whole_rows_may_have_an_attention_of_their_own(x):
    def attend(x, segment_ids=None):
        attention = MegaAttention(
            D, z_dim=Z, value_dim=E, chunk_size=C, num_heads=H, cema_order=N, norm_num_groups=4,
            implementations=Implementations(attention="triton", whole_row_attention="reference"),
            rngs=nnx.Rngs(0),
        )  # fmt: skip
        return attention(x, segment_ids=segment_ids).product

    assert jax.eval_shape(attend, x).shape == x.shape
    with pytest.raises(ValueError, match="triton needs an NVIDIA GPU"):
        jax.eval_shape(attend, x, jnp.ones(x.shape[:2], jnp.int32))
