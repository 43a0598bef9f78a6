"""The training loop: data, steps, logs, held-out evaluation, checkpoints and a final sample.

In a multi-process run every process calls `train`: all of them take part in steps, evaluations and
checkpoints, each loads its own rows, and process 0 logs.
"""

import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils

from megalodon_jax.checkpoints import RunCheckpoints, load_run_tokenizer, resolve_auto_resume
from megalodon_jax.compilation_cache import persistent_compilation_cache
from megalodon_jax.config import AnyEncoderConfig, TrainConfig
from megalodon_jax.config.run import locations, step_range
from megalodon_jax.data.loader import merge_states
from megalodon_jax.errors import CheckpointError, DataError
from megalodon_jax.evaluation.summary import Evaluation, evaluate_sets
from megalodon_jax.generate import stream_text
from megalodon_jax.inference.sampling import SamplingParams
from megalodon_jax.lora import merge_lora
from megalodon_jax.loss import LossOutput
from megalodon_jax.parallel import distributed
from megalodon_jax.parallel.liveness import LivenessWatch
from megalodon_jax.parallel.mesh import resolve_mesh
from megalodon_jax.storage.location import require_installed
from megalodon_jax.tasks import HeldoutLoader, Task, find_task, own_loaders
from megalodon_jax.train_state import TrainState
from megalodon_jax.training import run_report
from megalodon_jax.training.callbacks import Callback, RunView
from megalodon_jax.training.clock import ThroughputClock
from megalodon_jax.training.metrics import ProgressDisplay
from megalodon_jax.training.pictures import write_pictures
from megalodon_jax.training.report import ReportWindow, mean_metrics
from megalodon_jax.training.result import TrainResult
from megalodon_jax.training.run_context import (
    RunContext,
    describe_saved,
    name_checkpoint_of_failure,
    open_log,
)
from megalodon_jax.training.run_files import open_run_files
from megalodon_jax.training.run_time import RunTime
from megalodon_jax.training.signals import stop_on_signals
from megalodon_jax.training.start import initial_state
from megalodon_jax.training.step import StepMetrics, make_eval_step, make_train_step
from megalodon_jax.training.step_trace import StepTrace
from megalodon_jax.training.watchdog import Watchdog
from megalodon_jax.training.writers import MetricWriter
from megalodon_jax.typing import Batch, CountedBatch

SAMPLE_TEMPERATURE = 0.8
# Updates that may wait on the device: enough to keep it busy, and few enough that a signal, a
# waiting loader or a hang is noticed within two steps.
_MAX_IN_FLIGHT = 2


