"""The watch over the Ray processes that a connected process cannot continue without: the GCS and the raylet of its node.

If one of them dies, Ray terminates the process without a message: after 15 s for the raylet, after 60 s for the GCS (Ray 2.60.0).
"""

import os
import signal
import socket
import threading
import time
from dataclasses import dataclass

import ray

from training.loop.ray_internals import ray_logs
from utils.console import write_to_screen
from utils.errors import AnnealError
from utils.processes import exit_at_once, is_stopping

_PROBE_SECONDS = 1.0
_REFUSED_SECONDS = 3.0
"""Time after which a port that refuses connections counts as a dead process."""
_UNREACHABLE_SECONDS = 45.0
"""The same for a host that does not answer, such as during a network outage; less than the 60 s after which Ray exits."""
_RECONNECT_VARIABLE = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""Set where the GCS is restarted after a failure (GCS fault tolerance): the time that Ray waits for it."""
_REACTION_SECONDS = 8.0
"""Time after which a main thread counts as blocked in a call of Ray, which no signal interrupts; before Ray terminates the process."""
_SIGNAL = signal.SIGRTMIN + 2


class ClusterLostError(AnnealError):
    """The error of a cluster that was lost while this process was connected to it; the message names the process and its log."""

    exit_code = 1

    def __init__(self, lost: object):
        super().__init__(f"{lost} Run the same command again.")


class LostInterrupt(KeyboardInterrupt):
    """The interruption of the main thread by `Vitals`; as for a signal, no library catches it as an Exception."""


@dataclass
class _Probed:
    """A process of Ray that listens on a port."""

    name: str
    address: str
    log: str
    patience: float = _REFUSED_SECONDS
    """Seconds for which connections may be refused."""
    failing_since: float | None = None
    refused_since: float | None = None

    def connect(self) -> OSError | None:
        """Try to connect; return the error."""
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), _PROBE_SECONDS).close()
        except OSError as error:
            return error
        return None

    def probe(self) -> str | None:
        """Try to connect; return a description of the loss once the process counts as lost."""
        error, now = self.connect(), time.monotonic()
        if error is None:
            self.failing_since = self.refused_since = None
            return None
        self.failing_since = self.failing_since or now
        is_refused = isinstance(error, ConnectionRefusedError)
        self.refused_since = (self.refused_since or now) if is_refused else None
        is_dead = self.refused_since is not None and now - self.refused_since >= self.patience
        is_unreachable = now - self.failing_since >= max(self.patience, _UNREACHABLE_SECONDS)
        if not is_dead and not is_unreachable:
            return None
        return f"the cluster was lost: the {self.name} at {self.address} has exited ({error.strerror or error}). Its log: {self.log}."


class Vitals:
    """A thread that probes the processes of a cluster once a second, from before this process connects until it disconnects.

    When a process is lost, the thread interrupts the main thread with LostInterrupt, unless that thread polls `lost`. If the main
    thread does not react, because it is blocked in a call of Ray, the thread prints the error and ends this process.
    """

    def __init__(self, gcs: str | None):
        """Start the thread; call this in the main thread.

        Args:
            gcs: Address of the GCS, if it is known before connecting.
        """
        self.is_polled = False
        """True to interrupt nothing, because the main thread polls `lost`."""
        self._lost: str | None = None
        self._found, self._noticed, self._ended = threading.Event(), threading.Event(), threading.Event()
        patience = float(os.environ.get(_RECONNECT_VARIABLE, _REFUSED_SECONDS))
        log = "gcs_server.out in the logs of Ray's session on the head node"
        self._gcs = _Probed("GCS", gcs or "", log, patience)
        self._probed = [self._gcs] if gcs else []
        signal.signal(_SIGNAL, self._interrupt)
        threading.Thread(target=self._watch, name="vitals", daemon=True).start()

    def connected(self, *, is_local: bool) -> None:
        """Also probe the raylet of this process's node, and name the logs of both processes."""
        context = ray.get_runtime_context()
        self._gcs.address = context.gcs_address
        self._gcs.log = f"{ray_logs() / 'gcs_server.out'}{'' if is_local else ' on the head node'}"
        self._probed = [self._gcs]  # the next line asks it
        here = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
        raylet = f"{here['NodeManagerAddress']}:{here['NodeManagerPort']}"
        # The GCS first: a head node stops its raylet if its GCS dies.
        self._probed = [self._gcs, _Probed("raylet of this node", raylet, f"{ray_logs() / 'raylet.out'}")]

    def end(self) -> None:
        """End the thread; nothing is interrupted any more."""
        self._ended.set()
        self._noticed.set()

    @property
    def lost(self) -> str | None:
        """Describe the first process that is gone, with its log; None if none is."""
        if self._lost:
            self._noticed.set()
        return self._lost

    @property
    def is_answering(self) -> bool:
        """Return whether all processes answer now: calls to a lost GCS block until Ray terminates this process."""
        return all(process.connect() is None for process in self._probed)

    def diagnose(self) -> str | None:
        """Wait until a process that accepts no connections counts as lost, and describe it: it explains an error of Ray best."""
        self._found.wait(2 * _REFUSED_SECONDS)
        return self.lost

    def _watch(self) -> None:
        while self._lost is None:
            if self._ended.wait(_PROBE_SECONDS):
                return
            self._lost = next(filter(None, (process.probe() for process in self._probed)), None)
        self._found.set()
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, _SIGNAL)
        if not self._noticed.wait(_REACTION_SECONDS):
            write_to_screen(f"error: {ClusterLostError(self._lost)}\n")
            exit_at_once(ClusterLostError.exit_code)

    def _interrupt(self, *_: object) -> None:
        if not (self.is_polled or self._ended.is_set() or is_stopping()):
            raise LostInterrupt(self._lost)
