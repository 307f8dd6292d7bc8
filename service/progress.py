"""Progress of a job's run, read from the bucket: events, checkpoints and the CSV of step metrics."""

import bisect
import csv
import heapq
import io
import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from runs.layout import MetricsLine
from runs.reading import committed, parse_metrics
from service.layout import JOB_PREFIX, metrics_key, run_store
from service.models import fine_tuned_id
from service.records import Record
from service.requests import PageQuery, slice_by_id
from service.shared_calls import SharedCalls
from utils.storage.bucket import NotFoundError
from utils.storage.s3 import S3Store

_CSV_COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
"""OpenAI's columns."""
_MAX_RUNS = 64
"""Runs whose metrics are remembered."""
_MAX_STEPS = 1_000_000
"""Steps of all these runs together; a run with more is the only one."""

Figures = Mapping[str, float]
_Event = tuple[int, str, Any]
"""Creation time, id, and the step or (level, text)."""


class Progress:
    """The progress of jobs. The metrics of a run are read again only when the run has written them."""

    def __init__(self, store: S3Store):
        """Remember nothing yet.

        Args:
            store: The service's storage path.
        """
        self._store = store
        self._known: OrderedDict[str, tuple[str, dict[int, Figures]]] = OrderedDict()
        """Key of a run's metrics -> their ETag and what they contain."""
        self._shared = SharedCalls[dict[int, Figures]]()
        self._changing = threading.Lock()

    async def shared_steps(self, project: str, job_id: str) -> dict[int, Figures]:
        """Return what `steps` returns; requests for the same job share reads of the bucket."""
        return await self._shared(job_id, lambda: self.steps(project, job_id))

    def checkpoints(
        self, project: str, job: Record, steps: dict[int, Figures], query: PageQuery
    ) -> dict[str, Any]:
        """Return a part of the list of committed checkpoints of a job as the API answers it."""
        found = committed(run_store(self._store, project, job["id"]))
        bodies = [
            {
                "object": "fine_tuning.job.checkpoint",
                "id": f"ftckpt-{job['id'].removeprefix(JOB_PREFIX)}-{manifest.step}",
                "created_at": int(datetime.fromisoformat(manifest.created).timestamp()),
                "fine_tuned_model_checkpoint": f"{fine_tuned_id(job, project)}:ckpt-step-{manifest.step}",
                "fine_tuning_job_id": job["id"],
                "metrics": {"step": manifest.step, **steps.get(manifest.step, {})},
                "step_number": manifest.step,
            }
            for manifest in (found if query.ascending else reversed(found))
        ]
        return slice_by_id(bodies, query, "checkpoint", lambda body: body["id"], lambda body: body)

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

    def steps(self, project: str, job_id: str) -> dict[int, Figures]:
        """Return step -> metrics of a job's run with OpenAI's names, in order; empty before the first."""
        key = metrics_key(project, job_id)
        known = self._known.get(key)
        try:
            if known and known[0] == self._store.stat(key).etag:
                return known[1]
        except NotFoundError:
            return {}
        found = self._store.read_version(key)
        if found is None:
            return {}
        lines, _ = parse_metrics(found[0], self._store.uri_of(key))
        steps = _figures_by_step(lines)
        self._remember(key, (found[1], steps))
        return steps

    def _remember(self, key: str, known: tuple[str, dict[int, Figures]]) -> None:
        with self._changing:
            self._known[key] = known
            self._known.move_to_end(key)
            steps = sum(len(figures) for _, figures in self._known.values())
            while len(self._known) > 1 and (len(self._known) > _MAX_RUNS or steps > _MAX_STEPS):
                _, (_, figures) = self._known.popitem(last=False)
                steps -= len(figures)


def events_body(job: Record, steps: dict[int, Figures], query: PageQuery) -> dict[str, Any]:
    """Return a part of the list of events of a job as the API answers it; only its events are built."""
    name, total = job["id"].removeprefix(JOB_PREFIX), job["total_steps"]
    newest_first = not query.ascending
    messages = sorted(
        ((at, f"ftevent-{name}-m{number:05d}", (level, text)) for at, level, text, number in job["messages"]),
        reverse=newest_first,
    )
    metrics = (
        (_time_of(job, step), f"ftevent-{name}-s{step:07d}", step)
        for step in (reversed(steps) if newest_first else steps)
    )

    def shape(event: _Event) -> dict[str, Any]:
        created_at, identifier, content = event
        if isinstance(content, int):
            return _metrics_event(identifier, created_at, content, total, steps[content])
        level, text = content
        return _event_body(identifier, created_at, text, level=level)

    merged = heapq.merge(messages, metrics, key=lambda event: event[:2], reverse=newest_first)
    return slice_by_id(merged, query, "event", lambda event: event[1], shape)


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


def _time_of(job: Record, step: int) -> int:
    """Return when the service first saw the metrics of a step; they become visible with the next checkpoint."""
    marks = job["marks"]
    place = bisect.bisect_left(marks, step, key=lambda mark: mark[0])
    if place < len(marks):
        return marks[place][1]
    return job["finished_at"] or (marks[-1][1] if marks else job["started_at"] or job["created_at"])


def _metrics_event(
    identifier: str, created_at: int, step: int, total: int | None, figures: Figures
) -> dict[str, Any]:
    of_total = f"Step {step}/{total}" if total else f"Step {step}"
    shown = ", ".join(
        f"{label} loss={figures[key]:.4f}"
        for label, key in (("training", "train_loss"), ("validation", "valid_loss"))
        if key in figures
    )
    data = {"step": step, "total_steps": total, **figures}
    return _event_body(identifier, created_at, f"{of_total}: {shown}", kind="metrics", data=data)


def _event_body(
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
