"""Data preparation: convert the sources into tokens and labels, once per data set.

The driver reads chunks of rows and writes their tokens. Between the two, processes check, render and tokenize them. Large sources are
prepared in shards (training.data.shards), each by one process of this machine or of a cluster.
"""

import gc
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
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
    find_prepared,
    fingerprint_of,
    open_prepared,
)
from training.data.request import DataRequest
from training.data.row_index import DATA_FILE, INDEX_FILE, INDEX_SCHEMA, RowIndex
from training.data.row_pass import RowPass, Tally, reject_empty_shares
from training.data.rows import RowSchema
from training.data.shards import PARTS, Shard, ShardMap, ShardRun, ShardWorker, cut, prepare_shards
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
        on_cluster: Prepares shards of large sources on other nodes, which access only buckets; None: this machine prepares them.
        progress: Called with the number of rows read and the fraction of all sources, 0 to 1.
    """
    key = request.key(tokenizer_dir)
    if found := find_prepared(key, cache, bucket):
        return found
    shards = cut(request)
    preparation = _Preparation(request, tokenizer, template, progress)
    if on_cluster and bucket and shards and all(is_remote(file.uri) for file in request.files):
        preparation.run_on_cluster(shards, on_cluster, cache, join_uri(bucket, key))
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
    """The rows of all sources, whose index and rejected rows are in a directory of this machine."""

    tally: Tally
    rows: list[int]
    """Rows of each source within the token limit."""
    schemas: list[RowSchema | None]
    """Schema with which the rows of each source were read."""
    checksums: list[str]
    """Checksums of the files of tokens."""
    read: Callable[[Sequence[int]], list[dict[str, Any]]]
    """Returns the tokens of rows by their positions."""


class _Preparation:
    """The preparation of a request, in one pass or in shards."""

    def __init__(
        self, request: DataRequest, tokenizer: "PreTrainedTokenizerFast", template: str, progress: Progress
    ):
        self._request = request
        self._tokenizer = tokenizer
        self._template = template
        self._progress = progress
        self._chunks = ChunkTokenizer(request, tokenizer)

    def run_here(self, shards: Sequence[Shard], cache: Path, directory: Path) -> None:
        """Prepare all rows on this machine; the directory exists only if it is complete."""
        paths = ", ".join(self._request.paths)
        with _staging(directory.parent, paths) as staging:
            if shards:
                worker = ShardWorker(self._dated, self._tokenizer, str(staging), cache)
                rows = self._in_shards(shards, worker, partial(_map_here, paths), staging)
            else:
                rows = self._in_one_pass(staging, cache)
            self._finish(rows, staging)
            shutil.rmtree(staging / PARTS, ignore_errors=True)
            staging.replace(directory)

    def run_on_cluster(self, shards: Sequence[Shard], connect: ShardMap, cache: Path, output: str) -> None:
        """Prepare all rows on other nodes, which write them to a URI; this machine reads their index, and writes the summary last."""
        store = open_store(output)
        worker = ShardWorker(self._dated, self._tokenizer, output, cache=None)
        (cache / PREPARED).mkdir(parents=True, exist_ok=True)
        with connect() as run, _staging(cache / PREPARED, ", ".join(self._request.paths)) as staging:
            try:
                self._finish(self._in_shards(shards, worker, run, staging), staging)
            except BaseException:  # a signal and a lost cluster, too
                with suppress(BucketError):  # no summary names these files, so they may stay
                    store.delete([item.key for item in store.list()])
                raise
            ours = (INDEX_FILE, SKIPPED_FILE)
            store.upload_many({name: staging / name for name in ours})
            needed = {*ours, *(shard.data for shard in shards)}
            store.delete([item.key for item in store.list() if item.key not in needed])
            store.upload(staging / SUMMARY_FILE, SUMMARY_FILE)

    @property
    def _dated(self) -> DataRequest:
        """The request with the date that the chat template prints, which is the same on all nodes."""
        return replace(self._request, date=self._chunks.renderer.template.date)

    def _in_one_pass(self, staging: Path, cache: Path) -> _Rows:
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
        return _Rows(
            rows.tally,
            found,
            schemas,
            [checksum(files[0])],
            lambda positions: [read_row(files[0], position) for position in positions],
        )

    def _in_shards(self, shards: Sequence[Shard], worker: ShardWorker, run: ShardRun, staging: Path) -> _Rows:
        prepared = prepare_shards(worker, shards, run, self._progress)
        sources = [prepared.of_source(number) for number in range(len(self._request.paths))]
        for path, of_source in zip(self._request.paths, sources, strict=True):
            _reject_empty_source(path, sum(done.read for done in of_source))
        if worker.cache is None:
            store = open_store(worker.output)
            store.download_many({item: staging / item.key for item in store.list(f"{PARTS}/")})
        prepared.join(staging, staging / INDEX_FILE, staging / SKIPPED_FILE)
        return _Rows(
            prepared.tally,
            [sum(done.rows for done in of_source) for of_source in sources],
            [of_source[-1].schema for of_source in sources],
            [done.checksum for done in prepared.done],
            lambda positions: list(
                run(worker.read_row, [prepared.place(position) for position in positions])
            ),
        )

    def _finish(self, rows: _Rows, staging: Path) -> None:
        """Reject rows that stop the run; otherwise write the index of an epoch and the summary."""
        request, tally = self._request, rows.tally
        tally.reject_faults(request, self._template)
        tally.reject_long_rows(request)
        reject_empty_shares(request, rows.rows)
        index_file = staging / INDEX_FILE
        with pa.memory_map(str(index_file)) as source:
            table = pa.ipc.open_stream(source).read_all()
        duplicates, first_duplicates = find_duplicates(RowIndex(table), request.files)
        taken = rows.rows
        if request.weights:
            taken = _shares(rows.rows, request.weights)
            table = table.take(_mix(rows.rows, taken, request.seed))
            mixed = staging / f"{INDEX_FILE}.mixed"
            with pa.OSFile(str(mixed), "wb") as sink, pa.ipc.new_stream(sink, INDEX_SCHEMA) as writer:
                writer.write_table(table)
            mixed.replace(index_file)
        index = RowIndex(table)
        examples = rows.read([int(index.position[number]) for number in example_rows(len(index))])
        summary = DataSummary(
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
            examples=[show_example(row, self._tokenizer) for row in examples],
            date=self._chunks.renderer.template.date if tally.has_chats else None,
        )
        write_atomically(staging / SUMMARY_FILE, json.dumps(asdict(summary)).encode())


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
