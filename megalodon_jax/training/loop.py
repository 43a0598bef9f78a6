"""The training loop: data, steps, logs, held-out evaluation, checkpoints and a final sample.

In a multi-process run every process calls `train`: all of them take part in steps, evaluations and
checkpoints, each loads its own rows, and process 0 logs.
"""

import dataclasses
import json
import math
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from megalodon_jax.checkpoints import RunCheckpoints, load_params, restore_for_resume
from megalodon_jax.config import TrainConfig
from megalodon_jax.data.loader import Loader, merge_states
from megalodon_jax.data.packing import CountedBatch
from megalodon_jax.data.tokenizer import Tokenizer, load_tokenizer
from megalodon_jax.errors import ConfigError, TrainingError
from megalodon_jax.evaluation.summary import Evaluation, evaluate_batches
from megalodon_jax.flops import model_flops_per_token, model_flops_utilization
from megalodon_jax.generate import Sampling, stream_text
from megalodon_jax.models import abstract_model
from megalodon_jax.parallel import distributed
from megalodon_jax.parallel.mesh import resolve_mesh
from megalodon_jax.tasks import Task, find_task
from megalodon_jax.train_state import TrainState, init_state
from megalodon_jax.training.clock import ThroughputClock
from megalodon_jax.training.metrics import ProgressDisplay, RunLog
from megalodon_jax.training.signals import StopRequest, stop_on_signals
from megalodon_jax.training.step import StepMetrics, make_eval_step, make_train_step
from megalodon_jax.typing import Batch

SAMPLE_TEMPERATURE = 0.8


class TrainResult(NamedTuple):
    """The result of a run.

    Attributes:
      step: total number of updates.
      train_loss: loss of the last step in nats per token; None if no step was run.
      heldout: the final held-out evaluation; None without held-out text or after a signal.
      sample: the generated text with its prompt; empty if `sample_tokens` is 0.
      stop_signal: SIGINT or SIGTERM if it stopped the run, else None.
    """

    step: int
    train_loss: float | None
    heldout: Evaluation | None
    sample: str
    stop_signal: signal.Signals | None


def train(config: TrainConfig) -> TrainResult:
    """Trains until `config.steps`; checkpoints and logs are in `config.run_dir`.

    SIGINT or SIGTERM: the current step is completed, a checkpoint is saved, and the function
    returns with `stop_signal` set. A second SIGINT stops immediately. In a multi-process run a
    signal to any process stops all of them after the same step; `run_dir` must be shared.

    Raises:
      ConfigError: settings are inconsistent, or `run_dir` already has checkpoints and `resume` is
        not set.
      DataError: the data is empty or cannot be read.
      CheckpointError: a checkpoint cannot be written, or none can be read to resume from.
      RunLockedError: another process owns `run_dir`, or has taken it over.
      TrainingError: the loss or the gradient is NaN or infinite.
    """
    distributed.initialize(config.processes)
    mesh = resolve_mesh(config)
    rows = distributed.rows_of_process(mesh, config.data.batch_size)
    tokenizer = load_tokenizer(config.data.tokenizer)
    task = find_task(config.task)
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        loader, heldout_loader = task.open_loaders(
            config,
            tokenizer,
            rows=rows,
            num_shards=distributed.num_shards_of(mesh, config.data.batch_size),
        )
        stack.callback(loader.close)
        checkpoints = stack.enter_context(
            RunCheckpoints(
                config.run_dir,
                keep=config.keep_checkpoints,
                keep_every=config.keep_every,
                allow_unverified=config.allow_unverified,
            )
        )
        graphdef, state = _initial_state(config, mesh, loader, checkpoints)
        first_step = int(state.step)
        context = RunContext(
            config=config,
            mesh=mesh,
            rows=rows,
            task=task,
            tokenizer=tokenizer,
            loader=loader,
            heldout_loader=heldout_loader,
            graphdef=graphdef,
            checkpoints=checkpoints,
            log=stack.enter_context(_open_log(config, first_step=first_step)),
            display=stack.enter_context(
                ProgressDisplay(
                    first_step=first_step, steps=config.steps, silent=not distributed.is_main()
                )
            ),
        )
        run = _Run(context, state)
        run.advance(stop)
        return run.finish(stop)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunContext:
    """The fixed objects of a run.

    Attributes:
      config: the run's settings.
      mesh: the run's devices.
      rows: rows of the global batch that this process loads.
      task: examples, loss and metric.
      tokenizer: the run's tokenizer.
      loader: endless training batches.
      heldout_loader: a single held-out pass; None without held-out data.
      graphdef: the model's static structure.
      checkpoints: the run's checkpoints.
      log: output of metrics; None except in process 0.
      display: progress on the terminal.
    """

    config: TrainConfig
    mesh: Mesh
    rows: tuple[int, ...]
    task: Task
    tokenizer: Tokenizer
    loader: Loader
    heldout_loader: Loader | None
    graphdef: nnx.GraphDef
    checkpoints: RunCheckpoints
    log: RunLog | None
    display: ProgressDisplay


