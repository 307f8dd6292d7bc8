"""Small helpers for files: whole or not at all, locked, checked, measured. Also the errors of storage."""

import errno
import fcntl
import os
import re
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from utils.errors import AnnealError

PARTIAL_SUFFIX = ".partial"  # a name that is being written; nobody may read it
_BLOCK_BYTES = 8 * 1024 * 1024
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PROBE_BYTES = 1024 * 1024


class BucketError(AnnealError):
    """Storage refused or failed; the message says what, where (URI) and what to do."""


class UnsafeKeyError(BucketError, ValueError):
    """A key would name a file outside the directory it belongs to."""


def partial_name(path: Path) -> Path:
    """Return a fresh hidden name next to `path`, for a file that is not whole yet; `path` may have the longest of names."""
    return path.with_name(f".{secrets.token_hex(8)}{PARTIAL_SUFFIX}")


def write_atomically(path: Path, data: bytes, *, mode: int = 0o666, replace: bool = True) -> None:
    """Write `data` so that readers see the old file or the whole new one, also after a power cut.

    `mode` are the permission bits before the umask. Creates missing parent directories. Raises
    FileExistsError when `path` exists and `replace` is false, and OSError when the disk refuses.
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
    """Copy one file so that `path` is never seen half written. Raises OSError, also when the size differs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_name(path)
    try:
        shutil.copyfile(source, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        if partial.stat().st_size != source.stat().st_size:
            raise OSError(f"{source} changed its size while it was copied")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def checksum(path: Path, algorithm: str = "crc64nvme") -> str:
    """Return "crc64nvme:<16 hex digits>" of a file, read in blocks of 8 MB; crc32 and crc32c have 8. Raises OSError."""
    from awscrt import checksums

    update = {"crc64nvme": checksums.crc64nvme, "crc32": checksums.crc32, "crc32c": checksums.crc32c}[
        algorithm
    ]
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            value = update(block, value)
    return checksum_text(value, algorithm)


def checksum_bytes(data: bytes) -> str:
    """Return "crc64nvme:<16 hex digits>" of `data`: the same string `checksum` gives for a file of it."""
    from awscrt.checksums import crc64nvme

    return checksum_text(crc64nvme(data))


def checksum_text(value: int, algorithm: str = "crc64nvme") -> str:
    """Return a checksum as it is written everywhere: "algorithm:hex"."""
    return f"{algorithm}:{value:0{16 if algorithm == 'crc64nvme' else 8}x}"


def free_bytes(path: Path) -> int:
    """Return the bytes an ordinary user may still write where `path` is, or will be once it exists."""
    return shutil.disk_usage(nearest_existing(path)).free


def is_disk_full(error: Exception, directory: Path) -> bool:
    """Tell whether `directory` could not be written to because the disk takes no more, a quota or a limit included.

    Libraries in Rust and C++ raise what they like: of the former the text tells, of the latter only the disk.
    """
    if isinstance(error, OSError):
        return error.errno in _NO_ROOM
    if told := re.search(r"os error (\d+)", str(error)):
        return int(told[1]) in _NO_ROOM
    try:
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(bytes(_PROBE_BYTES))
    except OSError as refused:
        return refused.errno in _NO_ROOM
    return False


def nearest_existing(path: Path) -> Path:
    """Return `path` itself, or its first parent that exists."""
    path = path.absolute()
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())


def format_bytes(count: int) -> str:
    """Return bytes for people: 1536 -> "1.5 KiB"."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = max(0, min((count.bit_length() - 1) // 10, len(units) - 1))
    return f"{count / 1024**power:.1f} {units[power]}" if power else f"{count} B"


def parse_bytes(written: str) -> int:
    """Return the bytes that people write: "1.5GiB", "200 GB", "1024". Raises ValueError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(?:([KMGT]?)(i?)B)?", written.strip())
    if not match:
        raise ValueError("write a number of bytes, or one with a unit, such as 200GiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2] or " "))


def safe_join(directory: Path, key: str) -> Path:
    """Return the path of `key` (parts separated by "/") below `directory`.

    Raises UnsafeKeyError for a key that would leave the directory or name the same file as another key:
    empty, absolute, with a backslash, a NUL, or a part that is empty, "." or "..".
    """
    if "\\" in key or "\0" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise UnsafeKeyError(f"refusing the key {key!r}: as a file name it could leave {directory}")
    return directory / key


def refuse_clashes(keys: Iterable[str]) -> None:
    """Raise UnsafeKeyError when two keys would be one file, or one key the directory of another, on some file system."""
    seen: dict[str, str] = {}
    for key in sorted(keys):
        other = seen.setdefault(key.casefold(), key)
        if other != key:
            raise UnsafeKeyError(
                f"refusing the keys {other!r} and {key!r}: they differ by case only, and are one file on some disks"
            )
    for folded, key in seen.items():
        for parent in PurePosixPath(folded).parents:
            if other := seen.get(parent.as_posix()):
                raise UnsafeKeyError(
                    f"refusing the key {key!r}: {other!r} is a file, and cannot be its directory"
                )


_held_locks: set[int] = set()
_held_for_life: set[Path] = set()
_holding = threading.Lock()


def _forget_locks() -> None:
    # A fork copies the descriptors, and with them the locks: the child must not keep its parent's alive.
    for descriptor in _held_locks:
        os.close(descriptor)
    _held_locks.clear()
    _held_for_life.clear()


os.register_at_fork(after_in_child=_forget_locks)


@contextmanager
def file_lock(path: Path, *, shared: bool = False, blocking: bool = True) -> Iterator[None]:
    """Hold a lock on `path`, a file made for it; the kernel releases it when the holder dies, however.

    Locks between processes and between threads. A `shared` lock keeps out only exclusive ones. Raises
    BlockingIOError at once when `blocking` is false and another holds it.
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
            # Closing alone is not enough for a moment after a fork: the child still has its copy.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def hold_lock(path: Path) -> None:
    """Hold a shared lock on `path` until this process ends, however it does; once, however often it is called."""
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