def train(
    config: TrainConfig,
    *,
    loader: Iterable[Batch] | None = None,
    heldout: Mapping[str, Callable[[], Iterable[Batch | CountedBatch]]] | None = None,
    task: Task | None = None,
    optimizer: optax.GradientTransformation | None = None,
    callbacks: Sequence[Callback] = (),
    writers: Sequence[MetricWriter] | None = None,
) -> TrainResult:
    """Trains until `config.steps`; checkpoints and logs are in `config.run_dir`.

    SIGINT or SIGTERM: the current step, evaluation batch or token of the sample is completed, a
    checkpoint of the newest step is saved, and the function returns with `stop_signal` set. A
    second signal ends the process at once. In a multi-process run a signal to any process stops all
    of them after the same step; `run_dir` must be shared.

    Args:
      config: the run.
      loader: batches instead of those of `config.data`, whose `batch_size` and `seq_len` they have
        (see `tasks.OwnBatches`): rows of this process, endless.
      heldout: with `loader`, the held-out sets by name, each a function that starts a pass; the
        name of a single set may be "". None: none with `loader`, else those of `config.data`.
      task: examples, loss and metric instead of those of `config.task`.
      optimizer: an optimizer instead of that of `config.optim`, with its own schedule.
      callbacks: your code at the events of the run.
      writers: outputs of the metrics beside `metrics.jsonl`; None: TensorBoard, and wandb if
        `wandb_project` is set.

    Raises:
      ConfigError: settings are inconsistent, `run_dir` already has checkpoints and `resume` is not
        set, or the package for a URL's scheme is not installed.
      DataError: the data is empty or cannot be read.
      CheckpointError: a checkpoint cannot be written, or none can be read to resume from.
      RunLockedError: another process owns `run_dir`, or has taken it over.
      TrainingError: the parameters are not finite, more than `max_skipped_updates` updates in a row
        were skipped, or a spike stops the run.
    """
    started = time.monotonic()
    require_installed(locations(config))
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        distributed.initialize(config.processes)
        cache = (config.compilation_cache, config.compilation_cache_gb)
        stack.enter_context(persistent_compilation_cache(*cache))
        mesh = resolve_mesh(config)
        rows = distributed.rows_of_process(mesh, config.data.batch_size)
        tokenizer = load_run_tokenizer(config)
        task = task or find_task(config.task)
        if loader is None and heldout is None:
            training_loader, heldout_loaders = task.open_loaders(
                config,
                tokenizer,
                rows=rows,
                num_shards=distributed.num_shards_of(mesh, config.data.batch_size),
            )
        else:
            training_loader, heldout_loaders = own_loaders(config, loader, heldout, rows=len(rows))
        stack.callback(training_loader.close)
        stack.enter_context(LivenessWatch())
        files = stack.enter_context(open_run_files(config.run_dir))
        watchdog = stack.enter_context(
            Watchdog(config.watchdog_seconds, files.local, publish=files.copy)
        )
        checkpoints = stack.enter_context(
            RunCheckpoints(
                config.run_dir,
                keep=config.keep_checkpoints,
                keep_every=config.keep_every,
                allow_unverified=config.allow_unverified,
                before_manifest=files.copy,
            )
        )
        stack.enter_context(name_checkpoint_of_failure(config, checkpoints))
        config = resolve_auto_resume(checkpoints, config)
        stop.describe_saved = lambda: describe_saved(checkpoints, config)
        stack.enter_context(
            files.copies(checkpoints.check_owner, continue_earlier=distributed.is_main())
        )
        run_time = RunTime(
            files.local if distributed.is_main() else None,
            started=started,
            devices=run_report.describe_devices(list(mesh.devices.flat)),
        )
        graphdef, state, changes = initial_state(
            config, mesh, training_loader, checkpoints, optimizer=optimizer
        )
        checkpoints.keep_tokenizer(tokenizer)
        first_step = int(state.step)
        run_time.resume_at(first_step)
        context = RunContext(
            config=config,
            mesh=mesh,
            rows=rows,
            task=task,
            tokenizer=tokenizer,
            loader=training_loader,
            optimizer=optimizer,
            heldout_loaders=heldout_loaders,
            graphdef=graphdef,
            checkpoints=checkpoints,
            log=stack.enter_context(
                open_log(config, files.local, first_step=first_step, writers=writers)
            ),
            display=stack.enter_context(
                ProgressDisplay(
                    first_step=first_step, steps=config.steps, silent=not distributed.is_main()
                )
            ),
            run_time=run_time,
            watchdog=watchdog,
            trace=stack.enter_context(StepTrace(step_range(config.profile_steps), files.local)),
            stop=stop,
            callbacks=callbacks,
        )
        run = _Run(context, state)
        run.report_changes(changes)
        run.advance()
        return run.finish()


class _StoppedError(Exception):
    """A signal ended an evaluation or the sample."""


