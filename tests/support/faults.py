"""Faults of a run other than those of its bucket (see bucket_proxy): held or changed by injected code, or out of disk space."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.jobs import PROJECT
from tests.support.kernel_processes import triton_directory

_INJECTED = Path(__file__).parent / "injected"


def injection(ledger: Path, *, hold: str = "", skip_restore: str = "") -> dict[str, str]:
    """Return the environment variables that inject tests/support/injected into a run; see sitecustomize.py there."""
    ledger.mkdir(parents=True)
    return {
        "PYTHONPATH": _python_path(_INJECTED),
        "RESUME_LEDGER": str(ledger),
        "RESUME_HOLD": hold,
        "RESUME_SKIP_RESTORE": skip_restore,
    }


def release(ledger: Path) -> None:
    """Let workers that `injection` holds continue, and hold no later attempt."""
    (ledger / "RELEASED").touch()


@dataclass(frozen=True, order=True)
class ConsumedRow:
    """A row or pack that a worker consumed in an optimizer step."""

    step: int
    rank: int
    row: int


def read_ledger(directory: Path) -> list[ConsumedRow]:
    """Return the rows that the workers of one attempt consumed, from the directory that `injection` names."""
    lines = [line for path in directory.iterdir() for line in path.read_text().splitlines()]
    return [ConsumedRow(*map(int, line.split())) for line in lines]


def gpu_kernel_variables(provider: str) -> dict[str, str]:
    """Return the environment variables that give a CPU run the GPU kernels of `torch` or `liger`; see tests/support/injected."""
    return {
        "PYTHONPATH": _python_path(_INJECTED, PROJECT, triton_directory()),
        "GPU_KERNELS": provider,
        "TRITON_INTERPRET": "1",
    }


def small_shard_variables(size: int) -> dict[str, str]:
    """Return the environment variables with which a run prepares shards of `size` bytes; see tests/support/injected."""
    return {"PYTHONPATH": _python_path(_INJECTED), "ROWS_SHARD_BYTES": str(size)}


def _python_path(*directories: Path) -> str:
    return os.pathsep.join([*map(str, directories), *filter(None, [os.environ.get("PYTHONPATH")])])


def small_disk_prefix(directory: Path, size: str) -> list[str]:
    """Return the beginning of a command line that mounts a tmpfs at `directory`, visible only to the command.

    Args:
        directory: The mount point.
        size: The size, such as "16m".
    """
    mount = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"'
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    return [*unshare, "sh", "-c", mount, "sh", size, str(directory)]


@dataclass(frozen=True)
class SmallDisk:
    """A tmpfs that several commands see; it is deleted at the end of its block."""

    command: list[str]
    """Beginning of a command line that sees the disk at its mount point."""
    path: Path
    """The disk as this process sees it."""


@contextmanager
def small_disk(directory: Path, size: str) -> Iterator[SmallDisk]:
    """Mount a tmpfs at `directory` for the duration of the block, for the commands that start with `SmallDisk.command`."""
    with subprocess.Popen(
        [*small_disk_prefix(directory, size), "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdin and holder.stdout
        holder.stdin.write(b"mounted\n")
        holder.stdin.flush()
        assert holder.stdout.readline() == b"mounted\n"
        enter = [
            "nsenter",
            "--user",
            "--mount",
            "--preserve-credentials",
            f"--target={holder.pid}",
            f"--wd={PROJECT}",
        ]
        yield SmallDisk(enter, Path(f"/proc/{holder.pid}/root{directory}"))
        holder.stdin.close()


def require_small_disks(directory: Path) -> None:
    """Skip the test if unprivileged users of this machine cannot mount a tmpfs."""
    attempt = subprocess.run([*small_disk_prefix(directory, "1m"), "true"], capture_output=True, check=False)
    if attempt.returncode != 0:
        pytest.skip("unprivileged users of this machine cannot mount a tmpfs")


def fill_disk(directory: Path, *, leaving: int) -> None:
    """Write a file `filler` until only `leaving` bytes of the disk are free."""
    with suppress(OSError), (directory / "filler").open("ab", buffering=0) as filler:
        while shutil.disk_usage(directory).free > leaving:
            filler.write(bytes(4096))
