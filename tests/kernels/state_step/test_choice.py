"""Errors of a step of CEMA."""

from typing import get_args

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.common.dispatch import Implementation
from pallas_kernels.state_step import CemaStepTables, api, state_step


def step(x=(2, 128), table=(4, 128), state=(2, 8, 128), x_dtype=jnp.float32,
         table_dtype=jnp.float32, state_dtype=jnp.float32, implementation=None):  # fmt: skip
    tables = CemaStepTables(*[jnp.zeros(table, table_dtype)] * 5, jnp.zeros(128, table_dtype))
    x, state = jnp.zeros(x, x_dtype), jnp.zeros(state, state_dtype)
    return jax.eval_shape(lambda: state_step(x, tables, state, implementation=implementation))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": (2, 1, 128)}, r"x is float32\(2, 1, 128\); needs"),
        ({"x_dtype": jnp.int32}, r"x is int32\(2, 128\); needs"),
        ({"table": (4, 64)}, r"tables.q_re is float32\(4, 64\); x \(2, 128\)"),
        ({"table_dtype": jnp.bfloat16}, r"tables.q_re is bfloat16\(4, 128\)"),
        ({"state": (1, 8, 128)}, r"needs float32\(S, 8, 128\) with S >= 2: use pack_state"),
        ({"state": (2, 4, 128)}, r"state is float32\(2, 4, 128\); needs float32\(S, 8, 128\)"),
        ({"state_dtype": jnp.bfloat16}, r"state is bfloat16\(2, 8, 128\)"),
        ({"implementation": "cuda"}, "state_step has no implementation 'cuda'"),
    ],
)
def test_errors_name_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        step(**arguments)


def test_implementations_have_the_common_names():
    assert set(api.IMPLEMENTATIONS) <= set(get_args(Implementation))
