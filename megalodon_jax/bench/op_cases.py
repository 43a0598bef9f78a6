"""The operations of `pallas_kernels` at the shapes that `bench ops` measures.

A case makes random inputs, applies the operation, and counts its least work. To measure a new
shape, add a case to `CASES`; for a new operation, add a class.

B rows, L length, D channels, N orders, G groups, H heads, K and V width of a key and a value, C
chunk size.
"""

import abc
import dataclasses
import math
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from megalodon_jax.bench.options import BenchMode, DecayRange
from pallas_kernels import cema, chunk_attention, rowwise, timestep_norm
from pallas_kernels.common.dispatch import Implementation

NUM_DOCUMENTS = 8
# Errors are measured on at most this many tokens: the reference is slow, or stores L x L scores.
CHECKED_LENGTH = 1024


class Inputs(NamedTuple):
    """Inputs of one call, by the names of the operation's arguments.

    Attributes:
      differentiable: arrays with gradients.
      fixed: arrays without gradients.
    """

    differentiable: dict[str, Any]
    fixed: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class OpCase(abc.ABC):
    """One operation at one shape, bfloat16."""

    op: ClassVar[str]
    implementations: ClassVar[tuple[str, ...]] = get_args(Implementation)
    limit: ClassVar[Literal["memory", "matmul"]]
    """The ceiling of the device that bounds the operation."""
    modes: ClassVar[tuple[BenchMode, ...]] = get_args(BenchMode)
    """Modes in which the operation differs."""

    rows: int
    length: int

    @abc.abstractmethod
    def __str__(self) -> str:
        """The shape."""

    @abc.abstractmethod
    def make_inputs(
        self, rng: np.random.Generator, mode: BenchMode, decay_range: DecayRange
    ) -> Inputs:
        """Random inputs, with parameters as the model's modules initialize them.

        Args:
          rng: source of all numbers.
          mode: "plain"; "packed", eight documents of random lengths in every row; or "carried",
            with an initial state, which gets a gradient, and a final state.
          decay_range: CEMA's decay |q|, as at the start of training, or up to 1 - 1e-3.
        """

    @abc.abstractmethod
    def apply(
        self, differentiable: dict[str, Any], fixed: dict[str, Any], implementation: Any
    ) -> dict[str, Any]:
        """The operation's results by name; the final state only if there is an initial one."""

    def forward_flops(self, fixed: dict[str, Any]) -> int:
        """The least FLOPs of a forward pass; 0 for operations that memory bounds."""
        del fixed
        return 0

    def shortened(self) -> Self:
        """The case on which errors are measured."""
        return dataclasses.replace(self, length=min(self.length, CHECKED_LENGTH))


@dataclasses.dataclass(frozen=True)
class CemaCase(OpCase):
    """CEMA."""

    op = "cema"
    limit = "memory"

    channels: int
    order: int = 16

    def __str__(self) -> str:
        return f"B {self.rows} L {self.length} D {self.channels} N {self.order}"

    def make_inputs(
        self, rng: np.random.Generator, mode: BenchMode, decay_range: DecayRange
    ) -> Inputs:
        D, N = self.channels, self.order
        differentiable: dict[str, Any] = {
            "x": _normal(rng, (self.rows, self.length, D)),
            "params": _initial_cema_params(rng, D, N, decay_range),
        }
        fixed: dict[str, Any] = {}
        if mode == "carried":
            real, imaginary = (_normal(rng, (self.rows, D, N), jnp.float32) for _ in range(2))
            differentiable["initial_state"] = jax.lax.complex(real, imaginary)
        if mode == "packed":
            fixed["segment_ids"] = _documents(rng, self.rows, self.length)[0]
        return Inputs(differentiable, fixed)

    def apply(
        self, differentiable: dict[str, Any], fixed: dict[str, Any], implementation: Any
    ) -> dict[str, Any]:
        y, final_state = cema.cema(**differentiable, **fixed, implementation=implementation)
        if "initial_state" in differentiable:
            return {"y": y, "final_state": final_state}
        return {"y": y}


@dataclasses.dataclass(frozen=True)
class TimestepNormCase(OpCase):
    """TimestepNorm."""

    op = "timestep_norm"
    limit = "memory"

    channels: int
    groups: int

    def __str__(self) -> str:
        return f"B {self.rows} L {self.length} D {self.channels} G {self.groups}"

    def make_inputs(
        self, rng: np.random.Generator, mode: BenchMode, decay_range: DecayRange
    ) -> Inputs:
        del decay_range
        differentiable = {
            "x": _normal(rng, (self.rows, self.length, self.channels)),
            "scale": jnp.ones(self.channels),
            "bias": jnp.zeros(self.channels),
        }
        fixed: dict[str, Any] = {}
        if mode == "carried":
            fixed["count"] = jnp.asarray(rng.integers(1, 1000, self.rows), jnp.int32)
            moments = (self.rows, self.groups)
            differentiable["mean"] = _normal(rng, moments, jnp.float32)
            differentiable["var"] = jnp.asarray(rng.uniform(0.5, 2, moments), jnp.float32)
        if mode == "packed":
            fixed["segment_ids"] = _documents(rng, self.rows, self.length)[0]
        return Inputs(differentiable, fixed)

    def apply(
        self, differentiable: dict[str, Any], fixed: dict[str, Any], implementation: Any
    ) -> dict[str, Any]:
        state = None
        if "count" in fixed:
            mean, var = differentiable["mean"], differentiable["var"]
            state = timestep_norm.TimestepNormState(fixed["count"], mean, var)
        y, final = timestep_norm.timestep_norm(
            differentiable["x"],
            differentiable["scale"],
            differentiable["bias"],
            num_groups=self.groups,
            initial_state=state,
            segment_ids=fixed.get("segment_ids"),
            implementation=implementation,
        )
        return {"y": y} if state is None else {"y": y, "mean": final.mean, "var": final.var}


