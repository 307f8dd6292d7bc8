"""Every kind of store, the sync to a node, and storage errors, against a real S3 server."""

import gc
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.support.bucket_proxy import BucketProxy, Fault, bucket_proxy
from tests.support.faults import require_small_disks, small_disk_prefix
from tests.support.own_buckets import set_up_fsspec_bucket, set_up_own_bucket
from tests.support.waiting import wait_until
from utils.storage import node_cache
from utils.storage.bucket import (
    AlreadyExistsError,
    BucketError,
    NotFoundError,
    StoredObject,
    UnsafeKeyError,
    check_readable,
    check_writable,
    fetch_file,
    join_uri,
    missing_bytes,
    open_store,
    sync_to_node,
    upload_directory,
)
from utils.storage.embedded_bucket import EmbeddedBucket
from utils.storage.s3 import S3Store
from utils.storage.s3_errors import explain_failure

pytestmark = pytest.mark.timeout(60)
MB = 1024 * 1024
OWN_BUCKET = "own-models"
SYNC = (
    "import sys; from pathlib import Path; from utils.storage.bucket import sync_to_node\n"
    "print(sync_to_node(sys.argv[1], Path(sys.argv[2])))"
)


@pytest.fixture(params=["s3", "local", "memory", "s3fs"])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URI of a store of each kind; fsspec is tested with `memory://` and with s3fs on a real server."""
    match request.param:
        case "s3":
            return request.getfixturevalue("bucket_uri")
        case "local":
            return str(tmp_path / "store")
        case "memory":
            return f"memory://{tmp_path.name}"
        case _:
            server = request.getfixturevalue("bucket")
            return f"{set_up_fsspec_bucket(monkeypatch, server, OWN_BUCKET)}/{tmp_path.name}"


@pytest.fixture
def own_bucket(bucket: EmbeddedBucket, monkeypatch: pytest.MonkeyPatch) -> str:
    """Create a bucket that is accessed through the AWS variables, as a user's own bucket, and return its URI."""
    return set_up_own_bucket(monkeypatch, bucket, OWN_BUCKET)


@pytest.fixture
def proxy(bucket: EmbeddedBucket, own_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketProxy]:
    with bucket_proxy(bucket.endpoint, bytes_per_second=20 * MB) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint)
        yield server


def start_sync(uri: str, cache_dir: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SYNC, uri, str(cache_dir)], stdout=subprocess.PIPE, text=True
    )


def files_below(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_store_writes_lists_reads_downloads_and_deletes_objects(store_uri: str, tmp_path: Path):
    store = open_store(store_uri)
    assert store.list() == []
    assert store.read_if_exists("a/one") is None
    store.write("a/one", b"1")
    store.write("a/one", b"11")
    store.write("a-two", b"2")
    store.write("empty", b"")
    assert store.read("a/one") == store.read_if_exists("a/one") == b"11"
    assert [(item.key, item.size) for item in store.list()] == [("a-two", 1), ("a/one", 2), ("empty", 0)]
    assert [item.key for item in store.list("a/")] == ["a/one"]
    assert [item.key for item in open_store(join_uri(store_uri, "a")).list()] == ["one"]
    assert store.read_range("a/one", 1, 1) == b"1"
    assert store.uri_of("a/one") == f"{store_uri}/a/one"
    for key in ("a/one", "empty"):
        store.download(key, tmp_path / "got" / key)
        assert (tmp_path / "got" / key).read_bytes() == store.read(key)
    with pytest.raises(NotFoundError):
        store.download("none", tmp_path / "got" / "none")
    store.delete(["a/one", "empty", "none"])
    assert [item.key for item in store.list()] == ["a-two"]
    assert sorted(files_below(tmp_path / "got")) == ["a/one", "empty"]


def test_directories_are_listed_without_their_contents(store_uri: str):
    store = open_store(store_uri)
    assert list(store.directories()) == []
    for key in ("b/1", "b/deep/er/2", "a/3", "file", "b.c/4"):
        store.write(key, b"")
    assert list(store.directories()) == ["a", "b", "b.c"]


def test_etag_changes_with_the_content(store_uri: str):
    store = open_store(store_uri)
    store.write("key", b"1")
    before = store.list()
    store.write("key", b"2")
    assert store.list() != before


def test_conditional_write_to_an_existing_key_raises_an_error(store_uri: str):
    store = open_store(store_uri)
    store.write("manifest", b"first", only_if_absent=True)
    with pytest.raises(AlreadyExistsError, match="/manifest"):
        store.write("manifest", b"second", only_if_absent=True)
    assert store.read("manifest") == b"first"


@pytest.mark.parametrize(
    "store_uri", ["s3", "local", "memory", pytest.param("s3fs", marks=pytest.mark.slow)], indirect=True
)
def test_uploaded_directory_is_synced_back_unchanged(store_uri: str, tmp_path: Path):
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "large").write_bytes(os.urandom(20 * MB))  # uploaded in three parts
    for number in range(30):
        (source / "deep" / f"{number:02}").write_bytes(os.urandom(number))
    (source / "excluded").write_bytes(b"")
    names = sorted(set(files_below(source)) - {"excluded"})

    store = open_store(store_uri)
    upload_directory(source, store, "checkpoints/step-1", names)
    arrived = sync_to_node(join_uri(store_uri, "checkpoints", "step-1"), tmp_path / "cache")
    assert arrived.name == "step-1"
    expected = files_below(source)
    del expected["excluded"]
    assert files_below(arrived) == expected
    store.delete(item.key for item in store.list())
    assert store.list() == []


