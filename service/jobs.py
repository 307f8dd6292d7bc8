"""Fine-tuning jobs: how a request becomes a record, and how its status changes."""

import hashlib
import os
import random
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from service.config import LoadedService
from service.errors import ApiError, invalid, not_found
from service.job_config import JobConfigError, check_settings, resolve_hyperparameters
from service.keys import Caller
from service.layout import FILE_PREFIX, active_key, files_of, jobs_of
from service.models import Models
from service.records import Record, Slice
from service.requests import RETRY_SECONDS, PageQuery, RequestBody
from service.shared_calls import SharedCalls
from utils.storage.s3 import S3Store

VALIDATING, QUEUED, RUNNING, PAUSED = "validating_files", "queued", "running", "paused"
SUCCEEDED, FAILED, CANCELLED = "succeeded", "failed", "cancelled"
UNFINISHED = (VALIDATING, QUEUED, RUNNING, PAUSED)
_REPEAT_SECONDS = 5
_MAX_MESSAGES, _MAX_MARKS = 200, 200

Action = Literal["cancel", "pause", "resume"]
_ACTIONS: dict[Action, tuple[tuple[str, ...], str, str]] = {
    "cancel": (UNFINISHED, CANCELLED, "The job was cancelled"),
    "pause": ((VALIDATING, QUEUED, RUNNING), PAUSED, "The job was paused"),
    "resume": ((PAUSED,), VALIDATING, "The job was resumed"),
}
"""Action -> statuses that allow it, the new status, and the event's message."""

Auto = Literal["auto"]
Suffix = Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class HyperparametersBody(RequestBody):
    """Hyperparameters of a supervised job; null and `auto` mean the service's default."""

    n_epochs: Annotated[int, Field(ge=1, le=50)] | Auto | None = None
    batch_size: Annotated[int, Field(ge=1, le=4096)] | Auto | None = None
    learning_rate_multiplier: Annotated[float, Field(gt=0, le=1000)] | Auto | None = None


class DpoHyperparametersBody(HyperparametersBody):
    """Hyperparameters of a DPO job."""

    beta: Annotated[float, Field(gt=0, le=10)] | Auto | None = None


class SupervisedBody(RequestBody):
    """Settings of the method `supervised`."""

    hyperparameters: HyperparametersBody | None = None


class DpoBody(RequestBody):
    """Settings of the method `dpo`."""

    hyperparameters: DpoHyperparametersBody | None = None


class MethodBody(RequestBody):
    """The method of a job."""

    type: str
    supervised: SupervisedBody | None = None
    dpo: DpoBody | None = None
    reinforcement: Any = None


class WandbBody(RequestBody):
    """Settings of Weights & Biases, with its own limits: a run that it rejects would fail after it was accepted."""

    project: Annotated[str, Field(max_length=128, pattern=r"^[^/\\#?%:]+$")]
    name: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    entity: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    tags: Annotated[list[Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=16)] | None = (
        None
    )


class IntegrationBody(RequestBody):
    """An integration."""

    type: Literal["wandb"]
    wandb: WandbBody


class CreateJobBody(RequestBody):
    """The body of a request that creates a job."""

    model: Annotated[str, Field(max_length=300)]
    training_file: Annotated[str, Field(max_length=100)]
    validation_file: Annotated[str, Field(max_length=100)] | None = None
    suffix: Suffix | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    metadata: Metadata | None = None
    integrations: Annotated[list[IntegrationBody], Field(max_length=1)] | None = None
    method: MethodBody | None = None
    hyperparameters: HyperparametersBody | None = None


