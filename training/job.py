"""A RunPlan becomes a Ray TorchTrainer job, and its end a RunResult (driver side)."""

import os
import platform
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from configs.loading import to_yaml
from runs.curve import draw_eval_curve
from runs.layout import (
    CONFIG_FILE,
    CURVE_FILE,
    DATA_PAGE_FILE,
    DATA_REPORT_FILE,
    REPORT_FILE,
    RESULT_FILE,
    SKIPPED_ROWS_FILE,
    Claim,
    Manifest,
    MetricsLine,
    RunResult,
    RunStatus,
    Speed,
    checkpoint_uri,
    run_of,
)
from runs.reading import best, committed, eval_losses_of, parent_metrics, read_metrics, read_result
from runs.report import RunReport
from runs.report import to_html as report_to_html
from training import checkpoints
from training.claims import check_claim, claimed
from training.cluster import Workers, cluster, lacking, workers_of
from training.data.prepared import SKIPPED_FILE, PreparedData, keep_prepared
from training.data.report import DataReport, key_figures, to_html
from training.events import (
    CheckpointCommitted,
    Event,
    EventMailbox,
    ModelReady,
    Notice,
    Phase,
    PlacesFound,
    PlacesWanted,
    Refused,
    Restored,
    StepDone,
    UnrecordedError,
    WorkersFailed,
)
from training.memory import Saving, describe_savings
from training.models.files import first_line
from training.plan import PlanReport, RunPlan
from training.worker import package_versions, train_worker, worker_log
from training.worker_groups import GroupSizes, GroupTold, causes_of
from utils.bucket import BucketError, Store, open_store

_LOOK_FOR_SIGNALS_SECONDS = 0.1  # two that come while Ray waits are told as one
_WAIT_FOR_LOST_PLACES_SECONDS = 20
_LONGEST_START_SECONDS = 30.0  # of Ray's controller
_LONGEST_REASON = 400  # characters
_OUT_OF_MEMORY = "out of memory"


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
    """Train, and write result.json. A first SIGINT or SIGTERM commits a checkpoint and ends, a second ends at once.

    Args:
        plan: What to do.
        prepared: The rows' tokens, which workers take from the bucket.
        report: What is kept of them for people, and of the plan.
        command: What was typed, for the run's page.
        began: time.monotonic() when the driver started, for the result's elapsed seconds.
        driver_log: Where this process's library output goes.
        on_event: Called on this thread with what the workers tell.

    Raises:
        ClaimError: another driver trains the run.
        ClusterError: there are too few resources.
        BucketError: the run cannot be written to, before it begins.
        UnrecordedError: it cannot be written to when it has ended.
    """
    told = Told()
    workers = workers_of(plan)
    savings = report.memory.savings if report.memory else []
    lost: str | None = None
    store = open_store(plan.run_uri)
    with (
        claimed(
            store, waiting=lambda owner: on_event(Phase(f"waiting to see whether {owner} still lives"))
        ) as claim,
        cluster(workers, plan.resolved.target, tell=lambda text: on_event(Phase(text))),
    ):
        _keep_parent(plan, on_event)
        for rows in prepared:
            keep_prepared(rows, plan.prepared)
        _write_data_report(plan, prepared, report)
        signals = _remember_signals()  # only now: connecting to Ray installs a handler of its own
        mailbox = _mailbox_on_this_node()
        fit = _Fit(_trainer(plan, claim, mailbox), mailbox)

        def hear(event: Event) -> None:
            told.hear(event)
            on_event(event)
            if isinstance(event, PlacesFound) and event.workers < workers.count:
                on_event(Notice(_describe_fewer(event.workers, workers.count)))
            if isinstance(event, WorkersFailed) and told.refusal is None:  # else they only come back to end
                reason = classify(event.causes, savings)
                told.failures.append(reason)
                on_event(
                    Notice(
                        f"{reason.rstrip('.')}. The workers are started again from {told.newest_checkpoint}."
                    )
                )

        try:
            _follow(mailbox, signals, hear, told, workers)
            fit.end()
        except ray.exceptions.RayError as error:  # the mailbox ends with its cluster
            lost = f"{_how_lost(error, savings)} The same command goes on from {told.newest_checkpoint}."
        if len(signals) < 2:
            with suppress(BucketError):  # writing the result says so
                check_claim(store, claim)  # else it would take the place of another driver's
    logs = [driver_log, *(worker_log(plan, rank) for rank in range(plan.config.most_devices))]
    failure = told.refusal or lost or (classify(causes_of(fit.error), savings) if fit.error else None)
    try:
        manifests = committed(store)
        finished = bool(manifests) and manifests[-1].step >= plan.max_steps
        ending = _ending(failure, signals, finished)
        elapsed = time.monotonic() - began
        result = _write_result(plan, manifests, ending, told, logs, elapsed, report, command)
    except BucketError as error:
        raise UnrecordedError(
            f"{failure or 'trained to its end'}\n{RESULT_FILE} cannot be written: {error}\n"
            f"The same command goes on from {told.newest_checkpoint}."
        ) from error
    if ending.status == "completed" and plan.parent and run_of(plan.parent):
        with suppress(BucketError):  # the parent's run deletes a mark that is out of date
            checkpoints.unmark(plan.parent, plan.run_uri)
    return result


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
    """Mark the checkpoint that this run starts from, so that its own run does not prune it."""
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