@dataclasses.dataclass(frozen=True)
class ChunkAttentionCase(OpCase):
    """Chunk attention; "carried" starts in the middle of a chunk."""

    op = "chunk_attention"
    limit = "matmul"

    heads: int
    key_width: int
    value_width: int
    chunk_size: int

    def __str__(self) -> str:
        return (
            f"B {self.rows} L {self.length} H {self.heads} K {self.key_width} "
            f"V {self.value_width} C {self.chunk_size}"
        )

    def make_inputs(
        self, rng: np.random.Generator, mode: BenchMode, decay_range: DecayRange
    ) -> Inputs:
        del decay_range

        def keys_and_values(length: int) -> tuple[Array, Array]:
            shape = (self.rows, length, self.heads)
            # As in the model's attention: normalized heads times 1/sqrt(K), on both sides.
            key = _normal(rng, (*shape, self.key_width), scale=1 / math.sqrt(self.key_width))
            return key, _normal(rng, (*shape, self.value_width))

        differentiable: dict[str, Any] = {"q": keys_and_values(self.length)[0]}
        differentiable["k"], differentiable["v"] = keys_and_values(self.length)
        fixed: dict[str, Any] = {}
        if mode == "carried":
            cached = chunk_attention.KeyValueCache(*keys_and_values(self.chunk_size))
            differentiable["cache"] = cached.swap_heads_and_slots()
            positions = self.chunk_size // 2 + np.arange(self.length)
            fixed["positions"] = jnp.asarray(
                np.broadcast_to(positions, (self.rows, self.length)), jnp.int32
            )
        if mode == "packed":
            fixed["segment_ids"], fixed["positions"] = _documents(rng, self.rows, self.length)
        return Inputs(differentiable, fixed)

    def apply(
        self, differentiable: dict[str, Any], fixed: dict[str, Any], implementation: Any
    ) -> dict[str, Any]:
        out, cache = chunk_attention.chunk_attention(
            **differentiable, **fixed, chunk_size=self.chunk_size, implementation=implementation
        )
        return {"out": out} if cache is None else {"out": out, "cache": cache}

    def forward_flops(self, fixed: dict[str, Any]) -> int:
        positions = fixed.get("positions")
        if positions is None:
            positions = np.broadcast_to(np.arange(self.length), (self.rows, self.length))
        keys = np.sum(np.asarray(positions) % self.chunk_size + 1, dtype=np.int64)
        return int(2 * keys * self.heads * (self.key_width + self.value_width))

    def shortened(self) -> Self:
        return dataclasses.replace(self, length=min(self.length, 2 * self.chunk_size))


@dataclasses.dataclass(frozen=True)
class NoncausalAttentionCase(ChunkAttentionCase):
    """An encoder's attention: a token sees its whole chunk."""

    op = "noncausal_attention"
    implementations = ("reference", "xla", "triton")
    modes: ClassVar[tuple[BenchMode, ...]] = ("plain", "packed")

    def apply(
        self, differentiable: dict[str, Any], fixed: dict[str, Any], implementation: Any
    ) -> dict[str, Any]:
        out, _ = chunk_attention.chunk_attention(
            **differentiable,
            **fixed,
            chunk_size=self.chunk_size,
            causal=False,
            implementation=implementation,
        )
        return {"out": out}

    def forward_flops(self, fixed: dict[str, Any]) -> int:
        shape = (self.rows, self.length)
        positions = fixed.get("positions", np.broadcast_to(np.arange(self.length), shape))
        ids = np.asarray(fixed.get("segment_ids", np.ones(shape, np.int32)), np.int64)
        chunks = np.asarray(positions) // self.chunk_size + self.length * ids
        keys = sum(np.sum(np.unique(row, return_counts=True)[1] ** 2) for row in chunks)
        return int(2 * keys * self.heads * (self.key_width + self.value_width))


