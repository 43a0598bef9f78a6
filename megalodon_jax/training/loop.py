"""A training run: loader, step, logs, held-out measurements, checkpoints, a sample at the end.

In a run of several processes every one of them runs `train`: all take part in steps, measurements
and checkpoints, each loads its own rows, and the first one logs.
"""

import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from megalodon_jax.checkpoints import RunCheckpoints, load_latest_valid, load_params
from megalodon_jax.config import TrainConfig
from megalodon_jax.data.loader import Loader, make_loader, merge_states
from megalodon_jax.data.packing import CountedBatch
from megalodon_jax.data.tokenizer import Tokenizer, load_tokenizer
from megalodon_jax.errors import ConfigError, TrainingError
from megalodon_jax.evaluation import Evaluation, evaluate_batches
from megalodon_jax.generate import Sampling, stream_text
from megalodon_jax.parallel.distributed import (
    DelayedGlobalMax,
    all_gather_json,
    initialize,
    is_main,
    num_shards_of,
    place_batch,
    rows_of_process,
)
from megalodon_jax.parallel.mesh import resolve_mesh
from megalodon_jax.training.metrics import (
    ProgressDisplay,
    RunLog,
    model_flops_per_token,
    model_flops_utilization,
)
from megalodon_jax.training.step import (
    StepMetrics,
    TrainState,
    abstract_model,
    init_state,
    make_eval_step,
    make_train_step,
)
from megalodon_jax.typing import Batch

SAMPLE_TEMPERATURE = 0.8


class TrainResult(NamedTuple):
    """How a run ended.

    Attributes:
      step: updates done in all.
      train_loss: loss of the last step in nats per token; None if no step was done.
      heldout: the final held-out measurement; None if there is no held-out text or a signal came.
      sample: the generated text, prompt included; empty if none was asked for.
      stop_signal: SIGINT or SIGTERM if that ended the run early, else None.
    """

    step: int
    train_loss: float | None
    heldout: Evaluation | None
    sample: str
    stop_signal: signal.Signals | None


def train(config: TrainConfig) -> TrainResult:
    """Trains to `config.steps`, leaving checkpoints and logs in `config.run_dir`.

    SIGINT or SIGTERM: the step that runs is finished, a checkpoint is saved, and the function
    returns with `stop_signal` set. A second SIGINT stops at once. Of several processes one that
    gets the signal stops all, after the same step; all must see the same `run_dir`.

    Raises:
      ConfigError: the settings do not fit together, or `run_dir` already has checkpoints and
        `resume` is not set.
      DataError: the data cannot be read or is empty.
      CheckpointError: a checkpoint could not be written, or none could be read to resume from.
      TrainingError: the loss became NaN or infinite.
    """
    initialize(config.processes)
    mesh = resolve_mesh(config)
    rows = rows_of_process(mesh, config.data.batch_size)
    tokenizer = load_tokenizer(config.data.tokenizer)
    check_vocabulary(tokenizer, config)
    with ExitStack() as stack:
        stop = stack.enter_context(_stop_on_signals())
        loader, heldout_loader = _open_loaders(config, tokenizer, mesh, rows)
        stack.callback(loader.close)
        checkpoints = stack.enter_context(
            RunCheckpoints(config.run_dir, keep=config.keep_checkpoints)
        )
        graphdef, state = _first_state(config, mesh, loader, checkpoints)
        log = stack.enter_context(_open_log(config, first_step=int(state.step)))
        display = stack.enter_context(
            ProgressDisplay(first_step=int(state.step), steps=config.steps, silent=not is_main())
        )
        run = _Run(
            config,
            mesh,
            rows,
            tokenizer,
            loader,
            heldout_loader,
            graphdef,
            state,
            checkpoints,
            log,
            display,
        )
        run.advance(stop)
        return run.finish(stop)


