"""What several devices compute, against one: gradients, losses, and a checkpoint of theirs.

    megalodon bench agreement --preset mega1.3B

A model of the preset's width with few layers takes the same steps on the same random tokens: on one
device in float32, on one in bfloat16, and over every mesh in bfloat16, on whole rows and on rows of
three documents that cross the borders between devices. Rounding makes one device's bfloat16 differ
from float32; a mesh may differ by about as much. What the FSDP mesh saves one device restores.
"""

import argparse
import dataclasses
import statistics
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from megalodon_jax.bench.reference import relative_distance
from megalodon_jax.bench.scaling import (
    MESHES,
    Begun,
    begin,
    compiler_pool,
    count_devices,
    mesh_along,
)
from megalodon_jax.bench.train import Case, small, use_all_memory
from megalodon_jax.checkpoints import RunCheckpoints
from megalodon_jax.config import MeshConfig, TrainConfig
from megalodon_jax.parallel.sharding import batch_sharding
from megalodon_jax.presets import preset_names
from megalodon_jax.train_state import TrainState, init_state

# A mesh's bfloat16 may be this much farther from float32 than one device's is.
MARGIN = 1.25


class Trained(NamedTuple):
    """Losses before every step, the first one's gradients (all times one number), the state."""

    losses: list[float]
    gradients: dict[str, np.ndarray]
    state: TrainState


class Distances(NamedTuple):
    """Of gradients from float32's, relative L2: of the median tensor, and of the worst."""

    median: float
    worst: float


class AgreementRow(NamedTuple):
    """What one mesh computed.

    Attributes:
      mesh: which axis takes the devices.
      documents: packed into a row; 0: no segment ids.
      split: the mesh's gradients; None if it cannot run.
      alone: one device's, in bfloat16 too.
      loss_apart: largest difference of a loss from one device's, relative.
      reason: why it cannot run.
    """

    mesh: str
    documents: int
    split: Distances | None
    alone: Distances
    loss_apart: float = 0.0
    reason: str | None = None

    @property
    def agrees(self) -> bool:
        """Whether the mesh is as near to float32 as one device is, or cannot run at all."""
        if self.split is None:
            return True
        return all(mine <= MARGIN * its for mine, its in zip(self.split, self.alone, strict=True))


def train(begun: Begun, steps: int) -> Trained:
    """Some steps on one random batch, over the run's mesh."""
    compiled: Any = begun.compiled.result()[0]
    config, mesh, batch = begun.step[:3]
    batch = jax.device_put(batch, batch_sharding(mesh, leading=1))
    state = init_state(config, mesh)[1]
    losses, gradients = [], {}
    for number in range(steps):
        state, metrics = compiled(state, batch)
        losses.append(float(metrics.loss))
        if number == 0:
            # After one step the first moments are the gradients, all times one number.
            moments = jax.tree.leaves_with_path(optax.tree.get(state.opt_state, "mu"))
            gradients = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in moments}
    return Trained(losses, gradients, state)


def run(options: argparse.Namespace) -> tuple[list[AgreementRow], bool]:
    """Prints and returns a row for every mesh, and whether a checkpoint came back the same.

    Raises:
      ConfigError: there is one device only.
    """
    devices = count_devices("bench agreement")
    config = _configuration(options, devices)
    kind = jax.devices()[0].device_kind
    print(f"{devices} x {kind}, jax {jax.__version__}; compiling", flush=True)
    begun = _begin_all(config, options, devices)
    print(_HEADER, flush=True)
    rows, is_same = [], True
    for documents in options.documents:
        due, one = (train(begun[name, documents], options.steps) for name in ("exact", "one"))
        alone = _distances(one.gradients, due.gradients)
        for mesh in options.mesh:
            step = begun[mesh, documents]
            if isinstance(step, str):
                rows.append(AgreementRow(mesh, documents, None, alone, reason=step))
            else:
                trained = train(step, options.steps)
                split = _distances(trained.gradients, due.gradients)
                apart = np.abs(np.subtract(trained.losses, one.losses) / one.losses).max()
                rows.append(AgreementRow(mesh, documents, split, alone, float(apart)))
                if mesh == "fsdp" and documents == options.documents[0]:
                    is_same = restores(trained.state, config, options.steps)
                    verdict = "bit for bit" if is_same else "CHANGED"
                    print(f"what fsdp saves, one device restores {verdict}", flush=True)
            print(_format(rows[-1]), flush=True)
    return rows, is_same


