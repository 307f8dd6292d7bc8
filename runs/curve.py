"""What was measured over a run as pictures: PNG files of eval losses, and SVG for the run's page."""

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
    """Whether each point is to be seen."""
    is_parents: bool = False
    """Whether it is the run's that this one started from."""


def draw_eval_curve(
    run_name: str, eval_losses: Sequence[EvalLoss], parent_losses: Sequence[EvalLoss] = ()
) -> bytes:
    """A PNG of eval loss over epochs; a parent's epochs come first, and the run's go on from where they end."""
    begin = parent_losses[-1].epoch if parent_losses else 0.0
    with _chart("epoch", "eval loss (nats a trained token)", "png") as (axes, picture):
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
        axes.margins(x=0.12, y=0.15)  # room for the figures beside the points
    return picture.getvalue()


def draw_eval_curves(curves: Mapping[str, Sequence[EvalLoss]]) -> bytes:
    """A PNG of the eval losses of several runs over epochs, each from its own beginning."""
    with _chart("epoch", "eval loss (nats a trained token)", "png") as (axes, picture):
        for name, losses in curves.items():
            _plot(axes, eval_line(name, losses))
    return picture.getvalue()


def draw_svg(x_label: str, y_label: str, lines: Sequence[Line]) -> str:
    """Lines as an `<svg>` element that stands in a page by itself."""
    with _chart(x_label, y_label, "svg") as (axes, picture):
        for line in lines:
            _plot(axes, line)
    element = picture.getvalue().decode()
    return re.sub(r"<metadata>.*?</metadata>", "", element[element.index("<svg") :], flags=re.DOTALL)


def eval_line(name: str, losses: Sequence[EvalLoss], *, begin: float = 0.0, is_parents: bool = False) -> Line:
    """Eval losses over epochs, the first of which is `begin`."""
    epochs = [begin + loss.epoch for loss in losses]
    return Line(name, epochs, [loss.eval_loss for loss in losses], is_marked=True, is_parents=is_parents)


@contextmanager
def _chart(x_label: str, y_label: str, kind: Literal["png", "svg"]) -> Iterator[tuple[Any, io.BytesIO]]:
    """(axes to draw on, where the picture is afterwards)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings: dict[Any, Any] = {
        "text.parse_math": False,  # a name is no formula
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": f"{x_label} {y_label}",  # charts of one page share no ids
    }
    picture = io.BytesIO()
    with matplotlib.rc_context(settings):
        figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=110, layout="constrained")
        try:
            yield axes, picture
            axes.set_xlabel(x_label)
            axes.set_ylabel(y_label)
            axes.grid(alpha=0.3)
            axes.legend()
            figure.savefig(picture, format=kind)
        finally:
            pyplot.close(figure)


def _plot(axes: Any, line: Line) -> None:
    style = _PARENT if line.is_parents else {}
    axes.plot(line.x, line.y, marker="o" if line.is_marked else "", label=line.name, **style)
