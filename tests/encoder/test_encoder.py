"""The encoder as a whole: packing, padding, chunks, meshes, sizes, what it refuses."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.config import EncoderConfig
from megalodon_jax.encoder import Encoder
from megalodon_jax.errors import ConfigError
from megalodon_jax.modules import BidirectionalEMA, SequenceNorm, document_lengths
from pallas_kernels.common.target import interpreted
from tests.encoder.small_models import check_mesh, draw_inputs, model_of, rows_of, run, runner
from tests.golden_files import relative_error

SMALL = EncoderConfig(
    num_layers=2, model_dim=16, z_dim=8, value_dim=24, ffn_hidden_dim=20, cema_ndim=2,
    vocab_size=11, num_classes=3, chunk_size=4, norm_num_groups=4,
    # Compile fastest; the golden encoders and the operations' own tests have the others.
    cema_implementation="reference", attention_implementation="reference",
    timestep_norm_implementation="reference",
)  # fmt: skip
DOCUMENTS = [[5, 9, 2], [16], [1, 3, 8]]


VARIANTS = {
    "chunks": SMALL,
    "full": dataclasses.replace(SMALL, chunk_size=None, norm_num_groups=None),
    "values, SiLU": dataclasses.replace(
        SMALL, input="values", input_size=2, average_activation="silu"
    ),
    "patches": dataclasses.replace(SMALL, input="patches", input_size=5, pooling_residual=False),
    "EMA": dataclasses.replace(SMALL, moving_average="ema", residual_connection="pre_norm"),
    "causal": dataclasses.replace(SMALL, causal=True, time_norm="timestep"),
    "no average": dataclasses.replace(SMALL, moving_average="none", time_norm="layer"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_documents_are_computed_alone(name: str):
    config = VARIANTS[name]
    aligned = name in ("chunks", "patches")
    ids = rows_of(DOCUMENTS, 24, align=4 if aligned else 1)
    inputs = draw_inputs(config, ids.shape)
    packed = run(config, inputs, ids, max_documents=3, aligned=aligned)
    assert packed.shape == (3, 3, 3)
    for row, lengths in enumerate(DOCUMENTS):
        for number, count in enumerate(lengths):
            # Alone in its row, before padding; the shapes of the packed rows compile once.
            alone, own_ids = np.zeros_like(inputs), np.zeros_like(ids)
            alone[0, :count] = inputs[row, ids[row] == number + 1]
            own_ids[0, :count] = 1
            scores = run(config, alone, own_ids, max_documents=3, aligned=aligned)
            assert relative_error(packed[row, number], scores[0, 0]) <= 2e-5


def test_padding_changes_nothing():
    inputs = draw_inputs(SMALL, (2, 13))
    expected = run(SMALL, inputs)
    for before, after in ((0, 11), (8, 3)):
        padded = np.pad(inputs, ((0, 0), (before, after)), constant_values=5)
        ids = np.pad(np.ones((2, 13), np.int32), ((0, 0), (before, after)))
        assert relative_error(run(SMALL, padded, ids), expected) <= 1e-5


def test_a_chunk_longer_than_the_row_is_full_attention():
    inputs = draw_inputs(SMALL, (2, 13))
    expected = run(dataclasses.replace(SMALL, chunk_size=None), inputs)
    for chunk in (13, 40):
        assert (
            relative_error(run(dataclasses.replace(SMALL, chunk_size=chunk), inputs), expected)
            <= 2e-6
        )
    assert relative_error(run(SMALL, inputs), expected) > 1e-3


def test_too_many_documents_are_seen():
    ids = rows_of(DOCUMENTS, 24)
    inputs = draw_inputs(SMALL, ids.shape)
    for most in (None, 2):
        found = np.isnan(run(SMALL, inputs, ids, max_documents=most)).reshape(3, -1)
        assert found.any(axis=1).tolist() == [True, False, True]


@pytest.mark.parametrize("sizes", [{"data": 4}, {"chunk": 4}, {"data": 2, "model": 2}])
@pytest.mark.slow
@pytest.mark.parametrize("name", ["chunks", "full", "EMA"])
def test_meshes_equal_one_device(name: str, sizes: dict[str, int]):
    """Loss and every gradient, with documents that cross the borders of sequence shards."""
    config = dataclasses.replace(
        VARIANTS[name], cema_implementation=None, attention_implementation=None,
        timestep_norm_implementation=None,
    )  # fmt: skip
    if "model" in sizes:
        if name != "chunks":
            pytest.skip("one variant for tensor parallelism")
        config = dataclasses.replace(config, vocab_size=12, num_heads=2)
    check_mesh(config, sizes)


@pytest.mark.slow
def test_every_parameter_has_a_gradient():
    for config in (
        dataclasses.replace(VARIANTS["patches"], rescale_nffn=True, head_bias=True),
        dataclasses.replace(SMALL, head="pairs"),
        VARIANTS["EMA"],
    ):
        graphdef, params = model_of(config)
        ids = rows_of([[5, 8], [7, 6]], 16)
        inputs = draw_inputs(config, ids.shape)

        def loss(params, graphdef=graphdef, inputs=inputs, ids=ids):
            scores = nnx.merge(graphdef, params)(inputs, segment_ids=ids, max_documents=2)
            return jnp.sum(jnp.sin(scores + jnp.arange(scores.shape[-1])))

        for path, gradient in nnx.to_flat_state(jax.jit(jax.grad(loss))(params)):
            assert np.isfinite(gradient[...]).all(), path
            assert np.any(gradient[...]), path


@pytest.mark.slow
def test_dropout_and_remat_and_unrolled_blocks():
    inputs = draw_inputs(SMALL, (2, 13))
    _, params = model_of(SMALL)
    expected = run(SMALL, inputs)
    for changes in ({"scan_layers": False}, {"remat": "block"}):
        config = dataclasses.replace(SMALL, **changes)
        found = runner(config, "__call__", None, False)(params, inputs, None)
        assert relative_error(found, expected) <= 1e-6
    rates: Any = {"dropout": 0.3, "hidden_dropout": 0.2, "attention_dropout": 0.2}
    config = dataclasses.replace(SMALL, **rates)
    other, _ = model_of(config)
    dropped = jax.jit(lambda key: nnx.merge(other, params)(inputs, dropout_key=key))
    assert relative_error(run(config, inputs), expected) <= 1e-6
    first, second = (dropped(jax.random.key(k)) for k in (0, 0))
    assert np.array_equal(first, second)
    assert relative_error(dropped(jax.random.key(1)), first) > 0.05


def test_tokens_head_gives_scores_of_tokens():
    config = dataclasses.replace(SMALL, head="tokens")
    inputs = draw_inputs(config, (2, 13))
    graphdef, params = model_of(config)

    @jax.jit
    def results(params, inputs):
        model = nnx.merge(graphdef, params)
        return model(inputs), model.hidden(inputs), model.vectors(inputs), model.output_matrix()

    scores, hidden, vectors, matrix = map(np.asarray, results(params, inputs))
    assert scores.shape == (2, 13, 11)
    assert relative_error(scores, hidden @ matrix) <= 1e-5
    np.testing.assert_allclose(vectors, hidden.mean(axis=1), atol=1e-5)


# The paper's configurations, counted by building the authors' models.
MIDDLE = {"model_dim": 128, "value_dim": 256, "ffn_hidden_dim": 320, "num_classes": 2}
COUNTS = {
    "listops": (571_120, {"vocab_size": 17}),
    "sc10": (305_280, {
        "input": "values", "model_dim": 60, "z_dim": 30, "value_dim": 120, "ffn_hidden_dim": 120,
    }),
    "image": (2_590_560, {
        "input": "values", "num_layers": 8, "model_dim": 160, "z_dim": 96, "value_dim": 320,
        "ffn_hidden_dim": 320,
    }),
    "pathfinder": (1_357_440, {"input": "values", "average_activation": "silu", **MIDDLE}),
    "path-x": (246_464, {
        "input": "values", "num_layers": 4, "model_dim": 64, "z_dim": 32, "value_dim": 128,
        "ffn_hidden_dim": 160, "num_classes": 2, "average_activation": "silu",
    }),
    "text": (943_872, {"vocab_size": 257, "num_layers": 4, **MIDDLE}),
    "retrieval": (1_436_416, {"vocab_size": 100, "head": "pairs", **MIDDLE}),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_of_the_paper(name: str):
    expected, sizes = COUNTS[name]
    model = nnx.eval_shape(lambda: Encoder(EncoderConfig(**sizes), rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == expected


def test_sequence_norm_counts_any_number_of_documents():
    """More documents than a one-hot product takes; the moments are those of NumPy."""
    ids = np.repeat(np.arange(1, 101), 3)[None].astype(np.int32)
    x = np.random.default_rng(0).normal(2.0, 3.0, (1, 300, 6)).astype(np.float32)
    norm = SequenceNorm(6, num_groups=2)
    run = jax.jit(lambda x, ids, lengths: norm(x, segment_ids=ids, lengths=lengths))
    groups = x.reshape(100, 3, 2, 3).astype(np.float64)
    expected = (groups - groups.mean((1, 3), keepdims=True)) / np.sqrt(
        groups.var((1, 3), keepdims=True) + 1e-5
    )
    for lengths in (None, document_lengths(jnp.asarray(ids), 100)):
        assert relative_error(run(x, ids, lengths), expected.reshape(x.shape)) <= 1e-6


def test_bidirectional_ema_is_cema_at_angle_zero():
    ema = BidirectionalEMA(3, order=2, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(1, 9, 3)).astype(np.float32)
    p = 1 / (1 + np.exp(-np.asarray(ema.alpha[...], np.float64)))
    q = 1 - p / (1 + np.exp(-np.asarray(ema.delta[...], np.float64)))
    weights = np.asarray(ema.gamma[...] * ema.beta[...], np.float64) * p / np.sqrt(2)
    kernel = (weights[..., None] * q[..., None] ** np.arange(9)).sum(1)
    expected = np.asarray(ema.omega[...]) * x.astype(np.float64)
    for t in range(9):
        for s in range(9):
            k = kernel[:3, t - s] if s <= t else kernel[3:, s - t - 1]
            expected[:, t] += k * x[:, s]
    assert relative_error(jax.jit(lambda x: ema(x))(x), expected) <= 1e-5


@pytest.mark.slow
def test_triton_attention_equals_plain_jax():
    """Packed rows in chunks; gradients are tested with the operation."""
    pytest.importorskip("triton", reason="needs the extra: pip install -e '.[triton]'")
    ids, inputs = rows_of(DOCUMENTS, 16), draw_inputs(SMALL, (3, 16))
    expected = run(SMALL, inputs, ids, max_documents=3)
    kernels = dataclasses.replace(SMALL, attention_implementation="triton")
    with interpreted():
        np.testing.assert_allclose(run(kernels, inputs, ids, max_documents=3), expected, rtol=1e-4)


def test_what_is_refused():
    inputs = draw_inputs(SMALL, (2, 8))
    with pytest.raises(ValueError, match="two documents of a row"):
        nnx.merge(*model_of(dataclasses.replace(SMALL, head="pairs")))(inputs)
    with pytest.raises(ValueError, match=r"shape \(2, 8\).*'values' needs"):
        nnx.merge(*model_of(VARIANTS["values, SiLU"]))(inputs)
    with pytest.raises(ValueError, match="max_documents is 2 without segment_ids"):
        nnx.merge(*model_of(SMALL))(inputs, max_documents=2)
    with pytest.raises(ValueError, match="no matrix of tokens"):
        nnx.merge(*model_of(SMALL)).output_matrix()
    with pytest.raises(ConfigError, match=r"head is 'tokens'.*input is 'values'"):
        EncoderConfig(head="tokens", input="values")
    with pytest.raises(ConfigError, match="non-causal attention"):
        EncoderConfig(implementation="mosaic_gpu")
