"""A Ray cluster that somebody else has started: real raylets on this machine, behind a token."""

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
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from tests.support.jobs import environment
from tests.support.namespaces import NetworkNamespace

needs_ray_default = pytest.mark.skipif(
    find_spec("opencensus") is None, reason="needs ray[default]: `make test-submit`"
)
"""For tests of what only the dashboard's own packages bring: the job server, an autoscaler's view of its nodes."""

_RAY = Path(sys.executable).with_name("ray")
_LIMIT_SECONDS = 60
_OTHER_NODES = """
import json, ray
ray.init(log_to_driver=False)
print(json.dumps([node["NodeID"] for node in ray.nodes() if node["Alive"] and "node:__internal_head__" not in node["Resources"]]))
"""


class RayCluster:
    """A head, and one raylet after another, each a node of its own with its own CPUs and cache directory."""

    def __init__(self, directory: Path, variables: Mapping[str, str], host: str):
        self._directory = directory
        self._variables = variables
        self._host = host
        self._nodes: list[subprocess.Popen[bytes]] = []
        self._node_of_id: dict[str, subprocess.Popen[bytes]] = {}
        self.port, self._job_server_port, self._agent_port, self._metrics_port = _free_ports(4)
        self._token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

    @property
    def address(self) -> str:
        """What RAY_ADDRESS says."""
        return f"{self._host}:{self.port}"

    @property
    def job_server(self) -> str:
        """What --submit says, where the head was started with one."""
        return f"http://127.0.0.1:{self._job_server_port}"

    @property
    def metrics(self) -> str:
        """Where Prometheus finds the head's."""
        return f"http://{self._host}:{self._metrics_port}/metrics"

    @property
    def token(self) -> dict[str, str]:
        """What lets a client in."""
        return self._token

    @property
    def variables(self) -> dict[str, str]:
        """What leads to it, the token included."""
        return {"RAY_ADDRESS": self.address, **self._token}

    def start_head(self, cpus: int, *, job_server: bool) -> None:
        """Start the first node; returns when it listens."""
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
        _wait_until(lambda: _listens(self._host, self.port), "head")
        if job_server:
            _wait_until(lambda: _listens("127.0.0.1", self._job_server_port), "job server")

    def start_node(self, cpus: int, *, within: NetworkNamespace | None = None) -> str:
        """Start another node; returns its id when it has joined.

        Args:
            cpus: Of the node.
            within: Where it lives, if not on this machine's own network.
        """
        before = self.other_nodes()
        # A directory of its own, as a machine has: nodes that share one unpack the code into each other's hands.
        directory = self._directory / str(len(self._nodes))
        # Ray takes nodes of one address for one node: of two workers there, one would wait for what the other never fetches.
        address = within.address if within else f"127.0.0.{len(self._nodes) + 1}"
        self._start(
            f"--num-cpus={cpus}",
            f"--address={self.address}",
            f"--node-ip-address={address}",
            f"--temp-dir={directory}",
            within=within.command if within else (),
        )
        _wait_until(lambda: len(self.other_nodes()) > len(before), "node")
        node = next(node for node in self.other_nodes() if node not in before)
        self._node_of_id[node] = self._nodes[-1]
        return node

    def caches(self) -> list[Path]:
        """Where each node's user has caches (XDG_CACHE_HOME), in the order of their start."""
        return [self._cache_of(number) for number in range(len(self._nodes))]

    def kill(self, node: str) -> None:
        """End a node's processes with SIGKILL, as a machine ends that loses its power."""
        _kill(self._node_of_id[node])

    def other_nodes(self) -> list[str]:
        """The ids of all nodes that live, without the head."""
        return json.loads(self._run(sys.executable, "-c", _OTHER_NODES).splitlines()[-1])

    def preempt(self, node: str, *, seconds: int) -> None:
        """Give notice that a node will be taken away, as a cloud does with its spot instances."""
        self._run(
            str(_RAY),
            "drain-node",
            f"--address={self.address}",
            f"--node-id={node}",
            "--reason=DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message=taken away",
            f"--deadline-remaining-seconds={seconds}",
        )

    def what_ray_said(self) -> str:
        """The end of what Ray Train's own processes logged, for whoever looks why a run has not ended."""
        lines = [
            f"{log.name}: {line}"
            for log in sorted(self._directory.glob("session_latest/logs/train/*.log"))
            for line in log.read_text("utf-8", errors="replace").splitlines()[-20:]
        ]
        return "\n".join(line[:300] for line in lines)

    def end(self) -> None:
        """End every node with all its processes."""
        for node in reversed(self._nodes):
            if node.poll() is None:
                _kill(node)

    def _cache_of(self, number: int) -> Path:
        return self._directory / f"cache-{number}"

    def _start(self, *options: str, within: Sequence[str] = ()) -> None:
        self._nodes.append(
            subprocess.Popen(
                [
                    *within,
                    str(_RAY),
                    "start",
                    "--block",
                    "--disable-usage-stats",
                    # Any free ones: each node would give its workers those from 10002 on, as if the machine were its own.
                    "--min-worker-port=0",
                    "--max-worker-port=0",
                    *options,
                ],
                # `python` is ours on every node, as in an image.
                env=environment()
                | {"PATH": f"{_RAY.parent}:{os.environ['PATH']}"}
                | {"XDG_CACHE_HOME": str(self._cache_of(len(self._nodes)))}
                | self._token
                | dict(self._variables),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )

    def _run(self, *command: str) -> str:
        done = subprocess.run(
            command,
            env=environment() | self.variables,
            capture_output=True,
            text=True,
            timeout=_LIMIT_SECONDS,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def _kill(node: subprocess.Popen[bytes]) -> None:
    for process in [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]:
        with suppress(psutil.NoSuchProcess):  # it may have ended with the one before
            process.kill()
    node.wait()


def _listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]


def _wait_until(happened: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _LIMIT_SECONDS
    while not happened():
        assert time.monotonic() < deadline, f"no {what} in {_LIMIT_SECONDS} s"
        time.sleep(0.2)


@contextmanager
def ray_cluster(
    cpus: int,
    *,
    job_server: bool = False,
    variables: Mapping[str, str] | None = None,
    host: str = "127.0.0.1",
) -> Iterator[RayCluster]:
    """A cluster of one node for the length of the block.

    Args:
        cpus: Of the node.
        job_server: Whether jobs can be submitted to it.
        variables: Of its nodes' environment, on top of ours.
        host: The address of this machine that other nodes reach it by.
    """
    # Paths of Ray's sockets are limited to 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    cluster = RayCluster(directory, variables or {}, host)
    try:
        cluster.start_head(cpus, job_server=job_server)
        yield cluster
    except BaseException:
        print(cluster.what_ray_said())
        raise
    finally:
        cluster.end()
        shutil.rmtree(directory, ignore_errors=True)
