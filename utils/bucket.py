"""One interface for `s3://` and for local directories: list, read, write, move whole files, check, sync to a node.

Every bucket goes through boto3's standard chain of credentials and settings (AWS_ENDPOINT_URL_S3, AWS_PROFILE,
AWS_CA_BUNDLE, AWS_REQUEST_CHECKSUM_CALCULATION, ...), except `s3://anneal`, which is the embedded bucket. So one
process may use both. Keys of objects are relative to the store they are listed from.
"""

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from utils.embedded_bucket import EMBEDDED_BUCKET, embedded_endpoint, state_directory
from utils.files import (
    PARTIAL_SUFFIX,
    BucketError,
    UnsafeKeyError,
    copy_atomically,
    file_lock,
    format_bytes,
    free_bytes,
    nearest_existing,
    partial_name,
    safe_join,
    write_atomically,
)

__all__ = [
    "EMBEDDED_BUCKET",
    "AlreadyExistsError",
    "BucketError",
    "NotFoundError",
    "Store",
    "StoredObject",
    "UnsafeKeyError",
    "check_readable",
    "check_writable",
    "fetch_file",
    "find_objects",
    "is_remote",
    "join_uri",
    "missing_bytes",
    "open_store",
    "sync_to_node",
    "upload_directory",
    "uses_embedded_bucket",
]

_log = logging.getLogger(__name__)

_TRANSFER_THREADS = 16
_WORK_ATTEMPTS, _WORK_TIMEOUT_SECONDS = 10, 30  # a run outlives a storage that is down for a minute
_CHECK_ATTEMPTS, _CHECK_TIMEOUT_SECONDS = 2, 5  # a check answers within some 10 seconds
_READ_ATTEMPTS = 5
_ABOUT_EMBEDDED = "`make quickstart` fills this embedded bucket, whose data lies in"
_DELETE_BATCH = 1000  # the most keys S3 takes in one request


class NotFoundError(BucketError):
    """There is no such object."""


class AlreadyExistsError(BucketError):
    """A write that was to be the first found an object in its place."""


@dataclass(frozen=True)
class StoredObject:
    """One object as it was when it was listed: `key` relative to its store, `size` in bytes."""

    key: str
    size: int
    etag: str


class Store(Protocol):
    """A place for objects. Every method raises BucketError when storage refuses or fails."""

    uri: str

    def list(self, prefix: str = "") -> list[StoredObject]:
        """Return the objects whose key starts with `prefix`, sorted by key; none where there is no place."""
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

    def download_many(self, targets: Mapping[StoredObject, Path]) -> None:
        """Bring listed objects to paths, in parallel; each is whole or not there."""
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

    def uri_of(self, key: str) -> str:
        """Return the full URI of an object."""
        ...


def open_store(uri: str) -> Store:
    """Return the store at `uri` (s3://bucket/prefix, file:///directory, or a path). Touches nothing yet.

    Raises BucketError for other schemes.
    """
    return S3Store(uri) if is_remote(uri) else LocalStore(_local_path(uri))


def is_remote(uri: str) -> bool:
    """Tell whether `uri` is in a bucket rather than on this machine. Raises BucketError for other schemes."""
    scheme = _scheme(uri)
    if scheme not in ("", "file", "s3"):
        raise BucketError(f"{uri}: {scheme}:// is not supported; use s3://bucket/prefix or a local path")
    return scheme == "s3"


def uses_embedded_bucket(uri: str) -> bool:
    """Tell whether `uri`, of whatever scheme, needs the embedded bucket to be running."""
    return _scheme(uri) == "s3" and _split_s3(uri)[0] == EMBEDDED_BUCKET


def join_uri(uri: str, *parts: str) -> str:
    """Append path parts to a URI or a local path with single slashes; empty parts are left out."""
    for part in parts:
        if stripped := part.strip("/"):
            uri = f"{uri.rstrip('/')}/{stripped}"
    return uri


