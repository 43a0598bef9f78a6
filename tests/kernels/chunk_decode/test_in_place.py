"""Programs that decode in a scan update the donated caches without copies of them."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.chunk_attention import KeyValueCache
from pallas_kernels.chunk_decode import chunk_decode
from tests.kernels.chunk_decode.definition import shared_shapes
from tests.kernels.in_place import copies_of, temporary_share
from tests.topologies import compile_for, h200_device

# The widths of mega200M.
SLOTS, DK, DV = 2048, 256, 2048


def compile_decoding(
    device, dtype, implementation, *, rows, cache_rows, layers, slots=None, is_shared=False
):
    """A scan of 8 tokens over the caches of several layers, which are donated.

    `slots` gives the shapes of keys or values of some rows, heads, slots and a width; `is_shared`
    gives a shared representation in place of queries and keys.
    """

    def decode(q, k, v, caches, positions):
        def step(carry, _):
            caches, positions = carry
            outs = []
            for i, cache in enumerate(caches):
                out, caches[i] = chunk_decode(
                    q, k, v, cache, positions, implementation=implementation
                )
                outs.append(out)
            return (caches, positions + 1), sum(outs)

        return jax.lax.scan(step, (caches, positions), length=8)

    def shape(*dims):
        return jax.ShapeDtypeStruct(dims, dtype)

    q, v = shape(rows, 1, DK), shape(rows, 1, DV)
    slots = slots or shape
    cache = KeyValueCache(slots(cache_rows, 1, SLOTS, DK), slots(cache_rows, 1, SLOTS, DV))
    positions = jax.ShapeDtypeStruct((rows,), jnp.int32)
    caches = [cache] * layers
    q, k = (shared_shapes(rows, 1, DK), None) if is_shared else (q, q)
    compiled = compile_for(device, decode, q, k, v, caches, positions, donate_argnums=3)
    return compiled, caches


def check_in_place(compiled, caches, share=0.02):
    # Scales have three axes, and other small arrays have their size.
    assert not copies_of(compiled, {a.shape for a in jax.tree.leaves(caches) if len(a.shape) == 4})
    measured = temporary_share(compiled, caches)
    print(f"temporaries and outputs: {measured:.2%} of the caches")
    assert measured <= share


@pytest.mark.parametrize("cache_rows", [2, 3])
def test_cpu(cache_rows):
    """A step of the loop over slots needs 6% of one layer's cache."""
    device = jax.devices("cpu")[0]
    check_in_place(
        *compile_decoding(device, jnp.float32, None, rows=2, cache_rows=cache_rows, layers=4)
    )


@pytest.mark.parametrize("cache_rows", [8, 9])
@pytest.mark.slow
def test_kernels_on_an_h200(cache_rows):
    check_in_place(
        *compile_decoding(
            h200_device(), jnp.bfloat16, "mosaic_gpu", rows=8, cache_rows=cache_rows, layers=4,
            is_shared=cache_rows == 9,
        )
    )  # fmt: skip


def test_xla_on_an_h200():
    device = h200_device()
    check_in_place(*compile_decoding(device, jnp.bfloat16, "xla", rows=8, cache_rows=8, layers=2))