class Jobs:
    """The jobs of all projects, as requests see them."""

    def __init__(self, store: S3Store, service: LoadedService, models: Models):
        self._store, self._service, self._models = store, service, models
        self._shared = SharedCalls[Record | None]()

    def create(self, caller: Caller, body: CreateJobBody, *, is_retry: bool) -> Record:
        """Accept a job, or return the job that the same request has created already.

        Args:
            caller: Project and key of the request.
            body: The request.
            is_retry: The client says that it repeats a request whose answer it lost.
        """
        served = self._models.resolve(body.model, caller.project)
        method, given = _method_of(body)
        self._check_files(caller.project, body)
        integrations = _integrations_of(body)
        settings, base = self._service.config.models[served.base], self._service.bases[served.base].config
        digest = hashlib.sha256(f"{caller.key_id} {body.model_dump_json()}".encode()).hexdigest()
        now = int(time.time())
        record = {
            "key_id": caller.key_id,
            "request_digest": digest,
            "created_at": now,
            "started_at": None,
            "finished_at": None,
            "model": body.model,
            "base": served.base,
            "parent_checkpoint": served.checkpoint,
            "training_file": body.training_file,
            "validation_file": body.validation_file,
            "method": method,
            "hyperparameters": resolve_hyperparameters(method, given, settings, base),
            "suffix": body.suffix,
            "seed": random.randrange(2**31) if body.seed is None else body.seed,
            "metadata": body.metadata,
            "integrations": integrations,
            "status": VALIDATING,
            "error": None,
            "fine_tuned_model": None,
            "checkpoint": None,
            "trained_tokens": None,
            "result_file": None,
            "needs": None,
            "total_steps": None,
            "model_deleted": False,
            "messages": [
                [now, "info", "Created fine-tuning job", 0],
                [now, "info", "Validating training file", 1],
            ],
            "marks": [],
        }

        try:
            check_settings(record, base)
        except JobConfigError as error:
            raise invalid(f"The job's settings are not valid: {error}", _param_of(error)) from error

        marked: list[str] = []

        def make(identifier: str) -> Record:
            # Another request has taken the place of the last id.
            self._store.delete([active_key(caller.project, each) for each in marked])
            marked[:] = [identifier]
            self._mark_unfinished(caller.project, identifier)
            return {"id": identifier, **record}

        since = now - (RETRY_SECONDS if is_retry else _REPEAT_SECONDS)

        def is_the_same(other: Record) -> bool:
            return other["request_digest"] == digest and other["created_at"] >= since

        created = jobs_of(self._store, caller.project).append(make, is_the_same, since)
        # Between the marker and the record, a scheduler may have taken this request for dead.
        self._store.write(active_key(caller.project, created["id"]), b"")
        self._store.delete([active_key(caller.project, each) for each in marked if each != created["id"]])
        return created

    async def get(self, project: str, job_id: str) -> Record:
        """Return a job; raise an ApiError if it does not exist. Requests for the same job share reads of the bucket."""
        record = await self._shared(f"{project}/{job_id}", lambda: jobs_of(self._store, project).get(job_id))
        if record is None:
            raise _no_job(job_id)
        return record

    def slice(self, project: str, query: PageQuery, metadata: Mapping[str, str] | None) -> Slice | None:
        """Return part of the list of jobs that have this metadata; None: that have no metadata."""

        def wanted(job: Record) -> bool:
            has = job["metadata"] or {}
            return not has if metadata is None else metadata.items() <= has.items()

        return jobs_of(self._store, project).slice(
            after=query.after, limit=query.limit, ascending=query.ascending, wanted=wanted
        )

    def change(self, project: str, job_id: str, action: Action, *, is_retry: bool) -> Record:
        """Cancel, pause or resume a job, or return it if the same request has done so already.

        A cancelled job keeps its committed checkpoints. A paused job stops after a checkpoint, and resumes from there.

        Args:
            project: The caller's project.
            job_id: Id of the job.
            action: What to do.
            is_retry: The client says that it repeats a request whose answer it lost.
        """
        allowed, status, message = _ACTIONS[action]

        def change(job: Record) -> Record | None:
            if is_retry and _last_action(job) == message:
                return None
            if job["status"] == status and action != "resume":
                return None
            if job["status"] not in allowed:
                raise invalid(
                    f"Cannot {action} job {job_id}: its status is '{job['status']}'.", code="invalid_status"
                )
            if action == "resume":
                self._check_resumed(project, job_id)
                # Earlier versions deleted the markers of paused jobs.
                self._store.write(active_key(project, job_id), b"")
            finished = {"finished_at": int(time.time())} if status == CANCELLED else {}
            # After a validation, a resumed job does not need another.
            resumed = {"status": QUEUED if status == VALIDATING and job["needs"] else status}
            return with_message(job | finished | resumed, message)

        record = jobs_of(self._store, project).update(job_id, change)
        if record is None:
            raise _no_job(job_id)
        return record

    def _check_files(self, project: str, body: CreateJobBody) -> None:
        named = {"training_file": body.training_file, "validation_file": body.validation_file}
        wanted = {param: file_id for param, file_id in named.items() if file_id is not None}
        found = files_of(self._store, project).get_many(list(wanted.values()))
        for param, file_id in wanted.items():
            if file_id not in found:
                raise invalid(
                    f"No such file: {file_id!r}. File ids begin with {FILE_PREFIX!r}.",
                    param,
                    "file_not_found",
                )

    def _mark_unfinished(self, project: str, job_id: str) -> None:
        """Write the marker of a new job; raise an ApiError if earlier jobs use up the project's limit.

        The scheduler finds jobs by their markers, so the marker exists before the job does. Requests of all replicas see each
        other's markers, and ids sort by their time.
        """
        prefix, marker = active_key(project), active_key(project, job_id)
        self._store.write(marker, b"")
        earlier = [item.key.removeprefix(prefix) for item in self._store.list(prefix) if item.key < marker]
        if len(earlier) >= self._limit:  # the markers of some may only wait for the scheduler to delete them
            found = jobs_of(self._store, project).get_many(earlier)
            ended = {job["id"] for job in found.values() if job["status"] not in UNFINISHED}
            earlier = [each for each in earlier if each not in ended]
        if len(earlier) >= self._limit:
            self._store.delete([marker])
            raise self._too_many_jobs()

    def _check_resumed(self, project: str, job_id: str) -> None:
        """Raise an ApiError if jobs that are not paused use up the project's limit."""
        others = [item.key.rpartition("/")[2] for item in self._store.list(active_key(project))]
        found = jobs_of(self._store, project).get_many([each for each in others if each != job_id])
        if sum(job["status"] in (VALIDATING, QUEUED, RUNNING) for job in found.values()) >= self._limit:
            raise self._too_many_jobs()

    @property
    def _limit(self) -> int:
        return self._service.config.limits.jobs

    def _too_many_jobs(self) -> ApiError:
        return ApiError(
            status=429,
            message=f"The project has {self._limit} unfinished jobs, which is its limit. Wait until one has finished.",
            type="rate_limit_error",
            code="rate_limit_exceeded",
            headers={"Retry-After": "60"},
        )


