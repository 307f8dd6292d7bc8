"""`main.py serve --dry-run`: check the bucket, the models and the memory that jobs need, without a cluster."""

import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from configs.loading import LoadedConfig, load_config, to_yaml
from service.config import LoadedService
from service.job_config import JobConfigError, check_settings, resolve_hyperparameters, training_config
from training.planning.endpoints import ClusterTarget, set_ray_environment
from training.planning.planner import make_plan
from training.planning.report import PlanReport
from utils.errors import AnnealError
from utils.files import format_bytes
from utils.storage.bucket import check_writable


class DryRunError(AnnealError):
    """A base model that jobs cannot train."""


def check_service(service: LoadedService, target: ClusterTarget, console: Console) -> None:
    """Check everything that the service needs before it starts, and print what it found.

    Raises:
        AnnealError: with the key of the service YAML, what is wrong and the fix.
    """
    set_ray_environment(target)
    check_writable(service.config.storage_path)
    lines = [f"storage_path: {service.config.storage_path} is writable"]
    with tempfile.TemporaryDirectory(prefix="anneal-") as directory:
        for name, base in service.bases.items():
            for method in ("supervised", "dpo"):
                lines += _lines_of(name, method, service, base, target, Path(directory))
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)


def _lines_of(
    name: str,
    method: str,
    service: LoadedService,
    base: LoadedConfig,
    target: ClusterTarget,
    directory: Path,
) -> list[str]:
    """Return what jobs of one method need, or why this base model has none."""
    settings = service.config.models[name]
    job = {
        "id": "dry-run",
        "seed": 0,
        "method": method,
        "hyperparameters": resolve_hyperparameters(method, {}, settings, base.config),
        "validation_file": "valid.jsonl",
        "parent_checkpoint": None,
        "integrations": None,
    }
    if method == "dpo":
        try:
            check_settings(job, base.config)
        except JobConfigError as error:
            return [f"models.{name}: dpo jobs are rejected: {error}"]
    try:
        report = _plan(job, base, target, directory)
    except AnnealError as error:
        raise DryRunError(f"models.{name}: {error}") from error
    size = f"{report.parameters:,} parameters, {report.trainable_parameters:,} trainable"
    return [
        f"models.{name}: {method}: {report.model} ({size}), {_memory(report)}",
        *(f"warning: models.{name}: {method}: {warning}" for warning in report.warnings),
    ]


def _plan(job: dict[str, Any], base: LoadedConfig, target: ClusterTarget, directory: Path) -> PlanReport:
    """Plan a job of short rows: one step."""
    count, row = job["hyperparameters"]["batch_size"], _pair if job["method"] == "dpo" else _chat
    rows, valid = directory / "rows.jsonl", directory / "valid.jsonl"
    rows.write_text("".join(row(number) for number in range(count)), "utf-8")
    valid.write_text(row(count), "utf-8")
    paths = {"train": str(rows), "valid": str(valid), "storage": str(directory / "runs"), "publish": None}
    yaml = directory / "job.yaml"
    yaml.write_text(to_yaml(training_config(job, base.config, paths)), "utf-8")
    _, report, _ = make_plan(load_config(yaml), target=target)
    return report


def _chat(number: int) -> str:
    """Return a short row of training data."""
    messages = [
        {"role": "user", "content": f"What is {number}?"},
        {"role": "assistant", "content": "A number."},
    ]
    return json.dumps({"messages": messages}) + "\n"


def _pair(number: int) -> str:
    """Return a short row of preferences."""
    answers = {
        name: [{"role": "assistant", "content": text}]
        for name, text in (("preferred_output", "A number."), ("non_preferred_output", "No."))
    }
    question = {"messages": [{"role": "user", "content": f"What is {number}?"}]}
    return json.dumps({"input": question, **answers}) + "\n"


def _memory(report: PlanReport) -> str:
    if report.memory is None:
        return "memory unknown for this architecture"
    verdict = f", {report.memory.verdict}" if report.memory.verdict else ""
    return f"{format_bytes(report.memory.total)} per device for short rows{verdict}"
