"""Operations on a cache's states, on every device's rows, channels and heads of a mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from megalodon_jax.cache import slot_specs
from megalodon_jax.inference.rows import set_rows
from megalodon_jax.parallel.sharding import partition_spec, shard_map_logical
from megalodon_jax.typing import Array, Bool, Float, Float32, Int32
from pallas_kernels.chunk_attention import KeyValueCache
from pallas_kernels.chunk_decode import ChunkDecodeOutput, SharedRepresentation, chunk_decode
from pallas_kernels.norm_state_step import NormStateStepOutput, StepNorm
from pallas_kernels.state_step import CemaStepTables, StateStepOutput, state_step
from pallas_kernels.state_step.xla import state_steps
from pallas_kernels.timestep_norm import TimestepNormState


def normalize_and_average(
    operation: Callable[..., NormStateStepOutput],
    x: Float[Array, "B *T D"],
    norm: StepNorm,
    norm_state: TimestepNormState,
    tables: CemaStepTables,
    state: Float32[Array, "S 2N D"],
    fed: Bool[Array, " B"] | Int32[Array, " B"] | None,
    count: Int32[Array, " S"],
) -> NormStateStepOutput:
    """`norm_state_step` or `norm_state_steps` on every device's rows and channels.

    Args:
      operation: one of them.
      x: its arguments, and so are the next four.
      norm: see there.
      norm_state: see there.
      tables: see there.
      state: see there.
      fed: its sixth argument. None: it has none, and the counts of tokens do not change.
      count: equal to `norm_state.count`. Layers have the same counts. With one array for all, the
        compiler updates the layers' own in one kernel, and in place: no step's kernel reads them.
    """
    channels = partition_spec("batch", *[None] * (x.ndim - 2), "channels")
    table, vector = partition_spec(None, "channels"), partition_spec("channels")
    groups, rows = partition_spec("batch", "norm_groups"), partition_spec("batch")
    moments = TimestepNormState(rows, groups, groups)  # pyright: ignore[reportArgumentType]
    states = partition_spec("batch", None, "channels")
    arguments = () if fed is None else (fed,)

    def step(x, vectors, norm_state, tables, state, *fed) -> NormStateStepOutput:
        # The groups of this device.
        scale, bias = vectors
        here = StepNorm(scale, bias, norm_state.mean.shape[1], norm.eps)
        return operation(x, here, norm_state, tables, state, *fed)

    vectors = (norm.scale, norm.bias)
    out = shard_map_logical(
        step,
        in_specs=(
            channels,
            tuple(None if each is None else vector for each in vectors),
            moments,
            CemaStepTables(table, table, table, table, table, vector),
            states,
            *[rows] * len(arguments),
        ),
        out_specs=NormStateStepOutput(channels, channels, moments, states),  # pyright: ignore[reportArgumentType]
    )(x, vectors, norm_state._replace(count=count), tables, state, *arguments)
    own = norm_state.count
    if fed is not None:
        own = set_rows(own, own[: len(x)] + fed)
    return out._replace(norm=out.norm._replace(count=own))


def average(
    u: Float[Array, "B D"],
    tables: CemaStepTables,
    state: Float32[Array, "S 2N D"],
    active: Bool[Array, " B"],
) -> StateStepOutput:
    """`state_step` of one token a row."""
    channels, states = (
        partition_spec("batch", "channels"),
        partition_spec("batch", None, "channels"),
    )
    table = partition_spec(None, "channels")
    return shard_map_logical(
        state_step,
        in_specs=(
            channels,
            CemaStepTables(table, table, table, table, table, partition_spec("channels")),
            states,
            partition_spec("batch"),
        ),
        out_specs=StateStepOutput(channels, states),
    )(u, tables, state, active)


def average_steps(
    inputs: Float[Array, "B T D"],
    tables: CemaStepTables,
    state: Float32[Array, "B 2N D"],
    counts: Int32[Array, " B"] | None = None,
) -> StateStepOutput:
    """`state_steps`: the state's bits are those of `step.decode` for the same inputs."""
    channels = partition_spec("batch", None, "channels")
    table = partition_spec(None, "channels")
    table_specs = CemaStepTables(table, table, table, table, table, partition_spec("channels"))
    arguments = () if counts is None else (counts,)
    return shard_map_logical(
        state_steps,
        in_specs=(channels, table_specs, channels, *[partition_spec("batch")] * len(arguments)),
        out_specs=StateStepOutput(channels, channels),  # pyright: ignore[reportArgumentType]
    )(inputs, tables, state, *arguments)


def attend(
    shared: SharedRepresentation,
    value: Float[Array, "B H Dv"],
    gate: Float[Array, "B H Dv"],
    cache: KeyValueCache,
    position: Int32[Array, " B"],
) -> ChunkDecodeOutput:
    """`chunk_decode` of one token a row, its outputs multiplied by silu(gate)."""

    def step(shared, value, gate, cache, position) -> ChunkDecodeOutput:
        return chunk_decode(shared, None, value, cache, position, gate=gate)

    heads, cache_spec = partition_spec("batch", "heads", None), slot_specs(cache)
    return shard_map_logical(
        step,
        in_specs=(
            _specs_of(shared),
            heads,
            heads,
            cache_spec,
            partition_spec("batch"),
        ),
        out_specs=ChunkDecodeOutput(heads, cache_spec),
    )(shared, value, gate, cache, position)


def _specs_of(shared: SharedRepresentation) -> Any:
    """Partition specs of its arrays, in its structure."""
    heads, vectors = partition_spec("batch", "heads", None), partition_spec(None, "heads", None)
    every_head = partition_spec("batch", None, None)
    specs: Any = dataclasses.replace(
        shared,
        z=heads,
        vectors=jax.tree.map(lambda _: vectors, shared.vectors),
        swapped_z=jax.tree.map(lambda _: heads, shared.swapped_z),
        rotation=jax.tree.map(lambda _: every_head, shared.rotation),
    )
    return specs
