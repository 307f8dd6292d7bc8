"""Data preparation on the driver: convert the sources into tokens and labels, once per data set.

This process reads chunks of rows and writes their tokens. Between the two, processes check, render and tokenize them.
"""

import gc
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from configs.schema import DataFormat
from training.data.chunk_processes import ChunkProcesses
from training.data.chunks import Chunk, ChunkResult, ChunkTokenizer
from training.data.errors import DataError
from training.data.prepared import (
    PREPARED,
    SKIPPED_FILE,
    SUMMARY_FILE,
    PreparedData,
    find_prepared,
    fingerprint,
    open_prepared,
)
from training.data.request import DataRequest
from training.data.row_index import DATA_FILE, INDEX_FILE, INDEX_SCHEMA, RowIndex
from training.data.rows import RowSchema
from training.data.sources import StoredBatch, open_file
from training.data.summary import (
    DataSummary,
    SourceSummary,
    find_duplicates,
    measure_lengths,
    show_examples,
)
from training.data.template_checks import DROPPED_TEXT
from training.data.token_files import TokenWriter
from utils.files import file_lock, write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CHUNK_ROWS, _CHUNK_BYTES = 1000, 2_000_000
_MAX_SHOWN = 5
_VARIES = re.compile(r"'[^']*'|\d+")


def prepare_data(
    request: DataRequest,
    tokenizer: "PreTrainedTokenizerFast",
    tokenizer_dir: Path,
    cache: Path,
    *,
    bucket: str | None = None,
    template: str = "the model's",
    progress: Callable[[int, float], None] = lambda rows, fraction: None,
) -> PreparedData:
    """Tokenize the sources, or reuse prepared data from this node or the bucket (then without its tokens).

    Args:
        request: The sources and their settings.
        tokenizer: The model's tokenizer with the chat template to use.
        tokenizer_dir: Directory of the tokenizer files.
        cache: Node cache for downloads and prepared data.
        bucket: URI where prepared data is stored, or None.
        template: Where the chat template comes from, in errors.
        progress: Called with the number of rows read and the fraction of all sources, 0 to 1.
    """
    key = request.key(tokenizer_dir)
    if found := find_prepared(key, cache, bucket):
        return found
    directory = cache / PREPARED / key
    directory.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(directory.with_suffix(".lock")):
        if not (directory / SUMMARY_FILE).exists():
            _prepare(request, tokenizer, cache, directory, template, progress)
    return open_prepared(key, directory)


def _prepare(
    request: DataRequest,
    tokenizer: "PreTrainedTokenizerFast",
    cache: Path,
    directory: Path,
    template: str,
    progress: Callable[[int, float], None],
) -> None:
    staging = Path(tempfile.mkdtemp(dir=directory.parent, prefix=".partial-"))
    gc.freeze()  # garbage collection skips the objects of loaded libraries
    try:
        with _Preparation(request, tokenizer, staging, template) as preparation:
            summary = preparation.run(cache, progress)
        write_atomically(staging / SUMMARY_FILE, json.dumps(asdict(summary)).encode())
        staging.replace(directory)
    except OSError as error:
        raise DataError(
            f"{', '.join(request.paths)}: tokens cannot be written to {directory.parent} ({error}). Free disk space, or set output_dir "
            "to another disk."
        ) from error
    finally:
        gc.unfreeze()
        shutil.rmtree(staging, ignore_errors=True)


@dataclass
class _Faults:
    """Counts and first messages of rejected rows; messages that differ in quoted texts and numbers only count as one."""

    counts: Counter[str] = field(default_factory=Counter)
    shown: dict[str, str] = field(default_factory=dict)
    """Message without its quoted texts and numbers -> its first occurrence."""
    alike: Counter[str] = field(default_factory=Counter)

    def add(self, place: str, kind: str, message: str) -> None:
        self.counts[kind] += 1
        same = _VARIES.sub("", message)
        self.alike[same] += 1
        if len(self.shown) < _MAX_SHOWN:
            self.shown.setdefault(same, f"{place}: {message}")

    @property
    def first(self) -> list[str]:
        """The first messages, each with the number of rows that have the same."""
        return [
            f"{line} (and {self.alike[same] - 1:,} more rows)" if self.alike[same] > 1 else line
            for same, line in self.shown.items()
        ]

    @property
    def unseen(self) -> int:
        """The number of rows whose message is not among the first."""
        return self.counts.total() - sum(self.alike[same] for same in self.shown)


