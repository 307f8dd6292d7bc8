"""Processes on the cluster for one job: the check of its files, and the driver that runs main.py."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import yaml
from ray.util import list_named_actors

from configs.loading import ConfigError, load_config
from configs.schema import FinetuneConfig
from training.data.errors import DataError
from training.launch.packaging import PROJECT
from training.planning.endpoints import ClusterTarget, set_ray_environment
from training.planning.paths import make_scratch_directory
from utils.command_line import ADDRESS_VARIABLE
from utils.processes import die_with, importing

NAMESPACE = "fine-tuning-service"
_TAIL_BYTES = 4000
_NOT_STARTED = 126
"""Exit code that a shell reports for a command it cannot execute."""


@dataclass(frozen=True)
class Needs:
    """Ray resources of a job's workers."""

    each: dict[str, float]
    least: int
    """Minimum number of workers."""

    @property
    def together(self) -> dict[str, float]:
        """Resources of the minimum number of workers."""
        return {name: amount * self.least for name, amount in self.each.items()}


@dataclass(frozen=True)
class Checked:
    """The result of checking a job's files."""

    needs: Needs | None
    """None if the job is rejected."""
    steps: int
    error: str
    param: str | None
    """The request's parameter that is wrong."""


@ray.remote(num_cpus=0, max_retries=0)
def check_job(config: str, job_id: str, address: str) -> Checked:
    """Plan a job as main.py does: every row is read, checked and tokenized.

    Args:
        config: The job's training YAML.
        job_id: Id of the job.
        address: Address of the cluster.
    """
    target = ClusterTarget(address)
    set_ray_environment(target)
    with importing():  # torch, which the scheduler and the drivers do not need
        from training.data.prepared import keep_prepared
        from training.launch.cluster import workers_of
        from training.planning.planner import make_plan

    with tempfile.TemporaryDirectory(prefix="anneal-") as directory:
        path = Path(directory) / f"{job_id}.yaml"
        path.write_text(config, "utf-8")
        loaded = load_config(path)
    try:
        plan, _, prepared = make_plan(loaded, target=target)
    except (DataError, ConfigError) as error:
        in_validation = loaded.config.valid_path is not None and str(loaded.config.valid_path) in str(error)
        return Checked(None, 0, str(error), "validation_file" if in_validation else "training_file")
    for rows in prepared:
        keep_prepared(rows, plan.prepared)
    workers = workers_of(plan)
    return Checked(Needs(workers.each, workers.least), plan.max_steps, "", None)


@dataclass(frozen=True)
class DriverState:
    """The state of a driver process."""

    exit_code: int | None
    """None while it runs."""
    is_stopping: bool
    output: str
    """The end of its error output, once it has exited."""


class JobDriver:
    """An actor that runs main.py for one job; the process is killed with the actor."""

    def __init__(self, config: str, job_id: str, address: str):
        """Start main.py; `state` returns the error if it cannot be started."""
        self._is_stopping = False
        self._process: subprocess.Popen[bytes] | None = None
        self._failure = ""
        try:
            self._start(config, job_id, address)
        except Exception as error:  # noqa: BLE001  an actor that cannot be constructed loses the reason
            self._failure = f"error: cannot start the driver: {' '.join(str(error).split())}"

    def _start(self, config: str, job_id: str, address: str) -> None:
        settings = FinetuneConfig.model_validate(yaml.safe_load(config))
        directory = make_scratch_directory(settings) / "jobs"
        directory.mkdir(exist_ok=True)
        directory.chmod(0o700)  # the plan, in the error output, shows rows of the training file
        path = directory / f"{job_id}.yaml"
        path.write_text(config, "utf-8")
        self._errors = path.with_suffix(".stderr")
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(PROJECT / "main.py"), str(path), "--json"],
                cwd=PROJECT,
                env=_environment(os.environ, address),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                preexec_fn=die_with(os.getpid()),
            )

    def state(self) -> DriverState:
        """Return the state of the process."""
        if self._process is None:
            return DriverState(_NOT_STARTED, self._is_stopping, self._failure)
        code = self._process.poll()
        output = "" if code is None else self._errors.read_bytes()[-_TAIL_BYTES:].decode(errors="replace")
        return DriverState(code, self._is_stopping, output)

    def stop(self) -> None:
        """Ask the process to commit a checkpoint and exit."""
        if not self._is_stopping and self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        self._is_stopping = True


def start_driver(config: str, job_id: str, address: str) -> None:
    """Start the driver of a job, unless it runs already."""
    actor: Any = ray.remote(JobDriver)
    actor.options(
        name=_name_of(job_id),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=0,
    ).remote(config, job_id, address)


def find_driver(job_id: str) -> Any:
    """Return the actor of a job's driver, or None."""
    try:
        return ray.get_actor(_name_of(job_id), NAMESPACE)
    except ValueError:
        return None


def driver_state(actor: Any, timeout: float) -> DriverState | None:
    """Return the state of a driver; None if its actor has died.

    Raises:
        GetTimeoutError: it did not answer in time.
    """
    try:
        return ray.get(actor.state.remote(), timeout=timeout)
    except ray.exceptions.ActorDiedError:
        return None


def job_ids_of_drivers() -> list[str]:
    """Return the ids of the jobs whose driver actors are alive."""
    named: Any = list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in named if actor["namespace"] == NAMESPACE]
    return [name.removeprefix("driver-") for name in names if name.startswith("driver-")]


def _name_of(job_id: str) -> str:
    return f"driver-{job_id}"


def _environment(inherited: Mapping[str, str], address: str) -> dict[str, str]:
    """Return the environment of main.py: without the limits that Ray sets for an actor that has no GPU and one thread."""
    environment = {name: value for name, value in inherited.items() if name != "OMP_NUM_THREADS"}
    if environment.get("CUDA_VISIBLE_DEVICES") == "":
        del environment["CUDA_VISIBLE_DEVICES"]
    return environment | {ADDRESS_VARIABLE: address}
