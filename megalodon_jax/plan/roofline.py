"""Roofline: the least time of a step on a machine, from the rates of its data sheet."""

from collections.abc import Sequence
from dataclasses import dataclass

from megalodon_jax.compiled.collectives import Collective
from megalodon_jax.plan.machine import Machine


@dataclass(frozen=True)
class Roofline:
    """Estimated seconds of one step; estimates, not measurements.

    Attributes:
      compute: matrix products and kernels at the chip's peak.
      hbm: memory traffic at the memory's peak rate.
      links: collectives inside a slice, by their mesh axes ("data", "data+chunk"), at the peak
        rate of the links along these axes.
      network: traffic between slices over the data center's network; None if its rate is unknown.
      overlapped: the longest of these, which hides all others.
      serial: their sum, nothing hidden.
      tokens_per_second: of all devices, overlapped.
      tokens_per_second_serial: of all devices, nothing hidden.
      expected: `serial` at the share of these rates that training steps reached on the chip
        (`Chip.step_efficiency`); None if none was measured.
      compiler: the TPU compiler's estimate of XLA's own operations, without kernels and
        collectives; None if there is none.
    """

    compute: float
    hbm: float
    links: dict[str, float]
    network: float | None
    overlapped: float
    serial: float
    expected: float | None
    tokens_per_second: float
    tokens_per_second_serial: float
    compiler: float | None


def make_roofline(
    machine: Machine,
    *,
    flops: float,
    hbm_bytes: float,
    collectives: Sequence[Collective],
    cycles: int,
    tokens: int,
) -> Roofline:
    """The times of a step.

    Args:
      machine: the devices.
      flops: FLOPs of one device.
      hbm_bytes: memory traffic of one device.
      collectives: the step's collective operations.
      cycles: the compiler's estimate for one device; 0 if there is none.
      tokens: tokens of the step, over all devices.
    """
    links: dict[str, float] = {}
    network: float | None = 0.0
    for collective in collectives:
        axes, count = collective.axes, collective.count
        if not axes:
            continue
        inside, outside = _sent_inside_and_between(collective, machine.num_slices(axes))
        key = "+".join(axes)
        if inside:
            seconds = count * inside / machine.link_bytes_per_second(axes)
            links[key] = links.get(key, 0.0) + seconds
        if outside:
            rate = machine.chip.network_bytes_per_second
            if rate is None or network is None:
                network = None
            else:
                network += count * outside / rate
    compute = flops / machine.flops_per_second
    hbm = hbm_bytes / machine.memory_bytes_per_second
    times = [compute, hbm, *links.values(), network or 0.0]
    clock, efficiency = machine.chip.clock_hz, machine.chip.step_efficiency
    return Roofline(
        compute=compute,
        hbm=hbm,
        links=links,
        network=network,
        overlapped=max(times),
        serial=sum(times),
        expected=None if efficiency is None else sum(times) / efficiency,
        tokens_per_second=tokens / max(times),
        tokens_per_second_serial=tokens / sum(times),
        compiler=cycles / clock if clock and cycles else None,
    )


def _sent_inside_and_between(collective: Collective, slices: int) -> tuple[float, float]:
    """Bytes that a device sends inside its slice, and to other slices.

    Gathers, scatters and reductions have two levels: inside a slice, and then each device exchanges
    its shard with its partners in the other slices.
    """
    if slices == 1:
        return collective.sent_bytes, 0.0
    members = collective.group_size // slices
    if members <= 1 or collective.kind not in ("all-gather", "all-reduce", "reduce-scatter"):
        return 0.0, collective.sent_bytes
    factor = 2 if collective.kind == "all-reduce" else 1
    inside = factor * (members - 1) / members * collective.bytes
    return inside, factor * (slices - 1) / slices * collective.bytes / members
