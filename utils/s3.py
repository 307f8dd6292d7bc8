"""A prefix of an S3 bucket as a store.

Every bucket goes through botocore's standard chain of credentials and settings (AWS_ENDPOINT_URL_S3, AWS_PROFILE,
AWS_CA_BUNDLE, AWS_REQUEST_CHECKSUM_CALCULATION, ...), except `s3://anneal`, which is the embedded bucket. So one process
may use both.

Requests are repeated here and not in botocore, whose retries share a budget that a busy storage uses up, and end where
the body of an answer begins. When storage says that credentials have expired, the chain is asked anew.
"""

import base64
import hashlib
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from utils.embedded_bucket import EMBEDDED_BUCKET, embedded_endpoint, state_directory
from utils.files import BucketError
from utils.s3_errors import (
    CHANGED,
    ELSEWHERE,
    EXPIRED,
    NO_S3,
    error_code,
    explain_failure,
    explain_refusal,
    may_pass,
)
from utils.store import (
    AlreadyExistsError,
    DamagedError,
    NotFoundError,
    StoredObject,
    explain_os_error,
    join_uri,
)
from utils.transfer import LARGE_THREADS, SMALL_BYTES, SMALL_THREADS, Take, download_all

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long storage may be silent, and how long an operation goes on after it has failed first, in seconds."""

    silence: float
    failing: float


WORK = Patience(silence=30, failing=120)  # a run outlives a storage that is down for a minute
CHECK = Patience(silence=5, failing=2)  # a check answers within some 10 seconds

_FIRST_DELAY_SECONDS, _LONGEST_DELAY_SECONDS = 0.1, 5.0
BLOCK_BYTES = 256 * 1024  # of a body at a time: larger ones leave the processor's cache, and cost it more
_UPLOAD_PART_BYTES, _MOST_UPLOAD_PARTS = 8 * 1024 * 1024, 10_000
_TOKEN_VARIABLE = "AWS_WEB_IDENTITY_TOKEN_FILE"
_DELETE_BATCH = 1000  # the most keys S3 takes in one request


class S3Store:
    """A prefix of a bucket as a store. Made anew in each process; the credentials are looked up there."""

    def __init__(self, uri: str, patience: Patience = WORK):
        self.bucket, self.prefix = split_s3(uri)
        self.uri = join_uri(f"s3://{self.bucket}", self.prefix)
        self._start = f"{self.prefix}/" if self.prefix else ""  # what every key in the bucket starts with
        self._patience = patience
        self._made_client: Any = None
        self._making_client = Lock()

    @property
    def identity(self) -> str:
        """See Store; the embedded bucket keeps it when it is started again elsewhere."""
        return str(state_directory()) if self.bucket == EMBEDDED_BUCKET else self._client().meta.endpoint_url

    def list(self, prefix: str = "") -> list[StoredObject]:
        """See Store."""
        found = [item for answer in self._listing(prefix) for item in self._objects(answer)]
        return sorted(found, key=lambda item: item.key)

    def directories(self) -> Sequence[str]:
        """See Store. A request tells a thousand of them, whatever lies below."""
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
        """See transfer.Source. A checksum of parts' checksums is no use here."""
        if self._client().meta.config.response_checksum_validation == "when_required":
            return None  # storage is not to be asked
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

    def read_if_exists(self, key: str) -> bytes | None:
        """See Store."""
        try:
            return self.read(key)
        except NotFoundError:
            return None

    def write(self, key: str, data: bytes, *, only_if_absent: bool = False) -> None:
        """See Store."""
        with self._errors("write", key):
            try:
                self._put(key, data, **({"IfNoneMatch": "*"} if only_if_absent else {}))
            except _RefusedError as refused:
                if not only_if_absent or refused.code not in ("PreconditionFailed", "412"):
                    raise
                # The answer to an attempt of ours may have been lost after it was stored.
                if not refused.repeated or self.read_if_exists(key) != data:
                    raise AlreadyExistsError(
                        f"cannot write {self.uri_of(key)}: it already exists"
                    ) from refused

    def download(self, key: str, path: Path) -> None:
        """See Store."""
        self.download_many({self.stat(key): path})

    def download_many(self, targets: Mapping[StoredObject, Path]) -> dict[str, str]:
        """See Store. Every range carries the listed ETag, so they cannot be of two versions."""
        with self._errors("download from"):
            return download_all(self, targets)

    def upload(self, path: Path, key: str) -> None:
        """See Store."""
        self.upload_many({key: path})

    def upload_many(self, sources: Mapping[str, Path]) -> None:
        """See Store. 16 parts are in memory at a time, of 8 MB each; larger ones where 10,000 would not do."""
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

    def delete(self, keys: Iterable[str]) -> None:
        """See Store."""
        remaining = list(keys)
        with self._errors("delete from"):
            if not self._sends_checksums:  # deleting many at once needs one
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
        """See transfer.Source. What breaks off is continued where it broke off."""
        from botocore.exceptions import BotoCoreError, ClientError

        end, attempts = start + length, _Attempts(self._patience)
        is_whole = start == 0 and length == item.size  # storage sends its checksum with a whole object only
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
        if "Name" not in answer:  # any XML, a web page too, reads like a listing of nothing
            raise BucketError(f"cannot list {self.uri_of(prefix)}: {NO_S3}")
        return answer

    def _objects(self, listing: Mapping[str, Any]) -> Iterator[StoredObject]:
        for item in listing.get("Contents", []):
            if not item["Key"].endswith("/"):  # what consoles make to show an empty folder
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
            except FlexibleChecksumError:  # damaged on its way, or where it lies
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
            elif size <= _UPLOAD_PART_BYTES:
                pool.submit(lambda: self._put(key, path.read_bytes())).result()
            else:
                self._upload_in_parts(path, size, key, pool)

    def _upload_in_parts(self, path: Path, size: int, key: str, pool: ThreadPoolExecutor) -> None:
        where = {"Bucket": self.bucket, "Key": self._start + key}
        checksummed = (
            {"ChecksumAlgorithm": "CRC64NVME", "ChecksumType": "FULL_OBJECT"} if self._sends_checksums else {}
        )
        upload = self._request(lambda client: client.create_multipart_upload(**where, **checksummed))
        where["UploadId"] = upload["UploadId"]
        length = max(_UPLOAD_PART_BYTES, -(-size // _MOST_UPLOAD_PARTS))
        tasks = [
            pool.submit(self._upload_part, path, where, index, length) for index in range(-(-size // length))
        ]
        try:
            self._complete(where, [task.result() for task in tasks], key)
        except BaseException:
            for task in tasks:
                task.cancel()
            wait(tasks)  # a part that arrives after the end would stay
            self._abort(where["Key"], where["UploadId"])
            raise

    def _upload_part(self, path: Path, where: Mapping[str, str], index: int, length: int) -> dict[str, Any]:
        with path.open("rb") as file:
            file.seek(index * length)
            data = file.read(length)
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
        except _RefusedError as refused:
            # The answer to an attempt of ours may have been lost after the upload was completed.
            digests = b"".join(bytes.fromhex(part["ETag"].strip('"')) for part in parts)
            etag = f'"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(parts)}"'
            if not (refused.repeated and refused.code == "NoSuchUpload" and self.stat(key).etag == etag):
                raise

    def _abort(self, full_key: str, upload_id: str) -> None:
        try:
            self._request(
                lambda client: client.abort_multipart_upload(
                    Bucket=self.bucket, Key=full_key, UploadId=upload_id
                )
            )
        except _RefusedError as refused:
            if refused.code != "NoSuchUpload":
                raise

    def _checksum_option(self, data: bytes) -> dict[str, str]:
        """Return what tells storage to refuse `data` when it arrives damaged, unless storage knows no such thing."""
        if not self._sends_checksums:
            return {}
        from awscrt.checksums import crc64nvme

        return {"ChecksumCRC64NVME": base64.b64encode(crc64nvme(data).to_bytes(8)).decode()}

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
        for refused in answer.get("Errors", []):
            if refused.get("Code") != "NoSuchKey":
                where = f"s3://{self.bucket}/{refused.get('Key')}"
                raise BucketError(f"cannot delete {where}: {refused.get('Code')} ({refused.get('Message')})")

    # --- Requests ------------------------------------------------------------------------------------------------

    def _client(self) -> Any:
        with self._making_client:
            if self._made_client is None:
                self._made_client = self._make_client()
            return self._made_client

    def _make_client(self) -> Any:
        # botocore takes long to import: only those who use a bucket pay for it.
        from botocore.config import Config
        from botocore.handlers import add_expect_header
        from botocore.session import Session

        # The embedded bucket has keys of its own, and no profile of the user's is looked for.
        of_nobody = {"profile": (None, None, None, None)}
        session = Session(session_vars=of_nobody if self.bucket == EMBEDDED_BUCKET else None)
        session.register_component("data_loader", _service_descriptions())

        config = Config(
            retries={"mode": "standard", "total_max_attempts": 1},
            connect_timeout=min(10, self._patience.silence),
            read_timeout=self._patience.silence,
            parameter_validation=False,  # calls are ours, and a tenth of what a small object costs goes into it
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
                config=config.merge(Config(proxies={})),  # it is on this machine, whatever HTTP_PROXY says
            )
        else:
            try:
                region = (
                    session.get_config_variable("region") or "us-east-1"
                )  # also where it is set, and empty
                client = session.create_client("s3", region_name=region, config=config)
            except ValueError as error:  # botocore's word for it
                raise BucketError(
                    f"{self.uri}: {error}; check AWS_ENDPOINT_URL_S3 and AWS_ENDPOINT_URL"
                ) from error
        # A round trip more for every object, to ask whether its body may be sent.
        client.meta.events.unregister("before-call.s3", add_expect_header)
        return client

    def _request(self, send: Callable[[Any], T]) -> T:
        """Send a request and read its answer, again and again while it may help. Raises what botocore does."""
        from botocore.exceptions import BotoCoreError, ClientError

        attempts = _Attempts(self._patience)
        while True:
            client = self._client()
            try:
                return send(client)
            except (BotoCoreError, ClientError) as error:
                self._wait_or_raise(error, attempts, client)

    def _wait_or_raise(self, error: Exception, attempts: "_Attempts", client: Any) -> None:
        from botocore.exceptions import ClientError

        if not may_pass(error) or attempts.are_over():
            if isinstance(error, ClientError):
                raise _RefusedError(error, repeated=attempts.failed > 0) from error
            raise error
        if isinstance(error, ClientError) and error_code(error) in EXPIRED:
            with self._making_client:
                if self._made_client is client:  # others have made a new one meanwhile
                    self._made_client = None
        attempts.wait()

    @contextmanager
    def _errors(self, action: str, key: str = "") -> Iterator[None]:
        """Turn what botocore and the disk raise into BucketErrors."""
        from botocore.exceptions import BotoCoreError, FlexibleChecksumError

        where = f"cannot {action} {self.uri_of(key)}"
        try:
            yield
        except FlexibleChecksumError as error:
            raise DamagedError(
                key, f"{where}: it does not match the checksum that storage sent with it"
            ) from error
        except _RefusedError as refused:
            raise explain_refusal(refused.error, where, self.bucket) from refused.error
        except RecursionError as error:  # botocore asks again and again in which region the bucket is
            raise BucketError(f"{where}: {ELSEWHERE}") from error
        except BotoCoreError as error:
            raise BucketError(f"{where}: {explain_failure(error)}") from error
        except OSError as error:
            if error.filename and str(error.filename) == os.environ.get(_TOKEN_VARIABLE):  # botocore reads it
                raise BucketError(
                    f"{where}: the token that {_TOKEN_VARIABLE} names cannot be read ({error})"
                ) from error
            raise explain_os_error(error, action, self.uri_of(key)) from error


class _Attempts:
    """The failures of one operation, and how long to wait after each."""

    def __init__(self, patience: Patience):
        self.failed = 0
        self._patience = patience
        self._until = 0.0
        self._delay = _FIRST_DELAY_SECONDS

    def are_over(self) -> bool:
        return self.failed > 0 and time.monotonic() >= self._until

    def progressed(self) -> None:
        """Something has arrived: patience begins anew."""
        self.failed, self._delay = 0, _FIRST_DELAY_SECONDS

    def wait(self) -> None:
        """Wait longer each time; at random, so that those who were refused together do not come back together."""
        if not self.failed:
            self._until = time.monotonic() + self._patience.failing
        self.failed += 1
        time.sleep(self._delay * random.uniform(0.5, 1))
        self._delay = min(2 * self._delay, _LONGEST_DELAY_SECONDS)


class _RefusedError(Exception):
    """Storage answered with a refusal that stands; `repeated` when an earlier attempt may have been carried out."""

    def __init__(self, error: Any, *, repeated: bool):
        super().__init__(str(error))
        self.error, self.code, self.repeated = error, error_code(error), repeated


@cache
def _service_descriptions() -> Any:
    # A tenth of a second to read, and the same for every client.
    from botocore.loaders import create_loader

    return create_loader()


def storage_options(uri: str) -> dict[str, str]:
    """Return what s3fs needs (fsspec.open, datasets, pandas: `storage_options=`) to open an `s3://` URI as we do.

    Nothing, as a rule: it goes through the same chain of settings and credentials. The embedded bucket has its own.
    """
    if split_s3(uri)[0] != EMBEDDED_BUCKET:
        return {}
    server = embedded_endpoint()
    return {"endpoint_url": server.endpoint, "key": server.access_key, "secret": server.secret_key}


def split_s3(uri: str) -> tuple[str, str]:
    """Return (bucket, prefix without slashes around it). Raises BucketError."""
    bucket, _, prefix = uri.partition("://")[2].partition("/")
    if "@" in bucket or ":" in bucket:  # do not repeat it: it may be a password
        raise BucketError(
            "an s3:// URI holds a bucket and a prefix only; keys belong into AWS_ACCESS_KEY_ID or AWS_PROFILE, "
            "a server's address into AWS_ENDPOINT_URL_S3"
        )
    if not re.fullmatch(r"[A-Za-z0-9._-]+", bucket):
        problem = "no bucket is called that" if bucket else "the bucket's name is missing"
        raise BucketError(f"{uri}: {problem}; write s3://bucket/prefix")
    return bucket, prefix.strip("/")
