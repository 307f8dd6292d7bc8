"""Data preparation on the driver: convert the sources into tokens and labels, once per data set.

This thread renders the chat template while a second thread tokenizes the previous batch.
"""

import gc
import json
import re
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from configs.schema import DataFormat
from training.data.encoding import Encoder
from training.data.errors import DataError, RowError
from training.data.prepared import (
    PREPARED,
    SKIPPED_FILE,
    SUMMARY_FILE,
    PreparedData,
    find_prepared,
    fingerprint,
    open_prepared,
)
from training.data.records import Chat, Example, Pair, Tokens
from training.data.rendered import Rendered
from training.data.request import DataRequest
from training.data.row_index import INDEX_FILE, INDEX_SCHEMA, RowIndex
from training.data.rows import FORMAT_NAMES, RowSchema, read_row, recognise
from training.data.sources import open_file
from training.data.summary import (
    DataSummary,
    SourceSummary,
    find_duplicates,
    measure_lengths,
    show_examples,
)
from training.data.template_checks import DROPPED_TEXT
from training.data.templates import Renderer
from training.data.token_files import RenderedRow, TokenWriter, digest_of
from utils.files import file_lock, write_atomically

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerFast

_BATCH_ROWS, _BATCH_CHARACTERS = 1000, 2_000_000
_AHEAD = 2  # batches in the tokenizer queue while the next batch is rendered
_MAX_SHOWN = 5
_SHOWN_CHARACTERS = 2000
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

    def add(self, place: str, error: RowError) -> None:
        self.counts[error.kind] += 1
        same = _VARIES.sub("", str(error))
        self.alike[same] += 1
        if len(self.shown) < _MAX_SHOWN:
            self.shown.setdefault(same, f"{place}: {error}")

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
        self.renderer = Renderer(
            tokenizer,
            whole_text=request.task == "causal_lm",
            turns=request.turns,
            variables=dict(request.chat_template_kwargs),
            today=date.fromisoformat(request.date) if request.date else None,
        )
        self.notes: Counter[str] = Counter()
        self._ignored = frozenset(request.ignore_columns)
        self.split_rows = 0
        self.has_chats = False
        self.directory = directory
        self.rows_read = 0
        self.faults = _Faults()
        self.skipped = (directory / SKIPPED_FILE).open("w", encoding="utf-8")
        self.encoder = Encoder(tokenizer, whole_text=request.task == "causal_lm")
        self.tokens = TokenWriter(request, self.encoder, directory, self._leave_out)
        self.formats: list[DataFormat] = []
        self.rows_of_sources: list[int] = []

    def __enter__(self) -> "_Preparation":
        return self

    def __exit__(self, *_: object) -> None:
        self.skipped.close()
        self.tokens.close()

    def run(self, cache: Path, progress: Callable[[int, float], None]) -> DataSummary:
        pending: deque[tuple[list[RenderedRow], Future[list[Encoding]]]] = deque()
        with ThreadPoolExecutor(1, "encode") as pool:
            for source in range(len(self.request.paths)):
                before = self.tokens.rows
                for batch in _batched(self._rows_of(source, cache, progress)):
                    sequences = [sequence for row in batch for sequence in row.sequences]
                    pending.append((batch, pool.submit(self.encoder.encode, sequences)))
                    if len(pending) > _AHEAD:
                        self._write_first(pending)
                while pending:
                    self._write_first(pending)
                self.rows_of_sources.append(self.tokens.rows - before)
        self._reject_faults()
        return self._summary()

    def _write_first(self, pending: "deque[tuple[list[RenderedRow], Future[list[Encoding]]]]") -> None:
        batch, future = pending.popleft()
        self.tokens.add(batch, future.result())

    def _rows_of(
        self, source: int, cache: Path, progress: Callable[[int, float], None]
    ) -> Iterator[RenderedRow]:
        request = self.request
        files = request.files
        reading: RowSchema | None = None
        began, taken = self.rows_read, 0
        for number, file in enumerate(files):
            if file.source != source or taken == request.max_rows:
                continue
            opened = open_file(file, cache / "data")
            for row, value in opened.rows:
                if taken == request.max_rows:
                    break
                self.rows_read += 1
                if self.rows_read % _BATCH_ROWS == 0:
                    progress(self.rows_read, (number + opened.fraction()) / len(files))
                try:
                    if isinstance(value, RowError):
                        raise value
                    ignored = self._ignored & value.keys()
                    if ignored:
                        value = {name: entry for name, entry in value.items() if name not in ignored}
                    reading = reading or self._reading(value)
                    example = self._read(value, reading)
                    sequences = self.renderer.render(example)
                except RowError as error:
                    self.faults.add(f"{file.uri}:{row}", error)
                    self._write_skipped(file.uri, row, str(error), value)
                    continue
                if request.bad_rows == "error" and self.faults.counts:
                    continue  # the run will fail: only collect further faults
                if request.share != (0.0, 1.0) and not self._is_in_share(sequences):
                    continue
                if notes := (*example.notes, *self.renderer.notes(example, sequences)):
                    self.notes.update(set(notes))
                self.notes.update(f"column `{name}` is ignored (ignore_columns)" for name in ignored)
                taken += 1
                self.has_chats |= isinstance(example, Chat | Pair)
                if isinstance(example, Pair):
                    only = int(bool(example.chosen)) if len(sequences) == 1 else None
                    yield RenderedRow(number, row, sequences, only)
                    continue
                self.split_rows += len(sequences) > 1
                for sequence in sequences:
                    yield RenderedRow(number, row, (sequence,), getattr(example, "label", None))
        if self.rows_read == began:
            raise DataError(
                f"{request.paths[source]}: contains no rows. Use files with at least one row to train on."
            )
        self.formats.append(reading.data_format if reading else "messages")

    def _is_in_share(self, sequences: Sequence[Rendered | Tokens]) -> bool:
        begin, end = self.request.share
        return begin <= digest_of(sequences, self.request.seed) / 2**64 < end

    def _reading(self, row: dict[str, Any]) -> RowSchema:
        request = self.request
        columns = dict(request.columns)
        data_format = request.data_format
        if data_format == "auto":
            data_format = recognise(
                row, columns, request.task, request.prompt_template, unpaired=request.unpaired
            )
        return RowSchema(
            request.task, data_format, columns, request.prompt_template, request.labels, request.unpaired
        )

    def _read(self, row: dict[str, Any], reading: RowSchema) -> Example:
        try:
            return read_row(row, reading)
        except RowError as error:
            if self.request.data_format == "auto":
                other = recognise(
                    row, reading.columns, reading.task, reading.prompt_template, unpaired=reading.unpaired
                )
                if other != reading.data_format:
                    raise RowError(
                        "mixed formats",
                        f"has the format {FORMAT_NAMES[other]}, but earlier rows have {FORMAT_NAMES[reading.data_format]}. Use a separate "
                        "source for each format",
                    ) from error
            raise

    def _leave_out(self, row: RenderedRow, reason: str) -> None:
        """Record a row that is too long, or that has no loss tokens after truncation."""
        self._write_skipped(self.request.files[row.file].uri, row.row, reason, None)

    def _write_skipped(self, uri: str, row: int, reason: str, value: Any) -> None:
        line = {"file": uri, "row": row, "reason": reason, "content": _shown(value)}
        text = json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
        self.skipped.write(text + "\n")

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
            date=self.renderer.date if self.has_chats else None,
        )
        dataset = PreparedData("", self.directory, summary).dataset()
        return replace(summary, examples=show_examples(dataset, self.tokenizer))


def _batched(rows: Iterator[RenderedRow]) -> Iterator[list[RenderedRow]]:
    batch: list[RenderedRow] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += sum(sequence.size for sequence in row.sequences)
        if len(batch) == _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _shown(value: Any) -> str:
    if value is None or isinstance(value, RowError):
        return ""
    try:
        return json.dumps(value, ensure_ascii=False, default=str)[:_SHOWN_CHARACTERS]
    except RecursionError:
        return "(nested too deeply to display)"


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
