"""The layout of a run in the bucket: its paths and its typed records. No other module builds these paths."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from utils.processes import started_after_boot, this_machine
from utils.storage.bucket import EMBEDDED_BUCKET, join_uri

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
LEASES = "claim"
STOPS = "stop"
USES = "used-by"
EXPORTS = "exports"
MODELS = "models"
"""Directory in a storage path: base models that were uploaded with submitted LoRA runs."""
EXPORT_FILE = "EXPORT.json"
EVALUATIONS = "evaluations"
SAMPLES = "samples"

LEASE_EXPIRES_SECONDS = 30.0
"""A lease that was not renewed for this long has expired."""

RunStatus = Literal["completed", "stopped", "failed"]


CLUSTER_STORAGE = Path("/mnt/cluster_storage")
"""A directory shared by all nodes of an Anyscale cluster; exists only there."""


def default_storage() -> str:
    """Return the default storage path: Anyscale's artifact storage, its shared directory, or the embedded bucket."""
    if artifacts := os.environ.get("ANYSCALE_ARTIFACT_STORAGE"):
        return join_uri(artifacts, "anneal")
    if CLUSTER_STORAGE.is_dir():
        return str(CLUSTER_STORAGE / "anneal")
    return f"s3://{EMBEDDED_BUCKET}/runs"


def checkpoint_key(step: int, file: str = "") -> str:
    """Return the key of a checkpoint (or of a file in it) relative to the run, zero-padded so that keys sort by step."""
    return f"{CHECKPOINTS}/step-{step:06d}/{file}"


def checkpoint_uri(run_uri: str, step: int) -> str:
    """Return a checkpoint's URI."""
    return join_uri(run_uri, checkpoint_key(step))


def run_digest(run_uri: str) -> str:
    """Return a short id that distinguishes runs of the same name, for names that cannot contain a URI."""
    return hashlib.sha256(run_uri.encode()).hexdigest()[:16]


def run_of(checkpoint: str) -> str:
    """Return the URI of the run that a checkpoint URI belongs to; empty if it is not a run's checkpoint."""
    run, _, name = checkpoint.rstrip("/").rpartition(f"/{CHECKPOINTS}/")
    return run if re.fullmatch(r"step-\d+", name) else ""


def export_uri(run_uri: str, step: int, kind: str) -> str:
    """Return the default destination of an export of a checkpoint."""
    return join_uri(run_uri, EXPORTS, f"step-{step:06d}-{kind}")


def evaluation_key(name: str) -> str:
    """Return the key of an evaluation's rows, relative to the run."""
    return f"{EVALUATIONS}/{name}.jsonl"


def samples_key(step: int) -> str:
    """Return the key of the samples of an evaluation, relative to the run, zero-padded so that keys sort by step."""
    return f"{SAMPLES}/step-{step:06d}.jsonl"


def step_of_samples(key: str) -> int | None:
    """Return the step of the evaluation whose samples an object holds; None for other objects."""
    found = re.fullmatch(rf"{SAMPLES}/step-(\d+)\.jsonl", key)
    return int(found[1]) if found else None


def lease_key(number: int) -> str:
    """Return the key of a lease on the run, relative to the run; the highest number is valid."""
    return f"{LEASES}/{number:06d}.json"


def stop_key(token: str) -> str:
    """Return the key of a request to stop the driver whose lease has this token, relative to the run."""
    return f"{STOPS}/{token}.json"


def use_key(checkpoint: str, run_uri: str) -> str:
    """Return the key of the record, in a checkpoint's run, that another run started from the checkpoint."""
    step = checkpoint.rstrip("/").rpartition("/")[2]
    return f"{USES}/{step}/{run_digest(run_uri)}.json"


def step_of_use(key: str) -> int:
    """Return the step of the checkpoint that a use record refers to."""
    return int(key.split("/")[1].removeprefix("step-"))


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Record):
    """A file of a checkpoint as it was staged for upload."""

    path: str
    """Path relative to the checkpoint."""
    size: int
    """Size in bytes."""
    checksum: str
    """Checksum of the content: `crc64nvme:<hex>`."""


