"""The data report: figures about the rows of a run and about how they are batched."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict

from training.data.prepared import PreparedData
from training.data.row_index import contains
from training.data.rows import FORMAT_NAMES
from training.data.summary import DataSummary

if TYPE_CHECKING:
    from training.data.batches import BatchPlan, BatchShape  # imports torch

_MAX_SHOWN = 5
_TOLERATED = 0.25
"""Difference between the share of validation rows and valid_split that is not reported, relative to valid_split."""


class DataReport(BaseModel):
    """Figures about the rows of a run and how they are split into steps. Lengths are in tokens."""

    model_config = ConfigDict(frozen=True)

    train: DataSummary
    valid: DataSummary | None
    more_valid: dict[str, DataSummary] = {}
    """The validation sets after the first, by name."""
    limit: int | None
    """Maximum tokens per row: context_length, or the number of positions of the model."""
    in_both: int
    """Number of validation rows that are also training rows."""
    first_in_both: list[str]
    padding_waste: float
    """Share of padding in the tokens that the model processes in the first epoch."""
    steps: int
    steps_per_epoch: int
    sequences_per_step: int
    """Number of rows, or of packs, per step."""
    valid_split: float | None = None
    """Share of the rows that valid_split asks for; None without it, or if only one side of the split is limited."""


@dataclass(frozen=True)
class IndexFigures:
    """The figures for which the indexes of a run's rows are read. Their size does not depend on the number of rows."""

    shape: "BatchShape"
    """Division of the training rows, or of their packs, into batches."""
    padding_waste: float
    """Share of padding in the tokens that the model processes in the first epoch."""
    in_both: int
    """Number of validation rows that are also training rows."""
    first_in_both: list[str]


def measure_indexes(
    train: PreparedData, valid: Sequence[PreparedData], order: "BatchPlan", padded_to: int | None
) -> IndexFigures:
    """Compare the indexes of rows, and measure the padding of their batches.

    Args:
        train: Prepared training rows.
        valid: Prepared validation rows of all sets.
        order: The order in which the training rows are batched.
        padded_to: Length in tokens that every sequence is padded to; None for the longest of its batch.
    """
    overlaps = [_in_both(train, each) for each in valid]
    return IndexFigures(
        shape=order.shape,
        padding_waste=_padding_waste(train, order, padded_to),
        in_both=sum(count for count, _ in overlaps),
        first_in_both=[line for _, first in overlaps for line in first][:_MAX_SHOWN],
    )


def make_report(
    train: PreparedData,
    valid: PreparedData | None,
    figures: IndexFigures,
    *,
    more_valid: Mapping[str, PreparedData],
    limit: int | None,
    steps: int,
    valid_split: float | None = None,
) -> DataReport:
    """Combine the summaries of the prepared rows with the figures of their batches.

    Args:
        train: Prepared training rows.
        valid: Prepared validation rows, or None.
        figures: The figures of their indexes.
        more_valid: The validation sets after the first, by name.
        limit: Maximum tokens per row; None without a limit.
        steps: Optimizer steps of the run.
        valid_split: Share of the rows that should be validation rows; None if nothing asks for one.
    """
    return DataReport(
        train=train.summary,
        valid=valid.summary if valid else None,
        limit=limit,
        more_valid={name: rows.summary for name, rows in more_valid.items()},
        in_both=figures.in_both,
        first_in_both=figures.first_in_both,
        padding_waste=figures.padding_waste,
        steps=steps,
        steps_per_epoch=figures.shape.steps_per_epoch,
        sequences_per_step=figures.shape.sequences_per_step,
        valid_split=valid_split,
    )


def _in_both(train: PreparedData, valid: PreparedData) -> tuple[int, list[str]]:
    both = contains(np.unique(valid.index.digest), train.index.digest)
    same = np.flatnonzero(np.isin(valid.index.digest, train.index.digest[both]))
    first = [
        f"{valid.place(row)} is the same as {train.place(int(np.argmax(train.index.digest == valid.index.digest[row])))}"
        for row in same[:_MAX_SHOWN]
    ]
    return len(same), first


