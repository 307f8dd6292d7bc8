"""The files that rows become: their tokens (data.arrow), and a line about each (index.arrow)."""

from array import array
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
        columns = _Columns(pairs=self.request.task == "preference_tuning")
        remaining = iter(encodings)
        for row in batch:
            sequences = [self.encoder.locate(rendered, next(remaining)) for rendered in row.sequences]
            if self._fits(row, sequences):
                columns.add(self.rows, row, sequences)
                self.rows += 1
        if columns.index:
            self._data.write_batch(columns.data(self._schema))
            self._index.write_batch(
                pa.record_batch(
                    [list(column) for column in zip(*columns.index, strict=True)], schema=INDEX_SCHEMA
                )
            )

    def _fits(self, row: RenderedRow, sequences: list[Encoded]) -> bool:
        """Cut the sequences at the limit; false where the row is left out."""
        limit = self.request.limit
        length = max(len(sequence.ids) for sequence in sequences)
        self.lengths.append(length)
        cut = 0
        if limit and length > limit:
            if self.request.long_rows == "error":
                self.too_long_rows += 1
                if len(self.too_long) < _MAX_SHOWN:
                    self.too_long.append(f"{self.files[row.file].uri}:{row.row}: {length} tokens")
                return False
            if self.request.long_rows == "drop":
                self.dropped += 1
                self.lost += sum(len(sequence.ids) for sequence in sequences)
                self.leave_out(row, f"has {length:,} tokens, and {limit:,} are taken (long_rows: drop)")
                return False
            cut = sum(sequence.cut(limit) for sequence in sequences)
            self.lost += cut
        if not all(sequence.trained for sequence in sequences):
            self.dropped += 1
            self.lost += sum(len(sequence.ids) for sequence in sequences)
            self.leave_out(
                row,
                f"has no trained token within the {limit:,} tokens that are taken"
                if limit
                else "has no trained token",
            )
            return False
        self.truncated += cut > 0
        return True

    def refuse_long_rows(self) -> None:
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


class _Columns:
    """A batch on its way into Arrow: flat lists of tokens with the rows' ends."""

    def __init__(self, *, pairs: bool):
        self.pairs = pairs
        self.index: list[tuple[int, ...]] = []
        self.labels: list[int | None] = []
        self._flat: list[list[int]] = [[], [], []] if pairs else [[]]
        self._ends: list[list[int]] = [[0], [0], [0]] if pairs else [[0]]
        self._spans: list[tuple[int, int]] = []

    def add(self, position: int, row: RenderedRow, sequences: list[Encoded]) -> None:
        if self.pairs:
            parts = _shared_prompt(*sequences)
            tokens, trained = sum(len(sequence.ids) for sequence in sequences), len(parts[1]) + len(parts[2])
        else:
            begin = len(self._flat[0])
            parts = (sequences[0].ids,)
            tokens, trained = len(sequences[0].ids), sequences[0].trained
            self._spans += [(begin + first, begin + end) for first, end in sequences[0].spans]
        for flat, ends, part in zip(self._flat, self._ends, parts, strict=True):
            flat += part
            ends.append(len(flat))
        digest = digest_of(row.sequences)
        length = max(len(sequence.ids) for sequence in sequences)
        self.index.append((position, row.file, row.row, tokens, trained, length, digest))
        self.labels.append(row.label)

    def data(self, schema: pa.Schema) -> pa.RecordBatch:
        flat = [np.array(part, dtype=np.int32) for part in self._flat]
        ends = [np.array(part, dtype=np.int32) for part in self._ends]
        if not self.pairs:
            steps = np.zeros(len(flat[0]) + 1, dtype=np.int8)
            for begin, end in self._spans:
                steps[begin] += 1
                steps[end] -= 1
            flat.append(np.where(np.cumsum(steps[:-1]) > 0, flat[0], np.int32(IGNORED)))
            ends.append(ends[0])
        columns: list[Any] = [
            pa.ListArray.from_arrays(end, part) for end, part in zip(ends, flat, strict=True)
        ]
        if "label" in schema.names:
            columns.append(pa.array(self.labels, pa.int32()))
        return pa.record_batch(columns, schema=schema)


def _shared_prompt(chosen: Encoded, rejected: Encoded) -> tuple[list[int], list[int], list[int]]:
    """(prompt, chosen, rejected): a token that reaches over the prompt's end belongs to the completion."""
    shared = min(chosen.spans[0][0], rejected.spans[0][0])
    while chosen.ids[:shared] != rejected.ids[:shared]:
        shared -= 1
    return chosen.ids[:shared], chosen.ids[shared:], rejected.ids[shared:]