def _begin_all(
    config: TrainConfig, options: argparse.Namespace, devices: int
) -> dict[tuple[str, int], Any]:
    """What `begin` gave for every step, by what it runs over and its documents."""
    begun = {}
    with compiler_pool() as pool:
        for documents in options.documents:
            model = dataclasses.replace(config.model, dtype="float32")
            with jax.default_matmul_precision("highest"):
                exact = dataclasses.replace(config, model=model)
                begun["exact", documents] = begin(exact, pool, documents=documents)
            begun["one", documents] = begin(config, pool, documents=documents)
            for name in options.mesh:
                split = dataclasses.replace(config, mesh=mesh_along(name, devices))
                begun[name, documents] = begin(split, pool, documents=documents)
    return begun


def restores(state: TrainState, config: TrainConfig, step: int) -> bool:
    """Whether a state that is saved where it lives comes back the same under `config`'s mesh."""
    with tempfile.TemporaryDirectory() as folder, RunCheckpoints(folder) as checkpoints:
        checkpoints.save(state, loader_state={}, config=config, tokenizer_fingerprint="none")
        checkpoints.wait()
        restored = checkpoints.restore(step, config).state
    pairs = zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True)
    return all(np.array_equal(np.asarray(mine), np.asarray(due)) for mine, due in pairs)


def _configuration(options: argparse.Namespace, devices: int) -> TrainConfig:
    """Of one device: as many rows, and as many chunks in each, as there are devices."""
    config = Case(options.preset, devices, devices).config()
    if options.small:
        config = small(config)
    model = dataclasses.replace(config.model, num_layers=options.layers)
    data = dataclasses.replace(config.data, batch_size=devices, seq_len=devices * model.chunk_size)
    return dataclasses.replace(config, model=model, data=data, mesh=MeshConfig())


def _distances(found: dict[str, np.ndarray], due: dict[str, np.ndarray]) -> Distances:
    distances = [relative_distance(found[name], due[name]) for name in due]
    return Distances(statistics.median(distances), max(distances))


_HEADER = (
    f"{'':16} gradients' distance from float32  (one device's)\n"
    f"{'mesh':6} {'documents':>9} {'median':>9} {'worst':>9} {'median':>9} {'worst':>9} "
    f"{'loss apart':>10}"
)


def _format(row: AgreementRow) -> str:
    start = f"{row.mesh:6} {row.documents:9} "
    if row.split is None:
        return f"{start}{row.reason}"
    text = " ".join(f"{number:9.2e}" for number in (*row.split, *row.alone))
    return f"{start}{text} {row.loss_apart:10.1e}{'' if row.agrees else '   TOO FAR'}"


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="megalodon bench agreement", description="Compares what a mesh and one device compute."
    )
    parser.add_argument("--preset", choices=preset_names(), default="mega1.3B")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--mesh", nargs="+", choices=MESHES, default=MESHES)
    parser.add_argument(
        "--documents", nargs="+", type=int, default=(0, 3), help="packed into a row; 0: no ids"
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="a shape for a CPU")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; argv without the program's name, None: that of the process.

    Returns 1 if a mesh is farther from float32 than one device, or a checkpoint changed.
    """
    use_all_memory()
    rows, is_same = run(make_parser().parse_args(argv))
    return 0 if is_same and all(row.agrees for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
