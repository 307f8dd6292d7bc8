"""What a store of objects is, and the words for what goes wrong with one."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from utils.files import PARTIAL_SUFFIX, BucketError, format_bytes, free_bytes, is_disk_full


class NotFoundError(BucketError):
    """There is no such object."""


class AlreadyExistsError(BucketError):
    """A write that was to be the first found an object in its place."""


class DamagedError(BucketError):
    """What arrived of the object `key` is not what was stored."""

    def __init__(self, key: str, message: str):
        super().__init__(key, message)  # as it is made again when it comes from another process
        self.key = key

    def __str__(self) -> str:
        return self.args[1]


@dataclass(frozen=True)
class StoredObject:
    """One object as it was when it was listed: `key` relative to its store, `size` in bytes.

    `checksum` ("crc64nvme:<16 hex digits>", see utils.files) is for those who know what its content must be.
    """

    key: str
    size: int
    etag: str
    checksum: str | None = None


class Store(Protocol):
    """A place for objects. Every method raises BucketError when storage refuses or fails."""

    uri: str

    @property
    def identity(self) -> str:
        """What tells this place from one with the same URI elsewhere: the server, as a rule."""
        ...

    def list(self, prefix: str = "") -> list[StoredObject]:
        """Return the objects whose key starts with `prefix`, sorted by key; none where there is no place."""
        ...

    def directories(self) -> Sequence[str]:
        """Return the first parts of keys that have more than one, sorted, each once; objects below are not listed."""
        ...

    def first(self, prefix: str) -> StoredObject | None:
        """Return the first object whose key starts with `prefix`, None when there is none."""
        ...

    def stat(self, key: str) -> StoredObject:
        """Return what is known of one object; needs the right to read it. Raises NotFoundError."""
        ...

    def read(self, key: str) -> bytes:
        """Return the whole object. Raises NotFoundError."""
        ...

    def read_if_exists(self, key: str) -> bytes | None:
        """Return the whole object, None when there is none."""
        ...

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Return `length` bytes (at least 1) from byte `start`. Raises NotFoundError."""
        ...

    def age(self, key: str) -> float | None:
        """Return the seconds since an object was written, by the storage's own clock; None when there is none."""
        ...

    def write(self, key: str, data: bytes, *, only_if_absent: bool = False) -> None:
        """Write a whole object; raises AlreadyExistsError when it is there and `only_if_absent`."""
        ...

    def download(self, key: str, path: Path) -> None:
        """Bring one object to `path`, whole or not at all. Raises NotFoundError."""
        ...

    def download_many(self, targets: Mapping[StoredObject, Path]) -> dict[str, str]:
        """Bring listed objects to paths, in parallel; each is whole or not there. Returns key -> checksum.

        Raises DamagedError when an object is not what its `checksum`, or the storage's own, says.
        """
        ...

    def upload(self, path: Path, key: str) -> None:
        """Store one file."""
        ...

    def upload_many(self, sources: Mapping[str, Path]) -> None:
        """Store files (key -> path), in parallel; each object is whole or not there."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; those that are not there count as deleted."""
        ...

    def abort_stale_uploads(self, prefix: str = "") -> int:
        """Remove what dead writers left unfinished below `prefix`, and return how many; nobody may be writing there."""
        ...

    def uri_of(self, key: str) -> str:
        """Return the full URI of an object."""
        ...


def join_uri(uri: str, *parts: str) -> str:
    """Append path parts to a URI or a local path with single slashes; empty parts are left out."""
    for part in parts:
        if stripped := part.strip("/"):
            uri = f"{uri.rstrip('/')}/{stripped}"
    return uri


@contextmanager
def explained(action: str, uri: str) -> Iterator[None]:
    """Turn what the disk raises into a BucketError that says what was done where."""
    try:
        yield
    except OSError as error:
        raise explain_os_error(error, action, uri) from error


def explain_os_error(error: OSError, action: str, uri: str) -> BucketError:
    """Return the BucketError for what the disk raised."""
    where = f"cannot {action} {uri}"
    if isinstance(error, FileExistsError):
        return AlreadyExistsError(f"{where}: it already exists")
    if isinstance(error, FileNotFoundError):
        missing = "" if str(error.filename) == uri else f" ({error.filename})"
        return NotFoundError(f"{where}: no such file or directory{missing}")
    if isinstance(error, PermissionError):
        refused = Path(error.filename or "")
        refused = refused.parent if refused.suffix == PARTIAL_SUFFIX else refused
        return BucketError(
            f"{where}: permission denied ({refused}); change its owner or choose another place"
        )
    place = Path(error.filename2 or error.filename or "").parent  # of a copy, where to
    if is_disk_full(error, place):
        free = f"; {format_bytes(free_bytes(place))} are free in {place}" if error.filename else ""
        return BucketError(
            f"{where}: the disk is full ({error.strerror}{free}); free some space, or choose a directory on a larger disk"
        )
    return BucketError(f"{where}: {error}")
