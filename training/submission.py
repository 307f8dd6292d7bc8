"""A run as a job of Ray's job server: checked here, handed over, and followed to its end."""

import asyncio
import json
import shlex
import time
from collections.abc import Callable
from contextlib import chdir
from dataclasses import dataclass, replace

import aiohttp
import requests
from pydantic import ValidationError
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from runs.layout import RunResult
from training.addresses import TOKEN_ADVICE, ClusterError, ClusterTarget
from training.models.files import first_line
from training.plan import PlanReport
from training.planner import Progress, make_plan
from training.travel import Packed
from utils.bucket import BucketError, NotFoundError

# `ray job stop` asks with SIGTERM and kills this much later; what it waits for is a checkpoint on its way to the bucket.
_STOP_SECONDS = 600
_LOOK_SECONDS = 1.0
_SILENCE_SECONDS = 120.0
"""How long a job server may be out of reach before following its job is given up."""

_UNREACHABLE = (ConnectionError, RuntimeError, aiohttp.ClientError, requests.RequestException)


@dataclass(frozen=True)
class JobEnd:
    """How a job ended."""

    exit_code: int
    """As main.py's own: of the job's process, or what it would have been where Ray ended that."""
    result: RunResult | None
    """What the job printed under --json."""
    reason: str | None
    """Why, where nothing in the job's output says it."""


@dataclass(frozen=True)
class SubmittedJob:
    """A job on its way."""

    client: JobSubmissionClient
    submission_id: str
    address: str

    def to_json(self) -> str:
        """Where it is, for programs."""
        return json.dumps({"submission_id": self.submission_id, "address": self.address})

    @property
    def follow_command(self) -> list[str]:
        """Shows its output, from the beginning."""
        return ["ray", "job", "logs", "--follow", "--address", self.address, self.submission_id]

    @property
    def stop_command(self) -> list[str]:
        """Commits a checkpoint and ends it."""
        return ["ray", "job", "stop", "--address", self.address, self.submission_id]


def check_from_here(packed: Packed, target: ClusterTarget, progress: Progress) -> PlanReport | str:
    """The plan that the job will make, so that what refuses it does so now; or why it cannot be made here.

    Places that only the cluster sees, or that do not let this machine in, are left to the job, which checks them before it
    takes workers.

    Raises:
        ConfigError, StrategyError, ModelError, DataError, CheckpointError, NotFoundError: what refuses the run.
    """
    if packed.on_the_cluster:
        return f"{', '.join(packed.on_the_cluster)}: only the cluster's machines see it"
    # Where nodes keep their files is theirs alone.
    loaded = replace(packed.loaded, config=packed.loaded.config.model_copy(update={"output_dir": None}))
    with chdir(packed.directory):
        try:
            return make_plan(loaded, target=target, progress=progress)[1]
        except NotFoundError:
            raise
        except BucketError as error:
            return str(error)


def connect(address: str) -> JobSubmissionClient:
    """A client of the job server.

    Raises:
        ClusterError: what answers there is none, or it asks for a token.
    """
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ClusterError(f"--submit: {address} does not let us in. {TOKEN_ADVICE}") from error
    except (*_UNREACHABLE, ValueError, KeyError) as error:
        raise ClusterError(
            f"--submit: what answers at {address} is no job server of Ray ({first_line(error)}). Name the head's dashboard, as in "
            "http://HEAD:8265; the head needs ray[default]."
        ) from error


def submit(client: JobSubmissionClient, address: str, packed: Packed) -> SubmittedJob:
    """Hand the run over. Nothing of this machine's environment goes with it: credentials are the cluster's own.

    Raises:
        ClusterError: the job server refuses it.
    """
    try:
        submission_id = client.submit_job(
            # With --json the last line of its output is the result, whatever else is printed.
            entrypoint=shlex.join(["python", "main.py", packed.yaml, "--json"]),
            runtime_env={
                "working_dir": str(packed.directory),
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_SECONDS)},
            },
        )
    except _UNREACHABLE as error:
        raise ClusterError(f"--submit: {address} does not take the job ({first_line(error)}).") from error
    return SubmittedJob(client, submission_id, address)


def follow(job: SubmittedJob, show: Callable[[str], None]) -> JobEnd:
    """Show each line of the job's output until it ends.

    A job server that is out of reach for a while is asked again; the output goes on where it had stopped.

    Raises:
        ClusterError: it stays out of reach.
    """
    output = _Output(show)
    heard = time.monotonic()
    while True:
        try:
            asyncio.run(_read(job, output))
            details = job.client.get_job_info(job.submission_id)
        except _UNREACHABLE as error:
            if time.monotonic() - heard > _SILENCE_SECONDS:
                raise ClusterError(
                    f"the job server at {job.address} does not answer any more ({first_line(error)}). The job {job.submission_id} may go on: "
                    f"{shlex.join(job.follow_command)}. If its cluster is gone, the same command goes on with the run."
                ) from error
        else:
            heard = time.monotonic()
            if details.status.is_terminal():
                output.end()
                return _end(details.status, details.driver_exit_code, details.message, output.result)
        time.sleep(_LOOK_SECONDS)


async def _read(job: SubmittedJob, output: "_Output") -> None:
    """What there is of the job's output, until it ends or the connection does."""
    position = 0
    async for text in job.client.tail_job_logs(job.submission_id):
        output.add(text[max(0, output.length - position) :])
        position += len(text)


class _Output:
    """The job's output: lines for people, and the result."""

    def __init__(self, show: Callable[[str], None]):
        self.length = 0
        """Characters that have come so far."""
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
                pass  # a line of somebody else's
        self._show(line)


def _end(status: JobStatus, exit_code: int | None, message: str | None, result: RunResult | None) -> JobEnd:
    if status == JobStatus.STOPPED:
        return JobEnd(result.exit_code if result else 143, result, None)
    if exit_code is not None:
        return JobEnd(exit_code, result, None)
    return JobEnd(1, result, f"Ray ended the job: {message}")
