"""The Hopper kernels, in their interpreter where there is no such GPU, against float64."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.chunk_attention import (
    AttentionDropout,
    KeyValueCache,
    api,
    chunk_attention,
)
from pallas_kernels.common.target import Target, find_target, interpreted
from tests.topologies import compile_for, h200_device, ptxas_usage

# Outputs and weights are rounded to bfloat16, 1.7e-3 each, gradients of scores once more.
LARGEST_ERROR = {"out": 3e-3, "q": 4e-3, "k": 4e-3, "v": 3e-3}


@pytest.fixture(autouse=True)
def runnable():
    if find_target().is_hopper:
        yield
        return
    with interpreted():
        yield


def places_of(*runs):
    """positions and segment ids of one row from runs (id, first position, length)."""
    positions = [np.arange(first, first + length) for _, first, length in runs]
    ids = [np.full(length, number) for number, _, length in runs]
    return tuple(jnp.asarray(np.concatenate(part)[None], jnp.int32) for part in (positions, ids))


def random_operands(rows, length, heads, key_width, value_width, seed=0):
    rng = np.random.default_rng(seed)
    widths = {"q": key_width, "k": key_width, "v": value_width, "do": value_width}
    return {
        name: jnp.asarray(rng.normal(size=(rows, length, heads, width)), jnp.bfloat16)
        for name, width in widths.items()
    }


def run(operands, implementation, dtype, **places):
    with jax.enable_x64(dtype == jnp.float64):

        @jax.jit
        def both_passes(q, k, v, do):
            def attend(q, k, v):
                return chunk_attention(
                    q * q.shape[-1] ** -0.5, k, v, implementation=implementation, **places
                ).out

            out, pull_back = jax.vjp(attend, q, k, v)
            return dict(zip("qkv", pull_back(do), strict=True)) | {"out": out}

        cast = {name: value.astype(dtype) for name, value in operands.items()}
        return {name: np.asarray(a, np.float64) for name, a in both_passes(**cast).items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "heads", "widths", "chunk_size", "runs"),
    [
        (450, 1, (64, 64), 384, None),
        (300, 1, (64, 320), 100, None),
        (300, 2, (96, 64), 130, [(1, 0, 140), (0, 0, 3), (2, 0, 1), (3, 60, 150), (0, 0, 6)]),
    ],
)
def test_equals_float64(length, heads, widths, chunk_size, runs):
    operands = random_operands(1, length, heads, *widths)
    places = {"chunk_size": chunk_size}
    if runs is not None:
        places["positions"], places["segment_ids"] = places_of(*runs)
    want = run(operands, "reference", jnp.float64, **places)
    got = run(operands, "mosaic_gpu", jnp.bfloat16, **places)
    for name, allowed in LARGEST_ERROR.items():
        error = np.linalg.norm(got[name] - want[name]) / np.linalg.norm(want[name])
        assert error <= allowed, (name, error)


@pytest.mark.slow
def test_scores_far_from_zero_are_repaired():
    """Weights exp2(score) alone would overflow; the interpreter says so."""
    operands = random_operands(1, 256, 1, 64, 64)
    is_loud = jnp.arange(256)[:, None, None] % 7 == 3
    operands["q"] = jnp.where(is_loud, 60 * operands["q"], operands["q"])
    places = {"chunk_size": 256}
    want = run(operands, "reference", jnp.float64, **places)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        got = run(operands, "mosaic_gpu", jnp.bfloat16, **places)
    # One weight near 1: of dO Vᵀ - rowsum(dO * O) little is left, and O is rounded.
    for name, allowed in (LARGEST_ERROR | {"q": 1e-2, "k": 1.2e-2}).items():
        error = np.linalg.norm(got[name] - want[name]) / np.linalg.norm(want[name])
        assert error <= allowed, (name, error)


# What the interpreter says of 1e30 squared, in a document that nobody looks at.
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.slow
def test_not_a_bit_crosses_a_border_whatever_padding_holds():
    positions, segment_ids = places_of((1, 0, 70), (0, 0, 4), (2, 0, 60), (0, 0, 6))
    places = {"chunk_size": 64, "positions": positions, "segment_ids": segment_ids}
    operands = random_operands(1, 140, 1, 64, 64)
    kept = np.asarray(segment_ids)[..., None, None] == 2
    padding = np.asarray(segment_ids)[..., None, None] == 0

    def change(name, value):
        value = np.where(kept, np.asarray(value, np.float32), 1e30 if name != "do" else 0)
        return jnp.asarray(np.where(padding, np.nan, value), jnp.bfloat16)

    loud = {name: change(name, value) for name, value in operands.items()}
    quiet = operands | {"do": jnp.where(kept, operands["do"], 0)}
    quiet, loud = (run(each, "mosaic_gpu", jnp.bfloat16, **places) for each in (quiet, loud))
    where = {name: np.broadcast_to(kept, value.shape) for name, value in quiet.items()}
    for name, value in quiet.items():
        np.testing.assert_array_equal(value[where[name]], loud[name][where[name]], err_msg=name)
    np.testing.assert_array_equal(loud["out"][np.broadcast_to(padding, loud["out"].shape)], 0)


@pytest.mark.slow
def test_continues_a_cache():
    chunk_size, held, length = 96, 40, 130
    operands = random_operands(2, length, 1, 64, 64)
    before = random_operands(2, chunk_size, 1, 64, 64, seed=1)
    filled = np.arange(chunk_size)[None, :, None, None] < held
    cache = KeyValueCache(*(jnp.where(filled, before[name], jnp.nan) for name in ("k", "v")))
    positions = jnp.broadcast_to(jnp.arange(held, held + length), (2, length))
    call = jax.jit(chunk_attention, static_argnames=("chunk_size", "implementation"))
    got, want = (
        call(
            *(operands[name] for name in ("q", "k", "v")),
            chunk_size=chunk_size,
            positions=positions,
            cache=cache,
            implementation=implementation,
        )
        for implementation in ("mosaic_gpu", "xla")
    )
    out, right = (np.asarray(each.out, np.float64) for each in (got, want))
    assert np.linalg.norm(out - right) <= 4e-3 * np.linalg.norm(right)
    for mine, others in zip(got.cache, want.cache, strict=True):
        np.testing.assert_array_equal(mine, others)


@pytest.mark.slow
def test_compiles_for_an_h200_without_spilling():
    shape = jax.ShapeDtypeStruct
    q = shape((1, 16_384, 4, 256), jnp.bfloat16)
    v = shape((1, 16_384, 4, 2048), jnp.bfloat16)
    ids = shape((1, 16_384), jnp.int32)

    def both_passes(q, k, v, do, positions, segment_ids):
        def attend(q, k, v):
            return chunk_attention(
                q,
                k,
                v,
                chunk_size=4096,
                positions=positions,
                segment_ids=segment_ids,
                implementation="mosaic_gpu",
            ).out

        # Recomputed, because that drops whatever seems to have no result.
        out, pull_back = jax.vjp(jax.checkpoint(attend), q, k, v)
        return out, pull_back(do)

    device = h200_device()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pallas_kernels.chunk_attention.mosaic_gpu.op.is_interpreted", lambda: False)
        compiled = compile_for(device, both_passes, q, q, v, v, ids, ids)
    usage = ptxas_usage(compiled)
    for kernel in usage:
        print(f"{kernel.name}: {kernel.registers} registers, {kernel.spill_bytes} B spilled")
    assert {kernel.name.removeprefix("chunk_attention_") for kernel in usage} == {
        "weights",
        "repair",
        "band_product",
        "band_transpose_product",
        "score_gradient",
    }
    assert not any(kernel.spill_bytes for kernel in usage)


@pytest.mark.parametrize(
    ("target", "length", "width", "dtype", "rate", "choice"),
    [
        ("NVIDIA H200", 2048, 256, jnp.bfloat16, 0.0, "mosaic_gpu"),
        ("NVIDIA H100 80GB HBM3", 2048, 256, jnp.bfloat16, 0.0, "mosaic_gpu"),
        ("NVIDIA H200", 1, 256, jnp.bfloat16, 0.0, "xla"),
        ("NVIDIA H200", 2048, 320, jnp.bfloat16, 0.0, "xla"),
        ("NVIDIA H200", 2048, 256, jnp.float32, 0.0, "xla"),
        ("NVIDIA H200", 2048, 256, jnp.bfloat16, 0.1, "xla"),
        ("NVIDIA A100-SXM4-80GB", 2048, 256, jnp.bfloat16, 0.0, "xla"),
    ],
)
def test_choice_by_device_length_and_operands(
    target, length, width, dtype, rate, choice, monkeypatch
):
    monkeypatch.setattr(api, "find_target", lambda: Target("gpu", target))
    q, v = (jax.ShapeDtypeStruct((1, length, 4, w), dtype) for w in (width, 2048))
    drop = AttentionDropout(rate, jax.random.key(0))
    assert api._choose(q, v, 4096, drop) == choice


@pytest.mark.parametrize(
    ("dtype", "width", "dropout", "message"),
    [
        (jnp.float32, 64, None, "multiplies bfloat16, q is float32"),
        (jnp.bfloat16, 320, None, "at most 256 wide, q's are 320"),
        (jnp.bfloat16, 64, 0.1, "no attention dropout"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(dtype, width, dropout, message):
    operands = random_operands(1, 8, 1, width, 64)
    arguments = [operands[name].astype(dtype) for name in ("q", "k", "v")]
    drops = None if dropout is None else AttentionDropout(dropout, jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        chunk_attention(*arguments, chunk_size=8, dropout=drops, implementation="mosaic_gpu")
