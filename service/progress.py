"""What a job's run has left in the bucket: events, checkpoints and the CSV of step metrics."""

import bisect
import csv
import io
import math
from datetime import datetime
from typing import Any

from runs.layout import MetricsLine
from runs.reading import committed, read_metrics
from service.layout import JOB_PREFIX, run_uri
from service.models import fine_tuned_id
from service.records import Record
from utils.storage.bucket import open_store
from utils.storage.s3 import S3Store

# OpenAI's columns. Those of accuracies are empty, because training measures losses only.
_CSV_COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")


def events_of(store: S3Store, project: str, job: Record) -> list[dict[str, Any]]:
    """Return the events of a job as the API answers them, newest first."""
    name = job["id"].removeprefix(JOB_PREFIX)
    messages = [
        _event(f"ftevent-{name}-m{number:05d}", created_at, message, level=level)
        for created_at, level, message, number in job["messages"]
    ]
    total = job["total_steps"]
    metrics = []
    for step, figures in _steps_of(store, project, job).items():
        created_at = _time_of(job, step)
        of_total = f"Step {step}/{total}" if total else f"Step {step}"
        shown = ", ".join(
            f"{label} loss={figures[key]:.4f}"
            for label, key in (("training", "train_loss"), ("validation", "valid_loss"))
            if key in figures
        )
        data = {"step": step, "total_steps": total, **figures}
        metrics.append(
            _event(
                f"ftevent-{name}-s{step:07d}", created_at, f"{of_total}: {shown}", kind="metrics", data=data
            )
        )
    return sorted([*messages, *metrics], key=lambda event: (event["created_at"], event["id"]), reverse=True)


def checkpoints_of(store: S3Store, project: str, job: Record) -> list[dict[str, Any]]:
    """Return the committed checkpoints of a job as the API answers them, newest first."""
    steps = _steps_of(store, project, job)
    return [
        {
            "object": "fine_tuning.job.checkpoint",
            "id": f"ftckpt-{job['id'].removeprefix(JOB_PREFIX)}-{manifest.step}",
            "created_at": int(datetime.fromisoformat(manifest.created).timestamp()),
            "fine_tuned_model_checkpoint": f"{fine_tuned_id(job, project)}:ckpt-step-{manifest.step}",
            "fine_tuning_job_id": job["id"],
            "metrics": {"step": manifest.step, **steps.get(manifest.step, {})},
            "step_number": manifest.step,
        }
        for manifest in reversed(committed(open_store(run_uri(store, project, job["id"]))))
    ]


def metrics_csv(store: S3Store, project: str, job: Record) -> bytes:
    """Return the CSV of step metrics that a finished job has as its result file."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    for step, figures in _steps_of(store, project, job).items():
        if step > 0:
            row = {"step": step, **figures}
            writer.writerow([row.get(name, "") for name in _CSV_COLUMNS])
    return text.getvalue().encode()


def latest_step(store: S3Store, project: str, job_id: str) -> int:
    """Return the last step in a run's metrics; 0 if there is none."""
    lines = read_metrics(open_store(run_uri(store, project, job_id)))
    return max((line.step for line in lines), default=0)


def _steps_of(store: S3Store, project: str, job: Record) -> dict[int, dict[str, float]]:
    """Return step -> metrics with OpenAI's names, in order."""
    steps: dict[int, dict[str, float]] = {}
    for line in read_metrics(open_store(run_uri(store, project, job["id"]))):
        steps.setdefault(line.step, {}).update(_figures(line))
    return dict(sorted((step, figures) for step, figures in steps.items() if figures))


def _figures(line: MetricsLine) -> dict[str, float]:
    named = {
        "train_loss": line.loss,
        "valid_loss": line.eval_loss,
        "full_valid_loss": line.eval_loss,
    }
    # JSON has no NaN and no infinity.
    return {name: value for name, value in named.items() if value is not None and math.isfinite(value)}


def _time_of(job: Record, step: int) -> int:
    """Return when the service first saw the metrics of a step; they become visible with the next checkpoint."""
    marks = job["marks"]
    place = bisect.bisect_left([mark[0] for mark in marks], step)
    if place < len(marks):
        return marks[place][1]
    return job["finished_at"] or (marks[-1][1] if marks else job["started_at"] or job["created_at"])


def _event(
    identifier: str,
    created_at: int,
    message: str,
    *,
    level: str = "info",
    kind: str = "message",
    data: dict[str, Any] | None = None,
) -> dict[str, Any]:
    return {
        "object": "fine_tuning.job.event",
        "id": identifier,
        "created_at": created_at,
        "level": level,
        "message": message,
        "type": kind,
        "data": data or {},
    }
