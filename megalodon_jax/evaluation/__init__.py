"""Evaluation: held-out text, long contexts, problems with known answers, the cost of prefill.

Names are imported on first use: training imports `summary`, and no more than that.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megalodon_jax.evaluation.context import (
        ContextLoss,
        PositionLoss,
        loss_by_position,
        perplexity_by_context,
    )
    from megalodon_jax.evaluation.streaming import evaluate_documents, evaluate_files
    from megalodon_jax.evaluation.summary import Evaluation

_MODULES = {
    "ContextLoss": "context",
    "Evaluation": "summary",
    "PositionLoss": "context",
    "evaluate_documents": "streaming",
    "evaluate_files": "streaming",
    "loss_by_position": "context",
    "perplexity_by_context": "context",
}

__all__ = [
    "ContextLoss",
    "Evaluation",
    "PositionLoss",
    "evaluate_documents",
    "evaluate_files",
    "loss_by_position",
    "perplexity_by_context",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
