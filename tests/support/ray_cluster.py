"""An existing Ray cluster for tests to join: real raylets on this machine, with token authentication."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from tests.support.jobs import descendants, environment
from tests.support.namespaces import NetworkNamespace
from tests.support.ports import free_ports

needs_ray_default = pytest.mark.skipif(
    find_spec("opencensus") is None, reason="needs ray[default]: `make test-submit`"
)
"""Marks tests of the job server or of an autoscaler's node list: both need the dashboard's packages."""

_RAY = Path(sys.executable).with_name("ray")
_TIMEOUT_SECONDS = 180  # a head starts in 4 s on an idle machine, and in 80 s on a very busy one
_PRINT_WORKER_NODE_IDS = """
import json, ray
ray.init(log_to_driver=False)
print("nodes:", json.dumps([node["NodeID"] for node in ray.nodes() if node["Alive"] and "node:__internal_head__" not in node["Resources"]]))
"""


_COUNT_JOBS = """
import ray
from ray._private.state import jobs
ray.init(log_to_driver=False)
print("jobs:", len(jobs()))
"""
_HOLD_CPU = """
import ray, sys
ray.init(log_to_driver=False)
held = ray.util.placement_group([{"CPU": 1}])
assert held.wait(60)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def held_cpu(cluster: "RayCluster") -> Iterator[None]:
    """Reserve one CPU of a cluster for other work during the block."""
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD_CPU],
        env=environment() | cluster.variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        yield
    finally:
        holder.kill()
        holder.communicate()


