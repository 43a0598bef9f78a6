"""The one launcher of Triton kernels, by jax-triton; both packages are imported when first used.

Kernels live in modules that import triton, which is an optional dependency: they are loaded by
name, `load_kernels("pallas_kernels.cema.triton.kernels")`. The same modules run in Triton's
interpreter inside `target.interpreted`, on any machine.
"""

# The packages are optional, and this module has the name of one.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.common.target import Target, find_target, is_interpreted

INSTALL = 'pip install "megalodon-flax[triton]"'
# Triton's tensor-core instructions and asynchronous copies begin with Ampere.
OLDEST_CAPABILITY = 80


def is_installed() -> bool:
    """Whether triton and jax-triton are there."""
    return all(importlib.util.find_spec(name) is not None for name in ("triton", "jax_triton"))


def can_run(target: Target) -> bool:
    """Whether Triton kernels run on the target: a GPU from Ampere on, and the packages."""
    capability = target.compute_capability
    return capability is not None and capability >= OLDEST_CAPABILITY and is_installed()


def check_triton(implementation: str) -> None:
    """Raises ValueError unless Triton kernels run on the target, or are interpreted.

    The target may be no GPU, or one older than Ampere; or triton or jax-triton is not installed.
    """
    target = find_target()
    capability = target.compute_capability
    is_old = capability is None or capability < OLDEST_CAPABILITY
    if is_old and not is_interpreted():
        raise ValueError(
            f"{implementation} needs an NVIDIA GPU of compute capability 8.0 or more, this is "
            f"{target.platform} ({target.kind}); use implementation 'xla', or None for the "
            "fastest one on the target"
        )
    needed = ("triton",) if is_interpreted() else ("triton", "jax_triton")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{implementation} needs {' and '.join(missing)}: {INSTALL}")


def device_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a function that kernels call: `triton.jit`, nothing in the interpreter.

    Triton's interpreter replaces parts of `triton.language` while a kernel runs, and would not
    restore them after a nested one.
    """
    import triton

    return function if triton.knobs.runtime.interpret else triton.jit(function)


def load_kernels(module: str, *, interpret: bool = False) -> ModuleType:
    """A module of kernels, compiled or for the interpreter."""
    return _load_interpreted(module) if interpret else importlib.import_module(module)


@functools.cache
def _load_interpreted(module: str) -> ModuleType:
    """A second copy of a module and of the kernel modules beside it, made by the interpreter."""
    import sys

    import triton

    package = module.rpartition(".")[0] + "."
    compiled = {name: sys.modules.pop(name) for name in [*sys.modules] if name.startswith(package)}
    try:
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = True
            return importlib.import_module(module)
    finally:
        for name in [*sys.modules]:
            if name.startswith(package):
                del sys.modules[name]
        sys.modules.update(compiled)


def launch(
    kernel: Any,
    operands: Sequence[Array | int],
    out_type: Sequence[jax.ShapeDtypeStruct],
    *,
    grid: tuple[int, ...],
    constants: Mapping[str, Any],
    num_warps: int = 4,
    num_stages: int = 2,
    interpret: bool = False,
) -> list[Array]:
    """Runs a kernel in every block of the grid.

    Args:
      kernel: of `load_kernels`; takes pointers to the operands, or integers, then pointers to the
        results, then the constants by name.
      operands: arrays and integers.
      out_type: shapes of the results.
      grid: blocks along up to three axes.
      constants: the kernel's constexpr arguments.
      num_warps: warps of a block.
      num_stages: stages of the pipelines that Triton makes of loops with matrix products.
      interpret: whether `kernel` is for the interpreter.
    """
    if interpret:
        return _interpret(kernel, operands, out_type, grid, constants)
    jax_triton = _import_jax_triton()
    parameters = inspect.signature(jax_triton.triton_call).parameters
    out: dict[str, Any] = {"out_type" if "out_type" in parameters else "out_shape": list(out_type)}
    # Reports of compiled programs take a kernel's name from the scope.
    with jax.named_scope(kernel.__name__):
        return jax_triton.triton_call(
            *operands,
            kernel=kernel,
            grid=grid,
            num_warps=num_warps,
            num_stages=num_stages,
            compute_capability=find_target().compute_capability,
            **out,
            **constants,
        )


@functools.cache
def _import_jax_triton() -> ModuleType:
    import jax_triton
    from jax._src.interpreters import partial_eval

    # jax-triton 0.4.1 registers a rule of two arguments, which jax 0.12 calls with three, and which
    # keeps every call. JAX's default rule drops the calls whose results rematerialization ignores.
    partial_eval.dce_rules.pop(jax_triton.triton_lib.triton_kernel_call_p, None)
    return jax_triton


class _HostArray:
    """A numpy array as Triton's interpreter takes it: by its address."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.dtype = array.dtype
        self.shape = array.shape

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "_HostArray":
        return self

    def cpu(self) -> "_HostArray":
        return self

    def new_empty(self, *_: Any, **__: Any) -> "_HostArray":
        return _HostArray(self.array)

    def set_(self, *_: Any) -> None: ...

    def copy_(self, _: Any) -> None: ...

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return self.array.strides


def _interpret(kernel, operands, out_type, grid, constants) -> list[Array]:
    arrays = [operand for operand in operands if not isinstance(operand, int)]

    def run(*values):
        remaining = iter(values)
        # Copies: their memory is aligned and stays while the kernel runs.
        inputs = [
            operand if isinstance(operand, int) else _HostArray(np.array(next(remaining)))
            for operand in operands
        ]
        # The interpreter truncates numbers to bfloat16 where GPUs round them.
        results = [
            _HostArray(np.empty(s.shape, np.float32 if s.dtype == jnp.bfloat16 else s.dtype))
            for s in out_type
        ]
        # Overflow and NaN are values here too, not warnings.
        with np.errstate(all="ignore"):
            kernel[grid](*inputs, *results, **constants)
        return [r.array.astype(s.dtype) for r, s in zip(results, out_type, strict=True)]

    return jax.pure_callback(run, list(out_type), *arrays, vmap_method="sequential")
