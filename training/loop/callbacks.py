"""The trainer's callbacks: when to evaluate, save and stop, what to report and what to commit. One small class each."""

import math
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

from ray.util.metrics import Gauge
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from configs.schema import FinetuneConfig
from runs.early_stopping import stopping_step
from runs.layout import eval_figures
from training.events import DivergedError, Evaluated, Event, StepDone
from training.loop.throughput import PhaseClock
from training.models.files import ModelError
from utils.files import FilesInUse

_RECORD_EVERY_SECONDS = 30.0
_RECORDED_LINES_A_SECOND = 100
_GAUGES = {
    "loss": "Training loss of the last step, averaged over its loss tokens",
    "eval_loss": "Loss of the last evaluation, averaged over its loss tokens",
    "tokens_per_second": "Tokens per second of the last step over all workers, without padding",
}


class Schedule(TrainerCallback):
    """A callback that requests evaluations and checkpoints at the YAML's intervals and at the end.

    The step alone decides, so a resumed run continues both intervals.
    """

    def __init__(self, config: FinetuneConfig, steps_per_epoch: int, steps: int, *, evaluates: bool):
        self.evaluates = evaluates
        self.evaluation_every = config.evaluation_interval(steps_per_epoch, steps)
        self.checkpoint_every = config.checkpoint_interval(steps_per_epoch, steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Request an evaluation and a checkpoint if they are due."""
        step, is_last = state.global_step, state.global_step >= state.max_steps
        if is_last or _is_due(step, self.evaluation_every):
            control.should_evaluate = self.evaluates
        if is_last or _is_due(step, self.checkpoint_every):
            control.should_save = True


def _is_due(step: int, every: Fraction) -> bool:
    """Return whether a multiple of the interval is in (step - 1, step]."""
    return step // every > (step - 1) // every


class AfterFirstStep(TrainerCallback):
    """A callback that calls a function once, after the first optimizer step of an attempt."""

    def __init__(self, work: Callable[[], None]):
        self.work = work
        self.is_done = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Call the function after the first step."""
        if not self.is_done:
            self.is_done = True
            self.work()


class ProgressReporter(TrainerCallback):
    """A callback that emits an event for each step and evaluation."""

    def __init__(self, emit: Callable[[Event], None]):
        self.emit = emit

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Emit the metrics of a step or an evaluation."""
        assert logs is not None
        if "eval_loss" in logs:
            self.emit(Evaluated(state.global_step, state.epoch or 0.0, logs["eval_loss"], eval_figures(logs)))
        elif "loss" in logs:
            self.emit(
                StepDone(
                    state.global_step,
                    state.max_steps,
                    state.epoch or 0.0,
                    logs["loss"],
                    logs["tokens_per_second"],
                    logs.get("mfu"),
                    logs["peak_memory_bytes"],
                    {name: value for name, value in logs.items() if name.startswith("rewards/")},
                )
            )


class Gauges(TrainerCallback):
    """A callback on rank 0 that exports metrics through Ray; its dashboard and Prometheus show them as ray_anneal_*."""

    def __init__(self, run_name: str):
        self.gauges = {name: Gauge(f"anneal_{name}", text, ("run",)) for name, text in _GAUGES.items()}
        for gauge in self.gauges.values():
            gauge.set_default_tags({"run": run_name})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Set the gauges to the metrics of a step or an evaluation."""
        assert logs is not None
        for name, gauge in self.gauges.items():
            if name in logs:
                gauge.set(logs[name])


class EarlyStopping(TrainerCallback):
    """A callback that ends training, on every rank, once the eval loss has stopped improving, with a checkpoint."""

    def __init__(self, patience: int, threshold: float):
        self.patience = patience
        self.threshold = threshold

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Request the end of training after an evaluation, from the eval losses of all attempts."""
        if logs and "eval_loss" in logs:
            stops = stopping_step(state.log_history, self.patience, self.threshold) == state.global_step
            control.should_training_stop |= stops
            control.should_save |= stops  # checkpoints may have an interval of their own


class LossWatchdog(TrainerCallback):
    """A callback that fails the run on every rank if the training loss stays above a threshold.

    Args:
        threshold: Loss in nats per loss token.
        patience: Steps in a row above the threshold.
        last_good: Returns the URI of the latest committed checkpoint, if any.
    """

    def __init__(self, threshold: float, patience: int, last_good: Callable[[], str | None]):
        self.threshold = threshold
        self.patience = patience
        self.last_good = last_good

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Check the losses of the last steps, which are equal on all ranks."""
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry][-self.patience :]
        if len(losses) < self.patience or min(losses) <= self.threshold:
            return
        left = self.last_good()
        raise DivergedError(
            f"step {state.global_step}: the loss was above {self.threshold:g} (loss_watchdog_threshold) for {self.patience} steps, at last "
            f"{losses[-1]:.4g}. "
            + (f"The last checkpoint is {left}. " if left else "No checkpoint was committed. ")
            + "Lower learning_rate, raise num_warmup_steps, or raise loss_watchdog_threshold."
        )


