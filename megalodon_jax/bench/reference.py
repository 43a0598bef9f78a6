"""Training with the default implementations beside training with the reference ones.

    megalodon bench reference --text book.txt

A model in mega200M's shape with few layers, on random crops of a text's bytes, some cut into
documents. First loss and gradients of one batch: their distance from float32 with the reference
implementations, for bfloat16 with the reference ones and with the default ones. Then the loss of
`--steps` training steps in all three ways, from the same weights on the same batches.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from megalodon_jax.loss import cross_entropy
from megalodon_jax.model import Megalodon
from megalodon_jax.train_state import init_state
from megalodon_jax.training.step import make_train_step
from megalodon_jax.typing import Batch

SMALL = {
    "model_dim": 64, "z_dim": 32, "value_dim": 128, "ffn_hidden_dim": 128, "norm_num_groups": 8,
}  # fmt: skip


def configurations(options: argparse.Namespace) -> dict[str, TrainConfig]:
    """The three ways by name: "float32", "reference" and "default"."""
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
    ways = {
        "float32": reference,
        "reference": dataclasses.replace(reference, dtype="bfloat16"),
        "default": dataclasses.replace(model, dtype="bfloat16"),
    }
    data = DataConfig(batch_size=options.rows, seq_len=options.length)
    optim = OptimConfig(lr=1e-3, warmup_steps=20)
    return {
        name: TrainConfig(model=each, data=data, optim=optim, steps=options.steps)
        for name, each in ways.items()
    }


def batches(text: bytes, options: argparse.Namespace) -> Iterator[Batch]:
    """Random crops, every second row of three documents; the same ones at every call."""
    rng = np.random.default_rng(options.seed)
    source = np.frombuffer(text, np.uint8).astype(np.int32)
    rows, length = options.rows, options.length
    if len(source) <= length:
        raise ValueError(f"the text has {len(source)} bytes; a row needs more than {length}")
    while True:
        starts = rng.integers(0, len(source) - length, rows)
        crops = np.stack([source[start : start + length + 1] for start in starts])
        segment_ids = np.ones((rows, length), np.int32)
        for row in segment_ids[1::2]:
            row += np.searchsorted(np.sort(rng.integers(1, length, 2)), np.arange(length), "right")
        # The target of a document's last token belongs to the next one.
        known = np.pad(segment_ids[:, 1:] == segment_ids[:, :-1], ((0, 0), (0, 1)))
        yield Batch(
            jnp.asarray(crops[None, :, :-1]),
            jnp.asarray(crops[None, :, 1:]),
            jnp.asarray(segment_ids[None]),
            jnp.asarray(known[None], jnp.float32),
        )


def gradients(config: TrainConfig, batch: Batch) -> dict[str, np.ndarray]:
    """The loss and, by name, every gradient of one batch, float32."""
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


def run(options: argparse.Namespace) -> dict[str, list[float]]:
    """Prints both comparisons; returns the loss curves by name."""
    text = Path(options.text).read_bytes()
    ways = configurations(options)
    first = next(batches(text, options))
    due = gradients(ways["float32"], first)
    print(f"{jax.devices()[0].device_kind}: distance from float32, relative L2, of gradients")
    others = [name for name in ways if name != "float32"]
    for name in others:
        found = gradients(ways[name], first)
        errors = {key: relative_distance(found[key], due[key]) for key in due}
        worst = max(errors, key=errors.__getitem__)
        print(
            f"  {name:9} median {statistics.median(errors.values()):.1e}  worst "
            f"{errors[worst]:.1e} ({worst})  loss {float(found['loss']):.5f}",
            flush=True,
        )
    curves = {}
    for name, config in ways.items():
        curves[name] = losses(config, batches(text, options), options.steps)
        shown = ", ".join(f"{loss:.4f}" for loss in curves[name][:: max(1, options.steps // 10)])
        print(f"  {name:9} loss {shown}", flush=True)
    for name in others:
        apart = np.abs(np.subtract(curves[name], curves["float32"]))
        print(f"  {name:9} from float32: mean {apart.mean():.2e}, largest {apart.max():.2e}")
    return curves


def relative_distance(found: np.ndarray, due: np.ndarray) -> float:
    """L2 norm of the difference over that of `due`; 0 where `due` is 0."""
    size = np.linalg.norm(due)
    return float(np.linalg.norm(found - due) / size) if size else 0.0


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="megalodon bench reference", description=__doc__)
    parser.add_argument("--text", required=True, metavar="FILE", help="what to train on")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the crops")
    parser.add_argument("--small", action="store_true", help="a narrow model, for a CPU")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; argv without the program's name, None: that of the process."""
    run(make_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
