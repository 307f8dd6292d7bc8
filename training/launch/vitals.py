"""Probes of the Ray processes that a run cannot continue without: the GCS and the raylet of the driver's node.

If one of them dies, Ray terminates the driver without a message: after 15 s for the raylet, after 60 s for the GCS (Ray 2.60.0).
"""

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

import ray

from training.loop.ray_internals import ray_logs
from training.planning.endpoints import ClusterTarget

_PROBE_SECONDS = 1.0
_REFUSED_SECONDS = 3.0
"""Time after which a port that refuses connections counts as a dead process."""
_UNREACHABLE_SECONDS = 45.0
"""The same for a host that does not answer, such as during a network outage; less than the 60 s after which Ray exits."""
_RECONNECT_VARIABLE = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""Set where the GCS is restarted after a failure (GCS fault tolerance): the time that Ray waits for it."""


class ClusterLostError(Exception):
    """The cluster of a run is gone; `Vitals.diagnose` names the process and its log."""


@dataclass
class _Probed:
    """A process of Ray that listens on a port."""

    name: str
    address: str
    log: str
    patience: float
    """Seconds for which connections may be refused."""
    failing_since: float | None = None
    refused_since: float | None = None

    def probe(self, now: float) -> str | None:
        """Try to connect; return the error once the process counts as lost."""
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), _PROBE_SECONDS).close()
        except OSError as error:
            self.failing_since = self.failing_since or now
            is_refused = isinstance(error, ConnectionRefusedError)
            self.refused_since = (self.refused_since or now) if is_refused else None
            is_dead = self.refused_since is not None and now - self.refused_since >= self.patience
            is_unreachable = now - self.failing_since >= max(self.patience, _UNREACHABLE_SECONDS)
            return (error.strerror or str(error)) if is_dead or is_unreachable else None
        self.failing_since = self.refused_since = None
        return None


class Vitals:
    """The processes to probe, at most once a second."""

    def __init__(self, probed: Sequence[_Probed]):
        self._probed = probed
        self._next = 0.0
        self._found: str | None = None

    @classmethod
    def of(cls, target: ClusterTarget) -> "Vitals":
        """Return the processes of the cluster that this process is connected to; none behind a client such as anyscale://."""
        if "://" in (target.address or ""):
            return cls([])
        context = ray.get_runtime_context()
        here = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
        raylet = f"{here['NodeManagerAddress']}:{here['NodeManagerPort']}"
        where = "" if target.is_local else " on the head node"
        # The GCS first: a head node stops its raylet if its GCS dies.
        return cls(
            [
                _Probed(
                    "GCS",
                    context.gcs_address,
                    f"{ray_logs() / 'gcs_server.out'}{where}",
                    float(os.environ.get(_RECONNECT_VARIABLE, _REFUSED_SECONDS)),
                ),
                _Probed("raylet of this node", raylet, f"{ray_logs() / 'raylet.out'}", _REFUSED_SECONDS),
            ]
        )

    @property
    def is_answering(self) -> bool:
        """Return whether all processes answered the latest probe: calls to a lost GCS block until Ray terminates the driver."""
        return all(process.failing_since is None for process in self._probed)

    def diagnose(self, seconds: float = 2 * _REFUSED_SECONDS) -> str | None:
        """Describe the first process that is gone, with its log; None if all answer.

        Args:
            seconds: How long to probe again while a process refuses connections, until it counts as dead.
        """
        deadline = time.monotonic() + seconds
        while self._found is None:
            now = time.monotonic()
            if now >= self._next:
                self._next = now + _PROBE_SECONDS
                self._found = self._probe(now)
            if now >= deadline:
                break
            time.sleep(max(0.0, min(self._next, deadline) - time.monotonic()))
        return self._found

    def _probe(self, now: float) -> str | None:
        for process in self._probed:
            if error := process.probe(now):
                return f"the cluster was lost: the {process.name} at {process.address} has exited ({error}). Its log: {process.log}."
        return None
