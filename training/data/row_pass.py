"""One pass over rows: their chunks, and the files that the results of the chunks are written to."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from training.data.chunks import Chunk, ChunkResult, ChunkTokenizer
from training.data.request import DataRequest
from training.data.rows import RowSchema
from training.data.sources import Piece, StoredBatch, open_file
from training.data.tally import Tally
from training.data.token_files import TokenWriter

_CHUNK_ROWS, _CHUNK_BYTES = 1000, 2_000_000


class RowPass:
    """The state of one pass over rows."""

    def __init__(self, request: DataRequest, tokenizer: ChunkTokenizer):
        self.tally = Tally()
        self.schema: RowSchema | None = None
        """How the rows of the current source are read; None until a row has a known format."""
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
