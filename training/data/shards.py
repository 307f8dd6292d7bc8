"""Shards: parts of large sources that are prepared independently of each other, and then joined.

A shard has the code path of a small data set: `RowPass` reads, checks, renders and tokenizes its rows. It cannot know how many rows
and lines are before it: `PreparedShards.join` adds these numbers to the indexes, and the driver to the faults.
"""

import json
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from training.data.chunks import ChunkTokenizer
from training.data.errors import DataError
from training.data.request import DataRequest
from training.data.row_index import INDEX_SCHEMA
from training.data.row_pass import RowPass, Tally
from training.data.rows import RowSchema
from training.data.sources import Piece
from training.data.token_files import read_row
from utils.files import checksum
from utils.storage.bucket import open_store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MIN_BYTES = 1024**3
"""Bytes of sources from which rows are prepared in shards. Fewer take half a minute on 16 cores, and the processes of a cluster must start."""
SHARD_BYTES = 64 * 1024**2
"""Bytes of a shard: some 20 s of work for one core, which a lost node costs again. The fingerprint of the tokens depends on it."""

PARTS = "parts"
"""Directory of the shards' indexes, until they are joined."""

ShardRun = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]
"""Yields the results of a function for items, in their order; the calls may run in other processes and on other nodes."""
ShardMap = Callable[[], AbstractContextManager[ShardRun]]
"""Connects to other nodes, which run the calls until the context ends."""


@dataclass(frozen=True)
class Shard:
    """Consecutive rows of one source: one piece of a file, or several complete files."""

    number: int
    source: int
    pieces: tuple[Piece, ...]
    bytes: int
    schema: RowSchema | None = None
    """Schema of its rows; None if no row before them has a known format."""

    def takes_another_file(self, source: int) -> bool:
        """Return whether a file of a source belongs to this shard, too."""
        return self.source == source and self.pieces[0].end is None and self.bytes < SHARD_BYTES

    @property
    def data(self) -> str:
        """Return the name of its tokens; sorted names have the order of the rows."""
        return f"data-{self.number:05d}.arrow"

    @property
    def index(self) -> str:
        """Return the name of its index, with positions and line numbers that count from its start."""
        return f"{PARTS}/index-{self.number:05d}.arrow"

    @property
    def skipped(self) -> str:
        """Return the name of its rejected rows."""
        return f"{PARTS}/skipped-{self.number:05d}.jsonl"


def cut(request: DataRequest) -> list[Shard]:
    """Return the shards of a request; an empty list if it is prepared in one pass.

    Small sources, and these that cannot be cut:

    - with `max_rows`, the rows taken so far decide whether another one is read;
    - Hub datasets and Arrow files are read from copies on one machine;
    - a compressed file, CSV, TSV or a JSON document is read from its start: if it is large, one core would be busy with it.
    """
    files = request.files
    if request.max_rows is not None or not all(file.is_stream for file in files):
        return []
    sizes = [file.size for file in files]
    largest = max((size for file, size in zip(files, sizes, strict=True) if not file.is_divisible), default=0)
    if sum(sizes) < MIN_BYTES or largest >= MIN_BYTES:
        return []
    shards: list[Shard] = []
    for number, (file, size) in enumerate(zip(files, sizes, strict=True)):
        if file.is_divisible and size > SHARD_BYTES:
            for begin in range(0, size, SHARD_BYTES):
                end = min(begin + SHARD_BYTES, size)
                shards.append(Shard(len(shards), file.source, (Piece(number, begin, end),), end - begin))
        elif shards and shards[-1].takes_another_file(file.source):
            last = shards.pop()
            shards.append(replace(last, pieces=(*last.pieces, Piece(number)), bytes=last.bytes + size))
        else:
            shards.append(Shard(len(shards), file.source, (Piece(number),), size))
    return shards


@dataclass(frozen=True)
class ShardOutcome:
    """The result that a shard returns; everything else is written to storage."""

    tally: Tally
    schema: RowSchema | None
    checksum: str
    """Checksum of its tokens."""


