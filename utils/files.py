"""File helpers: atomic writes, locks, checksums and sizes. Also the base errors of storage."""

import errno
import fcntl
import os
import re
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from utils.errors import AnnealError

PARTIAL_SUFFIX = ".partial"  # an unfinished file; readers must ignore it
_BLOCK_BYTES = 8 * 1024 * 1024
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PROBE_BYTES = 1024 * 1024


class BucketError(AnnealError):
    """A storage error; the message says what failed, where (URI) and how to fix it."""


class UnsafeKeyError(BucketError, ValueError):
    """An error for a key that would name a file outside its directory."""


def partial_name(path: Path) -> Path:
    """Return a new hidden name next to `path` for an unfinished file; its length does not depend on the length of `path`."""
    return path.with_name(f".{secrets.token_hex(8)}{PARTIAL_SUFFIX}")


def write_atomically(path: Path, data: bytes, *, mode: int = 0o666, replace: bool = True) -> None:
    """Write `data` so that readers see the old file or the complete new one, also after a power failure.

    Creates missing parent directories.

    Args:
        mode: permission bits before the umask.

    Raises:
        FileExistsError: `path` exists and `replace` is false.
        OSError: the write failed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_name(path)
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            partial.replace(path)
        else:
            path.hardlink_to(partial)  # unlike a rename, a link never overwrites
    finally:
        partial.unlink(missing_ok=True)


def copy_atomically(source: Path, path: Path) -> None:
    """Copy one file so that `path` is never seen incomplete. Raises OSError, also if the size differs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_name(path)
    try:
        shutil.copyfile(source, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        if partial.stat().st_size != source.stat().st_size:
            raise OSError(f"{source} changed its size during the copy")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def checksum(path: Path, algorithm: str = "crc64nvme") -> str:
    """Return the checksum of a file as "crc64nvme:<16 hex digits>"; crc32 and crc32c have 8 digits. Raises OSError."""
    from awscrt import checksums

    update = {"crc64nvme": checksums.crc64nvme, "crc32": checksums.crc32, "crc32c": checksums.crc32c}[
        algorithm
    ]
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            value = update(block, value)
    return checksum_text(value, algorithm)


def first_changed(directory: Path, checksums: Mapping[str, str]) -> str | None:
    """Return the first file of a directory that is missing or has another content; None if all are unchanged.

    Args:
        directory: The directory.
        checksums: Relative path -> checksum of each file.
    """
    for name, expected in checksums.items():
        path = safe_join(directory, name)
        if not path.exists() or checksum(path) != expected:
            return name
    return None


def checksum_bytes(data: bytes) -> str:
    """Return the checksum of `data`, in the same form as `checksum` of a file with that content."""
    from awscrt.checksums import crc64nvme

    return checksum_text(crc64nvme(data))


def checksum_text(value: int, algorithm: str = "crc64nvme") -> str:
    """Return a checksum in its text form: "algorithm:hex"."""
    return f"{algorithm}:{value:0{16 if algorithm == 'crc64nvme' else 8}x}"


class FilesInUse:
    """Files that stay open until the process ends, to notice that they are written to while it maps or reads them.

    A file that is replaced by another one of its name does not change: its readers keep the old content.
    """

    def __init__(self, paths: Iterable[Path]):
        self._open = {path: os.open(path, os.O_RDONLY) for path in paths}
        self._states = self._read_states()

    def changed(self) -> list[Path]:
        """Return the files that were written to since they were opened here."""
        return [path for path, state in self._read_states().items() if state != self._states[path]]

    def _read_states(self) -> dict[Path, tuple[int, int]]:
        found = {path: os.fstat(descriptor) for path, descriptor in self._open.items()}
        return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


def free_bytes(path: Path) -> int:
    """Return the bytes that an unprivileged user can still write to the file system of `path`, which need not exist."""
    return shutil.disk_usage(nearest_existing(path)).free


def is_disk_full(error: Exception, directory: Path) -> bool:
    """Return whether writing to `directory` failed because the disk is full, including quotas and file size limits.

    Libraries written in Rust and C++ raise their own errors. Rust errors contain the number; C++ errors need a probe.
    """
    if isinstance(error, OSError):
        return error.errno in _NO_ROOM
    if number := re.search(r"os error (\d+)", str(error)):
        return int(number[1]) in _NO_ROOM
    try:
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(bytes(_PROBE_BYTES))
    except OSError as rejected:
        return rejected.errno in _NO_ROOM
    return False


def nearest_existing(path: Path) -> Path:
    """Return `path` itself, or its first parent that exists."""
    path = path.absolute()
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())


