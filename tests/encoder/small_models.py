"""Small encoders of both kinds with moved parameters, their inputs, and their check on a mesh."""

import functools

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.config import AnyEncoderConfig, MeshConfig
from megalodon_jax.models import abstract_model
from megalodon_jax.parallel.mesh import make_mesh
from megalodon_jax.parallel.sharding import batch_sharding
from tests.golden_files import relative_error


@functools.cache
def model_of(config: AnyEncoderConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """A model with parameters drawn in NumPy: no zero or small start hides a mistake."""
    graphdef, params = abstract_model(config)
    rng = np.random.default_rng(3)

    def draw(leaf):
        return jnp.asarray(rng.normal(0, 0.3, leaf.shape).astype(np.float32))

    return graphdef, jax.tree.map(draw, params)


@functools.cache
def runner(config: AnyEncoderConfig, method: str, max_documents: int | None, aligned: bool):
    graphdef, _ = model_of(config)

    def run(params, inputs, ids):
        function = getattr(nnx.merge(graphdef, params), method)
        return function(inputs, segment_ids=ids, max_documents=max_documents, aligned=aligned)

    return jax.jit(run)


def run(config, inputs, ids=None, *, method="__call__", max_documents=None, aligned=False):
    return runner(config, method, max_documents, aligned)(model_of(config)[1], inputs, ids)


def rows_of(documents, length, align=1):
    ids = np.zeros((len(documents), length), np.int32)
    for row, lengths in enumerate(documents):
        at = 0
        for number, count in enumerate(lengths, start=1):
            ids[row, at : at + count] = number
            at += -(-count // align) * align
    return ids


def draw_inputs(config: AnyEncoderConfig, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if config.input == "tokens":
        return rng.integers(0, config.vocab_size, shape).astype(np.int32)
    return rng.normal(size=(*shape, config.input_size)).astype(np.float32)


def check_mesh(config: AnyEncoderConfig, sizes: dict[str, int]) -> None:
    """Scores, loss and gradients on a mesh of four devices are those on one device."""
    documents = [[5, 20, 7], [32], [16, 9], [7, 25]]
    ids = rows_of(documents, 32)
    inputs = draw_inputs(config, ids.shape)
    graphdef, params = model_of(config)
    weights = np.random.default_rng(2).normal(size=(4, 3, 3)).astype(np.float32)
    weights[~np.array([[n < len(d) for n in range(3)] for d in documents])] = 0

    def loss(params, inputs, ids):
        scores = nnx.merge(graphdef, params)(inputs, segment_ids=ids, max_documents=3)
        return jnp.sum(scores * weights), scores

    step = jax.value_and_grad(loss, has_aux=True)
    expected = jax.jit(step)(params, inputs, ids)
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[:4])

    def on_mesh(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(*arguments)

    tokens = batch_sharding(mesh)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    found = jax.jit(on_mesh, in_shardings=(replicated, tokens, tokens))(params, inputs, ids)
    for actual, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative_error(actual, wanted) <= 2e-5
