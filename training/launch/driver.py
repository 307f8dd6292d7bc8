"""The driver: runs a RunPlan as a Ray TorchTrainer job and returns its RunResult."""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from runs.layout import (
    DATA_PAGE_FILE,
    DATA_REPORT_FILE,
    RESULT_FILE,
    SKIPPED_ROWS_FILE,
    Lease,
    RunResult,
    run_of,
)
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
from training.launch.cluster import Workers, cluster, lacking, workers_of
from training.launch.elastic import GroupSizes, WorkerGroupReporter
from training.launch.failures import causes_of, classify, describe_lost_cluster
from training.launch.results import Attempt, write_result
from training.loop.ray_internals import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, LeanTorchTrainer
from training.loop.worker import train_worker, worker_log
from training.planning.memory import Saving
from training.planning.plan import RunPlan
from training.planning.report import PlanReport
from utils.storage.bucket import BucketError, open_store

_LOOK_FOR_SIGNALS_SECONDS = 0.1  # Python delivers two signals as one while Ray waits
_WAIT_FOR_LOST_NODES_SECONDS = 20
_LONGEST_START_SECONDS = 30.0  # of Ray's controller


def run_job(
    plan: RunPlan,
    prepared: Sequence[PreparedData],
    report: PlanReport,
    *,
    command: Sequence[str],
    began: float,
    driver_log: Path,
    on_event: Callable[[Event], None],
) -> RunResult:
    """Train, and write result.json. The first SIGINT or SIGTERM commits a checkpoint and exits, a second exits at once.

    Args:
        plan: The run.
        prepared: The tokenized rows, which workers read from the bucket.
        report: What the plan and the data report show to users.
        command: The command line, for the run's page.
        began: time.monotonic() when the driver started, for the result's elapsed seconds.
        driver_log: Where this process's library output goes.
        on_event: Called on this thread with each event of the workers.

    Raises:
        LeaseError: another driver trains the run.
        ClusterError: the cluster lacks resources.
        BucketError: the run cannot be written to at its start.
        UnrecordedError: the result cannot be written.
    """
    workers = workers_of(plan)
    savings = report.memory.savings if report.memory else []
    state = RunState(workers, savings, on_event)
    store = open_store(plan.run_uri)
    with (
        held_lease(
            store, waiting=lambda owner: on_event(Phase(f"waiting to see whether {owner} still lives"))
        ) as lease,
        cluster(workers, plan.resolved.target, progress=lambda text: on_event(Phase(text))),
    ):
        _keep_parent(plan, on_event)
        for rows in prepared:
            keep_prepared(rows, plan.prepared)
        _write_data_report(plan, prepared, report)
        signals, failure = _train(plan, lease, workers, state, savings)
        if len(signals) < 2:
            with suppress(BucketError):  # writing the result reports it
                check_lease(store, lease)  # another driver's result must not be overwritten
    attempt = Attempt(
        failure=failure,
        signals=signals,
        model=state.model,
        checkpoint=state.checkpoint,
        restarts=state.restarts,
        log_files=[driver_log, *(worker_log(plan, rank) for rank in range(plan.config.most_devices))],
        elapsed_seconds=time.monotonic() - began,
        command=command,
    )
    try:
        result = write_result(plan, report, attempt)
    except BucketError as error:
        raise UnrecordedError(
            f"{failure or 'trained to its end'}\n{RESULT_FILE} cannot be written: {error}\n"
            f"The same command resumes from {state.latest_checkpoint}."
        ) from error
    if result.status == "completed":
        _release_parent(plan)
    return result


def _train(
    plan: RunPlan, lease: Lease, workers: Workers, state: "RunState", savings: Sequence[Saving]
) -> tuple[Sequence[int], str | None]:
    """Run the workers until they are done; return (received signals, why the attempt failed, if it did)."""
    signals = _remember_signals()  # only now: connecting to Ray installs handlers of its own
    mailbox = _mailbox_on_this_node()
    fit = _Fit(_trainer(plan, lease, mailbox), mailbox)
    lost: str | None = None
    try:
        _follow(mailbox, signals, state, workers)
        fit.end()
    except ray.exceptions.RayError as error:  # the mailbox is lost with its cluster
        lost = f"{describe_lost_cluster(error, savings)} The same command resumes from {state.latest_checkpoint}."
    failed = classify(causes_of(fit.error), savings) if fit.error else None
    return signals, state.rejection or lost or failed


def _write_data_report(plan: RunPlan, prepared: Sequence[PreparedData], report: DataReport) -> None:
    store = open_store(plan.run_uri)
    store.write(
        DATA_REPORT_FILE, report.model_dump_json(include=set(DataReport.model_fields), indent=2).encode()
    )
    store.write(DATA_PAGE_FILE, to_html(report, plan.run_name).encode())
    skipped = b"".join((rows.directory / SKIPPED_FILE).read_bytes() for rows in prepared)
    if skipped:
        store.write(SKIPPED_ROWS_FILE, skipped)


def _keep_parent(plan: RunPlan, on_event: Callable[[Event], None]) -> None:
    """Mark the checkpoint that this run starts from as in use, so that its own run does not prune it."""
    if not plan.parent or not run_of(plan.parent):
        return
    try:
        checkpoints.mark_in_use(plan.parent, plan.run_uri)
    except BucketError as error:
        on_event(
            Notice(
                f"{plan.parent} cannot be marked as used by this run, so its own run may prune it: {error}"
            )
        )


