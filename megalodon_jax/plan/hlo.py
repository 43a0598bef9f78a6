"""Reads an optimized program: how often each instruction runs, and what it computes and sends.

XLA's own `cost_analysis()` counts the body of a loop once. Here every computation carries the
number of times a step runs it, so that thirty-two scanned layers count thirty-two times.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np

from megalodon_jax.plan.replica_groups import axes_of, device_groups

Kind = Literal[
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
]  # fmt: skip
_KINDS: tuple[str, ...] = get_args(Kind)
_BITS = {"pred": 8, "token": 0, "opaque": 0, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "f4e2m1fn": 4}
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,<=]*)\](\{[^{}]*\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.$-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w-]*)\(")
_NAME = re.compile(r"%([\w.$-]+)")


class Shape(NamedTuple):
    """One array of an instruction's result.

    Attributes:
      dtype: XLA's name, such as "bf16".
      dims: sizes.
      space: memory space of its layout; on a TPU 0 is HBM and 1 the core's own memory.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes without padding of the layout."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            bits = int(cast(re.Match[str], re.search(r"\d+", self.dtype))[0])
        return -(-self.size * bits // 8)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: of the result.
      opcode: such as "fusion".
      shapes: arrays of the result; several for a tuple.
      operands: names, in the same computation.
      attributes: the rest of the line.
      is_root: whether it is the computation's result.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def op_name(self) -> str:
        """Where in the traced function it comes from, such as "jit(step)/jvp()/while/body/mul"."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found[1] if found else ""

    def called(self, key: str) -> str | None:
        """The computation that attribute `key` names."""
        found = re.search(rf"\b{key}=%?([\w.$-]+)", self.attributes)
        return found[1] if found else None


type Computation = dict[str, Instruction]


@dataclass(frozen=True)
class Program:
    """An optimized module.

    Attributes:
      computations: instructions by name, by the name of their computation.
      counts: executions of each computation in one run of the program. Every branch of a
        conditional counts as taken; what a reduction applies to its elements counts 0.
      unknown_loops: `op_name` (or name) of loops whose trips are not constant; they count once.
    """

    computations: dict[str, Computation]
    counts: dict[str, int]
    unknown_loops: tuple[str, ...]

    def runs(self) -> Iterator[tuple[Instruction, Computation, str, int]]:
        """Every instruction that runs, its computation, that one's name and count."""
        for name, computation in self.computations.items():
            if count := self.counts.get(name, 0):
                for instruction in computation.values():
                    yield instruction, computation, name, count


@dataclass(frozen=True)
class Collective:
    """One collective operation of a program, as every device takes part in it.

    Attributes:
      kind: the operation; an all-reduce of which each device keeps a part, as TPUs scatter, is a
        "reduce-scatter".
      axes: mesh axes over which its groups of devices run, in the mesh's order; none if every
        group is one device.
      group_size: devices of a group.
      bytes: payload per device and execution: the whole array before it is scattered or after it
        was gathered; what is reduced (all-reduce); what one device sends away or keeps
        (all-to-all) or sends (collective-permute).
      count: executions in one run of the program.
      op_name: where in the traced function it comes from; empty where the compiler does not say.
    """

    kind: Kind
    axes: tuple[str, ...]
    group_size: int
    bytes: int
    count: int
    op_name: str

    @property
    def sent_bytes(self) -> float:
        """Bytes that one device sends in one execution, by the best known (ring) algorithm."""
        others = (self.group_size - 1) / self.group_size
        if self.kind == "all-reduce":
            return 2 * others * self.bytes
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.bytes)
        return others * self.bytes


def parse_program(text: str) -> Program:
    """Reads optimized HLO, the result of `jax.stages.Compiled.as_text()`.

    Raises:
      ValueError: there is no entry computation in it.
    """
    computations: dict[str, Computation] = {}
    current: Computation = {}
    entry = ""
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")) and line.endswith("{"):
            name = line.removeprefix("ENTRY ").lstrip("%").split(" ", 1)[0]
            entry = name if line.startswith("ENTRY") else entry
            current = computations[name] = {}
        elif instruction := _parse_instruction(line):
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("this is no HLO module: there is no line that begins with ENTRY")
    counts, unknown = _count_executions(computations, entry)
    return Program(computations, counts, unknown)


def find_collectives(hlo_text: str | Program, mesh: Any) -> list[Collective]:
    """The collective operations of a program, one entry for each instruction that runs.

    Start and done of an asynchronous one are one entry, and so are the steps between which a TPU
    computes something else.

    Args:
      hlo_text: optimized HLO, or what `parse_program` made of it.
      mesh: the `jax.sharding.Mesh` it was compiled for: positions in `mesh.devices.flat` are what
        replica groups number. Only `mesh.shape` is looked at.
    """
    program = hlo_text if isinstance(hlo_text, Program) else parse_program(hlo_text)
    callers = _callers(program)
    found = []
    for instruction, computation, name, count in program.runs():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in _KINDS or _is_a_later_step(instruction, computation):
            continue
        # Fused with the slice that keeps each device's part.
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
                kind=cast(Kind, kind),
                axes=axes_of(groups, mesh.shape),
                group_size=groups.shape[1],
                bytes=whole,
                count=count,
                op_name=instruction.op_name or (caller.op_name if caller else ""),
            )
        )
    return found


