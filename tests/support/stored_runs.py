"""Runs as they are stored in a bucket, written without training."""

import json
import signal
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import yaml

from configs.loading import to_yaml
from runs.layout import (
    CONFIG_FILE,
    MANIFEST_FILE,
    METRICS_FILE,
    RESULT_FILE,
    DataFingerprints,
    DataPosition,
    EvalLoss,
    FileRecord,
    Lease,
    Manifest,
    RunResult,
    RunStatus,
    checkpoint_key,
    checkpoint_uri,
    lease_key,
)
from utils.files import checksum_bytes
from utils.storage.bucket import Store, open_store

if TYPE_CHECKING:
    from training.planning.plan import RunPlan

VERSIONS = {"torch": "2.13.0", "ray": "2.60.0"}
_WEIGHTS = b"weights"


def eval_losses(*losses: float) -> list[EvalLoss]:
    """Return one evaluation per epoch of ten steps; the first is before step 0."""
    return [
        EvalLoss(step=10 * epoch, epoch=float(epoch), eval_loss=loss) for epoch, loss in enumerate(losses)
    ]


def make_result(
    run_uri: str,
    losses: Sequence[EvalLoss],
    *,
    status: RunStatus = "completed",
    hours_ago: float = 0.0,
    **changes: Any,
) -> RunResult:
    """Return the result of a run with these evaluations."""
    checkpoint = checkpoint_uri(run_uri, losses[-1].step) if losses else None
    defaults: dict[str, Any] = {
        "status": status,
        "reason": {"completed": "all steps done", "stopped": "SIGTERM", "failed": "out of memory"}[status],
        "stop_signal": signal.SIGTERM if status == "stopped" else None,
        "run_name": run_uri.rpartition("/")[2],
        "run_uri": run_uri,
        "best_checkpoint": checkpoint,
        "last_checkpoint": checkpoint,
        "eval_losses": losses,
        "train_steps": losses[-1].step if losses else 0,
        "tokens": 12_345,
        "trained_tokens": 2_345,
        "tokens_per_second": 321.0,
        "elapsed_seconds": 60.0,
        "parent": None,
        "trainable_parameters": 8192,
        "log_files": ["/node/driver.log"],
        "versions": VERSIONS,
        "ended": (datetime.now(UTC) - timedelta(hours=hours_ago)).isoformat(timespec="seconds"),
    }
    return RunResult(**defaults | changes)


def write_run(
    store: Store, name: str, losses: Sequence[EvalLoss], *, result: RunResult | None, **settings: Any
) -> str:
    """Write a run with one committed checkpoint below a store; return its URI."""
    config = {"model_id": "some/model", "train_path": "rows.jsonl", "learning_rate": 1e-4, **settings}
    store.write(f"{name}/{CONFIG_FILE}", yaml.safe_dump(config).encode())
    lines = [
        {"loss": loss.eval_loss + 0.1, "learning_rate": 1e-4, "epoch": loss.epoch, "step": loss.step}
        for loss in losses
    ] + [loss.model_dump(exclude={"figures"}) for loss in losses]
    lines.sort(key=lambda line: line["step"])
    store.write(f"{name}/{METRICS_FILE}", "".join(json.dumps(line) + "\n" for line in lines).encode())
    if losses:
        _write_checkpoint(store, name, losses[-1])
    if result:
        store.write(f"{name}/{RESULT_FILE}", result.model_dump_json().encode())
    return store.uri_of(name)


def write_lease(store: Store, name: str, number: int = 1, **changes: Any) -> None:
    """Write a lease on a run below a store: acquired now by a driver on another machine, unless `changes` override it."""
    defaults: dict[str, Any] = {
        "number": number,
        "token": "theirs",
        "owner": "ann@elsewhere, process 7",
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": "another",
        "process": 7,
        "process_started": 0.0,
    }
    lease = Lease(**defaults | changes)
    store.write(f"{name}/{lease_key(number)}", lease.model_dump_json().encode())


def make_manifest(
    step: int, epoch: float = 0.0, eval_loss: float | None = None, files: Sequence[FileRecord] = ()
) -> Manifest:
    """Return the manifest of a checkpoint that one worker saved."""
    return Manifest(
        step=step,
        epoch=epoch,
        eval_loss=eval_loss,
        world_size=1,
        zero_stage=0,
        config_hash="0" * 64,
        data=DataFingerprints(train="0", valid=None),
        data_position=DataPosition(epoch=int(epoch), steps_in_epoch=0, rows_seen=step),
        parent=None,
        created="2026-11-21T12:00:00+00:00",
        versions=VERSIONS,
        files=list(files),
    )


def make_manifest_with_weights(loss: EvalLoss) -> Manifest:
    """Return the manifest of a checkpoint with one file of weights."""
    weights = FileRecord(path="model.safetensors", size=len(_WEIGHTS), checksum=checksum_bytes(_WEIGHTS))
    return make_manifest(loss.step, loss.epoch, loss.eval_loss, [weights])


def commit_plan(plan: "RunPlan") -> None:
    """Write the files that the planner reads from a run with one committed checkpoint."""
    store = open_store(plan.run_uri)
    record = FileRecord(path="model.safetensors", size=len(_WEIGHTS), checksum=checksum_bytes(_WEIGHTS))
    manifest = make_manifest(1, files=[record]).model_copy(
        update={"config_hash": plan.config_hash, "data": plan.data}
    )
    store.write(CONFIG_FILE, to_yaml(plan.config).encode())
    store.write(checkpoint_key(1, record.path), _WEIGHTS)
    store.write(checkpoint_key(1, MANIFEST_FILE), manifest.model_dump_json().encode())


def _write_checkpoint(store: Store, name: str, loss: EvalLoss) -> None:
    store.write(f"{name}/{checkpoint_key(loss.step, 'model.safetensors')}", _WEIGHTS)
    content = make_manifest_with_weights(loss).model_dump_json().encode()
    store.write(f"{name}/{checkpoint_key(loss.step, MANIFEST_FILE)}", content)
