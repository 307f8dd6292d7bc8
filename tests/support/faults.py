"""What can happen to a run: killed at an exact place, seen through injected code, and cut off from its bucket by a proxy."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tests.support.watched_proxy import WatchedProxy

_INJECTED = Path(__file__).parent / "injected"
_LIMIT_SECONDS = 240


@dataclass(frozen=True)
class Trap:
    """A PUT of an object whose key ends with `key` is caught there and goes no further.

    `before`: no byte of it reaches the server; `midway`: half of its body's first block does; `after`: the object is
    stored, and the answer does not reach the client.
    """

    when: Literal["before", "midway", "after"]
    key: str
    sprung: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def catches(self, request: bytes) -> bool:
        """Whether a block begins the request in question."""
        method, _, rest = request.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        return method == b"PUT" and path.endswith(self.key.encode())

    def spring(self) -> None:
        """Tell that it is caught, wait until the client is dead, and drop the connection."""
        self.sprung.set()
        self.released.wait(_LIMIT_SECONDS)
        raise ConnectionAbortedError


class TrappingProxy(WatchedProxy):
    """A proxy with one trap in it, or none."""

    def __init__(self, upstream: tuple[str, int], trap: Trap | None):
        self._trap = trap
        super().__init__(upstream, bytes_per_second=1e9)

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._upstream) as server:
            talk = _Talk(server, self._trap)
            answers = threading.Thread(target=self._pump, args=(server, client, talk.answered), daemon=True)
            answers.start()
            self._pump(client, server, talk.asked)
            answers.join()


class _Talk:
    """One connection: whether the request that it carries now is the trap's."""

    def __init__(self, server: socket.socket, trap: Trap | None):
        self._server = server
        self._trap = trap
        self._caught = False

    def asked(self, block: bytes) -> None:
        """Before a block of a request is forwarded. A client sends no request before the last one's answer."""
        if self._trap is None:
            return
        body_at = 0
        if self._trap.catches(block):
            self._caught = True
            body_at = block.index(b"\r\n\r\n") + 4
        if not self._caught:
            return
        if self._trap.when == "before":
            self._trap.spring()
        if self._trap.when == "midway" and body_at < len(block):
            self._server.sendall(block[: (body_at + len(block)) // 2])
            self._trap.spring()

    def answered(self, block: bytes) -> None:
        """Before a block of an answer is forwarded; `100 Continue` is none yet."""
        if self._trap and self._caught and self._trap.when == "after" and block.startswith(b"HTTP/1.1 200"):
            self._trap.spring()


@contextmanager
def trapping_proxy(endpoint: str, trap: Trap | None) -> Iterator[str]:
    """Put a proxy in front of the server at `endpoint` (http://host:port); gives the proxy's endpoint."""
    host, _, port = endpoint.removeprefix("http://").partition(":")
    proxy = TrappingProxy((host, int(port)), trap)
    try:
        yield proxy.endpoint
    finally:
        if trap:
            trap.released.set()
        proxy.close()


def injection(ledger: Path, *, hold: str = "", sabotage: str = "") -> dict[str, str]:
    """Environment variables that bring tests/support/injected into a run; see there."""
    ledger.mkdir(parents=True)
    paths = [str(_INJECTED), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "RESUME_LEDGER": str(ledger),
        "RESUME_HOLD": hold,
        "RESUME_SABOTAGE": sabotage,
    }
