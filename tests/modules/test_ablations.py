"""Ablations of a block and EMA, against their definitions in float64."""

import math
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.config import ModelConfig
from megalodon_jax.modules import CEMA, EMA, Block, position_info
from tests.ablations import VARIANTS
from tests.golden_files import relative_error

B, L = 2, 13
CONFIG: dict[str, Any] = {
    "num_layers": 1, "model_dim": 8, "z_dim": 8, "value_dim": 12, "num_heads": 2,
    "ffn_hidden_dim": 12, "cema_ndim": 3, "chunk_size": 5, "vocab_size": 7, "norm_num_groups": 2,
    "swiglu": True,
    # Compiles fastest; the tests of every operation compare its implementations.
    "implementation": "reference",
}  # fmt: skip
Params = dict[str, Any]


def define_block(xp: Any, params: Params, x: Any, config: ModelConfig) -> Any:
    """A block by its definition, with `xp` numpy or jax.numpy, in the arrays' own dtype."""
    mega = {key.removeprefix("mega."): value for key, value in params.items()}
    u = define_time_norm(xp, x, mega, config)
    m = rms(xp, define_average(xp, u, mega, config), config) * (1 + mega["rmsnorm.weight"])
    y = x + define_attention(xp, u, m, mega, config)
    n = standardize(xp, y, config) * (1 + params["nffn.norm.weight"]) + params["nffn.norm.bias"]
    hidden = silu(xp, n @ params["nffn.fc1.kernel"]) * (n @ params["nffn.fc3.kernel"])
    skipped = {"two_hop": x, "pre_norm": y}[config.residual_connection]
    return skipped + hidden @ params["nffn.fc2.kernel"]


def define_time_norm(xp: Any, x: Any, mega: Params, config: ModelConfig) -> Any:
    scale = 1 + mega["timenorm.weight"]
    if config.time_norm == "rms":
        return rms(xp, x, config) * scale
    if config.time_norm == "layer":
        return standardize(xp, x, config) * scale + mega["timenorm.bias"]
    grouped = x.reshape(*x.shape[:2], config.norm_num_groups, -1)
    # Means over the group's features of the tokens s <= t.
    seen = np.tril(np.ones((x.shape[1],) * 2)) / (1 + np.arange(x.shape[1]))[:, None]
    mean = xp.einsum("ts,bsg->btg", seen, grouped.mean(-1))[..., None]
    squares = xp.square(grouped[:, None] - mean[:, :, None]).mean(-1)
    var = xp.einsum("ts,btsg->btg", seen, squares)[..., None]
    normed = ((grouped - mean) / xp.sqrt(var + config.norm_eps)).reshape(x.shape)
    return normed * scale + mega["timenorm.bias"]


def define_average(xp: Any, u: Any, mega: Params, config: ModelConfig) -> Any:
    if config.moving_average == "none":
        return u
    p = sigmoid(xp, mega["cema.alpha"])
    q = 1 - p * sigmoid(xp, mega["cema.delta"])
    gamma = mega["cema.gamma"]
    if config.moving_average == "ema":
        p = p * mega["cema.beta"]
    else:
        angle = sigmoid(xp, mega["cema.theta"])[:, None] * (2 * math.pi / config.cema_ndim)
        angle = angle * (1 + xp.arange(config.cema_ndim))
        q = q * (xp.cos(angle) + 1j * xp.sin(angle))
        gamma = gamma[..., 0] + 1j * gamma[..., 1]
    # The recurrence written out: h[t] is the sum over s <= t of q^(t - s) p u[s].
    lag = np.arange(u.shape[1])[:, None] - np.arange(u.shape[1])
    powers = q ** np.maximum(lag, 0)[..., None, None]
    kernel = (gamma * p * powers).real.sum(-1) / math.sqrt(config.cema_ndim)
    past = xp.einsum("ts,tsd,bsd->btd", (lag >= 0) * 1.0, kernel, u)
    return past + mega["cema.omega"] * u