@pytest.mark.slow
def test_repeated_transfers_leak_no_threads_or_file_descriptors(bucket_uri: str, tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(4):
        (source / str(number)).write_bytes(os.urandom(1000))

    def transfer(times: int) -> int:
        for number in range(times):
            store = open_store(f"{bucket_uri}/{number}")
            upload_directory(source, store, "", [str(number) for number in range(4)])
            store.download_many({item: tmp_path / "back" / item.key for item in store.list()})
            store.delete(item.key for item in store.list())
        gc.collect()
        return threading.active_count() + len(list(Path("/proc/self/fd").iterdir()))

    before = transfer(5)
    assert transfer(50) < before + 10  # a few may be open at the moment


def test_upload_of_a_missing_file_raises_an_error_with_its_path(store_uri: str, tmp_path: Path):
    with pytest.raises(NotFoundError, match="nothing-here"):
        open_store(store_uri).upload(tmp_path / "nothing-here", "key")


def test_sync_filters_keys_and_detects_changed_objects(bucket_uri: str, tmp_path: Path):
    store = open_store(bucket_uri)
    store.write("model.safetensors", b"weights")
    store.write("model.bin", b"pickle")
    first = sync_to_node(bucket_uri, tmp_path, lambda key: not key.endswith(".bin"))
    assert files_below(first) == {"model.safetensors": b"weights"}
    store.write("model.safetensors", b"better!")
    second = sync_to_node(bucket_uri, tmp_path, lambda key: not key.endswith(".bin"))
    assert files_below(second) == {"model.safetensors": b"better!"}
    assert files_below(first) == {"model.safetensors": b"weights"}
    assert missing_bytes(bucket_uri, tmp_path) == len(b"pickle")  # the weights are cached
    sync_to_node(bucket_uri, tmp_path)
    assert missing_bytes(bucket_uri, tmp_path) == 0
    assert missing_bytes(f"{bucket_uri}/model.bin", tmp_path) == 0
    with pytest.raises(NotFoundError, match=rf"{bucket_uri}.*\b2 objects"):
        sync_to_node(bucket_uri, tmp_path, lambda key: False)


def test_single_object_keeps_its_name(bucket_uri: str, tmp_path: Path):
    store = open_store(bucket_uri)
    store.write("data/train.jsonl", b"{}\n")
    store.write("data/train.jsonl.bak", b"old")
    for fetch in (fetch_file, sync_to_node):
        path = fetch(f"{bucket_uri}/data/train.jsonl", tmp_path)
        assert (path.name, path.read_bytes()) == ("train.jsonl", b"{}\n")
        with pytest.raises(NotFoundError, match=r"/data/train: .*no such object"):
            fetch(f"{bucket_uri}/data/train", tmp_path)


def test_damaged_cached_copy_is_downloaded_again(bucket_uri: str, tmp_path: Path):
    open_store(bucket_uri).write("weights", b"12345")
    copy = sync_to_node(bucket_uri, tmp_path)
    for damage in (b"1", b"54321"):
        (copy / "weights").write_bytes(damage)
        os.utime(copy / "weights", (0, 0))  # the clock of some kernels does not tick between two writes
        assert files_below(sync_to_node(bucket_uri, tmp_path)) == {"weights": b"12345"}
    for marker in ("{", "[]", "{}"):
        (copy.parents[1] / "ready.json").write_text(marker)
        assert files_below(sync_to_node(bucket_uri, tmp_path)) == {"weights": b"12345"}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_four_processes_download_each_object_once(own_bucket: str, proxy: BucketProxy, tmp_path: Path):
    store = open_store(f"{own_bucket}/once")
    for number in range(3):
        store.write(str(number), os.urandom(2 * MB))
    proxy.requests.clear()
    processes = [start_sync(f"{own_bucket}/once", tmp_path) for _ in range(4)]
    paths = {process.communicate(timeout=300)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    assert len(paths) == 1
    assert len(proxy.downloads(OWN_BUCKET)) == 3
    # A sync of a complete copy downloads nothing.
    proxy.requests.clear()
    assert str(sync_to_node(f"{own_bucket}/once", tmp_path)) == paths.pop()
    assert proxy.requests != []
    assert proxy.downloads(OWN_BUCKET) == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sync_after_a_killed_download_reuses_its_complete_files(
    own_bucket: str, proxy: BucketProxy, tmp_path: Path
):
    content = os.urandom(30 * MB)
    store = open_store(f"{own_bucket}/killed")
    store.write("large", content)
    store.write("small", b"1")
    proxy.requests.clear()
    cache_dir = tmp_path / "cache"
    stall = Fault("stall", key="large")
    proxy.faults.append(stall)
    first, second = (start_sync(f"{own_bucket}/killed", cache_dir) for _ in range(2))
    wait_until(
        lambda: (
            stall.times_injected > 0
            and bool(list(cache_dir.rglob("small")))
            and any(_writes_below(process.pid, cache_dir) for process in (first, second))
        )
    )
    downloader = first if _writes_below(first.pid, cache_dir) else second
    downloader.send_signal(signal.SIGKILL)
    proxy.faults.clear()
    downloader.communicate()
    assert not list(cache_dir.rglob("ready.json"))
    survivor = second if downloader is first else first
    arrived = Path(survivor.communicate(timeout=300)[0].strip())
    assert files_below(arrived) == {"large": content, "small": b"1"}
    assert len([request for request in proxy.downloads(OWN_BUCKET) if request.path.endswith("small")]) == 1
    assert not list(cache_dir.rglob("*.partial"))


def _writes_below(pid: int, directory: Path) -> bool:
    opened = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it has just been closed
            opened.append(str(link.readlink()))
    return any(name.startswith(str(directory)) and not name.endswith("lock") for name in opened)


def test_unsafe_key_raises_an_error_and_writes_nothing(
    bucket_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # The test server rejects such a key, but a hostile server could list it.
    open_store(bucket_uri).write("good", b"1")
    listed = [
        *S3Store(bucket_uri).list(),
        StoredObject("../../outside", 1, '"1"'),
    ]
    monkeypatch.setattr(S3Store, "list", lambda store: listed)
    with pytest.raises(UnsafeKeyError, match=r"\.\./\.\./outside"):
        sync_to_node(bucket_uri, tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_insufficient_disk_space_raises_an_error_before_the_download(
    bucket_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    open_store(bucket_uri).write("weights", bytes(3 * MB))
    monkeypatch.setattr(node_cache, "free_bytes", lambda path: MB)
    with pytest.raises(BucketError, match=r"3\.0 MiB.*1\.0 MiB"):
        sync_to_node(bucket_uri, tmp_path)
    assert all(name.endswith("lock") for name in files_below(tmp_path))


def test_full_disk_of_a_local_store_raises_an_error_and_stores_no_object(tmp_path: Path):
    require_small_disks(tmp_path)
    disk, file = tmp_path / "disk", tmp_path / "file"
    disk.mkdir()
    file.write_bytes(bytes(2 * MB))
    upload = (
        "import sys; from pathlib import Path; from utils.storage.bucket import BucketError, open_store\n"
        "store = open_store(sys.argv[1])\n"
        "store.write('before', b'1')\n"
        "try: store.upload(Path(sys.argv[2]), 'a/file')\n"
        "except BucketError as error: print(error, [item.key for item in store.list()])"
    )
    output = subprocess.run(
        [*small_disk_prefix(disk, "1m"), sys.executable, "-c", upload, str(disk), str(file)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert re.search(rf"No space left on device.* {disk}/a\b", output)
    assert output.endswith("['before']\n")


@pytest.mark.slow
def test_object_that_changes_during_the_download_raises_an_error(bucket_uri: str, tmp_path: Path):
    store = open_store(bucket_uri)
    store.write("weights", os.urandom(9 * MB))
    listed = store.list()
    store.write("weights", os.urandom(9 * MB))
    with pytest.raises(BucketError, match="changed"):
        store.download_many({listed[0]: tmp_path / "weights"})
    store.write("small", b"1")
    listed = store.list("small")
    store.write("small", b"12")
    with pytest.raises(BucketError, match="changed"):
        store.download_many({listed[0]: tmp_path / "small"})
    assert list(tmp_path.iterdir()) == []


def test_checks_pass_for_a_working_bucket_and_leave_no_object(own_bucket: str):
    uri = f"{own_bucket}/checks"
    check_writable(uri)
    assert open_store(uri).list() == []
    open_store(uri).write("a/file", b"")
    for readable in (uri, f"{uri}/a", f"{uri}/a/", f"{uri}/a/file", own_bucket):
        check_readable(readable)


def test_each_storage_error_names_its_cause(own_bucket: str, monkeypatch: pytest.MonkeyPatch):
    for check in (check_readable, check_writable):
        with pytest.raises(BucketError, match="no bucket 'no-such-bucket'"):
            check("s3://no-such-bucket/x")
    open_store(own_bucket).write("there-2/x", b"")
    with pytest.raises(NotFoundError, match=r"/there: .*no such object"):
        check_readable(f"{own_bucket}/there")

    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
        with pytest.raises(BucketError, match="AWS_SECRET_ACCESS_KEY") as caught:
            check_readable(own_bucket)
        assert "hunter2" not in str(caught.value)
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        with pytest.raises(BucketError, match="AWS_ACCESS_KEY_ID"):
            check_writable(own_bucket)
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
        with pytest.raises(BucketError, match=r"no credentials.*AWS_ACCESS_KEY_ID"):
            check_readable(own_bucket)
        patch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/trainer")
        patch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/nowhere/token")
        with pytest.raises(BucketError, match=r"token.*AWS_WEB_IDENTITY_TOKEN_FILE"):
            # The error is about the credentials, not about the object.
            open_store(own_bucket).read_if_exists("MANIFEST.json")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "not a url")
    with pytest.raises(BucketError, match="AWS_ENDPOINT_URL_S3"):
        check_readable(own_bucket)


@pytest.mark.slow
def test_unresponsive_endpoint_raises_an_error_within_seconds(
    own_bucket: str, monkeypatch: pytest.MonkeyPatch
):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
        start = time.monotonic()
        with pytest.raises(BucketError, match=rf"127\.0\.0\.1:{port}\b"):
            check_readable(own_bucket)
        assert time.monotonic() - start < 15  # a run would wait for 30 s, twice
    start = time.monotonic()
    with pytest.raises(BucketError, match=rf"127\.0\.0\.1:{port}\b"):
        check_readable(own_bucket)
    assert time.monotonic() - start < 5  # a run would retry for 120 s
    monkeypatch.setenv("HTTP_PROXY", f"http://me:hunter2@127.0.0.1:{port}")
    with pytest.raises(BucketError, match=rf"proxy 127\.0\.0\.1:{port}\b"):
        check_readable(own_bucket)


@pytest.mark.parametrize(
    ("status", "body", "fact"),
    [
        (404, b"", "not an S3 server"),
        (404, b"<html>Not found</html>", "not an S3 server"),
        (200, b"<html>Welcome</html>", "not an S3 server"),
        (301, b"", "elsewhere|redirect"),
    ],
)
def test_server_that_is_not_s3_raises_an_error(
    own_bucket: str, monkeypatch: pytest.MonkeyPatch, status: int, body: bytes, fact: str
):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if self.command == "GET" else b"")

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(BucketError, match=rf"({fact}).*AWS_ENDPOINT_URL_S3"):
            check_readable(own_bucket)
        server.shutdown()


def test_endless_redirects_inside_a_request_are_reported():
    """botocore follows redirects until Python's recursion limit, which it may reach inside a request."""
    from botocore.exceptions import HTTPClientError

    assert re.search("elsewhere|redirect", explain_failure(HTTPClientError(error=RecursionError("too deep"))))


def test_empty_region_variable_counts_as_unset(own_bucket: str, monkeypatch: pytest.MonkeyPatch):
    for variable in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(variable, "")
    check_writable(own_bucket)
    store = open_store(f"{own_bucket}/no-region")
    store.write("key", b"1")
    assert store.read("key") == b"1"


def test_one_process_uses_own_and_embedded_bucket(own_bucket: str, bucket_uri: str):
    open_store(f"{own_bucket}/both").write("key", b"own")
    open_store(bucket_uri).write("key", b"embedded")
    assert open_store(f"{own_bucket}/both").read("key") == b"own"
    assert open_store(bucket_uri).read("key") == b"embedded"
