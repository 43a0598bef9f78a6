"""CEMA, TimestepNorm and attention on a sequence sharded over four devices, against one device."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels.cema import CemaParams, cema
from pallas_kernels.chunk_attention import chunk_attention
from pallas_kernels.timestep_norm import TimestepNormState, timestep_norm

SHARDS, LENGTH = 4, 32
ROWS = PartitionSpec(None, "chunk")
# (segment id, tokens): documents that begin and end within sequence shards or fill them, and
# padding of a whole shard.
DOCUMENTS = [
    [(1, 32)],
    [(1, 5), (2, 22), (3, 5)],
    [(1, 7), (0, 10), (2, 9), (0, 6)],
    [(0, 8), (1, 8), (2, 1), (3, 15)],
]


def segment_ids():
    return jnp.asarray(
        [np.concatenate([np.full(n, number) for number, n in row]) for row in DOCUMENTS], jnp.int32
    )


def positions_of(ids):
    ids = np.asarray(ids)
    positions = np.zeros_like(ids)
    for row, row_ids in enumerate(ids):
        for t in range(1, len(row_ids)):
            same = row_ids[t] == row_ids[t - 1]
            positions[row, t] = positions[row, t - 1] + 1 if same else 0
    return jnp.asarray(positions)


def sharded_over_sequence(function, specs):
    mesh = Mesh(np.array(jax.devices()[:SHARDS]), ("chunk",))
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=ROWS, check_vma=False)


def run_both(function, sharded, arguments, specs):
    """Outputs and gradients on one device and on four."""
    rng = np.random.default_rng(5)
    shape = jax.eval_shape(function, *arguments).shape
    weights = jnp.asarray(rng.normal(size=shape), jnp.float32)

    def run(f):
        def total(*arguments):
            y = f(*arguments)
            return jnp.sum(y * weights), y

        which = tuple(i for i, a in enumerate(arguments) if jnp.issubdtype(a.dtype, jnp.floating))
        (_, y), gradients = jax.jit(jax.value_and_grad(total, which, has_aux=True))(*arguments)
        return [y, *gradients]

    return run(function), run(sharded_over_sequence(sharded, specs))


def check(pairs, tolerance=3e-6):
    for expected, sharded in zip(*pairs, strict=True):
        size = np.linalg.norm(expected)
        assert np.linalg.norm(np.asarray(sharded) - expected) <= tolerance * size


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# Packed documents cover the rows of one document.
PACKED = [pytest.param(False, marks=pytest.mark.slow), True]


@pytest.mark.slow
@pytest.mark.parametrize("packed", PACKED)
def test_cema(packed: bool):
    D, N = 3, 2
    x, ids = normal(0, len(DOCUMENTS), LENGTH, D), segment_ids()
    params = (normal(1, D, N), normal(2, D, N) - 2, normal(3, D), normal(4, D, N, 2), normal(5, D))

    def run(axis):
        def y(x, ids, *params):
            ids = ids if packed else None
            return cema(x, CemaParams(*params), segment_ids=ids, sequence_axis=axis).y

        return y

    specs = (ROWS, ROWS, *[PartitionSpec()] * 5)
    check(run_both(run(None), run("chunk"), (x, ids, *params), specs))


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("count", [0, 5])
@pytest.mark.slow
def test_timestep_norm(packed: bool, count: int):
    D, G = 8, 2
    x, ids = normal(0, len(DOCUMENTS), LENGTH, D) + 3, segment_ids()
    parameters = normal(1, D), normal(2, D), normal(3, G), jnp.exp(normal(4, G))

    def run(axis):
        def y(x, ids, scale, bias, mean, var):
            prior = TimestepNormState(jnp.int32(count), mean, var)
            ids = ids if packed else None
            return timestep_norm(
                x, scale, bias, num_groups=G, prior=prior, segment_ids=ids, sequence_axis=axis
            ).y

        return y

    specs = (ROWS, ROWS, *[PartitionSpec()] * 4)
    expected, sharded = run_both(run(None), run("chunk"), (x, ids, *parameters), specs)
    if count == 0:
        # A prior of 0 tokens has no gradient.
        expected, sharded = expected[:-2], sharded[:-2]
    check((expected, sharded), 2e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_chunk_attention(packed: bool):
    B, H, C = len(DOCUMENTS), 2, 8
    q, k, v = (normal(i, B, LENGTH, H, 4) for i in range(3))
    ids = segment_ids()

    def run(axis):
        def out(q, k, v, ids, positions):
            packing = {"segment_ids": ids, "positions": positions} if packed else {}
            return chunk_attention(q, k, v, chunk_size=C, sequence_axis=axis, **packing).out

        return out

    check(run_both(run(None), run("chunk"), (q, k, v, ids, positions_of(ids)), (ROWS,) * 5))


def test_shards_without_whole_chunks_are_rejected():
    x = jnp.zeros((1, 6, 1, 2))
    with pytest.raises(ValueError, match=r"6 tokens.*chunk.* 4"):
        chunk_attention(x, x, x, chunk_size=4, sequence_axis="chunk")
    positions = jnp.zeros((1, 6), jnp.int32)
    with pytest.raises(ValueError, match=r"6 tokens.*chunk.* 8"):
        chunk_attention(x, x, x, chunk_size=8, positions=positions, sequence_axis="chunk")