def define_attention(xp: Any, u: Any, m: Any, mega: Params, config: ModelConfig) -> Any:
    heads = (config.num_heads, -1)
    z = (m @ mega["wz.kernel"] + mega["wz.bias"]).reshape(*m.shape[:2], *heads)
    z = rms(xp, z, config) if config.qk_norm else silu(xp, z)
    d = config.head_dim
    # With the norm q and k have 1/sqrt(d) each, without it their product has.
    part, whole = (1 / math.sqrt(d), 1.0) if config.qk_norm else (1.0, 1 / math.sqrt(d))
    q, k = (
        z * ((1 + mega["gamma"][i]) * part).reshape(heads) + mega["beta"][i].reshape(heads)
        for i in (0, 1)
    )
    v = silu(xp, u @ mega["wv.kernel"] + mega["wv.bias"]).reshape(*u.shape[:2], *heads)
    t = np.arange(u.shape[1])
    chunk, position = np.divmod(t, config.chunk_size)
    sees = (chunk[:, None] == chunk) & (t[:, None] >= t)
    query, key = (rope(xp, a, position, config.rope_base) for a in (q, k))
    weights = xp.exp(xp.einsum("bihd,bjhd->bhij", query, key) * whole) * sees
    weights = weights / weights.sum(-1, keepdims=True)
    o = xp.einsum("bhij,bjhd->bihd", weights, v).reshape(*u.shape[:2], -1)
    r = silu(xp, m @ mega["wr.kernel"] + mega["wr.bias"])
    return m @ mega["wh1.kernel"] + mega["wh1.bias"] + (o * r) @ mega["wh2.kernel"]


def rope(xp: Any, a: Any, position: np.ndarray, base: float | None) -> Any:
    if base is None:
        return a
    half = a.shape[-1] // 2
    angle = position[:, None] * base ** (-np.arange(half) / half)
    turned = (a[..., 0::2] + 1j * a[..., 1::2]) * np.exp(1j * angle)[:, None]
    return xp.stack([turned.real, turned.imag], -1).reshape(a.shape)


def rms(xp: Any, a: Any, config: ModelConfig) -> Any:
    return a / xp.sqrt(xp.square(a).mean(-1, keepdims=True) + config.norm_eps)


def standardize(xp: Any, a: Any, config: ModelConfig) -> Any:
    return rms(xp, a - a.mean(-1, keepdims=True), config)


def sigmoid(xp: Any, a: Any) -> Any:
    return 1 / (1 + xp.exp(-a))


def silu(xp: Any, a: Any) -> Any:
    return a * sigmoid(xp, a)


def named_arrays(state: nnx.State) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(state)
    return {".".join(map(str, path)): np.asarray(leaf[...], np.float64) for path, leaf in flat}


def perturbed(module: nnx.Module, seed: int = 0) -> nnx.Module:
    """A copy with no parameter at an initial value of zero."""
    graphdef, params = nnx.split(module, nnx.Param)
    random = np.random.default_rng(seed)
    return nnx.merge(
        graphdef,
        jax.tree.map(lambda a: a + 0.2 * random.normal(size=a.shape).astype(a.dtype), params),
    )


@pytest.fixture(scope="module")
def x() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(B, L, 8)), jnp.float32)


