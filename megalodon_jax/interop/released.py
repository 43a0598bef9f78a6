"""Conversion from and to released state dicts (github.com/XuezheMax/megalodon).

One table, `released_entries`, gives for every tensor of a released state dict its Param in this
model, its shape, and the axis along which the released model-parallel code shards it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from megalodon_jax.config import ModelConfig
from megalodon_jax.errors import ConfigError, StateDictError
from megalodon_jax.file_limits import MAX_METADATA_BYTES, read_json_table
from megalodon_jax.model import Megalodon
from megalodon_jax.modules.rotary import rotary_frequencies

Layout = Literal["same", "transposed"]


class Entry(NamedTuple):
    """One tensor of a released state dict.

    Attributes:
      name: its released name; `{}` is the layer index of a block's tensor.
      shape: its shape in an unsharded released state dict.
      path: attribute path of the Param in the model; empty for a tensor derived from the config or
        from another tensor (rotary frequencies, tied output matrix, priors of count 0).
      layout: "transposed" for linear weights, which are released as (out, in) and stored here as
        (in, out); "same" may add axes of length 1.
      shard_axis: the axis sharded by released model parallelism; None: shards hold copies.
    """

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    layout: Layout = "same"
    shard_axis: int | None = None


def released_entries(config: ModelConfig) -> tuple[list[Entry], list[Entry]]:
    """(entries outside the blocks, entries of one block) of a released state dict.

    Raises:
      StateDictError: the configuration is an ablation, which has no released names.
    """
    _check_released(config)
    D, V = config.model_dim, config.vocab_size
    output_path = () if config.share_emb else ("output", "kernel")
    outside = [
        Entry("embed.weight", (V, D), ("embed", "embedding"), shard_axis=1),
        Entry("rope.freqs", (config.head_dim // 2,), ()),
        *_timestep_norm_entries(config, "output.final_norm", ("final_norm",)),
        Entry("output.output.weight", (config.num_outputs, D), output_path, "transposed", 1),
    ]
    return outside, _block_entries(config)


def _check_released(config: ModelConfig) -> None:
    released = ModelConfig()
    differing = [
        f"{name} = {getattr(config, name)!r}"
        for name in (
            "moving_average",
            "time_norm",
            "residual_connection",
            "qk_norm",
            "skip_attention",
        )
        if getattr(config, name) != getattr(released, name)
    ]
    if config.rope_base is None:
        differing.append("rope_base = None")
    if differing:
        raise StateDictError(
            f"the model has {', '.join(differing)}, and released state dicts have no names for "
            "such a model; keep it as a run directory"
        )


def _block_entries(config: ModelConfig) -> list[Entry]:
    D, Z, E, F, N = (
        config.model_dim, config.z_dim, config.value_dim, config.ffn_hidden_dim, config.cema_ndim,
    )  # fmt: skip
    mega, nffn = ("layers", "mega"), ("layers", "nffn")

    def linear(name: str, shape: tuple[int, int], at: tuple[str, ...], split: int) -> list[Entry]:
        attribute = name.rsplit(".", 1)[1]
        weight = Entry(f"{name}.weight", shape, (*at, attribute, "kernel"), "transposed", split)
        if attribute not in ("wv", "wz", "wr", "wh1"):
            return [weight]
        bias = Entry(f"{name}.bias", shape[:1], (*at, attribute, "bias"), shard_axis=0)
        return [weight, bias]

    cema = {"alpha": (D, N, 1), "delta": (D, N, 1), "theta": (D, 1, 1), "gamma": (D, N, 2), "omega": (D, 1)}  # fmt: skip  # noqa: E501
    entries = [
        Entry("layers.{}.mega.gamma", (2, Z), (*mega, "gamma"), shard_axis=1),
        Entry("layers.{}.mega.beta", (2, Z), (*mega, "beta"), shard_axis=1),
        *_timestep_norm_entries(config, "layers.{}.mega.timenorm", (*mega, "timenorm")),
        *(
            Entry(f"layers.{{}}.mega.cema.{name}", shape, (*mega, "cema", name), shard_axis=0)
            for name, shape in cema.items()
        ),
        *linear("layers.{}.mega.wv", (E, D), mega, 0),
        *linear("layers.{}.mega.wz", (Z, D), mega, 0),
        *linear("layers.{}.mega.wr", (E, D), mega, 0),
        *linear("layers.{}.mega.wh1", (D, D), mega, 0),
        *linear("layers.{}.mega.wh2", (D, E), mega, 1),
        *linear("layers.{}.nffn.fc1", (F, D), nffn, 0),
        *linear("layers.{}.nffn.fc2", (D, F), nffn, 1),
    ]
    if config.norm_affine:
        entries += [
            Entry("layers.{}.mega.rmsnorm.weight", (D,), (*mega, "rmsnorm", "weight")),
            Entry("layers.{}.nffn.norm.weight", (D,), (*nffn, "norm", "weight")),
            Entry("layers.{}.nffn.norm.bias", (D,), (*nffn, "norm", "bias")),
        ]
    if config.swiglu:
        entries += linear("layers.{}.nffn.fc3", (F, D), nffn, 0)
    if config.rescale_nffn:
        entries.append(Entry("layers.{}.nffn.alpha", (D,), (*nffn, "alpha")))
    return entries


def _timestep_norm_entries(config: ModelConfig, name: str, path: tuple[str, ...]) -> list[Entry]:
    D, G = config.model_dim, config.norm_num_groups
    has_prior = config.norm_prior_count > 0
    return [
        Entry(f"{name}.weight", (D,), (*path, "weight"), shard_axis=0),
        Entry(f"{name}.bias", (D,), (*path, "bias"), shard_axis=0),
        Entry(f"{name}.prior_count", (), ()),
        *(
            Entry(f"{name}.{which}", (G,), (*path, which) if has_prior else (), shard_axis=0)
            for which in ("prior_mean", "prior_logv")
        ),
    ]


def from_state_dict(config: ModelConfig, state_dict: Mapping[str, Any]) -> Megalodon:
    """Builds a model with the weights of a released state dict.

    Args:
      config: the model's configuration, for example from `config_from_released`.
      state_dict: numpy arrays, jax arrays or torch tensors by released name, unsharded (see
        `join_shards`). Values are cast to `config.param_dtype`, those of CEMA to float32. Derived
        buffers are optional; if present, they must match the config.

    Raises:
      StateDictError: an entry is unknown, missing, of another shape or kind, or contradicts the
        config.
    """
    outside, per_block = released_entries(config)
    _check_num_layers(config, state_dict)
    named = _named_entries(config, outside, per_block)
    arrays = {name: _to_numpy(value) for name, value in state_dict.items()}
    _check_entries(arrays, named)
    _check_derived(config, arrays, named)

    abstract = nnx.eval_shape(lambda: Megalodon(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    flat = dict(nnx.to_flat_state(state))
    for entry in (*outside, *per_block):
        if not entry.path:
            continue
        param = flat[entry.path]
        if "{}" in entry.name:
            layers = [arrays[entry.name.format(i)] for i in range(config.num_layers)]
            value = np.stack([_to_model_layout(layer, entry) for layer in layers])
        else:
            value = _to_model_layout(arrays[entry.name], entry)
        flat[entry.path] = param.replace(value.reshape(param.shape).astype(param.dtype))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def to_state_dict(model: Megalodon) -> dict[str, np.ndarray]:
    """The model's weights by released name, in released shapes, with derived buffers; exact."""
    config = model.config
    outside, per_block = released_entries(config)
    flat = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    arrays: dict[str, np.ndarray] = {}
    for entry in outside:
        if entry.path:
            arrays[entry.name] = _to_released_layout(np.asarray(flat[entry.path][...]), entry)
    for entry in per_block:
        if entry.path:
            stacked = np.asarray(flat[entry.path][...])
            for i in range(config.num_layers):
                arrays[entry.name.format(i)] = _to_released_layout(stacked[i], entry)
    for name, entry in _named_entries(config, outside, per_block).items():
        if not entry.path:
            arrays[name] = _derived_value(config, arrays, entry)
    return arrays


