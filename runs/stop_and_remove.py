"""Stop a run wherever its driver is, and remove a run that no other run needs."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from configs.schema import uri_keys
from runs.layout import (
    CONFIG_FILE,
    MANIFEST_FILE,
    RESULT_FILE,
    USES,
    CheckpointUse,
    StopRequest,
    lease_key,
    run_of,
    stop_key,
)
from runs.reading import read_config, read_result
from runs.summaries import REQUESTS_AT_ONCE, RunSummary, check_run, latest_lease, lives, no_run, summarize
from utils.command_line import main_line
from utils.errors import AnnealError
from utils.processes import user_and_host
from utils.storage.bucket import BucketError, NotFoundError, Store, is_remote, local_path, open_store
from utils.storage.store import explained

_POLL_SECONDS = 1.0
_STARTS = uri_keys("model", "data")


class NotStoppedError(AnnealError):
    """A run without a driver that could stop; the message says what to do instead."""


class InUseError(AnnealError):
    """A run that must not be removed; the message names what uses it."""


def stop_run(uri: str, progress: Callable[[str], None]) -> RunSummary:
    """Ask the driver of a run to commit a checkpoint and exit; return the run's state once the driver has exited."""
    run = find_run(uri)
    store = open_store(uri)
    lease, _ = latest_lease(store, "")
    if run.status != "running" or lease is None:
        raise NotStoppedError(
            f"{uri}: no driver trains this run (status: {run.status}). There is nothing to stop."
        )
    request = StopRequest(requested_by=user_and_host())
    store.write(stop_key(lease.token), request.model_dump_json().encode())
    progress(f"waiting for {lease.owner} to commit a checkpoint and exit (Ctrl-C ends only this wait)")
    while lives(lease, store.age(lease_key(lease.number))) and _is_latest(store, lease.token):
        time.sleep(_POLL_SECONDS)
    store.delete([stop_key(lease.token)])
    ended = summarize(store, "")
    if ended is None:  # a run that has not trained leaves nothing
        return run.model_copy(update={"status": "stopped", "reason": "before training started"})
    if ended.status == "interrupted":
        raise NotStoppedError(
            f"{uri}: {lease.owner} exited before it could stop. The same command resumes the run."
        )
    return ended


def _is_latest(store: Store, token: str) -> bool:
    lease, _ = latest_lease(store, "")
    return lease is not None and lease.token == token


def find_run(uri: str) -> RunSummary:
    """Return the state of a run; raise NotFoundError if there is none."""
    if run_of(uri):
        raise NotFoundError(f"{uri} is a checkpoint. Give the URI of its run: {run_of(uri)}")
    check_run(uri)
    found = summarize(open_store(uri), "")
    if found is None:
        raise no_run(open_store(uri))
    return found


def check_removable(run: RunSummary) -> list[str]:
    """Raise InUseError for a run that is being trained, or that another run started from.

    Returns:
        A message for each record that cannot be read, and so may be of a run that started from this one.
    """
    if run.status == "running":
        raise InUseError(f"{run.run_uri} is running. Stop it first: {main_line('stop', run.run_uri)}")
    unreadable: list[str] = []
    users = sorted({*_marked_users(run.run_uri, unreadable), *_neighbours(run.run_uri, unreadable)})
    if users:
        raise InUseError(
            f"{run.run_uri}: other runs started from it: {', '.join(users)}. Remove those first, or keep it."
        )
    return unreadable


def remove_run(run: RunSummary) -> int:
    """Delete all objects of a run, manifests first, so that no partial checkpoint is ever visible; return their number."""
    store = open_store(run.run_uri)
    keys = [item.key for item in store.list()]
    store.abort_stale_uploads()
    store.delete(sorted(keys, key=lambda key: PurePosixPath(key).name != MANIFEST_FILE))
    if not is_remote(run.run_uri):
        with explained("remove", run.run_uri):
            for directory, _, _ in os.walk(local_path(run.run_uri), topdown=False):
                Path(directory).rmdir()  # a killed copy leaves empty ones
    return len(keys)


def _marked_users(uri: str, unreadable: list[str]) -> Iterator[str]:
    """Return the runs that still need a checkpoint of a run, wherever they are."""
    store = open_store(uri)
    keys = [item.key for item in store.list(f"{USES}/")]
    with ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="use") as pool:
        contents = list(pool.map(store.read_if_exists, keys))
    for key, content in zip(keys, contents, strict=True):
        if content is not None:
            try:
                yield CheckpointUse.model_validate_json(content).run_uri
            except ValidationError:
                unreadable.append(
                    f"{store.uri_of(key)} is damaged: it names a run that started from this one"
                )


def _neighbours(uri: str, unreadable: list[str]) -> Iterator[str]:
    """Return the runs in the same storage path that started from a run."""
    storage, _, name = uri.rstrip("/").rpartition("/")
    runs = open_store(storage)

    def uses_it(other: str) -> bool | str:
        try:
            return _started_from(runs, other, uri)
        except BucketError as error:
            return str(error)

    others = [other for other in runs.directories() if other != name]
    with ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="run") as pool:
        found = list(pool.map(uses_it, others))
    unreadable += [answer for answer in found if isinstance(answer, str)]
    yield from (runs.uri_of(other) for other, answer in zip(others, found, strict=True) if answer is True)


def _started_from(runs: Store, other: str, uri: str) -> bool:
    stored = read_config(runs, f"{other}/{CONFIG_FILE}")
    if stored is not None and any(
        _is_in(start, uri) for start in _texts([stored.keys.get(key) for key in _STARTS])
    ):
        return True
    result = read_result(runs, f"{other}/{RESULT_FILE}")
    if result is not None and result.parent is not None and run_of(result.parent) == uri:
        return True
    if stored is not None and stored.damage:
        raise BucketError(stored.damage)
    return False


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in a value of the YAML."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for below in value.values() if isinstance(value, dict) else value:
            yield from _texts(below)


def _is_in(start: str, uri: str) -> bool:
    """Return whether a URI of another run's YAML in the same storage path names a run, or an object in it."""
    if start.startswith("run:"):
        return start == f"run:{uri.rstrip('/').rpartition('/')[2]}"
    places = {start, str(local_path(start))}
    return any(f"{place}/".startswith(f"{uri.rstrip('/')}/") for place in places)
