"""The node cache downloads each object once, shares it between versions, has a limit, and evicts nothing that is in use."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.support.faults import require_small_disks, small_disk_prefix
from utils.files import checksum_bytes, file_lock
from utils.storage import node_cache
from utils.storage.bucket import BucketError, DamagedError, missing_bytes, open_store, sync_to_node
from utils.storage.node_cache import LIMIT_VARIABLE

pytestmark = pytest.mark.timeout(60)
KB = 1000
SYNC_AND_HOLD = (
    "import sys; from pathlib import Path; from utils.storage.bucket import sync_to_node\n"
    "print(sync_to_node(sys.argv[1], Path(sys.argv[2])), flush=True); sys.stdin.read()"
)


def sync_and_exit(uri: str, cache: Path) -> Path:
    """Sync a prefix in a process that exits, so that no process holds it afterwards."""
    with sync_and_hold(uri, cache) as process:
        return Path(process.communicate()[0].strip())


def sync_and_hold(uri: str, cache: Path) -> "subprocess.Popen[str]":
    """Start a process that syncs a prefix and holds it until its standard input is closed."""
    return subprocess.Popen(
        [sys.executable, "-c", SYNC_AND_HOLD, uri, str(cache)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_changed_prefix_downloads_only_the_changed_objects(bucket_uri: str, tmp_path: Path):
    store = open_store(bucket_uri)
    store.write("weights", os.urandom(500 * KB))
    store.write("config.json", b"{}")
    first = sync_to_node(bucket_uri, tmp_path)
    store.write("config.json", b'{"new": 1}')
    assert missing_bytes(bucket_uri, tmp_path) == 10
    second = sync_to_node(bucket_uri, tmp_path)
    assert (second / "config.json").read_bytes() == b'{"new": 1}'
    assert (first / "config.json").read_bytes() == b"{}"
    assert (first / "weights").samefile(second / "weights")


def test_ready_marker_contains_every_checksum(bucket_uri: str, tmp_path: Path):
    open_store(bucket_uri).write("weights", b"12345")
    copy = sync_to_node(bucket_uri, tmp_path)
    ready = json.loads((copy.parents[1] / "ready.json").read_bytes())
    assert [(entry["key"], entry["checksum"]) for entry in ready["objects"]] == [
        ("weights", checksum_bytes(b"12345"))
    ]


def test_copy_from_before_a_reboot_is_verified_once(bucket_uri: str, tmp_path: Path):
    open_store(bucket_uri).write("weights", b"12345")
    copy = sync_to_node(bucket_uri, tmp_path)
    marker = copy.parents[1] / "ready.json"
    current = marker.read_text()
    before_reboot = json.dumps(json.loads(current) | {"boot": "another"})
    marker.write_text(before_reboot)
    assert sync_to_node(bucket_uri, tmp_path) == copy
    assert json.loads(marker.read_text()) == json.loads(current)
    marker.write_text(before_reboot)
    (copy / "weights").write_bytes(b"1\0\0\0\0")  # of the right size, as after a power failure
    assert (sync_to_node(bucket_uri, tmp_path) / "weights").read_bytes() == b"12345"


@pytest.mark.slow
def test_least_recently_used_entry_is_evicted_unless_in_use(
    bucket_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("oldest", "held", "used", "new"):
        open_store(f"{bucket_uri}/{name}").write("weights", os.urandom(100 * KB))
    monkeypatch.setenv(LIMIT_VARIABLE, "300 KB")
    with sync_and_hold(f"{bucket_uri}/held", tmp_path) as holder:
        assert holder.stdout
        held = Path(holder.stdout.readline().strip())
        oldest, used = (sync_and_exit(f"{bucket_uri}/{name}", tmp_path) for name in ("oldest", "used"))
        sync_and_exit(f"{bucket_uri}/oldest", tmp_path)  # now "used" is the least recently used
        new = sync_and_exit(f"{bucket_uri}/new", tmp_path)
        assert [path.exists() for path in (held, oldest, used, new)] == [True, True, False, True]
        # A sync succeeds even if its objects alone exceed the limit.
        monkeypatch.setenv(LIMIT_VARIABLE, "1KB")
        assert sync_and_exit(f"{bucket_uri}/used", tmp_path) == used
        assert [path.exists() for path in (held, oldest, used, new)] == [True, False, True, False]


def test_partial_downloads_of_dead_processes_are_removed(
    bucket_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A sync of the same prefix never reuses one from another boot. Syncs of other prefixes evict it when they need space."""
    for name in ("first", "second"):
        open_store(f"{bucket_uri}/{name}").write("weights", b"1" * 100 * KB)
    version = sync_and_exit(f"{bucket_uri}/first", tmp_path).parents[1]
    (version / "ready.json").unlink()
    partial = version.rename(version.with_name(f"{version.name}.another.partial"))
    (partial / "files" / "first" / "weights").write_bytes(b"0" * 100 * KB)
    again = sync_and_exit(f"{bucket_uri}/first", tmp_path)
    assert (again / "weights").read_bytes() == b"1" * 100 * KB
    assert not partial.exists()
    version.rename(partial)
    monkeypatch.setenv(LIMIT_VARIABLE, "150KB")
    sync_and_exit(f"{bucket_uri}/second", tmp_path)
    assert not partial.exists()


