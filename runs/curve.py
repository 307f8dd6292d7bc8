"""Eval losses as pictures: a run's after its parent's, and several runs' in one."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from runs.layout import EvalLoss


def draw_eval_curve(
    run_name: str, eval_losses: Sequence[EvalLoss], parent_losses: Sequence[EvalLoss] = ()
) -> bytes:
    """A PNG of eval loss over epochs; a parent's epochs come first, and the run's go on from where they end."""
    buffer = io.BytesIO()
    with _axes() as axes:
        begin = parent_losses[-1].epoch if parent_losses else 0.0
        if parent_losses:
            _plot(axes, "parent run", parent_losses, style="o--", color="0.55")
        _plot(axes, run_name, eval_losses, begin=begin, color="tab:blue")
        for loss in eval_losses:
            axes.annotate(
                f"{loss.eval_loss:.4f}",
                (begin + loss.epoch, loss.eval_loss),
                textcoords="offset points",
                xytext=(4, 6),
                fontsize=8,
            )
        axes.margins(x=0.12, y=0.15)  # room for the figures beside the points
        _finish(axes, buffer)
    return buffer.getvalue()


def draw_eval_curves(curves: Mapping[str, Sequence[EvalLoss]]) -> bytes:
    """A PNG of the eval losses of several runs over epochs, each from its own beginning."""
    buffer = io.BytesIO()
    with _axes() as axes:
        for name, losses in curves.items():
            _plot(axes, name, losses)
        _finish(axes, buffer)
    return buffer.getvalue()


@contextmanager
def _axes() -> Iterator[Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"text.parse_math": False}):  # a name is no formula
        figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=110, layout="constrained")
        yield axes
        pyplot.close(figure)


def _plot(
    axes: Any, name: str, losses: Sequence[EvalLoss], *, begin: float = 0.0, style: str = "o-", **line: Any
) -> None:
    epochs = [begin + loss.epoch for loss in losses]
    axes.plot(epochs, [loss.eval_loss for loss in losses], style, label=name, **line)


def _finish(axes: Any, buffer: io.BytesIO) -> None:
    axes.set_xlabel("epoch")
    axes.set_ylabel("eval loss (nats a trained token)")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.figure.savefig(buffer, format="png")
