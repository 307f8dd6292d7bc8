"""What can happen to a run besides its bucket's faults (see bucket_proxy): killed at an exact place, seen through injected code, out of disk."""

import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.jobs import PROJECT
from tests.support.kernel_processes import triton_directory

_INJECTED = Path(__file__).parent / "injected"


def injection(ledger: Path, *, hold: str = "", sabotage: str = "") -> dict[str, str]:
    """Environment variables that bring tests/support/injected into a run; see there."""
    ledger.mkdir(parents=True)
    return {
        "PYTHONPATH": _python_path(_INJECTED),
        "RESUME_LEDGER": str(ledger),
        "RESUME_HOLD": hold,
        "RESUME_SABOTAGE": sabotage,
    }


def kernels_of_gpus(provider: str) -> dict[str, str]:
    """Environment variables that make a run on CPU compute as one on a GPU does with `torch` or `liger`; see tests/support/injected."""
    return {
        "PYTHONPATH": _python_path(_INJECTED, PROJECT, triton_directory()),
        "KERNELS_OF_GPUS": provider,
        "TRITON_INTERPRET": "1",
    }


def _python_path(*directories: Path) -> str:
    return os.pathsep.join([*map(str, directories), *filter(None, [os.environ.get("PYTHONPATH")])])


def on_a_small_disk(directory: Path, size: str) -> list[str]:
    """The beginning of a command line that has a disk of its own at `directory`: "16m" large, gone with the process."""
    mount = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"'
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    return [*alone, "sh", "-c", mount, "sh", size, str(directory)]


def require_small_disks(directory: Path) -> None:
    """Skip the test where this machine lets no ordinary user make them."""
    tried = subprocess.run([*on_a_small_disk(directory, "1m"), "true"], capture_output=True, check=False)
    if tried.returncode != 0:
        pytest.skip("this machine lets no ordinary user mount a file system of its own")


def fill_disk(directory: Path, *, leaving: int) -> None:
    """Make the file `filler` there as large as it takes, so that so many bytes stay free."""
    with suppress(OSError), (directory / "filler").open("ab", buffering=0) as filler:
        while shutil.disk_usage(directory).free > leaving:
            filler.write(bytes(4096))
