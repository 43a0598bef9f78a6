"""Texts and numbers about a run that its reports contain."""

from collections.abc import Sequence
from typing import Any

import jax

from megalodon_jax.config import TrainConfig
from megalodon_jax.data.loader import total_counts
from megalodon_jax.flops import model_flops_per_token, model_flops_utilization
from megalodon_jax.parallel import distributed
from megalodon_jax.tasks import TrainingLoader
from megalodon_jax.train_state import TrainState


def describe_devices(devices: Sequence[Any]) -> str:
    """Number and kind, such as "1 x NVIDIA H200"."""
    return f"{len(devices)} x {devices[0].device_kind}"


def describe_run(
    config: TrainConfig, state: TrainState, devices: Sequence[Any], *, first_step: int
) -> str:
    """One line: parameters, devices, directory, and the step of a resumed run."""
    count = f"{sum(leaf.size for leaf in jax.tree.leaves(state.params)):,} parameters"
    if state.base is not None:
        frozen = sum(leaf.size for leaf in jax.tree.leaves(state.base))
        count += f" of LoRA beside {frozen:,} frozen ones"
    text = describe_devices(devices)
    text += f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    unused = len(jax.devices()) - len(devices)
    text += f" ({unused} more are not used: set mesh.data to -1)" if unused else ""
    resumed = f", resumed at step {first_step}" if first_step else ""
    return f"{count} on {text}, run_dir {config.run_dir}{resumed}"


def data_counts(loader: TrainingLoader, config: TrainConfig) -> dict[str, float]:
    """Counts of what was left out, and of tokens and documents by source, since the first step."""
    data, is_sft = config.data, config.task == "sft"
    if data.on_bad_document == "stop" and not data.sources and not is_sft:
        return {}
    by_process = distributed.all_gather_json(loader.counts())
    if not any(by_process):
        return {}
    counts = total_counts(by_process)
    found: dict[str, float] = {"bad_documents": sum(entry.bad_documents for entry in counts)}
    if is_sft:
        found["dropped_examples"] = sum(entry.dropped for entry in counts)
        found["truncated_examples"] = sum(entry.truncated for entry in counts)
    if data.sources:
        for name, entry in zip(loader.source_names, counts, strict=True):
            found[f"source_tokens/{name}"] = entry.tokens
            found[f"source_documents/{name}"] = entry.documents
    return found


def utilization(
    config: TrainConfig, devices: Sequence[Any], tokens_per_second: float
) -> float | None:
    """Model FLOPs utilization; None for a kind of device without known peak."""
    flops = model_flops_per_token(config.model, seq_len=config.data.seq_len)
    if config.lora.rank:
        # The gradients of frozen weights, a third of the products, are not computed.
        flops = flops * 2 / 3
    return model_flops_utilization(
        tokens_per_second, flops, device_kind=devices[0].device_kind, device_count=len(devices)
    )
