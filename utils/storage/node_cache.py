"""The node cache: each bucket object is downloaded once per node, for all workers and jobs.

    <cache>/<place>/                 one prefix of one bucket on one server
        lock                         held by the process that downloads into the place; the others wait for it
        <version>/                   one set of keys, sizes, ETags and known checksums that were listed and wanted
            ready.json               written last: the checksums of the files
            files/<name>/...         the result for callers
        <version>.lock               shared lock, held by every process that uses the version, while it lives
        <version>.<boot>.partial/    a download in progress

The kernel releases a lock when its holder dies, so a waiting process takes over at once and reuses complete files. An
object that another version of the place already holds is hard-linked, not downloaded. When the cache exceeds its limit,
or the disk is full, the least recently used versions without a lock are evicted, including partial ones of dead processes.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from utils.files import (
    PARTIAL_SUFFIX,
    BucketError,
    checksum,
    file_lock,
    format_bytes,
    free_bytes,
    hold_lock,
    nearest_existing,
    parse_bytes,
    reject_clashes,
    safe_join,
    write_atomically,
)
from utils.storage.store import Store, StoredObject, explained

LIMIT_VARIABLE = "ANNEAL_CACHE_LIMIT"  # bytes, or with a unit: 200GiB
_SHARE_OF_DISK = 0.8
_READY, _FILES = "ready.json", "files"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NodeCopy:
    """Objects of a bucket, and their location in the node cache."""

    store: Store
    uri: str
    place: Path
    objects: tuple[StoredObject, ...]
    directory: str  # name of the directory that contains them; empty for a single object

    @property
    def version(self) -> Path:
        """Return the directory of this version."""
        listed = [(item.key, item.size, item.etag, item.checksum) for item in self.objects]
        return self.place / _digest([self.directory, *listed])

    @property
    def result(self) -> Path:
        """Return the path for callers: the directory, or the file."""
        return self.version / _FILES / (self.directory or self.objects[0].key)

    def paths(self, version: Path) -> dict[StoredObject, Path]:
        """Return the path of each object in a version, complete or partial. Rejects unsafe keys."""
        files = version / _FILES / self.directory
        return {item: safe_join(files, item.key) for item in self.objects}


class _Brought(BaseModel):
    """An object on this node, and the modification time of its file (in ns)."""

    key: str
    size: int
    etag: str
    checksum: str
    modified: int


class _Ready(BaseModel):
    """The marker of a complete version."""

    uri: str
    boot: str
    objects: list[_Brought]


def node_copy(
    store: Store, uri: str, objects: Iterable[StoredObject], cache_dir: Path, directory: str = ""
) -> NodeCopy:
    """Return the location of a store's objects in the node cache. Rejects keys that are unsafe as file names."""
    place = cache_dir.absolute() / _digest([store.identity, store.uri])
    copy = NodeCopy(store, uri, place, tuple(objects), directory)
    copy.paths(copy.version)
    reject_clashes(item.key for item in copy.objects)
    return copy


def missing_bytes(copy: NodeCopy) -> int:
    """Return how many bytes `bring` would download now."""
    if _is_ready(copy):
        return 0
    there = _held_by_other_versions(copy)
    return sum(item.size for item in copy.objects if item not in there)


def bring(copy: NodeCopy) -> Path:
    """Ensure that the copy is on this node, and keep it there while this process lives.

    This process or another one downloads it. Fails if disk space is short or storage fails.
    """
    with explained("sync to", str(copy.version)):
        hold_lock(_use_lock(copy.version))  # before the check, so that no process can evict it in between
        if not _is_ready(copy, compare=False):
            with file_lock(copy.place / "lock"):
                if not _is_ready(copy):  # only one of the waiting processes verifies the files, if necessary
                    _download(copy)
        os.utime(copy.version / _READY)  # the time of its last use
        return copy.result


def _download(copy: NodeCopy) -> None:
    version = copy.version
    # After a crash of the machine, files that were not flushed to disk cannot be trusted: hence the boot id.
    partial = version.with_name(f"{version.name}.{_boot()[:8]}{PARTIAL_SUFFIX}")
    for leftover in (version, *copy.place.glob(f"*{PARTIAL_SUFFIX}")):
        if leftover.exists() and leftover != partial:
            shutil.rmtree(leftover)
    targets = copy.paths(partial)
    try:
        for unfinished in partial.rglob(f".*{PARTIAL_SUFFIX}"):
            unfinished.unlink()
        checksums = {item.key: checksum(path) for item, path in targets.items() if path.exists()}
        for item, (path, known) in _held_by_other_versions(copy).items():
            if item.key not in checksums:
                targets[item].parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):  # removed meanwhile
                    targets[item].hardlink_to(path)
                    checksums[item.key] = known
        wanted = {item: path for item, path in targets.items() if item.key not in checksums}
        needed = sum(item.size for item in wanted)
        _free_space(copy, needed)
        _log.info("downloading %s: %d objects, %s", copy.uri, len(wanted), format_bytes(needed))
        checksums |= copy.store.download_many(wanted)
        _write_ready(partial, _look_at(copy, partial, checksums))
        partial.replace(version)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_ready(copy: NodeCopy, *, compare: bool = True) -> bool:
    """Return whether every file exists unchanged; tmp cleaners may remove single files.

    Args:
        compare: verify the checksums of changed files; otherwise count them as missing.
    """
    ready = _read_ready(copy.version)
    if ready is None:
        return False
    checksums = {brought.key: brought.checksum for brought in ready.objects}
    try:
        now = _look_at(copy, copy.version, checksums)
        if now != ready:
            # A file was written to, or the machine crashed: the disk may hold the marker but not the files.
            paths = copy.paths(copy.version)
            if not compare or any(checksum(path) != checksums.get(item.key) for item, path in paths.items()):
                return False
            _write_ready(copy.version, now)
    except FileNotFoundError:
        return False
    return True


