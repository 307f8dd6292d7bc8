"""Errors for want of shared memory."""

from pathlib import Path

import pytest
import torch

from tests.support.faults import require_small_disks, small_disk
from tests.support.messages import assert_names
from training.loop.memory_errors import shared_memory_message
from utils.files import free_bytes

SIZE = 9_637_888
"""Bytes of a segment of NCCL 2.21 with its default buffers."""


def nccl_error(directory: Path, cause: str) -> Exception:
    """Return the error that torch raises if NCCL cannot create a segment of shared memory in a directory."""
    return torch.distributed.DistBackendError(
        "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:317, unhandled system error (run with NCCL_DEBUG=INFO for details), "
        "NCCL version 2.21.5\nncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error. \n"
        f"Last error:\nError while creating shared memory segment {directory}/nccl-EoOvZr (size {SIZE}){cause}"
    )


@pytest.mark.parametrize("cause", ["", ", error: No space left on device (28)"])
def test_full_shared_memory_is_named_with_its_needed_and_free_bytes(cause: str, tmp_path: Path):
    directory = tmp_path / "shm"
    directory.mkdir()
    require_small_disks(directory)
    with small_disk(directory, "1m") as disk:
        disk.path.joinpath("other").write_bytes(bytes(800 * 1024))
        free = free_bytes(disk.path)
        assert 0 < free < 300 * 1024, "the tmpfs has one MiB, not the room of the disk below it"
        message = shared_memory_message(nccl_error(disk.path, cause))
    assert message
    assert_names(message, f"{disk.path}: ", f"{SIZE:,} bytes", f"{free:,} are free", "--shm-size", "rerun")


@pytest.mark.parametrize(
    "error",
    [
        nccl_error(Path("/dev/shm"), ", error: Permission denied (13)"),
        torch.distributed.DistBackendError("NCCL error: remote process exited"),
        ValueError(f"Error while creating shared memory segment /dev/shm/nccl-a (size {SIZE})"),
    ],
)
def test_other_errors_are_not_about_full_shared_memory(error: Exception):
    assert shared_memory_message(error) is None
