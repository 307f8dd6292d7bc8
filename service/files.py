"""Files: records, content in the bucket, and uploads that are streamed."""

import asyncio
import secrets
import sys
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from awscrt.checksums import crc64nvme
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from service.config import Limits
from service.errors import ApiError, invalid, not_found
from service.jobs import UNFINISHED
from service.keys import Caller
from service.layout import active_key, content_key, files_of, jobs_of
from service.records import Record, Slice
from service.requests import RETRY_SECONDS, PageQuery, blocks_of
from utils.files import checksum_text
from utils.storage.bucket import NotFoundError
from utils.storage.s3 import UPLOAD_PART_BYTES, S3Store, StreamedUpload

T = TypeVar("T")

PURPOSE, RESULTS_PURPOSE = "fine-tune", "fine-tune-results"
_PARTS_AT_A_TIME = 2
_MAX_TRANSFERS, _MAX_TRANSFERS_OF_PROJECT = 100, 50
"""Uploads that one replica receives at a time, and downloads. An upload has a buffer of 8 MB and 2 parts of 8 MB on their way; a
download has a block and its copy in the buffer of the connection. One project must not take the slots of all others."""
_MAX_FIELD_BYTES = 4096
_MAX_PARTS = 16
_READ_BYTES = 4 * 1024 * 1024
_DELETED = "deleted/"
"""Prefix of the markers of files that were just deleted, by which a repeated deletion is recognized. Their keys contain the hour of
the deletion, so that a listing shows which are old."""


@cache
def _content_threads() -> anyio.CapacityLimiter:
    """Return the limiter of threads of uploads and downloads: a slow bucket must not take the threads of other requests."""
    return anyio.CapacityLimiter(64)


class _Slots:
    """The uploads or downloads that this replica has at a time."""

    def __init__(self, kind: str):
        self._kind = kind
        self._taken: Counter[str] = Counter()

    @contextmanager
    def taken(self, project: str) -> Iterator[None]:
        """Count one within the block; raise an ApiError if there are too many already, of all projects or of this one."""
        is_full = self._taken.total() >= _MAX_TRANSFERS
        if is_full or self._taken[project] >= _MAX_TRANSFERS_OF_PROJECT:
            many = f"{_MAX_TRANSFERS} {self._kind}"
            many = many if is_full else f"{_MAX_TRANSFERS_OF_PROJECT} {self._kind} of the project"
            raise ApiError(
                status=429,
                message=f"The service has {many} already. Send the request again.",
                type="rate_limit_error",
                code="rate_limit_exceeded",
                headers={"Retry-After": "5"},
            )
        self._taken[project] += 1
        try:
            yield
        finally:
            self._taken[project] -= 1


