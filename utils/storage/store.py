"""The object store protocol and its errors."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from utils.files import PARTIAL_SUFFIX, BucketError, format_bytes, free_bytes, is_disk_full


class NotFoundError(BucketError):
    """An error for an object that does not exist."""


class AlreadyExistsError(BucketError):
    """An error for a conditional write whose object already exists."""


class ChangedError(BucketError):
    """An error for a conditional write whose object has changed since it was read."""


class DamagedError(BucketError):
    """An error for an object whose downloaded content differs from the stored content."""

    def __init__(self, key: str, message: str):
        super().__init__(key, message)  # arguments for unpickling in another process
        self.key = key

    def __str__(self) -> str:
        return self.args[1]


@dataclass(frozen=True)
class StoredObject:
    """One object as listed: `key` relative to its store, `size` in bytes.

    `checksum` ("crc64nvme:<16 hex digits>", see utils.files) is set by callers that know the expected content.
    """

    key: str
    size: int
    etag: str
    checksum: str | None = None


class Store(Protocol):
    """A store of objects, and what stores have in common. Every method raises BucketError when storage rejects a request or fails."""

    uri: str

    @property
    def identity(self) -> str:
        """Return an id that distinguishes this store from others with the same URI: usually the server."""
        ...

    def list(self, prefix: str = "") -> list[StoredObject]:
        """Return the objects whose key starts with `prefix`, sorted by key; empty if the location does not exist."""
        ...

    def directories(self) -> Sequence[str]:
        """Return the names of the directories at the top level, sorted, without listing the objects in them."""
        ...

    def first(self, prefix: str) -> StoredObject | None:
        """Return the first object whose key starts with `prefix`, or None."""
        return next(iter(self.list(prefix)), None)

    def stat(self, key: str) -> StoredObject:
        """Return the metadata of one object; requires permission to read it. Raises NotFoundError."""
        ...

    def read(self, key: str) -> bytes:
        """Return the content of an object. Raises NotFoundError."""
        ...

    def read_if_exists(self, key: str) -> bytes | None:
        """Return the content of an object, or None if it does not exist."""
        try:
            return self.read(key)
        except NotFoundError:
            return None

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Return `length` bytes (at least 1) from byte `start`. Raises NotFoundError."""
        ...

    def age(self, key: str) -> float | None:
        """Return the seconds since an object was written, by the storage's own clock; None if it does not exist."""
        ...

    def write(self, key: str, data: bytes, *, only_if_absent: bool = False) -> None:
        """Write an object; raise AlreadyExistsError if it exists and `only_if_absent` is set."""
        ...

    def download(self, key: str, path: Path) -> None:
        """Download one object to `path` atomically. Raises NotFoundError."""
        self.download_many({self.stat(key): path})

    def download_many(self, targets: Mapping[StoredObject, Path]) -> dict[str, str]:
        """Download listed objects to paths, in parallel and each atomically. Return key -> checksum.

        Raises:
            DamagedError: an object does not match its `checksum` or the checksum that storage holds.
        """
        ...

    def upload(self, path: Path, key: str) -> None:
        """Upload one file."""
        ...

    def upload_many(self, sources: Mapping[str, Path]) -> None:
        """Upload files (key -> path), in parallel and each atomically."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; missing objects are no error."""
        ...

    def abort_stale_uploads(self, prefix: str = "") -> int:
        """Remove unfinished uploads below `prefix` and return their number. No other process may be writing there."""
        ...

    def uri_of(self, key: str) -> str:
        """Return the full URI of an object."""
        return join_uri(self.uri, key)


def join_uri(uri: str, *parts: str) -> str:
    """Append path parts to a URI or a local path with single slashes; skip empty parts."""
    for part in parts:
        if stripped := part.strip("/"):
            uri = f"{uri.rstrip('/')}/{stripped}"
    return uri


@contextmanager
def explained(action: str, uri: str) -> Iterator[None]:
    """Convert an OSError into a BucketError that says which action failed and where."""
    try:
        yield
    except OSError as error:
        raise explain_os_error(error, action, uri) from error


def explain_os_error(error: OSError, action: str, uri: str) -> BucketError:
    """Return the BucketError for an OSError."""
    where = f"cannot {action} {uri}"
    if isinstance(error, FileExistsError):
        return AlreadyExistsError(f"{where}: it already exists")
    if isinstance(error, FileNotFoundError):
        missing = "" if str(error.filename) == uri else f" ({error.filename})"
        return NotFoundError(f"{where}: no such file or directory{missing}")
    if isinstance(error, PermissionError):
        rejected = Path(error.filename or "")
        rejected = rejected.parent if rejected.suffix == PARTIAL_SUFFIX else rejected
        return BucketError(
            f"{where}: permission denied ({rejected}); change its owner or choose another location"
        )
    if isinstance(error, NotADirectoryError):
        paths = [Path(error.filename or uri), *Path(error.filename or uri).parents]
        file = next((path for path in paths if path.is_file()), paths[0])
        return BucketError(f"{where}: {file} is a file; name a directory, such as {file.parent}")
    place = Path(error.filename2 or error.filename or "").parent  # for a copy: the target
    if is_disk_full(error, place):
        free = f"; {format_bytes(free_bytes(place))} are free in {place}" if error.filename else ""
        return BucketError(
            f"{where}: the disk is full ({error.strerror}{free}); free some space, or choose a directory on a larger disk"
        )
    return BucketError(f"{where}: {error}")
