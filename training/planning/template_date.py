"""The date that a chat template prints: that of the run that a plan resumes, and none in rows without chats."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from configs.schema import FinetuneConfig
from runs.layout import DATA_REPORT_FILE, run_of
from runs.reading import latest
from training.data.chunks import ChunkTokenizer
from training.data.prepared import find_prepared
from training.data.request import DataRequest
from training.data.sources import DataFile, open_file
from training.planning.resume import resolve
from utils.storage.bucket import is_remote, join_uri, open_store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FIRST_ROWS = 100
"""Lines or batches of a source that decide whether it has chats."""


@dataclass(frozen=True)
class EarlierRows:
    """The rows of an earlier run, as its data report describes them."""

    day: str
    """Date that the chat template prints in those that are chats (ISO 8601)."""
    train: str
    """Fingerprint of the training rows."""
    valid: list[str]
    """Fingerprints of the validation sets, in their order."""


def find_earlier_rows(
    config: FinetuneConfig,
    storage: str,
    stem: str,
    name_of: Callable[[EarlierRows], str],
) -> EarlierRows | None:
    """Return the rows of the run that this configuration resumes, or None if no template printed a date in them.

    Args:
        config: The configuration.
        storage: URI that holds the runs.
        stem: Beginning of the names of runs of this configuration without a run_name.
        name_of: Returns the name that a run of this configuration derives from its rows.
    """
    for run_uri in _runs(config, storage):
        if rows := read_rows(run_uri):
            return rows
    if config.run_name:
        return None
    names = [name for name in open_store(storage).directories() if name.startswith(f"{stem}-")]
    found = ((name, read_rows(join_uri(storage, name))) for name in names)
    return max(
        (rows for name, rows in found if rows and name_of(rows) == name),
        key=lambda rows: rows.day,
        default=None,
    )


def _runs(config: FinetuneConfig, storage: str) -> Iterator[str]:
    """Yield the URIs of the runs that the configuration names: its own, and that whose state it restores."""
    if config.run_name:
        yield join_uri(storage, config.run_name)
    if config.resume_from_checkpoint:
        checkpoint = resolve("resume_from_checkpoint", config.resume_from_checkpoint, storage, latest)
        if run_uri := run_of(checkpoint):
            yield run_uri


def read_rows(run_uri: str) -> EarlierRows | None:
    """Return the rows of a run, or None if no template printed a date in them."""
    report = open_store(run_uri).read_if_exists(DATA_REPORT_FILE)
    if report is None:
        return None
    sets = json.loads(report)
    train = sets["train"]
    valid = [*([sets["valid"]] if sets["valid"] else []), *sets.get("more_valid", {}).values()]
    day = next((each["date"] for each in (train, *valid) if each.get("date")), None)
    return EarlierRows(day, train["fingerprint"], [each["fingerprint"] for each in valid]) if day else None


def with_day(
    request: DataRequest,
    day: str | None,
    tokenizer: "PreTrainedTokenizerFast",
    tokenizer_dir: Path,
    cache: Path,
    bucket: str | None,
) -> DataRequest:
    """Return a request with the date that the chat template prints in its rows; rows without chats have none, so any day reuses them.

    Args:
        request: The request, without a date.
        day: Date that the chat template prints (ISO 8601); None: it prints none.
        tokenizer: The model's tokenizer with the chat template.
        tokenizer_dir: Directory of the tokenizer files.
        cache: Node cache.
        bucket: URI of the prepared rows in the bucket, or None without one.
    """
    if day is None:
        return request
    dated = replace(request, date=day)
    undated_rows, dated_rows = (
        find_prepared(each.key(tokenizer_dir), cache, bucket) for each in (request, dated)
    )
    if dated_rows or undated_rows:
        return request if undated_rows and undated_rows.summary.date is None else dated
    chunks = ChunkTokenizer(request, tokenizer)
    firsts = {file.source: file for file in reversed(request.files)}  # the first file of each source
    has_chats = any(_may_have_chats(file, chunks, cache) for file in firsts.values())
    return dated if has_chats else request


def _may_have_chats(file: DataFile, chunks: ChunkTokenizer, cache: Path) -> bool:
    """Return whether the rows of a source are chats, by the first row in its first file that has a known format."""
    opened = open_file(file, None if is_remote(file.uri) and file.is_stream else cache)
    schemas = (chunks.find_schema([stored]) for stored in islice(opened.stored, _FIRST_ROWS))
    schema = next(filter(None, schemas), None)
    return schema is None or schema.data_format not in ("text", "tokens")
