"""Detect out-of-memory and shared-memory errors, without importing torch, and build their messages."""

import re
from collections.abc import Sequence
from pathlib import Path

from training.planning.memory import Saving, describe_savings
from utils.errors import first_line
from utils.files import format_bytes, free_bytes

_MAX_REASON_CHARACTERS = 400

# torch 2.x raises OutOfMemoryError only from its CUDA allocator. Its CPU allocator, the CUDA driver and NCCL raise RuntimeErrors.
_TORCH_OUT_OF_MEMORY = re.compile(
    r"^.*(?:DefaultCPUAllocator: can't allocate memory|CUDA.*out of memory|Cuda failure.*out of memory).*$",
    re.MULTILINE,
)
# NCCL's misc/shmutils.cc; torch's DistBackendError contains it. Older versions of NCCL do not name the error.
_NO_SHARED_MEMORY = re.compile(
    r"Error while creating shared memory segment (\S+) \(size (\d+)\)(?!, error: (?!No space left))"
)


def out_of_memory_line(error: BaseException) -> str | None:
    """Return the line of an out-of-memory error's message that states the cause; None for any other error.

    An error counts if its type is MemoryError, an OutOfMemoryError of Ray or torch, or torch's RuntimeError with such a message.
    """
    text = str(error).strip()
    if isinstance(error, MemoryError) or any(
        kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__
    ):
        # Ray's message has forty lines with its largest processes; the first line that mentions memory states the cause.
        memory = re.search(r"^.*memory.*$", text, re.MULTILINE | re.IGNORECASE)
        return memory[0].strip() if memory else first_line(error)
    if isinstance(error, RuntimeError) and (failed := _TORCH_OUT_OF_MEMORY.search(text)):
        return failed[0].strip()
    return None


def out_of_memory_message(line: str, savings: Sequence[Saving]) -> str:
    """Return the message of a run without enough memory: its cause, and the settings that would save memory."""
    return f"out of memory: {line[:_MAX_REASON_CHARACTERS].rstrip('.')}. {describe_savings(savings)}".strip()


def shared_memory_message(error: BaseException) -> str | None:
    """Return the message for an NCCL error caused by full shared memory, with this node's free bytes; None for any other error."""
    found = _NO_SHARED_MEMORY.search(str(error)) if isinstance(error, RuntimeError) else None
    if found is None:
        return None
    place, needed = Path(found[1]).parent, int(found[2])
    return (
        f"{place}: shared memory is full on the node of a worker: NCCL needs {needed:,} bytes more ({format_bytes(needed)}), "
        f"and {free_bytes(place):,} are free. Remove leftover files there, or enlarge it on every node (docker run --shm-size=8g; on "
        "Kubernetes, mount an emptyDir with medium: Memory), and rerun the same command."
    )
