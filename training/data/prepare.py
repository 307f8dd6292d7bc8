"""Examples -> tokens and labels: prepared once, by the driver, and memory-mapped by everybody.

Text is laid out on this thread while the tokenizers library encodes the batch before on its own.
"""

import json
import shutil
import tempfile
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import xxhash

from configs.schema import DataFormat
from training.data.encoding import Encoded, Encoder
from training.data.rows import FORMAT_NAMES, Example, Reading, Task, read_row, recognise
from training.data.sources import DataError, DataFile, RowError, open_file
from training.data.templates import Rendered, Renderer
from utils.bucket import join_uri, open_store, sync_to_node
from utils.files import checksum, checksum_bytes, file_lock, write_atomically

if TYPE_CHECKING:
    from datasets import Dataset
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerFast

IGNORED = -100  # torch's cross-entropy skips this label

PREPARED = "prepared"
DATA_FILE, INDEX_FILE, SKIPPED_FILE, SUMMARY_FILE = (
    "data.arrow",
    "index.arrow",
    "skipped_rows.jsonl",
    "summary.json",
)
_FORMAT = 2  # raise it when prepared files change their meaning
_BATCH_ROWS, _BATCH_CHARACTERS = 1000, 2_000_000
_AHEAD = 2  # batches that are encoded while the next is laid out
_EXAMPLES, _EXAMPLE_TOKENS = 3, 400
_BARS = 14
_MAX_SHOWN = 5
_SHOWN_CHARACTERS = 2000
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "tokenizer.model",
)
_TOKEN_COLUMNS: dict[Task, tuple[str, ...]] = {
    "instruction_tuning": ("input_ids", "labels"),
    "causal_lm": ("input_ids", "labels"),
    "classification": ("input_ids", "labels"),
    "preference_tuning": ("prompt_ids", "chosen_ids", "rejected_ids"),
}
_INDEX_SCHEMA = pa.schema(
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


@dataclass(frozen=True)
class DataRequest:
    """What decides how sources become tokens."""

    paths: tuple[str, ...]
    """The sources as the YAML names them."""
    files: tuple[DataFile, ...]
    weights: tuple[float, ...] | None
    """Of each source; None: every row once."""
    task: Task
    data_format: Literal["auto"] | DataFormat
    columns: tuple[tuple[str, str], ...]
    """(our name, the name in the files)."""
    prompt_template: str | None
    chat_template: str | None
    """Jinja text; None: the model's own."""
    labels: tuple[str, ...]
    """Of a classification."""
    context_length: int | None
    """Tokens a row may have; None: as many as it has, at most `max_context`."""
    max_context: int | None
    """Tokens that the model's positions reach."""
    long_rows: Literal["truncate", "drop", "error"]
    bad_rows: Literal["error", "skip"]
    seed: int
    """Chooses rows where a weight takes a part of a source."""

    @property
    def limit(self) -> int | None:
        """Tokens a row may have, if anything limits them."""
        return self.context_length or self.max_context


@dataclass(frozen=True)
class SourceSummary:
    """What became of one source."""

    path: str
    format: DataFormat
    files: int
    rows: int
    """Rows that can be trained on."""
    taken: int
    """Rows of it in an epoch: more where they repeat, fewer where the weight leaves some out."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of the rows as they were written, before anything is cut off or dropped."""

    p50: int
    p95: int
    p99: int
    longest: int
    edges: list[int]
    """Where the histogram's bars begin; the last one is open."""
    counts: list[int]


@dataclass(frozen=True)
class DataSummary:
    """What was found in the sources; lengths are in tokens."""

    rows: int
    """In an epoch."""
    tokens: int
    trained_tokens: int
    longest: int
    truncated_rows: int
    lost_tokens: int
    """Cut off, or in rows that are dropped."""
    dropped_rows: int
    """Too long under `long_rows: drop`, or left without a trained token by truncation."""
    skipped_rows: dict[str, int]
    """Rows that cannot be learned from, left out by `bad_rows: skip`: fault -> how many."""
    first_skipped: list[str]
    duplicates: int
    """Rows that say the same as one before."""
    first_duplicates: list[str]
    lengths: Lengths
    sources: list[SourceSummary]
    files: list[str]
    fingerprint: str
    """Of the tokens: equal for the same rows wherever they lie."""
    examples: list[list[tuple[str, bool]]]
    """Rows in pieces: text, and whether the loss looks at it."""


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


@dataclass(frozen=True)
class PreparedData:
    """Sources as tokens on this node's disk."""

    key: str
    """Of everything that decides the tokens."""
    directory: Path
    summary: DataSummary

    @cached_property
    def index(self) -> RowIndex:
        """The rows of an epoch."""
        with pa.memory_map(str(self.directory / INDEX_FILE)) as source:
            return RowIndex(pa.ipc.open_stream(source).read_all())

    def dataset(self) -> "Dataset":
        """The tokens of each row of an epoch, memory-mapped."""
        from datasets import Dataset

        stored = Dataset.from_file(str(self.directory / DATA_FILE))
        position = self.index.position
        if len(position) == len(stored) and np.array_equal(position, np.arange(len(stored))):
            return stored
        return stored.select(position)

    def place(self, row: int) -> str:
        """Where a row of an epoch was written: `FILE:ROW`."""
        return f"{self.summary.files[self.index.file[row]]}:{self.index.row[row]}"

    def places(self, rows: Sequence[int]) -> str:
        """Where rows of an epoch were written: `3, 7 of FILE; 2 of ANOTHER`."""
        by_file: dict[int, list[str]] = {}
        for row in rows:
            by_file.setdefault(int(self.index.file[row]), []).append(str(self.index.row[row]))
        return "; ".join(
            f"{', '.join(numbers)} of {self.summary.files[file]}" for file, numbers in by_file.items()
        )


def prepare_data(
    request: DataRequest,
    tokenizer: "PreTrainedTokenizerFast",
    tokenizer_dir: Path,
    cache: Path,
    *,
    bucket: str | None = None,
    progress: Callable[[int, float], None] = lambda rows, fraction: None,
) -> PreparedData:
    """Tokenise sources, or find them tokenised already: on this node, or in the bucket (then without their tokens).

    Args:
        request: The sources and how to read them.
        tokenizer: The model's, with the chat template that is to be used.
        tokenizer_dir: Its files.
        cache: The node's directory for what was downloaded and prepared.
        bucket: Where prepared data is kept, if anywhere.
        progress: Told how many rows have been read, and how much of all sources that is, 0 to 1.

    Raises:
        DataError: rows that cannot be trained on, or no place for their tokens.
        BucketError: the sources cannot be fetched.
    """
    key = _key(request, tokenizer_dir)
    directory = cache / PREPARED / key
    if not (directory / SUMMARY_FILE).exists():
        if bucket and open_store(join_uri(bucket, key)).read_if_exists(SUMMARY_FILE) is not None:
            return _open(
                key,
                sync_to_node(join_uri(bucket, key), cache / PREPARED, lambda name: name != DATA_FILE),
            )
        directory.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(directory.with_suffix(".lock")):
            if not (directory / SUMMARY_FILE).exists():
                _prepare(request, tokenizer, cache, directory, progress)
    return _open(key, directory)


def keep_prepared(prepared: PreparedData, bucket: str) -> None:
    """Put prepared data into the bucket, its summary last, unless that is where it came from.

    Raises:
        BucketError: it cannot be written.
    """
    store = open_store(join_uri(bucket, prepared.key))
    if store.read_if_exists(SUMMARY_FILE) is None:
        files = (DATA_FILE, INDEX_FILE, SKIPPED_FILE)
        store.upload_many({name: prepared.directory / name for name in files})
        store.upload(prepared.directory / SUMMARY_FILE, SUMMARY_FILE)


def fetch_prepared(key: str, cache: Path, bucket: str) -> PreparedData:
    """Prepared data on a worker's node: found there, or brought from the bucket once a node.

    Raises:
        BucketError: it cannot be read.
    """
    directory = cache / PREPARED / key
    if not (directory / SUMMARY_FILE).exists():
        directory = sync_to_node(join_uri(bucket, key), cache / PREPARED)
    return _open(key, directory)


def verify_prepared(prepared: PreparedData) -> None:
    """Read the tokens once and compare them with their fingerprint.

    Raises:
        DataError: they are damaged.
    """
    if _fingerprint(prepared.directory) != prepared.summary.fingerprint:
        raise DataError(
            f"{prepared.directory}: the prepared rows are damaged. Remove {prepared.key} there and below {PREPARED}/ of storage_path, and "
            "run again."
        )


def _open(key: str, directory: Path) -> PreparedData:
    summary = json.loads((directory / SUMMARY_FILE).read_text("utf-8"))
    summary["lengths"] = Lengths(**summary["lengths"])
    summary["sources"] = [SourceSummary(**source) for source in summary["sources"]]
    summary["examples"] = [[(text, trained) for text, trained in example] for example in summary["examples"]]
    return PreparedData(key, directory, DataSummary(**summary))


def _key(request: DataRequest, tokenizer_dir: Path) -> str:
    """Of everything that decides the tokens and how their rows are named."""
    tokenizer_files = [
        checksum(tokenizer_dir / name) for name in _TOKENIZER_FILES if (tokenizer_dir / name).exists()
    ]
    content = json.dumps([_FORMAT, asdict(request), tokenizer_files], sort_keys=True)
    return checksum_bytes(content.encode()).removeprefix("crc64nvme:")


def _fingerprint(directory: Path) -> str:
    parts = " ".join(checksum(directory / name) for name in (DATA_FILE, INDEX_FILE))
    return checksum_bytes(parts.encode())


def _prepare(
    request: DataRequest,
    tokenizer: "PreTrainedTokenizerFast",
    cache: Path,
    directory: Path,
    progress: Callable[[int, float], None],
) -> None:
    staging = Path(tempfile.mkdtemp(dir=directory.parent, prefix=".partial-"))
    try:
        with _Preparation(request, tokenizer, staging) as preparation:
            summary = preparation.run(cache, progress)
        write_atomically(staging / SUMMARY_FILE, json.dumps(asdict(summary)).encode())
        staging.replace(directory)
    except OSError as error:
        raise DataError(
            f"{', '.join(request.paths)}: the tokens cannot be written to {directory.parent} ({error}). Free some space, or set output_dir "
            "to another disk."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


# --- Reading ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RenderedRow:
    """A row as text, and where it came from."""

    file: int
    row: int
    sequences: tuple[Rendered, ...]
    label: int | None


@dataclass
class _Faults:
    """Rows that cannot be learned from."""

    counts: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)

    def add(self, place: str, error: RowError) -> None:
        self.counts[error.kind] += 1
        if len(self.first) < _MAX_SHOWN:
            self.first.append(f"{place}: {error}")


class _Preparation:
    """The state of one pass over the sources."""

    def __init__(self, request: DataRequest, tokenizer: "PreTrainedTokenizerFast", directory: Path):
        self.request = request
        self.tokenizer = tokenizer
        self.renderer = Renderer(tokenizer, whole_text=request.task == "causal_lm")
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
        self._refuse_faults()
        return self._summary()

    def _write_first(self, pending: "deque[tuple[list[RenderedRow], Future[list[Encoding]]]]") -> None:
        batch, future = pending.popleft()
        self.tokens.add(batch, future.result())

    def _rows_of(
        self, source: int, cache: Path, progress: Callable[[int, float], None]
    ) -> Iterator[RenderedRow]:
        request = self.request
        files = request.files
        reading: Reading | None = None
        began = self.rows_read
        for number, file in enumerate(files):
            if file.source != source:
                continue
            opened = open_file(file, cache / "data")
            for row, value in opened.rows:
                self.rows_read += 1
                if self.rows_read % _BATCH_ROWS == 0:
                    progress(self.rows_read, (number + opened.fraction()) / len(files))
                try:
                    if isinstance(value, RowError):
                        raise value
                    reading = reading or self._reading(value)
                    example = self._read(value, reading)
                    sequences = self.renderer.render(example)
                except RowError as error:
                    self.faults.add(f"{file.uri}:{row}", error)
                    self._write_skipped(file.uri, row, str(error), value)
                    continue
                if request.bad_rows == "error" and self.faults.first:
                    continue  # nothing will be trained: only look for what else is wrong
                yield RenderedRow(number, row, sequences, getattr(example, "label", None))
        if self.rows_read == began:
            raise DataError(
                f"{request.paths[source]}: holds no rows. Name files with at least one row to learn from."
            )
        self.formats.append(reading.data_format if reading else "messages")

    def _reading(self, row: dict[str, Any]) -> Reading:
        request = self.request
        columns = dict(request.columns)
        data_format = request.data_format
        if data_format == "auto":
            data_format = recognise(row, columns, request.task, request.prompt_template)
        return Reading(request.task, data_format, columns, request.prompt_template, request.labels)

    def _read(self, row: dict[str, Any], reading: Reading) -> Example:
        try:
            return read_row(row, reading)
        except RowError as error:
            if self.request.data_format == "auto":
                other = recognise(row, reading.columns, reading.task, reading.prompt_template)
                if other != reading.data_format:
                    raise RowError(
                        "mixed formats",
                        f"is {FORMAT_NAMES[other]}, and the rows before are {FORMAT_NAMES[reading.data_format]}. Make a source of its own "
                        "of each format",
                    ) from error
            raise

    def _leave_out(self, row: RenderedRow, reason: str) -> None:
        """Note a row that is too long, or that truncation leaves nothing to learn of."""
        self._write_skipped(self.request.files[row.file].uri, row.row, reason, None)

    def _write_skipped(self, uri: str, row: int, reason: str, value: Any) -> None:
        line = {"file": uri, "row": row, "reason": reason, "content": _shown(value)}
        text = json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
        self.skipped.write(text + "\n")

    def _refuse_faults(self) -> None:
        faults, request = self.faults, self.request
        count = faults.counts.total()
        if count and (request.bad_rows == "error" or self.tokens.rows == 0):
            kinds = ", ".join(f"{number:,} {kind}" for kind, number in faults.counts.most_common())
            more = f"\n… and {count - len(faults.first):,} more rows" if count > len(faults.first) else ""
            raise DataError(
                f"{count:,} of {self.rows_read:,} rows cannot be trained on ({kinds}):\n"
                + "\n".join(faults.first)
                + more
                + "\nMend or remove them"
                + (", or leave them out with bad_rows: skip." if count < self.rows_read else ".")
            )
        self.tokens.refuse_long_rows()

    def _summary(self) -> DataSummary:
        request, tokens = self.request, self.tokens
        tokens.close()
        index_file = self.directory / INDEX_FILE
        with pa.memory_map(str(index_file)) as source:
            table = pa.ipc.open_stream(source).read_all()
        duplicates, first_duplicates = _duplicates(RowIndex(table), request.files)
        taken = self.rows_of_sources
        if request.weights:
            taken = _shares(self.rows_of_sources, request.weights)
            table = table.take(_mix(self.rows_of_sources, taken, request.seed))
            mixed = self.directory / f"{INDEX_FILE}.mixed"
            with pa.OSFile(str(mixed), "wb") as sink, pa.ipc.new_stream(sink, _INDEX_SCHEMA) as writer:
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
            skipped_rows=dict(self.faults.counts.most_common()),
            first_skipped=self.faults.first,
            duplicates=duplicates,
            first_duplicates=first_duplicates,
            lengths=_lengths(np.array(tokens.lengths, dtype=np.int64)),
            sources=[
                SourceSummary(
                    path, data_format, sum(file.source == number for file in request.files), rows, in_epoch
                )
                for number, (path, data_format, rows, in_epoch) in enumerate(
                    zip(request.paths, self.formats, self.rows_of_sources, taken, strict=True)
                )
            ],
            files=[file.uri for file in request.files],
            fingerprint=_fingerprint(self.directory),
            examples=[],
        )
        return replace(summary, examples=_examples(PreparedData("", self.directory, summary), self.tokenizer))


