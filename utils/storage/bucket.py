"""One interface for `s3://`, fsspec file systems and local directories: list, read, write, transfer, check and sync.

Object keys are relative to the store that lists them. Modules: utils.storage.store (the interface), utils.storage.s3,
utils.storage.local_store and utils.storage.fsspec_store (the stores), utils.storage.transfer (downloads), utils.storage.node_cache (node cache).
"""

import io
import re
import secrets
import tempfile
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from utils.files import BucketError, UnsafeKeyError, nearest_existing, safe_join
from utils.storage import node_cache
from utils.storage.embedded_bucket import EMBEDDED_BUCKET, state_directory
from utils.storage.fsspec_store import PACKAGES, FsspecStore
from utils.storage.local_store import LocalStore
from utils.storage.node_cache import NodeCopy
from utils.storage.retries import CHECK, WORK, RetryPolicy
from utils.storage.s3 import S3Store, split_s3, storage_options
from utils.storage.store import (
    AlreadyExistsError,
    ChangedError,
    DamagedError,
    NotFoundError,
    Store,
    StoredObject,
    explained,
    join_uri,
)
from utils.storage.transfer import RangeReader

__all__ = [
    "EMBEDDED_BUCKET",
    "AlreadyExistsError",
    "BucketError",
    "ChangedError",
    "DamagedError",
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
    "open_ranges",
    "open_store",
    "storage_options",
    "sync_to_node",
    "upload_directory",
    "uses_embedded_bucket",
]

_RANGE_BYTES = 4 * 1024 * 1024  # per request
_ABOUT_EMBEDDED = "`make quickstart` fills this embedded bucket, whose data is stored in"


def open_store(uri: str) -> Store:
    """Return the store at `uri`: s3://bucket/prefix, gs:// and others through fsspec, file:///directory, or a path.

    Sends no request.
    """
    return _remote_store(uri) if is_remote(uri) else LocalStore(local_path(uri))


def is_remote(uri: str) -> bool:
    """Return whether `uri` is in a bucket rather than on this machine. Rejects other schemes."""
    scheme = _scheme(uri)
    if scheme not in ("", "file", "s3", *PACKAGES):
        others = ", ".join(f"{other}://" for other in PACKAGES if other != "memory")
        raise BucketError(
            f"{uri}: {scheme}:// is not supported; use s3://bucket/prefix, a local path, or one of {others}"
        )
    if scheme not in ("", "file") and "://" not in uri:
        raise BucketError(f"{uri}: the bucket name is missing; write {scheme}://bucket/prefix")
    return scheme not in ("", "file")


def uses_embedded_bucket(uri: str) -> bool:
    """Return whether `uri`, of any scheme, requires the embedded bucket server."""
    return _scheme(uri) == "s3" and split_s3(uri)[0] == EMBEDDED_BUCKET


def check_readable(uri: str) -> None:
    """Check that `uri` names a readable object, or a prefix with readable objects.

    Each cause has its own message: missing bucket or object; missing, wrong, expired or insufficient credentials;
    an endpoint that does not answer (after about 10 seconds).
    """
    if not is_remote(uri):
        _check_local_readable(uri)
        return
    parent_uri, name = _parent(uri)
    parent = _remote_store(parent_uri, CHECK)
    found = parent.first(name)
    if found is None or found.key != name:
        found = parent.first(f"{name}/" if name else "")
    if found is None:
        hint = f" ({_ABOUT_EMBEDDED} {state_directory()})" if uses_embedded_bucket(uri) else ""
        raise NotFoundError(f"{uri}: the bucket exists, but has no such object and no objects below it{hint}")
    parent.stat(found.key)  # reading needs a permission that listing does not


def check_writable(uri: str) -> None:
    """Check that objects can be written to, read from and deleted from `uri`.

    In a bucket, this writes and deletes a small probe object, conditionally like a manifest. For a local path, it
    probes only the nearest existing directory and creates nothing.
    """
    if is_remote(uri):
        store = _remote_store(uri, CHECK)
        probe = f".write-probe-{secrets.token_hex(8)}"
        store.write(probe, b"probe", only_if_absent=True)
        store.read(probe)
        store.delete([probe])
        return
    path = local_path(uri)
    with explained("write to", str(path)):
        directory = nearest_existing(path)
        if not directory.is_dir():
            raise BucketError(f"cannot write to {path}: {directory} is a file; choose another location")
        try:
            tempfile.TemporaryFile(dir=directory).close()
        except FileNotFoundError as error:  # /proc and similar
            raise BucketError(
                f"cannot write to {path}: {directory} does not accept files; choose another location"
            ) from error


def find_objects(uri: str) -> list[tuple[str, str]]:
    """Return (full URI, version) of the object at `uri`, or of all objects below it, sorted by key.

    A version consists of size and ETag. The list is empty if there are no objects.
    """
    if is_remote(uri):
        parent_uri, name = _parent(uri)
        parent = _remote_store(parent_uri)
        found = parent.first(name) if name else None
        if found is not None and found.key == name:
            return [(uri, f"{found.size} {found.etag}")]
    elif (path := local_path(uri)).is_file():
        status = path.stat()
        return [(str(path), f"{status.st_size} {status.st_mtime_ns:x}")]
    store = open_store(uri)
    return [(store.uri_of(item.key), f"{item.size} {item.etag}") for item in store.list()]


