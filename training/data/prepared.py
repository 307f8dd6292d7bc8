"""Prepared rows: on a node's disk, where they are memory-mapped, and in the bucket."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from training.data.sources import DataError
from training.data.summary import DataSummary, Lengths, SourceSummary
from training.data.token_files import DATA_FILE, INDEX_FILE, RowIndex
from utils.bucket import join_uri, open_store, sync_to_node
from utils.files import checksum, checksum_bytes

if TYPE_CHECKING:
    from datasets import Dataset

PREPARED = "prepared"
SKIPPED_FILE, SUMMARY_FILE = "skipped_rows.jsonl", "summary.json"


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


def find_prepared(key: str, cache: Path, bucket: str | None) -> PreparedData | None:
    """What was prepared before: on this node, or in the bucket (then without its tokens).

    Raises:
        BucketError: the bucket cannot be read.
    """
    directory = cache / PREPARED / key
    if (directory / SUMMARY_FILE).exists():
        return open_prepared(key, directory)
    if bucket is None or open_store(join_uri(bucket, key)).read_if_exists(SUMMARY_FILE) is None:
        return None
    directory = sync_to_node(join_uri(bucket, key), cache / PREPARED, lambda name: name != DATA_FILE)
    return open_prepared(key, directory)


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
    return open_prepared(key, directory)


def verify_prepared(prepared: PreparedData) -> None:
    """Read the tokens once and compare them with their fingerprint.

    Raises:
        DataError: they are damaged.
    """
    if fingerprint(prepared.directory) != prepared.summary.fingerprint:
        raise DataError(
            f"{prepared.directory}: the prepared rows are damaged. Remove {prepared.key} there and below {PREPARED}/ of storage_path, and "
            "run again."
        )


def open_prepared(key: str, directory: Path) -> PreparedData:
    """Prepared data that lies whole in a directory."""
    summary = json.loads((directory / SUMMARY_FILE).read_text("utf-8"))
    summary["lengths"] = Lengths(**summary["lengths"])
    summary["sources"] = [SourceSummary(**source) for source in summary["sources"]]
    summary["examples"] = [[(text, trained) for text, trained in example] for example in summary["examples"]]
    return PreparedData(key, directory, DataSummary(**summary))


def fingerprint(directory: Path) -> str:
    """Of the tokens in a directory."""
    parts = " ".join(checksum(directory / name) for name in (DATA_FILE, INDEX_FILE))
    return checksum_bytes(parts.encode())
