"""One interface for `s3://`, what fsspec opens, and local directories: list, read, write, move whole files, check, sync.

Keys of objects are relative to the store they are listed from. The parts: utils.store (the interface), utils.s3,
utils.local_store and utils.fsspec_store (the stores), utils.transfer (downloads), utils.node_cache (what a node keeps).
"""

import re
import secrets
import tempfile
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from utils import node_cache
from utils.embedded_bucket import EMBEDDED_BUCKET, state_directory
from utils.files import BucketError, UnsafeKeyError, nearest_existing, safe_join
from utils.fsspec_store import PACKAGES, FsspecStore
from utils.local_store import LocalStore
from utils.node_cache import NodeCopy
from utils.s3 import CHECK, WORK, Patience, S3Store, split_s3, storage_options
from utils.store import (
    AlreadyExistsError,
    DamagedError,
    NotFoundError,
    Store,
    StoredObject,
    explained,
    join_uri,
)

__all__ = [
    "EMBEDDED_BUCKET",
    "AlreadyExistsError",
    "BucketError",
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
    "open_store",
    "storage_options",
    "sync_to_node",
    "upload_directory",
    "uses_embedded_bucket",
]

_ABOUT_EMBEDDED = "`make quickstart` fills this embedded bucket, whose data lies in"


def open_store(uri: str) -> Store:
    """Return the store at `uri`: s3://bucket/prefix, gs:// and others through fsspec, file:///directory, or a path.

    Touches nothing yet.

    Raises BucketError for other schemes.
    """
    return _remote_store(uri) if is_remote(uri) else LocalStore(local_path(uri))


def is_remote(uri: str) -> bool:
    """Tell whether `uri` is in a bucket rather than on this machine. Raises BucketError for other schemes."""
    scheme = _scheme(uri)
    if scheme not in ("", "file", "s3", *PACKAGES):
        others = ", ".join(f"{other}://" for other in PACKAGES if other != "memory")
        raise BucketError(
            f"{uri}: {scheme}:// is not supported; use s3://bucket/prefix, a local path, or one of {others}"
        )
    if scheme not in ("", "file") and "://" not in uri:
        raise BucketError(f"{uri}: the bucket's name is missing; write {scheme}://bucket/prefix")
    return scheme not in ("", "file")


def uses_embedded_bucket(uri: str) -> bool:
    """Tell whether `uri`, of whatever scheme, needs the embedded bucket to be running."""
    return _scheme(uri) == "s3" and split_s3(uri)[0] == EMBEDDED_BUCKET


def check_readable(uri: str) -> None:
    """Make sure that `uri` names an object, or a prefix with objects, that can be read.

    Raises BucketError, with a message of its own for each cause: no such bucket, no such object, credentials
    that are missing, wrong, expired or not allowed, an endpoint that does not answer (within some 10 seconds).
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
        raise NotFoundError(f"{uri}: the bucket exists, but has no such object and none below it{hint}")
    parent.stat(found.key)  # reading needs a permission that listing does not


def check_writable(uri: str) -> None:
    """Make sure that objects can be put at, read from and deleted from `uri`. Raises BucketError.

    A bucket gets a small probe object for a moment, written as a manifest is: only where there is none. Of a local path only
    the nearest existing directory is probed, nothing is created.
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
    """Bring one object to this node once and return its path; a local file is returned as it is.

    As `sync_to_node` in everything else. Raises NotFoundError when there is no such object.
    """
    if not is_remote(uri):
        path = local_path(uri)
        if path.is_dir():
            raise BucketError(f"{path}: is a directory. Name a file in it.")
        if not path.is_file():
            raise NotFoundError(f"{path}: no such file")
        return path
    return node_cache.bring(_single_object(uri, cache_dir))


def _everything(key: str) -> bool:
    return True


def sync_to_node(
    uri: str,
    cache_dir: Path,
    wanted: Callable[[str], bool] = _everything,
    checksums: Mapping[str, str] | None = None,
) -> Path:
    """Bring the objects below a prefix to this node, once, and return their directory.

    However many processes call it at once, one downloads and the others wait for it; if it dies, the next takes
    over. A copy that is already there moves no object, and stays there while this process lives. It is keyed by
    what was listed (keys, sizes, ETags): a changed prefix is another copy, for which only what changed is moved.
    `wanted` chooses among the keys (relative to the prefix). `checksums` says, by key, what objects must contain: the
    copy has nothing else. A `uri` that is a single object gives a file; local files and directories are returned as they
    are. See utils.node_cache for where things lie, and what goes.

    Raises BucketError: nothing there, not enough disk, keys that would leave the directory, failing storage; of these
    DamagedError when an object has another content.
    """
    if not is_remote(uri):
        path = local_path(uri)
        if not path.exists():
            raise NotFoundError(f"{path}: no such file or directory")
        return path
    return node_cache.bring(_node_copy(uri, cache_dir, wanted, checksums or {}))


def missing_bytes(uri: str, cache_dir: Path, wanted: Callable[[str], bool] = _everything) -> int:
    """Return how many bytes `sync_to_node` would bring to this node: 0 when they are there, or local.

    Raises BucketError, as `sync_to_node` does.
    """
    if not is_remote(uri):
        return 0
    return node_cache.missing_bytes(_node_copy(uri, cache_dir, wanted, {}))


def upload_directory(directory: Path, store: Store, prefix: str, files: Iterable[str]) -> None:
    """Store `files` (relative to `directory`, "/" between parts) under `prefix`, in parallel. Raises BucketError."""
    store.upload_many(
        {join_uri(prefix, name) if prefix else name: safe_join(directory, name) for name in files}
    )


def local_path(uri: str) -> Path:
    """The absolute path that a local path or `file://` URI names. Raises BucketError for another machine's."""
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
        raise NotFoundError(f"{uri}: none of its {len(listed)} objects is of the kind that is needed here")
    above, name = _parent(uri)
    return node_cache.node_copy(store, uri, objects, cache_dir, name or above.partition("://")[2])


def _single_object(uri: str, cache_dir: Path) -> NodeCopy:
    parent_uri, name = _parent(uri)
    store = _remote_store(parent_uri)
    found = store.first(name)
    if not name or found is None or found.key != name:
        raise NotFoundError(
            f"{uri}: there is no such object; look at the spelling and at upper and lower case"
        )
    return node_cache.node_copy(store, uri, [found], cache_dir)


def _remote_store(uri: str, patience: Patience = WORK) -> Store:
    return S3Store(uri, patience) if _scheme(uri) == "s3" else FsspecStore(uri)


def _parent(uri: str) -> tuple[str, str]:
    """Return (URI without its last part, last part); the last part is empty for a whole bucket."""
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
