"""report.html: one self-contained page with everything about a run."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runs.charts import report_charts
from runs.layout import DATA_PAGE_FILE, EvalSample, Manifest, MetricsLine, RunResult, checkpoint_uri
from runs.reading import overall_speed
from utils.command_line import ADDRESS_VARIABLE
from utils.files import format_bytes
from utils.page import render_page
from utils.storage.bucket import is_remote, local_path, uses_embedded_bucket

_TEMPLATE = Path(__file__).with_suffix(".html.j2")


@dataclass(frozen=True)
class RunReport:
    """The content of the page."""

    result: RunResult
    metrics: Sequence[MetricsLine]
    parent_metrics: Sequence[MetricsLine]
    """Metrics of the parent run, up to the checkpoint that this run started from."""
    samples: Sequence[EvalSample]
    """Answers to validation prompts, in the order of their evaluations."""
    checkpoints: Sequence[Manifest]
    data: Sequence[tuple[str, str]]
    """Names and values of the data's key figures, as text."""
    config: str
    """The resolved YAML."""
    environment: Mapping[str, str]
    """Names and values, as text."""
    command: Sequence[str]
    """The command line that started the run."""
    base_model: str
    """Hub id, directory or URI of the base model."""
    trains_adapter: bool


def to_html(report: RunReport) -> str:
    """Return the page."""
    result = report.result
    return render_page(
        _TEMPLATE,
        report=report,
        summary=_summary(report),
        charts=report_charts(report.metrics, report.parent_metrics, result.eval_losses),
        samples=_by_prompt(report.samples),
        data_page=DATA_PAGE_FILE,
        locations={manifest.step: _location(result, manifest.step) for manifest in report.checkpoints},
        commands=_commands(report),
        environment=[
            *report.environment.items(),
            *result.versions.items(),
            ("library output", " ".join(result.log_files)),
        ],
    )


def _summary(report: RunReport) -> list[tuple[str, str]]:
    result = report.result
    losses = [loss.eval_loss for loss in result.eval_losses]
    speed, peak = overall_speed(result, report.metrics), result.speed.peak_memory_bytes
    return [
        ("status", f"{result.status}: {result.reason}"),
        *((f"restart {number}", failure) for number, failure in enumerate(result.failures, 1)),
        ("eval loss", f"{losses[0]:.4f} initial, {min(losses):.4f} lowest" if losses else "none"),
        ("started from", result.parent or report.base_model),
        (
            "trained",
            f"{result.train_steps:,} steps, {result.tokens:,} tokens ({result.trained_tokens:,} loss tokens)",
        ),
        *([("throughput", f"{speed:,.0f} tokens/s, all workers")] if speed else []),
        *([("peak memory", f"{format_bytes(peak)}, first worker")] if peak else []),
        ("duration", f"{result.elapsed_seconds:,.0f} s, the latest attempt"),
        ("ended", result.ended or ""),
        ("trainable parameters", f"{result.trainable_parameters:,}"),
        ("run", result.run_uri),
    ]


def _by_prompt(samples: Sequence[EvalSample]) -> list[list[EvalSample]]:
    """Return the answers to each prompt."""
    prompts: dict[tuple[str, str], list[EvalSample]] = {}
    for sample in samples:
        prompts.setdefault((sample.row, sample.prompt), []).append(sample)
    return list(prompts.values())


def _location(result: RunResult, step: int) -> tuple[str, str | None]:
    """Return a checkpoint's URI and, for a local directory, the URL of a link to it."""
    uri = checkpoint_uri(result.run_uri, step)
    return uri, None if is_remote(uri) else local_path(uri).as_uri()


def _commands(report: RunReport) -> list[tuple[str, str]]:
    """Return (purpose, command or YAML line) pairs for the next steps that the run's state allows."""
    result = report.result
    commands = []
    if result.status != "completed":
        purpose = "Resume from the latest checkpoint:" if result.last_checkpoint else "Restart:"
        commands.append((purpose, shlex.join(report.command)))
    elif result.best_checkpoint:
        key = "initial_adapter_model_ckpt_path" if report.trains_adapter else "initial_base_model_ckpt_path"
        purpose = f"Start a new run from the {result.chosen} checkpoint. Set in its YAML:"
        commands.append((purpose, f"{key}: {result.best_checkpoint}"))
    if result.last_checkpoint:
        purpose = "Train longer from the complete training state. Copy the YAML, change run_name, raise num_epochs and set:"
        commands.append((purpose, f"resume_from_checkpoint: {result.last_checkpoint}"))
    if result.best_checkpoint:
        commands += _commands_on_the_model(report, result.best_checkpoint)
    return commands


def _commands_on_the_model(report: RunReport, checkpoint: str) -> list[tuple[str, str]]:
    result = report.result
    # the Python and main.py that trained the run
    main = [word for word in report.command if not word.startswith(f"{ADDRESS_VARIABLE}=")][:2]
    export = shlex.join([*main, "export", result.run_uri, "--to", "exported"])
    purpose = (
        f"Merge the {result.chosen} adapter into its base model"
        if report.trains_adapter
        else f"Export the {result.chosen} model"
    )
    commands = [
        (f"Chat with the {result.chosen} checkpoint:", shlex.join([*main, "chat", result.run_uri])),
        (
            "Generate and score answers to held-out rows:",
            shlex.join([*main, "evaluate", result.run_uri, "--data", "test.jsonl"]),
        ),
        (f"{purpose}, then serve it (requires vLLM):", f"{export}\nvllm serve exported"),
    ]
    if checkpoint.startswith("s3://") and not uses_embedded_bucket(checkpoint):
        name = checkpoint.rpartition("/")[2]
        purpose = f"Download the {result.chosen} checkpoint (requires the AWS CLI):"
        commands.append((purpose, shlex.join(["aws", "s3", "cp", "--recursive", checkpoint, name])))
    return commands
