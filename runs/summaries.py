"""List the runs in a storage path, and show the details of one run.

The number of requests does not depend on the number of checkpoints: one for a completed run, up to four for any other run,
five if it has a lease. Requests for several runs are sent in parallel.
"""

import glob
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from configs.loading import ConfigError, load_config
from runs.layout import (
    CONFIG_FILE,
    LEASE_EXPIRES_SECONDS,
    LEASES,
    METRICS_FILE,
    RESULT_FILE,
    EvalLoss,
    EvalSample,
    Lease,
    Manifest,
    RunResult,
    RunStatus,
    checkpoint_uri,
    default_storage,
    run_of,
)
from runs.reading import (
    eval_losses_of,
    overall_speed,
    read_config,
    read_lease,
    read_metrics,
    read_result,
    survey,
    survey_metrics,
    survey_samples,
)
from utils.command_line import main_line
from utils.storage.bucket import DamagedError, NotFoundError, Store, check_readable, join_uri, open_store

REQUESTS_AT_ONCE = 32
"""Requests for several runs that are sent in parallel."""

Standing = RunStatus | Literal["running", "interrupted", "damaged"]
"""State of a run. running: a driver trains it; interrupted: its driver is gone, and the same command resumes it."""


class RunSummary(BaseModel):
    """One run as a line of the list."""

    model_config = ConfigDict(frozen=True)

    run_name: str
    run_uri: str
    status: Standing
    reason: str
    """Reason for its end, if it has ended."""
    best_eval_loss: float | None
    """Best eval loss in nats per loss token."""
    steps: int
    """Optimizer steps: up to the latest committed checkpoint; for a run without a result, the latest known step."""
    age_seconds: float | None
    """Seconds since its last activity: its result, otherwise its lease or its metrics; None if unknown."""


class CheckpointSummary(BaseModel):
    """One committed checkpoint as a line of the list."""

    model_config = ConfigDict(frozen=True)

    uri: str
    step: int
    epoch: float
    eval_loss: float | None
    size: int
    """Size in bytes."""
    created: str
    """UTC, ISO 8601."""


class RunDetails(RunSummary):
    """All details of a run."""

    train_loss: float | None
    """Training loss of the latest known step in nats per loss token."""
    eval_losses: list[EvalLoss]
    samples: list[EvalSample]
    """Answers to validation prompts at the latest evaluation; empty without eval_samples."""
    checkpoints: list[CheckpointSummary]
    valid_rows: str | None
    """Fingerprint of the tokenized validation rows; None without validation rows or without a checkpoint."""
    tokens_per_second: float | None
    """Training speed over all attempts until the result; None without a result or a trained step."""
    damage: list[str]
    """Problems with committed checkpoints, metrics.jsonl, samples and config.yaml."""
    config: dict[str, Any]
    """Content of config.yaml; empty if it is damaged."""
    result: RunResult | None
    """Content of result.json; of an earlier attempt if the run is running or was interrupted."""


def list_runs(storage: str) -> list[RunSummary]:
    """Return the runs directly below a storage path, the most recently active first."""
    _reject_yaml(storage)
    storage = open_store(storage).uri
    try:
        check_readable(storage)
    except NotFoundError as error:
        raise NotFoundError(_no_runs(storage)) from error
    store = open_store(storage)
    with ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="run") as pool:
        found = list(pool.map(lambda name: summarize(store, name), store.directories()))
    runs = [run for run in found if run is not None]
    if not runs:
        if store.read_if_exists(CONFIG_FILE) is not None:
            raise NotFoundError(f"{storage}: it is a run itself; show it with: {main_line('show', storage)}")
        raise NotFoundError(_no_runs(storage))
    return sorted(runs, key=lambda run: (run.age_seconds is None, run.age_seconds or 0.0, run.run_name))


