"""Data preparation: convert the sources into tokens and labels, once per data set.

The driver reads chunks of rows and writes their tokens. Between the two, processes check, render and tokenize them. Large sources are
prepared in shards (training.data.shards), each by one process of this machine or of a cluster. One process joins their indexes.
"""

import gc
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from training.data.chunk_processes import ChunkProcesses
from training.data.chunks import ChunkTokenizer
from training.data.errors import DataError
from training.data.prepared import (
    PREPARED,
    SKIPPED_FILE,
    SUMMARY_FILE,
    PreparedData,
    encode_summary,
    find_prepared,
    fingerprint_of,
    open_prepared,
)
from training.data.request import DataRequest
from training.data.row_index import DATA_FILE, INDEX_FILE, INDEX_SCHEMA, RowIndex
from training.data.row_pass import RowPass, Tally, reject_empty_shares
from training.data.rows import RowSchema
from training.data.shards import (
    PARTS,
    PreparedShards,
    Shard,
    ShardMap,
    ShardRun,
    ShardWorker,
    cut,
    prepare_shards,
)
from training.data.sources import Piece
from training.data.summary import (
    DataSummary,
    SourceSummary,
    example_rows,
    find_duplicates,
    measure_lengths,
    show_example,
)
from training.data.token_files import read_row
from utils.files import checksum, file_lock, write_atomically
from utils.storage.bucket import BucketError, is_remote, join_uri, open_store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Progress = Callable[[int, float], None]


def prepare_data(
    request: DataRequest,
    tokenizer: "PreTrainedTokenizerFast",
    tokenizer_dir: Path,
    cache: Path,
    *,
    bucket: str | None = None,
    template: str = "the model's",
    on_cluster: ShardMap | None = None,
    progress: Progress = lambda rows, fraction: None,
) -> PreparedData:
    """Tokenize the sources, or reuse prepared data from this node or the bucket (then without its tokens).

    Args:
        request: The sources and their settings.
        tokenizer: The model's tokenizer with the chat template to use.
        tokenizer_dir: Directory of the tokenizer files.
        cache: Node cache for downloads and prepared data.
        bucket: URI where prepared data is stored, or None.
        template: Where the chat template comes from, in errors.
        on_cluster: Prepares large sources on other nodes, which access only buckets; None: this machine prepares them.
        progress: Called with the number of rows read and the fraction of all sources, 0 to 1.
    """
    key = request.key(tokenizer_dir)
    if found := find_prepared(key, cache, bucket):
        return found
    shards = cut(request)
    preparation = _Preparation(request, tokenizer, template, progress)
    if on_cluster and bucket and shards and all(is_remote(file.uri) for file in request.files):
        preparation.run_on_cluster(shards, on_cluster, join_uri(bucket, key))
        found = find_prepared(key, cache, bucket)
        assert found is not None, "the summary was just written"
        return found
    directory = cache / PREPARED / key
    directory.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(directory.with_suffix(".lock")):
        if not (directory / SUMMARY_FILE).exists():
            preparation.run_here(shards, cache, directory)
    return open_prepared(key, directory)


@dataclass(frozen=True)
class _Rows:
    """The tokenized rows of all sources."""

    tally: Tally
    rows: list[int]
    """Rows of each source within the token limit."""
    schemas: list[RowSchema | None]
    """Schema with which the rows of each source were read."""
    checksums: list[str]
    """Checksums of the files of tokens."""
    read: Callable[[int], dict[str, Any]]
    """Returns the tokens of a row by its position."""


@dataclass(frozen=True)
class ShardJoiner(ShardWorker):
    """The work on shards, and on the indexes of all shards."""

    def join(self, prepared: PreparedShards) -> DataSummary:
        """Join the indexes and rejected rows of all shards, which are stored; store the index of an epoch and return the summary."""
        with self._directory() as directory:
            paths = {name: directory / name for name in (INDEX_FILE, SKIPPED_FILE)}
            if self.cache is None:
                store = open_store(self.output)
                store.download_many({item: directory / item.key for item in store.list(f"{PARTS}/")})
            prepared.join(directory, *paths.values())
            rows = _Rows(
                prepared.tally,
                prepared.rows_of_sources(),
                [shards[-1].schema for shards in prepared.of_sources()],
                [done.checksum for done in prepared.done],
                lambda position: self.read_row(*prepared.place(position)),
            )
            summary = _finish_epoch(self.request, self.tokenizer, rows, directory)
            if self.cache is None:
                open_store(self.output).upload_many(paths)
            return summary


