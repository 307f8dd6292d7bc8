"""Faults of networks and stores in front of a real S3 server: no partial or damaged data is accepted."""

import os
import secrets
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pytest

from tests.support.bucket_proxy import BucketProxy, Fault, bucket_proxy
from tests.support.own_buckets import set_up_own_bucket
from utils.files import checksum_bytes
from utils.storage.bucket import (
    AlreadyExistsError,
    BucketError,
    DamagedError,
    StoredObject,
    UnsafeKeyError,
    open_store,
    sync_to_node,
)
from utils.storage.embedded_bucket import EmbeddedBucket
from utils.storage.retries import RetryPolicy
from utils.storage.s3 import S3Store

pytestmark = [pytest.mark.timeout(120), pytest.mark.slow]
MB = 1024 * 1024
BUCKET = "faults"
SHORT_TIMEOUTS = RetryPolicy(silence=1, failing=20)
PATIENT = RetryPolicy(silence=30, failing=20)
"""For faults other than silence: a busy machine may be silent for seconds, and a test counts the requests."""


@pytest.fixture
def own_bucket(bucket: EmbeddedBucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Create a bucket that is accessed through the AWS variables, as a user's own bucket."""
    set_up_own_bucket(monkeypatch, bucket, BUCKET)


class StartProxy(Protocol):
    def __call__(self, *faults: Fault) -> BucketProxy: ...


@pytest.fixture
def start_proxy(
    bucket: EmbeddedBucket, own_bucket: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[StartProxy]:
    """Return a function that starts a proxy with faults; stores that are opened afterwards use it."""
    opened: list[AbstractContextManager[BucketProxy]] = []

    def start(*faults: Fault) -> BucketProxy:
        opened.append(bucket_proxy(bucket.endpoint, *faults))
        proxy = opened[-1].__enter__()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        return proxy

    yield start
    for proxy in opened:
        proxy.__exit__(None, None, None)


@pytest.fixture
def uri(own_bucket: None) -> str:
    """Write a large object (4 ranges) and two small ones, and return the URI of their prefix."""
    uri = f"s3://{BUCKET}/{secrets.token_hex(6)}"
    store = open_store(uri)
    store.write("small-0", b"a" * 1000)
    store.write("small-1", b"b" * 1000)
    store.write("large", LARGE)
    return uri


LARGE = os.urandom(4 * 8 * MB)


def download(uri: str, directory: Path, retry_policy: RetryPolicy = SHORT_TIMEOUTS) -> dict[str, bytes]:
    store = S3Store(uri, retry_policy)
    store.download_many({item: directory / item.key for item in store.list()})
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def is_complete(files: dict[str, bytes]) -> bool:
    return files == {"large": LARGE, "small-0": b"a" * 1000, "small-1": b"b" * 1000}


@pytest.mark.parametrize("status", [500, 503])
def test_errors_on_half_of_all_requests_are_retried(
    uri: str, start_proxy: StartProxy, tmp_path: Path, status: int
):
    faults = [Fault("reject", method, share=0.5, status=status) for method in ("GET", "HEAD", "PUT", "POST")]
    start_proxy(*faults)
    assert is_complete(download(uri, tmp_path / "down"))
    store = S3Store(f"{uri}-up", SHORT_TIMEOUTS)
    store.upload_many({path.name: path for path in (tmp_path / "down").iterdir()})
    assert is_complete(download(f"{uri}-up", tmp_path / "again"))
    for number in range(16):
        store.write(f"more/{number}", b"")  # enough requests that some of them fail
    assert faults[0].times_injected > 3 and faults[2].times_injected > 1


@pytest.mark.parametrize("kind", ["reset", "truncate", "stall"])
def test_interrupted_download_continues_where_it_stopped(
    uri: str, start_proxy: StartProxy, tmp_path: Path, kind: str
):
    fault = Fault(kind, times=3)  # pyright: ignore[reportArgumentType]
    proxy = start_proxy(fault)
    assert is_complete(download(uri, tmp_path / "down", SHORT_TIMEOUTS if kind == "stall" else PATIENT))
    assert fault.times_injected == 3
    if kind == "truncate":  # bytes that were sent have arrived, and are not requested again
        assert proxy.body_bytes(BUCKET) == len(LARGE) + 2000


@pytest.mark.parametrize("kind", ["reset", "truncate", "stall"])
def test_download_that_is_always_interrupted_raises_an_error(
    uri: str, start_proxy: StartProxy, tmp_path: Path, kind: str
):
    start_proxy(Fault(kind, key="large", at=0))  # pyright: ignore[reportArgumentType]
    start = time.monotonic()
    with pytest.raises(BucketError, match="large"):
        download(uri, tmp_path / "down", RetryPolicy(silence=1, failing=1))
    assert time.monotonic() - start < 20
    assert not list((tmp_path / "down").glob("*large*"))


@pytest.mark.parametrize("kind", ["reset", "truncate", "stall"])
def test_interrupted_upload_is_retried(uri: str, start_proxy: StartProxy, tmp_path: Path, kind: str):
    (tmp_path / "file").write_bytes(LARGE)
    fault = Fault(kind, "PUT", key="up", times=3)  # pyright: ignore[reportArgumentType]
    start_proxy(fault)
    store = S3Store(uri, SHORT_TIMEOUTS)
    store.upload(tmp_path / "file", "up")
    assert fault.times_injected == 3
    assert store.read("up") == LARGE


@pytest.mark.parametrize("key", ["large", "small-1"])
@pytest.mark.parametrize("kind", ["flip", "swap"])
def test_damaged_body_is_downloaded_again_before_it_raises_an_error(
    uri: str, start_proxy: StartProxy, tmp_path: Path, kind: str, key: str
):
    once = Fault(kind, key=key, times=1, content=bytes(len(LARGE)))  # pyright: ignore[reportArgumentType]
    always = replace(once, times=None)
    proxy = start_proxy(once)
    assert is_complete(download(uri, tmp_path / "down"))
    assert once.times_injected == 1
    proxy.faults[:] = [always]
    with pytest.raises(DamagedError, match=key):
        download(uri, tmp_path / "never")
    assert not list((tmp_path / "never").glob(f"*{key}*"))
    if key == "small-1":
        with pytest.raises(DamagedError, match=key):
            S3Store(uri, SHORT_TIMEOUTS).read(key)


def test_continued_download_of_a_small_object_is_verified(uri: str, start_proxy: StartProxy, tmp_path: Path):
    """Storage sends a checksum with a complete body only, not with the rest of an interrupted one."""
    flip, truncate = Fault("flip", key="small-1", header="range"), Fault("truncate", key="small-1")
    start_proxy(flip, truncate)
    with pytest.raises(DamagedError, match="small-1"):
        download(uri, tmp_path / "down", PATIENT)
    assert flip.times_injected == truncate.times_injected == 2
    assert not list((tmp_path / "down").glob("*small-1*"))


@pytest.mark.parametrize("key", ["large", "small-1"])
def test_replaced_object_fails_the_known_checksum(uri: str, tmp_path: Path, key: str):
    store = open_store(uri)
    known = {item.key: checksum_bytes(store.read(item.key)) for item in store.list()}
    content = store.read(key)
    store.write(key, content[:-1] + bytes([content[-1] ^ 1]))  # matches storage's own checksum
    listed = [replace(item, checksum=known[item.key]) for item in store.list()]
    with pytest.raises(DamagedError, match=f"{key}.*{known[key]}"):
        store.download_many({item: tmp_path / "down" / item.key for item in listed})
    assert not list((tmp_path / "down").glob(f"*{key}*"))


@pytest.mark.parametrize("algorithm", ["CRC32", "CRC32C"])
def test_download_is_compared_with_the_stored_checksum(
    uri: str, start_proxy: StartProxy, tmp_path: Path, algorithm: str
):
    client = S3Store(uri)._client()
    key = f"{uri.removeprefix(f's3://{BUCKET}/')}/others"
    client.put_object(Bucket=BUCKET, Key=key, Body=LARGE, ChecksumAlgorithm=algorithm)
    start_proxy(Fault("flip", key="others", at=0))
    store = S3Store(uri, SHORT_TIMEOUTS)
    with pytest.raises(DamagedError, match=f"{algorithm.lower()}:.*{algorithm.lower()}:"):
        store.download("others", tmp_path / "others")
    assert not (tmp_path / "others").exists()


def test_storage_rejects_a_damaged_upload(uri: str, start_proxy: StartProxy, tmp_path: Path):
    (tmp_path / "file").write_bytes(LARGE)
    start_proxy(Fault("flip", "PUT", key="up"))
    store = S3Store(uri, SHORT_TIMEOUTS)
    for write in (lambda: store.upload(tmp_path / "file", "up"), lambda: store.write("up", b"manifest")):
        with pytest.raises(BucketError, match="up"):
            write()
    assert store.read_if_exists("up") is None


def test_retry_after_a_lost_response_recognizes_its_own_write(
    uri: str, start_proxy: StartProxy, tmp_path: Path
):
    (tmp_path / "file").write_bytes(LARGE)
    lost_responses = [Fault("lose", "PUT", key="manifest", times=1), Fault("lose", "POST", key="up", times=2)]
    start_proxy(*lost_responses)
    store = S3Store(uri, SHORT_TIMEOUTS)
    store.write("manifest", b"ours", only_if_absent=True)
    store.upload(tmp_path / "file", "up")
    assert [fault.times_injected for fault in lost_responses] == [1, 2]
    assert store.read("manifest") == b"ours"
    assert store.read("up") == LARGE
    with pytest.raises(AlreadyExistsError):
        store.write("manifest", b"theirs", only_if_absent=True)


def test_expired_credentials_are_reloaded(
    uri: str, start_proxy: StartProxy, tmp_path: Path, bucket: EmbeddedBucket, monkeypatch: pytest.MonkeyPatch
):
    start_proxy().expire("OLDKEY")
    profile = tmp_path / "credentials"
    content = f"[default]\naws_access_key_id={{}}\naws_secret_access_key={bucket.secret_key}\n"
    profile.write_text(content.format("OLDKEY"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profile))
    with pytest.raises(BucketError, match=r"credentials.*expired"):
        S3Store(uri, RetryPolicy(silence=30, failing=1)).list()
    renewal = threading.Timer(1, lambda: profile.write_text(content.format(bucket.access_key)))
    renewal.start()
    assert is_complete(download(uri, tmp_path / "down"))


@pytest.mark.parametrize(
    "key", ["../outside", "/absolute", "a/../../outside", "back\\slash", "nul\0", "a//b", ".", ""]
)
def test_unsafe_keys_raise_an_error_and_write_nothing(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
):
    # The test server rejects some of these keys, but a hostile server could list them.
    listed = [*S3Store(uri).list(), StoredObject(key, 1, '"1"')]
    monkeypatch.setattr(S3Store, "list", lambda store: listed)
    with pytest.raises(UnsafeKeyError):
        sync_to_node(uri, tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["Small-0", "small-0/below"])
def test_clashing_keys_raise_an_error_and_write_nothing(uri: str, tmp_path: Path, key: str):
    open_store(uri).write("deep/x", b"1")
    open_store(f"{uri}").write(key, b"2")
    with pytest.raises(UnsafeKeyError, match="small-0"):
        sync_to_node(uri, tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_download_replaces_a_symlink_and_does_not_follow_it(uri: str, tmp_path: Path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"untouched")
    (tmp_path / "down").mkdir()
    (tmp_path / "down" / "small-0").symlink_to(outside)
    assert is_complete(download(uri, tmp_path / "down"))
    assert outside.read_bytes() == b"untouched"
    assert not (tmp_path / "down" / "small-0").is_symlink()


def test_full_disk_raises_an_error_and_changes_no_file(uri: str, tmp_path: Path):
    store = open_store(uri)
    before = sync_to_node(f"{uri}/small-0", tmp_path / "cache")
    script = textwrap.dedent(
        """
        import resource, sys
        from pathlib import Path
        from utils.storage.bucket import sync_to_node, BucketError
        import boto3  # before the limit, because Python may write bytecode
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        try:
            sync_to_node(sys.argv[1], Path(sys.argv[2]))
        except BucketError as error:
            print(error)
        """
    )
    output = subprocess.run(
        [sys.executable, "-c", script, uri, str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "disk" in output and uri in output
    assert before.read_bytes() == store.read("small-0")
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} >= {"small-0"}
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name or path.name == "large"]


def test_abort_stale_uploads_removes_only_uploads_below_its_prefix(uri: str, tmp_path: Path):
    (tmp_path / "file").write_bytes(LARGE)
    store = S3Store(uri)
    client = store._client()
    prefix = uri.removeprefix(f"s3://{BUCKET}/")
    for key in (f"{prefix}/dead/one", f"{prefix}/dead/two", f"{prefix}-other/alive"):
        upload = client.create_multipart_upload(Bucket=BUCKET, Key=key)
        client.upload_part(
            Bucket=BUCKET, Key=key, UploadId=upload["UploadId"], PartNumber=1, Body=LARGE[: 8 * MB]
        )
    assert store.abort_stale_uploads() == 2
    assert store.abort_stale_uploads() == 0
    assert S3Store(f"{uri}-other").abort_stale_uploads("alive") == 1


def test_failed_upload_leaves_no_unfinished_upload(uri: str, start_proxy: StartProxy, tmp_path: Path):
    (tmp_path / "file").write_bytes(LARGE)
    start_proxy(Fault("reject", "PUT", key="up", status=403, code="AccessDenied"))
    store = S3Store(uri, SHORT_TIMEOUTS)
    with pytest.raises(BucketError, match="access denied"):
        store.upload(tmp_path / "file", "up")
    assert store.abort_stale_uploads() == 0
