"""The rows of the run that a plan resumes: a chat template that prints the date must print the same day again."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from configs.schema import FinetuneConfig
from runs.layout import DATA_REPORT_FILE, run_of
from runs.reading import latest
from training.planning.resume import resolve
from utils.storage.bucket import join_uri, open_store


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
