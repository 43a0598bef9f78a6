"""Ablations that the tests of modules, model, mesh and training share."""

from typing import Any

# One switch at a time, then two models in which all differ from the default.
VARIANTS: dict[str, dict[str, Any]] = {
    "ema": {"moving_average": "ema"},
    "no average": {"moving_average": "none"},
    "layer norm": {"time_norm": "layer"},
    "rms norm": {"time_norm": "rms"},
    "pre-norm": {"residual_connection": "pre_norm"},
    "no qk norm": {"qk_norm": False},
    "no positions": {"rope_base": None},
    "all, ema": {
        "moving_average": "ema", "time_norm": "layer", "residual_connection": "pre_norm",
        "qk_norm": False, "rope_base": None,
    },
    "all, no average": {
        "moving_average": "none", "time_norm": "rms", "residual_connection": "pre_norm",
        "qk_norm": False, "rope_base": None,
    },
}  # fmt: skip
