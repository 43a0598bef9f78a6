"""Drop path: factors of the right rates and mean, whole documents, nothing without a key."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.layer_stack import run_blocks
from megalodon_jax.modules.drop_path import draw_path_scales
from megalodon_jax.modules.positions import position_info
from tests.encoder.small_models import model_of, rows_of, run
from tests.encoder.test_encoder import SMALL as MEGALODON
from tests.encoder.test_transformer_encoder import SMALL as TRANSFORMER
from tests.golden_files import relative_error


def test_factors_have_rates_that_rise_and_the_mean_1():
    scales = np.asarray(
        draw_path_scales(jax.random.key(0), 0.4, num_layers=5, shape=(500, 8)), np.float64
    )
    assert scales.shape == (5, 2, 500, 8)
    for layer, rate in enumerate([0.0, 0.1, 0.2, 0.3, 0.4]):
        own = scales[layer]
        values = [1.0] if layer == 0 else [0.0, 1 / (1 - rate)]
        np.testing.assert_allclose(np.unique(own), values, rtol=1e-6)
        assert (own == 0).mean() == pytest.approx(rate, abs=0.02)
        assert own.mean() == pytest.approx(1.0, abs=0.03)
    assert (scales[4, 0] == 0).mean(axis=1).std() > 0.1
    single = draw_path_scales(jax.random.key(0), 0.4, num_layers=1, shape=(500, 8))
    assert float((single == 0).mean()) == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("config", [MEGALODON, TRANSFORMER], ids=["megalodon", "transformer"])
@pytest.mark.slow
def test_a_skipped_document_keeps_its_features(config):
    """Factors 0 skip both sub-layers of one document; 1 and 2 are those of the sub-layers."""
    config = dataclasses.replace(config, num_layers=1)
    graphdef, params = model_of(config)
    ids = rows_of([[5, 9, 2], [16, 4]], 24)
    x = np.random.default_rng(0).normal(size=(*ids.shape, 16)).astype(np.float32)
    info = position_info(
        ids.shape, chunk_size=4, head_dim=8, rope_base=1e4, segment_ids=jnp.asarray(ids),
        max_documents=3,
    )  # fmt: skip

    @jax.jit
    def blocks(params, scales=None):
        layers = nnx.merge(graphdef, params).layers
        return run_blocks(layers, config, x, info, path_scales=scales).x

    ones = np.ones((1, 2, 2, 3), np.float32)
    plain = blocks(params)
    assert relative_error(blocks(params, ones), plain) <= 1e-6
    scales = ones.copy()
    scales[:, :, 0, 1] = 0
    found = np.asarray(blocks(params, scales))
    skipped = (ids == 2) & (np.arange(2) == 0)[:, None]
    np.testing.assert_array_equal(found[skipped], x[skipped])
    is_other = (ids > 0) & ~skipped
    assert relative_error(found[is_other], np.asarray(plain)[is_other]) <= 1e-6
    # Without the second sub-layer the rest is linear in the factor of the first one.
    steps = []
    for factor in (1.0, 2.5):
        scales = np.zeros_like(ones)
        scales[:, 0] = factor
        steps.append(np.asarray(blocks(params, scales))[ids > 0] - x[ids > 0])
    if config.kind == "transformer_encoder":
        assert relative_error(steps[1], 2.5 * steps[0]) <= 1e-5
    else:
        # The two-hop residual has the first sub-layer in the second one's input alone.
        assert np.abs(steps).max() == 0


@pytest.mark.parametrize("config", [MEGALODON, TRANSFORMER], ids=["megalodon", "transformer"])
def test_evaluation_has_no_drop_path(config):
    dropping = dataclasses.replace(config, drop_path=0.5)
    assert dropping.has_dropout
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(2, 13, 2)).astype(np.float32)
    if config.input == "tokens":
        inputs = rng.integers(0, 11, (2, 13)).astype(np.int32)
    assert relative_error(run(dropping, inputs), run(config, inputs)) <= 1e-6
    graphdef, params = model_of(dropping)
    scores = jax.jit(lambda key: nnx.merge(graphdef, params)(inputs, dropout_key=key))
    found = [np.asarray(scores(jax.random.key(seed))).tobytes() for seed in (*range(8), 0)]
    assert found[0] == found[-1]
    # Two documents with two sub-layers: 16 draws.
    assert len(set(found)) > 3
