"""What a person should know of the rows before a model learns from them: figures, and a page to look through."""

import html
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from pydantic import BaseModel, ConfigDict

from training.data.batches import Order
from training.data.prepared import PreparedData
from training.data.rows import FORMAT_NAMES
from training.data.summary import DataSummary
from utils.page import facts, page, table

_MAX_SHOWN = 5


class DataReport(BaseModel):
    """The rows of a run and how they fall into steps; lengths are in tokens."""

    model_config = ConfigDict(frozen=True)

    train: DataSummary
    valid: DataSummary | None
    limit: int | None
    """Tokens of a row that are taken: context_length, or what the model's positions reach."""
    in_both: int
    """Validation rows that are training rows, too."""
    first_in_both: list[str]
    padding_waste: float
    """Padding's share of the tokens that go through the model in the first epoch."""
    steps: int
    steps_per_epoch: int
    sequences_per_step: int
    """Rows, or packs of them."""


def make_report(
    train: PreparedData,
    valid: PreparedData | None,
    order: Order,
    *,
    limit: int | None,
    padded_to: int | None,
    steps: int,
) -> DataReport:
    """Bring together what was found while rows were prepared and how they are dealt out.

    Args:
        train: Prepared rows.
        valid: Prepared rows, or None.
        order: How the training rows are dealt out.
        limit: Tokens of a row that are taken.
        padded_to: Tokens that every sequence is padded to; None: to the longest of its batch.
        steps: Optimizer steps of the run.
    """
    in_both, first_in_both = _in_both(train, valid) if valid else (0, [])
    return DataReport(
        train=train.summary,
        valid=valid.summary if valid else None,
        limit=limit,
        in_both=in_both,
        first_in_both=first_in_both,
        padding_waste=_padding_waste(train, order, padded_to),
        steps=steps,
        steps_per_epoch=order.shape.steps_per_epoch,
        sequences_per_step=order.shape.sequences_per_step,
    )


def _in_both(train: PreparedData, valid: PreparedData) -> tuple[int, list[str]]:
    same = np.flatnonzero(np.isin(valid.index.digest, train.index.digest))
    first = [
        f"{valid.place(row)} is {train.place(int(np.argmax(train.index.digest == valid.index.digest[row])))}"
        for row in same[:_MAX_SHOWN]
    ]
    return len(same), first


def _padding_waste(train: PreparedData, order: Order, padded_to: int | None) -> float:
    """Micro-batches are contiguous pieces of the epoch's order, whatever worker takes them."""
    lengths, tokens = train.index.length.astype(np.int64), train.index.tokens.astype(np.int64)
    if order.packs is not None:
        lengths = np.array([lengths[rows].sum() for rows in order.packs])
    ordered = lengths[order.epoch(0)]
    size = order.shape.batch_size
    batches = np.pad(ordered, (0, -len(ordered) % size)).reshape(-1, size)
    widest = batches.max(axis=1) if padded_to is None else np.full(len(batches), padded_to)
    sequences_of_a_row = 2 if "preference" in {source.format for source in train.summary.sources} else 1
    padded = int((widest * (batches > 0).sum(axis=1)).sum()) * sequences_of_a_row
    return 1 - int(tokens.sum()) / padded


def key_figures(report: DataReport) -> list[tuple[str, str]]:
    """Names and values, one a line, of the rows and of what becomes of them."""
    return [
        ("training rows", describe_rows(report.train)),
        ("", describe_tokens(report.train)),
        ("lengths", describe_lengths(report.train)),
        ("lost", describe_loss(report.train, report.limit)),
        ("padding", _describe_padding(report)),
        ("validation rows", describe_rows(report.valid) if report.valid else "none"),
        *([("", describe_tokens(report.valid))] if report.valid else []),
    ]


def _describe_padding(report: DataReport) -> str:
    return f"{report.padding_waste:.1%} of the tokens of an epoch"


def describe_rows(summary: DataSummary) -> str:
    """Rows and formats in a line: `1,000 chats (messages)`."""
    formats = dict.fromkeys(FORMAT_NAMES[source.format] for source in summary.sources)
    files = f"{len(summary.files):,} files" if len(summary.files) > 1 else "1 file"
    return f"{summary.rows:,} rows of {files}: {' and '.join(formats)}"


