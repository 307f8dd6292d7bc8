"""One pass over rows: their chunks, the files that the results are written to, and the tally of what became of the rows."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.data.chunks import Chunk, ChunkResult, ChunkTokenizer
from training.data.errors import DataError
from training.data.request import DataRequest
from training.data.rows import RowSchema
from training.data.sources import DataFile, Piece, StoredBatch, open_file
from training.data.template_checks import TEMPLATE_KINDS
from training.data.token_files import TokenWriter

_CHUNK_ROWS, _CHUNK_BYTES = 1000, 2_000_000
_MAX_SHOWN = 5
_RENDERING_KINDS = {*TEMPLATE_KINDS, "reasoning", "rendered already", "several contexts"}
"""Faults of rows whose format was read."""
_VARIES = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\d+""")
"""Parts of an error that differ between rows with the same fault: Python writes texts with an apostrophe in double quotes."""

Place = tuple[int, int]
"""(index in `DataRequest.files`, row)."""


class RowPass:
    """The state of one pass over rows."""

    def __init__(self, request: DataRequest, tokenizer: ChunkTokenizer):
        self.tally = Tally()
        self.schema: RowSchema | None = None
        """Schema of the rows of the current source; None until a row has a known format."""
        self._request = request
        self._tokenizer = tokenizer
        self._taken_before = 0

    def chunks(
        self,
        pieces: Iterable[Piece],
        cache: Path | None,
        schema: RowSchema | None = None,
        progress: Callable[[int, float], None] = lambda rows, fraction: None,
    ) -> Iterator[Chunk]:
        """Yield the rows of one source in chunks, until enough rows are taken.

        Args:
            pieces: The source's files, or pieces of them.
            cache: Where to keep copies of files; see `open_file`.
            schema: How the rows are read; None if no row before these has a known format.
            progress: Called with the number of rows read and the fraction of all files, 0 to 1.
        """
        request = self._request
        self.schema, self._taken_before, read = schema, self.tally.taken, 0
        for piece in pieces:
            if self._has_enough(read):
                return
            opened = open_file(request.files[piece.file], cache, piece)
            for stored, rows in _chunked(opened.stored):
                self.schema = self.schema or self._tokenizer.find_schema(stored)
                read += rows
                progress(read, (piece.file + opened.fraction()) / len(request.files))
                left = None if request.max_rows is None else request.max_rows - self._taken
                yield Chunk(piece.file, stored, self.schema, self._fails, left)
                if self._has_enough(read):
                    break
            self.tally.lines += opened.lines()

    @contextmanager
    def writing(
        self, data: Path, index: Path, skipped: Path
    ) -> Iterator[Callable[[Iterable[ChunkResult]], None]]:
        """Yield a function that adds the results of one source's chunks to the tally and to these files."""
        with (
            skipped.open("w", encoding="utf-8") as lines,
            closing(TokenWriter(self._request.task, data, index)) as tokens,
        ):

            def write(results: Iterable[ChunkResult]) -> None:
                for result in results:
                    self.tally.add(result)
                    lines.writelines(f"{line}\n" for _, line in result.skipped)
                    if result.tokenized:
                        tokens.add(result.tokenized)
                tokens.end_batch()

            yield write

    @property
    def _taken(self) -> int:
        """Rows taken from the current source."""
        return self.tally.taken - self._taken_before

    @property
    def _fails(self) -> bool:
        """True if a row stops the run, so that only further faults are collected."""
        return self._request.bad_rows == "error" and self.tally.kinds.total() > 0

    def _has_enough(self, read: int) -> bool:
        """Return whether `max_rows` of a source are taken or, if a row stops the run, read."""
        limit = self._request.max_rows
        return limit is not None and (read if self._fails else self._taken) >= limit


