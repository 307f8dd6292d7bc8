"""A directory as a store."""

import errno
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from utils.files import PARTIAL_SUFFIX, checksum, copy_atomically, safe_join, write_atomically
from utils.storage.store import DamagedError, Store, StoredObject, explained


class LocalStore(Store):
    """A directory as a store; each object is a file."""

    def __init__(self, root: Path):
        self.root = root
        self.uri = str(root)

    @property
    def identity(self) -> str:
        """See Store."""
        return ""

    def list(self, prefix: str = "") -> list[StoredObject]:
        """See Store."""
        found = []
        with explained("list", self.uri_of(prefix)):
            for path in self._files(prefix):
                if not _is_partial(path):
                    with suppress(FileNotFoundError):  # deleted after the listing
                        found.append(self._stored(path))
        return sorted(found, key=lambda item: item.key)

    def directories(self) -> Sequence[str]:
        """See Store."""
        with explained("list", self.uri):
            if not self.root.is_dir():
                return []
            return sorted(path.name for path in self.root.iterdir() if path.is_dir())

    def stat(self, key: str) -> StoredObject:
        """See Store."""
        path = safe_join(self.root, key)
        with explained("read", self.uri_of(key)), path.open("rb"):
            return self._stored(path)

    def read(self, key: str) -> bytes:
        """See Store."""
        with explained("read", self.uri_of(key)):
            return safe_join(self.root, key).read_bytes()

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """See Store."""
        with explained("read", self.uri_of(key)), safe_join(self.root, key).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def age(self, key: str) -> float | None:
        """See Store."""
        with explained("read", self.uri_of(key)):
            try:
                return time.time() - safe_join(self.root, key).stat().st_mtime
            except FileNotFoundError:
                return None

    def write(self, key: str, data: bytes, *, only_if_absent: bool = False) -> None:
        """See Store."""
        with explained("write", self.uri_of(key)):
            write_atomically(safe_join(self.root, key), data, replace=not only_if_absent)

    def download(self, key: str, path: Path) -> None:
        """See Store."""
        with explained("copy", self.uri_of(key)):
            copy_atomically(safe_join(self.root, key), path)

    def download_many(self, targets: Mapping[StoredObject, Path]) -> dict[str, str]:
        """See Store."""
        checksums = {}
        for item, path in targets.items():
            self.download(item.key, path)
            with explained("read", str(path)):
                checksums[item.key] = checksum(path)
            if item.checksum not in (None, checksums[item.key]):
                path.unlink()
                raise DamagedError(item.key, f"{self.uri_of(item.key)}: its content is not what was stored")
        return checksums

    def upload(self, path: Path, key: str) -> None:
        """See Store."""
        with explained(f"copy {path} to", self.uri_of(key)):
            copy_atomically(path, safe_join(self.root, key))

    def upload_many(self, sources: Mapping[str, Path]) -> None:
        """See Store."""
        for key, path in sources.items():
            self.upload(path, key)

    def delete(self, keys: Iterable[str]) -> None:
        """See Store. Also removes directories that become empty, since a bucket has none."""
        for key in keys:
            path = safe_join(self.root, key)
            with explained("delete", str(path)):
                path.unlink(missing_ok=True)
                for parent in path.parents:
                    # rmdir fails for a directory that is not empty or is being filled by another process.
                    if parent == self.root or not _removed_empty(parent):
                        break

    def abort_stale_uploads(self, prefix: str = "") -> int:
        """See Store."""
        with explained("clean", self.uri_of(prefix)):
            unfinished = [path for path in self._files(prefix) if _is_partial(path)]
            for path in unfinished:
                path.unlink(missing_ok=True)
        return len(unfinished)

    def _files(self, prefix: str) -> Sequence[Path]:
        start = safe_join(self.root, prefix.rpartition("/")[0]) if "/" in prefix else self.root
        return [
            path
            for directory, _, names in os.walk(start, onerror=_raise_unless_missing)
            for path in (Path(directory, name) for name in names)
            if path.relative_to(self.root).as_posix().startswith(prefix) or _is_partial(path)
        ]

    def _stored(self, path: Path) -> StoredObject:
        status = path.stat()
        etag = f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"
        return StoredObject(path.relative_to(self.root).as_posix(), status.st_size, etag)


def _is_partial(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(PARTIAL_SUFFIX)


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
