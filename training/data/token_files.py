"""Token files: the tokens of all rows (data.arrow) and one index entry per row (index.arrow)."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from training.data.encoding import Encoded, Encoder
from training.data.pieces import sums
from training.data.records import Task, Tokens
from training.data.rendered import Rendered
from training.data.request import DataRequest
from training.data.row_index import IGNORED, INDEX_SCHEMA

_BATCH_ROWS, _BATCH_SIZE = 1000, 2_000_000  # rendered rows and their characters per record batch
_UNPLACED = INDEX_SCHEMA.remove(INDEX_SCHEMA.get_field_index("position"))
_TOKEN_COLUMNS: dict[Task, tuple[str, ...]] = {
    "instruction_tuning": ("input_ids", "labels"),
    "causal_lm": ("input_ids", "labels"),
    "classification": ("input_ids", "labels"),
    "preference_tuning": ("prompt_ids", "chosen_ids", "rejected_ids"),
}


@dataclass(frozen=True, slots=True)
class RenderedRow:
    """A rendered row and its source location."""

    file: int
    row: int
    sequences: tuple[Rendered | Tokens, ...]
    label: int | None
    """Index of the label in classification. In an unpaired row: 1 if its response is the chosen one, 0 if the rejected one."""


def digest_of(sequences: Sequence[Rendered | Tokens], seed: int = 0) -> int:
    """Return a 64-bit hash of a row's text or tokens, to find duplicates and to split rows."""
    return xxhash.xxh3_64_intdigest(b"\x00".join(sequence.content for sequence in sequences), seed=seed)


@dataclass(frozen=True)
class TokenizedRows:
    """Rows of one source within the token limit, and what the limit did to the others."""

    data: pa.RecordBatch
    """Token columns of the retained rows."""
    index: pa.RecordBatch
    """Index of the retained rows without `position`, which depends on the rows before them."""
    kept: np.ndarray
    """bool [rows]: True for retained rows."""
    sizes: np.ndarray
    """int64 [rows]: characters, or tokens of pretokenised rows."""
    lengths: np.ndarray
    """int64 [rows]: tokens of the longest sequence, before the limit."""
    largest_id: int
    """Largest token id of the retained rows; -1 without rows."""
    truncated: int
    lost: int
    """Tokens removed by truncation or in dropped rows."""
    too_long: list[tuple[int, int, int]]
    """(file, row, tokens) of each row that exceeds the limit with `long_rows: error`."""
    left_out: list[tuple[int, int, str]]
    """(file, row, reason) of each row that is dropped."""