class NonFiniteLossCheck(TrainerCallback):
    """A callback that fails the run on every rank, before it saves, on a NaN or infinite loss or gradient.

    Args:
        rows_of_step: Returns the sources of the rows of a step, for the error message.
        last_good: Returns the URI of the latest committed checkpoint, if any.
    """

    def __init__(self, rows_of_step: Callable[[int], str], last_good: Callable[[], str | None]):
        self.rows_of_step = rows_of_step
        self.last_good = last_good

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Check the metrics of a step or an evaluation, which are equal on all ranks."""
        figures = {
            name: float(value)
            for name, value in (logs or {}).items()
            if name in ("loss", "grad_norm") or (name.startswith("eval_") and name.endswith("loss"))
        }
        wrong = [f"{name} {value}" for name, value in figures.items() if not math.isfinite(value)]
        if not wrong:
            return
        where = f" on the rows {self.rows_of_step(state.global_step)}" if "loss" in figures else ""
        left = self.last_good()
        if state.global_step == 0:
            raise DivergedError(
                f"before the first step: {' and '.join(wrong)}. The starting weights contain NaN or infinite values, or values too large "
                "for this dtype. Start from another checkpoint, or write dtype: fp32 to find the cause."
            )
        raise DivergedError(
            f"step {state.global_step}: {' and '.join(wrong)}{where}. "
            + (f"The last good checkpoint is {left}. " if left else "No checkpoint was committed. ")
            + "Lower learning_rate, raise num_warmup_steps, or check these rows."
        )


class Stopping(TrainerCallback):
    """A callback that saves a checkpoint and stops training, at the same step on every rank, once rank 0 receives a request.

    Rank 0's answer is broadcast after each step, so that no rank continues alone.
    """

    def __init__(self, is_requested: Callable[[], bool], broadcast: Callable[[bool], bool]):
        self.is_requested = is_requested
        self.broadcast = broadcast

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Request a checkpoint and the end of training if rank 0 has received a request."""
        if self.broadcast(self.is_requested()):
            control.should_save = True
            control.should_training_stop = True


class Preempted(TrainerCallback):
    """A callback that saves one checkpoint when a node is about to be terminated; training continues until then.

    Rank 0 is notified for every node; its answer is broadcast after each step.
    """

    def __init__(self, is_preempted: Callable[[], bool], broadcast: Callable[[bool], bool]):
        self.is_preempted = is_preempted
        self.broadcast = broadcast
        self.is_done = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Request a checkpoint on the first preemption notice."""
        if not self.is_done and self.broadcast(self.is_preempted()):
            self.is_done = True
            control.should_save = True


class Recording(TrainerCallback):
    """A callback on rank 0 that writes the metrics between checkpoints, for `show` and `compare` while the run trains."""

    def __init__(self, record: Callable[[list[dict[str, Any]]], None]):
        self.record = record
        self.due = time.monotonic() + _RECORD_EVERY_SECONDS

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the metrics if the interval has passed."""
        if time.monotonic() >= self.due:
            # Every record rewrites all lines. A growing interval limits the share of time that this takes.
            lines_take = len(state.log_history) / _RECORDED_LINES_A_SECOND
            self.due = time.monotonic() + max(_RECORD_EVERY_SECONDS, lines_take)
            self.record(list(state.log_history))


class UnchangedWeights(TrainerCallback):
    """A callback that fails the run once a file that weights are mapped from has changed, before the step is logged or committed.

    It must be called before `NonFiniteLossCheck`, which would blame the rows and the learning rate for the loss of changed weights.

    Args:
        files: The weight files.
        last_good: Returns the URI of the latest committed checkpoint, if any.
    """

    def __init__(self, files: FilesInUse, last_good: Callable[[], str | None]):
        self.files = files
        self.last_good = last_good

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Check the files after a step."""
        self._check(state)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Check the files after an evaluation."""
        self._check(state)

    def _check(self, state: TrainerState) -> None:
        if changed := self.files.changed():
            left = self.last_good()
            raise ModelError(
                f"step {state.global_step}: {changed[0]} was written to while the run trained from it, so this step is not committed. "
                + (f"The last good checkpoint is {left}. " if left else "No checkpoint was committed. ")
                + "Restore the file and run the same command again; write a new model to another directory."
            )


class Committing(TrainerCallback):
    """A callback that passes each saved checkpoint to the committer, on every rank."""

    def __init__(
        self, save: Callable[[Path, TrainerState], None], check: Callable[[], None], clock: PhaseClock
    ):
        self.save = clock.timed("upload_stall", save)
        self.check = check

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Fail the run if a checkpoint could not be committed."""
        self.check()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start to commit output_dir/checkpoint-STEP, which transformers has just saved."""
        assert args.output_dir is not None
        self.save(Path(args.output_dir) / f"checkpoint-{state.global_step}", state)