def check_readable(uri: str) -> None:
    """Make sure that `uri` names an object, or a prefix with objects, that can be read.

    Raises BucketError, with a message of its own for each cause: no such bucket, no such object, credentials
    that are missing, wrong, expired or not allowed, an endpoint that does not answer (within some 10 seconds).
    """
    if not is_remote(uri):
        _check_local_readable(uri)
        return
    parent_uri, name = _parent(uri)
    parent = S3Store(parent_uri, attempts=_CHECK_ATTEMPTS, timeout_seconds=_CHECK_TIMEOUT_SECONDS)
    found = parent.first(name)
    if found is None or found.key != name:
        found = parent.first(f"{name}/" if name else "")
    if found is None:
        hint = f" ({_ABOUT_EMBEDDED} {state_directory()})" if uses_embedded_bucket(uri) else ""
        raise NotFoundError(f"{uri}: the bucket exists, but has no such object and none below it{hint}")
    parent.stat(found.key)  # reading needs a permission that listing does not


def check_writable(uri: str) -> None:
    """Make sure that objects can be put at and deleted from `uri`. Raises BucketError.

    A bucket gets a small probe object for a moment; of a local path only the nearest existing directory is
    probed, nothing is created.
    """
    if is_remote(uri):
        store = S3Store(uri, attempts=_CHECK_ATTEMPTS, timeout_seconds=_CHECK_TIMEOUT_SECONDS)
        probe = f".write-probe-{secrets.token_hex(8)}"
        store.write(probe, b"probe")
        store.delete([probe])
        return
    path = _local_path(uri)
    with _local_errors("write to", str(path)):
        directory = nearest_existing(path)
        if not directory.is_dir():
            raise BucketError(f"cannot write to {path}: {directory} is a file; choose another place")
        try:
            tempfile.TemporaryFile(dir=directory).close()
        except FileNotFoundError as error:  # /proc and its like
            raise BucketError(
                f"cannot write to {path}: {directory} takes no files; choose another place"
            ) from error


def find_objects(uri: str) -> list[tuple[str, str]]:
    """Return (full URI, what tells its version: size and ETag) of the object at `uri`, or of all below it, by key.

    Raises BucketError when the listing fails; nothing there is an empty list.
    """
    if is_remote(uri):
        parent_uri, name = _parent(uri)
        parent = S3Store(parent_uri)
        found = parent.first(name) if name else None
        if found is not None and found.key == name:
            return [(uri, f"{found.size} {found.etag}")]
    elif (path := _local_path(uri)).is_file():
        status = path.stat()
        return [(str(path), f"{status.st_size} {status.st_mtime_ns:x}")]
    store = open_store(uri)
    return [(store.uri_of(item.key), f"{item.size} {item.etag}") for item in store.list()]


def fetch_file(uri: str, cache_dir: Path) -> Path:
    """Bring one object to this node once and return its path; a local file is returned as it is.

    As `sync_to_node` in everything else. Raises NotFoundError when there is no such object.
    """
    if not is_remote(uri):
        path = _local_path(uri)
        if path.is_dir():
            raise BucketError(f"{path}: is a directory. Name a file in it.")
        if not path.is_file():
            raise NotFoundError(f"{path}: no such file")
        return path
    return _download_once(_single_object(uri, cache_dir))


def _everything(key: str) -> bool:
    return True


def sync_to_node(uri: str, cache_dir: Path, wanted: Callable[[str], bool] = _everything) -> Path:
    """Bring the objects below a prefix to this node, once, and return their directory.

    However many processes call it at once, one downloads and the others wait for it; if it dies, the next takes
    over. A copy that is already there moves no object. It is keyed by what was listed (keys, sizes, ETags), so
    a changed prefix is another copy. `wanted` chooses among the keys (relative to the prefix). A `uri` that is
    a single object gives a file; local files and directories are returned as they are.

    Raises BucketError: nothing there, not enough disk, keys that would leave the directory, failing storage.
    """
    if not is_remote(uri):
        path = _local_path(uri)
        if not path.exists():
            raise NotFoundError(f"{path}: no such file or directory")
        return path
    return _download_once(_node_copy(uri, cache_dir, wanted))


def missing_bytes(uri: str, cache_dir: Path, wanted: Callable[[str], bool] = _everything) -> int:
    """Return how many bytes `sync_to_node` would bring to this node: 0 when they are there, or local.

    Raises BucketError, as `sync_to_node` does.
    """
    if not is_remote(uri):
        return 0
    copy = _node_copy(uri, cache_dir, wanted)
    return 0 if copy.is_whole() else copy.size