def join_shards(config: ModelConfig, shards: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Joins the shards of a released model-parallel checkpoint, in rank order.

    Raises:
      StateDictError: the shards have different entries, differ in an unsharded entry, or have an
        unknown entry.
    """
    if not shards:
        raise StateDictError("there are no shards; pass one state dict per rank")
    _check_num_layers(config, shards[0])
    named = _named_entries(config, *released_entries(config))
    names = list(shards[0])
    for rank, shard in enumerate(shards):
        if differing := sorted(set(shard) ^ set(names)):
            raise StateDictError(
                f"shard {rank} and shard 0 differ in their entries: {_listed(differing)}; pass "
                "shards of one checkpoint"
            )
    if unknown := sorted(set(names) - set(named)):
        raise StateDictError(
            f"unknown entries: {_listed(unknown)}; check that the config is that of the checkpoint"
        )
    joined = {}
    for name in names:
        values = [_to_numpy(shard[name]) for shard in shards]
        axis = named[name].shard_axis
        if axis is not None:
            try:
                joined[name] = np.concatenate(values, axis=axis)
            except ValueError as error:
                shapes = ", ".join(str(value.shape) for value in values)
                raise StateDictError(
                    f"the shards of {name} have shapes {shapes:.160}, which cannot be joined along "
                    f"axis {axis}; pass shards of one checkpoint"
                ) from error
        elif all(np.array_equal(value, values[0]) for value in values):
            joined[name] = values[0]
        else:
            raise StateDictError(
                f"the shards have different values of {name}, which is not sharded; pass shards of "
                "one checkpoint"
            )
    return joined


def config_from_released(table: Mapping[str, Any], **overrides: Any) -> ModelConfig:
    """The `ModelConfig` of the "model" table in a released `config.json`, with overrides."""
    table = table.get("model", table)
    if not isinstance(table, Mapping):
        raise ConfigError(f"the released config's model is {table!r:.80}; it must be a table")
    table = dict(table)
    for runtime_only in ("efficient_attn", "layerwise_ckpt", "custom_bwd", "loss_parallel"):
        table.pop(runtime_only, None)
    if table.get("init_mode") == "none":
        del table["init_mode"]
    if table.get("output_size") == -1:
        table["output_size"] = None
    if table.get("rope_base", 0) is None:
        del table["rope_base"]
    try:
        return ModelConfig(**{**table, **overrides})
    except TypeError as error:
        raise ConfigError(
            f"the released config has an unsupported setting ({error}); remove it"
        ) from error


def read_released_checkpoint(directory: str | Path) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Reads a consolidated released checkpoint directory: config.json and consolidated*.pth.

    Raises:
      StateDictError: the directory holds no consolidated checkpoint.
    """
    from megalodon_jax.interop.torch_file import read_torch_file

    directory = Path(directory)
    shards = sorted(directory.glob("consolidated*.pth"))
    config_file = directory / "config.json"
    if not shards or not config_file.is_file():
        raise StateDictError(
            f"{directory} is not a consolidated released checkpoint; it must have config.json and "
            "consolidated.pth or consolidated.00.pth, consolidated.01.pth, ..."
        )
    table = read_json_table(config_file, max_bytes=MAX_METADATA_BYTES, error=StateDictError)
    config = config_from_released(table)
    return config, join_shards(config, [read_torch_file(shard) for shard in shards])


def _check_num_layers(config: ModelConfig, state_dict: Mapping[str, Any]) -> None:
    """Compares the layers before their names are listed: a configuration may claim any number."""
    if config.num_layers > len(state_dict):
        raise StateDictError(
            f"the config has {config.num_layers:,} layers, the state dict only {len(state_dict):,} "
            "entries; check num_layers"
        )


def _named_entries(
    config: ModelConfig, outside: list[Entry], per_block: list[Entry]
) -> dict[str, Entry]:
    named = {entry.name: entry for entry in outside}
    for i in range(config.num_layers):
        named |= {entry.name.format(i): entry for entry in per_block}
    return named


def _check_entries(arrays: Mapping[str, np.ndarray], named: Mapping[str, Entry]) -> None:
    problems = []
    if unknown := sorted(set(arrays) - set(named)):
        problems.append(f"unknown entries: {_listed(unknown)}")
    if missing := sorted(name for name, e in named.items() if e.path and name not in arrays):
        problems.append(f"missing entries: {_listed(missing)}")
    misshaped = [
        f"{name} {arrays[name].shape}, must be {entry.shape}"
        for name, entry in named.items()
        if name in arrays and arrays[name].shape != entry.shape
    ]
    if misshaped:
        problems.append(f"entries of wrong shape: {_listed(misshaped)}")
    not_numbers = [
        f"{name} {arrays[name].dtype}, must be floating point"
        for name, entry in named.items()
        if entry.path and name in arrays and not _is_floating(arrays[name])
    ]
    if not_numbers:
        problems.append(f"entries of wrong dtype: {_listed(not_numbers)}")
    if problems:
        raise StateDictError("the state dict does not match the config; " + "; ".join(problems))


def _is_floating(array: np.ndarray) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))


