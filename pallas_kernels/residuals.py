"""Names of what the operations keep for their backward pass.

Under `jax.checkpoint` everything is computed again that its policy does not save. What a kernel's
backward pass needs of its forward pass carries the operation's name, so that a policy can save it
and leave pointwise work to be redone:

    jax.checkpoint(f, policy=jax.checkpoint_policies.save_only_these_names("cema"))
"""

from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name

# "sequence_parts": states of all parts of a sequence, gathered; small beside its tokens.
Operation = Literal["timestep_norm", "cema", "chunk_attention", "sequence_parts"]


def keep(values: Any, operation: Operation) -> Any:
    """The same values under the operation's name."""
    return jax.tree.map(lambda value: checkpoint_name(value, operation), values)