# Models in which all switches differ cover the single ones, which tell what is wrong.
QUICK = ("default", "ema", "all, ema", "all, no average")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in ("default", *VARIANTS)
    ],
)
@pytest.mark.slow
def test_a_block_equals_its_definition(name: str, x: jax.Array):
    config = ModelConfig(**{**CONFIG, **VARIANTS.get(name, {})})
    graphdef, params = nnx.split(perturbed(Block.from_config(config, rngs=nnx.Rngs(0))))
    weights = np.random.default_rng(1).normal(size=x.shape)

    @jax.jit
    def output_and_gradients(params, x):
        def total(params, x):
            out = nnx.merge(graphdef, params)(x).x
            return jnp.sum(out * weights.astype(np.float32)), out

        return jax.grad(total, argnums=(0, 1), has_aux=True)(params, x)

    (gradients, dx), out = output_and_gradients(params, x)
    values, wide_x = named_arrays(params), np.asarray(x, np.float64)
    assert relative_error(out, define_block(np, values, wide_x, config)) <= 1e-6
    with jax.enable_x64(True):

        @jax.jit
        def defined_gradients(values, x):
            total = lambda *args: jnp.sum(define_block(jnp, *args, config) * weights)  # noqa: E731
            return jax.grad(total, argnums=(0, 1))(values, x)

        expected, expected_dx = jax.tree.map(np.asarray, defined_gradients(values, wide_x))
    assert relative_error(dx, expected_dx) <= 5e-6
    found = named_arrays(gradients)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert np.linalg.norm(gradient) > 0, key
        assert relative_error(found[key], gradient) <= 5e-6, key


