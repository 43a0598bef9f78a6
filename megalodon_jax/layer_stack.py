"""The stack of blocks: stacked parameters, rematerialization, one loop or blocks written out."""

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.config import AnyModelConfig, Remat
from megalodon_jax.layer_variables import LayerChanges, merge_layer, snapshot, split_blocks
from megalodon_jax.modules.matmul import (
    ACTIVATION,
    GATHERED,
    PRODUCT,
    PROJECTION,
    STATISTICS,
    WEIGHT,
)
from megalodon_jax.modules.positions import PositionInfo
from megalodon_jax.parallel.sharding import constrain, has_multiple_devices, weight_axes
from megalodon_jax.typing import Array, Float, Float32, Int32, PRNGKey
from pallas_kernels.common.residuals import Operation

# Checkpoint names that the backward pass of a block reads besides the block's input; it recomputes
# everything else. Gathered states of other devices and sums over their channels are small, and
# never exchanged twice.
_PRODUCTS_AND_STATES = (PROJECTION, PRODUCT, GATHERED, STATISTICS, *get_args(Operation))
SAVED_NAMES: dict[Remat, tuple[str, ...]] = {
    "off": (*_PRODUCTS_AND_STATES, ACTIVATION),
    "none": _PRODUCTS_AND_STATES,
    "inputs": (PRODUCT, STATISTICS, "chunk_attention", "context_parallel"),
    "dots": (PROJECTION, PRODUCT, STATISTICS, "context_parallel"),
    "block": (STATISTICS, "context_parallel"),
}


class _Layer(NamedTuple):
    """One block's parameters, streaming state and dropout key; stacked along axis 0 for a scan.

    `number` is that of the layer, for blocks with random streams of their own; `path_scales` are
    the factors of drop path.
    """

    params: nnx.State
    cache: Any
    dropout_key: PRNGKey | None
    number: Int32[Array, ""] | None
    path_scales: Float32[Array, "2 B M"] | None = None


class _LayerOutput(NamedTuple):
    """Results of one block besides its features; None and () where nothing was asked for."""

    cache: Any
    hidden_state: Float[Array, "B L D"] | None
    changes: tuple[Any, ...]


class StackOutput(NamedTuple):
    """Features after the last block, the blocks' new states, and the features of every layer.

    Attributes:
      x: features after the last block.
      cache: new states, None if none came in.
      hidden_states: the embeddings and the output of every block; None if not asked for.
    """

    x: Float[Array, "B L D"]
    cache: Any
    hidden_states: Float[Array, "S B L D"] | None


def stack_blocks[B: nnx.Module](
    make_block: Callable[[Float32[Array, ""], nnx.Rngs], B], num_layers: int, *, rngs: nnx.Rngs
) -> B:
    """All blocks of a model as one block whose parameters have a leading axis of layers.

    Args:
      make_block: makes the block of a layer, numbered from 0.
      num_layers: number of blocks.
      rngs: source of initial values.
    """
    make = nnx.vmap(
        lambda key, layer: make_block(layer, nnx.Rngs(key)),
        in_axes=(0, 0),
        transform_metadata={nnx.PARTITION_NAME: "layers"},
    )
    keys = jax.random.split(rngs.params(), num_layers)
    return make(keys, jnp.arange(num_layers, dtype=jnp.float32))