def upload_directory(directory: Path, store: Store, prefix: str, files: Iterable[str]) -> None:
    """Store `files` (relative to `directory`, "/" between parts) under `prefix`, in parallel. Raises BucketError."""
    store.upload_many(
        {join_uri(prefix, name) if prefix else name: safe_join(directory, name) for name in files}
    )


@dataclass(frozen=True)
class _NodeCopy:
    """Objects of a bucket and where they lie on this node once they are there."""

    store: "S3Store"
    uri: str
    place: Path  # of this copy alone; filled under another name, so that it exists means that it is whole
    targets: Mapping[StoredObject, Path]
    result: Path  # what the caller gets: the directory or the one file, in `place`

    @property
    def size(self) -> int:
        return sum(item.size for item in self.targets)

    def is_whole(self) -> bool:
        # A look at each size, because cleaners of old files take single files.
        try:
            return all(path.stat().st_size == item.size for item, path in self.targets.items())
        except FileNotFoundError:
            return False


def _node_copy(uri: str, cache_dir: Path, wanted: Callable[[str], bool]) -> _NodeCopy:
    store = S3Store(uri)
    listed = store.list()
    if not listed:
        return _single_object(uri, cache_dir)
    objects = [item for item in listed if wanted(item.key)]
    if not objects:
        raise NotFoundError(f"{uri}: none of its {len(listed)} objects is of the kind that is needed here")
    place = _place(store, uri, objects, cache_dir)
    directory = safe_join(place, _parent(uri)[1] or store.bucket)
    targets = {item: safe_join(directory, item.key) for item in objects}
    return _NodeCopy(store, uri, place, targets, directory)


def _single_object(uri: str, cache_dir: Path) -> _NodeCopy:
    parent_uri, name = _parent(uri)
    store = S3Store(parent_uri)
    found = store.first(name)
    if not name or found is None or found.key != name:
        raise NotFoundError(
            f"{uri}: there is no such object; look at the spelling and at upper and lower case"
        )
    place = _place(store, uri, [found], cache_dir)
    path = safe_join(place, name)
    return _NodeCopy(store, uri, place, {found: path}, path)


def _place(store: "S3Store", uri: str, objects: list[StoredObject], cache_dir: Path) -> Path:
    identity = [store.identity, uri, [(item.key, item.size, item.etag) for item in objects]]
    return cache_dir.absolute() / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]


def _download_once(copy: _NodeCopy) -> Path:
    """Make sure that the copy is on this node, whoever downloads it, and return its path."""
    if copy.is_whole():
        return copy.result
    place = copy.place
    partial = place.with_name(f"{place.name}{PARTIAL_SUFFIX}")
    with _local_errors("sync to", str(place)), file_lock(place.with_name(f"{place.name}.lock")):
        if copy.is_whole():
            return copy.result
        for leftover in (place, partial):  # of a process that died here, or of a cleaner of old files
            if leftover.exists():
                shutil.rmtree(leftover)
        available = free_bytes(place)
        if copy.size > available:
            raise BucketError(
                f"{copy.uri} needs {format_bytes(copy.size)} of disk, but {place.parent} has "
                f"{format_bytes(available)} free; free some space, or choose a directory on a larger disk"
            )
        _log.info("downloading %s: %d objects, %s", copy.uri, len(copy.targets), format_bytes(copy.size))
        try:
            copy.store.download_many(
                {item: partial / path.relative_to(place) for item, path in copy.targets.items()}
            )
            partial.replace(place)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return copy.result


def _parent(uri: str) -> tuple[str, str]:
    """Return (URI without its last part, last part); the last part is empty for a whole bucket."""
    bucket, prefix = _split_s3(uri)
    above, _, name = prefix.rpartition("/")
    return join_uri(f"s3://{bucket}", above), name


# --- Local directories ------------------------------------------------------------------------------------------


