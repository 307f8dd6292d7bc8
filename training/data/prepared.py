"""Prepared data: memory-mapped token files on a node's disk, and their copy in the bucket."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from training.data.errors import DataError
from training.data.row_index import INDEX_FILE, RowIndex, is_data_file
from training.data.summary import DataSummary, Lengths, SourceSummary
from utils.files import checksum, checksum_bytes
from utils.storage.bucket import join_uri, open_store, sync_to_node

if TYPE_CHECKING:
    from datasets import Dataset

PREPARED = "prepared"
SKIPPED_FILE, SUMMARY_FILE = "skipped_rows.jsonl", "summary.json"


@dataclass(frozen=True)
class PreparedData:
    """Tokenized sources on this node's disk."""

    key: str
    """Hash of everything that determines the tokens."""
    directory: Path
    summary: DataSummary
    fetch_index: Callable[[], Path] | None = None
    """Downloads the index and returns its directory; None: it is in `directory`."""

    @property
    def has_index(self) -> bool:
        """Return whether the index is on this machine already."""
        return self.fetch_index is None

    @cached_property
    def index(self) -> RowIndex:
        """Return the index of an epoch's rows, whose size depends on the number of rows."""
        directory = self.fetch_index() if self.fetch_index else self.directory
        with pa.memory_map(str(directory / INDEX_FILE)) as source:
            return RowIndex(pa.ipc.open_stream(source).read_all())

    def dataset(self) -> "Dataset":
        """Return the tokens of an epoch's rows, memory-mapped."""
        from datasets import Dataset, concatenate_datasets

        stored = concatenate_datasets([Dataset.from_file(str(path)) for path in data_files(self.directory)])
        position = self.index.position
        if len(position) == len(stored) and np.array_equal(position, np.arange(len(stored))):
            return stored
        return stored.select(position)

    def place(self, row: int) -> str:
        """Return the source location of a row as `FILE:ROW`."""
        return f"{self.summary.files[self.index.file[row]]}:{self.index.row[row]}"

    def places(self, rows: Sequence[int]) -> str:
        """Return the source locations of rows as `3, 7 of FILE; 2 of ANOTHER`."""
        by_file: dict[int, list[str]] = {}
        for row in rows:
            by_file.setdefault(int(self.index.file[row]), []).append(str(self.index.row[row]))
        return "; ".join(
            f"{', '.join(numbers)} of {self.summary.files[file]}" for file, numbers in by_file.items()
        )


def find_prepared(key: str, cache: Path, bucket: str | None) -> PreparedData | None:
    """Return data prepared earlier on this node or in the bucket, or None. Data from the bucket is opened as by `open_stored`."""
    directory = cache / PREPARED / key
    if (directory / SUMMARY_FILE).exists():
        return open_prepared(key, directory)
    if bucket is None or open_store(join_uri(bucket, key)).read_if_exists(SUMMARY_FILE) is None:
        return None
    return open_stored(key, cache, bucket)


def open_stored(key: str, cache: Path, bucket: str) -> PreparedData:
    """Open prepared data in the bucket, without its tokens. Its index is downloaded at its first use."""
    sync = partial(sync_to_node, join_uri(bucket, key), cache / PREPARED)
    prepared = open_prepared(key, sync(lambda name: name in (SUMMARY_FILE, SKIPPED_FILE)))
    return replace(prepared, fetch_index=lambda: sync(lambda name: name == INDEX_FILE))


def rows_of_run(run_uri: str, fingerprint: str) -> tuple[str, str] | None:
    """Return (key, URI of the prepared data beside the run) of rows that a run used; None if they were deleted."""
    bucket = join_uri(run_uri.rpartition("/")[0], PREPARED)
    store = open_store(bucket)
    for key in store.directories():
        summary = store.read_if_exists(f"{key}/{SUMMARY_FILE}")
        if summary and json.loads(summary)["fingerprint"] == fingerprint:
            return key, bucket
    return None


def keep_prepared(prepared: PreparedData, bucket: str) -> None:
    """Upload prepared data to the bucket, its summary last, unless it is already there."""
    store = open_store(join_uri(bucket, prepared.key))
    if store.read_if_exists(SUMMARY_FILE) is None:
        files = [
            *data_files(prepared.directory),
            *(prepared.directory / n for n in (INDEX_FILE, SKIPPED_FILE)),
        ]
        store.upload_many({path.name: path for path in files})
        store.upload(prepared.directory / SUMMARY_FILE, SUMMARY_FILE)


def fetch_prepared(key: str, cache: Path, bucket: str) -> PreparedData:
    """Return prepared data on a worker's node; download it from the bucket once per node."""
    directory = cache / PREPARED / key
    if not (directory / SUMMARY_FILE).exists():
        directory = sync_to_node(join_uri(bucket, key), cache / PREPARED)
    return open_prepared(key, directory)


def verify_prepared(prepared: PreparedData) -> None:
    """Check the token files against their fingerprint."""
    if fingerprint(prepared.directory) != prepared.summary.fingerprint:
        raise DataError(
            f"{prepared.directory}: the prepared rows are corrupt. Delete {prepared.key} there and below {PREPARED}/ of storage_path, then "
            "rerun."
        )


def encode_summary(summary: DataSummary) -> bytes:
    """Return the content of a summary's file."""
    return json.dumps(asdict(summary)).encode()


def open_prepared(key: str, directory: Path) -> PreparedData:
    """Open the prepared data of a complete directory."""
    summary = json.loads((directory / SUMMARY_FILE).read_text("utf-8"))
    summary["lengths"] = Lengths(**summary["lengths"])
    summary["sources"] = [SourceSummary(**source) for source in summary["sources"]]
    summary["examples"] = [[(text, trained) for text, trained in example] for example in summary["examples"]]
    return PreparedData(key, directory, DataSummary(**summary))


def data_files(directory: Path) -> list[Path]:
    """Return the files of tokens in a directory, in the order of their rows."""
    return sorted(path for path in directory.iterdir() if is_data_file(path.name))


def fingerprint(directory: Path) -> str:
    """Return the checksum of the token files in a directory."""
    return fingerprint_of([checksum(path) for path in data_files(directory)], directory / INDEX_FILE)


def fingerprint_of(data: Sequence[str], index: Path) -> str:
    """Return the checksum of token files from their own checksums and their index."""
    return checksum_bytes(" ".join([*data, checksum(index)]).encode())
