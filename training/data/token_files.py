"""The files that rows become: their tokens (data.arrow), and a line about each (index.arrow)."""

from array import array
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import xxhash

from training.data.encoding import Encoded, Encoder
from training.data.request import DataRequest
from training.data.rows import Task
from training.data.sources import DataError
from training.data.templates import Rendered

if TYPE_CHECKING:
    from tokenizers import Encoding

IGNORED = -100  # torch's cross-entropy skips this label

DATA_FILE, INDEX_FILE = "data.arrow", "index.arrow"
INDEX_SCHEMA = pa.schema(
    [
        ("position", pa.int64()),
        ("file", pa.int32()),
        ("row", pa.int64()),
        ("tokens", pa.int32()),
        ("trained_tokens", pa.int32()),
        ("length", pa.int32()),
        ("digest", pa.uint64()),
    ]
)
_MAX_SHOWN = 5
_TOKEN_COLUMNS: dict[Task, tuple[str, ...]] = {
    "instruction_tuning": ("input_ids", "labels"),
    "causal_lm": ("input_ids", "labels"),
    "classification": ("input_ids", "labels"),
    "preference_tuning": ("prompt_ids", "chosen_ids", "rejected_ids"),
}


class RowIndex:
    """One line for each row of an epoch, as arrays; a row's number is its position here."""

    def __init__(self, table: pa.Table):
        self.position = table["position"].to_numpy()
        """Its row in data.arrow."""
        self.file = table["file"].to_numpy()
        self.row = table["row"].to_numpy()
        """Line or record in its file, from 1."""
        self.tokens = table["tokens"].to_numpy()
        """All that go through the model."""
        self.trained_tokens = table["trained_tokens"].to_numpy()
        self.length = table["length"].to_numpy()
        """Tokens of its longest sequence; a preference pair has two."""
        self.digest = table["digest"].to_numpy()

    def __len__(self) -> int:
        return len(self.position)


@dataclass(frozen=True, slots=True)
class RenderedRow:
    """A row as text, and where it came from."""

    file: int
    row: int
    sequences: tuple[Rendered, ...]
    label: int | None


def digest_of(sequences: tuple[Rendered, ...]) -> int:
    """What is equal for rows that say the same."""
    return xxhash.xxh3_64_intdigest("\x00".join(sequence.text for sequence in sequences).encode())


