"""Progress of a job's run, read from the bucket: events, checkpoints and the CSV of step metrics."""

import bisect
import csv
import io
import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from runs.layout import MetricsLine
from runs.reading import committed, parse_metrics
from service.layout import JOB_PREFIX, metrics_key, run_uri
from service.models import fine_tuned_id
from service.records import Record
from utils.storage.bucket import NotFoundError, open_store
from utils.storage.s3 import S3Store

_CSV_COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
"""OpenAI's columns."""
_MAX_RUNS = 64
"""Runs whose metrics are remembered."""

Figures = Mapping[str, float]


class Progress:
    """The progress of jobs. The metrics of a run are read again only when the run has written them."""

    def __init__(self, store: S3Store):
        """Remember nothing yet.

        Args:
            store: The service's storage path.
        """
        self._store = store
        self._known: OrderedDict[str, tuple[str, Mapping[int, Figures]]] = OrderedDict()
        """Key of a run's metrics -> their ETag and what they contain."""
        self._changing = threading.Lock()

    def events(self, project: str, job: Record) -> list[dict[str, Any]]:
        """Return the events of a job as the API answers them, newest first."""
        name = job["id"].removeprefix(JOB_PREFIX)
        messages = [
            _event(f"ftevent-{name}-m{number:05d}", created_at, message, level=level)
            for created_at, level, message, number in job["messages"]
        ]
        total = job["total_steps"]
        steps = self.steps(project, job["id"])
        metrics = []
        for created_at, (step, figures) in zip(_times_of(job, list(steps)), steps.items(), strict=True):
            of_total = f"Step {step}/{total}" if total else f"Step {step}"
            shown = ", ".join(
                f"{label} loss={figures[key]:.4f}"
                for label, key in (("training", "train_loss"), ("validation", "valid_loss"))
                if key in figures
            )
            data = {"step": step, "total_steps": total, **figures}
            identifier = f"ftevent-{name}-s{step:07d}"
            metrics.append(_event(identifier, created_at, f"{of_total}: {shown}", kind="metrics", data=data))
        return sorted(
            [*messages, *metrics], key=lambda event: (event["created_at"], event["id"]), reverse=True
        )

    def checkpoints(self, project: str, job: Record) -> list[dict[str, Any]]:
        """Return the committed checkpoints of a job as the API answers them, newest first."""
        steps = self.steps(project, job["id"])
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
            for manifest in reversed(committed(open_store(run_uri(self._store, project, job["id"]))))
        ]

    def metrics_csv(self, project: str, job: Record) -> bytes:
        """Return the CSV of step metrics that a finished job has as its result file."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_CSV_COLUMNS)
        for step, figures in self.steps(project, job["id"]).items():
            if step > 0:
                row = {"step": step, "train_accuracy": figures.get("train_mean_token_accuracy"), **figures}
                writer.writerow([row.get(name, "") for name in _CSV_COLUMNS])
        return text.getvalue().encode()

    def steps(self, project: str, job_id: str) -> Mapping[int, Figures]:
        """Return step -> metrics of a job's run with OpenAI's names, in order; empty before the first."""
        key = metrics_key(project, job_id)
        try:
            etag = self._store.stat(key).etag
        except NotFoundError:
            return {}
        known = self._known.get(key)
        if known is None or known[0] != etag:
            found = self._store.read_version(key)
            if found is None:
                return {}
            lines, _ = parse_metrics(found[0], self._store.uri_of(key))
            known = (found[1], _figures_by_step(lines))
            with self._changing:
                self._known[key] = known
                self._known.move_to_end(key)
                if len(self._known) > _MAX_RUNS:
                    self._known.popitem(last=False)
        return known[1]


def _figures_by_step(lines: Sequence[MetricsLine]) -> dict[int, Figures]:
    steps: dict[int, dict[str, float]] = {}
    for line in lines:
        steps.setdefault(line.step, {}).update(_figures(line))
    return dict(sorted((step, figures) for step, figures in steps.items() if figures))


def _figures(line: MetricsLine) -> dict[str, float]:
    others = line.model_extra or {}
    eval_accuracy = others.get("eval_mean_token_accuracy")
    named = {
        "train_loss": line.loss,
        "train_mean_token_accuracy": others.get("mean_token_accuracy"),
        "valid_loss": line.eval_loss,
        "valid_mean_token_accuracy": eval_accuracy,
        "full_valid_loss": line.eval_loss,
        "full_valid_mean_token_accuracy": eval_accuracy,
    }
    # JSON has no NaN and no infinity.
    return {name: value for name, value in named.items() if value is not None and math.isfinite(value)}


def _times_of(job: Record, steps: Sequence[int]) -> list[int]:
    """Return when the service first saw the metrics of each step; they become visible with the next checkpoint."""
    marks = job["marks"]
    marked = [mark[0] for mark in marks]
    last = job["finished_at"] or (marks[-1][1] if marks else job["started_at"] or job["created_at"])
    places = [bisect.bisect_left(marked, step) for step in steps]
    return [marks[place][1] if place < len(marks) else last for place in places]


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
