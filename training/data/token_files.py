"""Token files: the tokens of all rows (data.arrow) and one index entry per row (index.arrow)."""

from array import array
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import xxhash

from training.data.encoding import Encoded, Encoder
from training.data.errors import DataError
from training.data.records import Task, Tokens
from training.data.rendered import Rendered
from training.data.request import DataRequest
from training.data.row_index import DATA_FILE, IGNORED, INDEX_FILE, INDEX_SCHEMA

if TYPE_CHECKING:
    from tokenizers import Encoding


_MAX_SHOWN = 5
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
    """Of classification: index of the label. Of an unpaired row: 1 if its response is the chosen one, 0 if the rejected one."""


def digest_of(sequences: Sequence[Rendered | Tokens], seed: int = 0) -> int:
    """Return a 64-bit hash of a row's text or tokens, to find duplicates and to split rows."""
    return xxhash.xxh3_64_intdigest(b"\x00".join(sequence.content for sequence in sequences), seed=seed)


class TokenWriter:
    """A writer that applies the token limit and writes rows to data.arrow and index.arrow."""

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
        self._per_row = 1  # sequences of each row of the batch that is added
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
        """Write a batch of rows; `encodings` holds one entry per sequence, in order."""
        self._per_row = len(batch[0].sequences)
        encoded = self.encoder.locate([sequence for row in batch for sequence in row.sequences], encodings)
        encoded, kept = self._within_limit(batch, encoded)
        rows = [batch[number] for number in np.flatnonzero(kept)]
        if not rows:
            return
        if self.request.task != "preference_tuning":
            columns, trained = _columns(encoded)
        elif self._per_row == 2:
            columns, trained = _pair_columns(encoded)
        else:
            columns, trained = _unpaired_columns(encoded, np.array([row.label == 1 for row in rows]))
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
        """Reshape [sequences] to [rows, sequences per row]."""
        return of_sequences.reshape(-1, self._per_row)

    def _within_limit(self, batch: "list[RenderedRow]", encoded: Encoded) -> tuple[Encoded, np.ndarray]:
        """Apply the token limit and return the retained sequences and a mask of the retained rows, bool [rows]."""
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
                reason = f"has {longest[number]:,} tokens, above the limit of {limit:,} (long_rows: drop)"
            elif limit:
                reason = f"has no loss token within the limit of {limit:,} tokens"
            else:
                reason = "has no loss token"
            self.leave_out(row, reason)
        return (encoded if kept.all() else encoded.take(np.repeat(kept, self._per_row))), kept

    def reject_long_rows(self) -> None:
        """Raise an error for rows that exceed the limit with `long_rows: error`, or if no rows are left."""
        request = self.request
        sources = ", ".join(request.paths)
        if self.too_long:
            more = self.too_long_rows - len(self.too_long)
            shown = "\n".join(self.too_long) + (f"\n… and {more:,} more rows" if more else "")
            raise DataError(
                f"{sources}: {self.too_long_rows:,} rows exceed the limit of {request.limit} tokens (long_rows: error):\n{shown}\n"
                "Increase context_length, shorten these rows, or set long_rows to truncate or drop."
            )
        if self.rows == 0:
            advice = (
                "Increase context_length."
                if request.context_length
                else "This is the model's maximum context, so shorten the rows."
            )
            raise DataError(
                f"{sources}: no row has a loss token within {request.limit} tokens ({self.dropped:,} rows dropped). {advice}"
            )


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