class RayCluster:
    """A head node and worker nodes: one raylet each, with its own CPUs and cache directory."""

    def __init__(self, directory: Path, variables: Mapping[str, str], host: str):
        self._directory = directory
        self._variables = variables
        self._host = host
        self._raylets: list[subprocess.Popen[bytes]] = []
        self._raylet_by_id: dict[str, subprocess.Popen[bytes]] = {}
        self.port, self._job_server_port, self._agent_port, self._metrics_port = free_ports(4)
        self._token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

    @property
    def address(self) -> str:
        """Return the value of RAY_ADDRESS."""
        return f"{self._host}:{self.port}"

    @property
    def job_server(self) -> str:
        """Return the job server's address for --submit; the head must have been started with a job server."""
        return f"http://127.0.0.1:{self._job_server_port}"

    @property
    def metrics(self) -> str:
        """Return the URL of the head's Prometheus metrics."""
        return f"http://{self._host}:{self._metrics_port}/metrics"

    @property
    def token(self) -> dict[str, str]:
        """Return the environment variables that authenticate a client."""
        return self._token

    @property
    def variables(self) -> dict[str, str]:
        """Return the environment variables that connect a client: the address and the token."""
        return {"RAY_ADDRESS": self.address, **self._token}

    def start_head(self, cpus: int, *, job_server: bool) -> None:
        """Start the head node and wait until it listens."""
        self._start(
            f"--num-cpus={cpus}",
            "--head",
            f"--port={self.port}",
            f"--node-ip-address={self._host}",
            f"--include-dashboard={str(job_server).lower()}",
            f"--dashboard-port={self._job_server_port}",
            f"--dashboard-agent-listen-port={self._agent_port}",
            f"--metrics-export-port={self._metrics_port}",
            f"--temp-dir={self._directory}",
        )
        _wait_until(lambda: _is_listening(self._host, self.port), "head")
        if job_server:
            _wait_until(lambda: _is_listening("127.0.0.1", self._job_server_port), "job server")

    def start_node(self, *, within: NetworkNamespace | None = None) -> str:
        """Start a worker node with one CPU, wait until it has joined, and return its ID.

        Args:
            within: The network namespace to start it in; None: this machine's network.
        """
        before = set(self.worker_node_ids())  # a node that was just killed may still be listed
        # Each node needs its own directory: nodes that share one overwrite each other's unpacked code.
        directory = self._directory / str(len(self._raylets))
        # Ray treats nodes with one address as one node: one of its workers would wait for files that the other never fetches.
        address = within.address if within else f"127.0.0.{len(self._raylets) + 1}"
        self._start(
            "--num-cpus=1",
            f"--address={self.address}",
            f"--node-ip-address={address}",
            f"--temp-dir={directory}",
            within=within.command if within else (),
        )

        def joined() -> set[str]:
            return set(self.worker_node_ids()) - before

        _wait_until(lambda: bool(joined()), "node")
        (node,) = joined()
        self._raylet_by_id[node] = self._raylets[-1]
        return node

    def caches(self) -> list[Path]:
        """Return the cache directory (XDG_CACHE_HOME) of each node in start order."""
        return [self._cache_directory(number) for number in range(len(self._raylets))]

    def kill(self, node: str) -> None:
        """Kill a node's processes with SIGKILL, as if its machine lost power."""
        _kill(self._raylet_by_id[node])

    def kill_raylet(self, node: str) -> None:
        """Kill only the raylet of a node with SIGKILL; the node's other processes exit on their own."""
        _process_of(self._raylet_by_id[node], "raylet").kill()

    def kill_head(self, name: str) -> None:
        """Kill one process of the head node by its name, such as raylet or gcs_server; "head": all of them."""
        head = self._raylets[0]
        if name == "head":
            _kill(head)
            return
        _process_of(head, name).kill()

    def worker_node_ids(self) -> list[str]:
        """Return the IDs of all live nodes except the head."""
        printed = self._run(sys.executable, "-c", _PRINT_WORKER_NODE_IDS).splitlines()
        (listed,) = [
            line for line in printed if line.startswith("nodes: ")
        ]  # Ray may print that a node was lost
        return json.loads(listed.removeprefix("nodes: "))

    def count_jobs(self) -> int:
        """Return the number of connections to the cluster since its start, this one included."""
        printed = self._run(sys.executable, "-c", _COUNT_JOBS).splitlines()
        (count,) = [line for line in printed if line.startswith("jobs: ")]
        return int(count.removeprefix("jobs: "))

    def preempt(self, node: str, *, seconds: int) -> None:
        """Announce the preemption of a node, as a cloud does for spot instances."""
        self._run(
            str(_RAY),
            "drain-node",
            f"--address={self.address}",
            f"--node-id={node}",
            "--reason=DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message=preempted",
            f"--deadline-remaining-seconds={seconds}",
        )

    def ray_train_logs(self) -> str:
        """Return the last log lines of Ray Train's processes, which show why a run has not finished."""
        lines = [
            f"{log.name}: {line}"
            for log in sorted(self._directory.glob("session_latest/logs/train/*.log"))
            for line in log.read_text("utf-8", errors="replace").splitlines()[-20:]
        ]
        return "\n".join(line[:300] for line in lines)

    def end(self) -> None:
        """Kill the processes of every node."""
        for raylet in reversed(self._raylets):
            if raylet.poll() is None:
                _kill(raylet)

    def _cache_directory(self, number: int) -> Path:
        return self._directory / f"cache-{number}"

    def _start(self, *options: str, within: Sequence[str] = ()) -> None:
        self._raylets.append(
            subprocess.Popen(
                [
                    *within,
                    str(_RAY),
                    "start",
                    "--block",
                    "--disable-usage-stats",
                    # Any free ports: by default, every node on this machine would assign its workers the ports from 10002 on.
                    "--min-worker-port=0",
                    "--max-worker-port=0",
                    *options,
                ],
                # Put this environment's `python` first on every node's PATH, as an image does.
                env=environment()
                | {"PATH": f"{_RAY.parent}:{os.environ['PATH']}"}
                | {"XDG_CACHE_HOME": str(self._cache_directory(len(self._raylets)))}
                | self._token
                | dict(self._variables),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )

    def _run(self, *command: str) -> str:
        completed = subprocess.run(
            command,
            env=environment() | self.variables,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
        )
        assert completed.returncode == 0, completed.stderr
        return completed.stdout


def _kill(raylet: subprocess.Popen[bytes]) -> None:
    for process in [*psutil.Process(raylet.pid).children(recursive=True), psutil.Process(raylet.pid)]:
        with suppress(psutil.NoSuchProcess):  # it may have exited with a process killed before it
            process.kill()
    raylet.wait()


def _process_of(node: subprocess.Popen[bytes], name: str) -> psutil.Process:
    """Return the process of a node that has this name."""
    (process,) = descendants(node.pid, name)
    return process


def _is_listening(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def _wait_until(condition: Callable[[], bool], description: str) -> None:
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"no {description} within {_TIMEOUT_SECONDS} s"
        time.sleep(0.2)


@contextmanager
def ray_cluster(
    cpus: int,
    *,
    job_server: bool = False,
    variables: Mapping[str, str] | None = None,
    host: str = "127.0.0.1",
) -> Iterator[RayCluster]:
    """Run a cluster with a head node for the duration of the block.

    Args:
        cpus: CPUs of the head node.
        job_server: Whether to start a job server.
        variables: Environment variables to add on every node.
        host: The address of this machine at which other nodes reach the head.
    """
    # The socket paths of Ray are limited to 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    cluster = RayCluster(directory, variables or {}, host)
    try:
        cluster.start_head(cpus, job_server=job_server)
        yield cluster
    except BaseException:
        print(cluster.ray_train_logs())
        raise
    finally:
        cluster.end()
        shutil.rmtree(directory, ignore_errors=True)