class _Run:
    """The changing state of a run."""

    def __init__(self, context: RunContext, state: TrainState) -> None:
        config, mesh = context.config, context.mesh
        self.context = context
        self.config = config
        self.state = state
        self.devices = list(mesh.devices.flat)
        self.first_step = self.step = int(state.step)
        self.saved_step = self.step if config.resume else None
        self.train_step = make_train_step(
            context.graphdef, config, mesh, task=context.task, optimizer=context.optimizer
        )
        self.eval_step = make_eval_step(context.graphdef, config, mesh, task=context.task)
        self.has_evaluated = False
        self.window = ReportWindow(
            config, context.display, context.log, newest_checkpoint=self._newest_checkpoint,
            step=self.step,
        )  # fmt: skip
        self.in_flight: deque[StepMetrics] = deque()
        self.train_loss: float | None = None
        self.clock = ThroughputClock()
        self.global_signal = distributed.DelayedGlobalMax(mesh)
        self.stop_signal: signal.Signals | None = None
        self.view = RunView(config, context.graphdef, state)

    def _notify(self, event: str, *arguments: Any) -> None:
        self.view.step, self.view.state = self.step, self.state
        for callback in self.context.callbacks:
            getattr(callback, event)(self.view, *arguments)

    def report_changes(self, changes: Mapping[str, tuple[Any, Any]]) -> None:
        """Logs the settings that differ from those of the resumed or the initial weights."""
        for name, (old, new) in changes.items():
            self.context.display.message(
                f"{name} was {old!r} and is {new!r} from step {self.step + 1} on"
            )
        if changes and self.context.log is not None:
            self.context.log.write_changes(self.step, changes)

    def advance(self) -> None:
        """Trains until the last step or a signal, then saves."""
        config, run_time = self.config, self.context.run_time
        self.context.display.message(
            run_report.describe_run(config, self.state, self.devices, first_step=self.first_step)
        )
        self.context.checkpoints.check()  # before a compilation of minutes
        run_time.enter("steps")
        batches = iter(self.context.loader)
        self._notify("on_start")
        last = self.step == config.steps
        while not last and not self._must_stop():
            self._train_step(batches)
            self.context.display.advance(self.step)
            last = self.step == config.steps or self.view.is_stopped
            if last or self.step % config.log_every == 0:
                self._report()
            if not last and config.eval_every and self.step % config.eval_every == 0:
                try:
                    self._evaluate(config.eval_batches)
                except _StoppedError:
                    break
            if config.checkpoint_every and self.step % config.checkpoint_every == 0:
                self._save()
        if self.saved_step != self.step:
            self._save()
        with run_time.phase("saving"):
            self.context.checkpoints.wait()

    def _train_step(self, batches: Iterator[Batch]) -> None:
        watchdog, number = self.context.watchdog, self.step + 1
        is_first = self.step == self.first_step
        if not is_first:
            watchdog.beat(f"step {number}")
        started = time.monotonic()
        newest = self.in_flight[-1] if self.in_flight else None
        accumulate_steps = self.config.optim.accumulate_steps
        batch = _stack([self._next_batch(batches) for _ in range(accumulate_steps)])
        # While the device still computes, the loader keeps nothing waiting.
        loss: Any = None if newest is None else newest.loss
        if loss is None or loss.is_ready():
            self.context.run_time.move(time.monotonic() - started, to="data")
        placed = self._place(batch)
        with (
            self.context.trace.step(number, newest),
            self._compiling() if is_first else nullcontext(),
        ):
            self.state, metrics = self.train_step(self.state, placed)
            if is_first:
                jax.block_until_ready(metrics)
        self.step = number
        self.window.append(metrics)
        self.in_flight.append(metrics)
        if len(self.in_flight) > _MAX_IN_FLIGHT:
            jax.block_until_ready(self.in_flight.popleft())
        if is_first:
            self._report_compilation(metrics)
            watchdog.beat(f"step {number + 1}")
        else:
            watchdog.step_took(time.monotonic() - started)
        self._notify("on_step", metrics)

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        with self.context.watchdog.exempt(), self.context.run_time.phase("compilation"):
            yield

    def _next_batch(self, batches: Iterator[Batch]) -> Batch:
        try:
            return next(batches)
        except DataError as error:
            # The other processes are in the middle of a step: saving together is not possible.
            if jax.process_count() > 1:
                raise
            if self.saved_step != self.step:
                self._save()
                self.context.checkpoints.wait()
            raise DataError(
                f"{error}; step {self.step} is saved in {self.config.run_dir}"
            ) from error

    def _must_stop(self) -> bool:
        own = self.context.stop.signal
        signal_number = self.global_signal.exchange(0 if own is None else int(own))
        if signal_number:
            self.stop_signal = self.context.stop.signal = signal.Signals(signal_number)
        return bool(signal_number)

    def _place(self, batch: Batch) -> Batch:
        return distributed.place_batch(
            batch, self.context.mesh, rows=self.context.rows, batch_size=self.config.data.batch_size
        )

    def finish(self) -> TrainResult:
        """Runs the final held-out evaluation and the sample, unless a signal stopped the run."""
        config, display, run_time = self.config, self.context.display, self.context.run_time
        heldout, sample, activity = None, "", f"after step {self.step}"
        try:
            if self.stop_signal is not None:
                raise _StoppedError
            activity = "in the final evaluation"
            heldout = self._evaluate(config.final_eval_batches)
            activity = "in the sample"
            writes_text = config.sample_tokens and not isinstance(config.model, AnyEncoderConfig)
            sample = self._sample() if writes_text else ""
        except _StoppedError:
            assert self.stop_signal is not None
            saved = self.context.stop.describe_saved()
            display.message(f"{self.stop_signal.name}: stopped {activity}; {saved}")
        if sample:
            display.message(f"sample:\n{sample}")
        if heldout is not None:
            display.message(f"final held-out {heldout.describe()}")
        if heldout is not None and heldout.confusion is not None and self.context.log is not None:
            write_pictures(self.context.log.run_dir, heldout, config, self.context.task)
        if self.stop_signal is None:
            display.message(f"step {self.step}; checkpoints and logs are in {config.run_dir}")
        run_time.write(self.step)
        display.message(run_time.summary())
        result = TrainResult(self.step, self.train_loss, heldout, sample, self.stop_signal)
        self._notify("on_end", result)
        return result

    def _report_compilation(self, metrics: StepMetrics) -> None:
        self.context.display.message(f"first step, with compilation: {self.clock.seconds():.1f} s")
        # Throughput excludes this step, because most of its time is compilation.
        self.clock.restart_without(float(metrics.processed_tokens))
        self.context.display.restart(self.step)

    def _report(self) -> None:
        self.context.checkpoints.check()
        metrics: dict[str, Any] = mean_metrics(window := self.window.take())
        tokens_per_second = self.clock.tokens_per_second(
            metrics.get("input_tokens", metrics["tokens"])
        )
        mfu = (
            None
            if tokens_per_second is None
            else run_report.utilization(self.config, self.devices, tokens_per_second)
        )
        self.context.run_time.write(self.step)
        report = {
            **metrics,
            "tokens_per_second": tokens_per_second,
            "mfu": mfu,
            **self.context.run_time.metrics(),
            **run_report.data_counts(self.context.loader, self.config),
        }
        self._log(report)
        self._notify("on_report", report)
        text = f"loss {metrics['loss']:.4f}"
        text += f"  {tokens_per_second:,.0f} tokens/s" if tokens_per_second else ""
        text += f"  MFU {mfu:.1%}" if mfu else ""
        text += f"  skipped {metrics['skipped_updates']:.0f}" if metrics["skipped_updates"] else ""
        self.context.display.report(self.step, text)
        # The last finite loss is that of the parameters before its update.
        if (confirmed := self.window.finite_loss_step) is not None:
            self.context.checkpoints.confirm(confirmed)
        self.train_loss = float(window[-1].loss)
        self.clock.restart()

    def _log(self, metrics: Mapping[str, float | None]) -> None:
        if self.context.log is not None:
            self.context.log.write(self.step, metrics)

    def _newest_checkpoint(self) -> str:
        try:
            self.context.checkpoints.wait()
        except CheckpointError as error:
            return str(error)
        saved = self.context.checkpoints.complete_steps()
        return f"the newest checkpoint is step {saved[-1]}" if saved else "there is no checkpoint"

    def _evaluate(self, max_batches: int) -> Evaluation | None:
        if not (loaders := self.context.heldout_loaders):
            return None
        # The time of updates that still run is theirs.
        jax.block_until_ready(self.state.step)
        with self.clock.pause(), self.context.run_time.phase("evaluation"):
            heldout, by_set = evaluate_sets(
                self._evaluate_batch,
                self.state.evaluated_params,
                {name: self._heldout_batches(loader) for name, loader in loaders.items()},
                metric=self.context.task.metric,
                max_batches=max_batches,
            )
        if np.isfinite(heldout.loss):
            self.context.checkpoints.report_heldout(self.step, heldout.selection_loss)
            self.context.checkpoints.confirm(self.step)
        logged = {f"heldout_{key}": value for key, value in heldout.metrics().items()}
        for name, evaluation in by_set.items():
            for key, value in evaluation.metrics().items():
                logged[f"heldout_{key}/{name}"] = value
        self._log(logged)
        text = "".join(f"  {name} {each.describe()}" for name, each in by_set.items())
        self.context.display.message(
            f"step {self.step}/{self.config.steps}  held-out {heldout.describe()}{text}"
        )
        self._notify("on_evaluation", heldout)
        return heldout

    def _heldout_batches(self, loader: HeldoutLoader) -> Iterator[CountedBatch]:
        """A held-out pass from its start, on the devices."""
        loader.rewind()
        for batch, num_bytes in loader.with_bytes():
            if self._must_stop():
                raise _StoppedError
            self.context.watchdog.beat("evaluation")
            yield CountedBatch(self._place(batch), num_bytes)

    def _evaluate_batch(self, params: nnx.State, batch: Batch) -> LossOutput:
        if self.has_evaluated:
            return self.eval_step(params, batch)
        self.has_evaluated = True
        with self._compiling():
            return jax.block_until_ready(self.eval_step(params, batch))

    def _save(self) -> None:
        self.window.check()
        jax.block_until_ready(self.state.step)
        self.context.watchdog.beat(f"saving step {self.step}")
        if self.context.log is not None:
            self.context.log.make_durable()
        with self.clock.pause(), self.context.run_time.phase("saving"):
            self.context.checkpoints.save(
                self.state,
                loader_state=merge_states(
                    distributed.all_gather_json(self.context.loader.state_dict())
                ),
                config=self.config,
                tokenizer_fingerprint=self.context.tokenizer.fingerprint(),
            )
        self.context.run_time.mark(self.step)
        self.saved_step = self.step
        self._notify("on_save")

    def _sample(self) -> str:
        # Generation runs on one device; a larger model needs sample_tokens = 0.
        params = self.state.evaluated_params
        if jax.process_count() > 1:
            params = multihost_utils.process_allgather(params, tiled=True)
        # Every process generates the same text, so that none waits for another.
        params = jax.device_put(params, self.context.mesh.local_devices[0])
        model = merge_lora(nnx.merge(self.context.graphdef, params))
        pieces = stream_text(
            model,
            self.context.tokenizer,
            self.config.sample_prompt,
            max_tokens=self.config.sample_tokens,
            sampling=SamplingParams(temperature=SAMPLE_TEMPERATURE),
            key=jax.random.key(self.config.seed),
        )
        with self.context.run_time.phase("evaluation"):
            with self._compiling():
                sample = self.config.sample_prompt + next(pieces, "")
            for piece in pieces:
                if self._must_stop():
                    raise _StoppedError
                self.context.watchdog.beat("the sample")
                sample += piece
        return sample


def _stack(batches: list[Batch]) -> Batch:
    return jax.tree.map(lambda *rows: np.stack(rows), *batches)
