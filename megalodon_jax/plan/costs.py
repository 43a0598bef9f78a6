"""FLOPs of the kernels in a compiled step: attention's by formula, the others' as they state."""

from megalodon_jax.compiled.hlo import Program
from megalodon_jax.compiled.kernels import CompiledKernel, find_kernels
from megalodon_jax.config import ModelConfig
from megalodon_jax.flops import causal_flops_per_token


def find_step_kernels(
    program: Program, model: ModelConfig, *, tokens: int, tensor_shards: int
) -> list[CompiledKernel]:
    """The kernels that a step runs on one device, with the FLOPs of one execution.

    Attention counts by formula, causal inside whole chunks: its kernels skip masked tiles, but
    state the FLOPs of a full grid. Mosaic GPU kernels of other operations state nothing: 0.

    Args:
      program: the compiled step.
      model: the model's shape.
      tokens: of one execution on one device.
      tensor_shards: size of the mesh axis `model`, which shards heads and features.
    """
    return [
        kernel._replace(flops=_attention_flops(kernel, model, tokens, tensor_shards))
        if kernel.operation == "chunk_attention"
        else kernel
        for kernel in find_kernels(program)
    ]


def _attention_flops(
    kernel: CompiledKernel, model: ModelConfig, tokens: int, tensor_shards: int
) -> int:
    keys, values = model.z_dim // tensor_shards, model.value_dim // tensor_shards
    widths = {
        "chunk_attention_forward": keys + values,
        # Scores again, then the gradients of weights, v, q and k.
        "chunk_attention_backward": 3 * keys + 2 * values,
        "chunk_attention_weights": keys,
        "chunk_attention_score_gradient": values,
    }
    width = widths.get(kernel.name, 0)
    if "band" in kernel.name:
        width = kernel.results[0].size // tokens
    return tokens * causal_flops_per_token(model.chunk_size, width)