def _release_parent(plan: RunPlan) -> None:
    """Remove the mark of `_keep_parent`."""
    if plan.parent and run_of(plan.parent):
        with suppress(BucketError):  # the parent's run deletes a mark that is out of date
            checkpoints.unmark(plan.parent, plan.run_uri)


def _remember_signals() -> list[int]:
    """Return a list that every SIGINT and SIGTERM is appended to from now on, in place of their default action."""
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda signal_number, _: received.append(signal_number))
    return received


@dataclass
class RunState:
    """What the events of an attempt say about it so far; it passes them on to the display."""

    workers: Workers
    savings: Sequence[Saving]
    display: Callable[[Event], None]
    model: ModelReady | None = None
    checkpoint: CheckpointCommitted | None = None
    rejection: str | None = None
    """The error that no restart can fix."""
    restarts: list[str] = field(default_factory=list)
    """Why workers were restarted."""
    last_step: int = 0
    is_waiting: bool = False
    """Whether no worker group runs, because the cluster lacks resources or has lost a node."""

    @property
    def latest_checkpoint(self) -> str:
        """Return the latest checkpoint's URI, for messages."""
        return self.checkpoint.uri if self.checkpoint else "where it began: this attempt saw no checkpoint"

    @property
    def has_uncommitted_steps(self) -> bool:
        """Return whether stopping at once would lose steps of this attempt."""
        return self.last_step > (self.checkpoint.step if self.checkpoint else 0)

    def on_event(self, event: Event) -> None:
        """Record an event and display it, with a notice where it needs one."""
        self._record(event)
        self.display(event)
        if isinstance(event, WorkersStarted) and event.workers < self.workers.count:
            self.display(Notice(_describe_fewer(event.workers, self.workers.count)))
        if isinstance(event, WorkersFailed) and self.rejection is None:  # else they restart only to exit
            reason = classify(event.causes, self.savings)
            self.restarts.append(reason)
            self.display(
                Notice(f"{reason.rstrip('.')}. The workers are started again from {self.latest_checkpoint}.")
            )

    def _record(self, event: Event) -> None:
        match event:
            case ModelReady():
                self.model = event
            case StepDone(step=step):
                self.last_step = step
            case WorkersWaiting():
                self.is_waiting = True
                self.last_step = 0  # uncommitted steps are lost
            case WorkersStarted():
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
        f"running with {workers} of {most} workers: a step trains the same rows and takes longer. "
        "When resources for more arrive, the run commits a checkpoint and resumes from it with more workers."
    )


def _mailbox_on_this_node() -> Any:
    """Start the mailbox on the driver's node, so that only losing the driver loses it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(EventMailbox)
    return actor.options(num_cpus=0, scheduling_strategy=here).remote()


def _follow(mailbox: Any, signals: Sequence[int], state: RunState, workers: Workers) -> None:
    """Handle events until no worker is left, and report what the cluster lacks while workers wait for resources.

    The first signal asks the workers to stop; where no step would be lost it returns at once, since workers may be stuck
    waiting for a node. A second signal always returns at once.
    """
    asked = False
    news = mailbox.take.remote()
    while len(signals) < 2:
        if signals and state.is_waiting:
            return
        if signals and not asked:
            if not state.has_uncommitted_steps:
                return
            asked = True
            state.on_event(Phase("stopping after a checkpoint; a second signal stops at once"))
            mailbox.request_stop.remote()
        answered, _ = ray.wait([news], timeout=_LOOK_FOR_SIGNALS_SECONDS)
        if not answered:
            if state.is_waiting and (waits_for := lacking(workers)):
                state.on_event(Phase(waits_for))
            continue
        events: Any = ray.get(news)
        if events is None:
            return
        for event in events:
            state.on_event(event)
        news = mailbox.take.remote()


class _Fit:
    """TorchTrainer.fit() on its own thread, so that the driver's main thread receives signals; it closes the mailbox."""

    def __init__(self, trainer: TorchTrainer, mailbox: Any):
        self.error: BaseException | None = None
        self._trainer = trainer
        self._mailbox = mailbox
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="fit", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop the thread before the cluster ends: a thread that calls Ray after that terminates the whole process."""
        if self._thread.is_alive():
            self._is_stopped = True
            controller: Any = ray.get(self._mailbox.controller.remote(), timeout=_LONGEST_START_SECONDS)
            if controller is not None:
                ray.kill(controller)
            self._thread.join(_LONGEST_START_SECONDS)

    def _run(self) -> None:
        try:
            self._trainer.fit()
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
            if not self._is_stopped:
                self.error = error
        self._mailbox.close.remote()


def _trainer(plan: RunPlan, lease: Lease, mailbox: Any) -> TorchTrainer:
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
        train_loop_config={
            "plan": plan.model_dump(mode="json"),
            "lease": lease.model_dump(mode="json"),
            "mailbox": mailbox,
        },
        torch_config=TorchConfig(backend="nccl" if plan.device == "cuda" else "gloo"),
        scaling_config=scaling,
        scaling_policy=GroupSizes(scaling, config.device_counts, mailbox) if is_range else None,
        run_config=RunConfig(
            # Ray resumes a run of the same name by itself. Ours resume from their manifests, so each attempt gets its own name.
            name=f"{plan.run_name}-{time.time_ns()}",
            # Ray's own bookkeeping; checkpoints go into the bucket by the commit protocol.
            storage_path=str(Path(plan.scratch) / "ray"),
            failure_config=FailureConfig(max_failures=plan.config.max_failures),
            callbacks=[WorkerGroupReporter(mailbox)],  # pyright: ignore[reportArgumentType]  # Ray also takes its own kinds
        ),
    )
