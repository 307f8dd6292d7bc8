"""A prefix of an S3 bucket as a store.

Every bucket uses botocore's standard chain of credentials and settings (AWS_ENDPOINT_URL_S3, AWS_PROFILE,
AWS_CA_BUNDLE, AWS_REQUEST_CHECKSUM_CALCULATION, ...), except `s3://anneal`, the embedded bucket. So one process
can use both.

Retries are implemented here and not in botocore: its retries share a budget that a busy server uses up, and do not
cover the body of a response. When the server reports expired credentials, the chain is evaluated again.
"""

import base64
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from utils.files import BucketError
from utils.storage.embedded_bucket import EMBEDDED_BUCKET, embedded_endpoint, state_directory
from utils.storage.retries import WORK, Attempts, RetryPolicy
from utils.storage.s3_errors import (
    CHANGED,
    ELSEWHERE,
    EXPIRED,
    NO_S3,
    error_code,
    explain_failure,
    explain_rejection,
    may_pass,
)
from utils.storage.store import (
    AlreadyExistsError,
    ChangedError,
    DamagedError,
    NotFoundError,
    Store,
    StoredObject,
    explain_os_error,
    join_uri,
)
from utils.storage.transfer import LARGE_THREADS, SMALL_BYTES, SMALL_THREADS, Take, download_all

T = TypeVar("T")


BLOCK_BYTES = 256 * 1024  # read size for response bodies; larger blocks leave the CPU cache and are slower
UPLOAD_PART_BYTES, _MOST_UPLOAD_PARTS = 8 * 1024 * 1024, 10_000
_TOKEN_VARIABLE = "AWS_WEB_IDENTITY_TOKEN_FILE"
_DELETE_BATCH = 1000  # maximum number of keys per S3 request


