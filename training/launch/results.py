"""The result of a run: result.json, the eval curve and the report page (driver side)."""

import platform
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from configs.loading import to_yaml
from runs.charts import draw_eval_curve
from runs.early_stopping import stopping_step
from runs.layout import (
    CONFIG_FILE,
    CURVE_FILE,
    REPORT_FILE,
    RESULT_FILE,
    Manifest,
    MetricsLine,
    RunResult,
    RunStatus,
    Speed,
    checkpoint_uri,
)
from runs.reading import (
    best,
    committed,
    eval_losses_of,
    parent_metrics,
    read_metrics,
    read_result,
    survey_samples,
)
from runs.report import RunReport
from runs.report import to_html as report_to_html
from training.checkpoints.committer import package_versions
from training.data.report import key_figures
from training.events import CheckpointCommitted, ModelReady
from training.planning.plan import RunPlan
from training.planning.report import PlanReport
from utils.storage.bucket import Store, open_store

_SAMPLED_EVALUATIONS = 5
"""Evaluations whose samples the report page shows: the first, the last and some between."""


@dataclass(frozen=True)
class Attempt:
    """The driver's record of a finished attempt, in addition to the files in the bucket."""

    failure: str | None
    """Reason of the failure, if the attempt failed."""
    signals: Sequence[int]
    """The signals that the driver received."""
    stopped_by: str | None
    """Requester of a stop with `main.py stop`; the driver then sends SIGTERM to itself."""
    model: ModelReady | None
    checkpoint: CheckpointCommitted | None
    """The latest checkpoint that this attempt committed or restored."""
    restarts: Sequence[str]
    """The reason of each worker restart."""
    log_files: Sequence[Path]
    elapsed_seconds: float
    command: Sequence[str]


@dataclass(frozen=True)
class Ending:
    """The end of an attempt, as recorded in result.json."""

    status: RunStatus
    reason: str
    stop_signal: int | None = None


def ending_of(
    failure: str | None,
    signals: Sequence[int],
    finished: bool,
    early_stop: str | None = None,
    stopped_by: str | None = None,
) -> Ending:
    """Return how an attempt ended.

    Args:
        failure: Reason of the failure, if the attempt failed.
        signals: The signals that the driver received.
        finished: True if the last step is committed.
        early_stop: Reason for which training ended before the last step, if it did.
        stopped_by: Who requested the stop with `main.py stop`, if anyone did.
    """
    if finished and failure is None:
        return Ending("completed", "all steps done")
    if early_stop and failure is None:
        return Ending("completed", early_stop)
    if signals:
        cause = f"by {stopped_by} with main.py stop" if stopped_by else signal.Signals(signals[0]).name
        return Ending(
            "stopped", f"{cause}; failed before stopping: {failure}" if failure else cause, signals[0]
        )
    assert failure is not None, "training ended early without an error"
    return Ending("failed", failure)


def write_result(plan: RunPlan, report: PlanReport, attempt: Attempt) -> RunResult:
    """Write result.json, the eval curve and the report page. Write no files for a run that has none yet.

    Raises:
        BucketError: The run cannot be read or written.
    """
    store = open_store(plan.run_uri)
    manifests = committed(store)
    metrics = read_metrics(store)
    result = _result_of(plan, report, attempt, store, manifests, metrics)
    if store.read_if_exists(CONFIG_FILE) is None:
        return result
    before = _parent_metrics(plan)
    if result.eval_losses:
        store.write(CURVE_FILE, draw_eval_curve(plan.run_name, result.eval_losses, eval_losses_of(before)))
    page = RunReport(
        result=result,
        metrics=metrics,
        parent_metrics=before,
        samples=survey_samples(store, _SAMPLED_EVALUATIONS, result.train_steps)[0],
        checkpoints=manifests,
        data=key_figures(report),
        config=to_yaml(plan.config),
        environment={
            "device": report.device,
            "parallelism": report.parallelism,
            "kernels": report.kernels,
            "python": platform.python_version(),
        },
        command=attempt.command,
        base_model=plan.base_model,
        trains_adapter=plan.config.trains_adapter,
    )
    store.write(REPORT_FILE, report_to_html(page).encode())
    store.write(RESULT_FILE, result.model_dump_json(indent=2).encode())
    return result


def _result_of(
    plan: RunPlan,
    report: PlanReport,
    attempt: Attempt,
    store: Store,
    manifests: list[Manifest],
    metrics: list[MetricsLine],
) -> RunResult:
    last = manifests[-1] if manifests else None
    steps = last.step if last else 0
    ending = ending_of(
        attempt.failure,
        attempt.signals,
        bool(manifests) and steps >= plan.max_steps,
        _early_stop(plan, metrics, steps),
        attempt.stopped_by,
    )
    # Exclude evaluations after the last checkpoint: their weights are lost.
    eval_losses = [loss for loss in eval_losses_of(metrics) if loss.step <= steps]
    if last is None and plan.config.resume_from_checkpoint:
        eval_losses = []  # these belong to the parent run
    speed = attempt.checkpoint.speed if attempt.checkpoint else Speed()
    tokens, trained_tokens = _tokens_until(last, attempt.checkpoint, store)
    return RunResult(
        status=ending.status,
        reason=ending.reason,
        stop_signal=ending.stop_signal,
        run_name=plan.run_name,
        run_uri=plan.run_uri,
        best_checkpoint=_uri(plan, best(manifests)),
        last_checkpoint=_uri(plan, last),
        eval_losses=eval_losses,
        train_steps=steps,
        tokens=tokens,
        trained_tokens=trained_tokens,
        tokens_per_second=speed.tokens_per_second,
        speed=speed,
        elapsed_seconds=round(attempt.elapsed_seconds, 3),
        parent=plan.parent,
        trainable_parameters=(
            attempt.model.trainable_parameters if attempt.model else report.trainable_parameters
        ),
        failures=list(attempt.restarts),
        log_files=[str(log) for log in attempt.log_files],
        versions=package_versions(),
        ended=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _early_stop(plan: RunPlan, metrics: list[MetricsLine], committed_steps: int) -> str | None:
    """Return why early stopping ended the run at its last checkpoint, or None if it did not."""
    patience, threshold = plan.config.early_stopping_patience, plan.config.early_stopping_threshold
    if patience is None:
        return None
    step = stopping_step([line.model_dump() for line in metrics], patience, threshold)
    if step is None or step != committed_steps:
        return None
    gain = f" by more than {threshold:g}" if threshold else ""
    return (
        f"stopped early at step {step} of {plan.max_steps}: the eval loss did not fall{gain} in {patience} evaluations "
        "(early_stopping_patience)"
    )


def _tokens_until(
    last: Manifest | None, reached: CheckpointCommitted | None, store: Store
) -> tuple[int, int]:
    """Return (tokens, loss tokens) from this attempt's events or, if it has no checkpoint, from an earlier result."""
    if reached:
        return reached.tokens, reached.trained_tokens
    before = read_result(store)
    if before and last and before.train_steps == last.step:
        return before.tokens, before.trained_tokens
    return 0, 0


def _parent_metrics(plan: RunPlan) -> list[MetricsLine]:
    """Return the parent run's metrics. A run that resumed from its parent already has them in its own."""
    return [] if plan.config.resume_from_checkpoint else parent_metrics(plan.parent)


def _uri(plan: RunPlan, manifest: Manifest | None) -> str | None:
    return checkpoint_uri(plan.run_uri, manifest.step) if manifest else None
