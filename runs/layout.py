"""The one place that knows how a run lies in the bucket: its paths and its typed records."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from utils.bucket import EMBEDDED_BUCKET, join_uri
from utils.processes import started_after_boot, this_machine

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
RESULT_FILE = "result.json"
CURVE_FILE = "eval_loss.png"
REPORT_FILE = "report.html"
DATA_PAGE_FILE = "data_report.html"
DATA_REPORT_FILE = "data_report.json"
SKIPPED_ROWS_FILE = "skipped_rows.jsonl"
TENSORBOARD = "tensorboard"
CHECKPOINTS = "checkpoints"
MANIFEST_FILE = "MANIFEST.json"
CLAIMS = "claim"
USES = "used-by"
EXPORTS = "exports"
EXPORT_FILE = "EXPORT.json"
EVALUATIONS = "evaluations"

CLAIM_EXPIRES_SECONDS = 30.0
"""A claim that was not renewed for so long is nobody's any more."""

RunStatus = Literal["completed", "stopped", "failed"]


CLUSTER_STORAGE = Path("/mnt/cluster_storage")
"""A directory that all nodes of an Anyscale cluster share, where it exists."""


def default_storage() -> str:
    """Where runs go when nothing says otherwise: Anyscale's artifact storage, what its nodes share, else the embedded bucket."""
    if artifacts := os.environ.get("ANYSCALE_ARTIFACT_STORAGE"):
        return join_uri(artifacts, "anneal")
    if CLUSTER_STORAGE.is_dir():
        return str(CLUSTER_STORAGE / "anneal")
    return f"s3://{EMBEDDED_BUCKET}/runs"


def checkpoint_key(step: int, file: str = "") -> str:
    """The key of a checkpoint (or of a file in it), relative to the run: zero-padded, so that keys sort by step."""
    return f"{CHECKPOINTS}/step-{step:06d}/{file}"


def checkpoint_uri(run_uri: str, step: int) -> str:
    """A checkpoint's URI."""
    return join_uri(run_uri, checkpoint_key(step))


def run_digest(run_uri: str) -> str:
    """Tells runs of one name in different places apart, where a URI cannot stand."""
    return hashlib.sha256(run_uri.encode()).hexdigest()[:16]


def run_of(checkpoint: str) -> str:
    """A checkpoint's URI -> its run's; nothing of what is no run's checkpoint."""
    run, _, name = checkpoint.rstrip("/").rpartition(f"/{CHECKPOINTS}/")
    return run if re.fullmatch(r"step-\d+", name) else ""


def export_uri(run_uri: str, step: int, kind: str) -> str:
    """Where an export of a checkpoint goes when nothing says otherwise."""
    return join_uri(run_uri, EXPORTS, f"step-{step:06d}-{kind}")


def evaluation_key(name: str) -> str:
    """The key of an evaluation's rows, relative to the run."""
    return f"{EVALUATIONS}/{name}.jsonl"


def claim_key(number: int) -> str:
    """The key of a claim on the run, relative to it; the highest number counts."""
    return f"{CLAIMS}/{number:06d}.json"


def use_key(checkpoint: str, run_uri: str) -> str:
    """The key, in the run of a checkpoint, of the mark that another run started from it."""
    step = checkpoint.rstrip("/").rpartition("/")[2]
    return f"{USES}/{step}/{run_digest(run_uri)}.json"


def step_of_use(key: str) -> int:
    """The step of the checkpoint that a mark is about."""
    return int(key.split("/")[1].removeprefix("step-"))


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Record):
    """A file of a checkpoint as it was staged."""

    path: str
    """Relative to the checkpoint."""
    size: int
    """Bytes."""
    checksum: str
    """`crc64nvme:<hex>` of the content."""


class DataPosition(_Record):
    """Where the next optimizer step reads from."""

    epoch: int
    """Whole epochs trained."""
    steps_in_epoch: int
    """Optimizer steps taken in the epoch that has begun."""
    rows_seen: int
    """Rows trained since step 0, padding rows not counted."""


class DataFingerprints(_Record):
    """What the rows were, as tokens: equal for the same content wherever it lies."""

    train: str
    valid: str | None


class Manifest(_Record):
    """Written last: a checkpoint exists when its manifest does, and is whole when every file matches it."""

    format: Literal[1] = 1
    step: int
    epoch: float
    eval_loss: float | None
    world_size: int
    zero_stage: int
    config_hash: str
    data: DataFingerprints
    data_position: DataPosition
    parent: str | None
    """URI of the weights or the checkpoint that the run started from."""
    created: str
    """UTC, ISO 8601."""
    versions: dict[str, str]
    files: list[FileRecord]