@pytest.fixture(scope="module")
def ema_inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, segment ids and initial state: two documents and padding, several blocks of "xla"."""
    random = np.random.default_rng(3)
    x = random.normal(size=(2, 150, 6)).astype(np.float32)
    segment_ids = np.repeat([[1, 2, 0], [1, 1, 1]], 50, axis=1).astype(np.int32)
    return x, segment_ids, random.normal(size=(2, 6, 3)).astype(np.float32) + np.complex64(0)


def call_of(module: nnx.Module):
    graphdef = nnx.graphdef(module)
    return jax.jit(
        lambda params, x, segment_ids, initial_state: nnx.merge(graphdef, params)(
            x, segment_ids=segment_ids, initial_state=initial_state
        )
    )


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_ema_equals_the_recurrence_and_cema_at_angle_zero(implementation, ema_inputs):
    x, segment_ids, initial = ema_inputs
    D, N = x.shape[-1], initial.shape[-1]
    ema = perturbed(EMA(D, order=N, implementation=implementation, rngs=nnx.Rngs(0)))
    y, final_state = call_of(ema)(nnx.state(ema), x, segment_ids, initial)

    values = named_arrays(nnx.state(ema))
    p = sigmoid(np, values["alpha"]) * values["beta"]
    q = 1 - sigmoid(np, values["alpha"]) * sigmoid(np, values["delta"])
    # The module's state is h / beta.
    h, expected = initial.real * values["beta"], np.zeros(x.shape)
    for t in range(x.shape[1]):
        starts = t > 0 and segment_ids[:, t] != segment_ids[:, t - 1]
        new_h = q * np.where(np.reshape(starts, (-1, 1, 1)), 0, h) + p * x[:, t, :, None]
        is_token = segment_ids[:, t, None] != 0
        readout = (values["gamma"] * new_h).sum(-1) / math.sqrt(N) + values["omega"] * x[:, t]
        expected[:, t] = np.where(is_token, readout, 0)
        h = np.where(is_token[..., None], new_h, h)
    assert relative_error(y, expected) <= 1e-6
    assert relative_error(np.asarray(final_state).real * values["beta"], h) <= 1e-6
    assert np.abs(np.asarray(final_state).imag).max() <= 1e-20

    cema = CEMA(D, order=N, implementation=implementation, rngs=nnx.Rngs(0))
    weights = ema.gamma[...] * ema.beta[...]
    cema.alpha, cema.delta, cema.omega = (
        nnx.Param(a[...]) for a in (ema.alpha, ema.delta, ema.omega)
    )
    cema.gamma = nnx.Param(jnp.stack([weights, jnp.zeros_like(weights)], -1))
    cema.theta = nnx.Param(jnp.full(D, -60.0))  # an angle of 1e-26
    same, _ = call_of(cema)(nnx.state(cema), x, segment_ids, initial)
    assert relative_error(y, same) <= 1e-7


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.slow
def test_gradients_of_ema(implementation, ema_inputs):
    """Against float64 autodiff of the sum over all pairs of tokens of a document."""
    x, segment_ids, initial = ema_inputs
    ema = perturbed(EMA(6, order=3, implementation=implementation, rngs=nnx.Rngs(0)))
    weights = np.random.default_rng(4).normal(size=x.shape).astype(np.float32)
    call = call_of(ema)

    def total(params, x):
        return jnp.sum(call(params, x, segment_ids, initial).y * weights)

    gradients, dx = jax.jit(jax.grad(total, argnums=(0, 1)))(nnx.state(ema), x)
    lag = np.arange(150)[:, None] - np.arange(150)
    sees = (segment_ids[:, :, None] == segment_ids[:, None]) & (segment_ids != 0)[:, None]
    sees = sees & (lag >= 0)

    def defined(values, x):
        p = sigmoid(jnp, values["alpha"]) * values["beta"]
        q = 1 - sigmoid(jnp, values["alpha"]) * sigmoid(jnp, values["delta"])
        gamma = values["gamma"] / math.sqrt(3)
        kernel = jnp.sum(gamma * p * q ** np.maximum(lag, 0)[..., None, None], -1)
        y = jnp.einsum("bts,tsd,bsd->btd", sees.astype(float), kernel, x)
        decayed = q ** np.arange(1, 151)[:, None, None] * gamma * values["beta"]
        from_state = jnp.einsum("tdn,bdn->btd", decayed, initial.real.astype(float))
        y = y + from_state * (segment_ids == 1)[..., None] + values["omega"] * x
        return jnp.sum(y * weights * (segment_ids != 0)[..., None])

    with jax.enable_x64(True):
        values = named_arrays(nnx.state(ema))
        expected, expected_dx = jax.jit(jax.grad(defined, argnums=(0, 1)))(
            values, x.astype(np.float64)
        )
    assert relative_error(dx, expected_dx) <= 2e-6
    for key, gradient in expected.items():
        assert relative_error(named_arrays(gradients)[key], gradient) <= 2e-6, key


def test_initial_values_of_ema():
    D, N = 512, 16
    ema = EMA(D, order=N, rngs=nnx.Rngs(0))
    for name, std in (("alpha", 0.2), ("delta", 0.2), ("gamma", 1.0), ("omega", 1.0)):
        value = np.asarray(getattr(ema, name)[...])
        assert abs(value.std() - std) <= 0.1 * std, name
        assert abs(value.mean()) <= 5 * std / math.sqrt(value.size), name
    signs = np.where(np.arange(N) % 2, -1.0, 1.0)
    assert abs((np.asarray(ema.beta[...]) - signs).std() - 0.02) <= 0.001


def test_errors(x):
    config = ModelConfig(**{**CONFIG, "rope_base": None})
    block = Block.from_config(config, rngs=nnx.Rngs(0))
    rotated = position_info((B, L), chunk_size=5, head_dim=4, rope_base=1e4)
    with pytest.raises(ValueError, match=r"rope_base is None, but positions\.rotation is not None"):
        block(x, positions=rotated)
    with pytest.raises(ValueError, match="residual_connection is 'pre'; use 'two_hop'"):
        Block(block.mega, block.nffn, residual_connection="pre")  # type: ignore[arg-type]


def test_queries_and_keys_start_with_their_gain():
    config = ModelConfig(**CONFIG, qk_gain=3.0)
    block = Block.from_config(config, rngs=nnx.Rngs(0))
    scale, offset = block.mega.scale_and_offset()
    # z has length sqrt(d) in every head: queries and keys have length 3.
    np.testing.assert_allclose(scale, 3 / math.sqrt(config.head_dim), rtol=1e-6)
    assert not np.asarray(offset).any()
