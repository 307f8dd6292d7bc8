"""Console output of a run: the plan, the progress during training, and the result."""

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from runs.display import log_facts, print_eval_losses, print_facts, short_name, show_warning
from runs.layout import RunResult, Speed
from training.data.report import bars, key_figures
from training.events import (
    CheckpointCommitted,
    Evaluated,
    Event,
    ModelReady,
    Notice,
    Phase,
    Rejected,
    Restored,
    StepDone,
    WorkersFailed,
    WorkersStarted,
    WorkersWaiting,
)
from utils.command_line import main_line
from utils.files import format_bytes

if TYPE_CHECKING:
    from training.launch.submitted_job import SubmittedJob
    from training.planning.memory import MemoryReport
    from training.planning.report import PlanReport

_SECONDS_BETWEEN_LINES = 10
_BAR_WIDTH = 40


def show_plan(console: Console, report: "PlanReport") -> None:
    """Print the resolved plan and example rows with their loss tokens marked."""
    trained = report.trainable_parameters / max(report.parameters, 1)
    rows = [
        ("run", report.run_name),
        ("model", f"{report.model} ({report.architecture}, {report.parameters:,} parameters)"),
        ("trainable", f"{report.trainable_parameters:,} parameters ({trained:.2%})"),
        *([("adapter", report.mixture)] if report.mixture else []),
        *key_figures(report),
        (
            "steps",
            f"{report.steps:,} ({report.steps_per_epoch:,} per epoch, {_describe_step(report)} per step)",
        ),
        ("device", report.device),
        ("parallelism", report.parallelism),
        ("batch", report.batch),
        ("kernels", report.kernels),
    ]
    if report.memory:
        rows.append(("memory", _describe_memory(report.memory)))
    if report.packing:
        rows.append(("packing", report.packing))
    if report.starts_from:
        rows.append(("starts from", report.starts_from))
    if report.tokenizer:
        rows.append(("tokenizer", f"that of {report.tokenizer}, not of the base model"))
    if report.resumes_from:
        rows.append(("resumes from", report.resumes_from))
    if report.cluster:
        rows.append(("cluster", report.cluster))
    rows.append(("results go to", f"{report.run_uri} ({report.storage})"))
    print_facts(console, rows)
    console.print()
    _print_histogram(console, report)
    marks = "in green" if console.is_terminal else "between « and »"
    console.print(Text(f"First, middle and last row; the loss is on the tokens {marks}:", style="bold"))
    for example in report.train.examples:
        text = mark_example(example, colour=console.is_terminal)
        text.rstrip()
        console.print(text, soft_wrap=True)
        console.print()
    for warning in report.warnings:
        show_warning(console, warning)


def _describe_step(report: "PlanReport") -> str:
    count = report.sequences_per_step
    return f"{count:,} {'pack' if report.packing else 'row'}{'s' if count > 1 else ''}"


def _describe_memory(memory: "MemoryReport") -> str:
    estimate = asdict(memory.estimate)
    parts = ", ".join(f"{name} {format_bytes(count)}" for name, count in estimate.items())
    text = f"about {format_bytes(memory.total)} of tensors per device ({parts})"
    if memory.accelerator is None:
        return f"{text}, beside the memory of Python and its libraries"
    if memory.available is None:
        return f"{text}; the memory of {memory.accelerator} is unknown"
    return f"{text}; {memory.verdict} {memory.accelerator} ({format_bytes(memory.available)}), with {memory.kernels}'s kernels"


def _print_histogram(console: Console, report: "PlanReport") -> None:
    console.print(Text("Tokens per training row, before truncation:", style="bold"))
    most = max(report.train.lengths.counts)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column()
    for edge, (label, count) in zip(report.train.lengths.edges, bars(report.train), strict=True):
        over = report.limit is not None and edge >= report.limit
        bar = Text("█" * round(_BAR_WIDTH * count / most) or ("▏" if count else ""))
        table.add_row(label, f"{count:,}", bar.append(" over the limit") if over and count else bar)
    console.print(table)
    console.print()