def format_bytes(count: int) -> str:
    """Return a readable size: 1536 -> "1.5 KiB"."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = max(0, min((count.bit_length() - 1) // 10, len(units) - 1))
    return f"{count / 1024**power:.1f} {units[power]}" if power else f"{count} B"


def parse_bytes(written: str) -> int:
    """Parse a size such as "1.5GiB", "200 GB" or "1024" and return bytes. Raises ValueError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(?:([KMGT]?)(i?)B)?", written.strip())
    if not match:
        raise ValueError("write a number of bytes, or one with a unit, such as 200GiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2] or " "))


def safe_join(directory: Path, key: str) -> Path:
    """Return the path of `key` (parts separated by "/") below `directory`.

    Raises:
        UnsafeKeyError: the key would leave the directory or name the same file as another key. Such keys are empty,
            absolute, or have a backslash, a NUL, or a part that is empty, "." or "..".
    """
    if "\\" in key or "\0" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise UnsafeKeyError(f"the key {key!r} is rejected: as a file name it could leave {directory}")
    return directory / key


def reject_clashes(keys: Iterable[str]) -> None:
    """Raise UnsafeKeyError if, on some file system, two keys name one file or one key is another's directory."""
    seen: dict[str, str] = {}
    for key in sorted(keys):
        other = seen.setdefault(key.casefold(), key)
        if other != key:
            raise UnsafeKeyError(
                f"the keys {other!r} and {key!r} are rejected: they differ only by case, and name one file on some disks"
            )
    for folded, key in seen.items():
        for parent in PurePosixPath(folded).parents:
            if other := seen.get(parent.as_posix()):
                raise UnsafeKeyError(
                    f"the key {key!r} is rejected: {other!r} is a file, and cannot be its directory"
                )


_held_locks: set[int] = set()
_held_for_life: set[Path] = set()
_holding = threading.Lock()


def _forget_locks() -> None:
    # A fork copies the descriptors and their locks: the child must not keep the parent's locks alive.
    for descriptor in _held_locks:
        os.close(descriptor)
    _held_locks.clear()
    _held_for_life.clear()


os.register_at_fork(after_in_child=_forget_locks)


@contextmanager
def file_lock(path: Path, *, shared: bool = False, blocking: bool = True) -> Iterator[None]:
    """Hold a lock on the file `path`, which is created if missing. The kernel releases it when the holder exits.

    The lock works between processes and between threads. A `shared` lock blocks only exclusive ones.

    Raises:
        BlockingIOError: `blocking` is false and another holds the lock.
    """
    descriptor = _open_lock(path)
    try:
        fcntl.flock(
            descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if blocking else fcntl.LOCK_NB)
        )
        yield
    finally:
        if descriptor in _held_locks:
            _held_locks.remove(descriptor)
            # Closing is not enough right after a fork: the child still has a copy of the descriptor.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def hold_lock(path: Path) -> None:
    """Hold a shared lock on `path` until this process exits. Repeated calls have no further effect."""
    with _holding:
        if path not in _held_for_life:
            descriptor = _open_lock(path)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            _held_for_life.add(path)


def _open_lock(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    _held_locks.add(descriptor)
    return descriptor
