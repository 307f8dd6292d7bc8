"""Charts of a run: eval losses as PNG files, and SVG elements for the report page."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from runs.layout import EvalLoss

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
            _plot(axes, eval_line("parent run", parent_losses, is_parents=True))
        _plot(axes, eval_line(run_name, eval_losses, begin=begin))
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
            _plot(axes, eval_line(name, losses))
    return picture.getvalue()


def draw_svg(x_label: str, y_label: str, lines: Sequence[Line]) -> str:
    """Draw lines as a self-contained `<svg>` element. Labels and names are escaped."""
    with _chart(x_label, y_label, "svg") as (axes, picture):
        for line in lines:
            _plot(axes, line)
    element = picture.getvalue().decode()
    return re.sub(r"<metadata>.*?</metadata>", "", element[element.index("<svg") :], flags=re.DOTALL)


def eval_line(name: str, losses: Sequence[EvalLoss], *, begin: float = 0.0, is_parents: bool = False) -> Line:
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
