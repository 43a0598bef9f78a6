"""GPU kernels under context parallelism, against the reference on whole rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import mosaic_gpu
from pallas_kernels.common.target import interpreted
from pallas_kernels.timestep_norm import TimestepNormState, timestep_norm
from tests.kernels.context_parallel import (
    at_last_shard,
    from_shards,
    one_shard_at_a_time,
    to_shards,
)

SHARDS, GROUPS, LENGTH = 3, 2, 768
# Rows over three sequence shards in splits of 128: documents that end within a shard, at its end
# and at a split's, a document over all shards; padding at either end of a row, inside a document,
# and in a whole shard.
ROWS = [
    [(1, 100), (2, 540), (3, 128)],
    [(0, 130), (1, 126), (2, 200), (0, 100), (2, 212)],
    [(1, 200), (0, 312), (1, 100), (0, 156)],
]


each_implementation = pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])


def segment_ids():
    return jnp.asarray([np.concatenate([np.full(n, i) for i, n in row]) for row in ROWS])


@pytest.fixture
def sequential_shards(monkeypatch):
    """The interpreter knows one device: kernels of different shards run one after another."""
    monkeypatch.setattr(mosaic_gpu, "launch", one_shard_at_a_time(mosaic_gpu.launch))
    # Every shard has two splits.
    monkeypatch.setattr("pallas_kernels.timestep_norm.mosaic_gpu.block_sizes.MIN_SPLIT_TILES", 1)


def outputs_and_gradients(x, cotangents, parameters, ids, count, axis, **options):
    """y, then gradients of x, scale, bias and the prior's moments; no count: no prior."""

    def run(x, ids, d_y, d_mean, d_var):
        def loss(x, scale, bias, mean, var):
            prior = None if count is None else TimestepNormState(jnp.int32(count), mean, var)
            y, final_state = timestep_norm(
                x, scale, bias, num_groups=GROUPS, segment_ids=ids, sequence_axis=axis,
                prior=prior, **options,
            )  # fmt: skip
            of_state = jnp.sum(final_state.mean * d_mean) + jnp.sum(final_state.var * d_var)
            return jnp.sum(y * d_y) + of_state, y

        (_, y), gradients = jax.value_and_grad(loss, (0, 1, 2, 3, 4), has_aux=True)(x, *parameters)
        return y, *gradients

    if axis is None:
        return jax.jit(run)(x, ids, *cotangents)
    of_state = [at_last_shard(a, SHARDS) for a in cotangents[1:]]
    shards = [to_shards(a, SHARDS) for a in (x, ids, cotangents[0])]
    axes = [None if a is None else 0 for a in (*shards, *of_state)]
    over_shards = jax.jit(jax.vmap(run, axis_name=axis, in_axes=axes))
    y, dx, *others = over_shards(*shards, *of_state)
    return from_shards(y), from_shards(dx), *(a.sum(axis=0) for a in others)


@pytest.fixture(autouse=True)
def installed(request):
    if request.node.callspec.params["implementation"] == "triton":
        pytest.importorskip("triton", reason="needs the extra: pip install -e '.[triton]'")


@pytest.mark.slow
@each_implementation
@pytest.mark.parametrize(("packed", "count"), [(False, 0), (True, 5), (True, None)])
def test_shards_equal_the_reference(implementation, packed, count, sequential_shards):
    rng = np.random.default_rng(3)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    ids = segment_ids() if packed else None
    rows, width = len(ROWS) if packed else 1, 32
    x = normal(rows, LENGTH, width) + 3
    parameters = normal(width), normal(width), normal(GROUPS), jnp.exp(normal(GROUPS))
    cotangents = normal(rows, LENGTH, width), 9 * normal(rows, GROUPS), 9 * normal(rows, GROUPS)
    arguments = (x, cotangents, parameters, ids, count)
    expected = outputs_and_gradients(*arguments, None, implementation="reference")
    with interpreted():
        actual = outputs_and_gradients(*arguments, "chunk", implementation=implementation)
    names = ("y", "x", "scale", "bias", "mean", "var")
    for name, a, b in zip(names, actual, expected, strict=True):
        if not count and name in ("mean", "var"):
            # A prior with a count of 0 has no gradient.
            continue
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error <= 1e-5, (name, error)


@pytest.mark.slow
@each_implementation
def test_documents_do_not_affect_other_shards(implementation, sequential_shards):
    ids = jnp.asarray([[1] * 128 + [2] * 640])
    x = jnp.asarray(np.random.default_rng(4).normal(size=(1, LENGTH, 32)), jnp.float32)
    ones = jnp.ones(32)

    @jax.jit
    def outputs(x):
        def of_shard(x, ids):
            return timestep_norm(
                x, ones, ones, num_groups=GROUPS, segment_ids=ids, sequence_axis="chunk",
                implementation=implementation,
            ).y  # fmt: skip

        over_shards = jax.vmap(of_shard, axis_name="chunk")
        return from_shards(over_shards(to_shards(x, SHARDS), to_shards(ids, SHARDS)))

    with interpreted():
        expected, actual = outputs(x)[:, 128:], outputs(x.at[:, :128].set(jnp.nan))[:, 128:]
    np.testing.assert_array_equal(actual, expected)
