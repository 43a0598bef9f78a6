"""TimestepNorm's GPU kernels, interpreted where there is no such GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common.devices import HOPPER
from pallas_kernels.common.target import Target, find_target, interpreted
from pallas_kernels.timestep_norm import TimestepNormState, api, timestep_norm
from tests.topologies import compile_for, h200_device, ptxas_usage

# Three splits of a tile each; groups of 12 features are padded to 16, two of 16 share a block.
WHOLE, PACKED = (2, 384, 32, 2), (4, 300, 24, 2)
COUNTS = {"prior": jnp.asarray(2, jnp.int32)}


each_implementation = pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])


@pytest.fixture(autouse=True)
def runnable(monkeypatch, request):
    arguments = getattr(getattr(request.node, "callspec", None), "params", {})
    is_triton = arguments.get("implementation") == "triton"
    if is_triton:
        pytest.importorskip("triton", reason="needs the extra: pip install -e '.[triton]'")
    monkeypatch.setattr("pallas_kernels.timestep_norm.mosaic_gpu.block_sizes.MIN_SPLIT_TILES", 1)
    if find_target().is_hopper or (is_triton and find_target().platform == "gpu"):
        yield
        return
    with interpreted():
        yield


def relative(actual, expected):
    expected = np.asarray(expected, np.float64)
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)


@functools.partial(jax.jit, static_argnames=("num_groups", "implementation"))
def differentiate(arrays, counts, cotangents, segment_ids, *, num_groups, implementation):
    """(y, mean, var), the final count, and gradients of all arrays."""

    def run(arrays):
        initial_state, prior = (
            TimestepNormState(counts[name], *arrays[name]) for name in ("initial_state", "prior")
        )
        result = timestep_norm(
            *(arrays[name] for name in ("x", "scale", "bias")),
            num_groups=num_groups,
            initial_state=initial_state,
            prior=prior,
            segment_ids=segment_ids,
            implementation=implementation,
        )
        return (result.y, *result.final_state[1:]), result.final_state.count

    outputs, pull_back, count = jax.vjp(run, arrays, has_aux=True)
    return outputs, count, pull_back(cotangents)[0]


def draw(shape, *, offset=0.0):
    """Arrays, counts of their states, and cotangents: float64 with float32 values."""
    B, L, D, G = shape
    rng = np.random.default_rng(L)

    def moments(*shape):
        return offset + rng.normal(size=shape), rng.uniform(0.5, 2, shape)

    x = offset + rng.normal(size=(B, L, D)) * rng.uniform(0.5, 2, (B, 1, D))
    arrays = {
        "x": x,
        "scale": rng.normal(1, 0.3, D),
        "bias": rng.normal(size=D),
        "initial_state": moments(B, G),
        "prior": moments(G),
    }
    cotangents = (rng.normal(size=(B, L, D)), rng.normal(size=(B, G)), rng.normal(size=(B, G)))
    counts = COUNTS | {"initial_state": jnp.asarray([0, 900, 4, 3][:B], jnp.int32)}
    arrays, cotangents = jax.tree.map(
        lambda a: a.astype(np.float32).astype(np.float64), (arrays, cotangents)
    )
    return arrays, counts, cotangents


def single(tree):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)


def pack():
    """Documents that begin and end inside tiles, at tile boundaries, and after padding."""
    B, L, _, _ = PACKED
    ids = np.zeros((B, L), np.int32)
    ids[0] = np.repeat([1, 2, 3], [128, 1, L - 129])
    ids[1, 5:290] = np.repeat([1, 2, 3], [50, 1, 234])
    ids[1, [20, 150, 151]] = 0
    ids[2] = 1
    return ids


# The interpreter takes most of these tests' time: equal calls share their result.
@functools.cache
def by_kernels(shape, offset, implementation):
    """Results of the kernels for `draw(shape, offset)`, packed if the shape is `PACKED`."""
    arrays, counts, cotangents = draw(shape, offset=offset)
    segment_ids = jnp.asarray(pack()) if shape == PACKED else None
    return differentiate(
        single(arrays), counts, single(cotangents), segment_ids, num_groups=shape[3],
        implementation=implementation,
    )  # fmt: skip


def assert_equals_float64(shape, segment_ids, *, offset, implementation):
    arrays, counts, cotangents = draw(shape, offset=offset)
    with jax.enable_x64(True):
        double = jax.tree.map(jnp.asarray, (arrays, cotangents))
        expected = differentiate(
            double[0], counts, double[1], segment_ids, num_groups=shape[3], implementation="xla"
        )
        assert expected[0][0].dtype == jnp.float64
        expected = jax.tree.map(np.asarray, expected)
    actual = by_kernels(shape, offset, implementation)
    np.testing.assert_array_equal(actual[1], expected[1])
    for a, b in zip(actual[0], expected[0], strict=True):
        assert relative(a, b) <= 1e-6
    for name, gradients in expected[2].items():
        for a, b in zip(jax.tree.leaves(actual[2][name]), jax.tree.leaves(gradients), strict=True):
            if np.any(b):
                assert relative(a, b) <= 5e-6, name
            else:  # No document starts from the prior in a row of one document.
                assert not np.any(a), name
    return actual


@pytest.mark.slow
@each_implementation
@pytest.mark.parametrize("offset", [2.0, 1000.0])
def test_equals_float64(offset, implementation):
    assert_equals_float64(WHOLE, None, offset=offset, implementation=implementation)


@pytest.mark.slow
@each_implementation
def test_packed_rows_equal_float64(implementation):
    ids = pack()
    (y, mean, var), count, grads = assert_equals_float64(
        PACKED, jnp.asarray(ids), offset=2.0, implementation=implementation
    )
    assert not np.asarray(y)[ids == 0].any()
    assert not np.asarray(grads["x"])[ids == 0].any()
    # The last row is padding alone.
    arrays, counts, cotangents = draw(PACKED, offset=2.0)
    moments = arrays["initial_state"]
    initial_state = single((counts["initial_state"][3], *(moment[3] for moment in moments)))
    for a, b in zip((count, mean, var), initial_state, strict=True):
        np.testing.assert_array_equal(a[3], b)
    for a, b in zip(grads["initial_state"], single(cotangents[1:]), strict=True):
        np.testing.assert_array_equal(a[3], b[3])


# The interpreter warns of 1e30 squared, in a document that is not compared.
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.slow
@each_implementation
def test_documents_and_padding_do_not_affect_other_documents(implementation):
    arrays, counts, cotangents = draw(PACKED, offset=2.0)
    arrays, cotangents, ids = single(arrays), single(cotangents), pack()
    # Only rows 0 and 1 change: row 2 is a single document, row 3 padding alone.
    first = (ids == 1) & (np.arange(len(ids)) < 2)[:, None]
    padding = (ids == 0) & (np.arange(len(ids)) < 3)[:, None]

    def change(value):
        value = jnp.where(first[..., None], value * 1e30, value)
        return jnp.where(padding[..., None], np.nan, value)

    changed = differentiate(
        arrays | {"x": change(arrays["x"])}, counts, (change(cotangents[0]), *cotangents[1:]),
        jnp.asarray(ids), num_groups=PACKED[3], implementation=implementation,
    )  # fmt: skip

    def outputs_of_others(result):
        (y, mean, var), _, grads = result
        assert not np.asarray(y)[ids == 0].any()
        assert not np.asarray(grads["x"])[ids == 0].any()
        others = (ids != 0) & ~first
        return [np.asarray(a)[others] for a in (y, grads["x"])] + [*map(np.asarray, (mean, var))]

    expected = outputs_of_others(by_kernels(PACKED, 2.0, implementation))
    for a, b in zip(outputs_of_others(changed), expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@each_implementation
def test_bfloat16_is_rounded_once(implementation):
    arrays, counts, cotangents = draw(WHOLE, offset=4.0)
    arrays, cotangents = single(arrays), single(cotangents)
    x, dy = (a.astype(jnp.bfloat16) for a in (arrays["x"], cotangents[0]))
    results = (
        differentiate(
            arrays | {"x": x.astype(dtype)},
            counts,
            (dy.astype(dtype), *cotangents[1:]),
            None,
            num_groups=WHOLE[3],
            implementation=implementation,
        )
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    (outputs, _, grads), (wide_outputs, _, wide_grads) = results
    assert outputs[0].dtype == grads["x"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(outputs[0], wide_outputs[0].astype(jnp.bfloat16))
    np.testing.assert_array_equal(grads["x"], wide_grads["x"].astype(jnp.bfloat16))
    np.testing.assert_array_equal(outputs[2], wide_outputs[2])
    np.testing.assert_array_equal(grads["scale"], wide_grads["scale"])


def test_unsupported_inputs_are_refused():
    def run(D, G, dtype):
        ones = jnp.ones(D)
        return timestep_norm(
            jnp.ones((1, 8, D), dtype), ones, ones, num_groups=G, implementation="mosaic_gpu"
        )

    with pytest.raises(ValueError, match=r"at most 64 features, x is bfloat16 with groups of 128"):
        run(256, 2, jnp.bfloat16)
    with pytest.raises(ValueError, match="x is float16"):
        run(32, 2, jnp.float16)


def test_chosen_on_hopper_where_it_is_faster(monkeypatch):
    hopper = Target("gpu", "NVIDIA H200")
    monkeypatch.setattr(api, "find_target", lambda: hopper)
    monkeypatch.setattr("pallas_kernels.common.target.find_target", lambda: hopper)

    def chooses_kernels(L, dtype, G):
        x, ones = jnp.ones((1, L, 64), dtype), jnp.ones(64)
        program = jax.make_jaxpr(
            lambda x: timestep_norm(x, ones, ones, num_groups=G, segment_ids=None).y
        )(x)
        return "timestep_norm_outputs" in str(program)

    assert chooses_kernels(512, jnp.bfloat16, 2)
    assert not chooses_kernels(1, jnp.bfloat16, 2)
    assert not chooses_kernels(512, jnp.float32, 2)
    assert not chooses_kernels(512, jnp.bfloat16, 8)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "packed"])
@pytest.mark.parametrize("shape", [(1, 16_384, 4096, 64), (1, 131_072, 1024, 32)])
def test_compiles_for_an_h200_with_next_to_no_spilling(kind, shape, monkeypatch):
    B, L, D, G = shape
    monkeypatch.setattr("pallas_kernels.timestep_norm.mosaic_gpu.op.interpret_params", lambda: None)

    def both_passes(x, scale, bias, dy, ids):
        def run(x, scale, bias):
            return timestep_norm(
                x, scale, bias, num_groups=G, segment_ids=ids, implementation="mosaic_gpu"
            ).y

        y, pull_back = jax.vjp(run, x, scale, bias)
        return y, pull_back(dy)

    x = jax.ShapeDtypeStruct((B, L, D), jnp.bfloat16)
    vector = jax.ShapeDtypeStruct((D,), jnp.float32)
    ids = jax.ShapeDtypeStruct((B, L), jnp.int32) if kind == "packed" else None
    compiled = compile_for(h200_device(), both_passes, x, vector, vector, x, ids)
    usage = ptxas_usage(compiled)
    for kernel in usage:
        print(f"{kind}: {kernel.name} {kernel.registers} registers, {kernel.spill_bytes} B spilled")
    names = {kernel.name for kernel in usage}
    assert names == {
        f"timestep_norm_{name}" for name in ("moments", "outputs", "slopes", "gradients")
    }
    # CUDA 13.0's ptxas spills 16 bytes of timestep_norm_gradients, later versions none.
    assert sum(kernel.spill_bytes for kernel in usage) <= 16
    # Two warpgroups share a multiprocessor's registers.
    assert max(kernel.registers for kernel in usage) * 2 * 128 <= HOPPER.registers
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes <= 0.25 * L * D * 2