@dataclass(frozen=True)
class ShardWorker:
    """The work on shards, in any process of any node. It is sent to other nodes with the tokenizer."""

    request: DataRequest
    tokenizer: "PreTrainedTokenizerFast"
    output: str
    """Directory, or on a cluster URI, for the tokens and indexes."""
    cache: Path | None
    """Directory for copies of files in a bucket; None on a cluster: each node reads its own ranges of them."""
    scratch: Path | None = None
    """Directory of the node for temporary files; None: the system's."""

    @cached_property
    def _chunks(self) -> ChunkTokenizer:
        return ChunkTokenizer(self.request, self.tokenizer)

    def prepare(self, shard: Shard) -> ShardOutcome:
        """Read, check, render and tokenize the rows of a shard; store tokens, index and rejected rows."""
        with self._directory() as directory:
            paths = {name: directory / name for name in (shard.data, shard.index, shard.skipped)}
            (directory / PARTS).mkdir(exist_ok=True)
            rows = RowPass(self.request, self._chunks)
            with rows.writing(*paths.values()) as write:
                write(map(self._chunks.tokenize, rows.chunks(shard.pieces, self.cache, shard.schema)))
            if self.cache is None:
                open_store(self.output).upload_many(paths)
            return ShardOutcome(rows.tally, rows.schema, checksum(paths[shard.data]))

    def find_schema(self, shard: Shard) -> RowSchema | None:
        """Return how the rows of a shard are read, or None if none has a known format."""
        chunks = RowPass(self.request, self._chunks).chunks(shard.pieces, self.cache)
        return next((chunk.schema for chunk in chunks if chunk.schema), None)

    def read_row(self, shard: Shard, position: int) -> dict[str, Any]:
        """Return a row's tokens by its shard and its position there."""
        with self._directory() as directory:
            if self.cache is None:
                open_store(self.output).download(shard.data, directory / shard.data)
            return read_row(directory / shard.data, position)

    @contextmanager
    def _directory(self) -> Iterator[Path]:
        """Yield the output directory, or a temporary one of this node if the output is in a bucket."""
        if self.cache is not None:
            yield Path(self.output)
            return
        try:
            with tempfile.TemporaryDirectory(prefix="anneal-shard-", dir=self.scratch) as directory:
                yield Path(directory)
        except OSError as error:
            raise DataError(
                f"{', '.join(self.request.paths)}: tokens cannot be written on node {socket.gethostname()} ({error}). Free disk space "
                "there, or set output_dir to another disk."
            ) from error


@dataclass(frozen=True)
class _PreparedShard:
    """A shard, and what the driver keeps of its outcome."""

    shard: Shard
    rows: int
    """Rows within the token limit."""
    read: int
    lines_before: int
    """Lines of its file before it, if its rows are numbered from its start."""
    schema: RowSchema | None
    checksum: str


@dataclass
class PreparedShards:
    """The shards of a request that are prepared so far, in their order."""

    tally: Tally = field(default_factory=Tally)
    done: list[_PreparedShard] = field(default_factory=list)
    _lines: int = 0

    def add(self, shard: Shard, outcome: ShardOutcome) -> None:
        """Add the next shard."""
        tally = outcome.tally
        lines_before = self._lines if shard.pieces[0].begin else 0
        self._lines = lines_before + tally.lines
        self.tally.merge(tally, lines_before)
        self.done.append(
            _PreparedShard(shard, tally.rows, tally.read, lines_before, outcome.schema, outcome.checksum)
        )

    def of_sources(self) -> list[list[_PreparedShard]]:
        """Return the shards of each source."""
        return [list(shards) for _, shards in groupby(self.done, lambda done: done.shard.source)]

    def rows_of_sources(self) -> list[int]:
        """Return the rows of each source within the token limit."""
        return [sum(done.rows for done in shards) for shards in self.of_sources()]

    def place(self, position: int) -> tuple[Shard, int]:
        """Return the shard of a row, and the row's position in it."""
        for done in self.done:
            if position < done.rows:
                return done.shard, position
            position -= done.rows
        raise IndexError(position)

    def join(self, directory: Path, index: Path, skipped: Path) -> None:
        """Write one index and one list of rejected rows from those of the shards in a directory."""
        before = 0
        with (
            pa.OSFile(str(index), "wb") as sink,
            pa.ipc.new_stream(sink, INDEX_SCHEMA) as writer,
            skipped.open("w", encoding="utf-8") as lines,
        ):
            for done in self.done:
                with pa.memory_map(str(directory / done.shard.index)) as source:
                    for batch in pa.ipc.open_stream(source):
                        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
                        columns["position"] = columns["position"].to_numpy() + before
                        columns["row"] = columns["row"].to_numpy() + done.lines_before
                        writer.write_batch(pa.record_batch([*columns.values()], schema=INDEX_SCHEMA))
                before += done.rows
                with (directory / done.shard.skipped).open(encoding="utf-8") as file:
                    lines.writelines(_moved(line, done.lines_before) for line in file)


def prepare_shards(
    worker: ShardWorker, shards: Sequence[Shard], run: ShardRun, progress: Callable[[int, float], None]
) -> PreparedShards:
    """Prepare shards, and return what became of their rows.

    Args:
        worker: The work on a shard.
        shards: The shards of all sources.
        run: Runs the work.
        progress: Called with the number of rows read and the fraction of all bytes, 0 to 1.
    """
    prepared = PreparedShards()
    ready, size = 0, sum(shard.bytes for shard in shards)
    shards = list(_with_schemas(worker, shards, run))
    for shard, outcome in zip(shards, run(worker.prepare, shards), strict=True):
        prepared.add(shard, outcome)
        ready += shard.bytes
        progress(prepared.tally.read, ready / size)
    return prepared


def _with_schemas(worker: ShardWorker, shards: Sequence[Shard], run: ShardRun) -> Iterator[Shard]:
    """Yield shards with the schema that the rows before them have: as in one pass, the first known format of a source counts."""
    for _, of_source in groupby(shards, lambda shard: shard.source):
        schema: RowSchema | None = None
        *earlier, last = of_source
        for shard in earlier:
            yield replace(shard, schema=schema)
            if schema is None:
                (schema,) = run(worker.find_schema, [shard])
        yield replace(last, schema=schema)


def _moved(line: str, lines: int) -> str:
    """Return a line of skipped_rows.jsonl with a number added to its row."""
    if not lines:
        return line
    entry = json.loads(line)
    entry["row"] += lines
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n"
