"""data_report.html: the data report of a run as a page for a browser."""

from pathlib import Path

from training.data.report import (
    DataReport,
    bars,
    describe_lengths,
    describe_loss,
    describe_padding,
    describe_rows,
    describe_split,
    describe_tokens,
)
from training.data.rows import FORMAT_NAMES
from utils.page import render_page

_TEMPLATE = Path(__file__).with_suffix(".html.j2")


def to_html(report: DataReport, run_name: str) -> str:
    """Return a self-contained page: figures, sources, length histograms and example rows."""
    return render_page(
        _TEMPLATE,
        report=report,
        run_name=run_name,
        format_names=FORMAT_NAMES,
        bars=bars,
        describe_lengths=describe_lengths,
        describe_loss=describe_loss,
        describe_padding=describe_padding,
        describe_rows=describe_rows,
        describe_split=describe_split,
        describe_tokens=describe_tokens,
    )