def count_dot_flops(hlo_text: str | Program) -> int:
    """FLOPs per device of all matrix products and convolutions in one run of a program.

    A multiply-add is two. Kernels (custom calls) count nothing.

    Args:
      hlo_text: optimized HLO, or what `parse_program` made of it.
    """
    program = hlo_text if isinstance(hlo_text, Program) else parse_program(hlo_text)
    flops = 0
    for instruction, computation, _, count in program.runs():
        if instruction.opcode == "dot":
            flops += count * _dot_flops(instruction, computation)
        elif instruction.opcode == "convolution":
            flops += count * _convolution_flops(instruction, computation)
        elif "__cublas" in instruction.attributes and instruction.opcode == "custom-call":
            flops += count * _gemm_flops(instruction, computation)
    return flops


def _parse_instruction(line: str) -> Instruction | None:
    head = _INSTRUCTION.match(line)
    if not head:
        return None
    start = head.end()
    end = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    opcode = _OPCODE.match(line, end)
    if not opcode:
        return None
    close = _closing(line, opcode.end() - 1)
    inside = line[opcode.end() : close - 1]
    # Operands are names; of what else stands there only a constant's value is needed.
    names = () if opcode[1] in ("constant", "parameter") else tuple(_NAME.findall(inside))
    rest = f"value={inside}{line[close:]}" if opcode[1] == "constant" else line[close:]
    shapes = _parse_shapes(line[start:end])
    return Instruction(head[2], opcode[1], shapes, names, rest, bool(head[1]))


def _closing(line: str, start: int) -> int:
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r'"(?:[^"\\]|\\.)*"|[()]').finditer(line, start):
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    raise ValueError(f"unbalanced parentheses in {line[:120]}")


@lru_cache(maxsize=65536)
def _parse_shapes(text: str) -> tuple[Shape, ...]:
    shapes = []
    for dtype, dims, layout in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        shapes.append(Shape(dtype, sizes, int(space[1]) if space else 0))
    return tuple(shapes)


def _count_executions(
    computations: dict[str, Computation], entry: str
) -> tuple[dict[str, int], tuple[str, ...]]:
    unknown: list[str] = []
    calls = {
        name: list(_calls(computation, computations, unknown))
        for name, computation in computations.items()
    }
    # A computation stands before those that call it.
    counts = dict.fromkeys(computations, 0) | {entry: 1}
    for name in reversed(list(computations)):
        for callee, times in calls[name] if counts[name] else ():
            counts[callee] += times * counts[name]
    return counts, tuple(unknown)


def _calls(
    computation: Computation, computations: dict[str, Computation], unknown: list[str]
) -> Iterator[tuple[str, int]]:
    for instruction in computation.values():
        if instruction.opcode == "while":
            trips = _trips(instruction, computation, computations)
            if trips is None:
                unknown.append(instruction.op_name or instruction.name)
            for key, more in (("body", 0), ("condition", 1)):
                yield cast(str, instruction.called(key)), (trips or 1) + more
        elif instruction.opcode in ("fusion", "call", "async-start"):
            callee = instruction.called("calls") or instruction.called("to_apply")
            if callee:
                yield callee, 1
        elif instruction.opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
            names = _NAME.findall(branches[1]) if branches else []
            for key in ("true_computation", "false_computation"):
                names += [name for name in [instruction.called(key)] if name]
            yield from ((name, 1) for name in names)


