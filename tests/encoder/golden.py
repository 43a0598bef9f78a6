"""Golden vectors of the authors' encoders, in the names and shapes of this project's modules."""

from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp

from tests.golden_files import read_golden, relative_error

FLOAT64 = "float64"


def read_case(file: str, case: str, *, wide: bool) -> dict[str, np.ndarray]:
    """Arrays of a case by name, `param:` ones of its file included.

    With `wide` the results are those of the float64 run, and inputs and parameters are widened.
    """
    _, arrays = read_golden(f"encoder/{file}")
    prefix = f"{case}/"
    found = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    found |= {k: v for k, v in arrays.items() if k.startswith("param:")}
    if not wide:
        return found
    _, exact = read_golden("encoder/float64")
    prefix = f"{file}/{case}/"
    found |= {k.removeprefix(prefix): v for k, v in exact.items() if k.startswith(prefix)}
    return {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in found.items()}


def wide_cases() -> list[tuple[str, str]]:
    """Files and cases of the float64 run."""
    _, exact = read_golden("encoder/float64")
    return sorted({(name.split("/")[0], name.split("/")[1]) for name in exact})


def block_arrays(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Arrays of one layer under the names of `Block`; absent ones are left out."""

    def at(name: str) -> np.ndarray | None:
        return arrays.get(f"{prefix}{name}")

    found: dict[str, Any] = {}
    for ours, theirs in {
        "mega.timenorm.weight": "mega_layer.norm.weight",
        "mega.timenorm.bias": "mega_layer.norm.bias",
        "mega.rmsnorm.weight": "mega_layer.move_act.weight",
        "mega.gamma": "mega_layer.gamma",
        "mega.beta": "mega_layer.beta",
        "mega.cema.gamma": "mega_layer.move.gamma",
        "mega.wv.bias": "mega_layer.v_proj.bias",
        "nffn.norm.weight": "nffn.norm.weight",
        "nffn.norm.bias": "nffn.norm.bias",
        "nffn.fc1.bias": "nffn.fc1.bias",
        "nffn.alpha": "nffn.layerscale_weight",
    }.items():
        found[ours] = at(theirs)
    for ours, theirs in {
        "mega.wv.kernel": "mega_layer.v_proj.weight",
        "mega.wh2.kernel": "mega_layer.h_proj.weight",
        "nffn.fc1.kernel": "nffn.fc1.weight",
        "nffn.fc2.kernel": "nffn.fc2.weight",
    }.items():
        value = at(theirs)
        found[ours] = None if value is None else value.T
    for name in ("alpha", "delta", "theta", "omega"):
        value = at(f"mega_layer.move.{name}")
        if value is not None:
            value = value[..., 0] if name in ("alpha", "delta") else value.reshape(-1)
        found[f"mega.cema.{name}"] = value
    weight, bias = at("mega_layer.mx_proj.weight"), at("mega_layer.mx_proj.bias")
    z, e = at("mega_layer.gamma"), at("mega_layer.v_proj.bias")
    if weight is not None and bias is not None and z is not None and e is not None:
        ends = [z.shape[1], z.shape[1] + e.shape[0]]
        for name, w, b in zip(("wz", "wr", "wh1"), np.split(weight, ends), np.split(bias, ends)):
            found[f"mega.{name}.kernel"], found[f"mega.{name}.bias"] = w.T, b
    return {name: value for name, value in found.items() if value is not None}


def encoder_arrays(arrays: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    """Arrays of a classifier under the names of `Encoder`; `kind` is "param:" or "grad:"."""
    core = f"{kind}encoder.encoder."
    count = 1 + max(int(k.split("layers.")[1].split(".")[0]) for k in arrays if "layers." in k)
    layers = [block_arrays(arrays, f"{core}layers.{i}.") for i in range(count)]
    found = {f"layers.{name}": np.stack([layer[name] for layer in layers]) for name in layers[0]}
    embed = arrays[f"{core}embed_tokens.weight"]
    if embed.ndim == 2:
        found["inputs.embed.embedding"] = embed
    else:
        found["inputs.weight"] = embed[None]
        found["inputs.bias"] = arrays[f"{core}embed_tokens.bias"]
    found["final_norm.weight"] = arrays[f"{core}final_norm.weight"]
    found["final_norm.bias"] = arrays[f"{core}final_norm.bias"]
    found["pool.proj.kernel"] = arrays[f"{core}final_proj.weight"].T
    found["pool.proj.bias"] = arrays[f"{core}final_proj.bias"]
    classifier = arrays[f"{kind}sentence_projection_layer.weight"].T
    if f"{kind}pre_logits.0.weight" in arrays:
        found["head.kernel"] = arrays[f"{kind}pre_logits.0.weight"].T
        found["head.bias"] = arrays[f"{kind}pre_logits.0.bias"]
        found["head.classifier.kernel"] = classifier
    else:
        found["head.kernel"] = classifier
    return found


def load(module: nnx.Module, values: dict[str, np.ndarray]) -> tuple[nnx.GraphDef, nnx.State]:
    """An abstract module split, with these parameters; their names must be those of the module."""
    graphdef, params = nnx.split(module, nnx.Param)
    flat = dict(nnx.to_flat_state(params))
    assert {name_of(path) for path in flat} <= set(values), sorted(map(name_of, flat))
    for path, param in flat.items():
        value = values[name_of(path)]
        assert value.shape == param.shape, path
        flat[path] = param.replace(jnp.asarray(value))
    return graphdef, nnx.from_flat_state(flat)


def check_gradients(gradients: nnx.State, expected: dict[str, np.ndarray], tolerance: float):
    for path, gradient in nnx.to_flat_state(gradients):
        name = name_of(path)
        error = relative_error(gradient[...], expected[name])
        assert error <= tolerance, (name, error)


def name_of(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def precision(wide: bool):
    """The context in which float64 arrays stay so."""
    return jax.enable_x64(wide)


def case_names(file: str) -> list[str]:
    """Cases of a file."""
    _, arrays = read_golden(f"encoder/{file}")
    return sorted({name.split("/")[0] for name in arrays if not name.startswith("param:")})


def config_of(file: str) -> dict[str, Any]:
    """Sizes and cases of a file."""
    return read_golden(f"encoder/{file}")[0]["config"]
