"""Causal attention of the baseline, over all implementations."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megalodon_jax.baselines import blocked, cudnn, splash
from megalodon_jax.baselines.attention import causal_attention
from pallas_kernels.common.target import interpreted
from tests.baselines.definition import draw, exact_attention, lay_out, relative_error

# Padding at the start, in the middle and at the end; one id for two documents; a lone token.
SEGMENTS = lay_out(
    [(0, 3), (1, 20), (2, 1), (0, 6), (2, 17), (3, 11), (0, 3)],
    [(1, 40), (2, 21)],
)
MANY_DOCUMENTS = lay_out(
    [*((n, 3) for n in range(1, 21)), (0, 1)],
    [(0, 1), (1, 20), *((n, 1) for n in range(2, 42))],
)
SHAPE = {"B": 2, "L": 61, "d": 16}
CASES: dict[str, dict[str, Any]] = {
    "one document": {"H": 2, "K": 2},
    "window": {"H": 2, "K": 2, "window": 7},
    "window of one": {"H": 1, "K": 1, "window": 1},
    "window of the row": {"H": 1, "K": 1, "window": 61},
    "grouped": {"H": 6, "K": 2},
    "packed": {"H": 2, "K": 2, "segment_ids": SEGMENTS},
    "many documents": {"H": 2, "K": 2, "segment_ids": MANY_DOCUMENTS},
    "packed, window, grouped": {"H": 4, "K": 1, "segment_ids": SEGMENTS, "window": 9},
}
each_case = pytest.mark.parametrize("case", CASES)
IMPLEMENTATIONS = ("reference", "xla", "cudnn", "splash")
PLATFORMS = {"cudnn": "gpu", "splash": "tpu"}
run = jax.jit(causal_attention, static_argnames=("window", "implementation"))
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@functools.cache
def exact_case(case, dtype: Any = jnp.float32):
    """Operands that `dtype` can hold, options, and the exact results."""
    options = dict(CASES[case])
    operands = draw(7, **SHAPE, H=options.pop("H"), K=options.pop("K"))
    operands = [np.asarray(x.astype(dtype), np.float32) for x in operands]
    return operands, options, exact_attention(*operands, **options)


def differentiate(operands, dtype, **options):
    """Output and gradients of sum(out * cotangent), compiled."""

    @jax.jit
    def run(q, k, v, cotangent):
        out, pull_back = jax.vjp(lambda *qkv: causal_attention(*qkv, **options), q, k, v)
        return out, *pull_back(cotangent)

    return run(*(jnp.asarray(x, dtype) for x in operands))


def skip_unless_available(implementation):
    platform = PLATFORMS.get(implementation)
    if platform is not None and jax.default_backend() != platform:
        pytest.skip(f"{implementation} needs a {platform}")


@each_case
@each_implementation
def test_outputs_and_gradients_are_those_of_the_definition(implementation, case):
    skip_unless_available(implementation)
    # Weights and results in bfloat16, or sums in float32.
    dtype, tolerance = (jnp.bfloat16, 1e-2) if implementation in PLATFORMS else (jnp.float32, 2e-6)
    operands, options, expected = exact_case(case, dtype)
    results = differentiate(operands, dtype, implementation=implementation, **options)
    for name, actual, exact in zip(expected._fields, results, expected, strict=True):
        assert actual.dtype == dtype
        assert relative_error(actual.astype(jnp.float32), exact) < tolerance, name


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_float64_is_kept(implementation):
    operands, options, expected = exact_case("packed, window, grouped")
    with jax.enable_x64(True):
        results = differentiate(operands, jnp.float64, implementation=implementation, **options)
    for actual, exact in zip(results, expected, strict=True):
        assert relative_error(actual, exact) < 1e-14


@each_implementation
def test_padding_is_never_seen(implementation):
    skip_unless_available(implementation)
    operands, options, _ = exact_case("packed")
    dtype = jnp.bfloat16 if implementation in PLATFORMS else jnp.float32
    is_padding = (SEGMENTS == 0)[..., None, None]
    poisoned = [np.where(is_padding, np.nan, x) for x in operands[:3]]
    clean = differentiate(operands, dtype, implementation=implementation, **options)
    results = differentiate(
        [*poisoned, operands[3]], dtype, implementation=implementation, **options
    )
    # cuDNN adds up gradients of queries in any order.
    tolerance = 1e-2 if implementation == "cudnn" else 0
    for actual, expected in zip(results, clean, strict=True):
        assert relative_error(actual, expected) <= tolerance
        assert not np.any(np.where(is_padding, actual, 0))


@pytest.mark.parametrize("implementation", ["xla", "cudnn"])
def test_a_packed_row_is_its_documents_alone(implementation):
    skip_unless_available(implementation)
    q, k, v, _ = draw(5, 1, 47, H=2, K=1, d=8)
    dtype, tolerance = (jnp.bfloat16, 1e-2) if implementation == "cudnn" else (jnp.float32, 1e-6)
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    lengths = (19, 4, 24)
    segment_ids = jnp.asarray(lay_out([(1, 19), (2, 4), (3, 24)]))
    packed = run(q, k, v, segment_ids=segment_ids, implementation=implementation)
    begin = 0
    for length in lengths:
        tokens = slice(begin, begin + length)
        alone = run(q[:, tokens], k[:, tokens], v[:, tokens], implementation="xla")
        assert relative_error(packed[:, tokens], alone) < tolerance
        begin += length


@pytest.mark.parametrize("window", [None, 40])
def test_a_loop_over_heads_and_rows_changes_nothing(window, monkeypatch):
    operands = draw(3, B=2, L=300, H=3, K=3, d=8)
    rows = {"window": window, "segment_ids": lay_out([(1, 130), (2, 170)], [(1, 290), (0, 10)])}
    whole = differentiate(operands, jnp.float32, implementation="xla", **rows)
    # Two of the six heads of a row at a time, and tiles of half the size.
    keys = 300 if window is None else 80
    monkeypatch.setattr(blocked, "_MAX_SCORES", 2 * (64 if window is None else 40) * keys)
    looped = differentiate(operands, jnp.float32, implementation="xla", **rows)
    for actual, expected in zip(looped, whole, strict=True):
        assert relative_error(actual, expected) < 1e-6


@pytest.mark.parametrize("case", ["grouped", "packed, window, grouped"])
def test_splash_attention_in_the_interpreter(case):
    operands, options, expected = exact_case(case)
    with interpreted():
        results = differentiate(operands, jnp.float32, implementation="splash", **options)
    for actual, exact in zip(results, expected, strict=True):
        assert relative_error(actual, exact) < 1e-5


@pytest.mark.slow
def test_splash_attention_of_several_blocks(monkeypatch):
    monkeypatch.setattr(splash, "_BLOCK", 128)
    operands = draw(9, B=1, L=300, H=2, K=1, d=8)
    rows = {"window": 150, "segment_ids": lay_out([(1, 40), (2, 230), (0, 30)])}
    expected = differentiate(operands, jnp.float32, implementation="xla", **rows)
    with interpreted():
        results = differentiate(operands, jnp.float32, implementation="splash", **rows)
    for actual, exact in zip(results, expected, strict=True):
        assert relative_error(actual, exact) < 1e-5


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the default of a CPU")
def test_the_default_on_a_cpu_is_xla():
    operands, options, _ = exact_case("packed")
    q, k, v, _ = (jnp.asarray(x, jnp.bfloat16) for x in operands)
    default = run(q, k, v, **options)
    xla = run(q, k, v, implementation="xla", **options)
    np.testing.assert_array_equal(default, xla)


@pytest.mark.parametrize("implementation", ["cudnn", "splash"])
def test_a_named_implementation_that_cannot_run_is_an_error(implementation):
    if jax.default_backend() == PLATFORMS[implementation]:
        pytest.skip("it can run here")
    q, k, v, _ = (jnp.asarray(x, jnp.bfloat16) for x in draw(0, 1, 8, 1, 1, 8))
    with pytest.raises(ValueError, match=f"attention by '{implementation}': needs one"):
        causal_attention(q, k, v, implementation=implementation)


def test_operands_that_do_not_fit_are_named():
    q, k, v, _ = (jnp.asarray(x) for x in draw(0, 1, 8, 4, 2, 8))
    with pytest.raises(ValueError, match=r"expected \(B, L, H, d\), \(B, L, K, d\)"):
        causal_attention(q, k, v[:, :7])
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key heads"):
        causal_attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="cast them to one dtype"):
        causal_attention(q, k, v.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="window is 0"):
        causal_attention(q, k, v, window=0)
    with pytest.raises(ValueError, match="segment_ids has shape"):
        causal_attention(q, k, v, segment_ids=jnp.ones((1, 7), jnp.int32))
    with pytest.raises(ValueError, match="no implementation 'flash'"):
        causal_attention(q, k, v, implementation="flash")  # pyright: ignore[reportArgumentType]


def test_limits_of_fused_attention(monkeypatch):
    q = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    target = cudnn.Target("gpu", "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(cudnn, "find_target", lambda: target)
    packed = jnp.ones((1, 8), jnp.int32)

    def capable(*capability):
        monkeypatch.setattr(cudnn, "_compute_capability", lambda _: capability)

    capable(9, 0)
    assert cudnn.why_unsupported(q, packed) is None
    assert "bfloat16 or float16" in str(cudnn.why_unsupported(q.astype(jnp.float32), None))
    assert "up to 256, these have 60" in str(cudnn.why_unsupported(q[..., :60], None))
    assert cudnn.why_unsupported(jnp.zeros((1, 8, 2, 256), jnp.bfloat16), None) is None
    capable(8, 0)
    assert cudnn.why_unsupported(q, None) is None
    assert "Hopper" in str(cudnn.why_unsupported(q, packed))
    assert "up to 128" in str(cudnn.why_unsupported(jnp.zeros((1, 8, 2, 192), jnp.bfloat16), None))
    capable(7, 5)
    assert "8.0 or newer" in str(cudnn.why_unsupported(q, None))
    monkeypatch.setattr(splash, "find_target", lambda: target)
    assert "needs one TPU" in str(splash.why_unsupported(q, None))
    monkeypatch.setattr(splash, "find_target", lambda: cudnn.Target("tpu", "TPU v5 lite"))
    assert splash.why_unsupported(q, packed) is None
    assert "bfloat16 or float32" in str(splash.why_unsupported(q.astype(jnp.float16), None))
    assert "up to 256" in str(splash.why_unsupported(jnp.zeros((1, 8, 2, 512), q.dtype), None))