def _remember_signals() -> list[int]:
    """A list that grows with every SIGINT and SIGTERM from now on, instead of what they would do."""
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda signal_number, _: received.append(signal_number))
    return received


@dataclass
class Told:
    """What the workers told last."""

    model: ModelReady | None = None
    checkpoint: CheckpointCommitted | None = None
    refusal: str | None = None
    failures: list[str] = field(default_factory=list)
    """Why workers were started again."""
    last_step: int = 0
    are_without_places: bool = False
    """Whether there are no workers, since Ray has no places for them yet, or has lost some."""

    @property
    def newest_checkpoint(self) -> str:
        """For messages."""
        return self.checkpoint.uri if self.checkpoint else "where it began: this attempt saw no checkpoint"

    @property
    def has_uncommitted_steps(self) -> bool:
        """Whether stopping at once would lose steps of this attempt."""
        return self.last_step > (self.checkpoint.step if self.checkpoint else 0)

    def hear(self, event: Event) -> None:
        """Remember what the result needs."""
        match event:
            case ModelReady():
                self.model = event
            case StepDone(step=step):
                self.last_step = step
            case PlacesWanted():
                self.are_without_places = True
                self.last_step = 0  # what was not committed is lost
            case PlacesFound():
                self.are_without_places = False
            case CheckpointCommitted():
                self.checkpoint = event
            case Restored(checkpoint):
                self.checkpoint = checkpoint
            case Refused(message):
                self.refusal = message


