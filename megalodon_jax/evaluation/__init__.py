"""Evaluation: held-out text, long contexts, problems with known answers, the cost of inference.

Names are imported on first use: training imports `summary`, and no more than that.
"""

from typing import TYPE_CHECKING

from megalodon_jax.lazy_names import lazy_names

if TYPE_CHECKING:
    from megalodon_jax.evaluation.answers import (
        AnswerAccuracy,
        addition_accuracy,
        answer_accuracy,
        copy_accuracy,
        passkey_accuracy,
        recall_accuracy,
        wilson_interval,
    )
    from megalodon_jax.evaluation.context import (
        ContextLoss,
        PositionLoss,
        loss_by_position,
        perplexity_by_context,
    )
    from megalodon_jax.evaluation.costs import (
        PrefillCost,
        decode_seconds,
        prefill_cost,
    )
    from megalodon_jax.evaluation.examples import (
        Labels,
        write_examples,
        write_labelled_additions,
    )
    from megalodon_jax.evaluation.problems import (
        Addition,
        Copy,
        Passkey,
        Problem,
        Recall,
        draw_problems,
    )
    from megalodon_jax.evaluation.results import (
        results_table,
        write_results,
    )
    from megalodon_jax.evaluation.skipping import (
        SkippedAttention,
        skip_attention,
    )
    from megalodon_jax.evaluation.streaming import (
        evaluate_documents,
        evaluate_files,
    )
    from megalodon_jax.evaluation.summary import (
        Evaluation,
    )
    from megalodon_jax.evaluation.variants import (
        with_window,
        without_last_attention,
    )

_MODULES = {
    "Addition": "problems",
    "AnswerAccuracy": "answers",
    "ContextLoss": "context",
    "Copy": "problems",
    "Evaluation": "summary",
    "Labels": "examples",
    "Passkey": "problems",
    "PositionLoss": "context",
    "PrefillCost": "costs",
    "Problem": "problems",
    "Recall": "problems",
    "SkippedAttention": "skipping",
    "addition_accuracy": "answers",
    "answer_accuracy": "answers",
    "copy_accuracy": "answers",
    "decode_seconds": "costs",
    "draw_problems": "problems",
    "evaluate_documents": "streaming",
    "evaluate_files": "streaming",
    "loss_by_position": "context",
    "passkey_accuracy": "answers",
    "perplexity_by_context": "context",
    "prefill_cost": "costs",
    "recall_accuracy": "answers",
    "results_table": "results",
    "skip_attention": "skipping",
    "wilson_interval": "answers",
    "with_window": "variants",
    "without_last_attention": "variants",
    "write_examples": "examples",
    "write_labelled_additions": "examples",
    "write_results": "results",
}

__all__ = [
    "Addition",
    "AnswerAccuracy",
    "ContextLoss",
    "Copy",
    "Evaluation",
    "Labels",
    "Passkey",
    "PositionLoss",
    "PrefillCost",
    "Problem",
    "Recall",
    "SkippedAttention",
    "addition_accuracy",
    "answer_accuracy",
    "copy_accuracy",
    "decode_seconds",
    "draw_problems",
    "evaluate_documents",
    "evaluate_files",
    "loss_by_position",
    "passkey_accuracy",
    "perplexity_by_context",
    "prefill_cost",
    "recall_accuracy",
    "results_table",
    "skip_attention",
    "wilson_interval",
    "with_window",
    "without_last_attention",
    "write_examples",
    "write_labelled_additions",
    "write_results",
]

__getattr__, __dir__ = lazy_names(__name__, _MODULES, globals())
