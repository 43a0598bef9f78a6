"""Norms, feed-forward network and attention layer against the released code."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.config import ModelConfig
from megalodon_jax.modules import FeedForward, LayerNorm, MegaAttention, PositionInfo, RMSNorm
from megalodon_jax.modules.rotary import rotation
from tests.golden_files import read_golden, relative_error

SHAPE = ModelConfig(
    num_layers=1, model_dim=64, z_dim=32, value_dim=128, ffn_hidden_dim=160, chunk_size=32,
    vocab_size=97, norm_num_groups=8,
)  # fmt: skip


def golden_case(file: str, case: str) -> dict[str, np.ndarray]:
    _, arrays = read_golden(file)
    prefix = f"{case}/"
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def check_layer(module, run, golden: dict[str, np.ndarray], names: dict[str, str], inputs) -> None:
    """Loads `param:*` into the module, then compares the output and all gradients.

    `names` maps the module's parameter paths to released names; linear weights are transposed.
    """
    graphdef, params = nnx.split(module, nnx.Param)
    flat = dict(nnx.to_flat_state(params))
    assert {".".join(path) for path in flat} == set(names)
    for path, param in flat.items():
        value = golden[f"param:{names['.'.join(path)]}"]
        value = value.T if path[-1] == "kernel" else value
        flat[path] = param.replace(jnp.asarray(value.reshape(param.shape)))
    params = nnx.from_flat_state(flat)

    def loss(params, *inputs):
        y = run(nnx.merge(graphdef, params), *inputs)
        return jnp.sum(y * golden["cot_y"]), y

    arguments = (params, *(golden[name] for name in inputs))
    which = tuple(range(len(arguments)))
    (_, y), gradients = jax.jit(jax.value_and_grad(loss, which, has_aux=True))(*arguments)
    assert relative_error(y, golden["y"]) <= 1e-6
    for name, gradient in zip(inputs, gradients[1:]):
        assert relative_error(gradient, golden[f"grad_{name}"]) <= 5e-6, name
    for path, gradient in nnx.to_flat_state(gradients[0]):
        expected = golden[f"grad:{names['.'.join(path)]}"]
        expected = expected.T if path[-1] == "kernel" else expected.reshape(gradient[...].shape)
        assert relative_error(gradient[...], expected) <= 5e-6, path


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("kind", "name"), [(RMSNorm, "RMSNorm"), (LayerNorm, "LayerNorm")])
def test_norms(kind, name: str, affine: bool):
    golden = golden_case("ops_ffn_norms", f"Fused{name}_affine{int(affine)}")
    D = golden["x"].shape[-1]
    config = ModelConfig(model_dim=D, norm_num_groups=8, norm_affine=affine)
    learned = [key.removeprefix("param:") for key in golden if key.startswith("param:")]
    names = {entry: entry for entry in learned}
    check_layer(kind.from_config(config), lambda module, x: module(x), golden, names, ["x"])


@pytest.mark.parametrize("rescale", [None, 0.1, 0.05])
@pytest.mark.parametrize("swiglu", [False, True])
def test_feed_forward(swiglu: bool, rescale: float | None):
    golden = golden_case("ops_ffn_norms", f"swiglu{int(swiglu)}_rescale{rescale}")
    config = dataclasses.replace(SHAPE, swiglu=swiglu, rescale_nffn=rescale is not None)
    names = {"norm.weight": "norm.weight", "norm.bias": "norm.bias"}
    names |= {f"{fc}.kernel": f"{fc}.weight" for fc in ("fc1", "fc2")}
    names |= {"fc3.kernel": "fc3.weight"} if swiglu else {}
    names |= {"alpha": "alpha"} if rescale else {}
    module = FeedForward.from_config(config, rescale_start=rescale or 0.0, rngs=nnx.Rngs(0))
    check_layer(module, lambda m, x, r: m(x) + r, golden, names, ["x", "residual"])


@pytest.mark.parametrize("case", ["H1_L96_C32_N16_z32_base0", "H2_L20_C32_N8_z64_base100000"])
def test_attention_layer(case: str):
    golden = golden_case("layer_mega", case)
    sizes = {field[0]: int(field[1:]) for field in case.split("_")[:4]}
    Z, base = golden["param:wz.bias"].shape[0], 100_000.0 if "100000" in case else 10_000.0
    config = dataclasses.replace(
        SHAPE, num_heads=sizes["H"], z_dim=Z, cema_ndim=sizes["N"], rope_base=base
    )
    names = {
        name.replace("weight", "kernel") if name.startswith("w") else name: name
        for name in (key.removeprefix("param:") for key in golden if key.startswith("param:"))
        if "prior" not in name
    }

    def run(module: MegaAttention, x):
        positions = jnp.arange(x.shape[1])[None] % config.chunk_size
        info = PositionInfo(rotation(positions, config.head_dim, base), None, None)
        return x + module(x, positions=info).out

    module = MegaAttention.from_config(config, rngs=nnx.Rngs(0))
    check_layer(module, run, golden, names, ["x"])