def test_eviction_ignores_files_that_cannot_be_removed(
    bucket_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    require_small_disks(tmp_path)
    for name in ("first", "second"):
        open_store(f"{bucket_uri}/{name}").write("weights", b"1" * 100 * KB)
    first = sync_and_exit(f"{bucket_uri}/first", tmp_path)
    monkeypatch.setenv(LIMIT_VARIABLE, "150KB")
    mounted = small_disk_prefix(first, "1m")  # a mount point cannot be removed
    second = subprocess.run(
        [*mounted, sys.executable, "-c", SYNC_AND_HOLD, f"{bucket_uri}/second", str(tmp_path)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert (Path(second.stdout.strip()) / "weights").exists()
    assert first.exists()


def test_cache_size_is_measured_while_its_files_change(tmp_path: Path):
    files = tmp_path / "place" / "version" / "files"
    stop = threading.Event()

    def fill_and_clear() -> None:
        while not stop.is_set():
            for number in range(20):
                (files / str(number)).mkdir(parents=True)
                (files / str(number) / "weights").write_bytes(b"1")
            shutil.rmtree(files.parent)

    thread = threading.Thread(target=fill_and_clear)
    thread.start()
    try:
        assert all(0 <= node_cache._held_bytes(tmp_path) <= 20 for _ in range(2000))
    finally:
        stop.set()
        thread.join()


def test_cached_copy_with_another_checksum_raises_an_error(bucket_uri: str, tmp_path: Path):
    """The copy was synced without known checksums."""
    open_store(bucket_uri).write("weights", b"12345")
    cached = sync_to_node(bucket_uri, tmp_path)
    right, wrong = ({"weights": checksum_bytes(content)} for content in (b"12345", b"54321"))
    assert (sync_to_node(bucket_uri, tmp_path, checksums=right) / "weights").samefile(cached / "weights")
    with pytest.raises(DamagedError, match="weights"):
        sync_to_node(bucket_uri, tmp_path, checksums=wrong)
    assert (cached / "weights").read_bytes() == b"12345"


def test_entries_synced_by_this_process_are_not_evicted(
    bucket_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("first", "second"):
        open_store(f"{bucket_uri}/{name}").write("weights", os.urandom(100 * KB))
    monkeypatch.setenv(LIMIT_VARIABLE, "100KB")
    first = sync_to_node(f"{bucket_uri}/first", tmp_path)
    lock = first.parents[1].with_name(f"{first.parents[1].name}.lock")
    with pytest.raises(BlockingIOError), file_lock(lock, blocking=False):
        pass
    sync_and_exit(f"{bucket_uri}/second", tmp_path)
    assert first.exists()


def test_invalid_cache_limit_raises_an_error(
    bucket_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    open_store(bucket_uri).write("weights", b"1")
    monkeypatch.setenv(LIMIT_VARIABLE, "much")
    with pytest.raises(BucketError, match=f"{LIMIT_VARIABLE}=much: .*bytes"):
        sync_to_node(bucket_uri, tmp_path)
