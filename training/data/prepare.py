"""Data preparation: convert the sources into tokens and labels, once per data set.

The driver reads chunks of rows and writes their tokens. Between the two, processes check, render and tokenize them. Large sources are
prepared in shards (training.data.shards), each by one process of this machine or of a cluster.
"""

import gc
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.data.chunk_processes import ChunkProcesses
from training.data.chunks import ChunkTokenizer
from training.data.epoch import TokenizedSources, finish_epoch
from training.data.errors import DataError
from training.data.prepared import (
    PREPARED,
    SKIPPED_FILE,
    SUMMARY_FILE,
    PreparedData,
    encode_summary,
    find_prepared,
    open_prepared,
)
from training.data.request import DataRequest
from training.data.row_index import DATA_FILE, INDEX_FILE
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
from training.data.summary import DataSummary
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
                worker = ShardWorker(self._request, self._tokenizer, str(staging), cache)
                summary = worker.join(self._in_shards(shards, worker, partial(_map_here, paths)))
                shutil.rmtree(staging / PARTS)
            else:
                summary = self._in_one_pass(staging, cache)
            write_atomically(staging / SUMMARY_FILE, encode_summary(summary))
            staging.replace(directory)

    def run_on_cluster(self, shards: Sequence[Shard], connect: ShardMap, output: str) -> None:
        """Prepare all rows on other nodes, which write them and their index to a URI; this machine writes the summary last."""
        store = open_store(output)
        worker = ShardWorker(self._request, self._tokenizer, output, cache=None)
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
        sources = TokenizedSources(
            rows.tally, found, schemas, [checksum(files[0])], partial(read_row, files[0])
        )
        return finish_epoch(request, self._tokenizer, sources, staging)

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
