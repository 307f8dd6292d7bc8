"""The life cycle of the embedded bucket, with real servers, processes and signals."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from utils.storage.bucket import BucketError, open_store
from utils.storage.embedded_bucket import STATE_VARIABLE, embedded_bucket, embedded_endpoint

pytestmark = pytest.mark.timeout(180)
USE_BUCKET = (
    "import sys; from pathlib import Path; from utils.storage.embedded_bucket import embedded_bucket\n"
    "with embedded_bucket(Path(sys.argv[1])) as server:\n print(server.endpoint, flush=True); sys.stdin.read()"
)


@pytest.fixture
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "state"
    monkeypatch.setenv(STATE_VARIABLE, str(path))
    yield path
    assert wait_for(lambda: not (path / "server.json").exists()), "a server is still running"


def wait_for(condition) -> bool:
    deadline = time.monotonic() + 60  # a guard against hanging: it takes seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pids(state_dir: Path) -> tuple[int, int]:
    server = json.loads((state_dir / "server.json").read_bytes())
    return server["weed"], server["watcher"]


@contextmanager
def started_user(state_dir: Path):
    """Start another process that uses the bucket until its standard input is closed."""
    with subprocess.Popen(
        [sys.executable, "-c", USE_BUCKET, str(state_dir)], stdin=-1, stdout=-1, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_endpoint(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.slow
def test_objects_and_credentials_survive_a_server_restart(state_dir: Path):
    with embedded_bucket(state_dir) as first:
        open_store("s3://anneal/run").write("result.json", b"{}")
        processes = pids(state_dir)
    assert wait_for(lambda: not any(map(is_alive, processes)))
    with pytest.raises(BucketError, match=r"embedded bucket.*not running"):
        open_store("s3://anneal/run").list()
    with embedded_bucket(state_dir) as second:
        assert open_store("s3://anneal/run").read("result.json") == b"{}"
        assert embedded_endpoint() == second
    assert (first.access_key, first.secret_key) == (second.access_key, second.secret_key)


def test_secret_key_stays_private(state_dir: Path):
    with embedded_bucket(state_dir) as server:
        assert server.secret_key not in repr(server)
        for name in ("credentials.json", "server.json", "weed.log"):
            assert (state_dir / name).stat().st_mode & 0o077 == 0
        for pid in pids(state_dir):
            assert server.secret_key.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        assert server.secret_key not in (state_dir / "weed.log").read_text()
        assert server.secret_key not in os.environ.values()


def test_embedded_bucket_ignores_the_aws_profile_of_the_user(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with embedded_bucket(state_dir):
        assert open_store("s3://anneal/x").read_if_exists("nothing") is None


@pytest.mark.slow
def test_server_stops_after_its_last_user_exits(state_dir: Path):
    with started_user(state_dir) as first:
        endpoint = read_endpoint(first)
        with embedded_bucket(state_dir) as second:
            assert second.endpoint == endpoint
            before = pids(state_dir)
            first.communicate("")  # closes its standard input, so it exits
            time.sleep(1.5)
            assert pids(state_dir) == before
            open_store("s3://anneal/x").write("still", b"here")
        assert wait_for(lambda: not any(map(is_alive, before)))


@pytest.mark.slow
def test_server_stops_after_its_user_is_killed(state_dir: Path):
    with started_user(state_dir) as victim:
        read_endpoint(victim)
        processes = pids(state_dir)
        victim.kill()
        assert wait_for(lambda: not any(map(is_alive, processes)))
    assert not (state_dir / "server.json").exists()


@pytest.mark.slow
def test_killed_watcher_stops_the_server_and_the_next_user_starts_another(state_dir: Path):
    with started_user(state_dir) as first:
        read_endpoint(first)
        weed, watcher = pids(state_dir)
        os.kill(watcher, 9)
        assert wait_for(lambda: not is_alive(weed))
        with embedded_bucket(state_dir):
            assert pids(state_dir)[0] != weed
            assert open_store("s3://anneal/x").list() == []


@pytest.mark.slow
def test_killed_server_is_replaced(state_dir: Path):
    with embedded_bucket(state_dir):
        weed, watcher = pids(state_dir)
        os.kill(weed, 9)
        assert wait_for(lambda: not is_alive(watcher))
        with embedded_bucket(state_dir):
            assert pids(state_dir)[0] != weed
            open_store("s3://anneal/x").write("key", b"1")
            assert open_store("s3://anneal/x").read("key") == b"1"


def test_concurrent_users_share_one_server(state_dir: Path):
    with (
        started_user(state_dir) as first,
        started_user(state_dir) as second,
        started_user(state_dir) as third,
    ):
        assert len({read_endpoint(process) for process in (first, second, third)}) == 1


@pytest.mark.slow
def test_user_that_starts_during_a_stop_gets_a_new_server(state_dir: Path):
    with embedded_bucket(state_dir) as first:
        stopping, watcher = pids(state_dir)
        # A suspended process does not react to SIGTERM, so the stop takes seconds.
        os.kill(stopping, signal.SIGSTOP)
    assert wait_for(lambda: not (state_dir / "server.json").exists()), (
        "the watcher did not start to stop the server"
    )
    assert is_alive(stopping)
    with embedded_bucket(state_dir) as second:
        assert not is_alive(stopping)
        assert not {stopping, watcher} & set(pids(state_dir))
        assert second.endpoint != first.endpoint
        open_store("s3://anneal/x").write("key", b"1")
        assert open_store("s3://anneal/x").read("key") == b"1"


def test_server_that_cannot_start_raises_an_error_with_its_directory(state_dir: Path):
    state_dir.mkdir()
    (state_dir / "data").write_text("a file in place of the directory")
    with pytest.raises(BucketError, match=f"{state_dir} .*start"), embedded_bucket(state_dir):
        pass
    assert not (state_dir / "server.json").exists()