class TokenWriter:
    """Encoded rows -> data.arrow and index.arrow, within the limit."""

    def __init__(
        self,
        request: DataRequest,
        encoder: Encoder,
        directory: Path,
        leave_out: Callable[[RenderedRow, str], None],
    ):
        self.request = request
        self.leave_out = leave_out
        self.encoder = encoder
        self.files = request.files
        self.rows = self.truncated = self.lost = self.dropped = 0
        self.lengths = array("i")
        self.too_long: list[str] = []
        self.too_long_rows = 0
        columns: list[tuple[str, pa.DataType]] = [
            (name, pa.list_(pa.int32())) for name in _TOKEN_COLUMNS[request.task]
        ]
        if request.task == "classification":
            columns.append(("label", pa.int32()))
        self._schema = pa.schema(columns)
        self._per_row = 2 if request.task == "preference_tuning" else 1  # sequences
        self._files = ExitStack()
        self._data = self._open(directory / DATA_FILE, self._schema)
        self._index = self._open(directory / INDEX_FILE, INDEX_SCHEMA)

    def _open(self, path: Path, schema: pa.Schema) -> pa.RecordBatchStreamWriter:
        sink = self._files.enter_context(pa.OSFile(str(path), "wb"))
        return self._files.enter_context(pa.ipc.new_stream(sink, schema))

    def close(self) -> None:
        """Finish both files."""
        self._files.close()

    def add(self, batch: "list[RenderedRow]", encodings: "list[Encoding]") -> None:
        """Write a batch's rows; `encodings` are of their sequences, one after another."""
        encoded = self.encoder.locate([sequence for row in batch for sequence in row.sequences], encodings)
        encoded, kept = self._within_limit(batch, encoded)
        rows = [batch[number] for number in np.flatnonzero(kept)]
        if not rows:
            return
        columns, trained = _pair_columns(encoded) if self._per_row == 2 else _columns(encoded)
        if "label" in self._schema.names:
            columns.append(pa.array([row.label for row in rows], pa.int32()))
        index = [
            np.arange(self.rows, self.rows + len(rows)),
            [row.file for row in rows],
            [row.row for row in rows],
            self._by_row(encoded.lengths).sum(axis=1),
            trained,
            self._by_row(encoded.lengths).max(axis=1),
            [digest_of(row.sequences) for row in rows],
        ]
        self._data.write_batch(pa.record_batch(columns, schema=self._schema))
        self._index.write_batch(pa.record_batch(index, schema=INDEX_SCHEMA))
        self.rows += len(rows)

    def _by_row(self, of_sequences: np.ndarray) -> np.ndarray:
        """[rows, sequences of a row]"""
        return of_sequences.reshape(-1, self._per_row)

    def _within_limit(self, batch: "list[RenderedRow]", encoded: Encoded) -> tuple[Encoded, np.ndarray]:
        """Cut the sequences at the limit; what is kept of them, and which rows: bool [rows]."""
        limit, long_rows = self.request.limit, self.request.long_rows
        longest = self._by_row(encoded.lengths).max(axis=1)
        self.lengths.extend(longest.tolist())
        too_long = longest > limit if limit else np.zeros(len(batch), bool)
        if limit and long_rows == "truncate" and too_long.any():
            self.lost += int(np.maximum(encoded.lengths - limit, 0).sum())
            encoded = encoded.cut(limit)
        kept = self._by_row(encoded.predicted()).min(axis=1) > 0
        if long_rows != "truncate":
            kept &= ~too_long
        self.truncated += int((too_long & kept).sum())
        tokens = self._by_row(encoded.lengths).sum(axis=1)
        for number in np.flatnonzero(~kept):
            row = batch[number]
            if long_rows == "error" and too_long[number]:
                self.too_long_rows += 1
                if len(self.too_long) < _MAX_SHOWN:
                    self.too_long.append(f"{self.files[row.file].uri}:{row.row}: {longest[number]} tokens")
                continue
            self.dropped += 1
            self.lost += int(tokens[number])
            if long_rows == "drop" and too_long[number]:
                reason = f"has {longest[number]:,} tokens, and {limit:,} are taken (long_rows: drop)"
            elif limit:
                reason = f"has no trained token within the {limit:,} tokens that are taken"
            else:
                reason = "has no trained token"
            self.leave_out(row, reason)
        return (encoded if kept.all() else encoded.take(np.repeat(kept, self._per_row))), kept

    def reject_long_rows(self) -> None:
        """Raise what `long_rows: error` and an empty result ask for.

        Raises:
            DataError: some rows are too long, or none is left.
        """
        request = self.request
        sources = ", ".join(request.paths)
        if self.too_long:
            more = self.too_long_rows - len(self.too_long)
            shown = "\n".join(self.too_long) + (f"\n… and {more:,} more rows" if more else "")
            raise DataError(
                f"{sources}: long_rows is error, and of its rows {self.too_long_rows:,} exceed {request.limit} tokens:\n{shown}\n"
                "Raise context_length, shorten them, or set long_rows to truncate or drop."
            )
        if self.rows == 0:
            advice = (
                "Raise context_length."
                if request.context_length
                else "The model takes no more: shorten them."
            )
            raise DataError(
                f"{sources}: no row has a trained token within {request.limit} tokens ({self.dropped:,} rows dropped). {advice}"
            )


def _columns(encoded: Encoded) -> tuple[list[pa.Array], np.ndarray]:
    """Token columns of rows of one sequence, and how many tokens of each row are trained."""
    labels = np.where(encoded.trained, encoded.ids, np.int32(IGNORED))
    return [_lists(encoded.ids, encoded.lengths), _lists(labels, encoded.lengths)], encoded.predicted()


def _pair_columns(encoded: Encoded) -> tuple[list[pa.Array], np.ndarray]:
    """As `_columns`, of preference pairs: prompt, chosen and rejected."""
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


def _shared(encoded: Encoded, begin: int, middle: int, end: int) -> int:
    """Tokens of a pair's prompt: one that reaches over the prompt's end belongs to the completion."""
    chosen, rejected = slice(begin, middle), slice(middle, end)
    shared = min(int(encoded.trained[side].argmax()) for side in (chosen, rejected))
    differs = encoded.ids[chosen][:shared] != encoded.ids[rejected][:shared]
    return int(differs.argmax()) if differs.any() else shared


def _lists(ids: np.ndarray, lengths: np.ndarray) -> pa.Array:
    """int32 lists, one behind another."""
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(ends, ids)
