"""Sweep: compiles a run with several meshes and remat policies, and ranks the plans."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import jax

from megalodon_jax.config import MeshConfig, Remat, TrainConfig
from megalodon_jax.errors import ConfigError
from megalodon_jax.models import abstract_model
from megalodon_jax.parallel.mesh import check_fits, make_mesh
from megalodon_jax.plan.machine import describe_machine
from megalodon_jax.plan.plan import Plan, Progress, make_plan

# From the least memory to the most.
_REMAT_POLICIES: tuple[Remat, ...] = tuple(reversed(get_args(Remat)))


def sweep(
    config: TrainConfig,
    devices: Sequence[Any],
    *,
    max_candidates: int = 8,
    progress: Progress = lambda _: None,
) -> list[Plan]:
    """Plans of a run with other meshes and other `remat`: those that fit first, fastest first.

    Meshes are tried in the order of `find_meshes`, each with less and less rematerialization until
    it does not fit. The fastest has the most tokens/s with nothing hidden (`Roofline.serial`).

    Args:
      config: the run; its own mesh and remat are ignored.
      devices: devices to compile for.
      max_candidates: most plans to compile.
      progress: called with a line of text before every long stage.

    Raises:
      ConfigError: no mesh fits the run, or `max_candidates` is not positive.
    """
    if max_candidates < 1:
        raise ConfigError(f"max_candidates is {max_candidates}; must be at least 1")
    meshes = find_meshes(config, devices)
    plans: list[Plan] = []
    for mesh in meshes:
        for remat in _REMAT_POLICIES:
            if len(plans) == max_candidates:
                return rank(plans)
            model = dataclasses.replace(config.model, remat=remat)
            progress(f"candidate {len(plans) + 1} of at most {max_candidates}: remat {remat}")
            candidate = dataclasses.replace(config, mesh=mesh, model=model)
            plans.append(make_plan(candidate, devices, progress=progress))
            # A program compiled for a pod is large and never runs.
            jax.clear_caches()
            if not plans[-1].fits:
                break
    return rank(plans)


def find_meshes(config: TrainConfig, devices: Sequence[Any]) -> list[MeshConfig]:
    """Meshes over all devices that the run can be sharded over, the simplest first.

    The simplest has the least tensor parallelism, then the fewest sequence shards: the traffic of
    both grows with the batch. Meshes whose sizes do not divide, and those where weights, gradients
    and moments alone exceed the chip's memory, are excluded. Every slice holds whole replicas.

    Raises:
      ConfigError: there is none; the reason for the last candidate is given.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    parameters = sum(
        math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_model(config.model)[1])
    )
    every = make_mesh(MeshConfig(data=-1, replica=slices), devices)
    available = describe_machine(every).memory_bytes
    found, problem = [], ""
    for data, chunk, model in _factors(len(devices) // slices):
        sizes = {"replica": slices, "data": data, "chunk": chunk, "model": model}
        # Weights, two moments and the gradient in float32.
        state = 16 * parameters / (data * chunk * model)
        if state > available:
            problem = f"weights, gradients and moments take {state:,.0f} bytes a device"
            continue
        try:
            check_fits(config, sizes)
        except ConfigError as error:
            problem = str(error)
            continue
        found.append(MeshConfig(**sizes))
    if not found:
        raise ConfigError(
            f"no mesh of {len(devices)} devices suits this run; the last one tried: {problem}"
        )
    return sorted(found, key=lambda mesh: (mesh.model, mesh.chunk))


def rank(plans: Sequence[Plan]) -> list[Plan]:
    """Plans that fit first, then by tokens/s with nothing hidden, the most first."""
    return sorted(plans, key=lambda plan: (not plan.fits, -_serial_tokens_per_second(plan)))


def _serial_tokens_per_second(plan: Plan) -> float:
    return plan.roofline.tokens_per_second_serial if plan.roofline else 0.0


def _factors(count: int) -> Iterator[tuple[int, int, int]]:
    for first in _divisors(count):
        for second in _divisors(count // first):
            yield first, second, count // first // second


def _divisors(count: int) -> list[int]:
    return [number for number in range(1, count + 1) if count % number == 0]