def _no_runs(storage: str) -> str:
    if storage == default_storage():
        elsewhere = f"Those of a YAML with storage_path are listed by: {main_line('runs', 'STORAGE_PATH')}"
    else:
        elsewhere = f"Check the spelling, or start a run with storage_path: {storage}"
    return f"{storage}: there are no runs yet. {elsewhere}"


def read_run(uri: str) -> RunDetails:
    """Return the details of one run."""
    check_run(uri)
    store = open_store(uri)
    summary = summarize(store, "")
    if summary is None:
        raise no_run(store)
    if summary.status == "damaged":
        raise DamagedError(RESULT_FILE, summary.reason)
    result = read_result(store)
    metrics, damaged_metrics = survey_metrics(store)
    manifests, damage = survey(store)
    samples, damaged_samples = survey_samples(store, 1, summary.steps)
    stored = read_config(store)
    return RunDetails(
        **dict(summary),
        train_loss=next((line.loss for line in reversed(metrics) if line.loss is not None), None),
        eval_losses=result.eval_losses
        if result and result.status == summary.status
        else eval_losses_of(metrics),
        samples=samples,
        checkpoints=[_checkpoint(uri, manifest) for manifest in manifests],
        valid_rows=manifests[-1].data.valid if manifests else None,
        tokens_per_second=overall_speed(result, metrics) if result else None,
        damage=[
            *damage,
            *filter(None, [damaged_metrics, damaged_samples, stored.damage if stored else None]),
        ],
        config=stored.keys if stored else {},
        result=result,
    )


def run_uri(name_or_uri: str) -> str:
    """Return the URI of `run:NAME` in the default storage path; otherwise the URI itself, with local paths absolute."""
    if name_or_uri == "run:":
        raise NotFoundError("run: has no name; write run:NAME")
    if name_or_uri.startswith("run:"):
        return join_uri(default_storage(), name_or_uri.removeprefix("run:"))
    _reject_yaml(name_or_uri)
    if "/" not in name_or_uri and not Path(name_or_uri).exists():
        raise NotFoundError(
            f"{name_or_uri}: there is no such directory. run:{name_or_uri} would be a run in the default storage path, "
            f"{default_storage()}. {_name_by_path(name_or_uri)}"
        )
    return open_store(name_or_uri).uri


def _name_by_path(name: str) -> str:
    """Return how to name a run that is not in the default storage path."""
    found = sorted(Path().glob(f"outputs/*/{glob.escape(name)}/{CONFIG_FILE}"))
    if found:
        return f"Did you mean {found[0].parent}?"
    return f"A run elsewhere is named by its path; `{main_line('runs', 'outputs/tiny')}` lists those of a directory"


def no_run(store: Store) -> NotFoundError:
    """Return the error of a location that exists and is no run: it may be the storage path of runs."""
    if any(summarize(store, name) for name in store.directories()):
        return NotFoundError(
            f"{store.uri}: is a storage path, not a run; list its runs with: {main_line('runs', store.uri)}"
        )
    return NotFoundError(
        f"{store.uri}: there is no run, neither a {RESULT_FILE} nor a {CONFIG_FILE}. Give the URI of a run, or run:NAME."
    )


def _reject_yaml(name_or_uri: str) -> None:
    """Raise an error for a YAML that is given instead of a run that it trained, or of its storage path."""
    path = Path(name_or_uri)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return
    try:
        config = load_config(path).config
    except ConfigError as error:  # such as a YAML of another tool, or one that needs overrides
        raise NotFoundError(
            f"{path}: is a YAML, not a run. Give the URI of a run, or run:NAME; `{main_line('runs')}` lists those in the default storage path"
        ) from error
    storage = open_store(config.storage_path or default_storage()).uri
    run = join_uri(storage, config.run_name or "NAME")
    raise NotFoundError(
        f"{path}: is a YAML, not a run. Give its run as {run}; `{main_line('runs', storage)}` lists the runs"
    )


