"""Names of what the operations keep for their backward pass.

Under `jax.checkpoint` everything is computed again that its policy does not save. The results of
kernels carry the name KERNEL, so that a policy can save them and leave pointwise work to be redone:

    jax.checkpoint(f, policy=jax.checkpoint_policies.save_only_these_names(KERNEL))
"""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

KERNEL = "kernel"


def keep(values: Any, name: str = KERNEL) -> Any:
    """The same values, named for policies of `jax.checkpoint`."""
    return jax.tree.map(lambda value: checkpoint_name(value, name), values)