def fetch_file(uri: str, cache_dir: Path) -> Path:
    """Download one object to this node once and return its path; return a local file unchanged.

    Otherwise works like `sync_to_node`.
    """
    if not is_remote(uri):
        path = local_path(uri)
        if path.is_dir():
            raise BucketError(f"{path} is a directory; name a file in it")
        if not path.is_file():
            raise NotFoundError(f"{path}: no such file")
        return path
    return node_cache.bring(_single_object(uri, cache_dir))


def open_ranges(uri: str, version: str) -> tuple[io.BufferedReader, int]:
    """Open one object for reading from any position, without a copy on this node; return it and its size in bytes.

    S3 sends no checksum with a range.

    Args:
        uri: the object.
        version: its version as `find_objects` returns it.

    Raises:
        BucketError: the object has another version, also while it is read.
    """
    parent_uri, name = _parent(uri)
    store = _remote_store(parent_uri)
    item = store.first(name)
    if item is None or (item.key, f"{item.size} {item.etag}") != (name, version):
        raise BucketError(
            f"{uri}: was deleted or replaced after its rows were listed. Run the same command again."
        )
    return io.BufferedReader(RangeReader(store, item), _RANGE_BYTES), item.size


def _everything(key: str) -> bool:
    return True


def sync_to_node(
    uri: str,
    cache_dir: Path,
    wanted: Callable[[str], bool] = _everything,
    checksums: Mapping[str, str] | None = None,
) -> Path:
    """Download the objects below a prefix to this node, once, and return their directory.

    If several processes call this at once, one downloads and the others wait. If the downloader dies, another takes
    over. An existing copy downloads nothing, and stays in place while this process lives. Copies are identified by the
    listing (keys, sizes, ETags): a changed prefix is a new copy that downloads only changed objects. See
    utils.storage.node_cache for the layout and for eviction.

    Args:
        uri: a prefix; a single object returns a file, and local files and directories are returned unchanged.
        wanted: selects keys (relative to the prefix).
        checksums: expected checksum by key.

    Raises:
        DamagedError: an object does not have the expected content.
        BucketError: no objects, not enough disk space, unsafe keys, or failing storage.
    """
    if not is_remote(uri):
        path = local_path(uri)
        if not path.exists():
            raise NotFoundError(f"{path}: no such file or directory")
        return path
    return node_cache.bring(_node_copy(uri, cache_dir, wanted, checksums or {}))


def missing_bytes(uri: str, cache_dir: Path, wanted: Callable[[str], bool] = _everything) -> int:
    """Return how many bytes `sync_to_node` would download to this node: 0 if all are cached or local."""
    if not is_remote(uri):
        return 0
    return node_cache.missing_bytes(_node_copy(uri, cache_dir, wanted, {}))


def upload_directory(directory: Path, store: Store, prefix: str, files: Iterable[str]) -> None:
    """Upload `files` (relative to `directory`, "/" between parts) to `prefix`, in parallel."""
    store.upload_many(
        {join_uri(prefix, name) if prefix else name: safe_join(directory, name) for name in files}
    )


def local_path(uri: str) -> Path:
    """Return the absolute path of a local path or `file://` URI. Rejects URIs of other hosts."""
    if _scheme(uri) != "file":
        return Path(uri).expanduser().absolute()
    host, slash, path = uri.partition("://")[2].partition("/")
    if host not in ("", "localhost") or not slash:
        raise BucketError(f"{uri}: write file:///absolute/path")
    return Path("/" + urllib.parse.unquote(path))


def _node_copy(
    uri: str, cache_dir: Path, wanted: Callable[[str], bool], checksums: Mapping[str, str]
) -> NodeCopy:
    store = _remote_store(uri)
    listed = store.list()
    if not listed:
        return _single_object(uri, cache_dir)
    objects = [replace(item, checksum=checksums.get(item.key)) for item in listed if wanted(item.key)]
    if not objects:
        raise NotFoundError(f"{uri}: none of its {len(listed)} objects is of a type that is needed here")
    above, name = _parent(uri)
    return node_cache.node_copy(store, uri, objects, cache_dir, name or above.partition("://")[2])


def _single_object(uri: str, cache_dir: Path) -> NodeCopy:
    parent_uri, name = _parent(uri)
    store = _remote_store(parent_uri)
    found = store.first(name)
    if not name or found is None or found.key != name:
        raise NotFoundError(
            f"{uri}: there is no such object; check the spelling, including upper and lower case"
        )
    return node_cache.node_copy(store, uri, [found], cache_dir)


def _remote_store(uri: str, retry_policy: RetryPolicy = WORK) -> S3Store | FsspecStore:
    return S3Store(uri, retry_policy) if _scheme(uri) == "s3" else FsspecStore(uri)


def _parent(uri: str) -> tuple[str, str]:
    """Return (URI without its last part, last part); the last part is empty for the URI of a bucket."""
    scheme, _, path = uri.partition("://")
    bucket, _, prefix = path.partition("/")
    above, _, name = prefix.strip("/").rpartition("/")
    return join_uri(f"{scheme}://{bucket}", above), name


def _check_local_readable(uri: str) -> None:
    path = local_path(uri)
    with explained("read", str(path)):
        if path.is_dir():
            listed = LocalStore(path).list()
            if not listed:
                raise NotFoundError(f"{path}: the directory is empty")
            path = safe_join(path, listed[0].key)
        with path.open("rb") as file:
            file.read(1)


def _scheme(uri: str) -> str:
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/", uri)
    return match.group(1).lower() if match else ""
