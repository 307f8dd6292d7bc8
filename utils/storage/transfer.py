"""Parallel downloads: large objects in ranges into preallocated files, with checksums, each visible only when complete."""

import io
import logging
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from functools import reduce
from pathlib import Path
from typing import Any, Protocol

from utils.files import checksum, checksum_text, partial_name
from utils.storage.store import DamagedError, StoredObject

LARGE_THREADS = 16  # enough to saturate a network card at 90 MB/s per connection
SMALL_THREADS = 48  # these wait for responses; starting more costs more than it saves
SMALL_BYTES = 1024 * 1024  # maximum size of a small object
SMALLEST_PART_BYTES, LARGEST_PART_BYTES = 8 * 1024 * 1024, 64 * 1024 * 1024

_log = logging.getLogger(__name__)

Take = Callable[[bytes], None]


class Source(Protocol):
    """A source of objects."""

    def read_into(self, item: StoredObject, start: int, length: int, take: Take) -> bool:
        """Pass every byte of a range to `take`, in order and exactly once, across interruptions.

        Returns:
            True if the bytes were verified with a checksum from the server.

        Raises:
            BucketError: the object is missing, damaged, or no longer the version `item`.
        """
        ...

    def stored_checksum(self, item: StoredObject) -> str | None:
        """Return the server's own checksum of a complete object as "algorithm:hex", or None."""
        ...

    def uri_of(self, key: str) -> str:
        """Return the full URI of an object."""
        ...


class RangeReader(io.RawIOBase):
    """An object that is read in ranges, as a seekable binary file."""

    def __init__(self, source: Source, item: StoredObject):
        self._source, self._item, self._position = source, item, 0

    def readable(self) -> bool:
        """See io.IOBase."""
        return True

    def seekable(self) -> bool:
        """See io.IOBase."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """See io.IOBase."""
        self._position = (
            offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._item.size}[whence]
        )
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        """See io.RawIOBase."""
        target = memoryview(buffer).cast("B")
        length = max(min(len(target), self._item.size - self._position), 0)
        begin = 0

        def take(block: bytes) -> None:
            nonlocal begin
            target[begin : begin + len(block)] = block
            begin += len(block)

        if length:
            self._source.read_into(self._item, self._position, length, take)
        self._position += length
        return length


def download_all(source: Source, targets: Mapping[StoredObject, Path]) -> dict[str, str]:
    """Download objects to paths. Return key -> checksum.

    A path is replaced only when its object is complete and verified.

    Raises:
        DamagedError: an object arrived twice with content that differs from what was stored.
        OSError: writing to disk failed.
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


class _Stopped(Exception):  # noqa: N818  # not an error: another part has failed
    pass


class _Download:
    """The download of one object."""

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
        if len(self._parts) > 1 and not self.item.checksum:  # a small object arrives with its checksum
            self._stored_checksum = small.submit(self._source.stored_checksum, self.item)
        pool = small if self.item.size <= SMALL_BYTES else large
        return [pool.submit(self._receive, part) for part in self._parts]

    def discard(self) -> None:
        """Close and delete the partial file, if any."""
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
                os.posix_fallocate(
                    self._descriptor, 0, self.item.size
                )  # detect a full disk before the transfer
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
            _log.warning("%s; downloading it again", error)
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
            _log.warning("%s; downloading it again", wrong)
            for part in self._parts:
                self._read(part)
            if wrong := self._what_is_wrong():
                raise DamagedError(
                    self.item.key, f"{wrong}. Upload it again, or check the network path for data corruption."
                )
        self._close()
        self._partial.replace(self._path)

    def _what_is_wrong(self) -> str:
        self.checksum = checksum_text(reduce(_append, self._parts).crc)
        expected = self.item.checksum
        if expected is None and self._stored_checksum:
            expected = self._stored_checksum.result()
        elif (
            expected is None and not self._is_compared
        ):  # an interrupted small object has no checksum of its own
            expected = self._source.stored_checksum(self.item)
        if expected is None:
            return ""
        algorithm = expected.partition(":")[0]
        arrived = self.checksum
        if not arrived.startswith(f"{algorithm}:"):
            arrived = checksum(self._partial, algorithm)
        if arrived == expected:
            return ""
        return f"{self._source.uri_of(self.item.key)} arrived with the checksum {arrived}, but was stored with {expected}"


class _Part:
    """A range of an object, and the checksum of the received bytes."""

    def __init__(self, start: int, length: int, crc: int = 0):
        self.start, self.length, self.crc = start, length, crc


def _append(first: _Part, second: _Part) -> _Part:
    from awscrt.checksums import combine_crc64nvme

    crc = combine_crc64nvme(first.crc, second.crc, second.length)
    return _Part(first.start, first.length + second.length, crc)


def split(size: int) -> list[tuple[int, int]]:
    """Return (start, length) of the parts of an object: about two per thread, at least 8 MB each; at least one part."""
    wanted = -(-size // (2 * LARGE_THREADS))
    length = min(max(wanted, SMALLEST_PART_BYTES), LARGEST_PART_BYTES)
    return [(start, min(length, size - start)) for start in range(0, size, length)] or [(0, 0)]
