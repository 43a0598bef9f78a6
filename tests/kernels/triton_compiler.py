"""Triton's compiler for a named GPU, on a machine without one: registers, spills, shared memory."""

# The package is optional.
# pyright: reportMissingImports=false

import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

# Compute capabilities: A100; A10, RTX 30; L4, L40S, RTX 40; H100, H200; B200; RTX 50, RTX PRO 6000.
CAPABILITIES = [80, 86, 89, 90, 100, 120]
_POINTERS = {"bfloat16": "*bf16", "float32": "*fp32", "int32": "*i32"}


class TritonUsage(NamedTuple):
    """Resources of a compiled kernel: registers of a thread, bytes of the others."""

    registers: int
    spilled: int
    shared_memory: int


def compile_kernel(
    kernel: Any,
    capability: int,
    arguments: dict[str, str],
    constants: dict[str, Any],
    folder: Path,
    *,
    num_warps: int = 4,
    num_stages: int = 3,
) -> TritonUsage:
    """Compiles a `triton.jit` function.

    Args:
      kernel: the function.
      capability: compute capability, 90 for Hopper.
      arguments: "bfloat16", "float32", "int32" for pointers, "i32" for integers, by name.
      constants: its constexpr arguments.
      folder: for the compiled file.
      num_warps: warps of a block.
      num_stages: stages of the pipelines that Triton makes of loops with matrix products.
    """
    triton = pytest.importorskip("triton", reason="needs the extra: pip install -e '.[triton]'")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {
        name: "constexpr" if name in constants else _POINTERS.get(arguments[name], arguments[name])
        for name in kernel.arg_names
    }
    # As jax-triton states it: XLA aligns its buffers.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, type_name in enumerate(signature.values())
        if type_name.startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(
        source, target=target, options={"num_warps": num_warps, "num_stages": num_stages}
    )
    file = folder / f"{kernel.__name__}_{capability}.cubin"
    file.write_bytes(compiled.asm["cubin"])
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    report = subprocess.run(
        [tools / "cuobjdump", "-res-usage", file], capture_output=True, text=True, check=True
    ).stdout
    used = dict(field.split(":") for field in report.split() if field.count(":") == 1)
    return TritonUsage(int(used["REG"]), int(used["STACK"]), compiled.metadata.shared)