class Export(_Record):
    """Written last into an export: it exists when this does, and is whole when every file matches it."""

    format: Literal[1] = 1
    checkpoint: str
    """URI of what was exported."""
    uri: str
    """Where it was written."""
    kind: Literal["model", "merged", "adapter"]
    dtype: Literal["bf16", "fp16", "fp32"] | None
    """Of the weights; None: an adapter's own."""
    gguf: str | None
    """The GGUF file beside them."""
    notes: list[str]
    """What a person should know of how it was made."""
    created: str
    """UTC, ISO 8601."""
    versions: dict[str, str]
    files: list[FileRecord]


class Claim(_Record):
    """Who trains the run now."""

    number: int
    token: str
    """Random: tells claims of one number apart."""
    owner: str
    """For people: who and where."""
    since: str
    """UTC, ISO 8601."""
    machine: str
    process: int
    """Of the driver, on that machine."""
    process_started: float
    """Seconds after that machine's boot."""

    def owner_lives(self) -> bool | None:
        """What the kernel says of its driver; None where that is on another machine, and only renewing tells."""
        if self.machine != this_machine():
            return None
        return started_after_boot(self.process) == self.process_started


class CheckpointUse(_Record):
    """A run that started from this run's checkpoint and needs it until it is completed."""

    run_uri: str


class EvalLoss(_Record):
    """One evaluation; `eval_loss` is nats a trained token, weighted by tokens."""

    step: int
    epoch: float
    eval_loss: float
    figures: dict[str, float] = {}
    """What the task reports beside the loss: accuracy and f1 of a classification, rewards of preference tuning."""


class MetricsLine(BaseModel):
    """A line of metrics.jsonl: an optimizer step (`loss`) or an evaluation (`eval_loss`), and what else was measured."""

    model_config = ConfigDict(frozen=True, extra="allow")

    step: int
    epoch: float
    loss: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None


def eval_figures(logged: Mapping[str, Any]) -> dict[str, float]:
    """What a line of metrics.jsonl holds of an evaluation beside its loss."""
    return {
        name.removeprefix("eval_"): value
        for name, value in logged.items()
        if name.startswith("eval_") and name != "eval_loss"
    }


def is_metric(logged: Mapping[str, Any]) -> bool:
    """Whether what a trainer logged is of a step or of an evaluation."""
    return "loss" in logged or "eval_loss" in logged


def metrics_lines(log: Sequence[Mapping[str, Any]]) -> str:
    """The lines of metrics.jsonl, from all that a trainer has logged since step 0."""
    return "".join(json.dumps(logged) + "\n" for logged in log if is_metric(logged))


Phase = Literal["data", "forward", "backward", "optimizer", "evaluation", "saving", "upload_stall", "other"]
"""Where the time of training goes; training/speed.py says what each means."""


class Speed(_Record):
    """How fast an attempt trained: over its steps, all workers together, evaluation and saving left out."""

    tokens_per_second: float = 0.0
    """Of the rows, padding not counted."""
    trained_tokens_per_second: float = 0.0
    """Those of them that the loss looks at."""
    mfu: float | None = None
    """Model FLOPs utilisation, 0 to 1: the operations a second that training needs (training/flops.py), over those that the
    devices can do at most; None where either is not known."""
    peak_memory_bytes: int = 0
    """Of the first worker: on a GPU what its tensors took at most, else its process's resident memory."""
    seconds: dict[Phase, float] = {}
    """By phase, of the first worker, from the beginning of training."""


class RunResult(_Record):
    """What `result.json` holds and `--json` prints."""

    status: RunStatus
    reason: str
    stop_signal: int | None = None
    """The number of the signal that stopped it, if one did."""
    run_name: str
    run_uri: str
    best_checkpoint: str | None
    last_checkpoint: str | None
    eval_losses: list[EvalLoss]
    train_steps: int
    tokens: int
    """Tokens of the rows trained on since step 0, earlier attempts included, padding not counted."""
    trained_tokens: int
    """Those of them that the loss looks at."""
    tokens_per_second: float
    """As in `speed`."""
    speed: Speed = Speed()
    """Of this attempt, until its last checkpoint."""
    elapsed_seconds: float
    """Of this attempt: from the driver's start to the result."""
    parent: str | None
    trainable_parameters: int
    failures: list[str] = []
    """Why workers were lost and started again in this attempt."""
    log_files: list[str]
    """Library output of the driver and the workers, as paths on their nodes."""
    versions: dict[str, str]
    ended: str | None = None
    """UTC, ISO 8601; None in results of before it was told."""

    @property
    def chosen(self) -> Literal["best", "latest"]:
        """Which one `best_checkpoint` is: the best by eval loss, or the latest if none was evaluated."""
        evaluated = {checkpoint_uri(self.run_uri, loss.step) for loss in self.eval_losses}
        return "best" if self.best_checkpoint in evaluated else "latest"

    @property
    def exit_code(self) -> int:
        """What main.py ends with: 0 done, 1 failed, 128 + the signal that stopped it."""
        if self.stop_signal is not None:
            return 128 + self.stop_signal
        return 0 if self.status == "completed" else 1