def show_page(console: Console, page: Path, command: Sequence[str]) -> None:
    """Print the end of a dry run: the path of the data report (HTML), and the command that trains."""
    print_facts(console, [("data report", str(page)), ("next", f"train: {shlex.join(command)}")])


def mark_example(example: Sequence[tuple[str, bool]], *, colour: bool) -> Text:
    """Return a row's text with its loss tokens in green or, without colors, between « and »."""
    text = Text()
    for piece, trained in example:
        if not trained:
            text.append(piece, style="dim")
        elif colour:
            text.append(piece, style="bold green")
        else:
            text.append(f"«{piece}»")
    return text


def show_completed(console: Console) -> None:
    """Print that the run is already completed."""
    console.print(
        "This run is already completed, so nothing is trained. To train again, change a setting or add run_name=NAME."
    )


def show_submitted(
    console: Console, job: "SubmittedJob", results: str, command: Sequence[str], *, sample: int | None
) -> None:
    """Print the job's id and address, and the commands to follow, stop and resume it.

    Args:
        console: Where to print.
        job: The job.
        results: Where the results go, as far as it is known.
        command: The command that submitted the job.
        sample: Number of rows that were checked, if the job checks more; otherwise None.
    """
    print_facts(
        console,
        [
            ("job", f"{job.submission_id} at {job.address}"),
            *([("rows", f"{sample:,} checked here, the job checks all")] if sample else []),
            ("results go to", results),
            ("follow", shlex.join(job.follow_command)),
            ("stop", f"{shlex.join(job.stop_command)}  (commits a checkpoint first)"),
            ("resume", f"{shlex.join(command)}  (the same command, after the job has exited)"),
        ],
    )


def show_error(console: Console, message: str) -> None:
    """Print an error message."""
    console.print(Text.assemble(("error: ", "bold red"), message))


class _Steps(MofNCompleteColumn):
    """The number of steps, such as 3/10; empty for a phase without steps."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total is not None else Text()


class Watch:
    """The progress display of a run: a progress bar in a terminal, plain lines in a log."""

    def __init__(self, console: Console):
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            _Steps(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
            transient=True,
            # Library output belongs in the log file, not above the progress bar.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._progress.add_task("starting", total=None, figures="")
        self._phase = ""
        self._said = 0.0

    def __enter__(self) -> "Watch":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take the progress bar off the terminal, so that another console can print there."""
        self._progress.stop()
        yield
        self._progress.start()

    def phase(self, text: str) -> None:
        """Show a phase before training starts."""
        self._progress.update(self._task, description=text)
        if not self._console.is_terminal and text != self._phase:
            self._console.print(Text(f"… {text}"))
        self._phase = text

    def checking(self, what: str, fraction: float | None = None, figures: str = "") -> None:
        """Show the progress of a check; a log gets one line at the start and then one every ten seconds."""
        self.phase(f"checking the {what}")
        if fraction is None:
            self._progress.update(self._task, completed=0, total=None, figures="")
            self._said = time.monotonic()
            return
        self._progress.update(self._task, completed=int(100 * fraction), total=100, figures=figures)
        if not self._console.is_terminal and time.monotonic() - self._said > _SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            self._line(f"  {figures} ({fraction:.0%})")

    def on_event(self, event: Event) -> None:
        """Show an event emitted by the workers."""
        match event:
            case Phase(text, fraction):
                self.phase(text)
                if fraction is not None:
                    self._progress.update(self._task, description=f"{text} {fraction:.0%}")
            case ModelReady(parameters, trainable):
                self._line(f"model built: {parameters:,} parameters, {trainable:,} trainable")
            case StepDone(step, max_steps, _, loss, tokens_per_second, mfu, peak_memory, beside):
                figures = f"loss {loss:.4f}{_listed(beside)}  {tokens_per_second:,.0f} tokens/s"
                if mfu is not None:
                    figures += f"  MFU {mfu:.1%}"
                figures += f"  peak {format_bytes(peak_memory)}"
                self._progress.update(
                    self._task, description="training", completed=step, total=max_steps, figures=figures
                )
                if not self._console.is_terminal:
                    self._line(f"step {step}/{max_steps}  {figures}")
                self._phase = "training"
            case Evaluated(step, epoch, eval_loss, beside):
                self._line(f"step {step}  epoch {epoch:.2f}  eval loss {eval_loss:.4f}{_listed(beside)}")
            case CheckpointCommitted(step=step, uri=uri):
                self._line(f"step {step}  checkpoint {uri}")
            case Notice(text):
                show_warning(self._progress.console, text)
            case Restored() | WorkersFailed() | Rejected() | WorkersWaiting() | WorkersStarted():
                pass  # the driver reports these in notices and in the result

    def _line(self, text: str) -> None:
        self._progress.console.print(Text(text), soft_wrap=True)