class Files:
    """The files of all projects."""

    def __init__(self, store: S3Store, contents: S3Store, limits: Limits):
        """Set where files are stored.

        Args:
            store: The service's storage path, for requests that must be answered soon.
            contents: The same path, for uploads and downloads: they are lost if the bucket is given up too early.
            limits: Limits of the service.
        """
        self._store, self._contents, self._limits = store, contents, limits
        self._uploads, self._downloads = _Slots("uploads"), _Slots("downloads")

    async def create(self, caller: Caller, request: Request, *, is_retry: bool) -> Record:
        """Stream an upload into the bucket and return its record, or that of the same upload whose response was lost.

        Args:
            caller: Project and key of the request.
            request: The request.
            is_retry: The client repeats a request whose answer it lost.
        """
        began = time.time()  # a repeated upload may take longer than RETRY_SECONDS
        declared = request.headers.get("content-length", "")
        too_large = int(declared) > self._limits.file_bytes + 100_000 if declared.isdigit() else False
        if too_large:
            raise self._too_large()
        if not is_retry:  # a retry is counted below, because its first request may have used up the limit
            await anyio.to_thread.run_sync(self._check_stored_bytes, caller.project)
        name = f"{secrets.token_hex(12)}.jsonl"
        key = content_key(caller.project, name)
        parser = _Upload(request, self._limits.file_bytes, self._too_large)
        with self._uploads.taken(caller.project):
            upload = await parser.stream_to(self._contents, key)
        identity = {
            "key_id": caller.key_id,
            "bytes": upload.size,
            "checksum": checksum_text(upload.crc),
            "filename": upload.filename,
            "purpose": upload.fields.get("purpose"),
        }
        record = identity | {"created_at": int(time.time()), "content": name}
        since = int(began) - (RETRY_SECONDS if is_retry else 0)

        def make(identifier: str) -> Record:
            if is_retry:
                self._check_stored_bytes(caller.project)
            return {"id": identifier, **record}

        def is_the_same(other: Record) -> bool:
            if not is_retry or other["created_at"] < since:
                return other["content"] == name  # stored by a write whose response was lost
            return all(other.get(field) == value for field, value in identity.items())

        try:
            _check_form(upload)
            records = files_of(self._contents, caller.project)
            created = await _in_content_thread(records.append, make, is_the_same, since)
        except ApiError:
            await anyio.to_thread.run_sync(self._store.delete, [key])
            raise
        if created["content"] != name:
            await anyio.to_thread.run_sync(self._store.delete, [key])
        return created

    def get(self, project: str, file_id: str) -> Record:
        """Return a file's record; raise an ApiError if it does not exist."""
        record = files_of(self._store, project).get(file_id)
        if record is None:
            raise not_found("File object", file_id)
        return record

    def slice(self, project: str, query: PageQuery, purpose: str | None) -> Slice | None:
        """Return part of the list of files."""
        return files_of(self._store, project).slice(
            after=query.after,
            limit=query.limit,
            ascending=query.ascending,
            wanted=lambda record: purpose in (None, record["purpose"]),
        )

    async def content(self, project: str, record: Record) -> AsyncGenerator[bytes]:
        """Yield the content of a file in blocks; raise an ApiError if it was deleted, or there are too many downloads already."""
        key = content_key(project, record["content"])
        with self._downloads.taken(project):
            for start in range(0, record["bytes"], _READ_BYTES):
                length = min(_READ_BYTES, record["bytes"] - start)
                try:
                    yield await _in_content_thread(self._contents.read_range, key, start, length)
                except NotFoundError as error:
                    raise not_found("File object", record["id"]) from error

    def delete(self, project: str, file_id: str, *, is_retry: bool) -> None:
        """Delete a file; raise an ApiError if it does not exist or an unfinished job needs it.

        Args:
            project: The caller's project.
            file_id: Id of the file.
            is_retry: The client repeats a request whose answer it lost, so the file may have been deleted already.
        """
        records, hour = files_of(self._store, project), _hour()
        markers = [_deletion_marker(project, file_id, each) for each in (hour, hour - 1)]
        if is_retry and records.is_id(file_id) and records.get(file_id) is None:
            if all(self._store.read_if_exists(marker) is None for marker in markers):
                raise not_found("File object", file_id)
            return
        self.get(project, file_id)
        prefix = active_key(project)
        active = [item.key.removeprefix(prefix) for item in self._store.list(prefix)]
        for job in jobs_of(self._store, project).get_many(active).values():
            is_used = file_id in (job["training_file"], job["validation_file"])
            if is_used and job["status"] in UNFINISHED:
                raise invalid(
                    f"The file is used by the unfinished job {job['id']}. Cancel the job first.", "file_id"
                )
        self._store.write(markers[0], b"")
        record = records.remove(file_id)
        if record is not None:
            self._store.delete([content_key(project, record["content"])])

    def _check_stored_bytes(self, project: str) -> None:
        stored = sum(item.size for item in self._store.list(content_key(project)))
        if stored >= self._limits.stored_bytes:
            # Some contents may have no record: those of uploads that were killed or are being recorded.
            found = files_of(self._store, project).slice(after=None, limit=sys.maxsize)
            stored = sum(record["bytes"] for record in found.records) if found else 0
        if stored >= self._limits.stored_bytes:
            raise ApiError(
                status=429,
                message=f"The project stores {stored:,} bytes; the limit is {self._limits.stored_bytes:,}. Delete files first.",
                type="insufficient_quota",
                code="insufficient_quota",
                headers={"Retry-After": "60", "x-should-retry": "false"},
            )

    def _too_large(self) -> ApiError:
        return ApiError(
            status=413,
            message=f"The file is larger than the limit of {self._limits.file_bytes:,} bytes.",
            param="file",
        )


