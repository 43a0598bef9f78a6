"""Compatibility of checkpoints: format numbers, and equality of model configurations."""

import dataclasses
from typing import Any

from megalodon_jax.config import AnyEncoderConfig, AnyModelConfig, OptimConfig
from megalodon_jax.errors import CheckpointError, MismatchError
from megalodon_jax.storage.location import AnyPath

# The format of a checkpoint, increased by every change that older code would misread. A version
# reads its own format and the previous one. Manifests came later than format 1 and did not change
# it, because older code ignores them; a checkpoint without manifest needs `allow_unverified`.
FORMAT = 2
# Since this format a checkpoint has the item `guard`.
GUARD_FORMAT = 2
READABLE_FORMATS = (FORMAT, FORMAT - 1)

# Fields that change how a model is computed but not what it computes: they may differ on restore.
_COMPUTE_FIELDS = frozenset(
    {
        "implementation",
        "remat",
        "scan_layers",
        "cema_implementation",
        "timestep_norm_implementation",
        "attention_implementation",
        "rowwise_implementation",
    }
)
# Fields that a run may change when it starts from trained weights: no parameter depends on them.
CONTINUATION_FIELDS = frozenset({"chunk_size", "rope_base"})
# Fields of an encoder's head, which a run from trained weights may have afresh, and of dropout.
HEAD_FIELDS = frozenset({"head", "num_classes", "head_bias", "pooling_residual"})
DROPOUT_FIELDS = frozenset({"dropout", "hidden_dropout", "attention_dropout", "drop_path"})


def has_other_head(saved: AnyModelConfig, wanted: AnyModelConfig) -> bool:
    """Whether two encoders have heads of different parameters."""
    if not isinstance(saved, AnyEncoderConfig) or not isinstance(wanted, AnyEncoderConfig):
        return False
    return any(getattr(saved, name) != getattr(wanted, name) for name in HEAD_FIELDS)


def check_format(found: Any, source: str | AnyPath) -> None:
    """Raises `CheckpointError` if this version cannot read a checkpoint of format `found`."""
    if found not in READABLE_FORMATS:
        has = "no format number (older than format 1)" if found is None else f"format {found}"
        readable = ", ".join(map(str, READABLE_FORMATS))
        raise CheckpointError(
            f"checkpoint {source} has {has}, this version reads format {readable}; use the version "
            "of megalodon-flax that wrote it"
        )


def check_same_model(
    saved: AnyModelConfig,
    wanted: AnyModelConfig,
    source: str | AnyPath,
    *,
    allowed: frozenset[str] = frozenset(),
) -> None:
    """Raises `MismatchError`, which names the fields, if two configurations differ in the model.

    Args:
      saved: of the checkpoint.
      wanted: of the run.
      source: the checkpoint.
      allowed: fields that may differ, beside those that only say how to compute.
    """
    if saved.kind != wanted.kind:
        raise MismatchError(
            f"checkpoint {source} is of a {saved.kind}, the run asks for a {wanted.kind}; set "
            "model.kind, or use another run_dir"
        )
    differing = differing_fields(saved, wanted, ignored=_COMPUTE_FIELDS | allowed)
    if differing:
        raise MismatchError(
            f"checkpoint {source} is of another model: {'; '.join(differing)}; use the values of "
            "the checkpoint, or another run_dir"
        )


def check_same_optimizer(saved: OptimConfig, wanted: OptimConfig, source: str | AnyPath) -> None:
    """Raises `MismatchError` if the state of the saved optimizer is not that of the wanted one."""
    for name in ("name", "frozen"):
        old, new = getattr(saved, name), getattr(wanted, name)
        if old != new:
            raise MismatchError(
                f"checkpoint {source} has the optimizer state of optim.{name} = {old!r}, the run "
                f"asks for {new!r}; use the value of the checkpoint, or start a new run from these "
                "weights with --init_from"
            )


def differing_fields(saved: Any, wanted: Any, *, ignored: frozenset[str]) -> list[str]:
    """One text per differing field of two configurations: its name and both values."""
    texts = []
    for entry in dataclasses.fields(saved):
        old, new = getattr(saved, entry.name), getattr(wanted, entry.name)
        if entry.name not in ignored and old != new:
            texts.append(f"{entry.name} is {old!r} in the checkpoint, {new!r} now")
    return texts
