"""A store on Google Cloud Storage, Azure or another fsspec file system.

It follows the same protocol as the S3 store but is slower, and its guarantees depend on the file system:

- A write is atomic: object stores publish an object when its last byte has arrived.
- `only_if_absent` uses a condition of the storage through gcsfs, adlfs and s3fs. Elsewhere fsspec checks before it
  writes, which two concurrent writers can both pass.
- Ranges are not pinned to a version; the version of an object is checked after the download.
- The file system decides about retries.
- fsspec cannot list unfinished uploads: let a lifecycle rule of the bucket remove them.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from utils.files import BucketError
from utils.storage.store import AlreadyExistsError, Store, StoredObject, explain_os_error, join_uri
from utils.storage.transfer import LARGE_THREADS, Take, download_all

PACKAGES = {"gs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "memory": "fsspec"}  # scheme -> package
_EXCLUSIVE = {"az": {"overwrite": False}, "abfs": {"overwrite": False}}  # others take fsspec's own option
_BLOCK_BYTES = 8 * 1024 * 1024


class FsspecStore(Store):
    """A prefix of an fsspec file system as a store; the file system finds its own credentials."""

    def __init__(self, uri: str):
        self.uri = uri.rstrip("/")
        self._scheme, _, path = self.uri.partition("://")
        self._root = path.strip("/")
        if not self._root:
            raise BucketError(f"{uri}: the bucket name is missing; write {self._scheme}://bucket/prefix")

    @property
    def identity(self) -> str:
        """See Store."""
        return self._scheme

    @cached_property
    def _files(self) -> Any:
        import fsspec

        try:
            return fsspec.filesystem(self._scheme, use_listings_cache=False)
        except ImportError as error:
            raise BucketError(
                f"{self.uri}: {self._scheme}:// requires a package: pip install {PACKAGES[self._scheme]}"
            ) from error

    def list(self, prefix: str = "") -> list[StoredObject]:
        """See Store."""
        with self._errors("list", prefix):
            directory = self._path(prefix.rpartition("/")[0])
            self._files.invalidate_cache(directory)
            try:
                found = self._files.find(directory, detail=True)
            except FileNotFoundError:
                return []
            items = [
                self._stored(path, details)
                for path, details in found.items()
                if details["type"] == "file"
                and not path.endswith("/")  # a marker that web consoles create for an empty folder
            ]
        return sorted((item for item in items if item.key.startswith(prefix)), key=lambda item: item.key)

    def directories(self) -> Sequence[str]:
        """See Store."""
        with self._errors("list"):
            self._files.invalidate_cache(self._root)
            try:
                found = self._files.ls(self._root, detail=True)
            except FileNotFoundError:
                return []
        names = (
            entry["name"].rstrip("/").rpartition("/")[2] for entry in found if entry["type"] == "directory"
        )
        return sorted(names)

    def stat(self, key: str) -> StoredObject:
        """See Store."""
        with self._errors("read", key):
            path = self._path(key)
            self._files.invalidate_cache(path)
            item = self._stored(path, self._files.info(path))
            self._files.cat_file(path, start=0, end=min(1, item.size))  # reading requires its own permission
        return item

    def read(self, key: str) -> bytes:
        """See Store."""
        with self._errors("read", key):
            return self._files.cat_file(self._path(key))

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """See Store."""
        with self._errors("read", key):
            return self._files.cat_file(self._path(key), start=start, end=start + length)

    def age(self, key: str) -> float | None:
        """See Store. Uses this machine's clock, because fsspec provides no other."""
        with self._errors("read", key):
            try:
                modified = self._files.modified(self._path(key))
            except FileNotFoundError:
                return None
        return time.time() - (modified if modified.tzinfo else modified.replace(tzinfo=UTC)).timestamp()

    def write(self, key: str, data: bytes, *, only_if_absent: bool = False) -> None:
        """See Store."""
        path = self._path(key)
        with self._errors("write", key):
            if not only_if_absent:
                self._files.pipe_file(path, data)
                return
            try:
                self._files.pipe_file(path, data, **_EXCLUSIVE.get(self._scheme, {"mode": "create"}))
            except Exception as error:  # each file system raises its own error
                if not self._files.exists(path):
                    raise
                raise AlreadyExistsError(f"cannot write {self.uri_of(key)}: it already exists") from error

    def download_many(self, targets: Mapping[StoredObject, Path]) -> dict[str, str]:
        """See Store."""
        with self._errors("download from"):
            return download_all(self, targets)

    def upload(self, path: Path, key: str) -> None:
        """See Store."""
        with self._errors(f"upload {path} to", key):
            self._files.put_file(str(path), self._path(key))

    def upload_many(self, sources: Mapping[str, Path]) -> None:
        """See Store."""
        with ThreadPoolExecutor(LARGE_THREADS, thread_name_prefix="upload") as pool:
            list(pool.map(lambda source: self.upload(source[1], source[0]), sources.items()))

    def delete(self, keys: Iterable[str]) -> None:
        """See Store."""
        with self._errors("delete from"):
            for key in keys:
                try:
                    self._files.rm_file(self._path(key))
                except FileNotFoundError:
                    continue

    def abort_stale_uploads(self, prefix: str = "") -> int:
        """See Store. Always 0: fsspec cannot list unfinished uploads."""
        return 0

    def read_into(self, item: StoredObject, start: int, length: int, take: Take) -> bool:
        """See transfer.Source. fsspec pins no version: a change during the download is detected afterwards by the ETag."""
        with self._errors("download", item.key):
            path, end = self._path(item.key), start + length
            while start < end:
                block = self._files.cat_file(path, start=start, end=min(start + _BLOCK_BYTES, end))
                if not block:
                    break
                take(block)
                start += len(block)
            self._files.invalidate_cache(path)
            if start < end or self._stored(path, self._files.info(path)).etag != item.etag:
                raise BucketError(
                    f"cannot download {self.uri_of(item.key)}: it changed during the download; run again"
                )
        return False

    def stored_checksum(self, item: StoredObject) -> str | None:
        """See transfer.Source."""
        return None

    def _path(self, key: str) -> str:
        return join_uri(self._root, key)

    def _stored(self, path: str, details: Mapping[str, Any]) -> StoredObject:
        key = path.strip("/").removeprefix(self._root).strip("/")
        # The version of an object under the name of each file system, otherwise its creation time.
        version = next(
            (
                details[name]
                for name in ("etag", "ETag", "generation", "last_modified", "mtime", "created")
                if details.get(name)
            ),
            "",
        )
        text = str(version.timestamp() if isinstance(version, datetime) else version)
        return StoredObject(key, details["size"], f"{text}-{details['size']}")

    @contextmanager
    def _errors(self, action: str, key: str = "") -> Iterator[None]:
        """Convert errors of a file system, whose classes are unknown here, into BucketErrors."""
        try:
            yield
        except BucketError:
            raise
        except OSError as error:
            raise explain_os_error(error, action, self.uri_of(key)) from error
        except Exception as error:  # gcsfs and adlfs raise the errors of their clients
            raise BucketError(f"cannot {action} {self.uri_of(key)}: {error}") from error
