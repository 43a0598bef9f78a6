"""What a computation that is being traced will run on, and whether kernels are interpreted."""

import contextlib
import contextvars
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax

# Data center GPUs of compute capability 9.0 by their device kind.
_HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")
_interpreted = contextvars.ContextVar("interpreted", default=False)


class Target(NamedTuple):
    """A kind of device.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      kind: the device kind, such as "NVIDIA H200" or "TPU v5 lite".
    """

    platform: str
    kind: str

    @property
    def is_hopper(self) -> bool:
        """Whether Mosaic GPU kernels written for Hopper run there."""
        return self.platform == "gpu" and _HOPPER.search(self.kind) is not None


def find_target() -> Target:
    """The device of the mesh in use (`jax.sharding.use_abstract_mesh`), else JAX's default device.

    The compiler cannot split a kernel over devices. Where it would have to, because the mesh has
    several and this is not inside `jax.shard_map`, the kind is "several devices", which no default
    choice knows.

    A function that is compiled for another device than these, such as the CPU of a machine with a
    GPU, must name its implementation.
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
    """Raises a ValueError where Mosaic GPU kernels neither run nor are interpreted."""
    target = find_target()
    if not target.is_hopper and not is_interpreted():
        raise _wrong_device(implementation, "an NVIDIA Hopper GPU", target)


def check_tpu(implementation: str) -> str:
    """The kind of TPU; raises a ValueError where there is none."""
    target = find_target()
    if target.platform != "tpu":
        raise _wrong_device(implementation, "a TPU", target)
    return target.kind


def _wrong_device(implementation: str, needed: str, target: Target) -> ValueError:
    return ValueError(
        f"{implementation} needs {needed}, this is {target.platform} ({target.kind}); use "
        "implementation 'xla', or None for the best one here"
    )


def _describe(platform: str, kind: str) -> Target:
    return Target(_platform(platform), kind)


def _platform(name: str) -> str:
    return "gpu" if name in ("cuda", "rocm") else name


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Runs Pallas kernels traced inside in JAX's interpreters, on any machine: slow, for tests.

    A function that was traced outside keeps its compiled kernels.
    """
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)


def is_interpreted() -> bool:
    """Whether tracing happens inside `interpreted`."""
    return _interpreted.get()
