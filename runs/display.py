"""Print runs to a console as tables and facts."""

import re
import textwrap
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from runs.comparison import Comparison
from runs.layout import REPORT_FILE, EvalLoss, EvalSample
from runs.summaries import RunDetails, RunSummary
from utils.files import format_bytes

_NARROWEST = 20
"""Columns of a value below which wrapping would not help."""
_WIDEST = 1000
_SAMPLE_CHARACTERS = 300


def show_runs(console: Console, runs: Sequence[RunSummary]) -> None:
    """Print one line per run; on a terminal, its reason is a line of its own, truncated to the available width."""
    table = _table("run", "status", ">best eval loss", ">steps", ">active", "")
    reasons = ["" if run.status == "completed" else " ".join(run.reason.split()) for run in runs]
    for run, reason in zip(runs, reasons, strict=True):
        cells = (run.run_name, run.status, _loss(run.best_eval_loss), f"{run.steps:,}", _age(run.age_seconds))
        table.add_row(*cells, "" if console.is_terminal else reason)
    if not console.is_terminal:
        _print_table(console, table)
        return
    # Wider than the terminal, because a name is copied as one line.
    lines = console.render_lines(table, console.options.update(width=_WIDEST), pad=False)
    for line, reason in zip(lines, ["", *reasons], strict=True):
        text = Text.assemble(*((segment.text, segment.style or "") for segment in line))
        text.rstrip()
        console.print(text, soft_wrap=True)
        if reason:
            console.print(Text(f"  {reason}", style="dim"), no_wrap=True, overflow="ellipsis")


def show_run(console: Console, run: RunDetails) -> None:
    """Print the details of one run and the possible next steps."""
    if run.eval_losses:
        print_eval_losses(console, run.eval_losses)
        console.print()
    if run.samples:
        print_samples(console, run.samples)
        console.print()
    if run.checkpoints:
        table = _table(">step", ">epoch", ">eval loss", ">size", "committed (UTC)", "checkpoint of this run")
        for checkpoint in run.checkpoints:
            table.add_row(
                f"{checkpoint.step:,}",
                f"{checkpoint.epoch:.2f}",
                _loss(checkpoint.eval_loss),
                format_bytes(checkpoint.size),
                datetime.fromisoformat(checkpoint.created).astimezone(UTC).strftime("%Y-%m-%d %H:%M"),
                checkpoint.uri.removeprefix(f"{run.run_uri}/"),
            )
        _print_table(console, table)
        console.print()
    facts = [
        ("run", run.run_uri),
        ("status", describe_status(run)),
        *(
            [("training loss", f"{run.train_loss:.4f} at step {run.steps:,}, the latest that is recorded")]
            if run.train_loss is not None
            else []
        ),
        ("last activity", _age(run.age_seconds) + " ago" if run.age_seconds is not None else "unknown"),
        *(
            ("" if number else key, line)
            for key in ("model_id", "train_path", "valid_path")
            for number, line in enumerate(_uris(run.config.get(key)))
        ),
    ]
    if run.result:
        is_older = run.status != run.result.status
        facts += [
            ("started from", run.result.parent or f"{run.config.get('model_id', 'the model')}, unchanged"),
            (
                "trained",
                describe_training(run) + (", at the end of the previous attempt" if is_older else ""),
            ),
            ("versions", ", ".join(f"{name} {version}" for name, version in run.result.versions.items())),
            *log_facts(run.result.log_files, " (the previous attempt's)" if is_older else ""),
        ]
    print_facts(console, [*facts, *(("damaged", line) for line in run.damage), *_next(run)])


def _uris(value: Any) -> list[str]:
    """Return the sources that a key names, one per line: a URI, a list of them, sources with weights, or named sources."""
    if isinstance(value, dict) and "path" in value:
        weight = value.get("weight")
        return [value["path"] if weight is None else f"{value['path']} (weight {weight:g})"]
    if isinstance(value, dict):
        return [f"{name}: {uri}" for name, below in value.items() for uri in _uris(below)]
    if isinstance(value, list):
        return [uri for below in value for uri in _uris(below)]
    return [str(value)] if value else []


