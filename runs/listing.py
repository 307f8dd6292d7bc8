"""The runs below a place, and one of them in full.

A run of a thousand costs what one costs: a completed run is one request, any other at most four, or five where it is claimed,
however many checkpoints it has; they go out side by side.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from runs.layout import (
    CLAIM_EXPIRES_SECONDS,
    CLAIMS,
    CONFIG_FILE,
    METRICS_FILE,
    RESULT_FILE,
    Claim,
    EvalLoss,
    Manifest,
    RunResult,
    RunStatus,
    checkpoint_uri,
    default_storage,
    run_of,
)
from runs.reading import eval_losses_of, read_claim, read_config, read_metrics, read_result, survey
from utils.bucket import DamagedError, NotFoundError, Store, check_readable, join_uri, open_store

_REQUESTS_AT_ONCE = 32

Standing = RunStatus | Literal["running", "interrupted", "damaged"]
"""How a run stands. running: somebody trains it; interrupted: its driver is gone, and the same command goes on with it."""


class RunSummary(BaseModel):
    """A run in a line."""

    model_config = ConfigDict(frozen=True)

    run_name: str
    run_uri: str
    status: Standing
    reason: str
    """Why it ended, if it did."""
    best_eval_loss: float | None
    """Nats a trained token."""
    steps: int
    """Optimizer steps: up to its newest committed checkpoint, or, of one that did not come to an end, as far as is known."""
    age_seconds: float | None
    """Since it last gave a sign of life: its result, else its claim or its metrics; None where that is not known."""


class CheckpointSummary(BaseModel):
    """A committed checkpoint in a line."""

    model_config = ConfigDict(frozen=True)

    uri: str
    step: int
    epoch: float
    eval_loss: float | None
    size: int
    """Bytes."""
    created: str
    """UTC, ISO 8601."""


class RunDetails(RunSummary):
    """A run in full."""

    train_loss: float | None
    """Of the newest step that is known, nats a trained token."""
    eval_losses: list[EvalLoss]
    checkpoints: list[CheckpointSummary]
    damage: list[str]
    """What is wrong with checkpoints that were committed."""
    config: dict[str, Any]
    """Its config.yaml."""
    result: RunResult | None
    """Its result.json: of an attempt before, where it is running again or was interrupted since."""


def list_runs(storage: str) -> list[RunSummary]:
    """The runs directly below a place, those heard of last first.

    Raises:
        NotFoundError: there is no such place, or no run below it.
        BucketError: it cannot be read.
    """
    check_readable(storage)
    store = open_store(storage)
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE, thread_name_prefix="run") as pool:
        found = list(pool.map(lambda name: _summarize(store, name), store.directories()))
    runs = [run for run in found if run is not None]
    if not runs:
        is_run = store.read_if_exists(CONFIG_FILE) is not None
        advice = f"It is a run itself: main.py show {storage}" if is_run else "Look at its spelling."
        raise NotFoundError(f"{storage}: there is no run below it. {advice}")
    return sorted(runs, key=lambda run: (run.age_seconds is None, run.age_seconds or 0.0, run.run_name))


def read_run(uri: str) -> RunDetails:
    """One run.

    Raises:
        NotFoundError: there is none.
        BucketError: it cannot be read, or what lies there is damaged.
    """
    check_run(uri)
    store = open_store(uri)
    summary = _summarize(store, "")
    if summary is None:
        raise NotFoundError(
            f"{uri}: there is no run, neither a {RESULT_FILE} nor a {CONFIG_FILE}. Name a run's URI, or run:NAME."
        )
    if summary.status == "damaged":
        raise DamagedError(RESULT_FILE, summary.reason)
    result = read_result(store)
    metrics = read_metrics(store)
    manifests, damage = survey(store)
    stored = read_config(store)
    if stored and stored.damage:
        raise DamagedError(CONFIG_FILE, stored.damage)
    return RunDetails(
        **dict(summary),
        train_loss=next((line.loss for line in reversed(metrics) if line.loss is not None), None),
        eval_losses=result.eval_losses
        if result and result.status == summary.status
        else eval_losses_of(metrics),
        checkpoints=[_checkpoint(uri, manifest) for manifest in manifests],
        damage=damage,
        config=stored.keys if stored else {},
        result=result,
    )


def run_uri(name_or_uri: str) -> str:
    """`run:NAME` -> its URI where runs go by default; anything else as it is, local paths absolute.

    Raises:
        NotFoundError: it is a bare name, and no directory here has it.
        BucketError: it is no place that can be opened.
    """
    if name_or_uri == "run:":
        raise NotFoundError("run: names no run; write run:NAME")
    if name_or_uri.startswith("run:"):
        return join_uri(default_storage(), name_or_uri.removeprefix("run:"))
    if "/" not in name_or_uri and not Path(name_or_uri).exists():
        raise NotFoundError(f"{name_or_uri}: there is no such directory. Did you mean run:{name_or_uri}?")
    return open_store(name_or_uri).uri


def check_run(uri: str) -> None:
    """Make sure that something can be read where a run, or one of its checkpoints, is looked for.

    Raises:
        NotFoundError: there is nothing; the message says how to see what there is.
        BucketError: it cannot be read.
    """
    try:
        check_readable(uri)
    except NotFoundError as error:
        place = uri.rstrip("/").rpartition("/")[0]
        if run := run_of(uri):
            raise NotFoundError(
                f"{uri}: there is no such checkpoint; `main.py show {run}` lists what is there"
            ) from error
        if place.strip("/") and not place.endswith("/"):
            raise NotFoundError(
                f"{uri}: there is no such run; `main.py runs {place}` lists what is there"
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


def _summarize(store: Store, name: str) -> RunSummary | None:
    """How the run `name` in a store (empty: the store itself) stands; None where that is no run."""
    uri = store.uri_of(name)
    try:
        return _standing(store, name, uri)
    except DamagedError as error:
        return _summary(uri, "damaged", str(error), [], 0, None)


def _standing(store: Store, name: str, uri: str) -> RunSummary | None:
    result = read_result(store, join_uri(name, RESULT_FILE) if name else RESULT_FILE)
    if result is not None and result.status == "completed":
        return _of_result(uri, result)
    prefix = f"{name}/" if name else ""
    claim, claim_age = _newest_claim(store, prefix)
    is_running = claim is not None and _lives(claim, claim_age)
    if result is not None and not is_running and not _was_left_after(result, claim):
        return _of_result(uri, result)
    metrics = read_metrics(store, f"{prefix}{METRICS_FILE}")
    age = (
        claim_age
        if claim_age is not None
        else store.age(f"{prefix}{METRICS_FILE if metrics else CONFIG_FILE}")
    )
    if age is None:
        return None
    steps = metrics[-1].step if metrics else 0
    return _summary(uri, "running" if is_running else "interrupted", "", eval_losses_of(metrics), steps, age)


def _newest_claim(store: Store, prefix: str) -> tuple[Claim | None, float | None]:
    """(the newest claim, seconds since it was renewed); nothing where there is none."""
    claims = store.list(f"{prefix}{CLAIMS}/")
    return (read_claim(store, claims[-1].key), store.age(claims[-1].key)) if claims else (None, None)


def _lives(claim: Claim, age: float | None) -> bool:
    """Whether its owner still trains, as the next driver would see it."""
    lives = claim.owner_lives()
    return lives if lives is not None else age is not None and age < CLAIM_EXPIRES_SECONDS


def _was_left_after(result: RunResult, claim: Claim | None) -> bool:
    """Whether an attempt that began after a result has ended without one: an ordinary end takes its claim away."""
    return claim is not None and result.ended is not None and claim.since > result.ended


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
