"""The driver: runs a RunPlan as a Ray TorchTrainer job and returns its RunResult."""

import asyncio
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from runs.layout import (
    CONFIG_FILE,
    DATA_PAGE_FILE,
    DATA_REPORT_FILE,
    RESULT_FILE,
    SKIPPED_ROWS_FILE,
    Lease,
    RunResult,
    StopRequest,
    checkpoint_uri,
    run_of,
)
from runs.reading import committed
from training.checkpoints import store as checkpoints
from training.checkpoints.lease import check_lease, held_lease
from training.data.prepared import SKIPPED_FILE, PreparedData, keep_prepared
from training.data.report import DataReport
from training.data.report_page import to_html
from training.events import (
    CheckpointCommitted,
    Event,
    EventMailbox,
    ModelReady,
    Notice,
    Phase,
    Rejected,
    Restored,
    StepDone,
    UnrecordedError,
    WorkersFailed,
    WorkersStarted,
    WorkersWaiting,
)
from training.launch.cluster import Workers, cluster, lacking, vitals, workers_of
from training.launch.elastic import GroupSizes, WorkerGroupReporter
from training.launch.failures import classify_failures, describe_failure, describe_lost_cluster
from training.launch.results import Attempt, write_result
from training.launch.trainer import LeanTorchTrainer
from training.launch.vitals import ClusterLostError
from training.loop.ray_internals import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, LocalWorkers
from training.loop.worker import train_worker, worker_log
from training.models.kernels import COLLECTIVE_BACKENDS
from training.planning.memory import Saving
from training.planning.plan import RunPlan
from training.planning.report import PlanReport
from utils.processes import SENT_AS_SIGTERM, record_signals
from utils.storage.bucket import BucketError, Store, is_remote, local_path, open_store

_SIGNAL_POLL_SECONDS = 0.1  # Python merges two signals into one while Ray waits
_WAIT_FOR_LOST_NODES_SECONDS = 20
_RESOURCE_POLL_SECONDS = 1.0
_CONTROLLER_START_TIMEOUT_SECONDS = 30.0
_LAST_POLL_SECONDS = 3.0
"""Maximum time that a controller in this process takes to notice that it has been stopped, while no worker answers."""


def run_job(
    plan: RunPlan,
    prepared: Sequence[PreparedData],
    report: PlanReport,
    *,
    command: Sequence[str],
    began: float,
    driver_log: Path,
    local_workers: LocalWorkers | None,
    on_event: Callable[[Event], None],
) -> RunResult:
    """Train the run and write result.json.

    On the first SIGINT or SIGTERM, commit a checkpoint and exit; on the second, exit at once.

    Args:
        plan: The run to train.
        prepared: The tokenized rows; workers read them from the bucket.
        report: The plan and data report for users.
        command: The command line, for the report page.
        began: time.monotonic() when the driver started, for the result's elapsed seconds.
        driver_log: The log file of this process's library output.
        local_workers: Workers that have been started on a local cluster.
        on_event: Called on this thread with each event that the workers emit.
    """
    workers = workers_of(plan)
    savings = report.memory.savings if report.memory else []
    state = RunState(workers, savings, on_event)
    store = open_store(plan.run_uri)
    with (
        _removed_if_empty(plan.run_uri),
        held_lease(
            store,
            waiting=lambda owner: on_event(Phase(f"checking whether {owner} is still running")),
            on_stop=lambda request: _stop_this_process(request, state),
        ) as lease,
    ):
        with (
            _data_report(store, plan.run_name, prepared, report),
            cluster(workers, plan.resolved.target, progress=lambda text: on_event(Phase(text))) as connection,
        ):
            _mark_parent(plan, on_event)
            for rows in prepared:
                keep_prepared(rows, plan.prepared)
            signals, failure = _train(plan, lease, state, savings, local_workers)
            connection.keeps_logs = bool(failure or state.restarts)
            if len(signals) < 2:
                with suppress(BucketError):  # writing the result reports it
                    check_lease(store, lease)  # another driver's result must not be overwritten
        if failure and failure == state.lost_cluster:
            failure = f"{failure} The same command resumes from {_resume_point(store, state)}."
        attempt = Attempt(
            failure=failure,
            signals=signals,
            stopped_by=state.stopped_by,
            model=state.model,
            checkpoint=state.checkpoint,
            restarts=state.restarts,
            log_files=[driver_log, *_worker_logs(plan, state.most_workers)],
            elapsed_seconds=time.monotonic() - began,
            command=command,
        )
        result = _write_result(plan, report, attempt, state)
    if result.status == "completed":
        _release_parent(plan)
    return result