def _padding_waste(train: PreparedData, order: "BatchPlan", padded_to: int | None) -> float:
    """Return the share of padding in an epoch; it does not depend on the number of workers."""
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
    """Return (name, value) of each figure that a run prints."""
    return [
        ("training rows", describe_rows(report.train)),
        ("", describe_tokens(report.train)),
        ("lengths", describe_lengths(report.train)),
        ("cut off", describe_loss(report.train, report.limit)),
        ("padding", describe_padding(report)),
        ("validation rows", _describe_valid_rows(report, report.valid) if report.valid else "none"),
        *([("", describe_tokens(report.valid))] if report.valid else []),
        *((f"valid_path.{name}", describe_rows(summary)) for name, summary in report.more_valid.items()),
    ]


def describe_padding(report: DataReport) -> str:
    """Describe the share of padding in one line."""
    return f"{report.padding_waste:.1%} of the tokens in an epoch"


def describe_rows(summary: DataSummary) -> str:
    """Describe rows, files and formats in one line."""
    formats = dict.fromkeys(FORMAT_NAMES[source.format] for source in summary.sources)
    files = f"{len(summary.files):,} files" if len(summary.files) > 1 else "1 file"
    noun = "sequence" if summary.split_rows else "row"
    rows = f"1 {noun}" if summary.rows == 1 else f"{summary.rows:,} {noun}s"
    return f"{rows} in {files}: {' and '.join(formats)}"


def _describe_valid_rows(report: DataReport, valid: DataSummary) -> str:
    """Describe the validation rows in one line, with their share if a hash chose many more or fewer than valid_split asks for."""
    share, asked = valid.rows / (report.train.rows + valid.rows), report.valid_split
    if asked is None or abs(share - asked) <= _TOLERATED * asked:
        return describe_rows(valid)
    return f"{describe_rows(valid)} ({share:.1%} of all rows; valid_split asks for {asked:.1%}, and rows are chosen by a hash)"


def describe_tokens(summary: DataSummary) -> str:
    """Describe tokens and loss tokens in one line."""
    share = summary.trained_tokens / summary.tokens
    return f"{summary.tokens:,} tokens, {summary.trained_tokens:,} loss tokens ({share:.1%})"


def describe_lengths(summary: DataSummary) -> str:
    """Describe the length percentiles in one line."""
    lengths = summary.lengths
    return (
        f"p50 {lengths.p50:,}, p95 {lengths.p95:,}, p99 {lengths.p99:,}, longest {lengths.longest:,} tokens"
    )


def describe_loss(summary: DataSummary, limit: int | None) -> str:
    """Describe in one line which tokens truncation and `long_rows: drop` remove."""
    if limit is None:
        return "nothing: there is no context_length, and the model has no limit"
    lost = summary.lost_tokens
    if not lost:
        return f"nothing: every row fits into {limit:,} tokens"
    return (
        f"{lost:,} tokens ({lost / (lost + summary.tokens):.1%}) at {limit:,} tokens per row: "
        f"{summary.truncated_rows:,} rows truncated, {summary.dropped_rows:,} dropped"
    )


def describe_split(summary: DataSummary) -> str:
    """Describe in one line how many rows became several sequences."""
    if not summary.split_rows:
        return "none"
    rows = "1 row" if summary.split_rows == 1 else f"{summary.split_rows:,} rows"
    # Rows that an earlier version prepared have no number of sequences.
    sequences = f"{summary.split_sequences:,}" if summary.split_sequences else "several"
    return (
        f"{rows} became {sequences} sequences, because the chat template renders earlier turns differently once others "
        "follow (turns: auto)"
    )


def bars(summary: DataSummary) -> list[tuple[str, int]]:
    """Return (range of lengths, rows) of each bar of the length histogram."""
    edges = summary.lengths.edges
    labels = [f"{begin:,} to {following - 1:,}" for begin, following in pairwise(edges)]
    return list(zip([*labels, f"{edges[-1]:,} and more"], summary.lengths.counts, strict=True))
