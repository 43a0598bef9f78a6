"""Generation over several devices: the same tokens as on one."""

from typing import Any

import jax
import numpy as np
import pytest

from megalodon_jax.config import MeshConfig
from megalodon_jax.inference.engine import Engine
from megalodon_jax.inference.requests import Request
from megalodon_jax.inference.sampling import SamplingParams
from megalodon_jax.parallel.mesh import make_mesh
from tests.inference.models import CHUNK, greedy, random_prompt, small_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=CHUNK + 5)
SAMPLED = SamplingParams(temperature=0.9, top_k=30, max_tokens=CHUNK + 5)


def mesh_of(**sizes: int):
    return make_mesh(MeshConfig(**sizes), jax.devices()[: int(np.prod(list(sizes.values())))])


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["model", "int8"])
@pytest.mark.parametrize("sizes", [{"data": 2, "model": 2}, {"model": 2}, {"data": 2}], ids=str)
def test_tokens_equal_those_of_one_device(sizes: dict[str, int], weights):
    if weights == "int8" and len(sizes) == 1:
        pytest.skip("the mesh of both axes covers it")
    # Weights, keys and values together.
    formats: Any = {"weights": weights, "kv": weights}
    alone = Engine(small_model(), slots=4, **formats)
    rows = sizes.get("data", 1)
    together = Engine(small_model(), slots=4, mesh=mesh_of(**sizes), prefill_rows=rows, **formats)
    prompts = [random_prompt(length, length) for length in (3, CHUNK, 2 * CHUNK + 5, 20, 21, 1)]
    streams = []
    for engine in (alone, together):
        streams.append(
            [
                engine.submit(Request(prompt=prompt, params=GREEDY if i % 2 else SAMPLED))
                for i, prompt in enumerate(prompts)
            ]
        )
        engine.run()
    for one, several in zip(*streams, strict=True):
        assert one.tokens == several.tokens
    if weights == "model":
        assert streams[1][1].tokens == greedy(prompts[1], GREEDY.max_tokens)
    for slots in jax.tree.leaves(together._state.cache.layers[0].keys_and_values):
        shards = int(np.prod(list(sizes.values())))
        assert slots.addressable_shards[0].data.size == slots.size // shards


@pytest.mark.slow
def test_a_session_moves_between_meshes():
    engines = [
        Engine(small_model(), slots=2),
        Engine(small_model(), slots=2, mesh=mesh_of(data=2), prefill_rows=2),
    ]
    results = []
    for engine in engines:
        first = engine.submit(Request(prompt=random_prompt(21), params=GREEDY, keep_session=True))
        engine.run()
        results.append(first)
    for engine, (mine, theirs) in zip(engines, (results, results[::-1]), strict=True):
        continued = [
            engine.submit(Request(prompt=(5, 6), params=GREEDY, session=each.session)).result()
            for each in (mine, theirs)
        ]
        assert continued[0] == continued[1]


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="slots is 3; use a multiple of replica"):
        Engine(small_model(), slots=3, mesh=mesh_of(data=2))
    with pytest.raises(ValueError, match="prefill_rows is 1; use a multiple"):
        Engine(small_model(), slots=4, mesh=mesh_of(data=2))
    with pytest.raises(ValueError, match="the mesh has chunk = 2"):
        Engine(small_model(), slots=4, mesh=mesh_of(chunk=2))
    with pytest.raises(ValueError, match=r"num_heads 2, vocab_size 62, .* over model = 4 devices"):
        Engine(small_model(), slots=4, mesh=mesh_of(model=4))
