"""Locations of the service's records, files and runs below its storage path."""

import re
from urllib.parse import quote, unquote

from runs.layout import METRICS_FILE
from service.records import Records
from utils.storage.s3 import S3Store

PROJECT_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?")
JOB_PREFIX, FILE_PREFIX = "ftjob-", "file-"


def files_of(store: S3Store, project: str) -> Records:
    """Return the file records of a project."""
    return Records(store, f"projects/{project}/files", FILE_PREFIX)


def jobs_of(store: S3Store, project: str) -> Records:
    """Return the job records of a project."""
    return Records(store, f"projects/{project}/jobs", JOB_PREFIX)


def content_key(project: str, name: str = "") -> str:
    """Return the key of a file's content."""
    return f"content/{project}/{name}"


def active_key(project: str, job_id: str = "") -> str:
    """Return the key of the marker of an unfinished job, which the scheduler has to act on."""
    return f"active/{project}/{job_id}"


def active_jobs(store: S3Store) -> dict[str, list[str]]:
    """Return project -> ids of the jobs that have a marker: all unfinished ones, and some that have just ended."""
    found: dict[str, list[str]] = {}
    for item in store.list("active/"):
        _, project, job_id = item.key.split("/")
        found.setdefault(project, []).append(job_id)
    return found


def config_key(project: str, job_id: str) -> str:
    """Return the key of the training YAML that a job was accepted with."""
    return f"configs/{project}/{job_id}.yaml"


def model_key(project: str, model_id: str, created_at: int) -> str:
    """Return the key of the marker of a fine-tuned model; it is written after the job has succeeded."""
    return f"models/{project}/{quote(model_id, safe='')}@{created_at}"


def model_of_marker(key: str) -> tuple[str, int]:
    """Return (model id, creation time) of a marker."""
    name, _, created_at = key.rpartition("/")[2].rpartition("@")
    return unquote(name), int(created_at)


def runs_uri(store: S3Store, project: str) -> str:
    """Return the storage path of a project's runs."""
    return store.uri_of(f"runs/{project}")


def run_store(store: S3Store, project: str, job_id: str) -> S3Store:
    """Return the store of a job's run."""
    return store.below(f"runs/{project}/{job_id}")


def metrics_key(project: str, job_id: str) -> str:
    """Return the key of the step metrics of a job's run."""
    return f"runs/{project}/{job_id}/{METRICS_FILE}"