def describe_status(run: RunSummary) -> str:
    """Return the status of a run with its reason."""
    return f"{run.status}: {run.reason}" if run.reason else run.status


def _next(run: RunDetails) -> list[tuple[str, str]]:
    """Return the ways to continue a run that no driver trains."""
    lines = []
    if run.status in ("stopped", "failed", "interrupted"):
        what = "resumes it from its latest checkpoint" if run.checkpoints else "starts it again at step 0"
        lines.append(f"the same command as before {what}")
    if run.checkpoints and run.status != "running":
        latest = run.checkpoints[-1].uri
        lines.append("to train a new run on from here, add to its YAML:")
        lines.append(f"resume_from_checkpoint: {latest}")
    return [("next" if line is lines[0] else "", line) for line in lines]


def describe_training(run: RunDetails) -> str:
    """Return steps, tokens and speed of a run with a result, as one line."""
    assert run.result is not None
    speed = f"{run.tokens_per_second:,.0f} tokens/s, " if run.tokens_per_second else ""
    return (
        f"{run.result.train_steps:,} steps, {run.result.tokens:,} tokens ({run.result.trained_tokens:,} loss tokens), "
        f"{speed}{run.result.trainable_parameters:,} trainable parameters"
    )


def show_comparison(console: Console, comparison: Comparison, picture: Path | None) -> None:
    """Print metrics of runs side by side, differing settings, and the location of the chart."""
    runs = comparison.runs
    results = [run.result for run in runs]
    facts: dict[str, Sequence[Any]] = {
        "status": [run.status for run in runs],
        "best eval loss": [_loss(run.best_eval_loss) for run in runs],
        "last eval loss": [_loss(run.eval_losses[-1].eval_loss if run.eval_losses else None) for run in runs],
        "steps": [f"{run.steps:,}" for run in runs],
        "tokens trained on": [f"{result.tokens:,}" if result else "" for result in results],
        "tokens/s": [f"{run.tokens_per_second:,.0f}" if run.tokens_per_second else "" for run in runs],
        "trainable parameters": [f"{result.trainable_parameters:,}" if result else "" for result in results],
    }
    table = _table("", *(run.run_name for run in runs))
    for name, values in facts.items():
        if any(values):
            table.add_row(name, *values)
    _print_table(console, table)
    console.print()
    _print_differences(console, comparison)
    console.print()
    drawn = str(picture.absolute()) if picture else "none: no run has an eval loss"
    print_facts(console, [("curves", drawn)])
    for run in runs:
        for line in run.damage:
            show_warning(console, f"{run.run_name} is damaged: {line}")
    if comparison.incomparable_by:
        differing = ", ".join(comparison.incomparable_by)
        show_warning(
            console, f"the eval losses are not comparable, because these settings differ: {differing}"
        )


def _print_differences(console: Console, comparison: Comparison) -> None:
    """Print the settings that differ between the runs whose settings are recorded, and name the other runs."""
    recorded = [run for run in comparison.runs if run.config]
    if comparison.differences:
        table = _table("setting", *(run.run_name for run in recorded))
        for key, values in comparison.differences.items():
            settings = zip(comparison.runs, values, strict=True)
            table.add_row(key, *(_setting(run, key, value) for run, value in settings if run.config))
        _print_table(console, table)
    elif len(recorded) > 1:
        console.print("The settings are identical.")
    for run in comparison.runs:
        if not run.config:
            console.print(Text(f"{run.run_name}: its settings are not recorded yet"), soft_wrap=True)


def show_warning(console: Console, warning: str) -> None:
    """Print a warning line."""
    console.print(Text.assemble(("warning: ", "yellow"), warning))


def print_eval_losses(console: Console, losses: Sequence[EvalLoss]) -> None:
    """Print one line per evaluation and mark the lowest loss, which may have no checkpoint; there must be at least one."""
    beside = list(losses[0].figures)
    table = _table(">step", ">epoch", ">eval loss", ">", *(f">{short_name(name)}" for name in beside))
    lowest = min(loss.eval_loss for loss in losses)
    for loss in losses:
        mark = "lowest" if loss.eval_loss == lowest else ""
        figures = [f"{loss.figures[name]:.4f}" for name in beside]
        table.add_row(str(loss.step), f"{loss.epoch:.2f}", f"{loss.eval_loss:.4f}", mark, *figures)
    _print_table(console, table)