def check_vocabulary(tokenizer: Tokenizer, config: TrainConfig) -> None:
    """Raises `ConfigError` if the tokenizer has ids that the model does not know."""
    known = min(config.model.vocab_size, config.model.num_outputs)
    if tokenizer.vocab_size > known:
        raise ConfigError(
            f"tokenizer {config.data.tokenizer!r} has token ids up to {tokenizer.vocab_size - 1}, "
            f"but the model knows 0 to {known - 1}; set model.vocab_size to {tokenizer.vocab_size} "
            "or more"
        )


def _open_loaders(
    config: TrainConfig, tokenizer: Tokenizer, mesh: Mesh, rows: tuple[int, ...]
) -> tuple[Loader, Loader | None]:
    data = config.data
    shards = num_shards_of(mesh, data.batch_size)
    loader = make_loader(data, tokenizer, "train", rows=rows, default_shards=shards, repeat=True)
    named = data.tfds_heldout_split if data.source == "tfds" else data.heldout_files
    if not named and data.heldout_fraction == 0.0:
        return loader, None
    return loader, make_loader(data, tokenizer, "heldout", rows=rows, repeat=False)


def _first_state(
    config: TrainConfig, mesh: Mesh, loader: Loader, checkpoints: RunCheckpoints
) -> tuple[nnx.GraphDef, TrainState]:
    if not config.resume:
        if steps := checkpoints.steps():
            raise ConfigError(
                f"{config.run_dir} already has checkpoints (newest: step {steps[-1]}) and nothing "
                "is overwritten; go on from them with --resume, or choose another --run_dir"
            )
        graphdef, state = init_state(config, mesh)
        if config.init_from:
            state = state._replace(params=load_params(config.init_from, config, mesh))
        return graphdef, state
    damaged: list[int] = []
    restored = load_latest_valid(
        checkpoints,
        lambda step: checkpoints.restore(step, config, mesh),
        on_damaged=lambda step, _: damaged.append(step),
    )
    for step in damaged:
        checkpoints.set_aside(step)
    loader.load_state_dict(restored.loader_state)
    return abstract_model(config.model)[0], restored.state


@contextmanager
def _open_log(config: TrainConfig, *, first_step: int) -> Iterator[RunLog | None]:
    if not is_main():
        yield None
        return
    resolved = dataclasses.asdict(config)
    Path(config.run_dir, "config.json").write_text(json.dumps(resolved, indent=2) + "\n")
    log = RunLog(
        Path(config.run_dir),
        config=resolved,
        first_step=first_step,
        wandb_project=config.wandb_project,
    )
    try:
        yield log
    finally:
        log.close()