def _initial_state(
    config: TrainConfig, mesh: Mesh, loader: Loader, checkpoints: RunCheckpoints
) -> tuple[nnx.GraphDef, TrainState]:
    if not config.resume:
        if steps := checkpoints.steps():
            raise ConfigError(
                f"{config.run_dir} already has checkpoints (newest: step {steps[-1]}), which are "
                "not overwritten; resume with --resume, or choose another --run_dir"
            )
        graphdef, state = init_state(config, mesh)
        if config.init_from:
            state = state._replace(params=load_params(config.init_from, config, mesh))
        return graphdef, state
    restored = restore_for_resume(checkpoints, config, mesh, load_data=loader.load_state_dict)
    return abstract_model(config.model)[0], restored.state


@contextmanager
def _open_log(config: TrainConfig, *, first_step: int) -> Iterator[RunLog | None]:
    if not distributed.is_main():
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


class _Run:
    """The changing state of a run, and its metrics since the last report."""

    def __init__(self, context: RunContext, state: TrainState) -> None:
        config, mesh = context.config, context.mesh
        self.context = context
        self.config = config
        self.state = state
        self.devices = list(mesh.devices.flat)
        self.first_step = self.step = int(state.step)
        self.saved_step = self.step if config.resume else None
        self.train_step = make_train_step(context.graphdef, config, mesh)
        self.eval_step = make_eval_step(context.graphdef, config, mesh)
        self.window: list[StepMetrics] = []
        self.train_loss: float | None = None
        self.clock = ThroughputClock()
        self.global_signal = distributed.DelayedGlobalMax(mesh)

    def advance(self, stop: StopRequest) -> None:
        """Trains until the last step or a signal, then saves."""
        config = self.config
        self.context.display.message(self._description())
        batches = iter(self.context.loader)
        while self.step < config.steps and not self._must_stop(stop):
            batch = _stack([next(batches) for _ in range(config.optim.accumulate_steps)])
            self.state, metrics = self.train_step(self.state, self._place(batch))
            self.step += 1
            self.window.append(metrics)
            if self.step == self.first_step + 1:
                self._report_compilation()
            self.context.display.advance(self.step)
            last = self.step == config.steps
            if last or self.step % config.log_every == 0:
                self._report()
            if not last and config.eval_every and self.step % config.eval_every == 0:
                self._evaluate(config.eval_batches)
            if config.checkpoint_every and self.step % config.checkpoint_every == 0:
                self._save()
        if self.saved_step != self.step:
            self._save()
        self.context.checkpoints.wait()

    def _must_stop(self, stop: StopRequest) -> bool:
        signal_number = self.global_signal.exchange(0 if stop.signal is None else int(stop.signal))
        if signal_number:
            stop.signal = signal.Signals(signal_number)
        return bool(signal_number)

    def _place(self, batch: Batch) -> Batch:
        return distributed.place_batch(
            batch, self.context.mesh, rows=self.context.rows, batch_size=self.config.data.batch_size
        )

    def finish(self, stop: StopRequest) -> TrainResult:
        """Runs the final held-out evaluation and the sample, unless a signal stopped the run."""
        config = self.config
        if stop.signal is not None and self.step < config.steps:
            self.context.display.message(
                f"{stop.signal.name}: stopped after step {self.step}; checkpoint saved in "
                f"{config.run_dir}, resume with --resume"
            )
            return TrainResult(self.step, self.train_loss, None, "", stop.signal)
        heldout = self._evaluate(config.final_eval_batches)
        sample = self._sample() if config.sample_tokens else ""
        if sample:
            self.context.display.message(f"sample:\n{sample}")
        if heldout is not None:
            self.context.display.message(
                f"final held-out bits per byte {heldout.bits_per_byte:.4f} "
                f"({heldout.num_bytes:,} bytes, loss {heldout.loss:.4f} nats per token)"
            )
        self.context.display.message(
            f"step {self.step}; checkpoints and logs are in {config.run_dir}"
        )
        return TrainResult(self.step, self.train_loss, heldout, sample, None)

    def _description(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))
        devices = f"{len(self.devices)} x {self.devices[0].device_kind}"
        devices += f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        unused = len(jax.devices()) - len(self.devices)
        devices += f" ({unused} more are not used: set mesh.data to -1)" if unused else ""
        resumed = f", resumed at step {self.first_step}" if self.first_step else ""
        return f"{count:,} parameters on {devices}, run_dir {self.config.run_dir}{resumed}"

    def _report_compilation(self) -> None:
        jax.block_until_ready(self.window[-1])
        self.context.display.message(f"first step, with compilation: {self.clock.seconds():.1f} s")
        # Throughput excludes this step, because most of its time is compilation.
        self.clock.restart_without(float(self.window[-1].tokens))
        self.context.display.restart(self.step)

    def _report(self) -> None:
        self.context.checkpoints.check()
        window = self._finite_window()
        weights = np.asarray([metrics.tokens for metrics in window])
        total = max(float(weights.sum()), 1.0)
        mean = {
            name: float(sum(getattr(entry, name) * entry.tokens for entry in window)) / total
            for name in ("loss", "z_loss", "accuracy")
        }
        tokens_per_second = self.clock.tokens_per_second(float(weights.sum()))
        mfu = None if tokens_per_second is None else self._utilization(tokens_per_second)
        logged = {
            **mean,
            "grad_norm": float(window[-1].grad_norm),
            "learning_rate": float(window[-1].learning_rate),
            "tokens": float(weights.sum()),
            "tokens_per_second": tokens_per_second,
            "mfu": mfu,
        }
        self._log(logged)
        text = f"loss {mean['loss']:.4f}"
        text += f"  {tokens_per_second:,.0f} tokens/s" if tokens_per_second else ""
        text += f"  MFU {mfu:.1%}" if mfu else ""
        self.context.display.report(self.step, text)
        # The last loss is that of the parameters before its update.
        if np.isfinite(window[-1].loss):
            self.context.checkpoints.confirm(self.step - 1)
        self.train_loss = float(window[-1].loss)
        self.window = []
        self.clock.restart()

    def _log(self, metrics: Mapping[str, float | None]) -> None:
        if self.context.log is not None:
            self.context.log.write(self.step, metrics)

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
                saved = self.context.checkpoints.complete_steps()
                newest = (
                    f"the newest checkpoint is step {saved[-1]}"
                    if saved
                    else "there is no checkpoint"
                )
                raise TrainingError(
                    f"loss is {metrics.loss} and gradient norm {metrics.grad_norm} at step {step}; "
                    f"{newest}. Try a lower optim.lr, a longer warmup, or clipping"
                )
        return window

    def _evaluate(self, max_batches: int) -> Evaluation | None:
        if self.context.heldout_loader is None:
            return None
        with self.clock.pause():
            self.context.heldout_loader.rewind()
            heldout = evaluate_batches(
                self.eval_step,
                self.state.params,
                (
                    CountedBatch(self._place(batch), num_bytes)
                    for batch, num_bytes in self.context.heldout_loader.with_bytes()
                ),
                metric=self.context.task.metric,
                max_batches=max_batches,
            )
        if np.isfinite(heldout.loss):
            self.context.checkpoints.report_heldout(self.step, heldout.loss)
            self.context.checkpoints.confirm(self.step)
        self._log({"heldout_loss": heldout.loss, "heldout_bits_per_byte": heldout.bits_per_byte})
        self.context.display.message(
            f"step {self.step}/{self.config.steps}  held-out bits per byte "
            f"{heldout.bits_per_byte:.4f}  loss {heldout.loss:.4f}"
        )
        return heldout

    def _save(self) -> None:
        self._finite_window()
        with self.clock.pause():
            self.context.checkpoints.save(
                self.state,
                loader_state=merge_states(
                    distributed.all_gather_json(self.context.loader.state_dict())
                ),
                config=self.config,
                tokenizer_fingerprint=self.context.tokenizer.fingerprint(),
            )
        self.saved_step = self.step

    def _sample(self) -> str:
        # Generation runs on one device; a larger model needs sample_tokens = 0.
        params = self.state.params
        if jax.process_count() > 1:
            params = multihost_utils.process_allgather(params, tiled=True)
        # Every process generates the same text, so that none waits for another.
        params = jax.device_put(params, self.context.mesh.local_devices[0])
        model = nnx.merge(self.context.graphdef, params)
        new = stream_text(
            model,
            self.context.tokenizer,
            self.config.sample_prompt,
            max_tokens=self.config.sample_tokens,
            sampling=Sampling(temperature=SAMPLE_TEMPERATURE),
            key=jax.random.key(self.config.seed),
        )
        return self.config.sample_prompt + "".join(new)


def _stack(batches: list[Batch]) -> Batch:
    return jax.tree.map(lambda *rows: np.stack(rows), *batches)