def check_run(uri: str) -> None:
    """Check that a run, or one of its checkpoints, exists and is readable.

    The error for a missing run or checkpoint names the command that lists the existing ones.
    """
    try:
        check_readable(uri)
    except NotFoundError as error:
        place = uri.rstrip("/").rpartition("/")[0]
        if run := run_of(uri):
            raise NotFoundError(
                f"{uri}: there is no such checkpoint; `{main_line('show', run)}` lists the existing ones"
            ) from error
        if place.strip("/") and not place.endswith("/"):
            elsewhere = (
                f". run:NAME is a run in this default storage path. {_name_by_path(uri.rpartition('/')[2])}"
                if place == default_storage()
                else ""
            )
            raise NotFoundError(
                f"{uri}: there is no such run; `{main_line('runs', place)}` lists the existing ones{elsewhere}"
            ) from error
        raise


def _checkpoint(uri: str, manifest: Manifest) -> CheckpointSummary:
    return CheckpointSummary(
        uri=checkpoint_uri(uri, manifest.step),
        step=manifest.step,
        epoch=manifest.epoch,
        eval_loss=manifest.eval_loss,
        size=sum(file.size for file in manifest.files),
        created=manifest.created,
    )


def summarize(store: Store, name: str) -> RunSummary | None:
    """Return the summary of the run `name` in a store (empty: the store itself); None if it is not a run."""
    uri = store.uri_of(name)
    try:
        return _standing(store, name, uri)
    except DamagedError as error:
        return _summary(uri, "damaged", str(error), [], 0, None)


def _standing(store: Store, name: str, uri: str) -> RunSummary | None:
    prefix = f"{name}/" if name else ""
    result = read_result(store, f"{prefix}{RESULT_FILE}")
    if result is not None and result.status == "completed":
        return _of_result(uri, result)
    lease, lease_age = latest_lease(store, prefix)
    is_running = lease is not None and lives(lease, lease_age)
    if result is not None and not is_running and not _was_left_after(result, lease):
        return _of_result(uri, result)
    metrics = read_metrics(store, f"{prefix}{METRICS_FILE}")
    age = (
        lease_age
        if lease_age is not None
        else store.age(f"{prefix}{METRICS_FILE if metrics else CONFIG_FILE}")
    )
    if age is None:
        return None
    steps = metrics[-1].step if metrics else 0
    return _summary(uri, "running" if is_running else "interrupted", "", eval_losses_of(metrics), steps, age)


def latest_lease(store: Store, prefix: str) -> tuple[Lease | None, float | None]:
    """Return (latest lease, seconds since its renewal), or (None, None) without a lease."""
    leases = store.list(f"{prefix}{LEASES}/")
    return (read_lease(store, leases[-1].key), store.age(leases[-1].key)) if leases else (None, None)


def lives(lease: Lease, age: float | None) -> bool:
    """Return whether the owner of a lease still trains, by the same rule as the next driver."""
    lives = lease.owner_lives()
    return lives if lives is not None else age is not None and age < LEASE_EXPIRES_SECONDS


def _was_left_after(result: RunResult, lease: Lease | None) -> bool:
    """Return whether an attempt started after a result and died: a normal exit removes its lease."""
    return lease is not None and result.ended is not None and lease.since > result.ended


def _of_result(uri: str, result: RunResult) -> RunSummary:
    age = (datetime.now(UTC) - datetime.fromisoformat(result.ended)).total_seconds() if result.ended else None
    return _summary(uri, result.status, result.reason, result.eval_losses, result.train_steps, age)


def _summary(
    uri: str, status: Standing, reason: str, losses: Sequence[EvalLoss], steps: int, age: float | None
) -> RunSummary:
    return RunSummary(
        run_name=uri.rstrip("/").rpartition("/")[2],
        run_uri=uri,
        status=status,
        reason=reason,
        best_eval_loss=min((loss.eval_loss for loss in losses), default=None),
        steps=steps,
        age_seconds=age,
    )
