"""Encoder modules against the authors' encoder code (tests/golden/encoder/README.md)."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.config import EncoderConfig
from megalodon_jax.encoder import Encoder
from megalodon_jax.modules import Block, FeedForward, MegaAttention, SequenceNorm
from megalodon_jax.modules.attention import AttentionOutput
from pallas_kernels.cema import CemaParams, bidirectional_cema
from tests.encoder import golden
from tests.golden_files import relative_error

BICEMA = [("L77", False), ("L77", True), ("L300", False)]
NORMS = [
    "groups_none", "groups_3", "groups_3_no_padding", "groups_none_far_mean", "groups_3_far_mean",
]  # fmt: skip
LAYERS = [
    "full_two_hop", "full_padded_two_hop", "full_padded_groups_3_two_hop", "chunk_16_two_hop",
    "chunk_16_of_50_two_hop", "chunk_16_silu_two_hop", "full_pre_norm", "chunk_16_of_50_pre_norm",
    "full_padded_silu_layer_scale_pre_norm",
]  # fmt: skip


def cases_of(file: str, names: list[str]) -> list:
    """(case, float64) of a file; the float64 run has one case of each kind."""
    wide = [case for where, case in golden.wide_cases() if where == file]
    return [(name, False) for name in names] + [(name, True) for name in wide]


@pytest.mark.parametrize(("case", "wide"), BICEMA)
def test_bidirectional_cema(case: str, wide: bool):
    arrays = golden.read_case("ops_bicema", case, wide=wide)
    mask = jnp.asarray(~arrays["padding_mask"][:, None])

    def run(params, x):
        # The authors count y at padding, where averages go on: zeros inside one document.
        tokens = jnp.where(mask, x, 0).swapaxes(1, 2)
        y = bidirectional_cema(tokens, params).swapaxes(1, 2)
        return y + params.omega[:, None] * jnp.where(mask, 0, x)

    def loss(params, x):
        y = run(params, x)
        return jnp.sum(y * arrays["cot_y"]), y

    shapes = {"alpha": (48, 4), "delta": (48, 4), "theta": 48, "gamma": (48, 4, 2), "omega": 24}
    with golden.precision(wide):
        loaded = {n: arrays[f"param:{n}"].reshape(shape) for n, shape in shapes.items()}
        params = CemaParams(**jax.tree.map(jnp.asarray, loaded))
        step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        (_, y), (d_params, dx) = step(params, jnp.asarray(arrays["x"]))
        tolerance = 1e-10 if wide else 3e-5
        assert relative_error(y, arrays["y"]) <= tolerance
        assert relative_error(dx, arrays["grad_x"]) <= tolerance
        for name, gradient in d_params._asdict().items():
            expected = arrays[f"grad:{name}"].reshape(gradient.shape)
            assert relative_error(gradient, expected) <= tolerance, name


@pytest.mark.parametrize(("case", "wide"), cases_of("ops_sequence_norm", NORMS))
def test_sequence_norm(case: str, wide: bool):
    arrays = golden.read_case("ops_sequence_norm", case, wide=wide)
    tolerance = 1e-10 if wide else 1e-5 if "far_mean" in case else 1e-6
    dtype = jnp.float64 if wide else jnp.float32
    ids = None
    if "padding_mask" in arrays:
        ids = jnp.asarray(~arrays["padding_mask"], jnp.int32)
    with golden.precision(wide):
        groups = None if "none" in case else 3
        module = nnx.eval_shape(
            lambda: SequenceNorm(24, num_groups=groups, dtype=dtype, param_dtype=dtype)
        )
        values = {n: arrays[f"param:{n}"] for n in ("weight", "bias")}
        graphdef, params = golden.load(module, values)

        def loss(params, x):
            y = nnx.merge(graphdef, params)(x.swapaxes(1, 2), segment_ids=ids).swapaxes(1, 2)
            return jnp.sum(y * arrays["cot_y"]), y

        step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        (_, y), (gradients, dx) = step(params, jnp.asarray(arrays["x"]))
        assert relative_error(y, arrays["y"]) <= tolerance
        assert relative_error(dx, arrays["grad_x"]) <= tolerance
        expected = {n: arrays[f"grad:{n}"] for n in ("weight", "bias")}
        golden.check_gradients(gradients, expected, tolerance)


@pytest.mark.parametrize(("case", "wide"), cases_of("layers", LAYERS))
def test_layer(case: str, wide: bool):
    arrays = golden.read_case("layers", case, wide=wide)
    D, E, Z, F, N = 24, 40, 16, 36, 4
    padding = arrays.get("padding_mask")
    valid = np.ones(arrays["x"].shape[:2], bool) if padding is None else ~padding
    ids = None if padding is None else jnp.asarray(valid, jnp.int32)
    with golden.precision(wide):
        dtype = jnp.float64 if wide else jnp.float32
        dtypes = {"dtype": dtype, "param_dtype": dtype}
        module = nnx.eval_shape(lambda: Block(
            MegaAttention(
                D, z_dim=Z, value_dim=E, cema_order=N, causal=False, time_norm="sequence",
                qk_norm="l2", norm_num_groups=3 if "groups_3" in case else None,
                chunk_size=16 if "chunk_16" in case else None,
                average_activation="silu" if "silu" in case else "rms", rngs=nnx.Rngs(0), **dtypes,
            ),
            FeedForward(
                D, F, hidden_bias=True, rescale_start=0.1 if "layer_scale" in case else None,
                rngs=nnx.Rngs(0), **dtypes,
            ),
            residual_connection="pre_norm" if "pre_norm" in case else "two_hop",
        ))  # fmt: skip
        graphdef, params = golden.load(module, golden.block_arrays(arrays, "param:"))

        def loss(params, x):
            block = nnx.merge(graphdef, params)
            y = block(x, segment_ids=ids).x
            return jnp.sum(y * arrays["cot_y"]), (y, x + block.mega(x, segment_ids=ids).out)

        step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        (_, (y, y_attention)), (gradients, dx) = step(params, jnp.asarray(arrays["x"]))
        tolerance = 1e-10 if wide else 3e-5
        assert relative_error(y[valid], arrays["y"][valid]) <= tolerance
        # The float64 run did not keep it.
        assert relative_error(y_attention[valid], arrays["y_attention"][valid]) <= 3e-5
        assert relative_error(dx, arrays["grad_x"]) <= tolerance
        golden.check_gradients(gradients, golden.block_arrays(arrays, "grad:"), tolerance)


CLASSIFIERS = {
    "classifier_tokens": {
        "vocab_size": 20, "num_layers": 2, "model_dim": 32, "value_dim": 48, "ffn_hidden_dim": 40,
    },
    "classifier_pixels": {"input": "values", "num_layers": 2},
    "classifier_pairs": {"vocab_size": 20, "num_layers": 1, "head": "pairs", "num_classes": 2},
}  # fmt: skip


def all_classifiers() -> list:
    files = [(file, name) for file in CLASSIFIERS for name in golden.case_names(file)]
    wide = [entry for entry in golden.wide_cases() if entry[0] in CLASSIFIERS]
    return [(*entry, False) for entry in files] + [(*entry, True) for entry in wide]


def batch_of(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray | None, int | None]:
    """Inputs, segment ids, most documents."""
    if "pixels" in arrays:
        return arrays["pixels"][..., None], None, None

    def is_token(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return (np.arange(tokens.shape[1]) < lengths[:, None]).astype(np.int32)

    tokens, ids = arrays["tokens"], is_token(arrays["tokens"], arrays["lengths"])
    if "tokens1" not in arrays:
        return tokens.astype(np.int32), ids, None
    second = arrays["tokens1"]
    ids = np.concatenate([ids, 2 * is_token(second, arrays["lengths1"])], axis=1)
    return np.concatenate([tokens, second], axis=1).astype(np.int32), ids, 2


@pytest.mark.parametrize(("file", "case", "wide"), all_classifiers())
@pytest.mark.slow
def test_classifier(file: str, case: str, wide: bool):
    arrays = golden.read_case(file, case, wide=wide)
    meta = golden.config_of(file)["cases"][case]
    dtype = "float64" if wide else "float32"
    with golden.precision(wide):
        config = EncoderConfig(
            **{"model_dim": 24, "value_dim": 40, "ffn_hidden_dim": 36, **CLASSIFIERS[file]},
            z_dim=16, cema_ndim=4, chunk_size=meta.get("chunk"), dtype=dtype, param_dtype=dtype,
            average_activation="silu" if "silu" in case else "rms",
            residual_connection="pre_norm" if "pre_norm" in case else "two_hop",
            norm_num_groups=meta.get("groups"),
        )  # fmt: skip
        graphdef, params = golden.load(
            nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0))),
            golden.encoder_arrays(arrays, "param:"),
        )
        inputs, ids, most = batch_of(arrays)
        options = {"segment_ids": ids, "max_documents": most}

        def loss(params, inputs):
            model = nnx.merge(graphdef, params)
            logits = model(inputs, **options).reshape(len(inputs), -1)
            chosen = jnp.take_along_axis(logits, arrays["target"][:, None].astype(int), axis=1)
            each = jax.nn.logsumexp(logits, axis=1) - chosen[:, 0]
            return jnp.mean(each), (logits, model.vectors(inputs, **options))

        which = (0, 1) if "pixels" in arrays else 0
        step = jax.jit(jax.value_and_grad(loss, which, has_aux=True))
        (value, (logits, vectors)), gradients = step(params, jnp.asarray(inputs))
        tolerance = 1e-10 if wide else 3e-5
        assert relative_error(logits, arrays["logits"]) <= (1e-10 if wide else 2e-6)
        assert relative_error(value, arrays["loss"]) <= tolerance
        if "pixels" in arrays:
            gradients, d_pixels = gradients
            assert relative_error(d_pixels[..., 0], arrays["grad_pixels"]) <= tolerance
        expected = golden.encoder_arrays(arrays, "grad:")
        if ids is not None and "pixels" not in arrays:
            # The authors leave the row of the padding token out of the gradient.
            assert not np.any(np.asarray(gradients["inputs"]["embed"]["embedding"][...])[1])
        golden.check_gradients(gradients, expected, tolerance)
        if most is None:
            assert relative_error(vectors, arrays["rep"]) <= tolerance


def test_output_of_attention_is_wide_for_float64():
    with golden.precision(True):
        out = AttentionOutput(jnp.ones((1, 1, 2), jnp.float64), jnp.ones(2, jnp.float64), None)
        assert out.out.dtype == jnp.float64
