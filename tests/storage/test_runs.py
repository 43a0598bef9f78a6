"""Runs in a store."""

import dataclasses

from megalodon_jax.training.loop import train


def test_smoke(store, stored):
    import time

    t = time.time()
    result = train(stored)
    print("train", time.time() - t, result)
    print("\n".join(store.names()))
    t = time.time()
    result = train(dataclasses.replace(stored, steps=8, resume=True))
    print("resume", time.time() - t, result)
    print(store.read("run/metrics.jsonl").decode())
    from megalodon_jax.cli.main import main

    for args in (
        ["verify", stored.run_dir],
        ["generate", "--checkpoint", stored.run_dir, "--max_tokens", "3"],
    ):
        t = time.time()
        print(main(args), time.time() - t)
