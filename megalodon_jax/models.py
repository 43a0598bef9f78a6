"""Every kind of model, by the name in `model.kind`."""

from flax import nnx

from megalodon_jax.config import ModelConfig
from megalodon_jax.model import Megalodon

MODELS: dict[str, type[Megalodon]] = {"megalodon": Megalodon}


def build_model(config: ModelConfig, *, rngs: nnx.Rngs) -> Megalodon:
    """A model of `config.kind` with fresh weights."""
    return MODELS[config.kind](config, rngs=rngs)


def abstract_model(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """A model's static structure and its parameters' shapes and dtypes, without any memory."""
    model = nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model, nnx.Param)
    return graphdef, params
