"""The least time that a step can take on a machine, by what its data sheet promises."""

from collections.abc import Sequence
from dataclasses import dataclass

from megalodon_jax.chips import Machine
from megalodon_jax.plan.hlo import Collective

# GHz of a TPU's core, from Google Cloud's pages on each generation.
_CLOCKS = {"v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75}


@dataclass(frozen=True)
class Roofline:
    """Estimated seconds of one step; estimates, not measurements.

    Attributes:
      compute: matrix products and kernels at the chip's peak.
      hbm: memory traffic at the memory's full rate.
      links: collectives within a slice, by their mesh axes ("data", "data+chunk"), at the full
        rate of the links along these axes.
      network: what slices exchange over the data center's network; None where its rate is unknown.
      overlapped: the longest of these, all others hidden behind it.
      serial: their sum, nothing hidden.
      tokens_per_second: of all devices, overlapped.
      tokens_per_second_serial: of all devices, nothing hidden.
      compiler: what the TPU compiler expects of XLA's own operations, without kernels and
        collectives; None where it says nothing.
    """

    compute: float
    hbm: float
    links: dict[str, float]
    network: float | None
    overlapped: float
    serial: float
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
      flops: of one device.
      hbm_bytes: of one device.
      collectives: in which each device takes part.
      cycles: that the compiler expects of one device; 0 if it says nothing.
      tokens: of the step, on all devices.
    """
    links: dict[str, float] = {}
    network: float | None = 0.0
    for one in collectives:
        if not one.axes:
            continue
        slices = machine.slices(one.axes)
        inside, outside = _split(one, slices)
        key = "+".join(one.axes)
        if inside:
            seconds = one.count * inside / machine.link_rate(one.axes)
            links[key] = links.get(key, 0.0) + seconds
        if outside:
            rate = machine.chip.network_rate
            if rate is None or network is None:
                network = None
            else:
                network += one.count * outside / rate
    compute, hbm = flops / machine.flops, hbm_bytes / machine.hbm_rate
    parts = [compute, hbm, *links.values(), network or 0.0]
    clock = _CLOCKS.get(machine.chip.name)
    return Roofline(
        compute=compute,
        hbm=hbm,
        links=links,
        network=network,
        overlapped=max(parts),
        serial=sum(parts),
        tokens_per_second=tokens / max(parts),
        tokens_per_second_serial=tokens / sum(parts),
        compiler=cycles / (clock * 1e9) if clock and cycles else None,
    )


def _split(one: Collective, slices: int) -> tuple[float, float]:
    """Bytes that a device sends inside its slice, and to other slices.

    Gathering, scattering and reducing go in two levels: inside a slice, and then each device
    exchanges its part with its partners in the other slices.
    """
    if slices == 1:
        return one.sent_bytes, 0.0
    members = one.group_size // slices
    if members <= 1 or one.kind not in ("all-gather", "all-reduce", "reduce-scatter"):
        return 0.0, one.sent_bytes
    factor = 2 if one.kind == "all-reduce" else 1
    inside = factor * (members - 1) / members * one.bytes
    return inside, factor * (slices - 1) / slices * one.bytes / members
