"""The embedded bucket's life: real servers, real processes, real signals."""

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

pytestmark = pytest.mark.timeout(60)
USER = (
    "import sys; from pathlib import Path; from utils.storage.embedded_bucket import embedded_bucket\n"
    "with embedded_bucket(Path(sys.argv[1])) as server:\n print(server.endpoint, flush=True); sys.stdin.read()"
)


@pytest.fixture
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "state"
    monkeypatch.setenv(STATE_VARIABLE, str(path))
    yield path
    assert wait_for(lambda: not (path / "server.json").exists()), "a server was left behind"


def wait_for(condition, seconds: float = 8) -> bool:
    deadline = time.monotonic() + seconds
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
def user(state_dir: Path):
    """Another process that uses the bucket until its standard input ends."""
    with subprocess.Popen(
        [sys.executable, "-c", USER, str(state_dir)], stdin=-1, stdout=-1, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def endpoint_said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_objects_and_keys_outlive_the_server(state_dir: Path):
    with embedded_bucket(state_dir) as first:
        open_store("s3://anneal/run").write("result.json", b"{}")
        old = pids(state_dir)
    assert wait_for(lambda: not any(map(is_alive, old)))
    with pytest.raises(BucketError, match=r"embedded bucket.*not running"):
        open_store("s3://anneal/run").list()
    with embedded_bucket(state_dir) as second:
        assert open_store("s3://anneal/run").read("result.json") == b"{}"
        assert embedded_endpoint() == second
    assert (first.access_key, first.secret_key) == (second.access_key, second.secret_key)


def test_the_keys_stay_private(state_dir: Path):
    with embedded_bucket(state_dir) as server:
        assert server.secret_key not in repr(server)
        for name in ("credentials.json", "server.json", "weed.log"):
            assert (state_dir / name).stat().st_mode & 0o077 == 0
        for pid in pids(state_dir):
            assert server.secret_key.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        assert server.secret_key not in (state_dir / "weed.log").read_text()
        assert server.secret_key not in os.environ.values()


def test_a_profile_of_the_users_is_none_of_its_business(state_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with embedded_bucket(state_dir):
        assert open_store("s3://anneal/x").read_if_exists("nothing") is None


def test_it_lives_until_its_last_user_leaves(state_dir: Path):
    with user(state_dir) as first:
        endpoint = endpoint_said(first)
        with embedded_bucket(state_dir) as second:
            assert second.endpoint == endpoint
            before = pids(state_dir)
            first.communicate("")  # it leaves
            time.sleep(1.5)
            assert pids(state_dir) == before
            open_store("s3://anneal/x").write("still", b"here")
        assert wait_for(lambda: not any(map(is_alive, before)), 30)


def test_a_killed_user_leaves_nothing_behind(state_dir: Path):
    with user(state_dir) as victim:
        endpoint_said(victim)
        processes = pids(state_dir)
        victim.kill()
        assert wait_for(lambda: not any(map(is_alive, processes)), 4)
    assert not (state_dir / "server.json").exists()


def test_a_killed_watcher_takes_the_server_with_it_and_the_next_user_starts_another(state_dir: Path):
    with user(state_dir) as first:
        endpoint_said(first)
        weed, watcher = pids(state_dir)
        os.kill(watcher, 9)
        assert wait_for(lambda: not is_alive(weed))
        with embedded_bucket(state_dir):
            assert pids(state_dir)[0] != weed
            assert open_store("s3://anneal/x").list() == []


def test_a_dead_server_is_replaced(state_dir: Path):
    with embedded_bucket(state_dir):
        weed, watcher = pids(state_dir)
        os.kill(weed, 9)
        assert wait_for(lambda: not is_alive(watcher))
        with embedded_bucket(state_dir):
            assert pids(state_dir)[0] != weed
            open_store("s3://anneal/x").write("key", b"1")
            assert open_store("s3://anneal/x").read("key") == b"1"


def test_three_at_once_share_one_server(state_dir: Path):
    with user(state_dir) as one, user(state_dir) as two, user(state_dir) as three:
        assert len({endpoint_said(process) for process in (one, two, three)}) == 1


def test_a_user_that_arrives_during_the_stop_gets_a_new_server(state_dir: Path):
    with embedded_bucket(state_dir) as first:
        stopping, watcher = pids(state_dir)
        os.kill(stopping, signal.SIGSTOP)  # it ignores SIGTERM from now on, so the stop takes seconds
    assert wait_for(lambda: not (state_dir / "server.json").exists()), (
        "the watcher did not begin to stop the server"
    )
    assert is_alive(stopping)
    with embedded_bucket(state_dir) as second:
        assert not is_alive(stopping)
        assert not {stopping, watcher} & set(pids(state_dir))
        assert second.endpoint != first.endpoint
        open_store("s3://anneal/x").write("key", b"1")
        assert open_store("s3://anneal/x").read("key") == b"1"


def test_a_server_that_cannot_start_says_why(state_dir: Path):
    state_dir.mkdir()
    (state_dir / "data").write_text("a file where the directory belongs")
    with pytest.raises(BucketError, match=f"{state_dir} .*start"), embedded_bucket(state_dir):
        pass
    assert not (state_dir / "server.json").exists()
