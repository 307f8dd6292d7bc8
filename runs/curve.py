"""The eval loss of a run as a picture, its parent's before its own."""

import io
from collections.abc import Sequence

from runs.layout import EvalLoss


def draw_eval_curve(
    run_name: str, eval_losses: Sequence[EvalLoss], parent_losses: Sequence[EvalLoss] = ()
) -> bytes:
    """A PNG of eval loss over epochs; a parent's epochs come first, and the run's go on from where they end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=110, layout="constrained")
    begin = parent_losses[-1].epoch if parent_losses else 0.0
    if parent_losses:
        axes.plot(
            [loss.epoch for loss in parent_losses],
            [loss.eval_loss for loss in parent_losses],
            "o--",
            color="0.55",
            label="parent run",
        )
    epochs = [begin + loss.epoch for loss in eval_losses]
    axes.plot(epochs, [loss.eval_loss for loss in eval_losses], "o-", color="tab:blue", label=run_name)
    for epoch, loss in zip(epochs, eval_losses, strict=True):
        axes.annotate(
            f"{loss.eval_loss:.4f}",
            (epoch, loss.eval_loss),
            textcoords="offset points",
            xytext=(4, 6),
            fontsize=8,
        )
    axes.set_xlabel("epoch")
    axes.set_ylabel("eval loss (nats a trained token)")
    axes.margins(x=0.12, y=0.15)  # room for the figures beside the points
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    pyplot.close(figure)
    return buffer.getvalue()
