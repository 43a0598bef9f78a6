"""Contract of TimestepNorm, over all implementations."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.timestep_norm import TimestepNormState, timestep_norm

GOLDEN = np.load(Path(__file__).resolve().parents[2] / "golden" / "ops_timestep_norm.npz")
CASES = json.loads(GOLDEN["__meta__"].item())["cases"]
IMPLEMENTATIONS = ("reference", "xla")
both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def relative(actual, expected):
    expected = np.asarray(expected, np.float64)
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)


@functools.partial(jax.jit, static_argnames=("num_groups", "implementation"))
def run(
    x, scale, bias, initial_state=None, prior=None, segment_ids=None, *, num_groups, implementation
):
    return timestep_norm(
        x,
        scale,
        bias,
        num_groups=num_groups,
        initial_state=initial_state,
        prior=prior,
        segment_ids=segment_ids,
        implementation=implementation,
    )


@functools.partial(jax.jit, static_argnames=("num_groups", "implementation"))
def differentiate(
    arrays, counts, cotangents, segment_ids=None, *, num_groups, implementation="xla"
):
    """The result, and gradients of all arrays; of states those of mean and var."""

    def loss(arrays):
        initial_state, prior = (
            TimestepNormState(counts[name], *arrays[name]) if name in arrays else None
            for name in ("initial_state", "prior")
        )
        vectors = (arrays["scale"], arrays["bias"], initial_state, prior, segment_ids)
        result = run(arrays["x"], *vectors, num_groups=num_groups, implementation=implementation)
        outputs = (result.y, result.final_state.mean, result.final_state.var)
        return sum((a * c).sum() for a, c in zip(outputs, cotangents)), result

    (_, result), gradients = jax.value_and_grad(loss, has_aux=True)(arrays)
    return result, gradients


def draw(seed, B, L, D, G, *, offset=0.0):
    """x, scale, bias and the cotangents of y, mean, var, as float64 numpy arrays."""
    rng = np.random.default_rng(seed)
    x = offset + rng.normal(size=(B, L, D)) * rng.uniform(0.5, 2, (B, 1, D))
    arrays = {"x": x, "scale": rng.normal(1, 0.3, D), "bias": rng.normal(size=D)}
    return arrays, (rng.normal(size=(B, L, D)), rng.normal(size=(B, G)), rng.normal(size=(B, G)))


def draw_moments(seed, *shape):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape), rng.uniform(0.5, 2, shape)


def single(tree):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)


def exact_gradients(arrays, counts, cotangents, segment_ids=None, *, num_groups):
    """Float64 automatic differentiation through the token loop."""
    with jax.enable_x64(True):
        double = jax.tree.map(jnp.asarray, (arrays, cotangents))
        _, result = differentiate(
            double[0], counts, double[1], segment_ids, num_groups=num_groups,
            implementation="reference",
        )  # fmt: skip
        assert result["x"].dtype == jnp.float64
        return jax.tree.map(np.asarray, result)


# The token loop takes longest to compile and is checked against numpy as well: fewer cases of it.
@pytest.mark.parametrize(
    ("case", "implementation"),
    [(case, "xla") for case in CASES]
    + [(case, "reference") for case in CASES if case.endswith("mask") or "_L1_" in case],
)
def test_matches_released_code(case, implementation):
    load = {key.split("/")[1]: GOLDEN[key] for key in GOLDEN.files if key.startswith(case + "/")}
    arrays = {"x": load["x"], "scale": 1 + load["weight"], "bias": load["bias"]}
    counts, segment_ids = {}, None
    if "prev_mean" in load:
        arrays["initial_state"] = (load["prev_mean"], load["prev_var"])
        counts["initial_state"] = jnp.asarray(load["prev_count"], jnp.int32)
    if "padding_mask" in load:
        segment_ids = jnp.asarray(~load["padding_mask"], jnp.int32)
    cotangents = (load["cot_y"], load["cot_mean"], load["cot_var"])
    (y, final_state), grads = differentiate(
        arrays, counts, cotangents, segment_ids, num_groups=load["mean"].shape[1],
        implementation=implementation,
    )  # fmt: skip

    assert relative(y, load["y"]) <= 1e-6
    assert relative(final_state.mean, load["mean"]) <= 1e-6
    assert relative(final_state.var, load["var"]) <= 1e-6
    np.testing.assert_array_equal(final_state.count, load["count"])
    assert final_state.count.dtype == jnp.int32
    assert relative(grads["x"], load["grad_x"]) <= 5e-6
    assert relative(grads["scale"], load["grad_weight"]) <= 5e-6
    assert relative(grads["bias"], load["grad_bias"]) <= 5e-6
    if "initial_state" in arrays:
        assert relative(grads["initial_state"][0], load["grad_prev_mean"]) <= 5e-6
        assert relative(grads["initial_state"][1], load["grad_prev_var"]) <= 5e-6


@both
@pytest.mark.parametrize(("L", "D", "G"), [(1, 4, 2), (2, 12, 1), (31, 12, 6), (100, 12, 3)])
def test_matches_moments_of_all_numbers(L, D, G, implementation, normalize_document):
    arrays, _ = draw(L, 2, L, D, G, offset=3.0)
    arrays = jax.tree.map(lambda a: a.astype(np.float32).astype(np.float64), arrays)
    before = np.random.default_rng(1).normal(size=(5, D))
    seen = before.reshape(5, G, -1)
    moments = single(tuple(np.tile(f((0, 2)), (2, 1)) for f in (seen.mean, seen.var)))
    state = TimestepNormState(jnp.full((2,), 5, jnp.int32), *moments)
    for given, prefix in ((None, before[:0]), (state, before)):
        y, final_state = run(
            *single([arrays[n] for n in ("x", "scale", "bias")]), given, num_groups=G,
            implementation=implementation,
        )  # fmt: skip
        for row in range(2):
            expected, mean, var = normalize_document(arrays["x"][row], G, 1e-5, prefix)
            expected = expected * arrays["scale"] + arrays["bias"]
            np.testing.assert_allclose(y[row], expected, rtol=0, atol=2e-5)
            np.testing.assert_allclose(final_state.mean[row], mean, rtol=2e-6)
            np.testing.assert_allclose(final_state.var[row], var, rtol=2e-6)
        np.testing.assert_array_equal(final_state.count, len(prefix) + L)


def lay_out(lengths_by_row, L):
    """Segment ids of rows of documents; 0 stands for one padding token between documents."""
    ids = np.zeros((len(lengths_by_row), L), np.int32)
    spans = []
    for row, lengths in enumerate(lengths_by_row):
        at, document = 0, 0
        for length in lengths:
            if length:
                document += 1
                ids[row, at : at + length] = document
                spans.append((row, slice(at, at + length)))
            at += max(length, 1)
    return ids, spans


ROWS = ([17, 1, 1, 20], [0, 0, 17, 0, 1, 20], [38])


@both
@pytest.mark.parametrize("with_prior", ["no prior", "prior"])
def test_packed_documents_equal_documents_alone(with_prior, implementation):
    L, D, G = 43, 12, 6
    arrays, cotangents = draw(3, len(ROWS), L, D, G)
    ids, spans = lay_out(ROWS, L)
    counts = {}
    if with_prior == "prior":
        arrays["prior"] = draw_moments(4, G)
        counts["prior"] = jnp.asarray(3, jnp.int32)
    arrays, cotangents = single(arrays), single(cotangents)
    options = {"num_groups": G, "implementation": implementation}
    (y, final_state), grads = differentiate(arrays, counts, cotangents, jnp.asarray(ids), **options)

    assert not np.asarray(y)[ids == 0].any()
    assert not np.asarray(grads["x"])[ids == 0].any()
    total = jax.tree.map(jnp.zeros_like, {n: g for n, g in grads.items() if n != "x"})
    for number, (row, span) in enumerate(spans):
        is_last = number + 1 == len(spans) or spans[number + 1][0] != row
        single_document = {**arrays, "x": arrays["x"][row : row + 1, span]}
        # A row's final state is its last document's, and so is that state's cotangent.
        of_state = [c[row : row + 1] * is_last for c in cotangents[1:]]
        (expected_y, expected_state), g = differentiate(
            single_document, counts, (cotangents[0][row : row + 1, span], *of_state), **options
        )
        np.testing.assert_allclose(y[row, span], expected_y[0], rtol=0, atol=1e-5)
        if is_last:
            for a, b in zip(final_state, expected_state):
                np.testing.assert_allclose(a[row], b[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(grads["x"][row, span], g.pop("x")[0], rtol=0, atol=2e-5)
        total = jax.tree.map(jnp.add, total, g)
    for name, summed in total.items():
        for a, b in zip(jax.tree.leaves(grads[name]), jax.tree.leaves(summed)):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


@both
def test_documents_do_not_affect_each_other(implementation):
    L, D, G = 43, 12, 6
    arrays, cotangents = single(draw(5, 2, L, D, G))
    ids, spans = lay_out(([20, 0, 22], [13, 30]), L)
    options = {"num_groups": G, "implementation": implementation}

    def second_documents(x, cot_y):
        (y, final_state), grads = differentiate(
            {**arrays, "x": x}, {}, (cot_y, *cotangents[1:]), ids, **options
        )
        dx = grads["x"]
        return [
            np.asarray(a) for row, span in spans[1::2] for a in (y[row, span], dx[row, span])
        ] + list(map(np.asarray, final_state))

    x, cot_y = arrays["x"], cotangents[0]
    first = (ids <= 1)[..., None]
    expected = second_documents(x, cot_y)
    actual = second_documents(jnp.where(first, x * 1e30, x), jnp.where(first, cot_y * 1e30, cot_y))
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@both
def test_gradients_match_float64(implementation):
    L, D, G = 63, 12, 6
    arrays, cotangents = draw(6, len(ROWS), L, D, G, offset=2.0)
    arrays["initial_state"], arrays["prior"] = draw_moments(7, len(ROWS), G), draw_moments(8, G)
    counts = {
        "initial_state": jnp.asarray([4, 0, 900], jnp.int32),
        "prior": jnp.asarray(2, jnp.int32),
    }
    ids, _ = lay_out(ROWS, L)
    for segment_ids in (None, jnp.asarray(ids)):
        exact = exact_gradients(arrays, counts, cotangents, segment_ids, num_groups=G)
        _, found = differentiate(
            single(arrays), counts, single(cotangents), segment_ids, num_groups=G,
            implementation=implementation,
        )  # fmt: skip
        for name, value in exact.items():
            for a, b in zip(jax.tree.leaves(found[name]), jax.tree.leaves(value)):
                if np.any(b):
                    assert relative(a, b) <= 5e-6, name
                else:  # Without segment ids no document starts from the prior.
                    assert not np.any(a), name


@both
def test_pieces_with_state_equal_the_whole(implementation):
    B, L, D, G = 3, 61, 12, 3
    arrays, cotangents = single(draw(9, B, L, D, G, offset=1.0))
    prior = TimestepNormState(jnp.asarray(2, jnp.int32), *single(draw_moments(10, G)))
    ids, _ = lay_out(([61], [30, 0, 0, 25], [21, 40]), L)
    sizes = [20, 1, 20, 20]
    options = {"num_groups": G, "implementation": implementation}
    vectors = (arrays["scale"], arrays["bias"])
    spans = np.split(np.arange(L), np.cumsum(sizes)[:-1])

    def by_piece(x):
        # A piece whose first document is new starts from the prior.
        state, ys = None, []
        for span in spans:
            piece = np.asarray(ids[:, span])
            if state is not None:
                before = ids[:, : span[0]].max(1)
                is_new = (piece[:, 0] > before)[:, None]
                state = TimestepNormState(
                    jnp.where(is_new[:, 0], prior.count, state.count),
                    jnp.where(is_new, prior.mean, state.mean),
                    jnp.where(is_new, prior.var, state.var),
                )
            y, state = run(x[:, span], *vectors, state, prior, piece, **options)
            ys.append(y)
        return jnp.concatenate(ys, axis=1), state

    def whole(x):
        return run(x, *vectors, None, prior, ids, **options)

    @functools.partial(jax.jit, static_argnums=0)
    def with_gradient(function, x):
        def loss(x):
            y, state = function(x)
            return sum((a * c).sum() for a, c in zip((y, *state[1:]), cotangents)), (y, state)

        (_, result), dx = jax.value_and_grad(loss, has_aux=True)(x)
        return *result, dx

    y, state, dx = with_gradient(by_piece, arrays["x"])
    y_whole, state_whole, dx_whole = with_gradient(whole, arrays["x"])
    np.testing.assert_allclose(y, y_whole, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(state.count, state_whole.count)
    np.testing.assert_allclose(state.mean, state_whole.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.var, state_whole.var, rtol=1e-5)
    np.testing.assert_allclose(dx, dx_whole, rtol=0, atol=3e-5)


@both
def test_padding_inside_a_document_changes_nothing(implementation):
    L, D, G = 40, 12, 3
    arrays, _ = single(draw(11, 1, L, D, G))
    is_token = np.random.default_rng(0).random(L) > 0.4
    options = {"num_groups": G, "implementation": implementation}
    vectors = (arrays["scale"], arrays["bias"])
    ids = is_token[None].astype(np.int32)
    y, final_state = run(arrays["x"], *vectors, None, None, ids, **options)
    expected_y, expected_state = run(arrays["x"][:, is_token], *vectors, **options)
    np.testing.assert_allclose(y[:, is_token], expected_y, rtol=0, atol=1e-5)
    assert not np.asarray(y)[:, ~is_token].any()
    for a, b in zip(final_state, expected_state):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@both
def test_row_of_padding_returns_its_initial_state(implementation):
    L, D, G = 7, 12, 3
    arrays, cotangents = single(draw(12, 2, L, D, G))
    moments = single(draw_moments(13, 2, G))
    initial_state = TimestepNormState(jnp.asarray([3, 5], jnp.int32), *moments)
    ids = np.stack([np.zeros(L, np.int32), np.ones(L, np.int32)])
    options = {"num_groups": G, "implementation": implementation}
    (y, final_state), grads = differentiate(
        {**arrays, "initial_state": moments},
        {"initial_state": initial_state.count},
        cotangents,
        ids,
        **options,
    )
    assert not np.asarray(y[0]).any()
    for a, b in zip(final_state, initial_state):
        np.testing.assert_array_equal(a[0], b[0])
        assert (a[1] != b[1]).all()
    assert not np.asarray(grads["x"][0]).any()
    np.testing.assert_array_equal(grads["initial_state"][0][0], cotangents[1][0])
    np.testing.assert_array_equal(grads["initial_state"][1][0], cotangents[2][0])


def running_moments_float64(x, G):
    """Mean and variance after every token, by cumulative sums of float64 deviations."""
    L = x.shape[0]
    groups = x.astype(np.float64).reshape(L, G, -1)
    pivot = groups.mean((0, 2))
    deviation = groups - pivot[:, None]
    count = np.arange(1, L + 1)[:, None]
    mean = np.cumsum(deviation.mean(-1), 0) / count
    var = np.cumsum(np.square(deviation).mean(-1), 0) / count - mean**2
    return pivot + mean, var


@pytest.mark.parametrize("kind", ["offset", "drift", "outlier first"])
@pytest.mark.parametrize("packed", [False, True])
def test_long_rows_far_from_zero_are_accurate(kind, packed):
    L, D, G = 131_072, 8, 2
    x = np.random.default_rng(14).normal(size=(1, L, D))
    x += {"offset": 1000.0, "drift": np.linspace(0, 300, L)[:, None], "outlier first": 0.0}[kind]
    if kind == "outlier first":
        x[:, 0] = 1000.0
    x = x.astype(np.float32)
    ones = np.ones(D, np.float32)
    ids = np.ones((1, L), np.int32) if packed else None
    y, state = run(x, ones, 0 * ones, None, None, ids, num_groups=G, implementation="xla")
    mean, var = running_moments_float64(x[0], G)
    groups = x[0].astype(np.float64).reshape(L, G, -1)
    expected = (groups - mean[..., None]) / np.sqrt(var + 1e-5)[..., None]
    assert np.abs(np.asarray(y[0]) - expected.reshape(L, D)).max() <= 1e-4
    np.testing.assert_allclose(state.var[0], var[-1], rtol=2e-6)


def test_gradient_far_from_zero_is_accurate():
    L, D, G = 2048, 8, 2
    arrays, cotangents = draw(15, 1, L, D, G, offset=1000.0)
    arrays["x"] = arrays["x"].astype(np.float32).astype(np.float64)
    exact = exact_gradients(arrays, {}, cotangents, num_groups=G)
    for ids in (None, jnp.ones((1, L), jnp.int32)):
        _, found = differentiate(single(arrays), {}, single(cotangents), ids, num_groups=G)
        assert relative(found["x"], exact["x"]) <= 5e-6
        assert relative(found["scale"], exact["scale"]) <= 5e-6


@both
def test_bfloat16_input_has_float32_moments(implementation):
    L, D, G = 65, 12, 3
    arrays, cotangents = single(draw(16, 2, L, D, G, offset=4.0))
    x = arrays["x"].astype(jnp.bfloat16)
    options = {"num_groups": G, "implementation": implementation}
    (y, final_state), grads = differentiate({**arrays, "x": x}, {}, cotangents, **options)
    (wide, wide_state), exact = differentiate(
        {**arrays, "x": x.astype(jnp.float32)}, {}, cotangents, **options
    )
    assert y.dtype == jnp.bfloat16
    assert final_state.mean.dtype == final_state.var.dtype == jnp.float32
    # Only y is rounded.
    np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16))
    np.testing.assert_array_equal(final_state.var, wide_state.var)
    assert grads["x"].dtype == jnp.bfloat16
    assert grads["scale"].dtype == jnp.float32
    assert relative(grads["x"], exact["x"]) <= 4e-3


def test_backward_pass_saves_x_and_group_statistics_only():
    B, L, D, G = 1, 16, 64, 2
    x = jnp.ones((B, L, D), jnp.bfloat16)
    ones = jnp.ones((D,))
    ids = jnp.ones((B, L), jnp.int32)

    def backward(x):
        return jax.vjp(lambda x: timestep_norm(x, ones, ones, num_groups=G, segment_ids=ids).y, x)[
            1
        ]

    residuals = jax.tree.leaves(jax.eval_shape(backward, x))
    large = [r for r in residuals if r.size >= B * L * D]
    assert [r.dtype for r in large] == [jnp.bfloat16]


def test_errors_say_what_to_do():
    x, ones = jnp.ones((2, 3, 4)), jnp.ones((4,))
    with pytest.raises(ValueError, match=r"no implementation 'fastest'.*'reference', 'xla'"):
        timestep_norm(x, ones, ones, num_groups=2, implementation="fastest")  # type: ignore
    with pytest.raises(ValueError, match="num_groups 3 does not divide the 4 features"):
        timestep_norm(x, ones, ones, num_groups=3)
    with pytest.raises(ValueError, match=r"segment_ids has shape \(2, 4\)"):
        timestep_norm(x, ones, ones, num_groups=2, segment_ids=jnp.ones((2, 4), jnp.int32))
    state = TimestepNormState(jnp.zeros((), jnp.int32), jnp.zeros((2,)), jnp.zeros((2,)))
    with pytest.raises(ValueError, match="initial_state has shapes"):
        timestep_norm(x, ones, ones, num_groups=2, initial_state=state)
