"""Experiment trackers: rank 0 sends metrics to TensorBoard, Weights & Biases or MLflow from a background thread."""

import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from configs.schema import MlflowLogger, TensorboardLogger, WandbLogger
from runs.layout import TENSORBOARD, is_metric, run_digest
from training.events import Event, Notice
from utils.errors import first_line
from utils.storage.bucket import Store, join_uri

Logger = WandbLogger | MlflowLogger | TensorboardLogger

_END_SECONDS = 30.0
_MLFLOW_BATCH = 100  # the server's limit of parameters per request
_MLFLOW_LONGEST = 6000  # the server's limit of characters per parameter


@dataclass(frozen=True)
class TrackedRun:
    """The identity and configuration of a run, as sent to trackers."""

    name: str
    store: Store
    """Store of the run directory in the bucket."""
    parameters: Mapping[str, Any]
    """The flattened configuration."""
    scratch: Path
    """Local scratch directory of this process."""

    @property
    def id(self) -> str:
        """The run's id for trackers: 16 hex digits, unchanged when the run resumes."""
        return run_digest(self.store.uri)


class Tracker(Protocol):
    """A destination for metrics, created when training begins and used by one thread. Its exceptions become warnings."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Send the metrics of a step."""
        ...

    def end(self) -> None:
        """Send the remaining metrics and close the run."""
        ...


class Tensorboard:
    """A tracker that writes event files and uploads them to `tensorboard/` after every evaluation and at the end."""

    def __init__(self, run: TrackedRun, begin: int):
        from tensorboardX import SummaryWriter

        self._directory = run.scratch / TENSORBOARD
        self._store = run.store
        # Hides later steps that a killed attempt has logged.
        self._writer = SummaryWriter(str(self._directory), purge_step=begin + 1)
        settings = yaml.safe_dump(dict(run.parameters), allow_unicode=True)
        self._writer.add_text(
            "configuration", "\n".join(f"    {line}" for line in settings.splitlines()), begin
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Implement Tracker."""
        for name, figure in figures.items():
            self._writer.add_scalar(name, figure, step)
        if any(name.startswith("eval/") for name in figures):
            self._writer.flush()  # events still in the queue are uploaded with the next flush
            self._upload()

    def end(self) -> None:
        """Implement Tracker."""
        self._writer.close()
        self._upload()

    def _upload(self) -> None:
        for path in self._directory.iterdir():
            self._store.upload(path, join_uri(TENSORBOARD, path.name))


class Wandb:
    """A tracker for Weights & Biases; with WANDB_MODE=offline it writes local files."""

    def __init__(self, settings: WandbLogger, run: TrackedRun):
        import wandb

        run.scratch.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            group=settings.group,
            tags=settings.tags,
            id=run.id,
            name=settings.name or run.name,
            resume="allow",
            config=dict(run.parameters),
            dir=run.scratch,
            settings=wandb.Settings(console="off"),  # the process has its own log file
        )
        # A separate step metric accepts steps that are trained again after a failure.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Implement Tracker."""
        self._run.log({**figures, "step": step})

    def end(self) -> None:
        """Implement Tracker."""
        self._run.finish()


class Mlflow:
    """A tracker for MLflow, which finds the run of an earlier attempt by a tag."""

    def __init__(self, settings: MlflowLogger, run: TrackedRun):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient(settings.tracking_uri)
        name = settings.experiment_name or "Default"
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        before = self._client.search_runs([experiment_id], f"tags.anneal_run = '{run.id}'")
        if before:
            self._run_id = before[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
            return
        made = self._client.create_run(
            experiment_id, run_name=run.name, tags={**settings.tags, "anneal_run": run.id}
        )
        self._run_id = made.info.run_id
        parameters = [Param(key, str(value)[:_MLFLOW_LONGEST]) for key, value in run.parameters.items()]
        for first in range(0, len(parameters), _MLFLOW_BATCH):
            self._client.log_batch(self._run_id, params=parameters[first : first + _MLFLOW_BATCH])

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Implement Tracker."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, figure, now, step) for name, figure in figures.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def end(self) -> None:
        """Implement Tracker."""
        self._client.set_terminated(self._run_id)


class Tracking(TrainerCallback):
    """A callback that sends metrics to a tracker on its own thread.

    A slow tracker does not block training, and an error is reported once.

    Args:
        settings: The YAML's `logger`.
        run: The run to track.
        emit: Sends events to the driver.
    """

    def __init__(self, settings: Logger, run: TrackedRun, emit: Callable[[Event], None]):
        self._settings = settings
        self._run = run
        self._emit = emit
        self._measured: queue.SimpleQueue[tuple[int, dict[str, float]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the tracker thread."""
        self._thread = threading.Thread(
            target=self._work, args=(state.global_step,), name="tracker", daemon=True
        )
        self._thread.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Queue the metrics of a step or an evaluation."""
        if logs and is_metric(logs):
            self._measured.put((state.global_step, tracked_figures(logs)))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Close the tracker, and wait for it up to a time limit."""
        assert self._thread is not None
        self._measured.put(None)
        self._thread.join(_END_SECONDS)
        if self._thread.is_alive():
            self._warn(f"it had not received all metrics {_END_SECONDS:.0f} s after the last step")

    def _work(self, begin: int) -> None:
        try:
            tracker = open_tracker(self._settings, self._run, begin)
            while (measured := self._measured.get()) is not None:
                tracker.log(*measured)
            tracker.end()
        except Exception as error:  # noqa: BLE001  # tracker libraries raise many types; none may stop the run
            self._warn(first_line(error))

    def _warn(self, reason: str) -> None:
        self._emit(
            Notice(
                f"logger: {self._settings.provider} failed ({reason}). Training continues without it; metrics.jsonl has all metrics."
            )
        )


def open_tracker(settings: Logger, run: TrackedRun, begin: int) -> Tracker:
    """Open the tracker that the YAML selects.

    Args:
        settings: The YAML's `logger`.
        run: The run to track.
        begin: Step at which training starts or resumes.
    """
    match settings:
        case WandbLogger():
            return Wandb(settings, run)
        case MlflowLogger():
            return Mlflow(settings, run)
        case TensorboardLogger():
            return Tensorboard(run, begin)


def tracked_figures(logs: Mapping[str, Any]) -> dict[str, float]:
    """Group metrics for trackers: {"loss": 1, "eval_loss": 2} -> {"train/loss": 1, "eval/loss": 2}."""
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": float(figure)
        for name, figure in logs.items()
    }
