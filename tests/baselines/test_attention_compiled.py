"""Fused attention compiled ahead of time: no L x L array, and no second forward kernel."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from megalodon_jax.baselines import cudnn
from megalodon_jax.baselines.attention import causal_attention
from megalodon_jax.baselines.cached import cached_attention
from megalodon_jax.compiled.topologies import gpu_target
from pallas_kernels.chunk_attention import KeyValueCache
from tests.topologies import compile_for, h100_device, tpu_device

L = 4096
FORWARD = '"__cudnn$fmhaSoftmax"'
BACKWARD = '"__cudnn$fmhaSoftmaxBackward"'
each_layout = pytest.mark.parametrize("is_packed", [False, True], ids=["rows", "packed"])


def shapes(is_packed, *, H=4, K=2, d=64, dtype=jnp.bfloat16):
    q, kv = (jax.ShapeDtypeStruct((2, L, heads, d), dtype) for heads in (H, K))
    return q, kv, kv, *([jax.ShapeDtypeStruct((2, L), jnp.int32)] if is_packed else [])


def gradients(window=None):
    """Value and gradients of a loss whose own gradient reads the outputs."""

    def loss(q, k, v, segment_ids):
        attend = jax.checkpoint(
            lambda *qkv: causal_attention(*qkv, window=window, segment_ids=segment_ids),
            policy=jax.checkpoint_policies.save_only_these_names("chunk_attention"),
        )
        return jnp.sum(attend(q, k, v).astype(jnp.float32) ** 2)

    return lambda q, k, v, segment_ids=None: jax.value_and_grad(loss, (0, 1, 2))(
        q, k, v, segment_ids
    )


def lower_for(device, function, *arguments, donate_argnums=()):
    """Traces for a device without compiling."""
    mesh = Mesh(np.array([device]), ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function, donate_argnums=donate_argnums).lower(*arguments)


def v5e_device():
    return tpu_device("v5e:1x1")


def square_arrays(text):
    return re.findall(rf"\w+\[(?:\d+,)*{L},{L}\]", text)


@pytest.mark.slow
@each_layout
def test_cudnn_is_the_default_on_hopper(is_packed):
    text = str(compile_for(h100_device(), gradients(), *shapes(is_packed)).as_text())
    assert not square_arrays(text)
    calls = [line for line in text.splitlines() if " custom-call(" in line and "while" not in line]
    # The loop over more documents has its own calls. Remat saves the softmax by its name: there is
    # no second forward call.
    assert sum(FORWARD in line for line in calls) == 1
    assert sum(BACKWARD in line for line in calls) == 1


@pytest.mark.slow
def test_cudnn_takes_a_window():
    compiled = compile_for(h100_device(), gradients(window=1024), *shapes(True))
    assert re.search(r'"sliding_window_length": ?1024', compiled.as_text())


def test_float32_on_hopper_takes_blocks():
    lowered = lower_for(h100_device(), gradients(), *shapes(True, dtype=jnp.float32))
    assert "fmha" not in lowered.as_text()
    assert f"{L}x{L}x" not in lowered.as_text()


@pytest.mark.parametrize("window", [None, 8192])
def test_blocks_bound_the_scores_of_long_rows(window):
    def attend(q, k, v):
        out = causal_attention(q, k, v, window=window, implementation="xla")
        return jnp.sum(out.astype(jnp.float32))

    q, kv = (jax.ShapeDtypeStruct((1, 32768, heads, 64), jnp.bfloat16) for heads in (16, 4))
    text = jax.jit(jax.value_and_grad(attend, (0, 1, 2))).lower(q, kv, kv).as_text()
    sizes = [
        math.prod(int(size) for size in shape.split("x"))
        for shape in re.findall(r"tensor<(\d+(?:x\d+)*)x\w+>", text)
    ]
    # 256 MiB of float32, which is more than any operand takes.
    assert max(sizes) <= 1 << 26


def test_the_version_that_stands_in_is_the_targets():
    version = re.search(r"dnn_version_info {\s*major: (\d+)\s+minor: (\d+)", gpu_target("h100"))
    assert version is not None
    assert 10000 * int(version[1]) + 100 * int(version[2]) == cudnn._AHEAD_OF_TIME_VERSION


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:1x1", "v5p:1x1x1", "v6e:1x1"])
@each_layout
def test_splash_attention_is_the_default_on_tpus(topology, is_packed):
    device = tpu_device(topology)
    text = compile_for(device, gradients(), *shapes(is_packed, d=128)).as_text()
    assert not square_arrays(text)
    assert len(re.findall(r'custom_call_target="tpu_custom_call"', text)) == 3


@pytest.mark.parametrize("num_heads", [4, 16])
@pytest.mark.parametrize(("make_device", "most_copies"), [(h100_device, 1), (v5e_device, 0)])
def test_a_decode_step_writes_the_donated_cache_in_place(make_device, most_copies, num_heads):
    B, S, K, d = 8, L, 4, 128

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    cache = KeyValueCache(array(B, K, S, d), array(B, K, S, d))
    operands = array(B, 1, num_heads, d), array(B, 1, K, d), array(B, 1, K, d)
    lowered = lower_for(
        make_device(),
        lambda *operands: cached_attention(*operands[:4], positions=operands[4]),
        *operands,
        cache,
        array(B, 1, dtype=jnp.int32),
        donate_argnums=3,
    )
    memory: Any = lowered.compile().memory_analysis()
    slots = B * S * K * d * 2
    assert memory.alias_size_in_bytes == 2 * slots
    # GPUs: the selected values, and scores.
    assert memory.temp_size_in_bytes < (most_copies + 0.2) * slots


@pytest.mark.parametrize("window", [None, 2048], ids=["full", "window"])
def test_a_piece_of_a_prompt_reads_its_cache_by_cudnn(window):
    """No scores of queries to slots in memory; full attention has one kernel for cached keys."""
    B, H, K, d, S = 1, 8, 4, 64, 32768 if window is None else window

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    compiled = compile_for(
        h100_device(),
        lambda *operands: cached_attention(*operands[:4], positions=operands[4], window=window),
        array(B, L, H, d),
        array(B, L, K, d),
        array(B, L, K, d),
        KeyValueCache(array(B, K, S, d), array(B, K, S, d)),
        array(B, L, dtype=jnp.int32),
        donate_argnums=3,
    )
    text = compiled.as_text()
    assert text is not None
    assert text.count(FORWARD) >= 2
    memory: Any = compiled.memory_analysis()
    slots = 2 * B * K * S * d * 2
    assert memory.alias_size_in_bytes == slots
    # The slots without what lies behind the tokens; in a window also the row in order.
    assert memory.temp_size_in_bytes < 1.2 * slots + 16 * L * H * d * 2