def _mailbox_on_this_node() -> Any:
    """Beside the driver, so that it is lost only when the driver is."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(EventMailbox)
    return actor.options(num_cpus=0, scheduling_strategy=here).remote()


def _follow(
    mailbox: Any,
    signals: Sequence[int],
    hear: Callable[[Event], None],
    told: Told,
    workers: Workers,
) -> None:
    """Pass on what the workers tell until none is left, and for what they wait where they have no places.

    A first signal asks them to stop, and does not wait where nothing would be lost: workers may be stuck for want of a
    machine. A second signal never waits.
    """
    asked = False
    news = mailbox.take.remote()
    while len(signals) < 2:
        if signals and told.are_without_places:
            return
        if signals and not asked:
            if not told.has_uncommitted_steps:
                return
            asked = True
            hear(Phase("stopping behind a checkpoint; a second signal stops at once"))
            mailbox.ask_to_stop.remote()
        answered, _ = ray.wait([news], timeout=_LOOK_FOR_SIGNALS_SECONDS)
        if not answered:
            if told.are_without_places and (waits_for := lacking(workers)):
                hear(Phase(waits_for))
            continue
        events: Any = ray.get(news)
        if events is None:
            return
        for event in events:
            hear(event)
        news = mailbox.take.remote()


class _Fit:
    """TorchTrainer.fit() on a thread of its own, so that signals reach the driver's main thread; it closes the mailbox."""

    def __init__(self, trainer: TorchTrainer, mailbox: Any):
        self.error: BaseException | None = None
        self._trainer = trainer
        self._mailbox = mailbox
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="fit", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Leave nothing of it, before the cluster ends: a thread that asks Ray for anything behind that ends the whole process."""
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


def _describe_fewer(workers: int, most: int) -> str:
    return (
        f"{workers} of {most} workers {'has its place' if workers == 1 else 'have their places'}: a step takes the same rows, and "
        "longer. When there are places for more, the run goes on with them, from a checkpoint that it commits then."
    )


class _Trainer(TorchTrainer):
    """A TorchTrainer without two of Ray's actors, whose start every worker would wait for, and with sizes of our own.

    One hands out Ray Data's datasets, and there are none. The other cleans placement groups up behind a lost driver; a
    cluster that ends with its driver has nothing to clean, and the driver would wait for it, sometimes 12 s.
    """

    def __init__(self, *arguments: Any, is_local: bool, sizes: GroupSizes | None = None, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self._is_local = is_local
        self._sizes = sizes

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        if self._sizes is not None:
            arguments["scaling_policy"] = self._sizes
        return super()._initialize_and_run_controller(**arguments)

    def _create_default_callbacks(self) -> list[Any]:
        needless: list[type] = [DatasetsCallback]
        if self._is_local:
            needless.append(PlacementGroupCleanerCallback)
        return [each for each in super()._create_default_callbacks() if not isinstance(each, tuple(needless))]


def _trainer(plan: RunPlan, claim: Claim, mailbox: Any) -> TorchTrainer:
    config = plan.config
    is_range = len(config.device_counts) > 1
    if is_range:
        # Ray counts a lost node for some seconds more, and would wait a minute for its places.
        os.environ.setdefault(WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, str(_WAIT_FOR_LOST_PLACES_SECONDS))
    scaling = ScalingConfig(
        num_workers=(config.fewest_devices, config.most_devices) if is_range else config.most_devices,
        use_gpu=plan.device == "cuda",
        resources_per_worker=workers_of(plan).each,
    )
    return _Trainer(
        train_worker,
        is_local=plan.resolved.target.is_local,
        train_loop_config={
            "plan": plan.model_dump(mode="json"),
            "claim": claim.model_dump(mode="json"),
            "mailbox": mailbox,
        },
        torch_config=TorchConfig(backend="nccl" if plan.device == "cuda" else "gloo"),
        scaling_config=scaling,
        sizes=GroupSizes(scaling, config.device_counts, mailbox) if is_range else None,
        run_config=RunConfig(
            # Ray continues a run of the same name by itself; ours continues by its manifests, so each try gets its own.
            name=f"{plan.run_name}-{time.time_ns()}",
            # Ray's own bookkeeping; checkpoints go into the bucket by the commit protocol.
            storage_path=str(Path(plan.scratch) / "ray"),
            failure_config=FailureConfig(max_failures=plan.config.max_failures),
            callbacks=[GroupTold(mailbox)],  # pyright: ignore[reportArgumentType]  # Ray takes its own kinds as well
        ),
    )


@dataclass(frozen=True)
class _Ending:
    """How an attempt ended, as result.json says it."""

    status: RunStatus
    reason: str
    stop_signal: int | None = None


def _ending(failure: str | None, signals: Sequence[int], finished: bool) -> _Ending:
    if finished and failure is None:
        return _Ending("completed", "all steps done")
    if signals:
        name = signal.Signals(signals[0]).name
        return _Ending("stopped", f"{name}; before it could stop: {failure}" if failure else name, signals[0])
    assert failure is not None, "training ended early, without an error"
    return _Ending("failed", failure)


def _how_lost(error: ray.exceptions.RayError, savings: Sequence[Saving]) -> str:
    """In a sentence. Where memory is short, Ray may end its own actors of this run together with the workers."""
    reason = classify([str(error)], savings)
    return reason if reason.startswith(_OUT_OF_MEMORY) else f"the cluster was lost ({first_line(error)})."


def classify(causes: Sequence[str], savings: Sequence[Saving]) -> str:
    """Why workers failed, in a line: out of memory and what would save some, a lost worker, or the first one's own words."""
    text = "\n".join(causes)
    last_line = causes[0].splitlines()[-1]
    # Ray explains over forty lines which of its processes it ended; the first that names memory says why.
    memory = re.search(
        r"^.*(?:out of memory|OutOfMemory|running low on memory|can't allocate memory|MemoryError).*$",
        text,
        re.MULTILINE | re.IGNORECASE,
    )
    if memory:
        return f"{_OUT_OF_MEMORY}: {memory[0].strip()[:_LONGEST_REASON].rstrip('.')}. {describe_savings(savings)}".strip()
    if "died" in text or "SYSTEM_ERROR" in text or "unavailable" in text:
        return f"worker lost: {last_line}"
    return last_line