def _look_at(copy: NodeCopy, version: Path, checksums: Mapping[str, str]) -> _Ready:
    """Return a marker for the files as they are now. Raises FileNotFoundError."""
    objects = []
    for item, path in copy.paths(version).items():
        status = path.stat()
        objects.append(
            _Brought(
                key=item.key,
                size=status.st_size,
                etag=item.etag,
                checksum=checksums.get(item.key, ""),
                modified=status.st_mtime_ns,
            )
        )
    return _Ready(uri=copy.store.uri, boot=_boot(), objects=objects)


def _write_ready(version: Path, ready: _Ready) -> None:
    write_atomically(version / _READY, ready.model_dump_json(indent=2).encode())


def _read_ready(version: Path) -> _Ready | None:
    try:
        return _Ready.model_validate_json((version / _READY).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _held_by_other_versions(copy: NodeCopy) -> dict[StoredObject, tuple[Path, str]]:
    """Return the objects that another version of the place holds: object -> (file, checksum)."""
    found = {}
    for marker in copy.place.glob(f"*/{_READY}"):
        ready = _read_ready(marker.parent)
        files = next((marker.parent / _FILES).glob("*"), None)
        if ready is None or ready.boot != _boot() or files is None:
            continue
        held = {(brought.key, brought.size, brought.etag): brought for brought in ready.objects}
        for item in copy.objects:
            brought = held.get((item.key, item.size, item.etag))
            if brought is None or item.checksum not in (None, brought.checksum):
                continue
            path = files / item.key if files.is_dir() else files
            with suppress(FileNotFoundError):
                if path.stat().st_mtime_ns == brought.modified:
                    found[item] = (path, brought.checksum)
    return found


# --- Eviction -----------------------------------------------------------------------------------------------------


def cache_limit(cache_dir: Path) -> int:
    """Return the maximum size of a cache directory in bytes: $ANNEAL_CACHE_LIMIT, else four fifths of its disk."""
    limit = written_cache_limit()
    return (
        int(shutil.disk_usage(nearest_existing(cache_dir)).total * _SHARE_OF_DISK) if limit is None else limit
    )


def written_cache_limit() -> int | None:
    """Return $ANNEAL_CACHE_LIMIT in bytes; None if it is not set. Raise a BucketError if it is not a size."""
    written = os.environ.get(LIMIT_VARIABLE)
    if not written:
        return None
    try:
        return parse_bytes(written)
    except ValueError as error:
        raise BucketError(f"{LIMIT_VARIABLE}={written}: {error}") from error


def _free_space(copy: NodeCopy, needed: int) -> None:
    """Evict the least recently used versions without a lock until `needed` bytes fit into the limit and the disk."""
    cache_dir = copy.place.parent
    limit = cache_limit(cache_dir)
    while _held_bytes(cache_dir) + needed > limit or free_bytes(copy.place) < needed:
        if not _remove_oldest(cache_dir):
            break
    if (available := free_bytes(copy.place)) < needed:
        raise BucketError(
            f"{copy.uri} needs {format_bytes(needed)} of disk space, but {cache_dir} has {format_bytes(available)} free; "
            "free some space, or choose a directory on a larger disk"
        )


def _held_bytes(cache_dir: Path) -> int:
    sizes = dict[int, int]()  # by inode: versions share files
    for files in cache_dir.glob(f"*/*/{_FILES}"):
        for directory, _, names in os.walk(files):  # skips entries that others rename or remove meanwhile
            for name in names:
                with suppress(FileNotFoundError):
                    status = Path(directory, name).stat()
                    sizes[status.st_ino] = status.st_size
    return sum(sizes.values())


def _remove_oldest(cache_dir: Path) -> bool:
    """Remove the least recently used version without a lock; return whether there was one."""
    found = []
    for files in cache_dir.glob(f"*/*/{_FILES}"):
        version, marker = files.parent, files.parent / _READY
        with suppress(FileNotFoundError):
            found.append(((marker if marker.exists() else version).stat().st_mtime, version))
    for _, version in sorted(found):
        with suppress(BlockingIOError), file_lock(_use_lock(version), blocking=False):
            _log.info("removing %s from the cache", version)
            (version / _READY).unlink(missing_ok=True)
            shutil.rmtree(version, ignore_errors=True)
            if not version.exists():
                return True
            _log.warning("%s cannot be removed from the cache", version)
    return False


def _use_lock(version: Path) -> Path:
    """Return the lock file of a version, complete or partial."""
    return version.with_name(f"{version.name.partition('.')[0]}.lock")


def _digest(identity: list[Any]) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]


def _boot() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else ""
