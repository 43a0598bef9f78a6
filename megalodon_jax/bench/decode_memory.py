"""Decoding after contexts of many tokens: MEGALODON's constant cache beside a Transformer's.

The Transformer's cache has a slot for every token of the context. Its slots are filled with random
numbers, because a step reads them whatever they hold: no prompt goes through the model. The timed
steps are the last ones of the context, where MEGALODON's chunk is full.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
from jax import numpy as jnp

from megalodon_jax.bench.decode_bytes import num_bytes, row_bytes
from megalodon_jax.bench.decode_steps import (
    BenchModel,
    Chain,
    DecodeProgram,
    DecodeRow,
    measure_steps,
)
from megalodon_jax.chips import find_chip
from megalodon_jax.config import AnyModelConfig, TransformerConfig
from megalodon_jax.inference.blocks import SlotState


@dataclasses.dataclass(frozen=True)
class ContextRow:
    """Decoding of one model in one context.

    Attributes:
      context: tokens of the context.
      row_bytes: of a row's cache.
      rows_that_fit: rows whose caches fit the device beside the weights; None if its memory is not
        known. Temporaries are not counted.
      step: the measured steps.
    """

    context: int
    row_bytes: int
    rows_that_fit: int | None
    step: DecodeRow


def grouped_queries(config: TransformerConfig) -> TransformerConfig:
    """The Transformer with a quarter of its key and value heads, at least one."""
    return dataclasses.replace(config, num_kv_heads=max(1, config.num_heads // 4))


def memory_limit() -> int | None:
    """Bytes that JAX may use of the first device, or its data sheet's; None if both are unknown."""
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    chip = find_chip(device.device_kind)
    return limit or (None if chip is None else int(chip.memory_bytes))


def measure_context(
    name: str,
    model: BenchModel,
    *,
    context: int,
    batch: int,
    chain: Chain,
    repeats: int,
    bytes_per_second: float,
    limit: int | None,
) -> ContextRow:
    """Measures the last steps of a context.

    Args:
      name: of the model.
      model: the model.
      context: tokens after the last timed step.
      batch: rows that decode. One row runs beside an idle one, where two fit.
      chain: the timed chains.
      repeats: pairs of chains.
      bytes_per_second: rate of a copy on this device.
      limit: the device's memory, from `memory_limit`.
    """
    config = model.model.config
    shapes: Any = jax.eval_shape(lambda: model.model.init_cache(1, max_length=context, kv=model.kv))
    size = row_bytes(shapes)
    weights = num_bytes(model.weights)
    fitting = None if limit is None else max(0, (limit - weights) // size)
    slots = 2 if batch == 1 and (fitting is None or fitting >= 2) else batch
    position = context - chain.length * chain.long
    step = DecodeRow(name, "model", batch, slots, position, kv=model.kv)
    if fitting is not None and slots > fitting:
        reason = f"{slots} rows need {(weights + slots * size) / 1e9:.1f} GB"
        return ContextRow(context, size, fitting, dataclasses.replace(step, reason=reason))
    try:
        state = filled_slots(model, slots, batch, config, context)
        program = DecodeProgram(model.weights, state, chain.length)
        step, _ = measure_steps(
            step,
            program,
            state,
            chain=chain,
            repeats=repeats,
            bytes_per_second=bytes_per_second,
        )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        step = dataclasses.replace(step, reason=str(error).splitlines()[0])
    return ContextRow(context, size, fitting, step)


def filled_slots(
    model: BenchModel, slots: int, rows: int, config: AnyModelConfig, context: int
) -> SlotState:
    """Slots of which the first rows decode, with random numbers in their caches.

    Args:
      model: the model.
      slots: number of slots.
      rows: rows that decode.
      config: of the model.
      context: tokens that a cache which grows with the context has room for.
    """
    state = model.empty_slots(slots, context if isinstance(config, TransformerConfig) else None)
    layers, structure = jax.tree.flatten(state.cache.layers)
    keys = jax.random.split(jax.random.key(0), len(layers))
    active = jnp.arange(slots) < rows
    state = state._replace(cache=dataclasses.replace(state.cache, layers=()), active=active)
    for i, key in enumerate(keys):
        # One array after the other: only one is there twice.
        shape, dtype = layers[i].shape, layers[i].dtype
        layers[i] = None
        layers[i] = _random(key, shape, dtype)
    cache = dataclasses.replace(
        state.cache,
        layers=jax.tree.unflatten(structure, layers),
        segment=active.astype(jnp.int32),
    )
    return state._replace(cache=cache)


@partial(jax.jit, static_argnums=(1, 2))
def _random(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    # Variances and counts of norms are not negative.
    return jnp.abs(jax.random.normal(key, shape)).astype(dtype)
