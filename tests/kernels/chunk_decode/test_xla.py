"""The forms that plain JAX takes for a GPU and a TPU, on a CPU; rows sharded over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.chunk_attention import KeyValueCache
from pallas_kernels.chunk_decode import chunk_decode, xla
from pallas_kernels.common.target import Target
from tests.kernels.chunk_decode.definition import attend, make_inputs, poison, run

TARGETS = Target("gpu", "NVIDIA A100-SXM4-80GB"), Target("tpu", "TPU v5p")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("heads", "slots", "cache_rows"), [(1, 5, 4), (2, 48, 7), (3, 130, 4)])
def test_forms_for_other_devices_equal_the_definition(
    target, heads, slots, cache_rows, monkeypatch
):
    monkeypatch.setattr(xla, "find_target", lambda: target)
    positions = np.array([0, slots - 1, slots, slots + 1])
    inputs = make_inputs(4, heads, slots, 6, 10, cache_rows=cache_rows)
    poison(*inputs[3:], positions)
    gate = inputs[2] / 2
    with jax.enable_x64(True):
        got = run(inputs, positions, "xla", jnp.float64, gate)
    for value, expected in zip(got, attend(*inputs, positions, gate), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("target", [Target("cpu", "cpu"), *TARGETS])
def test_rows_sharded_over_devices_need_no_gather(target, monkeypatch):
    monkeypatch.setattr(xla, "find_target", lambda: target)
    positions = np.array([0, 5, 12, 3])
    inputs = make_inputs(4, 2, 6, 8, 16)
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))

    def decode(q, k, v, cache, positions):
        return chunk_decode(q, k, v, cache, positions, implementation="xla")

    q, k, v, key, value = (jax.device_put(jnp.asarray(a, jnp.float32), sharding) for a in inputs)
    row_positions = jax.device_put(jnp.asarray(positions, jnp.int32), sharding)
    compiled = (
        jax.jit(decode, donate_argnums=3)
        .lower(q, k, v, KeyValueCache(key, value), row_positions)
        .compile()
    )
    program = compiled.as_text() or ""
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert f"{collective}(" not in program, collective
    out, cache = compiled(q, k, v, KeyValueCache(key, value), row_positions)
    for got, expected in zip((out, *cache), attend(*inputs, positions), strict=True):
        assert got.sharding.is_equivalent_to(sharding, got.ndim)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
