"""Is a jump of the loss in the text? `python docs/results/batch_entropy.py CONFIG --steps 800`.

Reads the batches of a run in their order, and codes every byte with the counts of what followed the
two bytes before it in earlier batches. A jump of this loss is a change of the text (another
language, tables), whatever the trained model does. CONFIG is a configuration of `megalodon train`
with the tokenizer `bytes`, such as the `config.toml` of a run.
"""

import argparse

import numpy as np

from megalodon_jax.config import load_config
from megalodon_jax.data import load_tokenizer, make_loader

_BYTES = 256
# Count of every byte in a context that was never seen.
_PRIOR = 0.02


def batch_losses(batches, *, steps: int) -> np.ndarray:
    """Nats per byte of each of the first batches, before the batch is counted."""
    counts = np.full((_BYTES * _BYTES, _BYTES), _PRIOR, np.float32)
    totals = counts.sum(axis=1)
    losses = []
    for _, batch in zip(range(steps), batches, strict=False):
        tokens = np.asarray(batch.tokens)
        is_text = np.all(
            [tokens[:, i : tokens.shape[1] - 2 + i] < _BYTES for i in range(3)], axis=0
        )
        first, second, third = (
            tokens[:, i : tokens.shape[1] - 2 + i][is_text].astype(np.int64) for i in range(3)
        )
        context = first * _BYTES + second
        losses.append(float(-np.log(counts[context, third] / totals[context]).mean()))
        np.add.at(counts, (context, third), 1.0)
        np.add.at(totals, context, 1.0)
    return np.array(losses)


def main() -> None:
    """Prints the mean of every ten steps, and the largest jump."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--steps", type=int, default=800)
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    if config.data.tokenizer != "bytes":
        raise SystemExit(f"data.tokenizer is {config.data.tokenizer!r}; this reads bytes only")
    loader = make_loader(config.data, load_tokenizer("bytes"), "train", repeat=True)
    losses = batch_losses(loader, steps=arguments.steps)
    for start in range(0, len(losses), 10):
        print(f"steps {start + 1:>5} to {start + 10:>5}  {losses[start : start + 10].mean():.3f}")
    jumps = losses[1:] - losses[:-1]
    print(f"largest jump: {jumps.max():.3f} nats per byte, at step {int(jumps.argmax()) + 2}")


if __name__ == "__main__":
    main()