def _check_derived(
    config: ModelConfig, arrays: Mapping[str, np.ndarray], named: Mapping[str, Entry]
) -> None:
    for name, entry in named.items():
        if entry.path or name not in arrays:
            continue
        if arrays[name].dtype.kind in "cOSUM":
            raise StateDictError(f"{name} has dtype {arrays[name].dtype}; it must be a number")
        given = arrays[name].astype(np.float64)
        expected = _derived_value(config, arrays, entry).astype(np.float64)
        # In bfloat16 checkpoints the buffers are rounded to 8 bits too.
        if not np.allclose(given, expected, rtol=2**-8, atol=0.0):
            raise StateDictError(
                f"{name} contradicts the config (maximum difference "
                f"{np.max(np.abs(given - expected)):.3g}); check rope_base, share_emb and "
                "norm_prior_count"
            )


def _derived_value(
    config: ModelConfig, arrays: Mapping[str, np.ndarray], entry: Entry
) -> np.ndarray:
    if entry.name == "rope.freqs":
        assert config.rope_base is not None
        return rotary_frequencies(config.head_dim, config.rope_base)
    if entry.name == "output.output.weight":
        return arrays["embed.weight"]
    if entry.name.endswith("prior_count"):
        return np.asarray(config.norm_prior_count, np.int64)
    return np.zeros(entry.shape, np.float32)


def _to_model_layout(array: np.ndarray, entry: Entry) -> np.ndarray:
    return array.T if entry.layout == "transposed" else array


def _to_released_layout(array: np.ndarray, entry: Entry) -> np.ndarray:
    return array.T.copy() if entry.layout == "transposed" else array.reshape(entry.shape)


def _to_numpy(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):  # a torch tensor; torch is not imported
        value = value.detach().cpu()
        value = value.float() if "bfloat16" in str(value.dtype) else value
        return value.numpy()
    return np.asarray(value)


def _listed(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    # Names come from the file: they are shortened, and line breaks escaped.
    shown = [
        name if name.isprintable() and len(name) <= 160 else f"{name!r:.160}"
        for name in names[:limit]
    ]
    return ", ".join(shown) + more