class DataPosition(_Record):
    """The data position at which the next optimizer step starts."""

    epoch: int
    """Completed epochs."""
    steps_in_epoch: int
    """Optimizer steps completed in the current epoch."""
    rows_seen: int
    """Rows trained since step 0, excluding padding rows."""


class DataFingerprints(_Record):
    """Fingerprints of the tokenized rows: equal for the same content in any location."""

    train: str
    valid: str | None


class Manifest(_Record):
    """The record that commits a checkpoint. It is written last; the checkpoint is complete if every file matches it."""

    format: Literal[1] = 1
    step: int
    epoch: float
    eval_loss: float | None
    world_size: int
    zero_stage: int
    offload: list[str] | None = None
    """States that DeepSpeed offloads, and their destinations: `optimizer: cpu`, `param: cpu`; None in older manifests."""
    config_hash: str
    hash_without_devices: str | None = None
    """The hash of all settings but DEVICE_KEYS; None in older manifests."""
    data: DataFingerprints
    data_position: DataPosition
    parent: str | None
    """URI of the weights or the checkpoint that the run started from."""
    created: str
    """UTC, ISO 8601."""
    versions: dict[str, str]
    files: list[FileRecord]


class VllmVerification(_Record):
    """The comparison of an export in vLLM with the model as trained, in nats, over the same tokens."""

    version: str | None = None
    mean_difference: float | None = None
    largest_difference: float | None = None
    error: str | None = None
    """Why vLLM did not score the rows; None if it did."""


class Verification(_Record):
    """The comparison of an export with the model as trained, in nats, over the next tokens of a few rows."""

    rows: int
    tokens: int
    source: str
    """Kind of the rows."""
    mean_difference: float
    """Mean absolute difference of the log-probabilities."""
    largest_difference: float
    mean_rounding: float
    """The same for the model as trained with each weight rounded to the export's dtype."""
    largest_rounding: float
    loss: float | None
    """Mean loss of the export over the loss tokens of these rows; None without loss tokens."""
    loss_as_trained: float | None
    vllm: VllmVerification | None = None
    """None if vLLM is not installed, or `verify` was not set."""


class Export(_Record):
    """The record that commits an export. It is written last; the export is complete if every file matches it."""

    format: Literal[1] = 1
    checkpoint: str
    """URI of the exported checkpoint."""
    uri: str
    """URI of the export."""
    kind: Literal["model", "merged", "adapter"]
    dtype: Literal["bf16", "fp16", "fp32"] | None
    """Data type of the weights; None: an adapter's own."""
    gguf: str | None
    """Name of the additional GGUF file, if any."""
    notes: list[str]
    """Notes for users about the conversion."""
    created: str
    """UTC, ISO 8601."""
    versions: dict[str, str]
    verification: Verification | None = None
    """None if it was turned off, or the machine had too little memory for it."""
    files: list[FileRecord]


class Lease(_Record):
    """The driver that currently trains the run."""

    number: int
    token: str
    """Random; distinguishes leases with the same number."""
    owner: str
    """Human-readable user and host."""
    since: str
    """UTC, ISO 8601."""
    machine: str
    process: int
    """Process id of the driver on that machine."""
    process_started: float
    """Start of that process in seconds after the machine's boot."""

    def owner_lives(self) -> bool | None:
        """Return whether the driver process is alive; None on another machine, where only renewals show it."""
        if self.machine != this_machine():
            return None
        return started_after_boot(self.process) == self.process_started


class StopRequest(_Record):
    """A request to the driver of a run to commit a checkpoint and exit."""

    requested_by: str
    """Human-readable user and host."""


class CheckpointUse(_Record):
    """A run that started from this run's checkpoint and needs it until it has completed."""

    run_uri: str


class EvalLoss(_Record):
    """One evaluation; `eval_loss` is in nats per loss token, weighted by tokens."""

    step: int
    epoch: float
    eval_loss: float
    figures: dict[str, float] = {}
    """Other metrics of the task: accuracy and f1 for classification, rewards for preference tuning."""


