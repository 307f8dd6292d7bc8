"""report.html: everything about a run on one page that needs nothing else."""

import html
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from runs.curve import Line, draw_svg, eval_line
from runs.layout import DATA_PAGE_FILE, Manifest, MetricsLine, RunResult, checkpoint_uri
from runs.reading import eval_losses_of
from utils.bucket import is_remote, local_path, uses_embedded_bucket
from utils.files import format_bytes
from utils.page import Link, facts, page, preformatted, table


@dataclass(frozen=True)
class RunReport:
    """What the page is made of."""

    result: RunResult
    metrics: Sequence[MetricsLine]
    parent_metrics: Sequence[MetricsLine]
    """Of the run that this one started from, up to there."""
    checkpoints: Sequence[Manifest]
    data: Sequence[tuple[str, str]]
    """Names and values, for people, of the rows."""
    config: str
    """The resolved YAML."""
    environment: Mapping[str, str]
    """Names and values, for people."""
    command: Sequence[str]
    """What was typed."""
    base_model: str
    """Hub id, directory or URI of what an adapter sits on."""
    trains_adapter: bool


def to_html(report: RunReport) -> str:
    """The page."""
    result = report.result
    sections = [_summary(report), *_curves(report)]
    if result.eval_losses:
        sections += ["<h2>Evaluations</h2>", _evaluations(report)]
    sections += [
        "<h2>Data</h2>",
        facts(_escaped(report.data)),
        f"<p>Sources, a histogram and examples: {Link(DATA_PAGE_FILE, DATA_PAGE_FILE).to_html()}, beside this page.</p>",
        "<h2>Checkpoints</h2>",
        _checkpoints(report),
        "<h2>What to do next</h2>",
        *_commands(report),
        "<h2>Configuration</h2>",
        preformatted(report.config),
        "<h2>Environment</h2>",
        facts(
            _escaped(
                [
                    *report.environment.items(),
                    *result.versions.items(),
                    ("library output", " ".join(result.log_files)),
                ]
            )
        ),
    ]
    return page(result.run_name, *sections)


def _summary(report: RunReport) -> str:
    result = report.result
    losses = [loss.eval_loss for loss in result.eval_losses]
    return facts(
        _escaped(
            {
                "status": f"{result.status}: {result.reason}",
                **{f"started again ({number})": failure for number, failure in enumerate(result.failures, 1)},
                "eval loss": f"{losses[0]:.4f} at first, {min(losses):.4f} at best" if losses else "none",
                "started from": result.parent or report.base_model,
                "trained": f"{result.train_steps:,} steps, {result.tokens:,} tokens ({result.trained_tokens:,} trained)",
                "speed": f"{result.tokens_per_second:,.0f} tokens/s, all workers together",
                "memory": f"{format_bytes(result.speed.peak_memory_bytes)} at most, first worker",
                "took": f"{result.elapsed_seconds:,.0f} s",
                "ended": result.ended or "",
                "trainable parameters": f"{result.trainable_parameters:,}",
                "run": result.run_uri,
            }.items()
        )
    )


def _curves(report: RunReport) -> list[str]:
    parent = report.parent_metrics
    begin = parent[-1].epoch if parent else 0.0
    losses = [
        _training_line("parent run, training", parent, is_parents=True),
        eval_line("parent run, evaluation", eval_losses_of(parent), is_parents=True),
        _training_line("training", report.metrics, begin=begin),
        eval_line("evaluation", report.result.eval_losses, begin=begin),
    ]
    charts = [
        ("Loss", "epoch", "nats a trained token", losses),
        (
            "Learning rate",
            "step",
            "learning rate",
            [_by_step("learning rate", [(line.step, line.learning_rate) for line in report.metrics])],
        ),
        (
            "Throughput",
            "step",
            "tokens/s, all workers together",
            [_by_step("tokens/s", [(line.step, line.tokens_per_second) for line in report.metrics])],
        ),
        (
            "Memory",
            "step",
            "bytes, at most so far",
            [_by_step("first worker", [(line.step, line.peak_memory_bytes) for line in report.metrics])],
        ),
    ]
    return [
        f"<h2>{title}</h2>{draw_svg(x_label, y_label, drawn)}"
        for title, x_label, y_label, lines in charts
        if (drawn := [line for line in lines if line.x])
    ]


