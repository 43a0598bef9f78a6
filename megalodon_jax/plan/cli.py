"""`megalodon plan`: compiles a training step for a machine that is not there.

    megalodon plan --config paper_7b --topology v5p:4x4x8 --mesh.data 128
    megalodon plan --config paper_7b --topology v5e:16x16 --sweep --max_candidates 6

No accelerator is needed, only its compiler (`pip install -e '.[aot]'`). The plan goes to standard
output, progress to standard error. Without a mesh the simplest is taken that suits the run. Exit
codes: 0 it fits, 1 it does not, 2 the command is wrong.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from megalodon_jax.config import MeshConfig, TrainConfig, load_config
from megalodon_jax.errors import ConfigError
from megalodon_jax.plan.plan import Progress, make_plan
from megalodon_jax.plan.report import format_plan, format_ranking
from megalodon_jax.plan.sweep import find_meshes, sweep
from megalodon_jax.plan.topologies import KNOWN, find_devices

_TICK = 15.0  # seconds between lines of progress


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Compiles a run's training step for a machine that is not there, and says what it costs."""

    topology: str = ""
    """The machine, such as v5p:4x4x8, v5e:16x16, v6e:16x16x2slices or h200:8."""
    slices: int = 1
    """How many such TPUs, connected by the data center's network."""
    sweep: bool = False
    """Try meshes and remat policies and rank those that fit."""
    max_candidates: int = 8
    """Compile at most so many in a sweep."""
    json: str = ""
    """Also write the plan, or the list of a sweep's, to this file."""
    run: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)


def main(argv: Sequence[str] | None = None) -> int:
    """Plans one run; returns the process's exit code.

    Args:
      argv: arguments after "plan"; None: those of the process.

    Raises:
      ConfigError: the configuration, the machine or an option cannot be used.
    """
    options = _parse(list(sys.argv[1:] if argv is None else argv))
    # The process itself needs no accelerator, and to look for one takes long.
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")
    devices = find_devices(options.topology, slices=options.slices)
    with _progress() as progress:
        if options.sweep:
            plans = sweep(
                options.run, devices, max_candidates=options.max_candidates, progress=progress
            )
        else:
            run = _with_mesh(options.run, devices, progress)
            plans = [make_plan(run, devices, progress=progress)]
    if options.sweep:
        print(format_ranking(plans), end="\n\n")
    print(format_plan(plans[0]))
    if options.json:
        tables = [plan.to_dict() for plan in plans]
        table: Any = tables if options.sweep else tables[0]
        Path(options.json).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return 0 if plans[0].fits else 1


def _parse(arguments: list[str]) -> PlanOptions:
    from megalodon_jax.presets import find_config

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    known, rest = first.parse_known_args(arguments)
    name = known.config
    if name is None and rest and not rest[0].startswith("-"):
        name, *rest = rest
    run = TrainConfig() if name is None else load_config(find_config(name))
    options = tyro.cli(
        PlanOptions,
        default=PlanOptions(run=run),
        args=rest,
        prog="megalodon plan --config CONFIG.toml",
        use_underscores=True,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    if name is None:
        raise ConfigError("no config given; name a TOML file or a shipped one with --config")
    if not options.topology:
        raise ConfigError(f"no machine given; name one with --topology, such as {KNOWN}")
    return options


def _with_mesh(run: TrainConfig, devices: list[Any], progress: Progress) -> TrainConfig:
    """The run over all devices: its own mesh, or the simplest that suits it if it names none."""
    if run.mesh != MeshConfig() or len(devices) == 1:
        return run
    mesh = find_meshes(run, devices)[0]
    sizes = " ".join(f"--mesh.{axis} {size}" for axis, size in dataclasses.asdict(mesh).items())
    progress(f"no mesh given for {len(devices)} devices; taking {sizes}")
    return dataclasses.replace(run, mesh=mesh)


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    """Prints each line when it comes, and again with the time it takes while it lasts."""
    now = {"text": "", "since": time.monotonic()}
    start = time.monotonic()
    done = threading.Event()

    def report(text: str) -> None:
        now.update(text=text, since=time.monotonic())
        print(f"[{time.monotonic() - start:5.0f} s] {text}", file=sys.stderr, flush=True)

    def tick() -> None:
        while not done.wait(_TICK):
            seconds = time.monotonic() - now["since"]
            line = f"[{time.monotonic() - start:5.0f} s] {now['text']}: {seconds:.0f} s so far"
            print(line, file=sys.stderr, flush=True)

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield report
    finally:
        done.set()
        thread.join()
