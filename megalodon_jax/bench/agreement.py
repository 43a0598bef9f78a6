"""What several devices compute, against one: gradients, losses, and a checkpoint of theirs.

    megalodon bench agreement --preset mega1.3B

A model of the preset's width with few layers takes the same steps on the same random tokens: on one
device in float32, on one in bfloat16, and over every mesh in bfloat16, on whole rows and on rows of
three documents that cross the borders between devices. Rounding makes one device's bfloat16 differ
from float32; a mesh may differ by about as much. What the FSDP mesh saves one device restores.
"""

import argparse
import contextlib
import dataclasses
import statistics
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from megalodon_jax.bench.reference import relative_distance
from megalodon_jax.bench.scaling import MESHES, mesh_along
from megalodon_jax.bench.train import Case, random_batch, small
from megalodon_jax.config import ConfigError, MeshConfig, TrainConfig, preset_names
from megalodon_jax.sharding import batch_sharding
from megalodon_jax.training.checkpoint import RunCheckpoints
from megalodon_jax.training.step import TrainState, init_state, make_train_step, mesh_of

# A mesh's bfloat16 may be this much farther from float32 than one device's is.
MARGIN = 1.25


class Trained(NamedTuple):
    """Losses before every step, the first one's gradients (all times one number), the state."""

    losses: list[float]
    gradients: dict[str, np.ndarray]
    state: TrainState


@dataclasses.dataclass(frozen=True)
class AgreementRow:
    """What one mesh computed; distances are relative L2.

    Attributes:
      mesh: which axis takes the devices.
      documents: packed into a row; 0: no segment ids.
      median: of all tensors, the gradient's distance from float32.
      worst: the largest of them.
      median_alone: the same of one device in bfloat16.
      worst_alone: the same of one device in bfloat16.
      loss_apart: largest difference of a loss from one device's, relative.
      reason: why there are no numbers.
    """

    mesh: str
    documents: int
    median: float | None = None
    worst: float | None = None
    median_alone: float | None = None
    worst_alone: float | None = None
    loss_apart: float | None = None
    reason: str | None = None

    @property
    def agrees(self) -> bool:
        """Whether the mesh is as near to float32 as one device is, or cannot run at all."""
        if None in (self.median, self.worst, self.median_alone, self.worst_alone):
            return self.reason is not None
        medians, worsts = (self.median, self.median_alone), (self.worst, self.worst_alone)
        return all(mine <= MARGIN * alone for mine, alone in (medians, worsts))  # type: ignore


def train(config: TrainConfig, *, documents: int, steps: int) -> Trained:
    """Some steps on one random batch, over the run's mesh."""
    data, mesh = config.data, mesh_of(config)
    batch = random_batch(data.batch_size, data.seq_len, config.model.vocab_size, documents)
    batch = jax.device_put(batch, batch_sharding(mesh, leading=1))
    graphdef, state = init_state(config, mesh)
    exact = config.model.dtype == "float32"
    with jax.default_matmul_precision("highest") if exact else contextlib.nullcontext():
        step: Any = make_train_step(graphdef, config, mesh).lower(state, batch).compile()
    losses, gradients = [], {}
    for number in range(steps):
        state, metrics = step(state, batch)
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
    devices = len(jax.devices())
    if devices < 2:
        raise ConfigError("bench agreement compares several devices with one, and there is one")
    print(f"{devices} x {jax.devices()[0].device_kind}, jax {jax.__version__}\n{_HEADER}")
    config, rows, is_same = _configuration(options, devices), [], True
    for documents in (0, 3):
        amount = {"documents": documents, "steps": options.steps}
        exact = dataclasses.replace(config.model, dtype="float32")
        due = train(dataclasses.replace(config, model=exact), **amount).gradients
        alone = train(config, **amount)
        own = _distances(alone.gradients, due)
        for mesh in options.mesh:
            split = dataclasses.replace(config, mesh=mesh_along(mesh, devices))
            try:
                trained = train(split, **amount)
            except ConfigError as error:
                rows.append(AgreementRow(mesh, documents, reason=str(error)))
            else:
                distances = _distances(trained.gradients, due)
                apart = np.abs(np.subtract(trained.losses, alone.losses)) / np.abs(alone.losses)
                rows.append(
                    AgreementRow(mesh, documents, *distances, *own, loss_apart=float(apart.max()))
                )
                if mesh == "fsdp" and documents == 0:
                    is_same = restores(trained.state, config, options.steps)
            print(_format(rows[-1]), flush=True)
    if "fsdp" in options.mesh:
        print(f"what fsdp saves, one device restores {'bit for bit' if is_same else 'CHANGED'}")
    return rows, is_same


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


def _distances(found: dict[str, np.ndarray], due: dict[str, np.ndarray]) -> tuple[float, float]:
    distances = [relative_distance(found[name], due[name]) for name in due]
    return statistics.median(distances), max(distances)


_HEADER = (
    f"{'':16} gradients' distance from float32  (one device's)\n"
    f"{'mesh':6} {'documents':>9} {'median':>9} {'worst':>9} {'median':>9} {'worst':>9} "
    f"{'loss apart':>10}"
)


def _format(row: AgreementRow) -> str:
    start = f"{row.mesh:6} {row.documents:9} "
    if row.reason is not None:
        return start + row.reason
    numbers = (row.median, row.worst, row.median_alone, row.worst_alone)
    text = " ".join(f"{number:9.2e}" for number in numbers)
    return f"{start}{text} {row.loss_apart:10.1e}{'' if row.agrees else '   TOO FAR'}"


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="megalodon bench agreement", description="Compares what a mesh and one device compute."
    )
    parser.add_argument("--preset", choices=preset_names(), default="mega1.3B")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--mesh", nargs="+", choices=MESHES, default=MESHES)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="a shape for a CPU")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; argv without the program's name, None: that of the process.

    Returns 1 if a mesh is farther from float32 than one device, or a checkpoint changed.
    """
    rows, is_same = run(make_parser().parse_args(argv))
    return 0 if is_same and all(row.agrees for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
