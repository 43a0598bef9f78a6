"""The frozen base of a run with LoRA: its checkpoints name it and leave its weights out."""

from typing import Any, NamedTuple, Protocol

from flax import nnx
from jax.sharding import Mesh

from megalodon_jax.config import LoraConfig, TrainConfig
from megalodon_jax.errors import CheckpointError, MismatchError
from megalodon_jax.storage.location import AnyPath


class BaseRecord(NamedTuple):
    """The base of a run with LoRA, as its checkpoints record it.

    Attributes:
      path: where the run has read it; of a run directory the checkpoint, `.../checkpoints/STEP`.
      fingerprint: SHA-256 of its configuration and of sums of its weights' bits.
    """

    path: str
    fingerprint: str


class LoadBase(Protocol):
    """Reads the base that a checkpoint of LoRA factors needs, and compares its fingerprint."""

    def __call__(self, record: BaseRecord, config: TrainConfig, mesh: Mesh | None) -> nnx.State:
        """The parameters of the base.

        Args:
          record: of the checkpoint.
          config: the run that has trained the factors.
          mesh: devices over which the parameters are sharded; None: the first device.
        """
        ...


def record_from_json(entry: Any, source: str | AnyPath) -> BaseRecord | None:
    """The record in a checkpoint's JSON item; None: the run has no base.

    Raises:
      CheckpointError: the entry is something else.
    """
    if entry is None:
        return None
    try:
        return BaseRecord(str(entry["path"]), str(entry["fingerprint"]))
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {source} has no valid base: {entry!r:.80}") from error


def check_same_base(record: BaseRecord, found: BaseRecord, source: str | AnyPath) -> None:
    """Raises `MismatchError` if factors were trained for another base than the one found."""
    if record.fingerprint != found.fingerprint:
        raise MismatchError(
            f"checkpoint {source} has LoRA factors for the base {record.path} with fingerprint "
            f"{record.fingerprint[:16]}, and {found.path} has {found.fingerprint[:16]}: these are "
            "other weights; restore the base, or name its copy with init_from"
        )


def check_same_lora(saved: LoraConfig, wanted: LoraConfig, source: str | AnyPath) -> None:
    """Raises `MismatchError` if a run asks for other factors than its checkpoint has."""
    if saved == wanted or not (saved.rank or wanted.rank):
        return
    names = ("rank", "alpha", "targets", "dropout")
    pairs = [(name, getattr(saved, name), getattr(wanted, name)) for name in names]
    texts = [f"lora.{name} is {old!r} there, {new!r} now" for name, old, new in pairs if old != new]
    raise MismatchError(
        f"checkpoint {source} has other LoRA factors: {'; '.join(texts)}; use the values of the "
        "checkpoint, or start a new run"
    )
