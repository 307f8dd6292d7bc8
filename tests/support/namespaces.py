"""A machine beside this one, as far as the kernel can make one: a network of its own, and directories that it does not see."""

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
    """What lives in it reaches this machine by one cable, and nothing else."""

    interface: str
    """The name of the cable's end, here and there."""
    host: str
    """This machine's address on it."""
    address: str
    """The other end's."""
    command: list[str]
    """The beginning of a command line that lives there."""


@contextmanager
def network_namespace(hidden: Path) -> Iterator[NetworkNamespace]:
    """One for the length of the block; skips the test where this machine lets nobody make it.

    Args:
        hidden: A directory of this machine that is empty there.
    """
    name = f"anneal{secrets.token_hex(3)}"
    network = f"10.{200 + secrets.randbelow(50)}.{secrets.randbelow(256)}"
    near, far = f"{network}.1", f"{network}.2"
    hide = 'mount -t tmpfs tmpfs "$1" && shift && exec "$@"'  # `ip netns exec` has mounts of its own
    try:
        for words in (
            f"netns add {name}",
            f"link add {name} type veth peer name {name} netns {name}",
            f"addr add {near}/30 dev {name}",
            f"link set {name} up",
            f"-n {name} addr add {far}/30 dev {name}",
            f"-n {name} link set {name} up",
            f"-n {name} link set lo up",
        ):
            done = _ip(words)
            if done.returncode != 0:
                pytest.skip(f"this machine lets nobody make networks: ip {words}: {done.stderr.strip()}")
        yield NetworkNamespace(
            name, near, far, ["ip", "netns", "exec", name, "sh", "-c", hide, "sh", str(hidden)]
        )
    finally:
        _ip(f"netns del {name}")  # and the cable with it


def _ip(words: str) -> "subprocess.CompletedProcess[str]":
    if shutil.which("ip") is None:
        pytest.skip("this machine has no `ip`")
    return subprocess.run(["ip", *words.split()], capture_output=True, text=True, check=False)
