"""Ports for servers that start later."""

import secrets
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

_LOWEST = 20_000  # above the ports that Ray assigns to workers by default
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_ports(count: int) -> list[int]:
    """Return ports that no process listens on.

    They are below the range from which the kernel assigns ports: there, a process of another test may get one before the server
    binds it.
    """
    end = int(_EPHEMERAL.read_text().split()[0])
    found: list[int] = []
    with ExitStack() as stack:
        while len(found) < count:
            port = _LOWEST + secrets.randbelow(end - _LOWEST)
            with suppress(OSError):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
                found.append(port)
    return found


def free_port() -> int:
    """Return a port that no process listens on; see `free_ports`."""
    return free_ports(1)[0]
