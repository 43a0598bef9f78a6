"""Collective operations of a compiled program: kind, mesh axes, payload and executions."""

from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from megalodon_jax.compiled.hlo import Computation, Instruction, Program, parse_program
from megalodon_jax.compiled.replica_groups import axes_of, device_groups

CollectiveKind = Literal[
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
]  # fmt: skip
_KINDS: tuple[str, ...] = get_args(CollectiveKind)


@dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: the operation. TPUs scatter by an all-reduce that is fused with a slice: that is a
        "reduce-scatter" here.
      axes: mesh axes that its groups of devices span, in the mesh's order; empty if every group is
        one device.
      group_size: devices of a group.
      bytes: payload per device and execution: the whole array before a scatter or after a gather;
        the reduced array (all-reduce); the device's operand (all-to-all, collective-permute).
      count: executions in one run of the program.
      op_name: its place in the traced function; empty where the compiler does not say.
    """

    kind: CollectiveKind
    axes: tuple[str, ...]
    group_size: int
    bytes: int
    count: int
    op_name: str

    @property
    def sent_bytes(self) -> float:
        """Bytes that one device sends in one execution of the ring algorithm."""
        others = (self.group_size - 1) / self.group_size
        if self.kind == "all-reduce":
            return 2 * others * self.bytes
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.bytes)
        return others * self.bytes


def find_collectives(hlo_text: str | Program, mesh: Any) -> list[Collective]:
    """The collective operations of a program, one entry for each instruction that runs.

    Start and done of an asynchronous operation are one entry, and so are the steps of a TPU's
    transfer between which it computes something else.

    Args:
      hlo_text: optimized HLO, or the result of `parse_program`.
      mesh: the `jax.sharding.Mesh` of the program; replica groups number the positions in
        `mesh.devices.flat`. Only `mesh.shape` is read.
    """
    program = hlo_text if isinstance(hlo_text, Program) else parse_program(hlo_text)
    callers = _fusions_by_computation(program)
    found = []
    for instruction, computation, name, count in program.executed():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in _KINDS or _continues_transfer(instruction, computation):
            continue
        # The all-reduce is fused with the slice that keeps each device's shard.
        if name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        groups = device_groups(instruction.attributes, mesh.shape)
        whole = sum(
            shape.bytes for name in instruction.operands for shape in computation[name].shapes
        )
        if kind == "all-gather":
            whole *= groups.shape[1]
        caller = callers.get(name)
        found.append(
            Collective(
                kind=cast(CollectiveKind, kind),
                axes=axes_of(groups, mesh.shape),
                group_size=groups.shape[1],
                bytes=whole,
                count=count,
                op_name=instruction.op_name or (caller.op_name if caller else ""),
            )
        )
    return found


def _fusions_by_computation(program: Program) -> dict[str, Instruction]:
    return {
        callee: instruction
        for instruction, _, _, _ in program.executed()
        for callee in [instruction.called("calls")]
        if callee and instruction.opcode == "fusion"
    }


def _continues_transfer(instruction: Instruction, computation: Computation) -> bool:
    """Whether this continues a transfer that another fusion (AsyncCollectiveStart) starts."""
    if "chain_id=" not in instruction.attributes:
        return False
    return not any(
        instruction.name in other.operands and '"AsyncCollectiveStart"' in other.attributes
        for other in computation.values()
    )
