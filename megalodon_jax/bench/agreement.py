"""Agreement of several devices with one: gradients, losses, and a restored checkpoint.

    megalodon bench agreement --preset mega1.3B

A model of the preset's width with few layers takes the same steps on the same random tokens: on one
device in float32, on one in bfloat16, and over every mesh in bfloat16, on whole rows and on rows of
three documents that cross the borders of sequence shards. Rounding makes one device's bfloat16
differ from float32; a mesh may differ by about as much. One device must restore a checkpoint of the
FSDP mesh bit for bit.
"""

import dataclasses
import statistics
import tempfile
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from megalodon_jax.bench.options import BenchAgreementOptions, MeshName
from megalodon_jax.bench.reference import relative_distance
from megalodon_jax.bench.scaling import (
    PendingCompile,
    compiler_pool,
    count_devices,
    mesh_along,
    start_compile,
)
from megalodon_jax.bench.train import TrainCase, small, use_all_memory
from megalodon_jax.checkpoints import RunCheckpoints
from megalodon_jax.config import MeshConfig, ModelConfig, TrainConfig
from megalodon_jax.parallel.sharding import batch_sharding
from megalodon_jax.train_state import TrainState, init_state

# A mesh's distance from float32 may exceed a single device's by this factor.
MARGIN = 1.25


class TrainedSteps(NamedTuple):
    """Results of some training steps.

    Attributes:
      losses: the loss before every step.
      gradients: the first step's gradients by name, all times one factor.
      state: the state after the last step.
    """

    losses: list[float]
    gradients: dict[str, np.ndarray]
    state: TrainState


class GradientDistances(NamedTuple):
    """Relative L2 distances of gradients from those of float32.

    Attributes:
      median: of the median tensor.
      worst: of the worst tensor.
    """

    median: float
    worst: float


class AgreementRow(NamedTuple):
    """Results of one mesh.

    Attributes:
      mesh: the mesh.
      documents: documents packed into a row; 0: no segment ids.
      sharded: distances of the mesh's gradients in bfloat16; None if the mesh cannot run.
      single_device: distances of a single device's gradients in bfloat16.
      loss_diff: largest relative difference of a loss from the single device's.
      reason: why the mesh cannot run.
    """

    mesh: MeshName
    documents: int
    sharded: GradientDistances | None
    single_device: GradientDistances
    loss_diff: float = 0.0
    reason: str | None = None

    @property
    def agrees(self) -> bool:
        """Whether the mesh is as close to float32 as a single device, or cannot run at all."""
        if self.sharded is None:
            return True
        pairs = zip(self.sharded, self.single_device, strict=True)
        return all(sharded <= MARGIN * single for sharded, single in pairs)


def train(pending: PendingCompile, steps: int) -> TrainedSteps:
    """Trains some steps on one random batch, over the run's mesh."""
    compiled: Any = pending.compiled.result()[0]
    config, mesh, batch = pending.step[:3]
    batch = jax.device_put(batch, batch_sharding(mesh, leading=1))
    state = init_state(config, mesh)[1]
    losses, gradients = [], {}
    for number in range(steps):
        state, metrics = compiled(state, batch)
        losses.append(float(metrics.loss))
        if number == 0:
            # After one step the first moments are the gradients, all times one factor.
            moments = jax.tree.leaves_with_path(optax.tree.get(state.opt_state, "mu"))
            gradients = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in moments}
    return TrainedSteps(losses, gradients, state)


def run(options: BenchAgreementOptions) -> int:
    """Prints a row for every mesh; 1 if one disagrees or a checkpoint changed, else 0.

    Raises:
      ConfigError: there is only one device.
    """
    use_all_memory()
    rows, is_same = compare(options)
    return 0 if is_same and all(row.agrees for row in rows) else 1


