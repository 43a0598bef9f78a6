"""`bench reference` trains in three ways on the same crops of a text."""

import argparse

import numpy as np
import pytest

from megalodon_jax.bench import reference

OPTIONS = {"steps": 3, "rows": 2, "length": 16, "layers": 1, "seed": 0, "small": True}


def test_crops_are_cut_into_documents_and_targets_stay_inside():
    text = bytes(range(200))
    source = reference.batches(text, argparse.Namespace(**OPTIONS | {"rows": 4, "length": 50}))
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
        next(reference.batches(b"short", argparse.Namespace(**OPTIONS)))


@pytest.mark.slow
def test_default_and_reference_agree(tmp_path, capsys, monkeypatch):
    both = reference.configurations(argparse.Namespace(**OPTIONS))
    del both["reference"]
    monkeypatch.setattr(reference, "configurations", lambda options: both)
    text = tmp_path / "text.txt"
    text.write_bytes(b"A sentence that comes again. " * 40)
    curves = reference.run(argparse.Namespace(text=str(text), **OPTIONS))
    np.testing.assert_allclose(curves["default"], curves["float32"], rtol=3e-3)
    assert "distance from float32" in capsys.readouterr().out