def delete_orphans(store: S3Store, suspects: Collection[str]) -> set[str]:
    """Delete contents without a record, which killed uploads and deletions have left, and old markers of deleted files.

    Args:
        store: The service's storage path.
        suspects: Contents that had no record an hour ago. Their age would not do: S3 counts it from the begin of an upload, and
            the record of an upload that took long may be about to be stored.

    Returns:
        Contents that have no record now: the suspects of the next call.
    """
    last_hour = f"{_DELETED}{_hour() - 1:08d}"
    store.delete([item.key for item in store.list(_DELETED) if item.key < last_hour])
    contents: dict[str, set[str]] = {}
    for item in store.list("content/"):
        contents.setdefault(item.key.split("/")[1], set()).add(item.key)
    orphans: set[str] = set()
    for project, keys in contents.items():
        found = files_of(store, project).slice(after=None, limit=sys.maxsize)
        orphans |= keys - {
            content_key(project, record["content"]) for record in (found.records if found else ())
        }
    store.delete(orphans.intersection(suspects))
    return orphans.difference(suspects)


def _check_form(upload: "_Upload") -> None:
    """Raise an ApiError if a form has another purpose, unknown fields or an empty file."""
    purpose = upload.fields.get("purpose")
    if purpose is None:
        raise invalid("'purpose' is a required property", "purpose", "missing_required_parameter")
    if purpose != PURPOSE:
        raise invalid(f"Invalid 'purpose': this service stores files for {PURPOSE!r}.", "purpose")
    if unknown := sorted(upload.fields.keys() - {"purpose"}):
        raise invalid(f"Unknown parameter: {unknown[0][:100]!r}", unknown[0][:100], "unknown_parameter")
    if upload.size == 0:
        raise invalid("The file is empty.", "file")


