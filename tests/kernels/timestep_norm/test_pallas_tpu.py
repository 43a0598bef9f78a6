"""TimestepNorm's TPU kernels, interpreted, against float64 and the definition."""

import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.dispatch import Implementation
from pallas_kernels.common.target import Target, interpreted
from pallas_kernels.timestep_norm import TimestepNormState, api, timestep_norm
from pallas_kernels.timestep_norm.pallas_tpu import block_sizes, op


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Short rows get several tiles, as long ones have."""
    monkeypatch.setattr(block_sizes, "_MAX_TOKENS", 128)


def relative(actual, expected):
    expected = np.asarray(expected, np.float64)
    norm = np.linalg.norm(expected)
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / (norm if norm else 1.0)


def draw(seed, B, L, D, G, *, offset=0.0, moments=()) -> Any:
    """Inputs by name and the cotangents of y, mean and var, float32 numbers in float64."""
    rng = np.random.default_rng(seed)
    inputs: Any = {
        "x": offset + rng.normal(size=(B, L, D)) * rng.uniform(0.5, 2, (B, 1, D)),
        "scale": rng.normal(1, 0.3, D),
        "bias": rng.normal(size=D),
    }
    for name in moments:
        shape = (B, G) if name == "initial_state" else (G,)
        inputs[name] = (rng.normal(size=shape), rng.uniform(0.5, 2, shape))
    cotangents = tuple(rng.normal(size=shape) for shape in ((B, L, D), (B, G), (B, G)))
    return jax.tree.map(lambda a: a.astype(np.float32).astype(np.float64), (inputs, cotangents))


# Calls of equal shapes share one compilation.
@functools.partial(jax.jit, static_argnames=("normalize", "groups"))
def _differentiate(inputs, cotangents, counts, ids, *, normalize, groups):
    def run(inputs):
        initial_state, prior = (
            TimestepNormState(counts[name], *inputs[name]) if name in inputs else None
            for name in ("initial_state", "prior")
        )
        y, final_state = normalize(
            inputs["x"], inputs["scale"], inputs["bias"],
            num_groups=groups, initial_state=initial_state, prior=prior, segment_ids=ids,
        )  # fmt: skip
        return (y, final_state.mean, final_state.var), final_state.count

    out, pull_back, count = jax.vjp(run, inputs, has_aux=True)
    return out, count, pull_back(cotangents)[0]


def differentiate(inputs, cotangents, *, normalize, groups, counts=None, ids=None):
    """(y, mean, var), the final count, and gradients of every input."""
    counts = {name: jnp.asarray(count, jnp.int32) for name, count in (counts or {}).items()}
    ids = None if ids is None else jnp.asarray(ids, jnp.int32)
    result = _differentiate(inputs, cotangents, counts, ids, normalize=normalize, groups=groups)
    return jax.tree.map(np.asarray, result)


_normalize_by_kernels = functools.partial(timestep_norm, implementation="pallas_tpu")
_normalize_by_definition = functools.partial(timestep_norm, implementation="reference")


def by_kernels(inputs, cotangents, dtype=jnp.float32, **options):
    inputs, cotangents = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (inputs, cotangents))
    inputs["x"], dy = inputs["x"].astype(dtype), cotangents[0].astype(dtype)
    cotangents = dy, *cotangents[1:]
    with interpreted():
        return differentiate(inputs, cotangents, normalize=_normalize_by_kernels, **options)


def exactly(inputs, cotangents, **options):
    with jax.enable_x64(True):
        return differentiate(inputs, cotangents, normalize=_normalize_by_definition, **options)


def assert_close(got, want, *, gradients=3e-6):
    for a, b in zip(got[0], want[0], strict=True):
        assert relative(a, b) <= 5e-7
    np.testing.assert_array_equal(got[1], want[1])
    for name, expected in want[2].items():
        for a, b in zip(jax.tree.leaves(got[2][name]), jax.tree.leaves(expected), strict=True):
            assert relative(a, b) <= gradients, name


@pytest.mark.slow
# Several groups in 128 channels, groups of several times 128 channels, padded groups.
@pytest.mark.parametrize(
    ("L", "D", "G"),
    [(300, 128, 2), (200, 256, 1), (129, 36, 3)],
)
def test_rows(L, D, G):
    inputs, cotangents = draw(L, 2, L, D, G, offset=2.0, moments=["initial_state"])
    options = {"groups": G, "counts": {"initial_state": np.array([0, 7])}}
    got = by_kernels(inputs, cotangents, **options)
    assert_close(got, exactly(inputs, cotangents, **options))


def lay_out(lengths_by_row, L):
    """Segment ids of documents laid end to end; id 0 is padding."""
    ids = np.zeros((len(lengths_by_row), L), np.int32)
    for row, documents in enumerate(lengths_by_row):
        at = 0
        for number, length in documents:
            ids[row, at : at + length] = number
            at += length
    return ids


PACKED = (
    [(1, 100), (2, 28), (3, 1), (4, 1), (5, 170)],
    [(0, 30), (1, 40), (0, 80), (1, 50), (2, 7), (0, 93)],
    [(0, 300)],
)


@pytest.mark.slow
def test_packed_documents():
    L, D, G = 300, 128, 2
    ids = lay_out(PACKED, L)
    inputs, cotangents = draw(1, 3, L, D, G, offset=2.0, moments=["initial_state", "prior"])
    options = {
        "groups": G,
        "ids": ids,
        "counts": {"initial_state": np.array([9, 0, 4]), "prior": 3},
    }
    got = by_kernels(inputs, cotangents, **options)
    assert_close(got, exactly(inputs, cotangents, **options))
    assert not got[0][0][ids == 0].any()
    # A row of padding alone returns its initial state.
    for i in range(2):
        np.testing.assert_array_equal(got[0][1 + i][2], inputs["initial_state"][i][2])
        np.testing.assert_array_equal(got[2]["initial_state"][i][2], cotangents[1 + i][2])

    # The values at padding do not matter.
    padding = (ids == 0)[..., None]
    inputs["x"] = np.where(padding, np.nan, inputs["x"])
    with_nan = by_kernels(
        inputs, (np.where(padding, np.inf, cotangents[0]), *cotangents[1:]), **options
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(with_nan), strict=True):
        np.testing.assert_array_equal(a, b)


def test_documents_do_not_affect_each_other():
    L, D, G = 300, 128, 2
    ids = lay_out([[(1, 70), (2, 160), (3, 70)], [(1, 128), (2, 128), (3, 44)]], L)
    others = (ids != 2)[..., None]
    inputs, cotangents = draw(2, 2, L, D, G)
    disturbed = {**inputs, "x": np.where(others, inputs["x"] * np.inf, inputs["x"])}
    d_others = np.where(others, cotangents[0] * np.inf, cotangents[0])
    options = {"groups": G, "ids": ids}
    expected = by_kernels(inputs, cotangents, **options)
    actual = by_kernels(disturbed, (d_others, *cotangents[1:]), **options)
    assert not np.isfinite(actual[2]["x"]).all()
    for a, b in ((actual[0][0], expected[0][0]), (actual[2]["x"], expected[2]["x"])):
        np.testing.assert_array_equal(a[ids == 2], b[ids == 2])
        assert a[ids == 2].any(axis=-1).all()


@pytest.mark.slow
def test_pieces_with_state_equal_the_whole():
    L, D, G = 270, 128, 2
    inputs, cotangents = draw(3, 1, L, D, G, offset=1.0)
    want = exactly(inputs, cotangents, groups=G)
    first, _ = jax.tree.map(jnp.float32, (inputs, cotangents))
    y, state = [], None
    with interpreted():
        for piece in (slice(0, 135), slice(135, 270)):
            x = first["x"][:, piece]
            out, state = timestep_norm(
                x, first["scale"], first["bias"], num_groups=G, initial_state=state,
                implementation="pallas_tpu",
            )  # fmt: skip
            y.append(out)
    assert relative(np.concatenate(y, axis=1), want[0][0]) <= 5e-7
    assert state is not None
    np.testing.assert_array_equal(state.count, want[1])
    assert relative(state.mean, want[0][1]) <= 5e-7
    assert relative(state.var, want[0][2]) <= 5e-7


@pytest.mark.slow
def test_rows_far_from_zero_are_accurate():
    L, D, G = 1000, 128, 2
    inputs, cotangents = draw(4, 1, L, D, G, offset=1000.0)
    ids = np.ones((1, L), np.int32)
    assert_close(
        by_kernels(inputs, cotangents, groups=G, ids=ids),
        exactly(inputs, cotangents, groups=G),
        gradients=1e-6,
    )


@pytest.mark.slow
def test_bfloat16_rounds_only_the_result():
    L, D, G = 200, 128, 2
    inputs, cotangents = draw(5, 1, L, D, G, offset=4.0)
    inputs["x"] = np.asarray(jnp.asarray(inputs["x"], jnp.bfloat16), np.float64)
    dy = np.asarray(jnp.asarray(cotangents[0], jnp.bfloat16), np.float64)
    cotangents = (dy, *cotangents[1:])
    got = by_kernels(inputs, cotangents, dtype=jnp.bfloat16, groups=G)
    wide = by_kernels(inputs, cotangents, groups=G)
    assert got[0][0].dtype == got[2]["x"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(got[0][0], wide[0][0].astype(jnp.bfloat16))
    np.testing.assert_array_equal(got[2]["x"], wide[2]["x"].astype(jnp.bfloat16))
    np.testing.assert_array_equal(got[0][2], wide[0][2])
    np.testing.assert_array_equal(got[2]["scale"], wide[2]["scale"])


@pytest.mark.slow
def test_no_races_and_nothing_uninitialized(capfd):
    L, D, G = 300, 256, 4
    ids = lay_out([[(1, 100), (2, 150), (0, 50)]], L)
    inputs, cotangents = draw(6, 1, L, D, G, offset=2.0, moments=["initial_state", "prior"])
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")

    def normalize(x, scale, bias, *, num_groups, initial_state, prior, segment_ids):
        return op.timestep_norm(
            x, scale, bias, num_groups, 1e-5, initial_state, prior, segment_ids,
            interpret=interpret,
        )  # fmt: skip

    options = {"groups": G, "ids": ids, "counts": {"initial_state": np.array([5]), "prior": 2}}
    single = jax.tree.map(jnp.float32, (inputs, cotangents))
    got = differentiate(*single, normalize=normalize, **options)
    # The interpreter prints what it finds.
    assert "RACE" not in capfd.readouterr().out
    assert_close(got, exactly(inputs, cotangents, **options))


def test_unsupported_inputs_are_refused():
    ones = jnp.ones(4)
    options: Any = {"num_groups": 2, "implementation": "pallas_tpu"}
    with pytest.raises(ValueError, match="pallas_tpu needs a TPU"):
        timestep_norm(jnp.ones((1, 3, 4)), ones, ones, **options)
    with interpreted():
        with pytest.raises(ValueError, match="x is float16"):
            timestep_norm(jnp.ones((1, 3, 4), jnp.float16), ones, ones, **options)
        wide = jax.ShapeDtypeStruct((1, 128, 2**15), jnp.float32)
        vector = jax.ShapeDtypeStruct((2**15,), jnp.float32)
        with pytest.raises(ValueError, match=r"groups of 16384 features .* do not fit"):
            jax.eval_shape(lambda *a: timestep_norm(*a, **options), wide, vector, vector)


V5E = Target("tpu", "TPU v5 lite")


@pytest.mark.parametrize(
    ("target", "shape", "groups", "dtype", "choice"),
    [
        (V5E, (1, 4096, 4096), 64, jnp.bfloat16, "pallas_tpu"),
        (V5E, (1, 4096, 4096), 64, jnp.float32, "pallas_tpu"),
        (V5E, (1, 4096, 4096), 64, jnp.float16, "xla"),
        (V5E, (8, 1, 4096), 64, jnp.bfloat16, "xla"),
        (V5E, (1, 4096, 2**15), 1, jnp.bfloat16, "xla"),
        (V5E, (1, 4096, 12), 3, jnp.bfloat16, "xla"),
        (Target("tpu", "TPU v4"), (1, 4096, 1024), 32, jnp.bfloat16, "pallas_tpu"),
        (Target("tpu", "TPU of the future"), (1, 4096, 1024), 32, jnp.bfloat16, "xla"),
        (Target("gpu", "NVIDIA A100"), (1, 4096, 1024), 32, jnp.bfloat16, "xla"),
    ],
)
def test_choice(target, shape, groups, dtype, choice, monkeypatch):
    monkeypatch.setattr(api, "find_target", lambda: target)
    assert api._choose_implementation(jax.ShapeDtypeStruct(shape, dtype), groups) == choice


def test_every_implementation_can_be_named():
    assert set(api.IMPLEMENTATIONS) == set(get_args(Implementation))


@pytest.mark.parametrize("features", [1, 8, 24, 64, 100, 128, 300, 2048])
@pytest.mark.parametrize("groups", [1, 2, 6, 32, 64])
def test_blocks_cover_all_groups(features, groups, monkeypatch):
    monkeypatch.undo()
    blocks = block_sizes.choose_blocks(5000, groups, features, 2)
    assert blocks is not None
    assert blocks.channels % 128 == 0
    assert blocks.tokens % 128 == 0
    assert blocks.features >= features
    assert blocks.padded_groups >= groups
    assert blocks.padded_groups % blocks.groups == 0
