"""The scheduler: makes what runs on the cluster match the status of the jobs in the bucket.

Every step reads the bucket and the cluster, and can be repeated. So a scheduler may be killed at any moment, and the next one
continues. A lease in the bucket ensures that one at a time acts.

    validating_files  check the files in a task, then `queued` or `failed`
    queued            when the cluster has the resources: start the driver, then `running`
    running           without a driver: read the run's result, or start the driver again. It continues the same run.
    paused, cancelled with a driver: ask it to commit a checkpoint and exit
    succeeded         add the model to the list of models
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import ray
import ray.exceptions
import yaml

from configs.loading import to_yaml
from runs.layout import EXPORT_FILE, Lease, RunResult
from runs.reading import read_result
from service.config import LoadedService
from service.drivers import (
    Checked,
    DriverState,
    Needs,
    check_job,
    driver_state,
    find_driver,
    start_driver,
)
from service.files import RESULTS_PURPOSE, delete_orphans
from service.job_config import JobConfigError, training_config
from service.jobs import (
    FAILED,
    PAUSED,
    QUEUED,
    RUNNING,
    SUCCEEDED,
    VALIDATING,
    with_mark,
    with_message,
)
from service.layout import (
    active_jobs,
    active_key,
    config_key,
    content_key,
    files_of,
    jobs_of,
    model_key,
    run_store,
    runs_uri,
)
from service.models import fine_tuned_id
from service.progress import Progress
from service.records import Record
from training.checkpoints.lease import LeaseError, check_lease, held_lease
from training.loop.ray_internals import autoscaler_maximum, has_node_groups
from utils.errors import last_line
from utils.storage.bucket import AlreadyExistsError, BucketError, join_uri
from utils.storage.s3 import S3Store

TICK_SECONDS = 1.0
_DRIVER_ANSWERS_SECONDS = 30.0
_ORPHAN_SECONDS = 120.0
_METRICS_SECONDS = 3.0
_SWEEP_SECONDS = 3600.0
_MAX_ATTEMPTS = 8
_LONGEST_DELAY_SECONDS = 60.0
_MAX_REASON_CHARACTERS = 500

_log = logging.getLogger("service.scheduler")


@dataclass
class _Attempts:
    """Failed attempts of a job since its last progress, in this process; their reason may pass."""

    failed: int = 0
    not_before: float = 0.0

    def add(self) -> None:
        self.failed += 1
        self.not_before = time.monotonic() + min(2.0**self.failed, _LONGEST_DELAY_SECONDS)


@dataclass
class _Memory:
    """State of a scheduler between two rounds; all of it may be lost."""

    checks: dict[str, Any] = field(default_factory=dict)
    """Job id -> reference of the running check."""
    attempts: dict[str, _Attempts] = field(default_factory=dict)
    orphans: dict[str, float] = field(default_factory=dict)
    """Marker without a job -> when it was first seen."""
    metrics_read: dict[str, float] = field(default_factory=dict)
    suspects: set[str] = field(default_factory=set)
    """Contents that had no record at the last sweep."""
    next_sweep: float = 0.0
    """When contents without a record are deleted next."""


class Scheduler:
    """The scheduler of a service."""

    def __init__(self, store: S3Store, service: LoadedService, address: str):
        """Set what it works on.

        Args:
            store: The service's storage path.
            service: The service YAML.
            address: Address of the cluster, for drivers.
        """
        self._store, self._service, self._address = store, service, address
        self._memory = _Memory()
        self._progress = Progress(store)
        self._stop = threading.Event()

    def run(self) -> None:
        """Schedule jobs until `stop`; wait for the lease while another scheduler holds it."""
        lease_store = S3Store(self._store.uri_of("scheduler"))
        while not self._stop.is_set():
            try:
                with held_lease(lease_store, waiting=lambda owner: None) as lease:
                    self._schedule(lease_store, lease)
            except LeaseError as error:
                _log.info("waiting for the lease: %s", error)
            except BucketError as error:
                _log.warning("the bucket does not answer: %s", error)
            except Exception:  # noqa: BLE001
                _log.exception("a round failed; the scheduler continues with the next one")
            self._stop.wait(TICK_SECONDS)

    def stop(self) -> None:
        """End `run` after the current round."""
        self._stop.set()

    def _schedule(self, lease_store: S3Store, lease: Lease) -> None:
        while not self._stop.is_set():
            check_lease(lease_store, lease)
            self.round()
            if time.monotonic() > self._memory.next_sweep:
                self._memory.next_sweep = time.monotonic() + _SWEEP_SECONDS
                self._memory.suspects = delete_orphans(self._store, self._memory.suspects)
            self._stop.wait(TICK_SECONDS)

    def round(self) -> None:
        """Look at every active job once, oldest first."""
        jobs = self._active_jobs()
        drivers = {job["id"]: find_driver(job["id"]) for _, job in jobs}
        taken = _sum(
            Needs(**job["needs"]).together
            for _, job in jobs
            if drivers[job["id"]] is not None and job["needs"]
        )
        free = _FreeResources(self._service, taken)
        for project, job in sorted(jobs, key=lambda each: (each[1]["created_at"], each[1]["id"])):
            try:
                self._act(project, job, drivers[job["id"]], free)
            except JobConfigError as error:
                self._fail(project, job, "invalid_configuration", str(error))
            except (BucketError, ray.exceptions.RayError) as error:
                _log.warning("job %s: %s", job["id"], error)
            except Exception as error:  # noqa: BLE001
                _log.exception("job %s", job["id"])
                self._failed_attempt(project, job, f"the scheduler failed: {type(error).__name__}")

    def _active_jobs(self) -> list[tuple[str, Record]]:
        found = []
        for project, job_ids in active_jobs(self._store).items():
            jobs = jobs_of(self._store, project).get_many(job_ids)
            found += [(project, job) for job in jobs.values()]
            for job_id in set(job_ids) - set(jobs):
                self._forget_orphan(active_key(project, job_id))
        return found

    def _forget_orphan(self, marker: str) -> None:
        """Delete a marker whose job was never recorded, once no request can still be recording it."""
        since = self._memory.orphans.setdefault(marker, time.monotonic())
        if time.monotonic() - since > _ORPHAN_SECONDS:
            self._store.delete([marker])
            del self._memory.orphans[marker]

    def _act(self, project: str, job: Record, driver: Any, free: "_FreeResources") -> None:
        if job["status"] != VALIDATING and (check := self._memory.checks.pop(job["id"], None)) is not None:
            ray.cancel(check)
        state = driver_state(driver, _DRIVER_ANSWERS_SECONDS) if driver is not None else None
        if driver is not None and state is not None and state.exit_code is None:
            self._follow(project, job, driver, state)
            return
        if driver is not None and state is not None:
            ray.kill(driver)
        if job["status"] in (QUEUED, RUNNING) and self._finish(project, job, state):
            return
        if job["status"] == VALIDATING:
            self._check(project, job)
        elif job["status"] in (QUEUED, RUNNING):
            self._start(project, job, free)
        elif job["status"] != PAUSED:
            self._retire(project, job)

    def _follow(self, project: str, job: Record, driver: Any, state: DriverState) -> None:
        """Look after a job whose driver runs."""
        if job["status"] not in (QUEUED, RUNNING):
            if not state.is_stopping:
                driver.stop.remote()
            return
        if state.is_stopping:
            return  # resumed while it stops: the next driver starts when this one has exited
        if job["status"] == QUEUED:  # the scheduler was killed after it had started the driver
            self._set_running(project, job)
        if time.monotonic() - self._memory.metrics_read.get(job["id"], 0.0) > _METRICS_SECONDS:
            self._memory.metrics_read[job["id"]] = time.monotonic()
            self._mark_progress(project, job)

    def _mark_progress(self, project: str, job: Record) -> None:
        """Record when metrics up to a step became visible, so that events keep their times; forget earlier failures."""
        step = max(self._progress.steps(project, job["id"]), default=0)
        if step > (job["marks"][-1][0] if job["marks"] else 0):
            self._update(project, job, (RUNNING,), lambda found: with_mark(found, step))
            self._memory.attempts.pop(job["id"], None)

    def _update(
        self, project: str, job: Record, statuses: tuple[str, ...], change: Callable[[Record], Record]
    ) -> None:
        """Change a job that still has one of these statuses."""
        jobs_of(self._store, project).update(
            job["id"], lambda found: change(found) if found["status"] in statuses else None
        )

    # --- Checking the files ------------------------------------------------------------------------------------------

    def _check(self, project: str, job: Record) -> None:
        job_id, memory = job["id"], self._memory
        if job["base"] not in self._service.bases:
            self._fail(
                project, job, "model_not_found", f"The service no longer offers {job['base']}.", "model"
            )
            return
        running = memory.checks.get(job_id)
        if running is None:
            if self._may_try(job_id):
                memory.checks[job_id] = check_job.remote(self._config_of(project, job), job_id, self._address)
            return
        done, _ = ray.wait([running], timeout=0)
        if not done:
            return
        del memory.checks[job_id]
        try:
            checked: Checked = ray.get(running)
        except ray.exceptions.RayError as error:
            self._failed_attempt(
                project, job, f"the files could not be checked: {last_line(error)[:_MAX_REASON_CHARACTERS]}"
            )
            return
        if checked.needs is None:
            message = self._with_file_ids(project, job, checked.error)
            self._fail(project, job, "invalid_file", message, checked.param)
            return
        memory.attempts.pop(job_id, None)
        needs = asdict(checked.needs)
        self._update(
            project,
            job,
            (VALIDATING,),
            lambda found: with_message(
                found | {"status": QUEUED, "needs": needs, "total_steps": checked.steps},
                "Files validated, moving job to queued state",
            ),
        )

    def _config_of(self, project: str, job: Record) -> str:
        """Return the training YAML of a job; it never changes after it was first written."""
        key = config_key(project, job["id"])
        written = self._store.read_if_exists(key)
        if written is None:
            publish = self._service.config.publish_path
            paths: dict[str, str | None] = {
                "train": self._content_uri(project, job["training_file"]),
                "storage": runs_uri(self._store, project),
                "publish": join_uri(publish, job["base"], job["id"]) if publish else None,
            }
            paths["valid"] = (
                self._content_uri(project, job["validation_file"]) if job["validation_file"] else None
            )
            text = to_yaml(training_config(job, self._service.bases[job["base"]].config, paths)).encode()
            try:
                self._store.write(key, text, only_if_absent=True)
            except AlreadyExistsError:
                return self._store.read(key).decode()
            return text.decode()
        return written.decode()

    def _content_uri(self, project: str, file_id: str) -> str:
        record = files_of(self._store, project).get(file_id)
        # A file that was deleted meanwhile makes the check fail with its name.
        return self._store.uri_of(content_key(project, record["content"] if record else file_id))

    def _with_file_ids(self, project: str, job: Record, message: str) -> str:
        """Return an error with the ids of files instead of their locations in the bucket."""
        for file_id in filter(None, (job["training_file"], job["validation_file"])):
            message = message.replace(self._content_uri(project, file_id), file_id)
        return message.replace(self._store.uri, "")

    # --- Running -----------------------------------------------------------------------------------------------------

    def _start(self, project: str, job: Record, free: "_FreeResources") -> None:
        if not self._may_try(job["id"]):
            return
        needs = Needs(**job["needs"])
        lacking = free.lacking(job["id"], needs)
        if lacking:
            self._say_once(project, job, f"Waiting for resources: {lacking}")
            return
        free.take(needs)
        start_driver(self._config_of(project, job), job["id"], self._address)
        if job["status"] == QUEUED:
            self._set_running(project, job)

    def _set_running(self, project: str, job: Record) -> None:
        self._update(
            project,
            job,
            (QUEUED,),
            lambda found: with_message(
                found | {"status": RUNNING, "started_at": found["started_at"] or int(time.time())},
                "Fine-tuning job started",
            ),
        )

    def _say_once(self, project: str, job: Record, message: str) -> None:
        def change(found: Record) -> Record:
            waits = found["messages"][-1][2] == message
            return found if waits else with_message(found, message)

        if job["messages"][-1][2] != message:
            self._update(project, job, (QUEUED,), change)

    def _finish(self, project: str, job: Record, state: DriverState | None) -> bool:
        """End a job whose run has completed or failed; return whether it has."""
        result = read_result(run_store(self._store, project, job["id"]))
        if result is not None and result.status == "completed" and self._is_published(project, job):
            self._succeed(project, job, result)
            return True
        if state is None or state.is_stopping:
            return False  # killed, or stopped: the same run continues
        if state.exit_code == 1 and result is not None and result.status == "failed":
            self._fail(project, job, "training_failed", self._with_file_ids(project, job, result.reason))
            return True
        if state.exit_code != 0:
            said = [line for line in state.output.splitlines() if line.startswith("error: ")]
            reason = said[-1].removeprefix("error: ") if said else f"main.py exited with {state.exit_code}"
            self._mark_progress(project, job)  # the driver may have advanced since the last look
            self._failed_attempt(project, job, self._with_file_ids(project, job, reason))
            return True
        return False

    def _is_published(self, project: str, job: Record) -> bool:
        """Return whether the job's adapter is exported, or need not be."""
        export = yaml.safe_load(self._config_of(project, job))["export"]
        return export is None or S3Store(export["to"]).read_if_exists(EXPORT_FILE) is not None

    def _succeed(self, project: str, job: Record, result: RunResult) -> None:
        """Write the result file, then the status. Each step may be repeated."""
        files, jobs = files_of(self._store, project), jobs_of(self._store, project)
        result_file = job["result_file"]
        if result_file is None:
            reserved = files.reserve()
            updated = jobs.update(
                job["id"], lambda found: found | {"result_file": found["result_file"] or reserved}
            )
            if updated is None:
                return
            result_file = updated["result_file"]
        content, name = self._progress.metrics_csv(project, job), f"{job['id']}.csv"
        self._store.write(content_key(project, name), content)
        now = int(time.time())
        record = {
            "bytes": len(content),
            "created_at": now,
            "filename": "step_metrics.csv",
            "purpose": RESULTS_PURPOSE,
        }
        files.insert({"id": result_file, "content": name, **record})
        model = fine_tuned_id(job, project)
        self._mark_progress(project, job)
        done = {
            "status": SUCCEEDED,
            "finished_at": now,
            "fine_tuned_model": model,
            "checkpoint": result.best_checkpoint,
            "trained_tokens": result.tokens,
        }
        self._update(
            project,
            job,
            (QUEUED, RUNNING),
            lambda found: with_message(
                with_message(found | done, f"New fine-tuned model created: {model}"),
                "The job has successfully completed",
            ),
        )

    # --- Ends --------------------------------------------------------------------------------------------------------

    def _may_try(self, job_id: str) -> bool:
        attempts = self._memory.attempts.get(job_id)
        return attempts is None or time.monotonic() >= attempts.not_before

    def _failed_attempt(self, project: str, job: Record, reason: str) -> None:
        """Count an attempt that failed for a reason that may pass; fail the job after too many without progress."""
        attempts = self._memory.attempts.setdefault(job["id"], _Attempts())
        attempts.add()
        _log.warning("job %s, attempt %d: %s", job["id"], attempts.failed, reason)
        if attempts.failed >= _MAX_ATTEMPTS:
            self._fail(project, job, "server_error", reason)

    def _fail(self, project: str, job: Record, code: str, message: str, param: str | None = None) -> None:
        error = {"code": code, "message": message, "param": param}
        self._update(
            project,
            job,
            (VALIDATING, QUEUED, RUNNING),
            lambda found: with_message(
                found | {"status": FAILED, "error": error, "finished_at": int(time.time())}, message, "error"
            ),
        )

    def _retire(self, project: str, job: Record) -> None:
        """Write the marker of an ended job's model, and delete the marker of the job."""
        if model := job["fine_tuned_model"]:
            marker = model_key(project, model, job["created_at"])
            if not job["model_deleted"]:
                self._store.write(marker, b"")
            # A request may have deleted the model after the job was read here.
            again = jobs_of(self._store, project).get(job["id"])
            if again is None or again["model_deleted"]:
                self._store.delete([marker])
        self._store.delete([active_key(project, job["id"])])
        self._memory.attempts.pop(job["id"], None)
        self._memory.metrics_read.pop(job["id"], None)


