"""Hopper's kernels on a sequence that several devices share, against the recurrence on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common.target import interpreted
from pallas_kernels.timestep_norm import (
    TimestepNormState,
    mosaic_gpu,
    mosaic_gpu_tiles,
    timestep_norm,
)
from tests.kernels.parts import at_last_part, from_parts, in_turn, to_parts

PARTS, GROUPS, LENGTH = 3, 2, 768
# Rows over three parts, in splits of 128: borders within parts, at theirs, at a split's, a document
# over all parts; padding at ends, at starts, inside a document, for a whole part.
RUNS = [
    [(1, 100), (2, 540), (3, 128)],
    [(0, 130), (1, 126), (2, 200), (0, 100), (2, 212)],
    [(1, 200), (0, 312), (1, 100), (0, 156)],
]


def segment_ids():
    return jnp.asarray([np.concatenate([np.full(n, i) for i, n in runs]) for runs in RUNS])


@pytest.fixture
def one_part_after_another(monkeypatch):
    monkeypatch.setattr(mosaic_gpu_tiles, "launch", in_turn(mosaic_gpu_tiles.launch))
    # Two splits of every part.
    monkeypatch.setattr(mosaic_gpu, "SHORTEST_SPLIT", 1)


def outputs_and_gradients(x, cotangents, parameters, ids, count, axis, **options):
    """y, then gradients of x, scale, bias and the prior's moments."""

    def run(x, ids, cot_y, cot_mean, cot_var):
        def total(x, scale, bias, mean, var):
            y, state = timestep_norm(
                x, scale, bias, num_groups=GROUPS, segment_ids=ids, sequence_axis=axis,
                prior=TimestepNormState(jnp.int32(count), mean, var), **options,
            )  # fmt: skip
            of_state = jnp.sum(state.mean * cot_mean) + jnp.sum(state.var * cot_var)
            return jnp.sum(y * cot_y) + of_state, y

        (_, y), gradients = jax.value_and_grad(total, (0, 1, 2, 3, 4), has_aux=True)(x, *parameters)
        return y, *gradients

    if axis is None:
        return jax.jit(run)(x, ids, *cotangents)
    states = [at_last_part(a, PARTS) for a in cotangents[1:]]
    split = [to_parts(a, PARTS) for a in (x, ids, cotangents[0])]
    axes = [None if a is None else 0 for a in (*split, *states)]
    over = jax.jit(jax.vmap(run, axis_name=axis, in_axes=axes))
    y, dx, *others = over(*split, *states)
    return from_parts(y), from_parts(dx), *(a.sum(axis=0) for a in others)


@pytest.mark.slow
@pytest.mark.parametrize(("packed", "count"), [(False, 0), (True, 5)])
def test_parts_equal_the_recurrence(packed, count, one_part_after_another):
    rng = np.random.default_rng(3)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    ids = segment_ids() if packed else None
    rows, width = len(RUNS) if packed else 1, 32
    x = normal(rows, LENGTH, width) + 3
    parameters = normal(width), normal(width), normal(GROUPS), jnp.exp(normal(GROUPS))
    cotangents = normal(rows, LENGTH, width), 9 * normal(rows, GROUPS), 9 * normal(rows, GROUPS)
    arguments = (x, cotangents, parameters, ids, count)
    due = outputs_and_gradients(*arguments, None, implementation="reference")
    with interpreted():
        found = outputs_and_gradients(*arguments, "chunk", implementation="mosaic_gpu")
    names = ("y", "x", "scale", "bias", "mean", "var")
    for name, mine, expected in zip(names, found, due, strict=True):
        if count == 0 and name in ("mean", "var"):
            # A prior of no tokens counts for nothing.
            continue
        error = np.linalg.norm(mine - expected) / np.linalg.norm(expected)
        assert error <= 1e-5, (name, error)


@pytest.mark.slow
def test_what_another_document_holds_stays_there(one_part_after_another):
    ids = jnp.asarray([[1] * 128 + [2] * 640])
    x = jnp.asarray(np.random.default_rng(4).normal(size=(1, LENGTH, 32)), jnp.float32)
    ones = jnp.ones(32)

    @jax.jit
    def outputs(x):
        def of_part(x, ids):
            return timestep_norm(
                x, ones, ones, num_groups=GROUPS, segment_ids=ids, sequence_axis="chunk",
                implementation="mosaic_gpu",
            ).y  # fmt: skip

        run = jax.vmap(of_part, axis_name="chunk")
        return from_parts(run(to_parts(x, PARTS), to_parts(ids, PARTS)))

    with interpreted():
        quiet, loud = outputs(x)[:, 128:], outputs(x.at[:, :128].set(jnp.nan))[:, 128:]
    np.testing.assert_array_equal(loud, quiet)
