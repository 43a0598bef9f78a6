"""Decoding of any language model: prepared weights where a model has them, else its own call."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.config import WeightFormat
from megalodon_jax.inference import step
from megalodon_jax.inference.weights import DecodeWeights, prepare
from megalodon_jax.language_model import LanguageModel, StreamingCache
from megalodon_jax.layer_stack import unstack_layers
from megalodon_jax.lora import has_lora
from megalodon_jax.model import Megalodon
from megalodon_jax.typing import Array, Bool, Float32, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelWeights:
    """A model that decodes by its own call, with matrices cast to `config.dtype`.

    Its layers are an array each. The model stacks and splits them again, and the compiler leaves
    nothing of both; from one stacked array it would copy every matrix in every step.

    Attributes:
      layers: parameters of the blocks.
      rest: all others.
      graphdef: of the model.
    """

    layers: tuple[nnx.State, ...]
    rest: nnx.State
    graphdef: nnx.GraphDef = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, model: LanguageModel) -> "ModelWeights":
        """The weights of a model; call it inside `jit`."""
        graphdef, params = nnx.split(cast_matrices(model))
        rest = {name: each for name, each in params.items() if name != "layers"}
        layers = unstack_layers(params["layers"], model.config.num_layers)
        return cls(tuple(layers), nnx.State(rest), graphdef)

    def model(self) -> LanguageModel:
        """The model."""
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *self.layers)
        return nnx.merge(self.graphdef, nnx.State({**self.rest, "layers": stacked}))


AnyDecodeWeights = DecodeWeights | ModelWeights


def prepare_decoding(model: LanguageModel, weights: WeightFormat = "model") -> AnyDecodeWeights:
    """Weights for `decode`; call it inside `jit`, which casts without a copy of its own.

    Args:
      model: the model.
      weights: see `inference.weights.prepare`; models other than MEGALODON have "model" alone.

    Raises:
      ValueError: the model does not have this format, or it has LoRA factors.
    """
    if has_lora(model):
        raise ValueError("the model has LoRA factors; merge them first: lora.merge_lora(model)")
    if isinstance(model, Megalodon):
        return prepare(model, weights)
    if weights != "model":
        raise ValueError(
            f"weights is {weights!r}, but a {type(model).__name__} decodes with 'model' alone"
        )
    return ModelWeights.of(model)


def cast_matrices[M: LanguageModel](model: M) -> M:
    """The model with its matrices in `config.dtype`, in which their products are anyway.

    Vectors keep their dtype, and so do CEMA's parameters, which are float32.
    """
    graphdef, params = nnx.split(model)
    dtype = jnp.dtype(model.config.dtype)

    def cast(path: tuple[Any, ...], leaf: Array) -> Array:
        is_matrix = path[-1] in ("kernel", "embedding")
        return leaf.astype(dtype) if is_matrix else leaf

    flat = [(path, leaf) for path, leaf in nnx.to_flat_state(params)]
    cast_flat = {path: leaf.replace(cast(path, leaf[...])) for path, leaf in flat}
    return nnx.merge(graphdef, nnx.from_flat_state(cast_flat))


def decode(
    weights: AnyDecodeWeights,
    cache: Any,
    tokens: Int32[Array, " B"],
    active: Bool[Array, " B"],
) -> tuple[Float32[Array, "B V"], Any]:
    """Feeds one token to each of the first B rows; see `inference.step.decode`.

    Models other than MEGALODON need a cache of B rows.
    """
    if isinstance(weights, DecodeWeights):
        return step.decode(weights, cache, tokens, active)
    logits, stepped = weights.model()(tokens[:, None], cache=cache)
    # Slots of a row that stays are written after its last token, where nothing is read.
    kept: StreamingCache = stepped
    position = jnp.where(active, kept.position, cache.position)
    segment = jnp.where(active, kept.segment, cache.segment)
    return logits[:, 0], dataclasses.replace(stepped, position=position, segment=segment)
