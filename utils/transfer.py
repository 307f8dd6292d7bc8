"""Many objects down at once: large ones in ranges, straight into a preallocated file; each checked, none ever seen half."""

import logging
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from functools import reduce
from pathlib import Path
from typing import Protocol

from utils.files import checksum, checksum_text, partial_name
from utils.store import DamagedError, StoredObject

LARGE_THREADS = 16  # enough to fill a network card, with 90 MB/s a connection
SMALL_THREADS = 48  # these wait for answers; more cost more to start than they save in waiting
SMALL_BYTES = 1024 * 1024  # what counts as small
SMALLEST_PART_BYTES, LARGEST_PART_BYTES = 8 * 1024 * 1024, 64 * 1024 * 1024

_log = logging.getLogger(__name__)

Take = Callable[[bytes], None]


class Source(Protocol):
    """Where objects come from."""

    def read_into(self, item: StoredObject, start: int, length: int, take: Take) -> bool:
        """Give every byte of a range to `take`, in order and each once, whatever breaks on the way.

        Returns whether they were compared with a checksum that storage sent with them.
        Raises NotFoundError, DamagedError, or another BucketError when the object is not `item` any more.
        """
        ...

    def stored_checksum(self, item: StoredObject) -> str | None:
        """Return the storage's own checksum of a whole object as "algorithm:hex", None when it has none."""
        ...

    def uri_of(self, key: str) -> str:
        """Return the full URI of an object."""
        ...


def download_all(source: Source, targets: Mapping[StoredObject, Path]) -> dict[str, str]:
    """Bring objects to paths; returns key -> checksum.

    A path appears when its object is whole and checked. What there was at a path stays until then. Raises DamagedError
    when an object arrives twice with another content than it was stored with, and OSError when the disk refuses.
    """
    stop = threading.Event()
    largest_first = sorted(targets, key=lambda item: item.size, reverse=True)
    downloads = [_Download(source, item, targets[item], stop) for item in largest_first]
    with (
        ThreadPoolExecutor(LARGE_THREADS, thread_name_prefix="download-part") as large,
        ThreadPoolExecutor(SMALL_THREADS, thread_name_prefix="download") as small,
    ):
        tasks = [task for download in downloads for task in download.begin(large, small)]
        try:
            for task in as_completed(tasks):
                task.result()
        except BaseException:
            stop.set()
            for pool in (large, small):
                pool.shutdown(cancel_futures=True)
            raise
        finally:
            for download in downloads:
                download.discard()
    return {download.item.key: download.checksum for download in downloads}


class _Stopped(Exception):  # noqa: N818  # no error: another part has failed
    pass


class _Download:
    """One object on its way."""

    def __init__(self, source: Source, item: StoredObject, path: Path, stop: threading.Event):
        self.item = item
        self.checksum = ""
        self._source, self._path, self._stop = source, path, stop
        self._partial = partial_name(path)
        self._descriptor = -1
        self._stored_checksum: Future[str | None] | None = None
        self._is_compared = False
        self._parts = [_Part(start, length) for start, length in split(item.size)]
        self._waiting = len(self._parts)
        self._lock = threading.Lock()

    def begin(self, large: ThreadPoolExecutor, small: ThreadPoolExecutor) -> list["Future[None]"]:
        if len(self._parts) > 1 and not self.item.checksum:  # a small object's comes with it
            self._stored_checksum = small.submit(self._source.stored_checksum, self.item)
        pool = small if self.item.size <= SMALL_BYTES else large
        return [pool.submit(self._receive, part) for part in self._parts]

    def discard(self) -> None:
        """Leave nothing but a finished file."""
        self._close()
        self._partial.unlink(missing_ok=True)

    def _receive(self, part: "_Part") -> None:
        if self._stop.is_set():
            return
        with self._lock:
            if self._descriptor < 0:
                self._open()
        try:
            self._read(part)
            with self._lock:
                self._waiting -= 1
                is_last = not self._waiting
            if is_last:
                self._finish()
        except _Stopped:
            return

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        if self.item.size:
            try:
                os.posix_fallocate(self._descriptor, 0, self.item.size)  # a full disk, before a byte is moved
            except OSError as error:
                error.filename = str(self._path)
                raise

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _read(self, part: "_Part") -> None:
        try:
            self._read_once(part)
        except DamagedError as error:
            _log.warning("%s; reading it again", error)
            self._read_once(part)

    def _read_once(self, part: "_Part") -> None:
        from awscrt.checksums import crc64nvme

        part.crc, position = 0, part.start

        def take(block: bytes) -> None:
            nonlocal position
            if self._stop.is_set():
                raise _Stopped
            part.crc = crc64nvme(block, part.crc)
            rest = memoryview(block)
            while rest:
                written = os.pwrite(self._descriptor, rest, position)
                position += written
                rest = rest[written:]

        self._is_compared = self._source.read_into(self.item, part.start, part.length, take)

    def _finish(self) -> None:
        if wrong := self._what_is_wrong():
            _log.warning("%s; reading it again", wrong)
            for part in self._parts:
                self._read(part)
            if wrong := self._what_is_wrong():
                raise DamagedError(
                    self.item.key, f"{wrong}. Store it again, or look for what changes data on the way here."
                )
        self._close()
        self._partial.replace(self._path)

    def _what_is_wrong(self) -> str:
        self.checksum = checksum_text(reduce(_append, self._parts).crc)
        expected = self.item.checksum
        if expected is None and self._stored_checksum:
            expected = self._stored_checksum.result()
        elif expected is None and not self._is_compared:  # a small one broke off, and its rest came without
            expected = self._source.stored_checksum(self.item)
        if expected is None:
            return ""
        algorithm = expected.partition(":")[0]
        arrived = self.checksum
        if not arrived.startswith(f"{algorithm}:"):
            arrived = checksum(self._partial, algorithm)
        if arrived == expected:
            return ""
        return f"{self._source.uri_of(self.item.key)} arrived with the checksum {arrived}, and was stored with {expected}"


class _Part:
    """A range of an object, and the checksum of what has arrived of it."""

    def __init__(self, start: int, length: int, crc: int = 0):
        self.start, self.length, self.crc = start, length, crc


def _append(first: _Part, second: _Part) -> _Part:
    from awscrt.checksums import combine_crc64nvme

    crc = combine_crc64nvme(first.crc, second.crc, second.length)
    return _Part(first.start, first.length + second.length, crc)


def split(size: int) -> list[tuple[int, int]]:
    """Return (start, length) of the parts of an object: two rounds for every thread, of 8 to 64 MB each; at least one."""
    wanted = -(-size // (2 * LARGE_THREADS))
    length = min(max(wanted, SMALLEST_PART_BYTES), LARGEST_PART_BYTES)
    return [(start, min(length, size - start)) for start in range(0, size, length)] or [(0, 0)]
