"""The last step of data preparation: the index of an epoch, and the summary of its rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from training.data.prepared import fingerprint_of
from training.data.request import DataRequest
from training.data.row_index import INDEX_FILE, INDEX_SCHEMA, RowIndex
from training.data.row_pass import Tally
from training.data.rows import RowSchema
from training.data.summary import (
    DataSummary,
    SourceSummary,
    example_rows,
    find_duplicates,
    measure_lengths,
    show_example,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class TokenizedSources:
    """The rows of all sources, which are tokenized."""

    tally: Tally
    rows: list[int]
    """Rows of each source within the token limit."""
    schemas: list[RowSchema | None]
    """Schema with which the rows of each source were read."""
    checksums: list[str]
    """Checksums of the files of tokens."""
    read: Callable[[int], dict[str, Any]]
    """Returns the tokens of a row by its position."""


def finish_epoch(
    request: DataRequest, tokenizer: "PreTrainedTokenizerFast", sources: TokenizedSources, directory: Path
) -> DataSummary:
    """Replace the index of all rows by that of an epoch, and return the summary.

    Args:
        request: The request for the rows, with the date that the chat template prints.
        tokenizer: The model's tokenizer.
        sources: The rows.
        directory: Directory of the index.
    """
    tally, index_file = sources.tally, directory / INDEX_FILE
    with pa.memory_map(str(index_file)) as source:
        table = pa.ipc.open_stream(source).read_all()
    duplicates, first_duplicates = find_duplicates(RowIndex(table), request.files)
    taken = sources.rows
    if request.weights:
        taken = _shares(sources.rows, request.weights)
        table = table.take(_mix(sources.rows, taken, request.seed))
        mixed = directory / f"{INDEX_FILE}.mixed"
        with pa.OSFile(str(mixed), "wb") as sink, pa.ipc.new_stream(sink, INDEX_SCHEMA) as writer:
            writer.write_table(table)
        mixed.replace(index_file)
    index = RowIndex(table)
    examples = [sources.read(int(index.position[number])) for number in example_rows(len(index))]
    return DataSummary(
        rows=len(index),
        tokens=int(index.tokens.sum()),
        trained_tokens=int(index.trained_tokens.sum()),
        longest=int(index.length.max()),
        truncated_rows=tally.truncated,
        lost_tokens=tally.lost,
        dropped_rows=tally.dropped,
        split_rows=tally.split_rows,
        split_sequences=tally.split_sequences,
        has_reasoning=tally.has_reasoning if tally.has_chats else None,
        largest_id=tally.largest_id,
        notes=dict(tally.notes.most_common()),
        skipped_rows=dict(tally.kinds.most_common()),
        first_skipped=tally.first_faults(request.files),
        duplicates=duplicates,
        first_duplicates=first_duplicates,
        lengths=measure_lengths(tally.lengths),
        sources=[
            SourceSummary(
                path,
                schema.data_format if schema else "messages",
                sum(file.source == number for file in request.files),
                count,
                in_epoch,
            )
            for number, (path, schema, count, in_epoch) in enumerate(
                zip(request.paths, sources.schemas, sources.rows, taken, strict=True)
            )
        ],
        files=[file.uri for file in request.files],
        fingerprint=fingerprint_of(sources.checksums, index_file),
        examples=[show_example(row, tokenizer) for row in examples],
        date=request.date if tally.has_chats else None,
    )


def _shares(rows: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Return the rows per source in an epoch of as many rows as all sources have; largest remainders round up."""
    total = sum(rows)
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda source: shares[source] - exact[source])
    for source in by_remainder[: total - sum(shares)]:
        shares[source] += 1
    return shares


def _mix(rows: Sequence[int], taken: Sequence[int], seed: int) -> np.ndarray:
    """Return the row indices of an epoch: full repetitions of each source, plus a random remainder."""
    generator = np.random.default_rng(seed)
    pieces = []
    begin = 0
    for count, wanted in zip(rows, taken, strict=True):
        whole, rest = divmod(wanted, count) if count else (0, 0)
        pieces += [np.arange(begin, begin + count)] * whole
        pieces.append(begin + np.sort(generator.permutation(count)[:rest]))
        begin += count
    return np.concatenate(pieces)
