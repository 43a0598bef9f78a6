"""The benchmark of the data loader."""

import json
from pathlib import Path

from megalodon_jax.bench.loader import run
from megalodon_jax.bench.options import BenchLoaderOptions


def test_the_rate_of_a_small_loader(tmp_path: Path, capsys):
    (tmp_path / "text.txt").write_text("\0".join(f"document {i} " * 100 for i in range(50)))
    options = BenchLoaderOptions(
        files=(str(tmp_path / "text.txt"),), document_separator="\0", workers=(0,), length=64,
        seconds=0.2, warm_up=1, json=str(tmp_path / "out.json"),
    )  # fmt: skip
    assert run(options) == 0
    (timing,) = json.loads((tmp_path / "out.json").read_text())["timings"]
    assert timing["workers"] == 0
    assert timing["tokens_per_second"] > 1000
    assert "million tokens/s" in capsys.readouterr().out
