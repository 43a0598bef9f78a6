"""How well a model predicts text: held-out batches, and files of any length."""

from megalodon_jax.evaluation.evaluate import (
    Evaluation,
    evaluate_batches,
    evaluate_documents,
    evaluate_files,
    streaming_batches,
)

__all__ = [
    "Evaluation",
    "evaluate_batches",
    "evaluate_documents",
    "evaluate_files",
    "streaming_batches",
]
