"""Data in a run: named held-out sets, sources of a mixture, documents that cannot be read."""

import dataclasses
import json
from pathlib import Path

import pytest

from megalodon_jax.checkpoints import RunCheckpoints
from megalodon_jax.config import DataConfig, HeldoutSet, MixtureSource, TrainConfig
from megalodon_jax.errors import DataError
from megalodon_jax.training.loop import train

pytestmark = pytest.mark.usefixtures("shared_compilation", "short_prefetch")


def _logged(config: TrainConfig, name: str) -> list[float]:
    lines = Path(config.run_dir, "metrics.jsonl").read_text().splitlines()
    return [entry[name] for line in lines if name in (entry := json.loads(line))]


def _with_data(config: TrainConfig, **settings: object) -> TrainConfig:
    data = DataConfig(seq_len=32, batch_size=2, **settings)  # type: ignore[arg-type]
    return dataclasses.replace(config, data=data, sample_tokens=0)


@pytest.mark.slow
def test_sets_and_sources_have_metrics_of_their_own(config: TrainConfig, tmp_path: Path):
    for name in ("a", "b", "c", "d"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name} " * 300)
    sources = tuple(
        MixtureSource(name=name, files=(str(tmp_path / f"{name}.txt"),), weight=weight)
        for name, weight in (("a", 1.0), ("b", 2.0))
    )
    sets = tuple(HeldoutSet(name=n, files=(str(tmp_path / f"{n}.txt"),)) for n in ("c", "d"))
    config = _with_data(config, sources=sources, heldout_sets=sets)
    result = train(config)
    (loss,), (loss_c,), (loss_d,) = (
        _logged(config, name) for name in ("heldout_loss", "heldout_loss/c", "heldout_loss/d")
    )
    assert result.heldout is not None
    assert result.heldout.loss == loss
    # As many batches of each set.
    assert loss == pytest.approx((loss_c + loss_d) / 2, rel=1e-5)
    assert loss_c != loss_d
    tokens = [_logged(config, f"source_tokens/{name}")[-1] for name in ("a", "b")]
    assert sum(tokens) == sum(_logged(config, "tokens"))
    assert _logged(config, "bad_documents") == [0.0] * 6
    # A resumed run counts on.
    train(dataclasses.replace(config, steps=8, resume=True))
    resumed = [_logged(config, f"source_tokens/{name}")[-1] for name in ("a", "b")]
    assert sum(resumed) == sum(_logged(config, "tokens")) == 8 * 64


@pytest.mark.slow
def test_a_bad_document_stops_a_run_after_a_save(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from megalodon_jax.data import pipeline

    monkeypatch.setattr(pipeline, "WINDOW_TOKENS", 64)
    lines = [json.dumps({"text": f"document {i} " * 8}) for i in range(12)]
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join([*lines[:11], "{broken"]))
    config = _with_data(config, files=(str(path),), heldout_fraction=0.0)
    config = dataclasses.replace(config, steps=40, checkpoint_every=0)
    with pytest.raises(
        DataError, match=r"lines\.jsonl:12: not a line of JSON.*on_bad_document.* is saved"
    ):
        train(config)
    with RunCheckpoints(config.run_dir, keep=3) as checkpoints:
        (step,) = checkpoints.steps()
    assert step >= 1
    assert len(_logged(config, "loss")) == step
    # Again after a resume, with the setting it goes on.
    with pytest.raises(DataError, match=r"lines\.jsonl:12"):
        train(dataclasses.replace(config, resume=True))
    skipping = dataclasses.replace(config.data, on_bad_document="skip")
    train(dataclasses.replace(config, data=skipping, resume=True))
    assert _logged(config, "bad_documents")[-1] >= 1
    assert len(_logged(config, "loss")) == 40
