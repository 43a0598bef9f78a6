"""Speed of the data loader by the number of worker processes.

    megalodon bench loader --files "books/*.txt" --tokenizer tokenizer.json --workers 0 1 4 16

The loader is that of training: shuffled documents, tokenized, packed, copied to the main process.
The rate is that of `seconds` after `warm_up` batches of every reader, in which processes start and
the first window is read. Nothing but the loader runs, so a training step's own use of the CPU is
not in it.
"""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import NamedTuple

from megalodon_jax.bench.options import BenchLoaderOptions
from megalodon_jax.config import DataConfig
from megalodon_jax.data import load_tokenizer, make_loader
from megalodon_jax.data.loader import Loader


class LoaderTiming(NamedTuple):
    """One measured loader.

    Attributes:
      workers: worker processes; 0: a thread of the main process.
      tokens_per_second: tokens without padding.
      first_batch_seconds: time to the first batch.
    """

    workers: int
    tokens_per_second: float
    first_batch_seconds: float


def run(options: BenchLoaderOptions) -> int:
    """Prints one line per number of workers."""
    timings = []
    print(f"{os.cpu_count()} cores; tokenizer {options.tokenizer}")
    for workers in options.workers:
        timing = measure(options, workers)
        timings.append(timing)
        print(
            f"workers {workers:3}  {timing.tokens_per_second / 1e6:8.2f} million tokens/s  "
            f"first batch {timing.first_batch_seconds:.1f} s",
            flush=True,
        )
    if options.json:
        result = {
            "cores": os.cpu_count(),
            "options": dataclasses.asdict(options),
            "timings": [timing._asdict() for timing in timings],
        }
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    return 0


def measure(options: BenchLoaderOptions, workers: int) -> LoaderTiming:
    """Measures the loader with so many workers."""
    config = DataConfig(
        files=options.files,
        document_separator=options.document_separator,
        text_field=options.text_field,
        tokenizer=options.tokenizer,
        heldout_fraction=0.0,
        seq_len=options.length,
        batch_size=options.rows,
        num_workers=workers,
    )
    start = time.perf_counter()
    loader = make_loader(config, load_tokenizer(config.tokenizer), "train", repeat=True)
    try:
        next(loader)
        first_batch_seconds = time.perf_counter() - start
        for _ in range(options.warm_up * max(1, workers)):
            next(loader)
        return LoaderTiming(workers, _rate(loader, options.seconds), first_batch_seconds)
    finally:
        loader.close()


def _rate(loader: Loader, seconds: float) -> float:
    num_tokens = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        num_tokens += int(next(loader).weights.sum())
    return num_tokens / elapsed