class _Preparation:
    """The state of one pass over the sources."""

    def __init__(
        self, request: DataRequest, tokenizer: "PreTrainedTokenizerFast", directory: Path, template: str
    ):
        self.request = request
        self.template = template
        self.tokenizer = tokenizer
        self.chunks = ChunkTokenizer(request, tokenizer)
        self.notes: Counter[str] = Counter()
        self.split_rows = 0
        self.has_chats = False
        self.directory = directory
        self.rows_read = 0
        self.taken = 0
        """Rows taken from the current source."""
        self.faults = _Faults()
        self.skipped = (directory / SKIPPED_FILE).open("w", encoding="utf-8")
        self.tokens = TokenWriter(request, directory)
        self.formats: list[DataFormat] = []
        self.rows_of_sources: list[int] = []

    def __enter__(self) -> "_Preparation":
        return self

    def __exit__(self, *_: object) -> None:
        self.skipped.close()
        self.tokens.close()

    def run(self, cache: Path, progress: Callable[[int, float], None]) -> DataSummary:
        with ChunkProcesses(self.chunks.tokenize) as processes:
            for source, path in enumerate(self.request.paths):
                rows, read = self.tokens.rows, self.rows_read
                chunks = self._chunks_of(source, cache, progress)
                if self.request.max_rows is None:
                    results = processes.tokenize(chunks, path)
                else:  # the rows taken from a chunk decide whether another one is read
                    results = map(self.chunks.tokenize, chunks)
                for result in results:
                    self._add(result)
                self.tokens.end_batch()
                if self.rows_read == read:
                    raise DataError(f"{path}: contains no rows. Use files with at least one row to train on.")
                self.rows_of_sources.append(self.tokens.rows - rows)
        self._reject_faults()
        return self._summary()

    def _chunks_of(self, source: int, cache: Path, progress: Callable[[int, float], None]) -> Iterator[Chunk]:
        """Yield the rows of a source in chunks, until enough rows are taken."""
        request, files = self.request, self.request.files
        schema: RowSchema | None = None
        self.taken, read = 0, 0
        before = self.rows_read
        for number, file in enumerate(files):
            if file.source != source or self._has_enough(read):
                continue
            opened = open_file(file, cache / "data")
            for stored, rows in _chunked(opened.stored):
                schema = schema or self.chunks.find_schema(stored)
                read += rows
                progress(before + read, (number + opened.fraction()) / len(files))
                left = None if request.max_rows is None else request.max_rows - self.taken
                yield Chunk(number, stored, schema, self._fails, left)
                if self._has_enough(read):
                    break
        self.formats.append(schema.data_format if schema else "messages")

    @property
    def _fails(self) -> bool:
        """True if a row stops the run, so that only further faults are collected."""
        return self.request.bad_rows == "error" and self.faults.counts.total() > 0

    def _has_enough(self, read: int) -> bool:
        """Return whether `max_rows` of a source are taken or, if a row stops the run, read."""
        limit = self.request.max_rows
        return limit is not None and (read if self._fails else self.taken) >= limit

    def _add(self, result: ChunkResult) -> None:
        """Add the tokens and the faults of the next chunk."""
        self.rows_read += result.read
        self.taken += result.taken
        uri = self.request.files[result.file].uri
        for row, kind, message in result.faults:
            self.faults.add(f"{uri}:{row}", kind, message)
        self.skipped.writelines(f"{line}\n" for _, line in result.skipped)
        self.notes.update(result.notes)
        self.split_rows += result.split_rows
        self.has_chats |= result.has_chats
        if result.tokenized:
            self.tokens.add(result.tokenized)

    def _reject_faults(self) -> None:
        faults, request = self.faults, self.request
        count = faults.counts.total()
        if count and (request.bad_rows == "error" or self.tokens.rows == 0):
            kinds = ", ".join(f"{number:,} {kind}" for kind, number in faults.counts.most_common())
            more = f"\n… and {faults.unseen:,} more rows" if faults.unseen else ""
            raise DataError(
                f"{count:,} of {self.rows_read:,} rows cannot be trained on ({kinds}):\n"
                + "\n".join(faults.first)
                + more
                + (
                    f"\nThe chat template is {self.template}."
                    if faults.counts.keys() & {"template", DROPPED_TEXT}
                    else ""
                )
                + (
                    "\nFix or remove these rows, or skip them with bad_rows: skip."
                    if count < self.rows_read
                    else "\nNo row fits the YAML: check task, data_format, columns and prompt_template, or fix the rows."
                )
            )
        self.tokens.reject_long_rows()
        for path, rows in zip(request.paths, self.rows_of_sources, strict=True):
            if request.weights and not rows:
                raise DataError(
                    f"{path}: no rows are left after filtering, so the source cannot fill its weight's share of an epoch. Fix it, or "
                    "remove it from train_path."
                )

    def _summary(self) -> DataSummary:
        request, tokens = self.request, self.tokens
        tokens.close()
        index_file = self.directory / INDEX_FILE
        with pa.memory_map(str(index_file)) as source:
            table = pa.ipc.open_stream(source).read_all()
        duplicates, first_duplicates = find_duplicates(RowIndex(table), request.files)
        taken = self.rows_of_sources
        if request.weights:
            taken = _shares(self.rows_of_sources, request.weights)
            table = table.take(_mix(self.rows_of_sources, taken, request.seed))
            mixed = self.directory / f"{INDEX_FILE}.mixed"
            with pa.OSFile(str(mixed), "wb") as sink, pa.ipc.new_stream(sink, INDEX_SCHEMA) as writer:
                writer.write_table(table)
            mixed.replace(index_file)
        index = RowIndex(table)
        summary = DataSummary(
            rows=len(index),
            tokens=int(index.tokens.sum()),
            trained_tokens=int(index.trained_tokens.sum()),
            longest=int(index.length.max()),
            truncated_rows=tokens.truncated,
            lost_tokens=tokens.lost,
            dropped_rows=tokens.dropped,
            split_rows=self.split_rows,
            notes=dict(self.notes.most_common()),
            skipped_rows=dict(self.faults.counts.most_common()),
            first_skipped=self.faults.first,
            duplicates=duplicates,
            first_duplicates=first_duplicates,
            lengths=measure_lengths(np.array(tokens.lengths, dtype=np.int64)),
            sources=[
                SourceSummary(
                    path, data_format, sum(file.source == number for file in request.files), rows, in_epoch
                )
                for number, (path, data_format, rows, in_epoch) in enumerate(
                    zip(request.paths, self.formats, self.rows_of_sources, taken, strict=True)
                )
            ],
            files=[file.uri for file in request.files],
            fingerprint=fingerprint(self.directory),
            examples=[],
            date=self.chunks.renderer.date if self.has_chats else None,
        )
        with pa.memory_map(str(self.directory / DATA_FILE)) as source:
            data = pa.ipc.open_stream(source).read_all()
            return replace(summary, examples=show_examples(data, index.position, self.tokenizer))


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