class _Stop:
    """Remembers the signal that asked this process, or with it the whole run, to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None


@contextmanager
def _stop_on_signals() -> Iterator[_Stop]:
    stop = _Stop()

    def remember(number: int, frame: FrameType | None) -> None:
        stop.signal = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    # Python allows handlers in the main thread only; elsewhere the caller's handling stays.
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    earlier = [signal.signal(number, remember) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, earlier, strict=True):
            signal.signal(number, handler)


class _Clock:
    """Counts tokens and seconds of training alone, between two reports."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._started = time.monotonic()
        self._paused = 0.0

    def seconds(self) -> float:
        return time.monotonic() - self._started - self._paused

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves out what happens inside: held-out measurements, checkpoints."""
        started = time.monotonic()
        yield
        self._paused += time.monotonic() - started


class _Run:
    """The parts of one run and where it stands."""

    def __init__(
        self,
        config: TrainConfig,
        mesh: Mesh,
        rows: tuple[int, ...],
        tokenizer: Tokenizer,
        loader: Loader,
        heldout_loader: Loader | None,
        graphdef: nnx.GraphDef,
        state: TrainState,
        checkpoints: RunCheckpoints,
        log: RunLog | None,
        display: ProgressDisplay,
    ) -> None:
        self.config = config
        self.mesh = mesh
        self.rows = rows
        self.tokenizer = tokenizer
        self.loader = loader
        self.heldout_loader = heldout_loader
        self.graphdef = graphdef
        self.state = state
        self.checkpoints = checkpoints
        self.log = log
        self.display = display
        self.devices = list(mesh.devices.flat)
        self.first_step = self.step = int(state.step)
        self.saved_step = self.step if config.resume else None
        self.train_step = make_train_step(graphdef, config, mesh)
        self.eval_step = make_eval_step(graphdef, config, mesh)
        self.window: list[StepMetrics] = []
        self.timed_tokens = 0.0
        self.train_loss: float | None = None
        self.clock = _Clock()
        self.agreed_signal = DelayedGlobalMax(mesh)

    def advance(self, stop: _Stop) -> None:
        """Trains until the last step or a signal; saves at the end."""
        config = self.config
        self.display.message(self._description())
        batches = iter(self.loader)
        while self.step < config.steps and not self._must_stop(stop):
            batch = _stack([next(batches) for _ in range(config.optim.accumulate_steps)])
            self.state, metrics = self.train_step(self.state, self._place(batch))
            self.step += 1
            self.window.append(metrics)
            if self.step == self.first_step + 1:
                self._report_compilation()
            self.display.advance(self.step)
            last = self.step == config.steps
            if last or self.step % config.log_every == 0:
                self._report()
            if not last and config.eval_every and self.step % config.eval_every == 0:
                self._evaluate(config.eval_batches)
            if config.checkpoint_every and self.step % config.checkpoint_every == 0:
                self._save()
        if self.saved_step != self.step:
            self._save()
        self.checkpoints.wait()

    def _must_stop(self, stop: _Stop) -> bool:
        number = self.agreed_signal.exchange(0 if stop.signal is None else int(stop.signal))
        if number:
            stop.signal = signal.Signals(number)
        return bool(number)

    def _place(self, batch: Batch) -> Batch:
        return place_batch(batch, self.mesh, rows=self.rows, batch_size=self.config.data.batch_size)

    def finish(self, stop: _Stop) -> TrainResult:
        """The final held-out measurement and the sample; after a signal, how to go on."""
        config = self.config
        if stop.signal is not None and self.step < config.steps:
            self.display.message(
                f"{stop.signal.name}: stopped after step {self.step}; checkpoint saved in "
                f"{config.run_dir}, go on with --resume"
            )
            return TrainResult(self.step, self.train_loss, None, "", stop.signal)
        heldout = self._evaluate(config.final_eval_batches)
        sample = self._sample() if config.sample_tokens else ""
        if sample:
            self.display.message(f"sample:\n{sample}")
        if heldout is not None:
            self.display.message(
                f"final held-out bits per byte {heldout.bits_per_byte:.4f} "
                f"({heldout.num_bytes:,} bytes, loss {heldout.loss:.4f} nats per token)"
            )
        self.display.message(f"step {self.step}; checkpoints and logs are in {config.run_dir}")
        return TrainResult(self.step, self.train_loss, heldout, sample, None)

    def _description(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))
        place = f"{len(self.devices)} x {self.devices[0].device_kind}"
        place += f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        unused = len(jax.devices()) - len(self.devices)
        place += f" ({unused} more are not used: set mesh.data to -1)" if unused else ""
        resumed = f", resumed at step {self.first_step}" if self.first_step else ""
        return f"{count:,} parameters on {place}, run_dir {self.config.run_dir}{resumed}"

    def _report_compilation(self) -> None:
        jax.block_until_ready(self.window[-1])
        self.display.message(f"first step, with compilation: {self.clock.seconds():.1f} s")
        self.clock.restart()
        self.display.restart(self.step)
        # Its time is the compiler's, so its tokens do not count for speed.
        self.timed_tokens = -float(self.window[-1].tokens)

    def _report(self) -> None:
        self.checkpoints.check()
        window = self._finite_window()
        weights = np.asarray([metrics.tokens for metrics in window])
        total = max(float(weights.sum()), 1.0)
        mean = {
            name: float(sum(getattr(entry, name) * entry.tokens for entry in window)) / total
            for name in ("loss", "z_loss", "accuracy")
        }
        timed_tokens = float(weights.sum()) + self.timed_tokens
        tokens_per_second = timed_tokens / max(self.clock.seconds(), 1e-9) or None
        mfu = None if tokens_per_second is None else self._utilization(tokens_per_second)
        numbers = {
            **mean,
            "grad_norm": float(window[-1].grad_norm),
            "learning_rate": float(window[-1].learning_rate),
            "tokens": float(weights.sum()),
            "tokens_per_second": tokens_per_second,
            "mfu": mfu,
        }
        self._log(numbers)
        text = f"loss {mean['loss']:.4f}"
        text += f"  {tokens_per_second:,.0f} tokens/s" if tokens_per_second else ""
        text += f"  MFU {mfu:.1%}" if mfu else ""
        self.display.report(self.step, text)
        self.train_loss = float(window[-1].loss)
        self.window, self.timed_tokens = [], 0.0
        self.clock.restart()

    def _log(self, numbers: Mapping[str, float | None]) -> None:
        if self.log is not None:
            self.log.write(self.step, numbers)

    def _utilization(self, tokens_per_second: float) -> float | None:
        flops = model_flops_per_token(self.config.model, seq_len=self.config.data.seq_len)
        return model_flops_utilization(
            tokens_per_second,
            flops,
            device_kind=self.devices[0].device_kind,
            device_count=len(self.devices),
        )

    def _finite_window(self) -> list[StepMetrics]:
        window = jax.device_get(self.window)
        for offset, metrics in enumerate(window):
            if not (math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm)):
                step = self.step - len(window) + offset + 1
                kept = self.checkpoints.steps()
                rest = (
                    f"the newest checkpoint is step {kept[-1]}" if kept else "no checkpoint exists"
                )
                raise TrainingError(
                    f"loss is {metrics.loss} and gradient norm {metrics.grad_norm} at step {step}; "
                    f"stopped, {rest}. Try a lower optim.lr, a longer warm-up, or clipping"
                )
        return window

    def _evaluate(self, max_batches: int) -> Evaluation | None:
        if self.heldout_loader is None:
            return None
        with self.clock.pause():
            self.heldout_loader.rewind()
            heldout = evaluate_batches(
                self.eval_step,
                self.state.params,
                (
                    CountedBatch(self._place(batch), num_bytes)
                    for batch, num_bytes in self.heldout_loader.with_bytes()
                ),
                max_batches=max_batches,
            )
        self._log({"heldout_loss": heldout.loss, "heldout_bits_per_byte": heldout.bits_per_byte})
        self.display.message(
            f"step {self.step}/{self.config.steps}  held-out bits per byte "
            f"{heldout.bits_per_byte:.4f}  loss {heldout.loss:.4f}"
        )
        return heldout

    def _save(self) -> None:
        self._finite_window()
        with self.clock.pause():
            self.checkpoints.save(
                self.state,
                loader_state=merge_states(all_gather_json(self.loader.state_dict())),
                config=self.config,
                tokenizer_fingerprint=self.tokenizer.fingerprint(),
            )
        self.saved_step = self.step

    def _sample(self) -> str:
        # One row cannot be shared: a model too large for one device needs sample_tokens = 0.
        params = self.state.params
        if jax.process_count() > 1:
            params = multihost_utils.process_allgather(params, tiled=True)
        # Every process draws the same text, so that none has to wait for another.
        params = jax.device_put(params, self.mesh.local_devices[0])
        model = nnx.merge(self.graphdef, params)
        new = stream_text(
            model,
            self.tokenizer,
            self.config.sample_prompt,
            max_tokens=self.config.sample_tokens,
            sampling=Sampling(temperature=SAMPLE_TEMPERATURE),
            key=jax.random.key(self.config.seed),
        )
        return self.config.sample_prompt + "".join(new)


def _stack(batches: list[Batch]) -> Batch:
    return jax.tree.map(lambda *rows: np.stack(rows), *batches)