class LocalStore:
    """A directory as a store."""

    def __init__(self, root: Path):
        self.root = root
        self.uri = str(root)

    def list(self, prefix: str = "") -> list[StoredObject]:
        """See Store."""
        start = safe_join(self.root, prefix.rpartition("/")[0]) if "/" in prefix else self.root
        found = []
        with _local_errors("list", self.uri_of(prefix)):
            for directory, _, names in os.walk(start, onerror=_raise_unless_missing):
                for name in names:
                    path = Path(directory, name)
                    key = path.relative_to(self.root).as_posix()
                    is_partial = name.startswith(".") and name.endswith(PARTIAL_SUFFIX)
                    if key.startswith(prefix) and not is_partial:
                        with suppress(FileNotFoundError):  # deleted since
                            status = path.stat()
                            etag = f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"
                            found.append(StoredObject(key, status.st_size, etag))
        return sorted(found, key=lambda item: item.key)

    def read(self, key: str) -> bytes:
        """See Store."""
        with _local_errors("read", self.uri_of(key)):
            return safe_join(self.root, key).read_bytes()

    def read_if_exists(self, key: str) -> bytes | None:
        """See Store."""
        try:
            return self.read(key)
        except NotFoundError:
            return None

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """See Store."""
        with _local_errors("read", self.uri_of(key)), safe_join(self.root, key).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def age(self, key: str) -> float | None:
        """See Store."""
        with _local_errors("read", self.uri_of(key)):
            try:
                return time.time() - safe_join(self.root, key).stat().st_mtime
            except FileNotFoundError:
                return None

    def write(self, key: str, data: bytes, *, only_if_absent: bool = False) -> None:
        """See Store."""
        with _local_errors("write", self.uri_of(key)):
            write_atomically(safe_join(self.root, key), data, replace=not only_if_absent)

    def download(self, key: str, path: Path) -> None:
        """See Store."""
        with _local_errors("copy", self.uri_of(key)):
            copy_atomically(safe_join(self.root, key), path)

    def download_many(self, targets: Mapping[StoredObject, Path]) -> None:
        """See Store."""
        for item, path in targets.items():
            self.download(item.key, path)

    def upload(self, path: Path, key: str) -> None:
        """See Store."""
        with _local_errors(f"copy {path} to", self.uri_of(key)):
            copy_atomically(path, safe_join(self.root, key))

    def upload_many(self, sources: Mapping[str, Path]) -> None:
        """See Store."""
        for key, path in sources.items():
            self.upload(path, key)

    def delete(self, keys: Iterable[str]) -> None:
        """See Store. Directories that are empty afterwards go too, as they would in a bucket."""
        for key in keys:
            path = safe_join(self.root, key)
            with _local_errors("delete", str(path)):
                path.unlink(missing_ok=True)
                for parent in path.parents:
                    # A directory that is not empty, or that somebody is just filling, refuses to go.
                    if parent == self.root or not _removed_empty(parent):
                        break

    def uri_of(self, key: str) -> str:
        """See Store."""
        return join_uri(self.uri, key)


def _removed_empty(directory: Path) -> bool:
    try:
        directory.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        return False
    return True


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _check_local_readable(uri: str) -> None:
    path = _local_path(uri)
    with _local_errors("read", str(path)):
        if path.is_dir():
            listed = LocalStore(path).list()
            if not listed:
                raise NotFoundError(f"{path}: the directory is empty")
            path = safe_join(path, listed[0].key)
        with path.open("rb") as file:
            file.read(1)


def _local_path(uri: str) -> Path:
    if _scheme(uri) != "file":
        return Path(uri).expanduser().absolute()
    host, slash, path = uri.partition("://")[2].partition("/")
    if host not in ("", "localhost") or not slash:
        raise BucketError(f"{uri}: write file:///absolute/path")
    return Path("/" + urllib.parse.unquote(path))


def _scheme(uri: str) -> str:
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/", uri)
    return match.group(1).lower() if match else ""


