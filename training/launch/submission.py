"""Submission of a run to Ray's job server: local checks, the submission, and the job's output."""

import asyncio
import json
import os
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import chdir
from dataclasses import dataclass, replace

import aiohttp
import requests
from pydantic import ValidationError
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from runs.layout import CONFIG_FILE, RunResult
from training.checkpoints.lease import check_not_held
from training.launch.packaging import Package
from training.launch.submitted_job import SubmittedJob
from training.planning.endpoints import (
    WRITTEN_VARIABLE,
    ClusterError,
    ClusterTarget,
    describe_missing_token,
)
from training.planning.planner import Progress, plan_submission
from training.planning.report import CheckedSample, PlanReport
from utils.command_line import ADDRESS_VARIABLE, COMMAND_VARIABLE
from utils.errors import first_line
from utils.storage.bucket import BucketError, NotFoundError, is_remote, open_store

# `ray job stop` sends SIGTERM, then SIGKILL after this time. In between, the driver commits a checkpoint.
_STOP_SECONDS = 600
_POLL_SECONDS = 1.0
_MAX_SILENCE_SECONDS = 120.0
"""Maximum time that the job server may be unreachable while its job is being followed."""

_UNREACHABLE = (ConnectionError, RuntimeError, aiohttp.ClientError, requests.RequestException)


@dataclass(frozen=True)
class JobEnd:
    """The end of a job."""

    exit_code: int
    """Exit code of the job's main.py, or its equivalent if Ray terminated the process."""
    result: RunResult | None
    """Result that the job printed with --json."""
    reason: str | None
    """Reason of the end, if the job's output does not contain it."""


def check_from_here(
    packed: Package, target: ClusterTarget, progress: Progress
) -> PlanReport | CheckedSample | str:
    """Return the plan of the job, the sample of its rows that was checked, or the reason why it cannot be checked on this machine.

    Raise an error if the run is invalid, or if a driver on this machine trains it. The job itself checks URIs that only the
    cluster can access, before it requests workers. A path of the cluster's machines counts as a path of this machine if
    records of the run are there.
    """
    what = "a path" if len(packed.on_the_cluster) == 1 else "paths"
    elsewhere = f"{', '.join(packed.on_the_cluster)}: {what} of the cluster's machines"
    # The scratch directory is valid only on the nodes.
    loaded = replace(packed.loaded, config=packed.loaded.config.model_copy(update={"output_dir": None}))
    with chdir(packed.directory):
        try:
            if packed.on_the_cluster and not _has_records_here(packed):
                return elsewhere
            checked = plan_submission(loaded, target=target, progress=progress)
            if isinstance(checked, PlanReport) and not checked.completed:
                check_not_held(open_store(checked.run_uri))
            return checked
        except NotFoundError:
            if packed.on_the_cluster:
                return elsewhere
            raise
        except BucketError as error:
            return str(error)


def _has_records_here(packed: Package) -> bool:
    """Return whether storage_path is a directory of this machine with this run, or with one that is named after the YAML."""
    config = packed.loaded.config
    storage = config.storage_path or ""
    if is_remote(storage):
        return False
    store, stem = open_store(storage), packed.loaded.path.stem
    names = [config.run_name] if config.run_name else store.directories()
    return any(
        store.read_if_exists(f"{name}/{CONFIG_FILE}") is not None
        for name in names
        if config.run_name or name.startswith(f"{stem}-")
    )


def connect(address: str) -> JobSubmissionClient:
    """Return a client that is connected to the job server."""
    os.environ[ADDRESS_VARIABLE] = address  # Ray's client prefers the variable to its argument
    os.environ.pop("RAY_API_SERVER_ADDRESS", None)
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ClusterError(f"--submit: {address} {describe_missing_token()}") from error
    except (*_UNREACHABLE, ValueError, KeyError) as error:
        raise ClusterError(
            f"--submit: {address} is not a Ray job server ({first_line(error)}). Use the address of the head node's dashboard, such as "
            "http://HEAD:8265; the head node needs ray[default]."
        ) from error


def submit(
    client: JobSubmissionClient, address: str, packed: Package, command: Sequence[str]
) -> SubmittedJob:
    """Submit the run as a job that names `command` as the one to rerun. The job uses the cluster's own credentials; this machine's environment variables are not sent."""
    try:
        submission_id = client.submit_job(
            # With --json the result is the last line of the output, after any other output.
            entrypoint=shlex.join(["python", "main.py", packed.yaml, "--json"]),
            runtime_env={
                "working_dir": str(packed.directory),
                "env_vars": {
                    "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_SECONDS),
                    COMMAND_VARIABLE: json.dumps(command),
                    WRITTEN_VARIABLE: packed.written,
                },
            },
        )
    except _UNREACHABLE as error:
        raise ClusterError(f"--submit: {address} did not accept the job ({first_line(error)}).") from error
    return SubmittedJob(client, submission_id, address)


def follow(job: SubmittedJob, show: Callable[[str], None]) -> JobEnd:
    """Print each line of the job's output until the job ends.

    If the job server is unreachable, retry and continue the output where it stopped. Raise an error if it stays unreachable.
    """
    output = _Output(show)
    heard = time.monotonic()
    while True:
        try:
            asyncio.run(_read(job, output))
            details = job.client.get_job_info(job.submission_id)
        except _UNREACHABLE as error:
            if time.monotonic() - heard > _MAX_SILENCE_SECONDS:
                raise ClusterError(
                    f"the job server at {job.address} no longer responds ({first_line(error)}). The job {job.submission_id} may still be "
                    f"running: {shlex.join(job.follow_command)}. If its cluster is lost, the same command resumes the run."
                ) from error
        else:
            heard = time.monotonic()
            if details.status.is_terminal():
                output.end()
                return _end(details.status, details.driver_exit_code, details.message, output.result)
        time.sleep(_POLL_SECONDS)


async def _read(job: SubmittedJob, output: "_Output") -> None:
    """Read the job's output until it or the connection ends."""
    position = 0
    async for text in job.client.tail_job_logs(job.submission_id):
        output.add(text[max(0, output.length - position) :])
        position += len(text)


class _Output:
    """A job's output, split into lines to show and the JSON result."""

    def __init__(self, show: Callable[[str], None]):
        self.length = 0
        """Characters received so far."""
        self.result: RunResult | None = None
        self._show = show
        self._unfinished = ""

    def add(self, text: str) -> None:
        self.length += len(text)
        *lines, self._unfinished = (self._unfinished + text).split("\n")
        for line in lines:
            self._take(line)

    def end(self) -> None:
        if self._unfinished:
            self._take(self._unfinished)

    def _take(self, line: str) -> None:
        if line.startswith('{"status":'):
            try:
                self.result = RunResult.model_validate_json(line)
                return
            except ValidationError:
                pass  # a line of another program
        self._show(line)


def _end(status: JobStatus, exit_code: int | None, message: str | None, result: RunResult | None) -> JobEnd:
    if status == JobStatus.STOPPED:
        return JobEnd(result.exit_code if result else 143, result, None)
    if exit_code is not None:
        return JobEnd(exit_code, result, None)
    return JobEnd(1, result, f"Ray terminated the job: {message}")