def _resume_point(store: Store, state: "RunState") -> str:
    """Return where a run resumes: its workers may commit a checkpoint after the driver has lost the cluster."""
    with suppress(BucketError):  # writing the result reports it
        if manifests := committed(store):
            return checkpoint_uri(store.uri, manifests[-1].step)
    return state.latest_checkpoint


def _worker_logs(plan: RunPlan, started: int) -> list[Path]:
    """Return the log files of the workers: on this machine those that exist, on other machines those of started workers.

    Args:
        plan: The run.
        started: The most workers that have run at once.
    """
    if plan.resolved.target.is_local:
        logs = (worker_log(plan, rank) for rank in range(plan.config.most_devices))
        return [log for log in logs if log.exists()]
    return [worker_log(plan, rank) for rank in range(started)]


def _write_result(plan: RunPlan, report: PlanReport, attempt: Attempt, state: "RunState") -> RunResult:
    try:
        return write_result(plan, report, attempt)
    except BucketError as error:
        raise UnrecordedError(
            f"{(attempt.failure or 'all steps done').rstrip('.')}. Nor can {RESULT_FILE} be written: {str(error).rstrip('.')}. "
            f"The same command resumes from {state.latest_checkpoint}."
        ) from error


def _train(
    plan: RunPlan,
    lease: Lease,
    state: "RunState",
    savings: Sequence[Saving],
    local_workers: LocalWorkers | None,
) -> tuple[Sequence[int], str | None]:
    """Run the workers until they exit; return (received signals, reason of the failure or None)."""
    signals = record_signals()
    vitals().is_polled = True  # the result must be written
    mailbox = _mailbox_on_this_node()
    trainer = _trainer(plan, lease, mailbox, local_workers)
    fit = _Fit(trainer, mailbox)
    try:
        _follow(mailbox, signals, state)
        fit.end()
    except (ClusterLostError, ray.exceptions.RayError) as error:  # the mailbox is lost with its cluster
        fit.abandon()
        state.lost_cluster = vitals().diagnose() or describe_lost_cluster(error, savings)
    failed = describe_failure(classify_failures(fit.error), savings) if fit.error else None
    failure = state.rejection or state.lost_cluster or failed
    if plan.resolved.target.is_local and not failure:
        shutil.rmtree(trainer.state_directory, ignore_errors=True)
    return signals, failure


def _stop_this_process(request: StopRequest, state: "RunState") -> None:
    """Stop as on SIGTERM."""
    state.stopped_by = request.requested_by
    state.display(Notice(f"{request.requested_by} requested this stop with main.py stop"))
    os.kill(os.getpid(), SENT_AS_SIGTERM)


@contextmanager
def _removed_if_empty(run_uri: str) -> Iterator[None]:
    """Remove the local directory of a run in which the block left nothing, or only a file that a killed worker had not finished."""
    try:
        yield
    finally:
        if not is_remote(run_uri):
            with suppress(BucketError, OSError):  # it is not empty
                store = open_store(run_uri)
                if not store.list():
                    store.abort_stale_uploads()
                local_path(run_uri).rmdir()


@contextmanager
def _data_report(
    store: Store, run_name: str, prepared: Sequence[PreparedData], report: DataReport
) -> Iterator[None]:
    """Write the data report, and remove it if the block ends before training started, so that no empty run remains.

    No worker may run after the block: it could start the training meanwhile.
    """
    try:
        _write_data_report(store, run_name, prepared, report)
        yield
    finally:
        with suppress(BucketError):
            if store.read_if_exists(CONFIG_FILE) is None:
                store.delete([DATA_REPORT_FILE, DATA_PAGE_FILE, SKIPPED_ROWS_FILE])


def _write_data_report(
    store: Store, run_name: str, prepared: Sequence[PreparedData], report: DataReport
) -> None:
    store.write(
        DATA_REPORT_FILE, report.model_dump_json(include=set(DataReport.model_fields), indent=2).encode()
    )
    store.write(DATA_PAGE_FILE, to_html(report, run_name).encode())
    skipped = b"".join((rows.directory / SKIPPED_FILE).read_bytes() for rows in prepared)
    if skipped:
        store.write(SKIPPED_ROWS_FILE, skipped)


def _mark_parent(plan: RunPlan, on_event: Callable[[Event], None]) -> None:
    """Mark the parent checkpoint as in use, so that the parent run does not prune it."""
    if not plan.parent or not run_of(plan.parent):
        return
    try:
        checkpoints.mark_in_use(plan.parent, plan.run_uri)
    except BucketError as error:
        on_event(
            Notice(
                f"{plan.parent}: cannot mark this checkpoint as in use, so the parent run may prune it: {error}"
            )
        )


