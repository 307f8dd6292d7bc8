"""Isolation that makes processes act like a second machine: a separate network and hidden directories."""

import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class NetworkNamespace:
    """A network namespace whose only link is a veth pair to this machine."""

    interface: str
    """Name of the veth interface on both ends."""
    host: str
    """Address of this machine's end."""
    address: str
    """Address of the namespace's end."""
    command: list[str]
    """Beginning of a command line that runs in the namespace."""


@contextmanager
def network_namespace(hidden: Path) -> Iterator[NetworkNamespace]:
    """Create a network namespace for the duration of the block; skip the test if this machine does not allow it.

    Args:
        hidden: A directory of this machine that is empty in the namespace.
    """
    name = f"anneal{secrets.token_hex(3)}"
    network = f"10.{200 + secrets.randbelow(50)}.{secrets.randbelow(256)}"
    near, far = f"{network}.1", f"{network}.2"
    hide = 'mount -t tmpfs tmpfs "$1" && shift && exec "$@"'  # `ip netns exec` has its own mount namespace
    try:
        for arguments in (
            f"netns add {name}",
            f"link add {name} type veth peer name {name} netns {name}",
            f"addr add {near}/30 dev {name}",
            f"link set {name} up",
            f"-n {name} addr add {far}/30 dev {name}",
            f"-n {name} link set {name} up",
            f"-n {name} link set lo up",
        ):
            completed = _ip(arguments)
            if completed.returncode != 0:
                pytest.skip(
                    f"this machine does not allow network namespaces: ip {arguments}: {completed.stderr.strip()}"
                )
        yield NetworkNamespace(
            name, near, far, ["ip", "netns", "exec", name, "sh", "-c", hide, "sh", str(hidden)]
        )
    finally:
        _ip(f"netns del {name}")  # deletes the veth pair too


def _ip(arguments: str) -> "subprocess.CompletedProcess[str]":
    if shutil.which("ip") is None:
        pytest.skip("this machine has no `ip`")
    return subprocess.run(["ip", *arguments.split()], capture_output=True, text=True, check=False)