def print_samples(console: Console, samples: Sequence[EvalSample]) -> None:
    """Print the answers of one evaluation; there must be at least one."""
    count = f"{len(samples)} validation prompt{'s' if len(samples) > 1 else ''}"
    console.print(Text(f"answers to {count} at step {samples[0].step:,}, complete in {REPORT_FILE}:"))
    for sample in samples:
        end = "" if sample.ended else f" … (cut after {sample.tokens:,} tokens)"
        facts = [("prompt", _line(sample.prompt, is_end=True)), ("answer", _line(sample.completion) + end)]
        if sample.reference:
            facts.append(("reference", _line(sample.reference)))
        print_facts(console, facts)


def _line(text: str, *, is_end: bool = False) -> str:
    """Return the beginning or the end of a model's text as one line without control characters."""
    line = "".join(letter if letter.isprintable() else "�" for letter in " ".join(text.split()))
    if len(line) <= _SAMPLE_CHARACTERS:
        return line
    return f"…{line[-_SAMPLE_CHARACTERS:]}" if is_end else f"{line[:_SAMPLE_CHARACTERS]}…"


def print_facts(console: Console, facts: Sequence[tuple[str, str]]) -> None:
    """Print one name and value per line. A terminal's lines are wrapped between words, so that URIs and paths can be copied."""
    indent = max([17, *(len(name) + 2 for name, _ in facts)])
    for name, value in facts:
        lines = _wrapped(value, console.width - indent) if console.is_terminal else [value]
        for number, line in enumerate(lines):
            label = "" if number else name
            console.print(Text.assemble((f"{label:<{indent}}", "bold"), line), soft_wrap=True)


def _wrapped(text: str, width: int) -> list[str]:
    """Wrap text between words; return a text with a command, or a line of a YAML, as it is, since it is copied as one line."""
    is_copied = re.search(r"python\S* \S*main\.py ", text) or re.fullmatch(r"\w+: \S+", text)
    if is_copied or width < _NARROWEST:
        return [text]
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [text]


def log_facts(files: Sequence[str], whose: str = "") -> list[tuple[str, str]]:
    """Return the log files as facts to print: one line per file or, for more than two in a directory, per directory.

    Args:
        files: Their paths.
        whose: Added to each line.
    """
    directories: dict[Path, list[Path]] = {}
    for file in map(Path, files):
        directories.setdefault(file.parent, []).append(file)
    lines = []
    for directory, logs in directories.items():
        elsewhere = "" if any(log.exists() for log in logs) else ", on the machine of the worker"
        named = [f"{directory}/*.log ({len(logs)} files)"] if len(logs) > 2 else list(map(str, logs))
        lines += [f"{name}{elsewhere}{whose}" for name in named]
    return [("" if number else "library output", line) for number, line in enumerate(lines)]


def short_name(figure: str) -> str:
    """Return a short column name for a task metric."""
    return figure.removeprefix("rewards/")


def _table(*columns: str) -> Table:
    """Create a table with these column headings; a heading that starts with > is right-aligned."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in columns:
        heading = column.removeprefix(">")
        table.add_column(Text(heading), justify="right" if column != heading else "left", overflow="fold")
    return table


def _print_table(console: Console, table: Table) -> None:
    """Print a table; in a pipe, strip the trailing spaces with which rich pads all lines."""
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        console.print(Text(line.rstrip()), soft_wrap=True)


def _setting(run: RunDetails, key: str, value: Any) -> str:
    if value is not None:
        return str(value)
    continues_adapter = run.config.get("initial_adapter_model_ckpt_path") is not None
    return "as its parent's" if continues_adapter and key.startswith("lora_config") else "-"


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _age(seconds: float | None) -> str:
    """Return a duration in the largest unit with a value of at least two: 5400 -> 90 min."""
    if seconds is None:
        return ""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{max(seconds, 0):.0f} s"