def _batched(rows: Iterator[RenderedRow]) -> Iterator[list[RenderedRow]]:
    batch: list[RenderedRow] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += sum(len(sequence.text) for sequence in row.sequences)
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
        return "(nested too deeply to be shown)"


def _duplicates(index: RowIndex, files: Sequence[DataFile]) -> tuple[int, list[str]]:
    """How many rows say the same as one before, and the first of them."""
    _, first, inverse = np.unique(index.digest, return_index=True, return_inverse=True)
    repeated = np.flatnonzero(first[inverse] != np.arange(len(index)))
    shown = [
        f"{files[index.file[row]].uri}:{index.row[row]} repeats {files[index.file[earlier]].uri}:{index.row[earlier]}"
        for row, earlier in ((row, first[inverse[row]]) for row in repeated[:_MAX_SHOWN])
    ]
    return len(repeated), shown


def _lengths(lengths: np.ndarray) -> Lengths:
    """Percentiles by the nearest rank, and a histogram up to the 99th with a round width."""
    p50, p95, p99, longest = (
        int(length) for length in np.percentile(lengths, [50, 95, 99, 100], method="inverted_cdf")
    )
    smallest_width = max(p99 / _BARS, 1)
    magnitude = 10 ** int(np.log10(smallest_width))
    width = next(step * magnitude for step in (1, 2, 5, 10) if step * magnitude >= smallest_width)
    first = int(lengths.min()) // width
    edges = list(range(first * width, p99 + 1, width))
    counts = np.bincount(np.minimum(lengths // width - first, len(edges) - 1), minlength=len(edges))
    return Lengths(p50, p95, p99, longest, edges, counts.tolist())


def _shares(rows: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Rows of each source in an epoch, which has as many as all sources together; largest remainders round up."""
    total = sum(rows)
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda source: shares[source] - exact[source])
    for source in by_remainder[: total - sum(shares)]:
        shares[source] += 1
    return shares


def _mix(rows: Sequence[int], taken: Sequence[int], seed: int) -> np.ndarray:
    """Positions of an epoch's rows: each source as often as it goes in whole, and some rows of it once more."""
    generator = np.random.default_rng(seed)
    pieces = []
    begin = 0
    for count, wanted in zip(rows, taken, strict=True):
        whole, rest = divmod(wanted, count) if count else (0, 0)
        pieces += [np.arange(begin, begin + count)] * whole
        pieces.append(begin + np.sort(generator.permutation(count)[:rest]))
        begin += count
    return np.concatenate(pieces)


# --- Tokens -----------------------------------------------------------------------------------------------------


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
        self._index = self._open(directory / INDEX_FILE, _INDEX_SCHEMA)

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
                    [list(column) for column in zip(*columns.index, strict=True)], schema=_INDEX_SCHEMA
                )
            )

    def _fits(self, row: RenderedRow, sequences: list[Encoded]) -> bool:
        """Cut the sequences at the limit; false where the row is left out."""
        limit = self.request.limit
        length = max(len(sequence.ids) for sequence in sequences)
        self.lengths.append(length)
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
            self.truncated += 1
            for sequence in sequences:
                self.lost += sequence.cut(limit)
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
        texts = [sequence.text for sequence in row.sequences]
        digest = xxhash.xxh3_64_intdigest("\x00".join(texts).encode())
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


def _examples(prepared: PreparedData, tokenizer: "PreTrainedTokenizerFast") -> list[list[tuple[str, bool]]]:
    """The first row, one from the middle and the last, with what is trained on."""
    dataset = prepared.dataset()
    rows = sorted({round(part * (len(dataset) - 1) / (_EXAMPLES - 1)) for part in range(_EXAMPLES)})
    return [_mark(tokenizer, *_ids_and_trained(dataset[row])) for row in rows]


def _ids_and_trained(row: dict[str, Any]) -> tuple[list[int], list[bool]]:
    if "prompt_ids" in row:
        prompt, chosen = row["prompt_ids"], row["chosen_ids"]
        return prompt + chosen, [False] * len(prompt) + [True] * len(chosen)
    return row["input_ids"], [label != IGNORED for label in row["labels"]]


def _mark(
    tokenizer: "PreTrainedTokenizerFast", ids: list[int], trained: list[bool]
) -> list[tuple[str, bool]]:
    ids, trained = ids[:_EXAMPLE_TOKENS], trained[:_EXAMPLE_TOKENS]
    pieces: list[tuple[str, bool]] = []
    begin = 0
    for position in range(1, len(ids) + 1):
        if position == len(ids) or trained[position] != trained[begin]:
            pieces.append((str(tokenizer.decode(ids[begin:position])), trained[begin]))
            begin = position
    return pieces
