"""Model ids: which base model and which committed checkpoint each id stands for."""

import re
from dataclasses import dataclass
from typing import Any

from runs.layout import MANIFEST_FILE, checkpoint_key, checkpoint_uri
from service.config import LoadedService
from service.errors import ApiError
from service.layout import JOB_PREFIX, active_key, jobs_of, model_key, model_of_marker, run_store
from service.records import Record
from utils.storage.s3 import S3Store

_FINE_TUNED = re.compile(
    r"(?P<model>ft:(?P<base>[^:]+):(?P<project>[^:]+):(?P<suffix>[^:]*):(?P<job>[0-9a-f]+))(:ckpt-step-(?P<step>[0-9]{1,9}))?"
)


@dataclass(frozen=True)
class ServedModel:
    """A model that requests can name."""

    id: str
    base: str
    """Name of the base model in the service YAML."""
    checkpoint: str | None
    """URI of the committed checkpoint; None for the base model."""


class Models:
    """The base models, and the fine-tuned models of all projects."""

    def __init__(self, store: S3Store, service: LoadedService, started_at: int):
        self._store, self._service, self._started_at = store, service, started_at

    def resolve(self, model_id: str, project: str) -> ServedModel:
        """Return the model that an id stands for; raise an ApiError if the project has no such model."""
        if model_id in self._service.config.models:
            return ServedModel(model_id, model_id, None)
        match = _FINE_TUNED.fullmatch(model_id)
        if match is None or match["project"] != project or match["base"] not in self._service.config.models:
            raise model_not_found(model_id)
        job = jobs_of(self._store, project).get(f"{JOB_PREFIX}{match['job']}")
        if job is None or job["model_deleted"] or fine_tuned_id(job, project) != match["model"]:
            raise model_not_found(model_id)
        if match["step"] is None:
            checkpoint = job["checkpoint"]
        else:
            checkpoint = self._checkpoint(project, job, int(match["step"]))
        if checkpoint is None:
            raise model_not_found(model_id)
        return ServedModel(model_id, job["base"], checkpoint)

    def list(self, project: str) -> list[dict[str, Any]]:
        """Return the base models and the project's fine-tuned models as the API answers them."""
        bases = [_body(name, self._started_at, "system") for name in self._service.config.models]
        # Markers are written after the status, so those of the newest models may be missing. These jobs are still active.
        active = [item.key.rpartition("/")[2] for item in self._store.list(active_key(project))]
        found = dict(model_of_marker(item.key) for item in self._store.list(f"models/{project}/"))
        for job in jobs_of(self._store, project).get_many(active).values():
            if job["fine_tuned_model"] and not job["model_deleted"]:
                found[job["fine_tuned_model"]] = job["created_at"]
        offered = self._service.config.models
        return [
            *bases,
            *(
                _body(model_id, created_at, project)
                for model_id, created_at in sorted(found.items())
                if model_id.split(":")[1] in offered
            ),
        ]

    def get(self, model_id: str, project: str) -> dict[str, Any]:
        """Return a model as the API answers it; raise an ApiError if the project has no such model."""
        served = self.resolve(model_id, project)
        if served.checkpoint is None:
            return _body(model_id, self._started_at, "system")
        return _body(model_id, self._job_of(model_id, project)["created_at"], project)

    def delete(self, model_id: str, project: str, *, is_retry: bool) -> None:
        """Withdraw a fine-tuned model. The run with its checkpoints stays in the bucket.

        Args:
            model_id: Id of the model.
            project: The caller's project.
            is_retry: The client repeats a request whose answer it lost, so the model may have been deleted already.
        """
        if is_retry and self._is_deleted(model_id, project):
            return
        if self.resolve(model_id, project).checkpoint is None:
            raise ApiError(
                status=403,
                message=f"The model {model_id!r} is a base model and cannot be deleted.",
                param="model",
            )
        if ":ckpt-step-" in model_id:
            raise ApiError(
                status=400,
                message="A checkpoint cannot be deleted alone: delete the model of its job.",
                param="model",
            )
        job = self._job_of(model_id, project)
        jobs_of(self._store, project).update(job["id"], lambda found: found | {"model_deleted": True})
        self._store.delete([model_key(project, model_id, job["created_at"])])

    def _job_of(self, model_id: str, project: str) -> Record:
        match = _FINE_TUNED.fullmatch(model_id)
        job = jobs_of(self._store, project).get(f"{JOB_PREFIX}{match['job']}") if match else None
        if job is None:
            raise model_not_found(model_id)
        return job

    def _is_deleted(self, model_id: str, project: str) -> bool:
        match = _FINE_TUNED.fullmatch(model_id)
        job = jobs_of(self._store, project).get(f"{JOB_PREFIX}{match['job']}") if match else None
        return job is not None and job["model_deleted"] and fine_tuned_id(job, project) == model_id

    def _checkpoint(self, project: str, job: Record, step: int) -> str | None:
        run = run_store(self._store, project, job["id"])
        if run.read_if_exists(checkpoint_key(step, MANIFEST_FILE)) is None:
            return None
        return checkpoint_uri(run.uri, step)


def fine_tuned_id(job: Record, project: str) -> str:
    """Return the id of a job's model, which is the same before and after it exists."""
    return f"ft:{job['base']}:{project}:{job['suffix'] or ''}:{job['id'].removeprefix(JOB_PREFIX)}"


def model_not_found(model_id: str) -> ApiError:
    """Return the error for a model that does not exist in the caller's project."""
    return ApiError(
        status=404,
        message=f"The model {model_id[:200]!r} does not exist or you do not have access to it.",
        param="model",
        code="model_not_found",
    )


def _body(model_id: str, created_at: int, owner: str) -> dict[str, Any]:
    return {"id": model_id, "object": "model", "created": created_at, "owned_by": owner}