class _Preparation:
    """The preparation of a request, in one pass or in shards."""

    def __init__(
        self, request: DataRequest, tokenizer: "PreTrainedTokenizerFast", template: str, progress: Progress
    ):
        self._tokenizer = tokenizer
        self._template = template
        self._progress = progress
        self._chunks = ChunkTokenizer(request, tokenizer)
        # All nodes and the summary have the date of this preparation.
        self._request = replace(request, date=self._chunks.renderer.template.date)

    def run_here(self, shards: Sequence[Shard], cache: Path, directory: Path) -> None:
        """Prepare all rows on this machine; the directory exists only if it is complete."""
        paths = ", ".join(self._request.paths)
        with _staging(directory.parent, paths) as staging:
            if shards:
                worker = ShardJoiner(self._request, self._tokenizer, str(staging), cache)
                summary = worker.join(self._in_shards(shards, worker, partial(_map_here, paths)))
                shutil.rmtree(staging / PARTS)
            else:
                summary = self._in_one_pass(staging, cache)
            write_atomically(staging / SUMMARY_FILE, encode_summary(summary))
            staging.replace(directory)

    def run_on_cluster(self, shards: Sequence[Shard], connect: ShardMap, output: str) -> None:
        """Prepare all rows on other nodes, which write them and their index to a URI; this machine writes the summary last."""
        store = open_store(output)
        worker = ShardJoiner(self._request, self._tokenizer, output, cache=None)
        with connect() as run:
            try:
                (summary,) = run(worker.join, [self._in_shards(shards, worker, run)])
                needed = {INDEX_FILE, SKIPPED_FILE, *(shard.data for shard in shards)}
                store.delete([item.key for item in store.list() if item.key not in needed])
                store.write(SUMMARY_FILE, encode_summary(summary))
            except BaseException:  # a signal and a lost cluster, too
                with suppress(BucketError):  # no summary names these files, so they may stay
                    store.delete([item.key for item in store.list()])
                raise

    def _in_one_pass(self, staging: Path, cache: Path) -> DataSummary:
        request = self._request
        files = [staging / name for name in (DATA_FILE, INDEX_FILE, SKIPPED_FILE)]
        rows = RowPass(request, self._chunks)
        found: list[int] = []
        schemas: list[RowSchema | None] = []
        with ChunkProcesses(self._chunks.tokenize) as processes, rows.writing(*files) as write:
            for source, path in enumerate(request.paths):
                before, read = rows.tally.rows, rows.tally.read
                pieces = [Piece(number) for number, file in enumerate(request.files) if file.source == source]
                chunks = rows.chunks(
                    pieces, cache, progress=lambda count, part, read=read: self._progress(read + count, part)
                )
                if request.max_rows is None:
                    write(processes.tokenize(chunks, path))
                else:  # the rows taken from a chunk decide whether another one is read
                    write(map(self._chunks.tokenize, chunks))
                _reject_empty_source(path, rows.tally.read - read)
                found.append(rows.tally.rows - before)
                schemas.append(rows.schema)
        self._reject(rows.tally, found)
        tokenized = _Rows(rows.tally, found, schemas, [checksum(files[0])], partial(read_row, files[0]))
        return _finish_epoch(request, self._tokenizer, tokenized, staging)

    def _in_shards(self, shards: Sequence[Shard], worker: ShardWorker, run: ShardRun) -> PreparedShards:
        prepared = prepare_shards(worker, shards, run, self._progress)
        for path, of_source in zip(self._request.paths, prepared.of_sources(), strict=True):
            _reject_empty_source(path, sum(done.read for done in of_source))
        self._reject(prepared.tally, prepared.rows_of_sources())
        return prepared

    def _reject(self, tally: Tally, rows: Sequence[int]) -> None:
        """Raise an error for rows that stop the run.

        Args:
            tally: The outcome of all rows.
            rows: Rows of each source within the token limit.
        """
        tally.reject_faults(self._request, self._template)
        tally.reject_long_rows(self._request)
        reject_empty_shares(self._request, rows)


def _finish_epoch(
    request: DataRequest, tokenizer: "PreTrainedTokenizerFast", rows: _Rows, directory: Path
) -> DataSummary:
    """Replace the index of all rows by that of an epoch, and return the summary.

    Args:
        request: The request for the rows, with the date that the chat template prints.
        tokenizer: The model's tokenizer.
        rows: The tokenized rows.
        directory: Directory of the index.
    """
    tally, index_file = rows.tally, directory / INDEX_FILE
    with pa.memory_map(str(index_file)) as source:
        table = pa.ipc.open_stream(source).read_all()
    duplicates, first_duplicates = find_duplicates(RowIndex(table), request.files)
    taken = rows.rows
    if request.weights:
        taken = _shares(rows.rows, request.weights)
        table = table.take(_mix(rows.rows, taken, request.seed))
        mixed = directory / f"{INDEX_FILE}.mixed"
        with pa.OSFile(str(mixed), "wb") as sink, pa.ipc.new_stream(sink, INDEX_SCHEMA) as writer:
            writer.write_table(table)
        mixed.replace(index_file)
    index = RowIndex(table)
    examples = [rows.read(int(index.position[number])) for number in example_rows(len(index))]
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
                zip(request.paths, rows.schemas, rows.rows, taken, strict=True)
            )
        ],
        files=[file.uri for file in request.files],
        fingerprint=fingerprint_of(rows.checksums, index_file),
        examples=[show_example(row, tokenizer) for row in examples],
        date=request.date if tally.has_chats else None,
    )


@contextmanager
def _staging(directory: Path, paths: str) -> Iterator[Path]:
    """Yield a new directory, which is removed unless the block moves it. Errors of writing there name the paths of the sources."""
    staging = Path(tempfile.mkdtemp(dir=directory, prefix=".partial-"))
    gc.freeze()  # garbage collection skips the objects of loaded libraries
    try:
        yield staging
    except OSError as error:
        raise DataError(
            f"{paths}: tokens cannot be written to {directory} ({error}). Free disk space, or set output_dir to another disk."
        ) from error
    finally:
        gc.unfreeze()
        shutil.rmtree(staging, ignore_errors=True)


def _map_here(paths: str, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Call a function for each item, in one process per CPU core; errors name the paths."""
    with ChunkProcesses(function) as processes:
        yield from processes.tokenize(iter(items), paths)


def _reject_empty_source(path: str, read: int) -> None:
    if not read:
        raise DataError(f"{path}: contains no rows. Use files with at least one row to train on.")


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
