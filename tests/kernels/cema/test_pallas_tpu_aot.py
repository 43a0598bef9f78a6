"""The TPU compiler accepts CEMA's kernels for every generation; no TPU is needed."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.cema import CemaParams
from pallas_kernels.cema.pallas_tpu import cema_pallas_tpu

# libtpu takes a lock that a second test process would not get.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
pytest.importorskip("libtpu", reason="the TPU compiler, libtpu, is not installed")
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1"}


def compile_gradient(chip: str, dtype: Any, order: int, *, packed: bool) -> Any:
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
    sharding = NamedSharding(Mesh(np.array([device]), ("device",)), PartitionSpec())
    rows, length, channels = 2, 4_000 if packed else 16_000, 256

    def shaped(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def run(x, params, state, segment_ids, cotangents):
        out, pull_back = jax.vjp(lambda *a: cema_pallas_tpu(*a, segment_ids), x, params, state)
        return out, pull_back(type(out)(*cotangents))

    matrix = shaped(channels, order)
    params = CemaParams(
        matrix, matrix, shaped(channels), shaped(channels, order, 2), shaped(channels)
    )
    x = shaped(rows, length, channels, dtype=dtype)
    state = shaped(rows, channels, order, dtype=jnp.complex64)
    ids = shaped(rows, length, dtype=jnp.int32) if packed else None
    # Without the mesh, Pallas asks the process's own backend what to compile for.
    with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh):
        return jax.jit(run).lower(x, params, state, ids, (x, state)).compile()


@pytest.mark.slow
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_compiles(chip):
    compiled = compile_gradient(chip, jnp.bfloat16, 16, packed=chip == "v5e")
    kernels = [line for line in compiled.as_text().splitlines() if "tpu_custom_call" in line]
    assert any("cema_forward" in line for line in kernels)
    assert any("cema_backward" in line for line in kernels)


@pytest.mark.slow
def test_float32_and_large_orders_compile():
    assert "cema_backward" in compile_gradient("v6e", jnp.float32, 24, packed=False).as_text()


def test_tables_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="N can be up to 16"):
        compile_gradient("v4", jnp.bfloat16, 17, packed=False)