def _write_result(
    plan: RunPlan,
    manifests: list[Manifest],
    ending: _Ending,
    told: Told,
    logs: list[Path],
    elapsed: float,
    report: PlanReport,
    command: Sequence[str],
) -> RunResult:
    """result.json, the curve and the page, from what lies in the bucket; a run that wrote nothing leaves nothing."""
    store = open_store(plan.run_uri)
    metrics = read_metrics(store)
    last = manifests[-1] if manifests else None
    # What was evaluated behind the last checkpoint, nothing has; before the first there is what the run started from.
    reached = last.step if last else 0
    eval_losses = [loss for loss in eval_losses_of(metrics) if loss.step <= reached]
    if last is None and plan.config.resume_from_checkpoint:
        eval_losses = []  # they are the parent's
    speed = told.checkpoint.speed if told.checkpoint else Speed()
    tokens, trained_tokens = _tokens_until(last, told, store)
    result = RunResult(
        status=ending.status,
        reason=ending.reason,
        stop_signal=ending.stop_signal,
        run_name=plan.run_name,
        run_uri=plan.run_uri,
        best_checkpoint=_uri(plan, best(manifests)),
        last_checkpoint=_uri(plan, last),
        eval_losses=eval_losses,
        train_steps=last.step if last else 0,
        tokens=tokens,
        trained_tokens=trained_tokens,
        tokens_per_second=speed.tokens_per_second,
        speed=speed,
        elapsed_seconds=round(elapsed, 3),
        parent=plan.parent,
        trainable_parameters=told.model.trainable_parameters if told.model else report.trainable_parameters,
        failures=told.failures,
        log_files=[str(log) for log in logs],
        versions=package_versions(),
        ended=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    if store.read_if_exists(CONFIG_FILE) is not None:
        before = _parent_metrics(plan)
        if eval_losses:
            store.write(CURVE_FILE, draw_eval_curve(plan.run_name, eval_losses, eval_losses_of(before)))
        page = RunReport(
            result=result,
            metrics=metrics,
            parent_metrics=before,
            checkpoints=manifests,
            data=key_figures(report),
            config=to_yaml(plan.config),
            environment={
                "device": report.device,
                "parallelism": report.parallelism,
                "kernels": report.kernels,
                "python": platform.python_version(),
            },
            command=command,
            base_model=plan.base_model,
            trains_adapter=plan.config.trains_adapter,
        )
        store.write(REPORT_FILE, report_to_html(page).encode())
        store.write(RESULT_FILE, result.model_dump_json(indent=2).encode())
    return result


def _tokens_until(last: Manifest | None, told: Told, store: Store) -> tuple[int, int]:
    """(tokens, trained ones): as the workers told, or, where they did not come so far, as an earlier attempt's result says."""
    if told.checkpoint:
        return told.checkpoint.tokens, told.checkpoint.trained_tokens
    before = read_result(store)
    if before and last and before.train_steps == last.step:
        return before.tokens, before.trained_tokens
    return 0, 0


def _parent_metrics(plan: RunPlan) -> list[MetricsLine]:
    """Of the run whose weights this one started from; one that took the whole state has them in its own metrics."""
    return [] if plan.config.resume_from_checkpoint else parent_metrics(plan.parent)


def _uri(plan: RunPlan, manifest: Manifest | None) -> str | None:
    return checkpoint_uri(plan.run_uri, manifest.step) if manifest else None
