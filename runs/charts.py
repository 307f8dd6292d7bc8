"""Charts of a run: eval losses as PNG files, and SVG elements for the report page."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from runs.layout import EvalLoss, MetricsLine
from runs.reading import eval_losses_of

_PARENT = {"linestyle": "--", "color": "0.55"}


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    is_marked: bool = False
    """Draw a marker at each point."""
    is_parents: bool = False
    """Use the style of the parent run."""


def draw_eval_curve(
    run_name: str, eval_losses: Sequence[EvalLoss], parent_losses: Sequence[EvalLoss]
) -> bytes:
    """Draw a PNG of eval loss over epochs. The run's epochs follow the parent's."""
    begin = parent_losses[-1].epoch if parent_losses else 0.0
    with _chart("epoch", "eval loss (nats per loss token)", "png") as (axes, picture):
        if parent_losses:
            _plot(axes, _eval_line("parent run", parent_losses, is_parents=True))
        _plot(axes, _eval_line(run_name, eval_losses, begin=begin))
        for loss in eval_losses:
            axes.annotate(
                f"{loss.eval_loss:.4f}",
                (begin + loss.epoch, loss.eval_loss),
                textcoords="offset points",
                xytext=(4, 6),
                fontsize=8,
            )
        axes.margins(x=0.12, y=0.15)  # space for the figures next to the points
    return picture.getvalue()


def draw_eval_curves(curves: Mapping[str, Sequence[EvalLoss]]) -> bytes:
    """Draw a PNG of the eval losses of several runs over epochs, each from epoch 0."""
    with _chart("epoch", "eval loss (nats per loss token)", "png") as (axes, picture):
        for name, losses in curves.items():
            _plot(axes, _eval_line(name, losses))
    return picture.getvalue()


def report_charts(
    metrics: Sequence[MetricsLine], parent_metrics: Sequence[MetricsLine], eval_losses: Sequence[EvalLoss]
) -> list[tuple[str, str]]:
    """Return (title, SVG element) of each chart of the report page that has points."""
    begin = parent_metrics[-1].epoch if parent_metrics else 0.0
    losses = [
        _training_line("parent run, training", parent_metrics, is_parents=True),
        _eval_line("parent run, evaluation", eval_losses_of(parent_metrics), is_parents=True),
        _training_line("training", metrics, begin=begin),
        _eval_line("evaluation", eval_losses, begin=begin),
    ]
    rates = _by_step("learning rate", [(line.step, line.learning_rate) for line in metrics])
    speeds = _by_step("tokens/s", [(line.step, line.tokens_per_second) for line in metrics])
    memory = _by_step("first worker", [(line.step, line.peak_memory_bytes) for line in metrics])
    charts = [
        ("Loss", "epoch", "nats per loss token", losses),
        ("Learning rate", "step", "learning rate", [rates]),
        ("Throughput", "step", "tokens/s, all workers", [speeds]),
        ("Peak memory", "step", "bytes", [memory]),
    ]
    return [
        (title, _draw_svg(x_label, y_label, drawn))
        for title, x_label, y_label, lines in charts
        if (drawn := [line for line in lines if line.x])
    ]


def _draw_svg(x_label: str, y_label: str, lines: Sequence[Line]) -> str:
    """Draw lines as a self-contained `<svg>` element. Labels and names are escaped."""
    with _chart(x_label, y_label, "svg") as (axes, picture):
        for line in lines:
            _plot(axes, line)
    element = picture.getvalue().decode()
    return re.sub(r"<metadata>.*?</metadata>", "", element[element.index("<svg") :], flags=re.DOTALL)


def _eval_line(
    name: str, losses: Sequence[EvalLoss], *, begin: float = 0.0, is_parents: bool = False
) -> Line:
    """Return a line of eval losses over epochs, shifted by `begin` epochs."""
    epochs = [begin + loss.epoch for loss in losses]
    return Line(name, epochs, [loss.eval_loss for loss in losses], is_marked=True, is_parents=is_parents)


@contextmanager
def _chart(x_label: str, y_label: str, kind: Literal["png", "svg"]) -> Iterator[tuple[Any, io.BytesIO]]:
    """Yield (axes to draw on, buffer that holds the picture after the context exits)."""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot, which takes longer to import than to draw

    settings: dict[Any, Any] = {
        "text.parse_math": False,  # names may contain $
        "svg.fonttype": "none",  # keep text as text elements
        "svg.hashsalt": f"{x_label} {y_label}",  # unique ids for each chart on a page
    }
    picture = io.BytesIO()
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(7, 4.2), dpi=110, layout="constrained")
        axes = figure.subplots()
        yield axes, picture
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(picture, format=kind)


def _plot(axes: Any, line: Line) -> None:
    style = _PARENT if line.is_parents else {}
    axes.plot(line.x, line.y, marker="o" if line.is_marked else "", label=line.name, **style)


def _by_step(name: str, figures: Sequence[tuple[int, float | None]]) -> Line:
    points = [(step, figure) for step, figure in figures if figure is not None]
    return Line(name, [step for step, _ in points], [figure for _, figure in points])


def _training_line(
    name: str, metrics: Sequence[MetricsLine], *, begin: float = 0.0, is_parents: bool = False
) -> Line:
    points = [(begin + line.epoch, line.loss) for line in metrics if line.loss is not None]
    return Line(name, [epoch for epoch, _ in points], [loss for _, loss in points], is_parents=is_parents)
