"""What networks and stores do wrong, one at a time, between a real S3 server and us: nothing half, nothing wrong is accepted."""

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
from tests.support.own_buckets import reach_as_a_user
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
from utils.storage.s3 import RetryPolicy, S3Store

pytestmark = pytest.mark.timeout(120)
MB = 1024 * 1024
BUCKET = "faults"
IMPATIENT = RetryPolicy(silence=1, failing=20)


@pytest.fixture
def keys(bucket: EmbeddedBucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket of our own, reached as a user's is."""
    reach_as_a_user(monkeypatch, bucket, BUCKET)


class Behind(Protocol):
    def __call__(self, *faults: Fault) -> BucketProxy: ...


@pytest.fixture
def behind(bucket: EmbeddedBucket, keys: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Behind]:
    """Puts a proxy with faults between the server and everybody who opens a store from then on."""
    opened: list[AbstractContextManager[BucketProxy]] = []

    def behind(*faults: Fault) -> BucketProxy:
        opened.append(bucket_proxy(bucket.endpoint, *faults))
        proxy = opened[-1].__enter__()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        return proxy

    yield behind
    for proxy in opened:
        proxy.__exit__(None, None, None)


@pytest.fixture
def uri(keys: None) -> str:
    """A prefix with a large object (4 ranges) and some small ones."""
    uri = f"s3://{BUCKET}/{secrets.token_hex(6)}"
    store = open_store(uri)
    store.write("small-0", b"a" * 1000)
    store.write("small-1", b"b" * 1000)
    store.write("large", LARGE)
    return uri


LARGE = os.urandom(4 * 8 * MB)


def download(uri: str, directory: Path, patience: RetryPolicy = IMPATIENT) -> dict[str, bytes]:
    store = S3Store(uri, patience)
    store.download_many({item: directory / item.key for item in store.list()})
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def is_whole(files: dict[str, bytes]) -> bool:
    return files == {"large": LARGE, "small-0": b"a" * 1000, "small-1": b"b" * 1000}


@pytest.mark.parametrize("status", [500, 503])
def test_errors_of_half_of_all_requests_are_retried(uri: str, behind: Behind, tmp_path: Path, status: int):
    faults = [Fault("refuse", method, share=0.5, status=status) for method in ("GET", "HEAD", "PUT", "POST")]
    behind(*faults)
    assert is_whole(download(uri, tmp_path / "down"))
    store = S3Store(f"{uri}-up", IMPATIENT)
    store.upload_many({path.name: path for path in (tmp_path / "down").iterdir()})
    assert is_whole(download(f"{uri}-up", tmp_path / "again"))
    for number in range(16):
        store.write(f"more/{number}", b"")  # so many that chance cannot spare all of them
    assert faults[0].struck > 3 and faults[2].struck > 1


@pytest.mark.parametrize("kind", ["reset", "truncate", "stall"])
def test_a_body_that_breaks_off_is_continued(uri: str, behind: Behind, tmp_path: Path, kind: str):
    fault = Fault(kind, times=3)  # pyright: ignore[reportArgumentType]
    proxy = behind(fault)
    assert is_whole(download(uri, tmp_path / "down"))
    assert fault.struck == 3
    if kind == "truncate":  # all that was sent has arrived, and is not asked for again
        assert proxy.body_bytes(BUCKET) == len(LARGE) + 2000


@pytest.mark.parametrize("kind", ["reset", "truncate", "stall"])
def test_storage_that_always_breaks_off_is_given_up(uri: str, behind: Behind, tmp_path: Path, kind: str):
    behind(Fault(kind, key="large", at=0))  # pyright: ignore[reportArgumentType]
    began = time.monotonic()
    with pytest.raises(BucketError, match="large"):
        download(uri, tmp_path / "down", RetryPolicy(silence=1, failing=1))
    assert time.monotonic() - began < 20
    assert not list((tmp_path / "down").glob("*large*"))


@pytest.mark.parametrize("kind", ["reset", "truncate", "stall"])
def test_an_upload_that_breaks_off_is_repeated(uri: str, behind: Behind, tmp_path: Path, kind: str):
    (tmp_path / "file").write_bytes(LARGE)
    fault = Fault(kind, "PUT", key="up", times=3)  # pyright: ignore[reportArgumentType]
    behind(fault)
    store = S3Store(uri, IMPATIENT)
    store.upload(tmp_path / "file", "up")
    assert fault.struck == 3
    assert store.read("up") == LARGE


@pytest.mark.parametrize("key", ["large", "small-1"])
@pytest.mark.parametrize("kind", ["flip", "swap"])
def test_a_damaged_body_is_read_again_or_raises_an_error(
    uri: str, behind: Behind, tmp_path: Path, kind: str, key: str
):
    once = Fault(kind, key=key, times=1, content=bytes(len(LARGE)))  # pyright: ignore[reportArgumentType]
    always = replace(once, times=None)
    proxy = behind(once)
    assert is_whole(download(uri, tmp_path / "down"))
    assert once.struck == 1
    proxy.faults[:] = [always]
    with pytest.raises(DamagedError, match=key):
        download(uri, tmp_path / "never")
    assert not list((tmp_path / "never").glob(f"*{key}*"))
    if key == "small-1":
        with pytest.raises(DamagedError, match=key):
            S3Store(uri, IMPATIENT).read(key)


def test_the_rest_of_a_small_body_is_compared_as_well(uri: str, behind: Behind, tmp_path: Path):
    """Storage sends its checksum with a whole body only; the rest of one that broke off comes without."""
    flip, truncate = Fault("flip", key="small-1", header="range"), Fault("truncate", key="small-1")
    behind(flip, truncate)
    with pytest.raises(DamagedError, match="small-1"):
        download(uri, tmp_path / "down")
    assert flip.struck == truncate.struck == 2
    assert not list((tmp_path / "down").glob("*small-1*"))


@pytest.mark.parametrize("key", ["large", "small-1"])
def test_a_replaced_object_fails_the_known_checksum(uri: str, tmp_path: Path, key: str):
    store = open_store(uri)
    known = {item.key: checksum_bytes(store.read(item.key)) for item in store.list()}
    content = store.read(key)
    store.write(key, content[:-1] + bytes([content[-1] ^ 1]))  # storage's own checksum is right
    listed = [replace(item, checksum=known[item.key]) for item in store.list()]
    with pytest.raises(DamagedError, match=f"{key}.*{known[key]}"):
        store.download_many({item: tmp_path / "down" / item.key for item in listed})
    assert not list((tmp_path / "down").glob(f"*{key}*"))


@pytest.mark.parametrize("algorithm", ["CRC32", "CRC32C"])
def test_a_stored_checksum_is_compared_with_the_download(
    uri: str, behind: Behind, tmp_path: Path, algorithm: str
):
    client = S3Store(uri)._client()
    key = f"{uri.removeprefix(f's3://{BUCKET}/')}/others"
    client.put_object(Bucket=BUCKET, Key=key, Body=LARGE, ChecksumAlgorithm=algorithm)
    behind(Fault("flip", key="others", at=0))
    store = S3Store(uri, IMPATIENT)
    with pytest.raises(DamagedError, match=f"{algorithm.lower()}:.*{algorithm.lower()}:"):
        store.download("others", tmp_path / "others")
    assert not (tmp_path / "others").exists()


def test_a_damaged_upload_is_rejected_by_storage(uri: str, behind: Behind, tmp_path: Path):
    (tmp_path / "file").write_bytes(LARGE)
    behind(Fault("flip", "PUT", key="up"))
    store = S3Store(uri, IMPATIENT)
    for write in (lambda: store.upload(tmp_path / "file", "up"), lambda: store.write("up", b"manifest")):
        with pytest.raises(BucketError, match="up"):
            write()
    assert store.read_if_exists("up") is None


def test_a_write_whose_answer_is_lost_is_known_as_our_own(uri: str, behind: Behind, tmp_path: Path):
    (tmp_path / "file").write_bytes(LARGE)
    lost = [Fault("lose", "PUT", key="manifest", times=1), Fault("lose", "POST", key="up", times=2)]
    behind(*lost)
    store = S3Store(uri, IMPATIENT)
    store.write("manifest", b"ours", only_if_absent=True)
    store.upload(tmp_path / "file", "up")
    assert [fault.struck for fault in lost] == [1, 2]
    assert store.read("manifest") == b"ours"
    assert store.read("up") == LARGE
    with pytest.raises(AlreadyExistsError):
        store.write("manifest", b"another's", only_if_absent=True)


def test_expired_credentials_are_read_again(
    uri: str, behind: Behind, tmp_path: Path, bucket: EmbeddedBucket, monkeypatch: pytest.MonkeyPatch
):
    behind().expire("OLDKEY")
    profile = tmp_path / "credentials"
    content = f"[default]\naws_access_key_id={{}}\naws_secret_access_key={bucket.secret_key}\n"
    profile.write_text(content.format("OLDKEY"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profile))
    with pytest.raises(BucketError, match=r"credentials.*expired"):
        S3Store(uri, RetryPolicy(silence=1, failing=1)).list()
    renewed = threading.Timer(1, lambda: profile.write_text(content.format(bucket.access_key)))
    renewed.start()
    assert is_whole(download(uri, tmp_path / "down"))


@pytest.mark.parametrize(
    "key", ["../outside", "/absolute", "a/../../outside", "back\\slash", "nul\0", "a//b", ".", ""]
)
def test_keys_that_escape_write_nothing(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str):
    # The test server refuses to store some of them, a hostile one need not: the listing is where they come from.
    listed = [*S3Store(uri).list(), StoredObject(key, 1, '"1"')]
    monkeypatch.setattr(S3Store, "list", lambda store: listed)
    with pytest.raises(UnsafeKeyError):
        sync_to_node(uri, tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["Small-0", "small-0/below"])
def test_keys_that_would_be_one_file_write_nothing(uri: str, tmp_path: Path, key: str):
    open_store(uri).write("deep/x", b"1")
    open_store(f"{uri}").write(key, b"2")
    with pytest.raises(UnsafeKeyError, match="small-0"):
        sync_to_node(uri, tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_the_place_of_an_object_is_replaced_not_followed(uri: str, tmp_path: Path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"untouched")
    (tmp_path / "down").mkdir()
    (tmp_path / "down" / "small-0").symlink_to(outside)
    assert is_whole(download(uri, tmp_path / "down"))
    assert outside.read_bytes() == b"untouched"
    assert not (tmp_path / "down" / "small-0").is_symlink()


def test_a_full_disk_raises_an_error_and_changes_no_file(uri: str, tmp_path: Path):
    store = open_store(uri)
    before = sync_to_node(f"{uri}/small-0", tmp_path / "cache")
    limited = textwrap.dedent(
        """
        import resource, sys
        from pathlib import Path
        from utils.storage.bucket import sync_to_node, BucketError
        import boto3  # before the limit: bytecode may be written
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        try:
            sync_to_node(sys.argv[1], Path(sys.argv[2]))
        except BucketError as error:
            print(error)
        """
    )
    said = subprocess.run(
        [sys.executable, "-c", limited, uri, str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "disk" in said and uri in said
    assert before.read_bytes() == store.read("small-0")
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} >= {"small-0"}
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name or path.name == "large"]


def test_unfinished_uploads_of_the_dead_are_removed(uri: str, tmp_path: Path):
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


def test_a_failed_upload_leaves_nothing_unfinished(uri: str, behind: Behind, tmp_path: Path):
    (tmp_path / "file").write_bytes(LARGE)
    behind(Fault("refuse", "PUT", key="up", status=403, code="AccessDenied"))
    store = S3Store(uri, IMPATIENT)
    with pytest.raises(BucketError, match="access denied"):
        store.upload(tmp_path / "file", "up")
    assert store.abort_stale_uploads() == 0