def _hour() -> int:
    return int(time.time() // 3600)


def _deletion_marker(project: str, file_id: str, hour: int) -> str:
    """Return the key of the marker of a file that was deleted in this hour since 1970."""
    return f"{_DELETED}{hour:08d}/{project}/{file_id}"


async def _in_content_thread(call: Callable[..., T], *arguments: Any) -> T:
    return await anyio.to_thread.run_sync(call, *arguments, limiter=_content_threads())


def file_body(record: Record) -> dict[str, Any]:
    """Return a file as the API answers it."""
    return {
        "id": record["id"],
        "object": "file",
        "bytes": record["bytes"],
        "created_at": record["created_at"],
        "filename": record["filename"],
        "purpose": record["purpose"],
        "status": "processed",
        "status_details": None,
        "expires_at": None,
    }


@dataclass
class _Part:
    """The part of a form that is being parsed."""

    headers: dict[str, str] = field(default_factory=dict)
    header_name: bytearray = field(default_factory=bytearray)
    header_value: bytearray = field(default_factory=bytearray)
    name: str = ""
    filename: str | None = None
    value: bytearray = field(default_factory=bytearray)


class _Upload:
    """A multipart form whose part `file` is streamed and whose other parts are short texts."""

    def __init__(self, request: Request, limit: int, too_large: Callable[[], ApiError]):
        self.fields: dict[str, str] = {}
        self.filename = ""
        self.size = self.crc = 0
        self._request, self._limit, self._too_large = request, limit, too_large
        self._part = _Part()
        self._part_count = 0
        self._has_file = self._is_complete = False
        # A buffer of this size takes memory only where it is filled, and leaves no holes in the heap, unlike a growing one.
        self._buffer, self._filled = bytearray(UPLOAD_PART_BYTES), 0
        self._parts_to_send: deque[bytearray] = deque()
        self._free: list[bytearray] = []

    async def stream_to(self, store: S3Store, key: str) -> "_Upload":
        """Parse the form and upload the file part by part; return this object with its fields and size.

        A thread is needed only while a part is written, so slow clients take none.
        """
        upload = store.streamed_upload(key)
        running: deque[asyncio.Task[None]] = deque()
        try:
            await self._send_parts(upload, running)
        except BaseException as error:
            await asyncio.gather(*running, return_exceptions=True)
            await _in_content_thread(upload.abort)
            if isinstance(error, FormParserError):
                raise invalid(f"The multipart form cannot be parsed: {str(error)[:200]}") from error
            if isinstance(error, UnicodeDecodeError):
                message = "The multipart form has a part whose name or value is not UTF-8 text."
                raise invalid(message) from error
            raise
        return self

    async def _send_parts(self, upload: StreamedUpload, running: deque[asyncio.Task[None]]) -> None:
        parser, number = self._parser(), 0

        def send(number: int, part: bytearray) -> None:
            upload.put(number, part)
            self._free.append(part)

        async for block in blocks_of(self._request):
            if self._filled + len(block) >= UPLOAD_PART_BYTES and len(running) == _PARTS_AT_A_TIME:
                await running.popleft()  # before the block completes a part
            parser.write(block)
            while self._parts_to_send:
                if len(running) == _PARTS_AT_A_TIME:
                    await running.popleft()
                part = self._parts_to_send.popleft()
                running.append(asyncio.create_task(_in_content_thread(send, number, part)))
                number += 1
        self._check_complete()
        while running:
            await running.popleft()
        last = bytes(memoryview(self._buffer)[: self._filled])
        self.crc = crc64nvme(last, self.crc)
        await _in_content_thread(upload.complete, last)

    def _check_complete(self) -> None:
        if not self._is_complete:
            raise invalid("The multipart form ends before its closing boundary.")
        if not self._has_file:
            raise invalid("'file' is a required property", "file", "missing_required_parameter")

    def _parser(self) -> MultipartParser:
        kind, options = parse_options_header(self._request.headers.get("content-type", ""))
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary or len(boundary) > 200:
            raise invalid("Send the file as multipart/form-data with a boundary.")
        return MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": lambda data, start, end: self._add(
                    self._part.header_name, data, start, end
                ),
                "on_header_value": lambda data, start, end: self._add(
                    self._part.header_value, data, start, end
                ),
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )

    def _add(self, buffer: bytearray, data: bytes, start: int, end: int) -> None:
        buffer += data[start:end]
        if len(buffer) > _MAX_FIELD_BYTES:
            raise invalid(f"A field of the multipart form is larger than {_MAX_FIELD_BYTES:,} bytes.")

    def _on_part_begin(self) -> None:
        self._part_count += 1
        if self._part_count > _MAX_PARTS:
            raise invalid(f"The multipart form has more than {_MAX_PARTS} parts.")
        self._part = _Part()

    def _on_header_end(self) -> None:
        part = self._part
        part.headers[part.header_name.decode("latin-1").lower()] = part.header_value.decode("latin-1")
        if len(part.headers) > _MAX_PARTS:
            raise invalid(f"A part of the multipart form has more than {_MAX_PARTS} headers.")
        part.header_name.clear()
        part.header_value.clear()

    def _on_headers_finished(self) -> None:
        part = self._part
        _, options = parse_options_header(part.headers.get("content-disposition", ""))
        part.name = options.get(b"name", b"").decode()
        if part.name == "file":
            if self._has_file:
                raise invalid("The multipart form has two parts named 'file'.", "file")
            self._has_file = True
            filename = options.get(b"filename", b"upload.jsonl").decode()
            self.filename = "".join(each for each in filename if each.isprintable())[:255]

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._part.name != "file":
            self._add(self._part.value, data, start, end)
            return
        self.size += end - start
        if self.size > self._limit:
            raise self._too_large()
        while start < end:
            taken = min(end - start, UPLOAD_PART_BYTES - self._filled)
            self._buffer[self._filled : self._filled + taken] = memoryview(data)[start : start + taken]
            start, self._filled = start + taken, self._filled + taken
            if self._filled == UPLOAD_PART_BYTES:
                self.crc = crc64nvme(self._buffer, self.crc)  # pyright: ignore[reportArgumentType]  # its annotation lacks bytearray
                self._parts_to_send.append(self._buffer)
                self._buffer, self._filled = (
                    self._free.pop() if self._free else bytearray(UPLOAD_PART_BYTES),
                    0,
                )

    def _on_part_end(self) -> None:
        part = self._part
        if part.name != "file":
            if part.name in self.fields:
                raise invalid(f"The multipart form has two parts named {part.name[:100]!r}.", part.name[:100])
            self.fields[part.name] = part.value.decode()

    def _on_end(self) -> None:
        self._is_complete = True
