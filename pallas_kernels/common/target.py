"""The target device of the current trace, and the interpreter mode of kernels."""

import contextlib
import contextvars
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax

# Device kinds of data-center GPUs of compute capability 9.0.
_HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")
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
        """Whether the Mosaic GPU kernels, which are written for Hopper, run on it."""
        return self.platform == "gpu" and _HOPPER.search(self.kind) is not None


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