@dataclasses.dataclass(frozen=True)
class RowwiseCase(OpCase):
    """A norm or a gate of rows; documents do not matter to it."""

    op = "rowwise"
    implementations = tuple(name for name in get_args(Implementation) if name != "pallas_tpu")
    limit = "memory"
    modes: ClassVar[tuple[BenchMode, ...]] = ("plain",)

    channels: int
    function: Literal["rms_norm", "layer_norm", "silu", "silu_gate"]

    def __str__(self) -> str:
        return f"{self.function} B {self.rows} L {self.length} D {self.channels}"

    def make_inputs(
        self, rng: np.random.Generator, mode: BenchMode, decay_range: DecayRange
    ) -> Inputs:
        del mode, decay_range
        rows, vectors = {
            "rms_norm": (("x",), ("scale",)),
            "layer_norm": (("x", "added"), ("scale", "bias", "offset")),
            "silu": (("x",), ("bias",)),
            "silu_gate": (("x", "y"), ("bias",)),
        }[self.function]
        shape = (self.rows, self.length, self.channels)
        differentiable = {name: _normal(rng, shape) for name in rows}
        for name in vectors:
            differentiable[name] = _normal(rng, (self.channels,), jnp.float32)
        return Inputs(differentiable, {})

    def apply(
        self, differentiable: dict[str, Any], fixed: dict[str, Any], implementation: Any
    ) -> dict[str, Any]:
        options: dict[str, Any] = {"eps": 1e-5} if self.function.endswith("norm") else {}
        y = getattr(rowwise, self.function)(
            **differentiable,
            **fixed,
            **options,
            dtype=differentiable["x"].dtype,
            implementation=implementation,
        )
        return {"y": y}


CASES: tuple[OpCase, ...] = (
    CemaCase(1, 16_384, 4096),
    CemaCase(8, 2048, 1024),
    CemaCase(1, 131_072, 1024),
    TimestepNormCase(1, 16_384, 4096, groups=64),
    TimestepNormCase(8, 2048, 1024, groups=32),
    TimestepNormCase(1, 131_072, 1024, groups=32),
    ChunkAttentionCase(1, 16_384, heads=4, key_width=256, value_width=2048, chunk_size=4096),
    ChunkAttentionCase(1, 16_384, heads=4, key_width=256, value_width=2048, chunk_size=2048),
    NoncausalAttentionCase(50, 1024, heads=1, key_width=96, value_width=320, chunk_size=128),
    NoncausalAttentionCase(50, 1024, heads=1, key_width=96, value_width=320, chunk_size=1024),
    RowwiseCase(8, 2048, 1024, "rms_norm"),
    RowwiseCase(8, 2048, 1024, "layer_norm"),
    RowwiseCase(8, 2048, 2048, "layer_norm"),
    RowwiseCase(4, 2048, 4096, "layer_norm"),
    RowwiseCase(8, 2048, 2048, "silu"),
    RowwiseCase(8, 2048, 1024, "silu_gate"),
    RowwiseCase(8, 2048, 2048, "silu_gate"),
)
SMALL_CASES: tuple[OpCase, ...] = (
    CemaCase(2, 256, 128),
    TimestepNormCase(2, 256, 128, groups=4),
    ChunkAttentionCase(2, 256, heads=2, key_width=16, value_width=64, chunk_size=64),
    NoncausalAttentionCase(2, 256, heads=2, key_width=16, value_width=64, chunk_size=64),
    RowwiseCase(2, 256, 128, "layer_norm"),
    RowwiseCase(2, 256, 128, "silu_gate"),
)


def _normal(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = jnp.bfloat16, scale: float = 1.0
) -> Array:
    # Drawn on the device: numpy takes seconds.
    key = jax.random.key(int(rng.integers(2**31)))
    return scale * jax.random.normal(key, shape, dtype)


def _documents(rng: np.random.Generator, rows: int, length: int) -> tuple[Array, Array]:
    """(segment_ids, positions) of rows filled with documents of random lengths."""
    starts = np.zeros((rows, length), bool)
    for row in starts:
        row[0] = True
        row[1 + rng.permutation(length - 1)[: NUM_DOCUMENTS - 1]] = True
    index = np.arange(length)
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    return jnp.asarray(np.cumsum(starts, axis=1), jnp.int32), jnp.asarray(positions, jnp.int32)


def _initial_cema_params(
    rng: np.random.Generator, D: int, N: int, decay_range: DecayRange
) -> cema.CemaParams:
    """Parameters as `megalodon_jax.modules.CEMA` initializes them, without a dependence on Flax."""
    alpha, delta = rng.normal(0, 0.2, (2, D, N))
    if decay_range == "long":
        # |q| = 1 - sigmoid(alpha) sigmoid(delta)
        p = 1 / (1 + np.exp(-alpha))
        delta = _logit(10 ** rng.uniform(-3, -1, (D, N)) / p)
    theta = _logit(np.exp(-math.log(D) / D * rng.permutation(np.arange(1, D + 1))))
    gamma = np.stack([rng.normal(size=(D, N)), np.zeros((D, N))], -1)
    omega = np.clip(rng.normal(0, 0.25, D), -1, 1)
    params = (alpha, delta, theta, gamma, omega)
    return cema.CemaParams(*(jnp.asarray(param, jnp.float32) for param in params))


def _logit(probability: np.ndarray) -> np.ndarray:
    return np.log(probability / (1 - probability))