def _release_parent(plan: RunPlan) -> None:
    """Remove the mark that `_mark_parent` set."""
    if plan.parent and run_of(plan.parent):
        with suppress(BucketError):  # the parent run deletes outdated marks
            checkpoints.unmark(plan.parent, plan.run_uri)


@dataclass
class RunState:
    """The state of an attempt, built from its events; each event is also passed to the display."""

    workers: Workers
    savings: Sequence[Saving]
    display: Callable[[Event], None]
    model: ModelReady | None = None
    checkpoint: CheckpointCommitted | None = None
    rejection: str | None = None
    """The error that a restart cannot fix."""
    lost_cluster: str | None = None
    """The reason why the driver lost its cluster."""
    restarts: list[str] = field(default_factory=list)
    """The reason of each worker restart."""
    last_step: int = 0
    most_workers: int = 0
    """The most workers that have run at once."""
    stopped_by: str | None = None
    """Requester of a stop with `main.py stop`."""
    is_waiting: bool = False
    """True while no worker group runs because the cluster lacks resources or has lost a node."""

    @property
    def latest_checkpoint(self) -> str:
        """Return the latest checkpoint's URI, for messages."""
        return (
            self.checkpoint.uri
            if self.checkpoint
            else "the point where this attempt started: it committed no checkpoint"
        )

    @property
    def has_uncommitted_steps(self) -> bool:
        """Return whether an immediate stop would lose steps of this attempt."""
        return self.last_step > (self.checkpoint.step if self.checkpoint else 0)

    def on_event(self, event: Event) -> None:
        """Record and display an event; add a notice if workers failed or started in a smaller group."""
        self._record(event)
        self.display(event)
        if isinstance(event, WorkersStarted) and event.workers < self.workers.count:
            self.display(Notice(_describe_fewer(event.workers, self.workers.count)))
        if (
            isinstance(event, WorkersFailed) and self.rejection is None
        ):  # after a rejection, workers restart only to exit
            reason = describe_failure(event.causes, self.savings)
            self.restarts.append(reason)
            self.display(
                Notice(f"{reason.rstrip('.')}. Restarting the workers from {self.latest_checkpoint}.")
            )

    def _record(self, event: Event) -> None:
        match event:
            case ModelReady():
                self.model = event
            case StepDone(step=step):
                self.last_step = step
                self.is_waiting = False  # on a busy machine, the controller sends WorkersStarted later
            case WorkersWaiting():
                self.is_waiting = True
                self.last_step = 0  # uncommitted steps are lost
            case WorkersStarted(workers):
                self.most_workers = max(self.most_workers, workers)
                self.is_waiting = False
            case CheckpointCommitted():
                self.checkpoint = event
            case Restored(checkpoint):
                self.checkpoint = checkpoint
            case Rejected(message):
                self.rejection = message
            case _:
                pass


def _describe_fewer(workers: int, most: int) -> str:
    return (
        f"running with {workers} of {most} workers: each step trains on the same rows but takes longer. "
        "When the cluster has resources for more workers, the run commits a checkpoint and resumes with a larger group."
    )


