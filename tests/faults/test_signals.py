"""Real signals to real processes, in every phase of a run: when it ends, how, and what it says."""

import re
import signal
from pathlib import Path

import pytest

from megalodon_jax.checkpoints import RunCheckpoints
from tests.faults.run_process import started_run

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Twenty held-out documents in batches of 0.1 s, of which the run evaluates every one.
SLOW_EVALUATION = """
evaluate = loop._Run._evaluate_batch
def slowly(self, params, batch):
    import time
    print("BATCH", flush=True)
    time.sleep(0.1)
    return evaluate(self, params, batch)
loop._Run._evaluate_batch = slowly
"""
EVALUATE_ALL = ("--final_eval_batches", "100000", "--data.heldout_fraction", "0.5")
SLOW_SAMPLE = """
def endless(*arguments, **settings):
    import time
    for number in range(100_000):
        print("TOKEN", flush=True)
        yield "x"
        time.sleep(0.1)
loop.stream_text = endless
"""
# Like XLA's compiler: compiled code that no signal interrupts. Here 3 to 10 seconds.
SLOW_COMPILATION = """
make_train_step = loop.make_train_step
def make_slowly(*arguments, **options):
    step, compiled = make_train_step(*arguments, **options), []
    def compile_first(*arguments):
        if not compiled:
            import hashlib
            compiled.append(True)
            print("COMPILING", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", {rounds})
            print("COMPILED", flush=True)
        return step(*arguments)
    return compile_first
loop.make_train_step = make_slowly
"""


def steps_of(config) -> list[int]:
    with RunCheckpoints(config.run_dir, read_only=True) as checkpoints:
        return checkpoints.steps()


def has_reported(config):
    metrics = Path(config.run_dir, "metrics.jsonl")
    return lambda: metrics.exists() and metrics.stat().st_size > 0


@pytest.mark.slow
def test_sigterm_in_the_final_evaluation(config, compilation_cache_dir):
    """The run is not finished, all of its steps are saved, and a resume only evaluates."""
    with started_run(config, compilation_cache_dir, *EVALUATE_ALL, changes=SLOW_EVALUATION) as run:
        run.wait_for("BATCH\nBATCH\nBATCH")
        run.send(signal.SIGTERM)
        code, seconds = run.end()
        out = run.output()
    assert code == 143
    assert seconds < 2.0
    saved = f"checkpoint of step 6 saved in {config.run_dir}, resume with --resume"
    assert f"SIGTERM: stopped in the final evaluation; {saved}" in out
    assert "final held-out" not in out
    assert "Traceback" not in out
    assert 6 in steps_of(config)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_between_steps_and_the_end_of_the_resumed_run(
    number, config, compilation_cache_dir
):
    with started_run(config, compilation_cache_dir, steps=1_000_000) as run:
        run.wait_for(has_reported(config))
        run.send(number)
        code, seconds = run.end()
        out = run.output()
    assert code == 128 + number
    assert seconds < 5.0
    stopped = re.search(rf"{number.name}: stopped after step (\d+); checkpoint of step (\d+)", out)
    assert stopped is not None
    assert stopped[1] == stopped[2]
    step = int(stopped[1])
    assert steps_of(config)[-1] == step
    with started_run(config, compilation_cache_dir, "--resume", steps=step + 1) as run:
        assert run.end()[0] == 0
        assert f"resumed at step {step}" in run.output()


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_an_evaluation_during_training(number, config, compilation_cache_dir):
    with started_run(
        config, compilation_cache_dir, *EVALUATE_ALL, "--eval_every", "2", "--eval_batches",
        "100000", changes=SLOW_EVALUATION,
    ) as run:  # fmt: skip
        run.wait_for("BATCH\nBATCH\nBATCH")
        run.send(number)
        code, seconds = run.end()
        out = run.output()
    assert code == 128 + number
    assert seconds < 4.0
    assert f"{number.name}: stopped after step 2; checkpoint of step 2 saved" in out
    assert steps_of(config) == [2]


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_the_sample(number, config, compilation_cache_dir):
    with started_run(
        config, compilation_cache_dir, "--sample_tokens", "9", changes=SLOW_SAMPLE
    ) as run:
        run.wait_for("TOKEN\nTOKEN\nTOKEN")
        run.send(number)
        code, seconds = run.end()
        out = run.output()
    assert code == 128 + number
    assert seconds < 2.0
    assert f"{number.name}: stopped in the sample; checkpoint of step 6 saved" in out
    # The results of the completed evaluation are shown.
    assert "final held-out bits per byte" in out


@pytest.mark.slow
def test_a_second_signal_in_the_evaluation_leaves_at_once(config, compilation_cache_dir):
    stuck = SLOW_EVALUATION.replace("time.sleep(0.1)", "time.sleep(60.0)")
    with started_run(config, compilation_cache_dir, *EVALUATE_ALL, changes=stuck) as run:
        run.wait_for("BATCH")
        run.send(signal.SIGINT)
        with pytest.raises(AssertionError, match="still running"):
            run.end(1.0)
        run.send(signal.SIGINT)
        code, seconds = run.end(10.0)
        out = run.output()
    assert code == 130
    assert seconds < 1.0
    saved = f"checkpoint of step 6 saved in {config.run_dir}, resume with --resume"
    assert f"second SIGINT: stopped at once; {saved}" in out
    assert "Traceback" not in out


@pytest.mark.slow
def test_a_signal_during_compilation_is_remembered(config, compilation_cache_dir):
    changes = SLOW_COMPILATION.format(rounds=6_000_000)
    with started_run(config, compilation_cache_dir, changes=changes, steps=1_000_000) as run:
        run.wait_for("COMPILING")
        run.send(signal.SIGTERM)
        run.wait_for("COMPILED")
        code, _ = run.end()
        out = run.output()
    assert code == 143
    # The step that was compiled is the only one, whatever the machine's load.
    assert "SIGTERM: stopped after step 1; checkpoint of step 1 saved" in out
    assert steps_of(config) == [1]


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_during_compilation_leaves_at_once(number, config, compilation_cache_dir):
    changes = SLOW_COMPILATION.format(rounds=2_000_000_000)
    with started_run(config, compilation_cache_dir, changes=changes) as run:
        run.wait_for("COMPILING")
        run.send(signal.SIGTERM)
        with pytest.raises(AssertionError, match="still running"):
            run.end(1.0)
        run.send(number)
        code, seconds = run.end(10.0)
        out = run.output()
    assert code == 128 + number
    assert seconds < 1.0
    assert f"second {number.name}: stopped at once; nothing saved" in out
