"""Compatibility with other S3 stores, IAM policies, custom certificates and s3fs."""

import json
import os
import secrets
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec
import pandas
import pytest

from tests.support.bucket_proxy import Fault, bucket_proxy
from tests.support.iam import is_allowed, needed
from tests.support.own_buckets import set_up_own_bucket
from utils.storage.bucket import (
    BucketError,
    check_readable,
    check_writable,
    fetch_file,
    open_store,
    storage_options,
    sync_to_node,
)
from utils.storage.embedded_bucket import EmbeddedBucket

pytestmark = [pytest.mark.timeout(60), pytest.mark.slow]
MB = 1024 * 1024
BUCKET = "my-bucket"
POLICY = Path(__file__).resolve().parents[4] / "configs" / "iam_policy.json"


@pytest.fixture
def own_bucket(bucket: EmbeddedBucket, monkeypatch: pytest.MonkeyPatch) -> str:
    """Create a bucket that is accessed through the AWS variables, as a user's own bucket, and return its URI."""
    return set_up_own_bucket(monkeypatch, bucket, BUCKET)


def test_when_required_checksums_work_with_stores_that_reject_checksum_headers(
    own_bucket: str, bucket: EmbeddedBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rejections = [
        Fault("reject", method, header=header, status=400, code="InvalidArgument")
        for method in ("GET", "HEAD", "PUT", "POST")
        for header in ("x-amz-checksum-", "x-amz-sdk-checksum-", "x-amz-trailer")
    ]
    (tmp_path / "large").write_bytes(os.urandom(20 * MB))
    uri = f"{own_bucket}/{secrets.token_hex(4)}"
    with bucket_proxy(bucket.endpoint, *rejections) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        with pytest.raises(BucketError, match="InvalidArgument"):
            open_store(uri).write("small", b"1")
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
        store = open_store(uri)
        store.write("small", b"1", only_if_absent=True)
        store.upload(tmp_path / "large", "large")
        copy = sync_to_node(uri, tmp_path / "cache")
        assert (copy / "large").read_bytes() == (tmp_path / "large").read_bytes()
        store.delete(["small", "large", "none"])
        assert store.list() == []


def test_iam_policy_allows_exactly_the_required_actions(
    own_bucket: str, bucket: EmbeddedBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "large").write_bytes(os.urandom(20 * MB))
    for key in ("models/tiny/weights", "data/train.jsonl"):
        open_store(own_bucket).upload(tmp_path / "large", key)
    denied = Fault("reject", "PUT", key="broken", status=403, code="AccessDenied")
    with bucket_proxy(bucket.endpoint, denied) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        check_readable(f"{own_bucket}/models/tiny")
        check_readable(f"{own_bucket}/data/train.jsonl")
        check_writable(f"{own_bucket}/runs")
        sync_to_node(f"{own_bucket}/models/tiny", tmp_path / "cache")
        fetch_file(f"{own_bucket}/data/train.jsonl", tmp_path / "cache")
        run = open_store(f"{own_bucket}/runs/one")
        run.abort_stale_uploads()
        run.write("lease", b"1", only_if_absent=True)
        run.upload(tmp_path / "large", "checkpoints/weights")
        with pytest.raises(BucketError, match="access denied"):
            run.upload(tmp_path / "large", "broken")
        assert run.age("lease") is not None
        run.download_many({item: tmp_path / "restored" / item.key for item in run.list()})
        run.delete([item.key for item in run.list()])
        calls = needed(proxy.requests)
    policy = json.loads(POLICY.read_text().replace("MY-BUCKET", BUCKET))
    assert {call for call in calls if not is_allowed(policy, *call)} == set()
    allowed = {action for statement in policy["Statement"] for action in statement["Action"]}
    assert {action for action, _ in calls} == allowed


@pytest.mark.parametrize("own", [True, False])
def test_s3fs_opens_objects_with_our_storage_options(own: bool, own_bucket: str, bucket_uri: str):
    uri = own_bucket if own else bucket_uri
    open_store(uri).write("metrics.jsonl", b"{}\n")
    with fsspec.open(f"{uri}/metrics.jsonl", **storage_options(uri)) as file:
        assert file.read() == b"{}\n"  # pyright: ignore[reportAttributeAccessIssue]


def test_file_that_has_grown_since_a_listing_is_read_completely(bucket_uri: str):
    """As metrics.jsonl of a live run: s3fs would read as many bytes as its cached listing says."""
    store = open_store(bucket_uri)
    store.write("metrics.jsonl", b'{"step": 1}\n')
    options = storage_options(bucket_uri)
    files = fsspec.filesystem("s3", **options)
    assert len(files.ls(bucket_uri)) == 1
    store.write("metrics.jsonl", b'{"step": 1}\n{"step": 2}\n')
    read = pandas.read_json(f"{bucket_uri}/metrics.jsonl", lines=True, storage_options=options)
    assert list(read["step"]) == [1, 2]


def test_custom_certificate_works_with_aws_ca_bundle(
    own_bucket: str, bucket: EmbeddedBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "large").write_bytes(os.urandom(20 * MB))
    with tls_proxy(bucket.endpoint, tmp_path) as (endpoint, certificate):
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        with pytest.raises(BucketError, match="AWS_CA_BUNDLE"):
            check_readable(own_bucket)
        for no_certificate in (tmp_path / "nothing-here", tmp_path / "large"):
            monkeypatch.setenv("AWS_CA_BUNDLE", str(no_certificate))
            with pytest.raises(BucketError, match=r"AWS_CA_BUNDLE .*certificates"):
                check_readable(own_bucket)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        store = open_store(f"{own_bucket}/{secrets.token_hex(4)}")
        store.write("small", b"1")
        store.upload(tmp_path / "large", "large")
        store.download("large", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == (tmp_path / "large").read_bytes()
        store.delete(["small", "large"])


@contextmanager
def tls_proxy(endpoint: str, directory: Path) -> Iterator[tuple[str, Path]]:
    """Start a TLS proxy with a new self-signed certificate and yield (endpoint, path of the certificate)."""
    key, certificate = directory / "key.pem", directory / "certificate.pem"
    options = (
        "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    )
    subprocess.run(
        ["openssl", *options.split(), "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    host, _, port = endpoint.removeprefix("http://").partition(":")

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while block := source.recv(65536):
                sink.sendall(block)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def serve(raw: socket.socket) -> None:
        with (
            suppress(OSError),
            raw,
            context.wrap_socket(raw, server_side=True) as client,
            socket.create_connection((host, int(port))) as server,
        ):
            responses = threading.Thread(target=pump, args=(server, client), daemon=True)
            responses.start()
            pump(client, server)
            responses.join()

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"https://127.0.0.1:{listener.getsockname()[1]}", certificate
        listener.shutdown(socket.SHUT_RDWR)