def _by_step(name: str, figures: Sequence[tuple[int, float | None]]) -> Line:
    points = [(step, figure) for step, figure in figures if figure is not None]
    return Line(name, [step for step, _ in points], [figure for _, figure in points])


def _training_line(
    name: str, metrics: Sequence[MetricsLine], *, begin: float = 0.0, is_parents: bool = False
) -> Line:
    points = [(begin + line.epoch, line.loss) for line in metrics if line.loss is not None]
    return Line(name, [epoch for epoch, _ in points], [loss for _, loss in points], is_parents=is_parents)


def _evaluations(report: RunReport) -> str:
    losses = report.result.eval_losses
    beside = list(losses[0].figures)
    return table(
        [">step", ">epoch", ">eval loss", *(f">{name}" for name in beside)],
        (
            (
                f"{loss.step:,}",
                f"{loss.epoch:.2f}",
                f"{loss.eval_loss:.4f}",
                *(f"{loss.figures[name]:.4f}" for name in beside),
            )
            for loss in losses
        ),
    )


def _checkpoints(report: RunReport) -> str:
    return table(
        [">step", ">epoch", ">eval loss", ">size", "committed", "where"],
        (
            (
                f"{manifest.step:,}",
                f"{manifest.epoch:.2f}",
                "" if manifest.eval_loss is None else f"{manifest.eval_loss:.4f}",
                format_bytes(sum(file.size for file in manifest.files)),
                manifest.created,
                _place(checkpoint_uri(report.result.run_uri, manifest.step)),
            )
            for manifest in report.checkpoints
        ),
    )


def _place(uri: str) -> str | Link:
    """A directory of this machine leads there; what opens a bucket in a browser is not known."""
    return uri if is_remote(uri) else Link(uri, local_path(uri).as_uri())


def _commands(report: RunReport) -> list[str]:
    """What may be typed next, each with what it does."""
    result = report.result
    chosen = result.chosen
    commands = {}
    if result.status != "completed":
        where = "Go on from the newest checkpoint:" if result.last_checkpoint else "Begin again:"
        commands[where] = shlex.join(report.command)
    elif result.best_checkpoint:
        key = "initial_adapter_model_ckpt_path" if report.trains_adapter else "initial_base_model_ckpt_path"
        what = f"Train on from the {chosen} checkpoint, with other rows or settings: a YAML with"
        commands[what] = f"{key}: {result.best_checkpoint}"
    if result.last_checkpoint:
        what = "Take over the whole state, to train longer: the YAML with another run_name, more epochs and"
        commands[what] = f"resume_from_checkpoint: {result.last_checkpoint}"
    if result.best_checkpoint:
        main = [".venv/bin/python", "main.py"]
        commands[f"Talk with the {chosen} checkpoint:"] = shlex.join([*main, "chat", result.run_uri])
        commands["Answer and score held-out rows:"] = shlex.join(
            [*main, "evaluate", result.run_uri, "--data", "test.jsonl"]
        )
        what = (
            f"Merge the {chosen} adapter into its base model"
            if report.trains_adapter
            else f"Export the {chosen} model"
        )
        commands[f"{what}, then serve it, with vLLM installed:"] = (
            f"{shlex.join([*main, 'export', result.run_uri, '--to', 'exported'])}\nvllm serve exported"
        )
    if result.best_checkpoint and _is_reached_by_aws(result.best_checkpoint):
        here = result.best_checkpoint.rpartition("/")[2]
        commands[f"Copy the {chosen} checkpoint to this machine, with the AWS CLI installed:"] = shlex.join(
            ["aws", "s3", "cp", "--recursive", result.best_checkpoint, here]
        )
    return [f"<p>{html.escape(what)}</p>{preformatted(command)}" for what, command in commands.items()]


def _is_reached_by_aws(uri: str) -> bool:
    return uri.startswith("s3://") and not uses_embedded_bucket(uri)


def _escaped(items: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name, html.escape(value)) for name, value in items]