def _chunked(stored: Iterator[tuple[int, Any]]) -> Iterator[tuple[list[tuple[int, Any]], int]]:
    """Yield chunks of what a file stores, and the number of rows in each; lines of JSON are limited by their size, too."""
    chunk: list[tuple[int, Any]] = []
    rows = size = 0
    for number, value in stored:
        chunk.append((number, value))
        rows += len(value.batch) if isinstance(value, StoredBatch) else 1
        size += len(value) if isinstance(value, bytes) else 0
        if rows >= _CHUNK_ROWS or size >= _CHUNK_BYTES:
            yield chunk, rows
            chunk, rows, size = [], 0, 0
    if chunk:
        yield chunk, rows


@dataclass
class Tally:
    """The outcome of rows. Its size depends on the kinds of faults and lengths, not on the number of rows."""

    read: int = 0
    taken: int = 0
    """Rows that can be trained on, before the token limit."""
    rows: int = 0
    """Rows within the token limit."""
    largest_id: int = -1
    """Largest token id of these rows."""
    truncated: int = 0
    lost: int = 0
    """Tokens removed by truncation or in dropped rows."""
    dropped: int = 0
    split_rows: int = 0
    split_sequences: int = 0
    too_long_rows: int = 0
    lines: int = 0
    """Lines of a range of a JSONL file, whose rows are numbered from its start; 0 for other rows."""
    has_chats: bool = False
    has_reasoning: bool = False
    lengths: Counter[int] = field(default_factory=Counter)
    """Tokens per row, before the limit -> number of rows."""
    notes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    """Fault -> number of rejected rows."""
    alike: Counter[str] = field(default_factory=Counter)
    """Message of a fault without its quoted texts and numbers -> number of rejected rows."""
    shown: dict[str, tuple[Place, str]] = field(default_factory=dict)
    """The first of these messages -> their first occurrence."""
    too_long: list[tuple[Place, int]] = field(default_factory=list)
    """The first rows that exceed the limit with `long_rows: error`, and their tokens."""

    def add(self, result: ChunkResult) -> None:
        """Add the rows of the next chunk."""
        self.read += result.read
        self.taken += result.taken
        self.split_rows += result.split_rows
        self.split_sequences += result.split_sequences
        self.has_chats |= result.has_chats
        self.has_reasoning |= result.has_reasoning
        self.notes.update(result.notes)
        for row, kind, message in result.faults:
            same = _VARIES.sub("", message)
            self.kinds[kind] += 1
            self.alike[same] += 1
            self._show(same, (result.file, row), message)
        if rows := result.tokenized:
            self.rows += rows.data.num_rows
            self.largest_id = max(self.largest_id, rows.largest_id)
            self.truncated += rows.truncated
            self.lost += rows.lost
            self.dropped += len(rows.left_out)
            self.lengths.update(rows.lengths.tolist())
            longest: dict[Place, int] = {}  # a row may have several sequences
            for file, row, tokens in rows.too_long:
                longest[file, row] = max(tokens, longest.get((file, row), 0))
            self.too_long_rows += len(longest)
            self.too_long = [*self.too_long, *longest.items()][:_MAX_SHOWN]

    def merge(self, following: "Tally", lines_before: int) -> None:
        """Add the rows of another tally, which follow those of this one.

        Args:
            following: The other tally.
            lines_before: Number to add to its row numbers.
        """
        for name in (
            *("read", "taken", "rows", "truncated", "lost", "dropped", "too_long_rows"),
            *("split_rows", "split_sequences"),
        ):
            setattr(self, name, getattr(self, name) + getattr(following, name))
        self.largest_id = max(self.largest_id, following.largest_id)
        self.has_chats |= following.has_chats
        self.has_reasoning |= following.has_reasoning
        for name in ("lengths", "notes", "kinds", "alike"):
            getattr(self, name).update(getattr(following, name))
        for same, ((file, row), message) in following.shown.items():
            self._show(same, (file, row + lines_before), message)
        places = [((file, row + lines_before), tokens) for (file, row), tokens in following.too_long]
        self.too_long = [*self.too_long, *places][:_MAX_SHOWN]

    def _show(self, same: str, place: Place, message: str) -> None:
        if len(self.shown) < _MAX_SHOWN:
            self.shown.setdefault(same, (place, message))

    def first_faults(self, files: Sequence[DataFile]) -> list[str]:
        """Return the first messages, each with its file and row and the number of rows that have the same."""
        return [
            f"{files[file].uri}:{row}: {message}"
            + (f" (and {self.alike[same] - 1:,} more rows)" if self.alike[same] > 1 else "")
            for same, ((file, row), message) in self.shown.items()
        ]

    def reject_faults(self, request: DataRequest, template: str) -> None:
        """Raise an error for rows that stop the run.

        Args:
            request: The request for the rows.
            template: Where the chat template comes from.
        """
        count = self.kinds.total()
        if not count or (request.bad_rows == "skip" and self.rows):
            return
        lines = self.describe_faults(request.files, "trained on", template)
        if self.kinds.keys() <= _RENDERING_KINDS:
            every = "No row can be rendered as it is: do what these errors say, or set chat_template."
        else:
            every = (
                "No row fits the YAML: check task, data_format, columns and prompt_template, or fix the rows."
            )
        some = "Fix or remove these rows, or skip them with bad_rows: skip."
        lines.append(some if count < self.read else every)
        raise DataError("\n".join(lines))

    def describe_faults(self, files: Sequence[DataFile], use: str, template: str) -> list[str]:
        """Return the lines of an error about rejected rows: their number by kind, the first messages, and the chat template.

        Args:
            files: The files of the rows.
            use: What the rows cannot be used for.
            template: Where the chat template comes from.
        """
        count = self.kinds.total()
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in self.kinds.most_common())
        lines = [f"{count:,} of {self.read:,} rows cannot be {use} ({kinds}):", *self.first_faults(files)]
        if unseen := count - sum(self.alike[same] for same in self.shown):
            lines.append(f"… and {unseen:,} more rows")
        if self.kinds.keys() & _RENDERING_KINDS:
            lines.append(f"The chat template is {template}.")
        return lines

    def reject_long_rows(self, request: DataRequest) -> None:
        """Raise an error for rows that exceed the limit with `long_rows: error`, or if no rows are left."""
        sources = ", ".join(request.paths)
        if self.too_long:
            more = self.too_long_rows - len(self.too_long)
            shown = "\n".join(
                f"{request.files[file].uri}:{row}: {tokens} tokens" for (file, row), tokens in self.too_long
            ) + (f"\n… and {_rows(more)} more" if more else "")
            raise DataError(
                f"{sources}: {_rows(self.too_long_rows)} above the limit of {request.limit} tokens (long_rows: error):\n{shown}\n"
                "Increase context_length, shorten these rows, or set long_rows to truncate or drop."
            )
        if self.rows == 0 and not self.dropped:
            raise DataError(
                f"{sources}: no row is in this part of the split: with few rows, a share can be empty. Increase valid_split, or set valid_path."
            )
        if self.rows == 0:
            advice = (
                "Increase context_length."
                if request.context_length
                else "This is the model's maximum context, so shorten the rows."
            )
            raise DataError(
                f"{sources}: no row has a loss token within {request.limit} tokens ({_rows(self.taken)} dropped). {advice}"
            )


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def reject_empty_shares(request: DataRequest, rows: Sequence[int]) -> None:
    """Raise an error for a source with a weight and without rows.

    Args:
        request: The request for the rows.
        rows: Rows of each source within the token limit.
    """
    for path, count in zip(request.paths, rows, strict=True):
        if request.weights and not count:
            raise DataError(
                f"{path}: no rows are left after filtering, so the source cannot fill its weight's share of an epoch. Fix it, or "
                "remove it from train_path."
            )