class RowTokenizer:
    """A tokenizer of rendered rows that applies the token limit."""

    def __init__(self, request: DataRequest, encoder: Encoder):
        self._limit, self._long_rows, self._task = request.limit, request.long_rows, request.task
        self._encoder = encoder
        self._schema = data_schema(request.task)

    def tokenize(self, rows: Sequence[RenderedRow]) -> TokenizedRows:
        """Tokenize rows of one source, each with the same number of sequences.

        Args:
            rows: At least one row.
        """
        per_row = len(rows[0].sequences)
        encoded = self._encoder.encode([sequence for row in rows for sequence in row.sequences])
        lengths = _by_row(encoded.lengths, per_row).max(axis=1)
        limit, long_rows = self._limit, self._long_rows
        too_long = lengths > limit if limit else np.zeros(len(rows), bool)
        lost = 0
        if limit and long_rows == "truncate" and too_long.any():
            lost = int(np.maximum(encoded.lengths - limit, 0).sum())
            encoded = encoded.cut(limit)
        kept = _by_row(encoded.predicted(), per_row).min(axis=1) > 0
        if long_rows != "truncate":
            kept &= ~too_long
        is_error = too_long if long_rows == "error" else np.zeros(len(rows), bool)
        dropped = ~kept & ~is_error
        tokens = _by_row(encoded.lengths, per_row).sum(axis=1)
        if not kept.all():
            encoded = encoded.take(np.repeat(kept, per_row))
        data, index = self._batches(
            [rows[number] for number in np.flatnonzero(kept).tolist()], encoded, per_row
        )
        return TokenizedRows(
            data=data,
            index=index,
            kept=kept,
            sizes=np.array([sum(sequence.size for sequence in row.sequences) for row in rows], np.int64),
            lengths=lengths,
            largest_id=int(encoded.ids.max(initial=-1)),
            truncated=int((too_long & kept).sum()),
            lost=lost + int(tokens[dropped].sum()),
            too_long=[
                (rows[number].file, rows[number].row, int(lengths[number]))
                for number in np.flatnonzero(is_error).tolist()
            ],
            left_out=[
                (
                    rows[number].file,
                    rows[number].row,
                    self._reason(int(lengths[number]), dropped=bool(too_long[number])),
                )
                for number in np.flatnonzero(dropped).tolist()
            ],
        )

    def _reason(self, length: int, *, dropped: bool) -> str:
        limit = self._limit
        if self._long_rows == "drop" and dropped:
            return f"has {length:,} tokens, above the limit of {limit:,} (long_rows: drop)"
        if limit:
            return f"has no loss token within the limit of {limit:,} tokens"
        return "has no loss token"

    def _batches(
        self, rows: Sequence[RenderedRow], encoded: Encoded, per_row: int
    ) -> tuple[pa.RecordBatch, pa.RecordBatch]:
        """Return the token columns of rows and their index."""
        if not rows:
            return pa.RecordBatch.from_pylist([], self._schema), pa.RecordBatch.from_pylist([], _UNPLACED)
        if self._task != "preference_tuning":
            columns, trained = _columns(encoded)
        elif per_row == 2:
            columns, trained = _pair_columns(encoded)
        else:
            columns, trained = _unpaired_columns(encoded, np.array([row.label == 1 for row in rows]))
        if "label" in self._schema.names:
            columns.append(pa.array([row.label for row in rows], pa.int32()))
        index = [
            [row.file for row in rows],
            [row.row for row in rows],
            _by_row(encoded.lengths, per_row).sum(axis=1),
            trained,
            _by_row(encoded.lengths, per_row).max(axis=1),
            [digest_of(row.sequences) for row in rows],
        ]
        return pa.record_batch(columns, schema=self._schema), pa.record_batch(index, schema=_UNPLACED)


def data_schema(task: Task) -> pa.Schema:
    """Return the columns of data.arrow."""
    columns: list[tuple[str, pa.DataType]] = [(name, pa.list_(pa.int32())) for name in _TOKEN_COLUMNS[task]]
    return pa.schema([*columns, ("label", pa.int32())] if task == "classification" else columns)


def _by_row(of_sequences: np.ndarray, per_row: int) -> np.ndarray:
    """Reshape [sequences] to [rows, sequences per row]."""
    return of_sequences.reshape(-1, per_row)


class TokenWriter:
    """A writer of token files and their index. The files do not depend on how their rows were grouped for `add`."""

    def __init__(self, task: Task, data: Path, index: Path):
        self._written = 0
        self._waiting: list[tuple[pa.RecordBatch, pa.RecordBatch]] = []
        self._rows_of_batch = self._size_of_batch = 0
        self._files = ExitStack()
        self._data = self._open(data, data_schema(task))
        self._index = self._open(index, INDEX_SCHEMA)

    def _open(self, path: Path, schema: pa.Schema) -> pa.RecordBatchStreamWriter:
        sink = self._files.enter_context(pa.OSFile(str(path), "wb"))
        return self._files.enter_context(pa.ipc.new_stream(sink, schema))

    def close(self) -> None:
        """Finish both files."""
        self._files.close()

    def add(self, rows: TokenizedRows) -> None:
        """Add the next rows of a source."""
        sizes, kept = sums(rows.sizes), sums(rows.kept)
        begin = 0
        while begin < len(rows.kept):
            full = np.searchsorted(sizes, sizes[begin] + _BATCH_SIZE - self._size_of_batch)
            end = min(int(full), begin + _BATCH_ROWS - self._rows_of_batch, len(rows.kept))
            piece = kept[begin], kept[end] - kept[begin]
            self._waiting.append((rows.data.slice(*piece), rows.index.slice(*piece)))
            self._rows_of_batch += end - begin
            self._size_of_batch += int(sizes[end] - sizes[begin])
            if self._rows_of_batch == _BATCH_ROWS or self._size_of_batch >= _BATCH_SIZE:
                self.end_batch()
            begin = end

    def end_batch(self) -> None:
        """Write the rows that wait for more rows of their source."""
        waiting = [piece for piece in self._waiting if piece[0].num_rows]
        self._waiting, self._rows_of_batch, self._size_of_batch = [], 0, 0
        if not waiting:
            return
        data, index = (pa.concat_batches(pieces) for pieces in zip(*waiting, strict=True))
        self._data.write_batch(data)
        positions = np.arange(self._written, self._written + len(index))
        self._index.write_batch(pa.record_batch([positions, *index.columns], schema=INDEX_SCHEMA))
        self._written += len(index)