def with_mark(job: Record, step: int) -> Record:
    """Return a job with the time at which metrics up to a step became visible.

    Of the older half of too many marks, every second one is removed: its steps get the time of the next one.
    """
    marks = [*job["marks"], [step, int(time.time())]]
    half = len(marks) // 2
    return job | {"marks": marks if len(marks) <= _MAX_MARKS else marks[:half][1::2] + marks[half:]}


def with_message(job: Record, message: str, level: str = "info") -> Record:
    """Return a job with another event."""
    number = job["messages"][-1][3] + 1
    messages = [*job["messages"], [int(time.time()), level, message, number]]
    return job | {"messages": messages[:2] + messages[2:][-_MAX_MESSAGES:]}


def job_body(job: Record, project: str) -> dict[str, Any]:
    """Return a job as the API answers it."""
    return {
        "object": "fine_tuning.job",
        "id": job["id"],
        "model": job["model"],
        "created_at": job["created_at"],
        "finished_at": job["finished_at"],
        "fine_tuned_model": job["fine_tuned_model"],
        "organization_id": project,
        "result_files": [job["result_file"]] if job["status"] == SUCCEEDED else [],
        "status": job["status"],
        "training_file": job["training_file"],
        "validation_file": job["validation_file"],
        "hyperparameters": {name: value for name, value in job["hyperparameters"].items() if name != "beta"},
        "trained_tokens": job["trained_tokens"],
        "error": job["error"],
        "user_provided_suffix": job["suffix"],
        "seed": job["seed"],
        "estimated_finish": None,
        "integrations": job["integrations"] or [],
        "metadata": job["metadata"],
        "method": {"type": job["method"], job["method"]: {"hyperparameters": job["hyperparameters"]}},
    }


def _last_action(job: Record) -> str | None:
    """Return the message of the last cancel, pause or resume within the time of retries."""
    since, messages = time.time() - RETRY_SECONDS, {message for _, _, message in _ACTIONS.values()}
    asked = [text for at, _, text, _ in job["messages"] if text in messages and at >= since]
    return asked[-1] if asked else None


def _no_job(job_id: str) -> ApiError:
    return not_found("fine-tuning job", job_id, "fine_tuning_job_id")


def _param_of(error: JobConfigError) -> str | None:
    return (
        "hyperparameters" if str(error).startswith(("learning_rate", "train_batch", "num_epochs")) else None
    )


def _method_of(body: CreateJobBody) -> tuple[str, dict[str, Any]]:
    """Return (method, given hyperparameters)."""
    method = body.method
    if method is None:
        return "supervised", _given(body.hyperparameters)
    if method.type not in ("supervised", "dpo"):
        raise invalid(
            f"The method {method.type[:50]!r} is not supported: use 'supervised' or 'dpo'.",
            "method.type",
            "unsupported_method",
        )
    others = [
        name
        for name in ("supervised", "dpo", "reinforcement")
        if name != method.type and getattr(method, name)
    ]
    if others:
        raise invalid(
            f"'method.{others[0]}' does not belong to the method {method.type!r}.", f"method.{others[0]}"
        )
    if body.hyperparameters is not None:
        raise invalid("Set hyperparameters in 'method', not at the top level as well.", "hyperparameters")
    settings: SupervisedBody | DpoBody | None = getattr(method, method.type)
    return method.type, _given(settings.hyperparameters if settings else None)


def _given(body: HyperparametersBody | None) -> dict[str, Any]:
    return {} if body is None else body.model_dump(exclude_none=True)


def _integrations_of(body: CreateJobBody) -> list[dict[str, Any]] | None:
    if not body.integrations:
        return None
    if not os.environ.get("WANDB_API_KEY"):
        raise invalid("The service has no Weights & Biases key, so it cannot log there.", "integrations")
    return [integration.model_dump() for integration in body.integrations]