def _mailbox_on_this_node() -> Any:
    """Start the mailbox on the driver's node, so that it is lost only with the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(EventMailbox)
    return actor.options(num_cpus=0, scheduling_strategy=here).remote()


def _follow(mailbox: Any, signals: Sequence[int], state: RunState) -> None:
    """Handle events until all workers have exited. While workers wait for resources, report what the cluster lacks.

    After the first signal, ask the workers to stop, unless `_leaves_at_once`. Raise ClusterLostError if the cluster is lost.
    """
    has_asked = False
    shortage = _Shortage(state)
    news = mailbox.take.remote()
    while not _leaves_at_once(signals, state, has_asked):
        if signals and not has_asked:
            has_asked = True
            state.on_event(stopping(state.stopped_by))
            mailbox.request_stop.remote()
        if lost := vitals().lost:
            raise ClusterLostError(lost)
        answered, _ = ray.wait([news], timeout=_SIGNAL_POLL_SECONDS)
        if not answered:
            shortage.report()
            continue
        events: Any = ray.get(news)
        if events is None:
            return
        for event in events:
            state.on_event(event)
        news = mailbox.take.remote()


def stopping(stopped_by: str | None) -> Notice:
    """Return what the driver does after its first signal, or after the one that it sent itself for `main.py stop`; the result names it."""
    at_once = "Ctrl-C" if stopped_by else "a second signal"
    return Notice(f"stopping after the next checkpoint; {at_once} stops at once")


def _leaves_at_once(signals: Sequence[int], state: RunState, has_asked: bool) -> bool:
    """Return whether the driver stops without waiting for the workers.

    It does after a second signal. After the first, it does if no step would be lost, or if the workers may be stuck waiting for a node.

    Args:
        signals: The signals that the driver received.
        state: The state of the run.
        has_asked: Whether the workers were asked to stop.
    """
    if not signals:
        return False
    return len(signals) > 1 or state.is_waiting or not (has_asked or state.has_uncommitted_steps)


class _Shortage:
    """The report of what a cluster lacks while the workers wait for resources, once a second."""

    def __init__(self, state: RunState):
        self._state = state
        self._since = ""
        self._next_look = 0.0

    def report(self) -> None:
        """Report what the cluster lacks and since when, if the workers wait."""
        if not self._state.is_waiting:
            self._since = ""
            return
        now = time.monotonic()
        if now < self._next_look or not vitals().is_answering:
            return
        self._next_look = now + _RESOURCE_POLL_SECONDS
        if waits_for := lacking(self._state.workers):
            self._since = self._since or f"{datetime.now():%H:%M:%S}"
            self._state.on_event(Phase(f"{waits_for}, since {self._since}"))


class _Fit:
    """A thread that runs TorchTrainer.fit() and then closes the mailbox, so that the main thread can receive signals."""

    def __init__(self, trainer: LeanTorchTrainer, mailbox: Any):
        self.error: BaseException | None = None
        self._trainer = trainer
        self._mailbox = mailbox
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="fit", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop the thread before Ray shuts down: a thread that calls Ray after that terminates the process."""
        if self._thread.is_alive():
            self._is_stopped = True
            if self._trainer.runs_in_driver:
                self._trainer.stop(terminate_workers=True)
            else:
                self._kill_controller()
            self._thread.join(_CONTROLLER_START_TIMEOUT_SECONDS)

    def abandon(self) -> None:
        """Leave the thread to its end: its cluster is lost, and no call would be answered."""
        self._is_stopped = True
        if self._trainer.runs_in_driver:
            self._trainer.stop(terminate_workers=False)
            self._thread.join(_LAST_POLL_SECONDS)

    def _kill_controller(self) -> None:
        controller: Any = ray.get(
            self._mailbox.controller.remote(), timeout=_CONTROLLER_START_TIMEOUT_SECONDS
        )
        if controller is not None:
            ray.kill(controller)

    def _run(self) -> None:
        try:
            self._trainer.fit()
        except asyncio.CancelledError:  # `end` stopped it
            return
        except Exception as error:  # noqa: BLE001 - any error ends the run; the main thread reports it
            if not self._is_stopped:
                traceback.print_exc()  # for the log file
                self.error = error
        if not self._is_stopped:
            self._mailbox.close.remote()


def _trainer(
    plan: RunPlan, lease: Lease, mailbox: Any, local_workers: LocalWorkers | None
) -> LeanTorchTrainer:
    config = plan.config
    is_range = len(config.device_counts) > 1
    if is_range:
        os.environ.setdefault(WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, str(_WAIT_FOR_LOST_NODES_SECONDS))
    scaling = ScalingConfig(
        num_workers=(config.fewest_devices, config.most_devices) if is_range else config.most_devices,
        use_gpu=plan.device == "cuda",
        resources_per_worker=workers_of(plan).each,
    )
    return LeanTorchTrainer(
        train_worker,
        is_local=plan.resolved.target.is_local,
        local_workers=local_workers,
        train_loop_config={
            "plan": plan.model_dump(mode="json"),
            "lease": lease.model_dump(mode="json"),
            "mailbox": mailbox,
        },
        torch_config=TorchConfig(backend=COLLECTIVE_BACKENDS[plan.device]),
        scaling_config=scaling,
        scaling_policy=GroupSizes(scaling, config.device_counts, mailbox) if is_range else None,
        run_config=RunConfig(
            # Ray resumes a run of the same name by itself. Our runs resume from manifests, so each attempt gets a unique name.
            name=f"{plan.run_name}-{time.time_ns()}",
            # For Ray's own state only; the commit protocol writes checkpoints to the bucket.
            storage_path=str(Path(plan.scratch) / "ray"),
            failure_config=FailureConfig(max_failures=plan.config.max_failures),
            callbacks=[WorkerGroupReporter(mailbox)],  # pyright: ignore[reportArgumentType]  # Ray also accepts its own callback types
        ),
    )
