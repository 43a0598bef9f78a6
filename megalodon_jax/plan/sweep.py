"""Which mesh and which recomputation make a run fast on a machine: compile some, rank them."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import jax

from megalodon_jax.chips import describe_machine
from megalodon_jax.config import MeshConfig, Remat, TrainConfig
from megalodon_jax.errors import ConfigError
from megalodon_jax.models import abstract_model
from megalodon_jax.parallel.mesh import check_fits, make_mesh
from megalodon_jax.plan.plan import Plan, Progress, make_plan

# From the least memory to the most.
_REMATS: tuple[Remat, ...] = tuple(reversed(get_args(Remat)))


def sweep(
    config: TrainConfig,
    devices: Sequence[Any],
    *,
    max_candidates: int = 8,
    progress: Progress = lambda _: None,
) -> list[Plan]:
    """Plans of a run with other meshes and other `remat`, those that fit first, the fastest first.

    Meshes are tried in the order of `find_meshes`, each with more and more kept for the backward
    pass until it does not fit. Fast is the most tokens/s with nothing hidden behind anything else.

    Args:
      config: the run; its own mesh and remat are not looked at.
      devices: what to compile for.
      max_candidates: compile no more than so many.
      progress: called with a line of text when something long begins.

    Raises:
      ConfigError: no mesh fits the run, or `max_candidates` is not positive.
    """
    if max_candidates < 1:
        raise ConfigError(f"max_candidates is {max_candidates}; must be at least 1")
    meshes = find_meshes(config, devices)
    plans: list[Plan] = []
    for mesh in meshes:
        for remat in _REMATS:
            if len(plans) == max_candidates:
                return rank(plans)
            model = dataclasses.replace(config.model, remat=remat)
            progress(f"candidate {len(plans) + 1} of at most {max_candidates}: remat {remat}")
            candidate = dataclasses.replace(config, mesh=mesh, model=model)
            plans.append(make_plan(candidate, devices, progress=progress))
            # A compiled pod is large, and nobody runs it.
            jax.clear_caches()
            if not plans[-1].fits:
                break
    return rank(plans)


def find_meshes(config: TrainConfig, devices: Sequence[Any]) -> list[MeshConfig]:
    """Meshes over all devices that the run can be split over, the simplest first.

    Simple is little tensor parallelism, then few parts of the sequence: what these exchange grows
    with the batch. Left out is what does not divide, and where weights, gradients and moments alone
    are larger than the chip's memory. Every slice holds whole replicas.

    Raises:
      ConfigError: there is none; the reason for the last one is given.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    parameters = sum(
        math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_model(config.model)[1])
    )
    room = describe_machine(make_mesh(MeshConfig(data=-1, replica=slices), devices)).hbm_bytes
    found, problem = [], ""
    for data, chunk, model in _factors(len(devices) // slices):
        sizes = {"replica": slices, "data": data, "chunk": chunk, "model": model}
        # Weights, two moments and the gradient in float32.
        state = 16 * parameters / (data * model)
        if state > room:
            problem = f"weights, gradients and moments take {state:,.0f} bytes a device"
            continue
        try:
            check_fits(config, sizes)
        except ConfigError as error:
            problem = str(error)
            continue
        found.append(MeshConfig(**sizes))
    if not found:
        raise ConfigError(f"no mesh of {len(devices)} devices suits this run; the last: {problem}")
    return sorted(found, key=lambda mesh: (mesh.model, mesh.chunk))


def rank(plans: Sequence[Plan]) -> list[Plan]:
    """Those that fit first, the most tokens/s with nothing hidden first."""
    return sorted(plans, key=lambda plan: (not plan.fits, -_speed(plan)))


def _speed(plan: Plan) -> float:
    return plan.roofline.tokens_per_second_serial if plan.roofline else 0.0


def _factors(count: int) -> Iterator[tuple[int, int, int]]:
    for first in _divisors(count):
        for second in _divisors(count // first):
            yield first, second, count // first // second


def _divisors(count: int) -> list[int]:
    return [number for number in range(1, count + 1) if count % number == 0]