class _FreeResources:
    """The resources that a round may still give to jobs."""

    def __init__(self, service: LoadedService, taken: Mapping[str, float]):
        self._used = _sum([taken, *(base.engine_resources for base in service.config.models.values())])
        self._reserved_for: str | None = None

    def lacking(self, job_id: str, needs: Needs) -> str:
        """Describe what a job waits for; empty if it can start, or if the cluster can scale up for it."""
        if self._reserved_for is not None:
            return f"the job {self._reserved_for} is before it"
        has, most = ray.cluster_resources(), autoscaler_maximum()
        if not most and has_node_groups():
            return ""  # the driver asks the cluster to scale up, and waits
        total = {
            name: max(has.get(name, 0.0), most.get(name, 0.0)) for name in {*has, *most, *needs.together}
        }
        free = {name: max(amount - self._used.get(name, 0.0), 0.0) for name, amount in total.items()}
        short = [name for name, amount in needs.together.items() if free[name] < amount]
        if short and all(total[name] >= amount for name, amount in needs.together.items()):
            self._reserved_for = job_id  # smaller jobs must not overtake it for ever
        return ", ".join(
            f"{name} {needs.together[name]:g} ({free[name]:g} of {total[name]:g} free)" for name in short
        )

    def take(self, needs: Needs) -> None:
        """Count the resources of a job that is started."""
        self._used = _sum([self._used, needs.together])


def _sum(amounts: Any) -> dict[str, float]:
    total: dict[str, float] = {}
    for each in amounts:
        for name, amount in each.items():
            total[name] = total.get(name, 0.0) + amount
    return total
