"""What a program does to one device: memory traffic, kernels, and the compiler's own estimate."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from megalodon_jax.config import ModelConfig
from megalodon_jax.plan.hlo import Computation, Instruction, Program, Shape

_TARGETS = {"tpu_custom_call": "pallas_tpu", "mosaic_gpu_v2": "mosaic_gpu"}
# Operations of `pallas_kernels` by what the names of their kernels begin with.
_OPERATIONS = {
    "cema": "cema",
    "timestep_norm": "timestep_norm",
    "tsn": "timestep_norm",
    "chunk_attention": "chunk_attention",
    "rowwise": "rowwise",
}
# These move nothing by themselves; what asynchronous ones move is counted where they begin.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
    "conditional", "after-all", "partition-id", "replica-id", "iota", "opt-barrier",
    "copy-done", "async-done", "async-update", "slice-done", "add-dependency",
}  # fmt: skip


class Kernel(NamedTuple):
    """A hand-written kernel in a program.

    Attributes:
      name: such as "cema_forward".
      operation: the operation of `pallas_kernels` it belongs to, or "other".
      implementation: "pallas_tpu" or "mosaic_gpu".
      count: executions in one run of the program.
      flops: of one execution, as the kernel states or, for attention, by formula; 0 if neither.
    """

    name: str
    operation: str
    implementation: str
    count: int
    flops: int


def find_kernels(program: Program, model: ModelConfig, *, tokens: int, parts: int) -> list[Kernel]:
    """The kernels that a step runs on one device.

    Attention is counted by formula, causal inside whole chunks: its kernels skip what is masked,
    but state the FLOPs of a full grid. The rest is what kernels state; Mosaic GPU's state nothing.

    Args:
      program: the compiled step.
      model: the model's shape.
      tokens: of one execution on one device.
      parts: of heads and features over devices (the mesh axis `model`).
    """
    found = []
    for instruction, _, _, count in program.runs():
        target = re.search(r'custom_call_target="(\w+)"', instruction.attributes)
        if instruction.opcode != "custom-call" or not target or target[1] not in _TARGETS:
            continue
        path = instruction.op_name.split("/")
        name = path[-2] if len(path) > 1 else instruction.name
        operation = next((op for key, op in _OPERATIONS.items() if name.startswith(key)), "other")
        stated = re.search(r'"cost_estimate":\{"flops":"(\d+)"', instruction.attributes)
        flops = int(stated[1]) if stated else 0
        if operation == "chunk_attention":
            flops = _attention_flops(name, instruction.shapes, model, tokens, parts)
        found.append(Kernel(name, operation, _TARGETS[target[1]], count, flops))
    return found


def _attention_flops(
    name: str, results: Sequence[Shape], model: ModelConfig, tokens: int, parts: int
) -> int:
    keys, values = model.z_dim // parts, model.value_dim // parts
    widths = {
        "chunk_attention_forward": keys + values,
        # Scores again, then the gradients of weights, v, q and k.
        "chunk_attention_backward": 3 * keys + 2 * values,
        "chunk_attention_weights": keys,
        "chunk_attention_score_gradient": values,
    }
    width = widths.get(name, 0)
    if "band" in name:
        width = results[0].size // tokens
    return tokens * (model.chunk_size + 1) * width


def count_hbm_bytes(program: Program) -> int:
    """Bytes that one run reads from and writes to a device's memory, without what caches save.

    Operands and results of everything that is not fused into something else, as often as it runs.
    Slices count what they take, updates in place what they write, and what lies in a TPU's own
    memory (layout S(1)) counts nothing. Padding of layouts is left out.
    """
    fused = _fused(program)
    return sum(
        count * _traffic(instruction, computation, program)
        for instruction, computation, name, count in program.runs()
        if name not in fused
    )


def estimated_cycles(program: Program) -> int:
    """Cycles that the TPU compiler expects of XLA's own operations; kernels and waiting excepted.

    0 where a compiler says nothing, as for GPUs.
    """
    cycles = 0
    for instruction, _, _, count in program.runs():
        own = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
        cycles += count * int(own[1]) if own else 0
    return cycles


def _fused(program: Program) -> set[str]:
    """Computations that are parts of one operation, directly or inside another fusion."""
    fused: set[str] = set()
    for name, computation in reversed(program.computations.items()):
        for instruction in computation.values():
            callee = instruction.called("calls")
            if callee and (instruction.opcode == "fusion" or name in fused):
                fused.add(callee)
    return fused


def _traffic(instruction: Instruction, computation: Computation, program: Program) -> int:
    opcode = instruction.opcode
    if opcode in _FREE:
        return 0
    if opcode == "fusion":
        return _fusion_traffic(instruction, computation, program)
    results = [_in_hbm(shape) for shape in instruction.shapes]
    operands = [sum(map(_in_hbm, computation[name].shapes)) for name in instruction.operands]
    if opcode in ("dynamic-slice", "slice", "gather"):
        return sum(results) + min(operands[0], sum(map(_bytes, instruction.shapes)))
    if opcode == "dynamic-update-slice":
        return 2 * operands[1]
    if opcode == "custom-call":
        known = [*_TARGETS, "__cublas"]
        return sum(results + operands) if any(t in instruction.attributes for t in known) else 0
    if opcode == "copy-start":
        return results[0] + sum(operands)
    if opcode.endswith("-start"):
        return sum(operands)
    if opcode.endswith("-done"):
        return sum(results)
    return sum(results + operands)


def _fusion_traffic(fusion: Instruction, computation: Computation, program: Program) -> int:
    body = program.computations[fusion.called("calls") or ""]
    total = 0
    for index, name in enumerate(fusion.operands):
        space_bytes = sum(map(_in_hbm, computation[name].shapes))
        total += min(space_bytes, _read(body, index, program)) if space_bytes else 0
    root = next(instruction for instruction in body.values() if instruction.is_root)
    parts = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(parts) != len(fusion.shapes):
        return total + sum(map(_in_hbm, fusion.shapes))
    for part, shape in zip(parts, fusion.shapes, strict=True):
        while part.opcode in ("bitcast", "copy"):
            part = body[part.operands[0]]
        if part.opcode == "dynamic-update-slice" and _in_hbm(shape):
            total += sum(map(_bytes, body[part.operands[1]].shapes))
        else:
            total += _in_hbm(shape)
    return total


def _read(body: Computation, index: int, program: Program) -> int:
    """Bytes that a fused computation reads of one parameter."""
    parameters = [one for one in body.values() if one.opcode == "parameter"]
    return _read_by_users(parameters[index], body, program)


def _read_by_users(value: Instruction, body: Computation, program: Program) -> int:
    whole = sum(map(_bytes, value.shapes))
    total = 0
    for user in body.values():
        for place, name in enumerate(user.operands):
            if name != value.name:
                continue
            if user.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
                total += sum(map(_bytes, user.shapes))
            elif user.opcode == "bitcast":
                total += _read_by_users(user, body, program)
            elif user.opcode == "fusion":
                inner = program.computations[user.called("calls") or ""]
                total += _read(inner, place, program)
            elif user.opcode != "dynamic-update-slice" or place == 1:
                total += whole
    return min(total, whole)


def _bytes(shape: Shape) -> int:
    return shape.bytes


def _in_hbm(shape: Shape) -> int:
    return shape.bytes if shape.space == 0 else 0
