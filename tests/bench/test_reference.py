"""`bench reference` trains three variants on the same crops of a text."""

import dataclasses

import numpy as np
import pytest

from megalodon_jax.bench import reference
from megalodon_jax.bench.options import BenchReferenceOptions

OPTIONS = BenchReferenceOptions(text="", steps=30, rows=2, length=16, layers=1, small=True)


def test_crops_are_cut_into_documents_and_targets_stay_inside():
    text = bytes(range(200))
    source = reference.batches(text, dataclasses.replace(OPTIONS, rows=4, length=50))
    batch = next(source)
    np.testing.assert_array_equal(batch.targets, batch.tokens + 1)
    ids = np.asarray(batch.segment_ids[0])
    assert (ids[0::2] == 1).all()
    assert (ids[1::2].max(axis=1) == 3).all()
    inside = ids[:, 1:] == ids[:, :-1]
    np.testing.assert_array_equal(batch.weights[0][:, :-1], inside)
    assert not np.array_equal(next(source).tokens, batch.tokens)


def test_a_short_text_is_refused():
    with pytest.raises(ValueError, match="5 bytes; a row needs more than 16"):
        next(reference.batches(b"short", OPTIONS))


@pytest.mark.slow
def test_a_variant_learns_its_text():
    configs = reference.variants(OPTIONS)
    assert set(configs) == {"float32", "reference", "default"}
    portable = dataclasses.replace(configs["default"].model, dtype="float32")
    source = reference.batches(b"A sentence that comes again. " * 40, OPTIONS)
    curve = reference.losses(dataclasses.replace(configs["default"], model=portable), source, 30)
    assert len(curve) == 30
    assert curve[-1] < curve[0]


@pytest.mark.slow
def test_gradients_have_names():
    batch = next(reference.batches(bytes(range(200)), OPTIONS))
    found = reference.gradients(reference.variants(OPTIONS)["reference"], batch)
    assert found["loss"] > 0
    assert np.linalg.norm(found["layers.mega.cema.alpha"]) > 0
