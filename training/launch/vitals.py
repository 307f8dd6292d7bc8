"""The watch over the Ray processes that a connected process cannot continue without: the GCS and the raylet of its node.

If one of them dies, Ray terminates the process without a message: after 15 s for the raylet, after 60 s for the GCS (Ray 2.60.0).
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil
import ray

from training.loop.ray_internals import LocalProcess, local_processes, ray_logs
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
_REACTION_SECONDS = 6.0
"""Time after which a main thread counts as blocked in a call of Ray, which no signal interrupts; before Ray terminates the process."""
_LEAVING_SECONDS = 8.0
"""Time in which a process that does not train must have disconnected: ray.shutdown takes 6 s without a GCS (Ray 2.60.0)."""
_SIGNAL = signal.SIGRTMIN + 2


class ClusterLostError(AnnealError):
    """The error of a cluster that was lost while this process was connected to it; the message names the process and its log."""

    exit_code = 1

    def __init__(self, lost: object):
        super().__init__(f"{lost} Run the same command again.")


class LostInterrupt(KeyboardInterrupt):
    """The interruption of the main thread by `Vitals`; as for a signal, no library catches it as an Exception."""


@dataclass
class _Child:
    """A process of the local cluster, which is a child of this process."""

    started: LocalProcess

    def is_answering(self) -> bool:
        """Return whether the process has not exited."""
        return self.started.process.poll() is None

    def probe(self) -> str | None:
        """Return a description of the loss if the process has exited."""
        name, process, log = self.started
        code = process.poll()
        if code is None:
            return None
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        return _describe(name, how, str(log if log.exists() else log.parent))  # the process creates it


@dataclass
class _Listener:
    """A process of an existing cluster, which listens on a port."""

    name: str
    address: str
    log: str
    patience: float = _REFUSED_SECONDS
    """Seconds for which connections may be refused."""
    failing_since: float | None = None
    refused_since: float | None = None

    def is_answering(self) -> bool:
        """Return whether the process accepts a connection now."""
        return self._connect() is None

    def probe(self) -> str | None:
        """Try to connect; return a description of the loss once the process counts as lost."""
        error, now = self._connect(), time.monotonic()
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
        return _describe(f"{self.name} at {self.address}", error.strerror or str(error), self.log)

    def _connect(self) -> OSError | None:
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), _PROBE_SECONDS).close()
        except OSError as error:
            return error
        return None


def _describe(process: str, how: str, log: str) -> str:
    return f"the cluster was lost: the {process} has exited ({how}). Its log: {log}."


def processes_below_raylet() -> list[psutil.Process]:
    """Return the processes that the raylet of the local cluster has started; none if it has exited."""
    found: list[psutil.Process] = []
    for started in local_processes():
        if started.name == "raylet":
            with suppress(psutil.NoSuchProcess):
                found += psutil.Process(started.process.pid).children(recursive=True)
    return found


def kill(processes: Sequence[psutil.Process]) -> None:
    """Kill processes with SIGKILL. Without a GCS, Ray's agents would live for another minute."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


class Vitals:
    """A thread that probes the processes of a cluster once a second, from before this process connects until it disconnects.

    When a process is lost, the thread interrupts the main thread with LostInterrupt, unless that thread polls `lost`. If the main
    thread does not react, because it is blocked in a call of Ray, or does not disconnect in time, the thread prints the error and
    ends this process.
    """

    def __init__(self, gcs: str | None):
        """Start the thread; call this in the main thread.

        Args:
            gcs: Address of the GCS of an existing cluster; None for a local one, and behind a client such as anyscale://.
        """
        self.is_polled = False
        """True to interrupt nothing, because the main thread polls `lost`."""
        self._lost: str | None = None
        self._found, self._noticed = threading.Event(), threading.Event()
        self._ended, self._left = threading.Event(), threading.Event()
        patience = float(os.environ.get(_RECONNECT_VARIABLE, _REFUSED_SECONDS))
        log = "gcs_server.out in the logs of Ray's session on the head node"
        self._listeners = [_Listener("GCS", gcs, log, patience)] if gcs else []
        signal.signal(_SIGNAL, self._interrupt)
        threading.Thread(target=self._watch, name="vitals", daemon=True).start()

    def connected(self) -> None:
        """Also probe the raylet of this process's node of an existing cluster, and name the logs of both processes."""
        (gcs,) = self._listeners
        context = ray.get_runtime_context()
        gcs.address = context.gcs_address
        gcs.log = f"{ray_logs() / 'gcs_server.out'} on the head node"
        here = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
        raylet = f"{here['NodeManagerAddress']}:{here['NodeManagerPort']}"
        # The GCS first: a head node stops its raylet if its GCS dies.
        self._listeners = [gcs, _Listener("raylet of this node", raylet, f"{ray_logs() / 'raylet.out'}")]

    def end(self) -> None:
        """End the probes before disconnecting; nothing is interrupted any more."""
        self._ended.set()
        self._noticed.set()

    def left(self) -> None:
        """Note that this process has disconnected."""
        self._left.set()

    @property
    def lost(self) -> str | None:
        """Describe the first process that is gone, with its log; None if none is."""
        if self._lost:
            self._noticed.set()
        return self._lost

    @property
    def is_answering(self) -> bool:
        """Return whether all processes answer now: calls to a lost GCS block until Ray terminates this process."""
        return all(process.is_answering() for process in self._processes())

    def diagnose(self) -> str | None:
        """Wait until a process that does not answer counts as lost, and describe it: it explains an error of Ray best."""
        deadline = time.monotonic() + 2 * _REFUSED_SECONDS
        while not self._found.wait(_PROBE_SECONDS) and not self.is_answering and time.monotonic() < deadline:
            pass
        return self.lost

    def raise_if_lost(self) -> None:
        """Raise ClusterLostError if `diagnose` finds a loss."""
        if lost := self.diagnose():
            raise ClusterLostError(lost)

    def _processes(self) -> Sequence[_Child | _Listener]:
        return [*map(_Child, local_processes()), *self._listeners]

    def _watch(self) -> None:
        while self._lost is None:
            if self._ended.wait(_PROBE_SECONDS):
                return
            self._lost = next(filter(None, (process.probe() for process in self._processes())), None)
        self._found.set()
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, _SIGNAL)
        if not (self._noticed.wait(_REACTION_SECONDS) and self._leaves_in_time()):
            write_to_screen(f"error: {ClusterLostError(self._lost)}\n")
            kill(processes_below_raylet())
            exit_at_once(ClusterLostError.exit_code)

    def _leaves_in_time(self) -> bool:
        """Return whether this process disconnects in time. A driver that trains must still write its result."""
        return self.is_polled or self._left.wait(_LEAVING_SECONDS)

    def _interrupt(self, *_: object) -> None:
        if not (self.is_polled or self._ended.is_set() or is_stopping()):
            raise LostInterrupt(self._lost)
