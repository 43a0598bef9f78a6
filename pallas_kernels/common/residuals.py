"""Names of the residuals that operations save for their backward pass.

`jax.checkpoint` recomputes every value that its policy does not save. The residuals of a kernel
carry the operation's name, so that a policy can save them and recompute only pointwise operations:

    jax.checkpoint(f, policy=jax.checkpoint_policies.save_only_these_names("cema"))
"""

from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name

# "context_parallel": the gathered states of all sequence shards, small beside the tokens.
Operation = Literal["timestep_norm", "cema", "chunk_attention", "context_parallel"]


def name_residuals(values: Any, operation: Operation) -> Any:
    """The same values under the operation's name."""
    return jax.tree.map(lambda value: checkpoint_name(value, operation), values)
