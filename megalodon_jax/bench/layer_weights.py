"""Weights of a model that decodes by its own call, which a step reads without copies."""

import dataclasses

import jax
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.inference.decoders import ModelWeights
from megalodon_jax.language_model import LanguageModel
from megalodon_jax.layer_stack import unstack_layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """Weights of a model that decodes by its own call, an array for each layer.

    The model stacks and splits them again, of which the compiler leaves nothing. From one stacked
    array it would copy every layer's matrices in every step: twice the bytes of a short context.

    Attributes:
      layers: parameters of the blocks.
      rest: all others.
      graphdef: of the model.
    """

    layers: tuple[nnx.State, ...]
    rest: nnx.State
    graphdef: nnx.GraphDef = dataclasses.field(metadata={"static": True})

    @classmethod
    def split(cls, weights: ModelWeights) -> "LayerWeights":
        """From stacked weights; call it inside `jit`."""
        num_layers = weights.model().config.num_layers
        rest = {name: each for name, each in weights.params.items() if name != "layers"}
        layers = unstack_layers(weights.params["layers"], num_layers)
        return cls(tuple(layers), nnx.State(rest), weights.graphdef)

    def model(self) -> LanguageModel:
        """The model."""
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *self.layers)
        return nnx.merge(self.graphdef, nnx.State({**self.rest, "layers": stacked}))
