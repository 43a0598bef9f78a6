"""Training with the default implementations compared with the reference ones.

    megalodon bench reference --text book.txt

A model of mega200M's width with few layers trains on random crops of a text's bytes; some rows are
packed with three documents. There are three variants: float32 with the reference implementations,
bfloat16 with the reference ones, and bfloat16 with the default ones. The first table has the
distances of one batch's gradients from those of float32; the second the losses of `steps` training
steps, from the same weights on the same batches.
"""

import dataclasses
import statistics
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.bench.options import BenchReferenceOptions
from megalodon_jax.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from megalodon_jax.errors import ConfigError
from megalodon_jax.loss import cross_entropy
from megalodon_jax.model import Megalodon
from megalodon_jax.train_state import init_state
from megalodon_jax.training.step import make_train_step
from megalodon_jax.typing import Batch

SMALL = {
    "model_dim": 64, "z_dim": 32, "value_dim": 128, "ffn_hidden_dim": 128, "norm_num_groups": 8,
}  # fmt: skip


def variants(options: BenchReferenceOptions) -> dict[str, TrainConfig]:
    """The compared runs by name: "float32", "reference" and "default"."""
    sizes = SMALL if options.small else {}
    model = dataclasses.replace(
        ModelConfig.from_preset("mega200M"),
        num_layers=options.layers,
        chunk_size=options.length // 2,
        vocab_size=256,
        **sizes,
    )
    reference = dataclasses.replace(
        model,
        cema_implementation="reference",
        timestep_norm_implementation="reference",
        attention_implementation="reference",
    )
    models = {
        "float32": reference,
        "reference": dataclasses.replace(reference, dtype="bfloat16"),
        "default": dataclasses.replace(model, dtype="bfloat16"),
    }
    data = DataConfig(batch_size=options.rows, seq_len=options.length)
    optim = OptimConfig(lr=1e-3, warmup_steps=min(20, options.steps))
    return {
        name: TrainConfig(model=each, data=data, optim=optim, steps=options.steps)
        for name, each in models.items()
    }


def batches(text: bytes, options: BenchReferenceOptions) -> Iterator[Batch]:
    """Random crops, three documents in every second row; the same ones at every call.

    Raises:
      ConfigError: the text is shorter than a row.
    """
    rng = np.random.default_rng(options.seed)
    source = np.frombuffer(text, np.uint8).astype(np.int32)
    rows, length = options.rows, options.length
    if len(source) <= length:
        raise ConfigError(f"the text has {len(source)} bytes; a row needs more than {length}")
    while True:
        starts = rng.integers(0, len(source) - length, rows)
        crops = np.stack([source[start : start + length + 1] for start in starts])
        segment_ids = np.ones((rows, length), np.int32)
        for row in segment_ids[1::2]:
            row += np.searchsorted(np.sort(rng.integers(1, length, 2)), np.arange(length), "right")
        # The target of a document's last token belongs to the next document.
        known = np.pad(segment_ids[:, 1:] == segment_ids[:, :-1], ((0, 0), (0, 1)))
        yield Batch(
            jnp.asarray(crops[None, :, :-1]),
            jnp.asarray(crops[None, :, 1:]),
            jnp.asarray(segment_ids[None]),
            jnp.asarray(known[None], jnp.float32),
        )


def gradients(config: TrainConfig, batch: Batch) -> dict[str, np.ndarray]:
    """The loss and every gradient of one batch by name, float32."""
    graphdef, state = init_state(config)

    @jax.jit
    def both(params: nnx.State):
        def mean_loss(params: nnx.State):
            model: Megalodon = nnx.merge(graphdef, params)
            hidden = model.hidden(batch.tokens[0], segment_ids=batch.segment_ids[0]).hidden
            matrix = model.output_matrix()
            sums = cross_entropy(hidden, matrix, batch.targets[0], batch.weights[0])
            return sums.loss_sum / sums.weight_sum

        return jax.value_and_grad(mean_loss)(params)

    loss, gradient = both(state.params)
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(gradient))
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    return {name: np.asarray(leaf, np.float32) for name, leaf in {"loss": loss, **named}.items()}


def losses(config: TrainConfig, source: Iterator[Batch], steps: int) -> list[float]:
    """The loss before each of `steps` updates."""
    graphdef, state = init_state(config)
    step = make_train_step(graphdef, config)
    measured = []
    for _ in range(steps):
        state, metrics = step(state, next(source))
        measured.append(metrics.loss)
    return [float(loss) for loss in measured]


def run(options: BenchReferenceOptions) -> int:
    """Prints both comparisons; returns 0.

    Raises:
      ConfigError: the text is shorter than a row.
    """
    text = Path(options.text).read_bytes()
    configs = variants(options)
    _compare_gradients(configs, next(batches(text, options)))
    curves = {}
    for name, config in configs.items():
        curves[name] = losses(config, batches(text, options), options.steps)
        shown = ", ".join(f"{loss:.4f}" for loss in curves[name][:: max(1, options.steps // 10)])
        print(f"  {name:9} loss {shown}", flush=True)
    for name in ("reference", "default"):
        diff = np.abs(np.subtract(curves[name], curves["float32"]))
        print(f"  {name:9} from float32: mean {diff.mean():.2e}, largest {diff.max():.2e}")
    return 0


def _compare_gradients(configs: dict[str, TrainConfig], batch: Batch) -> None:
    expected = gradients(configs["float32"], batch)
    print(f"{jax.devices()[0].device_kind}: distance from float32, relative L2, of gradients")
    for name in ("reference", "default"):
        found = gradients(configs[name], batch)
        errors = {key: relative_distance(found[key], expected[key]) for key in expected}
        worst = max(errors, key=errors.__getitem__)
        print(
            f"  {name:9} median {statistics.median(errors.values()):.1e}  worst "
            f"{errors[worst]:.1e} ({worst})  loss {float(found['loss']):.5f}",
            flush=True,
        )


def relative_distance(found: np.ndarray, expected: np.ndarray) -> float:
    """L2 norm of the difference over that of `expected`; 0 where `expected` is 0."""
    size = np.linalg.norm(expected)
    return float(np.linalg.norm(found - expected) / size) if size else 0.0
