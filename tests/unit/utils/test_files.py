import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.files import (
    BucketError,
    UnsafeKeyError,
    checksum,
    checksum_bytes,
    copy_atomically,
    file_lock,
    format_bytes,
    free_bytes,
    parse_bytes,
    reject_clashes,
    safe_join,
    write_atomically,
)


def test_write_atomically_replaces_the_file_and_leaves_no_partial_files(tmp_path: Path):
    path = tmp_path / "new" / "file"
    write_atomically(path, b"one")
    write_atomically(path, b"two", mode=0o600)
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        write_atomically(path, b"three", replace=False)
    assert path.read_bytes() == b"two"
    assert [found.name for found in path.parent.iterdir()] == ["file"]


def test_checksum_is_the_standard_crc64nvme(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"123456789")
    assert checksum(path) == checksum_bytes(b"123456789") == "crc64nvme:ae8b14860a799888"
    assert (checksum(path, "crc32"), checksum(path, "crc32c")) == ("crc32:cbf43926", "crc32c:e3069283")
    path.write_bytes(os.urandom(9 * 1024 * 1024))  # more than one block
    assert checksum(path) == checksum_bytes(path.read_bytes())


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB"), (2**52, "4096.0 TiB")],
)
def test_format_bytes_uses_binary_units(count: int, text: str):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("text", "count"), [("1024", 1024), ("200GiB", 200 * 2**30), ("1.5 GB", 1_500_000_000), ("7B", 7)]
)
def test_parse_bytes_accepts_units_and_rejects_other_text(text: str, count: int):
    assert parse_bytes(text) == count
    for invalid in ("", "much", "GiB", "1 GiBs", "-1"):
        with pytest.raises(ValueError, match="200GiB"):
            parse_bytes(invalid)


def test_keys_that_clash_on_disk_raise_an_error():
    reject_clashes(["a", "b/a", "b/c/a"])
    for keys, reason in (
        (["B/x", "b/X"], "by case"),
        (["b", "b/x"], "directory"),
        (["B", "b/c/x"], "directory"),
    ):
        with pytest.raises(UnsafeKeyError, match=reason):
            reject_clashes(keys)


def test_atomic_writes_accept_names_of_255_bytes(tmp_path: Path):
    path = tmp_path / ("x" * 255)
    write_atomically(path, b"1")
    copy_atomically(path, tmp_path / ("y" * 255))
    assert {found.name[0] for found in tmp_path.iterdir()} == {"x", "y"}


def test_free_bytes_accepts_a_path_that_does_not_exist(tmp_path: Path):
    assert free_bytes(tmp_path / "not" / "yet") > 0


@pytest.mark.parametrize(
    "key", ["", "/etc/x", "../x", "a/../../x", "a//b", "./a", "a/", "a\\b", "a\0b", ".."]
)
def test_keys_outside_of_the_directory_raise_an_error(tmp_path: Path, key: str):
    with pytest.raises(UnsafeKeyError, match=re.escape(repr(key))) as caught:
        safe_join(tmp_path, key)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, BucketError)


@given(st.text())
def test_joined_keys_stay_inside_the_directory(key: str):
    directory = Path("/some/directory")
    try:
        joined = safe_join(directory, key)
    except UnsafeKeyError:
        return
    assert Path(os.path.normpath(joined)).is_relative_to(directory)
    assert joined.relative_to(directory).as_posix() == key


def test_lock_excludes_other_processes_until_its_holder_dies(tmp_path: Path):
    lock = tmp_path / "lock"
    hold = (
        "import sys,time; from pathlib import Path; from utils.files import file_lock\n"
        "with file_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", hold, str(lock)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(BlockingIOError), file_lock(lock, blocking=False):
            pass
        holder.kill()
        start = time.monotonic()
        with file_lock(lock):
            assert time.monotonic() - start < 60


def test_shared_locks_exclude_only_exclusive_locks(tmp_path: Path):
    lock = tmp_path / "lock"
    with (
        file_lock(lock, shared=True),
        file_lock(lock, shared=True, blocking=False),
        pytest.raises(BlockingIOError),
        file_lock(lock, blocking=False),
    ):
        pass
    with file_lock(lock, blocking=False):
        pass


def test_forked_child_does_not_hold_its_parents_lock(tmp_path: Path):
    lock = tmp_path / "lock"
    with file_lock(lock):
        child = os.fork()
        if child == 0:
            time.sleep(600)
            os._exit(0)
    try:
        with file_lock(lock, blocking=False):
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "the child still runs"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