def _trips(
    loop: Instruction, computation: Computation, computations: dict[str, Computation]
) -> int | None:
    """Iterations of a loop, None where they are not constant."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    # Loops count from a constant in steps of a constant while they are below a constant.
    condition = computations[cast(str, loop.called("condition"))]
    test = next(instruction for instruction in condition.values() if instruction.is_root)
    if test.opcode == "fusion":
        test, condition = _inlined(test, condition, computations)
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    counter, bound = (condition[name] for name in test.operands)
    found = re.search(r"\bindex=(\d+)", counter.attributes)
    if counter.opcode != "get-tuple-element" or found is None:
        return None
    index = int(found[1])
    first = computation[loop.operands[0]]
    start = computation[first.operands[index]] if first.opcode == "tuple" else first
    low, high = _constant(_original(start, computation)), _constant(bound)
    step = _step(computations[cast(str, loop.called("body"))], index)
    if low is None or high is None or not step:
        return None
    return max(0, -(-(high - low) // step))


def _inlined(
    test: Instruction, condition: Computation, computations: dict[str, Computation]
) -> tuple[Instruction, Computation]:
    """The root of the fusion `test`, whose parameters are the fusion's operands."""
    inner = dict(computations[cast(str, test.called("calls"))])
    parameters = [one for one in inner.values() if one.opcode == "parameter"]
    for parameter, operand in zip(parameters, test.operands, strict=True):
        inner[parameter.name] = condition[operand]
    root = next(instruction for instruction in inner.values() if instruction.is_root)
    return root, inner


def _step(body: Computation, index: int) -> int | None:
    """What a loop's body adds to element `index` of its state."""
    root = next(instruction for instruction in body.values() if instruction.is_root)
    if root.opcode != "tuple":
        return None
    new = _original(body[root.operands[index]], body)
    if new.opcode != "add":
        return None
    added = [_constant(_original(body[name], body)) for name in new.operands]
    return next((number for number in added if number is not None), None)


def _original(instruction: Instruction, computation: Computation) -> Instruction:
    """What copies, if it is one, are copies of."""
    while instruction.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        instruction = computation[instruction.operands[0]]
    return instruction


def _constant(instruction: Instruction) -> int | None:
    value = re.match(r"value=(-?\d+)\b(?!\.)", instruction.attributes)
    return int(value[1]) if instruction.opcode == "constant" and value else None


def _callers(program: Program) -> dict[str, Instruction]:
    return {
        callee: instruction
        for instruction, _, _, _ in program.runs()
        for callee in [instruction.called("calls")]
        if callee and instruction.opcode == "fusion"
    }


def _is_a_later_step(instruction: Instruction, computation: Computation) -> bool:
    """Whether this continues a transfer that another fusion (AsyncCollectiveStart) has begun."""
    if "chain_id=" not in instruction.attributes:
        return False
    return not any(
        instruction.name in other.operands and '"AsyncCollectiveStart"' in other.attributes
        for other in computation.values()
    )


def _dims(text: str, key: str) -> list[int]:
    found = re.search(rf"\b{key}=\{{([\d,]*)\}}", text)
    return [int(number) for number in found[1].split(",") if number] if found else []


def _dot_flops(dot: Instruction, computation: Computation) -> int:
    left = computation[dot.operands[0]].shapes[0]
    contracted = _dims(dot.attributes, "lhs_contracting_dims")
    return 2 * dot.shapes[0].size * math.prod(left.dims[dim] for dim in contracted)


def _gemm_flops(gemm: Instruction, computation: Computation) -> int:
    left = computation[gemm.operands[0]].shapes[0]
    found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', gemm.attributes)
    contracted = re.findall(r"\d+", found[1]) if found else []
    return 2 * gemm.shapes[0].size * math.prod(left.dims[int(dim)] for dim in contracted)


def _convolution_flops(convolution: Instruction, computation: Computation) -> int:
    """Counts products of an input and a kernel element; a TPU's matrix products look like this."""
    image, kernel = (computation[name].shapes[0] for name in convolution.operands)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    if labels is None:
        raise ValueError(f"convolution {convolution.name} has no dim_labels")
    window = re.search(r"window=\{([^}]*)\}", convolution.attributes)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    out = convolution.shapes[0]
    products = 1
    spatial = sorted(label for label in labels[3] if label.isdigit())
    for index, label in enumerate(spatial):
        products *= _valid_positions(
            image.dims[labels[1].index(label)],
            kernel.dims[labels[2].index(label)],
            out.dims[labels[3].index(label)],
            *(_field(fields, key, index, default) for key, default in _WINDOW),
        )
    channels = kernel.dims[labels[2].index("i")]
    batch, features = (out.dims[labels[3].index(label)] for label in "bf")
    return 2 * products * channels * batch * features


_WINDOW = (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))


def _field(fields: Mapping[str, str], key: str, index: int, default: int) -> int:
    """A window's number along a spatial dimension; of a padding the part before."""
    if key not in fields:
        return default
    return int(fields[key].split("x")[index].split("_")[0])


@lru_cache(maxsize=1024)
def _valid_positions(
    size: int, window: int, outputs: int, stride: int, pad: int, dilation: int, window_dilation: int
) -> int:
    """Pairs of an output and a window element that meet an input element, not padding."""
    places = np.arange(outputs) * stride - pad
    count = 0
    for element in range(window):
        at = places + element * window_dilation
        count += int(((at >= 0) & (at % dilation == 0) & (at // dilation < size)).sum())
    return count
