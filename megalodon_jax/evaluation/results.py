"""Results of evaluations as tables and JSON."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from megalodon_jax.encoder_model import EncoderModel
from megalodon_jax.language_model import LanguageModel
from megalodon_jax.storage.location import AnyPath, as_path


def as_json_values(value: Any) -> Any:
    """A result as JSON values: NamedTuples become objects, numbers that are not finite None."""
    if hasattr(value, "_asdict"):
        return {name: as_json_values(each) for name, each in value._asdict().items()}
    if isinstance(value, dict):
        return {name: as_json_values(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_json_values(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_results(
    path: str | AnyPath,
    results: Sequence[Any],
    *,
    model: LanguageModel | EncoderModel,
    task: str,
    checkpoint: str,
    options: dict[str, Any],
) -> None:
    """Writes results with all that is needed to repeat them; an existing file is replaced.

    Args:
      path: of the .json file.
      results: NamedTuples of plain numbers.
      model: the model, for its configuration and the device that holds it.
      task: name of the evaluation.
      checkpoint: where the model came from.
      options: of the evaluation.
    """
    import jax
    from flax import nnx

    params = jax.tree.leaves(nnx.state(model, nnx.Param))
    content = {
        "task": task,
        "checkpoint": checkpoint,
        "options": options,
        "model": dataclasses.asdict(model.config),
        "num_parameters": sum(leaf.size for leaf in params),
        "device": jax.devices()[0].device_kind,
        "results": list(results),
    }
    text = json.dumps(as_json_values(content), indent=1, allow_nan=False)
    as_path(path).write_text(text + "\n")


def results_table(results: Sequence[Any]) -> str:
    """A table of NamedTuples of one type; columns without a value are left out."""
    rows = [as_json_values(result) for result in results]
    names = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    cells = [names, *([_cell(row[name]) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