def read_row(data: Path, position: int) -> dict[str, Any]:
    """Return one row of a file of tokens."""
    with pa.memory_map(str(data)) as source:
        return pa.ipc.open_stream(source).read_all().slice(position, 1).to_pylist()[0]


def _columns(encoded: Encoded) -> tuple[list[pa.Array], np.ndarray]:
    """Return the token columns of single-sequence rows, and the number of loss tokens per row."""
    labels = np.where(encoded.trained, encoded.ids, np.int32(IGNORED))
    return [_lists(encoded.ids, encoded.lengths), _lists(labels, encoded.lengths)], encoded.predicted()


def _pair_columns(encoded: Encoded) -> tuple[list[pa.Array], np.ndarray]:
    """Return the token columns of preference pairs (prompt, chosen, rejected), and the number of loss tokens per pair."""
    begins = encoded.begins()
    shared = np.array(
        [_shared(encoded, *begins[first : first + 3]) for first in range(0, len(begins) - 1, 2)]
    )
    in_prompt = encoded.places() < np.repeat(np.repeat(shared, 2), encoded.lengths)
    in_chosen = np.repeat(np.arange(len(encoded.lengths)) % 2 == 0, encoded.lengths)
    chosen, rejected = encoded.lengths[::2] - shared, encoded.lengths[1::2] - shared
    columns = [
        _lists(encoded.ids[in_chosen & in_prompt], shared),
        _lists(encoded.ids[in_chosen & ~in_prompt], chosen),
        _lists(encoded.ids[~in_chosen & ~in_prompt], rejected),
    ]
    return columns, chosen + rejected


def _unpaired_columns(encoded: Encoded, is_chosen: np.ndarray) -> tuple[list[pa.Array], np.ndarray]:
    """Return the token columns of unpaired rows (prompt, chosen, rejected), one of the last two empty, and their loss tokens.

    Args:
        encoded: One sequence per row.
        is_chosen: True for rows whose response is the chosen one, bool [rows].
    """
    begins = encoded.begins()
    prompts = np.array([encoded.trained[begin:end].argmax() for begin, end in pairwise(begins)], np.int64)
    in_prompt = encoded.places() < np.repeat(prompts, encoded.lengths)
    responses = encoded.lengths - prompts
    columns = [_lists(encoded.ids[in_prompt], prompts)]
    for side in (is_chosen, ~is_chosen):
        of_side = np.repeat(side, encoded.lengths)
        columns.append(_lists(encoded.ids[of_side & ~in_prompt], np.where(side, responses, 0)))
    return columns, responses


def _shared(encoded: Encoded, begin: int, middle: int, end: int) -> int:
    """Return the number of prompt tokens of a pair; a token that crosses the prompt's end belongs to the completion."""
    chosen, rejected = slice(begin, middle), slice(middle, end)
    shared = min(int(encoded.trained[side].argmax()) for side in (chosen, rejected))
    differs = encoded.ids[chosen][:shared] != encoded.ids[rejected][:shared]
    return int(differs.argmax()) if differs.any() else shared


def _lists(ids: np.ndarray, lengths: np.ndarray) -> pa.Array:
    """Split concatenated ids into an int32 list array."""
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(ends, ids)
