"""`megalodon plan`: compiles a training step for hardware you do not have.

    megalodon plan paper_7b --topology v5p:4x4x8 --mesh.data 128
    megalodon plan paper_7b --topology v5e:16x16 --sweep --max_candidates 6

No accelerator is needed, only its compiler (`pip install -e '.[aot]'`). The plan goes to standard
output, progress to standard error. Without a mesh the simplest one that suits the run is taken.
Exit codes: 0 it fits, 1 it does not, 2 the command is wrong.
"""

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from megalodon_jax.compiled.topologies import KNOWN_TOPOLOGIES, find_devices
from megalodon_jax.config import MeshConfig, TrainConfig
from megalodon_jax.errors import ConfigError
from megalodon_jax.plan.options import PlanOptions
from megalodon_jax.plan.plan import Progress, make_plan
from megalodon_jax.plan.report import format_plan, format_ranking
from megalodon_jax.plan.sweep import find_meshes, sweep

_TICK_SECONDS = 15.0  # between lines of progress


def run(options: PlanOptions, config: TrainConfig) -> int:
    """Plans one run and prints the plan; 0 if it fits, else 1.

    Args:
      options: the devices, and how to plan.
      config: the run.

    Raises:
      ConfigError: the run, the topology or an option cannot be used.
    """
    if not options.topology:
        raise ConfigError(
            f"no topology given; name one with --topology, such as {KNOWN_TOPOLOGIES}"
        )
    # The process itself needs no accelerator, and a search for one takes long.
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")
    devices = find_devices(options.topology, slices=options.slices)
    with _show_progress() as progress:
        if options.sweep:
            plans = sweep(config, devices, max_candidates=options.max_candidates, progress=progress)
        else:
            config = _with_mesh(config, devices, progress)
            plans = [make_plan(config, devices, progress=progress)]
    if options.sweep:
        print(format_ranking(plans), end="\n\n")
    print(format_plan(plans[0]))
    if options.json:
        tables = [plan.to_dict() for plan in plans]
        table: Any = tables if options.sweep else tables[0]
        Path(options.json).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return 0 if plans[0].fits else 1


def _with_mesh(config: TrainConfig, devices: list[Any], progress: Progress) -> TrainConfig:
    """The run over all devices: with its own mesh, or the simplest that suits if it names none."""
    if config.mesh != MeshConfig() or len(devices) == 1:
        return config
    mesh = find_meshes(config, devices)[0]
    sizes = " ".join(f"--mesh.{axis} {size}" for axis, size in dataclasses.asdict(mesh).items())
    progress(f"no mesh given for {len(devices)} devices; taking {sizes}")
    return dataclasses.replace(config, mesh=mesh)


@contextlib.contextmanager
def _show_progress() -> Iterator[Progress]:
    """Prints each line at once, and again with the time it has taken while it lasts."""
    current = {"text": "", "since": time.monotonic()}
    start = time.monotonic()
    done = threading.Event()

    def report(text: str) -> None:
        current.update(text=text, since=time.monotonic())
        print(f"[{time.monotonic() - start:5.0f} s] {text}", file=sys.stderr, flush=True)

    def tick() -> None:
        while not done.wait(_TICK_SECONDS):
            seconds = time.monotonic() - current["since"]
            line = f"[{time.monotonic() - start:5.0f} s] {current['text']}: {seconds:.0f} s so far"
            print(line, file=sys.stderr, flush=True)

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield report
    finally:
        done.set()
        thread.join()
