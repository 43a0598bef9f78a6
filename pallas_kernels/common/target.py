"""The target device of the current trace, and the interpreter mode of kernels."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from pallas_kernels.common.devices import GPU_LIMITS, HOPPER, GpuLimits, capability_of

# H100 and H200; B200; RTX 50 and RTX PRO 6000.
_HOPPER_AND_BLACKWELL = (90, 100, 120)
_interpreted = contextvars.ContextVar("interpreted", default=False)


class Target(NamedTuple):
    """The kind of device that a trace is compiled for.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      kind: the device kind, such as "NVIDIA H200" or "TPU v5 lite".
    """

    platform: str
    kind: str

    @property
    def is_hopper(self) -> bool:
        """Whether it is the GPU that the Mosaic GPU kernels were measured on."""
        return self.compute_capability == 90

    @property
    def compute_capability(self) -> int | None:
        """90 for compute capability 9.0; None for other platforms and for unknown GPUs."""
        if self.platform != "gpu":
            return None
        device = self._live_device()
        if device is not None and hasattr(device, "compute_capability"):
            return int(str(device.compute_capability).replace(".", ""))
        return capability_of(self.kind)

    @property
    def gpu_limits(self) -> GpuLimits:
        """What kernels are sized by: of the device, or of the largest one of its capability."""
        limits = GPU_LIMITS.get(self.compute_capability or 90, HOPPER)
        device = self._live_device()
        if device is None or not hasattr(device, "core_count"):
            return limits
        return limits._replace(multiprocessors=device.core_count)

    def _live_device(self) -> Any:
        if self.platform != "gpu" or jax.default_backend() not in ("gpu", "cuda"):
            return None
        return next((d for d in jax.local_devices() if d.device_kind == self.kind), None)


def find_target() -> Target:
    """The device of the current mesh (`jax.sharding.use_abstract_mesh`), else the default device.

    The compiler cannot partition a kernel. Outside `jax.shard_map`, under a mesh of several
    devices, the kind is "several devices", for which no default choice selects a kernel.

    A function that is compiled for another device, such as the CPU of a machine with a GPU, must
    name its implementation.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    if mesh.size > 1 and len(mesh.manual_axes) < len(mesh.axis_names):
        return Target("cpu" if device is None else _platform(device.platform), "several devices")
    if device is not None:
        return _describe(device.platform, device.device_kind)
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(default, str):
        default = jax.devices(default)[0]
    device = default or jax.devices()[0]
    return _describe(device.platform, device.device_kind)


def check_hopper(implementation: str) -> None:
    """Raises ValueError unless the target is Hopper or kernels are interpreted."""
    target = find_target()
    if not target.is_hopper and not is_interpreted():
        raise _wrong_device(implementation, "an NVIDIA Hopper GPU", target)


def check_hopper_or_blackwell(implementation: str, *, shared_memory: int = 0) -> None:
    """As `check_hopper`, for kernels without Hopper's matrix instructions (wgmma).

    They compile for Blackwell too (tests/kernels/test_blackwell_aot.py), where nobody has run them:
    no default choice selects them there.

    Args:
      implementation: its name, for the error.
      shared_memory: bytes of it that the kernels need, which RTX cards may lack.
    """
    target = find_target()
    if is_interpreted():
        return
    if target.compute_capability not in _HOPPER_AND_BLACKWELL:
        raise _wrong_device(implementation, "an NVIDIA Hopper or Blackwell GPU", target)
    if target.gpu_limits.shared_memory < shared_memory:
        needed = f"{shared_memory} bytes of shared memory in a block"
        raise _wrong_device(implementation, needed, target)


def check_tpu(implementation: str) -> str:
    """The device kind of the target TPU; raises ValueError for other targets."""
    target = find_target()
    if target.platform != "tpu":
        raise _wrong_device(implementation, "a TPU", target)
    return target.kind


def _wrong_device(implementation: str, needed: str, target: Target) -> ValueError:
    return ValueError(
        f"{implementation} needs {needed}, this is {target.platform} ({target.kind}); use "
        "implementation 'xla', or None for the fastest one on the target"
    )


def _describe(platform: str, kind: str) -> Target:
    return Target(_platform(platform), kind)


def _platform(name: str) -> str:
    return "gpu" if name in ("cuda", "rocm") else name


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Runs Pallas kernels that are traced inside in JAX's interpreters: slow, on any machine.

    A function traced outside of the context keeps its compiled kernels.
    """
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)


def is_interpreted() -> bool:
    """Whether the current trace is inside `interpreted`."""
    return _interpreted.get()