class S3Store(Store):
    """A prefix of a bucket as a store. Create one per process; each process looks up its own credentials."""

    def __init__(self, uri: str, retry_policy: RetryPolicy = WORK):
        self.bucket, self.prefix = split_s3(uri)
        self.uri = join_uri(f"s3://{self.bucket}", self.prefix)
        self._start = f"{self.prefix}/" if self.prefix else ""  # prefix of every key in the bucket
        self._retry_policy = retry_policy
        self._connection = _Connection()

    @property
    def identity(self) -> str:
        """See Store. The identity of the embedded bucket does not change when it restarts on another port."""
        return str(state_directory()) if self.bucket == EMBEDDED_BUCKET else self._client().meta.endpoint_url

    def below(self, key: str) -> "S3Store":
        """Return the store of a prefix in this store; both use the same client."""
        store = S3Store(self.uri_of(key), self._retry_policy)
        store._connection = self._connection
        return store

    def list(self, prefix: str = "") -> list[StoredObject]:
        """See Store."""
        found = [item for answer in self._listing(prefix) for item in self._objects(answer)]
        return sorted(found, key=lambda item: item.key)

    def directories(self) -> Sequence[str]:
        """See Store. Each request returns a thousand directories, however many objects they contain."""
        prefixes = [
            found["Prefix"]
            for answer in self._listing("", Delimiter="/")
            for found in answer.get("CommonPrefixes", [])
        ]
        return sorted(prefix.removeprefix(self._start).rstrip("/") for prefix in prefixes)

    def first(self, prefix: str) -> StoredObject | None:
        """See Store."""
        with self._errors("list", prefix):
            answer = self._list_page(prefix, MaxKeys=100)
        return next(iter(self._objects(answer)), None)

    def stat(self, key: str) -> StoredObject:
        """See Store."""
        head = self._head(key)
        return StoredObject(key, head["ContentLength"], head["ETag"])

    def age(self, key: str) -> float | None:
        """See Store."""
        try:
            head = self._head(key)
        except NotFoundError:
            return None
        now = parsedate_to_datetime(head["ResponseMetadata"]["HTTPHeaders"]["date"])
        return (now - head["LastModified"]).total_seconds()

    def stored_checksum(self, item: StoredObject) -> str | None:
        """See transfer.Source. Ignores composite checksums (checksums of the checksums of parts)."""
        if self._client().meta.config.response_checksum_validation == "when_required":
            return None  # the settings disable response checksums
        head = self._head(item.key, ChecksumMode="ENABLED")
        if head.get("ChecksumType", "FULL_OBJECT") != "FULL_OBJECT":
            return None
        for algorithm in ("crc64nvme", "crc32c", "crc32"):
            written = head.get(f"Checksum{algorithm.upper()}", "")
            if written and "-" not in written:
                return f"{algorithm}:{base64.b64decode(written).hex()}"
        return None

    def read(self, key: str) -> bytes:
        """See Store."""
        return self._get(key)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """See Store."""
        return self._get(key, Range=f"bytes={start}-{start + length - 1}")

    def write(self, key: str, data: bytes, *, only_if_absent: bool = False) -> None:
        """See Store."""
        with self._errors("write", key):
            try:
                self._put(key, data, **({"IfNoneMatch": "*"} if only_if_absent else {}))
            except _RejectedError as rejected:
                if not only_if_absent or rejected.code not in ("PreconditionFailed", "412"):
                    raise
                # An earlier attempt may have succeeded although its response was lost.
                if not rejected.repeated or self.read_if_exists(key) != data:
                    raise AlreadyExistsError(
                        f"cannot write {self.uri_of(key)}: it already exists"
                    ) from rejected

    def read_version(self, key: str) -> tuple[bytes, str] | None:
        """Return (content, ETag) of an object for `write_version`, or None if it does not exist."""

        def get(client: Any) -> tuple[bytes, str]:
            answer = client.get_object(Bucket=self.bucket, Key=self._start + key)
            return answer["Body"].read(), answer["ETag"]

        try:
            with self._errors("read", key):
                return self._request(get)
        except NotFoundError:
            return None

    def write_version(self, key: str, data: bytes, etag: str) -> None:
        """Replace an object that still has this ETag.

        Raises:
            ChangedError: another process has written or deleted it.
        """
        with self._errors("write", key):
            try:
                self._put(key, data, IfMatch=etag)
            except _RejectedError as rejected:
                # 409: another conditional write of the object is in progress. 404: it was deleted.
                if rejected.code not in (
                    "PreconditionFailed",
                    "412",
                    "ConditionalRequestConflict",
                    "NoSuchKey",
                ):
                    raise
                # An earlier attempt may have succeeded although its response was lost.
                if not rejected.repeated or self.read_if_exists(key) != data:
                    raise ChangedError(
                        f"cannot write {self.uri_of(key)}: it has changed since it was read"
                    ) from rejected

    def download_many(self, targets: Mapping[StoredObject, Path]) -> dict[str, str]:
        """See Store. Every range request carries the listed ETag, so that all ranges belong to one version."""
        with self._errors("download from"):
            return download_all(self, targets)

    def upload(self, path: Path, key: str) -> None:
        """See Store."""
        self.upload_many({key: path})

    def upload_many(self, sources: Mapping[str, Path]) -> None:
        """See Store. At most 16 parts are in memory, of 8 MB each, or larger for files above 10,000 parts."""
        with (
            ThreadPoolExecutor(SMALL_THREADS, thread_name_prefix="upload") as files,
            ThreadPoolExecutor(LARGE_THREADS, thread_name_prefix="upload-part") as parts,
        ):
            tasks = [files.submit(self._upload, path, key, parts) for key, path in sources.items()]
            try:
                for task in tasks:
                    task.result()
            except BaseException:
                files.shutdown(wait=False, cancel_futures=True)
                raise

    def streamed_upload(self, key: str) -> "StreamedUpload":
        """Return an upload of an object whose content arrives in parts."""
        return StreamedUpload(self, key)

    def delete(self, keys: Iterable[str]) -> None:
        """See Store."""
        remaining = list(keys)
        with self._errors("delete from"):
            if not self._sends_checksums:  # a batch deletion requires a checksum
                with ThreadPoolExecutor(LARGE_THREADS, thread_name_prefix="delete") as pool:
                    list(pool.map(self._delete_one, remaining))
                return
            while remaining:
                batch, remaining = remaining[:_DELETE_BATCH], remaining[_DELETE_BATCH:]
                self._delete_batch(batch)

    def abort_stale_uploads(self, prefix: str = "") -> int:
        """See Store."""
        aborted, page = 0, {}
        with self._errors("list the unfinished uploads of", prefix):
            while True:
                answer = self._request(
                    lambda client, page=page: client.list_multipart_uploads(
                        Bucket=self.bucket, Prefix=self._start + prefix, **page
                    )
                )
                for upload in answer.get("Uploads", []):
                    self._abort(upload["Key"], upload["UploadId"])
                    aborted += 1
                if not answer.get("IsTruncated"):
                    return aborted
                page = {
                    "KeyMarker": answer["NextKeyMarker"],
                    "UploadIdMarker": answer.get("NextUploadIdMarker", ""),
                }

    def uri_of(self, key: str) -> str:
        """See Store."""
        return f"{self.uri}/{key}" if key else self.uri

    def read_into(self, item: StoredObject, start: int, length: int, take: Take) -> bool:
        """See transfer.Source. Continues an interrupted download at the byte where it stopped."""
        from botocore.exceptions import BotoCoreError, ClientError

        end, attempts = start + length, Attempts(self._retry_policy)
        is_whole = start == 0 and length == item.size  # S3 sends a checksum only with a complete object
        with self._errors("download", item.key):
            while True:
                pinned = {"IfMatch": item.etag} if item.etag else {}
                if not is_whole or start:
                    pinned["Range"] = f"bytes={start}-{end - 1}"
                client = self._client()
                try:
                    answer = client.get_object(Bucket=self.bucket, Key=self._start + item.key, **pinned)
                    self._check_answer(answer, item, end - start)
                    body = answer["Body"]
                    while block := body.read(BLOCK_BYTES):
                        take(block)
                        start += len(block)
                        attempts.progressed()
                    return "Range" not in pinned
                except (BotoCoreError, ClientError) as error:
                    self._wait_or_raise(error, attempts, client)

    def _check_answer(self, answer: Mapping[str, Any], item: StoredObject, length: int) -> None:
        if (item.etag and answer["ETag"] != item.etag) or answer["ContentLength"] != length:
            raise BucketError(f"cannot download {self.uri_of(item.key)}: {CHANGED}")

    def _listing(self, prefix: str, **options: str) -> Iterator[Mapping[str, Any]]:
        page: dict[str, str] = {}
        with self._errors("list", prefix):
            while True:
                answer = self._list_page(prefix, **options, **page)
                yield answer
                if not answer.get("IsTruncated"):
                    return
                page = {"ContinuationToken": answer["NextContinuationToken"]}

    def _list_page(self, prefix: str, **options: Any) -> Mapping[str, Any]:
        answer = self._request(
            lambda client: client.list_objects_v2(Bucket=self.bucket, Prefix=self._start + prefix, **options)
        )
        if "Name" not in answer:  # any XML, such as a web page, parses as an empty listing
            raise BucketError(f"cannot list {self.uri_of(prefix)}: {NO_S3}")
        return answer

    def _objects(self, listing: Mapping[str, Any]) -> Iterator[StoredObject]:
        for item in listing.get("Contents", []):
            if not item["Key"].endswith("/"):  # a marker that web consoles create for an empty folder
                yield StoredObject(item["Key"].removeprefix(self._start), item["Size"], item["ETag"])

    def _head(self, key: str, **options: str) -> dict[str, Any]:
        with self._errors("read", key):
            return self._request(
                lambda client: client.head_object(Bucket=self.bucket, Key=self._start + key, **options)
            )

    def _get(self, key: str, **options: str) -> bytes:
        from botocore.exceptions import FlexibleChecksumError

        def get(client: Any) -> bytes:
            answer = client.get_object(Bucket=self.bucket, Key=self._start + key, **options)
            return answer["Body"].read()

        with self._errors("read", key):
            try:
                return self._request(get)
            except FlexibleChecksumError:  # damaged in transit or in storage
                return self._request(get)

    def _put(self, key: str, data: bytes, **options: str) -> None:
        checksum = self._checksum_option(data)
        self._request(
            lambda client: client.put_object(
                Bucket=self.bucket, Key=self._start + key, Body=data, **checksum, **options
            )
        )

    # --- Uploads -------------------------------------------------------------------------------------------------

    def _upload(self, path: Path, key: str, pool: ThreadPoolExecutor) -> None:
        with self._errors(f"upload {path} to", key):
            size = path.stat().st_size
            if size <= SMALL_BYTES:
                self._put(key, path.read_bytes())
            elif size <= UPLOAD_PART_BYTES:
                pool.submit(lambda: self._put(key, path.read_bytes())).result()
            else:
                self._upload_in_parts(path, size, key, pool)

    def _upload_in_parts(self, path: Path, size: int, key: str, pool: ThreadPoolExecutor) -> None:
        where = self._begin_upload(key)
        length = max(UPLOAD_PART_BYTES, -(-size // _MOST_UPLOAD_PARTS))
        tasks = [
            pool.submit(self._upload_part, path, where, index, length) for index in range(-(-size // length))
        ]
        try:
            self._complete(where, [task.result() for task in tasks], key)
        except BaseException:
            for task in tasks:
                task.cancel()
            wait(tasks)  # a part that arrives after the abort would stay in the bucket
            self._abort(where["Key"], where["UploadId"])
            raise

    def _begin_upload(self, key: str) -> dict[str, str]:
        where = {"Bucket": self.bucket, "Key": self._start + key}
        checksummed = (
            {"ChecksumAlgorithm": "CRC64NVME", "ChecksumType": "FULL_OBJECT"} if self._sends_checksums else {}
        )
        upload = self._request(lambda client: client.create_multipart_upload(**where, **checksummed))
        return where | {"UploadId": upload["UploadId"]}

    def _upload_part(self, path: Path, where: Mapping[str, str], index: int, length: int) -> dict[str, Any]:
        with path.open("rb") as file:
            file.seek(index * length)
            data = file.read(length)
        return self._put_part(where, index, data)

    def _put_part(self, where: Mapping[str, str], index: int, data: bytes | bytearray) -> dict[str, Any]:
        checksum = self._checksum_option(data)
        answer = self._request(
            lambda client: client.upload_part(**where, PartNumber=index + 1, Body=data, **checksum)
        )
        return {"PartNumber": index + 1, "ETag": answer["ETag"], **checksum}

    def _complete(self, where: Mapping[str, str], parts: Sequence[dict[str, Any]], key: str) -> None:
        try:
            self._request(
                lambda client: client.complete_multipart_upload(**where, MultipartUpload={"Parts": parts})
            )
        except _RejectedError as rejected:
            # An earlier attempt may have completed the upload although its response was lost.
            digests = b"".join(bytes.fromhex(part["ETag"].strip('"')) for part in parts)
            etag = f'"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(parts)}"'
            if not (rejected.repeated and rejected.code == "NoSuchUpload" and self.stat(key).etag == etag):
                raise

    def _abort(self, full_key: str, upload_id: str) -> None:
        try:
            self._request(
                lambda client: client.abort_multipart_upload(
                    Bucket=self.bucket, Key=full_key, UploadId=upload_id
                )
            )
        except _RejectedError as rejected:
            if rejected.code != "NoSuchUpload":
                raise

    def _checksum_option(self, data: bytes | bytearray) -> dict[str, str]:
        """Return the checksum with which the server detects damaged `data`; empty if the settings disable checksums."""
        if not self._sends_checksums:
            return {}
        from awscrt.checksums import crc64nvme

        number = crc64nvme(data)  # pyright: ignore[reportArgumentType]  # its annotation lacks bytearray
        return {"ChecksumCRC64NVME": base64.b64encode(number.to_bytes(8)).decode()}

    @property
    def _sends_checksums(self) -> bool:
        return self._client().meta.config.request_checksum_calculation != "when_required"

    # --- Deletions -----------------------------------------------------------------------------------------------

    def _delete_one(self, key: str) -> None:
        self._request(lambda client: client.delete_object(Bucket=self.bucket, Key=self._start + key))

    def _delete_batch(self, keys: Iterable[str]) -> None:
        objects = [{"Key": self._start + key} for key in keys]
        answer = self._request(
            lambda client: client.delete_objects(
                Bucket=self.bucket, Delete={"Objects": objects, "Quiet": True}
            )
        )
        for rejected in answer.get("Errors", []):
            if rejected.get("Code") != "NoSuchKey":
                where = f"s3://{self.bucket}/{rejected.get('Key')}"
                raise BucketError(
                    f"cannot delete {where}: {rejected.get('Code')} ({rejected.get('Message')})"
                )

    # --- Requests ------------------------------------------------------------------------------------------------

    def _client(self) -> Any:
        connection = self._connection
        with connection.lock:
            if connection.client is None:
                connection.client = self._make_client()
            return connection.client

    def _make_client(self) -> Any:
        # botocore is slow to import: only users of a bucket should pay for it.
        from botocore.config import Config
        from botocore.handlers import add_expect_header
        from botocore.session import Session

        # The embedded bucket has its own keys, so do not look for a profile of the user.
        no_profile = {"profile": (None, None, None, None)}
        session = Session(session_vars=no_profile if self.bucket == EMBEDDED_BUCKET else None)
        session.register_component("data_loader", _service_descriptions())

        config = Config(
            retries={"mode": "standard", "total_max_attempts": 1},
            connect_timeout=min(10, self._retry_policy.silence),
            read_timeout=self._retry_policy.silence,
            parameter_validation=False,  # validation takes a tenth of the time of a small object
            max_pool_connections=SMALL_THREADS + LARGE_THREADS,
        )
        if self.bucket == EMBEDDED_BUCKET:
            server = embedded_endpoint()
            client = session.create_client(
                "s3",
                endpoint_url=server.endpoint,
                region_name="us-east-1",
                aws_access_key_id=server.access_key,
                aws_secret_access_key=server.secret_key,
                config=config.merge(Config(proxies={})),  # the server is local, so ignore HTTP_PROXY
            )
        else:
            try:
                region = (
                    session.get_config_variable("region") or "us-east-1"
                )  # also covers a region that is set but empty
                client = session.create_client("s3", region_name=region, config=config)
            except ValueError as error:  # botocore's error for an invalid endpoint
                raise BucketError(
                    f"{self.uri}: {error}; check AWS_ENDPOINT_URL_S3 and AWS_ENDPOINT_URL"
                ) from error
        # The Expect header costs one more round trip per upload.
        client.meta.events.unregister("before-call.s3", add_expect_header)
        return client

    def _request(self, send: Callable[[Any], T]) -> T:
        """Send a request and read its response, with retries while they may help. Raises botocore's errors."""
        from botocore.exceptions import BotoCoreError, ClientError

        attempts = Attempts(self._retry_policy)
        while True:
            client = self._client()
            try:
                return send(client)
            except (BotoCoreError, ClientError) as error:
                self._wait_or_raise(error, attempts, client)

    def _wait_or_raise(self, error: Exception, attempts: Attempts, client: Any) -> None:
        from botocore.exceptions import ClientError

        if not may_pass(error) or attempts.are_over():
            if isinstance(error, ClientError):
                raise _RejectedError(error, repeated=attempts.failed > 0) from error
            raise error
        if isinstance(error, ClientError) and error_code(error) in EXPIRED:
            with self._connection.lock:
                if self._connection.client is client:  # another thread may have replaced it already
                    self._connection.client = None
        attempts.wait()

    @contextmanager
    def _errors(self, action: str, key: str = "") -> Iterator[None]:
        """Convert errors of botocore and the disk into BucketErrors."""
        from botocore.exceptions import BotoCoreError, FlexibleChecksumError

        where = f"cannot {action} {self.uri_of(key)}"
        try:
            yield
        except FlexibleChecksumError as error:
            raise DamagedError(
                key, f"{where}: it does not match the checksum that the server sent with it"
            ) from error
        except _RejectedError as rejected:
            raise explain_rejection(rejected.error, where, self.bucket) from rejected.error
        except RecursionError as error:  # botocore keeps asking for the region of the bucket
            raise BucketError(f"{where}: {ELSEWHERE}") from error
        except BotoCoreError as error:
            raise BucketError(f"{where}: {explain_failure(error)}") from error
        except OSError as error:
            if error.filename and str(error.filename) == os.environ.get(_TOKEN_VARIABLE):  # read by botocore
                raise BucketError(
                    f"{where}: cannot read the token file {_TOKEN_VARIABLE} ({error})"
                ) from error
            raise explain_os_error(error, action, self.uri_of(key)) from error


class StreamedUpload:
    """An upload of an object whose content arrives in parts of UPLOAD_PART_BYTES, the last one of any size.

    The object exists after `complete`. Several threads may call `put` at a time.
    """

    def __init__(self, store: S3Store, key: str):
        self._store, self._key = store, key
        self._where: dict[str, str] | None = None
        self._beginning = Lock()
        self._done: dict[int, dict[str, Any]] = {}

    def put(self, index: int, data: bytes | bytearray) -> None:
        """Upload a part; the first one has the index 0."""
        with self._store._errors("upload to", self._key):
            with self._beginning:
                if self._where is None:
                    self._where = self._store._begin_upload(self._key)
            self._done[index] = self._store._put_part(self._where, index, data)

    def complete(self, last: bytes) -> None:
        """Upload the last part, which may be empty, and create the object."""
        if self._where is not None and last:
            self.put(len(self._done), last)
        with self._store._errors("upload to", self._key):
            if self._where is None:
                self._store._put(self._key, last)
            else:
                parts = [part for _, part in sorted(self._done.items())]
                self._store._complete(self._where, parts, self._key)

    def abort(self) -> None:
        """Delete the parts. No `put` may be running: its part would stay in the bucket."""
        if self._where is not None:
            with self._store._errors("abort the upload to", self._key):
                self._store._abort(self._where["Key"], self._where["UploadId"])


@dataclass
class _Connection:
    """The client that stores of one bucket share; None until the first request and after expired credentials."""

    client: Any = None
    lock: Lock = field(default_factory=Lock)


class _RejectedError(Exception):
    """A final error response from the server; `repeated` if an earlier attempt may have been executed."""

    def __init__(self, error: Any, *, repeated: bool):
        super().__init__(str(error))
        self.error, self.code, self.repeated = error, error_code(error), repeated


@cache
def _service_descriptions() -> Any:
    # Loading takes a tenth of a second, and the result is the same for every client.
    from botocore.loaders import create_loader

    return create_loader()


def storage_options(uri: str) -> dict[str, Any]:
    """Return the `storage_options` for s3fs (fsspec.open, datasets, pandas) to open an `s3://` URI as this module does.

    s3fs uses the same settings and credentials, except for the embedded bucket, which has its own. Its cache of listings is off,
    because it would give the old size of a file that a run has written again.
    """
    options: dict[str, Any] = {"use_listings_cache": False}
    if split_s3(uri)[0] == EMBEDDED_BUCKET:
        server = embedded_endpoint()
        options |= {"endpoint_url": server.endpoint, "key": server.access_key, "secret": server.secret_key}
    return options


def split_s3(uri: str) -> tuple[str, str]:
    """Return (bucket, prefix without leading and trailing slashes)."""
    bucket, _, prefix = uri.partition("://")[2].partition("/")
    if "@" in bucket or ":" in bucket:  # do not print it: it may contain a password
        raise BucketError(
            "an s3:// URI contains only a bucket and a prefix; set keys with AWS_ACCESS_KEY_ID or AWS_PROFILE, "
            "and a server address with AWS_ENDPOINT_URL_S3"
        )
    if not re.fullmatch(r"[A-Za-z0-9._-]+", bucket):
        problem = "the bucket name is invalid" if bucket else "the bucket name is missing"
        raise BucketError(f"{uri}: {problem}; write s3://bucket/prefix")
    return bucket, prefix.strip("/")