class EvalSample(_Record):
    """The answer to one validation prompt at an evaluation. Long texts are cut and then have an ellipsis."""

    step: int
    row: str
    """Source location of the row, `FILE:ROW`."""
    prompt: str
    """End of the prompt as it was rendered, with the generation prompt."""
    completion: str
    """Text that the model generated, without the stop token."""
    reference: str
    """The row's own answer; empty if it has none."""
    tokens: int
    """Generated tokens, including the stop token."""
    ended: bool
    """True if the model generated a stop token within eval_max_new_tokens."""


class MetricsLine(BaseModel):
    """A line of metrics.jsonl: an optimizer step (`loss`) or an evaluation (`eval_loss`), with further metrics."""

    model_config = ConfigDict(frozen=True, extra="allow")

    step: int
    epoch: float
    loss: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None


def eval_figures(logged: Mapping[str, Any]) -> dict[str, float]:
    """Return the evaluation metrics of a metrics.jsonl line, excluding the loss."""
    return {
        name.removeprefix("eval_"): value
        for name, value in logged.items()
        if name.startswith("eval_") and name != "eval_loss"
    }


def is_metric(logged: Mapping[str, Any]) -> bool:
    """Return whether a trainer's log entry belongs to a step or an evaluation."""
    return "loss" in logged or "eval_loss" in logged


def metrics_lines(log: Sequence[Mapping[str, Any]]) -> str:
    """Return the text of metrics.jsonl from all log entries of a trainer since step 0."""
    return "".join(json.dumps(logged) + "\n" for logged in log if is_metric(logged))


Phase = Literal["data", "forward", "backward", "optimizer", "evaluation", "saving", "upload_stall", "other"]
"""Phases that training time is divided into; training/loop/throughput.py defines each."""


class Speed(_Record):
    """Training speed of an attempt over its steps: all workers together, excluding evaluation and saving."""

    tokens_per_second: float = 0.0
    """Tokens of the rows, excluding padding."""
    trained_tokens_per_second: float = 0.0
    """Loss tokens: tokens that contribute to the loss."""
    mfu: float | None = None
    """Model FLOPs utilization, 0 to 1: FLOPs per second that training needs (training/planning/flops.py), divided by the peak FLOPs
    of the devices; None if either is unknown."""
    peak_memory_bytes: int = 0
    """Peak memory of the first worker: of its tensors on a GPU, otherwise the resident memory of its process."""
    seconds: dict[Phase, float] = {}
    """Seconds per phase of the first worker, from the start of training."""


class RunResult(_Record):
    """The content of `result.json` and of `--json`."""

    status: RunStatus
    reason: str
    stop_signal: int | None = None
    """Number of the signal that stopped the run, if any."""
    run_name: str
    run_uri: str
    best_checkpoint: str | None
    last_checkpoint: str | None
    eval_losses: list[EvalLoss]
    train_steps: int
    tokens: int
    """Tokens of the rows trained on since step 0, including earlier attempts and excluding padding."""
    trained_tokens: int
    """Loss tokens among them."""
    tokens_per_second: float
    """Same as in `speed`."""
    speed: Speed = Speed()
    """Speed of this attempt, until its last checkpoint."""
    elapsed_seconds: float
    """Duration of this attempt, from the start of the driver to the result."""
    parent: str | None
    trainable_parameters: int
    failures: list[str] = []
    """Reasons for the restarts of workers in this attempt."""
    log_files: list[str]
    """Library output of the driver and the workers, as paths on their nodes."""
    versions: dict[str, str]
    ended: str | None = None
    """UTC, ISO 8601; None in results of earlier versions."""

    @property
    def chosen(self) -> Literal["best", "latest"]:
        """Return which checkpoint `best_checkpoint` is: the best by eval loss, or the latest if none was evaluated."""
        evaluated = {checkpoint_uri(self.run_uri, loss.step) for loss in self.eval_losses}
        return "best" if self.best_checkpoint in evaluated else "latest"

    @property
    def exit_code(self) -> int:
        """Return the exit code of main.py: 0 done, 1 failed, 128 + the signal that stopped it."""
        if self.stop_signal is not None:
            return 128 + self.stop_signal
        return 0 if self.status == "completed" else 1
