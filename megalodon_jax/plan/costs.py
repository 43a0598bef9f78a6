"""FLOPs of the kernels in a compiled step: as they state, or by formula."""

from megalodon_jax.compiled.hlo import Program
from megalodon_jax.compiled.kernels import CompiledKernel, find_kernels
from megalodon_jax.config import AnyModelConfig, ModelConfig, TransformerConfig
from megalodon_jax.flops import causal_flops_per_token, mean_visible_keys


def find_step_kernels(
    program: Program, model: AnyModelConfig, *, tokens: int, length: int, tensor_shards: int
) -> list[CompiledKernel]:
    """The kernels that a step runs on one device, with the FLOPs of one execution.

    Attention counts by formula, causal inside whole chunks or rows: its kernels skip masked tiles,
    but state the FLOPs of a full grid, or none. Mosaic GPU kernels of other operations state
    nothing; they count the operations of the definition, at which memory traffic sets their time.

    Args:
      program: the compiled step.
      model: the model's shape.
      tokens: of one execution on one device.
      length: tokens of a row.
      tensor_shards: size of the mesh axis `model`, which shards heads and features.
    """
    found = []
    for kernel in find_kernels(program):
        if isinstance(model, ModelConfig) and kernel.operation == "chunk_attention":
            kernel = kernel._replace(flops=_attention_flops(kernel, model, tokens, tensor_shards))
        elif not kernel.flops and kernel.name in _FLOPS_PER_ELEMENT:
            kernel = kernel._replace(flops=_definition_flops(kernel, model, tokens, tensor_shards))
        elif isinstance(model, TransformerConfig) and kernel.operation == "attention":
            # Products per token and key: two forward, five backward, of them one for the scores.
            products = next((count for name, count in _PRODUCTS.items() if name in kernel.name), 0)
            keys = mean_visible_keys(length, model.attention_window)
            flops = 2 * products * tokens * keys * model.model_dim / tensor_shards
            kernel = kernel._replace(flops=round(flops))
        found.append(kernel)
    return found


# FLOPs per token and channel; those of CEMA per state too. The recurrence takes a complex product
# and sum for each state (8 + 2), an output the real part of a product and its sum (4). The backward
# pass repeats the recurrence, runs its adjoint, and sums gradients of three complex coefficients.
_FLOPS_PER_ELEMENT = {
    "cema_summaries": 10,
    "cema_outputs": 14,
    "cema_gradients": 48,
    "timestep_norm_moments": 3,
    "timestep_norm_outputs": 8,
    "timestep_norm_slopes": 8,
    "timestep_norm_gradients": 20,
    "rowwise_layer_norm_forward": 8,
    "rowwise_layer_norm_backward": 18,
    "rowwise_rms_norm_forward": 5,
    "rowwise_rms_norm_backward": 12,
    "rowwise_silu_forward": 5,
    "rowwise_silu_backward": 9,
    "rowwise_silu_gate_forward": 6,
    "rowwise_silu_gate_backward": 12,
}


def _definition_flops(
    kernel: CompiledKernel, model: AnyModelConfig, tokens: int, tensor_shards: int
) -> int:
    per_element = _FLOPS_PER_ELEMENT[kernel.name]
    if kernel.operation == "rowwise":
        return per_element * kernel.results[0].size
    states = model.cema_ndim if isinstance(model, ModelConfig) else 1
    elements = tokens * model.model_dim // tensor_shards
    return per_element * elements * (states if kernel.operation == "cema" else 1)


# Products with every key by the kernel's name; splash attention's backward pass has two kernels.
_PRODUCTS = {"fwd": 2, "forward": 2, "backward": 5, "dkv": 4, "dq": 3}


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