def show_result(console: Console, result: RunResult, command: Sequence[str], *, trains_adapter: bool) -> None:
    """Print the eval losses, the location of the results, and the next commands to run."""
    if result.eval_losses:
        console.print()
        print_eval_losses(console, result.eval_losses)
    console.print()
    facts = [
        ("status", result.status if result.status == "failed" else f"{result.status}: {result.reason}"),
        (f"{result.chosen} checkpoint", result.best_checkpoint or "none"),
        *(("restarted", failure) for failure in result.failures),
        *([("last checkpoint", _describe_last(result))] if result.chosen == "best" else []),
        ("run", result.run_uri),
        ("trained", _describe_trained(result)),
        *_describe_speed(result.speed),
        ("duration", f"{result.elapsed_seconds:.0f} s from the start of this command"),
        *log_facts(result.log_files),
    ]
    if result.status == "completed" and result.best_checkpoint:
        key = "initial_adapter_model_ckpt_path" if trains_adapter else "initial_base_model_ckpt_path"
        facts += [
            ("next", f"chat with it: {main_line('chat', result.run_uri)}"),
            ("", f"export it for serving: {main_line('export', result.run_uri)}"),
            ("", "start a new run from it with this line in its YAML:"),
            ("", f"{key}: run:{result.run_name}"),
        ]
    elif result.last_checkpoint:
        facts.append(
            ("next", f"resume from the last checkpoint with the same command: {shlex.join(command)}")
        )
    elif result.status == "stopped":
        facts.append(("next", f"restart with the same command: {shlex.join(command)}"))
    print_facts(console, facts)


def _describe_last(result: RunResult) -> str:
    return (
        "the same" if result.last_checkpoint == result.best_checkpoint else result.last_checkpoint or "none"
    )


def _describe_trained(result: RunResult) -> str:
    if not result.last_checkpoint:
        return "no step that a checkpoint contains"
    tokens = f"{result.tokens:,} tokens ({result.trained_tokens:,} loss tokens)"
    return f"{result.train_steps:,} steps, {tokens}: what the latest checkpoint contains"


def _describe_speed(speed: Speed) -> list[tuple[str, str]]:
    """Return the throughput and the time per phase; empty if this attempt committed no step that it trained."""
    if not speed.tokens_per_second:
        return []
    total = sum(speed.seconds.values())
    mfu = "" if speed.mfu is None else f", MFU {speed.mfu:.1%}"
    phases = [
        f"{phase.replace('_', ' ')} {seconds / total:.0%}"
        for phase, seconds in speed.seconds.items()
        if seconds >= 0.005 * total
    ]
    return [
        (
            "speed",
            f"{speed.tokens_per_second:,.0f} tokens/s ({speed.trained_tokens_per_second:,.0f} loss tokens/s){mfu}, "
            f"{format_bytes(speed.peak_memory_bytes)} peak memory per worker",
        ),
        ("time in training", f"{total:,.0f} s in this attempt: {', '.join(phases)}"),
    ]


def _listed(figures: Mapping[str, float]) -> str:
    return "".join(f"  {short_name(name)} {figure:.4f}" for name, figure in figures.items())