def run_blocks(
    blocks: nnx.Module,
    config: AnyModelConfig,
    x: Float[Array, "B L D"],
    positions: PositionInfo,
    *,
    cache: Any = None,
    carries: bool = False,
    dropout_key: PRNGKey | None = None,
    path_scales: Float32[Array, "S 2 B M"] | None = None,
    hidden_states: bool = False,
) -> StackOutput:
    """Runs x through all blocks.

    Args:
      blocks: from `stack_blocks`; called as `block(x, positions=, cache=, dropout_key=)`, a block
        returns its output and its new streaming state. Variables that a call adds to a block or
        replaces are written into `blocks`.
      config: how to run them: `remat`, `scan_layers`. A decoding step (a cache and one token a row)
        writes the blocks out: a loop would copy their states in and out. The last `skip_attention`
        blocks are called as `block.without_attention(x)`, and their states stay as they are.
      x: embeddings.
      positions: of the tokens.
      cache: states of all blocks, a tuple.
      carries: the states are those of training rows (`CarriedState`): with `scan_layers` they come
        and go stacked along a leading axis, and gradients stop at the new ones.
      dropout_key: turns dropout on.
      path_scales: factors of drop path, from `draw_path_scales`; blocks take their own as
        `path_scales=`.
      hidden_states: whether to return the features of every layer.

    Raises:
      ValueError: `skip_attention` is set in training, with dropout or states of training rows.
    """
    if config.skip_attention and (carries or dropout_key is not None):
        raise ValueError(
            f"model.skip_attention is {config.skip_attention}, which is for inference; train a "
            "model with 0"
        )
    stacked, changes, count = split_blocks(blocks), LayerChanges(), config.num_layers
    keys = None if dropout_key is None else jax.random.split(dropout_key, count)
    numbers = jnp.arange(count) if stacked.has_random else None

    def run_block(x: Array, layer: _Layer) -> tuple[Array, _LayerOutput]:
        block = merge_layer(stacked, layer.params, layer.number)
        before = snapshot(block)
        options = {} if layer.path_scales is None else {"path_scales": layer.path_scales}
        out, cache = block(
            x, positions=positions, cache=layer.cache, dropout_key=layer.dropout_key, **options
        )
        out = constrain(out, "batch", "length", "channels")
        # Inside the loop: outside it, zero gradients of all new states would be computed with.
        cache = jax.lax.stop_gradient(cache) if carries else cache
        state = out if hidden_states else None
        return out, _LayerOutput(cache, state, changes.find(block, before))

    def skip_attention(x: Array, layer: _Layer) -> tuple[Array, _LayerOutput]:
        out = merge_layer(stacked, layer.params, layer.number).without_attention(x)
        out = constrain(out, "batch", "length", "channels")
        return out, _LayerOutput(layer.cache, out if hidden_states else None, ())

    run_block = jax.checkpoint(
        run_block,
        policy=jax.checkpoint_policies.save_only_these_names(*_saved_names(config)),
        prevent_cse=not config.scan_layers,
    )
    embeddings, is_stacked = x, carries and config.scan_layers
    num_complete = count - config.skip_attention
    if config.scan_layers and (cache is None or is_stacked or x.shape[1] > 1):
        stacked_cache = cache if cache is None or is_stacked else jax.tree.map(_stack, *cache)
        layers = _Layer(stacked.params, stacked_cache, keys, numbers, path_scales)
        x, outputs = _scan(run_block, x, layers, slice(0, num_complete))
        if config.skip_attention:
            x, others = _scan(skip_attention, x, layers, slice(num_complete, count))
            outputs = jax.tree.map(lambda *both: jnp.concatenate(both), outputs, others)
        caches, states, changed = outputs
        if cache is not None and not is_stacked:
            caches = tuple(unstack_layers(caches, count))
    else:
        layers = unstack_layers(_Layer(stacked.params, None, keys, numbers, path_scales), count)
        if cache is not None:
            layers = [layer._replace(cache=each) for layer, each in zip(layers, cache, strict=True)]
        functions = [run_block] * num_complete + [skip_attention] * config.skip_attention
        x, outputs = _run_written_out(functions, x, layers)
        caches = None if cache is None else tuple(output.cache for output in outputs)
        states, changed = jax.tree.map(
            _stack, *((output.hidden_state, output.changes) for output in outputs)
        )
    changes.write(blocks, changed)
    states = None if states is None else jnp.concatenate([embeddings[None], states])
    return StackOutput(x, caches, states)


_RunBlock = Callable[[Array, _Layer], tuple[Array, _LayerOutput]]


def _scan(
    run_block: _RunBlock, x: Array, layers: _Layer, which: slice
) -> tuple[Array, _LayerOutput]:
    if which != slice(0, len(jax.tree.leaves(layers)[0])):
        layers = jax.tree.map(lambda leaf: leaf[which], layers)
    return jax.lax.scan(run_block, x, layers)


def _run_written_out(
    functions: list[_RunBlock],
    x: Array,
    layers: list[_Layer],
) -> tuple[Array, list[_LayerOutput]]:
    outputs = []
    for number, layer in enumerate(layers, start=1):
        if has_multiple_devices() and number < len(layers):
            x, next_params = _serialize_grad_reduction(x, layers[number].params)
            layers[number] = layers[number]._replace(params=next_params)
        x, output = functions[number - 1](x, layer)
        outputs.append(output)
    return x, outputs


def _stack(*leaves: Array) -> Array:
    return jnp.stack(leaves)


def _saved_names(config: AnyModelConfig) -> tuple[str, ...]:
    saved = SAVED_NAMES[config.remat]
    # Weights are cast once a step. A loop would copy the cast ones, FSDP keep them gathered.
    keeps_weights = config.remat == "off" or (config.remat == "none" and not weight_axes())
    return (*saved, WEIGHT) if keeps_weights and not config.scan_layers else saved


def unstack_layers[T](stacked: T, count: int) -> list[T]:
    """The trees of single layers, from a tree of arrays with a leading axis of layers."""
    leaves, structure = jax.tree.flatten(stacked)
    # The gradient of a split is one concatenation; that of an index is an array of zeros.
    pieces = [jax.lax.split(leaf, [1] * count) for leaf in leaves]
    return [
        jax.tree.unflatten(structure, [piece.squeeze(0) for piece in layer])
        for layer in zip(*pieces, strict=True)
    ]


@jax.custom_vjp
def _serialize_grad_reduction(x: Array, next_params: Any) -> tuple[Array, Any]:
    """A block's input and the next block's parameters, unchanged.

    The backward pass of this block waits for the reduction of the next block's gradients over
    devices. Without the barrier the compiler reduces all gradients at the end of the step.
    """
    return x, next_params


_serialize_grad_reduction.defvjp(
    lambda x, next_params: ((x, next_params), None),
    lambda _, gradients: jax.lax.optimization_barrier(gradients),
)