@contextmanager
def _local_errors(action: str, uri: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _explain_os_error(error, action, uri) from error


def _explain_os_error(error: OSError, action: str, uri: str) -> BucketError:
    where = f"cannot {action} {uri}"
    if isinstance(error, FileExistsError):
        return AlreadyExistsError(f"{where}: it already exists")
    if isinstance(error, FileNotFoundError):
        return NotFoundError(f"{where}: no such file ({error.filename})")
    if isinstance(error, PermissionError):
        return BucketError(
            f"{where}: permission denied ({error.filename}); change its owner or choose another place"
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BucketError(f"{where}: the disk is full; free some space or choose another place")
    return BucketError(f"{where}: {error}")


# --- S3 ---------------------------------------------------------------------------------------------------------


class S3Store:
    """A prefix of a bucket as a store. Made anew in each process; the credentials are looked up there."""

    def __init__(
        self, uri: str, *, attempts: int = _WORK_ATTEMPTS, timeout_seconds: int = _WORK_TIMEOUT_SECONDS
    ):
        self.bucket, self.prefix = _split_s3(uri)
        self.uri = join_uri(f"s3://{self.bucket}", self.prefix)
        self._start = f"{self.prefix}/" if self.prefix else ""  # what every key in the bucket starts with
        self._attempts = attempts
        self._timeout_seconds = timeout_seconds

    @property
    def identity(self) -> str:
        """Tell this bucket from one of the same name elsewhere; the embedded one keeps it over restarts."""
        return str(state_directory()) if self.bucket == EMBEDDED_BUCKET else self._client.meta.endpoint_url

    @cached_property
    def _client(self) -> Any:
        # boto3 takes half a second to import: only those who use a bucket pay for it.
        from boto3.session import Session
        from botocore.config import Config

        config = Config(
            retries={"mode": "standard", "total_max_attempts": self._attempts},
            connect_timeout=min(10, self._timeout_seconds),
            read_timeout=self._timeout_seconds,
            max_pool_connections=2 * _TRANSFER_THREADS,
        )
        if self.bucket != EMBEDDED_BUCKET:
            try:
                return Session().client("s3", config=config)
            except ValueError as error:  # botocore's word for it
                raise BucketError(
                    f"{self.uri}: {error}; check AWS_ENDPOINT_URL_S3 and AWS_ENDPOINT_URL"
                ) from error
        server = embedded_endpoint()
        return Session().client(
            "s3",
            endpoint_url=server.endpoint,
            region_name="us-east-1",
            aws_access_key_id=server.access_key,
            aws_secret_access_key=server.secret_key,
            config=config.merge(Config(proxies={})),  # it is on this machine, whatever HTTP_PROXY says
        )

    def list(self, prefix: str = "") -> list[StoredObject]:
        """See Store."""
        with self._errors("list", prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self._start + prefix
            )
            return sorted((item for page in pages for item in self._objects(page)), key=lambda item: item.key)

    def first(self, prefix: str) -> StoredObject | None:
        """Return the first object whose key starts with `prefix`, None when there is none."""
        with self._errors("list", prefix):
            answer = self._client.list_objects_v2(
                Bucket=self.bucket, Prefix=self._start + prefix, MaxKeys=100
            )
        return next(iter(self._objects(answer)), None)

    def stat(self, key: str) -> StoredObject:
        """Return what is known of one object. Raises NotFoundError."""
        with self._errors("read", key):
            head = self._client.head_object(Bucket=self.bucket, Key=self._start + key)
        return StoredObject(key, head["ContentLength"], head["ETag"])

    def _objects(self, listing: Mapping[str, Any]) -> Iterator[StoredObject]:
        for item in listing.get("Contents", []):
            if not item["Key"].endswith("/"):  # what consoles make to show an empty folder
                yield StoredObject(item["Key"].removeprefix(self._start), item["Size"], item["ETag"])

    def read(self, key: str) -> bytes:
        """See Store."""
        return self._get(key)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """See Store."""
        return self._get(key, Range=f"bytes={start}-{start + length - 1}")

    def _get(self, key: str, **parameters: str) -> bytes:
        from botocore.exceptions import FlexibleChecksumError, HTTPClientError, IncompleteReadError

        with self._errors("read", key):
            for attempt in range(1, _READ_ATTEMPTS + 1):
                answer = self._client.get_object(Bucket=self.bucket, Key=self._start + key, **parameters)
                try:
                    return answer["Body"].read()
                # botocore repeats requests, but not a body that breaks off or arrives damaged.
                except (FlexibleChecksumError, HTTPClientError, IncompleteReadError):
                    if attempt == _READ_ATTEMPTS:
                        raise
        raise AssertionError("the last attempt returns or raises")

    def read_if_exists(self, key: str) -> bytes | None:
        """See Store."""
        try:
            return self.read(key)
        except NotFoundError:
            return None

    def age(self, key: str) -> float | None:
        """See Store."""
        try:
            with self._errors("read", key):
                head = self._client.head_object(Bucket=self.bucket, Key=self._start + key)
        except NotFoundError:
            return None
        now = parsedate_to_datetime(head["ResponseMetadata"]["HTTPHeaders"]["date"])
        return (now - head["LastModified"]).total_seconds()

    def write(self, key: str, data: bytes, *, only_if_absent: bool = False) -> None:
        """See Store."""
        condition = {"IfNoneMatch": "*"} if only_if_absent else {}
        with self._errors("write", key, exists_if_refused=only_if_absent):
            self._client.put_object(Bucket=self.bucket, Key=self._start + key, Body=data, **condition)

    def download(self, key: str, path: Path) -> None:
        """See Store."""
        self.download_many({self.stat(key): path})

    def download_many(self, targets: Mapping[StoredObject, Path]) -> None:
        """See Store. Parts of large objects carry the listed ETag, so they cannot be of two versions."""
        partials = {item: partial_name(path) for item, path in targets.items()}
        try:
            with self._errors("download"), self._transfers() as transfers:
                futures = {}
                for item, partial in partials.items():
                    partial.parent.mkdir(parents=True, exist_ok=True)
                    futures[item] = transfers.download(
                        self.bucket, self._start + item.key, str(partial), subscribers=[_as_listed(item)]
                    )
                for item, future in futures.items():
                    with self._errors("download", item.key):
                        future.result()
                        if partials[item].stat().st_size != item.size:
                            raise BucketError(
                                f"{self.uri_of(item.key)} arrived with {partials[item].stat().st_size} bytes "
                                f"instead of {item.size}: it changed meanwhile; run again"
                            )
                        partials[item].replace(targets[item])
        finally:
            for partial in partials.values():
                partial.unlink(missing_ok=True)

    def upload(self, path: Path, key: str) -> None:
        """See Store."""
        self.upload_many({key: path})

    def upload_many(self, sources: Mapping[str, Path]) -> None:
        """See Store."""
        with self._errors("upload to"), self._transfers() as transfers:
            futures = {
                key: transfers.upload(str(path), self.bucket, self._start + key)
                for key, path in sources.items()
            }
            for key, future in futures.items():
                with self._errors(f"upload {sources[key]} to", key):
                    future.result()

    def delete(self, keys: Iterable[str]) -> None:
        """See Store."""
        remaining = list(keys)
        while remaining:
            batch, remaining = remaining[:_DELETE_BATCH], remaining[_DELETE_BATCH:]
            with self._errors("delete from"):
                answer = self._client.delete_objects(
                    Bucket=self.bucket,
                    Delete={"Objects": [{"Key": self._start + key} for key in batch], "Quiet": True},
                )
            for refused in answer.get("Errors", []):
                if refused.get("Code") != "NoSuchKey":
                    where = f"s3://{self.bucket}/{refused.get('Key')}"
                    raise BucketError(
                        f"cannot delete {where}: {refused.get('Code')} ({refused.get('Message')})"
                    )

    def uri_of(self, key: str) -> str:
        """See Store."""
        return f"{self.uri}/{key}" if key else self.uri

    def _transfers(self) -> Any:
        from s3transfer.manager import TransferConfig, TransferManager

        # Used directly, not through the client's upload_file: one pool of threads for all files and their parts.
        return TransferManager(self._client, TransferConfig(max_request_concurrency=_TRANSFER_THREADS))

    @contextmanager
    def _errors(self, action: str, key: str = "", exists_if_refused: bool = False) -> Iterator[None]:
        """Turn what botocore, s3transfer and the disk raise into BucketErrors."""
        from botocore.exceptions import BotoCoreError, ClientError
        from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError

        where = f"cannot {action} {self.uri_of(key)}"
        try:
            yield
        except BucketError:
            raise
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            if exists_if_refused and code in ("PreconditionFailed", "412", "ConditionalRequestConflict"):
                raise AlreadyExistsError(f"{where}: it already exists") from error
            raise _explain_refusal(error, where, self.bucket) from error
        except BotoCoreError as error:
            raise BucketError(f"{where}: {_explain_failure(error)}") from error
        except S3DownloadFailedError as error:  # a part no longer has the ETag that was listed
            raise BucketError(f"{where}: {_ADVICE['PreconditionFailed']}") from error
        except RetriesExceededError as error:
            raise BucketError(f"{where}: the connection broke again and again; run again later") from error
        except OSError as error:
            raise _explain_os_error(error, action, self.uri_of(key)) from error


def _split_s3(uri: str) -> tuple[str, str]:
    """Return (bucket, prefix without slashes around it)."""
    bucket, _, prefix = uri.partition("://")[2].partition("/")
    if "@" in bucket or ":" in bucket:  # do not repeat it: it may be a password
        raise BucketError(
            "an s3:// URI holds a bucket and a prefix only; keys belong into AWS_ACCESS_KEY_ID or AWS_PROFILE, "
            "a server's address into AWS_ENDPOINT_URL_S3"
        )
    if not bucket:
        raise BucketError(f"{uri}: the bucket's name is missing; write s3://bucket/prefix")
    return bucket, prefix.strip("/")


def _as_listed(item: StoredObject) -> Any:
    """Return a subscriber that tells s3transfer what the listing said: no HEAD request, and the ETag pinned."""
    from s3transfer.subscribers import BaseSubscriber

    class AsListed(BaseSubscriber):
        def on_queued(self, future: Any, **kwargs: Any) -> None:
            future.meta.provide_transfer_size(item.size)
            future.meta.provide_object_etag(item.etag or None)

    return AsListed()


_ADVICE = {
    "NoSuchBucket": "there is no bucket {bucket!r}; create it, or correct the URI or AWS_ENDPOINT_URL_S3",
    "NoSuchKey": "there is no such object",
    "404": "there is no such object",
    "AccessDenied": "access denied; these credentials need s3:ListBucket, s3:GetObject, s3:PutObject and "
    "s3:DeleteObject there",
    "403": "access denied; the credentials are wrong, expired, or may not do this",
    "InvalidAccessKeyId": "the access key is not known there; check AWS_ACCESS_KEY_ID or AWS_PROFILE",
    "SignatureDoesNotMatch": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY or AWS_PROFILE",
    "ExpiredToken": "the credentials have expired; renew them and run again",
    "ExpiredTokenException": "the credentials have expired; renew them and run again",
    "RequestExpired": "the credentials have expired; renew them and run again",
    "TokenRefreshRequired": "the credentials have expired; renew them and run again",
    "InvalidToken": "the session token is not valid; check AWS_SESSION_TOKEN, or renew the credentials",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
    "PreconditionFailed": "the object changed while it was read; run again",
    "412": "the object changed while it was read; run again",
    "PermanentRedirect": "the bucket is in another region; set AWS_REGION",
    "AuthorizationHeaderMalformed": "the bucket is in another region; set AWS_REGION",
    "301": "the bucket is in another region; set AWS_REGION",
    "SlowDown": "storage is overloaded and refused every attempt; run again later",
    "ServiceUnavailable": "storage is overloaded and refused every attempt; run again later",
    "503": "storage is overloaded and refused every attempt; run again later",
}


def _explain_refusal(error: Any, where: str, bucket: str) -> BucketError:
    """Explain a botocore ClientError: storage answered, with a refusal."""
    details = error.response.get("Error", {})
    code = details.get("Code", "")
    advice = _ADVICE.get(code)
    if advice is None:
        return BucketError(f"{where}: storage answered {code} ({details.get('Message', '')})")
    kind = NotFoundError if code in ("NoSuchKey", "404") else BucketError
    return kind(f"{where}: {advice.format(bucket=bucket)}")


def _explain_failure(error: Any) -> str:
    """Explain a BotoCoreError: storage was not reached, or what is needed to reach it is missing."""
    from botocore import exceptions

    if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
        return "no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if isinstance(error, exceptions.SSOError | exceptions.TokenRetrievalError | exceptions.LoginError):
        return "the sign-in has expired; run `aws sso login` or `aws login` and try again"
    if isinstance(error, exceptions.SSLError):
        return "the server's certificate is not trusted; set AWS_CA_BUNDLE to the file that vouches for it"
    if isinstance(error, exceptions.ConnectionError | exceptions.HTTPClientError):
        request_url = getattr(error, "kwargs", {}).get("endpoint_url", "")
        server = urllib.parse.urlsplit(str(request_url)).netloc.rpartition("@")[2]
        return f"the storage server {server} does not answer; check the network and AWS_ENDPOINT_URL_S3"
    return str(error)
