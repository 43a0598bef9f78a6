"""CEMA's error over 131,072 tokens, for channels with fast and slow decay."""

from decimal import Decimal, localcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cema import CemaParams, cema
from pallas_kernels.cema.phase import cos_sin_of_multiples

LENGTH, ORDER, CHANNELS = 131_072, 16, 8
# Largest error of any channel by 1 - |q|, None for initial values: two to four times the measured
# error. A float32 recurrence has 2e-7, 3e-6, 3e-5 and 2e-3.
LARGEST_ERROR = {None: 1e-6, 1e-2: 1e-6, 1e-3: 2e-6, 1e-5: 4e-6}


def logit(v):
    return np.log(v / (1 - v))


def parameters(distance: float | None, rng: np.random.Generator) -> list[np.ndarray]:
    if distance is None:
        alpha, delta = rng.normal(0, 0.2, (2, CHANNELS, ORDER))
    else:
        p = rng.uniform(0.3, 0.7, (CHANNELS, ORDER))
        alpha, delta = logit(p), logit(distance / p)
    frequency = np.exp(-np.log(CHANNELS) / CHANNELS * np.arange(1, CHANNELS + 1))
    theta = logit(rng.permutation(frequency) * 0.999)
    gamma = rng.normal(size=(CHANNELS, ORDER, 2))
    omega = rng.normal(0, 0.25, CHANNELS)
    return [value.astype(np.float32) for value in (alpha, delta, theta, gamma, omega)]


def recurrence(x: np.ndarray, params: list[np.ndarray]) -> np.ndarray:
    alpha, delta, theta, gamma, omega = (value.astype(np.float64) for value in params)
    p = 1 / (1 + np.exp(-alpha))
    angle = np.arange(1, ORDER + 1) / (1 + np.exp(-theta))[:, None] * (2 * np.pi / ORDER)
    q = (1 - p / (1 + np.exp(-delta))) * np.exp(1j * angle)
    weight = (gamma[..., 0] + 1j * gamma[..., 1]) / np.sqrt(ORDER)
    h, y = np.zeros_like(q), np.empty_like(x)
    for t, x_t in enumerate(x):
        h *= q
        h += p * x_t[:, None]
        y[t] = np.einsum("dn,dn->d", weight, h).real
    return y + omega * x


@pytest.mark.slow
def test_error_against_float64_recurrence_of_131072_tokens():
    rng = np.random.default_rng(0)
    kinds = [parameters(distance, rng) for distance in LARGEST_ERROR]
    params = [np.concatenate(values) for values in zip(*kinds, strict=True)]
    x = rng.normal(size=(LENGTH, len(kinds) * CHANNELS)).astype(np.float32)
    want = recurrence(x.astype(np.float64), params)
    call = jax.jit(lambda x, params: cema(x, params, implementation="xla").y)
    got = call(jnp.asarray(x)[None], CemaParams(*(jnp.asarray(value) for value in params)))[0]
    squares = ((np.asarray(got, np.float64) - want) ** 2).mean(0) / (want**2).mean(0)
    errors = np.sqrt(squares).reshape(len(kinds), CHANNELS)
    for (distance, allowed), error in zip(LARGEST_ERROR.items(), errors, strict=True):
        print(f"1 - |q| = {distance}: median {np.median(error):.1e}, max {error.max():.1e}")
        assert error.max() <= allowed, f"1 - |q| = {distance}: {error}"


@pytest.mark.parametrize("order", [1, 7, 16, 32])
def test_angles_of_millions_of_revolutions(order):
    rng = np.random.default_rng(order)
    edges = [0.0, 1e-6, -1e-6, 0.3465, -0.3466, 63.9, -63.9, 90.0]
    theta = np.concatenate([rng.normal(0, 4, 40), edges]).astype(np.float32)
    multiples = np.array([0, 1, 5, 16, 1000, 2**20 + 3, 2**22 - 1], np.int32)
    cos_sin = jax.jit(lambda t: cos_sin_of_multiples(t, jnp.asarray(multiples), order))(theta)
    # float32 rounding of a quarter turn, and of a turn to 44 bits.
    allowed = 1.5e-7 + 2 * np.pi * multiples * 2.0**-44
    with localcontext(prec=40):
        for i, t in enumerate(theta):
            frequency = 1 / (1 + (-Decimal(float(t))).exp()) / order
            turns = [float(frequency * int(m) % 1) for m in multiples]
            for function, got in zip((np.cos, np.sin), cos_sin, strict=True):
                error = np.abs(function(2 * np.pi * np.asarray(turns)) - np.asarray(got)[i])
                assert (error <= allowed).all(), (t, error)


def test_angles_differentiate_like_the_plain_formula():
    theta = jnp.asarray([-3.0, -0.5, 0.0, 2.0])
    multiples = jnp.asarray([[1, 2], [7, 30]])

    def plain(t):
        angle = jax.nn.sigmoid(t)[:, None, None] * multiples * (2 * np.pi / 16)
        return jnp.cos(angle).sum(), jnp.sin(angle).sum()

    got = jax.jacobian(lambda t: jax.tree.map(jnp.sum, cos_sin_of_multiples(t, multiples, 16)))(
        theta
    )
    for slope, want in zip(got, jax.jacobian(plain)(theta), strict=True):
        np.testing.assert_allclose(slope, want, rtol=2e-6, atol=1e-5)


@pytest.mark.device_only
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "pallas_tpu", "triton"])
@pytest.mark.parametrize("distance", [None, 1e-3])
@pytest.mark.parametrize("signal", ["noise", "constant"])
def test_bfloat16_kernels_add_little_to_the_rounding_of_their_output(
    implementation, distance, signal
):
    rng = np.random.default_rng()
    params = parameters(distance, rng)
    noise = rng.normal(size=(LENGTH, CHANNELS))
    x = jnp.asarray(noise if signal == "noise" else np.ones_like(noise), jnp.bfloat16)
    want = recurrence(np.asarray(x, np.float64), params)
    rounded = np.asarray(jnp.asarray(want, jnp.bfloat16), np.float64)
    cotangent = jnp.asarray(rng.normal(size=x.shape), jnp.bfloat16)

    def run(name, dtype):
        def y(x, params):
            return cema(x[None].astype(dtype), params, implementation=name).y[0]

        arguments = x, CemaParams(*(jnp.asarray(value) for value in params))
        out, pull_back = jax.jit(lambda *a: jax.vjp(y, *a))(*arguments)
        return np.asarray(out, np.float64), jax.jit(pull_back)(cotangent.astype(dtype))[1]

    got, gradients = run(implementation, jnp.bfloat16)
    error = np.sqrt(((got - want) ** 2).mean(0) / (want**2).mean(0))
    allowed = 1.15 * np.sqrt(((rounded - want) ** 2).mean(0) / (want**2).mean(0))
    print(f"error over rounding: {(1.15 * error / allowed).max():.4f}")
    # A constant output may round to itself in a channel, so the bound is on the median of channels.
    assert np.median(error / allowed) <= 1
    assert np.sqrt((error**2).mean()) <= np.sqrt((allowed**2).mean())
    if signal == "constant":
        # Sums of a constant times a random cotangent nearly cancel: no bound for gradients.
        return
    _, exact = run("xla", jnp.float32)
    for name, value in gradients._asdict().items():
        right = np.asarray(getattr(exact, name))
        error = np.linalg.norm(np.asarray(value) - right) / np.linalg.norm(right)
        print(f"gradient of {name}: {error:.1e}")
        assert error <= 1e-4, name
