"""Low-rank adaptation (LoRA, Hu et al. 2021): factors beside kernels of linear layers, and merging.

The factors belong to `Linear` itself, which computes X W + (alpha / rank) dropout(X) A B on every
mesh with the products of its kernels. Qwix's `apply_lora_to_model` intercepts the call of a model
only, and the training step calls `hidden`, which has no logits of the whole batch.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import variance_scaling

from megalodon_jax.config import LoraConfig
from megalodon_jax.errors import ConfigError
from megalodon_jax.modules.linear import Linear, LoraFactors
from megalodon_jax.parameter_names import is_selected


def add_lora(model: nnx.Module, config: LoraConfig, *, rngs: nnx.Rngs) -> None:
    """Adds factors to linear layers, in place; the model computes what it did before.

    A (in, rank) is uniform in [-1 / sqrt(in), 1 / sqrt(in)], B (rank, out) is zero. Both
    are float32, of type `nnx.LoRAParam`, with the leading axis of layers that stacked kernels have.

    Args:
      model: a model or one of its modules.
      config: rank, alpha, dropout, and the kernels by name.
      rngs: source of initial values.

    Raises:
      ConfigError: a pattern of `targets` matches no kernel of a linear layer.
    """
    linears = linear_kernels(model)
    for pattern in config.targets:
        if not any(is_selected(name, [pattern]) for name in linears):
            raise ConfigError(
                f"lora.targets has {pattern!r}, which matches no kernel of a linear layer; they "
                f"are {', '.join(linears)}"
            )
    for name, linear in linears.items():
        if is_selected(name, config.targets):
            _add_factors(linear, config, rngs)


def linear_kernels(model: nnx.Module) -> dict[str, Linear]:
    """The linear layers of a model by the dotted names of their kernels."""
    found = {
        ".".join(map(str, (*path, "kernel"))): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear)
    }
    return dict(sorted(found.items()))


def _add_factors(linear: Linear, config: LoraConfig, rngs: nnx.Rngs) -> None:
    kernel = linear.kernel
    *layers, rows, columns = kernel.get_value().shape
    *layer_names, row_name, column_name = kernel.get_metadata()["out_sharding"]
    initialize = variance_scaling(
        1.0 / 3.0,
        "fan_in",
        "uniform",
        in_axis=-2,
        out_axis=-1,
        batch_axis=tuple(range(len(layers))),
    )
    a = initialize(rngs.params(), (*layers, rows, config.rank), jnp.float32)
    b = jnp.zeros((*layers, config.rank, columns), jnp.float32)
    linear.lora_a = _factor(a, *layer_names, row_name, None)
    linear.lora_b = _factor(b, *layer_names, None, column_name)
    linear.lora = LoraFactors(config.alpha / config.rank, config.dropout)


def _factor(value: jax.Array, *axes: str | None) -> nnx.LoRAParam:
    return nnx.LoRAParam(value, out_sharding=axes, eager_sharding=False)


def has_lora(model: nnx.Module) -> bool:
    """Whether a model has factors."""
    return any(linear.lora is not None for linear in linear_kernels(model).values())


def merge_lora[M: nnx.Module](model: M) -> M:
    """A copy without factors, with W + (alpha / rank) A B in place of W; the model itself if none.

    The product and the sum are float32; the sum is rounded once to the dtype of W.
    """
    if not has_lora(model):
        return model
    merged = nnx.clone(model)
    for linear in linear_kernels(merged).values():
        if linear.lora is None:
            continue
        kernel = jnp.asarray(linear.kernel[...])
        change = jnp.einsum(
            "...ir,...ro->...io",
            jnp.asarray(linear.lora_a[...]),
            jnp.asarray(linear.lora_b[...]),
            precision=jax.lax.Precision.HIGHEST,
        )
        value = kernel.astype(jnp.float32) + linear.lora.scale * change
        linear.kernel.set_value(value.astype(kernel.dtype))
        del linear.lora, linear.lora_a, linear.lora_b
    return merged