def compare(options: BenchAgreementOptions) -> tuple[list[AgreementRow], bool]:
    """Prints and returns a row for every mesh, and whether a checkpoint was restored unchanged."""
    devices = count_devices("bench agreement")
    config = _single_device_config(options, devices)
    kind = jax.devices()[0].device_kind
    print(f"{devices} x {kind}, jax {jax.__version__}; compiling", flush=True)
    pending = _start_compiles(config, options, devices)
    print(_HEADER, flush=True)
    rows, is_same = [], True
    for documents in options.documents:
        exact, single = (
            train(pending[name, documents], options.steps) for name in ("float32", "single_device")
        )
        of_single = _distances(single.gradients, exact.gradients)
        for mesh in options.mesh:
            step = pending[mesh, documents]
            if isinstance(step, str):
                rows.append(AgreementRow(mesh, documents, None, of_single, reason=step))
            else:
                trained = train(step, options.steps)
                sharded = _distances(trained.gradients, exact.gradients)
                diff = np.abs(np.subtract(trained.losses, single.losses) / single.losses).max()
                rows.append(AgreementRow(mesh, documents, sharded, of_single, float(diff)))
                if mesh == "fsdp" and documents == options.documents[0]:
                    is_same = restores(trained.state, config, options.steps)
                    verdict = "bit for bit" if is_same else "CHANGED"
                    print(f"one device restores the checkpoint of fsdp {verdict}", flush=True)
            print(_format(rows[-1]), flush=True)
    return rows, is_same


def _start_compiles(
    config: TrainConfig, options: BenchAgreementOptions, devices: int
) -> dict[tuple[str, int], Any]:
    """The results of `start_compile` by (mesh, "float32" or "single_device"; documents)."""
    pending = {}
    with compiler_pool() as pool:
        for documents in options.documents:
            model = dataclasses.replace(config.model, dtype="float32")
            with jax.default_matmul_precision("highest"):
                exact = dataclasses.replace(config, model=model)
                pending["float32", documents] = start_compile(exact, pool, documents=documents)
            pending["single_device", documents] = start_compile(config, pool, documents=documents)
            for name in options.mesh:
                sharded = dataclasses.replace(config, mesh=mesh_along(name, devices))
                pending[name, documents] = start_compile(sharded, pool, documents=documents)
    return pending


def restores(state: TrainState, config: TrainConfig, step: int) -> bool:
    """Whether a sharded state is saved and restored unchanged under the mesh of `config`."""
    with tempfile.TemporaryDirectory() as folder, RunCheckpoints(folder) as checkpoints:
        checkpoints.save(state, loader_state={}, config=config, tokenizer_fingerprint="none")
        checkpoints.wait()
        restored = checkpoints.restore(step, config).state
    pairs = zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True)
    return all(np.array_equal(np.asarray(found), np.asarray(saved)) for found, saved in pairs)


# Tokens of a Transformer's row per device: it has no chunks.
_TRANSFORMER_LENGTH = 256


def _single_device_config(options: BenchAgreementOptions, devices: int) -> TrainConfig:
    """The run on a single device: one row, and one chunk in each row, for every device."""
    config = TrainCase(options.preset, devices, devices, reduce_dtype=options.reduce_dtype).config()
    if options.small:
        config = small(config)
    model = dataclasses.replace(config.model, num_layers=options.layers)
    length = model.chunk_size if isinstance(model, ModelConfig) else _TRANSFORMER_LENGTH
    data = dataclasses.replace(config.data, batch_size=devices, seq_len=devices * length)
    return dataclasses.replace(config, model=model, data=data, mesh=MeshConfig())


def _distances(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> GradientDistances:
    distances = [relative_distance(found[name], expected[name]) for name in expected]
    return GradientDistances(statistics.median(distances), max(distances))


_HEADER = (
    f"{'':16} gradients' distance from float32  (a single device's)\n"
    f"{'mesh':10} {'documents':>9} {'median':>9} {'worst':>9} {'median':>9} {'worst':>9} "
    f"{'loss diff':>10}"
)


def _format(row: AgreementRow) -> str:
    start = f"{row.mesh:10} {row.documents:9} "
    if row.sharded is None:
        return f"{start}{row.reason}"
    text = " ".join(f"{number:9.2e}" for number in (*row.sharded, *row.single_device))
    return f"{start}{text} {row.loss_diff:10.1e}{'' if row.agrees else '   TOO FAR'}"