def describe_tokens(summary: DataSummary) -> str:
    """Tokens in a line, and how many of them are trained."""
    return f"{summary.tokens:,} tokens, {summary.trained_tokens:,} trained ({summary.trained_tokens / summary.tokens:.1%})"


def describe_lengths(summary: DataSummary) -> str:
    """Percentiles in a line."""
    lengths = summary.lengths
    return (
        f"p50 {lengths.p50:,}, p95 {lengths.p95:,}, p99 {lengths.p99:,}, longest {lengths.longest:,} tokens"
    )


def describe_loss(summary: DataSummary, limit: int | None) -> str:
    """What does not fit, in a line."""
    if limit is None:
        return "nothing (no context_length, and the model names no limit)"
    lost = summary.lost_tokens
    if not lost:
        return f"nothing at {limit:,} tokens a row"
    return (
        f"{lost:,} tokens ({lost / (lost + summary.tokens):.1%}) at {limit:,} tokens a row: "
        f"{summary.truncated_rows:,} rows are cut, {summary.dropped_rows:,} left out"
    )


def bars(summary: DataSummary) -> list[tuple[str, int]]:
    """The histogram of lengths: (tokens from and to, rows)."""
    edges = summary.lengths.edges
    labels = [f"{begin:,} to {following - 1:,}" for begin, following in pairwise(edges)]
    return list(zip([*labels, f"{edges[-1]:,} and more"], summary.lengths.counts, strict=True))


def to_html(report: DataReport, run_name: str) -> str:
    """A page that needs nothing else."""
    sections = [_split_section("Training rows", report.train, report.limit)]
    if report.valid:
        sections.append(_split_section("Validation rows", report.valid, report.limit))
    about_both = facts(
        [
            ("steps", f"{report.steps:,}, {report.steps_per_epoch:,} an epoch"),
            ("padding", _describe_padding(report)),
            (
                "validation rows that are training rows",
                f"{report.in_both:,}" + _list(report.first_in_both),
            ),
        ]
    )
    return page(f"Data of {run_name}", about_both, *sections, style=_STYLE)


_STYLE = "i{display:block;height:.9rem;background:#4a7ab5;min-width:1px}i.over{background:#c8553d}mark{background:#cdeccd;color:#111}"


def _split_section(title: str, summary: DataSummary, limit: int | None) -> str:
    most = max(summary.lengths.counts)
    histogram = "".join(
        f'<tr><td class="n">{label}</td><td class="n">{count:,}</td><td style="width:30rem">'
        f'<i{_over(edge, limit)} style="width:{100 * count / most:.1f}%"></i></td></tr>'
        for edge, (label, count) in zip(summary.lengths.edges, bars(summary), strict=True)
    )
    sources = table(
        ["path", "rows are", ">files", ">rows", ">rows an epoch"],
        (
            (
                source.path,
                FORMAT_NAMES[source.format],
                f"{source.files:,}",
                f"{source.rows:,}",
                f"{source.taken:,}",
            )
            for source in summary.sources
        ),
    )
    examples = "".join(f"<pre>{''.join(_pieces(example))}</pre>" for example in summary.examples)
    skipped = ", ".join(f"{count:,} {kind}" for kind, count in summary.skipped_rows.items()) or "none"
    return (
        f"<h2>{title}</h2>"
        + facts(
            [
                ("rows", html.escape(describe_rows(summary))),
                ("tokens", describe_tokens(summary)),
                ("lengths", describe_lengths(summary)),
                ("lost", describe_loss(summary, limit)),
                ("skipped", skipped + _list(summary.first_skipped)),
                ("repeated", f"{summary.duplicates:,}" + _list(summary.first_duplicates)),
            ]
        )
        + f"<h3>Sources</h3>{sources}"
        + f"<h3>Tokens a row, before anything is cut</h3><table>{histogram}</table>"
        + f"<h3>Examples; <mark>what is trained on</mark></h3>{examples}"
    )


def _over(edge: int, limit: int | None) -> str:
    return ' class="over"' if limit is not None and edge >= limit else ""


def _pieces(example: list[tuple[str, bool]]) -> Iterator[str]:
    for text, trained in example:
        yield f"<mark>{html.escape(text)}</mark>" if trained else html.escape(text)


def _list(items: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(item)}</li>' for item in items)}</ul>" if items else ""
