"""FLOPs of the matrix products and convolutions of a compiled program."""

import math
import re
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from megalodon_jax.compiled.hlo import Computation, Instruction, Program, parse_program


def count_matmul_flops(hlo_text: str | Program) -> int:
    """FLOPs per device of all matrix products and convolutions in one run of a program.

    A multiply-add counts two. Kernels (custom calls) count nothing, cuBLAS products count.

    Args:
      hlo_text: optimized HLO, or the result of `parse_program`.
    """
    program = hlo_text if isinstance(hlo_text, Program) else parse_program(hlo_text)
    flops = 0
    for instruction, computation, _, count in program.executed():
        if instruction.opcode == "dot":
            flops += count * _dot_flops(instruction, computation)
        elif instruction.opcode == "convolution":
            flops += count * _convolution_flops(instruction, computation)
        elif "__cublas" in instruction.attributes and instruction.opcode == "custom-call":
            flops += count * _gemm_flops(instruction, computation)
    return flops


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
    """Counts products of an input and a kernel element; libtpu writes matrix products so."""
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
    """A window's number along a spatial dimension; for a padding the low side."""
    if key not in fields:
        return default
    return int(fields[key].split("x")[index].split("_")[0])


@lru_cache(maxsize=1024)
def _valid_positions(
    size: int, window: int, outputs: int, stride: int, pad: int, dilation: int, window_dilation: int
) -> int:
    """Number of (output, window element) pairs that read an input element, not padding."""
    first_inputs = np.arange(outputs) * stride - pad
    count = 0
    for element in range(window):
        at = first_inputs + element * window_dilation
        count += int(((at >= 0) & (at % dilation == 0) & (at // dilation < size)).sum())
    return count
