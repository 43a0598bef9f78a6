"""Reads optimized HLO: the instructions of a compiled program, and how often each one runs.

XLA's own `cost_analysis()` counts the body of a loop once. Here every computation carries its
number of executions, so that thirty-two scanned layers count thirty-two times.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, cast

from megalodon_jax.baselines.packed import LATER_PASSES

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
        """Its place in the traced function, such as "jit(step)/jvp()/while/body/mul"."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found[1] if found else ""

    def called(self, key: str) -> str | None:
        """The computation that attribute `key` names."""
        found = re.search(rf"\b{key}=%?([\w.$-]+)", self.attributes)
        return found[1] if found else None


type Computation = dict[str, Instruction]


class ExecutedInstruction(NamedTuple):
    """An instruction that runs.

    Attributes:
      instruction: the instruction.
      computation: the computation that holds it.
      computation_name: name of that computation.
      count: executions in one run of the program.
    """

    instruction: Instruction
    computation: Computation
    computation_name: str
    count: int


@dataclass(frozen=True)
class Program:
    """An optimized HLO module.

    Attributes:
      computations: instructions by name, by the name of their computation.
      counts: executions of each computation in one run of the program. Every branch of a
        conditional counts as taken; the scalar function of a reduction counts 0.
      unknown_loops: `op_name` (or name) of loops without a constant trip count; they count once.
        The loop over packed documents that do not fit one call of cuDNN counts nothing.
    """

    computations: dict[str, Computation]
    counts: dict[str, int]
    unknown_loops: tuple[str, ...]

    def executed(self) -> Iterator[ExecutedInstruction]:
        """Every instruction that runs."""
        for name, computation in self.computations.items():
            if count := self.counts.get(name, 0):
                for instruction in computation.values():
                    yield ExecutedInstruction(instruction, computation, name, count)


def parse_program(text: str) -> Program:
    """Parses optimized HLO, the result of `jax.stages.Compiled.as_text()`.

    Raises:
      ValueError: the text has no entry computation.
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
        raise ValueError("the text is no HLO module: no line begins with ENTRY")
    counts, unknown = _count_executions(computations, entry)
    return Program(computations, counts, unknown)


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
    # The operands are names; a constant has its value there.
    names = () if opcode[1] in ("constant", "parameter") else tuple(_NAME.findall(inside))
    rest = f"value={inside}{line[close:]}" if opcode[1] == "constant" else line[close:]
    shapes = _parse_shapes(line[start:end])
    return Instruction(head[2], opcode[1], shapes, names, rest, bool(head[1]))


def _closing(line: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`."""
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
    # A computation is listed before its callers.
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
            trips = _trip_count(instruction, computation, computations)
            if LATER_PASSES in instruction.op_name:
                trips = 0
            elif trips is None:
                unknown.append(instruction.op_name or instruction.name)
                trips = 1
            for key, extra in (("body", 0), ("condition", 1)):
                yield cast(str, instruction.called(key)), trips + extra
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


def _trip_count(
    loop: Instruction, computation: Computation, computations: dict[str, Computation]
) -> int | None:
    """Iterations of a loop; None if they are not constant."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    # libtpu states no trip count: the loop counts from a constant, by a constant, to a constant.
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
    low, high = _constant(_without_copies(start, computation)), _constant(bound)
    step = _increment(computations[cast(str, loop.called("body"))], index)
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


def _increment(body: Computation, index: int) -> int | None:
    """The constant that a loop's body adds to element `index` of its state, if it does."""
    root = next(instruction for instruction in body.values() if instruction.is_root)
    if root.opcode != "tuple":
        return None
    new = _without_copies(body[root.operands[index]], body)
    if new.opcode != "add":
        return None
    added = [_constant(_without_copies(body[name], body)) for name in new.operands]
    return next((number for number in added if number is not None), None)


def _without_copies(instruction: Instruction, computation: Computation) -> Instruction:
    """The instruction whose result a chain of copies passes on."""
    while instruction.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        instruction = computation[instruction.operands[0]]
    return instruction


def _constant(instruction: Instruction) -> int | None:
    value = re.match(r"value=(-?\d+)\b(?!\.)", instruction.attributes)
    return int(value[1]) if instruction.opcode == "constant" and value else None
